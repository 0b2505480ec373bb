"""``damping = "auto"``, the default: found once, kept apart from all else that a solver prepares, and shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import influence_pipeline as ip
from influence_pipeline import pipeline, plan, runner
from influence_pipeline.cache import Cache
from influence_pipeline.inventory import listed
from stages.damping import GRID
from tests import tiny

AUTO = {"damping": "auto"}


def made(cache: Path, *, correction: str | None = None, **s_test: Any) -> ip.Pipeline:
    settings = tiny.settings(s_test={**AUTO, **s_test}, influence={"top_k": 1, "correction": correction})
    return ip.Pipeline(tiny.experiment(), cache, settings)


def groups(cache: Path) -> set[str]:
    return {path.name for path in (cache / "curvature").iterdir() if path.is_dir()}


def test_it_is_the_default_where_there_are_products() -> None:
    found = ip.Settings().s_test
    assert (found.solver, found.damping) == ("cg", "auto")
    for name in ("exact", "lissa"):
        assert ip.Settings(s_test={"solver": name}).s_test.damping == "auto"


def test_it_is_prepared_once_beside_what_any_damping_shares(tmp_path: Path) -> None:
    first = made(tmp_path, solver="exact", damping={"relative": 1.0}).run()["holdout"]
    (matrix,) = groups(tmp_path)
    influences = made(tmp_path, solver="exact").run()["holdout"]
    (chosen,) = groups(tmp_path) - {matrix}
    group = zarr.open_group(tmp_path / "curvature" / chosen, mode="r")
    dampings, changes = group["tried_damping"][...], group["objective_change"][...]
    assert dampings.shape == changes.shape == (len(GRID),)
    assert influences.damping == dampings[np.nanargmin(changes)] == group["auto_damping"][()]
    assert min(abs(influences.damping / (first.damping or 0) / factor - 1) for factor in GRID) < 1e-6
    given = made(tmp_path, solver="exact", damping=float(influences.damping or 0)).run()["holdout"]
    np.testing.assert_array_equal(influences.scores[:], given.scores[:])
    assert made(tmp_path, solver="exact").plan().complete


def test_a_plan_that_measures_guesses_it_where_it_is_not_there(
    make: Callable[..., ip.Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "MOST_FINISHING", -1.0)
    monkeypatch.setattr(plan, "LEAST_SUMMED", 15)  # four parts
    monkeypatch.setattr(runner, "SHORT", float("inf"))
    found = make(s_test=AUTO).plan(measure=True)
    assert "not kept" in str(found["s_test"])
    curvature = [stage for stage in found.stages if stage.stage == "curvature"]
    assert [(stage.done, stage.timing is not None) for stage in curvature] == [(2, True), (0, False)]
    assert "and curvature, which could not be measured" in str(found)
    assert make(s_test=AUTO).run()["holdout"].damping


@pytest.mark.parametrize("further", ["self-influence", "newton"])
def test_what_solves_for_training_samples_has_it_too(tmp_path: Path, further: str) -> None:
    made_of = made(tmp_path, solver="exact", correction="newton" if further == "newton" else None)
    found = made_of.run()["holdout"]
    if further == "self-influence":
        assert made_of.self_influence().damping == found.damping


def test_status_shows_it(tmp_path: Path) -> None:
    found = made(tmp_path).run()["holdout"]
    assert f"λ = {found.damping:.4g}" in "\n".join(listed(Cache(tmp_path)))
