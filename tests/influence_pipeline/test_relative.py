"""Scores relative to norms, against products of the arrays as plain zarr reads them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import zarr

import influence_pipeline as ip
from influence_pipeline.relative import Relative, inverse, ranked, read_rows, row_norms
from stages.influence.ranking import bottom_k, top_k
from tests import tiny
from tests.conftest import remember_blocks
from tests.influence_pipeline.test_by_parameter import decoded, solutions

Make = Callable[..., ip.Pipeline]
N, T = 60, 10
KINDS: tuple[Relative, ...] = get_args(Relative)
EVERY = pytest.mark.parametrize("relative", KINDS)
EXACT: dict[str, Any] = {"solver": "exact", "damping": 0.1}
IDENTITY: dict[str, Any] = {"solver": "identity"}


def stored(cache: Path, pattern: str) -> np.ndarray:
    (path,) = cache.glob(pattern)
    return zarr.open_array(path, mode="r")[:].astype(np.float64)


def dense(cache: Path, relative: str) -> np.ndarray:
    """Return relative scores in float64, of gradients, solutions and the matrix in the cache."""
    s, g, matrix = solutions(cache), decoded(cache), stored(cache, "curvature/*/matrix")
    change = np.linalg.solve(matrix + 0.1 * np.eye(len(matrix)), g.T).T
    norms = {
        "cosine": np.outer(np.linalg.norm(s, axis=1), np.linalg.norm(g, axis=1)),
        "l-relatif": np.sqrt((g * change).sum(1))[None],
        "theta-relatif": np.linalg.norm(change, axis=1)[None],
    }
    return s @ g.T / norms[relative]


def order(scores: np.ndarray, ids: np.ndarray, k: int, *, largest: bool) -> np.ndarray:
    return np.stack([ids[np.lexsort((ids, -row if largest else row))[:k]] for row in scores])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished cache with self-influence, of the dense solver."""
    folder = tmp_path_factory.mktemp("relative") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        remember_blocks(patch)
        tiny.shrink_blocks()
        pipeline = ip.Pipeline(tiny.experiment(), folder, tiny.settings(s_test=EXACT))
        pipeline.run()
        pipeline.self_influence()
    return folder


@pytest.fixture
def influences(whole: Path) -> ip.Influences:
    return ip.Influences.open(whole, "holdout")


# ---- values ----------------------------------------------------------------------------------------------------------


@EVERY
def test_relative_scores_are_those_of_the_dense_answer(
    influences: ip.Influences, whole: Path, relative: Relative
) -> None:
    found, expected = influences.relative_scores(relative), dense(whole, relative)
    assert (found.shape, found.dtype) == ((T, N), np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_array_equal(influences.relative_scores(relative, [7, 0]), found[[7, 0]])
    if relative == "cosine":
        assert np.abs(found).max() <= 1.001


@EVERY
@pytest.mark.parametrize("k", [1, 7, N])
def test_rankings_are_those_of_the_relative_scores(influences: ip.Influences, relative: Relative, k: int) -> None:
    scores = influences.relative_scores(relative)
    for (ids, found), largest in ((influences.helpful(k, relative), True), (influences.harmful(k, relative), False)):
        assert (ids.dtype, found.dtype) == (np.int64, np.float32)
        np.testing.assert_array_equal(ids, order(scores, influences.train_ids, k, largest=largest))
        np.testing.assert_array_equal(found, np.take_along_axis(scores, ids, axis=1))
    assert (influences.helpful(k, relative)[0] != influences.helpful(k)[0]).any(), "norms make a difference"


def test_relative_to_its_own_norm_no_sample_is_above_itself(make: Make) -> None:
    """Of sᵢᵀgⱼ / √(gⱼᵀ(H + λI)⁻¹gⱼ) the largest is j = i, by Cauchy and Schwarz."""
    pipeline = make(tests={"train": tiny.points(N, 1)}, s_test=EXACT)
    influences = pipeline.run()["train"]
    pipeline.self_influence()
    assert influences.helpful(1, "l-relatif")[0][:, 0].tolist() == list(range(N))
    assert (influences.helpful(1)[0][:, 0] != np.arange(N)).any()


class Margin(ip.Classification):
    higher_is_better = True


def test_higher_is_better_turns_relative_rankings_too(make: Make, cache: Path) -> None:
    loss = make(s_test=IDENTITY).run()["holdout"]
    margin = make(cache.parent / "margin", task=Margin(l2=0.01), s_test=IDENTITY).run()["holdout"]
    np.testing.assert_array_equal(margin.relative_scores("cosine"), loss.relative_scores("cosine"))
    np.testing.assert_array_equal(margin.helpful(4, "cosine"), loss.harmful(4, "cosine"))


class Some(ip.Classification):
    """A loss that is zero for one of the labels."""

    def losses(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return super().losses(outputs, batch) * (batch[1] != 1)


def test_a_zero_gradient_or_solution_has_zero(make: Make) -> None:
    pipeline = make(task=Some(l2=0.01), s_test=EXACT)
    influences = pipeline.run()["holdout"]
    pipeline.self_influence()
    tests, trains = influences.labels()
    assert tests is not None
    assert trains is not None
    zero = (tests == 1)[:, None] | (trains == 1)[None]
    assert zero.any()
    for relative in KINDS:
        found = influences.relative_scores(relative)
        np.testing.assert_array_equal(found == 0, zero)
        ids, _ = influences.helpful(N, relative)
        np.testing.assert_array_equal(ids, order(found, influences.train_ids, N, largest=True))


# ---- reading in pieces -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [(1, 1), (2, 3), (4, 5), (3, 100), (100, 7)])
@pytest.mark.parametrize("k", [1, 4, 11])
@pytest.mark.parametrize("pick", [top_k, bottom_k])
def test_rankings_do_not_depend_on_how_scores_are_read(tile: tuple[int, int], k: int, pick: Any) -> None:
    draw = np.random.default_rng(0)
    values, ids = draw.integers(0, 4, (5, 11)).astype(np.float32), draw.permutation(11)
    found_ids, found = ranked(values, ids, k, pick, tile)
    np.testing.assert_array_equal(found_ids, order(values, ids, k, largest=pick is top_k) if k else found_ids)
    np.testing.assert_array_equal(found, pick(values, ids, k)[1])


@pytest.mark.parametrize("tile", [(1, 1), (2, 3), (10, 10)])
def test_norms_of_rows_do_not_depend_on_how_they_are_read(tile: tuple[int, int]) -> None:
    rows = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32) * 1e20
    np.testing.assert_allclose(row_norms(rows, tile), np.linalg.norm(rows.astype(np.float64), axis=1), rtol=1e-12)


@pytest.mark.parametrize("tile", [(1, 1), (2, 3), (10, 10)])
def test_rows_do_not_depend_on_how_they_are_read(tile: tuple[int, int]) -> None:
    values = np.random.default_rng(0).standard_normal((8, 7)).astype(np.float32)
    for wanted in ([0, 1, 2, 3, 4, 5, 6, 7], [3, 4, 5, 1, 0, 7], [2, 2], [7]):
        np.testing.assert_array_equal(read_rows(values, np.array(wanted), tile), values[wanted])


def test_nothing_is_divided_by_zero() -> None:
    assert inverse(np.array([0.0, 4.0, 1e-30], np.float32)).tolist()[:2] == [0.0, 0.25]
    assert np.isfinite(inverse(np.array([1e-40], np.float32))).all()


def test_more_ranks_than_were_kept_are_read_in_pieces_too(influences: ip.Influences) -> None:
    scores = influences.scores[:]
    np.testing.assert_array_equal(influences.helpful(N)[0], order(scores, influences.train_ids, N, largest=True))


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_norms_that_there_are_not_are_refused(influences: ip.Influences) -> None:
    with pytest.raises(ip.RequestError, match=r"relative = 'norm': must be one of 'cosine', 'l-relatif',"):
        influences.helpful(1, "norm")  # type: ignore[arg-type]
    with pytest.raises(ip.RequestError, match="k = 61"):
        influences.helpful(61, "cosine")
    with pytest.raises(ip.RequestError, match="test samples: 10"):
        influences.relative_scores("cosine", [10])


def test_scores_that_were_not_stored_are_refused(make: Make) -> None:
    found = make(influence={"store_scores": False}, s_test=IDENTITY).run()["holdout"]
    with pytest.raises(ip.RequestError, match="store_scores = true"):
        found.helpful(1, "cosine")
    with pytest.raises(ip.RequestError, match="store_scores = true"):
        found.relative_scores("cosine")


def test_gradients_that_are_not_there_are_refused(make: Make) -> None:
    pipeline = make(grad_z={"store": False}, s_test=IDENTITY)
    influences = pipeline.run()["holdout"]
    pipeline.self_influence()
    for relative in KINDS:
        with pytest.raises(ip.MissingStage, match=r"no relative scores: the gradients .* store = false"):
            influences.helpful(1, relative)


def test_self_influence_is_asked_for_with_the_call(make: Make) -> None:
    pipeline = make(s_test=EXACT)
    influences = pipeline.run()["holdout"]
    make(s_test=IDENTITY).self_influence()
    influences.helpful(1, "cosine")
    for relative in ("l-relatif", "theta-relatif"):
        with pytest.raises(
            ip.MissingStage, match=r"pipeline\.self_influence\(\), or `influence-pipeline self-influence"
        ):
            influences.helpful(1, relative)
    pipeline.self_influence()
    influences.helpful(1, "l-relatif")


def test_what_changed_since_is_refused(make: Make) -> None:
    pipeline = make(s_test=EXACT)
    influences = pipeline.run()["holdout"]
    pipeline.self_influence()
    changed = tiny.points(N, 1)
    changed.tensors[0][20] += 1
    pipeline = make(train=changed, s_test=EXACT)
    pipeline.refresh()
    pipeline.grad_z()
    for relative in KINDS:
        with pytest.raises(ip.MissingStage, match="no relative scores: gradients or solutions in the cache are others"):
            influences.helpful(1, relative)
    influences = pipeline.run()["holdout"]
    assert influences.helpful(1, "cosine")[0].shape == (T, 1)
    with pytest.raises(ip.MissingStage, match="not complete"):
        influences.helpful(1, "l-relatif")
    pipeline.self_influence()
    assert influences.helpful(1, "l-relatif")[0].shape == (T, 1)


def test_a_block_of_self_influence_that_is_lost_is_refused(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    next((tmp_path / "copy").glob("self_influence/*/blocks/c/0/0")).unlink()
    with pytest.raises(ip.MissingStage, match="not complete"):
        ip.Influences.open(tmp_path / "copy", "holdout").helpful(1, "l-relatif")
