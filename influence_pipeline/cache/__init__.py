"""The cache: one Zarr v3 hierarchy that any Zarr reader opens. The only place that imports zarr.

::

    <cache>/
        grad_z/<key>/           gradients (sample, coordinate) · scale · norm, loss, label, digests · blocks
        curvature/<key>/        what a solver prepares once
        s_test/<set>-<key>/     vectors (test, coordinate) · residual, iterations, … · blocks
        influence/<set>-<key>/  scores (test, sample) · helpful_ids, … (test, rank) · offset · … · blocks
"""

from __future__ import annotations

import fcntl
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zarr

from influence_pipeline.cache.group import Group, Layout
from influence_pipeline.cache.identity import Identity, differences, key_of, nearest
from influence_pipeline.errors import CacheDamaged, CacheMismatch, RequestError, WorkError

FORMAT = 1
STAGES = ("grad_z", "curvature", "s_test", "influence")

__all__ = ["FORMAT", "STAGES", "Cache", "Group", "Layout", "differences", "key_of", "nearest"]


class Cache:
    """A cache's root folder."""

    def __init__(self, path: Path | str) -> None:
        """Name a cache; nothing is read or written.

        Raises:
            CacheDamaged: the folder's description cannot be read.
            CacheMismatch: the folder is a cache of another format.
            RequestError: the folder holds something else.
        """
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise RequestError(f"cache {self.path} is a file: name a folder")
        if (self.path / "zarr.json").exists():
            try:
                attributes = dict(zarr.open_group(self.path, mode="r").attrs)
            except Exception as error:
                raise CacheDamaged(
                    f"{self.path}/zarr.json cannot be read ({error}): delete that file and run again"
                ) from error
            if attributes.get("influence_pipeline") != FORMAT:
                raise CacheMismatch(
                    f"cache {self.path} has format {attributes.get('influence_pipeline', 'of something else')}, "
                    f"this is format {FORMAT}: name another folder"
                )
        elif self.path.exists() and any(
            p for p in self.path.iterdir() if p.name not in STAGES and not p.name.endswith(".partial")
        ):
            raise RequestError(f"cache {self.path} is a folder with other things in it: name a new one")

    @property
    def exists(self) -> bool:
        """Whether anything was ever cached here."""
        return (self.path / "zarr.json").exists()

    def groups(self, stage: str) -> Iterator[Group]:
        """Yield all groups of a stage."""
        folder = self.path / stage
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if (path / "zarr.json").exists():
                yield Group(path)

    def find(self, stage: str, name: str) -> Group | None:
        """Return a group by its name, None where there is none."""
        path = self.path / stage / name
        return Group(path) if (path / "zarr.json").exists() else None

    def create(self, stage: str, name: str, layout: Layout, attributes: Mapping[str, Any]) -> Group:
        """Return a group by its name, laid out anew where there is none.

        Raises:
            WorkError: the folder cannot be written.
        """
        try:
            self._found()
            with self._lock():
                if not (self.path / stage / "zarr.json").exists():
                    zarr.create_group(self.path / stage)
                return Group.create(self.path / stage / name, layout, attributes)
        except OSError as error:
            raise WorkError(f"cache {self.path} cannot be written: {error}") from error

    def remove(self, group: Group) -> None:
        """Remove a group, in one step for whoever looks."""
        with self._lock():
            aside = self.path / f"{group.path.name}.removed.partial"
            group.path.rename(aside)
            shutil.rmtree(aside)

    def _found(self) -> None:
        """Make the root where there is none; of several processes that try, one does.

        Raises:
            OSError: the folder cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.exists:
            return
        aside = self.path / f"{uuid.uuid4().hex}.partial"
        zarr.create_group(aside, attributes={"influence_pipeline": FORMAT})
        try:
            (self.path / "zarr.json").hardlink_to(aside / "zarr.json")
        except OSError:
            if not self.exists:
                raise
        shutil.rmtree(aside, ignore_errors=True)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Be the only process that adds or removes groups, after removing what a killed one left half laid out."""
        with open(self.path / "zarr.json", "rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            for folder in (self.path, *(self.path / stage for stage in STAGES)):
                for path in folder.glob("*.partial"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            yield


def group_name(set_name: str | None, identity: Identity) -> str:
    """Return the folder name of a group: its key, after the name of the test set where it has one."""
    key = key_of(identity)
    return f"{set_name}-{key}" if set_name else key
