"""What bookkeeping alone costs of very many blocks: seconds and memory of status, plan and resuming.

    python scripts/benchmark/bookkeeping.py [--blocks 1000000] [--folder FOLDER]
    python scripts/benchmark/bookkeeping.py --real [--blocks 20000] [--rows 5000] [--folder FOLDER]

Without ``--real`` it is a stage that writes nothing but records, all but the last few of which are links to one. With
it, it is a pipeline of so many times the same sample: two blocks of gradients are computed, and all others are links to
the files of the second, a cache as a run leaves it. Figures are of processes of their own, all that these load
included: first without summaries of records, then with them. A folder on a disk of memory is the fastest; one that
allows millions of files is needed.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # this checkout's packages, whatever is installed

import influence_pipeline as ip  # noqa: E402
from influence_pipeline import inventory, plan, room, runner  # noqa: E402
from influence_pipeline.cache import Cache, Group  # noqa: E402
from influence_pipeline.settings import RuntimeSettings  # noqa: E402
from influence_pipeline.work import Work, pending  # noqa: E402
from stages.stage import Array, Axis, Block, Grid, Report, Stage, silent  # noqa: E402

FEATURES, TESTS, LEFT = 8, 4, 4
RUNTIME = RuntimeSettings(device="cpu", progress=False)
LINKS = 30000
"""Links to one file, after which another copy is made: file systems allow some 65000."""


class Same(Dataset[tuple[Tensor, Tensor]]):
    """So many times the same sample."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        """Count the samples."""
        return self.length

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        """Return the sample."""
        return torch.ones(FEATURES), torch.ones(1)


class Nothing(Stage):
    """Blocks of which nothing comes."""

    name = "grad_z"

    def __init__(self, samples: int, rows: int) -> None:
        self.grid = Grid((Axis("sample", samples, rows),))

    def compute(self, block: Block, report: Report = silent) -> dict[str, Array]:
        """Compute nothing."""
        return {}


class Bookkeeping:
    """A cache of very many blocks, and what is asked of it.

    Attributes:
        blocks: how many.
        rows: samples of each.
        folder: of the cache.
    """

    def __init__(self, blocks: int, rows: int, folder: Path) -> None:
        self.blocks, self.rows, self.folder = blocks, rows, folder
        self.cache = Cache(folder / "cache")

    @property
    def group(self) -> Group:
        """The arrays of the stage."""
        return next(self.cache.groups("grad_z"))

    def link(self) -> str:
        """Make the cache: all but the first two and the last few blocks are links to the second."""
        self.begin()
        group, templates = self.group, self.folder / "templates"
        templates.mkdir()

        def names(number: int) -> list[str]:
            return [*group.layout.block_files(group.layout.grid.block((number,))), f"blocks/c/{number}/0"]

        for number in range(2, self.blocks - LEFT):
            for which, (name, of) in enumerate(zip(names(number), names(1), strict=True)):
                template, target = f"{templates}/{which}.{number // LINKS}", f"{group.path}/{name}"
                if number == 2 or not number % LINKS:
                    shutil.copy(group.path / of, template)
                try:
                    os.link(template, target)
                except FileNotFoundError:
                    os.mkdir(os.path.dirname(target))
                    os.link(template, target)
        shutil.rmtree(templates)
        return ""

    def status(self) -> str:
        """List what is there."""
        return inventory.listed(self.cache)[1]

    def summarise(self) -> str:
        """Write all summaries, as a run does."""
        self.group.summarise(pending(self.work(), self.group))
        return f"{len(list(self.group.path.glob('blocks/summary/*')))} summaries"

    def resume(self) -> str:
        """Compute the last blocks, and discard them again."""
        said = self.computed()
        for number in range(self.blocks - LEFT, self.blocks):
            self.group.discard(self.group.layout.grid.block((number,)))
        return said

    def work(self) -> Work:
        """Return the work of the stage."""
        return Work(Nothing(self.blocks * self.rows, self.rows), "nothing")

    def begin(self) -> None:
        """Compute the first two blocks."""
        identity = {"train": "train", "weights": "", "task": {"losses": ""}, "encoding": ""}
        attributes = {"stage": "grad_z", "tests": None, "reads": {}, "identity": identity}
        group = self.cache.create("grad_z", "nothing", self.work().layout, attributes)
        runner.measure(self.work(), group, RUNTIME, lambda missing: missing)

    def computed(self) -> str:
        """Run the stage."""
        done = runner.run(
            self.work(), self.group, RUNTIME, lambda: (self.work(), self.group), "", lambda missing: missing
        )
        return f"{done.computed} of {done.total} blocks computed"

    def plan(self) -> str:
        """Say what is missing."""
        missing, (size, _) = pending(self.work(), self.group), room.expected_bytes(self.work(), self.group)
        return f"{len(missing)} blocks missing, {self.group.bytes_on_disk()} of {size} bytes"


class Real(Bookkeeping):
    """The same of a pipeline."""

    @property
    def pipeline(self) -> ip.Pipeline:
        """The pipeline of so many samples, in blocks of so many."""
        plan.MOST_ROWS = self.rows
        model = torch.nn.Linear(FEATURES, 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        experiment = ip.Experiment(model, ip.Regression(), Same(self.blocks * self.rows), {"tests": Same(TESTS)})
        return ip.Pipeline(experiment, self.cache.path, ip.Settings(s_test={"solver": "identity"}, runtime=RUNTIME))

    def work(self) -> Work:
        """Return the work of gradients."""
        works = self.pipeline._works
        return works.work(works.grad_z_place())

    def begin(self) -> None:
        """Compute the first two blocks."""
        self.pipeline.plan(measure=True)

    def computed(self) -> str:
        """Run the stage."""
        done = self.pipeline.grad_z()
        return f"{done.computed} of {done.total} blocks computed"

    def plan(self) -> str:
        """Say what is missing."""
        return str(self.pipeline.plan()["grad_z"]).splitlines()[0]


STEPS = ("link", "status", "plan", "resume", "summarise", "status", "plan", "resume")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="a pipeline's gradients")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--rows", type=int, help="samples of a block")
    parser.add_argument("--folder", type=Path, help="where the cache is made; a temporary folder where it is left out")
    parser.add_argument("--step", choices=STEPS, help="one of all, in this process; needs --folder")
    options = parser.parse_args()
    blocks = options.blocks or (20_000 if options.real else 1_000_000)
    rows = options.rows or (5000 if options.real else 100)
    if options.step:
        began = time.perf_counter()
        said = getattr((Real if options.real else Bookkeeping)(blocks, rows, options.folder), options.step)()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{options.step:<10} {time.perf_counter() - began:>8.2f} s  {peak:>7.0f} MiB  {' '.join(said.split())}")
        return
    print(f"{blocks} blocks of {rows} samples, {blocks * rows:.3g} samples", flush=True)
    with tempfile.TemporaryDirectory(prefix="bookkeeping_", dir=options.folder) as folder:
        words = [
            "--blocks",
            str(blocks),
            "--rows",
            str(rows),
            "--folder",
            folder,
            *(["--real"] if options.real else []),
        ]
        for step in STEPS:
            subprocess.run([sys.executable, __file__, *words, "--step", step], check=True)


if __name__ == "__main__":
    main()
