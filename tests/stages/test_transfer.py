"""Copies from a GPU are begun before the item after them is asked for, and waited for after that."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stages import transfer


def test_in_memory_every_tensor_comes_at_once_as_float32() -> None:
    made: list[int] = []

    def items() -> Iterator[torch.Tensor]:
        for number in range(3):
            made.append(number)
            yield torch.full((2,), number, dtype=torch.float64)

    for number, (item, copy) in enumerate(transfer.on_host(items(), lambda tensor: tensor)):
        assert made == list(range(number + 1))
        assert (item.dtype, copy.dtype) == (torch.float64, torch.float32)
        assert copy.tolist() == [number] * 2


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_from_a_gpu_a_copy_is_waited_for_when_the_next_is_under_way(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    said: list[str] = []

    def begin(values: Any) -> Any:
        said.append(f"copy {values.number}")
        return f"copy of {values.number}", lambda: said.append(f"wait {values.number}")

    def items() -> Iterator[Any]:
        for number in range(count):
            said.append(f"compute {number}")
            yield SimpleNamespace(number=number, device=SimpleNamespace(type="cuda"))

    monkeypatch.setattr(transfer, "begin_copy", begin)
    found = [copy for _, copy in transfer.on_host(items(), lambda item: item)]
    assert found == [f"copy of {number}" for number in range(count)]
    assert said[:2] == [f"{what} 0" for what in ("compute", "copy")][: 2 * count]
    for number in range(count - 1):
        assert said.index(f"copy {number + 1}") < said.index(f"wait {number}")
        if number:
            assert said.index(f"wait {number - 1}") < said.index(f"compute {number + 1}")
    assert len(said) == 3 * count


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_from_a_gpu_values_are_those_that_were_computed() -> None:
    values = [torch.randn(64, 1000, device="cuda") for _ in range(5)]
    for value, copy in transfer.on_host(values, lambda tensor: tensor * 2):
        torch.testing.assert_close(copy, (value * 2).cpu())
