"""Random numbers of single samples: each sample has its own, whatever else is in its batch and whoever computes it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stages.stage import Array

STEP = np.uint64(0x9E3779B97F4A7C15)
"""The odd increment of SplitMix64 (Steele, Lea & Flood, 2014), 2⁶⁴ over the golden ratio."""


class Draws:
    """Streams of random numbers, one for each sample of a batch; they depend on the seed and the sample's id alone."""

    def __init__(self, seed: int, ids: Sequence[int], device: torch.device) -> None:
        """Begin the streams of some samples.

        Args:
            seed: of all streams.
            ids: the samples of a batch, in its order.
            device: where the numbers are wanted.
        """
        start = _mixed(np.array([seed], dtype=np.uint64))
        self._keys = _mixed(np.asarray(ids, dtype=np.uint64) * STEP + start)
        self._device = device
        self._drawn = 0

    def uniform(self, *shape: int) -> Tensor:
        """Return the next numbers between 0 and 1, both excluded, (B, *shape) in double precision."""
        count = math.prod(shape)
        steps = np.arange(self._drawn + 1, self._drawn + count + 1, dtype=np.uint64) * STEP
        self._drawn += count
        bits = _mixed(self._keys[:, np.newaxis] + steps) >> np.uint64(12)
        numbers = torch.from_numpy((bits.astype(np.float64) + 0.5) * 2.0**-52)
        return numbers.reshape(len(self._keys), *shape).to(self._device)

    def normal(self, *shape: int) -> Tensor:
        """Return the next standard normal numbers, (B, *shape) in double precision."""
        found: Tensor = torch.special.ndtri(self.uniform(*shape))
        return found


def _mixed(values: Array) -> Array:
    """Return the mixing function of SplitMix64 of unsigned numbers, which is one to one."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = values ^ (values >> np.uint64(31))
    return mixed
