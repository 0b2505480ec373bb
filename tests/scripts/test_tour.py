"""The tour runs from its first cell to the last, and says what is true."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
TOUR = SCRIPTS / "tour.py"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of its own, in which everything stays that the tour writes."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("xarray")
    for name in ("digits", "train"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(TOUR), "--quick"])
    yield tmp_path
    for name in ("digits", "train"):
        sys.modules.pop(name, None)


def test_the_tour_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, Any] = runpy.run_path(str(TOUR))
    said = capsys.readouterr().out
    assert re.search(r"grad_z: ([1-9]\d*) of \1 blocks computed", said)
    pairs = re.findall(r"predicted (\S+), found (\S+)", said)
    assert len(pairs) == 2
    for predicted, measured in pairs:
        assert 0.5 < float(measured) / float(predicted) < 2
    assert float(pairs[0][0]) > 0 > float(pairs[1][0])
    assert found["wrong"][:10].mean() > 0.7
    whole, without, at_random = (loss for _, loss in found["results"].values())
    assert without < 0.95 * min(whole, at_random)
    np.testing.assert_array_equal(found["opened"]["scores"].values, found["influences"].scores[:])
    for name in ("harmed", "cumulative"):
        assert (here / "runs" / "tour-quick" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_its_cells_alternate_between_words_and_code() -> None:
    """As editors and jupytext read them."""
    cells = re.split(r"^# %%", TOUR.read_text(), flags=re.MULTILINE)
    assert cells[0] == ""
    words = [cell.startswith(" [markdown]\n") for cell in cells[1:]]
    assert words == [number % 2 == 0 for number in range(len(words))]
    for cell, is_words in zip(cells[1:], words, strict=True):
        lines = [line for line in cell.splitlines()[1:] if line]
        assert lines
        assert all(line.startswith("#") for line in lines) == is_words
