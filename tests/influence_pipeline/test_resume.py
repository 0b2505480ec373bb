"""Whatever is cached is used, whatever is missing is computed, and what does not fit is refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import influence_pipeline as ip
from influence_pipeline.experiment import weights_hash
from stages.s_test.prepare import Prepare
from stages.stage import Block
from tests import tiny
from tests.conftest import ROOT
from tests.marks import thoroughly

Make = Callable[..., ip.Pipeline]
Ask = Callable[..., dict[str, Any]]
KILLS = 20


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Return what runs the tiny experiment in a child of a process that has loaded torch."""
    command = [sys.executable, "-m", "tests.influence_pipeline.killed"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        assert server.stdin
        assert server.stdout

        def ask(**order: Any) -> dict[str, Any]:
            print(json.dumps(order, default=str), file=server.stdin, flush=True)
            answer: dict[str, Any] = json.loads(server.stdout.readline())
            answer["computed"] = [tuple(block) for block in answer.get("computed", [])]
            return answer

        yield ask
        server.stdin.close()


@pytest.fixture(scope="module")
def reference(ask: Ask, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the files of a run that nothing interrupted, and what it said."""
    folder = tmp_path_factory.mktemp("reference") / "cache"
    said = ask(cache=folder)
    assert said["exit"] == 0
    return tiny.files(folder), said


@pytest.mark.parametrize("moment", [*range(0, KILLS, 4), *thoroughly(m for m in range(KILLS) if m % 4)])
def test_a_killed_run_goes_on_to_the_same_bytes(
    ask: Ask, reference: tuple[dict[str, bytes], dict[str, Any]], cache: Path, moment: int
) -> None:
    expected, uninterrupted = reference
    draw = random.Random(moment)
    die_at = int((moment + draw.random()) / KILLS * uninterrupted["operations"])
    killed = ask(cache=cache, die_at=die_at, how=("before", "half written", "after")[moment % 3])
    assert killed["exit"] == -9
    kept = tiny.blocks(cache)
    resumed = ask(cache=cache)
    assert resumed["exit"] == 0
    assert tiny.files(cache) == expected
    assert not kept & set(resumed["computed"])
    assert sorted([*kept, *resumed["computed"]]) == sorted(uninterrupted["computed"])


def test_kills_are_spread_over_all_stages(reference: tuple[dict[str, bytes], dict[str, Any]]) -> None:
    computed = reference[1]["computed"]
    assert {stage: sum(block[0] == stage for block in computed) for stage in ("grad_z", "s_test", "influence")} == {
        "grad_z": 4,
        "s_test": 3,
        "influence": 12,
    }


def test_a_run_killed_twice_goes_on_to_the_same_bytes(
    ask: Ask, reference: tuple[dict[str, bytes], dict[str, Any]], cache: Path
) -> None:
    for die_at in (200, 150, 100):
        assert ask(cache=cache, die_at=die_at, how="half written")["exit"] == -9
    assert ask(cache=cache)["exit"] == 0
    assert tiny.files(cache) == reference[0]


# ---- nothing twice ---------------------------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Return the list to which every block is added that is computed from now on."""
    from influence_pipeline.cache import Group

    found: list[tuple[str, ...]] = []
    commit = Group.commit

    def committed(group: Group, block: Any, *args: Any, **kwargs: Any) -> bool:
        found.append((group.path.parent.name, *map(str, block.index)))
        return commit(group, block, *args, **kwargs)

    monkeypatch.setattr(Group, "commit", committed)
    return found


def count(computed: list[tuple[str, ...]]) -> dict[str, int]:
    return {stage: sum(block[0] == stage for block in computed) for stage in sorted({block[0] for block in computed})}


def test_a_finished_run_computes_nothing_and_writes_nothing(
    done: Path, make: Make, computed: list[tuple[str, ...]]
) -> None:
    before = tiny.files(done)
    pipeline = make()
    assert pipeline.plan().complete
    assert pipeline.grad_z().computed == 0
    assert pipeline.s_test("holdout").computed == 0
    pipeline.run()
    assert computed == []
    assert tiny.files(done) == before


def test_a_preparation_interrupted_between_its_parts_goes_on_with_the_next(
    make: Make, cache: Path, finished: Path, computed: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Prepare.compute

    def interrupted(stage: Prepare, block: Block, *args: Any) -> Any:
        if block.index == (1,):
            raise KeyboardInterrupt
        return compute(stage, block, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Prepare, "compute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make().run()
    assert [block for block in computed if block[0] == "curvature"] == [("curvature", "0")]
    assert (make().plan()["curvature"].done, make().plan()["curvature"].total) == (1, 2)
    make().run()
    assert [block for block in computed if block[0] == "curvature"] == [("curvature", "0"), ("curvature", "1")]
    assert tiny.files(cache) == tiny.files(finished)


def test_planning_computes_nothing_and_writes_nothing(make: Make, cache: Path) -> None:
    plan = make().plan()
    assert not plan.complete
    assert [stage.done for stage in plan.stages] == [0, 0, 0, 0]
    assert not cache.exists()


def test_another_test_set_uses_the_same_gradients(done: Path, make: Make, computed: list[tuple[str, ...]]) -> None:
    tests = {"holdout": tiny.points(10, 2), "other": tiny.points(5, 3)}
    make(tests=tests).run()
    assert count(computed) == {"influence": 8, "s_test": 2}


def test_another_solver_uses_the_same_gradients(done: Path, make: Make, computed: list[tuple[str, ...]]) -> None:
    make(s_test={"solver": "identity"}).run()
    assert count(computed) == {"influence": 12, "s_test": 3}


def test_another_damping_uses_what_the_solver_prepared(done: Path, make: Make, computed: list[tuple[str, ...]]) -> None:
    make(s_test={"solver": "cg", "damping": {"relative": 0.2}}).run()
    assert count(computed) == {"influence": 12, "s_test": 3}


def test_other_ranks_use_the_same_solutions(done: Path, make: Make, computed: list[tuple[str, ...]]) -> None:
    make(influence={"top_k": 2}).run()
    assert count(computed) == {"influence": 6}


def test_a_plan_says_what_differs_from_what_is_cached(done: Path, make: Make) -> None:
    plan = make(s_test={"solver": "cg", "tolerance": 0.01}).plan("holdout")
    assert plan["grad_z"].complete
    assert plan["s_test"].done == 0
    assert plan["s_test"].differs == ("s_test.tolerance: 0.001 ≠ 0.01",)


def test_a_grown_training_set_keeps_its_whole_blocks(done: Path, make: Make, computed: list[tuple[str, ...]]) -> None:
    grown = make(train=tiny.points(70, 1)).run()["holdout"]
    assert sorted(block for block in computed if block[0] == "grad_z") == [("grad_z", "3"), ("grad_z", "4")]
    assert count(computed) == {"curvature": 2, "grad_z": 2, "influence": 15, "s_test": 3}
    fresh = make(done.parent / "fresh", train=tiny.points(70, 1)).run()["holdout"]
    assert (grown.scores[:] == fresh.scores[:]).all()
    assert (grown.helpful(1)[0] == fresh.helpful(1)[0]).all()
    assert make(train=tiny.points(70, 1)).plan().complete


def test_a_grown_test_set_keeps_its_whole_blocks(done: Path, make: Make, computed: list[tuple[str, ...]]) -> None:
    tests = {"holdout": tiny.points(13, 2)}
    grown = make(tests=tests).run()["holdout"]
    assert count(computed) == {"influence": 8, "s_test": 2}
    fresh = make(done.parent / "fresh", tests=tests).run()["holdout"]
    assert (grown.scores[:] == fresh.scores[:]).all()
    assert (grown.mean_scores() == fresh.mean_scores()).all()


def test_only_the_shape_of_metadata_changes_by_growing(done: Path, make: Make) -> None:
    before = metadata(done)
    make(train=tiny.points(70, 1), tests={"holdout": tiny.points(13, 2)}).run()
    after = metadata(done)
    assert before.keys() == after.keys()
    for made_anew in [name for name in before if name.startswith("curvature/")]:
        del before[made_anew], after[made_anew]
    for described in (*before.values(), *after.values()):
        del described["attributes"]["checksum"]
    shapes = {name for name in before if before[name].pop("shape", None) != after[name].pop("shape", None)}
    assert shapes
    assert before == after


def metadata(cache: Path) -> dict[str, dict[str, Any]]:
    return {name: json.loads(text) for name, text in tiny.files(cache).items() if name.endswith("zarr.json")}


def test_metadata_stays_as_created_while_blocks_are_computed(make: Make, cache: Path) -> None:
    pipeline = make()
    pipeline.grad_z()
    before = metadata(cache)
    for block in sorted(cache.glob("grad_z/*/blocks/c/*/0"))[1:]:
        block.unlink()
    pipeline.run()
    after = metadata(cache)
    assert {name: after[name] for name in before} == before


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"model": lambda: tiny.model(1)}, "weights: "),
        ({"grad_z": {"parameters": ["0.*"]}}, "parameters.2.weight: [3, 8] ≠ nothing"),
        ({"grad_z": {"encoding": "float32"}}, "encoding: float16 ≠ float32"),
    ],
)
def test_gradients_of_something_else_are_refused(
    done: Path, make: Make, computed: list[tuple[str, ...]], changes: dict[str, Any], differs: str
) -> None:
    before = tiny.files(done)
    with pytest.raises(ip.CacheMismatch) as refused:
        make(**changes).run()
    assert differs in str(refused.value)
    assert "computes 60 gradients" in str(refused.value)
    assert "KiB" in str(refused.value)
    assert "--new" in str(refused.value)
    assert refused.value.exit_code == 2
    assert tiny.files(done) == before
    make(**changes).run(new=True)
    assert count(computed)["grad_z"] == 4
    assert len(list(done.glob("grad_z/*/zarr.json"))) == 2
    assert before.items() <= tiny.files(done).items()
    make(**changes).run()
    make().run()
    assert count(computed)["grad_z"] == 4


def test_solutions_of_something_else_than_the_gradients_are_computed_with_a_hint(
    done: Path, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    tests = {"holdout": tiny.points(10, 2), "other": tiny.points(4, 3)}
    make(grad_z={"encoding": "float32"}, tests=tests).s_test("other")
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []
    pipeline = make(model=lambda: tiny.model(1), tests=tests)
    for name in tests:
        pipeline.s_test(name)
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    hashes = [weights_hash(tiny.model(seed)) for seed in (0, 1)]
    assert warning.endswith(f"now: weights: {hashes[0]} ≠ {hashes[1]}")


def changed(data: TensorDataset, position: int) -> TensorDataset:
    """Return the data with one sample's label changed."""
    inputs, labels = (tensor.clone() for tensor in data.tensors)
    labels[position] = (labels[position] + 1) % 3
    return TensorDataset(inputs, labels)


WHAT_TO_DO = r"[\s\S]*--refresh[\s\S]*--accept-data[\s\S]*verify[\s\S]*another name"


def test_a_changed_training_sample_is_refused_by_name(done: Path, make: Make) -> None:
    before = tiny.files(done)
    with pytest.raises(ip.CacheMismatch, match=r"'train': sample 15 is not what it was" + WHAT_TO_DO):
        make(train=changed(tiny.points(60, 1), 15)).run()
    with pytest.raises(ip.CacheMismatch, match=r"'train': sample 15 is not"):
        make(train=changed(tiny.points(60, 1), 15)).plan()
    assert tiny.files(done) == before


def test_a_changed_training_sample_is_refused_while_going_on(make: Make, cache: Path) -> None:
    make().grad_z()
    sorted(cache.glob("grad_z/*/blocks/c/*/0"))[2].unlink()
    with pytest.raises(ip.CacheMismatch, match="sample 15 is not what it was"):
        make(train=changed(tiny.points(60, 1), 15)).grad_z()


def test_a_changed_sample_that_was_not_compared_is_refused_where_it_is_read(make: Make) -> None:
    """Of the 60 samples 32 are compared beforehand; the solver reads them all."""
    make().grad_z()
    position = 14
    other = make(train=changed(tiny.points(60, 1), position))
    other.plan()
    with pytest.raises(ip.CacheMismatch, match=f"sample {position} is not what it was"):
        other.s_test("holdout")


def test_other_data_under_a_test_sets_name_are_refused(done: Path, make: Make) -> None:
    before = tiny.files(done)
    for settings in ({"solver": "cg"}, {"solver": "identity"}):
        with pytest.raises(ip.CacheMismatch, match=r"'holdout': sample 7 is not what it was" + WHAT_TO_DO):
            make(tests={"holdout": changed(tiny.points(10, 2), 7)}, s_test=settings).run()
    assert tiny.files(done).items() >= before.items()


def test_a_shrunk_data_set_is_refused(done: Path, make: Make) -> None:
    before = tiny.files(done)
    with pytest.raises(ip.CacheMismatch, match="60 samples of 'train', which has 50 now"):
        make(train=tiny.points(50, 1)).run()
    with pytest.raises(ip.CacheMismatch, match="10 samples of 'holdout', which has 5 now"):
        make(tests={"holdout": tiny.points(5, 2)}).run()
    assert tiny.files(done) == before


def test_a_stage_asked_for_too_early_names_the_call(make: Make) -> None:
    pipeline = make()
    with pytest.raises(ip.MissingStage, match=r"pipeline\.grad_z\(\).*grad-z"):
        pipeline.influence("holdout")
    pipeline.grad_z()
    with pytest.raises(ip.MissingStage, match=r"pipeline\.s_test\('holdout'\).*s-test --tests holdout"):
        pipeline.influence("holdout")


def test_an_unknown_test_set_is_refused_with_the_known_ones(make: Make, cache: Path) -> None:
    with pytest.raises(ip.RequestError, match="no test set 'nope'; the experiment has: holdout"):
        make().run("nope")
    assert not cache.exists()


def test_a_folder_of_other_things_is_no_cache(make: Make, cache: Path) -> None:
    cache.mkdir()
    (cache / "thesis.txt").write_text("precious")
    with pytest.raises(ip.RequestError, match="other things"):
        make()
    assert (cache / "thesis.txt").read_text() == "precious"


# ---- other ways to the same ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["float16", "float32"])
def test_uncached_gradients_give_the_cached_scores(make: Make, cache: Path, encoding: str) -> None:
    cached = make(grad_z={"encoding": encoding}).run()["holdout"]
    pipeline = make(cache.parent / "uncached", grad_z={"encoding": encoding, "store": False})
    uncached = pipeline.run()["holdout"]
    torch.testing.assert_close(uncached.scores[:], cached.scores[:], rtol=1e-5, atol=1e-8)
    assert (uncached.helpful(1)[0] == cached.helpful(1)[0]).all()
    assert not list(cache.parent.glob("uncached/grad_z/*"))
    with pytest.raises(ip.RequestError, match=r"grad_z\.store = false"):
        pipeline.grad_z()


def test_any_device_batch_gives_the_same_scores(make: Make, cache: Path) -> None:
    exact: dict[str, Any] = {"s_test": {"solver": "identity"}, "grad_z": {"encoding": "float32"}}
    expected = make(**exact).run()["holdout"].scores[:]
    for batch in (1, 7):
        found = make(cache.parent / str(batch), runtime={"device_batch": batch}, **exact).run()["holdout"].scores[:]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * abs(expected).max())


def test_a_live_experiment_is_sent_to_workers(tmp_path: Path, new_workers: None) -> None:
    """It has two blocks of the sizes that new workers, too, have."""
    experiment = tiny.experiment(train=tiny.points(1030, 1))
    solver = {"solver": "identity"}
    alone = ip.Pipeline(experiment, tmp_path / "alone", tiny.settings(s_test=solver)).run()["holdout"]
    pipeline = ip.Pipeline(experiment, tmp_path / "sent", tiny.settings(s_test=solver, runtime={"workers": 2}))
    assert pipeline.grad_z().computed == 2
    assert (pipeline.run()["holdout"].scores[:] == alone.scores[:]).all()
    assert tiny.files(tmp_path / "sent") == tiny.files(tmp_path / "alone")


def test_two_workers_write_the_bytes_of_one(project: Path) -> None:
    ip.Pipeline.from_toml(project).run()
    alone = project.parent / "runs"
    alone.rename(project.parent / "alone")
    with project.open("a") as settings:
        settings.write("workers = 2\n")
    ip.Pipeline.from_toml(project).run()
    assert tiny.files(alone) == tiny.files(project.parent / "alone")


CHANGING = """\
import os
from pathlib import Path

from tests import tiny

tiny.shrink_blocks()
HERE = Path(__file__).parent


class Changing:
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, position):
        inputs, label = self.data[position]
        return (inputs + 1 if position == 14 and (HERE / "changed").exists() else inputs), label


def experiment():
    with (HERE / "loads").open("a") as file:
        file.write(f"{os.getpid()}\\n")
    return tiny.experiment(train=Changing(tiny.points(60, 1)))
"""


def test_a_worker_loads_the_experiment_once_for_all_stages_and_anew_where_data_changed(project: Path) -> None:
    folder = project.parent
    (folder / "experiment.py").write_text(CHANGING)
    project.write_text(project.read_text() + "workers = 2\n")
    pipeline = ip.Pipeline.from_toml(project)
    pipeline.run()
    loads = (folder / "loads").read_text().split()
    assert len(set(loads)) == len(loads) > 1
    (folder / "changed").touch()
    assert pipeline.refresh() == {"train": [14]}
    pipeline.run()
    made = folder / "runs"
    made.rename(folder / "refreshed")
    ip.Pipeline.from_toml(project).run()
    assert tiny.files(made) == tiny.files(folder / "refreshed")


IDENTITY = {"solver": "identity"}
GGN = {"solver": "cg", "damping": {"relative": 0.1}}
DENSE = {"solver": "exact", "damping": {"relative": 0.1}}


@pytest.mark.parametrize(("first", "second"), [(GGN, DENSE), (DENSE, GGN)], ids=["cg-exact", "exact-cg"])
def test_dense_and_iterative_solvers_live_in_one_cache(
    make: Make, computed: list[tuple[str, ...]], first: dict[str, Any], second: dict[str, Any]
) -> None:
    for s_test in (first, second):
        make(s_test=s_test).run()
    computed.clear()
    found = [make(s_test=s_test).run()["holdout"].scores[:] for s_test in (first, second)]
    assert computed == []
    assert np.abs(found[0] - found[1]).max() < 0.1 * np.abs(found[0]).max(), "λ is a trace, or an estimate of it"


def test_another_damping_of_exact_uses_the_same_matrix(make: Make, computed: list[tuple[str, ...]]) -> None:
    make(s_test={"solver": "exact", "damping": 0.5}).run()
    computed.clear()
    make(s_test={"solver": "exact", "damping": {"relative": 1.0}, "seed": 3}).run()
    assert {stage for stage, *_ in computed} == {"s_test", "influence"}


def test_scores_of_a_grown_training_set_are_divided_by_its_own_size(make: Make, cache: Path, tmp_path: Path) -> None:
    make(s_test=IDENTITY, train=tiny.points(48, 1)).run()
    grown = make(s_test=IDENTITY, train=tiny.points(60, 1)).run()["holdout"]
    fresh = tiny.experiment(train=tiny.points(60, 1))
    expected = ip.Pipeline(fresh, tmp_path / "fresh", tiny.settings(s_test=IDENTITY)).run()["holdout"]
    np.testing.assert_array_equal(grown.scores[:], expected.scores[:])


def test_solutions_of_a_smaller_training_set_are_not_taken_for_those_of_a_grown_one(make: Make) -> None:
    make(train=tiny.points(48, 1)).run()
    grown = make(train=tiny.points(60, 1))
    grown.grad_z()
    assert not grown.plan()["s_test"].complete
    with pytest.raises(ip.MissingStage, match=r"pipeline\.s_test\('holdout'\)"):
        grown.influence("holdout")


def test_a_damaged_file_of_a_full_size_block_is_made_again(cache: Path) -> None:
    """A file of many tiles, of which the block fills a part: zarr reads it before it writes it."""
    pipeline = ip.Pipeline(tiny.experiment(), cache, tiny.settings())
    pipeline.run()
    before = tiny.files(cache)
    for path in cache.glob("grad_z/*/gradients/c/0/0"):
        path.write_bytes(b"x")
    ip.Pipeline(tiny.experiment(), cache, tiny.settings()).run()
    assert tiny.files(cache) == before
