"""Runs work in children of a process that has loaded torch and zarr, so that each costs a fork and not an import.

As a module this is the server: it reads an order as JSON from each line of stdin, and answers each with a line. It
computes nothing itself, since neither torch nor zarr survives a fork with its threads. :class:`Server` is its client;
what it starts are children, which a test may kill, stop, or run beside one another.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import influence_pipeline as ip
import influence_pipeline.checks
from influence_pipeline.cache import Group, claims
from influence_pipeline.cache.writing import ArrayWriting
from tests import tiny

ROOT = Path(__file__).parents[2]
HANGS = 45.0
"""Seconds after which a child hangs: less than a claim takes to expire."""
LOOK = 0.005
"""Seconds between looks at a child."""


# ---- what children do ------------------------------------------------------------------------------------------------


def run(
    cache: str,
    events: str | None = None,
    expiry: float | None = None,
    pause: float = 0.0,
    train: int = 60,
    tests: int = 10,
    clock: str | None = None,
) -> None:
    """Run the whole tiny experiment.

    Args:
        cache: the cache's folder.
        events: a file that gets a line for every block before and after it is written.
        expiry: of claims, in seconds.
        pause: seconds before each array of a block is written.
        train: training samples.
        tests: test samples.
        clock: a file; when it was written last is what time it is, for claims to expire.
    """
    prepare(events, expiry, pause)
    if clock is not None:
        claims.time = SimpleNamespace(monotonic=lambda: os.stat(clock).st_mtime, sleep=time.sleep)  # type: ignore[assignment]
    experiment = tiny.experiment(train=tiny.points(train, 1), tests={"holdout": tiny.points(tests, 2)})
    ip.Pipeline(experiment, cache, tiny.settings()).run()


def gradients(cache: str, environment: dict[str, str]) -> None:
    """Compute the gradients of the tiny experiment, into a cache that the environment tells of."""
    os.environ.update(environment)
    prepare()
    ip.Pipeline(tiny.experiment(), cache, tiny.settings()).grad_z()


def harmed(cache: str, at: str, number: int, when: str, by: int, of: str = "", expiry: float | None = None) -> None:
    """Run the whole tiny experiment, and get a signal before or after a function is called for the so many-th time.

    Args:
        cache: the cache's folder.
        at: the function, ``module:name`` or ``module:class.name``.
        number: of the call, from 0.
        when: ``before`` or ``after``.
        by: the signal's number.
        of: what must be part of an argument for a call to count.
        expiry: of claims, in seconds.
    """
    module, _, name = at.partition(":")
    where: Any = importlib.import_module(module)
    *owners, name = name.split(".")
    for owner in owners:
        where = getattr(where, owner)
    count = itertools.count()

    def harm() -> None:
        os.kill(os.getpid(), by)
        time.sleep(0.2)  # until all threads have stopped

    def harming(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            now = any(of in str(arg) for arg in args) and next(count) == number
            if now and when == "before":
                harm()
            result = function(*args, **kwargs)
            if now and when == "after":
                harm()
            return result

        return called

    _patch(where, name, harming)
    run(cache, expiry=expiry)


def look_on(cache: str, stop: str) -> dict[str, list[str]]:
    """Verify a cache again and again until a file appears; return what was found damaged."""
    prepare()
    found: list[str] = []
    while not Path(stop).exists():
        if Path(cache, "zarr.json").exists():
            found += ip.Pipeline(tiny.experiment(), cache, tiny.settings()).verify().damaged
    return {"damaged": found}


def prepare(events: str | None = None, expiry: float | None = None, pause: float = 0.0) -> None:
    torch.set_num_threads(1)
    tiny.shrink_blocks()
    if expiry is not None:
        claims.EXPIRY = expiry
    if pause:
        _patch(ArrayWriting, "appear", lambda appear: lambda writing: (time.sleep(pause), appear(writing))[1])
    if events is not None:
        _report(os.open(events, os.O_WRONLY | os.O_APPEND | os.O_CREAT))


def _report(events: int) -> None:
    """Write a line for every block and whatever is merged, before and after it is written."""

    def note(what: str, group: Group, index: str) -> None:
        line = [time.monotonic(), what, group.path.parent.name, group.path.name, index]
        os.write(events, f"{json.dumps(line)}\n".encode())

    def block(commit: Callable[..., bool]) -> Callable[..., bool]:
        def committed(group: Group, block: Any, *args: Any, **kwargs: Any) -> bool:
            index = ".".join(map(str, block.index))
            note("writing", group, index)
            written = commit(group, block, *args, **kwargs)
            note("kept" if written else "lost", group, index)
            return written

        return committed

    def merging(commit: Callable[..., None]) -> Callable[..., None]:
        def committed(group: Group, *args: Any) -> None:
            note("writing", group, "merged")
            commit(group, *args)
            note("kept", group, "merged")

        return committed

    _patch(Group, "commit", block)
    _patch(Group, "commit_merged", merging)


def _patch(where: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    setattr(where, name, wrap(getattr(where, name)))


# ---- the server ------------------------------------------------------------------------------------------------------


def _child(order: dict[str, Any]) -> None:
    """Do what was ordered, and end this process."""
    out = Path(order["out"])
    try:
        with out.with_suffix(".err").open("w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        if order["hangs"] is not None:
            faulthandler.dump_traceback_later(order["hangs"] - 5)  # what hangs says where
        module, _, function = order["call"].partition(":")
        value = getattr(importlib.import_module(module), function)(**order["args"])
        modules = list(sys.modules) if order["modules"] else []
        out.write_text(json.dumps({"value": value, "modules": modules}))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _answer(order: dict[str, Any]) -> dict[str, Any]:
    if order["do"] == "start":
        process = os.fork()
        if process == 0:
            _child(order)
        return {"process": process}
    if order["do"] == "import":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in order["modules"]:
                if name.split(".")[0] in ("torch", "zarr", "sympy", "numcodecs"):
                    with contextlib.suppress(Exception):
                        importlib.import_module(name)
        gc.collect()
        gc.freeze()
        return {}
    ended, status = os.waitpid(order["process"], os.WNOHANG)
    return {"exit": os.waitstatus_to_exitcode(status) if ended else None}


def main() -> None:
    torch.set_num_threads(1)
    importlib.import_module("tests.faults.children")  # by the name that orders have
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)


# ---- its client ------------------------------------------------------------------------------------------------------


class Child:
    """A process that was started to be harmed."""

    def __init__(self, process: int, out: Path, look: Callable[[], int | None], hangs: float = HANGS) -> None:
        """Follow a process, which hangs after so many seconds; ``look`` gives its exit code once it has ended."""
        self.process, self.began, self._hangs = process, time.monotonic(), hangs
        self._out, self._look, self._exit = out, look, None

    def signal(self, number: int, after: float = 0.0) -> bool:
        """Send a signal so many seconds after the start; say whether the process was still there."""
        time.sleep(max(0.0, self.began + after - time.monotonic()))
        if self.exit is not None:
            return False
        os.kill(self.process, number)  # it is not waited for, so the number is still its own
        return True

    @property
    def exit(self) -> int | None:
        """The exit code, None while it runs; minus the signal that killed it."""
        if self._exit is None:
            self._exit = self._look()
        return self._exit

    def wait(self, most: float | None = None) -> int:
        """Return the exit code.

        Raises:
            TimeoutError: it hangs.
        """
        most = self._hangs if most is None else most
        end = time.monotonic() + most
        while self.exit is None:
            if time.monotonic() > end:
                self.signal(signal.SIGKILL)
                self.wait(5)
                raise TimeoutError(f"a child was still running after {most} seconds\n{self.said}")
            time.sleep(LOOK)
        assert self.exit is not None
        return self.exit

    def killed(self, after: float = 0.0) -> int:
        """Kill it so many seconds after its start, or now; return the exit code, −9 unless it was done before."""
        self.signal(signal.SIGKILL, after)
        return self.wait()

    @property
    def value(self) -> Any:
        """What it returned, after it ended."""
        return json.loads(self._out.read_text())["value"]

    @property
    def said(self) -> str:
        """What it wrote to stdout and stderr."""
        path = self._out.with_suffix(".err")
        return path.read_text() if path.exists() else ""


class Server:
    """The client's side: starts children."""

    def __init__(self, server: subprocess.Popen[str], folder: Path) -> None:
        """Talk to a server; what children say is kept in a folder."""
        self._server, self._folder, self._lock = server, folder, threading.Lock()

    def _ask(self, **order: Any) -> dict[str, Any]:
        assert self._server.stdin
        assert self._server.stdout
        with self._lock:
            print(json.dumps(order, default=str), file=self._server.stdin, flush=True)
            answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        return answer

    def start(self, call: str, *, learn: bool = False, hangs: float | None = HANGS, **args: Any) -> Child:
        """Start ``module:function(**args)`` in a child; its result must be JSON.

        Args:
            call: what.
            learn: whether the child's modules are asked for.
            hangs: seconds after which it says where it is; None for one that takes long.
            args: of the function.
        """
        out = self._folder / f"{uuid.uuid4().hex}.out"
        process = self._ask(do="start", call=call, args=args, out=out, modules=learn, hangs=hangs)["process"]
        return Child(process, out, lambda: self._ask(do="look", process=process)["exit"], hangs or HANGS)

    def learn(self, call: str, **args: Any) -> None:
        """Run something once, and import in the server what it imported."""
        child = self.start(call, learn=True, **args)
        if child.wait() != 0:
            raise RuntimeError(child.said)
        self._ask(do="import", modules=json.loads(child._out.read_text())["modules"])


@contextmanager
def server(folder: Path) -> Iterator[Server]:
    """Have a server that has imported whatever the tiny experiment needs."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.faults.children"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        serving = Server(process, folder)
        try:
            serving.learn("tests.faults.children:run", cache=folder / "first")
            yield serving
        finally:
            assert process.stdin
            process.stdin.close()


if __name__ == "__main__":
    main()
