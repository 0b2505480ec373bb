"""Self-influence of every solver against a dense answer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from stages.s_test.cg import Cg
from stages.s_test.exact import Exact
from stages.s_test.identity import Identity
from stages.s_test.solver import SPARE, Solver
from stages.self_influence import SelfInfluence
from stages.stage import StageError
from tests import oracles
from tests.oracles import CASES, Case, make
from tests.stages.test_solvers import EVERY, KINDS, TABLE, dense, enough, gradients

BAND, ENOUGH = 5, 2**30


def stage(solver: Solver, case: Case, rows: np.ndarray, memory: int = ENOUGH, **held: int) -> SelfInfluence:
    curvature = case.curvature(getattr(solver, "curvature", "ggn"), 64)
    prepared = oracles.prepared(solver, curvature) if memory == ENOUGH else {}
    ids = 100 + np.arange(len(rows))
    sizes = {"kept_bytes": 0, "reading_bytes": 0, **held}
    return SelfInfluence(solver, curvature, prepared, rows, ids, BAND, memory, **sizes)


def values(found: SelfInfluence) -> dict[str, np.ndarray]:
    """Return every array, of all blocks."""
    parts = [found.compute(block) for block in found.grid]
    for part, block in zip(parts, found.grid, strict=True):
        for spec in found.arrays:
            assert part[spec.name].dtype == np.dtype(spec.dtype)
            assert part[spec.name].shape == tuple(r.stop - r.start for r in spec.region(found.grid, block))
    return {spec.name: np.concatenate([part[spec.name] for part in parts]) for spec in found.arrays}


def expected(case: Case, kind: str, damping: float) -> tuple[np.ndarray, np.ndarray]:
    rows = gradients(case)
    solved = oracles.solution(dense(case, kind), damping, rows)
    return ((rows * solved).sum(1) / len(rows)).numpy(), solved.norm(dim=1).numpy()


@EVERY
@KINDS
@pytest.mark.parametrize("case", CASES)
def test_every_solver_equals_the_dense_answer(case: Case, kind: str, name: str) -> None:
    damping = enough(case, kind)
    found = values(stage(TABLE[name](curvature=kind, damping=damping), case, gradients(case).numpy()))
    own, change = expected(case, kind, damping)
    np.testing.assert_allclose(found["self_influence"], own, rtol=1e-5, atol=1e-7 * own.max())
    np.testing.assert_allclose(found["change"], change, rtol=1e-5, atol=1e-7 * change.max())
    assert found["residual"].max() < 1e-6
    assert (found["damping"] == damping).all()
    assert found["train_ids"].tolist() == list(range(100, 100 + len(own)))
    assert (found["iterations"] == 0).all() == (name == "exact")
    assert found["batch"].tolist() == [64] * math.ceil(len(own) / BAND)


def test_identity_gives_squared_norms() -> None:
    case = make(oracles.mlp)
    found, norms = values(stage(Identity(), case, gradients(case).numpy())), gradients(case).norm(dim=1).numpy()
    np.testing.assert_allclose(found["self_influence"], norms**2 / 12, rtol=1e-6)
    np.testing.assert_allclose(found["change"], norms, rtol=1e-6)


def test_one_over_n_is_of_the_curvatures_samples() -> None:
    case, solver = make(oracles.mlp), Exact(damping=0.1)
    few = stage(solver, case, gradients(case).numpy()[:7])
    own, _ = expected(case, "ggn", 0.1)
    np.testing.assert_allclose(values(few)["self_influence"], own[:7], rtol=1e-5)


@pytest.mark.parametrize("solver", [*(TABLE[name](damping=0.5) for name in TABLE), Identity()], ids=lambda s: s.solver)
def test_a_zero_gradient_has_none(solver: Solver) -> None:
    case = make(oracles.mlp)
    rows = gradients(case).numpy().copy()
    rows[[0, 3]] = 0.0
    found = values(stage(solver, case, rows))
    for name in ("self_influence", "change", "residual"):
        assert (found[name][[0, 3]] == 0).all()
    assert np.flatnonzero(found["self_influence"] == 0).tolist() == [0, 3]


@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
def test_samples_are_solved_for_as_many_at_once_as_fit(rows_at_once: int) -> None:
    case, solver = make(oracles.mlp), Cg(damping=0.5, tolerance=1e-9)
    curvature = case.curvature("ggn", 64)
    memory = solver.fixed_bytes(curvature) + 1000 + rows_at_once * solver.state_vectors * 43 * 8
    given, reads = math.ceil(memory * SPARE / (SPARE - 1)), list[int]()

    class Read:
        shape = (12, 43)

        def __getitem__(self, index: tuple[slice, slice]) -> Any:
            reads.append(index[0].stop - index[0].start)
            return gradients(case).numpy()[index]

    found = stage(solver, case, np.empty((12, 0)), given, kept_bytes=1000)
    found.gradients, found.prepared = Read(), oracles.prepared(solver, curvature)
    assert found.rows_at_once == rows_at_once
    assert found.held_bytes(rows_at_once) == memory
    own, _ = expected(case, "ggn", 0.5)
    np.testing.assert_allclose(values(found)["self_influence"], own, rtol=1e-5)
    assert reads == {1: [1] * 12, 3: [3, 2, 3, 2, 2], 100: [5, 5, 2]}[rows_at_once]


def test_reading_counts_where_it_takes_more_than_solving() -> None:
    case = make(oracles.mlp)
    found = stage(Exact(damping=0.5), case, gradients(case).numpy(), kept_bytes=50, reading_bytes=10**6)
    assert found.held_bytes(3) == 10**6
    assert stage(Exact(damping=0.5), case, gradients(case).numpy(), kept_bytes=50).held_bytes(3) == (
        50 + 3 * 8 * 43**2 + 3 * Exact.state_vectors * 43 * 8
    )


def test_what_does_not_fit_is_refused_before_anything_is_computed() -> None:
    with pytest.raises(StageError, match="43 × 43"):
        stage(Exact(), make(oracles.mlp), np.empty((12, 43)), 3 * 8 * 43**2 - 1)


@pytest.mark.parametrize("broken", [float("nan"), 1e30])
def test_what_is_not_finite_is_refused_by_its_id(broken: float) -> None:
    case = make(oracles.mlp)
    rows = gradients(case).numpy().copy()
    rows[7] = broken
    with pytest.raises(StageError, match=r"training sample 107 is (nan|inf)"):
        values(stage(Exact(damping=0.5), case, rows))


def test_rows_in_single_precision_are_solved_for_in_the_models() -> None:
    case = make(oracles.mlp)
    found = values(stage(Exact(damping=0.5), case, gradients(case).to(torch.float32).numpy()))
    own, _ = expected(case, "ggn", 0.5)
    np.testing.assert_allclose(found["self_influence"], own, rtol=1e-5)
