"""What is run with ``--thorough`` only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def thoroughly(values: Iterable[Any]) -> list[Any]:
    """Return values of a parameter that are tried with ``--thorough`` only."""
    return [pytest.param(value, marks=pytest.mark.thorough) for value in values]
