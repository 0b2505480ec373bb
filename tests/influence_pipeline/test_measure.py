"""A plan that measures keeps what it computes, extrapolates it, and leaves a cache that a run goes on with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import influence_pipeline as ip
from influence_pipeline import pipeline, plan, runner
from influence_pipeline.peak import most_held, peak
from influence_pipeline.work import Work
from stages.grad_z import GradZ
from stages.influence import Influence
from stages.s_test import STest
from stages.s_test.prepare import Prepare
from stages.stage import Block
from tests import tiny

Make = Callable[..., ip.Pipeline]
SHORT, LONG = 60.0, -1.0
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "nothing prepared": ({"solver": "identity"}, SHORT),
    "prepared soon": ({"solver": "exact", "damping": 0.1}, SHORT),
    "cg by some parts": ({"solver": "cg", "damping": {"relative": 0.1}}, LONG),
    "lissa by some parts": ({"solver": "lissa", "damping": {"relative": 1.0}, "recursion_depth": 4}, LONG),
    "exact by some parts": ({"solver": "exact", "damping": 0.1}, LONG),
}


@pytest.fixture(autouse=True)
def _blocks_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a second block measured, however slow the machine is."""
    monkeypatch.setattr(runner, "SHORT", float("inf"))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Return what will have (stage, index…) of every block that is computed."""
    found: list[tuple[Any, ...]] = []
    start = Work.start

    def started(work: Work, block: Block, *more: Any) -> Any:
        found.append((work.stage.name, *block.index))
        return start(work, block, *more)

    monkeypatch.setattr(Work, "start", started)
    return found


def test_without_measuring_nothing_is_computed(make: Make, cache: Path, computed: list[tuple[Any, ...]]) -> None:
    found = make().plan()
    assert computed == []
    assert not cache.exists()
    assert "to go" not in str(found)


@pytest.mark.parametrize("case", CASES)
def test_measured_blocks_are_kept_and_not_computed_again(
    make: Make, cache: Path, computed: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    solver, finishing = CASES[case]
    prepares, part = solver["solver"] != "identity", finishing == LONG
    monkeypatch.setattr(pipeline, "MOST_FINISHING", finishing)
    monkeypatch.setattr(plan, "LEAST_SUMMED", 15)  # four parts
    found = make(s_test=solver).plan(measure=True)
    kept = {(stage, *map(int, index)) for stage, _, *index in tiny.blocks(cache)}
    counts = [[block[0] for block in kept].count(stage) for stage in ("grad_z", "curvature", "s_test", "influence")]
    assert counts == [2, (2 if part else 4) * prepares, 0 if part else 2, 0]
    for stage in found.stages:
        assert stage.timing is not None
        assert stage.measured
        assert stage.seconds > 0 or stage.complete
        assert bool(stage.timing.stand_in) == (stage.stage == "influence" or (stage.stage == "s_test" and part))
        assert stage.timing.peak_bytes > 2**26, "Python and PyTorch are part of what a process holds"
    assert f"to go: about {found.seconds:.1f} s of computing; a process holds about " in str(found)
    assert found.peak_bytes == max(stage.timing.peak_bytes for stage in found.stages if stage.timing)
    assert ("not kept" in str(found["s_test"])) == part
    computed.clear()
    make(s_test=solver).run()
    assert not kept & set(computed)
    assert len(kept) + len(computed) == 4 + 4 * prepares + 3 + 12


def test_a_stage_of_which_one_block_is_missing_is_completed_and_merged(
    make: Make, done: Path, computed: list[tuple[Any, ...]]
) -> None:
    whole = tiny.files(done)
    for stage, block in (("grad_z", "3/0"), ("influence", "1/2/0")):
        (path,) = done.glob(f"{stage}/*/blocks/c/{block}")
        path.unlink()
    found = make().plan(measure=True)
    assert computed == [("grad_z", 3), ("influence", 1, 2)]
    assert found.complete
    assert found.seconds == 0
    assert tiny.files(done) == whole
    again = make().plan(measure=True)
    assert len(computed) == 2
    assert all(stage.timing is None for stage in again.stages)


@pytest.mark.parametrize("kind", [GradZ, Prepare, STest, Influence])
def test_an_interrupted_measurement_leaves_a_valid_cache(
    make: Make, cache: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    compute = kind.parts if kind is GradZ else kind.together if kind is Influence else kind.compute
    calls: list[int] = []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compute(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(kind, compute.__name__, interrupted)
        with pytest.raises(KeyboardInterrupt):
            make().plan(measure=True)
    make().run()
    assert tiny.files(cache) == tiny.files(finished)


def test_seconds_are_those_of_the_blocks_that_are_left(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, check, clock = GradZ.parts, GradZ.prepare, [0.0]

    def slow(stage: GradZ, block: Block, *more: Any) -> Any:
        clock[0] += 1.0 + 3.0 * (block.index == (0,))
        return parts(stage, block, *more)

    def prepare(stage: GradZ, *more: Any) -> None:
        clock[0] += 2.0
        check(stage, *more)

    monkeypatch.setattr(GradZ, "parts", slow)
    monkeypatch.setattr(GradZ, "prepare", prepare)
    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    found = make(train=tiny.points(10 * tiny.ROWS, 1)).plan(measure=True)["grad_z"]
    assert found.timing is not None
    assert found.timing.spent == 2 + 4 + 1
    assert found.seconds == 2 + 8, "neither the first block's 3 s nor the 2 s before are multiplied"
    assert "2 blocks in 7.0 s; about 10 s to go" in str(found)


def test_gradients_that_are_not_stored_are_measured_where_they_are_computed(make: Make, cache: Path) -> None:
    found = make(grad_z={"store": False}).plan(measure=True)
    assert found["influence"].timing is not None
    assert found["influence"].timing.blocks == ((4 * 16, pytest.approx(0, abs=2)), (4 * 16, pytest.approx(0, abs=2)))
    assert not (cache / "grad_z").exists()


@pytest.mark.parametrize("solved", [False, True])
@pytest.mark.parametrize("samples", [30, 60])
def test_test_sets_share_what_reading_gradients_takes(make: Make, solved: bool, samples: int) -> None:
    data = {"tests": {"one": tiny.points(2, 2), "two": tiny.points(1, 3)}, "train": tiny.points(samples, 1)}
    if solved:
        make(**data).grad_z()
        for name in ("one", "two"):
            make(**data).s_test(name)
    stages = make(**data).plan(measure=True).stages
    one, two = (stage for stage in stages if stage.stage == "influence")
    assert one.timing is not None
    assert one.timing is two.timing
    assert one.timing.blocks[0][0] == 3 * 16
    measured = solved or samples == 30
    assert one.done == two.done == 2 * measured
    assert one.complete == two.complete == (samples == 30)
    if samples == 60:
        assert one.seconds - one.timing.ready == pytest.approx(2 * (two.seconds - two.timing.ready))


def test_a_second_set_of_gradients_is_refused_as_by_a_run(make: Make, done: Path) -> None:
    with pytest.raises(ip.CacheMismatch, match="training gradients of 'train' are cached, of something else"):
        make(model=lambda: tiny.model(1)).plan(measure=True)


def test_a_block_that_is_long_is_measured_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SHORT", 0.0)
    assert [stage.done for stage in make().plan(measure=True).stages] == [1, 2, 1, 0], "a curvature is completed"


def test_what_others_compute_is_not_measured(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    make().grad_z()
    monkeypatch.setattr(runner, "_here", lambda *arguments: [])
    found = make().plan(measure=True)
    assert all(stage.timing is None for stage in found.stages)
    assert "to go" not in str(found)


def test_the_peak_is_of_what_is_held_beside_what_was() -> None:
    with peak() as most:
        torch.zeros(2**26).add_(1)
        assert 2**28 - 2**22 < most() < 2**28 + 2**26
        assert most_held() > most()
    with peak() as most:
        assert most() < 2**26
