"""Claims: files by which processes share work over a folder, on one machine or on several.

Whoever makes the file owns what it stands for until it removes it. A claim is dead when its process is (seen at once
on the machine that the process ran on), or when nothing has touched it for ``EXPIRY`` seconds of the looker's own
clock, so that clocks need not agree. A dead claim may be taken over. An owner that was taken for dead finds out with
:meth:`Claim.held`, before it writes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from influence_pipeline.cache.store import files_at
from influence_pipeline.errors import WorkError
from influence_pipeline.location import Location

log = logging.getLogger(__name__)

EXPIRY = 60.0
"""Seconds without a sign of life after which a claim is dead."""
PAUSE = 0.1
"""Seconds between looks at what another process has."""


@dataclass(frozen=True)
class Claim:
    """Something that is this process's, until released."""

    path: Location
    token: str

    def held(self) -> bool:
        """Say whether it still is; nobody else took it for dead."""
        found = _read(self.path)
        return found is not None and found.says.get("token") == self.token

    def touch(self) -> None:
        """Show that its process is alive.

        Raises:
            OSError: that cannot be written.
        """
        found = _read(self.path)
        if found is not None and found.says.get("token") == self.token:
            files_at(self.path.parent).touch(self.path.name, _content(self.token), found.mark)

    def release(self) -> None:
        """Give it up."""
        _heart.forget(self)
        if self.held():
            files_at(self.path.parent).remove(self.path.name)

    def __enter__(self) -> Claim:
        """Have it for a while."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Give it up, also where the disk is gone."""
        with contextlib.suppress(OSError, WorkError):
            self.release()


def take(path: Location, token: str | None = None) -> Claim | None:
    """Claim what a file stands for; None where another living process has it.

    Args:
        path: the file.
        token: tells this claim from others; by default nobody else knows it.

    Raises:
        OSError: the folder cannot be written.
    """
    for _ in range(3):
        claim = _make(path, token or uuid.uuid4().hex)
        if claim is not None:
            return claim
        if not _bury_if_dead(path):
            return None
    return None


def taken(path: Location) -> str | None:
    """Say who has claimed what a file stands for, None where nobody has or a process of this machine died."""
    found = _read(path)
    if found is None or _known_dead(found.says):
        return None
    return f"process {found.says.get('process')} on {str(found.says.get('machine')).split('/')[0]}"


@contextmanager
def exclusively(path: Location) -> Iterator[Claim]:
    """Have what a file stands for, after waiting for whoever else has it.

    Raises:
        OSError: the folder cannot be written.
    """
    claim, told = take(path), False
    while claim is None:
        if not told:
            log.info("%s: waiting for %s", path, taken(path))
            told = True
        time.sleep(PAUSE)
        claim = take(path)
    with claim:
        yield claim


# ---- making, reading, burying ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """A claim as it was found: its bytes, what it says, and its mark."""

    content: bytes
    says: dict[str, Any]
    mark: Any


def _make(path: Location, token: str) -> Claim | None:
    """Make the file, whole and only where there is none.

    Raises:
        OSError: the folder cannot be written.
    """
    claim, made = Claim(path, token), False
    _heart.keep(claim)  # before others of this process see it
    try:
        made = files_at(path.parent).create(path.name, _content(claim.token))
    finally:
        if not made:
            _heart.forget(claim)
    return claim if made else None


def _content(token: str) -> bytes:
    """Return what a claim of this process says, other bytes each time."""
    content = {"token": token, "machine": _machine(), "process": os.getpid(), "started": _started(os.getpid())}
    return json.dumps({**content, "touched": uuid.uuid4().hex}).encode()


def _read(path: Location) -> _Seen | None:
    """Return a claim, None where there is none."""
    found = files_at(path.parent).look(path.name)
    if found is None:
        return None
    try:
        content = json.loads(found[0])
    except ValueError:
        content = None
    return _Seen(found[0], content if isinstance(content, dict) else {}, found[1])


_seen: dict[Location, tuple[object, object, float]] = {}


def _bury_if_dead(path: Location) -> bool:
    """Remove a claim that is dead; say whether there may be none now."""
    found = _read(path)
    if found is None:
        _seen.pop(path, None)
        return True
    token, now = found.says.get("token"), time.monotonic()
    since = _seen.get(path)
    if since is None or since[:2] != (token, found.mark):
        _seen[path] = since = (token, found.mark, now)
    if not _known_dead(found.says) and now - since[2] < EXPIRY:
        return False
    _seen.pop(path, None)
    log.info("%s: its process is gone; going on in its place", path)
    with contextlib.suppress(OSError):
        files_at(path.parent).bury(path.name, found.content, found.mark)
    return True


def _known_dead(content: dict[str, Any]) -> bool:
    """Say whether the owner was a process of this machine that is no more, or this one, which could not release it."""
    if content.get("machine") != _machine():
        return False
    process = content.get("process", 0)
    if process == os.getpid() and not _heart.has(content.get("token")):
        return True
    return _started(process) != content.get("started")


@functools.cache
def _machine() -> str:
    """Name what process numbers are of: this start of this machine, and this container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return "/".join(parts)


def _started(process: int) -> str | None:
    """Return when a process of this machine was started, None where there is none, or only a dead one's remains."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return None
        except OSError:
            pass
        return "unknown"
    return None if fields[0] in "ZX" else fields[19]


class _Heart:
    """Touches this process's claims so that others see it is alive."""

    def __init__(self) -> None:
        self.reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.reset)

    def reset(self) -> None:
        """Have no claims: a forked child has none of its parent's."""
        self._claims: set[Claim] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def keep(self, claim: Claim) -> None:
        """Touch a claim from now on."""
        with self._lock:
            self._claims.add(claim)
            if self._thread is None:
                self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)
                self._thread.start()

    def has(self, token: Any) -> bool:
        """Say whether a claim is this process's."""
        with self._lock:
            return any(claim.token == token for claim in self._claims)

    def forget(self, claim: Claim) -> None:
        """Touch a claim no more."""
        with self._lock:
            self._claims.discard(claim)

    def _beat(self) -> None:
        while True:
            time.sleep(EXPIRY / 6)
            with self._lock:
                claims = list(self._claims)
            for claim in claims:
                with contextlib.suppress(OSError, WorkError):
                    claim.touch()


_heart = _Heart()
