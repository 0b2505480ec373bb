"""Curvature of the mean training loss: products with the Hessian or the generalised Gauss-Newton matrix.

H = (1/N) Σ ∇²L(z_i, θ) + diag(l2), or with JᵢᵀAᵢJᵢ in the place of ∇²L(z_i, θ), where Jᵢ is the Jacobian of
sample i's outputs and Aᵢ the Hessian of its loss in these outputs (Schraudolph, 2002).

Shapes: ``T`` vectors, ``D`` coordinates, ``B`` samples in a batch, ``N`` training samples.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from stages import work
from stages.batch import only_tensors, shapes, size, split
from stages.device_batch import DeviceBatch, refuse_memory
from stages.grad_z import loop, refuse_infinite
from stages.grad_z.choose import naming, relative_difference, tolerance
from stages.jacobian import ggn_products
from stages.parameters import ModelFunction, Parameters
from stages.stage import Batch, Progress, Report, Samples, StageError, silent

log = logging.getLogger(__name__)

Kind = Literal["hessian", "ggn"]
Product = Callable[[Tensor], Tensor]
"""(T, D) -> (T, D), linear in every row."""
PROBES = 8
"""Samples on which two ways to the same products are compared."""


@dataclass
class Curvature:
    """The matrix H over a training set, known by its products.

    Attributes:
        function: the model.
        samples: the training set.
        kind: "hessian" or "ggn".
        batch: samples on the device at once.
        memory_bytes: what all work may hold, of which products take a part.
    """

    function: ModelFunction
    samples: Samples
    kind: Kind
    batch: DeviceBatch
    memory_bytes: int
    _work: dict[str, work.Work] = field(init=False, default_factory=dict)
    _jacobian: bool | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Resolve the quadratic penalty once."""
        self.l2 = self.function.l2()

    @property
    def dim(self) -> int:
        """D."""
        return self.function.size

    @property
    def batch_size(self) -> int:
        """Samples on the device at once."""
        return self.batch.size

    @functools.cached_property
    def few(self) -> work.Work:
        """The work of a few samples, with what the model keeps of each; nothing where the model raises.

        Raises:
            MemoryError: not even these fit.
        """
        return work.of_samples(self.function, self.samples)

    @property
    def together(self) -> int:
        """Numbers in the largest array that products make, where that is for them to choose."""
        return work.together(self.dim, self.kind, self.memory_bytes, self.function.dtype.itemsize)

    @property
    def product_bytes(self) -> int:
        """What products hold at most, beside vectors as many as theirs.

        The sum and what is added to it are two arrays of the vectors' size, and one sample's Jacobian may be a third.
        """
        few, batch = self.few, self.batch.size
        numbers = max(self.together, batch * few.widest // few.samples)
        kept = few.kept(self.kind, self.function.device)
        return work.ARRAYS[self.kind] * numbers * self.function.dtype.itemsize + batch * kept

    def product(self, vectors_TD: Tensor, ids: Sequence[int] | None = None, report: Report = silent) -> Tensor:
        """Return H v for each row v, (T, D), with the mean over ``ids`` (default: the whole training set).

        Raises:
            StageError: finite vectors have products that are not.
        """
        ids = range(len(self.samples)) if ids is None else ids
        total_TD = torch.zeros_like(vectors_TD)
        done = 0
        with closing(self.samples.batches(ids, self.batch_size)) as batches:
            for whole in batches:
                for batch, found_TD in self.batch.pieces(whole, lambda batch: self._sum(batch)(vectors_TD)):
                    total_TD += found_TD
                    done += size(batch)
                    report(Progress(done, len(ids), f"{self.kind} products"))
                    del found_TD
        if not torch.isfinite(total_TD).all() and torch.isfinite(vectors_TD).all():
            self.gradient()  # where that is not finite either, it names the samples
            raise StageError(
                f"curvature = {self.kind!r}: its products are NaN or infinite. Some training sample's loss has no "
                f"finite second derivative, or it is beyond {self.function.dtype}: look at the scale of inputs and "
                'losses, or use solver = "identity"'
            )
        return total_TD.div_(len(ids)).addcmul_(self.l2, vectors_TD)

    def on(self, batch: Batch) -> Product:
        """Return what multiplies by H with the mean over one batch, which is linearised once for all products."""
        count, whole = size(batch), self._sum(batch)

        def product(vectors_TD: Tensor) -> Tensor:
            pieces = self.batch.pieces(batch, lambda p: (whole if p is batch else self._sum(p))(vectors_TD))
            total_TD = next(pieces)[1]
            for _, found_TD in pieces:
                total_TD += found_TD
            return total_TD.div_(count).addcmul_(self.l2, vectors_TD)

        return product

    def gradient(self, report: Report = silent) -> Tensor:
        """Return the gradient of the training objective, (1/N) Σ ∇L(z_i, θ) + l2·θ, (D,): zero at an optimum."""
        params = self.function.params
        total_D = torch.zeros(self.dim, dtype=torch.float64, device=self.function.device)
        done = 0

        def summed(batch: Batch) -> Tensor:
            leaves = {name: parameter.detach().requires_grad_() for name, parameter in params.items()}
            with naming(f"at training samples {done} to {done + size(batch) - 1}"):
                found = torch.autograd.grad(
                    self._total_loss(leaves, batch), list(leaves.values()), allow_unused=True, materialize_grads=True
                )
            return self.function.flatten(dict(zip(leaves, found, strict=True)))

        with closing(self.samples.batches(range(len(self.samples)), self.batch_size)) as batches:
            for whole in batches:
                for batch, flat_D in self.batch.pieces(whole, summed):
                    ids = range(done, done + size(batch))
                    if not torch.isfinite(flat_D).all():
                        refuse_infinite(*loop.gradients(self.function, self.function.losses, batch), ids)
                    total_D += flat_D
                    done += size(batch)
                    report(Progress(done, len(self.samples), "mean gradient"))
        return total_D / len(self.samples) + self.l2 * self.function.flatten(params)

    def _total_loss(self, params: Parameters, batch: Batch) -> Tensor:
        return self.function.losses(params, batch).sum()

    def _sum(self, batch: Batch) -> Product:
        """Return what multiplies by the sum over a batch, without the penalty; its results are the caller's to change.

        The product raises StageError where the model has an operation that lacks a derivative, or raised; and
        MemoryError or OutOfMemoryError where there is not enough memory.
        """
        linear: Callable[[Parameters], Parameters] | None = None

        def products(vectors_TD: Tensor) -> Tensor:
            nonlocal linear
            try:
                sizes = self._sizes(batch)
                if self._by_jacobian(sizes, batch, vectors_TD):
                    return ggn_products(self.function, batch, vectors_TD, sizes.samples_together(self.together))
                linear = linear or self._linear(batch)
                return self._products(linear, sizes.vectors_together(self.together), vectors_TD)
            except StageError:
                raise
            except Exception as error:
                linear = None
                refuse_memory(error)
                with torch.no_grad(), naming(f"on a batch of {shapes(batch)}"):
                    self.function.losses(self.function.params, batch)
                what = str(error).partition("\n")[0] or type(error).__name__
                raise StageError(
                    f"curvature = {self.kind!r} needs derivatives that this model does not give "
                    f"({what}): replace that operation, choose parameters behind it, or use "
                    'solver = "identity"'
                ) from error

        return products

    def _sizes(self, batch: Batch) -> work.Work:
        """Count the work once for all batches of these shapes."""
        key = shapes(batch)
        if key not in self._work:
            self._work[key] = work.count(self.function, batch)
        return self._work[key]

    def _by_jacobian(self, sizes: work.Work, batch: Batch, vectors_TD: Tensor) -> bool:
        """Say whether to multiply by the Jacobian: where that pays, and was once found to be right."""
        if self.kind != "ggn" or not sizes.jacobian_pays(len(vectors_TD), self.together) or not only_tensors(batch):
            return False
        if self._jacobian is None:
            self._jacobian = self._jacobian_is_right(batch, vectors_TD[:2])
        return self._jacobian

    def _jacobian_is_right(self, batch: Batch, vectors_TD: Tensor) -> bool:
        """Compare both ways on a few samples."""
        tensors, join = split(batch)
        few = join([tensor[:PROBES] for tensor in tensors])
        expected = self._products(self._linear(few), 1, vectors_TD)
        try:
            found = ggn_products(self.function, few, vectors_TD, PROBES)
        except Exception as error:  # noqa: BLE001 - vmap's refusals have many types; the linearisation is always right
            refuse_memory(error)
            log.info("products without the Jacobian: vmap cannot follow this model (%s)", str(error).split("\n")[0])
            return False
        difference = relative_difference(found, expected)
        if not difference <= tolerance(self.function, self.function.losses, few):
            log.warning("products without the Jacobian: they differ by %.2g", difference)
            return False
        return True

    def _products(self, one: Callable[[Parameters], Parameters], together: int, vectors_TD: Tensor) -> Tensor:
        """Apply a linear map to each row, some at once."""

        def flat(vector_D: Tensor) -> Tensor:
            return self.function.flatten(one(self.function.unflatten(vector_D)))

        found_TD = torch.empty_like(vectors_TD)
        for rows, into in zip(torch.split(vectors_TD, together), torch.split(found_TD, together), strict=True):
            into.copy_(vmap(flat)(rows) if len(rows) > 1 else flat(rows[0]))
        return found_TD

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
