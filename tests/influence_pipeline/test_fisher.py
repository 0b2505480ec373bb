"""``fisher`` through the whole pipeline: right numbers, one preparation for every test set, validity, memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from typer.testing import CliRunner

import influence_pipeline as ip
from influence_pipeline import inventory, plan
from influence_pipeline.cache import Cache, Group
from influence_pipeline.cli import app
from influence_pipeline.context import Context
from stages.s_test.prepare_fisher import OfSamples
from tests import oracles, tiny
from tests.stages.test_projection import matrix_of

Make = Callable[..., ip.Pipeline]
DAMPING, L2 = 0.02, {"0.weight": 0.3, "0.bias": 0.1, "2.*": 0.01}
FISHER = {"solver": "fisher", "damping": DAMPING}
PROJECTED = {"grad_z": {"projection": {"kind": "kronecker", "dim": 40}}}
SETTINGS: dict[str, dict[str, Any]] = {
    "samples": {"s_test": FISHER},
    "coordinates": {"s_test": FISHER, **PROJECTED},
    "rank": {"s_test": {**FISHER, "rank": 20}},
}
"""60 samples of 83 coordinates, or of 40: every form that is solved."""
FORMS = pytest.mark.parametrize("form", SETTINGS)


def case(data: Any, l2: float | dict[str, float]) -> oracles.Case:
    tensors = tuple(t.double() if t.is_floating_point() else t for t in data.tensors)
    return oracles.Case("", tiny.model().double(), oracles.ClassTask(l2), oracles.Data(tensors))


def expected(gradients: np.ndarray, penalty: np.ndarray, tests: np.ndarray) -> np.ndarray:
    """Scores (T, N) by the dense matrix."""
    dense = gradients.T @ gradients / len(gradients) + np.diag(penalty) + DAMPING * np.eye(len(penalty))
    return tests @ np.linalg.solve(dense, gradients.T) / len(gradients)


def off(found: Any, right: np.ndarray) -> float:
    return float(np.abs(found[...] - right).max() / np.abs(right).max())


@pytest.mark.parametrize(("l2", "rank"), [(0.05, "full"), (L2, "full"), (L2, 60)], ids=str)
def test_scores_are_those_of_the_dense_fisher_matrix(make: Make, l2: Any, rank: Any) -> None:
    solver = {**FISHER, "rank": rank}
    found = make(s_test=solver, grad_z={"encoding": "float32"}, task=ip.Classification(l2=l2)).run()["holdout"]
    train, tests = case(tiny.points(60, 1), l2), case(tiny.points(10, 2), l2)
    right = expected(*(x.numpy() for x in (oracles.gradients(train), oracles.penalty(train), oracles.gradients(tests))))
    assert off(found.scores, right) < 2e-5


@pytest.mark.parametrize("kind", ["kronecker", "sparse"])
def test_of_projected_gradients_it_is_that_of_the_projected_ones(make: Make, kind: str) -> None:
    """(ΦᵀΦ/N + λ)⁻¹, as TRAK has it."""
    grad_z = {"projection": {"kind": kind, "dim": 40}, "encoding": "float32"}
    pipeline = make(s_test=FISHER, grad_z=grad_z)
    found = pipeline.run()["holdout"]
    phi = matrix_of(Context(tiny.experiment(model=tiny.model().double()), pipeline.settings).function.coordinates)
    train, tests = (oracles.gradients(case(tiny.points(*of), 0.01)) @ phi.T for of in ((60, 1), (10, 2)))
    right = expected(train.numpy(), np.full(len(phi), 0.01), tests.numpy())
    assert off(found.scores, right) < 2e-5
    assert "matrix" in Group(next((pipeline.cache.path / "curvature").glob("*/zarr.json")).parent)


@pytest.mark.parametrize(
    ("form", "encoding", "most"),
    [("samples", "float16", 2e-3), ("coordinates", "int8", 0.3), ("rank", "float16", 2e-3)],
)
def test_of_gradients_in_fewer_bits_it_is_that_of_the_gradients_as_they_are_kept(
    make: Make, tmp_path: Path, form: str, encoding: str, most: float
) -> None:
    sections = {**SETTINGS[form], "grad_z": {**SETTINGS[form].get("grad_z", {}), "encoding": encoding}}
    pipeline = make(**sections)
    found = pipeline.run()["holdout"]
    works = pipeline._works
    kept = works.find(works.grad_z_place()).rows("gradients")[:, :].astype(np.float64)
    if form != "rank":
        vectors = works.find(works.s_test_place("holdout")).rows("vectors")[:, :]
        right = vectors @ (kept.T @ kept / 60 + (0.01 + DAMPING) * np.eye(kept.shape[1]))
        exact = make(tmp_path / "identity", **{**sections, "s_test": {"solver": "identity"}})
        exact.run()
        place = exact._works.s_test_place("holdout")
        assert off(exact._works.find(place).rows("vectors")[:, :], right) < 1e-5
    sections["grad_z"]["encoding"] = "float32"
    exact_scores = make(tmp_path / "float32", **sections).run()["holdout"].scores[:]
    assert off(found.scores, exact_scores) < most


# ---- blocks, resume, workers ---------------------------------------------------------------------------------------


@FORMS
def test_discarded_blocks_are_computed_anew_to_the_same_bytes(make: Make, cache: Path, form: str) -> None:
    make(**SETTINGS[form]).run()
    before = tiny.files(cache)
    [path] = (path.parent for path in (cache / "curvature").glob("*/zarr.json"))
    blocks = list(Group(path).layout.grid)
    assert len(blocks) == {"samples": 4, "coordinates": 2, "rank": 1}[form]
    Group(path).discard(blocks[-1])
    assert make(**SETTINGS[form]).plan()["curvature"].done == len(blocks) - 1
    make(**SETTINGS[form]).run()
    assert tiny.files(cache) == before


def test_an_interrupted_preparation_goes_on_with_the_next_block(
    make: Make, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, done = OfSamples.compute, list[int]()

    def interrupted(stage: OfSamples, block: Any, *args: Any) -> Any:
        if block.index == (2,) and len(done) == 2:
            raise KeyboardInterrupt
        done.append(block.index[0])
        return compute(stage, block, *args)

    with monkeypatch.context() as patch:
        patch.setattr(OfSamples, "compute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(s_test=FISHER).run()
    kept = make(s_test=FISHER).plan()["curvature"].done
    monkeypatch.setattr(OfSamples, "compute", interrupted)
    done.extend([-1])
    make(s_test=FISHER).run()
    assert sorted(done[3:]) == list(range(kept, 4))
    make(tmp_path / "whole", s_test=FISHER).run()
    assert tiny.files(cache) == tiny.files(tmp_path / "whole")


def test_workers_give_the_same_bytes(make: Make, project: Path, tmp_path: Path) -> None:
    for form in ("samples", "rank"):
        sections = SETTINGS[form]
        text = project.read_text().replace('"runs"', f'"{form}"').replace("[runtime]", "[runtime]\nworkers = 2")
        (tmp_path / f"{form}.toml").write_text(tiny.solved_by(text, **sections["s_test"]))
        ip.Pipeline.from_toml(tmp_path / f"{form}.toml").run()
        make(tmp_path / f"{form} by one", **sections).run()
        assert tiny.files(tmp_path / form) == tiny.files(tmp_path / f"{form} by one")


def test_it_is_prepared_once_for_every_test_set_and_damping(make: Make, cache: Path) -> None:
    make(s_test=FISHER).run()
    before = tiny.files(cache / "curvature")
    tests = {"holdout": tiny.points(10, 2), "other": tiny.points(5, 3)}
    make(s_test=FISHER, tests=tests).run()
    make(s_test={**FISHER, "damping": {"relative": 0.5}}, tests=tests).run()
    assert tiny.files(cache / "curvature") == before
    assert len(list((cache / "s_test").glob("*/zarr.json"))) == 4


def test_status_says_what_was_prepared(make: Make, cache: Path) -> None:
    make(**SETTINGS["rank"]).run()
    text = "\n".join(inventory.listed(Cache(cache)))
    assert "curvature fisher, l2 0.01" in text
    assert "share of the trace that the low rank has: 0.9" in text
    [kept] = zarr.open_array(next((cache / "curvature").glob("*/kept_trace")), mode="r")[()].reshape(1)
    assert 0.9 < kept < 1


# ---- what it is of -------------------------------------------------------------------------------------------------


class Changed(torch.utils.data.Dataset[Any]):
    """The training set with another sample at one position."""

    def __init__(self, position: int) -> None:
        self.data, self.position = tiny.points(60, 1), position

    def __len__(self) -> int:
        return 60

    def __getitem__(self, position: int) -> Any:
        inputs, label = self.data[position]
        return (inputs + 1 if position == self.position else inputs), label


@pytest.mark.parametrize(("form", "position"), [("samples", 59), ("coordinates", 3), ("rank", 3)])
def test_a_changed_gradient_makes_it_invalid(make: Make, cache: Path, tmp_path: Path, form: str, position: int) -> None:
    make(**SETTINGS[form]).run()
    changed = make(**SETTINGS[form], train=Changed(position))
    assert changed.refresh() == {"train": [position]}
    changed.grad_z()
    done = {stage.stage: stage.done for stage in changed.plan().stages}
    assert (done["grad_z"], done["curvature"], done["s_test"]) == (4, 0, 0)
    scores = changed.run()["holdout"].scores[:]
    fresh = make(tmp_path / "fresh", **SETTINGS[form], train=Changed(position)).run()["holdout"].scores[:]
    np.testing.assert_array_equal(scores, fresh)


def test_it_is_not_valid_while_a_gradient_is_missing(make: Make, cache: Path) -> None:
    pipeline = make(s_test=FISHER)
    pipeline.run()
    before, group = tiny.files(cache), pipeline._works.find(pipeline._works.grad_z_place())
    group.discard(group.layout.grid.block((1,)))
    done = {stage.stage: stage.done for stage in make(s_test=FISHER).plan().stages}
    assert (done["grad_z"], done["curvature"], done["s_test"]) == (3, 0, 0)
    with pytest.raises(ip.MissingStage, match="grad_z is not complete: 1 of 4"):
        make(s_test=FISHER).s_test("holdout")
    make(s_test=FISHER).grad_z()
    assert make(s_test=FISHER).plan().complete
    assert tiny.files(cache) == before


@pytest.mark.parametrize(("form", "size"), [("samples", 70), ("samples", 90), ("rank", 70)])
def test_of_a_grown_training_set_it_is_that_of_a_fresh_one(
    make: Make, cache: Path, tmp_path: Path, form: str, size: int
) -> None:
    """Of 90 samples, the side of the coordinates is the smaller one."""
    make(**SETTINGS[form]).run()
    make(**SETTINGS[form], train=tiny.points(size, 1)).run()
    make(tmp_path / "fresh", **SETTINGS[form], train=tiny.points(size, 1)).run()
    assert tiny.files(cache) == tiny.files(tmp_path / "fresh")


@pytest.mark.parametrize("form", ["samples", "rank"])
def test_it_can_be_kept_where_the_training_set_grows(make: Make, cache: Path, form: str) -> None:
    old = make(**SETTINGS[form]).run()["holdout"].scores[:]
    before = tiny.files(cache / "curvature") | tiny.files(cache / "s_test")
    grown = ip.Pipeline(
        tiny.experiment(train=tiny.points(70, 1)), cache, tiny.settings(**SETTINGS[form]), keep_curvature=True
    )
    found = grown.run()["holdout"]
    np.testing.assert_array_equal(found.scores[:, :48], old[:, :48])
    assert found.curvature_samples == 60
    assert tiny.files(cache / "curvature") | tiny.files(cache / "s_test") == before


def test_another_encoding_or_seed_is_another_one(make: Make, cache: Path) -> None:
    identities = []
    for sections in (
        SETTINGS["rank"],
        {"s_test": {**SETTINGS["rank"]["s_test"], "seed": 1}},
        {**SETTINGS["rank"], "grad_z": {"encoding": "float32"}},
        SETTINGS["samples"],
        {"s_test": {**FISHER, "seed": 1}},
    ):
        works = make(**sections)._works
        identities.append((works.curvature_place().name, works.s_test_place("holdout").name))
    curvature, solutions = zip(*identities, strict=True)
    assert len(set(solutions)) == 5
    assert curvature[3] == curvature[4], "of no low rank, nothing is drawn"
    assert len(set(curvature)) == 4


def test_nothing_that_is_read_is_garbage(make: Make, cache: Path) -> None:
    make(s_test=FISHER).run()
    assert make(s_test={"solver": "identity"}).garbage() == []


# ---- what is refused, and what is said before ----------------------------------------------------------------------


def test_without_gradients_it_says_what_makes_them(make: Make, project: Path, cache: Path) -> None:
    with pytest.raises(ip.MissingStage, match=r"grad_z is not complete: 4 of 4 blocks.*pipeline\.grad_z\(\)"):
        make(s_test=FISHER).s_test("holdout")
    assert not (cache / "curvature").exists()
    project.write_text(tiny.solved_by(project.read_text(), solver="fisher"))
    said = CliRunner().invoke(app, ["s-test", str(project)])
    assert said.exit_code == 2
    assert "influence-pipeline grad-z" in said.output


def test_gradients_that_are_not_kept_are_refused(make: Make) -> None:
    pipeline = make(s_test=FISHER, grad_z={"store": False})
    for ask in (pipeline.plan, pipeline.run):
        with pytest.raises(ip.RequestError, match=r'"fisher" reads all training gradients.*grad_z.store = false'):
            ask()


def test_what_does_not_fit_is_refused_before_anything_is_computed(make: Make, cache: Path) -> None:
    pipeline = make(s_test={**FISHER, "rank": 60}, runtime={"memory": "400 KiB"})
    with pytest.raises(
        ip.RequestError, match=r"a basis of 60 × 60.*runtime\.memory is .*: raise it, or use rank = \d+"
    ):
        pipeline.plan()
    assert not cache.exists()


def test_a_plan_says_which_side_and_measures_it(make: Make) -> None:
    texts = {form: str(make(**SETTINGS[form]).plan()["curvature"]) for form in SETTINGS}
    assert "products of 60 gradients with one another" in texts["samples"]
    assert "a matrix of" in texts["coordinates"]
    assert "of rank 20" in texts["rank"]
    pipeline = make(s_test=FISHER)
    first = pipeline.plan(measure=True)
    assert first["curvature"].timing is None, "gradients are not complete"
    pipeline.grad_z()
    second = pipeline.plan(measure=True)
    assert second["curvature"].timing is not None
    assert second["s_test"].timing is not None


def test_parts_of_a_low_rank_are_bands_of_coordinates(make: Make, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TILE_COLUMNS", 30), ("TILE_ENTRIES", 30 * 16)):
        monkeypatch.setattr(plan, name, value)
    pipeline = make(**SETTINGS["rank"])
    found = pipeline.run()["holdout"]
    [path] = (path.parent for path in (cache / "curvature").glob("*/zarr.json"))
    assert len(list(Group(path).layout.grid)) == 2
    works = pipeline._works
    basis = Group(path).array("basis")[:]
    kept = works.find(works.grad_z_place()).rows("gradients")[:, :].astype(np.float64)
    low = basis.T @ kept
    tests = oracles.gradients(case(tiny.points(10, 2), 0.01)).numpy()
    dense = low.T @ low / 60 + (0.01 + DAMPING) * np.eye(83)
    assert off(found.scores, tests @ np.linalg.solve(dense, kept.T) / 60) < 1e-4
