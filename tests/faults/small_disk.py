"""Disks of a few pages, made for one test: what is written on them runs into their real end.

A tmpfs, whose every file takes whole pages: mounted by root; or, by anybody else, in a mount namespace of a helper
process, through whose ``/proc/<id>/root`` it is seen; or, where neither is allowed, a folder, and writes of this
process that are refused beyond a number of pages. ``SMALL_DISK=mount|namespace|patched`` chooses; :func:`way` says
which it is.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PAGE = os.sysconf("SC_PAGE_SIZE")


class Disk:
    """A file system of its own, with a ballast file that leaves as much of it free as a test wants.

    Attributes:
        path: where it is seen.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def free_pages(self) -> int:
        """How many pages can be written."""
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize // PAGE

    def leave(self, pages: int) -> None:
        """Shrink or grow the ballast until so many pages are free."""
        ballast = self.path / "ballast"
        held = ballast.stat().st_size // PAGE if ballast.exists() else 0
        wanted = held + self.free_pages - pages
        assert wanted >= 0, f"the disk has no {pages} pages"
        with open(ballast, "ab") as file:
            file.truncate(wanted * PAGE)
            if wanted:
                os.posix_fallocate(file.fileno(), 0, wanted * PAGE)
        assert self.free_pages == pages

    def lighten(self) -> None:
        """Remove the ballast."""
        (self.path / "ballast").unlink(missing_ok=True)

    def mount(self, options: str) -> None:
        """Mount it, or mount it again with other options."""
        raise NotImplementedError

    def set_read_only(self) -> None:
        """Refuse all writing from now on."""
        self.mount("remount,ro")

    def set_inodes(self, count: int) -> None:
        """Have room for so many files and folders in all."""
        self.mount(f"remount,nr_inodes={count}")

    @property
    def inodes(self) -> int:
        """How many files and folders there are."""
        found = os.statvfs(self.path)
        return found.f_files - found.f_ffree

    def close(self) -> None:
        """Take it away."""


class Mounted(Disk):
    """A tmpfs in sight of everybody."""

    def __init__(self, path: Path, pages: int) -> None:
        super().__init__(path)
        self.mount(f"size={pages * PAGE}")

    def mount(self, options: str) -> None:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)], check=True, capture_output=True
        )

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)


class InNamespace(Disk):
    """A tmpfs in the mount namespace of a shell that waits for commands, and goes with it."""

    def __init__(self, path: Path, pages: int) -> None:
        shell = ["unshare", "-Urm", "--propagation", "private", "sh"]
        self._shell = subprocess.Popen(
            shell, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._inside = path
        self.mount(f"size={pages * PAGE}")
        super().__init__(Path(f"/proc/{self._shell.pid}/root{path}"))
        self.free_pages  # noqa: B018 - it can be seen

    def mount(self, options: str) -> None:
        assert self._shell.stdin
        assert self._shell.stdout
        self._shell.stdin.write(f"mount -t tmpfs -o {options} tmpfs '{self._inside}'; echo $?\n")
        self._shell.stdin.flush()
        said = self._shell.stdout.readline().strip()
        if said != "0":
            raise OSError(f"tmpfs with {options}: {said}")

    def close(self) -> None:
        assert self._shell.stdin
        assert self._shell.stdout
        self._shell.stdin.close()
        self._shell.stdout.close()
        self._shell.wait(timeout=10)


class Patched(Disk):
    """A folder; this process's writes into it are refused as those on a full disk are."""

    def __init__(self, path: Path, pages: int) -> None:
        super().__init__(path)
        self._pages, self._inodes, self._read_only = pages, 10**9, False
        self._patch = pytest.MonkeyPatch()
        opened = io.open

        def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if set(mode) & set("wax+") and self._is_here(file):
                self._refuse_new(Path(file))
                return self._counting(Path(file), opened(file, mode, *args, **kwargs))
            return opened(file, mode, *args, **kwargs)

        for module in ("io", "builtins"):
            self._patch.setattr(f"{module}.open", open_)
        for name in ("mkdir", "rename", "replace", "link", "unlink", "rmdir", "utime"):
            self._patch.setattr(os, name, self._guarded(name, getattr(os, name)))

    def _is_here(self, file: Any) -> bool:
        return not isinstance(file, int) and Path(os.fsdecode(file)).is_relative_to(self.path)

    def _refuse_new(self, path: Path) -> None:
        if self._read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        if self.inodes >= self._inodes and not path.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def _guarded(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(path: Any, *args: Any, **kwargs: Any) -> Any:
            if self._is_here(path):
                if self._read_only:
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
                if name == "mkdir":
                    self._refuse_new(Path(path))
            return operation(path, *args, **kwargs)

        return guarded

    def _counting(self, path: Path, file: Any) -> Any:
        """Have a file refuse what no page is left for; as much as fits is written."""
        write = file.write

        def counted(data: Any) -> int:
            if path.name == "ballast":
                return int(write(data))
            file.flush()
            size = path.stat().st_size
            length = len(data) if isinstance(data, (str, bytes)) else memoryview(data).nbytes
            room = (self.free_pages + -(-size // PAGE)) * PAGE - size
            if length <= room:
                written = int(write(data))
                file.flush()
                return written
            write(data[:room] if isinstance(data, (str, bytes)) else memoryview(data).cast("B")[:room])
            file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        file.write = counted
        return file

    @property
    def free_pages(self) -> int:
        held = sum(-(-path.stat().st_size // PAGE) for path in self.path.rglob("*") if path.is_file())
        return self._pages - held

    def mount(self, options: str) -> None:
        raise AssertionError(options)

    def set_read_only(self) -> None:
        self._read_only = True

    def set_inodes(self, count: int) -> None:
        self._inodes = count

    @property
    def inodes(self) -> int:
        return 1 + sum(1 for _ in self.path.rglob("*"))

    def close(self) -> None:
        self._patch.undo()


WAYS: dict[str, type[Mounted] | type[InNamespace] | type[Patched]] = {
    "mount": Mounted,
    "namespace": InNamespace,
    "patched": Patched,
}


@functools.cache
def way() -> str:
    """Return the first way in which a small disk can be made here, or the one that was chosen."""
    chosen = os.environ.get("SMALL_DISK")
    if chosen:
        return chosen
    for name in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                disk = WAYS[name](Path(folder), 4)
            except (OSError, subprocess.SubprocessError):
                continue
            disk.close()
            return name
    raise AssertionError("writes can always be patched")


@contextmanager
def small_disk(folder: Path, pages: int) -> Iterator[Disk]:
    """Give an empty disk of so many pages, seen at a folder or elsewhere, and take it away at the end."""
    folder.mkdir()
    disk = WAYS[way()](folder, pages)
    try:
        yield disk
    finally:
        disk.close()
