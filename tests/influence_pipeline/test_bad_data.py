"""Data, models and tasks of any shape and type give finite scores, or an error that says what, where and what else."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import influence_pipeline as ip
from influence_pipeline.samples import digest
from tests.influence_pipeline.twelve import SOLVERS, TYPES, N, Net, Sample, T, X, Y, pipeline, plain, scores, tolerance


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    return lambda: tmp_path_factory.mktemp("data") / "cache"


# ---- batches ---------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["x", "y"])
CONTAINERS: dict[str, Callable[[Any, Any], Any]] = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "namedtuple": Pair,
    "dict": lambda x, y: {"x": x, "labels": y},
    "label": lambda x, y: {"label": y, "x": x},
    "OrderedDict": lambda x, y: OrderedDict(x=x, targets=y),
    "UserDict": lambda x, y: UserDict(x=x, target=y),
    "nested dict": lambda x, y: {"x": {"inner": x}, "labels": y},
    "nested UserDict": lambda x, y: UserDict(x=UserDict(inner=UserDict(inner=x)), labels=y),
    "dict in a tuple": lambda x, y: ({"inner": x}, y),
    "tuple in a tuple": lambda x, y: ((x, x), y),
    "tuple in a dict": lambda x, y: {"x": (x, {"more": x}), "labels": y},
    "with words": lambda x, y: {"x": x, "labels": y, "text": "words"},
}
LABELS: dict[str, tuple[Callable[[int], Any], bool | None]] = {
    "int": (int, True),
    "0-d": (torch.tensor, True),
    "numpy": (np.int64, True),
    "uint8": (np.uint8, True),
    "float": (float, False),
    "int8": (np.int8, False),
    "bool": (bool, False),
    "1-d": (lambda y: torch.tensor([y]), False),
    "text": (str, False),
    "nothing": (lambda y: None, False),
    "beyond int64": (lambda y: 2**70, False),
    "no class": (lambda y: y + 3, False),
    "int 1-hot": (lambda y: nn.functional.one_hot(torch.tensor(y), 3), False),
    "1-hot": (lambda y: nn.functional.one_hot(torch.tensor(y), 3).float(), None),  # None: depends on the model's type
}


GOOD = [name for name, (_, good) in LABELS.items() if good]


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS.keys())
def test_every_container_gives_the_same_scores(new: Callable[[], Path], container: Callable[[Any, Any], Any]) -> None:
    np.testing.assert_allclose(
        scores(new(), lambda i: container(*plain(i))), scores(new(), plain), rtol=1e-4, atol=1e-6
    )


@settings(max_examples=20)
@given(st.data())
def test_inputs_of_any_type_in_any_container(new: Callable[[], Path], data: st.DataObject) -> None:
    draw = data.draw
    container, kind = draw(st.sampled_from(list(CONTAINERS))), draw(st.sampled_from(TYPES))
    dtype, casts = draw(st.sampled_from(TYPES[:4])), draw(st.sampled_from([False, True]))
    label, good = LABELS[draw(st.sampled_from([*LABELS, *GOOD, *GOOD]))]
    solver = draw(st.sampled_from([{"solver": "identity"}, {"solver": "cg", "max_iterations": 20}]))
    as_numpy = draw(st.sampled_from([False, True])) and kind != torch.bfloat16

    def sample(i: int) -> Any:
        x = X[i].to(kind)
        return CONTAINERS[container](x.numpy() if as_numpy else x, label(Y[i]))

    def model() -> Net:
        return Net(dtype, casts)

    fits = (casts or kind == dtype) and good
    if fits is False:
        with pytest.raises(ip.RequestError) as refused:
            scores(new(), sample, model, solver=solver)
        told = str(refused.value)
        assert ("the model or the task raised" in told and str(kind).removeprefix("torch.") in told) or (
            "'train': its samples cannot be collated" in told
        )
    elif fits is None:
        try:
            scores(new(), sample, model, solver=solver)
        except ip.RequestError as error:
            assert "the model or the task raised" in str(error)  # noqa: PT017 - or it is taken
    else:
        found = scores(new(), sample, model, solver=solver)
        same = scores(new(), lambda i: (X[i].to(kind).to(dtype), Y[i]), lambda: Net(dtype), solver=solver)
        np.testing.assert_allclose(found, same, atol=tolerance(dtype) * np.abs(same).max())


class Embedded(nn.Module):
    """Takes whole numbers below 5."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = self.table(x)
        return self.head(found if found.ndim == 2 else found.mean(1))


WHOLE: dict[str, tuple[Callable[[int], Any], bool]] = {
    "int": (lambda i: i % 5, True),
    "0-d": (lambda i: torch.tensor(i % 5), True),
    "1-d": (lambda i: torch.tensor([i % 5, 2]), True),
    "int32": (lambda i: np.int32(i % 5), True),
    "numpy": (lambda i: np.asarray([i % 5]), True),
    "float": (lambda i: float(i % 5), False),
    "uint8": (lambda i: np.uint8(i % 5), False),
    "bool": (lambda i: True, False),
    "too large": (lambda i: i, False),
    "negative": (lambda i: -1, False),
}


@pytest.mark.parametrize("solver", ["identity", "cg"])
@pytest.mark.parametrize(("number", "good"), WHOLE.values(), ids=WHOLE.keys())
def test_models_that_take_whole_numbers(
    new: Callable[[], Path], number: Callable[[int], Any], good: bool, solver: str
) -> None:
    if good:
        scores(new(), lambda i: (number(i), Y[i]), Embedded, solver={"solver": solver})
    else:
        with pytest.raises(ip.RequestError, match=r"(?s)grad_z: on a batch of .* the model or the task raised"):
            scores(new(), lambda i: (number(i), Y[i]), Embedded, solver={"solver": solver})


# ---- data sets -------------------------------------------------------------------------------------------------------

NO_DATA: dict[str, tuple[Sample, str]] = {
    "wider": (lambda i: (torch.zeros(7), Y[i]), r"on a batch of float32 \(8, 7\), int64 \(8,\) .*8x7 and 4x5"),
    "empty": (lambda i: (X[i][:0], Y[i]), r"on a batch of float32 \(8, 0\)"),
    "number": (lambda i: (1.0, Y[i]), r"on a batch of float64 \(8,\), int64 \(8,\) the model or the task raised"),
    "0-d": (lambda i: (torch.tensor(1.0), Y[i]), r"on a batch of float32 \(8,\), int64"),
    "alone": (lambda i: X[i], r"a batch is expected to be \(inputs, targets\) or a mapping with labels"),
    "no labels": (lambda i: {"x": X[i]}, r"none of the keys .*; it has \('x',\)"),
    "no inputs": (lambda i: {"labels": Y[i]}, "missing 1 required positional argument: 'x'"),
    "other key": (lambda i: {"q": X[i], "labels": Y[i]}, "unexpected keyword argument 'q'"),
    "key of a number": (lambda i: {0: X[i], "labels": Y[i]}, "keywords must be strings"),
    "nothing": (lambda i: None, "'train': its samples cannot be collated .*NoneType.*`collate`"),
    "tables of nothing": (lambda i: {}, "a batch must hold tensors with the batch first"),
    "words": (lambda i: "words", "a batch must hold tensors with the batch first"),
    "object": (lambda i: object(), "a sample holds a object"),
    "ragged": (lambda i: (torch.zeros(4 + i % 2), Y[i]), r"'train': its samples cannot be collated .*\[4\].*\[5\]"),
    "ragged at the end": (lambda i: (torch.zeros(4 + (i == 11)), Y[i]), "'train': its samples cannot be collated"),
    "other keys": (lambda i: {"x": X[i], "labels": Y[i]} | ({} if i % 2 else {"z": 1}), "collated.*KeyError.*z"),
    "other kinds": (lambda i: plain(i) if i % 2 else {"x": X[i], "labels": Y[i]}, "cannot be collated"),
    "other lengths": (lambda i: (*plain(i), 1)[: 2 + i % 2], "cannot be collated"),
    "other types": (lambda i: (X[i].double() if i % 2 else X[i], Y[i]), "must have the same dtype"),
}


@pytest.mark.parametrize(("sample", "told"), NO_DATA.values(), ids=NO_DATA.keys())
def test_samples_that_make_no_batch_are_refused_with_what_they_are(
    new: Callable[[], Path], sample: Sample, told: str
) -> None:
    with pytest.raises(ip.RequestError, match=f"(?s){told}"):
        scores(new(), sample)


def endless() -> list[Any]:
    held: list[Any] = [X[0]]
    held.append(held)
    return held


NO_DIGEST: dict[str, tuple[Sample, str]] = {
    "sparse": (lambda i: (X[i].to_sparse(), Y[i]), "a sample holds a tensor of torch.sparse_coo"),
    "meta": (lambda i: (X[i].to("meta"), Y[i]), "a sample holds a tensor of torch.strided on meta"),
    "endless": (lambda i: (X[i], Y[i], endless()), "a sample holds itself"),
}


@pytest.mark.parametrize(("sample", "told"), NO_DIGEST.values(), ids=NO_DIGEST.keys())
def test_samples_without_bytes_are_refused(new: Callable[[], Path], sample: Sample, told: str) -> None:
    with pytest.raises(ip.RequestError, match=told):
        scores(new(), sample)


def test_conjugates_are_read_by_their_values() -> None:
    numbers = torch.randn(3, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    assert digest(numbers.conj()) == digest(numbers.conj().resolve_conj()) != digest(numbers)
    assert digest(numbers.conj().imag) == digest(numbers.conj().imag.resolve_neg().contiguous()) != digest(numbers.imag)


@settings(max_examples=12)
@given(st.integers(0, N - 1), st.sampled_from([float("nan"), float("inf"), -float("inf")]), st.sampled_from(SOLVERS))
def test_a_sample_that_is_no_number_is_named_by_every_stage(
    new: Callable[[], Path], at: int, value: float, solver: dict[str, Any]
) -> None:
    def broken(i: int) -> Any:
        return X[i] * (value if i == at else 1), Y[i]

    work = pipeline(new(), broken, test=plain, solver=solver)
    for stage in (work.grad_z, lambda: work.s_test("holdout")):
        with pytest.raises(ip.RequestError, match=f"the gradient is NaN or infinite for sample {at}: "):
            stage()
    if at < T:
        with pytest.raises(ip.RequestError, match=f"s_test holdout: the gradient is NaN or infinite for sample {at}: "):
            pipeline(new(), plain, test=broken, solver=solver).s_test("holdout")


@settings(max_examples=12)
@given(st.integers(0, N - 1), st.sampled_from([3, -1, 2**62]), st.sampled_from(SOLVERS))
def test_a_label_that_is_no_class_is_shown_by_every_stage(
    new: Callable[[], Path], at: int, label: int, solver: dict[str, Any]
) -> None:
    work = pipeline(new(), lambda i: (X[i], label if i == at else Y[i]), test=plain, solver=solver)
    for stage in (work.grad_z, lambda: work.s_test("holdout")):
        with pytest.raises(ip.RequestError, match=rf"the task raised .*: (Target|index) {label} is out of bounds"):
            stage()


def test_a_loss_without_second_derivative_at_a_sample_is_refused(new: Callable[[], Path]) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        distance = (outputs - outputs.detach()).sum(1).clamp(min=0)  # zero, with an infinite second derivative
        return distance**1.5 + nn.functional.cross_entropy(outputs, targets, reduction="none")

    for solver in (
        {"solver": "cg", "curvature": "hessian", "damping": 1.0},
        {"solver": "exact", "curvature": "hessian"},
    ):
        with pytest.raises(ip.RequestError, match=r"its products are NaN or infinite.*no finite second derivative"):
            scores(new(), plain, task=ip.Task.from_loss(loss, name="kink"), solver=solver)
