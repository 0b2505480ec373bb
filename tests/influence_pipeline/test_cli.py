"""The command line: exit codes, and what a user is told."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import influence_pipeline as ip
from influence_pipeline import cli
from influence_pipeline.cli import app
from tests import tiny
from tests.conftest import ROOT

Invoke = Callable[..., Result]


@pytest.fixture
def invoke() -> Invoke:
    """Return what runs a command in this process."""
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def add(settings: Path, text: str) -> None:
    """Put top-level lines in front of a settings file."""
    settings.write_text(text + "\n" + settings.read_text())


def refused(result: Result, *texts: str) -> None:
    """Check that a request was refused in a few lines that say these."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    assert len(result.stderr.splitlines()) <= 8
    for text in texts:
        assert text in result.stderr


def test_a_run_shows_ids_and_scores_and_where_they_are(invoke: Invoke, project: Path) -> None:
    result = invoke("run", project)
    assert result.exit_code == 0, result.output
    assert "holdout: 10 tests × 60 training samples" in result.stdout
    ids, scores = tiny_influences(project).helpful_on_average(1)
    assert re.search(rf"^ +{ids[0]}  {re.escape(f'{scores[0]:+.3e}')} +\d ", result.stdout, re.MULTILINE)
    assert f"in {project.parent / 'runs' / 'influence'}/holdout-" in result.stdout


def tiny_influences(project: Path) -> ip.Influences:
    return ip.Influences.open(project.parent / "runs", "holdout")


def test_every_stage_has_a_command_that_counts_its_blocks(invoke: Invoke, project: Path) -> None:
    early = invoke("influence", project)
    refused(early, "grad_z is not complete: 4 of 4 blocks", "influence-pipeline grad-z")
    assert "4 of 4 blocks computed" in invoke("grad-z", project).stdout
    assert "0 of 4 blocks computed" in invoke("grad-z", project).stdout
    refused(invoke("influence", project), "s-test --tests holdout")
    assert "s_test holdout: 3 of 3 blocks computed" in invoke("s-test", project).stdout
    assert "holdout: 10 tests" in invoke("influence", project, "--tests", "holdout").stdout


def test_a_plan_shows_what_is_missing_and_computes_nothing(invoke: Invoke, project: Path) -> None:
    before = invoke("plan", project)
    assert before.exit_code == 0, before.output
    assert [re.split(r"  +", line)[2:4] for line in before.stdout.splitlines()[1:-1]] == [
        ["0 / 4", "blocks"],
        ["0 / 2", "blocks"],
        ["0 / 3", "blocks"],
        ["0 / 12", "blocks"],
    ]
    assert re.search(
        r"to be written: at most [\d.]+ KiB in \d+ files, free on that disk: [\d.]+ GiB$", before.stdout.strip()
    )
    assert not (project.parent / "runs").exists()
    invoke("run", project)
    after = invoke("plan", project).stdout
    assert after.count("complete") == 4
    assert "4 / 4" in after


def test_a_plan_that_measures_says_seconds_and_keeps_blocks(invoke: Invoke, project: Path) -> None:
    result = invoke("plan", project, "--measure")
    assert result.exit_code == 0, result.output
    assert re.search(
        r"measured: 2 blocks in [\d.]+ s; about [\d.]+ s to go; the process held [\d.]+ .?i?B at most", result.stdout
    )
    assert re.search(
        r"^to go: about [\d.]+ s of computing; a process holds about [\d.]+ .?i?B at most$", result.stdout, re.MULTILINE
    )
    assert "2 of 4 blocks computed" in invoke("grad-z", project).stdout


def test_status_shows_what_is_cached_without_model_or_data(invoke: Invoke, project: Path) -> None:
    assert "nothing is cached" in invoke("status", project).stdout
    invoke("run", project)
    (project.parent / "experiment.py").unlink()
    result = invoke("status", project)
    assert result.exit_code == 0, result.output
    for text in (
        "4 sets of arrays",
        "4 / 4",
        "3 / 3",
        "12 / 12",
        "distance from an optimum",
        "largest residual",
        "λ =",
    ):
        assert text in result.stdout


def test_show_prints_one_test_or_the_average_without_model_or_data(invoke: Invoke, project: Path) -> None:
    refused(invoke("show", project), "--tests is needed", "nothing")
    invoke("run", project)
    (project.parent / "experiment.py").unlink()
    average = invoke("show", project)
    assert average.stdout.startswith("on average over the 10 tests of holdout\n")
    one = invoke("show", project, "--test", 3, "-k", 2)
    ids, _ = tiny_influences(project).helpful(2)
    assert [int(line.split()[0]) for line in one.stdout.splitlines()[3:5]] == ids[3].tolist()
    assert re.match(r"test 3 of holdout  label \d\n", one.stdout)
    refused(invoke("show", project, "--test", 10), "--test 10", "10 test samples")
    refused(invoke("show", project, "-k", 61), "k = 61", "60 training samples")
    refused(invoke("show", project, "-k", 0), "k = 0")
    refused(invoke("show", project, "--tests", "nope"), "no results for 'nope'", "holdout")
    refused(invoke("show", project, "--key", "nope"), "key nope")


@pytest.mark.parametrize(
    "array", ["zarr.json", "offset/zarr.json", "helpful_ids/c/0/0", "scores/c/0/0", "finished/c/0"]
)
@pytest.mark.parametrize("words", [(), ("--tests", "holdout")], ids=["alone", "named"])
def test_a_damaged_result_is_work_that_a_run_does_again(
    invoke: Invoke, project: Path, done: Path, array: str, words: tuple[str, ...]
) -> None:
    project.write_text(project.read_text().replace('"runs"', f'"{done}"'))
    (file,) = done.glob(f"influence/*/{array}")
    file.write_bytes(file.read_bytes()[:-1])
    result = invoke("show", project, *words)
    assert result.exit_code == 1, result.output
    assert "error: " in result.stderr
    assert "run" in result.stderr
    assert len(result.stderr.splitlines()) <= 3
    assert invoke("run", project).exit_code == 0
    assert invoke("show", project, *words).exit_code == 0


def test_another_key_is_asked_for_where_several_are_cached(invoke: Invoke, project: Path) -> None:
    invoke("run", project)
    project.write_text(project.read_text().replace("top_k = 1", "top_k = 2"))
    invoke("run", project)
    result = invoke("show", project)
    refused(result, "several results for 'holdout'", 'key="')
    key = re.findall(r'key="(\w+)"', result.stderr)[1]
    assert invoke("show", project, "--key", key).exit_code == 0


def test_an_unknown_test_set_is_refused_before_anything_is_computed(invoke: Invoke, project: Path) -> None:
    for command in ("run", "plan", "s-test", "influence"):
        refused(invoke(command, project, "--tests", "nope"), "no test set 'nope'", "the experiment has: holdout")
    assert not (project.parent / "runs").exists()


def test_a_wrong_settings_file_is_refused_with_its_name_and_setting(invoke: Invoke, project: Path) -> None:
    refused(invoke("run", project.parent / "absent.toml"), "absent.toml: no such file")
    project.write_text(project.read_text().replace("top_k", "topk"))
    refused(invoke("run", project), str(project), "influence.topk: unknown setting")


@pytest.mark.parametrize("missing", ["experiment", "cache"])
def test_a_settings_file_without_experiment_or_cache_is_refused(invoke: Invoke, project: Path, missing: str) -> None:
    lines = [line for line in project.read_text().splitlines() if not line.startswith(missing)]
    project.write_text("\n".join(lines))
    refused(invoke("run", project), f"{missing} is missing")


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("absent.py:experiment", "absent.py: no such file"),
        ("experiment.py:absent", "no function 'absent'"),
        ("experiment.py:nothing", "must return an ip.Experiment, got int"),
        ("experiment.py", 'must be "file.py:function"'),
        ("no_such_package.module:experiment", "no_such_package"),
    ],
)
def test_a_wrong_reference_is_refused(invoke: Invoke, project: Path, reference: str, text: str) -> None:
    project.write_text(project.read_text().replace("experiment.py:experiment", reference))
    refused(invoke("run", project), text)


def test_an_error_in_the_experiments_file_shows_its_own_file_and_line(invoke: Invoke, project: Path) -> None:
    project.write_text(project.read_text().replace("experiment.py:experiment", "experiment.py:broken"))
    result = invoke("run", project)
    file = project.parent / "experiment.py"
    line = file.read_text().splitlines().index("    return 1 / width") + 1
    refused(result, f"{file}, line {line}: return 1 / width", "ZeroDivisionError")
    assert "site-packages" not in result.stderr
    file.write_text("def broken(:\n")
    syntax = invoke("run", project)
    refused(syntax, "line 1", "SyntaxError")


def test_a_mismatch_is_refused_until_new_is_said(invoke: Invoke, project: Path) -> None:
    assert invoke("grad-z", project).exit_code == 0
    project.write_text(project.read_text() + '\n[grad_z]\nencoding = "float32"\n')
    refused(invoke("run", project), "encoding: float16 ≠ float32", "computes 60 gradients", "--new")
    assert invoke("run", project, "--new").exit_code == 0
    assert invoke("run", project).exit_code == 0


def test_work_that_fails_is_exit_code_1_and_goes_on_later(invoke: Invoke, project: Path) -> None:
    file = project.parent / "experiment.py"
    good = file.read_text()
    file.write_text(
        good.replace(
            "        return self.data[position]",
            '        if position == 38:\n            raise OSError("disk on fire")\n        return self.data[position]',
        )
    )
    failed = invoke("run", project)
    assert failed.exit_code == 1, failed.output
    assert "data set 'train' raised at sample 38: OSError: disk on fire" in failed.stderr
    assert "Traceback" not in failed.output
    kept = tiny.blocks(project.parent / "runs")
    assert len(kept) == 2
    file.write_text(good)
    result = invoke("grad-z", project)
    assert "2 of 4 blocks computed" in result.stdout


def test_a_log_file_has_what_happened_and_no_progress_bars(invoke: Invoke, project: Path) -> None:
    with project.open("a") as settings:
        settings.write('log_file = "logs/log.txt"\nprogress = true\n')
    assert invoke("run", project).exit_code == 0
    log = (project.parent / "logs" / "log.txt").read_text()
    assert "4 of 4 blocks to compute" in log
    assert "4 blocks computed" in log
    assert "\r" not in log
    assert "%|" not in log
    first = len(log.splitlines())
    invoke("run", project)
    assert len((project.parent / "logs" / "log.txt").read_text().splitlines()) >= first


def test_a_log_file_that_cannot_be_written_is_refused(invoke: Invoke, project: Path) -> None:
    with project.open("a") as settings:
        settings.write('log_file = "experiment.py/log.txt"\n')
    refused(invoke("run", project), "runtime.log_file", "cannot be written")


WITHOUT_TORCH = """
import json, sys
from influence_pipeline.cli import app
for words in json.loads(sys.argv[1]):
    app(words, standalone_mode=False)
assert "torch" not in sys.modules
"""


def test_what_needs_neither_model_nor_data_needs_no_pytorch(invoke: Invoke, project: Path) -> None:
    assert invoke("run", project).exit_code == 0
    key = next((project.parent / "runs").glob("influence/*/scores")).parent.name
    words = [["--help"], ["status", str(project)], ["show", str(project)], ["rm", str(project), key, "--yes"]]
    for form in ("csv", "json", "npy"):
        words.insert(3, ["export", str(project), "--format", form, "--out", str(project.with_name(f"out.{form}"))])
    command = [sys.executable, "-c", WITHOUT_TORCH, json.dumps(words)]
    done = subprocess.run(command, text=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    for said in ("Training data attribution", "4 sets of arrays", "on average over the 10 tests", f"influence/{key}"):
        assert said in done.stdout
    assert all(project.with_name(f"out.{form}").stat().st_size for form in ("csv", "json", "npy"))
    assert not list((project.parent / "runs").glob("influence/holdout-*"))


def test_the_terminal_gets_warnings_and_each_message_of_the_stages_once(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: list[logging.Handler] = []
    monkeypatch.setattr(logging, "basicConfig", lambda **options: handlers.extend(options["handlers"]))
    cli._main()
    (terminal,) = handlers

    def shown(name: str, level: int, text: str) -> bool:
        return bool(terminal.filter(logging.LogRecord(name, level, "", 0, text, None, None)))

    assert [shown("stages.grad_z.choose", logging.INFO, text) for text in ("a", "b", "a")] == [True, True, False]
    assert [shown("influence_pipeline.runner", logging.WARNING, "a") for _ in range(2)] == [True, True]
    assert not shown("influence_pipeline.runner", logging.INFO, "c")
