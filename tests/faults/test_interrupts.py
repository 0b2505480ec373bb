"""Real command lines that are interrupted and killed at chosen moments: progress is kept, nothing is left behind.

The experiment of each says by a file that a moment has come, and waits; then the test sends its signal. Cases run two
at a time, each in a folder of its own; a test looks at what came of one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

import influence_pipeline as ip
from influence_pipeline.cache import Group, claims
from tests import tiny
from tests.conftest import ROOT, remember_blocks
from tests.marks import thoroughly

EXPERIMENT = """\
import multiprocessing
import os
import signal
import time
from pathlib import Path

from influence_pipeline.cache.writing import ArrayWriting
from stages.influence import Influence
from stages.s_test import STest
from stages.s_test.prepare import Prepare
from tests import tiny

MOMENT = os.environ.get("MOMENT", "")
IN_WORKER = multiprocessing.current_process().name != "MainProcess"
tiny.shrink_blocks()


def moment(name, here=True, seconds=60):
    if name != MOMENT or not here:
        return
    try:
        with open(Path(__file__).with_name("reached.new"), "x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return
    Path(__file__).with_name("reached.new").rename(Path(__file__).with_name("reached"))
    time.sleep(seconds)


def before(kind, method, name, when, seconds=60):
    original = getattr(kind, method)

    def changed(self, *args, **kwargs):
        moment(name, when(self, *args), seconds)
        return original(self, *args, **kwargs)

    setattr(kind, method, changed)


if MOMENT:
    before(Prepare, "compute", "curvature", lambda stage, block, *args: block.index == (1,))
    before(STest, "compute", "s_test", lambda stage, block, *args: block.index == (1,))
    before(Influence, "compute", "influence", lambda stage, block, *args: block.index == (1, 1))
    before(Influence, "finish", "merging", lambda stage, *args: True)
    before(
        ArrayWriting, "appear", "writing",
        lambda writing: writing.spec.name == "norm" and writing.region[0].start == 16, 1.0,
    )
    before(
        ArrayWriting, "appear", "writing scores",
        lambda writing: writing.spec.name == "part_sum" and writing.region[1].start == 16, 1.0,
    )


class Data:
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, position):
        moment("samples", position == 40)
        if MOMENT == "worker memory" and position == 7 and IN_WORKER:
            import resource

            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))
            bytearray(2**30)
        return self.data[position]


def experiment():
    moment("loading", not IN_WORKER)
    moment("loading in a worker", IN_WORKER)
    return tiny.experiment(train=Data(tiny.points(60, 1)))
"""
SETTINGS = """\
experiment = "experiment.py:experiment"
cache = "runs"
[s_test]
damping = {{ relative = 0.1 }}
[influence]
top_k = 1
[runtime]
device = "cpu"
workers = {workers}
log_file = "log.txt"
"""
LIMIT = 60.0
"""Seconds that a moment is waited for, and that it lasts."""
AT_ONCE = 30.0
"""Seconds within which a run ends that does not wait for its moment to end."""
GRACE = 60.0
"""Seconds after the end of a run in which its worker processes have to be gone."""
INT, TERM, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL
STAGES = ("grad_z", "curvature", "s_test", "influence")


@dataclass(frozen=True)
class Case:
    """What is done to a run.

    Attributes:
        moment: at which something is done; one of memory does it by itself.
        workers: processes that compute.
        there: how many of the four stages are cached before.
        signals: sent one after the other.
        to: "group", as a terminal does; or "parent" or "worker" alone.
        gap: seconds between signals.
    """

    moment: str
    workers: int
    there: int
    signals: tuple[signal.Signals, ...] = ()
    to: str = "group"
    gap: float = 0.0

    def __str__(self) -> str:
        sent = "+".join(number.name for number in self.signals)
        after = f"-{self.gap:g}s" if self.gap else ""
        return f"{self.workers}-{self.moment.replace(' ', '_')}-{sent or 'nothing'}-{self.to}{after}"


@dataclass
class Outcome:
    """What came of a case.

    Attributes:
        folder: of its project.
        code: exit code, None where it did not end.
        seconds: from the first signal, or from the start, to the exit.
        said: what it printed.
        left: processes of its session, some time after the exit.
        claims: claims and partial files.
    """

    folder: Path
    code: int | None
    seconds: float
    said: str
    left: list[str]
    claims: list[str]

    @property
    def cache(self) -> Path:
        return self.folder / "runs"


INTERRUPTS = [
    Case("importing", 1, 0, (INT,)),
    Case("samples", 1, 0, (INT,)),
    Case("writing", 1, 0, (TERM,)),
    Case("s_test", 1, 2, (TERM,)),
    Case("merging", 1, 3, (TERM,)),
    Case("influence", 1, 3, (INT, INT), gap=0.05),
    Case("starting workers", 2, 3, (INT,)),
    Case("influence", 2, 3, (TERM,), "parent"),
]
FURTHER = [
    Case("loading", 1, 0, (TERM,)),
    Case("curvature", 1, 1, (INT,), "parent"),
    Case("influence", 1, 3, (INT,)),
    Case("writing scores", 1, 3, (INT, INT), gap=0.05),
    Case("samples", 2, 0, (TERM,)),
    Case("loading in a worker", 2, 3, (INT,)),
    Case("writing scores", 2, 3, (INT,)),
    Case("influence", 2, 3, (INT, INT), gap=0.05),
]
WORKER_KILLED = [Case("writing scores", 2, 3, (KILL,), "worker")]
PARENT_KILLED = [Case("influence", 2, 3, (KILL,), "parent"), Case("starting workers", 2, 3, (KILL,), "parent")]
OUT_OF_MEMORY = [Case("worker memory", 2, 0)]


def session(process: int) -> list[str]:
    """Return the command lines of the living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == process and fields[0] not in "ZX":
                found.append(f"{path.name} {(path / 'cmdline').read_text()}".replace("\0", " "))
        except OSError:
            continue
    return found


def until(condition: Callable[[], Any], seconds: float) -> bool:
    """Wait for something; say whether it came."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def loads_torch(process: int) -> bool:
    try:
        return "libtorch_cpu" in Path(f"/proc/{process}/maps").read_text()
    except OSError:
        return True


def leftovers(folder: Path) -> list[str]:
    return [path.name for pattern in ("*.partial", "*.claim") for path in folder.rglob(pattern)]


def run(case: Case, folder: Path, finished: Path) -> Outcome:
    """Run a case; judges nothing."""
    (folder / "experiment.py").write_text(EXPERIMENT)
    settings, reached, said = folder / "settings.toml", folder / "reached", folder / "said.txt"
    settings.write_text(SETTINGS.format(workers=case.workers))
    if case.there:
        shutil.copytree(finished, folder / "runs", ignore=shutil.ignore_patterns(*STAGES[case.there :]))
    with open(said, "w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "influence_pipeline.cli", "run", str(settings)],
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "MOMENT": case.moment},
        )

    def come() -> bool:
        if case.moment == "starting workers":
            return any("popen_loky_posix" in line for line in session(process.pid))
        return loads_torch(process.pid) if case.moment == "importing" else reached.exists()

    try:
        if case.signals:
            assert until(lambda: come() or process.poll() is not None, LIMIT), f"{case}: its moment never came"
        sent = time.monotonic()
        for number in case.signals:
            if case.to == "group":
                os.killpg(process.pid, number)
            else:
                os.kill(process.pid if case.to == "parent" else int(reached.read_text()), number)
            time.sleep(case.gap)
        until(lambda: process.poll() is not None, AT_ONCE if case.signals else LIMIT)
        seconds = time.monotonic() - sent
        until(lambda: not session(process.pid), GRACE)
        left = [] if process.poll() is None else session(process.pid)
        return Outcome(folder, process.poll(), seconds, said.read_text(), left, leftovers(folder))
    finally:
        for line in session(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(line.split()[0]), signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, finished: Path
) -> Iterator[dict[Case, Future[Outcome]]]:
    """Return what comes of every case that a chosen test asks for; two are run at a time."""
    asked = [vars(item.callspec)["params"].get("case") for item in request.session.items if hasattr(item, "callspec")]
    cases = [case for case in dict.fromkeys(asked) if isinstance(case, Case)]
    with ThreadPoolExecutor(2) as pool:
        futures = {case: pool.submit(run, case, tmp_path_factory.mktemp("case"), finished) for case in cases}
        yield futures
        for future in futures.values():
            future.cancel()


@pytest.fixture
def outcome(case: Case, outcomes: dict[Case, Future[Outcome]]) -> Outcome:
    found = outcomes[case].result()
    # A worker whose parent is killed while it starts is joblib's, and says so.
    assert "Traceback" not in found.said or case in PARENT_KILLED
    return found


def goes_on(outcome: Outcome, finished: Path) -> dict[str, int]:
    """Run again in this process; check that nothing that was kept is computed again; return how much was, by stage."""
    kept = tiny.blocks(outcome.cache)
    computed: list[tuple[str, ...]] = []
    commit = Group.commit

    def committed(group: Group, block: Any, *args: Any, **kwargs: Any) -> bool:
        computed.append((group.path.parent.name, group.path.name, *map(str, block.index)))
        return commit(group, block, *args, **kwargs)

    settings = outcome.folder / "settings.toml"
    settings.write_text(SETTINGS.format(workers=1))
    with pytest.MonkeyPatch.context() as patch:
        remember_blocks(patch)
        patch.delenv("MOMENT", raising=False)
        patch.setattr(Group, "commit", committed)
        began = time.monotonic()
        ip.Pipeline.from_toml(settings).run()
        assert time.monotonic() - began < claims.EXPIRY, "it waited for a claim of somebody who is gone"
    assert not kept & set(computed)
    assert len(computed) == len(set(computed))
    assert kept | set(computed) == tiny.blocks(outcome.cache)
    assert leftovers(outcome.folder) == []
    assert tiny.files(outcome.cache) == tiny.files(finished)
    return {stage: sum(block[0] == stage for block in kept) for stage in STAGES}


KEPT = {
    "importing": (0, 0, 0, 0), "loading": (0, 0, 0, 0), "samples": (2, 0, 0, 0), "writing": (2, 0, 0, 0),
    "curvature": (4, 1, 0, 0), "s_test": (4, 2, 1, 0), "influence": (4, 2, 3, 5), "writing scores": (4, 2, 3, 2),
    "merging": (4, 2, 3, 12), "starting workers": (4, 2, 3, 0), "loading in a worker": (4, 2, 3, 0),
}  # fmt: skip
"""Blocks of the four stages that are there at a moment, where one process computes them in order."""


@pytest.mark.parametrize("case", [*INTERRUPTS, *thoroughly(FURTHER)], ids=str)
def test_an_interrupted_run_ends_at_once_keeps_its_blocks_and_goes_on(
    case: Case, outcome: Outcome, finished: Path
) -> None:
    assert outcome.code == {INT: 130, TERM: 143}[case.signals[0]], outcome.said
    assert outcome.seconds < AT_ONCE
    assert outcome.said.count("interrupted: finished blocks are kept, the same command goes on from there\n") == 1
    assert outcome.left == []
    assert outcome.claims == []
    kept, expected = tuple(goes_on(outcome, finished).values()), KEPT[case.moment]
    if case.workers == 1 and case.moment in {"writing", "writing scores"}:
        # The next block may be waiting to be written, too.
        more = [k - e for k, e in zip(kept, expected, strict=True)]
        assert sorted(more) in ([0, 0, 0, 0], [0, 0, 0, 1])
    elif case.workers == 1 or case.moment in {"starting workers", "loading in a worker"}:
        assert kept == expected
    else:
        assert kept[: case.there] == expected[: case.there]
        assert sum(kept) < 4 + 1 + 3 + 12


@pytest.mark.parametrize("case", WORKER_KILLED, ids=str)
def test_a_killed_worker_is_an_error_that_says_so_and_the_next_run_goes_on(
    case: Case, outcome: Outcome, finished: Path
) -> None:
    assert outcome.code == 1, outcome.said
    stage = "influence holdout" if case.there else "grad_z"
    assert f"error: {stage}: a worker process died, out of memory perhaps: use fewer workers" in outcome.said
    assert "Finished blocks are kept; the same command goes on" in outcome.said
    assert outcome.seconds < AT_ONCE
    assert outcome.left == []
    assert outcome.claims == []
    goes_on(outcome, finished)


@pytest.mark.parametrize("case", [PARENT_KILLED[0], *thoroughly(PARENT_KILLED[1:])], ids=str)
def test_workers_of_a_killed_run_go_away_and_the_next_run_takes_over_their_claims(
    case: Case, outcome: Outcome, finished: Path
) -> None:
    assert outcome.code == -KILL
    assert outcome.left == []
    kept = goes_on(outcome, finished)
    assert kept["influence"] < 12
    assert (kept["influence"] > 0) == (case.moment == "influence")


@pytest.mark.parametrize("case", OUT_OF_MEMORY, ids=str)
def test_memory_that_runs_out_is_an_error_that_says_so(case: Case, outcome: Outcome, finished: Path) -> None:
    assert outcome.code == 1, outcome.said
    assert outcome.said.count("error: ") == 1
    assert "data set 'train' raised at sample 7: MemoryError" in outcome.said
    assert len(outcome.said.splitlines()) <= 8
    assert outcome.left == []
    assert outcome.claims == []
    goes_on(outcome, finished)


# ---- memory, in this process -----------------------------------------------------------------------------------------


class Hungry(ip.Classification):
    """A task that has too little memory for batches with a certain sample."""

    def __init__(self, least: float, allocate: Callable[[], None]) -> None:
        super().__init__(l2=0.01)
        self._least, self._allocate = least, allocate

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        if (batch[0] == self._least).any():
            self._allocate()
        return super().losses(outputs, batch)


def raise_memory_error() -> None:
    raise MemoryError("no memory for these losses")


def allocate_an_array() -> None:
    np.empty(2**60, np.uint8)


def allocate_a_tensor() -> None:
    torch.empty(2**60, dtype=torch.uint8)


class Starved(Dataset[Any]):
    """A data set that has too little memory for one sample."""

    def __init__(self, data: TensorDataset, position: int) -> None:
        self.data, self.position = data, position

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: int) -> Any:
        if position == self.position:
            raise MemoryError("no memory for this sample")
        return self.data[position]


@pytest.mark.parametrize(("name", "position", "kept"), [("train", 0, 0), ("train", 38, 2), ("holdout", 7, 7)])
def test_a_sample_that_does_not_fit_the_memory_is_named(
    make: Callable[..., ip.Pipeline], cache: Path, finished: Path, name: str, position: int, kept: int
) -> None:
    train, holdout = tiny.points(60, 1), tiny.points(10, 2)
    starved = (
        {"train": Starved(train, position)} if name == "train" else {"tests": {"holdout": Starved(holdout, position)}}
    )
    with pytest.raises(ip.WorkError, match=f"'{name}' raised at sample {position}: MemoryError: no memory") as refused:
        make(**starved).run()
    assert refused.value.exit_code == 1
    assert leftovers(cache) == []
    assert len(tiny.blocks(cache)) == kept
    make().run()
    assert tiny.files(cache) == tiny.files(finished)


@pytest.mark.parametrize("allocate", [raise_memory_error, allocate_an_array, allocate_a_tensor])
@pytest.mark.parametrize(("position", "kept"), [(8, 0), (38, 2)])
def test_a_task_that_does_not_fit_the_memory_says_so(
    make: Callable[..., ip.Pipeline], cache: Path, position: int, kept: int, allocate: Callable[[], None]
) -> None:
    sample = tiny.points(60, 1)[position][0]
    with pytest.raises(ip.WorkError, match=r"grad_z: out of memory: lower runtime\.memory or") as refused:
        make(task=Hungry(float(sample[0]), allocate)).run()
    assert refused.value.exit_code == 1
    assert leftovers(cache) == []
    assert len(tiny.blocks(cache)) == kept
    make(task=Hungry(1e9, allocate)).run()
    assert make(task=Hungry(1e9, allocate)).plan().complete
