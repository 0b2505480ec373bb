"""Self-influence by the machine: kept, resumed, checked, and read back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from typer.testing import CliRunner

import influence_pipeline as ip
from influence_pipeline import inventory, plan
from influence_pipeline.cache import Cache
from influence_pipeline.cli import app
from stages.self_influence import SelfInfluence
from stages.stage import Block
from tests import tiny
from tests.influence_pipeline.test_by_parameter import decoded

Make = Callable[..., ip.Pipeline]
N = 60
EXACT: dict[str, Any] = {"solver": "exact", "damping": 0.1}
IDENTITY: dict[str, Any] = {"solver": "identity"}


def own(pipeline: ip.Pipeline) -> ip.SelfInfluence:
    """Compute gradients where they are kept, and self-influence."""
    if pipeline.settings.grad_z.store:
        pipeline.grad_z()
    return pipeline.self_influence()


def dense(cache: Path, rows: np.ndarray, damping: float) -> np.ndarray:
    """Return the answer in float64, of the matrix that ``exact`` prepared, which is compared elsewhere."""
    (matrix,) = (zarr.open_array(path, mode="r")[:] for path in cache.glob("curvature/*/matrix"))
    return np.einsum("nd,nd->n", rows, np.linalg.solve(matrix + damping * np.eye(len(matrix)), rows.T).T) / N


def gradients() -> np.ndarray:
    """Return the training gradients in float64, one by one."""
    model, data = tiny.model().double(), tiny.points(N, 1)
    found = []
    for x, label in data:
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x.double()), label).backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    return torch.stack(found).numpy()


@pytest.fixture
def solved(done: Path, make: Make) -> Path:
    """Return a finished cache with self-influence."""
    make().self_influence()
    return done


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list to which every block of self-influence is added that is computed from now on."""
    found: list[int] = []
    compute = SelfInfluence.compute

    def counted(stage: SelfInfluence, block: Block, *more: Any) -> Any:
        found.append(block.index[0])
        return compute(stage, block, *more)

    monkeypatch.setattr(SelfInfluence, "compute", counted)
    return found


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "tolerance"), [("float32", 1e-4), ("float16", 2e-3), ("int8", 2e-2)], ids=lambda value: str(value)
)
def test_values_are_the_dense_ones_of_gradients_as_they_are_kept(
    make: Make, cache: Path, encoding: str, tolerance: float
) -> None:
    found = own(make(grad_z={"encoding": encoding}, s_test=EXACT))
    assert found.ids.tolist() == list(range(N))
    assert (found.ids.dtype, found.values.dtype) == (np.int64, np.float32)
    np.testing.assert_allclose(found.values, dense(cache, decoded(cache), 0.1), rtol=1e-4)
    np.testing.assert_allclose(found.values, dense(cache, gradients(), 0.1), rtol=tolerance)
    assert found.residual.max() < 1e-10
    assert found.damping == 0.1
    assert found.labels is not None
    assert found.labels.tolist() == [int(label) for _, label in tiny.points(N, 1)]


@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [
        ({"solver": "cg", "damping": 0.5}, 2e-3),
        ({"solver": "lissa", "damping": 0.5, "batch_size": 60, "tolerance": 0.02}, 2e-2),
    ],
    ids=["cg", "lissa"],
)
def test_solvers_agree(make: Make, cache: Path, solver: dict[str, Any], tolerance: float) -> None:
    found, exact = own(make(s_test=solver)), own(make(s_test={"solver": "exact", "damping": 0.5}))
    assert found.path != exact.path
    np.testing.assert_allclose(found.values, exact.values, rtol=tolerance)
    assert 0 < found.residual.max() < 0.02


def test_identity_has_no_curvature_and_gives_squared_norms(make: Make, cache: Path) -> None:
    found = own(make(s_test=IDENTITY))
    np.testing.assert_allclose(found.values, (gradients() ** 2).sum(1) / N, rtol=2e-3)
    assert not list(cache.glob("curvature/*"))


def test_self_influence_is_the_score_of_a_sample_on_its_own_loss(make: Make) -> None:
    pipeline = make(tests={"train": tiny.points(N, 1)}, s_test=EXACT, influence={"top_k": 1})
    scores = pipeline.run()["train"].scores[:]
    np.testing.assert_allclose(pipeline.self_influence().values, np.diag(scores), rtol=2e-3)


@pytest.mark.parametrize("encoding", ["float16", "int8"])
def test_gradients_that_are_not_kept_give_the_same_bits(make: Make, cache: Path, encoding: str) -> None:
    kept = own(make(grad_z={"encoding": encoding}, s_test=EXACT))
    computed = own(make(cache.parent / "other", grad_z={"encoding": encoding, "store": False}, s_test=EXACT))
    np.testing.assert_array_equal(computed.values, kept.values)
    assert computed.path.name == kept.path.name
    assert computed.labels is None
    assert not list(cache.parent.glob("other/grad_z/*"))


def test_zero_gradients_have_none(make: Make) -> None:
    class Halved(ip.Classification):
        def losses(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
            return super().losses(outputs, batch) * (batch[1] != 1)

    found = own(make(task=Halved(l2=0.01), s_test=EXACT))
    assert found.labels is not None
    assert ((found.values == 0) == (found.labels == 1)).all()
    assert np.isfinite(found.residual).all()


# ---- blocks ----------------------------------------------------------------------------------------------------------


def test_blocks_are_the_bands_of_gradients_and_an_interrupted_one_goes_on_to_the_same_bytes(
    solved: Path, make: Make, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = solved.parent / "other"
    make(other).grad_z()
    counted = SelfInfluence.compute

    def interrupted(stage: SelfInfluence, block: Block, *more: Any) -> Any:
        if block.index == (2,):
            raise KeyboardInterrupt
        return counted(stage, block, *more)

    with monkeypatch.context() as patch:
        patch.setattr(SelfInfluence, "compute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(other).self_influence()
    with pytest.raises(ip.MissingStage, match=r"is not complete: 2 of 4 blocks.*self-influence"):
        ip.SelfInfluence.open(other)
    make(other).self_influence()
    make(other).self_influence()
    assert computed == [0, 1, 2, 3]
    assert tiny.files(other / "self_influence") == tiny.files(solved / "self_influence")


def test_two_workers_write_the_bytes_of_one(project: Path) -> None:
    pipeline = ip.Pipeline.from_toml(project)
    pipeline.grad_z()
    pipeline.self_influence()
    alone = project.parent / "runs" / "self_influence"
    alone.rename(project.parent / "alone")
    project.write_text(project.read_text() + "workers = 2\n")
    ip.Pipeline.from_toml(project).self_influence()
    assert tiny.files(alone) == tiny.files(project.parent / "alone")


@pytest.mark.parametrize("solver", [IDENTITY, EXACT], ids=lambda solver: solver["solver"])
def test_a_changed_sample_is_computed_anew_with_all_that_came_of_it(
    make: Make, computed: list[int], solver: dict[str, Any]
) -> None:
    own(make(s_test=solver))
    changed = tiny.points(N, 1)
    changed.tensors[0][20] += 1
    pipeline = make(train=changed, s_test=solver)
    with pytest.raises(ip.CacheMismatch, match="sample 20 is not what it was"):
        pipeline.self_influence()
    pipeline.refresh()
    with pytest.raises(ip.MissingStage, match="1 of 4 blocks are missing"):
        pipeline.self_influence()
    pipeline.grad_z()
    computed.clear()
    pipeline.self_influence()
    assert computed == ([1] if solver is IDENTITY else [0, 1, 2, 3])


def test_a_grown_training_set_with_its_curvature_kept_computes_new_samples_only(
    make: Make, cache: Path, computed: list[int]
) -> None:
    before = own(make(s_test=EXACT))
    grown = ip.Pipeline(
        tiny.experiment(train=tiny.points(70, 1)), cache, tiny.settings(s_test=EXACT), keep_curvature=True
    )
    computed.clear()
    found = own(grown)
    assert computed == [3, 4]
    np.testing.assert_allclose(found.values[:N], before.values, rtol=1e-5)
    assert len(found.ids) == 70
    whole = own(make(s_test=EXACT, train=tiny.points(70, 1)))
    assert computed == [3, 4, 0, 1, 2, 3, 4]
    assert not np.allclose(whole.values, found.values, rtol=1e-3)


def test_damage_is_found_and_mended(solved: Path, make: Make, computed: list[int]) -> None:
    before = tiny.files(solved)
    (file,) = solved.glob("self_influence/*/residual/c/1")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert "self_influence" in str(make().verify())
    make().self_influence()
    assert computed == [1]
    (described,) = solved.glob("self_influence/*/change/zarr.json")
    described.write_text("{")
    make().self_influence()
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    make().self_influence()
    assert tiny.files(solved) == before


def test_other_ids_are_those_that_are_shown(make: Make) -> None:
    plain = own(make(s_test=IDENTITY))
    named = make(train_ids=list(range(100, 160)), s_test=IDENTITY).self_influence()
    np.testing.assert_array_equal(named.ids, plain.ids + 100)
    np.testing.assert_array_equal(named.values, plain.values)


def test_gradients_come_first(make: Make, cache: Path) -> None:
    with pytest.raises(ip.MissingStage, match=r"grad_z is not complete: 4 of 4 blocks.*grad-z"):
        make().self_influence()
    assert not cache.exists()


@pytest.mark.parametrize(
    ("solver", "what"),
    [
        (EXACT, r'solver = "exact" needs .* 83 × 83 matrix'),
        (
            {"solver": "cg", "damping": 0.1},
            r"self_influence: solver 'cg', for one training sample, needs .* KiB; runtime",
        ),
    ],
    ids=["exact", "cg"],
)
@pytest.mark.parametrize("store", [True, False])
def test_what_does_not_fit_the_memory_is_refused_with_the_bytes(
    make: Make, cache: Path, solver: dict[str, Any], what: str, store: bool
) -> None:
    if store:
        make(s_test=solver).grad_z()
    with pytest.raises(ip.RequestError, match=what):
        make(s_test=solver, grad_z={"store": store}, runtime={"memory": 5000}).self_influence()
    assert not list(cache.glob("self_influence/*"))


def test_rows_that_are_computed_are_kept_and_copied_and_tiles_of_stored_ones_are_small() -> None:
    assert plan.rows_memory(1000, 16, computed=True, encoding="float16") == (4 * 16_000, 12 * 16_000)
    assert plan.rows_memory(1000, 16, computed=False, encoding="int8") == (2 * 16_000, 2 * 16_000)


# ---- what is there ---------------------------------------------------------------------------------------------------


def test_it_is_read_without_model_or_data(solved: Path) -> None:
    found = ip.SelfInfluence.open(solved)
    ids, values = found.highest(5)
    order = np.lexsort((found.ids, -found.values))[:5]
    np.testing.assert_array_equal(ids, found.ids[order])
    np.testing.assert_array_equal(values, found.values[order])
    assert (ids.dtype, values.dtype) == (np.int64, np.float32)
    assert len(found.highest()[0]) == 10
    for k in (0, N + 1):
        with pytest.raises(ip.RequestError, match=f"k = {k}: there are 60 training samples"):
            found.highest(k)
    with pytest.raises(FrozenInstanceError):
        found.values = values  # type: ignore[misc]
    shutil.rmtree(solved / "grad_z")
    assert ip.SelfInfluence.open(solved).labels is None


def test_one_of_several_is_chosen_by_its_key(solved: Path, make: Make) -> None:
    second = make(s_test=EXACT).self_influence()
    with pytest.raises(ip.RequestError, match=r"several results of self-influence") as refused:
        ip.SelfInfluence.open(solved)
    assert f'key="{second.path.name}"' in str(refused.value)
    assert "s_test.solver = exact" in str(refused.value)
    np.testing.assert_array_equal(ip.SelfInfluence.open(solved, second.path.name).values, second.values)
    with pytest.raises(ip.MissingStage, match=r"no self-influence with key nope.*pipeline\.self_influence\(\)"):
        ip.SelfInfluence.open(solved, "nope")


def test_it_is_listed_with_its_evidence_and_planned(solved: Path, make: Make) -> None:
    text = "\n".join(inventory.listed(Cache(solved)))
    assert "5 sets of arrays" in text
    line = text[text.index("self_influence ") :]
    assert "4 / 4" in line
    for what in ("float16", "solver cg", "λ = ", "largest residual"):
        assert what in line
    found = make(s_test={"solver": "cg", "damping": 0.5}).plan(self_influence=True)["self_influence"]
    assert (found.done, found.total) == (0, 4)
    assert found.passes == "cg, 60 solutions in 4 blocks of ≤ 200 passes over the training set"
    assert found.differs == ("s_test.damping: nothing ≠ 0.5", "s_test.damping.relative: 0.1 ≠ nothing")
    assert make().plan(self_influence=True).complete
    assert [stage.stage for stage in make().plan().stages] == ["grad_z", "curvature", "s_test", "influence"]


def test_it_stays_as_long_as_its_gradients(solved: Path, make: Make) -> None:
    make(s_test={"solver": "cg", "damping": 0.5}).self_influence()
    (solved / "influence").rename(solved.parent / "away")
    assert make().garbage() == []
    assert {path.parent.name for path in make(model=lambda: tiny.model(1)).garbage()} == {
        "grad_z", "curvature", "s_test", "self_influence",
    }  # fmt: skip


def test_it_stays_where_gradients_are_not_kept(make: Make) -> None:
    own(make(grad_z={"store": False}))
    assert make(grad_z={"store": False}).garbage() == []
    left = make(grad_z={"store": False}, s_test=EXACT).garbage()
    assert {path.parent.name for path in left} == {"self_influence", "curvature"}


# ---- command line ----------------------------------------------------------------------------------------------------


def test_the_command_prints_the_highest(project: Path) -> None:
    def invoke(*words: object) -> Any:
        return CliRunner().invoke(app, [str(word) for word in words])

    early = invoke("self-influence", project)
    assert early.exit_code == 2
    assert "influence-pipeline grad-z" in early.stderr
    assert invoke("grad-z", project).exit_code == 0
    result = invoke("self-influence", project, "-k", 3)
    assert result.exit_code == 0, result.output
    found = ip.SelfInfluence.open(project.parent / "runs")
    first, *rows, last = result.stdout.splitlines()
    assert first.startswith("highest self-influence of 60 training samples (λ = ")
    ids, values = found.highest(3)
    assert found.labels is not None
    expected = [f"{i:>8}  {v:+.3e}  label {found.labels[i]:g}" for i, v in zip(ids, values, strict=True)]
    assert rows == expected
    assert last == f"in {found.path}"
    assert invoke("self-influence", project, "-k", 61).exit_code == 2
    assert invoke("self-influence", project, "-k", 0).exit_code == 2
    planned = invoke("plan", project, "--self-influence")
    assert "60 solutions in 4 blocks" in planned.stdout
    assert invoke("rm", project, found.path.name, "--yes").exit_code == 0
    assert not found.path.exists()
