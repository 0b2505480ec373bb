"""Dense float64 answers, computed without the package, and the problems that they are computed for.

Everything here differentiates the model itself, sample by sample and row by row, by plain autograd.
Shapes: ``N`` samples, ``K`` entries of one sample's outputs, ``D`` coordinates, ``T`` right-hand sides.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.curvature import Curvature
from stages.device_batch import DeviceBatch
from stages.gradients import Gradients
from stages.parameters import ModelFunction
from stages.projection import Projection
from stages.s_test.preparation import Sources
from stages.s_test.solver import Solver

CPU = torch.device("cpu")


class Data:
    """Samples in one tree of tensors, with the batch first."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree

    def __len__(self) -> int:
        tree = self.tree
        while not isinstance(tree, Tensor):
            tree = next(iter(tree.values())) if isinstance(tree, dict) else tree[0]
        return len(tree)

    def batch(self, ids: Sequence[int]) -> Any:
        index = torch.as_tensor(list(ids))

        def pick(node: Any) -> Any:
            if isinstance(node, Tensor):
                return node[index]
            if isinstance(node, dict):
                return {key: pick(value) for key, value in node.items()}
            return type(node)(pick(value) for value in node)

        return pick(self.tree)

    def batches(self, ids: Sequence[int], size: int) -> Generator[Any, None, None]:
        for start in range(0, len(ids), size):
            yield self.batch(ids[start : start + size])

    def stream(self, parts: Iterable[Sequence[int]]) -> Generator[Any, None, None]:
        for ids in parts:
            yield self.batch(ids)


class ClassTask:
    """Cross-entropy over tuples (inputs, labels)."""

    def __init__(self, l2: float | dict[str, float] = 0.0) -> None:
        self.l2 = l2

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        return functional.cross_entropy(outputs, batch[1], reduction="none")

    def measurements(self, outputs: Tensor, batch: Any) -> Tensor:
        return self.losses(outputs, batch)

    def labels(self, batch: Any) -> Tensor | None:
        return batch[1]


class SquaredTask(ClassTask):
    """Squared error, summed over outputs."""

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        return (outputs - batch[1]).square().sum(1)

    def labels(self, batch: Any) -> Tensor | None:
        return None


class WeightedTask(ClassTask):
    """Cross-entropy with a weight for each sample, over dicts in dicts."""

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch["inputs"]["x"]) * batch["inputs"]["temperature"].unsqueeze(1)

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        return batch["weight"] * functional.cross_entropy(outputs, batch["labels"], reduction="none")

    def labels(self, batch: Any) -> Tensor | None:
        return batch["labels"]


@dataclass(frozen=True)
class Case:
    """One problem: a model in ``eval()`` mode, its task and its samples."""

    name: str
    model: nn.Module
    task: ClassTask
    data: Data
    globs: tuple[str, ...] = ("*",)
    projection: Projection | None = None

    @property
    def function(self) -> ModelFunction:
        """What the package makes of it."""
        return ModelFunction(self.model, self.task, self.globs, CPU, self.projection)

    def curvature(self, kind: str, batch_size: int = 5, memory_bytes: int = 2**30) -> Curvature:
        """What the package makes of its curvature."""
        return Curvature(self.function, self.data, kind, DeviceBatch(batch_size), memory_bytes)

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that require a gradient, each tensor once."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def theta(self) -> Tensor:
        """All of them as one vector, (D,)."""
        return torch.cat([p.detach().reshape(-1) for p in self.parameters])


# ---- the problems ------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """One weight used twice, and named twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class WithUnused(nn.Module):
    """A parameter, between two others, that the outputs do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.ghost = nn.Parameter(torch.ones(5))
        self.second = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sigmoid(self.first(x)))


def _model(*layers: nn.Module) -> nn.Module:
    return (layers[0] if len(layers) == 1 else nn.Sequential(*layers)).double().eval()


def _labelled(count: int, *shape: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(count, *shape, dtype=torch.float64), torch.randint(0, classes, (count,))


def softmax_regression() -> Case:
    return Case("softmax-regression", _model(nn.Linear(4, 3)), ClassTask(0.03), Data(_labelled(12, 4)))


def mlp() -> Case:
    model = _model(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return Case("mlp-tanh", model, ClassTask({"0.weight": 0.1, "2.*": 0.02}), Data(_labelled(12, 4)))


def conv() -> Case:
    model = _model(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))
    return Case("conv-relu", model, ClassTask(0.01), Data(_labelled(11, 1, 6, 6)))


def regression() -> Case:
    data = Data((torch.randn(13, 4, dtype=torch.float64), torch.randn(13, 2, dtype=torch.float64)))
    return Case("regression", _model(nn.Linear(4, 3), nn.Softplus(), nn.Linear(3, 2)), SquaredTask(0.05), data)


def tied() -> Case:
    return Case("tied-weights", _model(Tied()), ClassTask(0.02), Data(_labelled(12, 4, classes=4)))


def unused() -> Case:
    return Case("unused-parameter", _model(WithUnused()), ClassTask(0.02), Data(_labelled(12, 4)))


def batch_norm() -> Case:
    model = _model(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3))
    model.train()
    with torch.no_grad():
        model(3 + 2 * torch.randn(32, 4, dtype=torch.float64))
    return Case("batch-norm", model.eval(), ClassTask(), Data(_labelled(12, 4)))


def dict_batches() -> Case:
    x, labels = _labelled(12, 4)
    inputs = {"x": x, "temperature": 0.5 + torch.rand(12, dtype=torch.float64)}
    data = Data({"inputs": inputs, "labels": labels, "weight": 0.1 + torch.rand(12, dtype=torch.float64)})
    return Case("dict-batches", _model(nn.Linear(4, 3, bias=False)), WeightedTask(0.04), data)


MAKERS = (softmax_regression, mlp, conv, regression, tied, unused, batch_norm, dict_batches)
_made: dict[Callable[[], Case], Case] = {}


def make(maker: Callable[[], Case]) -> Case:
    """Make a case, the same one every time and in any order."""
    if maker not in _made:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(MAKERS.index(maker))
            _made[maker] = maker()
    return _made[maker]


CASES = [pytest.param(make(maker), id=make(maker).name) for maker in MAKERS]


# ---- dense answers -----------------------------------------------------------------------------------------------


def flat_grad(value: Tensor, parameters: Sequence[Tensor], *, again: bool = False) -> Tensor:
    """Return the gradient of a number as one vector, (D,), zero for what it does not depend on."""
    if not value.requires_grad:
        return torch.zeros(sum(p.numel() for p in parameters), dtype=value.dtype)
    grads = torch.autograd.grad(value, parameters, create_graph=again, retain_graph=True, allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
    return torch.cat([part.reshape(-1) for part in parts])


def sample_losses(case: Case) -> list[Tensor]:
    """Return each sample's loss, computed alone, with its graph."""
    found = []
    for i in range(len(case.data)):
        batch = case.data.batch([i])
        found.append(case.task.losses(case.task.outputs(case.model, batch), batch)[0])
    return found


def gradients(case: Case) -> Tensor:
    """Return G, (N, D)."""
    return torch.stack([flat_grad(loss, case.parameters).detach() for loss in sample_losses(case)])


def penalty(case: Case) -> Tensor:
    """Return the weight of the quadratic penalty on each coordinate, (D,), from the task's l2."""
    l2, parts = case.task.l2, []
    for name, parameter in case.model.named_parameters():
        if not parameter.requires_grad:
            continue
        weight = l2
        if isinstance(l2, dict):
            weight = next((w for glob, w in l2.items() if glob.rstrip("*") == name[: len(glob.rstrip("*"))]), 0.0)
        parts.append(torch.full((parameter.numel(),), weight, dtype=torch.float64))
    return torch.cat(parts)


def hessian(case: Case) -> Tensor:
    """Return the Hessian of the mean loss plus the penalty's, (D, D), row by row."""
    mean = torch.stack(sample_losses(case)).mean()
    gradient = flat_grad(mean, case.parameters, again=True)
    rows = [flat_grad(entry, case.parameters).detach() for entry in gradient]
    return torch.stack(rows) + torch.diag(penalty(case))


def sample_ggns(case: Case) -> Tensor:
    """Return JᵢᵀAᵢJᵢ of each sample, (N, D, D), with explicit Jᵢ (K, D) and Aᵢ (K, K)."""
    found = []
    for i in range(len(case.data)):
        batch = case.data.batch([i])
        outputs = case.task.outputs(case.model, batch)
        jacobian = torch.stack([flat_grad(o, case.parameters).detach() for o in outputs.reshape(-1)])
        inner = torch.autograd.functional.hessian(
            lambda o, batch=batch, like=outputs: case.task.losses(o.reshape(like.shape), batch).sum(),
            outputs.detach().reshape(-1),
        )
        found.append(jacobian.T @ inner @ jacobian)
    return torch.stack(found)


def ggn(case: Case) -> Tensor:
    """Return (1/N) Σ JᵢᵀAᵢJᵢ plus the penalty's Hessian, (D, D)."""
    return sample_ggns(case).mean(0) + torch.diag(penalty(case))


def corrected(whole: Tensor, parts: Tensor, grads_ND: Tensor) -> Tensor:
    """Return what gives the Newton step without each sample when it is multiplied by (N H)⁻¹, (N, D).

    Args:
        whole: H with everything that is added to it, (D, D).
        parts: JᵢᵀAᵢJᵢ, (N, D, D).
        grads_ND: gradients.
    """
    whole = len(parts) * whole
    return torch.stack([whole @ torch.linalg.solve(whole - p, g) for p, g in zip(parts, grads_ND, strict=True)])


def dense(case: Case, kind: str) -> Tensor:
    """Return H of this kind, (D, D)."""
    return {"hessian": hessian, "ggn": ggn}[kind](case)


def second_moments(case: Case, kind: str, draw: Callable[[Tensor, Any, int], Any] | None = None) -> Tensor:
    """Return the K-FAC or EK-FAC matrix with the penalty's Hessian, (D, D), with every Kronecker product formed.

    Args:
        case: whose layers are linear ones, convolutions and tables, which have factors where they are called, with the
            bias where it has the weight's l2; all else has the diagonal.
        kind: "kfac" or "ekfac".
        draw: gives the batch of one sample, with its outputs and number, other targets; by default its own are taken.
    """
    kinds = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding
    layers = {module: name for name, module in case.model.named_modules() if isinstance(module, kinds)}
    names = [name for name, p in case.model.named_parameters() if p.requires_grad]
    starts = dict(zip(names, np.cumsum([0, *(p.numel() for p in case.parameters)]).tolist(), strict=False))
    met: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {module: [] for module in layers}
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    hooks = [m.register_forward_hook(lambda m, args, out: calls.append((m, args[0], out))) for m in layers]
    count, rows = len(case.data), []
    for i in range(count):
        calls.clear()
        batch = case.data.batch([i])
        outputs = case.task.outputs(case.model, batch)
        if draw is None:
            loss = case.task.losses(outputs, batch)[0]
        else:
            loss = case.task.sampled_losses(outputs, draw(outputs.detach(), batch, i))[0]
        rows.append(flat_grad(loss, case.parameters).detach())
        of_outputs = torch.autograd.grad(loss, [out for _, _, out in calls])
        for (module, inputs, _), grads in zip(calls, of_outputs, strict=True):
            met[module].append((inputs.detach(), grads))
    for hook in hooks:
        hook.remove()
    rows_ND = torch.stack(rows)
    total = torch.diag(rows_ND.square().mean(0))
    l2 = penalty(case)
    for module, name in layers.items():
        bias = starts.get(f"{name}.bias")
        with_bias = bias is not None and bool(l2[bias] == l2[starts[f"{name}.weight"]])
        found = _factors_of(module, starts[f"{name}.weight"], bias if with_bias else None, met[module])
        for places, left, right, positions in found:
            left, right = left / positions, right / count
            whole = torch.kron(left, right)
            if kind == "ekfac":
                units = torch.eye(len(right), dtype=right.dtype)
                basis = units if isinstance(module, nn.Embedding) else torch.linalg.eigh(right)[1]
                vectors = torch.kron(torch.linalg.eigh(left)[1].contiguous(), basis.contiguous())
                whole = vectors @ torch.diag((rows_ND[:, places] @ vectors).square().mean(0)) @ vectors.T
            total[places.unsqueeze(1), places] = whole
    return total + torch.diag(l2)


def _factors_of(
    module: nn.Module, start: int, bias: int | None, calls: list[tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor, Tensor, int]]:
    """Return, for each group of a layer, its coordinates (O · I,), Σ g gᵀ and Σ a aᵀ, and the number of positions."""
    seen, back = [], []
    for inputs, grads in calls:
        if isinstance(module, nn.Embedding):
            keep = inputs.reshape(-1) != (-1 if module.padding_idx is None else module.padding_idx)
            seen.append(functional.one_hot(inputs.reshape(-1), module.num_embeddings)[keep].double())
            back.append(grads.reshape(-1, grads.shape[-1])[keep])
        elif isinstance(module, nn.Linear):
            seen.append(inputs.reshape(-1, inputs.shape[-1]))
            back.append(grads.reshape(-1, grads.shape[-1]))
        else:
            image = inputs if inputs.ndim == 4 else inputs.unsqueeze(2)
            options = ((1, *o) if inputs.ndim == 3 else o for o in (module.kernel_size, module.dilation))
            padding, stride = module.padding, module.stride
            if inputs.ndim == 3:
                padding, stride = (0, *padding), (1, *stride)
            patches = functional.unfold(image, *options, padding=padding, stride=stride)
            seen.append(patches[0].T)
            back.append(grads.flatten(2)[0].T)
    if not seen:
        return []
    a, g = torch.cat(seen), torch.cat(back)
    weight, groups = module.weight, getattr(module, "groups", 1)
    inputs, outputs = a.shape[1] // groups, g.shape[1] // groups
    found = []
    for group in range(groups):
        part, own = a[:, group * inputs : (group + 1) * inputs], g[:, group * outputs : (group + 1) * outputs]
        places = start + torch.arange(weight.numel())
        places = places.view(inputs, outputs).T if isinstance(module, nn.Embedding) else places.view(-1, inputs)
        places = places[group * outputs : (group + 1) * outputs]
        if bias is not None:
            part = torch.cat([part, torch.ones(len(part), 1, dtype=part.dtype)], dim=1)
            of_bias = bias + torch.arange(group * outputs, (group + 1) * outputs)
            places = torch.cat([places, of_bias.unsqueeze(1)], dim=1)
        found.append((places.flatten(), own.T @ own, part.T @ part, len(own)))
    return found


def solution(matrix: Tensor, damping: float, rhs_TD: Tensor) -> Tensor:
    """Return (H + λI)⁻¹ v for each row v, (T, D)."""
    return torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype), rhs_TD.T).T


def ranking(scores: Sequence[float], ids: Sequence[int], k: int, *, largest: bool) -> list[int]:
    """Return the ids of the k largest or smallest scores in order, equal ones by ascending id."""
    sign = -1 if largest else 1
    return [i for _, i in sorted(zip((sign * float(s) for s in scores), map(int, ids), strict=True))[:k]]


# ---- running the package without its machine -----------------------------------------------------------------------


def prepared(solver: Solver, curvature: Curvature, parts: int = 3, band: int | None = None) -> dict[str, Any]:
    """Run a solver's preparation, block by block, into NumPy arrays, with what comes before it."""
    before: dict[str, Any] = {}
    for one in solver.chain():
        stage = one.preparing(
            Sources(
                *(curvature, before, _no_gradients),
                parts=lambda length, summed: parts,
                band=lambda axis, otherwise: band or otherwise,
            ),
            curvature.memory_bytes,
        )
        arrays = {spec.name: np.full(spec.shape, np.nan) for spec in stage.arrays}
        for block in stage.grid:
            found = stage.compute(block)
            for spec in stage.arrays:
                arrays[spec.name][spec.region(stage.grid, block)] = found[spec.name]
        before = {**before, **arrays, **stage.finish(arrays)}
    return before


def _no_gradients(whole_rows: bool) -> Gradients:
    raise AssertionError("there is no cache")
