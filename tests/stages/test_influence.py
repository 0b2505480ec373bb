from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stages.influence import Influence, _transposed, columns_at_once, scores
from stages.influence.ranking import NO_ID, bottom_k, top_k
from stages.stage import ArraySpec, StageError
from tests import oracles

Found = dict[str, NDArray[Any]]
SMALL = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def stage_for(vectors: NDArray[Any], gradients: NDArray[Any], **changes: Any) -> Influence:
    count, tests = gradients.shape[0], vectors.shape[0]
    arguments = {
        "train_ids": np.arange(count, dtype=np.int64),
        "test_ids": np.arange(tests, dtype=np.int64),
        "bands": (tests, count),
        "read_rows": count,
        "read_columns": gradients.shape[1],
        "tile_columns": gradients.shape[1],
        "rows_first": False,
        "curvature_samples": count,
        "top_k": min(5, count),
        "store_scores": True,
    }
    return Influence(vectors, gradients, **{**arguments, **changes})


def run(stage: Influence) -> Found:
    """Run all blocks and merge them, as the machine does; every value of every array must be filled."""

    def empty(spec: ArraySpec) -> NDArray[Any]:
        return np.full(spec.shape, -7 if spec.dtype == "int64" else np.nan, spec.dtype)

    arrays = {spec.name: empty(spec) for spec in stage.arrays}
    for block in stage.grid:
        found = stage.compute(block)
        assert set(found) == set(arrays)
        for spec in stage.arrays:
            assert found[spec.name].dtype == np.dtype(spec.dtype)
            region = arrays[spec.name][spec.region(stage.grid, block)]
            assert found[spec.name].shape == region.shape
            region[...] = found[spec.name]
    merged = stage.finish(arrays)
    assert {name: (a.shape, a.dtype) for name, a in merged.items()} == {
        spec.name: (spec.shape, np.dtype(spec.dtype)) for spec in stage.merged
    }
    return {**arrays, **merged}


def matrices(tests: int = 7, count: int = 40, dim: int = 23) -> tuple[NDArray[Any], NDArray[Any]]:
    draw = np.random.default_rng(0)
    return draw.normal(size=(tests, dim)).astype(np.float32), draw.normal(size=(count, dim)).astype(np.float32)


def whole_numbers(tests: int, count: int, dim: int, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Matrices of few small whole numbers: products are exact in any order, and tie all the time."""
    draw = np.random.default_rng(seed)
    return draw.integers(-1, 2, (tests, dim)).astype(np.float32), draw.integers(-1, 2, (count, dim)).astype(np.float32)


def brute(scores: NDArray[Any], ids: NDArray[Any], k: int, *, largest: bool) -> list[list[int]]:
    return [oracles.ranking(row, ids, k, largest=largest) for row in scores]


LAYOUTS = [
    {},
    {"bands": (3, 40)},
    {"bands": (7, 11)},
    {"bands": (2, 16), "read_rows": 5},
    {"read_rows": 7, "read_columns": 4, "tile_columns": 3},
    {"read_rows": 7, "read_columns": 4, "rows_first": True},
    {"bands": (1, 1), "read_columns": 1, "rows_first": True},
    {"bands": (4, 13), "read_rows": 6, "read_columns": 10, "store_scores": False},
]


# ---- scores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_scores_are_products_over_n_in_any_layout(layout: dict[str, Any]) -> None:
    vectors, gradients = matrices()
    expected = vectors.astype(np.float64) @ gradients.astype(np.float64).T / 40
    found = run(stage_for(vectors, gradients, **layout))
    if "store_scores" in layout:
        assert "scores" not in found
    else:
        np.testing.assert_allclose(found["scores"], expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_allclose(found["mean_scores"], expected.mean(0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        found["offset"], -vectors.astype(np.float64) @ gradients.mean(0, dtype=np.float64) / 40, rtol=0, atol=1e-8
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_neither_blocks_nor_tiles_nor_their_order_change_a_ranking(layout: dict[str, Any]) -> None:
    vectors, gradients = whole_numbers(7, 40, 23, 1)
    one, cut = run(stage_for(vectors, gradients)), run(stage_for(vectors, gradients, **layout))
    for spec in stage_for(vectors, gradients).merged:
        np.testing.assert_array_equal(cut[spec.name], one[spec.name], err_msg=spec.name)


@pytest.mark.parametrize("merged_bytes", [1, 12 * 5 * 7 * 2, 2**20])
def test_candidates_may_be_merged_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch, merged_bytes: int) -> None:
    vectors, gradients = whole_numbers(7, 40, 23, 1)
    one = run(stage_for(vectors, gradients))
    monkeypatch.setattr(scores, "MERGED_BYTES", merged_bytes)
    cut = run(stage_for(vectors, gradients, bands=(3, 6)))
    for spec in stage_for(vectors, gradients).merged:
        np.testing.assert_array_equal(cut[spec.name], one[spec.name], err_msg=spec.name)


def test_a_rising_measurement_is_a_positive_score() -> None:
    """Without a sample whose gradient is along H s, the loss of the test falls less far: x = s, one step of 1 / N."""
    vectors, gradients = np.array([[2.0]], np.float32), np.array([[3.0], [-1.0]], np.float32)
    found = run(stage_for(vectors, gradients, top_k=2))
    assert found["scores"].tolist() == [[3.0, -1.0]]
    assert found["helpful_ids"].tolist() == [[0, 1]]
    assert found["harmful_ids"].tolist() == [[1, 0]]
    assert found["offset"].tolist() == [-1.0]


def test_every_tile_is_read_once_and_the_vectors_once_for_each_band_of_columns() -> None:
    class Watched:
        def __init__(self, array: NDArray[Any]) -> None:
            self.array, self.shape, self.seen = array, array.shape, np.zeros(array.shape, int)
            self.reads = 0

        def __getitem__(self, index: Any) -> NDArray[Any]:
            self.seen[index] += 1
            self.reads += 1
            return self.array[index]

    vectors, gradients = matrices()
    watched_s, watched_g = Watched(vectors), Watched(gradients)
    stage = stage_for(watched_s, watched_g, read_rows=6, read_columns=10)  # type: ignore[arg-type]
    stage.compute(stage.grid.block((0, 0)))
    assert (watched_s.seen == 1).all()
    assert (watched_g.seen == 1).all()
    assert (watched_s.reads, watched_g.reads) == (3, 21)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("side", ["vectors", "gradients"])
def test_a_score_that_is_not_finite_names_its_samples(side: str, value: float) -> None:
    vectors, gradients = matrices()
    (vectors if side == "vectors" else gradients)[5, 3] = value
    stage = stage_for(vectors, gradients, bands=(4, 3), top_k=1)
    block = stage.grid.block((1, 1) if side == "gradients" else (1, 2))
    named = r"test 4 and training sample 5 " if side == "gradients" else r"test 5 and training sample 6 "
    with pytest.raises(StageError, match=named):
        stage.compute(block)


def test_scores_beyond_single_precision_are_refused() -> None:
    huge = np.full((2, 3), 1e30, np.float32)
    with pytest.raises(StageError, match="beyond float32"):
        run(stage_for(huge, huge, top_k=1))


# ---- rankings ------------------------------------------------------------------------------------------------------


@SMALL
@given(
    tests=st.integers(1, 4),
    count=st.integers(1, 30),
    bands=st.tuples(st.integers(1, 4), st.integers(1, 30)),
    read_rows=st.integers(1, 30),
    rows_first=st.booleans(),
    k=st.integers(1, 30),
    seed=st.integers(0, 2**16),
)
def test_rankings_are_those_of_sorting_everything(
    tests: int, count: int, bands: tuple[int, int], read_rows: int, rows_first: bool, k: int, seed: int
) -> None:
    vectors, gradients = whole_numbers(tests, count, 3, seed)
    ids = np.random.default_rng(seed).permutation(3 * count)[:count].astype(np.int64)
    k = min(k, count)
    stage = stage_for(
        vectors,
        gradients,
        train_ids=ids,
        bands=bands,
        read_rows=read_rows,
        read_columns=2,
        rows_first=rows_first,
        top_k=k,
    )
    found = run(stage)
    for side, largest in (("helpful", True), ("harmful", False)):
        expected = brute(found["scores"], ids, k, largest=largest)
        assert found[f"{side}_ids"].tolist() == expected
        position = {int(i): column for column, i in enumerate(ids)}
        for row, chosen in enumerate(expected):
            columns = [position[i] for i in chosen]
            np.testing.assert_array_equal(found[f"{side}_scores"][row], found["scores"][row, columns])
        assert found[f"mean_{side}_ids"].tolist() == brute(found["mean_scores"][None], ids, k, largest=largest)[0]
    np.testing.assert_array_equal(found["train_ids"], ids)


@SMALL
@given(
    scores=st.lists(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1e-30, 1.0, 3.0]), max_size=40),
    k=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
def test_top_and_bottom_are_those_of_sorting_with_ties_by_ascending_id(scores: list[float], k: int, seed: int) -> None:
    ids = np.random.default_rng(seed).permutation(100)[: len(scores)].astype(np.int64)
    row = np.array([scores], np.float32)
    for pick, largest, nothing in ((top_k, True, -np.inf), (bottom_k, False, np.inf)):
        found_ids, found = pick(row, ids, k)
        kept = min(k, len(scores))
        assert found_ids.shape == found.shape == (1, k)
        assert found_ids[0, :kept].tolist() == oracles.ranking(row[0], ids, k, largest=largest)
        assert found[0, :kept].tolist() == sorted(row[0].tolist(), reverse=largest)[:kept]
        assert (found_ids[0, kept:] == NO_ID).all()
        assert (found[0, kept:] == nothing).all()


def test_rows_may_have_ids_of_their_own() -> None:
    scores = np.array([[1.0, 1.0, 0.0], [2.0, 2.0, 2.0]], np.float32)
    ids = np.array([[9, 4, 1], [5, 6, 2]])
    assert top_k(scores, ids, 2)[0].tolist() == [[4, 9], [2, 5]]
    assert bottom_k(scores, ids, 2)[0].tolist() == [[1, 4], [2, 5]]


def test_all_equal_scores_rank_by_ascending_id_on_both_sides() -> None:
    vectors, gradients = np.ones((2, 3), np.float32), np.ones((9, 3), np.float32)
    ids = np.arange(9, dtype=np.int64)[::-1].copy()
    found = run(stage_for(vectors, gradients, train_ids=ids, bands=(1, 4), top_k=4))
    for name in ("helpful_ids", "harmful_ids"):
        assert found[name].tolist() == [[0, 1, 2, 3]] * 2


def test_a_part_with_fewer_samples_than_ranks_is_filled_up_with_what_never_wins() -> None:
    vectors, gradients = matrices(2, 7)
    stage = stage_for(vectors, gradients, bands=(2, 3), top_k=5)
    found = run(stage)
    assert (found["part_helpful_ids"][2, :, 1:] == NO_ID).all()
    assert (found["part_harmful_scores"][2, :, 1:] == np.inf).all()
    for name in ("helpful", "harmful"):
        assert (found[f"{name}_ids"] >= 0).all()
        assert np.isfinite(found[f"{name}_scores"]).all()


def test_few_wide_solutions_are_read_a_tile_at_a_time() -> None:
    """A tile of two rows has a million columns: to read it for each eight thousand is to decode it 128 times."""
    reads: list[slice] = []

    class Counted:
        shape = (2, 3 * 2**20)

        def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
            reads.append(index[1])
            return np.ones((2, index[1].stop - index[1].start), np.float32)

    assert _transposed(Counted(), slice(0, 2), slice(5, 3 * 2**20)).shape == (3 * 2**20 - 5, 2)
    assert len(reads) == 3
    assert max(part.stop - part.start for part in reads) == columns_at_once(2) == 2**20
    assert columns_at_once(1024) == 2**13
