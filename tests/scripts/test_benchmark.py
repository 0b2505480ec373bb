"""Every row of the benchmark can be measured; how fast anything is, is not for tests to say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.marks import thoroughly

RUN = Path(__file__).parents[2] / "scripts" / "benchmark" / "run.py"


FEW = ("influence_cold_8", "further_tests")
ROWS = (
    *("grad_z_loop", "influence_cold_8", "further_tests", "lissa_32", "resume", "wide", "projection_identity"),
    *("plan_seconds", "plan_disk", "plan_peak"),
)
"""Rows of every module but ``nothing_to_do``, which has one row alone."""


@pytest.mark.parametrize("names", [FEW, *thoroughly([ROWS])], ids=["few", "of every module"])
def test_rows_print(tmp_path: Path, names: tuple[str, ...]) -> None:
    figures = tmp_path / "figures.json"
    only = [argument for name in names for argument in ("--only", name)]
    command = [sys.executable, str(RUN), "--quick", "--folder", str(tmp_path), "--json", str(figures), *only]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {line.split("|")[1].strip() for line in done.stdout.splitlines()[2:]} == set(names)
    rows = json.loads(figures.read_text())["rows"]
    assert {row["name"] for row in rows} == set(names)
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in rows)


def test_every_row_is_one_of_its_module() -> None:
    named = (
        "import importlib, run; "
        "assert all(set(importlib.import_module(module).ROWS) == set(names) for module, names in run.MODULES.items())"
    )
    path = os.pathsep.join([str(RUN.parent), str(RUN.parents[2])])
    command = [sys.executable, "-c", named]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr


def test_unknown_row() -> None:
    done = subprocess.run([sys.executable, str(RUN), "--only", "grad"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no row 'grad'" in done.stderr


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium on PATH: apt-get install chromium")
def test_the_page_is_written_and_opened() -> None:
    command = [sys.executable, str(RUN.with_name("page.py")), "--tests", "12", "--times", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "12 tests, 1797 training samples" in done.stdout
    assert "console           empty" in done.stdout
