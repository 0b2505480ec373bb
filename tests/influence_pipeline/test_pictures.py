"""Pictures and tables of results in papers and notebooks: they show what the results say, and escape it."""

from __future__ import annotations

import gc
import io
import shutil
import sys
import weakref
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import influence_pipeline as ip
from tests import tiny

pytest.importorskip("matplotlib")
from matplotlib import colors, image, text
from PIL import Image

from influence_pipeline.influences import shown_label
from influence_pipeline.report import pictures

Make = Callable[..., ip.Pipeline]
N, T = 60, 10
TRAIN, TESTS = tiny.points(N, 1), tiny.points(T, 2)


@pytest.fixture(scope="module")
def influences(finished: Path) -> ip.Influences:
    return ip.Influences.open(finished, "holdout")


def written(of: Any) -> list[str]:
    """Return all texts of a figure or its part."""
    return [found.get_text() for found in of.findobj(text.Text) if found.get_text()]


def as_picture(sample: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
    """Show six numbers as a picture of 6 × 6 different pixels."""
    return torch.sigmoid(torch.outer(sample[0], sample[0])).numpy()


# ---- one test sample -------------------------------------------------------------------------------------------------


def test_a_plot_has_the_samples_with_ids_labels_and_scores(influences: ip.Influences) -> None:
    drawn = influences.plot(3, train=TRAIN, tests=TESTS, k=2, show=as_picture)
    assert len(drawn.axes) == 5
    assert drawn.axes[0].get_title() == f"test 3\nlabel {int(TESTS[3][1])}"
    shown = [TESTS[3]]
    for axes, (ids, scores) in ((drawn.axes[1:3], influences.helpful(2)), (drawn.axes[3:], influences.harmful(2))):
        for axis, i, score in zip(axes, ids[3], scores[3], strict=True):
            assert axis.get_title() == f"id {i}\nlabel {int(TRAIN[i][1])}\n{score:+.2e}"
            shown.append(TRAIN[int(i)])
    assert drawn.axes[1].get_ylabel() == "most helpful"
    assert drawn.axes[3].get_ylabel() == "most harmful"
    assert any(each.replace("\n", "; ") == influences.meaning for each in written(drawn))
    for axis, sample in zip(drawn.axes, shown, strict=True):
        (found,) = axis.findobj(image.AxesImage)
        np.testing.assert_allclose(np.asarray(found.get_array())[..., 0] / 255, as_picture(sample), atol=0.01)
    file = io.BytesIO()
    drawn.savefig(file, format="png", dpi=20)
    assert Image.open(io.BytesIO(file.getvalue())).width > 50


def test_a_plot_names_labels_and_shows_values_and_texts(influences: ip.Influences) -> None:
    plain = influences.plot(train=TRAIN, tests=TESTS, k=1)
    assert f"{float(TESTS[0][0][0]):.4g}" in "".join(written(plain.axes[0]))
    named = influences.plot(
        train=TRAIN,
        tests=TESTS,
        k=1,
        show=lambda sample: {"first": sample[0][0]},
        label_names={0: "no", 1: "a", 2: "b"},
    )
    assert named.axes[0].get_title().splitlines()[1] == ("no", "a", "b")[int(TESTS[0][1])]
    assert written(named.axes[0])[0].startswith("first: ")
    long = influences.plot(train=TRAIN, tests=TESTS, k=1, show=lambda sample: "a long sentence " * 99)
    lines = next(each for each in written(long.axes[0]) if "sentence" in each).splitlines()
    assert len(lines) == pictures.LINES
    assert max(map(len, lines)) <= pictures.LINE
    assert lines[-1] == "…"


HOSTILE = ("$\\frac{1", "\x07a\u202eb\ud800\u2028c", "x^{2$ <b> \\mathbf{y} $")


def test_hostile_texts_are_drawn_as_they_are(influences: ip.Influences) -> None:
    drawn = influences.plot(train=TRAIN, tests=TESTS, k=1, show=lambda sample: HOSTILE[0], label_names=HOSTILE)
    assert drawn._repr_png_().startswith(b"\x89PNG")
    label = HOSTILE[int(TESTS[0][1])]
    assert drawn.axes[0].get_title() == f"test 0\n{pictures.drawn_text(label)}"
    assert HOSTILE[0] in written(drawn.axes[1])
    assert pictures.drawn_text(HOSTILE[1]) == " a b  c"
    assert pictures.drawn_text("two\nlines, äöü, 数") == "two\nlines, äöü, 数"


def test_what_cannot_be_plotted_is_refused(influences: ip.Influences, make: Make) -> None:
    for test in (-1, T, 1.5, None):
        with pytest.raises(ip.RequestError, match=f"test = {test}: 'holdout' has 10 test samples"):
            influences.plot(test, train=TRAIN, tests=TESTS)  # type: ignore[arg-type]
    with pytest.raises(ip.RequestError, match="train has 10 samples, the influences are of 60"):
        influences.plot(train=TESTS, tests=TESTS)
    with pytest.raises(ip.RequestError, match="tests has 60 samples, the influences are of 10"):
        influences.plot(train=TRAIN, tests=TRAIN)
    with pytest.raises(ip.RequestError, match="k = 61: there are 60"):
        influences.plot(train=TRAIN, tests=TESTS, k=61)
    for draw in (influences.plot_distribution, influences.plot_cumulative):
        with pytest.raises(ip.RequestError, match="test = 10: 'holdout' has 10"):
            draw(10)
    ranks = make(influence={"top_k": 3, "store_scores": False}).run()["holdout"]
    for draw in (ranks.plot_distribution, ranks.plot_cumulative):
        with pytest.raises(ip.RequestError, match="store_scores = false"):
            draw(0)
        assert draw().axes
    assert len(ranks.plot(train=TRAIN, tests=TESTS, k=3).axes) == 7


# ---- all training samples --------------------------------------------------------------------------------------------


class Margin(ip.Classification):
    higher_is_better = True


def counted(drawn: Any, side: str) -> float:
    """Return how many samples the bars of a side have."""
    colour = colors.to_rgba(pictures.COLOURS[side])
    return sum(bar.get_height() for bar in drawn.axes[0].patches if bar.get_facecolor() == colour)


def test_a_distribution_counts_every_sample_on_its_side(influences: ip.Influences, make: Make) -> None:
    for test in (None, 4):
        scores = influences.mean_scores() if test is None else influences.scores[test]
        drawn = influences.plot_distribution(test)
        assert counted(drawn, "helpful") == (scores > 0).sum()
        assert counted(drawn, "harmful") == (scores < 0).sum()
        said = drawn.axes[0].get_legend().get_texts()[0].get_text()
        assert said == f"helpful: {(scores > 0).sum()}, together {scores[scores > 0].sum():+.2e}"
    assert drawn.axes[0].get_title() == "test 4 of holdout"
    margin = make(task=Margin(l2=0.01)).run()["holdout"]
    assert counted(margin.plot_distribution(), "helpful") == (margin.mean_scores() < 0).sum()


def test_cumulative_shares_are_those_of_the_largest(influences: ip.Influences) -> None:
    scores = influences.scores[4].astype(np.float64)
    drawn = influences.plot_cumulative(4)
    sizes = sorted(np.abs(scores).tolist(), reverse=True)
    wanted = [sum(sizes[: k + 1]) / sum(sizes) for k in range(N)]
    found = drawn.axes[0].lines[0]
    np.testing.assert_array_equal(found.get_xdata(), range(1, N + 1))
    np.testing.assert_allclose(found.get_ydata(), wanted, rtol=1e-6)
    for share in (0.5, 0.9):
        k = next(k for k, part in enumerate(wanted, 1) if part >= share)
        assert f"{k} carry {share:.0%}" in written(drawn)
    assert f"helpful ({(scores > 0).sum()})" in written(drawn)


def test_scores_that_are_all_zero_are_drawn(influences: ip.Influences, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(influences, "mean_scores", lambda: np.zeros(N, np.float32))
    for draw in (influences.plot_distribution, influences.plot_cumulative):
        drawn = draw()
        assert drawn.axes[0].get_title() == "average over the 10 tests of holdout"
        assert drawn._repr_png_().startswith(b"\x89PNG")
    assert "all scores are 0" in written(drawn)


# ---- notebooks and packages ------------------------------------------------------------------------------------------


def test_figures_are_kept_by_nobody_else(influences: ip.Influences) -> None:
    drawn = influences.plot_cumulative()
    drawn._repr_png_()
    reference = weakref.ref(drawn)
    del drawn
    gc.collect()
    assert reference() is None
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


@pytest.mark.parametrize(("module", "package"), [("matplotlib", "matplotlib"), ("PIL", "pillow")])
def test_a_missing_package_is_named_with_the_extra(
    influences: ip.Influences, monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for draw in (
        lambda: influences.plot(train=TRAIN, tests=TESTS),
        influences.plot_distribution,
        influences.plot_cumulative,
    ):
        with pytest.raises(ip.RequestError, match=rf"pictures need {package}.*influence-pipeline\[report\]"):
            draw()
    assert "<table" in influences._repr_html_()


class Cells(HTMLParser):
    """What tags there are, and the texts in cells of tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.cells: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["td"]:
            self.cells.append(data)


def test_a_notebook_shows_the_ends_of_the_average_and_everything_escaped(finished: Path, tmp_path: Path) -> None:
    cache = tmp_path / "<script>alert('&')<" / "cache"
    shutil.copytree(finished, cache)
    found = ip.Influences.open(cache, "holdout")
    html = found._repr_html_()
    parsed = Cells(html)
    assert parsed.tags == {"div", "b", "br", "table", "thead", "tbody", "tr", "th", "td", "code"}
    sides = found.helpful_on_average(10), found.harmful_on_average(10)
    wanted = [
        cell
        for rank in range(10)
        for ids, scores in sides
        for cell in (str(ids[rank]), f"{scores[rank]:+.3e}", str(int(TRAIN[int(ids[rank])][1])))
    ]
    assert parsed.cells == wanted
    assert "60 training samples on 10 tests <b>holdout</b>" in html
    assert "+ helps, - harms" in html
    shutil.rmtree(cache / "grad_z")
    shutil.rmtree(cache / "s_test")
    assert len(Cells(ip.Influences.open(cache, "holdout")._repr_html_()).cells) == 40


def test_labels_are_short_and_whole_ones_exact() -> None:
    shown = [shown_label(np.array([label]), 0) for label in (3.0, -1.0, 123456789.0, 1.554830074, 1e-7, float("nan"))]
    assert shown == ["3", "-1", "123456789", "1.555", "1e-07", ""]
    assert shown_label(None, 0) == ""


def test_few_training_samples_are_all_shown(make: Make) -> None:
    few = TensorDataset(*TRAIN[:4])
    found = make(train=few, s_test={"solver": "identity"}).run()["holdout"]
    assert len(Cells(found._repr_html_()).cells) == 2 * 3 * 4
    assert len(found.plot(train=few, tests=TESTS, k=4).axes) == 9
