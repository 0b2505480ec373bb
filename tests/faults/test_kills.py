"""A run that is killed, at whatever moment, leaves nothing wrong and loses no finished block."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from influence_pipeline.cache import STAGES
from tests.faults import kills
from tests.faults.children import Server
from tests.faults.kills import END, Reference, Tally, left_over

FORKED, NEW, IN_EACH_STAGE = 24, 2, 2
"""Kills of forks and of new processes; and in each stage, at least."""
THOROUGH = 8
"""How often all that, where it is to be thorough."""


@pytest.fixture(scope="module")
def times(thorough: bool) -> int:
    return THOROUGH if thorough else 1


@pytest.fixture(scope="module")
def killed(server: Server, reference: Reference, tmp_path_factory: pytest.TempPathFactory, times: int) -> Tally:
    """Return what came of runs that were killed at random moments."""
    counts = [times * count for count in (FORKED, NEW, IN_EACH_STAGE)]
    return kills.many(server, reference, tmp_path_factory.mktemp("kills"), *counts)


def test_kills_hit_and_are_spread_over_all_stages(killed: Tally, times: int) -> None:
    assert killed.tried >= times * (FORKED + NEW)
    assert sum(killed.kinds[stage] for stage in (*STAGES, END)) == killed.tried
    for stage in STAGES:
        assert killed.kinds[stage] >= times * IN_EACH_STAGE, killed.kinds


def test_finished_blocks_stay_and_the_last_run_makes_the_same_bytes(killed: Tally) -> None:
    assert not killed.wrong, "\n".join(killed.wrong)


def test_nothing_is_left_over_after_the_last_run(killed: Tally) -> None:
    assert not killed.left, "\n".join(killed.left)


# ---- chosen moments, at which little is written ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "when"),
    [("influence_pipeline.cache.claims:Claim.release", "before"), ("os:link", "before"), ("os:link", "after")],
    ids=["work done, claim still there", "claim half made", "claim made, half file still there"],
)
def test_runs_killed_again_and_again_around_a_claim_leave_nothing(
    server: Server, reference: Reference, tmp_path: Path, at: str, when: str
) -> None:
    cache, draw, codes = tmp_path / "cache", random.Random(at + when), []
    order = {"at": at, "when": when, "by": signal.SIGKILL, "of": "laim"}
    while not codes or (codes[-1] == -9 and len(codes) < 60):
        codes.append(
            server.start("tests.faults.children:harmed", cache=cache, number=draw.randrange(9), **order).wait()
        )
        assert not reference.wrong(cache)
    assert codes[-1] == 0
    assert len(codes) > 3
    assert server.start(kills.RUN, cache=cache).wait() == 0
    assert reference.differs(cache) == []
    assert left_over(cache) == []


@pytest.mark.parametrize("number", range(4))
def test_a_run_killed_after_it_laid_out_a_group_leaves_no_claim_of_the_cache(
    server: Server, reference: Reference, tmp_path: Path, number: int
) -> None:
    cache = tmp_path / "cache"
    order = {"at": "influence_pipeline.cache.claims:Claim.release", "when": "before", "by": signal.SIGKILL}
    child = server.start("tests.faults.children:harmed", cache=cache, number=number, of="layout.claim", **order)
    assert child.wait() == -9
    assert (cache / "layout.claim").exists()
    assert server.start(kills.RUN, cache=cache).wait() == 0
    assert reference.differs(cache) == []
    assert left_over(cache) == []
