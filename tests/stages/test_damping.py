"""``damping = "auto"`` against the same criterion computed densely, and against what it is for."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from stages import damping
from stages.damping import Tried, tried
from stages.s_test.cg import Cg
from stages.s_test.exact import Exact
from stages.s_test.kfac import Kfac
from stages.s_test.lissa import Lissa
from stages.s_test.solver import CurvatureSolver, RelativeDamping
from stages.stage import StageError, silent
from tests import oracles
from tests.oracles import CASES, Case, Data, make, mlp

dense = functools.cache(oracles.dense)


def found(case: Case, kind: str = "ggn", seed: int = 0, together: int = 3) -> Tried:
    curvature = case.curvature(kind)
    matrix = dense(case, kind)
    sums_RD = torch.stack([oracles.gradients(case)[half].sum(0) for half in damping.halves_of(len(case.data), seed)])
    rhs_RD = sums_RD / len(case.data)
    return tried(curvature, lambda x: x @ matrix, float(matrix.diagonal().mean()), rhs_RD, seed, together, silent)


def objective(case: Case, kept: list[int], step_D: Tensor) -> float:
    """The training objective without the samples that are not kept, a step away from the case's parameters."""
    function = case.curvature("ggn").function
    values, at, penalty = {}, 0, 0.0
    weights = function.penalties()
    for name, parameter in function.params.items():
        values[name] = parameter + step_D[at : at + parameter.numel()].view_as(parameter)
        penalty += 0.5 * weights[name] * float(values[name].square().sum())
        at += parameter.numel()
    batch = case.data.batch(kept)
    return float(function.losses(values, batch).sum()) / len(case.data) + penalty


@pytest.mark.parametrize("case", CASES)
def test_every_change_is_that_of_the_objective(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(damping, "TOLERANCE", 1e-9)
    monkeypatch.setattr(damping, "MOST_ITERATIONS", 5000)
    count, matrix = len(case.data), dense(case, "ggn")
    gradients = oracles.gradients(case)
    result = found(case)
    halves = damping.halves_of(count, 0)
    assert len(halves) == 4
    compared = 0
    for value, change in zip(result.dampings, result.changes, strict=True):
        if math.isnan(change):
            continue
        expected = 0.0
        for half in halves:
            step = oracles.solution(matrix, value, gradients[half].sum(0, keepdim=True) / count)[0]
            kept = [i for i in range(count) if i not in half]
            expected += (objective(case, kept, step) - objective(case, kept, torch.zeros_like(step))) / len(halves)
        assert change == pytest.approx(expected, rel=1e-4, abs=1e-9)
        compared += 1
    assert compared >= 3
    tried_changes = [change for change in result.changes if not math.isnan(change)]
    assert result.changes[result.dampings.index(result.best)] == min(tried_changes)


def test_it_stops_where_smaller_ones_are_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    falls = iter([-1.0, -2.0, -3.0, -2.5, -2.4, -9.0])
    monkeypatch.setattr(damping, "_moved", lambda curvature, ids, step: (0.0, 0.0))
    monkeypatch.setattr(damping, "_mean_change", lambda *arguments: next(falls))
    result = found(make(mlp))
    assert [change for change in result.changes if not math.isnan(change)] == [-1.0, -2.0, -3.0, -2.5, -2.4]
    assert result.best == result.dampings[2]


def test_a_quadratic_at_its_optimum_needs_none() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 3, generator=generator).double()
    targets = torch.randn(400, 1, generator=generator).double()
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(inputs, targets).solution.T)
    changes = found(Case("line", model, oracles.SquaredTask(), Data((inputs, targets)))).changes
    assert not any(map(math.isnan, changes))
    assert sorted(changes, reverse=True) == list(changes)


def test_halves_are_complements_and_follow_from_the_seed() -> None:
    halves = damping.halves_of(11, 3)
    for first, second in zip(halves[::2], halves[1::2], strict=True):
        assert sorted(first + second) == list(range(11))
    assert halves == damping.halves_of(11, 3)
    assert halves != damping.halves_of(11, 4)


def test_only_some_samples_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(damping, "MOST_LOOKED_AT", 3)
    case = make(mlp)
    curvature, half = case.curvature("ggn"), damping.halves_of(len(case.data), 0)[0]
    kept = damping._kept(curvature, half, 0)
    assert len(kept) == 3
    assert not set(kept) & set(half)
    assert kept == damping._kept(curvature, half, 0)


def test_an_indefinite_matrix_is_refused() -> None:
    case = make(mlp)
    curvature, rhs_RD = case.curvature("ggn"), torch.ones(damping.HALVES, len(case.theta), dtype=torch.float64)
    result = tried(curvature, lambda x: -1e6 * x, 1.0, rhs_RD, 0, 4, silent)
    assert all(map(math.isnan, result.changes))
    with pytest.raises(StageError, match=r"not positive definite even for λ = 100.*curvature = \"ggn\""):
        _ = result.best


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_solvers_agree(kind: str) -> None:
    case = make(oracles.softmax_regression)
    curvature = case.curvature(kind)
    values = [
        solver.resolved(oracles.prepared(solver, curvature))
        for solver in (Exact(curvature=kind), Cg(curvature=kind), Lissa(curvature=kind))
    ]
    assert values[1] == values[2]
    mean = float(dense(case, kind).diagonal().mean())
    grid = [factor * mean for factor in damping.GRID]
    assert min(abs(values[0] / value - 1) for value in grid) < 1e-6
    assert 0.5 < values[1] / values[0] < 2  # whose mean eigenvalue is estimated


def test_what_it_depends_on_is_part_of_what_is_prepared() -> None:
    def prepares(solver: CurvatureSolver) -> list[Any]:
        return [one.preparation() for one in solver.chain()]

    shared, auto = prepares(Cg(seed=1))
    assert [shared] == prepares(Cg(seed=1, damping=RelativeDamping(relative=1.0)))
    assert prepares(Cg(seed=1, sample=4)) == [shared, {**auto, "sample": 4}]
    assert prepares(Exact(seed=1))[0] == prepares(Exact(seed=2))[0]
    assert len({str(prepares(solver)[-1]) for solver in (Exact(), Exact(seed=1), Exact(curvature="hessian"))}) == 3


def test_solvers_that_have_no_products_refuse_it() -> None:
    assert Cg().damping == "auto"
    assert Kfac().damping == RelativeDamping(relative=0.01)
    with pytest.raises(ValidationError, match=r"exact.*cg.*lissa"):
        Kfac(damping="auto")
