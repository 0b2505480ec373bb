"""Has several processes run the same experiment over one cache at the same time; some are killed or stopped."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from influence_pipeline.cache import STAGES
from tests.faults.children import Child, Server
from tests.faults.kills import LANES, RUN, Event, Reference, Tally, Told, ended, left_over, read_events

KINDS = (
    *("two", "two", "two", "three"),
    *("two, one killed", "two, one killed", "three, one killed"),
    *("two, one stopped", "two, one stopped", "two, one stopped for longer than a claim lasts"),
)
EXPIRY = 0.5
"""Seconds that a claim lasts in the last of these."""
SHARES = (1.0, 0.5, 0.25)
"""Of the work, within which a process is harmed: one that ended before is harmed earlier in another try."""
STARTING = 0.15
"""How often a process is harmed while it starts, as a share of all of the work."""


def together(server: Server, reference: Reference, folder: Path, seed: int, share: float = 1.0) -> Tally:
    """Run at once what the seed says, and look at what came out; harm is done within the first share of the work."""
    draw, kind = random.Random(seed), KINDS[seed % len(KINDS)]
    folder.mkdir(parents=True)
    cache, count = folder / "cache", 3 if "three" in kind else 2
    if draw.random() < 0.4:
        _copy_some(reference, cache, draw)
    before, what = reference.there(cache), f"{kind} (seed {seed})"
    missing = len(reference.records) - len(before)
    expiry = EXPIRY if "longer" in kind else None
    children = []
    for number in range(count):
        if number and draw.random() < 0.5:
            reference.reach(cache, len(before) + int(0.4 * missing * draw.random()), children[0])
        children.append(server.start(RUN, cache=cache, events=folder / f"{number}.events", expiry=expiry))
    harmed = draw.choice(children)
    hit = True
    if "one" in kind:
        moment = draw.uniform(-STARTING, share)
        after = reference.seconds[STAGES[0]] * draw.random() * (moment < 0)  # before the first block, mostly
        reference.reach(cache, len(before) + int(missing * moment), harmed)
        hit = _harm(harmed, kind, draw, after)
    wrong = []
    for number, child in enumerate(children):
        failed = ended(child)
        if failed and not (child is harmed and hit and "killed" in kind and child.exit == -9):
            wrong.append(f"process {number}: {failed}")
    killed = "killed" in kind and harmed.exit == -9
    wrong += [f"{name} is missing" for name in sorted(reference.records.keys() - reference.there(cache))]
    if killed and left_over(cache):  # is for whoever runs next
        failed = ended(server.start(RUN, cache=cache, events=folder / "last.events"))
        wrong += [f"last run: {failed}"] if failed else []
    wrong += reference.differs(cache)
    events = {path.stem: read_events(path) for path in folder.glob("*.events")}
    if expiry is None:
        wrong += _twice(events, before, str(children.index(harmed)) if killed else None)
        if not killed and (missing := reference.records.keys() - before - _kept(events)):
            wrong.append(f"written by nobody: {sorted(missing)}")
    left = left_over(cache)
    if not wrong:
        shutil.rmtree(folder)
    told = [f"{what}: {name}" for name in left], [f"{what}: {text}" for text in wrong]
    return Tally(int(hit), int(not hit), Counter([kind] * hit), *told)


def _copy_some(reference: Reference, cache: Path, draw: random.Random) -> None:
    """Begin with a part of what there is in the end: blocks without their records are of killed processes."""
    shutil.copytree(reference.path, cache)
    share = draw.random()
    lost = [name for name in reference.records if draw.random() < share]
    for name in lost or [draw.choice(sorted(reference.records))]:
        (cache / name).unlink()


def _harm(child: Child, kind: str, draw: random.Random, after: float) -> bool:
    """Kill or stop a process so many seconds after its start, or now; say whether it was still there."""
    if "killed" in kind:
        return child.signal(signal.SIGKILL, after)
    hit = child.signal(signal.SIGSTOP, after)
    if hit:
        time.sleep(3 * EXPIRY if "longer" in kind else draw.uniform(0.05, 0.8))
        child.signal(signal.SIGCONT)
    return hit


def _kept(events: dict[str, list[Event]]) -> set[str]:
    return {event.record for found in events.values() for event in found if event.what == "kept"}


def _twice(events: dict[str, list[Event]], before: set[str], killed: str | None) -> list[str]:
    """Say which blocks were computed in vain: more than once, or although they were there."""
    wrong = []
    writing = Counter(event.record for found in events.values() for event in found if event.what == "writing")
    of_killed = Counter(event.record for event in events.get(killed or "", []) if event.what == "writing")
    kept_by_killed = {event.record for event in events.get(killed or "", []) if event.what == "kept"}
    for record, times in sorted(writing.items()):
        allowed = 1 + (of_killed[record] - (record in kept_by_killed))
        if record in before or times > allowed:
            wrong.append(f"{record} was computed {times} times")
    lost = [event.record for found in events.values() for event in found if event.what == "lost"]
    return wrong + [f"{record} was computed and given up" for record in lost]


def many(server: Server, reference: Reference, folder: Path, rounds: int, told: Told = lambda tally: None) -> Tally:
    """Do so many rounds, each again where there was nobody left to be harmed; ``told`` hears of each."""
    total = Tally()

    def one(seed: int) -> Tally:
        tally = Tally()
        for share in SHARES:
            tally.add(together(server, reference, folder / f"{seed}.{share}", seed, share))
            if tally.tried:
                break
        return tally

    with ThreadPoolExecutor(LANES) as lanes:
        for tally in lanes.map(one, range(rounds)):
            total.add(tally)
            told(total)
    return total
