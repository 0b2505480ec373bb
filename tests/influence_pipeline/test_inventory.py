"""What is cached is listed, and goes only where it is ours, asked for, and of no more use."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import influence_pipeline as ip
from influence_pipeline import inventory
from influence_pipeline.cache import Cache, claims
from influence_pipeline.cli import app
from tests import tiny

Make = Callable[..., ip.Pipeline]


def groups(cache: Path) -> set[str]:
    return {f"{path.parent.parent.name}/{path.parent.name}" for path in cache.glob("*/*/zarr.json")}


def group(cache: Path, stage: str) -> Path:
    return next(cache.glob(f"{stage}/*/zarr.json")).parent


def invoke(project: Path, command: str, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, [command, str(project), *arguments])
    return result.exit_code, result.output


@pytest.fixture
def run(project: Path) -> Path:
    """Return a project whose pipeline was run."""
    ip.Pipeline.from_toml(project).run()
    return project


# ---- listing ---------------------------------------------------------------------------------------------------------


def test_everything_cached_is_listed_with_how_much_of_it_is_there(done: Path) -> None:
    group(done, "grad_z").joinpath("blocks/c/2/0").unlink()
    text = "\n".join(inventory.listed(Cache(done)))
    assert "4 sets of arrays" in text
    assert "3 / 4      blocks" in text
    assert "12 / 12     blocks" in text
    assert text.count(" ago") == 4
    assert "solver cg" in text
    assert "distance from an optimum" in text
    assert re.search(
        r"products of gradients, float16 against exact: Spearman (1.0|0.99)\d+, 100.0% of the top 100", text
    )


def test_work_in_progress_is_listed(done: Path) -> None:
    claim = claims.take(group(done, "grad_z") / "blocks" / "2.claim")
    assert claim is not None
    assert "being computed by process" in "\n".join(inventory.listed(Cache(done)))
    claim.release()
    assert "being computed" not in "\n".join(inventory.listed(Cache(done)))


def test_what_is_damaged_is_listed_as_such(done: Path) -> None:
    (group(done, "s_test") / "residual" / "zarr.json").write_text("{")
    text = "\n".join(inventory.listed(Cache(done)))
    assert "4 sets of arrays" in text
    assert "residual/zarr.json cannot be read" in text


def test_nothing_is_listed_as_nothing(cache: Path) -> None:
    assert inventory.listed(Cache(cache)) == [f"{cache}: nothing is cached"]


# ---- removing by name ------------------------------------------------------------------------------------------------


def test_a_key_or_its_start_names_arrays(done: Path) -> None:
    place = group(done, "s_test")
    key = place.name.rpartition("-")[2]
    for name in (place.name, key, key[:5]):
        assert inventory.named(Cache(done), name) == place


@pytest.mark.parametrize("name", ["", "0", "..", "../..", "nothing", "grad_z", "holdout", "/"])
def test_what_names_nothing_is_refused(done: Path, name: str) -> None:
    with pytest.raises(ip.RequestError, match="status"):
        inventory.named(Cache(done), name)


def test_removing_takes_a_yes(run: Path) -> None:
    cache = run.parent / "runs"
    before, place = tiny.files(cache), group(cache, "s_test")
    code, said = invoke(run, "rm", place.name)
    assert code == 2
    assert place.name in said
    assert "--yes" in said
    assert tiny.files(cache) == before
    code, said = invoke(run, "rm", place.name, "--yes")
    assert code == 0
    assert not place.exists()
    assert tiny.files(cache).items() < before.items()
    ip.Pipeline.from_toml(run).run()
    assert tiny.files(cache) == before


def test_several_are_removed_or_none(run: Path) -> None:
    cache = run.parent / "runs"
    before = tiny.files(cache)
    assert invoke(run, "rm", group(cache, "s_test").name, "nothing", "--yes")[0] == 2
    assert tiny.files(cache) == before


def test_arrays_at_which_somebody_is_at_work_are_not_removed(run: Path) -> None:
    place = group(run.parent / "runs", "grad_z")
    claim = claims.take(place / "blocks" / "0.claim")
    assert claim is not None
    with claim:
        code, said = invoke(run, "rm", place.name, "--yes")
    assert code == 2
    assert "being computed by process" in said
    assert place.exists()


def test_a_folder_that_is_none_of_ours_is_left_alone(run: Path) -> None:
    cache = run.parent / "runs"
    theirs = cache / "grad_z" / "holiday-pictures"
    theirs.mkdir()
    (theirs / "beach.jpg").write_text("precious")
    link = cache / "grad_z" / "abcdefabcdef"
    link.symlink_to(run.parent, target_is_directory=True)
    for name in ("holiday-pictures", "abcdefabcdef"):
        assert invoke(run, "rm", name, "--yes")[0] == 2
    assert invoke(run, "gc", "--yes")[0] == 0
    assert (theirs / "beach.jpg").read_text() == "precious"
    assert link.is_symlink()
    assert run.exists()


def test_a_folder_that_is_no_cache_is_left_alone(project: Path) -> None:
    folder = project.parent / "runs"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    for command in (("rm", "thesis.txt", "--yes"), ("gc", "--yes")):
        assert invoke(project, *command)[0] == 2
    assert (folder / "thesis.txt").read_text() == "precious"


# ---- garbage ---------------------------------------------------------------------------------------------------------


def test_a_finished_cache_has_no_garbage(done: Path, make: Make) -> None:
    make(s_test={"solver": "identity"}).run()
    assert make().garbage() == []


def test_what_no_result_was_made_of_is_garbage(done: Path, make: Make) -> None:
    keep = groups(done)
    make(s_test={"solver": "cg", "damping": 0.5}).s_test("holdout")
    make(grad_z={"encoding": "float32"}).grad_z(new=True)
    left = {f"{path.parent.name}/{path.name}" for path in make().garbage()}
    assert left == groups(done) - keep
    assert len(left) == 3 if any(name.startswith("curvature") for name in left) else 2


def test_what_the_experiment_wants_now_is_no_garbage(make: Make) -> None:
    make().grad_z()
    assert make().garbage() == []
    assert len(make(grad_z={"encoding": "float32"}).garbage()) == 1


def test_what_an_unfinished_result_was_made_of_is_garbage_of_another_experiment(done: Path, make: Make) -> None:
    (group(done, "influence") / "finished" / "c" / "0").unlink()
    assert make().garbage() == []
    assert {path.parent.name for path in make(model=lambda: tiny.model(1)).garbage()} == {
        "grad_z", "curvature", "s_test", "influence",
    }  # fmt: skip


def test_garbage_is_removed_and_results_stay(run: Path) -> None:
    cache = run.parent / "runs"
    before = tiny.files(cache)
    other = run.parent / "other.toml"
    other.write_text(tiny.solved_by(run.read_text(), solver="cg", damping=0.5))
    ip.Pipeline.from_toml(other).s_test("holdout")
    code, said = invoke(run, "gc", "--yes")
    assert code == 0
    assert "s_test/holdout-" in said
    assert tiny.files(cache) == before
    assert invoke(run, "gc", "--yes") == (0, "nothing to remove\n")
