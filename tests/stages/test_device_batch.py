"""A batch that does not fit is halved, down to one sample; what is computed stays what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stages.device_batch import DeviceBatch
from stages.grad_z import PerSample
from tests import oracles
from tests.oracles import Case, ClassTask, make

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
]


class Small(ClassTask):
    """A task on a machine that has memory for few samples only."""

    def __init__(self, most: int, error: Exception) -> None:
        super().__init__(0.1)
        self.most, self.error, self.sizes = most, error, list[int]()

    def outputs(self, model: torch.nn.Module, batch: Any) -> Tensor:
        self.sizes.append(len(batch[0]))
        if len(batch[0]) > self.most:
            raise self.error
        return super().outputs(model, batch)


def small(most: int, error: Exception) -> tuple[Case, Case]:
    """Return a problem with, and one without, enough memory."""
    base = make(oracles.mlp)
    return Case("", base.model, ClassTask(0.1), base.data), Case("", base.model, Small(most, error), base.data)


@pytest.mark.parametrize("error", ERRORS, ids=["device", "memory"])
def test_gradients_are_the_same_of_halved_batches(error: Exception) -> None:
    large, case = small(3, error)
    rows = [
        list(PerSample(c.function, c.function.losses, c.data, DeviceBatch(8)).rows(range(12))) for c in (large, case)
    ]
    torch.testing.assert_close(*(torch.cat([row.grads for row in found]) for found in rows))
    assert [len(row.grads) for row in rows[1]] == [2] * 6


@pytest.mark.parametrize("error", ERRORS, ids=["device", "memory"])
@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_products_are_the_same_of_halved_batches(kind: str, error: Exception) -> None:
    large, case = small(3, error)
    vectors = torch.randn(2, large.function.size, dtype=torch.float64)
    curvature = case.curvature(kind, 12)
    torch.testing.assert_close(curvature.product(vectors), large.curvature(kind, 12).product(vectors))
    assert curvature.batch.size == 3
    once = large.curvature(kind, 12).on(large.data.batch(range(8)))(vectors)
    torch.testing.assert_close(case.curvature(kind, 12).on(case.data.batch(range(8)))(vectors), once)


def test_a_batch_that_was_halved_stays_so() -> None:
    case = small(3, ERRORS[0])[1]
    curvature = case.curvature("ggn", 12)
    vectors = torch.randn(2, case.function.size, dtype=torch.float64)
    curvature.product(vectors)
    case.task.sizes.clear()
    curvature.product(vectors)
    assert max(case.task.sizes) == 3


@pytest.mark.parametrize("error", ERRORS, ids=["device", "memory"])
def test_one_sample_that_does_not_fit_is_told_with_what_would_help(error: Exception) -> None:
    case = small(0, error)[1]
    with pytest.raises(MemoryError, match=r"not even one sample .* fits: close other programs .* fewer parameters"):
        PerSample(case.function, case.function.losses, case.data, DeviceBatch(8)).check()


def test_other_errors_halve_nothing() -> None:
    case = small(3, ValueError("something else"))[1]
    batch = DeviceBatch(8)
    with pytest.raises(ValueError, match="something else"):
        next(batch.pieces(case.data.batch(range(8)), lambda piece: case.function.losses(case.function.params, piece)))
    assert batch.size == 8
