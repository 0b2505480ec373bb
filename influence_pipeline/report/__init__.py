"""The page: results as one HTML file that opens from disk and shows what samples look like. Needs extra ``report``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from influence_pipeline.errors import RequestError
from influence_pipeline.export import check_target

if TYPE_CHECKING:
    from influence_pipeline.context import Context
    from influence_pipeline.influences import Influences

NEEDED = {"jinja2": "jinja2", "PIL": "pillow"}
"""Modules that the page is made with, and the packages that they are of."""


def check(path: Path) -> None:
    """Refuse a page that cannot be made or written, before anything is read for it.

    Raises:
        RequestError: a package is missing, or there is no place for the file.
    """
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise RequestError(f'the page needs {" and ".join(missing)}: pip install "influence-pipeline[report]"')
    check_target(path)


def write(influences: Influences, context: Context, path: Path, k: int | None = None) -> None:
    """Write the page of some results; see :func:`influence_pipeline.report.page.write`."""
    from influence_pipeline.report.page import write as write_page  # needs the extra

    write_page(influences, context, path, k)
