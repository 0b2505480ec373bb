"""Room on the disk: is there enough for what is to be computed, and if not, what would fit?"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from influence_pipeline.cache import Group
from influence_pipeline.context import Context
from influence_pipeline.errors import RequestError
from influence_pipeline.plan import show_bytes
from influence_pipeline.runner import Work
from influence_pipeline.works import Place
from stages.stage import Block

SPARE = 16 * 2**20
"""Bytes that are left free."""


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk that a folder is on, or will be."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def expected_bytes(work: Work, group: Group | None) -> tuple[int, bool]:
    """Return what all of a stage will take on disk, and whether that was measured on its first blocks."""
    bound = work.layout.bytes_bound()
    done, _ = (0, 0) if group is None else group.progress()
    if group is None or not done:
        return bound, False
    rows = sum(block.rows for block in group.layout.grid if group.record(block) is not None)
    total = sum(block.rows for block in work.stage.grid)
    return min(bound, group.bytes_on_disk() * total // rows), True


def refuse(place: Place, work: Work, group: Group, context: Context, missing: list[Block]) -> list[Block]:
    """Refuse missing blocks that do not fit the disk; return those to compute before this is asked again.

    How far arrays can be compressed is not known before: where their bound does not fit, one block is computed and
    measured.

    Raises:
        RequestError: with the bytes, and what would fit.
    """
    free = free_bytes(group.path) - SPARE
    expected, measured = expected_bytes(work, group)
    needed = expected - group.bytes_on_disk()
    if needed <= free:
        return missing
    one = needed // len(missing)
    if not measured and one <= free:
        return missing[:1]
    how = "measured on the blocks that are there" if measured else "before compression"
    raise RequestError(
        f"{work.label} needs {show_bytes(needed)} more ({how}), and the disk of {group.path} has "
        f"{show_bytes(max(0, free))} free, beside {show_bytes(SPARE)} that are left alone. "
        f"{_what_fits(place, context, needed, max(0, free))}"
    )


def _what_fits(place: Place, context: Context, needed: int, free: int) -> str:
    """Say what would fit in the free bytes."""
    if place.stage != "grad_z":
        return "Free some (`gc` removes what nothing refers to), or name a cache on another disk"
    fits = []
    encoding = context.settings.grad_z.encoding
    for other in ("float16", "int8"):
        part = np.dtype(encoding).itemsize // np.dtype(other).itemsize
        if part > 1 and needed // part <= free:
            fits.append(f'[grad_z] encoding = "{other}" ({"half" if part == 2 else "a quarter"} of it)')
    sizes: dict[str, int] = {}
    for name, parameter in context.function.params.items():
        prefix = name.partition(".")[0]
        sizes[prefix] = sizes.get(prefix, 0) + parameter.numel()
    share = free / needed
    small = sorted(((size, name) for name, size in sizes.items() if size <= share * context.dim), reverse=True)
    fits += [
        f'[grad_z] parameters = ["{name}{"" if name in context.function.params else ".*"}"] '
        f"({size} of {context.dim} coordinates)"
        for size, name in small[:3]
    ]
    fits.append("[grad_z] store = false (keeps none; computes them for each test set)")
    return f"Would fit: {'; '.join(fits)}; or a cache on another disk"
