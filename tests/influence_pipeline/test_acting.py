"""Acting on results: subsets to train on, files for other programs, a table in the terminal."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from typer.testing import CliRunner, Result

import influence_pipeline as ip
from influence_pipeline import export
from influence_pipeline.cli import app
from tests import tiny

Make = Callable[..., ip.Pipeline]
Invoke = Callable[..., Result]
N, T = 60, 10
KEPT = 1
"""Ranks that the tiny experiment keeps."""


@pytest.fixture(scope="module")
def influences(finished: Path) -> ip.Influences:
    return ip.Influences.open(finished, "holdout")


NAMES = [5, *range(99_999 + N - 1, 99_999, -1)]
FEW = ip.per_class(tiny.points(40, 2), 2, start=1)


class Margin(ip.Classification):
    higher_is_better = True


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> ip.Influences:
    """Results whose training samples have names, and whose tests are some of a larger set."""
    experiment = tiny.experiment(train_ids=NAMES, tests={"few": FEW})
    return ip.Pipeline(experiment, tmp_path_factory.mktemp("named") / "cache", tiny.settings()).run()["few"]


@pytest.fixture(scope="module")
def margin(tmp_path_factory: pytest.TempPathFactory) -> ip.Influences:
    """Results of a measurement that is better where it is higher."""
    experiment = tiny.experiment(task=Margin(l2=0.01), tests={"few": FEW})
    return ip.Pipeline(experiment, tmp_path_factory.mktemp("margin") / "cache", tiny.settings()).run()["few"]


@pytest.fixture
def invoke() -> Invoke:
    """Return what runs a command in this process."""
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def shown(done: Path, project: Path) -> Path:
    """Return the settings file of a project whose results are there, but neither model nor data."""
    (project.parent / "experiment.py").unlink()
    project.write_text(project.read_text().replace('"runs"', f'"{done}"'))
    return project


# ---- subsets ---------------------------------------------------------------------------------------------------------


def test_subsets_have_the_samples_that_averages_name(named: ip.Influences) -> None:
    """Whatever the samples are called; a subset's indices are positions in the training set."""
    train = tiny.points(N, 1)
    for which, ids in (("helpful", named.helpful_on_average(7)[0]), ("harmful", named.harmful_on_average(7)[0])):
        assert [NAMES[i] for i in named.subset(train, 7, which).indices] == ids.tolist()
    harmful = set(named.harmful_on_average(7)[0].tolist())
    assert named.subset(train, 7, "not-harmful").indices == [i for i in range(N) if NAMES[i] not in harmful]
    mean = np.abs(named.mean_scores())
    assert named.subset(train, 7).indices == np.argsort(-mean, kind="stable")[:7].tolist()
    assert named.subset(train, 7, "influential").indices == named.subset(train, 7).indices


def test_a_subset_is_loaded_and_trained_on(influences: ip.Influences) -> None:
    train = tiny.points(N, 1)
    for which, count in (("influential", 12), ("helpful", 12), ("harmful", 12), ("not-harmful", N - 12)):
        subset = influences.subset(train, 12, which)
        seen = torch.cat([inputs for inputs, _ in DataLoader(subset, batch_size=5)])
        torch.testing.assert_close(seen, train.tensors[0][subset.indices])
        assert len(seen) == count
        found = ip.Pipeline(tiny.experiment(train=subset), "unused", tiny.settings()).experiment
        assert len(found.train) == count


def test_what_is_harmful_to_a_margin_is_left_out(margin: ip.Influences) -> None:
    train, best = tiny.points(N, 1), np.argsort(margin.mean_scores(), kind="stable").tolist()
    assert margin.subset(train, 5, "helpful").indices == best[:5]
    assert margin.subset(train, 5, "harmful").indices == best[:-6:-1]
    assert margin.subset(train, 5, "not-harmful").indices == sorted(best[:-5])


def test_subsets_that_cannot_be_are_refused(influences: ip.Influences) -> None:
    train = tiny.points(N, 1)
    with pytest.raises(ip.RequestError, match="which = 'best': must be one of 'influential', 'helpful', 'harmful'"):
        influences.subset(train, 5, "best")  # type: ignore[arg-type]
    with pytest.raises(ip.RequestError, match="k = 60: without all 60 training samples nothing is left"):
        influences.subset(train, N, "not-harmful")
    assert len(influences.subset(train, N, "harmful")) == N
    for which in ("helpful", "harmful", "not-harmful"):
        with pytest.raises(ip.RequestError, match="k = 61: there are 60"):
            influences.subset(train, 61, which)
        with pytest.raises(ip.RequestError, match="train has 50 samples"):
            influences.subset(tiny.points(50, 1), 5, which)


# ---- one test after the other ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [KEPT, 7, N])
def test_rankings_of_some_tests_are_those_of_all(influences: ip.Influences, k: int) -> None:
    for side, (ids, scores) in (("helpful", influences.helpful(k)), ("harmful", influences.harmful(k))):
        for rows in (slice(0, 1), slice(3, 8), slice(9, 10)):
            found = influences.rankings(rows, side, k)
            np.testing.assert_array_equal(found[0], ids[rows])
            np.testing.assert_array_equal(found[1], scores[rows])
    np.testing.assert_array_equal(influences.scores_of(4), influences.scores[4])
    with pytest.raises(ip.RequestError, match="side = 'best'"):
        influences.rankings(slice(0, 1), "best", k)  # type: ignore[arg-type]
    for row in (-1, T, True, 1.0, None):
        with pytest.raises(ip.RequestError, match=rf"test = {row}: 'holdout' has 10 test samples"):
            influences.scores_of(row)  # type: ignore[arg-type]


# ---- files -----------------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("k", [None, 4, N])
def test_csv_has_a_line_for_each_rank(influences: ip.Influences, tmp_path: Path, k: int | None) -> None:
    path, ranks = tmp_path / "out.csv", k or KEPT
    influences.to_csv(path, k)
    assert path.read_text().splitlines()[0] == "test_id,rank,kind,train_id,score"
    found = lines(path)
    assert len(found) == 2 * T * ranks
    for side, (ids, scores) in (("helpful", influences.helpful(ranks)), ("harmful", influences.harmful(ranks))):
        of_side = [line for line in found if line["kind"] == side]
        assert [int(line["test_id"]) for line in of_side] == np.repeat(influences.test_ids, ranks).tolist()
        assert [int(line["rank"]) for line in of_side] == T * list(range(1, ranks + 1))
        assert [int(line["train_id"]) for line in of_side] == ids.flatten().tolist()
        np.testing.assert_array_equal(np.array([line["score"] for line in of_side], np.float32), scores.flatten())


def test_csv_and_json_name_samples_by_their_ids(named: ip.Influences, tmp_path: Path) -> None:
    named.to_csv(tmp_path / "out.csv")
    named.to_json(tmp_path / "out.json")
    assert {int(line["train_id"]) for line in lines(tmp_path / "out.csv")} <= set(NAMES)
    assert {int(line["test_id"]) for line in lines(tmp_path / "out.csv")} == set(FEW.indices)
    assert [int(test) for test in json.loads((tmp_path / "out.json").read_text())] == FEW.indices


def test_npy_has_the_scores(influences: ip.Influences, tmp_path: Path) -> None:
    influences.to_npy(tmp_path / "out.npy")
    found = np.load(tmp_path / "out.npy", mmap_mode="r", allow_pickle=False)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, influences.scores[:])


def test_files_are_the_same_however_much_is_read_at_once(
    influences: ip.Influences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(folder: str) -> dict[str, bytes]:
        (tmp_path / folder).mkdir()
        influences.to_csv(tmp_path / folder / "out.csv", 5)
        influences.to_json(tmp_path / folder / "out.json", 5)
        influences.to_npy(tmp_path / folder / "out.npy")
        return tiny.files(tmp_path / folder)

    whole = write("whole")
    monkeypatch.setattr(export, "MOST_BYTES", 16 * N)
    monkeypatch.setattr(export, "AS_OBJECTS", 1)
    assert write("pieces") == whole
    assert len(whole) == 3


def test_what_was_not_stored_is_refused_and_nothing_written(make: Make, tmp_path: Path) -> None:
    found = make(influence={"top_k": 3, "store_scores": False}).run()["holdout"]
    for write in (lambda path: found.to_npy(path), lambda path: found.to_csv(path, 4)):
        with pytest.raises(ip.RequestError, match="store_scores"):
            write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    found.to_csv(tmp_path / "out.csv")
    assert len(lines(tmp_path / "out.csv")) == 2 * T * 3


WRITERS = ["to_json", "to_csv", "to_npy"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError, MemoryError])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_is_whole_or_as_it_was(
    influences: ip.Influences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, stop: type[BaseException]
) -> None:
    path = tmp_path / "out"
    path.write_text("before")
    monkeypatch.setattr(export, "MOST_BYTES", 16 * N)
    monkeypatch.setattr(export, "AS_OBJECTS", 16 * N)
    name = "score_rows" if writer == "to_npy" else "rankings"
    read = getattr(ip.Influences, name)

    def stopping(self: ip.Influences, *words: Any) -> Any:
        if name == "score_rows":
            return itertools.chain([next(read(self, *words))], stopped())
        return next(stopped()) if words[0].start == 4 else read(self, *words)

    def stopped() -> Iterator[Any]:
        assert list(tmp_path.glob(".*.partial"))
        raise stop
        yield

    with monkeypatch.context() as patch:
        patch.setattr(ip.Influences, name, stopping)
        with pytest.raises(ip.WorkError if stop is OSError else stop):
            getattr(influences, writer)(path)
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"out": "before"}
    getattr(influences, writer)(path)
    assert path.read_bytes() != b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_place_where_no_file_can_be_is_refused(influences: ip.Influences, tmp_path: Path, writer: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, text in (
        (tmp_path / "none" / "out", f"there is no folder {tmp_path / 'none'}"),
        (tmp_path / "file" / "out", "there is no folder"),
        (tmp_path, "it is a folder"),
        ("a\0b", "zero byte"),
        (tmp_path / "loop" / "out", ""),
    ):
        with pytest.raises(ip.RequestError, match=f"cannot be written.*{re.escape(text)}"):
            getattr(influences, writer)(path)
    with pytest.raises(ip.InfluenceError, match="cannot be written"):
        getattr(influences, writer)(tmp_path / ("a" * 300))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_a_link_stays_one_and_a_pipe_is_written(influences: ip.Influences, tmp_path: Path) -> None:
    influences.to_csv(tmp_path / "out.csv")
    wanted = (tmp_path / "out.csv").read_bytes()
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "link.csv"
    link.symlink_to(tmp_path / "elsewhere" / "out.csv")
    influences.to_csv(link)
    assert link.is_symlink()
    assert link.read_bytes() == wanted
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reading = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reading.start()
    influences.to_csv(pipe)
    reading.join()
    assert read == [wanted]
    assert pipe.is_fifo()


# ---- commands --------------------------------------------------------------------------------------------------------


def test_export_writes_what_methods_do_without_model_or_data(
    invoke: Invoke, shown: Path, influences: ip.Influences, tmp_path: Path
) -> None:
    for form, write in (
        ("json", influences.to_json),
        ("csv", influences.to_csv),
        ("npy", influences.to_npy),
    ):
        out, wanted = tmp_path / f"out.{form}", tmp_path / "wanted"
        result = invoke("export", shown, "--format", form, "--out", out)
        assert result.exit_code == 0, result.output
        assert f"{out}: 10 tests × 60 training samples" in result.stderr
        write(wanted)
        assert out.read_bytes() == wanted.read_bytes()
    assert invoke("export", shown, "--format", "csv", "--out", out, "-k", 2, "--tests", "holdout").exit_code == 0
    assert len(lines(out)) == 2 * T * 2
    assert invoke("export", shown, "--format", "npy", "--out", out, "--key", influences.key).exit_code == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--format", "csv", "--out", "none/out.csv"], "there is no folder"),
        (["--format", "csv", "--out", "."], "it is a folder"),
        (["--format", "npy", "--out", "out", "-k", "3"], "-k 3: npy has all scores"),
        (["--format", "csv", "--out", "out", "-k", "0"], "k = 0: there are 60 training samples"),
        (["--format", "json", "--out", "out", "--tests", "nope"], "no results for 'nope'"),
        (["--format", "json", "--out", "out", "--key", "nope"], "with key nope"),
    ],
)
def test_an_export_that_cannot_be_is_refused(
    invoke: Invoke, shown: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], text: str
) -> None:
    monkeypatch.chdir(shown.parent)
    there = set(shown.parent.iterdir())
    result = invoke("export", shown, *words)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert text in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert set(shown.parent.iterdir()) == there


def test_help_says_what_a_user_needs(invoke: Invoke, shown: Path) -> None:
    said = invoke("export", "--help").stdout
    assert "Write the scores or rankings" in said
    assert "Raises" not in said
    assert invoke("export", shown, "--format", "xml", "--out", "out").exit_code == 2


def table(invoke: Invoke, project: Path, found: ip.Influences, *words: object) -> list[list[str]]:
    """Return what ``show`` prints of some results: the heading, the lines of the table, and those below it."""
    project.write_text(project.read_text().replace('"runs"', f'"{found.path.parent.parent}"'))
    result = invoke("show", project, *words)
    assert result.exit_code == 0, result.output
    heading, *rest = result.stdout.splitlines()
    last = next(number for number, line in enumerate(rest) if line.startswith("score: "))
    return [[heading], rest[:last], rest[last:]]


@pytest.mark.parametrize("test", [None, 3])
def test_show_prints_columns_that_stand_below_one_another(
    invoke: Invoke, named: ip.Influences, project: Path, test: int | None
) -> None:
    words = () if test is None else ("--test", test)
    (heading,), printed, below = table(invoke, project, named, "-k", N, *words)
    if test is None:
        assert heading == f"on average over the {len(FEW)} tests of few"
        sides = named.helpful_on_average(N), named.harmful_on_average(N)
    else:
        assert heading == f"test 3 of few  label {FEW[3][1]}  id {FEW.indices[3]}"
        sides = tuple((ids[test], scores[test]) for ids, scores in (named.helpful(N), named.harmful(N)))
    labels = {name: int(label) for name, (_, label) in zip(NAMES, tiny.points(N, 1), strict=True)}
    assert re.fullmatch(r"  most helpful +most harmful", printed[0])
    assert printed[1].split() == 2 * ["id", "score", "label"]
    assert len({len(line) for line in printed[1:]}) == 1, "columns do not end below one another"
    for row, line in enumerate(printed[2:]):
        cells = [f"{ids[row]} {scores[row]:+.3e} {labels[int(ids[row])]}" for ids, scores in sides]
        assert " ".join(line.split()) == " ".join(cells)
    assert below[0].endswith("+ helps, - harms")
    assert below[-1] == f"in {named.path}"


def test_show_says_what_signs_mean_to_a_margin_and_leaves_out_labels_that_are_gone(
    invoke: Invoke, margin: ip.Influences, project: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "alone"
    shutil.copytree(margin.path.parent.parent, cache, ignore=shutil.ignore_patterns("grad_z", "s_test", "curvature"))
    alone = ip.Influences.open(cache, "few")
    (heading,), printed, below = table(invoke, project, alone, "--test", 1)
    assert heading == f"test 1 of few  id {FEW.indices[1]}"
    assert printed[1].split() == 2 * ["id", "score"]
    assert len({len(line) for line in printed[1:]}) == 1
    assert below[0].endswith("+ harms, - helps")
