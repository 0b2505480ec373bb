"""A data set as the stages see it, and digests that tell whether a sample is what it was."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections import UserDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from influence_pipeline.cache.record import digest as digest_of
from influence_pipeline.errors import CacheMismatch, RequestError, WorkError
from influence_pipeline.task import targets_of
from stages.batch import leaves, map_leaves, only_tensors, size, to_device
from stages.prefetch import ahead
from stages.stage import Array, ArrayLike, Batch

DIGEST_BYTES = 16
AT_ONCE = 2**20
"""Digests that are read at once; more are read when they are asked for."""
AROUND = 2**12
"""Digests that are read with one that is asked for."""
MOST_SOURCES = 255


def digest(sample: Any) -> bytes:
    """Return 16 bytes that depend on a sample's structure, types, shapes and values, and on nothing else.

    Raises:
        RequestError: the sample holds something that has no stable bytes.
    """
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    try:
        _feed(state, sample)
    except RecursionError:
        raise RequestError("a sample holds itself, or is nested too deeply for a digest to be taken") from None
    return state.digest()


def _feed(state: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.device.type == "meta":
            raise RequestError(f"a sample holds a tensor of {value.layout} on {value.device}: dense ones are needed")
        state.update(_tensor_head(value.dtype, value.shape))
        try:
            state.update(value.numpy(force=True).tobytes())
        except TypeError:  # NumPy has no such type
            value = value.detach().cpu().contiguous()
            state.update(value.flatten().view(torch.uint8).numpy())
    elif isinstance(value, (np.ndarray, np.generic)):
        value = np.ascontiguousarray(value)
        if value.dtype.hasobject:
            _feed(state, value.tolist())
            return
        state.update(f"array {value.dtype.str} {value.shape};".encode())
        state.update(value.tobytes())
    elif value is None or isinstance(value, (bool, int, float, complex, str)):
        state.update(f"{type(value).__name__} {value!r};".encode("utf-8", "surrogatepass"))
    elif isinstance(value, (bytes, bytearray)):
        state.update(f"bytes {len(value)};".encode())
        state.update(value)
    elif isinstance(value, (Mapping, UserDict)):
        state.update(f"mapping {len(value)};".encode())
        for key, entry in value.items():
            _feed(state, key)
            _feed(state, entry)
    elif isinstance(value, (tuple, list)):
        state.update(f"sequence {len(value)};".encode())
        for entry in value:
            _feed(state, entry)
    elif hasattr(value, "tobytes") and hasattr(value, "mode") and hasattr(value, "size"):
        state.update(f"image {value.mode} {value.size};".encode())
        state.update(value.tobytes())
    elif hasattr(value, "__dict__"):
        _feed(state, vars(value))
    else:
        raise RequestError(f"a sample holds a {type(value).__name__}, of which no digest can be taken")


@functools.lru_cache
def _tensor_head(dtype: torch.dtype, shape: torch.Size) -> bytes:
    return f"tensor {dtype} {tuple(shape)};".encode()


class DataSet:
    """Batches of a user's data set by ids, with a digest of every sample that was read.

    Where samples are collated by PyTorch's default and all of them fit into ``keep_bytes``, they are kept as
    tensors after :meth:`keep`, so that solvers go over them again and again at the speed of memory.
    """

    def __init__(
        self,
        data: Dataset[Any],
        name: str,
        *,
        collate: Callable[[list[Any]], Any] | None = None,
        device: torch.device | None = None,
        keep_entries: tuple[str, ...] = (),
        workers: int = 0,
        keep_bytes: int = 0,
    ) -> None:
        """Wrap a map-style data set.

        Raises:
            RequestError: it is an IterableDataset, has no length, or is empty.
        """
        self.data, self.name = data, name
        self._collate = collate
        self._device = device or torch.device("cpu")
        self._keep_entries = keep_entries
        self._workers = workers
        self._keep_bytes = keep_bytes
        self._kept: Batch | None = None
        self._length = check_dataset(data, name)
        self._fingerprints: dict[int, bytes] = {}
        self._sources: list[ArrayLike] = []

    @functools.cached_property
    def _digests(self) -> Array:
        return np.zeros((self._length, DIGEST_BYTES), np.uint8)

    @functools.cached_property
    def _known(self) -> Array:
        return np.zeros(self._length, bool)

    @functools.cached_property
    def _fetched(self) -> Array:
        return np.zeros(self._length, bool)

    @functools.cached_property
    def _unread(self) -> Array:
        """For each sample, the number of what its digest is to be read from, 0 where it is in memory."""
        return np.zeros(self._length, np.uint8)

    def __len__(self) -> int:
        """Count the samples."""
        return self._length

    def batch(self, ids: Sequence[int]) -> Batch:
        """Collate some samples, on the device.

        Raises:
            WorkError: the data set raised.
            RequestError: the batch is not made of tensors with the batch first.
        """
        if self._kept is not None:
            index = torch.as_tensor(list(ids), device=self._device)
            return map_leaves(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf, self._kept)
        return self._collated([self.sample(i) for i in ids])

    def batches(self, ids: Sequence[int], size: int) -> Generator[Batch, None, None]:
        """Yield some samples in order, ``size`` at a time; read by worker processes where there are any."""
        if self._workers and self._kept is None:
            yield from (batch for _, batch in self.read(ids, size))
            return
        yield from self.stream(ids[start : start + size] for start in range(0, len(ids), size))

    def read(self, ids: Sequence[int], size: int) -> Generator[tuple[list[Any], Batch], None, None]:
        """Yield some samples in order, ``size`` at a time: as the data set gives them, and as a batch."""
        for part, samples in self._read(ids, size):
            for position, sample in zip(part, samples, strict=True):
                self._remember(position, sample)
            yield samples, self._collated(samples)

    def stream(self, parts: Iterable[Sequence[int]]) -> Generator[Batch, None, None]:
        """Yield a batch for each of these parts, which need not end; read ahead where they are not kept."""
        if self._kept is not None:
            yield from map(self.batch, parts)
            return
        with closing(ahead(self.sample, parts)) as found:
            for samples in found:
                yield self._collated(samples)

    def _read(self, ids: Sequence[int], size: int) -> Iterator[tuple[Sequence[int], list[Any]]]:
        """Yield positions and samples, ``size`` at a time; read by worker processes where there are any."""
        parts, reader = [ids[start : start + size] for start in range(0, len(ids), size)], _Fetch(self.data, self.name)
        if not self._workers:
            yield from ((part, [fetch(self.data, self.name, position) for position in part]) for part in parts)
            return
        loader = DataLoader(
            reader, batch_size=None, sampler=parts, collate_fn=_Fetch.as_it_is, num_workers=self._workers
        )
        for part, samples in zip(parts, loader, strict=True):
            if isinstance(samples, WorkError):
                raise samples
            yield part, samples

    def keep(self) -> None:
        """Hold the whole data set as tensors from now on, where that is possible and fits ``keep_bytes``."""
        if self._kept is not None or self._collate is not None:
            return
        one = self._collated([self.sample(0)])
        if not only_tensors(one):
            return
        sample_bytes = sum(leaf.numel() * leaf.element_size() for leaf in leaves(one) if isinstance(leaf, Tensor))
        if self._length * sample_bytes > self._keep_bytes:
            return
        whole = list(self.batches(range(self._length), 1024))
        if len({str(map_leaves(_shape, b)) for b in whole}) > 1:
            return
        self._kept = _concatenate(whole)

    def sample(self, position: int) -> Any:
        """Fetch one sample as the data set gives it, and take its digest.

        Raises:
            WorkError: the data set raised.
            CacheMismatch: it gave another sample for this position before.
        """
        sample = fetch(self.data, self.name, position)
        self._remember(position, sample)
        return sample

    def digests(self, ids: Sequence[int]) -> Array:
        """Return the digests of some samples, (n, 16) uint8; those neither read nor expected are fetched."""
        # A range of a million ids is one copy this way, and a loop otherwise.
        rows = slice(ids.start, ids.stop) if isinstance(ids, range) and ids.step == 1 else np.asarray(ids, np.int64)
        for number in np.flatnonzero(~self._known[rows]).tolist():
            self.sample(int(ids[number]))
        if self._sources:
            self._read_digests(np.asarray(ids))
        found: Array = self._digests[rows].copy()
        return found

    def _read_digests(self, ids: Array) -> None:
        """Read what is to be read of the digests of some samples, and of those around them."""
        for chunk in np.unique(ids[self._unread[ids] > 0] // AROUND).tolist():
            part = slice(chunk * AROUND, min((chunk + 1) * AROUND, self._length))
            for number, source in enumerate(self._sources, 1):
                rows = np.flatnonzero(self._unread[part] == number) + part.start
                if len(rows):
                    around = slice(int(rows[0]), int(rows[-1]) + 1)
                    self._digests[rows] = source[around][rows - around.start]
                    self._unread[rows] = 0

    def fingerprint(self, count: int) -> bytes:
        """Return a digest of the first ``count`` samples, taken once: what is known stays until it is forgotten."""
        if count not in self._fingerprints:
            parts = (self.digests(range(start, min(start + AT_ONCE, count))) for start in range(0, count, AT_ONCE))
            self._fingerprints[count] = digest_of(itertools.chain([count.to_bytes(8, "little")], parts))
        return self._fingerprints[count]

    def expect(self, digests: ArrayLike, part: slice) -> None:
        """Refuse, from now on, samples that are not those of which something is cached.

        Args:
            digests: (n, 16) uint8, of all samples. Very many are read when they are asked for.
            part: those that count.
        """
        part = slice(part.start, min(part.stop, self._length))
        if part.stop <= part.start or not (new := ~self._known[part]).any():
            return
        rows = slice(None) if new.all() else new  # a slice of a million rows is one copy
        if part.stop - part.start <= AT_ONCE or len(self._sources) == MOST_SOURCES:
            self._digests[part][rows] = digests[part][rows]
        else:
            if all(source is not digests for source in self._sources):
                self._sources.append(digests)
            number = next(n for n, source in enumerate(self._sources, 1) if source is digests)
            self._unread[part][rows] = number
        self._known[part] = True

    @property
    def expected(self) -> Array:
        """The positions of samples whose digest is known, (n,) int64."""
        return np.flatnonzero(self._known)

    def expected_among(self, choose: Callable[[int], list[int]]) -> list[int]:
        """Return some positions of samples whose digest is known; ``choose`` is told how many there are."""
        starts = np.arange(0, self._length, AROUND)
        ends = np.add.reduceat(self._known, starts, dtype=np.int64).cumsum()
        found = []
        for number in choose(int(ends[-1])):
            chunk = int(np.searchsorted(ends, number, "right"))
            before = int(ends[chunk - 1]) if chunk else 0
            there = np.flatnonzero(self._known[chunk * AROUND : (chunk + 1) * AROUND])
            found.append(chunk * AROUND + int(there[number - before]))
        return found

    @property
    def all_expected(self) -> bool:
        """Whether the digest of every sample is known."""
        return bool(self._known.all())

    def forget(self) -> None:
        """Expect nothing of any sample."""
        self._known[:], self._fetched[:], self._kept = False, False, None
        self._fingerprints.clear()
        if self._sources:
            self._unread[:] = 0
            self._sources.clear()

    def changed(self, ids: Sequence[int], report: Callable[[int], None] = lambda count: None) -> dict[int, Array]:
        """Fetch some samples, and return the digests of those that are not what was expected, by position."""
        found = {}
        for part, samples in self._read(ids, 32):
            for position, sample in zip(part, samples, strict=True):
                now = np.frombuffer(digest(sample), np.uint8)
                if self._known[position] and not np.array_equal(now, self._digest(position)):
                    found[position] = now
            report(len(part))
        return found

    def check_fixed(self, ids: Sequence[int]) -> None:
        """Fetch some samples twice and refuse a data set that gives another one the second time.

        Raises:
            CacheMismatch: naming the sample.
        """
        for position in ids:
            self.sample(position)
            self.sample(position)

    def _remember(self, position: int, sample: Any) -> None:
        found = np.frombuffer(digest(sample), np.uint8)
        if self._known[position] and not np.array_equal(self._digest(position), found):
            if not self._fetched[position]:
                raise CacheMismatch(changed_samples(self.name, [position]))
            raise CacheMismatch(
                f"data set {self.name!r}: sample {position} differs when fetched twice. Influence is about fixed "
                "samples: turn random augmentation off (use the evaluation transform), or fix its seed by sample"
            )
        self._digests[position], self._known[position], self._fetched[position] = found, True, True

    def _digest(self, position: int) -> Array:
        if self._sources:
            self._read_digests(np.array([position]))
        found: Array = self._digests[position]
        return found

    def _collated(self, samples: list[Any]) -> Batch:
        try:
            batch = (self._collate or _collate)([_to_dict(sample) for sample in samples])
        except Exception as error:
            raise RequestError(
                f"data set {self.name!r}: its samples cannot be collated ({type(error).__name__}: {error}). "
                "Give the Experiment a `collate`"
            ) from error
        batch = _drop_others(_to_dict(batch), self._keep_entries)
        found = size(batch)
        if found != len(samples):
            raise RequestError(f"data set {self.name!r}: {len(samples)} samples collate to a batch of {found}")
        return to_device(batch, self._device)


class First:
    """The first samples of a data set, as stages see it."""

    def __init__(self, data: DataSet, count: int) -> None:
        """Leave out all but the first ``count``."""
        self._data, self._count = data, count

    def __len__(self) -> int:
        """Count the samples."""
        return self._count

    def batch(self, ids: Sequence[int]) -> Batch:
        """Collate some samples, on the device."""
        return self._data.batch(ids)

    def batches(self, ids: Sequence[int], size: int) -> Generator[Batch, None, None]:
        """Yield some samples in order, ``size`` at a time."""
        return self._data.batches(ids, size)

    def stream(self, parts: Iterable[Sequence[int]]) -> Generator[Batch, None, None]:
        """Yield a batch for each of these parts, which need not end."""
        return self._data.stream(parts)


def changed_samples(name: str, ids: Sequence[int]) -> str:
    """Say what is to be done about samples that are not those of which something is cached."""
    return (
        f"data set {name!r}: sample{'s' * (len(ids) > 1)} {shown_ids(ids)} "
        f"{'are not what they were' if len(ids) > 1 else 'is not what it was'} when the cache was made of them. "
        "`run --refresh` computes anew what came of changed samples; `run --accept-data` keeps it where the model "
        "gives the same gradients (another decoder, another machine); `verify` lists all that changed. "
        "For another data set choose another name, or another cache"
    )


def shown_ids(ids: Sequence[int]) -> str:
    """Write ids for people."""
    return ", ".join(map(str, ids[:10])) + (f", … ({len(ids)} in all)" if len(ids) > 10 else "")


class _Fetch(Dataset[Any]):
    """Lists of samples by lists of positions, for a loader's worker processes."""

    def __init__(self, data: Dataset[Any], name: str) -> None:
        self.data, self.name = data, name

    @staticmethod
    def as_it_is(samples: Any) -> Any:
        """Keep the loader from making tensors of what the data set gave."""
        return samples

    def __getitem__(self, positions: Sequence[int]) -> list[Any] | WorkError:
        """Return samples, or the error: a loader would raise it with the traceback of its process for a text."""
        try:
            return [fetch(self.data, self.name, position) for position in positions]
        except WorkError as error:
            return error


def fetch(data: Dataset[Any], name: str, position: int) -> Any:
    """Return one sample.

    Raises:
        WorkError: the data set raised, with the position and what it said.
    """
    try:
        return data[position]
    except Exception as error:
        raise WorkError(f"data set {name!r} raised at sample {position}: {type(error).__name__}: {error}") from error


def check_dataset(data: Any, name: str) -> int:
    """Return the length of a data set.

    Raises:
        RequestError: it cannot be read by position, has no length, or is empty.
    """
    if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise RequestError(
            f"data set {name!r} is a {type(data).__name__}: a data set with __getitem__ and __len__ is needed, "
            "since samples are named by their positions and read again"
        )
    try:
        length = len(data)
    except Exception as error:
        raise RequestError(f"data set {name!r}: its length raises {type(error).__name__}: {error}") from error
    if length == 0:
        raise RequestError(f"data set {name!r} is empty")
    return length


class PerClass(Subset[Any]):
    """The same number of samples of each class; ``indices`` are positions in the data set it was cut out of."""


def per_class(dataset: Dataset[Any], num: int, start: int = 0) -> PerClass:
    """Return ``num`` samples of each class, passing over the first ``start`` of each, class by class.

    Args:
        dataset: samples (inputs, label), or mappings with a label; a ``targets`` attribute is used where there is one.
        num: samples of each class.
        start: how many of each class to pass over first.

    Returns:
        A subset; its ``indices`` are positions in ``dataset``.

    Raises:
        RequestError: a class has fewer than ``start + num`` samples, or these are no such numbers.
    """
    if num < 1 or start < 0:
        raise RequestError(f"per_class: num must be at least 1 and start at least 0, got {num} and {start}")
    length = check_dataset(dataset, "per_class")
    targets = getattr(dataset, "targets", None)
    if targets is None or len(targets) != length:
        targets = [targets_of(_to_dict(fetch(dataset, "per_class", position))) for position in range(length)]
    positions: dict[Any, list[int]] = {}
    for position, label in enumerate(targets):
        positions.setdefault(label.item() if hasattr(label, "item") else label, []).append(position)
    short = {label: len(found) for label, found in positions.items() if len(found) < start + num}
    if short:
        raise RequestError(
            f"per_class = {num}, start = {start} needs {start + num} samples of each class; there are only "
            + ", ".join(f"{count} of class {label}" for label, count in sorted(short.items()))
        )
    return PerClass(dataset, [i for label in sorted(positions) for i in positions[label][start : start + num]])


def _collate(samples: list[Any]) -> Any:
    """Collate as PyTorch does, but for lists of numbers in mappings, as tokenizers give: they are rows of a tensor."""
    return default_collate([_rows_to_tensors(sample) for sample in samples])


def _rows_to_tensors(sample: Any) -> Any:
    if not isinstance(sample, dict):
        return sample
    return {
        key: torch.tensor(value)
        if isinstance(value, list) and value and all(isinstance(entry, (bool, int, float)) for entry in value)
        else value
        for key, value in sample.items()
    }


def _to_dict(tree: Any) -> Any:
    if isinstance(tree, UserDict):
        tree = dict(tree)
    if isinstance(tree, Mapping):
        return {key: _to_dict(value) for key, value in tree.items()}
    return tree


def _drop_others(batch: Batch, keep: tuple[str, ...]) -> Batch:
    """Drop the entries of mappings that hold no tensor, unless the task names them."""
    if isinstance(batch, dict):
        return {
            key: value
            for key, value in batch.items()
            if key in keep or any(isinstance(leaf, Tensor) for leaf in leaves(value))
        }
    return batch


def _shape(leaf: Any) -> Any:
    return (leaf.shape[1:], leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _concatenate(batches: list[Batch]) -> Batch:
    columns = [[leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)] for batch in batches]
    joined = iter([torch.cat(parts) for parts in zip(*columns, strict=True)])
    return map_leaves(lambda leaf: next(joined) if isinstance(leaf, Tensor) else leaf, batches[0])
