"""The array job: tasks share the work, and one that is stopped goes on when it is queued again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import influence_pipeline as ip
from tests import tiny
from tests.conftest import ROOT
from tests.marks import thoroughly

TASKS = 3
SCONTROL = """\
#!/usr/bin/env bash
echo "$*" >>"$(dirname "$0")/requeued"
"""
GATED = """
import os, time
from pathlib import Path
from tests import tiny

tiny.shrink_blocks()
HERE = Path(__file__).parent


class Gated:
    \"\"\"Samples of which those from the 20th on are read once a gate is open.\"\"\"

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, position):
        if position >= 20:
            (HERE / f"waiting-{os.environ['SLURM_ARRAY_TASK_ID']}").touch()
            while not (HERE / "gate").exists():
                time.sleep(0.02)
        return self.data[position]


def experiment():
    return tiny.experiment(train=Gated(tiny.points(60, 1)))
"""


@pytest.fixture
def cluster(project: Path) -> Path:
    """Return the folder of a project with the job as a user edits it, and a cluster's command."""
    folder = project.parent
    (folder / "experiment.py").write_text(GATED)
    command = folder / "scontrol"
    command.write_text(SCONTROL)
    command.chmod(0o755)
    job = (ROOT / "scripts" / "slurm" / "array.sh").read_text()
    edits = {
        'environment="$HOME/venv"': 'environment=""',
        'settings="$HOME/experiment.toml"': f'settings="{project}"',
        "command=(influence-pipeline run": f"command=({sys.executable} -m influence_pipeline.cli run",
    }
    for line, edited in edits.items():
        assert line in job
        job = job.replace(line, edited)
    (folder / "array.sh").write_text(job)
    return folder


@pytest.fixture
def queue(cluster: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Return what starts a task of the job, in a process group of its own."""
    started = []

    def start(task: int, restarts: int = 0, job: str = "array.sh") -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "PATH": f"{cluster}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_ARRAY_JOB_ID": "7",
            "SLURM_ARRAY_TASK_COUNT": str(TASKS),
            "SLURM_ARRAY_TASK_ID": str(task),
            "SLURM_RESTART_COUNT": str(restarts),
        }
        with (cluster / f"{task}.log").open("ab") as log:
            process = subprocess.Popen(
                ["bash", str(cluster / job)], env=environment, stdout=log, stderr=log, start_new_session=True
            )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def until(what: Callable[[], bool], folder: Path) -> None:
    """Wait for something.

    Raises:
        TimeoutError: it does not come; with what the tasks said.
    """
    end = time.monotonic() + 120
    while not what():
        if time.monotonic() > end:
            raise TimeoutError("\n".join(path.read_text() for path in sorted(folder.glob("*.log"))))
        time.sleep(0.05)


def ended(process: subprocess.Popen[bytes], folder: Path) -> int:
    until(lambda: process.poll() is not None, folder)
    return process.returncode


def whole(folder: Path) -> dict[str, bytes]:
    """Return the files of the same run in one process."""
    settings = ip.Settings.from_toml(folder / "settings.toml")
    ip.Pipeline(tiny.experiment(), folder / "whole", settings).run()
    return tiny.files(folder / "whole")


@pytest.mark.parametrize("shares", ["claimed", *thoroughly(["fixed"])])
def test_tasks_that_are_stopped_go_on_when_they_are_queued_again(
    cluster: Path, queue: Callable[..., subprocess.Popen[bytes]], shares: str
) -> None:
    if shares == "fixed":
        job = cluster / "array.sh"
        added = '--shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"'
        assert added in job.read_text()
        job.write_text(job.read_text().replace('"$settings")', f'"$settings" {added})'))
    tasks = [queue(task) for task in range(TASKS)]
    until(lambda: all((cluster / f"waiting-{task}").exists() for task in range(TASKS)), cluster)
    os.killpg(tasks[0].pid, signal.SIGKILL)  # its machine is gone
    os.kill(tasks[1].pid, signal.SIGTERM)  # its time is over: the script alone is told
    assert ended(tasks[1], cluster) == 0
    assert (cluster / "requeued").read_text().split("\n")[:-1] == ["requeue 7_1"]
    (cluster / "gate").touch()
    again = [queue(task, restarts=1) for task in (0, 1)]
    assert [ended(process, cluster) for process in (tasks[2], *again)] == [0, 0, 0]
    assert tiny.files(cluster / "runs") == whole(cluster)


def test_a_wrong_request_is_not_queued_again(cluster: Path, queue: Callable[..., subprocess.Popen[bytes]]) -> None:
    (cluster / "settings.toml").write_text("typo = 1\n")
    assert ended(queue(0), cluster) == 2
    assert not (cluster / "requeued").exists()


def test_what_fails_again_and_again_is_given_up(cluster: Path, queue: Callable[..., subprocess.Popen[bytes]]) -> None:
    shutil.copy(cluster / "array.sh", cluster / "failing.sh")
    text = (cluster / "failing.sh").read_text()
    (cluster / "failing.sh").write_text(text.replace("set -uo pipefail", "command=(false)\nset -uo pipefail"))
    assert ended(queue(0, restarts=9, job="failing.sh"), cluster) == 0
    assert ended(queue(0, restarts=10, job="failing.sh"), cluster) == 1
    assert (cluster / "requeued").read_text() == "requeue 7_0\n"
