"""Scores of several test sets come of one pass over the gradients, and are those that each set gets alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import influence_pipeline as ip
from influence_pipeline import plan
from influence_pipeline.cache.stored import DecodedRows
from stages.grad_z import GradZ
from stages.influence import Influence
from stages.stage import Block
from tests import tiny

SETS = {"one": 3, "two": 4, "three": 1}

Pipelines = Callable[..., ip.Pipeline]


@pytest.fixture
def make(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Pipelines:
    """Return what makes a pipeline of three test sets, over many blocks of training samples."""
    monkeypatch.setattr(plan, "MOST_ROWS", tiny.ROWS)

    def make(**sections: dict[str, Any]) -> ip.Pipeline:
        tests = {name: tiny.points(count, seed) for seed, (name, count) in enumerate(SETS.items(), 2)}
        return ip.Pipeline(tiny.experiment(tests=tests), cache, tiny.settings(**sections))

    return make


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[slice, slice]]:
    """Return the list to which every part of the gradients is added that is read for scores."""
    found: list[tuple[slice, slice]] = []
    read = DecodedRows.read_into

    def counted(rows: DecodedRows, index: tuple[slice, slice], out: Any) -> None:
        found.append(index)
        read(rows, index, out)

    monkeypatch.setattr(DecodedRows, "read_into", counted)
    return found


def alone(make: Pipelines, cache: Path) -> dict[str, bytes]:
    """Return the files of scores where each test set is scored by itself."""
    pipeline = make()
    pipeline.grad_z()
    for name in SETS:
        pipeline.s_test(name)
        pipeline.influence(name)
    files = tiny.files(cache)
    shutil.rmtree(cache / "influence")
    return files


def goes_on(make: Pipelines, cache: Path, reads: list[Any], starts: list[int], expected: dict[str, bytes]) -> None:
    """Run all, and check which gradients are read for it, and what is there then."""
    reads.clear()
    make().run()
    assert [rows.start for rows, _ in reads] == starts
    assert tiny.files(cache) == expected


def test_all_sets_are_scored_in_one_pass_in_the_bits_that_each_gets_alone(
    make: Pipelines, cache: Path, reads: list[Any]
) -> None:
    expected = alone(make, cache)
    assert len(reads) == len(SETS) * 4
    reads.clear()
    found = make().run()
    assert list(found) == list(SETS)
    assert list(make().influences("two", "one", "two")) == ["two", "one"]
    assert len(reads) == 4
    assert tiny.files(cache) == expected


def test_only_what_is_missing_is_computed_with_the_others(make: Pipelines, cache: Path, reads: list[Any]) -> None:
    expected = alone(make, cache)
    make().influence("two")
    for name in ("one", "three"):
        make().influence(name)
    one, three = (next(cache.glob(f"influence/{name}-*")) for name in ("one", "three"))
    for path in (one / "blocks/c/0/1/0", three / "blocks/c/0/1/0", three / "blocks/c/0/3/0"):
        path.unlink()
    goes_on(make, cache, reads, [16, 48], expected)


def test_an_interrupted_pass_goes_on(
    make: Pipelines, cache: Path, reads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(make, cache)
    together = Influence.together

    def interrupted(stage: Influence, parts: Any, *args: Any) -> Any:
        if parts[0][1].index == (0, 2):
            raise KeyboardInterrupt
        return together(stage, parts, *args)

    pipeline = make()
    with monkeypatch.context() as patch:
        patch.setattr(Influence, "together", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run()
    assert not list(cache.rglob("*.claim"))
    assert not list(cache.rglob("*.partial"))
    goes_on(make, cache, reads, [32, 48], expected)


def test_sets_that_do_not_fit_together_are_scored_one_after_the_other(
    make: Pipelines, cache: Path, reads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MOST_SCORED_TESTS", 7)  # "one" and "two" fit, and "three" does not fit beside them
    expected = alone(make, cache)
    reads.clear()
    make().run()
    assert len(reads) == 2 * 4
    assert tiny.files(cache) == expected


def test_gradients_that_are_not_kept_are_computed_once_for_all_sets(
    make: Pipelines, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[Block] = []
    parts = GradZ.parts

    def counted(stage: GradZ, block: Block, *args: Any) -> Any:
        computed.append(block)
        return parts(stage, block, *args)

    monkeypatch.setattr(GradZ, "parts", counted)
    found = make(grad_z={"store": False}).run()
    assert len(computed) == 4
    monkeypatch.undo()
    for name, scores in make().run().items():
        np.testing.assert_array_equal(found[name].scores[...], scores.scores[...])


def test_two_workers_score_all_sets_in_one_pass(make: Pipelines, cache: Path) -> None:
    expected = alone(make, cache)
    make(runtime={"workers": 2}).run()
    assert tiny.files(cache) == expected


def test_with_nothing_to_do_each_set_is_looked_at_no_more_often_the_more_there_are(
    make: Pipelines, monkeypatch: pytest.MonkeyPatch
) -> None:
    make().run()
    opened: list[str | None] = []
    find = ip.Pipeline._open

    def counted(pipeline: ip.Pipeline, place: Any) -> Any:
        opened.append(place.tests if place.stage == "influence" else None)
        return find(pipeline, place)

    monkeypatch.setattr(ip.Pipeline, "_open", counted)
    make().run()
    assert [opened.count(name) for name in SETS] == [1, 2, 2]
