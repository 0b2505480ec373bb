"""Plans: pure arithmetic on sizes. Blocks, tiles, bytes and memory, before anything is computed.

A grid is a function of D, the number of coordinates, alone, so that it is the same for whoever resumes a cache;
``memory`` only splits the work inside a block.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from influence_pipeline.errors import RequestError
from stages.influence import columns_at_once

DECODED_SHARD_BYTES = 256 * 2**20
MOST_ROWS = 1024
MOST_TESTS = 64
"""Test samples that are solved for together: more share each pass over the training set, fewer are lost to a kill."""
MOST_SCORED_TESTS = 1024
MOST_PARTS = 16
"""Parts of the training set over which a solver's sums are kept."""
LEAST_SUMMED = 256
"""Training samples in such a part, about: as many as are on the device at once."""
SUMS_BYTES = 2**30
"""Of all such sums, at most, where there is more than one part."""
LARGE_BYTES = 10 * 2**30
"""Of gradients, for which smaller ones are suggested even where they fit."""
SUGGESTED_DIM = 4096
"""Coordinates that are suggested at most: by those, products of gradients are within about 1/64 of their size."""
LEAST_SUGGESTED_DIM = 64
SUGGESTED_LAYERS = 3
"""Modules that are suggested at most; by their names, one by one."""
MOST_BATCH = 256
"""Samples on the device at once, where nothing else bounds them."""
SEGMENT = 4096
"""Blocks, one after the other, of whose records there is a summary; groups of fewer have none."""
TILE_ENTRIES = 2**21
TILE_ROWS = 256
TILE_COLUMNS = 8192
ENDLESS = 2**80
"""Bytes that are free where there is no end of them."""
AHEAD_BYTES = 2**27
"""Of gradients and solutions that are under way at once from an object store, where the memory allows that."""


def block_rows(dim: int, most: int | None = None) -> int:
    """Return the rows of a block of float32 vectors of ``dim`` entries: a power of two, at most ``most``."""
    most = MOST_ROWS if most is None else most
    fits = DECODED_SHARD_BYTES // (4 * dim)
    return min(most, 2 ** int(math.log2(fits))) if fits >= 1 else 1


def parts(samples: int, summed: int) -> int:
    """Return into how many parts the training set is cut, over each of which so many numbers are summed in float64."""
    return max(1, min(MOST_PARTS, samples // LEAST_SUMMED, SUMS_BYTES // (8 * summed)))


def train_band(rows: int, top_k: int) -> int:
    """Return the training samples of a block of scores: whole gradient blocks, at least 16 · top_k samples."""
    return rows * max(1, math.ceil(16 * top_k / rows))


def tile_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the tiles that a block's part of an array is cut into, of about equal width.

    A tile has at most ``TILE_ENTRIES`` entries, and decodes several times faster than whole long rows.
    """
    if len(shape) < 2:
        return shape
    rows, columns = shape[-2:]
    tile_rows = min(TILE_ROWS, rows)
    most = max(TILE_COLUMNS, TILE_ENTRIES // tile_rows)
    tile_columns = math.ceil(columns / math.ceil(columns / most))
    return (*(1 for _ in shape[:-2]), tile_rows, tile_columns)


@dataclass(frozen=True)
class Reads:
    """How one block of scores reads its gradients.

    Attributes:
        rows: rows at once.
        columns: columns of the solutions at once.
        tile_columns: columns of the gradients at once.
        passes: times that the gradients are read, over all test samples.
        memory_bytes: what a block holds at once.
        ahead_bytes: what of that is fetched before it is used.
    """

    rows: int
    columns: int
    tile_columns: int
    passes: int
    memory_bytes: int
    ahead_bytes: int


def reads(
    tests: int,
    samples: int,
    dim: int,
    rows: int,
    bands: tuple[int, int],
    memory_bytes: int,
    *,
    computed: bool,
    encoding: str,
    threads: int,
    far: bool = False,
) -> Reads:
    """Choose the tiles that a block of scores is computed in, and how many columns of the solutions are held.

    Args:
        tests: T.
        samples: N.
        dim: D.
        rows: rows of a block of gradients.
        bands: test and training samples of a block of scores.
        memory_bytes: the budget.
        computed: gradients are computed as they are read, a whole block at a time; otherwise tile by tile.
        encoding: how gradients are kept.
        threads: that read.
        far: each read takes long, so that some are under way before they are used.

    Raises:
        RequestError: not even one column fits; the message has the bytes needed.
    """
    test_rows, band = min(tests, bands[0]), min(samples, bands[1])
    read_rows = min(rows, samples) if computed else min(rows, samples, TILE_ROWS)
    tile = dim if computed else tile_shape((min(rows, samples), dim))[1]
    # Scores, their transpose and what ranking them takes; and a tile for each thread: compressed, as kept, decoded.
    kept = np.dtype(encoding).itemsize
    ahead_bytes = min(AHEAD_BYTES, memory_bytes // 8) if far else 0
    fixed = ahead_bytes + 3 * 4 * test_rows * band
    fixed += 3 * 4 * read_rows * dim if computed else threads * (kept + kept + 4) * read_rows * tile
    per_column = 4 * test_rows
    fixed += 2 * per_column * min(dim, columns_at_once(test_rows))  # of the solutions, while they are transposed
    columns = min(dim, (memory_bytes - fixed) // per_column)
    least = min(dim, 256)
    if columns < least:
        raise RequestError(
            f"influence: a block of {test_rows} tests × {band} training samples needs "
            f"{show_bytes(fixed + per_column * least, up=True)}; runtime.memory is {show_bytes(memory_bytes)}: raise it"
        )
    if tile < columns < dim:
        columns -= columns % tile  # so that no tile is decoded twice
    passes = math.ceil(tests / bands[0])
    return Reads(read_rows, columns, min(tile, columns), passes, fixed + per_column * columns, ahead_bytes)


def rows_memory(dim: int, rows: int, *, computed: bool, encoding: str) -> tuple[int, int]:
    """Return what gradients hold beside whole rows that are read of them: between reads, and while one goes on.

    Args:
        dim: D.
        rows: of a block.
        computed: gradients are computed as they are read, a whole block at a time, and this one is kept; otherwise
            they are read tile by tile.
        encoding: how they are kept.
    """
    if computed:
        return 4 * rows * dim, 3 * 4 * rows * dim
    tile = 2 * math.prod(tile_shape((rows, dim))) * np.dtype(encoding).itemsize  # compressed, and as kept
    return tile, tile


def gradients_memory(dim: int, rows: int, batch: int, itemsize: int, encoding: str) -> int:
    """Return what gradients hold at once while they are computed, encoded and written.

    Batches: one that is computed, twice, and two that are to be encoded. Bands of tiles: one that is filled, two that
    are compressed, and two of the block before.
    """
    batches = min(batch, rows) * (2 * itemsize + 2 * 4)
    return dim * (batches + 5 * min(rows, TILE_ROWS) * np.dtype(encoding).itemsize)


def gradient_batch(dim: int, itemsize: int) -> int:
    """Return how many samples' gradients are best computed together: a power of two that takes about 30 MiB.

    Measured, for hooks and for ``vmap``: what takes more is new memory every time.
    """
    return power_of_two(max(4, min(MOST_BATCH, 30 * 2**20 // (dim * itemsize))))


def fitting(most: int, *bounds: tuple[int, int]) -> int:
    """Return how many samples fit, at least one: ``most``, or a power of two below it.

    Args:
        most: samples.
        bounds: bytes that each sample takes, and bytes that there are.
    """
    fits = min((available // each for each, available in bounds if each), default=most)
    return most if fits >= most else power_of_two(max(1, fits))


def power_of_two(count: int) -> int:
    """Return the largest power of two up to a number."""
    return 1 << (count.bit_length() - 1)


@dataclass(frozen=True)
class Suggestion:
    """Settings under which gradients take less.

    Attributes:
        setting: a line of ``[grad_z]``.
        dim: D under it, 0 where no gradients are kept.
        grad_z_bytes: what gradients would take, at most.
    """

    setting: str
    dim: int
    grad_z_bytes: int

    def __str__(self) -> str:
        """Show it in one line."""
        if not self.dim:
            return f"[grad_z] {self.setting} (keeps no gradients, computes them for each test set)"
        return f"[grad_z] {self.setting} (D = {self.dim}: {show_bytes(self.grad_z_bytes)})"


GradZBytes = Callable[[int, str], int]
"""Gives what gradients of so many coordinates take, at most, under an encoding."""


def suggestions(
    sizes: Mapping[str, int], dim: int, encoding: str, needed: GradZBytes, available: Callable[[int], int]
) -> list[Suggestion]:
    """Return what would fit: encodings that take less, a projection, the last layers; and to keep no gradients.

    Of projections it is the largest power of two, up to ``SUGGESTED_DIM``, that takes half of what is available.

    Args:
        sizes: entries of each selected parameter, in the model's order.
        dim: D.
        encoding: as it is set.
        needed: bytes.
        available: gives the bytes that gradients of so many coordinates may take.
    """
    found = []
    for other in ("float16", "int8"):
        smaller = np.dtype(other).itemsize < np.dtype(encoding).itemsize
        if smaller and needed(dim, other) <= available(dim):
            found.append(Suggestion(f'encoding = "{other}"', dim, needed(dim, other)))

    projected = min(SUGGESTED_DIM, power_of_two(max(1, dim - 1)))
    while projected >= LEAST_SUGGESTED_DIM and 2 * needed(projected, encoding) > available(projected):
        projected //= 2
    if max(LEAST_SUGGESTED_DIM, len(sizes)) <= projected < dim:
        setting = f'projection = {{ kind = "kronecker", dim = {projected} }}'
        found.append(Suggestion(setting, projected, needed(projected, encoding)))
    if dim == sum(sizes.values()):
        layers = [(globs, n) for globs, n in _last_layers(sizes) if n < dim and needed(n, encoding) <= available(n)]
        for globs, entries in layers[-1:]:
            setting = "parameters = [{}]".format(", ".join(f'"{glob}"' for glob in globs))
            found.append(Suggestion(setting, entries, needed(entries, encoding)))
    return [*found, Suggestion("store = false", 0, 0)]


def _last_layers(sizes: Mapping[str, int]) -> Iterator[tuple[list[str], int]]:
    """Yield globs for the last module's parameters, the last two modules', …, with the entries that these match."""
    globs = list(dict.fromkeys(f"{name.rpartition('.')[0]}.*" if "." in name else name for name in sizes))
    for count in range(1, min(SUGGESTED_LAYERS, len(globs)) + 1):
        chosen = globs[-count:]
        yield chosen, sum(n for name, n in sizes.items() if any(fnmatch.fnmatchcase(name, glob) for glob in chosen))


@dataclass(frozen=True)
class Timing:
    """What some blocks of a stage took, by themselves in one process.

    Attributes:
        ready: seconds before the first: what every process checks and chooses once.
        blocks: the entries of each, and its seconds.
        rest: seconds of whatever came after these.
        peak_bytes: what the process held at most: libraries, model and data among it.
        stand_in: what they were computed of, for people, where their inputs are not there yet: these are not kept.
        shares: what each of their arrays took on disk, of what it has in memory.
    """

    ready: float
    blocks: tuple[tuple[int, float], ...]
    rest: float = 0.0
    peak_bytes: int = 0
    stand_in: str = ""
    shares: Mapping[str, float] = field(default_factory=dict)

    @property
    def spent(self) -> float:
        """Seconds that were spent on what is kept."""
        return 0.0 if self.stand_in else self.ready + sum(seconds for _, seconds in self.blocks) + self.rest

    @property
    def each(self) -> float:
        """Seconds of an entry: of the first block, which costs more, only where there is no other."""
        timed = self.blocks[1:] or self.blocks
        return sum(seconds for _, seconds in timed) / sum(rows for rows, _ in timed)

    def left(self, entries: int, blocks: int, workers: int) -> float:
        """Return the seconds that the next run takes for what is left; what first blocks cost is not multiplied.

        Args:
            entries: of the blocks that are left.
            blocks: that are left.
            workers: processes that share them.
        """
        if not (entries and self.blocks):
            return 0.0
        return self.ready + self.each * entries / min(workers, blocks)


@dataclass(frozen=True)
class StagePlan:
    """What a stage has, and what it would take.

    Attributes:
        stage: its name.
        key: of its arrays in the cache.
        done: blocks that are there.
        total: blocks in all.
        rows: samples in all.
        files: that are there.
        files_expected: in all.
        bytes_on_disk: what is there.
        bytes_expected: what all of it would take: measured on the blocks that are there, or else before compression.
        measured: whether it was measured.
        memory_bytes: what one process holds at once, 0 where nothing is left to compute.
        passes: what it reads how often, for people.
        differs: for a miss, how the identity differs from the nearest that is cached.
        timing: what blocks took where they were measured now.
        seconds: that are left to a run by that.
        member: the checkpoint that it is of, where there are several.
    """

    stage: str
    key: str
    done: int
    total: int
    rows: int
    files: int
    files_expected: int
    bytes_on_disk: int
    bytes_expected: int
    measured: bool
    memory_bytes: int
    passes: str
    differs: tuple[str, ...] = ()
    timing: Timing | None = None
    seconds: float = 0.0
    member: str = ""

    @property
    def complete(self) -> bool:
        """Whether nothing is left to compute."""
        return self.done == self.total

    def __str__(self) -> str:
        """Show it in one line, one for what was measured, and one for each difference."""
        state = "complete" if self.complete else "not begun" if not self.done else "to go on"
        of = "about" if self.measured else "at most"
        size = show_bytes(self.bytes_on_disk) + ("" if self.complete else f" of {of} {show_bytes(self.bytes_expected)}")
        lines = [
            f"{self.stage:<10} {self.key:<24} {self.done:>6} / {self.total:<6} blocks  {state:<9}  "
            f"{f'{self.files_expected} files':<12}  {size:<29}  "
            f"memory {show_bytes(self.memory_bytes) if self.memory_bytes else '-':<9}  {self.passes}"
        ]
        if self.timing is not None:
            lines.append(f"{'':<11}{self._timed(self.timing)}")
        lines += [f"{'':<11}differs from what is cached: {text}" for text in self.differs]
        return "\n".join(lines)

    def _timed(self, timing: Timing) -> str:
        """Say what was measured, and what follows of that."""
        peak = f"the process held {show_bytes(timing.peak_bytes)} at most"
        if timing.stand_in:
            took = sum(seconds for _, seconds in timing.blocks)
            how = f"estimated from {show_seconds(took)} of {timing.stand_in}, which are not kept"
            return f"about {show_seconds(self.seconds)} to go, {how}; {peak}"
        if self.complete:
            return f"measured: {show_seconds(timing.spent)} for what was missing; {peak}"
        of = f"{len(timing.blocks)} block{'s' * (len(timing.blocks) > 1)} in {show_seconds(timing.spent)}"
        return f"measured: {of}; about {show_seconds(self.seconds)} to go; {peak}"


@dataclass(frozen=True)
class Plan:
    """What a run would do; printing it shows it.

    Attributes:
        title: of what.
        stages: in the order in which they are run.
        free: bytes on the disk of the cache.
        spare: of these, what is left free.
        suggestions: what takes less disk, where that is wanted.
    """

    title: str
    stages: tuple[StagePlan, ...] = field(default=())
    free: int = 0
    spare: int = 0
    suggestions: tuple[Suggestion, ...] = ()

    def __getitem__(self, stage: str) -> StagePlan:
        """Return the plan of one stage, of the first checkpoint where there are several."""
        return next(plan for plan in self.stages if plan.stage == stage)

    @property
    def complete(self) -> bool:
        """Whether nothing is left to compute."""
        return all(plan.complete for plan in self.stages)

    @property
    def seconds(self) -> float:
        """What is left to a run, as far as stages were measured."""
        return sum(plan.seconds for plan in self.stages)

    @property
    def peak_bytes(self) -> int:
        """What a process held at most in all stages that were measured; the blocks that are left take no more."""
        return max((plan.timing.peak_bytes for plan in self.stages if plan.timing is not None), default=0)

    @property
    def bytes_needed(self) -> int:
        """What is to be written."""
        return sum(plan.bytes_expected - plan.bytes_on_disk for plan in self.stages if not plan.complete)

    @property
    def fits(self) -> bool:
        """Whether there is room for that."""
        return self.bytes_needed <= self.free - self.spare

    def __str__(self) -> str:
        """Show it as a table."""
        lines, missing = [self.title], [plan for plan in self.stages if not plan.complete]
        for member, stages in itertools.groupby(self.stages, lambda plan: plan.member):
            lines += [*([f"checkpoint {member}:"] if member else []), *map(str, stages)]
        if self.bytes_needed:
            how = "" if all(plan.measured for plan in missing) else "at most "
            files = sum(max(0, plan.files_expected - plan.files) for plan in missing)
            risk = "" if self.fits else ": may not fit; a run measures a block, and refuses what does not"
            free = "" if self.free >= ENDLESS else f", free on that disk: {show_bytes(self.free)}{risk}"
            lines.append(f"to be written: {how}{show_bytes(self.bytes_needed)} in {files} files{free}")
            if self.suggestions:
                lines.append("would take less:" if self.fits else "would fit:")
                lines += [f"  {suggestion}" for suggestion in self.suggestions]
        if any(plan.timing for plan in self.stages):
            unknown = list(dict.fromkeys(plan.stage for plan in missing if plan.timing is None))
            beside = f", and {', '.join(unknown)}, which could not be measured" if unknown else ""
            held = f"a process holds about {show_bytes(self.peak_bytes)} at most"
            lines.append(f"to go: about {show_seconds(self.seconds)} of computing{beside}; {held}")
        return "\n".join(lines)


def show_seconds(seconds: float) -> str:
    """Write a time for people."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.{0 if seconds >= 10 else 1}f} s"


def enough(needed: Callable[[int], int], memory_bytes: int) -> int:
    """Return an amount of memory, at least that given, that is enough where more is used if there is more."""
    while (more := needed(memory_bytes)) > memory_bytes:
        memory_bytes = more
    return memory_bytes


def show_bytes(count: float, *, up: bool = False) -> str:
    """Write an amount of memory for people; rounded up where it is to be given."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(count) >= 1024 and len(units) > 1:
        count /= 1024
        units.pop(0)
    digits = 0 if units[0] == "B" or count >= 100 else 1
    return f"{math.ceil(count * 10**digits) / 10**digits if up else count:.{digits}f} {units[0]}"
