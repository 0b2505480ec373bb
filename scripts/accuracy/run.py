"""How accurate scores are: ``python scripts/accuracy/run.py`` prints a table, a row for each case and method.

For each case of ``cases.py``, models are trained again on random halves of the training set and without single
samples. Scores of every solver, and of other packages in an environment of their own, are compared with what came of
that. What is done is kept in the folder and not done again: delete it to begin anew. All of it takes two cores about an
hour.

LDS is the linear datamodeling score with a 95 % bootstrap interval; LOO Pearson and slope (of actual against predicted)
are of effects of single samples; AUC is of finding wrong labels, by self-influence ("own"; not by iterative solvers,
which solve a thousand times for it) and by the harm to the tests on average. λ is found by the solver where it can do
that, the default otherwise; in hindsight, the one with the best LDS of some is named. LiSSA goes some fixed steps.
Seconds are those of processors, from the model to the scores: what else the machine does changes them little.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]
os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:3], os.environ.get("PYTHONPATH", "")])  # for workers
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded

if TYPE_CHECKING:
    from cases import Case
    from truth import Figures, Scored, Truth

LIMIT = 1800.0
"""Seconds for another package and a case."""
NAMES = ("logistic", "mlp", "cnn", "table")
HEADING = (
    *("method", "LDS (95 %)", "LOO Pearson", "slope", "AUC, own", "AUC, harm", "processor seconds"),
    "best in hindsight: LDS",
)


@dataclass(frozen=True)
class Row:
    """A method in a case.

    Attributes:
        title: of the method.
        setting: that was chosen beforehand.
        figures: of its scores; None where there are none.
        own: the chance that self-influence puts a wrong label before a right one.
        harm: likewise for the harm to the tests on average.
        seconds: of processors, for the scores of all tests.
        best: the setting with the largest LDS of all that were tried.
        best_lds: that LDS.
        note: why there are no figures.
    """

    title: str
    setting: str = ""
    figures: Figures | None = None
    own: float = math.nan
    harm: float = math.nan
    seconds: float = math.nan
    best: str = ""
    best_lds: float = math.nan
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        """Return what the table says."""
        best = "" if math.isnan(self.best_lds) or self.best == self.setting else f"{self.best}: {self.best_lds:.3f}"
        if self.figures is None:
            return (self.title, self.note, "–", "–", "–", "–", "–", best)
        f = self.figures
        return (
            f"{self.title}, {self.setting}" if self.setting else self.title,
            f"{f.lds:.3f} ({f.low:.3f}–{f.high:.3f})",
            f"{f.pearson:.4f}",
            f"{f.slope:.3g}",
            "–" if math.isnan(self.own) else f"{self.own:.3f}",
            f"{self.harm:.3f}",
            f"{self.seconds:.1f}",
            best,
        )


def row_of(title: str, found: Iterable[Scored | str], case: Case, truth: Truth) -> Row:
    """Make a row of what came of each setting, the one that was chosen beforehand first; text says why nothing did."""
    from influence_pipeline.evaluate import detection

    rows: list[Row] = []
    for one in found:
        if isinstance(one, str):
            rows.append(Row(title, note=one))
            continue
        figures, wrong = truth.figures(one.scores), case.is_flipped()
        own = math.nan if one.own is None else detection(one.own, wrong).auc
        harm = detection(-one.scores.mean(axis=0), wrong).auc
        rows.append(Row(title, one.setting, figures, own, harm, one.seconds, one.setting, figures.lds))
    best = max((row for row in rows if row.figures), key=lambda row: row.best_lds, default=rows[0])
    return dataclasses.replace(rows[0], best=best.best, best_lds=best.best_lds)


class Kept:
    """Rows of a case that are done, in a file each."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def __getitem__(self, name: str) -> Row | None:
        """Return a row, None where it is not there."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            return None
        from truth import Figures

        told = json.loads(path.read_text(encoding="utf-8"))
        return Row(**{**told, "figures": told["figures"] and Figures(**told["figures"])})

    def __setitem__(self, name: str, row: Row) -> None:
        """Keep a row."""
        partial = self.folder / f"{name}.partial"
        partial.write_text(json.dumps(dataclasses.asdict(row), indent=1), encoding="utf-8")
        partial.replace(self.folder / f"{name}.json")


class Measuring:
    """The rows of a case."""

    def __init__(self, case: Case, folder: Path, workers: int) -> None:
        """Train the case's model, and then those of the ground truth, if that was not done."""
        from truth import Truth

        import influence_pipeline as ip
        from influence_pipeline.experiment import weights_hash

        case.train()
        self.case = case
        self.folder = folder / f"{case.name}-{weights_hash(case.model())}"
        self.rows = Kept(self.folder / "rows")
        settings = ip.Settings(runtime={"workers": workers, "device": "cpu"})
        self.truth = Truth.of(ip.Pipeline(case.experiment, self.folder / "cache", settings), "holdout", case.size)

    def solver(self, name: str) -> Row:
        """Return the row of a solver of this package."""
        import solvers

        if (row := self.rows[name]) is None:
            method = solvers.SOLVERS[name]
            row = self.rows[name] = row_of(method.title, solvers.scored(method, self.case), self.case, self.truth)
        return row

    def peer(self, name: str) -> Row:
        """Return the row of another package; one that cannot be installed or fails says so, and is tried again."""
        import others
        import peers

        if (row := self.rows[name]) is not None:
            return row
        file, title = self.folder / f"{name}.npz", peers.PEERS[name].title
        if not file.is_file():
            python, failed = others.install()
            wrong = failed.get(name) or failed.get("torch")
            wrong = wrong or others.ask(python, str(HERE / "peers.py"), [name, self.case.key, file], LIMIT)
            if wrong:
                return Row(title, note=str(wrong))
        row = self.rows[name] = row_of(title, peers.read(file), self.case, self.truth)
        return row


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """Return rows as a table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (HEADING, ("---",) * len(HEADING), *rows))


def main() -> None:
    """Print the tables of the cases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes and no other packages: does everything run?")
    parser.add_argument("--only", action="append", choices=NAMES, metavar="CASE", help=f"cases: {', '.join(NAMES)}")
    parser.add_argument("--folder", type=Path, default=HERE.parent.parent / "runs" / "accuracy", help="what is kept")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that train")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the tables there, too")
    options = parser.parse_args()

    import peers
    import solvers
    from cases import cases

    logging.getLogger("stages").setLevel(logging.ERROR)  # a model that is no optimum is what some cases are
    parts: list[str] = []
    for name, case in cases(options.quick).items():
        if name not in (options.only or NAMES):
            continue
        began = time.perf_counter()
        measuring = Measuring(case, options.folder, options.workers)
        print(f"{name}: trained again [{time.perf_counter() - began:.0f} s]", file=sys.stderr)
        rows: list[tuple[str, ...]] = []
        for method in [*solvers.SOLVERS, *(() if options.quick else peers.PEERS)]:
            began = time.perf_counter()
            rows.append((measuring.solver if method in solvers.SOLVERS else measuring.peer)(method).cells())
            print(f"{name}: {' | '.join(rows[-1])} [{time.perf_counter() - began:.0f} s]", file=sys.stderr, flush=True)
        parts.append(f"**{case.title}** ({measuring.truth})\n\n{table(rows)}\n")
        print(f"\n{parts[-1]}", flush=True)
    if options.table:
        options.table.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
