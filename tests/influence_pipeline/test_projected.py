"""Projected gradients through the whole pipeline: right numbers, identity, receipts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import influence_pipeline as ip
from influence_pipeline import inventory
from influence_pipeline.cache import Cache
from influence_pipeline.context import Context
from tests import oracles, tiny
from tests.stages.test_projection import matrix_of

DIM, DAMPING = 40, 0.1
SOLVERS: dict[str, dict[str, Any]] = {
    "identity": {"solver": "identity"},
    "exact": {"solver": "exact", "damping": DAMPING},
    "cg": {"solver": "cg", "damping": DAMPING, "tolerance": 1e-5},
}


def settings(kind: str = "kronecker", solver: str = "cg", seed: int = 0, **grad_z: Any) -> ip.Settings:
    projection = {"kind": kind, "dim": DIM, "seed": seed}
    return tiny.settings(grad_z={"projection": projection, "encoding": "float32", **grad_z}, s_test=SOLVERS[solver])


def expected(kind: str, solver: str) -> np.ndarray:
    """Scores (T, N) by the explicit matrix Φ and the dense curvature."""
    model = tiny.model().double()
    data = oracles.Data(tuple(t.double() if t.is_floating_point() else t for t in tiny.points(60, 1).tensors))
    tests = oracles.Data(tuple(t.double() if t.is_floating_point() else t for t in tiny.points(10, 2).tensors))
    case = oracles.Case("", model, oracles.ClassTask(0.01), data)
    function = Context(tiny.experiment(model=model), settings(kind)).function
    phi = matrix_of(function.coordinates)
    train, test = (oracles.gradients(oracles.Case("", model, case.task, of)) @ phi.T for of in (data, tests))
    if solver != "identity":
        without = oracles.ggn(case) - torch.diag(oracles.penalty(case))
        matrix = phi @ without @ phi.T + 0.01 * torch.eye(len(phi))
        test = oracles.solution(matrix, DAMPING, test)
    return (test @ train.T / 60).numpy()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", ["kronecker", "sparse", "dense"])
def test_scores_are_those_of_the_projected_gradients_and_curvature(cache: Path, kind: str, solver: str) -> None:
    influences = ip.Pipeline(tiny.experiment(), cache, settings(kind, solver)).run()["holdout"]
    scores, right = influences.scores[...], expected(kind, solver)
    np.testing.assert_allclose(scores, right, rtol=0, atol=2e-5 * np.abs(right).max())


def test_gradients_that_are_not_kept_are_projected_alike(cache: Path, tmp_path: Path) -> None:
    kept = ip.Pipeline(tiny.experiment(), cache, settings()).run()["holdout"]
    anew = ip.Pipeline(tiny.experiment(), tmp_path / "anew", settings(store=False)).run()["holdout"]
    np.testing.assert_allclose(anew.scores[...], kept.scores[...], rtol=0, atol=1e-6 * np.abs(kept.scores[...]).max())


def test_another_projection_is_another_set_of_gradients(cache: Path) -> None:
    ip.Pipeline(tiny.experiment(), cache, settings()).run()
    with pytest.raises(ip.CacheMismatch, match=r"projection\.seed: 0 ≠ 1"):
        ip.Pipeline(tiny.experiment(), cache, settings(seed=1)).run()
    assert "projection.kind: kronecker ≠ sparse" in str(
        ip.Pipeline(tiny.experiment(), cache, settings("sparse")).plan()
    )
    assert len({group for stage, group, *_ in tiny.blocks(cache) if stage == "grad_z"}) == 1


def test_what_products_lose_is_measured_and_shown(cache: Path) -> None:
    pipeline = ip.Pipeline(tiny.experiment(), cache, settings())
    pipeline.grad_z()
    [path] = (cache / "grad_z").glob("*/projection_fidelity")
    spearman, same = zarr.open_array(path, mode="r")[0]
    function = Context(tiny.experiment(), settings()).function
    assert 0.3 < spearman < 1
    assert 0 <= same <= 1
    assert function.projected
    assert f"products of gradients, projected against exact: Spearman {spearman:.6f}" in "\n".join(
        inventory.listed(Cache(cache))
    )


def test_too_many_coordinates_are_refused_before_anything_is_computed(cache: Path) -> None:
    pipeline = ip.Pipeline(tiny.experiment(), cache, tiny.settings(grad_z={"projection": {"dim": 83}}))
    with pytest.raises(ip.RequestError, match="dim = 83, and the selected parameters have 83 entries"):
        pipeline.plan()


@pytest.mark.parametrize(
    ("projection", "message"),
    [
        ({"kind": "kroneker", "dim": 4}, "kronecker"),
        ({"dim": 0}, "greater than 0"),
        ({"kind": "sparse"}, r"grad_z\.projection\.dim: Field required"),
        ({"dim": 4, "sed": 2}, r"grad_z\.projection\.sed: unknown setting; did you mean 'seed'"),
    ],
)
def test_a_projection_that_is_none_is_refused(projection: dict[str, Any], message: str) -> None:
    with pytest.raises(ip.RequestError, match=message):
        tiny.settings(grad_z={"projection": projection})
