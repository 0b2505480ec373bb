"""What is in a cache, and what of it may go. Needs neither model nor data."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from influence_pipeline.cache import FOLDERS, GROUND_TRUTH, Cache, Group
from influence_pipeline.cache.store import files_at
from influence_pipeline.errors import CacheDamaged, RequestError
from influence_pipeline.influences import described
from influence_pipeline.location import Location
from influence_pipeline.place import read_paths
from influence_pipeline.plan import show_bytes

RECEIPTS = {
    "gradient_norm": "distance from an optimum |ḡ + l2·θ| (influence assumes 0)",
    "mean_eigenvalue": "mean eigenvalue",
    "largest_eigenvalue": "largest eigenvalue",
    "kept_trace": "share of the trace that the low rank has",
}


def listed(cache: Cache) -> list[str]:
    """Describe everything that is cached, some lines for each set of arrays."""
    paths = [path for stage in FOLDERS for path in cache.paths(stage)]
    lines = [f"{cache.path}: " + (f"{len(paths)} sets of arrays" if paths else "nothing is cached")]
    for path in paths:
        try:
            lines += _described(Group(path))
        except (CacheDamaged, KeyError) as error:
            what = str(error) if isinstance(error, CacheDamaged) else f"its identity has no {error}"
            lines.append(f"{path.parent.name:<10} {path.name:<28} {what}")
    return lines


def _described(group: Group) -> list[str]:
    stage, name = group.path.parent.name, group.path.name
    done, total = group.progress()
    size, _, written = group.size()
    age = _age(time.time() - written)
    lines = [f"{stage:<10} {name:<28} {done:>6} / {total:<6} blocks  {show_bytes(size):>9}  written {age} ago"]
    details = [_brief(stage, group.attributes["identity"]), *_receipts(group)]
    if worker := group.at_work():
        details.append(f"being computed by {worker}")
    return [*lines, *(f"{'':<11}{text}" for text in details)]


def named(cache: Cache, key: str) -> Location:
    """Return the folder of the arrays of this name, or key, or start of a key.

    Raises:
        RequestError: there is none, or more than one.
    """
    if not cache.exists:
        raise RequestError(f"{cache.path} is no cache")
    paths = [path for stage in FOLDERS for path in cache.paths(stage)]
    found = [path for path in paths if key in (path.name, path.name.rpartition("-")[2])]
    found = found or [path for path in paths if len(key) >= 4 and path.name.rpartition("-")[2].startswith(key)]
    if len(found) != 1:
        what = f"{len(found)} sets of arrays are named" if found else "nothing is named"
        raise RequestError(f"{what} {key!r} in {cache.path}; `status` lists all names")
    return found[0]


def garbage(cache: Cache, wanted: Iterable[Location]) -> list[Location]:
    """Return the folders of arrays that nothing refers to: no complete result, and not what is wanted now.

    Self-influence stays as long as the gradients that it is of. Retrained models, and what they measure, stay: they
    are for every solver, and expensive.

    Raises:
        CacheDamaged: a description is, so that it is not known what it refers to.
    """
    keep = set(wanted)
    for stage in ("combined", "influence"):  # in this order: the former are made of the latter
        for group in map(Group, cache.paths(stage)):
            if group.finished or group.path in keep:
                keep |= {group.path, *read_paths(cache.path, group.attributes["reads"])}
    for group in map(Group, cache.paths("self_influence")):
        if cache.path / "grad_z" / group.attributes["reads"]["grad_z"] in keep:
            keep.add(group.path)
    for stage in ("s_test", "newton", "self_influence", "curvature"):  # a curvature is read by all of these
        for group in map(Group, cache.paths(stage)):
            if group.path in keep:
                keep.update(read_paths(cache.path, group.attributes["reads"]))
    folders = [stage for stage in FOLDERS if stage not in GROUND_TRUTH]
    return [path for stage in folders for path in cache.paths(stage) if path not in keep and _may_go(path)]


def _may_go(path: Location) -> bool:
    """Say whether a folder has arrays of ours, at which nobody is at work."""
    try:
        return Group(path).at_work() is None
    except CacheDamaged:
        return False


def refuse_foreign(path: Location) -> None:
    """Refuse to remove a folder that is none of ours, or that is in use.

    Raises:
        RequestError: it is.
    """
    try:
        worker = Group(path).at_work()
    except CacheDamaged as error:
        if not files_at(path / "blocks").there:
            raise RequestError(f"{path} does not look like arrays of a cache, and is left alone") from error
        worker = None
    if worker:
        raise RequestError(f"{path} is being computed by {worker}")


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{max(0, seconds):.0f} s"


def _brief(stage: str, identity: dict[str, Any]) -> str:
    """Say in a line what a set of arrays is of."""
    if stage == "influence":
        names = [name for name in ("grad_z", "newton", "s_test", "top_k") if name in identity]
        return ", ".join(f"{name} {identity[name]}" for name in names)
    if stage == "combined":
        return described(identity["combination"], identity["members"])
    if stage == "retrained":
        left_out = ", ".join(f"{name} {value}" for name, value in identity["left_out"].items())
        how = f"{identity['retrain']['function']}, seed {identity['seed']}"
        return f"train {identity['train']}, {how}, without {left_out}"
    if stage == "measured":
        return f"of the models in retrained {identity['retrained']}"
    parts = [f"train {identity['train']}", f"weights {identity['weights']}", f"loss {identity['task']['losses']}"]
    if stage in {"grad_z", "newton", "self_influence"}:
        parts.append(identity["encoding"])
    if stage in {"s_test", "newton", "self_influence"}:
        parts += [f"{name} {value}" for name, value in identity["s_test"].items()]
    if stage == "curvature":
        parts += [f"{name} {identity[name]}" for name in ("curvature", "fisher", "l2", "rank") if name in identity]
    return ", ".join(parts)


def _receipts(group: Group) -> list[str]:
    """Say what was measured on the way, of what is there already."""
    lines = []
    for name, about in RECEIPTS.items():
        value = float(group.array(name).filled(())) if name in group else math.nan
        if math.isfinite(value):
            lines.append(f"{about}: {value:.3g}")
    for name, become in (
        ("projection_fidelity", "projected"),
        ("fidelity", group.attributes["identity"].get("encoding")),
    ):
        if name in group:
            spearman, same = group.array(name).filled(0)
            if math.isfinite(spearman):
                found = f"Spearman {spearman:.6f}, {same:.1%} of the top 100 the same"
                lines.append(f"products of gradients, {become} against exact: {found}")
    if "leverage" in group:
        leverage, residual = (group.array(name).filled(...) for name in ("leverage", "residual"))
        if np.isfinite(leverage).any():
            lines.append(f"largest leverage {np.nanmax(leverage):.3g}, largest residual {np.nanmax(residual):.2g}")
    if "iterations" in group:
        residual, iterations, damping = (
            group.array(name).filled(...) for name in ("residual", "iterations", "damping")
        )
        there = np.isfinite(residual)
        if there.any():
            lines.append(
                f"λ = {damping[there][0]:.4g}, largest residual {residual[there].max():.2g}, "
                f"iterations {iterations[there].min()} to {iterations[there].max()}"
            )
    if "curvature_samples" in group and group.finished:
        over, samples = int(group.array("curvature_samples")[()]), group.array("train_ids").shape[0]
        if over != samples:
            lines.append(f"H and 1/N are of the first {over} of {samples} training samples (kept)")
    return lines
