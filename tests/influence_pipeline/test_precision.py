"""Models in half precision: computed as they are, accumulated in single precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import influence_pipeline as ip
from influence_pipeline.experiment import Experiment
from stages.grad_z import hooks, loop, vmap
from stages.grad_z.choose import Technique, relative_difference
from stages.grad_z.fidelity import spearman
from stages.parameters import ModelFunction
from tests import tiny


class Autocast(nn.Module):
    """The tiny model, computed in bfloat16, with parameters in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny.model()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(x)


class Converted(nn.Module):
    """The tiny model with its parameters in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny.model().bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.bfloat16())


MODELS = [Autocast, Converted]


def by_hooks(function: ModelFunction, values: object, batch: object) -> tuple[Tensor, Tensor]:
    found, results, unfit = hooks.gradients(function, function.losses, batch, frozenset(function.params))
    assert not unfit
    return found, results


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("technique", [by_hooks, vmap.gradients, loop.gradients])
def test_gradients_in_half_precision_are_near_those_in_single(technique: Technique, model: type[nn.Module]) -> None:
    batch, task = tiny.points(12, 1).tensors, ip.Classification()
    of = [ModelFunction(made, task, ["*"], torch.device("cpu")) for made in (model(), tiny.model())]
    found, _ = technique(of[0], of[0].losses, batch)
    expected, _ = loop.gradients(of[1], of[1].losses, batch)
    assert found.dtype == torch.float32
    assert relative_difference(found, expected) < 0.05


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_scores_in_half_precision_rank_as_those_in_single(
    tmp_path: Path, model: Callable[[], nn.Module], curvature: str, caplog: pytest.LogCaptureFixture
) -> None:
    def scores(experiment: Experiment, name: str) -> list[list[float]]:
        solver = {"solver": "cg", "damping": 1.0, "curvature": curvature, "tolerance": 0.01}
        runtime = {"device": "cpu", "progress": False}
        pipeline = ip.Pipeline(
            experiment, tmp_path / name, ip.Settings(s_test=solver, runtime=runtime, influence={"top_k": 5})
        )
        found: list[list[float]] = pipeline.run()["holdout"].scores[:]
        return found

    pairs = zip(scores(tiny.experiment(), "single"), scores(tiny.experiment(model=model), "half"), strict=True)
    assert min(spearman(a, b) for a, b in pairs) > 0.95
    assert "is not used" not in caplog.text
