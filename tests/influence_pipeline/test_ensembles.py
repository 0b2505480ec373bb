"""Several sets of weights: scores of each in the cache, their mean or weighted sum as one result."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable
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
from influence_pipeline.pipeline import _rebuild
from tests import tiny

N, T, L2 = 12, 3, 0.1
States = dict[str, Any]
EXACT: dict[str, Any] = {"solver": "exact", "damping": 0.1}


def points(count: int, seed: int) -> TensorDataset:
    inputs = torch.stack([
        torch.randn(4, generator=torch.Generator().manual_seed(100 * seed + i)) for i in range(count)
    ])
    return TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long())


def model(seed: int = 0) -> nn.Module:
    made, generator = nn.Linear(4, 3), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return made


def state(seed: int) -> dict[str, torch.Tensor]:
    return model(seed).state_dict()


A, B, C = (state(seed) for seed in (1, 2, 3))


def experiment(checkpoints: Any = None, **changes: Any) -> ip.Experiment:
    arguments = {"model": model, "train": points(N, 1), "tests": {"holdout": points(T, 2)}, **changes}
    return ip.Experiment(task=ip.Classification(l2=L2), checkpoints=checkpoints, **arguments)


def pipeline(cache: Path, checkpoints: Any = None, *, solver: Any = None, **more: Any) -> ip.Pipeline:
    sections = {name: more.pop(name) for name in ("grad_z", "influence") if name in more}
    sections.setdefault("influence", {"top_k": 2})
    settings = ip.Settings(s_test=solver or EXACT, runtime={"progress": False, "device": "cpu"}, **sections)
    return ip.Pipeline(experiment(checkpoints, **more), cache, settings)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished cache of the checkpoints a and b, to be copied."""
    folder = tmp_path_factory.mktemp("two") / "cache"
    pipeline(folder, {"a": A, "b": B}).run()
    return folder


@pytest.fixture
def done(two: Path, cache: Path) -> Path:
    """Return a finished cache that a test may change."""
    shutil.copytree(two, cache)
    return cache


def oracle(seeds: Iterable[int], train: TensorDataset, *, solved: bool = True) -> np.ndarray:
    """Return the mean of the scores of some models by dense matrices in float64; plain products if not solved."""
    found = []
    for seed in seeds:
        theta = torch.cat([state(seed)["weight"].flatten(), state(seed)["bias"]]).double()
        losses_T, losses_N = (_losses(data) for data in (points(T, 2), train))
        asked, gradients = (torch.autograd.functional.jacobian(each, theta) for each in (losses_T, losses_N))
        hessian = torch.autograd.functional.hessian(lambda at, each=losses_N: each(at).mean(), theta)
        damped = hessian + (L2 + 0.1) * torch.eye(len(theta)).double()
        found.append((torch.linalg.solve(damped, asked.T).T if solved else asked) @ gradients.T / len(train))
    return torch.stack(found).mean(0).numpy()


def _losses(data: TensorDataset) -> Callable[[torch.Tensor], torch.Tensor]:
    inputs, labels = data.tensors

    def losses(theta: torch.Tensor) -> torch.Tensor:
        logits = inputs.double() @ theta[:12].reshape(3, 4).T + theta[12:]
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    return losses


def assert_near(scores: Any, expected: np.ndarray) -> None:
    """Compare scores that went through gradients in half precision."""
    np.testing.assert_allclose(scores[:], expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def new_blocks(cache: Path, before: set[tuple[str, ...]]) -> Counter[str]:
    return Counter(stage for stage, *_ in tiny.blocks(cache) - before)


ONE_MODEL = {"grad_z": 1, "curvature": 1, "s_test": 1, "influence": 1, "combined": 1}


# ---- what the numbers are --------------------------------------------------------------------------------------------


def test_scores_are_the_mean_of_those_of_each_model(two: Path) -> None:
    found = ip.Influences.open(two, "holdout")
    one, other = found.members
    mean = np.mean([one.scores[:], other.scores[:]], axis=0, dtype=np.float64)
    np.testing.assert_array_equal(found.scores[:], mean.astype(np.float32))
    assert_near(found.scores, oracle((1, 2), points(N, 1)))
    order = np.argsort(-mean, axis=1)
    np.testing.assert_array_equal(found.helpful(2)[0], order[:, :2])
    np.testing.assert_array_equal(found.harmful(N)[0], order[:, ::-1])
    np.testing.assert_allclose(found.mean_scores(), mean.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.offset, (one.offset + other.offset) / 2)
    assert found.combination == "mean"
    assert found.weights == {one.path.name: 0.5, other.path.name: 0.5}
    np.testing.assert_array_equal(found.labels()[1], points(N, 1).tensors[1])
    np.testing.assert_allclose(found.losses(), np.mean([one.losses(), other.losses()], axis=0), rtol=1e-6)
    np.testing.assert_array_equal(found.residual, np.maximum(one.residual, other.residual))
    assert found.damping == 0.1
    assert found.gradient_norm == max(one.gradient_norm, other.gradient_norm)


def test_with_learning_rates_scores_are_those_of_tracin(cache: Path) -> None:
    rates = {1: 0.3, 2: 0.1, 3: 0.02}
    tracin = sum(rate * oracle([seed], points(N, 1), solved=False) for seed, rate in rates.items())
    checkpoints = {f"epoch{seed}": ip.Checkpoint(state(seed), weight=rate) for seed, rate in rates.items()}
    found = pipeline(cache, checkpoints, solver={"solver": "identity"}, grad_z={"encoding": "float32"}).run()["holdout"]
    np.testing.assert_allclose(found.scores[:], tracin, rtol=0, atol=1e-6 * np.abs(tracin).max())
    assert found.combination == "sum"
    assert sorted(found.weights.values()) == [0.02, 0.1, 0.3]


def test_parts_by_parameter_add_up_until_a_model_is_scored_anew(done: Path) -> None:
    found = ip.Influences.open(done, "holdout")
    parts = found.by_parameter([0, 5, 7], tests=[1])
    np.testing.assert_allclose(sum(parts.values()), found.scores[1:2, [0, 5, 7]], rtol=1e-3)
    assert set(parts) == {"weight", "bias"}
    shutil.rmtree(next(done.glob("influence/*/zarr.json")).parent)
    with pytest.raises(ip.MissingStage, match="those of a model were removed, or are others"):
        ip.Influences.open(done, "holdout").by_parameter([0])


def test_corrected_scores_are_combined_too(done: Path) -> None:
    both = pipeline(done, {"a": A, "b": B}, influence={"top_k": 2, "correction": "newton"})
    assert both.newton().computed == 2
    found = both.run()["holdout"]
    one, other = (member.scores[:] for member in found.members)
    np.testing.assert_array_equal(found.scores[:], (one + other) / 2)
    first_order = ip.Influences.open(done, "holdout", pipeline(done, {"a": A, "b": B}).run()["holdout"].key).scores[:]
    assert np.abs(found.scores[:] - first_order).max() > 0.05 * np.abs(first_order).max()


# ---- what is computed ------------------------------------------------------------------------------------------------


def test_adding_a_checkpoint_computes_it_and_the_combination_alone(done: Path) -> None:
    before, files = tiny.blocks(done), tiny.files(done)
    found = pipeline(done, {"c": C, "b": B, "a": A}).run()["holdout"]
    assert new_blocks(done, before) == ONE_MODEL
    now = tiny.files(done)
    assert {name: now[name] for name in files} == files
    assert_near(found.scores, oracle((1, 2, 3), points(N, 1)))
    with pytest.raises(ip.RequestError, match=r"(?s)choose one:.*mean of [23]: .*mean of [23]: "):
        ip.Influences.open(done, "holdout")


def test_another_order_other_names_and_other_ways_to_give_them_compute_nothing(done: Path, tmp_path: Path) -> None:
    files = tiny.files(done)
    torch.save({f"module.{name}": value for name, value in A.items()}, tmp_path / "a.pt")
    again = pipeline(done, {"one": lambda: B, "other": tmp_path / "a.pt"})
    assert again.plan().complete
    again.run()
    assert (again.grad_z().computed, again.s_test("holdout").computed) == (0, 0)
    assert again.grad_z().total == 2
    assert again.garbage() == []
    assert tiny.files(done) == files


def test_a_checkpoint_whose_file_changed_is_another_one(done: Path, tmp_path: Path) -> None:
    path = tmp_path / "b.pt"
    torch.save(B, path)
    assert pipeline(done, {"a": A, "b": path}).plan().complete
    torch.save(C, path)
    stages = pipeline(done, {"a": A, "b": path}).plan().stages
    assert [(stage.member, stage.stage) for stage in stages if not stage.complete] == [
        *(("b", stage) for stage in ("grad_z", "curvature", "s_test", "influence")),
        ("", "combined"),
    ]
    assert "weights: " in stages[4].differs[0]


def test_a_plan_tells_checkpoints_apart_and_measures_them(cache: Path) -> None:
    named = pipeline(cache, {"first": A, "second": B})
    text = str(named.plan())
    assert text.index("checkpoint first:") < text.index("checkpoint second:") < text.index("combined   holdout-")
    measured = named.plan(measure=True)
    assert measured["grad_z"].timing is not None
    assert "and combined, which could not be measured" in str(measured)
    assert [stage.done for stage in named.plan().stages] == [1] * 8 + [0]


def test_members_are_pipelines_over_the_same_cache(two: Path) -> None:
    both = pipeline(two, {"a": A, "b": B})
    assert list(both.members) == ["a", "b"]
    found = both.members["b"].run()["holdout"]
    assert_near(found.scores, oracle([2], points(N, 1)))
    assert ip.Influences.open(two, "holdout", found.key).path == found.path
    assert both.members["b"].members == {}


def test_workers_are_told_the_weights_of_their_member(done: Path) -> None:
    both = pipeline(done, {"a": A, "b": B})
    member = both.members["b"]
    place, weights = member._works.grad_z_place(), member._works.context.weights
    arguments = ("token", experiment({"a": A, "b": B}), both.settings, str(done), place)
    work, group = _rebuild(*arguments, weights, keep_curvature=False, checkpoint="b")
    assert all(work.valid(group, block) for block in work.stage.grid)
    with pytest.raises(ip.CacheMismatch, match="a worker process loaded other weights"):
        _rebuild(*arguments, weights, keep_curvature=False, checkpoint="a")


def test_a_longer_training_set_is_combined_anew(done: Path) -> None:
    longer = points(N + 4, 1)
    grown = pipeline(done, {"a": A, "b": B}, train=longer)
    assert not grown.plan().stages[-1].done
    assert_near(grown.run()["holdout"].scores, oracle((1, 2), longer))


# ---- a cache to trust ------------------------------------------------------------------------------------------------


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def file_of(cache: Path, stage: str, array: str) -> Path:
    return next(path for path in sorted(cache.glob(f"{stage}/*/{array}/c/**/*")) if path.is_file())


@pytest.mark.parametrize("array", ["scores", "helpful_ids"])
def test_damage_is_found_and_mended_to_the_same_bytes(done: Path, array: str) -> None:
    files = tiny.files(done)
    damage(file_of(done, "combined", array))
    found = pipeline(done, {"a": A, "b": B}).verify(sample=1)
    assert found.exit_code == 1
    assert "combined/holdout-" in found.damaged[0]
    assert found.rows == 2
    pipeline(done, {"a": A, "b": B}).run()
    assert tiny.files(done) == files


def test_damaged_scores_of_a_model_are_mended_when_they_are_combined(done: Path) -> None:
    files = tiny.files(done)
    shutil.rmtree(next(done.glob("combined/*/zarr.json")).parent)
    damage(file_of(done, "influence", "scores"))
    pipeline(done, {"a": A, "b": B}).run()
    assert tiny.files(done) == files


def test_a_damaged_description_is_mended(done: Path) -> None:
    files = tiny.files(done)
    damage(next(done.glob("combined/*/zarr.json")))
    with pytest.raises(ip.CacheDamaged):
        ip.Influences.open(done, "holdout")
    pipeline(done, {"a": A, "b": B}).run()
    assert tiny.files(done) == files


def test_changed_samples_are_computed_anew_for_all(done: Path) -> None:
    changed = points(N, 1)
    changed.tensors[0][3] += 1
    with pytest.raises(ip.CacheMismatch, match="sample 3 is not what it was"):
        pipeline(done, {"a": A, "b": B}, train=changed).run()
    again = pipeline(done, {"a": A, "b": B}, train=changed)
    assert again.verify().changed == {"train": [3]}
    assert again.refresh() == {"train": [3]}
    assert_near(again.run()["holdout"].scores, oracle((1, 2), changed))
    hardly = points(N, 1)
    hardly.tensors[0][3] += 1 + 1e-6
    assert pipeline(done, {"a": A, "b": B}, train=hardly).accept_data() == {"train": [3]}
    assert pipeline(done, {"a": A, "b": B}, train=hardly).plan().complete


def test_what_belongs_to_no_result_is_garbage(done: Path) -> None:
    assert pipeline(done).garbage() == []  # a complete result refers to all of it
    for path in [*done.glob("combined/*/zarr.json"), *done.glob("influence/*/zarr.json")]:
        shutil.rmtree(path.parent)
    assert Counter(path.parent.name for path in pipeline(done).garbage()) == {"grad_z": 2, "curvature": 2, "s_test": 2}
    left = pipeline(done, {"a": A, "c": C}).garbage()
    assert Counter(path.parent.name for path in left) == {"grad_z": 1, "curvature": 1, "s_test": 1}


def test_gradients_of_another_kind_are_refused_and_of_another_model_only_where_it_is_no_member(done: Path) -> None:
    with pytest.raises(ip.CacheMismatch, match=r"(?s)weights: .*Starting again computes 12 gradients"):
        pipeline(done, model=lambda: model(3)).run()
    other = pipeline(done, {"a": A, "b": B, "c": C}, grad_z={"encoding": "float32"})
    with pytest.raises(ip.CacheMismatch, match="encoding: float16 ≠ float32"):
        other.run()
    before = tiny.blocks(done)
    assert other.grad_z(new=True).computed == 3
    assert new_blocks(done, before) == {"grad_z": 3}


# ---- beside ----------------------------------------------------------------------------------------------------------


def test_evaluation_is_of_the_combined_scores(cache: Path) -> None:
    def retrain(dataset: Any, seed: int) -> nn.Module:
        made = model(seed)
        inputs, labels = (torch.stack([torch.as_tensor(row[i]) for row in dataset]) for i in (0, 1))
        optimizer = torch.optim.SGD(made.parameters(), 0.5)
        for _ in range(30):
            optimizer.zero_grad()
            penalty = sum(parameter.square().sum() for parameter in made.parameters())
            (nn.functional.cross_entropy(made(inputs), labels) + L2 / 2 * penalty).backward()
            optimizer.step()
        return made

    trained = {f"seed{seed}": retrain(points(N, 1), seed).state_dict() for seed in range(2)}
    both = pipeline(cache, trained, retrain=retrain, mislabelled=[1, 4])
    settings = both.settings.model_copy(
        update={
            "evaluate": both.settings.evaluate.model_copy(update={"subsets": 4, "seeds": 1, "self_influence": True})
        }
    )
    both = ip.Pipeline(both.experiment, cache, settings)
    found = both.evaluate("holdout")["holdout"]
    assert found.about == "3 tests × 12 training samples, exact, λ = 0.1, mean of 2 models"
    assert found.lds is not None
    assert found.lds.mean > 0.3
    assert set(found.mislabelled) == {"harm on average", "self-influence", "training loss"}
    own = [member.self_influence().values for member in both.members.values()]
    np.testing.assert_allclose(both._own_influence(), np.mean(own, axis=0), rtol=1e-6)
    assert both.garbage() == []


def test_commands_say_what_is_combined(tmp_path: Path) -> None:
    for seed in (1, 2):
        torch.save(state(seed), tmp_path / f"{seed}.pt")
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\n"
        "from tests.influence_pipeline.test_ensembles import experiment\n"
        "def several():\n"
        "    return experiment({f'seed{n}': Path(__file__).with_name(f'{n}.pt') for n in (1, 2)})\n"
    )
    (tmp_path / "mine.toml").write_text(
        'experiment = "mine.py:several"\ncache = "runs"\n'
        '[s_test]\nsolver = "exact"\n[influence]\ntop_k = 2\n[runtime]\ndevice = "cpu"\n'
    )

    def said(*arguments: str) -> str:
        result = CliRunner().invoke(app, [arguments[0], str(tmp_path / "mine.toml"), *arguments[1:]])
        assert result.exit_code == 0, result.output
        return result.output

    assert "checkpoint seed1:" in said("plan")
    with pytest.raises(
        ip.MissingStage, match=r"combined of holdout is not complete: .*pipeline.influence\('holdout'\)"
    ):
        ip.Pipeline.from_toml(tmp_path / "mine.toml").report("holdout", tmp_path / "page.html")
    assert "grad_z: 2 of 2 blocks computed" in said("grad-z")
    out = said("run")
    assert "holdout: 3 tests × 12 training samples, averaged over 2 checkpoints" in out
    assert "λ = " in out
    assert "|ḡ + l2·θ| = " in out  # measured for what the solver found λ with
    assert "combined/holdout-" in said("show")
    assert "mean of 2: " in said("status")
    said("verify")
    assert "nothing to remove" in said("gc")
    page = tmp_path / "page.html"
    said("report", "--out", str(page))
    assert "mean of the scores of" in page.read_text(encoding="utf-8")
    assert "mean of 2" in "\n".join(inventory.listed(Cache(tmp_path / "runs")))


# ---- refused ---------------------------------------------------------------------------------------------------------


def with_(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in {**A, **changes}.items() if value is not None}


WRONG: list[tuple[Callable[[Path], Any], str]] = [
    (lambda folder: {}, "checkpoints is empty"),
    (lambda folder: [A, B], "checkpoints must be weights by name"),
    (lambda folder: {"a/b": A}, "checkpoints: 'a/b' must be made of letters"),
    (lambda folder: {"a": 5}, "'a' must be a state dict, the path of one, .* got int"),
    (lambda folder: {"a": model()}, "'a' must be a state dict, the path of one, .* got Linear"),
    (lambda folder: {"a": A, "b": ip.Checkpoint(B, weight=0.1)}, "'a' without a weight, and others with one"),
    (lambda folder: {"a": ip.Checkpoint(A, weight=float("nan"))}, "the weight of 'a' must be a finite number.* nan"),
    (lambda folder: {"a": ip.Checkpoint(A, weight=0.0)}, "the weight of 'a' must be a finite number, not 0"),
    (lambda folder: {"a": ip.Checkpoint(A, weight="1")}, "the weight of 'a' must be a finite number, not 0, got '1'"),
    (lambda folder: {"a": A, "b": with_(bias=None)}, r"(?s)checkpoint 'b' does not fit .*Missing key\(s\).*bias"),
    (lambda folder: {"a": with_(more=A["bias"])}, r"(?s)checkpoint 'a' does not fit .*Unexpected key\(s\).*more"),
    (lambda folder: {"a": with_(bias=torch.ones(5))}, "(?s)checkpoint 'a' does not fit .*size mismatch for bias"),
    (lambda folder: {"a": with_(bias=torch.full((3,), torch.nan))}, "checkpoint 'a': bias has numbers that are not f"),
    (lambda folder: {"a": {"epoch": 3, "net": A}}, "Is it in 'net' of that\\? Give a function that returns it"),
    (lambda folder: {"a": lambda: None}, "checkpoint 'a' is no state dict but a NoneType"),
    (lambda folder: {"a": lambda: {}["x"]}, "checkpoint 'a': its function raised KeyError"),
    (lambda folder: {"a": folder / "none.pt"}, "checkpoint 'a': .*none.pt: no such file"),
    (lambda folder: {"a": saved(folder, b"no file of torch")}, "checkpoint 'a': .*saved.pt cannot be read"),
    (lambda folder: {"a": A, "b": B, "again": A}, "checkpoints 'a' and 'again' are the same weights"),
]


def saved(folder: Path, content: bytes) -> Path:
    (folder / "saved.pt").write_bytes(content)
    return folder / "saved.pt"


@pytest.mark.parametrize(("checkpoints", "why"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_what_is_wrong_with_a_checkpoint_is_said_before_anything_is_computed(
    cache: Path, tmp_path: Path, checkpoints: Callable[[Path], Any], why: str
) -> None:
    with pytest.raises(ip.RequestError, match=why):
        pipeline(cache, checkpoints(tmp_path)).run()
    assert not cache.exists()


def test_what_is_of_one_model_alone_is_refused(two: Path, cache: Path) -> None:
    both = pipeline(two, {"a": A, "b": B})
    with pytest.raises(ip.RequestError, match=r"pipeline.members\['a'\].self_influence\(\)"):
        both.self_influence()
    with pytest.raises(ip.RequestError, match="self_influence is of one model"):
        both.plan(self_influence=True)
    with pytest.raises(ip.RequestError, match="relative scores are of one model"):
        ip.Influences.open(two, "holdout").helpful(2, relative="cosine")
    with pytest.raises(ip.RequestError, match="no checkpoint 'z'; the experiment has: a, b"):
        both.experiment.member("z")
    unkept = pipeline(cache, {"a": A, "b": B}, influence={"top_k": 2, "store_scores": False})
    for refused in (unkept.run, unkept.plan):
        with pytest.raises(ip.RequestError, match="store_scores = false"):
            refused()
    assert not cache.exists()
