"""The cache: one Zarr v3 hierarchy that any Zarr reader opens. The only place that imports zarr.

::

    <cache>/
        grad_z/<key>/           gradients (sample, coordinate) · scale · norm, loss, label, digests · blocks
        curvature/<key>/        what a solver prepares once · digests
        newton/<key>/           as grad_z, corrected · leverage, residual
        s_test/<set>-<key>/     vectors (test, coordinate) · residual, iterations, … · digests · blocks
        influence/<set>-<key>/  scores (test, sample) · helpful_ids, … (test, rank) · offset · … · blocks
        combined/<set>-<key>/   as influence, of the scores of several models
        self_influence/<key>/   self_influence, change, residual, … (sample) · blocks
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numcodecs.blosc

from influence_pipeline.cache import claims
from influence_pipeline.cache.group import Group
from influence_pipeline.cache.identity import Identity, differences, key_of, nearest, told_apart
from influence_pipeline.cache.layout import DESCRIPTION, GROUP, Layout, array_bytes, sealed, write_description
from influence_pipeline.cache.objects import refuse_unreachable
from influence_pipeline.cache.store import files_at
from influence_pipeline.errors import CacheDamaged, CacheMismatch, RequestError, WorkError
from influence_pipeline.location import Location, ObjectPath, located, without_secrets

FORMAT = 5
STAGES = ("grad_z", "curvature", "s_test", "influence")
"""What a run goes through."""
GROUND_TRUTH = ("retrained", "measured")
FOLDERS = (*STAGES, "combined", "self_influence", "newton", *GROUND_TRUTH)
"""All that may be cached: the stages of a run, and what is computed when it is asked for."""
ALONE = "layout.claim"
LEFTOVERS = ("*.partial", "*/zarr.*.partial", "*/*/zarr.*.partial")

log = logging.getLogger(__name__)

__all__ = [
    "DESCRIPTION",
    "FOLDERS",
    "FORMAT",
    "GROUND_TRUTH",
    "STAGES",
    "Cache",
    "Group",
    "Layout",
    "array_bytes",
    "differences",
    "key_of",
    "leave_no_lock",
    "nearest",
    "told_apart",
]


class Cache:
    """A cache's root folder."""

    def __init__(self, path: Location | str) -> None:
        """Name a cache; nothing is written.

        Raises:
            CacheDamaged: the folder's description cannot be read.
            CacheMismatch: the folder is a cache of another format.
            RequestError: the folder holds something else, or cannot be used.
        """
        try:
            self.path = located(path)
        except ValueError as error:
            raise RequestError(f"cache {without_secrets(repr(path))} is no path: {error}") from None
        self._files = files_at(self.path)
        if isinstance(self.path, ObjectPath):
            refuse_unreachable(self.path)
        else:
            _refuse_no_folder(self.path)
        if self.exists:
            attributes = _described(self.path)
            if attributes.get("influence_pipeline") != FORMAT:
                raise CacheMismatch(
                    f"cache {self.path} has format {attributes.get('influence_pipeline', 'of something else')}, "
                    f"this is format {FORMAT}: name another folder"
                )
        elif any(
            name not in (*FOLDERS, ALONE, DESCRIPTION) and not name.endswith(".partial")
            for name in self._files.names("")
        ):
            raise RequestError(f"cache {self.path} is a folder with other things in it: name a new one")

    @property
    def exists(self) -> bool:
        """Whether anything was ever cached here."""
        return self._files.exists(DESCRIPTION)

    def mend(self) -> list[str]:
        """Write damaged descriptions of stages' folders anew; return what was wrong with them.

        Raises:
            OSError: the disk refused.
        """
        if not self._damaged_stages():
            return []
        with self.alone():
            damaged = self._damaged_stages()  # not one that somebody was just making
            self._mend_stages(set(damaged))
        return [f"{self.path / stage / DESCRIPTION} was damaged" for stage in damaged]

    def _damaged_stages(self) -> list[str]:
        return [stage for stage in FOLDERS if files_at(self.path / stage).there and not self._is_described(stage)]

    def _mend_stages(self, stages: set[str]) -> None:
        for stage in stages:
            if not self._is_described(stage):
                write_description(self._files, f"{stage}/{DESCRIPTION}", GROUP)

    def _is_described(self, stage: str) -> bool:
        try:
            sealed(self.path / stage / DESCRIPTION)
        except CacheDamaged:
            return False
        return True

    def tidy(self) -> None:
        """Remove what a killed process left half laid out, where that can be done."""
        with contextlib.suppress(OSError):
            self.mend()
            if self._leftovers() or self._files.exists(ALONE):
                claim = claims.take(self.path / ALONE)
                if claim is not None:
                    with claim:
                        self._clear()

    def _leftovers(self) -> list[str]:
        return self._files.leftovers(*LEFTOVERS, *(f"{stage}/{depth}" for stage in FOLDERS for depth in LEFTOVERS))

    def groups(self, stage: str) -> Iterator[Group]:
        """Yield all groups of a stage whose descriptions can be read."""
        for path in self.paths(stage):
            try:
                yield Group(path)
            except CacheDamaged as error:
                log.warning("%s", error)

    def paths(self, stage: str) -> list[Location]:
        """Return the folders of all groups of a stage."""
        return files_at(self.path / stage).folders()

    def find(self, stage: str, name: str) -> Group | None:
        """Return a group by its name, None where there is none.

        Raises:
            CacheDamaged: its description is damaged.
            RequestError: the name is none of a group's.
        """
        if stage not in FOLDERS or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise RequestError(f"{stage}/{name} is no name of arrays in a cache")
        path = self.path / stage / name
        try:
            return Group(path)
        except CacheDamaged:
            if files_at(path).there:
                raise
        return None

    def create(self, stage: str, name: str, layout: Layout, attributes: Mapping[str, Any]) -> Group:
        """Return a group by its name: laid out anew where there is none, mended where its descriptions are damaged.

        Raises:
            WorkError: the folder cannot be written.
        """
        try:
            try:
                return self._create(stage, name, layout, attributes)
            except FileNotFoundError:
                # What was half laid out is gone: this process stood still for so long that it was taken for dead.
                return self._create(stage, name, layout, attributes)
        except OSError as error:
            raise WorkError(f"cache {self.path} cannot be written: {error}") from error

    def _create(self, stage: str, name: str, layout: Layout, attributes: Mapping[str, Any]) -> Group:
        path = self.path / stage / name
        self._found()
        with self.alone():
            self._mend_stages({stage})
            if files_at(path).there:
                Group.mend(path, layout, attributes)
            return Group.create(path, layout, attributes)

    def resize(self, group: Group, layout: Layout) -> None:
        """Make a group as long as a layout that fits wants it.

        Raises:
            WorkError: the folder cannot be written.
        """
        try:
            with self.alone():
                group.resize(layout)
        except OSError as error:
            raise WorkError(f"cache {self.path} cannot be written: {error}") from error

    def remove(self, path: Location, unless: Callable[[Group], bool] = lambda group: False) -> None:
        """Remove the group in this folder, in one step for whoever looks.

        Args:
            path: its folder.
            unless: looks at the group as it is when nobody else changes it, and says whether it stays.

        Raises:
            WorkError: the folder cannot be written.
        """
        try:
            with self.alone():
                if files_at(path).there and not unless(Group(path)):
                    self._files.remove_folder(f"{path.parent.name}/{path.name}", DESCRIPTION)
        except OSError as error:
            raise WorkError(f"{path} cannot be removed: {error}") from error

    def _found(self) -> None:
        """Make the root where there is none; whoever else does so makes the same.

        Raises:
            OSError: the folder cannot be written.
        """
        self._files.found()
        if not self.exists:
            write_description(self._files, DESCRIPTION, {**GROUP, "attributes": {"influence_pipeline": FORMAT}})

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only process that lays out, grows, mends or removes, after removing what a killed one left of that.

        Raises:
            OSError: the folder cannot be written.
        """
        with claims.exclusively(self.path / ALONE):
            self._clear()
            yield

    def _clear(self) -> None:
        for name in self._leftovers():
            self._files.clear(name)


def _refuse_no_folder(path: Path) -> None:
    """Refuse a path at which there can be no folder.

    Raises:
        RequestError: there is something else.
    """
    try:
        path.exists()
    except OSError as error:
        raise RequestError(f"cache {path} cannot be used: {error}") from error
    if path.is_symlink() and not path.exists():
        raise RequestError(f"cache {path} is a symbolic link to nothing ({os.readlink(path)})")
    if path.exists() and not path.is_dir():
        raise RequestError(f"cache {path} is a file: name a folder")


def _described(root: Location) -> dict[str, Any]:
    """Return the attributes of a root.

    Raises:
        CacheDamaged: its description cannot be read, or is not as it was written.
    """
    path = root / DESCRIPTION
    try:
        attributes = dict(json.loads(files_at(root).read(DESCRIPTION))["attributes"])
        foreign = "influence_pipeline" not in attributes and "checksum" not in attributes
        if not foreign and attributes.keys() != {"influence_pipeline"}:  # the format before had no checksum
            sealed(path)
    except (CacheDamaged, OSError, ValueError, KeyError, TypeError) as error:
        raise CacheDamaged(f"{path} cannot be read ({error}): delete that file and run again") from error
    return attributes


def leave_no_lock() -> None:
    """Have numcodecs make its lock, one for each process, so that it does not outlive a process that is killed."""
    if "fork" in multiprocessing.get_all_start_methods():
        # Locks of this method alone have no name in the system.
        method = multiprocessing.get_start_method()
        multiprocessing.set_start_method("fork", force=True)
        numcodecs.blosc.get_mutex()
        multiprocessing.set_start_method(method, force=True)


def group_name(set_name: str | None, identity: Identity) -> str:
    """Return the folder name of a group: its key, after the name of the test set where it has one."""
    key = key_of(identity)
    return f"{set_name}-{key}" if set_name else key
