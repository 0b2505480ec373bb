"""Objects of a store: S3 and whatever else obstore speaks to.

Such a store has neither folders nor a way to rename, but puts an object whole or not at all, only where there is none
if that is asked for, or only in the place of one that has a certain etag: these make claims and records. A request
that fails for a reason that may pass is made again, with longer and longer pauses. Credentials are the environment's,
and nothing is said of them.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import random
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from influence_pipeline.cache.layout import DESCRIPTION
from influence_pipeline.cache.store import PART, Files, Found, Growing, Ranges, Rewritten
from influence_pipeline.errors import RequestError, WorkError
from influence_pipeline.location import Location, ObjectPath, without_secrets

Answer = TypeVar("Answer")
PATIENCE = 60.0
"""Seconds after which a request that keeps failing is given up."""
LOOK = 3.0
"""The same of the first request, by which it is seen whether there is such a store at all."""
TRIES = 6
"""Of a request that cannot be made again unseen, or whose answer broke off."""
PAUSE = 0.1
"""Seconds before the second try."""
AT_ONCE = 32
"""Requests under way at once."""
GAP = 2**16
"""Bytes between two parts of an object up to which they are read as one."""
RUN = 2**23
"""Bytes of one request at most, where it is for several parts."""
UPLOAD_PART = 2**23
SPOOLED = 2**20
"""Bytes of an object that is written part by part, up to which these are kept in memory."""
CONTENDED = 5
"""Times that a claim is tried for that others make and bury meanwhile."""
KEPT = 4096
"""Objects of which something is known without a request."""
DESCRIBED = 5.0
"""Seconds for which descriptions are known, unless something is claimed meanwhile: each is read many times in a run."""
ASKED_ONE_BY_ONE = 8
"""Objects whose lengths are asked for one by one; of more, all that there are are listed."""
MOST_SAID = 300
ENVIRONMENT = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_SAS_TOKEN",
}


class ObjectFiles(Files):
    """Objects below a prefix."""

    far = True

    def __init__(self, folder: ObjectPath) -> None:
        """Read and write objects below a prefix."""
        self._folder = folder
        self._store = opened(folder.root)
        self._prefix = f"{folder.key}/" if folder.key else ""

    # ---- reading -------------------------------------------------------------------------------------------------

    def read(self, name: str) -> bytes:
        """Return what an object has."""
        if not _describes(name):
            return self._got(name)[0]
        known = _descriptions.get(self._id(name))
        return _descriptions.read(self._id(name), lambda: self._got(name)[0]) if known is None else known

    def read_all(self, names: Sequence[str]) -> Iterator[bytes | None]:
        """Yield what objects have, None for each that is not there."""
        return _together(self._read_if_there, names)

    def _read_if_there(self, name: str) -> bytes | None:
        try:
            return self.read(name)
        except FileNotFoundError:
            return None

    def stream(self, name: str) -> Iterator[bytes]:
        """Yield what an object has, part by part.

        Raises:
            WorkError: it was written anew meanwhile.
        """
        import obstore

        known = self._asked(name, lambda: obstore.head(self._store, self._key(name)))
        for start in range(0, known["size"], PART):
            try:
                yield self._part(name, start, min(start + PART, known["size"]), known["e_tag"])
            except Rewritten as error:
                raise WorkError(f"{error}: try again") from None

    def together(self, requests: Sequence[Callable[[], Answer]]) -> Iterator[Answer]:
        """Yield what some requests give, which are made at once."""
        return _together(lambda request: request(), requests)

    @contextmanager
    def reading(self, name: str) -> Iterator[Ranges]:
        """Read parts of an object."""
        yield _ObjectRanges(self, name)

    def tail(self, name: str, size: int) -> tuple[bytes, str | None]:
        """Return the last bytes of an object, and its etag; what was asked before is known."""
        known = _tails.get(self._id(name))
        if known is None or known[0] != size:
            known = _tails.read(self._id(name), lambda: (size, *self._got(name, {"range": {"suffix": size}})))
        return known[1], known[2]

    def parts(self, name: str, places: Sequence[tuple[int, int]], etag: str | None) -> Iterator[bytes]:
        """Yield what is at each offset, of a length, with a request for each run of them."""
        runs: list[list[tuple[int, int]]] = []
        for offset, length in places:
            if runs:
                begin, (last, size) = runs[-1][0][0], runs[-1][-1]
                if 0 <= offset - last - size <= GAP and offset + length - begin <= RUN:
                    runs[-1].append((offset, length))
                    continue
            runs.append([(offset, length)])

        for run in runs:
            raw = self._part(name, run[0][0], run[-1][0] + run[-1][1], etag)
            for offset, length in run:
                yield raw[offset - run[0][0] : offset - run[0][0] + length]

    def _part(self, name: str, start: int, stop: int, etag: str | None) -> bytes:
        """Return some bytes of an object that is still the one with this etag.

        Raises:
            Rewritten: it is another one now.
        """
        from obstore.exceptions import PreconditionError

        try:
            return self._got(name, {"range": (start, stop), **({"if_match": etag} if etag else {})})[0]
        except PreconditionError:
            _tails.drop(self._id(name))
            raise Rewritten(f"{self._folder / name} was written anew while it was read") from None

    def length(self, name: str) -> int:
        """Return the length of an object in bytes, 0 where there is none."""
        import obstore

        if _describes(name) and (known := _descriptions.get(self._id(name))) is not None:
            return len(known)
        try:
            return int(self._asked(name, lambda: obstore.head(self._store, self._key(name)))["size"])
        except FileNotFoundError:
            return 0

    def lengths(self, names: Sequence[str]) -> list[int]:
        """Return the lengths of objects, 0 for each that is not there."""
        if len(names) <= ASKED_ONE_BY_ONE:
            return list(_together(self.length, names))
        known = {found.name: found.length for found in self.walk()}
        return [known.get(name, 0) for name in names]

    def exists(self, name: str) -> bool:
        """Say whether there is an object."""
        import obstore

        try:
            self._asked(name, lambda: obstore.head(self._store, self._key(name)))
        except FileNotFoundError:
            return False
        return True

    def names(self, folder: str) -> list[str]:
        """Return the names of what is directly below a prefix."""
        found = self._listed(folder)
        return sorted(key.rpartition("/")[2] for key in (*found["common_prefixes"], *_keys(found["objects"])))

    def walk(self, inside: str = "") -> Iterator[Found]:
        """Yield all objects, or those below a part of the prefix."""
        import obstore

        def listed() -> list[Any]:
            return list(obstore.list(self._store, self._key(inside) or None, chunk_size=1000).collect())

        for found in self._asked("", listed):
            name = found["path"].removeprefix(self._prefix)
            yield Found(name, int(found["size"]), found["last_modified"].timestamp())

    @property
    def there(self) -> bool:
        """Whether anything is below the prefix."""
        found = self._listed("")
        return bool(found["objects"] or found["common_prefixes"])

    def folders(self) -> list[Location]:
        """Return what is directly below the prefix, and has something below it."""
        return sorted(self._folder / key.rpartition("/")[2] for key in self._listed("")["common_prefixes"])

    def _listed(self, folder: str) -> Any:
        import obstore

        return self._asked(folder, lambda: obstore.list_with_delimiter(self._store, self._key(folder) or None))

    # ---- writing -------------------------------------------------------------------------------------------------

    def put(self, name: str, data: bytes) -> None:
        """Have an object appear, in the place of what was."""
        import obstore

        self._written(name, lambda: obstore.put(self._store, self._key(name), data, use_multipart=False))

    def put_once(self, name: str, data: bytes) -> bool:
        """Have an object appear that nobody else made meanwhile; say whether it is there."""
        return self.create(name, data)

    def grow(self, name: str) -> Growing:
        """Begin an object that is written part by part, into a file until it is whole."""
        return _ObjectGrowing(self, name)

    def upload(self, name: str, file: Any) -> None:
        """Have an object appear, in the place of what was, with all of a file."""
        import obstore

        def put() -> None:
            file.seek(0)
            obstore.put(self._store, self._key(name), file, chunk_size=UPLOAD_PART, max_concurrency=4)

        self._written(name, put)

    def remove(self, *names: str) -> None:
        """Remove objects, as far as they are there."""
        for _ in _together(self._remove, names):
            pass

    def _remove(self, name: str) -> None:
        import obstore

        with contextlib.suppress(FileNotFoundError):
            self._written(name, lambda: obstore.delete(self._store, self._key(name)))

    def tidy(self, name: str) -> None:
        """Remove nothing: nothing is aside."""

    @contextmanager
    def laying_out(self, sign: str) -> Iterator[Files]:
        """Have what is written inside of this be there: all but the last file means nothing."""
        yield self

    def found(self) -> None:
        """Make nothing: there are no folders."""

    def remove_folder(self, name: str, sign: str) -> None:
        """Remove all below a prefix, what it is known by first."""
        self.remove(f"{name}/{sign}")
        below = ObjectFiles(self._folder / name)
        below.remove(*(found.name for found in below.walk()))

    def leftovers(self, *patterns: str) -> list[str]:
        """Return nothing: nothing is aside."""
        return []

    def clear(self, name: str) -> None:
        """Remove nothing: nothing is aside."""

    # ---- claims --------------------------------------------------------------------------------------------------

    def create(self, name: str, data: bytes) -> bool:
        """Make an object only where there is none, or one that was buried; say whether it is there."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        def put() -> bool:
            mode: Any = "create"
            for _ in range(CONTENDED):
                try:
                    obstore.put(self._store, self._key(name), data, mode=mode, use_multipart=False)
                except (AlreadyExistsError, PreconditionError, FileNotFoundError) as error:
                    if isinstance(error, FileNotFoundError) and mode == "create":
                        raise  # there is no such bucket
                    found = self._looked(name)
                    if found is not None and found[0]:
                        return found[0] == data  # it was put, and the answer was lost
                    mode = "create" if found is None else _mode(found[1])
                else:
                    return True
            return False

        made = self._written(name, put)
        _descriptions.drop()  # whoever has a claim sees what is there now
        return made

    def look(self, name: str) -> tuple[bytes, Any] | None:
        """Return what an object has, and its version; None where there is none, or one that was buried."""
        found = self._looked(name)
        return found if found and found[0] else None

    def _looked(self, name: str) -> tuple[bytes, Any] | None:
        import obstore

        def get() -> tuple[bytes, Any]:
            found = obstore.get(self._store, self._key(name))
            return bytes(found.bytes()), (found.meta["e_tag"], found.meta["version"])

        try:
            return self._asked(name, get)
        except FileNotFoundError:
            return None

    def touch(self, name: str, data: bytes, mark: Any) -> None:
        """Give an object another version, if it still has this one."""
        import obstore
        from obstore.exceptions import PreconditionError

        with contextlib.suppress(PreconditionError, FileNotFoundError):
            self._written(name, lambda: obstore.put(self._store, self._key(name), data, mode=_mode(mark)))

    def bury(self, name: str, data: bytes, mark: Any) -> None:
        """Leave an object empty, if it still has this version: there is no way to remove it on this condition."""
        self.touch(name, b"", mark)

    # ---- requests ------------------------------------------------------------------------------------------------

    def _key(self, name: str) -> str:
        return f"{self._prefix}{name}" if name else self._folder.key

    def _id(self, name: str) -> tuple[str, str]:
        return self._folder.root, self._key(name)

    def _got(self, name: str, options: Any = None) -> tuple[bytes, str | None]:
        import obstore

        def get() -> tuple[bytes, str | None]:
            found = obstore.get(self._store, self._key(name), options=options)
            return bytes(found.bytes()), found.meta["e_tag"]

        return self._asked(name, get)

    def _asked(self, name: str, request: Callable[[], Answer]) -> Answer:
        """Make a request that reads.

        Raises:
            FileNotFoundError: there is no such object.
            WorkError: the store does not answer, or refuses.
        """
        try:
            return self._again(name, request)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise WorkError(f"{self._folder / name} cannot be read: {error}") from None

    def _written(self, name: str, request: Callable[[], Answer]) -> Answer:
        """Make a request that writes.

        Raises:
            OSError: the store does not answer, or refuses.
        """
        try:
            return self._again(name, request)
        finally:
            _tails.drop(self._id(name))
            _descriptions.drop(self._id(name))

    def _again(self, name: str, request: Callable[[], Answer]) -> Answer:
        """Make a request, and again where it failed for a reason that may pass.

        Raises:
            AlreadyExistsError: there is such an object, and there was to be none.
            PreconditionError: it is another one than was asked for.
            FileNotFoundError: there is none.
            OSError: it failed in the end.
        """
        from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PreconditionError

        began, tries = time.monotonic(), 0
        while True:
            tries += 1
            try:
                return request()
            except (AlreadyExistsError, PreconditionError):
                raise
            except FileNotFoundError:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._folder / name)) from None
            except BaseError as error:
                if not isinstance(error, GenericError) or tries == TRIES or time.monotonic() - began > PATIENCE:
                    raise OSError(_said(error)) from None
                time.sleep(random.uniform(0.5, 1.0) * PAUSE * 2**tries)


class _ObjectRanges:
    def __init__(self, files: ObjectFiles, name: str) -> None:
        self._files, self._name = files, name
        self._etag: str | None = None

    def tail(self, size: int) -> bytes:
        found, self._etag = self._files.tail(self._name, size)
        return found

    def parts(self, places: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        return self._files.parts(self._name, places, self._etag)


class _ObjectGrowing(Growing):
    def __init__(self, files: ObjectFiles, name: str) -> None:
        super().__init__(files._folder / name)
        self._files, self._name = files, name
        self._file = tempfile.SpooledTemporaryFile(SPOOLED)  # noqa: SIM115 - closed by abandon

    def _write(self, data: bytes) -> None:
        self._file.write(data)

    def finish(self) -> None:
        self._file.flush()

    def appear(self) -> None:
        self._files.upload(self._name, self._file)
        self._file.close()

    def abandon(self) -> None:
        self._file.close()


class _Known:
    """What was read of objects, by their roots and keys: of those that were used last, until they are written here."""

    def __init__(self, seconds: float = math.inf) -> None:
        """Keep things for some seconds."""
        self._seconds = seconds
        self._known: OrderedDict[tuple[str, str], tuple[float, Any]] = OrderedDict()
        self._reading: dict[tuple[str, str], object] = {}
        self._lock = threading.Lock()

    def get(self, key: tuple[str, str]) -> Any:
        """Return what is known of an object, None where nothing is."""
        with self._lock:
            if key not in self._known:
                return None
            self._known.move_to_end(key)
            read, found = self._known[key]
            return found if time.monotonic() - read <= self._seconds else None

    def read(self, key: tuple[str, str], read: Callable[[], Answer]) -> Answer:
        """Read something of an object, and keep it if it was not forgotten meanwhile."""
        began, token = time.monotonic(), object()
        with self._lock:
            self._reading[key] = token
        found = read()
        with self._lock:
            if self._reading.pop(key, None) is token:
                self._known[key] = began, found
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        return found

    def drop(self, *keys: tuple[str, str]) -> None:
        """Forget some objects, by default all."""
        with self._lock:
            for known in (self._known, self._reading):
                for key in keys or tuple(known):
                    known.pop(key, None)


_tails, _descriptions = _Known(), _Known(DESCRIBED)


def refuse_unreachable(place: ObjectPath) -> None:
    """Refuse a place that cannot be used, within seconds.

    Raises:
        RequestError: there is no such bucket, or it may not be read.
        WorkError: the store does not answer.
    """
    import obstore
    from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

    if place.of_one_process:
        return
    scheme = place.root.partition("://")[0]
    how = f"credentials come from the environment ({ENVIRONMENT[scheme]})"
    try:
        obstore.list_with_delimiter(_store(place.root, LOOK), place.key or None)
    except FileNotFoundError:
        raise RequestError(f"cache {place}: there is no {place.root}; make it first, or name another") from None
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise RequestError(f"cache {place}: access is refused: {_said(error)}\n{how}") from None
    except BaseError as error:
        said = _said(error)
        if "NoSuchBucket" in said:
            raise RequestError(f"cache {place}: there is no {place.root}; make it first, or name another") from None
        if any(word in said for word in ("169.254.169.254", "metadata", "redential")):
            raise RequestError(f"cache {place}: no credentials were found; {how}") from None
        raise WorkError(f"cache {place} cannot be reached: {said}") from None


@cache
def opened(root: str) -> Any:
    """Return the store of a bucket, the same for all of this process.

    Raises:
        RequestError: obstore is not installed, or does not know such a store.
    """
    return _store(root, PATIENCE)


def _store(root: str, patience: float) -> Any:
    """Open the store of a bucket.

    Raises:
        RequestError: obstore is not installed, or does not know such a store.
    """
    try:
        from obstore.exceptions import BaseError
        from obstore.store import MemoryStore, from_url
    except ImportError as error:
        raise RequestError(f"cache {root}: needs obstore ({error}): pip install 'influence-pipeline[s3]'") from None
    if root.startswith("memory://"):
        return MemoryStore()
    endpoints = (value for name, value in os.environ.items() if name.startswith("AWS_ENDPOINT"))
    try:
        return from_url(
            root,
            client_options={
                "timeout": timedelta(seconds=max(patience, 2.0)),
                "connect_timeout": timedelta(seconds=min(5.0, patience)),
                "allow_http": any(value.startswith("http://") for value in endpoints),
            },
            retry_config={
                "max_retries": 10 if patience > LOOK else 2,
                "retry_timeout": timedelta(seconds=patience),
                "backoff": {"init_backoff": timedelta(seconds=PAUSE), "max_backoff": timedelta(seconds=5), "base": 2},
            },
        )
    except (BaseError, ValueError) as error:
        raise RequestError(f"cache {root} cannot be used: {_said(error)}") from None


def _describes(name: str) -> bool:
    return name.endswith(DESCRIPTION)


def _mode(mark: Any) -> Any:
    return {name: value for name, value in zip(("e_tag", "version"), mark, strict=True) if value is not None}


def _keys(objects: Any) -> list[str]:
    return [found["path"] for found in objects]


def _said(error: Exception) -> str:
    """Return what an error says in one short line, and nothing of credentials."""
    text = " ".join(without_secrets(str(error)).partition("Debug source")[0].split())
    return text if len(text) <= MOST_SAID else f"{text[:MOST_SAID]}…"


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(AT_ONCE, "requests")


def _together(request: Callable[[Any], Answer], of: Sequence[Any]) -> Iterator[Answer]:
    """Make some requests at once; yield the answers in order, and leave none under way."""
    if len(of) < 2:
        yield from map(request, of)
        return
    answers = [_threads().submit(request, each) for each in of]
    try:
        for answer in answers:
            yield answer.result()
    finally:
        for answer in answers:
            answer.cancel()
        wait(answers)
