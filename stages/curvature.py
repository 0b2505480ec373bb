"""Curvature of the mean training loss: products with the Hessian or the generalised Gauss-Newton matrix.

H = (1/N) Σ ∇²L(z_i, θ) + diag(l2), or with JᵢᵀAᵢJᵢ in the place of ∇²L(z_i, θ), where Jᵢ is the Jacobian of
sample i's outputs and Aᵢ the Hessian of its loss in these outputs (Schraudolph, 2002).

Shapes: ``T`` vectors, ``D`` coordinates, ``B`` samples in a batch, ``N`` training samples.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from stages import work
from stages.batch import only_tensors, shapes, size, split
from stages.device_batch import DeviceBatch, refuse_memory
from stages.grad_z import PerSample, loop, refuse_infinite
from stages.grad_z.choose import PROBES, advice, compared, hooked, naming, reason, relative_difference, tolerance
from stages.grad_z.hooks import Hooks
from stages.jacobian import Linearised, ggn_products, linearised
from stages.parameters import ModelFunction, Parameters
from stages.stage import Batch, Progress, Report, Samples, StageError, silent

log = logging.getLogger(__name__)

T = TypeVar("T")

Kind = Literal["hessian", "ggn"]
Product = Callable[[Tensor], Tensor]
"""(T, D) -> (T, D), linear in every row."""
Repeated = Callable[..., Tensor]
"""A product that takes a report, too."""
UNITS = 64
"""Unit vectors that are multiplied together for a matrix that the Jacobian does not give."""
BASIS_ENTRIES = 2**27
"""Of all vectors of a Krylov space that are held at once."""
KEPT_PART = 4
"""A Jacobian that is kept between products has one part in so many of the memory at most."""


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
    _hooks: Hooks | None = field(init=False, default=None)

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

    @functools.cached_property
    def per_sample(self) -> PerSample:
        """Gradients of the training losses, of which the technique is chosen once."""
        return PerSample(self.function, self.function.losses, self.samples, self.batch)

    @functools.cached_property
    def hooks(self) -> Hooks:
        """Layer hooks for all parameters whose training gradients they follow, whether or not that is the fastest."""
        technique = self.per_sample.technique
        if isinstance(technique, Hooks):
            return technique
        probes = self.samples.batch(self.per_sample.probes)
        chosen = DeviceBatch(PROBES).pieces(probes, lambda few: hooked(self.function, self.function.losses, few))
        return next(chosen)[1]

    @property
    def together(self) -> int:
        """Numbers in the largest array that products make, where that is for them to choose."""
        return work.together(self.function.entries, self.kind, self.memory_bytes, self.function.dtype.itemsize)

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
        return self.total(vectors_TD, ids, report).div_(len(ids)).addcmul_(self.l2, vectors_TD)

    def total(self, vectors_TD: Tensor, ids: Sequence[int], report: Report = silent) -> Tensor:
        """Return the sum of the products over some samples, without the penalty, (T, D).

        Raises:
            StageError: finite vectors have products that are not.
        """
        total_TD = torch.zeros_like(vectors_TD)
        every = self.pieces(ids, lambda batch, now: self._sum(batch)(vectors_TD), f"{self.kind} products", report)
        for _, _, found_TD in every:
            total_TD += found_TD
            del found_TD
        self._refuse_infinite(total_TD, vectors_TD, ids)
        return total_TD

    def pieces(
        self, ids: Sequence[int], compute: Callable[[Batch, Sequence[int]], T], what: str, report: Report
    ) -> Iterator[tuple[Batch, Sequence[int], T]]:
        """Yield what is computed of some samples, as many at once as fit, after these and their ids."""
        done = 0

        def of_these(batch: Batch) -> T:
            return compute(batch, ids[done : done + size(batch)])

        with closing(self.samples.batches(ids, self.batch_size)) as batches:
            for whole in batches:
                for batch, found in self.batch.pieces(whole, of_these):
                    yield batch, ids[done : done + size(batch)], found
                    del found  # before more is computed
                    done += size(batch)
                    report(Progress(done, len(ids), what))

    def over(self, ids: Sequence[int]) -> Repeated:
        """Return what multiplies by H with the mean over ``ids`` again and again.

        The Jacobian of these samples is made once and kept where it is small enough; that depends on sizes alone.
        """
        kept: list[Linearised] | None = None

        def product(vectors_TD: Tensor, report: Report = silent) -> Tensor:
            nonlocal kept
            if kept is None:
                kept = self._jacobian_of(ids, vectors_TD)
            if not kept:
                return self.product(vectors_TD, ids, report)
            total_TD = torch.zeros_like(vectors_TD)
            for part in kept:
                part.add_products(vectors_TD, total_TD)
            report(Progress(len(ids), len(ids), f"{self.kind} products"))
            self._refuse_infinite(total_TD, vectors_TD, ids)
            return total_TD.div_(len(ids)).addcmul_(self.l2, vectors_TD)

        return product

    def kept_bytes(self, count: int) -> int:
        """Return what :meth:`over` keeps of ``count`` samples, at most; nothing where it does not pay or fit."""
        numbers = count * self.few.outputs * self.dim * self.function.dtype.itemsize
        pays = self.kind == "ggn" and self.few.kept_jacobian_pays(self.together)
        return numbers if pays and numbers <= self.memory_bytes // KEPT_PART else 0

    def _jacobian_of(self, ids: Sequence[int], vectors_TD: Tensor) -> list[Linearised]:
        """Return the Jacobian of some samples, none where it is not to be kept."""
        if not self.kept_bytes(len(ids)) or not self._may_use_jacobian(self.samples.batch(ids[:PROBES]), vectors_TD):
            return []
        found: list[Linearised] = []
        with closing(self.samples.batches(ids, self.few.samples_together(self.together))) as batches:
            for whole in batches:
                for _, parts in self.batch.pieces(whole, self._linearised):
                    found += parts
        return found

    def _linearised(self, batch: Batch) -> list[Linearised]:
        return list(linearised(self.function, batch, size(batch), self._hooks))

    def _refuse_infinite(self, total_TD: Tensor, vectors_TD: Tensor, ids: Sequence[int]) -> None:
        """Refuse products that are not finite.

        Raises:
            StageError: the vectors are.
        """
        if not torch.isfinite(total_TD).all() and torch.isfinite(vectors_TD).all():
            self.gradient_sum(ids)  # where that is not finite either, it names the samples
            raise StageError(
                f"curvature = {self.kind!r}: its products are NaN or infinite. Some training sample's loss has no "
                f"finite second derivative, or it is beyond {self.function.dtype}: look at the scale of inputs and "
                'losses, or use solver = "identity"'
            )

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

    def gradient(self, sum_D: Tensor) -> Tensor:
        """Return the gradient of the training objective, (1/N) Σ ∇L(z_i, θ) + l2·θ, (D,): zero at an optimum.

        Args:
            sum_D: what :meth:`gradient_sum` gives of all samples, or the sum of what it gives of parts of them.
        """
        return sum_D / len(self.samples) + self.l2 * self.function.flatten(self.function.params)

    def gradient_sum(self, ids: Sequence[int], report: Report = silent) -> Tensor:
        """Return Σ ∇L(z_i, θ) over some samples, (D,) in double precision.

        Raises:
            StageError: some sample's gradient is NaN or infinite.
        """
        params = self.function.params
        total_D = torch.zeros(self.dim, dtype=torch.float64, device=self.function.device)

        def summed(batch: Batch, now: Sequence[int]) -> Tensor:
            leaves = {name: parameter.detach().requires_grad_() for name, parameter in params.items()}
            with naming(f"at training samples {now[0]} to {now[-1]}"):
                found = torch.autograd.grad(
                    self._total_loss(leaves, batch), list(leaves.values()), allow_unused=True, materialize_grads=True
                )
            return self.function.flatten(dict(zip(leaves, found, strict=True)))

        for batch, now, flat_D in self.pieces(ids, summed, "mean gradient", report):
            if not torch.isfinite(flat_D).all():
                refuse_infinite(*loop.gradients(self.function, self.function.losses, batch), now)
            total_D += flat_D
            del flat_D
        return total_D

    def matrix(self, ids: Sequence[int], report: Report = silent) -> Tensor:
        """Return Σ H_i over some samples, without the penalty, (D, D) in double precision.

        Raises:
            StageError: it is not finite.
        """
        signs = random_signs(2, self.dim, self.l2, seed=0)
        total_DD = torch.zeros(self.dim, self.dim, dtype=torch.float64, device=self.l2.device)
        for _, _, found_DD in self.pieces(ids, lambda batch, now: self._matrix(batch, signs), "matrix", report):
            total_DD += found_DD
            del found_DD
        self._refuse_infinite(total_DD, signs, ids)
        return total_DD

    def _matrix(self, batch: Batch, signs: Tensor) -> Tensor:
        """Return Σ H_i over a batch, (D, D)."""
        sizes = self._sizes(batch)
        total_DD = torch.zeros(self.dim, self.dim, dtype=signs.dtype, device=signs.device)
        if sizes.jacobian_fits(self.together) and self._may_use_jacobian(batch, signs):
            for part in linearised(self.function, batch, sizes.samples_together(self.together), self._hooks):
                part.add_matrix(total_DD)
            return total_DD
        product = self._sum(batch)
        for start in range(0, self.dim, UNITS):
            rows = range(start, min(start + UNITS, self.dim))
            total_DD[start : start + UNITS] = product(_units(rows, self.l2))
        return total_DD

    def forms(self, vectors_TD: Tensor, ids: Sequence[int], report: Report = silent) -> Tensor:
        """Return vᵀ Σ H_i v over some samples for each row v, without the penalty, (T,) in double precision."""
        return vectors_TD.mul(self.total(vectors_TD, ids, report)).sum(1, dtype=torch.float64)

    def mean_eigenvalue(self, forms_T: Tensor) -> float:
        """Estimate trace / D by Hutchinson's probes (Hutchinson, 1990): E[vᵀHv] = tr H for random signs v.

        Args:
            forms_T: what :meth:`forms` gives of all samples for :func:`random_signs`; of T vectors, the relative
                error falls with √T, and with √D.
        """
        return float(forms_T.mean()) / len(self.samples) / self.dim + float(self.l2.mean(dtype=torch.float64))

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
                if sizes.jacobian_pays(len(vectors_TD), self.together) and self._may_use_jacobian(batch, vectors_TD):
                    together = sizes.samples_together(self.together)
                    return ggn_products(self.function, batch, vectors_TD, together, self._hooks)
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
                    f"({what}): {advice(error) or 'replace that operation'}; or choose parameters behind it, or use "
                    'solver = "identity"'
                ) from error

        return products

    def _sizes(self, batch: Batch) -> work.Work:
        """Count the work once for all batches of these shapes."""
        key = shapes(batch)
        if key not in self._work:
            self._work[key] = work.count(self.function, batch)
        return self._work[key]

    def _may_use_jacobian(self, batch: Batch, vectors_TD: Tensor) -> bool:
        """Say whether products by the Jacobian are the same: that was once found to be right."""
        if self.kind != "ggn" or not only_tensors(batch):
            return False
        if self._jacobian is None:
            self._jacobian = self._jacobian_is_right(batch, vectors_TD[:2])
        return self._jacobian

    def _jacobian_is_right(self, batch: Batch, vectors_TD: Tensor) -> bool:
        """Find a way to the Jacobian that gives the same products on a few samples.

        That is ``vmap``, then layer hooks where these follow every parameter; hooks alone where they project.
        """
        tensors, join = split(batch)
        few = join([tensor[: compared(self.function)] for tensor in tensors])
        expected = self._products(self._linear(few), 1, vectors_TD)
        most = tolerance(self.function, self.function.losses, few)
        hooks = self.per_sample.technique
        ways = [hooks] if isinstance(hooks, Hooks) and hooks.names == frozenset(self.function.params) else []
        for way in ways if ways and self.function.projected else [None, *ways]:
            try:
                found = ggn_products(self.function, few, vectors_TD, self.few.samples_together(self.together), way)
            except Exception as error:  # noqa: BLE001 - vmap's refusals have many types; the linearisation is always right
                refuse_memory(error)
                log.info("products without the Jacobian by vmap, which cannot follow this model: %s", reason(error))
                continue
            difference = relative_difference(found, expected)
            if difference <= most:
                self._hooks = way
                return True
            log.warning("products without the Jacobian: they differ by %.2g", difference)
        return False

    def _products(self, one: Callable[[Parameters], Parameters], together: int, vectors_TD: Tensor) -> Tensor:
        """Apply a linear map to each row, some at once."""
        found_TD = torch.empty_like(vectors_TD)
        for rows, into in zip(torch.split(vectors_TD, together), torch.split(found_TD, together), strict=True):
            tangents = self.function.unflatten(rows)
            into.copy_(self.function.flatten(vmap(one)(tangents) if len(rows) > 1 else _single(one, tangents)))
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


def _units(rows: range, like_D: Tensor) -> Tensor:
    """Return some rows of the identity, (n, D)."""
    units = torch.zeros(len(rows), len(like_D), dtype=like_D.dtype, device=like_D.device)
    units[torch.arange(len(rows)), torch.arange(rows.start, rows.stop)] = 1
    return units


def _single(one: Callable[[Parameters], Parameters], tangents: Parameters) -> Parameters:
    """Apply what takes one vector to the only one of a batch, without ``vmap``."""
    return {name: found.unsqueeze(0) for name, found in one({n: t[0] for n, t in tangents.items()}).items()}


def _transposed(function: Callable[[Any], Any], at: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return a function's value at a point, and the product with its transposed Jacobian there."""
    value, pullback = vjp(function, at)[:2]
    return value, lambda cotangent: pullback(cotangent)[0]


def random_signs(count: int, dim: int, like: Tensor, seed: int) -> Tensor:
    """Return vectors of entries ±1, (count, D), of the dtype and on the device of ``like``."""
    return next(few_random_signs(count, dim, like, seed, count))


def few_random_signs(count: int, dim: int, like: Tensor, seed: int, together: int) -> Iterator[Tensor]:
    """Yield the same vectors, so many together, each part made when it is asked for."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, together):
        shape = min(together, count - start), dim
        yield torch.randint(0, 2, shape, generator=generator).to(like).mul_(2).sub_(1)


def extreme_eigenvalues(product: Product, dim: int, like: Tensor, seed: int, steps: int = 24) -> tuple[float, float]:
    """Estimate the smallest and the largest eigenvalue by Lanczos' method with full reorthogonalisation.

    The extremes of the Ritz values are inside the spectrum, and converge to its ends much faster than the
    plain power iteration over the same Krylov space (Golub & Van Loan, 2013, chapter 10).

    Args:
        product: (T, D) -> (T, D), symmetric.
        dim: D.
        like: a tensor of the dtype and device to work with.
        seed: of the starting vector.
        steps: products to use, at most D; and fewer, down to eight, where their vectors are beyond ``BASIS_ENTRIES``.

    Returns:
        (smallest, largest).
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(dim, generator=generator, dtype=torch.float64).to(like)
    basis = [start / start.norm()]
    diagonal: list[float] = []
    off: list[float] = []
    for _ in range(min(steps, dim, max(8, BASIS_ENTRIES // dim))):
        following = product(basis[-1].unsqueeze(0))[0]
        diagonal.append(float(following @ basis[-1]))
        for known in (*basis, *basis):
            following -= (known @ following) * known
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
