"""``nystrom`` against the dense approximation that it stands for, and as a preconditioner of ``cg``."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import influence_pipeline as ip
from stages.projection import Projection
from stages.s_test.cg import Cg
from stages.s_test.nystrom import Nystrom
from stages.s_test.solver import Solution, Solver
from stages.stage import StageError, silent
from tests import oracles
from tests.oracles import CASES, Case, ClassTask, Data, make

ggn = functools.cache(oracles.ggn)
gradients = functools.cache(oracles.gradients)
MLP = make(oracles.mlp)
RANK = 6


@functools.cache
def wide(l2: float = 1e-3) -> Case:
    """A perceptron of 163 coordinates whose curvature falls off slowly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3)).double().eval()
        x = torch.randn(60, 12, dtype=torch.float64) * torch.linspace(3, 0.2, 12, dtype=torch.float64)
        return Case("wide", model, ip.Classification(l2), Data((x, torch.randint(0, 3, (60,)))))


def solve(solver: Solver, case: Case, rhs: Tensor | None = None, band: int | None = None) -> Solution:
    curvature = case.curvature("ggn", 64)
    solver.check_size(case.function, 2**30)
    prepared = oracles.prepared(solver, curvature, band=band)
    return solver.start(curvature, prepared)(gradients(case)[:5] if rhs is None else rhs, silent)


def approximation(matrix: Tensor, rank: int, seed: int) -> Tensor:
    """Return K Ωᵀ (Ω K Ωᵀ)⁻¹ Ω K with the same random vectors, by its formula."""
    drawn = [np.random.default_rng([seed, row]).standard_normal(len(matrix), dtype=np.float32) for row in range(rank)]
    random = torch.linalg.qr(torch.from_numpy(np.stack(drawn)).double().T).Q.T
    products = random @ matrix
    return products.T @ torch.linalg.pinv(products @ random.T, hermitian=True, rtol=1e-13) @ products


def error(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


# ---- against dense matrices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_solutions_are_those_of_the_dense_approximation_and_the_residual_is_of_the_matrix_itself(case: Case) -> None:
    penalty = torch.diag(oracles.penalty(case))
    expected = oracles.solution(approximation(ggn(case) - penalty, RANK, 3) + penalty, 0.02, gradients(case)[:5])
    found = solve(Nystrom(rank=RANK, damping=0.02, seed=3), case)
    assert error(found.vectors, expected) < 1e-8
    left = gradients(case)[:5] - expected @ ggn(case) - 0.02 * expected
    torch.testing.assert_close(found.residual, left.norm(dim=1) / gradients(case)[:5].norm(dim=1))
    assert not found.iterations.any()


@pytest.mark.parametrize("case", CASES)
def test_of_as_many_vectors_as_coordinates_it_is_the_matrix(case: Case) -> None:
    found = solve(Nystrom(rank=len(case.theta), damping=0.02), case)
    assert error(found.vectors, oracles.solution(ggn(case), 0.02, gradients(case)[:5])) < 1e-6
    assert found.residual.max() < 1e-6


def test_the_approximation_is_below_the_matrix_and_nears_it() -> None:
    case, missing = wide(), []
    for rank in (5, 20, 80):
        found = oracles.prepared(Nystrom(rank=rank), case.curvature("ggn", 64))
        vectors, values = torch.from_numpy(found["eigenvectors"]), torch.from_numpy(found["eigenvalues"])
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(rank, dtype=torch.float64))
        assert (values.diff() <= 0).all()
        left = torch.linalg.eigvalsh(ggn(case) - torch.diag(oracles.penalty(case)) - (vectors.T * values) @ vectors)
        assert left[0] > -1e-9 * values[0]
        missing.append(float(left.sum()))
    assert missing[0] > 2 * missing[1] > 4 * missing[2]


def test_blocks_change_rounding_alone_and_seeds_change_the_vectors() -> None:
    case, settings = wide(), {"rank": 20, "damping": 0.01}
    first, cut = (oracles.prepared(Nystrom(**settings), case.curvature("ggn", 64), band=band) for band in (64, 3))
    np.testing.assert_allclose(cut["sketch"], first["sketch"], rtol=1e-9, atol=1e-12)
    other = oracles.prepared(Nystrom(**settings, seed=1), case.curvature("ggn", 64))
    assert not np.allclose(other["sketch"], first["sketch"])
    assert Nystrom(**settings).preparation() != Nystrom(**settings, seed=1).preparation()
    assert Nystrom(**settings).preparation() == Nystrom(rank=20, damping=1.0).preparation()


def test_little_memory_takes_more_passes_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    case, settings = wide(), {"rank": 20, "damping": 0.01}
    expected = solve(Nystrom(**settings), case).vectors
    monkeypatch.setattr("stages.s_test.nystrom.PART_ENTRIES", 300)
    monkeypatch.setattr("stages.s_test.nystrom.PROBE_VECTORS", 2**20)
    torch.testing.assert_close(solve(Nystrom(**settings), case).vectors, expected, rtol=1e-8, atol=1e-12)


def test_projected_gradients_have_a_projected_curvature() -> None:
    case = replace(wide(), projection=Projection(kind="dense", dim=20))
    dense, rhs = case.curvature("ggn", 64).matrix(range(60)) / 60, torch.randn(3, 20, dtype=torch.float64)
    dense += torch.diag(case.function.l2())
    assert error(solve(Nystrom(rank=20, damping=0.02), case, rhs).vectors, oracles.solution(dense, 0.02, rhs)) < 1e-6


def test_single_precision_is_near() -> None:
    case = wide()
    single = replace(
        case, model=copy.deepcopy(case.model).float(), data=Data((case.data.tree[0].float(), case.data.tree[1]))
    )
    found = solve(Nystrom(rank=40, damping=0.01), single, gradients(case)[:5].float())
    assert error(found.vectors, solve(Nystrom(rank=40, damping=0.01), case).vectors) < 1e-3


# ---- damping and size ----------------------------------------------------------------------------------------------


def test_relative_damping_is_of_the_mean_eigenvalue_that_the_vectors_show() -> None:
    case, solver = wide(), Nystrom(rank=120, damping={"relative": 0.3})
    prepared = oracles.prepared(solver, case.curvature("ggn", 64))
    mean = float(ggn(case).trace()) / len(ggn(case))
    assert solver.resolved(prepared) == pytest.approx(0.3 * float(prepared["mean_eigenvalue"]))
    assert float(prepared["mean_eigenvalue"]) == pytest.approx(mean, rel=0.2)
    gradient = gradients(case).mean(0) + oracles.penalty(case) * case.theta
    assert float(prepared["gradient_norm"]) == pytest.approx(float(gradient.norm()))


def test_no_damping_is_refused_where_directions_are_left_without_curvature() -> None:
    with pytest.raises(StageError, match=r"rank 6 leaves directions without curvature.*Use a damping > 0"):
        solve(Nystrom(rank=RANK, damping=0.0), replace(MLP, task=ClassTask()))
    assert torch.isfinite(solve(Nystrom(rank=RANK, damping=0.0), wide()).vectors).all()


def test_a_model_without_curvature_is_divided_by_the_damping() -> None:
    class Flat(ClassTask):
        def losses(self, outputs: Tensor, batch: Any) -> Tensor:
            return 0 * outputs.square().sum(1)

    case, rhs = replace(MLP, task=Flat()), torch.ones(2, len(MLP.theta), dtype=torch.float64)
    torch.testing.assert_close(solve(Nystrom(rank=RANK, damping=0.5), case, rhs).vectors, 2 * rhs)


def test_more_vectors_than_fit_or_than_coordinates_are_refused() -> None:
    function = wide().function
    with pytest.raises(StageError, match="rank = 200, and there are 163 coordinates"):
        Nystrom(rank=200).check_size(function, 2**30)
    with pytest.raises(StageError, match=r"rank = 160 needs .* enough for rank = 19$"):
        Nystrom(rank=160).check_size(function, 100_000)
    Nystrom(rank=19).check_size(function, 100_000)


# ---- cg -------------------------------------------------------------------------------------------------------------

BY_IT: dict[str, Any] = {"preconditioner": "nystrom", "rank": 30}


def test_a_preconditioner_changes_how_many_iterations_are_needed_and_not_the_solution() -> None:
    case, rhs = wide(), gradients(wide())[:8]
    plain, found = (solve(Cg(damping=1e-3, tolerance=1e-8, **more), case, rhs) for more in ({}, BY_IT))
    assert error(found.vectors, oracles.solution(ggn(case), 1e-3, rhs)) < 1e-6
    assert found.residual.max() < 2e-8
    assert found.iterations.sum() < 0.7 * plain.iterations.sum()


def test_each_sample_stops_by_itself() -> None:
    case, rhs = wide(), gradients(wide())[:6]
    solver = Cg(damping=1e-3, tolerance=1e-4, **BY_IT)
    together = solve(solver, case, rhs)
    alone = [solve(solver, case, one.unsqueeze(0)) for one in rhs]
    assert together.iterations.tolist() == [int(one.iterations) for one in alone]
    torch.testing.assert_close(together.vectors, torch.cat([one.vectors for one in alone]))


def test_the_damping_is_that_of_cg_alone() -> None:
    case = wide()
    plain, found = (Cg(damping={"relative": 0.1}, **more) for more in ({}, BY_IT))
    expected, prepared = (oracles.prepared(solver, case.curvature("ggn", 64)) for solver in (plain, found))
    assert found.resolved(prepared) == plain.resolved(expected)
    assert found.preparation() != plain.preparation()


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValidationError, match='rank is of preconditioner = "nystrom"'):
        Cg(rank=7)
    with pytest.raises(ValidationError, match='use curvature = "ggn"'):
        Cg(preconditioner="nystrom", curvature="hessian")
