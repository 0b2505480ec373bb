"""Shards: fixed shares of a stage's blocks, for processes that know nothing of one another but their number.

Without them, processes over one cache share its blocks by claiming, and each can finish the whole by itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from influence_pipeline.errors import RequestError
from stages.stage import Blocks


@dataclass(frozen=True)
class Shard:
    """Every ``count``-th block of each stage, from the ``index``-th on.

    Attributes:
        index: of this share, from 0 on.
        count: of the shares.
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "2/8", the third of eight.

        Raises:
            RequestError: it is nothing like that.
        """
        match = re.fullmatch(r"\s*([0-9]{1,9})/([0-9]{1,9})\s*", text)
        if match is None:
            raise RequestError(f"--shard {text!r}: write its number and how many there are, for example 0/8")
        index, count = int(match[1]), int(match[2])
        if index >= count:
            raise RequestError(f"--shard {text!r}: {count} shards are counted from 0/{count} to {count - 1}/{count}")
        return cls(index, count)

    def of(self, blocks: Blocks) -> Blocks:
        """Return those of some blocks that are of this share."""
        return Blocks(blocks.grid, blocks.numbers[blocks.numbers % self.count == self.index])

    def __str__(self) -> str:
        """Write it as it is read."""
        return f"{self.index}/{self.count}"
