"""``fisher`` against the dense matrix, by both sides and of low rank; and what it reads, tile by tile."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from stages.gradients import AHEAD, Gradients, runs, within
from stages.s_test.fisher import Fisher
from stages.s_test.prepare_fisher import OfCoordinates, OfGradients, OfRank, OfSamples, shared_with
from stages.s_test.solver import Solution
from stages.stage import StageError, silent
from tests import oracles
from tests.oracles import CPU, Case, ClassTask, Data, make

TILE = (5, 7)
FORMS = pytest.mark.parametrize("form", ["coordinates", "samples", "rank"])


def wide() -> Case:
    """12 samples, 43 coordinates, two penalties."""
    return make(oracles.mlp)


def tall(l2: float | dict[str, float] = 0.05) -> Case:
    """40 samples, 15 coordinates."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Linear(4, 3).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    return Case("tall", model, ClassTask(l2), Data((x, torch.randint(0, 3, (40,), generator=generator))))


def matrix(case: Case, gradients: Tensor | None = None) -> Tensor:
    """GᵀG / N with the penalty, (D, D)."""
    gradients = oracles.gradients(case) if gradients is None else gradients
    return gradients.T @ gradients / len(gradients) + torch.diag(oracles.penalty(case))


def stage_of(solver: Fisher, case: Case, tile: tuple[int, int] = TILE, parts: int = 3) -> OfGradients:
    rows = oracles.gradients(case).numpy()
    l2, form = case.function.l2(), solver.form(*rows.shape)
    gradients = Gradients(rows, len(rows), (tile[0], rows.shape[1]) if form == "coordinates" else tile, CPU)
    if form == "coordinates":
        return OfCoordinates(gradients, l2, parts)
    if form == "samples":
        return OfSamples(gradients, l2, -(-len(rows) // parts))
    return OfRank(gradients, l2, parts, int(solver.rank), solver.seed)


def prepared(stage: OfGradients) -> dict[str, Any]:
    """Run a preparation block by block, into arrays of NaN."""
    arrays = {spec.name: np.full(spec.shape, np.nan) for spec in stage.arrays}
    for block in stage.grid:
        found = stage.compute(block)
        for spec in stage.arrays:
            region = spec.region(stage.grid, block)
            assert found[spec.name].shape == arrays[spec.name][region].shape
            arrays[spec.name][region] = found[spec.name]
    merged = stage.finish(arrays)
    assert set(merged) == {spec.name for spec in stage.merged}
    assert all(np.shape(merged[spec.name]) == spec.shape for spec in stage.merged)
    every = {**arrays, **merged}
    assert set(stage.summary) <= set(every)
    return {**{name: every[name] for name in stage.summary}, "gradients": stage.gradients}


def rhs_for(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    others = torch.randn(3, len(case.theta), generator=generator, dtype=torch.float64)
    return torch.cat([oracles.gradients(case)[:2], others])


def solve(solver: Fisher, case: Case, rhs: Tensor | None = None, **cut: Any) -> Solution:
    found = prepared(stage_of(solver, case, **cut))
    return solver.start(case.curvature("ggn"), found)(rhs_for(case) if rhs is None else rhs, silent)


def error(found: Tensor, expected: Tensor) -> float:
    """The largest relative error of a row."""
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


# ---- against the dense matrix --------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [1e-6, 0.1, {"relative": 0.1}])
@pytest.mark.parametrize(
    ("case", "settings", "form"),
    [
        (tall(), {}, "coordinates"),
        (tall({"weight": 0.3, "bias": 0.01}), {}, "coordinates"),
        (wide(), {}, "samples"),
        (replace(wide(), task=ClassTask(0.0)), {}, "samples"),
        (make(oracles.conv), {}, "samples"),
        (wide(), {"rank": 12}, "rank"),
        (make(oracles.conv), {"rank": 11}, "rank"),
    ],
    ids=["tall", "two penalties", "wide", "no penalty", "convolution", "rank of all", "convolution, rank of all"],
)
def test_it_equals_the_dense_solution(case: Case, settings: Any, form: str, damping: Any) -> None:
    solver = Fisher(damping=damping, **settings)
    assert solver.form(len(case.data), len(case.theta)) == form
    found = solve(solver, case)
    dense = matrix(case)
    absolute = 0.1 * float(dense.trace()) / len(dense) if isinstance(damping, dict) else damping
    assert error(found.vectors, oracles.solution(dense, absolute, rhs_for(case))) < 1e-7
    assert found.residual.max() < 1e-7
    assert not found.iterations.any()
    assert (found.residual.dtype, found.iterations.dtype) == (torch.float64, torch.int64)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_of_low_rank_it_is_the_solution_with_what_the_basis_has_and_says_what_is_left(rank: int) -> None:
    case, solver = wide(), Fisher(damping=0.01, rank=rank)
    stage = stage_of(solver, case)
    found = prepared(stage)
    basis = torch.from_numpy(found["basis"])
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=torch.float64))
    gradients = oracles.gradients(case)
    low = basis @ basis.T @ gradients
    dense = low.T @ low / 12 + torch.diag(oracles.penalty(case))
    solution = solver.start(case.curvature("ggn"), found)(rhs_for(case), silent)
    assert error(solution.vectors, oracles.solution(dense, 0.01, rhs_for(case))) < 1e-9
    left = rhs_for(case) - solution.vectors @ (matrix(case) + 0.01 * torch.eye(43, dtype=torch.float64))
    torch.testing.assert_close(solution.residual, left.norm(dim=1) / rhs_for(case).norm(dim=1))
    kept = float(stage.finish({n: np.asarray(v) for n, v in sums(stage).items()})["kept_trace"])
    assert kept == pytest.approx(float(low.square().sum() / gradients.square().sum()))
    # The bound of the module's docstring.
    lacking = matrix(case) - dense
    assert torch.linalg.eigvalsh(lacking)[0] > -1e-12
    size, eye = float(torch.linalg.eigvalsh(lacking)[-1]), torch.eye(43, dtype=torch.float64)
    off = torch.linalg.inv(dense + 0.01 * eye) - torch.linalg.inv(matrix(case) + 0.01 * eye)
    assert torch.linalg.eigvalsh(off)[-1] <= size / (0.01 * (0.01 + size))


def sums(stage: OfGradients) -> dict[str, Any]:
    blocks = [stage.compute(block) for block in stage.grid]
    return {spec.name: np.concatenate([found[spec.name] for found in blocks]) for spec in stage.arrays}


def test_a_low_rank_finds_what_gradients_have_of_it() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 4, generator=generator) @ torch.randn(4, 300, generator=generator)
    gradients = Gradients(rows.numpy(), 60, (16, 64), CPU)
    stage = OfRank(gradients, torch.full((300,), 0.1), 2, 8, 0)
    merged = stage.finish(sums(stage))
    assert float(merged["kept_trace"]) == pytest.approx(1, rel=1e-10)


def test_a_basis_depends_on_its_seed_and_not_on_how_coordinates_are_cut_into_parts() -> None:
    case = wide()
    first, again = (prepared(stage_of(Fisher(rank=4), case, parts=parts)) for parts in (1, 5))
    np.testing.assert_array_equal(first["basis"], again["basis"])
    np.testing.assert_allclose(first["gram"], again["gram"], rtol=1e-12, atol=1e-14)
    assert not np.allclose(first["basis"], prepared(stage_of(Fisher(rank=4, seed=1), case))["basis"])


# ---- what every form holds to --------------------------------------------------------------------------------------


def of_form(form: str, **settings: Any) -> tuple[Fisher, Case]:
    return Fisher(**settings, **({"rank": 6} if form == "rank" else {})), tall() if form == "coordinates" else wide()


@FORMS
@pytest.mark.parametrize(("tile", "parts"), [((1, 1), 1), ((3, 50), 4), ((64, 3), 12)])
def test_tiles_and_blocks_change_no_more_than_rounding(form: str, tile: tuple[int, int], parts: int) -> None:
    solver, case = of_form(form, damping=0.1)
    if form == "rank":
        tile = tile[0], TILE[1]  # the signs of a sketch are drawn tile by tile
    found, expected = solve(solver, case, tile=tile, parts=parts), solve(solver, case)
    torch.testing.assert_close(found.vectors, expected.vectors, rtol=1e-9, atol=1e-11)


@FORMS
def test_a_vector_depends_on_no_other(form: str) -> None:
    solver, case = of_form(form, damping=0.1)
    rhs = rhs_for(case)
    together, alone = solve(solver, case), [solve(solver, case, row.unsqueeze(0)).vectors for row in rhs]
    torch.testing.assert_close(together.vectors, torch.cat(alone), rtol=1e-10, atol=1e-13)


@FORMS
def test_zero_gives_zero(form: str) -> None:
    solver, case = of_form(form, damping=0.1)
    rhs = rhs_for(case) * torch.tensor([[1.0], [0], [1], [1], [1]])
    found = solve(solver, case, rhs)
    assert not found.vectors[1].any()
    assert found.residual[1] == 0
    assert torch.isfinite(found.vectors).all()


@FORMS
def test_right_hand_sides_stay_as_they_are(form: str) -> None:
    solver, case = of_form(form, damping=0.1)
    rhs = rhs_for(case)
    solve(solver, case, rhs)
    assert torch.equal(rhs, rhs_for(case))


@FORMS
def test_vectors_in_single_precision_are_solved_as_exactly_as_these_can_be_kept(form: str) -> None:
    solver, case = of_form(form, damping=1e-5)
    found, exact = solve(solver, case, rhs_for(case).float()), solve(solver, case, rhs_for(case).float().double())
    assert error(found.vectors.double(), exact.vectors) < 1e-6


@FORMS
def test_damping_is_relative_to_the_exact_mean_eigenvalue(form: str) -> None:
    solver, case = of_form(form, damping={"relative": 0.3})
    dense = matrix(case)
    expected = 0.3 * float(dense.trace()) / len(dense)
    assert solver.resolved(prepared(stage_of(solver, case))) == pytest.approx(expected, rel=1e-12)


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_no_damping_is_refused_where_gradients_do_not_span_the_coordinates() -> None:
    case = replace(wide(), task=ClassTask({"0.weight": 0.1}))
    with pytest.raises(StageError, match=r"12 gradients do not span 43 coordinates.*damping = ") as caught:
        solve(Fisher(damping=0.0), case)
    damping = float(re.findall(r"damping = (\S+) ", str(caught.value))[0])
    found = solve(Fisher(damping=damping), case)
    assert error(found.vectors, oracles.solution(matrix(case), damping, rhs_for(case))) < 1e-6


def test_damping_that_rounding_hides_is_refused() -> None:
    case = replace(wide(), task=ClassTask(0.0), data=Data(wide().data.batch([0] * 12)))
    with pytest.raises(StageError, match="use a larger damping"):
        solve(Fisher(damping=1e-25), case)


def test_no_damping_is_needed_where_every_coordinate_has_a_penalty() -> None:
    case = replace(wide(), task=ClassTask({"0.*": 0.3, "2.*": 0.02}))
    found = solve(Fisher(damping=0.0), case)
    assert error(found.vectors, oracles.solution(matrix(case), 0.0, rhs_for(case))) < 1e-9


def test_a_singular_matrix_is_refused() -> None:
    case = tall()
    singular = replace(case, task=ClassTask(0.0))
    with pytest.raises(StageError, match="not positive definite"):  # softmax: a direction without curvature
        solve(Fisher(damping=0.0), singular)


@pytest.mark.parametrize(
    ("count", "dim", "what", "rank"),
    [
        (100_000, 20_000, "20000 × 20000 matrix", 256),
        (30_000, 11_000_000, "30000 × 30000 products of gradients", 1024),
    ],
)
def test_what_does_not_fit_is_refused_with_a_rank_that_does(count: int, dim: int, what: str, rank: int) -> None:
    memory = 2 * 2**30
    with pytest.raises(StageError, match=rf"GiB for .*{what}.* use rank = {rank}$"):
        Fisher().check(count, dim, 1, memory)
    Fisher(rank=rank).check(count, dim, 1, memory)
    with pytest.raises(StageError, match=f"basis of {count} × {2 * rank}"):
        Fisher(rank=2 * rank).check(count, dim, 1, memory)


def test_a_rank_that_there_is_not_is_refused() -> None:
    with pytest.raises(StageError, match=r"rank = 13, and 12 gradients of 43 coordinates"):
        Fisher(rank=13).check(12, 43, 1, 2**30)
    Fisher(rank=12).check(12, 43, 1, 2**30)


# ---- how gradients are read ----------------------------------------------------------------------------------------


@given(st.integers(1, 40))
def test_of_every_two_bands_one_has_the_products_with_the_other(bands: int) -> None:
    pairs = [frozenset((band, other)) for band in range(bands) for other in shared_with(band, bands)]
    assert sorted(map(sorted, pairs)) == [list(pair) for pair in itertools.combinations(range(bands), 2)]
    sizes = [len(shared_with(band, bands)) for band in range(bands)]
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.sampled_from([0.0, 0.1, 0.5]), min_size=1, max_size=30), st.data())
def test_runs_are_every_coordinate_once_with_its_penalty(values: list[float], data: st.DataObject) -> None:
    penalties, pieces = runs(torch.tensor(values, dtype=torch.float64))
    start = data.draw(st.integers(0, len(values) - 1))
    part = slice(start, data.draw(st.integers(start + 1, len(values))))
    assert penalties == sorted(set(values))
    found = [penalties[n] for n, run in within(pieces, part) for _ in range(run.start, run.stop)]
    assert found == values[part]


def test_no_more_tiles_are_read_ahead_than_said_and_an_error_is_the_readers() -> None:
    asked: list[Any] = []

    class Rows:
        shape = (8, 6)

        def __getitem__(self, index: Any) -> np.ndarray:
            asked.append(index)
            if index[0].start == 6:
                raise OSError("no such disk")
            return np.zeros((2, 3), np.float32)

    gradients = Gradients(Rows(), 8, (2, 3), CPU)
    tiles = gradients.read((samples, part) for part in gradients.coordinates() for samples in gradients.samples())
    for number in range(3):
        assert next(tiles)[0] == slice(2 * number, 2 * number + 2)
        assert len(asked) <= number + 1 + AHEAD + 1
    with pytest.raises(OSError, match="no such disk"):
        next(tiles)
    assert len(asked) < 8
