"""Measure every target: ``python scripts/benchmark/run.py`` prints a table, a row for each.

Both sides of a row are measured in one run, in turn; figures are medians. A row's ratio is what the other side takes
over what the work takes (at least the bar), or the other way round where the bar is a largest ratio.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import importlib
import json
import logging
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from common import Bench, Row

HERE = Path(__file__).resolve().parent
MODULES = {
    "rows_grad_z": ("grad_z_loop", "grad_z_computing"),
    "rows_influence": ("influence_cold_8", "influence_cold_64", "influence_warm"),
    "rows_further": ("further_tests",),
    "rows_s_test": ("lissa_32", "lissa_512"),
    "rows_machine": ("two_workers", "resume"),
    "rows_memory": ("memory", "wide"),
    "rows_projection": (
        *("projection_identity", "projection_ggn", "projection_cost"),
        *("resnet_memory", "projected_memory"),
    ),
    "rows_plan": ("plan_seconds", "plan_disk", "plan_peak"),
    "rows_engines": ("dask_workers", "dask_workers_watched"),
    "nothing_to_do": ("nothing_to_do",),
}
"""The modules of this folder that have rows, by name; each has them as ``ROWS``, functions of a ``Bench``."""
REPEATS = 5


def measure(module: str, name: str, bench: Bench) -> Row | str:
    """Measure one row; or say why that cannot be."""
    try:
        rows: dict[str, Callable[[Bench], Row]] = importlib.import_module(module).ROWS
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return f"there is no {module}.py yet"
    return rows[name](bench)


def main() -> None:
    names = [name for found in MODULES.values() for name in found]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a look whether everything runs")
    parser.add_argument("--only", action="append", metavar="NAME", help=f"rows, or globs of them: {', '.join(names)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured, for some 5 GB; default: temporary")
    options = parser.parse_args()
    wanted = [name for name in names if any(fnmatch.fnmatch(name, glob) for glob in options.only or ["*"])]
    for glob in options.only or []:
        if not fnmatch.filter(names, glob):
            parser.error(f"no row {glob!r}; there are: {', '.join(names)}")

    # Before torch is loaded: threads that wait by spinning take the core from those that work.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if options.quick:
        os.environ["BENCHMARK_QUICK"] = "1"
    sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])
    from common import Bench, table

    logging.getLogger("stages").setLevel(logging.ERROR)  # solvers are stopped before they are done
    rows: list[Row] = []
    cells: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory(prefix="benchmark_", dir=options.folder) as folder:
        bench = Bench(Path(folder), options.quick, 1 if options.quick else REPEATS)
        for module, found in MODULES.items():
            for name in (name for name in found if name in wanted):
                began = time.perf_counter()
                row = measure(module, name, bench)
                if isinstance(row, str):
                    cells.append((name, *("–" for _ in range(7)), row))
                else:
                    rows.append(row)
                    cells.append(row.cells())
                print(f"{name}: {' | '.join(cells[-1][1:])} [{time.perf_counter() - began:.0f} s]", file=sys.stderr)
    print(table(cells))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": [told(row) for row in rows]}, indent=2))


def told(row: Row) -> dict[str, object]:
    """Return a row's figures."""
    return {**dataclasses.asdict(row), "ratio": row.ratio, "verdict": row.verdict}


def machine() -> dict[str, object]:
    """Return what figures depend on beside the code."""
    import torch

    return {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
