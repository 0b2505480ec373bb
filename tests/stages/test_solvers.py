from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from stages.curvature import Curvature, random_signs
from stages.device_batch import DeviceBatch
from stages.parameters import ModelFunction
from stages.projection import Projection
from stages.s_test import STest, solvers
from stages.s_test.cg import Cg, conjugate_gradients
from stages.s_test.exact import Exact
from stages.s_test.identity import Identity
from stages.s_test.lissa import Lissa
from stages.s_test.prepare import Prepare
from stages.s_test.solver import PROBES, SPARE, CurvatureSolver, Solution, Solver, fixed_sample
from stages.stage import StageError, silent
from tests import oracles
from tests.oracles import CASES, Case, ClassTask, Data, make

KINDS = pytest.mark.parametrize("kind", ["hessian", "ggn"])
dense = functools.cache(oracles.dense)
gradients = functools.cache(oracles.gradients)

TABLE: dict[str, Callable[..., Solver]] = {
    "exact": Exact,
    "cg": functools.partial(Cg, tolerance=1e-10, max_iterations=2000),
    "lissa": functools.partial(Lissa, batch_size=1000, recursion_depth=128, tolerance=1e-9),
}
"""Settings under which a solver is to be right to six digits; ``identity`` solves nothing."""
EVERY = pytest.mark.parametrize("name", TABLE)


def ends(case: Case, kind: str) -> tuple[float, float]:
    eigenvalues = torch.linalg.eigvalsh(dense(case, kind))
    return float(eigenvalues[0]), float(eigenvalues[-1])


def enough(case: Case, kind: str) -> float:
    """A λ with which H + λI is well conditioned, so that every solver gets there in few steps."""
    smallest, largest = ends(case, kind)
    return largest - smallest


def rhs_for(case: Case) -> Tensor:
    return gradients(case)[:5]


def solve(solver: Solver, case: Case, kind: str = "ggn", rhs: Tensor | None = None, batch_size: int = 64) -> Solution:
    curvature = case.curvature(kind, batch_size)
    found = solver.start(curvature, oracles.prepared(solver, curvature))(rhs_for(case) if rhs is None else rhs, silent)
    count = len(found.vectors)
    assert found.residual.shape == found.iterations.shape == (count,)
    assert (found.residual.dtype, found.iterations.dtype) == (torch.float64, torch.int64)
    return found


def error(found: Tensor, expected: Tensor) -> float:
    """The largest relative error of a row."""
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


def true_residual(matrix: Tensor, damping: float, rhs: Tensor, vectors: Tensor) -> Tensor:
    return (rhs - vectors.double() @ matrix - damping * vectors).norm(dim=1) / rhs.norm(dim=1)


# ---- every solver --------------------------------------------------------------------------------------------------


def test_every_solver_that_is_found_is_compared_with_a_dense_answer() -> None:
    own_tests = {"identity", "fisher", "kfac", "ekfac", "nystrom"}
    assert set(solvers()) == {*TABLE, *own_tests}, "give the new solver settings in TABLE, or tests of its own"


@EVERY
@KINDS
@pytest.mark.parametrize("case", CASES)
def test_every_solver_equals_the_dense_solution(case: Case, kind: str, name: str) -> None:
    damping = enough(case, kind)
    found = solve(TABLE[name](curvature=kind, damping=damping), case, kind)
    expected = oracles.solution(dense(case, kind), damping, rhs_for(case))
    assert error(found.vectors, expected) < 1e-6
    assert found.residual.max() < 1e-6


@pytest.mark.parametrize("name", ["exact", "cg"])
@KINDS
@pytest.mark.parametrize("case", CASES)
def test_little_damping_is_as_right_as_much(case: Case, kind: str, name: str) -> None:
    smallest, largest = ends(case, kind)
    damping = max(0.0, -1.01 * smallest) + 1e-3 * largest
    found = solve(TABLE[name](curvature=kind, damping=damping), case, kind, batch_size=5)
    assert error(found.vectors, oracles.solution(dense(case, kind), damping, rhs_for(case))) < 1e-6


def test_identity_gives_back_its_right_hand_sides() -> None:
    case = make(oracles.mlp)
    found = solve(Identity(), case)
    assert torch.equal(found.vectors, rhs_for(case))
    assert not found.residual.any()


@EVERY
def test_no_damping_is_needed_where_the_penalty_makes_h_positive(name: str) -> None:
    case = make(oracles.softmax_regression)
    solver = TABLE[name](curvature="hessian", damping=0.0)
    if name == "lissa":
        solver = solver.model_copy(update={"recursion_depth": 768, "scale": 1.0})
    found = solve(solver, case, "hessian")
    assert error(found.vectors, oracles.solution(dense(case, "hessian"), 0.0, rhs_for(case))) < 1e-6


@EVERY
def test_a_vector_does_not_depend_on_its_neighbours(name: str) -> None:
    case = make(oracles.mlp)
    loose: dict[str, dict[str, Any]] = {
        "cg": {"tolerance": 0.05},
        "lissa": {"tolerance": 0.1, "batch_size": 9, "repeats": "auto"},
    }
    solver = TABLE[name](curvature="ggn", damping=enough(case, "ggn"))
    solver = solver.model_copy(update=loose.get(name, {}))
    rhs = gradients(case)[:4] * torch.tensor([[1.0], [1e-3], [30.0], [1.0]])
    rhs[3] = torch.linalg.eigh(dense(case, "ggn"))[1][:, -1]
    together = solve(solver, case, rhs=rhs)
    alone = [solve(solver, case, rhs=row.unsqueeze(0)) for row in rhs]
    assert together.iterations.tolist() == [int(one.iterations) for one in alone]
    torch.testing.assert_close(together.vectors, torch.cat([one.vectors for one in alone]), rtol=1e-10, atol=1e-14)
    if name == "cg":
        assert len(set(together.iterations.tolist())) > 1, "these stop at different steps, or nothing is shown"


@EVERY
def test_a_vector_scales_with_its_right_hand_side(name: str) -> None:
    case = make(oracles.mlp)
    solver = TABLE[name](curvature="ggn", damping=enough(case, "ggn"))
    once, more = solve(solver, case), solve(solver, case, rhs=1e-6 * rhs_for(case))
    torch.testing.assert_close(more.vectors, 1e-6 * once.vectors, rtol=1e-6, atol=1e-14)


@EVERY
@KINDS
def test_the_residual_is_the_true_one(name: str, kind: str) -> None:
    case = make(oracles.conv)
    damping = enough(case, kind)
    loose: dict[str, dict[str, Any]] = {
        "cg": {"tolerance": 0.1},
        "lissa": {"tolerance": 0.5, "batch_size": 6, "recursion_depth": 20},
    }
    solver = TABLE[name](curvature=kind, damping=damping).model_copy(update=loose.get(name, {}))
    found = solve(solver, case, kind)
    expected = true_residual(dense(case, kind), damping, rhs_for(case), found.vectors)
    torch.testing.assert_close(found.residual, expected, rtol=1e-8, atol=1e-13)
    assert name == "exact" or found.residual.max() > 1e-3


@pytest.mark.parametrize("solver", [*(TABLE[name](damping=0.5) for name in TABLE), Identity()], ids=lambda s: s.solver)
@pytest.mark.parametrize("zeros", [[True], [False, True, False]], ids=["alone", "between others"])
def test_a_zero_right_hand_side_gives_zero(solver: Solver, zeros: list[bool], caplog: pytest.LogCaptureFixture) -> None:
    case = make(oracles.mlp)
    rhs = rhs_for(case)[: len(zeros)] * ~torch.tensor(zeros).unsqueeze(1)
    found = solve(solver, case, rhs=rhs)
    assert torch.isfinite(found.vectors).all()
    assert found.vectors.eq(0).all(dim=1).tolist() == zeros
    assert found.residual[torch.tensor(zeros)].eq(0).all()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# ---- damping -------------------------------------------------------------------------------------------------------


@EVERY
@KINDS
def test_relative_damping_is_that_many_mean_eigenvalues(name: str, kind: str) -> None:
    case = make(oracles.batch_norm)
    solver = TABLE[name](curvature=kind, damping={"relative": 0.25})
    assert isinstance(solver, CurvatureSolver)
    prepared = oracles.prepared(solver, case.curvature(kind))
    mean = float(dense(case, kind).trace()) / len(case.theta)
    assert solver.resolved(prepared) == pytest.approx(0.25 * mean, rel=1e-10 if name == "exact" else 0.25)
    assert solver.resolved(prepared) == pytest.approx(0.25 * float(prepared["mean_eigenvalue"]), rel=1e-12)


def test_relative_damping_is_what_the_solution_has() -> None:
    case = make(oracles.mlp)
    damping = 0.1 * float(dense(case, "ggn").trace()) / len(case.theta)
    found = solve(Exact(damping={"relative": 0.1}), case)
    assert error(found.vectors, oracles.solution(dense(case, "ggn"), damping, rhs_for(case))) < 1e-9


def test_damping_relative_to_a_negative_mean_is_refused() -> None:
    solver = Exact(curvature="hessian", damping={"relative": 0.1})
    with pytest.raises(StageError, match=r'mean eigenvalue of H, and that is -0\.5.*curvature = "ggn"'):
        solver.resolved({"mean_eigenvalue": np.asarray(-0.5)})


@pytest.mark.parametrize("damping", [-1e-9, float("nan"), float("inf"), {"relative": 0.0}, {"relative": -1.0}, "much"])
def test_damping_that_is_no_damping_is_refused(damping: Any) -> None:
    with pytest.raises(ValidationError):
        Cg(damping=damping)


def named(caught: pytest.ExceptionInfo[StageError], what: str) -> float:
    """The value that an error tells the user to set."""
    found = re.search(rf"Use {what} = (\S+?)[,.]? ", str(caught.value))
    assert found, str(caught.value)
    return float(found[1])


@pytest.mark.parametrize(
    ("name", "maker"),
    [(name, maker) for maker in (oracles.mlp, oracles.conv, oracles.regression) for name in ("exact", "cg")]
    + [("lissa", oracles.mlp)],
)
def test_negative_curvature_names_an_eigenvalue_and_a_damping_that_works(name: str, maker: Callable[[], Case]) -> None:
    case = make(maker)
    smallest, largest = ends(case, "hessian")
    assert smallest < -0.1
    solver = TABLE[name](curvature="hessian", damping=0.05)
    if name == "lissa":
        solver = solver.model_copy(update={"recursion_depth": 1000, "tolerance": 0.01})
    with pytest.raises(StageError, match="not positive definite") as caught:
        solve(solver, case, "hessian")
    for value, number in zip((smallest, largest, 0.05), re.findall(r"-?\d[\d.e-]*\d", str(caught.value)), strict=False):
        assert float(number) == pytest.approx(value, rel=0.02)
    assert 'curvature = "ggn"' in str(caught.value)
    damping = named(caught, "damping")
    assert -smallest < damping < -1.5 * smallest
    found = solve(solver.model_copy(update={"damping": damping}), case, "hessian")
    limit = 0.05 if name == "lissa" else 1e-6
    assert error(found.vectors, oracles.solution(dense(case, "hessian"), damping, rhs_for(case))) < limit


def test_a_singular_matrix_is_refused_by_exact_with_a_damping_that_works() -> None:
    case = make(oracles.unused)
    singular = Case("", case.model, ClassTask(0.0), case.data)
    with pytest.raises(StageError, match="not positive definite") as caught:
        solve(Exact(damping=0.0), singular)
    damping = named(caught, "damping")
    assert 0 < damping < 1e-4
    found = solve(Exact(damping=damping), singular)
    assert error(found.vectors, oracles.solution(oracles.dense(singular, "ggn"), damping, rhs_for(case))) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_cg_refuses_what_has_no_solution_with_a_damping_that_works(dtype: torch.dtype) -> None:
    """A right-hand side outside the range of a singular matrix: iterates grow without bound."""
    model = oracles.unused().model.to(dtype)
    model.load_state_dict(make(oracles.unused).model.state_dict())
    x, labels = make(oracles.unused).data.tree
    singular = Case("", model, ClassTask(0.0), Data((x.to(dtype), labels)))
    solver, rhs = Cg(damping=0.0, max_iterations=100), torch.ones(2, len(singular.theta), dtype=dtype)
    with pytest.raises(StageError, match=r"cg: the residual of 2 of 2 samples.*nearly singular") as caught:
        solve(solver, singular, rhs=rhs)
    damping = named(caught, "damping")
    assert 0 < damping < 0.01
    found = solve(solver.model_copy(update={"damping": damping}), singular, rhs=rhs)
    assert found.residual.max() < 1.5e-3


# ---- exact ---------------------------------------------------------------------------------------------------------


def test_exact_refuses_a_matrix_that_does_not_fit_with_the_numbers() -> None:
    def of_size(dim: int) -> ModelFunction:
        return ModelFunction(nn.Linear(dim, 1, bias=False), ClassTask(), ["*"], oracles.CPU)

    with pytest.raises(StageError, match=r"needs 22\.4 GiB for a 31623 × 31623 .* is 2\.0 GiB, enough for 9459 param"):
        Exact().check_size(of_size(31623), 2 * 2**30)
    Exact().check_size(of_size(9459), 2 * 2**30)
    with pytest.raises(StageError):
        Exact().check_size(of_size(9460), 2 * 2**30)


def test_exact_refuses_before_anything_is_computed() -> None:
    case = make(oracles.mlp)
    with pytest.raises(StageError, match="43 × 43"):
        STest(Exact(), case.curvature("ggn"), {}, case.data, 4, DeviceBatch(4), 3 * 8 * 43**2 - 1)


@KINDS
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("parts", [1, 5, 12])
def test_the_dense_matrix_is_the_same_however_the_training_set_is_cut(kind: str, parts: int, projected: bool) -> None:
    case = make(oracles.mlp)
    if projected:
        case = replace(case, projection=Projection(dim=20))
    columns = case.function.flatten(case.function.unprojected().unflatten(torch.eye(43, dtype=torch.float64)))
    expected = columns.T @ (dense(case, kind) - torch.diag(oracles.penalty(case))) @ columns
    found = oracles.prepared(Exact(curvature=kind), case.curvature(kind), parts)["matrix"]
    np.testing.assert_allclose(found, expected + torch.diag(case.function.l2()), rtol=1e-10, atol=1e-12)


@EVERY
@pytest.mark.parametrize("blocks", [1, 5, 12])
def test_what_is_prepared_has_the_distance_from_an_optimum(name: str, blocks: int) -> None:
    case = make(oracles.mlp)
    found = oracles.prepared(TABLE[name](), case.curvature("ggn"), blocks)
    expected = gradients(case).mean(0) + oracles.penalty(case) * case.theta
    assert float(found["gradient_norm"]) == pytest.approx(float(expected.norm()), rel=1e-10)


@KINDS
@pytest.mark.parametrize("parts", [1, 5, 12])
def test_the_mean_eigenvalue_is_that_of_the_same_probes_however_the_training_set_is_cut(kind: str, parts: int) -> None:
    case = make(oracles.mlp)
    matrix, signs = dense(case, kind), random_signs(PROBES, 43, case.theta, seed=0)
    found = oracles.prepared(Cg(curvature=kind), case.curvature(kind), parts=parts)["mean_eigenvalue"]
    assert float(found) == pytest.approx(float((signs @ matrix * signs).sum()) / PROBES / 43, rel=1e-10)


@given(st.integers(1, 100), st.integers(1, 100))
def test_every_training_sample_is_in_the_part_of_exactly_one_block(count: int, parts: int) -> None:
    case = make(oracles.mlp)
    curvature = Curvature(case.function, Data(torch.zeros(count)), "ggn", 4, 2**20)
    for solver in (Cg(), Exact()):
        stage = Prepare(solver, curvature, parts, {})
        assert [i for block in stage.grid for i in stage.part(block)] == list(range(count))


# ---- cg ------------------------------------------------------------------------------------------------------------


def test_cg_over_a_sample_solves_for_these_and_always_the_same_ones() -> None:
    case = make(oracles.mlp)
    solver = Cg(damping=0.1, tolerance=1e-10, sample=7, seed=3)
    ids = fixed_sample(7, 12, 3)
    assert sorted(set(ids)) == ids
    assert len(ids) == 7
    part = Case("", case.model, case.task, Data(case.data.batch(ids)))
    expected = oracles.solution(dense(part, "ggn"), 0.1, rhs_for(case))
    first, again = solve(solver, case), solve(solver, case)
    assert error(first.vectors, expected) < 1e-6
    assert torch.equal(first.vectors, again.vectors)
    other = solve(solver.model_copy(update={"seed": 4}), case)
    assert error(other.vectors, expected) > 1e-3


def test_cg_over_more_samples_than_there_are_is_refused() -> None:
    with pytest.raises(StageError, match=r"sample = 13, and the training set has 12"):
        solve(Cg(damping=0.1, sample=13), make(oracles.mlp))


def test_cg_out_of_iterations_says_so_and_keeps_the_residual(caplog: pytest.LogCaptureFixture) -> None:
    case = make(oracles.mlp)
    found = solve(Cg(damping=1e-3, tolerance=1e-8, max_iterations=4), case)
    assert found.iterations.tolist() == [4] * 5
    assert found.residual.min() > 1e-6
    torch.testing.assert_close(found.residual, true_residual(dense(case, "ggn"), 1e-3, rhs_for(case), found.vectors))
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert re.search(r"5 of 5 samples are above the tolerance.*max_iterations", record.getMessage())


def test_cg_within_its_tolerance_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    case = make(oracles.mlp)
    found = solve(Cg(damping=1e-2, tolerance=1e-3), case)
    assert found.residual.max() <= 1e-3
    assert not caplog.records


def test_cg_needs_no_more_products_than_there_are_eigenvalues() -> None:
    matrix = torch.diag(torch.tensor([1.0, 1.0, 4.0, 4.0, 9.0], dtype=torch.float64))
    calls: list[int] = []

    def product(vectors: Tensor) -> Tensor:
        calls.append(len(vectors))
        return vectors @ matrix

    rhs = torch.tensor([[1.0, 2, 3, 4, 5], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 0, 0]], dtype=torch.float64)
    vectors, iterations, residual = conjugate_gradients(product, rhs, 1e-9, 100)
    assert vectors is not None
    torch.testing.assert_close(residual, true_residual(matrix, 0.0, rhs, vectors).nan_to_num(), rtol=0, atol=1e-15)
    torch.testing.assert_close(vectors, rhs / matrix.diagonal(), rtol=1e-9, atol=0)
    # One more where the true residual was measured and was within the tolerance.
    assert (iterations - torch.tensor([3, 1, 0, 2])).abs().max() <= 1
    assert calls[0] == 3, "a zero right-hand side takes no part"
    assert sum(calls) == int(iterations.sum())


@pytest.mark.parametrize("most", [200, 3], ids=["converges", "runs out"])
def test_cg_measures_the_true_residual_once(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case, passes = make(oracles.mlp), list[int]()
    product = Curvature.product

    def watched(self: Curvature, vectors: Tensor, *args: Any) -> Tensor:
        passes.append(len(vectors))
        return product(self, vectors, *args)

    solver = Cg(damping=1e-2, tolerance=1e-3, max_iterations=most)
    curvature = case.curvature("ggn", 64)
    run = solver.start(curvature, oracles.prepared(solver, curvature))
    monkeypatch.setattr(Curvature, "product", watched)
    found = run(rhs_for(case), silent)
    left = int((found.iterations == most).sum())
    assert sum(passes) == int(found.iterations.sum()) + left
    expected = true_residual(dense(case, "ggn"), 1e-2, rhs_for(case), found.vectors)
    torch.testing.assert_close(found.residual, expected, rtol=1e-8, atol=1e-13)


@KINDS
def test_cg_in_single_precision_has_the_residual_that_it_claims(kind: str) -> None:
    case = make(oracles.mlp)
    model = oracles.mlp().model.float()
    model.load_state_dict(case.model.state_dict())
    single = Case("", model, case.task, Data((case.data.tree[0].float(), case.data.tree[1])))
    damping = max(0.0, -1.1 * ends(case, kind)[0]) + 1e-3
    found = solve(Cg(curvature=kind, damping=damping, tolerance=1e-4), single, kind, rhs_for(case).float())
    assert found.vectors.dtype == torch.float32
    truth = true_residual(dense(case, kind), damping, rhs_for(case), found.vectors)
    assert truth.max() < 1.5e-4
    torch.testing.assert_close(found.residual, truth, rtol=0.1, atol=1e-5)


# ---- lissa ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "seed"),
    [
        ({"recursion_depth": 256, "repeats": 2, "scale": 2.0}, 0),
        ({"recursion_depth": "auto", "repeats": 1, "scale": "auto"}, 0),
        ({"recursion_depth": "auto", "repeats": 1, "scale": "auto"}, 1),
        ({"recursion_depth": "auto", "repeats": "auto", "scale": "auto"}, 2),
        ({"recursion_depth": 300, "repeats": "auto", "scale": 3.0}, 3),
    ],
    ids=["fixed", "auto depth", "other seed", "all auto", "auto repeats"],
)
def test_lissa_over_minibatches_is_within_its_tolerance_of_the_regularised_inverse(given: Any, seed: int) -> None:
    """λ is absolute: neither scale nor depth changes what is solved."""
    case = make(oracles.mlp)
    solver = Lissa(damping=0.1, batch_size=9, tolerance=0.05, seed=seed, **given)
    found = solve(solver, case)
    expected = oracles.solution(dense(case, "ggn"), 0.1, rhs_for(case))
    assert error(found.vectors, expected) < 0.05
    assert error(found.vectors, oracles.solution(dense(case, "ggn"), 0.2, rhs_for(case))) > 4 * 0.05


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 31])
def test_lissas_estimate_is_an_average_of_its_iterates_at_every_depth(depth: int) -> None:
    """Where H + λI is scale times the identity, every iterate is the solution already."""
    case = Case("", nn.Linear(4, 2, bias=False).double(), ClassTask(3.0), make(oracles.mlp).data)
    flat = Case("", case.model, _Flat(3.0), case.data)
    solver = Lissa(damping=1.0, scale=4.0, recursion_depth=depth, batch_size=4, tolerance=1e-12)
    rhs = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = solve(solver, flat, rhs=rhs)
    torch.testing.assert_close(found.vectors, rhs / 4, rtol=1e-12, atol=0)
    assert found.iterations.tolist() == [min(depth, 8)] * 3, "too few steps say nothing about having settled"


class _Flat(ClassTask):
    """A loss without curvature in the outputs."""

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        return outputs.square().sum(1) * 0.0


@pytest.mark.parametrize("depth", [1, 2, 3, 6, 8, 11])
def test_lissas_estimate_is_the_mean_of_the_later_half_of_the_recursion(depth: int) -> None:
    case = make(oracles.mlp)
    matrix, rhs = dense(case, "ggn"), rhs_for(case)
    iterates = [rhs / 2]
    for _ in range(depth):
        iterates.append(iterates[-1] + (rhs - iterates[-1] @ matrix - 0.2 * iterates[-1]) / 2)
    # Windows end at powers of two: the last whole one, with what came after it.
    start = {1: 1, 2: 2, 3: 2, 6: 3, 8: 5, 11: 5}[depth]
    expected = torch.stack(iterates[start:]).mean(0)
    solver = Lissa(damping=0.2, scale=2.0, recursion_depth=depth, batch_size=99, tolerance=1e-12)
    torch.testing.assert_close(solve(solver, case).vectors, expected, rtol=1e-10, atol=1e-14)


def test_lissa_depends_on_its_seed_and_on_nothing_else() -> None:
    case = make(oracles.mlp)
    solver = Lissa(damping=0.5, scale=3.0, batch_size=6, recursion_depth=16, repeats=2)
    first, again = solve(solver, case), solve(solver, case)
    assert torch.equal(first.vectors, again.vectors)
    assert not torch.allclose(first.vectors, solve(solver.model_copy(update={"seed": 1}), case).vectors, rtol=1e-3)


def test_lissa_repeats_come_from_different_minibatches_and_are_averaged() -> None:
    case = make(oracles.mlp)
    settings = {"damping": 0.5, "scale": 3.0, "batch_size": 4, "recursion_depth": 16, "tolerance": 1e-9}
    expected = oracles.solution(dense(case, "ggn"), 0.5, rhs_for(case))
    errors = [error(solve(Lissa(**settings, repeats=r, seed=1), case).vectors, expected) for r in (1, 12)]
    assert errors[1] < 0.6 * errors[0]


def test_lissa_with_too_small_a_scale_names_one_that_works() -> None:
    case = make(oracles.mlp)
    solver = Lissa(damping=0.1, scale=0.2, batch_size=9)
    with pytest.raises(StageError, match=r"diverged after \d+ steps: scale = 0\.2 is below") as caught:
        solve(solver, case)
    scale = named(caught, "scale")
    assert scale > (ends(case, "ggn")[1] + 0.1) / 2
    found = solve(solver.model_copy(update={"scale": scale}), case)
    assert error(found.vectors, oracles.solution(dense(case, "ggn"), 0.1, rhs_for(case))) < 0.1


def test_lissa_diverging_to_nan_is_an_error_too() -> None:
    with pytest.raises(StageError, match="diverged after 8 steps"):
        solve(Lissa(damping=0.1, scale=1e-60, batch_size=9), make(oracles.mlp))


def test_lissas_own_scale_is_above_every_minibatchs_largest_eigenvalue() -> None:
    case = make(oracles.conv)
    solver = Lissa(curvature="hessian", batch_size=5, damping=0.1)
    prepared = oracles.prepared(solver, case.curvature("hessian"))
    whole = max(map(abs, ends(case, "hessian")))
    assert 1.25 * float(prepared["largest_eigenvalue"]) > whole
    assert "largest_eigenvalue" not in oracles.prepared(Lissa(scale=3.0), case.curvature("ggn"))


def test_lissa_stops_early_when_it_has_settled(caplog: pytest.LogCaptureFixture) -> None:
    case = make(oracles.mlp)
    with caplog.at_level(logging.INFO, "stages"):
        found = solve(Lissa(damping=1.0, batch_size=99, recursion_depth=5000, tolerance=1e-3), case)
    assert found.iterations.max() <= 64
    [record] = caplog.records
    assert record.getMessage() == f"lissa: settled after at most {int(found.iterations.max())} of 5000 steps"


def test_lissa_out_of_depth_says_so(caplog: pytest.LogCaptureFixture) -> None:
    case = make(oracles.mlp)
    found = solve(Lissa(damping=1e-3, batch_size=99, recursion_depth=9, tolerance=1e-3), case)
    assert found.iterations.tolist() == [9] * 5
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert re.search(r"5 of 5 samples have not settled within 0\.001 after 9 steps", record.getMessage())


def test_lissa_says_when_fewer_repeats_would_have_done(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "stages"):
        solve(Lissa(damping=1.0, batch_size=11, repeats=4, tolerance=0.05), make(oracles.mlp))
    assert "lissa: 1 repeats would have been within the tolerance; 4 were made" in caplog.messages


def test_lissa_with_too_few_repeats_says_so(caplog: pytest.LogCaptureFixture) -> None:
    settings = {"damping": 0.5, "scale": 1.0, "batch_size": 1, "recursion_depth": 16, "tolerance": 0.02}
    solve(Lissa(**settings, repeats="auto"), make(oracles.mlp), rhs=rhs_for(make(oracles.mlp))[:1])
    assert any("above the tolerance 0.02 after 16 repeats" in message for message in caplog.messages)


# ---- the stage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
def test_the_stage_solves_for_each_sample_of_its_block_however_many_fit_at_once(rows_at_once: int) -> None:
    case = make(oracles.mlp)
    solver = Cg(damping={"relative": 2.0}, tolerance=1e-7)
    curvature = case.curvature("ggn", 64)
    prepared = oracles.prepared(solver, curvature)
    memory = solver.fixed_bytes(curvature) + 7 * 43 * 4 + rows_at_once * solver.state_vectors * 43 * 8
    given = math.ceil(memory * SPARE / (SPARE - 1))
    stage = STest(solver, curvature, prepared, case.data, 7, DeviceBatch(2), given)
    assert stage.rows_at_once == rows_at_once
    assert stage.held_bytes(rows_at_once) == memory
    stage.prepare()
    damping = 2 * float(prepared["mean_eigenvalue"])
    expected = oracles.solution(dense(case, "ggn"), damping, gradients(case)).numpy()
    assert len(stage.grid) == 2
    for block in stage.grid:
        rows, found = block.bounds["test"], stage.compute(block)
        np.testing.assert_allclose(found["vectors"], expected[rows], rtol=1e-5, atol=1e-6)
        assert (found["residual"] <= 1e-7).all()
        assert (found["damping"] == damping).all()
        losses = torch.stack(oracles.sample_losses(case)).detach()[rows]
        np.testing.assert_allclose(found["measurement"], losses, rtol=1e-6)
        np.testing.assert_array_equal(found["label"], case.data.tree[1][rows])
        assert found["batch"].tolist() == [[2, 64]]
        for spec in stage.arrays:
            assert len(found[spec.name]) == (1 if spec.name == "batch" else rows.stop - rows.start)
            assert found[spec.name].dtype == np.dtype(spec.dtype)


def test_the_right_hand_side_is_the_measurements_gradient_not_the_losss() -> None:
    class Margin(ClassTask):
        def measurements(self, outputs: Tensor, batch: Any) -> Tensor:
            return outputs.gather(1, batch[1].unsqueeze(1))[:, 0]

    base = make(oracles.softmax_regression)
    case = Case("", base.model, Margin(0.03), base.data)
    stage = STest(Identity(), case.curvature("ggn"), {}, case.data, 12, DeviceBatch(4), 2**20)
    stage.prepare()
    x, labels = case.data.tree
    ones = torch.nn.functional.one_hot(labels, 3).double()
    expected = torch.cat([(ones.unsqueeze(2) * x.unsqueeze(1)).flatten(1), ones], dim=1)
    np.testing.assert_allclose(stage.compute(stage.grid.block((0,)))["vectors"], expected, rtol=1e-6)
