"""Scores by parameter, against products of the arrays as plain zarr reads them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import influence_pipeline as ip
from influence_pipeline import by_parameter
from influence_pipeline.cache.encoding import GROUP
from tests import tiny

Make = Callable[..., ip.Pipeline]
N, T = 60, 10
SHAPES = {name: tuple(parameter.shape) for name, parameter in tiny.model().named_parameters()}
KRONECKER = {"kind": "kronecker", "dim": 40}


def decoded(cache: Path) -> np.ndarray:
    """Return the gradients in float64, as plain zarr reads them."""
    (group,) = cache.glob("grad_z/*/gradients")
    kept = zarr.open_array(group, mode="r")[:].astype(np.float64)
    if kept.dtype != np.float64 or not (group.parent / "scale").exists():
        return kept
    scale = zarr.open_array(group.parent / "scale", mode="r")[:].astype(np.float64)
    return kept / (scale if scale.shape[1] == 1 else np.repeat(scale, GROUP, axis=1)[:, : kept.shape[1]])


def solutions(cache: Path) -> np.ndarray:
    """Return the solutions in float64, as plain zarr reads them."""
    (array,) = cache.glob("s_test/*/vectors")
    return zarr.open_array(array, mode="r")[:].astype(np.float64)


def widths(projection: dict[str, Any] | None) -> dict[str, int]:
    """Return how many coordinates each parameter has, in the order of the model."""
    if projection is None:
        return {name: math.prod(shape) for name, shape in SHAPES.items()}
    from stages.coordinates import projected
    from stages.projection import Projection

    params = dict(tiny.model().named_parameters())
    first = next(iter(params.values()))
    found = projected(Projection(**projection), params, first.dtype, first.device)
    return {name: one.size for name, one in found.maps.items()}


@pytest.mark.parametrize(
    ("encoding", "projection"), [("float32", None), ("float16", KRONECKER), ("int8", None)], ids=str
)
def test_each_part_is_the_product_of_its_columns_and_they_add_up(
    make: Make, cache: Path, encoding: str, projection: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_parameter, "ENTRIES", 200)  # so that some rows are read one by one
    grad_z = {"encoding": encoding, "projection": projection}
    influences = make(grad_z=grad_z, s_test={"solver": "exact", "damping": 0.1}).run()["holdout"]
    samples, tests = [59, 3, 4, 20, 3], [7, 0]
    parts = influences.by_parameter(samples, tests)
    assert list(parts) == list(SHAPES)
    vectors, gradients = solutions(cache)[tests], decoded(cache)[samples]
    start = 0
    for name, width in widths(projection).items():
        own = slice(start, start + width)
        expected = vectors[:, own] @ gradients[:, own].T / N
        np.testing.assert_allclose(parts[name], expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
        start += width
    assert start == gradients.shape[1]
    scores = influences.scores[:][np.ix_(tests, samples)]
    np.testing.assert_allclose(sum(parts.values()), scores, rtol=1e-4, atol=1e-5 * np.abs(scores).max())


def test_all_tests_and_samples_add_up_to_all_scores(finished: Path) -> None:
    influences = ip.Influences.open(finished, "holdout")
    parts = influences.by_parameter(influences.train_ids)
    assert {part.shape for part in parts.values()} == {(T, N)}
    assert {part.dtype for part in parts.values()} == {np.dtype(np.float32)}
    scores = influences.scores[:]
    np.testing.assert_allclose(sum(parts.values()), scores, atol=1e-5 * np.abs(scores).max())


def test_globs_sum_over_layers_and_the_rest_stays(finished: Path) -> None:
    influences = ip.Influences.open(finished, "holdout")
    parts, layers = influences.by_parameter([5, 6]), influences.by_parameter([5, 6], layers=["2.*", "*.weight"])
    assert list(layers) == ["2.*", "*.weight", "0.bias"]
    np.testing.assert_allclose(layers["2.*"], parts["2.weight"] + parts["2.bias"], rtol=1e-4, atol=1e-9)
    np.testing.assert_array_equal(layers["*.weight"], parts["0.weight"])
    np.testing.assert_array_equal(layers["0.bias"], parts["0.bias"])


def test_ids_are_those_that_are_shown(make: Make) -> None:
    ids = list(range(100, 160))
    influences = make(train_ids=ids).run()["holdout"]
    whole = sum(influences.by_parameter(ids).values())
    np.testing.assert_allclose(sum(influences.by_parameter([131, 104]).values()), whole[:, [31, 4]], rtol=1e-4)
    with pytest.raises(ip.RequestError, match=r"training samples: 3; there are 60, .* from 100 to 159"):
        influences.by_parameter([3])


@pytest.mark.parametrize("ask", [{"samples": [60]}, {"samples": []}, {"samples": [1], "tests": [10]}])
def test_what_is_not_there_is_refused(finished: Path, ask: dict[str, Any]) -> None:
    with pytest.raises(ip.RequestError, match=r"samples: .*; there are .*, with ids from 0"):
        ip.Influences.open(finished, "holdout").by_parameter(**ask)


def test_a_glob_that_matches_nothing_is_refused(finished: Path) -> None:
    with pytest.raises(ip.RequestError, match=r"'3.\*' matches no parameter; there are 0.weight, 0.bias"):
        ip.Influences.open(finished, "holdout").by_parameter([1], layers=["3.*"])


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_shared_coordinates_are_refused_with_what_to_do(make: Make, kind: str) -> None:
    influences = make(grad_z={"projection": {"kind": kind, "dim": 20}}).run()["holdout"]
    with pytest.raises(ip.RequestError, match=rf'a {kind} projection mixes all parameters .* kind = "kronecker"'):
        influences.by_parameter([1])


def test_gradients_that_were_not_stored_are_refused(make: Make) -> None:
    influences = make(grad_z={"store": False}).run()["holdout"]
    with pytest.raises(ip.MissingStage, match="store = false"):
        influences.by_parameter([1])


@pytest.mark.parametrize(("stage", "what"), [("grad_z", "gradients are not in the cache"), ("s_test", "run s_test")])
def test_inputs_that_were_removed_are_refused(finished: Path, tmp_path: Path, stage: str, what: str) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    (group,) = (tmp_path / "copy" / stage).glob("*/zarr.json")
    shutil.rmtree(group.parent)
    with pytest.raises(ip.MissingStage, match=what):
        ip.Influences.open(tmp_path / "copy", "holdout").by_parameter([1])


def test_gradients_of_other_samples_than_the_scores_are_refused(make: Make) -> None:
    influences = make().run()["holdout"]
    changed = tiny.points(60, 1)
    changed.tensors[0][3] += 1
    pipeline = make(train=changed)
    pipeline.refresh()
    pipeline.grad_z()
    with pytest.raises(ip.MissingStage, match="others than these scores are of"):
        influences.by_parameter([1, 3])
    influences = pipeline.run()["holdout"]
    assert influences.by_parameter([3])["0.weight"].shape == (T, 1)
