"""What scores of several models gain: ``python scripts/accuracy/ensembles.py`` prints a table.

The same problems and the same ground truth as in ``run.py``: models that were trained again on random halves of the
training set and without single samples. Here the mean of the scores of one, three and ten models is compared with it.
The first is the model of that table, the others are trained from seeds that the ground truth has not. What is done is
kept in the folder and not done again; the ground truth is that of ``run.py`` where its folder is given.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from run import HERE, NAMES, Measuring

if TYPE_CHECKING:
    from cases import Case

HEADING = ("method", "models", "LDS (95 %)", "LOO Pearson", "slope")
METHODS: tuple[tuple[str, float | None], ...] = (
    *(("exact", None), ("exact", 0.1), ("exact", 1.0)),
    *(("cg", None), ("cg", 0.1), ("cg", 1.0)),
    *(("ekfac", 0.1), ("ekfac", 1.0)),
)
"""Solvers, each with λ as a part of the mean eigenvalue, or None where the solver finds it, as it does by default."""


def states(case: Case, count: int, folder: Path) -> list[Path]:
    """Return files of the weights of some models, which are trained if they are not there."""
    import torch

    seeds = [0, *range(case.size.seeds, case.size.seeds + count - 1)]
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{seed}.pt" for seed in seeds]
    for seed, path in zip(seeds, paths, strict=True):
        if not path.is_file():
            model = case.retrain(case.data().train, seed) if seed else case.model()
            torch.save(model.state_dict(), path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)
    return paths


def rows(
    case: Case, measuring: Measuring, methods: Sequence[tuple[str, float | None]], counts: Sequence[int]
) -> list[tuple[str, ...]]:
    """Return the rows of a case, for each method one with each number of models."""
    import influence_pipeline as ip

    paths, found = states(case, max(counts), measuring.folder / "seeds"), []
    train, test, _ = case.data()
    for solver, damping in methods:
        settings = ip.Settings(
            s_test={"solver": solver, "damping": {"relative": damping} if damping else "auto"},
            runtime={"progress": False, "device": "cpu"},
        )
        for count in counts:
            began = time.perf_counter()
            checkpoints = {f"seed{path.stem}": path for path in paths[:count]}
            experiment = ip.Experiment(case.network, case.task, train, {"holdout": test}, checkpoints=checkpoints)
            influences = ip.Pipeline(experiment, measuring.folder / "ensembles", settings).run()["holdout"]
            f = measuring.truth.figures(influences.scores[:])
            title = f"`{solver}`, λ = {damping:g} of the mean" if damping else f"`{solver}`, λ found"
            lds = f"{f.lds:.3f} ({f.low:.3f}–{f.high:.3f})"
            found.append((title, str(count), lds, f"{f.pearson:.4f}", f"{f.slope:.3g}"))
            seconds = time.perf_counter() - began
            print(f"{case.key}: {' | '.join(found[-1])} [{seconds:.0f} s]", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Print the tables of the cases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--only", action="append", choices=NAMES, metavar="CASE", help="cases; default mlp")
    parser.add_argument("--folder", type=Path, default=HERE.parent.parent / "runs" / "accuracy", help="what is kept")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that train")
    options = parser.parse_args()

    from cases import cases

    logging.getLogger("stages").setLevel(logging.ERROR)  # a model that is no optimum is what some cases are
    for name, case in cases(options.quick).items():
        if name not in (options.only or ("mlp",)):
            continue
        measuring = Measuring(case, options.folder, options.workers)
        sizes = (METHODS[::7], (1, 2)) if options.quick else (METHODS, (1, 3, 10))
        found = rows(case, measuring, *sizes)
        lines = (f"| {' | '.join(cells)} |" for cells in (HEADING, ("---",) * len(HEADING), *found))
        print(f"**{case.title}** ({measuring.truth})", "", *lines, sep="\n", flush=True)


if __name__ == "__main__":
    main()
