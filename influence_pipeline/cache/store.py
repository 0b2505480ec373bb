"""What the cache asks of whatever keeps its files: files below a folder, by their names relative to it.

Whoever writes sees to it that others find a file whole or not at all. Names are such as ``"norm/c/3"``; folders that
are part of a name are made, but not the one that the files are below: it may have been removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from influence_pipeline.cache.record import FileSum
from influence_pipeline.location import Location, ObjectPath

Answer = TypeVar("Answer")
NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV)
"""What a file system without hard links answers."""

PART = 2**24
"""Bytes of a file that are read at once."""


class Found(NamedTuple):
    """A file that is there: its name, its length in bytes, and when it was written, in seconds since the epoch."""

    name: str
    length: int
    written: float


class Rewritten(ValueError):
    """A file was written anew while parts of it were read."""


class Ranges(Protocol):
    """A file while parts of it are read."""

    def tail(self, size: int) -> bytes:
        """Return the last so many bytes; fewer where there are not as many."""

    def parts(self, places: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """Yield what is at each offset, of a length; less where the file ends before."""


class Growing(ABC):
    """A file while it is written, aside.

    Attributes:
        path: where it will be.
        sum: of what was written.
    """

    def __init__(self, path: Location) -> None:
        """Begin an empty file."""
        self.path, self.sum = path, FileSum()

    def write(self, data: bytes) -> None:
        """Append some bytes.

        Raises:
            OSError: it is refused.
        """
        self._write(data)
        self.sum = self.sum.then(data)

    @abstractmethod
    def _write(self, data: bytes) -> None: ...

    @abstractmethod
    def finish(self) -> None:
        """Have all of it written, aside.

        Raises:
            OSError: it is refused.
        """

    @abstractmethod
    def appear(self) -> None:
        """Be there at once, in the place of what was.

        Raises:
            OSError: it is refused.
        """

    @abstractmethod
    def abandon(self) -> None:
        """Leave nothing aside."""


class Files(ABC):
    """Files below a folder.

    Attributes:
        far: whether each request takes long, so that what is needed is asked for together and before, and a claim may
            be lost between a look at it and what is done then.
    """

    far = False

    # ---- reading -------------------------------------------------------------------------------------------------

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return what a file has.

        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be read.
        """

    @abstractmethod
    def read_all(self, names: Sequence[str]) -> Iterator[bytes | None]:
        """Yield what files have, None for each that is not there.

        Raises:
            OSError: one cannot be read.
        """

    @abstractmethod
    def stream(self, name: str) -> Iterator[bytes]:
        """Yield what a file has, part by part.

        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be read.
        """

    def together(self, requests: Sequence[Callable[[], Answer]]) -> Iterator[Answer]:
        """Yield what some requests give, at once where each takes long."""
        return (request() for request in requests)

    @abstractmethod
    def reading(self, name: str) -> AbstractContextManager[Ranges]:
        """Read parts of a file.

        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be read.
        """

    @abstractmethod
    def length(self, name: str) -> int:
        """Return the length of a file in bytes, 0 where there is none."""

    @abstractmethod
    def lengths(self, names: Sequence[str]) -> list[int]:
        """Return the lengths of files in bytes, 0 for each that is not there."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Say whether there is a file."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Return the names of what is in a folder, without it."""

    @abstractmethod
    def walk(self, inside: str = "") -> Iterator[Found]:
        """Yield all files, or those in a folder."""

    @property
    @abstractmethod
    def there(self) -> bool:
        """Whether the folder is."""

    @abstractmethod
    def folders(self) -> list[Location]:
        """Return the folders in it, in order."""

    # ---- writing -------------------------------------------------------------------------------------------------

    @abstractmethod
    def put(self, name: str, data: bytes) -> None:
        """Have a file appear, in the place of what was.

        Raises:
            OSError: it is refused; what was is there.
        """

    @abstractmethod
    def put_once(self, name: str, data: bytes) -> bool:
        """Have a file appear that only the holder of a claim makes; false where another holder has made it before.

        Raises:
            OSError: it is refused.
        """

    @abstractmethod
    def grow(self, name: str) -> Growing:
        """Begin a file that is written part by part.

        Raises:
            OSError: it is refused.
        """

    @abstractmethod
    def remove(self, *names: str) -> None:
        """Remove files where they are.

        Raises:
            OSError: it is refused.
        """

    @abstractmethod
    def tidy(self, name: str) -> None:
        """Remove what killed processes left aside of a file that nobody writes.

        Raises:
            OSError: it is refused.
        """

    # ---- whole folders -------------------------------------------------------------------------------------------

    @abstractmethod
    def laying_out(self, sign: str) -> AbstractContextManager[Files]:
        """Have what is written inside of this appear at once as the folder; where it is there already, that stays.

        Args:
            sign: the file by which it is there, which is written last.

        Raises:
            OSError: it is refused.
        """

    @abstractmethod
    def found(self) -> None:
        """Make the folder where there is none.

        Raises:
            OSError: it is refused.
        """

    @abstractmethod
    def remove_folder(self, name: str, sign: str) -> None:
        """Remove a folder, in one step for whoever looks.

        Args:
            name: the folder's.
            sign: the file by which it is there.

        Raises:
            OSError: it is refused.
        """

    @abstractmethod
    def leftovers(self, *patterns: str) -> list[str]:
        """Return the names of what killed processes left aside, as far as it fits one of some globs."""

    @abstractmethod
    def clear(self, name: str) -> None:
        """Remove a leftover, as far as that can be done."""

    # ---- claims --------------------------------------------------------------------------------------------------

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Make a file, whole, and only where there is none; say whether that was so.

        Raises:
            OSError: it is refused.
        """

    @abstractmethod
    def look(self, name: str) -> tuple[bytes, Any] | None:
        """Return what a file has, and a mark that is another one after each :meth:`touch`; None where there is none."""

    @abstractmethod
    def touch(self, name: str, data: bytes, mark: Any) -> None:
        """Give a file another mark.

        Args:
            name: the file's.
            data: what it may have then.
            mark: it had when it was looked at; where that changed since, the file stays as it is, if that can be seen.

        Raises:
            OSError: it is refused.
        """

    @abstractmethod
    def bury(self, name: str, data: bytes, mark: Any) -> None:
        """Remove a file unless it is another than when it was looked at.

        Args:
            name: the file's.
            data: what it had.
            mark: that it had.

        Raises:
            OSError: it is refused.
        """


def files_at(folder: Location) -> Files:
    """Return the files below a folder."""
    if isinstance(folder, ObjectPath):
        from influence_pipeline.cache.objects import ObjectFiles

        return ObjectFiles(folder)
    return _LocalFiles(folder)


class _LocalFiles(Files):
    """Files on a disk of this machine, or on one that is mounted.

    What is not whole yet has a name that ends with ".partial".
    """

    def __init__(self, folder: Path) -> None:
        """Read and write files below a folder; it need not be there."""
        self._folder = folder
        self._text = str(folder)

    def read(self, name: str) -> bytes:
        # Paths as text: a Path for each of some files of a thousand blocks takes longer than to look at them.
        with open(f"{self._text}/{name}", "rb") as file:
            return file.read()

    def read_all(self, names: Sequence[str]) -> Iterator[bytes | None]:
        for name in names:
            try:
                yield self.read(name)
            except FileNotFoundError:
                yield None

    def stream(self, name: str) -> Iterator[bytes]:
        with open(f"{self._text}/{name}", "rb") as file:
            while part := file.read(PART):
                yield part

    @contextmanager
    def reading(self, name: str) -> Iterator[Ranges]:
        with open(f"{self._text}/{name}", "rb", buffering=0) as file:
            yield _LocalRanges(file)

    def length(self, name: str) -> int:
        try:
            return os.stat(f"{self._text}/{name}").st_size
        except OSError:
            return 0

    def lengths(self, names: Sequence[str]) -> list[int]:
        return [self.length(name) for name in names]

    def exists(self, name: str) -> bool:
        return (self._folder / name).exists()

    def names(self, folder: str) -> list[str]:
        with contextlib.suppress(OSError):
            return os.listdir(f"{self._text}/{folder}")
        return []

    def walk(self, inside: str = "") -> Iterator[Found]:
        for folder, _, names in os.walk(f"{self._text}/{inside}" if inside else self._text):
            inside = folder[len(self._text) + 1 :]
            for name in names:
                with contextlib.suppress(OSError):  # it may be gone since
                    found = os.stat(f"{folder}/{name}")
                    yield Found(f"{inside}/{name}" if inside else name, found.st_size, found.st_mtime)

    @property
    def there(self) -> bool:
        return self._folder.is_dir()

    def folders(self) -> list[Location]:
        found = sorted(self._folder.iterdir()) if self._folder.is_dir() else []
        return [path for path in found if path.is_dir() and not path.is_symlink()]

    def put(self, name: str, data: bytes) -> None:
        path, aside = self._aside(name)
        try:
            aside.write_bytes(data)
            aside.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise

    def put_once(self, name: str, data: bytes) -> bool:
        self.put(name, data)
        return True

    def grow(self, name: str) -> Growing:
        return _LocalGrowing(*self._aside(name))

    def _aside(self, name: str) -> tuple[Path, Path]:
        path = self._folder / name
        for folder in reversed(path.parents[: name.count("/")]):
            folder.mkdir(exist_ok=True)
        return path, path.with_name(f"{path.stem}.{uuid.uuid4().hex}.partial")

    def remove(self, *names: str) -> None:
        for name in names:
            (self._folder / name).unlink(missing_ok=True)

    def tidy(self, name: str) -> None:
        path = self._folder / name
        for leftover in path.parent.glob(f"{path.stem}.*.partial"):
            leftover.unlink(missing_ok=True)

    @contextmanager
    def laying_out(self, sign: str) -> Iterator[Files]:
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        aside = self._folder.parent.parent / f"{self._folder.name}.{uuid.uuid4().hex}.partial"
        try:
            aside.mkdir()
            yield _LocalFiles(aside)
            try:
                aside.rename(self._folder)
            except OSError:
                if not self.exists(sign):
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def found(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)

    def remove_folder(self, name: str, sign: str) -> None:
        path = self._folder / name
        aside = self._folder / f"{path.name}.{uuid.uuid4().hex}.partial"
        path.rename(aside)
        shutil.rmtree(aside)

    def leftovers(self, *patterns: str) -> list[str]:
        return [str(path.relative_to(self._folder)) for glob in patterns for path in self._folder.glob(glob)]

    def clear(self, name: str) -> None:
        path = self._folder / name
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def create(self, name: str, data: bytes) -> bool:
        path = self._folder / name
        aside = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.partial")
        try:
            aside.write_bytes(data)
            try:
                os.link(aside, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno == errno.ENOENT and path.parent.is_dir():
                    return False  # whoever has the claim tidied up what seemed to be left over
                if error.errno not in NO_LINKS:
                    raise
                return self._create_without_links(path, data)
        finally:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
        return True

    def _create_without_links(self, path: Path, data: bytes) -> bool:
        try:
            with open(path, "xb") as file:
                try:
                    file.write(data)
                    file.flush()
                except OSError:
                    path.unlink(missing_ok=True)
                    raise
        except FileExistsError:
            return False
        return True

    def look(self, name: str) -> tuple[bytes, Any] | None:
        try:
            # Opened, not looked up: only that makes a network file system ask its server.
            with open(f"{self._text}/{name}", "rb") as file:
                touched = os.fstat(file.fileno()).st_mtime_ns
                return file.read(), touched
        except OSError:
            return None

    def touch(self, name: str, data: bytes, mark: Any) -> None:
        os.utime(self._folder / name)

    def bury(self, name: str, data: bytes, mark: Any) -> None:
        path = self._folder / name
        grave = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.partial")
        path.rename(grave)
        with contextlib.suppress(OSError):
            if grave.read_bytes() != data:
                # Somebody was faster and has made a new one, which is put back.
                os.link(grave, path)
        grave.unlink(missing_ok=True)


class _LocalRanges:
    def __init__(self, file: Any) -> None:
        self._file = file

    def tail(self, size: int) -> bytes:
        length = self._file.seek(0, 2)
        self._file.seek(max(0, length - size))
        found: bytes = self._file.read(size)
        return found

    def parts(self, places: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        for offset, length in places:
            self._file.seek(offset)
            yield self._file.read(length)


class _LocalGrowing(Growing):
    def __init__(self, path: Path, aside: Path) -> None:
        super().__init__(path)
        self._path, self._aside = path, aside
        self._file = open(aside, "wb", buffering=0)  # noqa: SIM115 - closed by finish or abandon

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]

    def finish(self) -> None:
        self._file.close()

    def appear(self) -> None:
        self._aside.replace(self._path)

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._aside.unlink(missing_ok=True)
