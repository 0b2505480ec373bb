"""Processes over one cache in an object store."""

from __future__ import annotations

import time
from pathlib import Path

import influence_pipeline as ip
from influence_pipeline.cache.store import files_at
from influence_pipeline.location import located
from tests import s3, tiny
from tests.faults.children import Server

CALL = "tests.faults.children:gradients"


def test_two_processes_share_the_blocks_after_a_third_was_killed(
    server: Server, s3: s3.Server, small_blocks: None, tmp_path: Path
) -> None:
    url = f"{s3.bucket()}/runs"
    first = server.start(CALL, cache=url, environment=s3.environment)
    while not [path for method, path in s3.requests if method == "PUT" and "/blocks/c/1/" in path]:
        assert first.exit is None, first.said
        time.sleep(0.002)
    assert first.killed() == -9
    before = len(s3.requests)
    for process in [server.start(CALL, cache=url, environment=s3.environment) for _ in range(2)]:
        assert process.wait() == 0, process.said
    ip.Pipeline(tiny.experiment(), tmp_path / "cache", tiny.settings()).grad_z()
    found = files_at(located(url))
    assert {file.name: found.read(file.name) for file in found.walk()} == tiny.files(tmp_path / "cache")
    written = [path for method, path in s3.requests[before:] if method == "PUT" and "/gradients/c/" in path]
    assert 1 <= len(written) <= 3, "what the killed one finished is not computed again, and nothing twice"
