"""Plans: seconds, bytes and memory that ``plan --measure`` says of the examples, against what a run then takes.

As a program, ``python rows_plan.py plan FILE.toml`` measures a plan and ``run FILE.toml`` goes on with what is left;
each prints its figures. They run in processes of their own, so that memory is that of the whole process. A plan says
the seconds of computing: what a run takes that has nothing to compute (PyTorch, model and data are loaded, and looked
at) is added to them. Where nothing is left once blocks of each stage were measured, there is nothing to compare but
the disk.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

from common import Bench, Row

SCRIPTS = Path(__file__).resolve().parent.parent
EXAMPLES = ("digits_logistic", "digits_cnn", "diabetes", "images", "text")
LAUNCH = (
    "import resource, subprocess, sys\n"
    "done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True)\n"
    "print(done.stdout.splitlines()[-1] if done.stdout else '')\n"
    "print(1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    "sys.exit(done.returncode)\n"
)
"""Says what a command held at most: a small process of its own, since what starts a command counts with it."""


class Took(NamedTuple):
    """What was said, or what was taken.

    Attributes:
        seconds: for what is left after the plan.
        bytes: on disk, in the end.
        peak: bytes that a process holds at most.
    """

    seconds: float
    bytes: int
    peak: int


def planned(settings: Path) -> tuple[float, int, int]:
    """Measure a plan; return what it says of what is left."""
    import influence_pipeline as ip

    found = ip.Pipeline.from_toml(settings).plan(measure=True)
    return found.seconds, sum(stage.bytes_expected for stage in found.stages), found.peak_bytes


def taken(settings: Path) -> tuple[float, int, int]:
    """Run what is left; return the seconds and the bytes of all that is cached."""
    import influence_pipeline as ip

    began = time.perf_counter()
    pipeline = ip.Pipeline.from_toml(settings)
    pipeline.run()
    seconds = time.perf_counter() - began
    return seconds, sum(stage.bytes_on_disk for stage in pipeline.plan().stages), 0


def in_child(what: str, settings: Path) -> Took:
    """Do one of the two in a process of its own; return what came of it, for a run with the peak of that process."""
    command = [sys.executable, "-c", LAUNCH, sys.executable, str(Path(__file__)), what, str(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[3:])} failed:\n{done.stderr}")
    told, held = done.stdout.splitlines()
    seconds, size, peak = json.loads(told)
    return Took(seconds, size, peak or int(held))


@cache
def measured(bench: Bench) -> dict[str, tuple[Took, Took]]:
    """Return what was said and what was taken for each example; of those with nothing left, only on disk."""
    found = {}
    for name in bench.size(EXAMPLES, EXAMPLES[:1]):
        if not (SCRIPTS / "weights" / f"{name}.pt").is_file():
            subprocess.run([sys.executable, str(SCRIPTS / "train.py"), name], check=True, capture_output=True)
        lines = (SCRIPTS / f"{name}.toml").read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if not line.startswith(("experiment =", "cache ="))]
        head = [
            f'experiment = "{SCRIPTS / name}.py:experiment"',
            f'cache = "{bench.fresh(name)}"',
            "runtime = { progress = false }",
        ]
        settings = bench.folder / f"{name}.toml"
        settings.write_text("\n".join([*head, *kept]), encoding="utf-8")
        said, took = in_child("plan", settings), in_child("run", settings)
        if said.seconds:
            said = said._replace(seconds=said.seconds + in_child("run", settings).seconds)
        else:
            said, took = said._replace(peak=0), took._replace(peak=0, seconds=0)
        found[name] = said, took
        shutil.rmtree(bench.folder / name)
    return found


def row(bench: Bench, name: str, what: str, part: int, unit: str, size: float) -> Row:
    """Return the row of the example for which a figure is furthest from what was said."""
    found = measured(bench)
    off = {key: max(a[part] / b[part], b[part] / a[part]) for key, (a, b) in found.items() if a[part]}
    worst = max(off, key=off.__getitem__)
    less, more = sorted(one[part] / size for one in found[worst])
    note = "; ".join(
        f"{key}: {a[part] / size:.4g} said, {b[part] / size:.4g} taken" if a[part] else f"{key}: nothing left"
        for key, (a, b) in found.items()
    )
    works = (f"{what}, {worst}: the larger of what was said and taken", "the smaller")
    return Row(name, *works, more, less, unit, 1.25, True, note)


ROWS = {
    "plan_seconds": lambda bench: row(bench, "plan_seconds", "seconds of a run of what is left", 0, "s", 1),
    "plan_disk": lambda bench: row(bench, "plan_disk", "bytes on disk", 1, "MiB", 2**20),
    "plan_peak": lambda bench: row(bench, "plan_peak", "memory of the process", 2, "MiB", 2**20),
}

if __name__ == "__main__":
    command, file = sys.argv[1:]
    print(json.dumps((planned if command == "plan" else taken)(Path(file))))
