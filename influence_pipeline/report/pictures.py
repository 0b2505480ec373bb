"""Pictures of results for papers and notebooks, drawn by matplotlib, which nothing else of the package imports.

A figure belongs to who asked for it: pyplot and its state are not touched.

Shapes: ``N`` training samples, ``k`` ranks.
"""

from __future__ import annotations

import io
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from influence_pipeline.errors import RequestError
from influence_pipeline.influences import Influences, shown_label
from influence_pipeline.report.appearance import Appearance, Look, Picture, Problem, Text, Values
from influence_pipeline.report.distribution import Histogram
from influence_pipeline.samples import check_dataset, fetch
from stages.stage import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.utils.data import Dataset

Names = Sequence[str] | Mapping[int, str]
COLOURS = {"helpful": "#0072b2", "harmful": "#d55e00"}
"""Told apart by the colour-blind, too (Okabe & Ito)."""
INK = "#404040"
SIDE = 1.45
"""Inches that a training sample takes."""
FEW_PIXELS = 64
"""Rows and columns up to which a picture is shown as squares."""
LINES, LINE = 11, 24
"""Of a text in the place of a picture, and characters of each."""
UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Categories of characters that nothing is drawn for: control, format, lone surrogates, separators of lines."""
POINTS = 1000
"""That a curve is drawn through, however many samples there are."""
POINTED_OUT = (0.5, 0.9)
"""Shares of all influence."""


class Drawing(Figure):
    """A figure that a notebook shows by itself."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # its box is drawn
            self.savefig(file, format="png", dpi=110, facecolor="white")
        return file.getvalue()


@dataclass(frozen=True)
class Seen:
    """A sample as it is drawn.

    Attributes:
        look: what it looks like.
        title: lines above it.
    """

    look: Look
    title: str


# ---- one test sample and its training samples ------------------------------------------------------------------------


def plot(
    influences: Influences,
    test: int,
    train: Dataset[Any],
    tests: Dataset[Any],
    k: int,
    show: Callable[[Any], Any] | None,
    label_names: Names | None,
) -> Figure:
    """Draw what :meth:`Influences.plot` says.

    Raises:
        RequestError: a data set has another length, there is no such test sample, or not so many ranks.
    """
    influences.check_row(test)
    for name, data, count in (("train", train, len(influences.train_ids)), ("tests", tests, len(influences))):
        if (length := check_dataset(data, name)) != count:
            raise RequestError(f"{name} has {length} samples, the influences are of {count}")
    pairs = label_names.items() if isinstance(label_names, Mapping) else enumerate(label_names or ())
    names = {float(number): name for number, name in pairs}
    of_test, of_train = influences.labels()
    asked, row = fetch(tests, "tests", test), slice(test, test + 1)
    found: dict[str, list[tuple[Any, str]]] = {}
    for side, (ids, scores) in (
        ("helpful", influences.rankings(row, "helpful", k)),
        ("harmful", influences.rankings(row, "harmful", k)),
    ):
        positions = [int((influences.train_ids == i).argmax()) for i in ids[0]]
        found[side] = [
            (fetch(train, "train", position), f"id {i}\n{_named(of_train, position, names)}{score:+.2e}")
            for position, i, score in zip(positions, ids[0], scores[0], strict=True)
        ]
    look = Appearance(show, [asked, *(sample for side in found.values() for sample, _ in side)])
    seen = {side: [Seen(look(sample), title) for sample, title in each] for side, each in found.items()}
    title = f"test {influences.test_ids[test]}\n{_named(of_test, test, names)}".rstrip("\n")
    drawing = _samples(Seen(look(asked), title), seen)
    _caption(drawing, influences)
    return drawing


def _named(labels: Array | None, position: int, names: Mapping[float, str]) -> str:
    """Return a line of a sample's label, or nothing where it has none."""
    label = shown_label(labels, position)
    if not label:
        return ""
    return names.get(float(label), f"label {label}").replace("\n", " ") + "\n"


def _samples(test: Seen, found: Mapping[str, Sequence[Seen]]) -> Drawing:
    """Draw a test sample, and a row of training samples for each side."""
    columns = max(map(len, found.values()))
    drawing = Drawing(figsize=(SIDE * (columns + 1.6), 2 * SIDE + 1.4), layout="constrained")
    grid = drawing.add_gridspec(2, columns + 1, width_ratios=[1.5, *[1] * columns])
    _sample(drawing.add_subplot(grid[:, 0]), test, INK, 1.5)
    for row, (side, each) in enumerate(found.items()):
        for column, seen in enumerate(each, 1):
            axis = drawing.add_subplot(grid[row, column])
            _sample(axis, seen, COLOURS[side], 1.0)
            if column == 1:
                axis.set_ylabel(f"most {side}", color=COLOURS[side], fontsize=9)
    return drawing


def _sample(axis: Axes, seen: Seen, colour: str, scale: float) -> None:
    """Draw a sample under its title; a text with letters of a size that fits ``scale``."""
    axis.set_title(drawn_text(seen.title), fontsize=8 * scale**0.5, color=colour, parse_math=False)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_color(colour)
    axis.set_box_aspect(1)
    if isinstance(seen.look, Picture):
        pixels = np.asarray(Image.open(io.BytesIO(seen.look.data)).convert("RGBA"))
        axis.imshow(pixels, interpolation="nearest" if max(pixels.shape[:2]) <= FEW_PIXELS else "antialiased")
        axis.set_box_aspect(pixels.shape[0] / pixels.shape[1])
        return
    style = "italic" if isinstance(seen.look, Problem) else "normal"
    text = axis.text(0.05, 0.95, _words(seen.look), ha="left", va="top", transform=axis.transAxes, parse_math=False)
    text.set(fontsize=6 * scale, style=style, linespacing=1.35, clip_on=True)


def _words(look: Text | Values | Problem) -> str:
    """Return a look that is no picture in a few short lines."""
    if isinstance(look, (Text, Problem)):
        lines = textwrap.wrap(" ".join(drawn_text(look.text).split()), LINE)
    elif look.names:
        pairs = zip(look.names, look.values, strict=True)
        lines = [textwrap.shorten(drawn_text(f"{name}: {value}"), LINE, placeholder="…") for name, value in pairs]
    else:
        lines = textwrap.wrap(drawn_text(", ".join(look.values)), LINE)
    return "\n".join(lines if len(lines) <= LINES else [*lines[: LINES - 1], "…"])


def drawn_text(text: str) -> str:
    """Return a text of which every character can be drawn; a new line stays one."""
    return "".join(letter if letter == "\n" or unicodedata.category(letter) not in UNSEEN else " " for letter in text)


# ---- all training samples --------------------------------------------------------------------------------------------


def plot_distribution(influences: Influences, test: int | None) -> Figure:
    """Draw what :meth:`Influences.plot_distribution` says.

    Raises:
        RequestError: there is no such test sample, or scores were not stored.
    """
    scores, what = _scores(influences, test)
    histogram = Histogram.between(float(scores.min()), float(scores.max()))
    histogram.add(scores)
    left, right = histogram.edges[:-1], histogram.edges[1:]
    drawing, axis = _axis()
    for side in COLOURS:
        positive = (side == "helpful") != influences.higher_is_better
        own, those = (left + right > 0) == positive, (scores > 0) if positive else (scores < 0)
        label = f"{side}: {those.sum():,}, together {scores[those].sum(dtype=np.float64):+.2e}"
        sides = {"width": (right - left)[own], "align": "edge", "color": COLOURS[side], "linewidth": 0}
        axis.bar(left[own], histogram.counts[own], label=label, **sides)
    axis.axvline(0, color=INK, linewidth=0.8)
    axis.set_yscale("log")
    peak = float(histogram.counts.max())
    axis.set_ylim(0.7, 2 * peak**1.3)  # with room for the legend
    axis.set_xlabel("score: change of the measurement without the sample", fontsize=9)
    axis.set_ylabel("training samples", fontsize=9)
    axis.set_title(drawn_text(what), fontsize=9, parse_math=False)
    axis.legend(fontsize=8, frameon=False)
    return drawing


def plot_cumulative(influences: Influences, test: int | None) -> Figure:
    """Draw what :meth:`Influences.plot_cumulative` says.

    Raises:
        RequestError: there is no such test sample, or scores were not stored.
    """
    scores, what = _scores(influences, test)
    drawing, axis = _axis()
    sign = -1 if influences.higher_is_better else 1
    parts = {"of either sign": np.abs(scores), "helpful": sign * scores, "harmful": -sign * scores}
    for name, part in parts.items():
        shares = carried(part[part > 0])
        if len(shares):
            ks = np.unique(np.geomspace(1, len(shares), POINTS).round().astype(int))
            colour, width = (COLOURS[name], 1.2) if name in COLOURS else (INK, 2.0)
            axis.plot(ks, shares[ks - 1], color=colour, linewidth=width, label=f"{name} ({len(shares):,})")
    shares = carried(np.abs(scores))
    for share in POINTED_OUT if shares[-1] > 0 else ():
        k = int(np.searchsorted(shares, share)) + 1
        axis.plot([k, k], [0, share], color=INK, linewidth=0.8, linestyle=":")
        axis.plot(k, share, marker="o", markersize=4, color=INK)
        axis.annotate(
            f"{k:,} carry {share:.0%}", (k, share), xytext=(6, -10), textcoords="offset points", fontsize=8, color=INK
        )
    axis.set_xscale("log")
    axis.set_xlim(1, max(2, len(scores)))
    axis.set_ylim(0, 1.02)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_major_formatter("{x:.0%}")
    axis.set_xlabel(f"k, of {len(scores):,} training samples", fontsize=9)
    axis.set_ylabel("share of |scores| that the k largest carry", fontsize=9)
    axis.set_title(drawn_text(what), fontsize=9, parse_math=False)
    if axis.lines:
        axis.legend(fontsize=8, frameon=False, loc="upper left")
    else:
        axis.text(0.5, 0.5, "all scores are 0", fontsize=9, color=INK, ha="center", transform=axis.transAxes)
    return drawing


def carried(sizes: Array) -> Array:
    """Return the share of the sum of all that the k largest carry, for every k, (N,); 0 where all are 0."""
    sums = np.cumsum(np.sort(sizes)[::-1], dtype=np.float64)
    return sums / sums[-1] if len(sums) and sums[-1] > 0 else sums


def _scores(influences: Influences, test: int | None) -> tuple[Array, str]:
    """Return the scores of a test sample, or their averages, (N,), and what they are."""
    if test is None:
        return influences.mean_scores(), f"average over the {len(influences)} tests of {influences.tests}"
    return influences.scores_of(test), f"test {influences.test_ids[test]} of {influences.tests}"


def _axis() -> tuple[Drawing, Axes]:
    drawing = Drawing(figsize=(4.6, 3.4), layout="constrained")
    axis = drawing.add_subplot()
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    return drawing, axis


def _caption(drawing: Drawing, influences: Influences) -> None:
    """Say below what scores are."""
    width = int(18 * drawing.get_figwidth())
    parts = [influences.meaning] if len(influences.meaning) <= width else influences.meaning.split("; ")
    lines = "\n".join(textwrap.fill(part, width) for part in parts)
    drawing.supxlabel(lines, fontsize=7, color=INK, x=0.99, ha="right")
