"""What a user gets wrong ends in a message that says where, and never in a traceback."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import influence_pipeline as ip
from tests import tiny

Make = Callable[..., ip.Pipeline]


@pytest.mark.parametrize("l2", [float("nan"), float("inf"), -1.0, "0.1", {"*": -0.5}, True])
def test_an_l2_that_is_no_weight_is_refused(make: Make, l2: Any) -> None:
    with pytest.raises(ip.RequestError, match="l2 must be a finite number of at least 0"):
        make(task=ip.Classification(l2=l2)).run()


def broken() -> Any:
    raise ValueError("no data at this place")


@pytest.mark.parametrize("change", [{"train": broken}, {"model": broken}, {"tests": {"holdout": broken}}])
def test_a_function_that_raises_is_shown_with_its_line(make: Make, change: dict[str, Any]) -> None:
    with pytest.raises(ip.RequestError, match=r"(?s)ValueError: no data at this place.*line \d+: raise ValueError"):
        make(**change).run()


@pytest.mark.parametrize("store", [True, False])
def test_a_label_that_the_model_does_not_know_is_shown_in_every_stage(make: Make, store: bool) -> None:
    inputs, labels = tiny.points(60, 1).tensors
    train = TensorDataset(inputs, labels + 5)
    with pytest.raises(ip.RequestError, match="the model or the task raised IndexError: Target"):
        make(train=train, grad_z={"store": store}).run()
    with pytest.raises(ip.RequestError, match="the model or the task raised IndexError: Target"):
        make(train=train).s_test("holdout")


def test_targets_of_another_size_than_the_outputs_are_named(make: Make) -> None:
    train = TensorDataset(torch.randn(60, 6), torch.randn(60, 2))
    with pytest.raises(ip.RequestError, match=r"outputs have shape \(8, 3\) and targets \(8, 2\)"):
        make(task=ip.Regression(), train=train).run()


def test_an_operation_without_second_derivative_is_refused_with_what_would_do(make: Make) -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny.model()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Once.apply(self.inner(x))

    pipeline = make(model=Model)
    assert pipeline.grad_z().computed
    with pytest.raises(ip.RequestError, match=r"needs derivatives that this model does not give.*identity"):
        pipeline.s_test("holdout")
    assert make(model=Model, s_test={"solver": "identity"}).run()["holdout"].scores.shape == (10, 60)


def test_the_memory_that_a_refusal_names_is_enough(make: Make) -> None:
    """Of a stage: what it needs grows with what there is, since more samples are computed together."""
    refused: list[str] = []
    memory: str | int = 100
    while len(set(refused)) == len(refused):
        try:
            make(runtime={"memory": memory}).plan()
        except ip.RequestError as error:
            ((stage, memory),) = re.findall(r"^(\w+):.* needs ([\d.]+ \w+); runtime.memory is", str(error))
            refused.append(stage)
        else:
            break
    assert refused[0] == "grad_z"
    assert len(set(refused)) == len(refused)


def test_a_sample_larger_than_the_training_set_is_refused_before_anything_is_computed(make: Make, cache: Path) -> None:
    pipeline = make(s_test={"solver": "cg", "sample": 61})
    for call in (pipeline.plan, pipeline.s_test):
        with pytest.raises(ip.RequestError, match="sample = 61, and the training set has 60 samples"):
            call("holdout")
    assert not list(cache.glob("s_test/*"))
