"""Projections: settings, and how many coordinates each parameter gets.

A gradient g of P entries is kept as Φ g of D. Φ is random with E[ΦᵀΦ] = I, so that products of gradients are kept
within a relative error of about 1/√D (Johnson & Lindenstrauss, 1984). Scores are functions of products of gradients
and rows of the Jacobian alone, with λ and l2 as they are; so solvers run in the projected coordinates, where H is
Φ H Φᵀ and λI stays λI.

Shapes: ``P`` entries of the parameters, ``D`` coordinates, ``R`` and ``C`` rows and columns of a parameter as a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

from stages.numbers import Count, Whole
from stages.stage import StageError


class Projection(BaseModel):
    """``[grad_z] projection``: what coordinates of gradients are, where they are not the parameters' entries.

    Attributes:
        kind: "kronecker" projects each parameter by itself, as a matrix from both sides, for known layers before
            its gradient is ever formed (Choe et al., 2024, "What is your data worth to GPT?"); "sparse" has one
            entry in each column of Φ (Charikar et al., 2002); "dense" has a random sign everywhere (Achlioptas, 2003).
        dim: D; "kronecker" keeps nearly as many.
        seed: of Φ.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["kronecker", "sparse", "dense"] = "kronecker"
    dim: Count
    seed: Whole = 0

    def sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
        """Return how many rows and columns each parameter is projected to; (1, D) for what all parameters share.

        Raises:
            StageError: there are too few entries for so many coordinates, or too few coordinates for the parameters.
        """
        entries = sum(map(math.prod, shapes.values()))
        if self.dim >= entries:
            raise StageError(
                f"projection: dim = {self.dim}, and the selected parameters have {entries} entries: "
                "choose fewer, or leave `projection` out"
            )
        if self.kind != "kronecker":
            return dict.fromkeys(shapes, (1, self.dim))
        if self.dim < len(shapes):
            raise StageError(
                f"projection: dim = {self.dim} is too few for {len(shapes)} parameters, which are projected one by "
                'one: choose more, fewer by [grad_z] parameters, or kind = "sparse"'
            )
        shares = _shares({name: math.prod(shape) for name, shape in shapes.items()}, self.dim)
        return {name: _sides(*as_matrix(shape), shares[name]) for name, shape in shapes.items()}

    def columns(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, slice]:
        """Return each parameter's coordinates; where parameters share them, all have the same."""
        sizes = self.sizes(shapes)
        return consecutive({n: r * c for n, (r, c) in sizes.items()}) if self.separate else _all_of(shapes, self.dim)

    @property
    def separate(self) -> bool:
        """Whether each parameter has coordinates of its own."""
        return self.kind == "kronecker"


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and columns of a parameter as a matrix: its first dimension, and all others."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def consecutive(sizes: Mapping[str, int]) -> dict[str, slice]:
    """Return columns for each name, one after the other."""
    found, start = {}, 0
    for name, size in sizes.items():
        found[name] = slice(start, start + size)
        start += size
    return found


def _all_of(shapes: Mapping[str, tuple[int, ...]], dim: int) -> dict[str, slice]:
    return {name: slice(0, dim) for name in shapes}


def _shares(entries: Mapping[str, int], dim: int) -> dict[str, int]:
    """Share ``dim`` coordinates in proportion to the fourth root of the entries; nobody gets more than it has, or none.

    Measured best of powers from 0 to 1 on a small CNN and a residual network: last layers have few entries and much of
    the gradient.
    """
    shares: dict[str, int] = {}
    left = dict(entries)
    while left:
        one = (dim - sum(shares.values())) / sum(n**0.25 for n in left.values())
        filled = {name: n for name, n in left.items() if n <= max(1, one * n**0.25)}
        if not filled:
            return shares | {name: max(1, int(one * n**0.25)) for name, n in left.items()}
        shares |= filled
        left = {name: n for name, n in left.items() if name not in filled}
    return shares


def _sides(rows: int, columns: int, size: int) -> tuple[int, int]:
    """Return at most ``size`` coordinates as rows and columns, about as many of each."""
    kept = min(rows, max(1, math.isqrt(size)))
    of_columns = min(columns, size // kept)
    return min(rows, size // of_columns), of_columns
