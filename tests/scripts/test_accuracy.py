"""The accuracy table can be made, is made once, and its ground truth is what it says; figures are not for tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
MODULES = ("train", "digits", "cases", "truth")


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the scripts, in which everything they write stays."""
    folder = tmp_path_factory.mktemp("checkout") / "scripts"
    shutil.copytree(SCRIPTS, folder, ignore=shutil.ignore_patterns("weights", "__pycache__", ".peers-env"))
    return folder


@pytest.fixture(scope="module")
def cases(scripts: Path) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        patch.syspath_prepend(scripts)
        patch.syspath_prepend(scripts / "accuracy")
        yield import_module("cases")
        for name in MODULES:
            sys.modules.pop(name, None)


def run(scripts: Path, *arguments: str, script: str = "run.py") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(scripts / "accuracy" / script), "--quick", "--workers", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def made(scripts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Return a folder with one case's ground truth and rows, and what making them said."""
    folder = tmp_path_factory.mktemp("accuracy")
    return folder, run(scripts, "--folder", str(folder), "--only", "table", "--table", str(folder / "table.md"))


def test_all_rows_print_and_are_kept(scripts: Path, made: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = made
    assert done.returncode == 0, done.stderr
    written = (folder / "table.md").read_text()
    assert done.stdout.split() == written.split()
    (part,) = written.split("**")[2::2]
    rows = [line.split("|")[1:-1] for line in part.splitlines() if line.startswith("| `")]
    titles = [cells[0].strip().partition(",")[0].strip("`") for cells in rows]
    assert titles == ["identity", "lissa", "cg", "nystrom", "exact", "exact", "exact", "fisher", "kfac", "ekfac"]
    for cells in rows:
        if "Hessian" in cells[0]:
            continue  # of a model that is no optimum: no scores for some dampings
        figures = [float(cells[i].split()[0]) for i in (1, 2, 3, 5)]
        assert np.isfinite(figures).all(), cells
        assert -1 <= figures[0] <= 1
        assert 0 <= figures[3] <= 1

    written_at = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = run(scripts, "--folder", str(folder), "--only", "table")
    assert again.stdout == done.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == written_at


@pytest.mark.thorough
def test_rows_of_several_models_print(scripts: Path, made: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = made
    several = run(scripts, "--folder", str(folder), "--only", "table", script="ensembles.py")
    assert several.returncode == 0, several.stderr
    cells = [line.split("|")[1:-1] for line in several.stdout.splitlines() if line.startswith("| `")]
    assert [cell[1].strip() for cell in cells] == ["1", "2", "1", "2"]
    # The first model is that of the other table.
    exact = next(line for line in done.stdout.splitlines() if line.startswith("| `exact`, λ"))
    assert cells[0][2].split()[0] == exact.split("|")[2].split()[0]
    assert all(np.isfinite([float(cell[i].split()[0]) for i in (2, 3, 4)]).all() for cell in cells)


def test_unknown_case(scripts: Path) -> None:
    done = run(scripts, "--only", "digits")
    assert done.returncode == 2
    assert "invalid choice: 'digits'" in done.stderr


def test_newtons_method_ends_where_the_objective_is_least(cases: ModuleType) -> None:
    """Also with samples of weight 0, while losses are still divided by the number of all."""
    case = cases.cases(quick=True)["logistic"]
    train = case.data().train
    weights = (torch.arange(len(train)) % 3 > 0).float()
    model = case.retrain(train, 0, weights).double()
    model.zero_grad()
    inputs, labels = train.tensors
    losses = case.task.losses(model(inputs.double()), (inputs, labels))
    value = (losses * weights).mean() + case.task.l2 / 2 * sum(p.square().sum() for p in model.parameters())
    value.backward()
    assert max(float(p.grad.abs().max()) for p in model.parameters()) < 1e-6  # θ is rounded to float32


def test_leaving_out_a_sample_leaves_the_other_batches(cases: ModuleType) -> None:
    """Training by batches is the same every time, and nearly the same without one sample."""
    case = cases.cases(quick=True)["cnn"]
    train = case.data().train
    weights = torch.ones(len(train))
    weights[7] = 0
    whole, again, without = (case.retrain(train, 0, w).state_dict() for w in (None, torch.ones(len(train)), weights))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert any(not torch.equal(whole[name], without[name]) for name in whole)
    near = [torch.dist(whole[name], without[name]) / whole[name].norm() for name in whole]
    assert max(near) < 0.2, "one sample of 80 has changed the weights by more than a fifth"


def test_figures_of_a_perfect_prediction(cases: ModuleType) -> None:
    """Measurements that are sums over what is left out: LDS, Pearson and slope are 1; of the opposite, -1."""
    truth = import_module("truth")
    draw = np.random.default_rng(0)
    scores = draw.standard_normal((3, 40))
    subsets = draw.integers(2, size=(30, 40)).astype(float)
    singles = np.arange(10)
    found = truth.Truth(subsets, subsets @ scores.T, singles, scores.T[singles], truth.Size(30, 10, 1), np.nan)
    figures = found.figures(scores)
    assert figures.lds == figures.low == figures.high == pytest.approx(1)
    assert figures.pearson == pytest.approx(1)
    assert figures.slope == pytest.approx(1)
    assert found.figures(-scores).lds == pytest.approx(-1)
    assert found.figures(scores / 2).slope == pytest.approx(2)
