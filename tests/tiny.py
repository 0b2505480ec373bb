"""A tiny experiment that every test of the machine can afford: 60 training samples, 83 parameters, float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch.utils.data import TensorDataset

import influence_pipeline as ip
from influence_pipeline import plan
from influence_pipeline.cache import Group
from influence_pipeline.cache.writing import BlockWriting
from stages.stage import Block

ROWS, TESTS, SCORED, SUMMED = 16, 4, 4, 30
"""Rows of a block of gradients, of solutions, of scores and of sums after :func:`shrink_blocks`."""


SECTIONS = ("grad_z", "s_test", "influence", "runtime")


def shrink_blocks() -> None:
    """Make grids of many small blocks, as large experiments have."""
    plan.MOST_ROWS, plan.MOST_TESTS, plan.MOST_SCORED_TESTS, plan.LEAST_SUMMED = ROWS, TESTS, SCORED, SUMMED


def points(count: int, seed: int) -> TensorDataset:
    """Return samples (6 numbers, one of 3 labels); the first of a larger set are those of a smaller one."""
    rows = [torch.randn(6, generator=torch.Generator().manual_seed(1000 * seed + row)) for row in range(count)]
    inputs = torch.stack(rows)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long())


def model(seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    made = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return made


def experiment(**changes: Any) -> ip.Experiment:
    """Return the experiment, with some of its arguments changed."""
    arguments = {
        "model": model,
        "task": ip.Classification(l2=0.01),
        "train": points(60, 1),
        "tests": {"holdout": points(10, 2)},
    }
    return ip.Experiment(**{**arguments, **changes})


def settings(**sections: dict[str, Any]) -> ip.Settings:
    """Return settings under which scores, too, are cut into many blocks, and λ is not "auto"; sections add to them."""
    basis: dict[str, Any] = {"influence": {"top_k": 1}, "runtime": {"progress": False, "device": "cpu"}}
    if sections.get("s_test", {}).get("solver") != "identity":
        basis["s_test"] = {"damping": {"relative": 0.1}}
    return ip.Settings(**{name: {**basis.get(name, {}), **sections.get(name, {})} for name in SECTIONS})


def solved_by(settings: str, **solver: Any) -> str:
    """Return the text of a settings file of `project` with other settings of the solver."""
    lines = "".join(f"{name} = {value!r}\n" for name, value in solver.items())
    return settings.replace("[s_test]\ndamping = { relative = 0.1 }\n", f"[s_test]\n{lines}")


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def blocks(cache: Path) -> set[tuple[str, ...]]:
    """Return (stage, group, index…) of every block that has a record, as plain zarr reads them."""
    found = set()
    for path in cache.glob("*/*/blocks"):
        records = zarr.open_array(path, mode="r")[...]
        for index in np.argwhere(records.any(axis=-1)).tolist():
            found.add((path.parent.parent.name, path.parent.name, *map(str, index)))
    return found


def commit(group: Group, block: Block, values: dict[str, np.ndarray], *digests: bytes, **options: bytes) -> bool:
    """Write a block of which all values are there."""
    with BlockWriting(group, block) as writing:
        writing.add(values)
        return group.commit(block, writing, *digests, **options)
