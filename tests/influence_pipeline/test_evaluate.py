"""Scores against models that were trained again: figures, their cache, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import influence_pipeline as ip
from influence_pipeline import inventory
from influence_pipeline.cache import Cache
from influence_pipeline.evaluate import datamodeling_score, detection, leave_one_out, predicted
from influence_pipeline.evaluate.left_out import RandomSamples, RandomSubsets, listed
from tests import tiny

N, T, L2 = 40, 6, 0.05
TRAINED: list[int] = []
"""How many samples each training of this process had."""


def numbers(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, inputs.sum(1, keepdim=True) + noise)


def ridge(inputs: Tensor, targets: Tensor, weights: Tensor, total: float) -> nn.Module:
    """Minimise Σ w (xθ − y)² / total + (l2/2)·|θ|² in closed form."""
    model = nn.Linear(3, 1, bias=False).double()
    matrix = 2 / total * inputs.T @ (weights[:, None] * inputs) + L2 * torch.eye(3, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.solve(matrix, 2 / total * inputs.T @ (weights[:, None] * targets)).T)
    return model


def on_a_mean(data: Dataset[Any], seed: int) -> nn.Module:
    inputs, targets = (torch.stack(parts) for parts in zip(*(data[i] for i in range(len(data))), strict=True))
    TRAINED.append(len(inputs))
    return ridge(inputs, targets, torch.ones(len(inputs), dtype=torch.float64), len(inputs))


def on_a_sum(data: Dataset[Any], seed: int, weights: Tensor) -> nn.Module:
    inputs, targets = data.tensors
    TRAINED.append(int(weights.sum()))
    return ridge(inputs, targets, weights.double(), len(inputs))


def noisy(data: Dataset[Any], seed: int) -> nn.Module:
    """Train to something that depends on PyTorch's random numbers."""
    model = on_a_mean(data, seed)
    with torch.no_grad():
        model.weight += torch.randn(1, 3, dtype=torch.float64) / 10
    return model


def experiment(**changes: Any) -> ip.Experiment:
    train = numbers(N, 1)
    arguments = {
        "model": ridge(*train.tensors, torch.ones(N, dtype=torch.float64), N),
        "task": ip.Regression(l2=L2),
        "train": train,
        "tests": {"holdout": numbers(T, 2), "other": numbers(3, 3)},
        "retrain": on_a_mean,
    }
    return ip.Experiment(**{**arguments, **changes})


def pipeline(cache: Path, evaluate: dict[str, Any] | None = None, **changes: Any) -> ip.Pipeline:
    solver = {"solver": changes.pop("solver", "exact"), "damping": 0.0}
    settings = ip.Settings(
        grad_z={"encoding": "float32"},
        s_test={name: value for name, value in solver.items() if solver["solver"] != "identity" or name == "solver"},
        influence=changes.pop("influence", {}),
        evaluate={"subsets": 8, "leave_one_out": 5, "seeds": 1, **(evaluate or {})},
        runtime={"progress": False, "device": "cpu", "workers": changes.pop("workers", 1)},
    )
    return ip.Pipeline(experiment(**changes), cache, settings)


@pytest.fixture(autouse=True)
def nothing_trained() -> None:
    TRAINED.clear()


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_the_datamodeling_score_is_the_mean_of_spearmans_correlations() -> None:
    draw = np.random.default_rng(0)
    actual, noise = draw.standard_normal((30, 4)), draw.standard_normal((30, 4))
    guess = actual + noise
    guess[:, 3] = 1.0
    found = datamodeling_score(actual, guess)
    expected = [spearmanr(actual[:, i], guess[:, i]).statistic for i in range(3)]
    np.testing.assert_allclose(found.by_test, [*expected, 0.0], atol=1e-12)
    assert found.mean == pytest.approx(sum(expected) / 4)
    assert found.low < found.mean < found.high


def test_the_interval_is_narrower_with_more_subsets() -> None:
    draw = np.random.default_rng(0)
    widths = []
    for subsets in (20, 500):
        actual = draw.standard_normal((subsets, 3))
        found = datamodeling_score(actual, actual + draw.standard_normal((subsets, 3)))
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 2


def test_leave_one_out_is_pearsons_correlation_of_all_pairs_with_its_slope() -> None:
    draw = np.random.default_rng(0)
    guess = draw.standard_normal((20, 3))
    actual = 1.5 * guess + draw.standard_normal((20, 3)) / 10
    found = leave_one_out(actual, guess, list(range(20)))
    assert found.pearson == pytest.approx(pearsonr(actual.ravel(), guess.ravel()).statistic)
    assert found.slope == pytest.approx(1.5, abs=0.03)
    assert found.by_test[1] == pytest.approx(pearsonr(actual[:, 1], guess[:, 1]).statistic)


@pytest.mark.parametrize("ties", [False, True])
def test_detection_is_the_area_under_the_curve_and_the_part_that_is_found_first(ties: bool) -> None:
    draw = np.random.default_rng(0)
    wrong = draw.random(200) < 0.1
    suspicion = draw.standard_normal(200) + 2 * wrong
    if ties:
        suspicion = suspicion.round()
    found = detection(suspicion, wrong)
    assert found.auc == pytest.approx(roc_auc_score(wrong, suspicion))
    first = np.argsort(-suspicion, kind="stable")[:20]
    assert found.found[1] == pytest.approx(wrong[first].sum() / wrong.sum())


# ---- what is predicted -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retrain", [on_a_mean, on_a_sum])
def test_what_is_predicted_is_the_first_step_towards_the_other_objective(
    cache: Path, retrain: Callable[..., nn.Module]
) -> None:
    made = pipeline(cache, retrain=retrain)
    influences = made.run("holdout")["holdout"]
    inputs, targets = made.experiment.train.tensors
    tests, wanted = made.experiment.test("holdout").tensors
    theta = made.experiment.model.weight.detach().T
    left_out = RandomSubsets(4, N, 0.5, 0)
    found = predicted(influences, left_out, weighted=retrain is on_a_sum)
    hessian = 2 / N * inputs.T @ inputs + L2 * torch.eye(3, dtype=torch.float64)
    for number in range(4):
        kept = sorted(set(range(N)) - set(left_out[number]))
        total = N if retrain is on_a_sum else len(kept)
        part, error = inputs[kept], inputs[kept] @ theta - targets[kept]
        step = -torch.linalg.solve(hessian, 2 / total * part.T @ error + L2 * theta)
        change = (2 * (tests @ theta - wanted) * (tests @ step)).flatten()
        np.testing.assert_allclose(found[number], change.numpy(), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("retrain", [on_a_mean, on_a_sum])
def test_scores_of_a_quadratic_problem_agree_with_retraining(cache: Path, retrain: Callable[..., nn.Module]) -> None:
    settings = {"subsets": 40, "share": 0.8, "leave_one_out": N}
    found = pipeline(cache, settings, retrain=retrain).evaluate("holdout")["holdout"]
    assert found.lds is not None
    assert found.lds.mean > 0.9
    assert found.leave_one_out is not None
    assert found.leave_one_out.pearson > 0.98
    assert found.leave_one_out.slope == pytest.approx(1.1, abs=0.12)
    assert sorted(found.leave_one_out.samples.tolist()) == list(range(N))


def test_wrong_labels_and_curves(cache: Path) -> None:
    train = numbers(N, 1)
    train.tensors[1][:4] += 12.0
    changes = {"train": train, "mislabelled": [0, 1, 2, 3]}
    changes["model"] = ridge(*train.tensors, torch.ones(N, dtype=torch.float64), N)
    settings = {"subsets": 0, "leave_one_out": 0, "shares": (0.1, 0.5), "self_influence": True}
    found = pipeline(cache, settings, **changes).evaluate("holdout")["holdout"]
    assert found.lds is None
    assert found.mislabelled["training loss"].auc == 1.0
    assert found.mislabelled["self-influence"].auc > 0.95
    assert found.mislabelled["training loss"].found[1] == 1.0
    curves = {curve.trained: curve for curve in found.curves}
    assert curves["without the most harmful"].shares == (0.1, 0.5)
    at_random, alone = curves["without random samples"].measurement, curves["with random samples alone"].measurement
    assert curves["without the most harmful"].measurement[0] < at_random[0]
    assert curves["without the most helpful"].measurement[1] > at_random[1]
    assert curves["with the most helpful alone"].measurement[1] < alone[1]
    assert sorted(TRAINED) == [4, 4, 20, 20, 20, 20, 20, 36, 36, 36]
    assert all(np.isnan(curve.accuracy).all() for curve in curves.values())


def test_the_samples_with_the_largest_scores_are_left_out_where_that_is_asked_for(cache: Path) -> None:
    made = pipeline(cache, {"subsets": 0, "by": "influence", "leave_one_out": 3})
    found = made.evaluate("holdout")["holdout"]
    size = np.abs(made.influence("holdout").scores[:]).sum(axis=0)
    assert found.leave_one_out is not None
    np.testing.assert_array_equal(found.leave_one_out.samples, np.argsort(-size)[:3])


def test_accuracy_is_that_of_the_retrained_model(cache: Path) -> None:
    def tiny_model(data: Dataset[Any], seed: int) -> nn.Module:
        return tiny.model(seed + 5)

    made = ip.Pipeline(tiny.experiment(retrain=tiny_model), cache, tiny.settings())
    found = made.retrained("holdout", [[0], [1, 2]], seeds=2)
    inputs, labels = tiny.points(10, 2).tensors
    for seed in range(2):
        outputs = tiny.model(seed + 5)(inputs)
        right = (outputs.argmax(1) == labels).float()
        losses = nn.functional.cross_entropy(outputs, labels, reduction="none")
        for number in range(2):
            np.testing.assert_array_equal(found.correct[seed, number], right.numpy())
            np.testing.assert_allclose(found.values[seed, number], losses.detach().numpy(), rtol=1e-5)


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_each_model_is_trained_once_for_all_solvers_and_test_sets(cache: Path) -> None:
    pipeline(cache).evaluate()
    assert sorted(TRAINED) == [N // 2] * 8 + [N - 1] * 5 + [N]
    TRAINED.clear()
    pipeline(cache).evaluate()
    pipeline(cache, solver="identity").evaluate()
    assert TRAINED == []
    pipeline(cache, {"subsets": 10}).evaluate()
    assert TRAINED == [N // 2] * 2
    TRAINED.clear()
    fewer = pipeline(cache).evaluate("other")["other"]
    assert fewer.lds is not None
    assert TRAINED == []


def test_fewer_subsets_than_are_cached_give_the_figures_of_so_many(cache: Path, tmp_path: Path) -> None:
    pipeline(cache, {"subsets": 12}).evaluate("holdout")
    fewer, alone = (pipeline(folder).evaluate("holdout")["holdout"] for folder in (cache, tmp_path / "alone"))
    assert str(fewer) == str(alone)


@pytest.mark.parametrize("change", ["seeds", "share", "retrain", "l2", "data"])
def test_what_changes_the_models_trains_them_anew(cache: Path, change: str) -> None:
    pipeline(cache).evaluate("holdout")
    TRAINED.clear()
    changes: dict[str, Any] = {"retrain": {"retrain": noisy}, "l2": {"task": ip.Regression(l2=0.1)}}.get(change, {})
    if change == "data":
        shutil.rmtree(cache / "grad_z")
        shutil.rmtree(cache / "curvature")
        train = numbers(N, 1)
        train.tensors[1][0] += 1
        changes = {"train": train}
    settings = {"seeds": {"seeds": 2}, "share": {"share": 0.6}}.get(change, {})
    pipeline(cache, settings, **changes).evaluate("holdout")
    assert len(TRAINED) == (8 if change == "share" else 14)


def test_an_interrupted_evaluation_goes_on_to_the_same_bytes(cache: Path, tmp_path: Path) -> None:
    def interrupting(data: Dataset[Any], seed: int) -> nn.Module:
        if len(TRAINED) == 4:
            raise KeyboardInterrupt
        return noisy(data, seed)

    interrupting.__qualname__ = noisy.__qualname__
    whole = tmp_path / "whole"
    pipeline(whole, retrain=noisy).evaluate("holdout")
    TRAINED.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("influence_pipeline.evaluate.truth._identity_of", lambda function: {"function": "noisy"})
        with pytest.raises(KeyboardInterrupt):
            pipeline(cache, retrain=interrupting).evaluate("holdout")
        assert len(TRAINED) == 4
        pipeline(cache, retrain=noisy).evaluate("holdout")
        assert len(TRAINED) == 14

    def weights(folder: Path) -> list[np.ndarray]:
        return sorted((g.array("weights")[:] for g in Cache(folder).groups("retrained")), key=lambda a: a.tobytes())

    for first, second in zip(weights(whole), weights(cache), strict=True):
        np.testing.assert_array_equal(first, second)


def test_random_numbers_are_those_of_the_seed_and_go_on_as_before(cache: Path) -> None:
    made = pipeline(cache, retrain=noisy)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    found = made.retrained("holdout", [[], []], seeds=2)
    np.testing.assert_array_equal(before, torch.random.get_rng_state())
    np.testing.assert_array_equal(found.values[:, 0], found.values[:, 1])
    assert (found.values[0] != found.values[1]).any()


@pytest.mark.usefixtures("new_workers")
def test_two_workers_train_the_models_of_one(cache: Path, tmp_path: Path) -> None:
    one = pipeline(tmp_path / "one", retrain=noisy).evaluate("holdout")["holdout"]
    two = pipeline(cache, retrain=noisy, workers=2).evaluate("holdout")["holdout"]
    assert str(one) == str(two)


def test_how_many_models_are_missing_is_told_after_the_first(cache: Path) -> None:
    told: list[str] = []
    pipeline(cache).evaluate("holdout", told=told.append)
    assert len(told) == 1
    assert told[0].startswith("12 models are to be trained: about ")
    told.clear()
    pipeline(cache).evaluate("holdout", told=told.append)
    assert told == []


def test_retrained_models_are_listed_verified_and_kept(cache: Path) -> None:
    made = pipeline(cache)
    made.evaluate("holdout")
    assert "without kind random subsets, samples 40, share 0.5, seed 0" in "\n".join(inventory.listed(Cache(cache)))
    assert made.verify().exit_code == 0
    assert made.garbage() == []
    file = min(cache.glob("retrained/*/weights/c/0/0"))
    file.write_bytes(bytes(len(file.read_bytes())))
    assert made.verify().exit_code == 1
    TRAINED.clear()
    made.evaluate("holdout")
    assert len(TRAINED) == 1


def test_a_damaged_model_that_is_read_is_trained_again_at_once(cache: Path) -> None:
    found = pipeline(cache).evaluate("holdout")["holdout"]
    for file in cache.glob("retrained/*/weights/c/0/0"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 255
        file.write_bytes(content)
    shutil.rmtree(next(cache.glob("measured/holdout-*")).parent)
    TRAINED.clear()
    assert str(pipeline(cache).evaluate("holdout")["holdout"]) == str(found)
    assert len(TRAINED) == 3


# ---- which are left out ----------------------------------------------------------------------------------------------


def test_random_subsets_have_their_share_and_are_the_same_whatever_their_number() -> None:
    few, many = RandomSubsets(2, 30, 0.4, 7), RandomSubsets(9, 30, 0.4, 7)
    assert [few[i] for i in range(2)] == [many[i] for i in range(2)]
    assert all(len(set(many[i])) == 18 for i in range(9))
    assert many[3] != many[4]
    assert sorted(RandomSamples(30, 30, 0)[i][0] for i in range(30)) == list(range(30))
    assert listed([[3, 1, 3]])[0] == (1, 3)


# ---- what is refused -------------------------------------------------------------------------------------------------


def other_model(data: Dataset[Any], seed: int) -> nn.Module:
    return nn.Linear(4, 1, bias=False).double()


def diverged(data: Dataset[Any], seed: int) -> nn.Module:
    model = nn.Linear(3, 1, bias=False).double()
    nn.init.constant_(model.weight, torch.nan)
    return model


def raises(data: Dataset[Any], seed: int) -> nn.Module:
    raise ValueError("no such optimiser")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retrain": None}, "does not say how"),
        ({"retrain": other_model}, r"another one than the experiment's: weight \[1, 3\], weight \[1, 4\]"),
        ({"retrain": diverged}, "numbers in weight that are not finite"),
        ({"retrain": raises}, "no such optimiser"),
        ({"retrain": lambda data, seed: 3}, "must return a torch.nn.Module, got int"),
        ({"influence": {"store_scores": False}}, "scores were not stored"),
        ({"mislabelled": [N]}, r"\[40\] are ids of no training sample"),
        ({"mislabelled": []}, "not all labels, nor none"),
        ({"evaluate": {"leave_one_out": N + 1}}, "leave_one_out = 41, and there are 40"),
        ({"evaluate": {"subsets": 0, "leave_one_out": 0}}, "nothing to evaluate"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(cache: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ip.RequestError, match=message):
        pipeline(cache, **changes).evaluate("holdout")


def test_retrain_must_be_a_function() -> None:
    with pytest.raises(ip.RequestError, match="retrain must be a function"):
        experiment(retrain=3)


# ---- the command line ------------------------------------------------------------------------------------------------

EXPERIMENT = """\
from tests.influence_pipeline import test_evaluate


def experiment():
    return test_evaluate.experiment()
"""
SETTINGS = """\
experiment = "experiment.py:experiment"
cache = "runs"
[s_test]
solver = "exact"
[evaluate]
subsets = 5
seeds = 1
leave_one_out = 2
[runtime]
device = "cpu"
progress = false
"""


def test_the_command_prints_the_figures_and_writes_all(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from influence_pipeline.cli import app

    (tmp_path / "experiment.py").write_text(EXPERIMENT)
    (tmp_path / "settings.toml").write_text(SETTINGS)
    order = ["evaluate", str(tmp_path / "settings.toml"), "--tests", "holdout", "--out", str(tmp_path / "found.json")]
    result = CliRunner().invoke(app, order)
    assert result.exit_code == 0, result.output
    assert "holdout: 6 tests × 40 training samples, exact, λ = " in result.output
    assert "LDS 0." in result.output
    assert "leave-one-out: Pearson" in result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["lds"]["by_test"]) == T
    assert np.shape(found["leave_one_out"]["actual"]) == (2, T)
    result = CliRunner().invoke(app, [*order[:2], "--out", str(tmp_path / "found.json")])
    assert result.exit_code == 2
    assert "--out is for one test set" in result.output
