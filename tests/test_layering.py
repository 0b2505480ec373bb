"""Imports go downward only, and each thing that is stored, run or shown has one home."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = ("influence_pipeline", "stages")
HOMES = {
    "zarr": "influence_pipeline/cache/",
    "numcodecs": "influence_pipeline/cache/",
    "obstore": "influence_pipeline/cache/objects.py",
    "joblib": "influence_pipeline/engines/local.py",
    "loky": "influence_pipeline/engines/local.py",
    "distributed": "influence_pipeline/engines/on_dask.py",
    "ray": "influence_pipeline/engines/on_ray.py",
    "tqdm": "influence_pipeline/runner.py",
}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yield every module that a file imports anywhere in it, with the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield node.module or "", node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((a.value, node.lineno) for a in node.args if isinstance(a, ast.Constant) and a.value)


def offences(package: str, forbidden: str, home: str = "") -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules(package)
        for name, line in imports(path)
        if name.split(".")[0] == forbidden and not (home and str(path.relative_to(ROOT)).startswith(home))
    ]


def test_stages_know_nothing_of_the_machine() -> None:
    assert modules("stages")
    assert offences("stages", "influence_pipeline") == []


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("above", ["scripts", "tests"])
def test_no_package_imports_what_is_above_it(package: str, above: str) -> None:
    assert offences(package, above) == []


@pytest.mark.parametrize("library", HOMES)
@pytest.mark.parametrize("package", PACKAGES)
def test_each_library_of_the_machine_has_one_home(package: str, library: str) -> None:
    assert offences(package, library, HOMES[library]) == []


@pytest.mark.parametrize("library", ["zarr", "joblib", "distributed", "ray", "tqdm"])
def test_the_homes_are_where_these_are_used(library: str) -> None:
    assert offences("influence_pipeline", library) != []


@pytest.mark.parametrize("library", ["os", "pathlib", "shutil", "tempfile", "multiprocessing", "subprocess"])
def test_stages_touch_no_file_and_no_process(library: str) -> None:
    assert offences("stages", library) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_the_core_does_not_print(package: str) -> None:
    printing = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in modules(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert printing == []


def test_every_package_is_listed_to_be_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {".".join(path.parent.relative_to(ROOT).parts) for package in PACKAGES for path in modules(package)}
    assert set(listed) == there
    assert all((ROOT / name.replace(".", "/") / "__init__.py").exists() for name in listed)
