"""Projections of gradients: the maps, the fast way through layer hooks, and curvature in projected coordinates."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stages.coordinates import Coordinates, Entries, Kronecker, _side, projected
from stages.device_batch import DeviceBatch
from stages.grad_z import PerSample, hooks, layers
from stages.parameters import ModelFunction
from stages.projection import Projection
from stages.stage import StageError
from tests import oracles
from tests.oracles import CASES, Case, ClassTask, Data, dense, gradients, make

EXACT = {"rtol": 1e-9, "atol": 1e-10}
KINDS = ["kronecker", "sparse", "dense"]
CPU = torch.device("cpu")


def with_projection(case: Case, kind: str) -> Case:
    return replace(case, projection=Projection(kind=kind, dim=max(6, len(case.theta) // 2)))


def matrix_of(coordinates: Coordinates) -> Tensor:
    """Φ (D, P), from the transposed map."""
    expanded = coordinates.expand(torch.eye(coordinates.size, dtype=torch.float64))
    return torch.cat([expanded[name].reshape(coordinates.size, -1) for name in coordinates.maps], 1)


SHAPES = {"weight": (40, 30), "bias": (40,), "conv": (8, 4, 3, 3), "scalar": (), "table": (50, 7)}
P = sum(map(math.prod, SHAPES.values()))


def example(kind: str, seed: int = 0, dim: int = 600) -> Coordinates:
    params = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    return projected(Projection(kind=kind, dim=dim, seed=seed), params, torch.float64, CPU)


# ---- the maps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_expanding_is_the_transpose_of_projecting(kind: str) -> None:
    coordinates = example(kind)
    generator = torch.Generator().manual_seed(0)
    values = {n: torch.randn(3, 2, *shape, generator=generator, dtype=torch.float64) for n, shape in SHAPES.items()}
    flat = torch.cat([v.reshape(3, 2, -1) for v in values.values()], 2)
    found = coordinates.project(values, torch.float64)
    assert found.shape == (3, 2, coordinates.size)
    torch.testing.assert_close(found, flat @ matrix_of(coordinates).T, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_kept_on_average_over_seeds(kind: str) -> None:
    first, second = (torch.randn(P, generator=torch.Generator().manual_seed(i)).double() for i in (0, 1))
    matrices = [matrix_of(example(kind, seed)) for seed in range(60)]
    squares = torch.stack([(m @ first).square().sum() for m in matrices]) / first.square().sum()
    products = torch.stack([(m @ first) @ (m @ second) for m in matrices]) / (first.norm() * second.norm())
    assert abs(float(squares.mean()) - 1) < 4 * float(squares.std()) / math.sqrt(60)
    assert abs(float(products.mean() - (first @ second) / (first.norm() * second.norm()))) < 0.02
    assert float(squares.std()) < 3 / math.sqrt(600)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_and_the_parameter_decide_the_random_numbers(kind: str) -> None:
    once, again, other = (matrix_of(example(kind, seed)) for seed in (0, 0, 1))
    assert torch.equal(once, again)
    assert not torch.allclose(once, other)
    if kind != "kronecker":
        weight, table = once[:, :350], once[:, -350:]
        assert not torch.equal(weight, table)


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_tiles_change_nothing_but_what_is_made_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    coordinates = example(kind)
    monkeypatch.setattr("stages.coordinates.TILE", 600 * 64)
    values = {name: torch.ones(2, *shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    flat = torch.ones(2, P, dtype=torch.float64)
    torch.testing.assert_close(coordinates.project(values, torch.float64), flat @ matrix_of(coordinates).T, **EXACT)


def test_a_sparse_projection_has_one_entry_in_each_column() -> None:
    matrix = matrix_of(example("sparse"))
    assert (matrix != 0).sum(0).unique().tolist() == [1]
    torch.testing.assert_close(matrix.square().sum(0), torch.ones(P, dtype=torch.float64))


@pytest.mark.parametrize("dim", [5, 30, 600, 1500, 1850])
def test_kronecker_shares_its_coordinates_among_parameters(dim: int) -> None:
    sizes = Projection(kind="kronecker", dim=dim).sizes(SHAPES)
    assert len(SHAPES) <= sum(r * c for r, c in sizes.values()) <= dim
    assert dim < 100 or sum(r * c for r, c in sizes.values()) > 0.8 * dim
    for name, (rows, columns) in sizes.items():
        shape = SHAPES[name] or (1,)
        assert 1 <= rows <= shape[0]
        assert 1 <= columns <= math.prod(shape[1:])


def test_a_side_that_is_kept_whole_is_not_touched() -> None:
    coordinates = example("kronecker", dim=1850)
    assert isinstance(coordinates.maps["bias"], Entries)
    kept = coordinates.maps["weight"]
    assert isinstance(kept, Kronecker)
    assert (kept.left is None) != (kept.right is None)


@pytest.mark.parametrize(("full", "kept"), [(5000, 2), (640, 37), (128, 64)])
def test_a_tall_side_is_the_same_made_with_little_memory(full: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _side(full, kept, 7, torch.float64, torch.device("cpu"))
    monkeypatch.setattr("stages.coordinates.TILE", 2000)
    tiled = _side(full, kept, 7, torch.float64, torch.device("cpu"))
    assert whole is not None
    assert tiled is not None
    torch.testing.assert_close(tiled, whole, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(tiled @ tiled.T, full / kept * torch.eye(kept, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize(
    ("kind", "dim", "message"),
    [
        ("kronecker", 3, r"dim = 3 is too few for 5 parameters.*\[grad_z\] parameters"),
        ("kronecker", P, f"dim = {P}, and the selected parameters have {P} entries"),
        ("sparse", 2000, f"dim = 2000, and the selected parameters have {P} entries"),
    ],
)
def test_what_cannot_be_projected_is_refused(kind: str, dim: int, message: str) -> None:
    with pytest.raises(StageError, match=message):
        example(kind, dim=dim)


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_projected_whichever_way_they_are_computed(case: Case, kind: str) -> None:
    function = with_projection(case, kind).function
    expected = gradients(case) @ matrix_of(function.coordinates).T
    per_sample = PerSample(function, function.losses, case.data, DeviceBatch(5))
    found = torch.cat([rows.grads for rows in per_sample.rows(range(len(case.data)))])
    torch.testing.assert_close(found, expected, **EXACT)


class Shared(nn.Module):
    """A table that is also the last layer, and a parameter that no layer knows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.inner = nn.Linear(8, 8)
        self.last = nn.Linear(8, 30, bias=False)
        self.last.weight = self.table.weight
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.inner(self.table(tokens) * self.scale).tanh()).mean(1)


def tokens() -> Case:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randint(0, 30, (7, 4), generator=generator)
    return Case("tokens", Shared().double(), ClassTask(), Data((inputs, torch.randint(0, 30, (7,)))))


LAYERS = [
    (nn.Conv1d(3, 8, 3, padding=1, stride=2), (3, 9)),
    (nn.Conv2d(4, 8, 3, padding=1, groups=2), (4, 6, 5)),
    (nn.Conv2d(8, 8, 3, groups=8, padding_mode="circular", padding=1), (8, 4, 4)),
    (nn.Conv3d(2, 6, 2, dilation=2), (2, 5, 4, 4)),
    (nn.Conv2d(4, 8, 3, padding="same"), (4, 5, 5)),
    (nn.Linear(12, 9), (12,)),
    (nn.Linear(12, 9), (3, 12)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: str(value) if isinstance(value, tuple) else "")
@pytest.mark.parametrize("sides", ["both", "left", "right"])
def test_factors_of_a_layer_are_those_of_its_gradients(layer: Any, shape: tuple[int, ...], sides: str) -> None:
    layer, generator = layer.double(), torch.Generator().manual_seed(0)
    inputs = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    outputs = layer(inputs)
    grads = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
    weight = tuple(layer.weight.shape)
    full = torch.empty(4, *weight, dtype=torch.float64)
    known = layers.layer_of(layer)
    assert known is not None
    known.write(layer, "weight", inputs, grads, full)
    left = torch.randn(3, weight[0], generator=generator).double() if sides != "right" else None
    right = torch.randn(5, math.prod(weight[1:]), generator=generator).double() if sides != "left" else None
    one = Kronecker(weight, left, right)
    assert known.factors is not None
    found = known.factors(layer, inputs.detach(), grads, one)
    if found is None:
        assert sides != "both"
    else:
        torch.testing.assert_close(torch.bmm(*found).flatten(1), one.project(full), **EXACT)


def test_tied_weights_and_other_parameters_are_projected_too() -> None:
    case = tokens()
    function = with_projection(case, "kronecker").function
    assert isinstance(function.coordinates.maps["table.weight"], Kronecker)
    expected = gradients(case) @ matrix_of(function.coordinates).T
    per_sample = PerSample(function, function.losses, case.data, DeviceBatch(3))
    found = torch.cat([rows.grads for rows in per_sample.rows(range(7))])
    torch.testing.assert_close(found, expected, **EXACT)


def test_weights_of_known_layers_are_never_formed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 4))
    data = Data((torch.randn(6, 3, 6, 6), torch.arange(6) % 4))
    function = ModelFunction(model, ClassTask(), ("*",), CPU, Projection(dim=600))
    names = frozenset(function.params)
    assert hooks.formed(function) <= 600
    expected, _, unfit = hooks.gradients(function, function.losses, data.batch(range(6)), names)
    assert not unfit
    assert expected.shape == (6, function.size)
    whole = [n for n, one in function.coordinates.maps.items() if isinstance(one, Kronecker)]
    monkeypatch.setattr(Kronecker, "project", lambda *_: pytest.fail("a gradient was formed and then projected"))
    assert {"3.weight", "5.weight"} <= set(whole)
    biases = {n for n in whole if n.endswith("bias") or n == "0.weight"}
    hooks.gradients(function, function.losses, data.batch(range(6)), names - biases)


# ---- curvature -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("matrix", ["ggn", "hessian"])
@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_the_projected_matrix(case: Case, kind: str, matrix: str) -> None:
    case = with_projection(replace(case, task=copy.copy(case.task)), kind)
    case.task.l2 = 0.05
    phi, l2 = matrix_of(case.function.coordinates), oracles.penalty(case)
    expected = phi @ (dense(case, matrix) - torch.diag(l2)) @ phi.T + l2[0] * torch.eye(len(phi)).double()
    vectors = torch.eye(len(phi), dtype=torch.float64)
    curvature = case.curvature(matrix)
    torch.testing.assert_close(curvature.product(vectors), expected, **EXACT)
    torch.testing.assert_close(curvature.product(vectors[:1]), expected[:1], **EXACT)
    torch.testing.assert_close(curvature.over(range(len(case.data)))(vectors), expected, **EXACT)


def test_l2_by_glob_stays_with_its_parameter() -> None:
    case = make(oracles.mlp)
    globs: dict[str, float] = {"2.bias": 0.5, "*.weight": 2.0, "*": 0.125}
    function = ModelFunction(case.model, ClassTask(globs), ("*",), CPU, Projection(dim=20))
    own = {"0.weight": 2.0, "0.bias": 0.125, "2.weight": 2.0, "2.bias": 0.5}
    for name, columns in function.coordinates.columns.items():
        assert function.l2()[columns].unique().tolist() == [own[name]]
    with pytest.raises(StageError, match=r"projection = \{ kind = .kronecker"):
        ModelFunction(case.model, ClassTask(globs), ("*",), CPU, Projection(kind="sparse", dim=20)).l2()
