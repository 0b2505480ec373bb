"""Claims: files by which processes share work over a folder, on one machine or on several.

Whoever makes the file owns what it stands for until it removes it. A claim is dead when its process is (seen at once
on the machine that the process ran on), or when nothing has touched it for ``EXPIRY`` seconds of the looker's own
clock, so that clocks need not agree. A dead claim may be taken over. An owner that was taken for dead finds out with
:meth:`Claim.held`, before it writes.
"""

from __future__ import annotations

import contextlib
import errno
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

log = logging.getLogger(__name__)

EXPIRY = 60.0
"""Seconds without a sign of life after which a claim is dead."""
NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV)
"""What a file system without hard links answers."""
PAUSE = 0.1
"""Seconds between looks at what another process has."""


@dataclass(frozen=True)
class Claim:
    """Something that is this process's, until released."""

    path: Path
    token: str

    def held(self) -> bool:
        """Say whether it still is; nobody else took it for dead."""
        found = _read(self.path)
        return found is not None and found[0].get("token") == self.token

    def release(self) -> None:
        """Give it up."""
        _heart.forget(self)
        if self.held():
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Claim:
        """Have it for a while."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Give it up, also where the disk is gone."""
        with contextlib.suppress(OSError):
            self.release()


def take(path: Path, token: str | None = None) -> Claim | None:
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


def taken(path: Path) -> str | None:
    """Say who has claimed what a file stands for, None where nobody has or a process of this machine died."""
    found = _read(path)
    if found is None or _known_dead(found[0]):
        return None
    return f"process {found[0].get('process')} on {str(found[0].get('machine')).split('/')[0]}"


@contextmanager
def exclusively(path: Path) -> Iterator[Claim]:
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


def _make(path: Path, token: str) -> Claim | None:
    """Make the file, whole and only where there is none.

    Raises:
        OSError: the folder cannot be written.
    """
    claim = Claim(path, token)
    content = {"token": claim.token, "machine": _machine(), "process": os.getpid(), "started": _started(os.getpid())}
    aside = path.with_name(f"{path.stem}.{claim.token}.partial")
    try:
        aside.write_text(json.dumps(content))
        try:
            os.link(aside, path)
        except FileExistsError:
            return None
        except OSError as error:
            if error.errno == errno.ENOENT and path.parent.is_dir():
                return None  # whoever has the claim tidied up what seemed to be left over
            if error.errno not in NO_LINKS:
                raise
            if not _make_without_links(path, json.dumps(content)):
                return None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
    _heart.keep(claim)
    return claim


def _make_without_links(path: Path, content: str) -> bool:
    try:
        with open(path, "x", encoding="utf-8") as file:
            try:
                file.write(content)
                file.flush()
            except OSError:
                path.unlink(missing_ok=True)
                raise
    except FileExistsError:
        return False
    return True


def _read(path: Path) -> tuple[dict[str, Any], int] | None:
    """Return what a claim says and when it was last touched; None where there is none."""
    try:
        # Opened, not looked up: only that makes a network file system ask its server.
        with open(path, encoding="utf-8") as file:
            touched = os.fstat(file.fileno()).st_mtime_ns
            text = file.read()
    except OSError:
        return None
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    return content if isinstance(content, dict) else {}, touched


_seen: dict[Path, tuple[object, int, float]] = {}


def _bury_if_dead(path: Path) -> bool:
    """Remove a claim that is dead; say whether there may be none now."""
    found = _read(path)
    if found is None:
        _seen.pop(path, None)
        return True
    content, touched = found
    token, now = content.get("token"), time.monotonic()
    since = _seen.get(path)
    if since is None or since[:2] != (token, touched):
        _seen[path] = since = (token, touched, now)
    if not _known_dead(content) and now - since[2] < EXPIRY:
        return False
    _seen.pop(path, None)
    log.info("%s: its process is gone; going on in its place", path)
    grave = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.partial")
    try:
        path.rename(grave)
    except OSError:
        return True
    moved = _read(grave)
    if moved is not None and moved[0].get("token") != token:
        # Somebody was faster and has made a new one, which is put back.
        with contextlib.suppress(OSError):
            os.link(grave, path)
    grave.unlink(missing_ok=True)
    return True


def _known_dead(content: dict[str, Any]) -> bool:
    """Say whether the owner was a process of this machine that is no more."""
    return content.get("machine") == _machine() and _started(content.get("process", 0)) != content.get("started")


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
                with contextlib.suppress(OSError):
                    os.utime(claim.path)


_heart = _Heart()
