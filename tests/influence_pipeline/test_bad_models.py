"""Models and tasks of any kind give finite scores, or an error that says what is wrong with them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import influence_pipeline as ip
from tests.influence_pipeline.twelve import SOLVERS, TYPES, Net, X, Y, plain, scores, tolerance


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    return lambda: tmp_path_factory.mktemp("data") / "cache"


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cg", "exact", "lissa", "identity"])
def test_models_of_every_float_type_agree(new: Callable[[], Path], name: str) -> None:
    solver = {"solver": name} | ({} if name == "identity" else {"damping": 1.0})
    float32 = scores(new(), plain, solver=solver)
    for dtype in TYPES[1:4]:
        samples = [(x, y) for x, y in zip(X.to(dtype), Y, strict=True)]
        found = scores(new(), samples.__getitem__, functools.partial(Net, dtype), solver=solver)
        atol = max(tolerance(dtype), 0.05 * (name == "lissa")) * np.abs(float32).max()
        np.testing.assert_allclose(found, float32, atol=atol)


class Scaled(Net):
    """Has a parameter without dimensions, and one that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.idle = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Any) -> Tensor:
        return super().forward(x) * self.scale


class Mixed(Net):
    """Float32 below, double above."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers[0].to(dtype)
        self.layers[2].double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[2](torch.tanh(self.layers[0](x.to(self.layers[0].weight.dtype))).double())


def with_parameter(parameter: Tensor) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Net()
        model.register_parameter("extra", nn.Parameter(parameter))
        return model

    return make


def with_buffer(buffer: Tensor) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Net()
        model.register_buffer("extra", buffer)
        return model

    return make


@pytest.mark.parametrize("solver", [*SOLVERS[:4], {"solver": "identity"}], ids=str)
def test_a_parameter_without_dimensions_is_one_like_others(new: Callable[[], Path], solver: dict[str, Any]) -> None:
    solver = {**solver, "damping": 3.0} if solver["solver"] != "identity" else solver
    scores(new(), plain, Scaled, solver=solver)


@pytest.mark.parametrize("solver", ["identity", "cg", "exact"])
def test_models_of_several_types_are_as_precise_as_their_coarsest(new: Callable[[], Path], solver: str) -> None:
    found = scores(new(), plain, Mixed, solver={"solver": solver})
    double = scores(new(), plain, lambda: Mixed(torch.float64), solver={"solver": solver})
    np.testing.assert_allclose(found, double, atol=1e-3 * np.abs(double).max())


NO_MODEL: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "complex": (with_parameter(torch.ones(2, dtype=torch.complex64)), "extra is of torch.complex64, which is not real"),
    "meta": (with_parameter(torch.ones(2, device="meta")), "model: extra cannot be read .* has values"),
    "sparse": (with_buffer(torch.ones(3).to_sparse()), "model: extra cannot be read .* dense tensor"),
    "lazy": (lambda: nn.LazyLinear(3), "model: weight cannot be read .* lazy layers once"),
    "no entries": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 0)), "0-d|no entries|raised"),
    "no parameters": (nn.ReLU, r"'\*' matches no parameter"),
    "frozen": (lambda: Net().requires_grad_(False), "requires a gradient"),
}


@pytest.mark.parametrize(("model", "told"), NO_MODEL.values(), ids=NO_MODEL.keys())
def test_models_without_numbers_to_differentiate_are_refused(
    new: Callable[[], Path], model: Callable[[], nn.Module], told: str
) -> None:
    with pytest.raises(ip.RequestError, match=told):
        scores(new(), plain, model)


def test_a_parameter_without_entries_changes_nothing(new: Callable[[], Path]) -> None:
    np.testing.assert_array_equal(scores(new(), plain, with_parameter(torch.ones(0))), scores(new(), plain))


# ---- tasks -----------------------------------------------------------------------------------------------------------


def task_with(**members: Any) -> ip.Task:
    made: ip.Task = type("Mine", (ip.Classification,), members)()
    return made


def raising(*arguments: Any) -> Any:
    raise KeyError("nowhere")


def losses(function: Callable[[Tensor], Any]) -> dict[str, Any]:
    return {"losses": lambda self, outputs, batch: function(outputs)}


NO_TASK: dict[str, tuple[dict[str, Any], str]] = {
    "one loss": (losses(lambda o: o.mean()), r"Task.losses must return one number for each sample, .* got \(\)"),
    "no loss": (losses(lambda o: None), "Task.losses must return one number for each sample, .* got NoneType"),
    "complex": (losses(lambda o: o.sum(1) * 1j), "Task.losses must return real numbers, .* got torch.complex64"),
    "whole": (losses(lambda o: o.argmax(1)), "Task.losses must return real numbers, .* got torch.int64"),
    "twice": (losses(lambda o: o.sum(1).repeat(2)), "16 losses, its samples one at a time 16|differs by"),
    "raises": (losses(raising), r"on a batch of float32 \(8, 4\), int64 \(8,\) the model or the task raised KeyError"),
    "constant": (losses(lambda o: o.sum(1) * 0), "every gradient is zero"),
    "nan": (losses(lambda o: o.sum(1) * float("nan")), "NaN or infinite for samples 0, 1, 2"),
    "measures nothing": ({"measurements": lambda self, o, b: o}, r"Task.measurements must return .* got \(3, 3\)"),
    "labels raise": ({"labels": raising}, "in Task.labels the model or the task raised KeyError: 'nowhere'"),
    "labels are words": ({"labels": lambda self, b: "abc"}, "Task.labels must return a tensor, .* got str"),
    "labels are a list": ({"labels": lambda self, b: [1] * len(b[1])}, "Task.labels must return a tensor, .* got list"),
    "keep is a word": ({"keep": "text"}, "task.keep must be names of entries"),
    "keep is a number": ({"keep": 5}, "task.keep must be names of entries"),
    "version": ({"version": object()}, "of type object cannot be part of its identity"),
    "objects": ({"table": np.array([object()])}, "of type ndarray cannot be part of its identity"),
    "sparse": ({"table": torch.ones(3).to_sparse()}, "of type Tensor cannot be part of its identity"),
    "l2": ({"l2": 1e39}, "l2 must be a finite number .* at most 3.4e\\+38 for torch.float32, got 1e\\+39"),
    "l2 for a number": ({"l2": {1: 0.5}}, "l2 must be a finite number .* got 0.5 for 1"),
}


@pytest.mark.parametrize(("members", "told"), NO_TASK.values(), ids=NO_TASK.keys())
def test_tasks_that_measure_no_sample_are_refused(new: Callable[[], Path], members: dict[str, Any], told: str) -> None:
    task = task_with(**members)
    task.l2 = members.get("l2", 0.1)
    with pytest.raises(ip.RequestError, match=f"(?s){told}"):
        scores(new(), plain, task=task, solver={"solver": "cg"})


def test_an_error_in_a_gradient_is_shown_with_its_line(new: Callable[[], Path]) -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise KeyError("no way back")

    task = task_with(losses=lambda self, o, b: ip.Classification.losses(self, Once.apply(o), b))
    with pytest.raises(
        ip.RequestError, match=r"(?s)in the gradients of a batch of .*KeyError: 'no way back'.*line \d+: raise"
    ):
        scores(new(), plain, task=task)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_too_little_memory_is_no_mistake_of_the_request(new: Callable[[], Path], error: type[Exception]) -> None:
    def full(outputs: Tensor) -> Tensor:
        raise error("full")

    with pytest.raises(ip.WorkError, match=r"out of memory: lower runtime\.memory"):
        scores(new(), plain, task=task_with(**losses(full)))


PLAIN = st.one_of(st.none(), st.floats(), st.integers(), st.text(max_size=3), st.booleans())


@given(st.recursive(PLAIN, st.frozensets))
@example(float("nan"))
@example(frozenset({1, "a", None}))
def test_whatever_a_task_is_told_apart_by_is_the_same_every_time(value: Any) -> None:
    from influence_pipeline.cache import key_of

    assert key_of(task_with(mine=value).identity()) == key_of(task_with(mine=value).identity())
    assert key_of(task_with(mine=value).identity()) != key_of(task_with(mine=[value]).identity())
