"""Data sets, models and tasks that fail, change or grow: named by sample, never mixed, and nothing computed twice."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from typer.testing import CliRunner

import influence_pipeline as ip
from influence_pipeline import plan
from influence_pipeline.cache import Group
from influence_pipeline.cli import app
from stages.influence import Influence
from tests import tiny
from tests.conftest import remember_blocks

Make = Callable[..., ip.Pipeline]
Computed = list[tuple[str, ...]]
IDENTITY = {"solver": "identity"}
CG = {"solver": "cg"}


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Computed:
    """Return the list to which every block is added that is written from now on, as (stage, index…)."""
    found: Computed = []
    commit = Group.commit

    def committed(group: Group, block: Any, *args: Any, **kwargs: Any) -> bool:
        done = commit(group, block, *args, **kwargs)
        found.append((group.path.parent.name, *map(str, block.index)))
        return done

    monkeypatch.setattr(Group, "commit", committed)
    return found


def count(blocks: Computed | set[tuple[str, ...]]) -> dict[str, int]:
    return dict(Counter(block[0] for block in blocks))


def of(name: str, data: Dataset[Any]) -> dict[str, Any]:
    """Return what makes a data set the training set or the test set of an experiment."""
    return {"train": data} if name == "train" else {"tests": {name: data}}


STAGES = ("grad_z", "curvature", "s_test", "influence")
SIZES = {"train": (60, 1), "holdout": (10, 2)}


def changed(name: str, *positions: int, size: int | None = None) -> dict[str, Any]:
    """Return an experiment's data set with some samples moved, so that the model sees it."""
    count, seed = SIZES[name]
    inputs, labels = (tensor.clone() for tensor in tiny.points(size or count, seed).tensors)
    for position in positions:
        inputs[position] += 0.5
    return of(name, TensorDataset(inputs, labels))


def nothing_left(cache: Path) -> bool:
    return not [path for pattern in ("*.partial", "*.claim") for path in cache.rglob(pattern)]


def goes_on(make: Make, cache: Path, finished: Path, name: str) -> None:
    """Run again, for a training set its own stage alone, and compare with what nothing disturbed."""
    if name == "holdout":
        make().run()
        assert tiny.files(cache) == tiny.files(finished)
        return
    make().grad_z()
    expected = {file: text for file, text in tiny.files(finished).items() if file.split("/")[0] in STAGES[:1]}
    assert {file: text for file, text in tiny.files(cache).items() if file.split("/")[0] in STAGES[:1]} == expected


# ---- data sets that raise --------------------------------------------------------------------------------------------


class Raising(Dataset[Any]):
    """A data set that raises at one sample."""

    def __init__(self, data: TensorDataset, position: int, error: Exception) -> None:
        self.data, self.position, self.error = data, position, error

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: int) -> Any:
        if position == self.position:
            raise self.error
        return self.data[position]


@pytest.mark.parametrize(("name", "position", "error", "kept", "readers"), [
    ("train", 0, ValueError("bad"), {}, 0),
    ("train", 14, KeyError("bad"), {}, 0),
    ("train", 33, IndexError("bad"), {"grad_z": 2}, 0),
    ("train", 38, OSError("bad"), {"grad_z": 2}, 1),
    ("train", 58, StopIteration("bad"), {"grad_z": 3}, 0),
    ("holdout", 0, RuntimeError("bad"), {"grad_z": 4, "curvature": 2}, 0),
    ("holdout", 7, ValueError("bad"), {"grad_z": 4, "curvature": 2, "s_test": 1}, 0),
])  # fmt: skip
def test_a_data_set_that_raises_is_named_with_its_sample_and_the_next_run_goes_on(
    make: Make,
    cache: Path,
    finished: Path,
    computed: Computed,
    name: str,
    position: int,
    error: Exception,
    kept: dict[str, int],
    readers: int,
) -> None:
    broken = of(name, Raising(tiny.points(*SIZES[name]), position, error))
    said = re.escape(f"data set '{name}' raised at sample {position}: {type(error).__name__}: {error}")
    with pytest.raises(ip.WorkError, match=said) as raised:
        make(**broken, loader_workers=readers).run()
    assert raised.value.exit_code == 1
    assert "Traceback" not in str(raised.value)
    assert nothing_left(cache)
    assert count(tiny.blocks(cache)) == kept
    computed.clear()
    goes_on(make, cache, finished, name)
    stages = ("grad_z",) if name == "train" else TOTAL
    assert count(computed) == {
        stage: TOTAL[stage] - kept.get(stage, 0) for stage in stages if TOTAL[stage] > kept.get(stage, 0)
    }


TOTAL = {"grad_z": 4, "curvature": 2, "s_test": 3, "influence": 12}


# ---- models that give NaN --------------------------------------------------------------------------------------------


class Faulty(torch.nn.Sequential):
    """The tiny model, with outputs that are no numbers for samples with certain first inputs."""

    _first: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = super().forward(inputs)  # type: ignore[no-untyped-call]
        at = torch.eq(inputs[..., :1, None], self._first).any(-1).any(-1, keepdim=True)
        return torch.where(at, torch.full_like(outputs, torch.nan), outputs)


def faulty(wrong: Tensor) -> Faulty:
    model = Faulty(*tiny.model().children())
    model._first = wrong
    return model


@pytest.mark.parametrize(("name", "positions", "kept"), [
    ("train", (0,), {}),
    ("train", (21,), {"grad_z": 1}),
    ("train", (38, 41), {"grad_z": 2}),
    ("holdout", (7,), {"grad_z": 4, "curvature": 2, "s_test": 1}),
])  # fmt: skip
def test_a_model_that_gives_nan_is_refused_with_the_samples(
    make: Make, cache: Path, finished: Path, name: str, positions: tuple[int, ...], kept: dict[str, int]
) -> None:
    wrong = tiny.points(*SIZES[name]).tensors[0][list(positions), 0]
    ids = ", ".join(map(str, positions))
    with pytest.raises(ip.RequestError, match=f"NaN or infinite for samples? {ids}: look at their inputs") as refused:
        make(model=faulty(wrong)).run()
    assert refused.value.exit_code == 2
    assert ("s_test holdout: " if name == "holdout" else "grad_z: ") in str(refused.value)
    assert nothing_left(cache)
    assert count(tiny.blocks(cache)) == kept
    goes_on(make, cache, finished, name)


# ---- data sets that give another sample the second time ------------------------------------------------------------


class Twice(Dataset[Any]):
    """A data set that gives another sample for some positions from the second time on."""

    def __init__(self, data: TensorDataset, *positions: int) -> None:
        self.data, self.positions, self.fetched = data, positions, Counter[int]()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: int) -> Any:
        self.fetched[position] += 1
        inputs, label = self.data[position]
        return (inputs + (position in self.positions and self.fetched[position] > 1), label)


@pytest.mark.parametrize(("name", "positions", "first"), [
    ("train", tuple(range(60)), 0), ("train", (15,), 15), ("holdout", (4,), 4),
])  # fmt: skip
def test_samples_that_differ_when_fetched_twice_are_refused_before_anything_is_computed_of_them(
    make: Make, cache: Path, finished: Path, name: str, positions: tuple[int, ...], first: int
) -> None:
    said = f"data set '{name}': sample {first} differs when fetched twice.*turn random augmentation off"
    with pytest.raises(ip.CacheMismatch, match=said) as refused:
        make(**of(name, Twice(tiny.points(*SIZES[name]), *positions))).run()
    assert refused.value.exit_code == 2
    assert nothing_left(cache)
    stage = "grad_z" if name == "train" else "s_test"
    assert count(tiny.blocks(cache)).get(stage, 0) == 0
    goes_on(make, cache, finished, name)


@pytest.mark.parametrize(("name", "position"), [("train", 14), ("holdout", 7)])
def test_a_sample_that_differs_when_fetched_again_later_is_refused_then(
    make: Make, cache: Path, finished: Path, name: str, position: int
) -> None:
    """Only some samples are fetched twice at once; of the others it is seen where they are read again."""
    data = of(name, Twice(tiny.points(*SIZES[name]), position))
    if name == "train":
        with pytest.raises(ip.CacheMismatch, match=f"'train': sample {position} differs when fetched twice"):
            make(**data).run()
        assert count(tiny.blocks(cache)) == {"grad_z": 4}
    else:
        make(**data).run()
        with pytest.raises(ip.CacheMismatch, match=f"'holdout': sample {position} is not what it was"):
            make(**data).run()
    make().run()
    assert tiny.files(cache) == tiny.files(finished)


# ---- samples that changed since --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train", "holdout"])
@pytest.mark.parametrize("positions", [(7,), (3, 5, 9)])
def test_verify_finds_exactly_the_samples_that_changed(
    done: Path, make: Make, name: str, positions: tuple[int, ...]
) -> None:
    before = tiny.files(done)
    pipeline = make(**changed(name, *positions))
    found = pipeline.verify()
    assert found.changed == {name: list(positions)}
    assert found.samples == 70
    assert found.damaged == found.differing == []
    assert found.exit_code == 2
    assert f"data set '{name}': changed samples {', '.join(map(str, positions))}" in str(found)
    assert "--refresh" in str(found)
    assert tiny.files(done) == before
    assert make().verify().exit_code == 0


def test_a_sample_that_is_not_compared_is_found_by_verify_alone(done: Path, make: Make, computed: Computed) -> None:
    data = changed("train", 14)
    make(**data).run()
    assert computed == []
    assert make(**data).verify().changed == {"train": [14]}


@pytest.mark.parametrize(("name", "position"), [("train", 15), ("train", 58), ("holdout", 7)])
def test_a_run_refuses_a_sample_that_is_compared_by_its_id(
    done: Path, make: Make, computed: Computed, name: str, position: int
) -> None:
    before = tiny.files(done)
    for call in ("run", "plan"):
        with pytest.raises(ip.CacheMismatch, match=f"'{name}': sample {position} is not what it was") as refused:
            getattr(make(**changed(name, position)), call)()
        assert refused.value.exit_code == 2
    assert computed == []
    assert tiny.files(done) == before


def all_cells(rows: range = range(3), columns: range = range(4)) -> Computed:
    return [("influence", str(row), str(column)) for row in rows for column in columns]


ALL_SOLUTIONS = [("s_test", str(block)) for block in range(3)]
SUMS = [("curvature", "0"), ("curvature", "1")]
REFRESHED = [
    ("train", (14,), CG, [("grad_z", "0"), *SUMS, *ALL_SOLUTIONS, *all_cells()]),
    ("train", (15, 40), CG, [("grad_z", "0"), ("grad_z", "2"), *SUMS, *ALL_SOLUTIONS, *all_cells()]),
    ("train", (14,), IDENTITY, [("grad_z", "0"), *all_cells(columns=range(1))]),
    ("train", (59, 50), IDENTITY, [("grad_z", "3"), *all_cells(columns=range(3, 4))]),
    ("holdout", (7,), CG, [("s_test", "1"), *all_cells(rows=range(1, 2))]),
    ("holdout", (0, 9), IDENTITY, [("s_test", "0"), ("s_test", "2"), *all_cells(range(1)), *all_cells(range(2, 3))]),
]


@pytest.fixture(scope="module")
def of_identity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished cache of plain gradient products, to be copied."""
    return made(tmp_path_factory.mktemp("identity"), s_test=IDENTITY)


def made(folder: Path, **changes: Any) -> Path:
    """Make a finished cache below a folder, outside of any test."""
    with pytest.MonkeyPatch.context() as patch:
        remember_blocks(patch)
        tiny.shrink_blocks()
        sections = {name: changes.pop(name) for name in tiny.SECTIONS if name in changes}
        ip.Pipeline(tiny.experiment(**changes), folder / "cache", tiny.settings(**sections)).run()
    return folder / "cache"


@pytest.mark.parametrize(("name", "positions", "solver", "expected"), REFRESHED)
def test_refresh_computes_exactly_what_came_of_changed_samples(
    done: Path,
    of_identity: Path,
    make: Make,
    computed: Computed,
    tmp_path: Path,
    name: str,
    positions: tuple[int, ...],
    solver: dict[str, Any],
    expected: Computed,
) -> None:
    if solver is IDENTITY:
        shutil.rmtree(done)
        shutil.copytree(of_identity, done)
    data = changed(name, *positions)
    pipeline = make(**data, s_test=solver)
    assert pipeline.refresh() == {name: sorted(positions)}
    pipeline.run()
    assert sorted(computed) == sorted(expected)
    make(tmp_path / "fresh", **data, s_test=solver).run()
    assert tiny.files(done) == tiny.files(tmp_path / "fresh")
    computed.clear()
    again = make(**data, s_test=solver)
    assert again.plan().complete
    assert again.verify().exit_code == 0
    assert again.refresh() == {}
    again.run()
    assert computed == []


def test_gradients_that_are_not_stored_are_refreshed_by_themselves(
    make: Make, cache: Path, computed: Computed, tmp_path: Path
) -> None:
    uncached = {"grad_z": {"store": False}, "s_test": IDENTITY}
    make(**uncached).run()
    computed.clear()
    make(**changed("train", 14), **uncached).run()
    assert computed == all_cells(columns=range(1))
    make(tmp_path / "fresh", **changed("train", 14), **uncached).run()
    assert tiny.files(cache) == tiny.files(tmp_path / "fresh")


def command(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def with_data(project: Path, data: str) -> None:
    """Give a project's experiment other arguments."""
    (project.parent / "experiment.py").write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\nfrom tests import tiny\nfrom tests.faults import "
        f"test_data\ntiny.shrink_blocks()\n\n\ndef experiment():\n    return tiny.experiment({data})\n"
    )


def test_the_command_line_verifies_refuses_and_refreshes(project: Path, tmp_path: Path) -> None:
    with_data(project, "")
    assert command("run", project).exit_code == 0
    with_data(project, "**test_data.changed('train', 14)")
    verified = command("verify", project)
    assert verified.exit_code == 2
    assert "data set 'train': changed samples 14\n" in verified.stdout
    with_data(project, "**test_data.changed('train', 15)")
    refused = command("run", project)
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: data set 'train': sample 15 is not what it was")
    both = command("run", project, "--refresh", "--accept-data")
    assert both.exit_code == 2
    seen = command("run", project, "--accept-data")
    assert seen.exit_code == 2
    assert "training sample 15 has a gradient" in seen.stderr
    refreshed = command("run", project, "--refresh")
    assert refreshed.exit_code == 0, refreshed.output
    assert "changed samples of 'train': 15\n" in refreshed.stdout
    again = command("run", project, "--refresh")
    assert "no sample has changed\n" in again.stdout
    assert command("verify", project).exit_code == 0


# ---- samples that changed, and the model does not see it -----------------------------------------------------------


class Records(Dataset[Any]):
    """The tiny samples as mappings, with an entry that the model does not read."""

    def __init__(self, data: TensorDataset, sources: dict[int, str] | None = None, *seen: int) -> None:
        self.data, self.sources, self.seen = data, sources or {}, seen

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: int) -> Any:
        inputs, label = self.data[position]
        further = {"source": self.sources[position]} if position in self.sources else {}
        return {"inputs": inputs + 0.5 * (position in self.seen), "labels": label, "source": "camera", **further}


class OfRecords(torch.nn.Module):
    """The tiny model, called with the entries of a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny.model()

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.inner(inputs)
        return outputs


def records(sources: dict[str, dict[int, str]] | None = None, **seen: int) -> dict[str, Any]:
    """Return an experiment of records, some of other sources, and one of each named data set with other inputs."""
    sources = sources or {}
    sets = {
        name: Records(tiny.points(*SIZES[name]), sources.get(name), *([seen[name]] if name in seen else []))
        for name in SIZES
    }
    return {"model": OfRecords(), **of("train", sets["train"]), **of("holdout", sets["holdout"])}


def zeros(zero: float) -> dict[str, Any]:
    """Return data sets with a sample whose inputs are zeros of this sign."""
    found: dict[str, Any] = {}
    for name, position in (("train", 14), ("holdout", 7)):
        inputs, labels = (tensor.clone() for tensor in tiny.points(*SIZES[name]).tensors)
        inputs[position] = zero
        found |= of(name, TensorDataset(inputs, labels))
    return found


SEEN_IN_TRAINING = r"training sample 14 has a gradient [\d.]+% off the cached one \(loss [\d.]+, cached [\d.]+\)"
SEEN_IN_TESTS = r"test sample 7 has a measurement of [\d.]+, cached [\d.]+"
UNSEEN = {
    "an entry": (records(), records({"train": {14: "scanner", 33: "scanner"}, "holdout": {7: "scanner"}})),
    "a zero": (zeros(0.0), zeros(-0.0)),
}


@pytest.mark.parametrize(("unseen", "solver"), [
    ("an entry", CG), ("an entry", {"solver": "exact"}), ("a zero", CG), ("a zero", IDENTITY),
])  # fmt: skip
def test_changes_that_the_model_does_not_see_are_accepted_and_nothing_is_computed(
    make: Make, cache: Path, computed: Computed, unseen: str, solver: dict[str, Any]
) -> None:
    first, second = UNSEEN[unseen]
    make(**first, s_test=solver).run()
    before = tiny.files(cache)
    computed.clear()
    ids = {"train": [14, 33] if unseen == "an entry" else [14], "holdout": [7]}
    assert make(**second, s_test=solver).verify().changed == ids
    pipeline = make(**second, s_test=solver)
    assert pipeline.accept_data() == ids
    assert pipeline.plan().complete
    pipeline.run()
    anew = make(**second, s_test=solver)
    assert anew.plan().complete
    anew.run()
    assert computed == []
    assert anew.verify(sample=4).exit_code == 0
    assert nothing_left(cache)
    after = tiny.files(cache)
    differs = {name.split("/")[2] for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert differs <= {"digests", "blocks", "finished"}
    assert make(**first, s_test=solver).verify().changed == ids
    assert make(**first, s_test=solver).accept_data() == ids
    assert tiny.files(cache) == before, "and back"


@pytest.mark.parametrize(("name", "position", "what", "solver"), [
    ("train", 14, SEEN_IN_TRAINING, CG), ("train", 14, SEEN_IN_TRAINING, IDENTITY), ("holdout", 7, SEEN_IN_TESTS, CG),
])  # fmt: skip
def test_a_change_that_the_model_sees_is_not_accepted(
    make: Make, cache: Path, computed: Computed, name: str, position: int, what: str, solver: dict[str, Any]
) -> None:
    """Neither is an unseen one beside it."""
    make(**records(), s_test=solver).run()
    before = tiny.files(cache)
    computed.clear()
    changes = records({name: {2: "scanner"}}, **{name: position})
    said = rf"data set '{name}': the change of samples 2, {position} matters to the model: {what}.*--refresh"
    with pytest.raises(ip.CacheMismatch, match=said) as refused:
        make(**changes, s_test=solver).accept_data()
    assert refused.value.exit_code == 2
    assert tiny.files(cache) == before
    assert computed == []
    make(**records(), s_test=solver).run()
    assert computed == []


def test_a_change_that_the_model_sees_is_not_accepted_among_many_that_it_does_not(make: Make, cache: Path) -> None:
    make(**records()).run()
    before = tiny.files(cache)
    unseen = {"train": dict.fromkeys(range(20), "scanner")}
    with pytest.raises(ip.CacheMismatch, match="matters to the model: training sample 3 has a gradient"):
        make(**records(unseen, train=3)).accept_data()
    assert tiny.files(cache) == before


def test_an_unseen_change_of_a_test_set_is_accepted_beside_a_seen_one_of_the_training_set_or_not_at_all(
    make: Make, cache: Path
) -> None:
    make(**records()).run()
    before = tiny.files(cache)
    with pytest.raises(ip.CacheMismatch, match="samples 14 matters to the model"):
        make(**records({"holdout": {7: "scanner"}}, train=14)).accept_data()
    assert tiny.files(cache) == before
    assert make(**records({"holdout": {7: "scanner"}})).accept_data() == {"holdout": [7]}


def test_the_command_line_accepts_what_the_model_does_not_see(project: Path, computed: Computed) -> None:
    with_data(project, "**test_data.zeros(0.0)")
    assert command("run", project).exit_code == 0
    computed.clear()
    with_data(project, "**test_data.zeros(-0.0)")
    refused = command("run", project)
    assert refused.exit_code == 2, refused.output
    assert "sample 7 is not what it was" in refused.stderr
    accepted = command("run", project, "--accept-data")
    assert accepted.exit_code == 0, accepted.output
    assert "accepted samples of 'train': 14\n" in accepted.stdout
    assert "accepted samples of 'holdout': 7\n" in accepted.stdout
    assert command("run", project).exit_code == 0
    assert command("verify", project, "--sample", 3).exit_code == 0
    assert command("plan", project).stdout.count("complete") == 4
    assert computed == []


# ---- data sets that grow ---------------------------------------------------------------------------------------------


def keeping(folder: Path, **changes: Any) -> ip.Pipeline:
    """Return a pipeline that keeps the curvature of a smaller training set."""
    sections = {name: changes.pop(name) for name in tiny.SECTIONS if name in changes}
    return ip.Pipeline(tiny.experiment(**changes), folder, tiny.settings(**sections), keep_curvature=True)


def stored(cache: Path, stage: str, name: str) -> Any:
    return Group(next(cache.glob(f"{stage}/*/zarr.json")).parent).rows(name)


GROWN = {"train": tiny.points(70, 1)}


@pytest.mark.parametrize("solver", [CG, {"solver": "exact"}], ids=lambda solver: str(solver["solver"]))
def test_a_kept_curvature_keeps_all_scores_and_gives_those_of_new_samples(
    make: Make, cache: Path, computed: Computed, tmp_path: Path, solver: dict[str, Any]
) -> None:
    old = make(s_test=solver).run()["holdout"].scores[:]
    kept = {name: text for name, text in tiny.files(cache).items() if name.startswith(("s_test/", "curvature/"))}
    computed.clear()
    grown = keeping(cache, s_test=solver, **GROWN).run()["holdout"]
    assert sorted(computed) == [("grad_z", "3"), ("grad_z", "4"), *all_cells(columns=range(3, 5))]
    scores = grown.scores[:]
    np.testing.assert_array_equal(scores[:, :48], old[:, :48])
    # The gradients of a block that was not full are computed in other batches now.
    np.testing.assert_allclose(scores[:, 48:60], old[:, 48:], rtol=1e-4, atol=1e-6 * abs(old).max())
    solutions = np.asarray(stored(cache, "s_test", "vectors")[:, :], np.float64)
    gradients = np.asarray(stored(cache, "grad_z", "gradients")[60:70, :], np.float64)
    expected = solutions @ gradients.T / 60
    np.testing.assert_allclose(scores[:, 60:], expected, rtol=1e-4, atol=1e-6 * abs(expected).max())
    assert grown.curvature_samples == 60
    assert len(grown.train_ids) == 70
    np.testing.assert_allclose(grown.mean_scores(), scores.mean(axis=0), rtol=1e-5, atol=1e-9)
    assert kept.items() <= tiny.files(cache).items()
    computed.clear()
    again = keeping(cache, s_test=solver, **GROWN)
    assert again.plan().complete
    assert again.run()["holdout"].curvature_samples == 60
    assert keeping(cache, s_test=solver, **GROWN).verify(sample=3).exit_code == 0
    assert ip.Influences.open(cache, "holdout").curvature_samples == 60
    assert computed == []
    further = keeping(cache, s_test=solver, train=tiny.points(80, 1)).run()["holdout"]
    assert further.curvature_samples == 60
    np.testing.assert_array_equal(further.scores[:, :64], scores[:, :64])
    make(s_test=solver, train=tiny.points(80, 1)).run()
    make(tmp_path / "fresh", s_test=solver, train=tiny.points(80, 1)).run()
    assert tiny.files(cache) == tiny.files(tmp_path / "fresh")


@pytest.mark.parametrize("size", [61, 70])
def test_a_grown_training_set_gives_the_bytes_of_a_fresh_cache(
    done: Path, make: Make, computed: Computed, tmp_path: Path, size: int
) -> None:
    data = {"train": tiny.points(size, 1)}
    grown = make(**data).run()["holdout"]
    blocks = [str(block) for block in range(3, -(-size // 16))]
    columns = range(-(-size // 16))
    assert sorted(computed) == sorted([
        *(("grad_z", block) for block in blocks),
        *SUMS,
        *ALL_SOLUTIONS,
        *all_cells(columns=columns),
    ])
    assert grown.curvature_samples == size
    make(tmp_path / "fresh", **data).run()
    assert tiny.files(done) == tiny.files(tmp_path / "fresh")


@pytest.mark.parametrize("size", [12, 13])
def test_a_grown_test_set_gives_the_bytes_of_a_fresh_cache(
    done: Path, make: Make, computed: Computed, tmp_path: Path, size: int
) -> None:
    data = {"tests": {"holdout": tiny.points(size, 2)}}
    make(**data).run()
    rows = range(2, -(-size // 4))
    assert sorted(computed) == sorted([*(("s_test", str(row)) for row in rows), *all_cells(rows)])
    make(tmp_path / "fresh", **data).run()
    assert tiny.files(done) == tiny.files(tmp_path / "fresh")


@pytest.mark.parametrize("grown", [GROWN, {"tests": {"holdout": tiny.points(13, 2)}}], ids=["train", "tests"])
def test_nothing_is_damaged_where_growth_was_interrupted(
    done: Path, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grown: dict[str, Any]
) -> None:
    """What was merged of fewer samples is of the past, not broken."""
    calls: list[None] = []
    compute = Influence.compute

    def interrupted(stage: Influence, *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(stage, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Influence, "compute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(**grown).run()
    found = make(**grown).verify()
    assert found.damaged == []
    assert found.exit_code == 0
    make(**grown).run()
    make(tmp_path / "fresh", **grown).run()
    assert tiny.files(done) == tiny.files(tmp_path / "fresh")


def test_a_plan_says_what_growth_costs_with_and_without_the_old_curvature(
    done: Path, make: Make, computed: Computed
) -> None:
    before = tiny.files(done)
    kept, anew = keeping(done, **GROWN).plan(), make(**GROWN).plan()
    assert {stage.stage: (stage.done, stage.total) for stage in kept.stages} == {
        "grad_z": (3, 5), "curvature": (2, 2), "s_test": (3, 3), "influence": (9, 15),
    }  # fmt: skip
    assert {stage.stage: (stage.done, stage.total) for stage in anew.stages} == {
        "grad_z": (3, 5), "curvature": (0, 2), "s_test": (0, 3), "influence": (0, 15),
    }  # fmt: skip
    assert kept["curvature"].differs == ()
    assert "H and 1/N are of the first 60 of 70 training samples (kept)" in str(kept)
    assert "H and 1/N" not in str(make().plan())
    assert re.search(r"training samples: 60 ≠ 70.*computed anew \(--keep-curvature keeps them\)", str(anew))
    assert tiny.files(done) == before
    assert computed == []


def test_the_command_line_says_how_many_samples_a_kept_curvature_is_of(project: Path) -> None:
    with_data(project, "")
    assert "H and 1/N are of" not in command("run", project).stdout
    with_data(project, "train=tiny.points(70, 1)")
    planned = command("plan", project)
    assert "training samples: 60 ≠ 70" in planned.stdout
    kept = command("plan", project, "--keep-curvature")
    assert "60 ≠ 70" not in kept.stdout
    of = "H and 1/N are of the first 60 of 70 training samples"
    run = command("run", project, "--keep-curvature")
    assert run.exit_code == 0, run.output
    assert of in run.stdout
    assert of in command("status", project).stdout
    assert of in command("show", project).stdout
    assert of in command("influence", project, "--keep-curvature").stdout
    assert command("run", project).exit_code == 0
    for words in (("status",), ("show",), ("run",)):
        assert "H and 1/N are of" not in command(*words, project).stdout


def test_a_curvature_that_is_not_there_cannot_be_kept(make: Make, cache: Path) -> None:
    with pytest.raises(ip.RequestError, match="no curvature can be kept: none is cached"):
        keeping(cache).run()
    make(s_test=IDENTITY).run()
    with pytest.raises(ip.RequestError, match="no curvature can be kept: solver 'identity' has none"):
        keeping(cache, s_test=IDENTITY, **GROWN).run()


def test_a_sample_that_changed_while_the_set_grew_is_refused(done: Path, make: Make, computed: Computed) -> None:
    for pipeline in (make(**changed("train", 15, size=70)), keeping(done, **changed("train", 15, size=70))):
        with pytest.raises(ip.CacheMismatch, match="'train': sample 15 is not what it was"):
            pipeline.run()
    assert computed == []
    with pytest.raises(ip.CacheMismatch, match="'train': sample 50 is not what it was"):
        keeping(done, **changed("train", 50, size=70)).run()
    make().run()
    assert computed == []


# ---- a task whose code changed ---------------------------------------------------------------------------------------


def task(factor: float, version: int = 1) -> ip.Task:
    """Return a task of always the same name, whose losses are scaled."""

    class Tuned(ip.Classification):
        def losses(self, outputs: Tensor, batch: Any) -> Tensor:
            return factor * super().losses(outputs, batch)

    made = Tuned(l2=0.01)
    made.version = version
    return made


@pytest.fixture(scope="module")
def of_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished cache of the task as it was, to be copied."""
    return made(tmp_path_factory.mktemp("task"), task=task(1.0))


WITH_NUMBERS = (
    r"the code of the task, or of the model, is not the one that the cached gradients are of: "
    r"training sample \d+ has a gradient 33\.\d% off the cached one \(loss ([\d.]+), cached ([\d.]+)\)"
)


def lose_a_block(cache: Path) -> dict[str, Any]:
    next(cache.glob("grad_z/*/blocks/c/2/0")).unlink()
    return {}


def grow(cache: Path) -> dict[str, Any]:
    return GROWN


def another_test_set(cache: Path) -> dict[str, Any]:
    return {"tests": {"holdout": tiny.points(10, 2), "other": tiny.points(5, 3)}}


def more_tests(cache: Path) -> dict[str, Any]:
    return {"tests": {"holdout": tiny.points(13, 2)}}


def another_solver(cache: Path) -> dict[str, Any]:
    return {"s_test": IDENTITY}


def another_damping(cache: Path) -> dict[str, Any]:
    return {"s_test": {"solver": "cg", "damping": 0.5}}


def a_dense_solver(cache: Path) -> dict[str, Any]:
    return {"s_test": {"solver": "exact"}}


MORE_WORK = (lose_a_block, grow, another_test_set, more_tests, another_solver, another_damping, a_dense_solver)


@pytest.mark.parametrize("more", MORE_WORK, ids=lambda more: more.__name__)
def test_a_task_whose_code_changed_is_refused_before_anything_is_added(
    make: Make,
    cache: Path,
    of_task: Path,
    computed: Computed,
    tmp_path: Path,
    more: Callable[[Path], dict[str, Any]],
) -> None:
    """Nothing that was made before the refusal is used after the change is undone."""
    shutil.copytree(of_task, cache)
    changes = more(cache)
    before = tiny.blocks(cache)
    with pytest.raises(ip.CacheMismatch, match=WITH_NUMBERS) as refused:
        make(task=task(1.5), **changes).run()
    assert refused.value.exit_code == 2
    assert "raise `version`" in str(refused.value)
    numbers = re.search(WITH_NUMBERS, str(refused.value))
    assert numbers
    assert float(numbers[1]) == pytest.approx(1.5 * float(numbers[2]), rel=1e-3)
    added = [block[0] for block in computed]
    assert nothing_left(cache)
    if added:
        scores = make(task=task(1.0), **changes).run()["holdout"].scores[:]
        expected = make(tmp_path / "fresh", task=task(1.0), **changes).run()["holdout"].scores[:]
        np.testing.assert_array_equal(scores, expected)
        assert tiny.files(tmp_path / "fresh").items() <= tiny.files(cache).items()
    assert added == []
    assert before <= tiny.blocks(cache)


def one_sample_more(cache: Path) -> dict[str, Any]:
    """The only block of gradients is not full, so that growth computes all of it again."""
    return {"train": tiny.points(61, 1)}


def no_gradients(cache: Path) -> dict[str, Any]:
    shutil.rmtree(next(cache.glob("grad_z/*/zarr.json")).parent)
    return {}


def damaged_gradients(cache: Path) -> dict[str, Any]:
    for path in cache.glob("grad_z/*/gradients/c/*/0"):
        path.write_bytes(path.read_bytes()[:50])
    return {}


@pytest.mark.parametrize("more", [one_sample_more, no_gradients, damaged_gradients], ids=lambda more: more.__name__)
@pytest.mark.parametrize("keep", [False, True], ids=["anew", "kept"])
def test_changed_code_is_refused_where_no_gradient_stays_to_compare_with(
    cache: Path,
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    computed: Computed,
    more: Callable[[Path], dict[str, Any]],
    keep: bool,
) -> None:
    monkeypatch.setattr(plan, "MOST_ROWS", 64)
    make(task=task(1.0)).run()
    changes = more(cache)
    computed.clear()
    run = keeping if keep else make
    with pytest.raises(ip.CacheMismatch, match="the code of the task, or of the model, is not the one"):
        run(cache, task=task(1.5), **changes).run()
    assert computed == []
    run(cache, task=task(1.0), **changes).run()


def test_changed_code_is_refused_before_changed_samples_are_computed_anew(
    cache: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MOST_ROWS", 64)
    make(task=task(1.0), s_test=IDENTITY).run()
    before = tiny.files(cache)
    with pytest.raises(ip.CacheMismatch, match="the code of the task"):
        make(task=task(1.5), s_test=IDENTITY, **changed("train", 5)).refresh()
    assert tiny.files(cache) == before
    assert make(task=task(1.0), s_test=IDENTITY, **changed("train", 5)).refresh() == {"train": [5]}


def test_growth_that_failed_leaves_the_cache_to_the_smaller_set(done: Path, make: Make, computed: Computed) -> None:
    before = tiny.files(done)
    with pytest.raises(ip.WorkError, match="raised at sample 62"):
        make(train=Raising(tiny.points(100, 1), 62, OSError("unreadable"))).grad_z()
    computed.clear()
    assert make().plan().complete
    make().run()
    assert computed == []
    assert tiny.files(done) == before


def test_a_cache_that_nothing_was_computed_for_is_of_no_size_yet(cache: Path, make: Make, finished: Path) -> None:
    with pytest.raises(ip.WorkError, match="raised at sample 5"):
        make(train=Raising(tiny.points(2500, 1), 5, OSError("unreadable"))).run()
    make().run()
    assert tiny.files(cache) == tiny.files(finished)


def test_verifying_a_sample_of_gradients_reports_a_changed_sample_and_damage_together(done: Path, make: Make) -> None:
    path = next(done.glob("influence/*/scores/c/0/0"))
    path.write_bytes(path.read_bytes()[:10])
    found = make(**changed("train", 0)).verify(sample=60)
    assert found.changed == {"train": [0]}
    assert found.rows == 59
    assert len(found.damaged) == 1
    again = make().verify()
    assert again.damaged == []
    assert again.absent == 1
    assert "; 1 block is not there, the next run computes it" in str(again)


def measuring(factor: float) -> ip.Task:
    """Return a task of always the same name, whose measurement alone is scaled."""

    class Measuring(ip.Classification):
        def measurements(self, outputs: Tensor, batch: Any) -> Tensor:
            return factor * self.losses(outputs, batch)

    return Measuring(l2=0.01)


@pytest.mark.parametrize(("tasks", "stored"), [(measuring, True), (task, False)], ids=["measurement", "not_stored"])
def test_a_task_that_measures_something_else_is_refused_before_tests_are_added(
    make: Make, cache: Path, computed: Computed, tasks: Callable[[float], ip.Task], stored: bool
) -> None:
    """The gradients are the same, or none are there; rows of two measurements must not stand in one table."""
    sections = {"grad_z": {"store": stored}}
    make(task=tasks(1.0), **sections).run()
    computed.clear()
    grown = {"tests": {"holdout": tiny.points(13, 2)}}
    with pytest.raises(ip.CacheMismatch, match=r"has a (measurement|loss) of [\d.]+, cached [\d.]+"):
        make(task=tasks(1.5), **grown, **sections).run()
    assert computed == []
    make(task=tasks(1.0), **grown, **sections).run()
    assert make(task=tasks(1.0), **grown, **sections).plan().complete


def test_verify_computes_gradients_again_and_finds_changed_code(make: Make, cache: Path, of_task: Path) -> None:
    shutil.copytree(of_task, cache)
    before = tiny.files(cache)
    assert make(task=task(1.0)).verify(sample=60).exit_code == 0
    assert make(task=task(1.5)).verify().exit_code == 0, "nothing is computed again unless asked for"
    found = make(task=task(1.5)).verify(sample=5)
    assert found.rows == len(found.differing) == 5
    assert found.exit_code == 2
    for text in found.differing:
        assert re.fullmatch(
            r"training sample \d+ has a gradient 33\.\d% off the cached one \(loss [\d.e-]+, cached [\d.e-]+\)", text
        )
    assert "raise the task's `version`" in str(found)
    assert tiny.files(cache) == before


def test_a_raised_version_is_another_task(make: Make, cache: Path, of_task: Path, tmp_path: Path) -> None:
    shutil.copytree(of_task, cache)
    before = tiny.files(cache)
    with pytest.raises(ip.CacheMismatch, match=r"task\.version: 1 ≠ 2"):
        make(task=task(1.5, version=2)).run()
    raised = make(task=task(1.5, version=2)).run(new=True)["holdout"]
    fresh = make(tmp_path / "fresh", task=task(1.5, version=2)).run()["holdout"]
    np.testing.assert_array_equal(raised.scores[:], fresh.scores[:])
    assert before.items() <= tiny.files(cache).items()
    assert tiny.files(tmp_path / "fresh").items() <= tiny.files(cache).items()
