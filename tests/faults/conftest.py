"""What tests of faults share: children to be harmed, and what should come out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults import children
from tests.faults.children import Server
from tests.faults.kills import Reference


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return what starts children that run the tiny experiment."""
    with children.server(tmp_path_factory.mktemp("server")) as serving:
        yield serving


@pytest.fixture(scope="session")
def reference(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Return a cache that nothing disturbed."""
    return Reference(server, tmp_path_factory.mktemp("reference"))
