"""What ``nystrom`` prepares is blocks of products in the cache: kept, shared, resumed; and ``cg`` made faster by it."""

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
from stages.s_test import nystrom
from stages.s_test.nystrom import Sketch
from stages.stage import Block
from tests import oracles, tiny

Make = Callable[..., ip.Pipeline]
NYSTROM = {"solver": "nystrom", "rank": 20}
CG = {"solver": "cg", "preconditioner": "nystrom", "rank": 20}
BLOCKS = [("nystrom", 0), ("nystrom", 1), ("nystrom", 2)]


@pytest.fixture(autouse=True)
def few_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nystrom, "BAND", 8)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return the list to which every block of a preparation is added that is computed from now on, with its kind."""
    found: list[tuple[str, int]] = []
    commit = Group.commit

    def committed(group: Group, block: Any, *args: Any, **kwargs: Any) -> bool:
        if group.path.parent.name == "curvature":
            found.append((group.attributes["identity"]["curvature"], block.index[0]))
        return commit(group, block, *args, **kwargs)

    monkeypatch.setattr(Group, "commit", committed)
    return found


def groups(cache: Path) -> dict[str, Group]:
    return {group.attributes["identity"]["curvature"]: group for group in Cache(cache).groups("curvature")}


def test_scores_are_those_of_the_dense_matrix_where_no_vector_is_missing(make: Make) -> None:
    solver = {"solver": "nystrom", "rank": 83, "damping": 0.1}
    found = make(s_test=solver, grad_z={"encoding": "float32"}).run()["holdout"].scores[:]
    model = tiny.model().double()
    data, tests = (
        oracles.Data((inputs.double(), labels)) for inputs, labels in (tiny.points(60, 1)[:], tiny.points(10, 2)[:])
    )
    case = oracles.Case("", model, ip.Classification(l2=0.01), data)
    rhs = oracles.gradients(oracles.Case("", model, case.task, tests))
    expected = oracles.solution(oracles.ggn(case), 0.1, rhs) @ oracles.gradients(case).T / 60
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"s_test": {**NYSTROM, "damping": 0.5}}, []),
        ({"s_test": NYSTROM, "tests": {"holdout": tiny.points(10, 2), "other": tiny.points(4, 3)}}, []),
        ({"s_test": CG}, [("ggn", 0), ("ggn", 1)]),
        ({"s_test": {**NYSTROM, "rank": 17}}, BLOCKS),
        ({"s_test": NYSTROM, "train": tiny.points(70, 1)}, BLOCKS),
    ],
    ids=["damping", "another test set", "cg", "rank", "a longer training set"],
)
def test_what_is_prepared_is_used_for_whatever_it_is_of(
    make: Make, computed: list[tuple[str, int]], changes: dict[str, Any], again: list[tuple[str, int]]
) -> None:
    make(s_test=NYSTROM).run()
    assert computed == BLOCKS
    computed.clear()
    make(**changes).run()
    assert computed == again
    computed.clear()
    make(**changes).run()
    assert computed == []


def test_an_interrupted_preparation_goes_on_to_the_same_bytes(
    make: Make, cache: Path, tmp_path: Path, computed: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "whole", s_test=NYSTROM).run()
    compute = Sketch.compute
    computed.clear()

    def interrupted(stage: Sketch, block: Block, *args: Any) -> Any:
        if block.index == (1,):
            raise KeyboardInterrupt
        return compute(stage, block, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Sketch, "compute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(s_test=NYSTROM).run()
    make(s_test=NYSTROM).run()
    assert computed == BLOCKS
    assert tiny.files(cache) == tiny.files(tmp_path / "whole")


def test_a_plan_says_what_is_multiplied_and_what_is_shown_has_its_figures(make: Make, cache: Path) -> None:
    assert "20 products with H" in str(make(s_test=NYSTROM).plan())
    make(s_test=NYSTROM).run()
    assert make(s_test=NYSTROM).plan().complete
    assert make(s_test=NYSTROM).verify().damaged == []
    shown = "\n".join(inventory.listed(Cache(cache)))
    assert "curvature nystrom, l2 0.01, rank 20" in shown
    assert "share of the trace" in shown


def test_measuring_keeps_what_it_computes(make: Make, computed: list[tuple[str, int]]) -> None:
    make(s_test=NYSTROM).plan(measure=True)
    make(s_test=NYSTROM).run()
    assert computed == BLOCKS


def test_vectors_that_do_not_fit_are_refused_before_anything_is_computed(make: Make, cache: Path) -> None:
    def wide() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(6, 5_000), torch.nn.Linear(5_000, 3))

    with pytest.raises(ip.RequestError, match=r"curvature: rank = 200 needs .* enough for rank = 20"):
        make(model=wide, s_test={**NYSTROM, "rank": 200}, runtime={"memory": "16 MiB"}).plan()
    assert not cache.exists()


def test_cg_by_it_takes_fewer_iterations_to_the_same_scores(make: Make, cache: Path) -> None:
    settings = {"damping": 1e-3, "tolerance": 1e-5}
    plain = make(s_test={"solver": "cg", **settings}).run()["holdout"].scores[:]
    found = make(s_test={**CG, **settings}).run()["holdout"].scores[:]
    np.testing.assert_allclose(found, plain, rtol=2e-3, atol=2e-5 * np.abs(plain).max())
    by = {g.attributes["identity"]["s_test"]["preconditioner"]: g for g in Cache(cache).groups("s_test")}
    assert by["nystrom"].array("iterations")[:].sum() < 0.7 * by["none"].array("iterations")[:].sum()
