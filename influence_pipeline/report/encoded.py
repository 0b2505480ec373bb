"""Data as a page holds it: JSON in blocks, each deflated and in base64, which a browser decodes when it needs one.

What is in a block needs no escaping: base64 has no letter that HTML knows.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from influence_pipeline.report.appearance import Look, Picture, Problem, Text
from stages.stage import Array

ROWS = 250
"""Entries of a list that are in one block."""
PICTURES_BYTES = 2**17
"""That pictures of one block have at least, but for the last."""


def block(value: Any) -> str:
    """Return a value as text of a block."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode("ascii"), 6)).decode("ascii")


def in_blocks(name: str, entries: Sequence[Any]) -> dict[str, str]:
    """Return a list cut into blocks, by their names."""
    return {
        f"{name}-{number}": block(entries[start : start + ROWS])
        for number, start in enumerate(range(0, len(entries), ROWS))
    }


def numbers(values: Array | None, digits: int = 5) -> list[Any] | None:
    """Return numbers as JSON has them: whole ones exactly, others rounded, null for NaN and infinities."""
    if values is None:
        return None
    if values.ndim > 1:
        return [numbers(row, digits) for row in values]
    return [_plain(value, digits) for value in values.tolist()]


def _plain(value: float, digits: int) -> float | None:
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) else float(f"{value:.{digits}g}")


@dataclass
class Pictures:
    """Pictures, each of them kept once.

    Attributes:
        kept: type and base64 of each, as a data URL has them.
    """

    kept: list[str] = field(default_factory=list)
    _known: dict[bytes, int] = field(default_factory=dict)

    def number(self, picture: Picture) -> int:
        """Return the number of a picture, which is kept from now on."""
        if picture.data not in self._known:
            self._known[picture.data] = len(self.kept)
            self.kept.append(f"{picture.kind};base64,{base64.b64encode(picture.data).decode('ascii')}")
        return self._known[picture.data]

    def blocks(self) -> tuple[dict[str, str], list[int]]:
        """Return all in blocks by their names, and the number of the first picture of each."""
        starts, size = [0], 0
        for number, picture in enumerate(self.kept):
            if size >= PICTURES_BYTES:
                starts.append(number)
                size = 0
            size += len(picture)
        ends = [*starts[1:], len(self.kept)]
        parts = [self.kept[start:end] for start, end in zip(starts, ends, strict=True)]
        return {f"pictures-{number}": block(part) for number, part in enumerate(parts)}, starts


def look(found: Look, pictures: Pictures) -> dict[str, Any]:
    """Return what a sample looks like as the page reads it."""
    if isinstance(found, Picture):
        return {"picture": pictures.number(found), "size": list(found.size)}
    if isinstance(found, Text):
        return {"text": found.text}
    if isinstance(found, Problem):
        return {"problem": found.text}
    return {"values": list(found.values), "names": list(found.names), "more": found.more}
