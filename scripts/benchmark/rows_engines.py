"""Engines: what the workers of a cluster on this machine take over processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import workload
from common import Bench, Row, Side, alternate
from joblib.externals.loky import get_reusable_executor
from rows_machine import small_blocks

import influence_pipeline as ip

WORKERS = 3
ROWS_OF_BLOCK = 256
EXPERIMENT = """\
from pathlib import Path

import torch
import workload


def experiment():
    model = workload.small_cnn()
    model.load_state_dict(torch.load(Path(__file__).with_suffix(".pt"), weights_only=True))
    return workload.experiment({samples}, {{"holdout": {tests}}}, model.eval())
"""
"""Trained once: with other threads, as a worker has, the same training gives other weights."""


QUIET = {
    "DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL": "1s",
    "DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__INTERVAL": "5s",
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
}
"""What has dask look at its workers less often: by default it takes their interpreter some hundred times a second."""


@contextmanager
def dask(folder: Path, quiet: bool) -> Iterator[str]:
    """Have a scheduler with workers of this machine; give its address."""
    said = folder / "scheduler.json"
    said.unlink(missing_ok=True)
    threads = max(1, (os.cpu_count() or 1) // WORKERS)
    common = ["--no-dashboard", "--host", "127.0.0.1", "--scheduler-file", str(said)]
    own = ["--no-nanny", "--nthreads", str(threads), "--local-directory", str(folder)]
    commands = [["scheduler", *common, "--port", "0"], *[["worker", *common, *own]] * WORKERS]
    environment = {**os.environ, "DASK_LOGGING__DISTRIBUTED": "critical", **(QUIET if quiet else {})}
    started = []
    try:
        for command in commands:
            started.append(subprocess.Popen([sys.executable, "-m", "dask", *command], env=environment))
            while not said.exists():
                time.sleep(0.1)
        from distributed import Client

        with Client(scheduler_file=str(said), set_as_default=False) as client:
            client.wait_for_workers(WORKERS)
            yield str(client.scheduler.address)
    finally:
        for process in started:
            process.kill()
            process.wait()


def both_stages(bench: Bench, name: str, **runtime: object) -> Side:
    """Return what computes gradients and solutions anew, from an experiment in a file."""
    solver = {"solver": "cg", "damping": 50.0, "sample": bench.size(32, 4)}
    settings = workload.settings(s_test=solver, runtime=runtime)
    file = bench.folder / "engines.py"
    torch.save(workload.trained_cnn().state_dict(), file.with_suffix(".pt"))
    file.write_text(EXPERIMENT.format(samples=bench.size(4096, 1024), tests=8 * bench.size(6, 4)))
    pipeline = None

    def prepare() -> None:
        nonlocal pipeline
        os.sync()
        pipeline = ip.Pipeline(f"{file}:experiment", bench.fresh(name), settings)
        pipeline.experiment.model  # noqa: B018 - which this process keeps

    def run() -> None:
        pipeline.grad_z()
        pipeline.s_test("holdout")

    return Side(run, prepare)


def dask_workers(bench: Bench, name: str = "dask_workers", quiet: bool = True) -> Row:
    with dask(bench.folder, quiet) as address, small_blocks("MOST_TESTS", 8), small_blocks("MOST_ROWS", ROWS_OF_BLOCK):
        of_dask = both_stages(bench, "dask", workers=WORKERS, backend="dask", address=address)
        dask_, loky = alternate(bench, of_dask, both_stages(bench, "loky", workers=WORKERS))
    get_reusable_executor().shutdown(wait=True)
    return Row(
        *(name, f"grad_z and s_test, {WORKERS} dask workers{'' if quiet else ', as dask sets them'}"),
        f"{WORKERS} loky workers",
        *(dask_, loky, "s", 1.1, True),
    )


ROWS = {
    "dask_workers": dask_workers,
    "dask_workers_watched": lambda bench: dask_workers(bench, "dask_workers_watched", quiet=False),
}
