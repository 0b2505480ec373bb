"""What ``ekfac`` prepares is two stages of the cache, the second made of the first: kept, shared, resumed, mended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import influence_pipeline as ip
from influence_pipeline import inventory
from influence_pipeline.cache import Cache, Group
from influence_pipeline.pipeline import Pipeline
from stages.s_test.prepare import Prepare
from stages.stage import Block
from tests import oracles, tiny

Make = Callable[..., ip.Pipeline]
EKFAC = {"solver": "ekfac"}


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return the list to which every part is added that is computed from now on, with its solver."""
    found: list[tuple[str, int]] = []
    commit = Group.commit

    def committed(group: Group, block: Any, *args: Any, **kwargs: Any) -> bool:
        stage, identity = group.path.parent.name, group.attributes["identity"]
        found.append((identity["curvature"] if stage == "curvature" else stage, block.index[0]))
        return commit(group, block, *args, **kwargs)

    monkeypatch.setattr(Group, "commit", committed)
    return found


PARTS = [("kfac", 0), ("kfac", 1), ("ekfac", 0), ("ekfac", 1)]


def prepared(computed: list[tuple[str, int]]) -> list[tuple[str, int]]:
    return [part for part in computed if part[0] in ("kfac", "ekfac")]


def test_both_solvers_share_the_factors(make: Make, computed: list[tuple[str, int]]) -> None:
    make(s_test={"solver": "kfac"}).run()
    assert prepared(computed) == PARTS[:2]
    make(s_test=EKFAC).run()
    assert prepared(computed) == PARTS


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"s_test": {**EKFAC, "damping": 0.5}}, []),
        ({"s_test": EKFAC, "tests": {"holdout": tiny.points(10, 2), "other": tiny.points(4, 3)}}, []),
        ({"s_test": {**EKFAC, "seed": 1}}, PARTS),
        ({"s_test": {**EKFAC, "fisher": "empirical"}}, PARTS),
        ({"s_test": EKFAC, "task": ip.Classification(l2=0.1)}, PARTS),
        ({"s_test": EKFAC, "train": tiny.points(70, 1)}, PARTS),
    ],
    ids=["damping", "another test set", "seed", "fisher", "l2", "a longer training set"],
)
def test_what_is_prepared_is_used_for_whatever_it_is_of(
    make: Make, computed: list[tuple[str, int]], changes: dict[str, Any], again: list[tuple[str, int]]
) -> None:
    make(s_test=EKFAC).run()
    computed.clear()
    make(**changes).run()
    assert prepared(computed) == again
    computed.clear()
    make(**changes).run()
    assert computed == []


def test_an_empirical_fisher_does_not_depend_on_a_seed_nor_on_draws(
    make: Make, computed: list[tuple[str, int]]
) -> None:
    task = ip.Task.from_loss(lambda o, y: torch.nn.functional.cross_entropy(o, y, reduction="none"), name="plain")
    with pytest.raises(ip.RequestError, match=r"draws targets by _FromLoss\.sample"):
        make(s_test=EKFAC, task=task).plan()
    make(s_test={**EKFAC, "fisher": "empirical"}, task=task).run()
    make(s_test={**EKFAC, "fisher": "empirical", "seed": 7}, task=task).run()
    assert prepared(computed) == PARTS


@pytest.mark.parametrize("stop", PARTS[1:])
def test_an_interrupted_preparation_goes_on_to_the_same_bytes(
    make: Make, cache: Path, tmp_path: Path, computed: list[tuple[str, int]], stop: tuple[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    make(tmp_path / "whole", s_test=EKFAC).run()
    compute = Prepare.compute
    computed.clear()

    def interrupted(stage: Prepare, block: Block, *args: Any) -> Any:
        if (stage.solver.solver, block.index[0]) == stop:
            raise KeyboardInterrupt
        return compute(stage, block, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Prepare, "compute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(s_test=EKFAC).run()
    make(s_test=EKFAC).run()
    assert prepared(computed) == PARTS
    assert tiny.files(cache) == tiny.files(tmp_path / "whole")


def test_two_workers_prepare_the_same_bytes(make: Make, cache: Path, tmp_path: Path) -> None:
    make(tmp_path / "one", s_test=EKFAC).s_test("holdout")
    make(s_test=EKFAC, runtime={"workers": 2}).s_test("holdout")
    assert tiny.files(cache) == tiny.files(tmp_path / "one")


def test_scores_are_those_of_the_dense_matrix(make: Make) -> None:
    solver = {"solver": "ekfac", "fisher": "empirical", "damping": 0.1}
    found = make(s_test=solver, grad_z={"encoding": "float32"}).run()["holdout"].scores[:]
    model = tiny.model().double()
    data, tests = (
        oracles.Data((inputs.double(), labels)) for inputs, labels in (tiny.points(60, 1)[:], tiny.points(10, 2)[:])
    )
    case = oracles.Case("", model, ip.Classification(l2=0.01), data)
    matrix = oracles.second_moments(case, "ekfac")
    rhs = oracles.gradients(oracles.Case("", model, case.task, tests))
    expected = oracles.solution(matrix, 0.1, rhs) @ oracles.gradients(case).T / 60
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


# ---- integrity -----------------------------------------------------------------------------------------------------


def groups(cache: Path) -> dict[str, Group]:
    return {group.attributes["identity"]["curvature"]: group for group in Cache(cache).groups("curvature")}


@pytest.mark.parametrize(
    ("solver", "array"), [("kfac", "eigenvectors"), ("kfac", "factor_sum"), ("ekfac", "square_sum")]
)
def test_damage_is_found_and_mended_to_the_same_bytes(make: Make, cache: Path, solver: str, array: str) -> None:
    make(s_test=EKFAC).run()
    before = tiny.files(cache)
    path = next(p for p in (groups(cache)[solver].path / array / "c").rglob("*") if p.is_file())
    path.write_bytes(path.read_bytes()[:-9] + b"\0" * 9)
    found = make(s_test=EKFAC).verify()
    assert len(found.damaged) == 1
    assert groups(cache)[solver].path.name in found.damaged[0]
    make(s_test=EKFAC).run()
    assert tiny.files(cache) == before


def test_damaged_eigenvectors_are_made_anew_when_they_are_read(make: Make, cache: Path) -> None:
    make(s_test=EKFAC).s_test("holdout")
    path = next(p for p in (groups(cache)["kfac"].path / "eigenvectors" / "c").rglob("*") if p.is_file())
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + b"\0" * 9)
    make(tests={"holdout": tiny.points(10, 2), "other": tiny.points(4, 3)}, s_test=EKFAC).s_test("other")
    assert path.read_bytes() == whole


def test_what_comes_of_changed_samples_is_computed_anew(make: Make, computed: list[tuple[str, int]]) -> None:
    make(s_test=EKFAC).run()
    changed = tiny.points(60, 1)
    changed.tensors[0][3] += 1
    computed.clear()
    pipeline = make(s_test=EKFAC, train=changed)
    pipeline.refresh()
    scores = pipeline.run()["holdout"].scores[:]
    assert prepared(computed) == PARTS
    fresh = make(pipeline.cache.path.parent / "fresh", s_test=EKFAC, train=changed).run()["holdout"].scores[:]
    assert (scores == fresh).all()


def test_a_kept_curvature_is_kept_in_both_stages(make: Make, cache: Path, computed: list[tuple[str, int]]) -> None:
    make(s_test=EKFAC).run()
    computed.clear()
    settings = tiny.settings(s_test=EKFAC)
    grown = Pipeline(tiny.experiment(train=tiny.points(70, 1)), cache, settings, keep_curvature=True).run()["holdout"]
    assert grown.curvature_samples == 60
    assert {stage for stage, _ in computed} == {"grad_z", "influence"}


def test_nothing_that_is_read_is_garbage(make: Make, cache: Path) -> None:
    make(s_test=EKFAC).run()
    assert inventory.garbage(Cache(cache), []) == []
    make(s_test={**EKFAC, "seed": 1}).s_test("holdout")
    left = {path.parent.name for path in make(s_test=EKFAC).garbage()}
    assert left == {"curvature", "s_test"}
    assert len(make(s_test=EKFAC).garbage()) == 3


def test_a_plan_has_both_stages_and_what_is_shown_has_its_figures(make: Make, cache: Path) -> None:
    plan = make(s_test=EKFAC).plan()
    assert [stage.stage for stage in plan.stages] == ["grad_z", "curvature", "curvature", "s_test", "influence"]
    assert "the factors of 2 layers" in str(plan)
    assert "squared gradients in the eigenbasis" in str(plan)
    found = make(s_test=EKFAC).run()["holdout"]
    assert make(s_test=EKFAC).plan().complete
    assert found.gradient_norm == pytest.approx(float(groups(cache)["kfac"].array("gradient_norm")[()]))
    shown = "\n".join(inventory.listed(Cache(cache)))
    assert "curvature ekfac, fisher sampled, l2 0.01" in shown
    assert shown.count("mean eigenvalue: ") == 2


def test_measuring_keeps_what_it_computes_of_both_stages(make: Make, computed: list[tuple[str, int]]) -> None:
    plan = make(s_test=EKFAC).plan(measure=True)
    assert all(stage.timing for stage in plan.stages)
    assert prepared(computed) == PARTS
    make(s_test=EKFAC).run()
    assert prepared(computed) == PARTS


def test_factors_that_do_not_fit_are_refused_before_anything_is_computed(make: Make, cache: Path) -> None:
    def wide() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(6, 800), torch.nn.Linear(800, 3))

    pipeline = make(model=wide, s_test=EKFAC, runtime={"memory": "16 MiB"})
    with pytest.raises(ip.RequestError, match=r'curvature: solver = "ekfac" needs .* for the factors of 2 layers'):
        pipeline.plan()
    assert not cache.exists()
