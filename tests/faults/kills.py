"""Kills runs at random moments, again and again on one cache, and looks at what each kill left."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic, sleep

from influence_pipeline.cache import STAGES, Group
from influence_pipeline.cache.layout import FINISHED, RECORDS
from tests import tiny
from tests.faults.children import LOOK, ROOT, Child, Server

RUN = "tests.faults.children:run"
CHAIN = 10
"""Kills on one cache."""
LANES = 2
"""Chains at once."""
END = "end"
"""What is killed when nothing is missing any more."""
CLAIMING = "with a claim"
"""What is killed while it had one, as most are."""
ORDER = (*STAGES, END)
AIMS = (
    "grad_z",
    "grad_z",
    "curvature",
    "curvature",
    "curvature",
    "s_test",
    "s_test",
    "influence",
    "influence",
    "influence",
)
"""Where to kill as a chain goes on; what comes after the last block, too, is aimed at with the last."""
LEFT = (".partial", ".claim")


@dataclass
class Tally:
    """What was done to caches, and what was wrong with them afterwards.

    Attributes:
        tried: faults that happened.
        missed: those that came too late.
        kinds: how many of each kind happened.
        left: claims and half files that were left over.
        wrong: whatever else was wrong, a line or more for each.
    """

    tried: int = 0
    missed: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    left: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Count what another one counted."""
        self.tried += other.tried
        self.missed += other.missed
        self.kinds += other.kinds
        self.left += other.left
        self.wrong += other.wrong


class Reference:
    """A cache that nothing disturbed, and how long its stages took.

    Attributes:
        files: the content of every file by its name.
        records: of each record's file, the files of which it is: those of its block, itself among them.
        seconds: that each stage took, and what came after the last block.
    """

    def __init__(self, server: Server, folder: Path) -> None:
        """Make one below a folder."""
        self.path = folder / "reference"
        events = folder / "reference.events"
        child = server.start(RUN, cache=self.path, events=events)
        if child.wait() != 0:
            raise RuntimeError(child.said)
        ended = monotonic()
        self.files = tiny.files(self.path)
        self.records = {
            record: files for path in sorted(self.path.glob("*/*/")) for record, files in _records(Group(path))
        }
        self.seconds, before = {}, child.began
        for stage in STAGES:
            last = max(event.at for event in read_events(events) if event.stage == stage)
            self.seconds[stage], before = last - before, last
        self.seconds[END] = ended - before

    def there(self, cache: Path) -> set[str]:
        """Return the records that a cache has."""
        return {name for name in self.records if (cache / name).exists()}

    def stage(self, cache: Path) -> str:
        """Return the first stage of which something is missing."""
        missing = {name.split("/")[0] for name in self.records.keys() - self.there(cache)}
        return next((stage for stage in STAGES if stage in missing), END)

    def reach(self, cache: Path, count: int, child: Child) -> None:
        """Wait until a cache has so many records, or a process has ended."""
        while len(self.there(cache)) < count and child.exit is None:
            sleep(LOOK)

    def wrong(self, cache: Path) -> list[str]:
        """Say which files of blocks that have a record are not as they should be."""
        return [
            f"{record} is there, and {name} is {'another' if (cache / name).exists() else 'missing'}"
            for record in sorted(self.there(cache))
            for name in self.records[record]
            if _bytes(cache / name) != self.files[name]
        ]

    def differs(self, cache: Path) -> list[str]:
        """Say how a finished cache differs from this one, but for what is left over."""
        files = {name: content for name, content in tiny.files(cache).items() if not name.endswith(LEFT)}
        names = sorted(name for name in files.keys() | self.files.keys() if files.get(name) != self.files.get(name))
        return [
            f"{name} {'is lost' if name not in files else 'is new' if name not in self.files else 'differs'}"
            for name in names
        ]


def left_over(cache: Path) -> list[str]:
    """Return the names of claims and half files."""
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.name.endswith(LEFT))


def _records(group: Group) -> Iterator[tuple[str, tuple[str, ...]]]:
    layout, place = group.layout, f"{group.path.parent.name}/{group.path.name}"
    found = {
        f"{RECORDS}/c/{'/'.join(map(str, block.index))}/0": layout.block_files(block) for block in layout.grid
    }  # fmt: skip
    if layout.merged:
        found[f"{FINISHED}/c/0"] = layout.merged_files()
    for record, files in found.items():
        yield f"{place}/{record}", tuple(f"{place}/{name}" for name in (*files, record))


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


@dataclass(frozen=True)
class Event:
    """A block, or what is merged of all, before or after it is written (``writing``, ``kept`` or ``lost``)."""

    at: float
    what: str
    stage: str
    group: str
    index: str

    @property
    def record(self) -> str:
        """The name of its record's file."""
        place = f"{FINISHED}/c/0" if self.index == "merged" else f"{RECORDS}/c/{self.index.replace('.', '/')}/0"
        return f"{self.stage}/{self.group}/{place}"


def read_events(path: Path) -> list[Event]:
    """Return what children wrote down."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [Event(*json.loads(line)) for line in lines]


# ---- one chain -------------------------------------------------------------------------------------------------------


def in_fork(server: Server, cache: Path, events: Path) -> Child:
    """Start a run in a forked child."""
    return server.start(RUN, cache=cache, events=events)


PROJECT = """\
from pathlib import Path

from tests import tiny

tiny.shrink_blocks()


def experiment():
    (Path(__file__).parent / "begun").touch()
    return tiny.experiment()
"""
SETTINGS = """\
experiment = "experiment.py:experiment"
cache = "cache"
[s_test]
damping = { relative = 0.1 }
[influence]
top_k = 1
[runtime]
device = "cpu"
progress = false
"""


def in_new_process(cache: Path, events: Path) -> Child:
    """Start ``influence-pipeline run`` in a process of its own; but for the first, it begins as the experiment does."""
    project = cache.parent
    (project / "experiment.py").write_text(PROJECT)
    (project / "settings.toml").write_text(SETTINGS)
    begun, said = project / "begun", project / "new.err"
    begun.unlink(missing_ok=True)
    command = [sys.executable, "-m", "influence_pipeline.cli", "run", str(project / "settings.toml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with said.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    until = monotonic() + (0 if events.stem == "1" else 60)  # the first one may be killed while it imports
    while not begun.exists() and process.poll() is None and monotonic() < until:
        sleep(0.005)
    return Child(process.pid, said.with_suffix(".out"), process.poll)


Start = Callable[[Path, Path], Child]


def chain(start: Start, reference: Reference, folder: Path, seed: int, kills: int = CHAIN) -> Tally:
    """Kill runs on one cache until so many were hit, then let one go on to the end."""
    draw, tally = random.Random(seed), Tally()
    folder.mkdir(parents=True)
    cache = folder / "cache"
    for number in range(1, 3 * kills + 1):
        if tally.tried == kills:
            break
        if reference.stage(cache) == END:  # nothing is left to be killed: look at this one, begin another
            _last(start, reference, cache, f"chain {seed}", tally)
            shutil.rmtree(cache)
        before = {name: _touched(cache / name) for name in reference.there(cache)}
        events = folder / f"{number}.events"
        aim = AIMS[int(len(AIMS) * tally.tried / kills)]
        count, after = _moment(draw, reference, cache, aim)
        child = start(cache, events)
        reference.reach(cache, count, child)
        sleep(after)
        code = child.killed()
        what = f"chain {seed}, run {number}, killed {after:.3f} s after there were {count} records"
        if code == 0:
            tally.missed += 1
        elif code == -9:
            tally.tried += 1
            tally.kinds[reference.stage(cache)] += 1
            tally.kinds[CLAIMING] += any(_owner(path) == child.process for path in cache.rglob("*.claim"))
        else:
            tally.wrong.append(f"{what}: exit {code}\n{child.said}")
        wrong = reference.wrong(cache)
        wrong += [f"{name} was touched" for name, was in before.items() if _touched(cache / name) != was]
        wrong += [f"{event.record} computed again" for event in read_events(events) if event.record in before]
        tally.wrong += [f"{what}: {text}" for text in wrong]
    _last(start, reference, cache, f"chain {seed}", tally)
    if not tally.wrong:
        shutil.rmtree(folder)
    return tally


def ended(child: Child) -> str | None:
    """Wait for a child; say how it failed, None where it did not."""
    try:
        return f"exit {child.exit}\n{child.said}" if child.wait() else None
    except TimeoutError as error:
        return str(error)


def _owner(claim: Path) -> int:
    found: int = json.loads(claim.read_bytes())["process"]
    return found


def _touched(path: Path) -> tuple[int, int] | None:
    """Return what changes when a file is written again."""
    if not path.exists():
        return None
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def _last(start: Start, reference: Reference, cache: Path, what: str, tally: Tally) -> None:
    """Run to the end; note what is wrong then."""
    before, events = reference.there(cache), cache.parent / "last.events"
    events.unlink(missing_ok=True)
    if failed := ended(start(cache, events)):
        tally.wrong.append(f"{what}, last run: {failed}")
        return
    found = [f"{event.record} computed again" for event in read_events(events) if event.record in before]
    tally.wrong += [f"{what}, last run: {text}" for text in (*found, *reference.differs(cache))]
    tally.left += [f"{what}, last run: {name}" for name in left_over(cache)]


def _moment(draw: random.Random, reference: Reference, cache: Path, aim: str) -> tuple[int, float]:
    """Draw when to kill the next run: once there are so many records, and so many seconds later.

    That is within a stage, or if that is done, within the one that it goes on with; with the last aim, or at the end.
    """
    there = reference.there(cache)
    missing = Counter(name.split("/")[0] for name in reference.records.keys() - there)
    stage = max(aim, reference.stage(cache), key=ORDER.index)
    place = draw.randrange(missing[stage] + (aim == AIMS[-1]))
    count = len(there) + sum(missing[earlier] for earlier in STAGES[: STAGES.index(stage)]) + place
    if count == len(there):  # while it starts
        return count, draw.uniform(0, reference.seconds[STAGES[0]])
    if place == missing[stage]:
        return count, draw.uniform(0, reference.seconds[END])
    of_stage = sum(name.startswith(f"{stage}/") for name in reference.records)
    return count, draw.uniform(0, reference.seconds[stage] / of_stage)


# ---- many ------------------------------------------------------------------------------------------------------------


Told = Callable[[Tally], None]


def many(
    server: Server,
    reference: Reference,
    folder: Path,
    forked: int,
    new: int,
    least: int,
    told: Told = lambda tally: None,
) -> Tally:
    """Kill so many runs in forked children and in new processes.

    Args:
        server: of children.
        reference: what comes out.
        folder: for the caches.
        forked: kills of forked children.
        new: kills of new processes.
        least: kills in each stage; where chance gave fewer, there are more chains.
        told: hears of each chain that ended.
    """
    total, of_fork = Tally(), partial(in_fork, server)
    chains = [(in_new_process, f"new{i}", 10**6 + i, kills) for i, kills in enumerate(_cut(new))]
    chains += [(of_fork, str(i), i, kills) for i, kills in enumerate(_cut(forked))]
    with ThreadPoolExecutor(LANES) as lanes:
        for tally in lanes.map(lambda one: chain(one[0], reference, folder / one[1], *one[2:]), chains):
            total.add(tally)
            told(total)
    for more in range(5):
        if total.tried >= forked + new and min(total.kinds[stage] for stage in STAGES) >= least:
            break
        total.add(chain(of_fork, reference, folder / f"more{more}", 10**7 + more))
        told(total)
    return total


def _cut(kills: int, size: int = CHAIN) -> list[int]:
    return [min(size, kills - begin) for begin in range(0, kills, size)]
