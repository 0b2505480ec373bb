"""Corrected scores through the whole pipeline: exact where the Newton step is, kept by identity, refused by numbers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import influence_pipeline as ip
from influence_pipeline import inventory
from influence_pipeline.cache import Cache
from influence_pipeline.cli import app
from stages.newton import Newton
from stages.stage import Block
from tests import oracles, tiny

Make = Callable[..., ip.Pipeline]
CORRECTED: dict[str, Any] = {
    "s_test": {"solver": "exact", "damping": 0.01},
    "influence": {"top_k": 1, "correction": "newton"},
}


def stages(cache: Path) -> set[str]:
    return {path.parent.parent.name for path in cache.glob("*/*/zarr.json")}


def group(cache: Path, stage: str = "newton") -> Path:
    [path] = cache.glob(f"{stage}/*/zarr.json")
    return path.parent


# ---- what the numbers claim ------------------------------------------------------------------------------------------


class Prediction(ip.Regression):
    """Squared error; asked about is the prediction, which is linear in the parameters."""

    def measurements(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return outputs[:, 0]


def test_scores_of_a_linear_regression_are_those_of_retraining(cache: Path) -> None:
    rng = np.random.default_rng(0)
    inputs, targets, asked = rng.normal(size=(20, 4)), rng.normal(size=20), rng.normal(size=(5, 4))
    l2 = 0.02

    def trained(weights: np.ndarray) -> np.ndarray:
        """Minimise (1/N) Σ wᵢ (xᵢθ − yᵢ)² + (l2/2)|θ|²."""
        scaled = inputs * weights[:, None] * 2 / len(inputs)
        return np.linalg.solve(scaled.T @ inputs + l2 * np.eye(4), scaled.T @ targets)

    theta = trained(np.ones(20))
    truth = np.stack([asked @ (trained(1.0 - (np.arange(20) == i)) - theta) for i in range(20)], axis=1)
    model = nn.Linear(4, 1, bias=False).double()
    model.weight.data.copy_(torch.from_numpy(theta)[None])
    train = TensorDataset(torch.from_numpy(inputs), torch.from_numpy(targets))
    holdout = TensorDataset(torch.from_numpy(asked), torch.zeros(5).double())

    def errors(**influence: Any) -> float:
        settings = tiny.settings(
            grad_z={"encoding": "float32"}, s_test={"solver": "exact", "damping": 0.0}, influence=influence
        )
        experiment = ip.Experiment(model, Prediction(l2), train, {"holdout": holdout})
        scores = ip.Pipeline(experiment, cache, settings).run()["holdout"].scores[:]
        return float(np.abs(scores - truth).max() / np.abs(truth).max())

    assert errors(correction="newton") < 1e-6
    assert errors() > 0.2, "of first order they are the same: this test shows nothing"


def expected(projection: Any = None) -> np.ndarray:
    """Scores (T, N) of the Newton step by dense matrices."""
    model, task = tiny.model().double(), oracles.ClassTask(0.01)
    train, test = (
        oracles.Case("", model, task, oracles.Data((points.tensors[0].double(), points.tensors[1])))
        for points in (tiny.points(60, 1), tiny.points(10, 2))
    )
    parts, whole = oracles.sample_ggns(train), oracles.ggn(train) + 0.01 * torch.eye(len(train.theta))
    gradients = oracles.corrected(whole, parts, oracles.gradients(train))
    return (oracles.solution(whole, 0.0, oracles.gradients(test)) @ gradients.T / 60).numpy()


@pytest.mark.parametrize(("encoding", "within"), [("float32", 1e-5), ("float16", 1e-3), ("int8", 0.05)])
def test_scores_are_those_of_the_newton_step_as_gradients_are_kept(make: Make, encoding: str, within: float) -> None:
    scores = make(**CORRECTED, grad_z={"encoding": encoding}).run()["holdout"].scores[:]
    right = expected()
    np.testing.assert_allclose(scores, right, rtol=0, atol=within * np.abs(right).max())


def test_cg_gives_what_exact_does(make: Make, tmp_path: Path) -> None:
    exact = make(**CORRECTED).run()["holdout"].scores[:]
    solver = {"solver": "cg", "damping": 0.01, "tolerance": 1e-5}
    scores = make(tmp_path / "cg", **{**CORRECTED, "s_test": solver}).run()["holdout"].scores[:]
    np.testing.assert_allclose(scores, exact, rtol=0, atol=1e-3 * np.abs(exact).max())


def test_parts_by_parameter_add_up_to_corrected_scores(make: Make) -> None:
    influences = make(**CORRECTED).run()["holdout"]
    parts = influences.by_parameter(influences.train_ids)
    scores = influences.scores[:]
    np.testing.assert_allclose(sum(parts.values()), scores, rtol=0, atol=1e-5 * np.abs(scores).max())
    np.testing.assert_array_equal(influences.labels()[1], tiny.points(60, 1).tensors[1])


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_a_run_needs_no_other_gradients_and_leaves_no_garbage(make: Make, cache: Path) -> None:
    pipeline = make(**CORRECTED)
    assert [stage.stage for stage in pipeline.plan().stages] == ["curvature", "newton", "s_test", "influence"]
    pipeline.run()
    assert stages(cache) == {"curvature", "newton", "s_test", "influence"}
    before = tiny.files(cache)
    again = make(**CORRECTED)
    assert again.plan().complete
    assert again.newton().computed == 0
    again.run()
    assert tiny.files(cache) == before
    assert again.garbage() == []
    assert make().garbage() == []  # a complete result refers to all of it
    assert again.verify(sample=3).exit_code == 0
    said = "\n".join(inventory.listed(Cache(cache)))
    assert "largest leverage 0." in said
    assert f"newton {group(cache).name}" in said


def keys(pipeline: ip.Pipeline) -> dict[str, str]:
    return {stage.stage: stage.key for stage in pipeline.plan("holdout").stages}


@pytest.mark.parametrize(
    ("change", "others"),
    [
        ({"s_test": {"solver": "exact", "damping": 0.02}}, {"newton", "s_test", "influence"}),
        ({"task": ip.Classification(l2=0.02)}, {"curvature", "newton", "s_test", "influence"}),
        ({"grad_z": {"encoding": "float32"}}, {"newton", "influence"}),
        ({"influence": {"top_k": 2, "correction": "newton"}}, {"influence"}),
    ],
    ids=["damping", "l2", "encoding", "top_k"],
)
def test_a_key_covers_what_changes_corrected_gradients(make: Make, change: dict[str, Any], others: set[str]) -> None:
    before, after = keys(make(**CORRECTED)), keys(make(**{**CORRECTED, **change}))
    assert {stage for stage in before if before[stage] != after[stage]} == others


def test_a_correction_changes_no_other_key(make: Make) -> None:
    plain = keys(make(s_test=CORRECTED["s_test"]))
    corrected = keys(make(**CORRECTED))
    same = {stage for stage in corrected if plain.get(stage) == corrected[stage]}
    assert same == {"curvature", "s_test"}
    assert keys(make(s_test={"solver": "exact", "damping": 0.02}))["grad_z"] == plain["grad_z"]


def test_results_with_and_without_correction_are_told_apart(make: Make, cache: Path) -> None:
    make(**CORRECTED).run()
    make(s_test=CORRECTED["s_test"]).run()
    with pytest.raises(ip.RequestError, match="correction = newton"):
        ip.Influences.open(cache, "holdout")


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    make: Make, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "whole", **CORRECTED).run()
    parts = Newton.parts

    def interrupted(stage: Newton, block: Block, *args: Any) -> Any:
        if block.index == (2,):
            raise KeyboardInterrupt
        return parts(stage, block, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Newton, "parts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(**CORRECTED).run()
    assert make(**CORRECTED).plan()["newton"].done == 2
    make(**CORRECTED).run()
    assert tiny.files(cache) == tiny.files(tmp_path / "whole")


def test_workers_give_the_same_bytes(make: Make, cache: Path, tmp_path: Path) -> None:
    make(tmp_path / "one", **CORRECTED).run()
    make(**CORRECTED, runtime={"workers": 2}).run()
    assert tiny.files(cache) == tiny.files(tmp_path / "one")


def test_damage_is_mended_to_the_same_bytes(make: Make, cache: Path) -> None:
    make(**CORRECTED).run()
    before = tiny.files(cache)
    file = next(path for path in sorted((group(cache) / "gradients" / "c").rglob("*")) if path.is_file())
    file.write_bytes(file.read_bytes()[:-9])
    shutil.rmtree(group(cache, "influence"))
    make(**CORRECTED).run()
    assert tiny.files(cache) == before


def test_a_longer_training_set_is_corrected_anew_unless_the_curvature_is_kept(
    make: Make, cache: Path, tmp_path: Path
) -> None:
    make(**CORRECTED, train=tiny.points(48, 1)).run()
    old = np.array(ip.Influences.open(cache, "holdout").scores[:])

    def kept_by(**sections: Any) -> ip.Influences:
        pipeline = ip.Pipeline(tiny.experiment(), cache, tiny.settings(**sections), keep_curvature=True)
        return pipeline.run()["holdout"]

    kept, plain = kept_by(**CORRECTED), kept_by(s_test=CORRECTED["s_test"])
    np.testing.assert_array_equal(kept.scores[:, :48], old)
    np.testing.assert_allclose(kept.scores[:, 48:], plain.scores[:, 48:], rtol=1e-3)
    make(**CORRECTED).run()
    fresh = make(tmp_path / "fresh", **CORRECTED).run()["holdout"].scores[:]
    np.testing.assert_array_equal(make(**CORRECTED).run()["holdout"].scores[:], fresh)


def test_changed_samples_are_corrected_anew(make: Make, cache: Path, tmp_path: Path) -> None:
    make(**CORRECTED).run()
    changed = tiny.points(60, 1)
    changed.tensors[0][3] += 1
    with pytest.raises(ip.CacheMismatch, match="3"):
        make(**CORRECTED, train=changed).accept_data()
    pipeline = make(**CORRECTED, train=changed)
    assert pipeline.refresh() == {"train": [3]}
    fresh = make(tmp_path / "fresh", **CORRECTED, train=changed).run()["holdout"].scores[:]
    np.testing.assert_array_equal(pipeline.run()["holdout"].scores[:], fresh)


def test_samples_that_changed_for_nobody_are_accepted(make: Make, cache: Path) -> None:
    make(**CORRECTED).run()
    changed = tiny.points(60, 1)
    changed.tensors[0][3] += 1e-6
    assert make(**CORRECTED, train=changed).accept_data() == {"train": [3]}
    assert make(**CORRECTED, train=changed).plan().complete


def test_a_plan_measures_it(make: Make) -> None:
    plan = make(**CORRECTED).plan(measure=True)
    assert plan["newton"].timing is not None
    assert plan["newton"].done == 2
    assert all(stage.timing is not None for stage in plan.stages)


# ---- asked for alone, and refused ------------------------------------------------------------------------------------


def test_scores_ask_for_it_by_a_call_and_a_command_that_exist(make: Make, project: Path) -> None:
    pipeline = make(**CORRECTED)
    with pytest.raises(ip.MissingStage, match=r"newton is not complete: 4 of 4 .* pipeline.newton\(\), or `influence"):
        pipeline.influence("holdout")
    assert pipeline.newton().computed == 4
    with pytest.raises(ip.MissingStage, match="s_test of holdout"):
        pipeline.influence("holdout")
    text = project.read_text().replace("top_k = 1", 'top_k = 1\ncorrection = "newton"')
    project.write_text(tiny.solved_by(text, solver="exact"))
    for command in ("newton", "s-test", "influence"):
        result = CliRunner().invoke(app, [command, str(project)])
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"s_test": {"solver": "identity"}}, 'solver = "identity" has no H'),
        ({"s_test": {"solver": "lissa"}}, 'solver = "lissa" is less precise'),
        ({"s_test": {"solver": "cg", "sample": 20}}, "sample = 20: H must be of all training samples"),
        ({"grad_z": {"store": False}}, "store = false keeps none"),
    ],
    ids=["identity", "lissa", "sample", "store"],
)
def test_settings_that_cannot_be_corrected_are_refused(sections: dict[str, Any], why: str) -> None:
    with pytest.raises(ip.RequestError, match=f'influence.correction = "newton": .*{why}'):
        tiny.settings(**{**CORRECTED, **sections})


def test_outputs_times_coordinates_beyond_the_memory_are_refused_with_numbers(cache: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 4000))
    data = tiny.points(8, 1)
    experiment = ip.Experiment(model, ip.Classification(0.1), data, {"holdout": data})
    runtime = {"memory": "512 MiB"}
    settings = tiny.settings(influence={"top_k": 1, "correction": "newton"}, runtime=runtime)
    with pytest.raises(ip.RequestError, match=r"4000 outputs × 12014 coordinates, needs .* GiB; runtime.memory is 512"):
        ip.Pipeline(experiment, cache, settings).run()
    assert not cache.exists(), "it is refused before anything is computed"


def test_without_a_correction_there_is_nothing_to_correct(make: Make) -> None:
    with pytest.raises(ip.RequestError, match="no correction is asked for"):
        make().newton()
