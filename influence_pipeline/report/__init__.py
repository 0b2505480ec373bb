"""Results to look at: one HTML file that opens from disk, pictures, tables in notebooks. Needs extra ``report``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from influence_pipeline.errors import RequestError
from influence_pipeline.export import check_target

if TYPE_CHECKING:
    from influence_pipeline.context import Context
    from influence_pipeline.influences import Influences

NEEDED = {"the page needs": ("jinja2", "PIL"), "pictures need": ("matplotlib", "PIL")}
"""Modules that things are made with."""
PACKAGES = {"PIL": "pillow"}
"""That modules of another name are of."""


def check_installed(what: str) -> None:
    """Refuse something where a package is missing that it needs.

    Raises:
        RequestError: one is.
    """
    missing = [PACKAGES.get(module, module) for module in NEEDED[what] if find_spec(module) is None]
    if missing:
        raise RequestError(f'{what} {" and ".join(missing)}: pip install "influence-pipeline[report]"')


def check(path: Path) -> None:
    """Refuse a page that cannot be made or written, before anything is read for it.

    Raises:
        RequestError: a package is missing, or there is no place for the file.
    """
    check_installed("the page needs")
    check_target(path)


def write(influences: Influences, context: Context, path: Path, k: int | None = None) -> None:
    """Write the page of some results; see :func:`influence_pipeline.report.page.write`."""
    from influence_pipeline.report.page import write as write_page  # needs the extra

    write_page(influences, context, path, k)
