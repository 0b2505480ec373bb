"""Runs the tiny experiment in forked children, some of which kill themselves at a chosen file operation.

Reads one order as JSON from each line of stdin and answers each with a line. Nothing of torch or zarr is computed in
this process, since neither survives a fork with its threads; what children imported is imported here, so that the next
ones need not.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import influence_pipeline as ip
import influence_pipeline.pipeline
from influence_pipeline.cache import Group
from tests import tiny

torch.set_num_threads(1)


class Operations:
    """Counts what changes names on disk: the moments between which nothing that another process can see changes."""

    def __init__(self, die_at: int | None, how: str) -> None:
        self.count, self._die_at, self._how = 0, die_at, how
        self._lock = threading.RLock()
        for name in ("replace", "rename", "mkdir", "hardlink_to"):
            setattr(Path, name, self._counted(getattr(Path, name)))

    def _counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(path: Path, *args: Any, **kwargs: Any) -> Any:
            with self._lock:
                dies = self.count == self._die_at
                self.count += 1
                if dies and self._how == "half written" and path.is_file():
                    os.truncate(path, path.stat().st_size // 2)
                if dies and self._how != "after":
                    os.kill(os.getpid(), signal.SIGKILL)
                result = operation(path, *args, **kwargs)
                if dies:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

        return counted


def run(order: dict[str, Any]) -> dict[str, Any]:
    """Run everything; return the blocks that were computed and what was imported for it."""
    tiny.shrink_blocks()
    computed: list[tuple[str, ...]] = []
    commit = Group.commit

    def committed(group: Group, block: Any, *args: Any, **kwargs: Any) -> bool:
        computed.append((group.path.parent.name, group.path.name, *map(str, block.index)))
        return commit(group, block, *args, **kwargs)

    Group.commit = committed  # type: ignore[method-assign]
    operations = Operations(order.get("die_at"), order.get("how", "before"))
    ip.Pipeline(tiny.experiment(), order["cache"], tiny.settings()).run()
    return {"computed": computed, "operations": operations.count, "modules": list(sys.modules)}


def in_child(order: dict[str, Any]) -> dict[str, Any]:
    """Run in a child; return its exit and what it said."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(writing, "w") as said:
            json.dump(run(order), said)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    status = os.waitpid(child, 0)[1]
    answer = json.loads(text) if text else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in answer.pop("modules", []):
            if name.split(".")[0] in ("torch", "zarr", "sympy", "numcodecs"):
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
    return {**answer, "exit": os.waitstatus_to_exitcode(status)}


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(in_child(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
