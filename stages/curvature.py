"""Curvature of the mean training loss: products with the Hessian or the generalised Gauss-Newton matrix.

H = (1/N) Σ ∇²L(z_i, θ) + diag(l2), or with JᵢᵀAᵢJᵢ in the place of ∇²L(z_i, θ), where Jᵢ is the Jacobian of
sample i's outputs and Aᵢ the Hessian of its loss in these outputs (Schraudolph, 2002).

Shapes: ``T`` vectors, ``D`` coordinates, ``B`` samples in a batch, ``N`` training samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from stages.batch import shapes, size
from stages.grad_z import loop, refuse_infinite
from stages.grad_z.choose import naming, refuse_memory
from stages.parameters import ModelFunction, Parameters
from stages.stage import Batch, Progress, Report, Samples, StageError, silent

Kind = Literal["hessian", "ggn"]
Product = Callable[[Tensor], Tensor]
"""(T, D) -> (T, D), linear in every row."""


@dataclass
class Curvature:
    """The matrix H over a training set, known by its products.

    Attributes:
        function: the model.
        samples: the training set.
        kind: "hessian" or "ggn".
        batch_size: samples on the device at once.
    """

    function: ModelFunction
    samples: Samples
    kind: Kind
    batch_size: int

    def __post_init__(self) -> None:
        """Resolve the quadratic penalty once."""
        self.l2 = self.function.l2()

    @property
    def dim(self) -> int:
        """D."""
        return self.function.size

    def product(self, vectors_TD: Tensor, ids: Sequence[int] | None = None, report: Report = silent) -> Tensor:
        """Return H v for each row v, (T, D), with the mean over ``ids`` (default: the whole training set).

        Raises:
            StageError: finite vectors have products that are not.
        """
        ids = range(len(self.samples)) if ids is None else ids
        total_TD = torch.zeros_like(vectors_TD)
        done = 0
        for batch in self.samples.batches(ids, self.batch_size):
            total_TD += self._sum(batch, vectors_TD)
            done += size(batch)
            report(Progress(done, len(ids), f"{self.kind} products"))
        if not torch.isfinite(total_TD).all() and torch.isfinite(vectors_TD).all():
            self.gradient()  # where that is not finite either, it names the samples
            raise StageError(
                f"curvature = {self.kind!r}: its products are NaN or infinite. Some training sample's loss has no "
                f"finite second derivative, or it is beyond {self.function.dtype}: look at the scale of inputs and "
                'losses, or use solver = "identity"'
            )
        return total_TD / len(ids) + self.l2 * vectors_TD

    def batch_product(self, batch: Batch, vectors_TD: Tensor) -> Tensor:
        """Return H v for each row v, (T, D), with the mean over one batch."""
        return self._sum(batch, vectors_TD) / size(batch) + self.l2 * vectors_TD

    def gradient(self, report: Report = silent) -> Tensor:
        """Return the gradient of the training objective, (1/N) Σ ∇L(z_i, θ) + l2·θ, (D,): zero at an optimum."""
        params = self.function.params
        total_D = torch.zeros(self.dim, dtype=torch.float64, device=self.function.device)
        done = 0
        for batch in self.samples.batches(range(len(self.samples)), self.batch_size):
            leaves = {name: parameter.detach().requires_grad_() for name, parameter in params.items()}
            ids = range(done, done + size(batch))
            with naming(f"at training samples {ids[0]} to {ids[-1]}"):
                found = torch.autograd.grad(
                    self._total_loss(leaves, batch), list(leaves.values()), allow_unused=True, materialize_grads=True
                )
            flat_D = self.function.flatten(dict(zip(leaves, found, strict=True)))
            if not torch.isfinite(flat_D).all():
                refuse_infinite(*loop.gradients(self.function, self.function.losses, batch), ids)
            total_D += flat_D
            done += size(batch)
            report(Progress(done, len(self.samples), "mean gradient"))
        return total_D / len(self.samples) + self.l2 * self.function.flatten(params)

    def _total_loss(self, params: Parameters, batch: Batch) -> Tensor:
        return self.function.losses(params, batch).sum()

    def _sum(self, batch: Batch, vectors_TD: Tensor) -> Tensor:
        """Return the sum over a batch, without the penalty.

        Raises:
            StageError: the model has an operation that lacks a derivative, or raised.
            MemoryError: there is not enough.
            OutOfMemoryError: not on the device.
        """
        try:
            return self._products(self._linear(batch), size(batch), vectors_TD)
        except StageError:
            raise
        except Exception as error:
            refuse_memory(error)
            with torch.no_grad(), naming(f"on a batch of {shapes(batch)}"):
                self.function.losses(self.function.params, batch)
            what = str(error).partition("\n")[0] or type(error).__name__
            raise StageError(
                f"curvature = {self.kind!r} needs derivatives that this model does not give "
                f"({what}): replace that operation, choose parameters behind it, or use "
                'solver = "identity"'
            ) from error

    def _products(self, one: Callable[[Parameters], Parameters], samples: int, vectors_TD: Tensor) -> Tensor:
        """Apply a linear map to each row, several at once where that pays."""

        def flat(vector_D: Tensor) -> Tensor:
            return self.function.flatten(one(self.function.unflatten(vector_D)))

        # Many vectors at once save overhead for small work and lose to memory traffic for large; the bound
        # on (samples × vectors) was measured on models of 650 to 38,000 parameters.
        together = max(512, min(16384, 2**25 // self.dim)) // samples
        if together > 1:
            products: Tensor = vmap(flat, chunk_size=together)(vectors_TD)
            return products.detach()
        return torch.stack([flat(vector_D) for vector_D in vectors_TD]).detach()

    def _linear(self, batch: Batch) -> Callable[[Parameters], Parameters]:
        """Linearise once for a batch; the result is reused by all vectors. Reverse mode only, so any model can."""
        function, params = self.function, self.function.params
        if self.kind == "hessian":
            return _transposed(grad(lambda p: self._total_loss(p, batch)), params)[1]
        outputs, backward = _transposed(lambda p: function.outputs(p, batch), params)
        outputs = outputs.detach()
        # The transpose of the transposed Jacobian is the Jacobian: a product with J by two reverse passes.
        forward = _transposed(backward, torch.zeros_like(outputs))[1]
        inner = _transposed(grad(lambda o: function.task.losses(o, batch).sum()), outputs)[1]
        return lambda vector: backward(inner(forward(vector)))


def _transposed(function: Callable[[Any], Any], at: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return a function's value at a point, and the product with its transposed Jacobian there."""
    value, pullback = vjp(function, at)[:2]
    return value, lambda cotangent: pullback(cotangent)[0]


def mean_eigenvalue(product: Product, dim: int, like: Tensor, seed: int, probes: int = 32) -> float:
    """Estimate trace / dimension by Hutchinson's probes (Hutchinson, 1990): E[vᵀHv] = tr H for random signs v.

    Args:
        product: (T, D) -> (T, D).
        dim: D.
        like: a tensor of the dtype and device to work with.
        seed: of the probes.
        probes: their number; the relative error falls with its square root, and with that of D.

    Returns:
        The estimate.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (probes, dim), generator=generator).to(like) * 2 - 1
    return float((signs * product(signs)).sum(dtype=torch.float64)) / probes / dim


def extreme_eigenvalues(product: Product, dim: int, like: Tensor, seed: int, steps: int = 24) -> tuple[float, float]:
    """Estimate the smallest and the largest eigenvalue by Lanczos' method with full reorthogonalisation.

    The extremes of the Ritz values are inside the spectrum, and converge to its ends much faster than the
    plain power iteration over the same Krylov space (Golub & Van Loan, 2013, chapter 10).

    Args:
        product: (T, D) -> (T, D), symmetric.
        dim: D.
        like: a tensor of the dtype and device to work with.
        seed: of the starting vector.
        steps: products to use, at most D.

    Returns:
        (smallest, largest).
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(dim, generator=generator, dtype=torch.float64).to(like)
    basis = [start / start.norm()]
    diagonal: list[float] = []
    off: list[float] = []
    for _ in range(min(steps, dim)):
        following = product(basis[-1].unsqueeze(0))[0]
        diagonal.append(float(following @ basis[-1]))
        for _ in range(2):
            known = torch.stack(basis)
            following = following - known.T @ (known @ following)
        norm = float(following.norm())
        if not norm > 1e-6 * max(map(abs, diagonal)):
            break
        off.append(norm)
        basis.append(following / norm)
    off = off[: len(diagonal) - 1]
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    tridiagonal += torch.diag(torch.tensor(off, dtype=torch.float64), 1)
    tridiagonal += torch.diag(torch.tensor(off, dtype=torch.float64), -1)
    ritz = torch.linalg.eigvalsh(tridiagonal)
    return float(ritz[0]), float(ritz[-1])
