"""Twelve samples and a small model of any type: what tests of odd data, models and tasks start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import influence_pipeline as ip

N, T = 12, 3
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
Y = [0, 1, 2, 1, 0, 2, 2, 1, 0, 1, 2, 0]
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]
Sample = Callable[[int], Any]


class Net(nn.Module):
    """Takes tensors, and tables that hold one; may turn whatever comes into its own type first."""

    def __init__(self, dtype: torch.dtype = torch.float32, casts: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        self.layers.to(dtype)
        self.dtype, self.casts = dtype, casts

    def forward(self, x: Any) -> Tensor:
        while not isinstance(x, Tensor):
            x = x["inner"] if isinstance(x, dict) else x[0]
        return self.layers(x.to(self.dtype) if self.casts else x)


def pipeline(
    cache: Path, sample: Sample, model: Any = Net, *, test: Sample | None = None, solver: Any = None, **more: Any
) -> ip.Pipeline:
    experiment = ip.Experiment(
        model=model,
        task=more.pop("task", None) or ip.Classification(l2=0.1),
        train=[sample(i) for i in range(N)],
        tests={"holdout": [(test or sample)(i) for i in range(T)]},
        **more,
    )
    sections: dict[str, Any] = {"runtime": {"progress": False, "device": "cpu"}}
    return ip.Pipeline(experiment, cache, ip.Settings(s_test=solver or {"solver": "identity"}, **sections))


def scores(cache: Path, sample: Sample, model: Any = Net, **more: Any) -> np.ndarray:
    """Return all scores, which must be finite and not all zero."""
    found = pipeline(cache, sample, model, **more).run()["holdout"].scores[:]
    assert found.shape == (T, N)
    assert np.isfinite(found).all()
    assert found.any()
    return found


def plain(i: int) -> Any:
    return X[i], Y[i]


def tolerance(dtype: torch.dtype) -> float:
    return 0.05 if dtype in (torch.bfloat16, torch.float16) else 1e-4


SOLVERS: list[dict[str, Any]] = [
    {"solver": "cg"},
    {"solver": "cg", "damping": 0.1, "curvature": "hessian"},
    {"solver": "exact", "damping": 0.1},
    {"solver": "lissa", "damping": 0.1},
    {"solver": "lissa", "damping": 0.1, "scale": 3.0, "batch_size": 2},
]
