"""Plans of what does not exist: sizes and rates are given, everything else is what a run would do.

Blocks, files and bytes are those of the very layouts that a run writes, of a model that stands in for the real one.
"""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from influence_pipeline.cache import DESCRIPTION, Cache, array_bytes
from influence_pipeline.cache.layout import SCALE
from influence_pipeline.context import Context
from influence_pipeline.errors import RequestError
from influence_pipeline.experiment import Experiment
from influence_pipeline.place import Place
from influence_pipeline.plan import Plan, show_bytes, show_seconds, tile_shape
from influence_pipeline.settings import BYTES, Settings
from influence_pipeline.task import Regression
from influence_pipeline.work import Work
from influence_pipeline.works import Works
from stages.influence import Influence, columns_at_once
from stages.stage import ArraySpec

TESTS = "tests"
UNITS = {"": 1.0, "ms": 1e-3, "us": 1e-6, "s": 1.0, **{unit: float(size) for unit, size in BYTES.items() if unit}}
CLAIMS = 4
"""Requests beside files that a block takes: a claim is made, read before the block appears and before its record does,
and removed."""
INDEXED = 2
"""Requests that reading a tile takes: where it is in its file, and the tile."""


LOW_RANK_PASSES = 4
"""Passes over gradients in which a basis of low rank is prepared."""


@dataclass(frozen=True)
class Scale:
    """How much there is, on what. Rates are those of one worker, unless they say otherwise.

    Attributes:
        samples: N.
        tests: T, of one test set.
        dim: D.
        workers: processes.
        disk: bytes that the disks, or the object store, read or write in a second, for all workers together.
        network: bytes that go from or to one worker in a second; without a limit where the disk is its own.
        latency: seconds that a request takes: a file that is made, or opened, or removed.
        gradients: samples whose gradients are computed, encoded and compressed in a second.
        curvature: training samples that are read, and that what the solver prepares goes over, in a second.
        solutions: test samples that are solved for in a second.
        reads: bytes of gradients, counted as float32, that are decompressed and decoded in a second.
        flops: operations of products of gradients and solutions in a second.
        ranked: scores that are looked at for rankings and averages in a second.
        start: seconds that a worker takes before the first block of a stage.
    """

    samples: int
    tests: int
    dim: int
    workers: int = 1
    disk: float = 2e9
    network: float = math.inf
    latency: float = 1e-4
    gradients: float = 1000.0
    curvature: float = 1000.0
    solutions: float = 1.0
    reads: float = 3e9
    flops: float = 1e11
    ranked: float = 5e7
    start: float = 0.0

    @classmethod
    def read(cls, text: str) -> Scale:
        """Read it from a text such as ``samples=1e9,tests=1000,dim=4096,workers=64,disk=2GB/s,latency=1ms``.

        Raises:
            RequestError: something is unknown, missing, or no such number.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        given: dict[str, Any] = {}
        for part in text.replace(" ", "").strip(",").split(","):
            name, _, value = part.partition("=")
            if name not in known or name in given:
                what = "is given twice" if name in given else f"is none of {', '.join(known)}"
                raise RequestError(f"--simulate: {name!r} {what}")
            given[name] = _number(name, value, whole=known[name].type == "int")
        missing = [n for n, field in known.items() if field.default is dataclasses.MISSING and n not in given]
        if missing:
            raise RequestError(
                f"--simulate: {', '.join(missing)} must be given, for example samples=1e6,tests=1000,dim=4096"
            )
        return cls(**given)

    def measured(self, plan: Plan) -> Scale:
        """Return the same with those rates that the plan of an experiment has measured."""
        names = {"grad_z": "gradients", "curvature": "curvature", "s_test": "solutions"}
        timed = [stage for stage in plan.stages if stage.stage in names and stage.timing and stage.timing.blocks]
        samples = next((stage.rows for stage in plan.stages if stage.stage == "grad_z"), 0)
        found: dict[str, Any] = {}
        if timed:
            found["start"] = min(stage.timing.ready for stage in timed if stage.timing)
        for stage in timed:
            assert stage.timing is not None
            each = stage.timing.each
            if stage.complete:
                each = (sum(seconds for _, seconds in stage.timing.blocks) + stage.timing.rest) / stage.rows
            if stage.stage != "curvature":
                found[names[stage.stage]] = 1 / each
            elif samples:  # its entries are not samples, but all of them go over all samples
                reading = stage.timing.ready - found["start"]  # all samples, which are kept for all passes
                found["curvature"] = samples / (stage.rows * each + reading)
        return dataclasses.replace(self, **found)

    def __str__(self) -> str:
        """Show all rates."""
        store = f"disks {show_bytes(self.disk)}/s for all"
        link = "" if math.isinf(self.network) else f", network {show_bytes(self.network)}/s each"
        return (
            f"{store}{link}, {1000 * self.latency:g} ms a request; a worker in a second: "
            f"{self.gradients:.4g} gradients, {self.curvature:.4g} samples of curvature, "
            f"{self.solutions:.4g} solutions, "
            f"{show_bytes(self.reads)} of float32 gradients read, {self.flops / 1e9:.4g} GFLOP of products, "
            f"{self.ranked / 1e6:.4g} million scores ranked"
        )


@dataclass(frozen=True)
class SimulatedStage:
    """What a stage would take; seconds are of each resource, were it alone.

    Attributes:
        name: of the stage.
        blocks: of its grid.
        files: that are written.
        bytes: that are written, before compression.
        read_bytes: that are read of other stages.
        requests: in all.
        compute: seconds of the workers.
        disk: seconds of the disks.
        network: seconds of the workers' links.
        bookkeeping: seconds of waiting for requests, by all workers at the same time.
    """

    name: str
    blocks: int
    files: int
    bytes: int
    read_bytes: int
    requests: int
    compute: float
    disk: float
    network: float
    bookkeeping: float

    @property
    def seconds(self) -> float:
        """What it takes: blocks are computed, and claimed, one after the other, and moved beside that."""
        return max(self.compute + self.bookkeeping, self.disk, self.network)

    @property
    def binds(self) -> str:
        """The resource that takes longest."""
        resources = ("compute", "disk", "network", "bookkeeping")
        return max(resources, key=lambda resource: float(getattr(self, resource)))

    def __str__(self) -> str:
        """Show it in one line."""
        hours = (f"{seconds / 3600:>10.4g}" for seconds in (self.compute, self.disk, self.network, self.bookkeeping))
        return (
            f"{self.name:<10} {self.blocks:>10} {self.files:>10} {show_bytes(self.bytes):>10} "
            f"{show_bytes(self.read_bytes):>10} {self.requests:>12} {' '.join(hours)} {self.seconds / 3600:>10.4g}  "
            f"{self.binds}"
        )


HEADING = (
    f"{'':<10} {'blocks':>10} {'files':>10} {'written':>10} {'read':>10} {'requests':>12} "
    f"{'compute':>10} {'disk':>10} {'network':>10} {'bookkeep.':>10} {'hours':>10}  binds"
)


@dataclass(frozen=True)
class Simulation:
    """What a run of some scale would take; printing it shows it.

    Attributes:
        scale: that was given.
        title: of what.
        stages: in the order in which they are run.
    """

    scale: Scale
    title: str
    stages: tuple[SimulatedStage, ...]

    def __getitem__(self, name: str) -> SimulatedStage:
        """Return one stage."""
        return next(stage for stage in self.stages if stage.name == name)

    @property
    def seconds(self) -> float:
        """All stages, one after the other."""
        return sum(stage.seconds for stage in self.stages)

    def __str__(self) -> str:
        """Show it as a table; resources in hours."""
        written, files = sum(stage.bytes for stage in self.stages), sum(stage.files for stage in self.stages)
        binds = max(self.stages, key=lambda stage: stage.seconds)
        return "\n".join([
            *(self.title, str(self.scale), HEADING, *map(str, self.stages)),
            f"in all {show_seconds(self.seconds)}, {files} files, {show_bytes(written)} before compression; "
            f"most of it {binds.name}, where {binds.binds} binds",
        ])


def simulate(scale: Scale, settings: Settings | None = None) -> Simulation:
    """Return what a run of some scale would take.

    Args:
        scale: of what, on what.
        settings: of it; by default the defaults. Parameters and tests are the scale's.

    Raises:
        RequestError: the settings do not fit the sizes.
    """
    settings = settings or Settings()
    projection = settings.grad_z.projection
    if projection is not None:  # of whichever kind: the same arrays
        projection = projection.model_copy(update={"kind": "sparse", "dim": scale.dim})
    gradients = settings.grad_z.model_copy(update={"parameters": ("*",), "projection": projection})
    runtime = settings.runtime.model_copy(update={"device": "cpu"})
    settings = settings.model_copy(update={"grad_z": gradients, "runtime": runtime, "tests": {}})
    entries = scale.dim + (projection is not None)
    model = torch.nn.Linear(entries, 1, bias=False)
    train, tests = _Same(scale.samples, entries), _Same(scale.tests, entries)
    experiment = Experiment(model, Regression(), train, {TESTS: tests})
    with tempfile.TemporaryDirectory() as folder:
        works = Works(Context(experiment, settings), Cache(Path(folder) / "cache"))
        stages = [_stage(works.work(place), place, works, scale) for place in _places(works)]
    solver = f"solver {settings.s_test.solver}, top_k {min(settings.influence.top_k, scale.samples)}"
    title = (
        f"{scale.samples} training samples × {scale.dim} coordinates ({gradients.encoding}), {scale.tests} tests, "
        f"{solver}, {scale.workers} workers"
    )
    return Simulation(scale, title, tuple(stages))


class _Same(Dataset[tuple[Tensor, Tensor]]):
    """A data set of which only the length counts."""

    def __init__(self, length: int, entries: int) -> None:
        self._length, self._entries = length, entries

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        return torch.ones(self._entries), torch.ones(1)


def _places(works: Works) -> list[Place]:
    gradients = [works.gradients_place()] if works.settings.grad_z.store else []
    prepared = works.curvature_places()
    first = [*prepared, *gradients] if works.settings.influence.correction else [*gradients, *prepared]
    return [*first, works.s_test_place(TESTS), works.influence_place(TESTS)]


def _stage(work: Work, place: Place, works: Works, scale: Scale) -> SimulatedStage:
    """Count what a stage does, and divide that by the rates."""
    layout, blocks = work.layout, len(work.stage.grid)
    each = layout.files_each + 1
    written = layout.bytes_bound({DESCRIPTION: 0.0})
    read = _Read()
    if isinstance(work.stage, Influence):
        read = _read_by_scores(work.stage, works)
    elif place.stage == "curvature" and works.settings.s_test.of_gradients:
        read = _read_by_rows(works)
    requests = layout.file_count + blocks * (CLAIMS + 2 * each) + read.requests  # made aside, the old one removed
    workers = blocks / math.ceil(blocks / scale.workers)  # the last blocks leave some of them idle
    moved = written + read.bytes
    return SimulatedStage(
        *(place.stage, blocks, layout.file_count, written, read.bytes, requests),
        compute=scale.start + _compute(place, read, scale) / workers + read.merged / scale.ranked,
        disk=moved / scale.disk,
        network=moved / (scale.network * workers),
        bookkeeping=requests * scale.latency / workers,
    )


def _compute(place: Place, read: _Read, scale: Scale) -> float:
    """Return the seconds that one worker would take for all blocks."""
    if place.stage in ("grad_z", "newton"):
        return scale.samples / scale.gradients
    if place.stage == "curvature" and not read.entries:
        return scale.samples / scale.curvature
    if place.stage == "s_test":
        return scale.tests / scale.solutions
    if place.stage == "curvature":
        return read.entries * (4 / scale.reads + 4 * read.columns / scale.flops)  # in float64, half as fast
    scores = scale.tests * scale.samples
    computed = read.passes_computed * scale.samples / scale.gradients
    return computed + 4 * read.entries / scale.reads + scores * (2 * scale.dim / scale.flops + 1 / scale.ranked)


@dataclass(frozen=True)
class _Read:
    """What a stage reads of others, and of its own blocks to merge them.

    Attributes:
        bytes: as they are kept.
        entries: of vectors, that are decoded.
        requests: of files and tiles.
        columns: that each of these entries is multiplied by, where these are no solutions.
        merged: candidates that one process ranks in the end.
        passes_computed: over the training set, where no gradients are kept.
    """

    bytes: int = 0
    entries: int = 0
    requests: int = 0
    columns: int = 0
    merged: int = 0
    passes_computed: int = 0


def _read_by_rows(works: Works) -> _Read:
    """Count what a solver prepares of the gradients that are kept: of all coordinates, or of a low rank."""
    rank, dim = getattr(works.settings.s_test, "rank", "full"), works.context.dim
    passes, columns = (1, dim) if rank == "full" else (LOW_RANK_PASSES, int(rank))
    kept, tiles = _kept(works)
    return _Read(
        bytes=passes * sum(map(array_bytes, kept)),
        entries=passes * math.prod(kept[0].shape),
        requests=passes * INDEXED * tiles,
        columns=columns,
    )


def _kept(works: Works) -> tuple[list[ArraySpec], int]:
    """Return the arrays that gradients are read from, themselves first, and how many tiles these have."""
    layout = works.work(works.gradients_place()).layout
    kept = sorted((spec for spec in layout.stored if spec.encoding or spec.name == SCALE), key=lambda spec: spec.name)
    files, tile = layout.shard_shape(kept[0]), tile_shape(layout.shard_shape(kept[0]))
    return kept, len(layout.grid) * math.prod(math.ceil(n / t) for n, t in zip(files, tile, strict=True))


def _read_by_scores(stage: Influence, works: Works) -> _Read:
    """Count what scores are made of: gradients once for each band of tests, solutions once for each block."""
    (tests, count), dim = (axis.length for axis in stage.grid.axes), stage.gradients.shape[1]
    test_bands, sample_bands = stage.grid.shape
    solved = works.work(works.s_test_place(TESTS)).stage.grid
    tile = tile_shape((solved.axes[0].band, dim))[1]
    steps = math.ceil(dim / min(tile, columns_at_once(min(tests, stage.grid.axes[0].band))))
    parts = [spec for spec in stage.arrays if spec.name.startswith("part_")]
    candidates = sum(math.prod(spec.shape) for spec in parts if spec.name.endswith("_scores"))
    own = _Read(
        bytes=4 * sample_bands * tests * dim + sum(map(array_bytes, parts)),
        entries=sample_bands * tests * dim,
        requests=INDEXED * sample_bands * len(solved) * steps + len(stage.grid) * len(parts),
        merged=candidates,
        passes_computed=0 if works.settings.grad_z.store else test_bands,
    )
    if not works.settings.grad_z.store:
        return own
    kept, tiles = _kept(works)
    factors = len(works.work(works.gradients_place()).stage.grid) * (len(kept) - 1)
    return dataclasses.replace(
        own,
        bytes=own.bytes + test_bands * sum(map(array_bytes, kept)),
        entries=own.entries + test_bands * count * dim,
        requests=own.requests + test_bands * (INDEXED * tiles + factors),
    )


def _number(name: str, text: str, *, whole: bool) -> float:
    """Read a number, perhaps with a unit of bytes or time, and "/s" for what is a rate.

    Raises:
        RequestError: it is none, or not above 0.
    """
    match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?)([A-Za-z]*)(?:/s)?", text)
    unit = UNITS.get(match[2]) if match else None
    try:
        value = float(match[1]) * unit if match and unit else math.nan
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf or (whole and value != int(value)):
        kind = "a whole number, for example 1e6" if whole else "a number, for example 2e9, 2GB/s or 1ms"
        raise RequestError(f"--simulate: {name} must be {kind}, above 0 (found {text!r})")
    return int(value) if whole else value
