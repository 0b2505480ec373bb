"""Every row of the benchmark can be measured; how fast anything is, is not for tests to say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / "scripts" / "benchmark" / "run.py"


def test_all_rows_print(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(RUN), "--quick", "--folder", str(tmp_path), "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = {line.split("|")[1].strip() for line in done.stdout.splitlines()[2:]}
    expected = {
        *("grad_z_loop", "grad_z_computing", "influence_cold_8", "influence_cold_64", "influence_warm"),
        *(
            "further_tests",
            "lissa_32",
            "lissa_512",
            "two_workers",
            "resume",
            "memory",
            "wide",
            "nothing_to_do",
            "dask_workers",
        ),
        *("projection_identity", "projection_ggn", "projection_cost", "resnet_memory", "projected_memory"),
        *("plan_seconds", "plan_disk", "plan_peak"),
    }
    assert printed == expected
    rows = json.loads(figures.read_text())["rows"]
    assert {row["name"] for row in rows} >= expected - {"nothing_to_do"}
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in rows)


def test_unknown_row() -> None:
    done = subprocess.run([sys.executable, str(RUN), "--only", "grad"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no row 'grad'" in done.stderr


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium on PATH: apt-get install chromium")
def test_the_page_is_written_and_opened() -> None:
    command = [sys.executable, str(RUN.with_name("page.py")), "--tests", "12", "--times", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "12 tests, 1797 training samples" in done.stdout
    assert "console           empty" in done.stdout
