"""Scripts of ``pytorch_influence_functions``: their config, their results, and what these mean."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

import influence_pipeline as ip
import influence_pipeline.compat as ptif

CLASSES = 3

pytestmark = pytest.mark.usefixtures("one_thread")


def noisy_points(count: int, seed: int) -> TensorDataset:
    """Return samples (2 numbers, one of 3 labels) of classes that overlap, in mixed order."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    centres = torch.tensor([[1.0, 0.0], [-0.5, 0.9], [-0.5, -0.9]])
    inputs = centres[labels] + 0.8 * torch.randn(count, 2, generator=generator)
    order = torch.randperm(count, generator=generator)
    return TensorDataset(inputs[order], labels[order])


def losses(theta: Tensor, data: TensorDataset) -> Tensor:
    """Return the loss of logistic regression for each sample, in float64."""
    logits = data.tensors[0].double() @ theta[:6].view(CLASSES, 2).T + theta[6:]
    return cross_entropy(logits, data.tensors[1], reduction="none")


def fit(data: TensorDataset, weights_MN: Tensor) -> Tensor:
    """Return the parameters at the optimum of each of M weighted mean losses, by Newton's method."""

    def objective(theta: Tensor, weights: Tensor) -> Tensor:
        return (weights * losses(theta, data)).mean()

    theta_MD = torch.zeros(len(weights_MN), 9, dtype=torch.float64)
    for _ in range(12):
        slope = vmap(grad(objective))(theta_MD, weights_MN)
        hessian = vmap(jacrev(jacrev(objective)))(theta_MD, weights_MN)
        theta_MD = theta_MD - (torch.linalg.pinv(hessian, rtol=1e-9) @ slope.unsqueeze(2)).squeeze(2)
    assert slope.abs().max() < 1e-10
    return theta_MD


@pytest.fixture(scope="module")
def train() -> TensorDataset:
    return noisy_points(60, 0)


@pytest.fixture(scope="module")
def test() -> TensorDataset:
    return noisy_points(15, 1)


@pytest.fixture(scope="module")
def optimum(train: TensorDataset) -> Tensor:
    return fit(train, torch.ones(1, len(train)))[0]


@pytest.fixture
def model(optimum: Tensor) -> nn.Module:
    made = nn.Linear(2, CLASSES)
    with torch.no_grad():
        made.weight.copy_(optimum[:6].view(CLASSES, 2))
        made.bias.copy_(optimum[6:])
    return made


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    return {**ptif.get_default_config(), "gpu": -1, "outdir": str(tmp_path / "out"), "recursion_depth": 16}


def loader(data: Dataset[Any], **arguments: Any) -> DataLoader[Any]:
    return DataLoader(data, **{"batch_size": 60, "shuffle": True, **arguments})


def read(folder: Path | str, pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(Path(folder).glob(pattern))]


# ---- what influence means --------------------------------------------------------------------------------------


def test_signs_and_order_are_those_of_retraining(config, optimum, model, train, test):
    config.update(test_sample_num=None, damp=1e-4, scale=2, recursion_depth=2000)
    influences, harmful, helpful = ptif.calc_img_wise(config, model, loader(train), loader(test))
    retrained = fit(train, 1 - torch.eye(len(train)))
    after = torch.stack([losses(theta, test) for theta in retrained], 1)
    change = (after - losses(optimum, test).unsqueeze(1)).numpy()  # the loss of each test without each sample
    influence = np.array([influences[str(t)]["influence"] for t in range(len(test))])

    assert np.corrcoef(-influence.ravel(), change.ravel())[0, 1] > 0.97
    large = np.abs(change) > 0.05 * np.abs(change).max()
    assert (np.sign(-influence) == np.sign(change))[large].mean() > 0.97
    for t in range(len(test)):
        assert change[t, influences[str(t)]["harmful"][0]] < 0 < change[t, influences[str(t)]["helpful"][0]]
    average = change.mean(0)
    assert average[harmful[:5]].max() < 0 < average[helpful[:5]].min()
    assert average[harmful[0]] < np.quantile(average, 0.1)


def test_influence_is_the_negative_of_our_scores(config, model, train, test, tmp_path):
    config.update(test_sample_num=2, test_start_index=1, damp=0.05, scale=2, seed=7)
    influences, harmful, helpful = ptif.calc_all_grad_then_test(
        config, model, loader(train, batch_size=16), loader(test)
    )
    ours = ip.Pipeline(
        ip.Experiment(model, ip.Classification(), train, {"mine": ip.per_class(test, 2, 1)}),
        tmp_path / "ours",
        ip.Settings(
            grad_z={"encoding": "float32"},
            s_test={
                "solver": "lissa",
                "damping": 0.1,
                "scale": 2.0,
                "recursion_depth": 16,
                "seed": 7,
                "batch_size": 16,
            },
            runtime={"device": "cpu"},
        ),
    ).run()["mine"]
    assert list(influences) == [str(test_id) for test_id in ours.test_ids]
    for row, result in enumerate(influences.values()):
        assert np.array_equal(result["influence"], -ours.scores[row])
        assert result["harmful"] == ours.harmful(60)[0][row].tolist()
        assert result["helpful"] == ours.helpful(60)[0][row].tolist()
        assert result["harmful"][0] == int(np.argmax(result["influence"]))
    assert harmful == ours.harmful_on_average(60)[0].tolist()
    assert helpful == ours.helpful_on_average(60)[0].tolist()


def test_recursion_is_that_of_damp_and_scale(config, model, train, test):
    """h ← v + (1 − damp) h − H h / scale from h = v, over scale; the mean of the later half of 4 steps."""
    config.update(test_sample_num=1, damp=0.02, scale=5, recursion_depth=4)
    influences, _, _ = ptif.calc_img_wise(config, model, loader(train), loader(test))
    theta = torch.cat([model.weight.detach().flatten(), model.bias.detach()]).double()
    hessian = jacrev(jacrev(lambda t: losses(t, train).mean()))(theta)
    grads, tests = (jacrev(losses)(theta, data) for data in (train, test))
    for position, result in influences.items():
        v = tests[int(position)]
        steps = [v]
        for _ in range(4):
            steps.append(v + (1 - 0.02) * steps[-1] - hessian @ steps[-1] / 5)
        expected = -grads @ ((steps[3] + steps[4]) / 2 / 5) / len(train)
        np.testing.assert_allclose(result["influence"], expected, rtol=1e-4, atol=1e-7)


def test_both_ways_give_the_same(config, model, train, test, tmp_path):
    config.update(test_sample_num=2)
    img_wise = ptif.calc_img_wise(config, model, loader(train), loader(test))
    assert not list(tmp_path.glob("out/cache/grad_z/*/"))
    config.update(outdir=tmp_path / "all", save_pth=tmp_path / "kept", r=2)
    ptif.calc_all_grad_then_test(config, model, loader(train), loader(test))
    config.update(r=None)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("kept/grad_z/*/**/*") if path.is_file()}
    assert kept
    assert not (tmp_path / "all" / "cache").exists()
    stored = ptif.calc_all_grad_then_test(config, model, loader(train), loader(test))
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    for position, result in img_wise[0].items():
        np.testing.assert_allclose(result["influence"], stored[0][position]["influence"], rtol=1e-5, atol=1e-8)
    assert img_wise[1:] == stored[1:]


# ---- which test samples, and the files --------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["test_start_index", "test_sample_start_per_class"])
def test_samples_are_chosen_by_class_and_named_by_position(config, model, train, test, start):
    del config["test_start_index"]
    config.update({"test_sample_num": 2, start: 3, "num_classes": CLASSES})
    influences, harmful, _ = ptif.calc_img_wise(config, model, loader(train), loader(test))
    labels = test.tensors[1].tolist()
    expected = [i for c in range(CLASSES) for i in [j for j, label in enumerate(labels) if label == c][3:5]]
    assert list(influences) == [str(i) for i in expected]
    for position, result in influences.items():
        assert set(result) == {"label", "num_in_dataset", "time_calc_influence_s", "influence", "harmful", "helpful"}
        assert result["num_in_dataset"] == int(position)
        assert result["label"] == labels[int(position)]
        assert result["time_calc_influence_s"] > 0
        assert len(result["influence"]) == len(train)
        assert sorted(result["harmful"]) == sorted(result["helpful"]) == list(range(len(train)))
    folder = config["outdir"]
    assert read(folder, "influence_results_3_2.json") == [influences]
    [meta] = read(folder, "influences_results_meta_3-2.json")
    assert meta["test_sample_index_list"] == expected
    assert meta["harmful"] == harmful
    assert meta[start] == 3


def test_whole_test_set(config, model, train, test):
    config.update(test_sample_num=False, test_start_index=False)
    influences, _, _ = ptif.calc_img_wise(config, model, loader(train), loader(test))
    assert list(influences) == [str(i) for i in range(len(test))]
    assert [result["label"] for result in influences.values()] == test.tensors[1].tolist()
    assert read(config["outdir"], "influence_results_0_all.json") == [influences]


def test_only_the_first_classes(config, model, train, test):
    config.update(num_classes=2)
    influences, _, _ = ptif.calc_img_wise(config, model, loader(train), loader(test))
    assert [result["label"] for result in influences.values()] == [0, 1]


def test_rankings_are_cut_at_500(config, model, test):
    influences, harmful, helpful = ptif.calc_img_wise(config, model, loader(noisy_points(520, 3)), loader(test))
    assert {len(result[side]) for result in influences.values() for side in ("harmful", "helpful")} == {500}
    assert {len(result["influence"]) for result in influences.values()} == {520}
    assert sorted(harmful) == sorted(helpful) == list(range(520))


def test_no_file_is_overwritten_and_nothing_computed_twice(config, model, train, test):
    first = ptif.calc_img_wise(config, model, loader(train), loader(test))
    again = ptif.calc_img_wise(config, model, loader(train), loader(test))
    assert first[1:] == again[1:]
    assert len(read(config["outdir"], "influence_results_0_1*.json")) == 2
    assert len(read(config["outdir"], "influences_results_meta_0-1*.json")) == 2
    assert read(config["outdir"], "influence_results_0_1.json") == [first[0]]


# ---- the config -------------------------------------------------------------------------------------------------


def solver_of(**config: Any) -> Any:
    return ptif.Config.read(config).settings(32, store=False).s_test


def test_config_is_translated():
    config = {"recursion_depth": 10, "damp": 0.01, "scale": 25, "seed": 3}
    for name in ("r", "r_averaging"):
        solver = solver_of(**config, **{name: 2})
        assert (solver.recursion_depth, solver.repeats, solver.scale, solver.seed) == (10, 2, 25.0, 3)
        assert solver.damping == pytest.approx(0.25)
        assert solver.batch_size == 32
    assert solver_of(r=2, r_averaging=2).repeats == 2
    assert solver_of(damp=0).damping == 0
    defaults = solver_of(recursion_depth=None, r=None, damp=None, scale=None, seed=None)
    given = {"solver": "lissa", "batch_size": 32, "damping": {"relative": 0.1}}
    assert defaults == ip.Settings(s_test=given).s_test
    assert defaults.scale == defaults.recursion_depth == "auto"
    assert solver_of(scale=25).damping == defaults.damping


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recursion_dept": 5}, "unknown key recursion_dept"),
        ({"unheard": None}, "unknown key unheard"),
        ({"r": 2, "r_averaging": 3}, "r is given twice"),
        ({"test_start_index": 0, "test_sample_start_per_class": 1}, "test_start_index is given twice"),
        ({"damp": 0.01}, "damp = 0.01 needs a number for scale"),
        ({"damp": 0.01, "scale": "auto"}, "damp = 0.01 needs a number for scale"),
        ({"damp": -1, "scale": 0}, "(?s)damp = -1: .*scale = 0: "),
        ({"recursion_depth": 0}, "recursion_depth = 0"),
        ({"test_sample_num": 0}, "test_sample_num = 0"),
        ({"test_sample_num": False, "test_start_index": 2}, "test_start_index = 2 needs test_sample_num"),
        ({"test_sample_num": 6}, "there are only 5 of class 0"),
        ({"num_classes": 4}, "no sample of class 3"),
        ({"calc_method": "best"}, "calc_method = 'best'"),
        ({"gpu": -2}, "gpu = -2"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_wrong_config_is_refused(config, model, train, test, changes, said):
    with pytest.raises(ip.RequestError, match=said):
        ptif.calc_img_wise({**config, **changes}, model, loader(train), loader(test))
    assert not Path(config["outdir"]).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_the_cpu_is_used(caplog):
    assert ptif.Config.read({"gpu": 0}).settings(None, store=True).runtime.device == "cpu"
    assert "there is no CUDA here" in caplog.text
    assert ptif.get_default_config()["gpu"] == -1


def test_default_config_has_that_packages_keys():
    config = ptif.get_default_config()
    assert {
        "outdir", "seed", "gpu", "dataset", "num_classes", "test_sample_num", "test_start_index", "recursion_depth",
        "r_averaging", "scale", "damp", "calc_method", "log_filename",
    } <= set(config)  # fmt: skip
    assert ptif.Config.read({**config, "r": 3, "test_sample_start_per_class": 2}).r == 3


# ---- model, loaders, logs ---------------------------------------------------------------------------------------


def test_model_stays_as_it_was_and_frozen_parameters_have_no_part(config, train, test):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, CLASSES)).train()
    model[0].requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ptif.calc_all_grad_then_test(config, model, loader(train), loader(test))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    [group] = Path(config["outdir"]).glob("cache/grad_z/*/gradients/zarr.json")
    assert json.loads(group.read_text())["shape"] == [len(train), 4 + 4 + 4 * CLASSES + CLASSES]


class Dicts(Dataset[dict[str, Any]]):
    """The same samples, in a form that PyTorch's own collation gives the model in another order."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        inputs, label = self.data[index]
        return inputs.flip(0), int(label)


def flipped(samples: list[Any]) -> Any:
    inputs, labels = default_collate(samples)
    return inputs.flip(1), labels


def test_collate_fn_is_used(config, model, train, test, tmp_path):
    expected = ptif.calc_img_wise(config, model, loader(train), loader(test))
    config.update(outdir=tmp_path / "other")
    loaders = [loader(Dicts(data), collate_fn=flipped) for data in (train, test)]
    found = ptif.calc_img_wise(config, model, *loaders)
    for position, result in expected[0].items():
        np.testing.assert_allclose(found[0][position]["influence"], result["influence"], rtol=1e-4, atol=1e-8)
    with pytest.raises(ip.RequestError, match="different collate_fn"):
        ptif.calc_img_wise(config, model, loader(train), loaders[1])


def test_other_models_need_another_cache_for_gradients(config, model, train, test, tmp_path):
    ptif.calc_all_grad_then_test(config, model, loader(train), loader(test))
    with torch.no_grad():
        model.bias += 1
    with pytest.raises(ip.CacheMismatch, match="save_pth"):
        ptif.calc_all_grad_then_test(config, model, loader(train), loader(test))
    ptif.calc_all_grad_then_test({**config, "save_pth": tmp_path / "new"}, model, loader(train), loader(test))


class Augmented(TensorDataset):
    """Samples that differ whenever they are read."""

    def __getitem__(self, index: int) -> Any:
        inputs, label = super().__getitem__(index)
        return inputs + torch.rand(2), label


@pytest.mark.parametrize("call", [ptif.calc_img_wise, ptif.calc_all_grad_then_test])
def test_random_augmentation_is_refused(config, model, train, test, call):
    with pytest.raises(ip.CacheMismatch, match="differs when fetched twice"):
        call(config, model, loader(Augmented(*train.tensors)), loader(test))


@contextmanager
def bare_root() -> Iterator[None]:
    """Have the root logger as a script finds it."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    root.handlers = []
    try:
        yield
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers = handlers
        root.setLevel(level)


def test_log_goes_to_a_file_once(config, model, train, test, tmp_path, capsys):
    log_file = tmp_path / "log.txt"
    with bare_root():
        ptif.init_logging(str(log_file))
        ptif.calc_img_wise({**config, "log_filename": str(log_file)}, model, loader(train), loader(test))
    lines = [line for line in log_file.read_text().splitlines() if "influence_results_0_1.json" in line]
    computed = [line for line in log_file.read_text().splitlines() if "s_test" in line and "to compute" in line]
    assert len(lines) == len(computed) == 1
    assert lines[0] in capsys.readouterr().out


def test_log_filename_alone_is_enough(config, model, train, test, tmp_path):
    log_file = tmp_path / "log.txt"
    ptif.calc_img_wise({**config, "log_filename": log_file}, model, loader(train), loader(test))
    assert "s_test" in log_file.read_text()
