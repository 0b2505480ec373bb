"""The page of some results: gathers what it shows, and fills the template.

All data are in blocks that a browser decodes when they are looked at; the rest of the page is the same for any data.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from influence_pipeline.context import Context
from influence_pipeline.export import written
from influence_pipeline.influences import Influences
from influence_pipeline.report.distribution import FEW, Spread, drawn, spread
from influence_pipeline.report.encoded import ROWS, Pictures, block, in_blocks, look, numbers
from influence_pipeline.report.seen import Seen, appearance, see
from stages.stage import Array

RANKS = 10
"""Helpful and harmful samples of each test, where it is not said."""
LISTED = 200
"""Samples that harm most on average."""
SCRIPTS = ("blocks.js", "elements.js", "training.js", "tests.js", "page.js")
"""Parts of the page's script, in their order."""
TEMPLATE = importlib.resources.files("influence_pipeline.report") / "template"


@dataclass(frozen=True)
class Ranked:
    """Which training samples the page shows.

    Attributes:
        positions: (P,) of all of them in the training set, ascending.
        helpful: (T, k), numbers among these; and what they score.
        harmful: the same.
        listed: (n,) of those that harm most on average, most harmful first.
    """

    positions: Array
    helpful: tuple[Array, Array]
    harmful: tuple[Array, Array]
    listed: Array

    @classmethod
    def of(cls, influences: Influences, k: int) -> Ranked:
        """Take the k most helpful and most harmful of each test, and those that harm most on average."""
        helpful, harmful = influences.helpful(k), influences.harmful(k)
        listed, means = influences.harmful_on_average(min(LISTED, len(influences.train_ids)))
        listed = listed[means > 0 if influences.higher_is_better else means < 0]
        ids = influences.train_ids
        order = np.argsort(ids)
        shown = np.unique(np.concatenate([helpful[0].ravel(), harmful[0].ravel(), listed]))
        positions = np.sort(order[np.searchsorted(ids[order], shown)])
        by_id = np.argsort(ids[positions])

        def number(of: Array) -> Array:
            found: Array = by_id[np.searchsorted(ids[positions][by_id], of)]
            return found

        return cls(positions, (number(helpful[0]), helpful[1]), (number(harmful[0]), harmful[1]), number(listed))


def write(influences: Influences, context: Context, path: Path, k: int | None = None) -> None:
    """Write the page of some results.

    Args:
        influences: the results.
        context: of the experiment that they are of.
        path: the file; it appears when it is whole.
        k: helpful and harmful training samples that each test shows; by default ten, or as many as were kept.

    Raises:
        RequestError: k is more than there are, or the model or the task raised.
        WorkError: the file cannot be written, or the data set raised.
    """
    if k is None:
        most = len(influences.train_ids) if influences.stored else influences.ranks
        k = min(RANKS, most)
    ranked, found = Ranked.of(influences, k), spread(influences)
    shown = appearance(context)
    trains = see(
        *(context, context.train, ranked.positions.tolist(), influences.train_ids[ranked.positions], shown), losses=True
    )
    test = context.test(influences.tests)
    tests = see(context, test, range(len(test)), influences.test_ids, shown, losses=False)
    text = rendered(influences, context, ranked, found, trains, tests)
    with written(path) as file:
        file.write(text.encode())


def rendered(influences: Influences, context: Context, ranked: Ranked, found: Spread, trains: Seen, tests: Seen) -> str:
    """Return the page's HTML."""
    measured = context.experiment.task.measurement_identity()["measurements"]
    facts = _facts(influences, context)
    script = _script()
    style = (TEMPLATE / "page.css").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("influence_pipeline.report", "template"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    better = influences.higher_is_better
    return environment.get_template("page.html").render(
        influences=influences,
        tests=len(influences),
        samples=len(influences.train_ids),
        measure="loss" if measured == "losses" else "measurement",
        facts=facts,
        blocks=_blocks(influences, context, ranked, found, trains, tests, measured == "losses"),
        script=script,
        script_hash=_hash(script),
        style=style,
        style_hash=_hash(style),
        scores=None if found.scores is None else drawn(found.scores, better),
        means=drawn(found.means, better),
        few=FEW,
        ranks=found.ranks,
        k=ranked.helpful[0].shape[1],
        listed=len(ranked.listed),
    )


def _blocks(
    influences: Influences,
    context: Context,
    ranked: Ranked,
    found: Spread,
    trains: Seen,
    tests: Seen,
    is_loss: bool,
) -> dict[str, str]:
    """Return all data of the page, by the names of their blocks."""
    pictures = Pictures()
    looks = {"training": trains.looks, "tests": tests.looks}
    shown = {name: [look(one, pictures) for one in of] for name, of in looks.items()}
    of_pictures, starts = pictures.blocks()
    sides = (*ranked.helpful, *ranked.harmful)
    columns = [numbers(side) or [] for side in sides]
    head = {
        "tests": influences.tests,
        "training": context.experiment.train_name,
        "key": influences.key,
        "samples": len(influences.train_ids),
        "higherIsBetter": influences.higher_is_better,
        "measure": "loss" if is_loss else "measurement",
        "few": FEW,
        "ranks": found.ranks,
        "rows": ROWS,
        "pictures": starts,
        "names": _names(context, trains, tests),
    }
    tables = {
        "tests": {
            "id": influences.test_ids.tolist(),
            **_columns(tests),
            "loss": numbers(influences.measurements()),
            "share": numbers(found.shares, 3),
        },
        "training": {
            "id": influences.train_ids[ranked.positions].tolist(),
            **_columns(trains),
            "loss": numbers(trains.losses),
            "mean": numbers(influences.mean_scores()[ranked.positions]),
        },
    }
    return {
        "head": block(head),
        **{f"{name}-table": block(table) for name, table in tables.items()},
        "listed": block(ranked.listed.tolist()),
        **in_blocks("tests-looks", shown["tests"]),
        **in_blocks("training-looks", shown["training"]),
        **in_blocks("ranks", list(zip(*columns, strict=True))),
        **of_pictures,
    }


def _columns(seen: Seen) -> dict[str, Any]:
    """Return what the page has of each sample beside its look; None for a column that has nothing."""
    columns = {"label": seen.labels, "prediction": seen.predictions, "right": seen.right}
    return {name: None if np.isnan(values).all() else numbers(values) for name, values in columns.items()}


def _names(context: Context, *seen: Seen) -> dict[str, str]:
    """Return the names of the labels that are on the page, by the number as JavaScript writes it."""
    names = context.experiment.label_names
    if names is None:
        return {}
    there = {number for one in seen for column in (one.labels, one.predictions) for number in column.tolist()}
    whole = sorted(int(number) for number in there if number == number and number.is_integer())
    return {str(number): names[number] for number in whole if number in names}


def _facts(influences: Influences, context: Context) -> list[tuple[str, str]]:
    """Say what speaks for the numbers."""
    facts = [
        ("test set", f"{influences.tests}, {len(influences):,} samples"),
        ("training set", f"{context.experiment.train_name}, {len(influences.train_ids):,} samples"),
        ("solver", context.settings.s_test.solver),
    ]
    if influences.combination:
        facts.append((f"{influences.combination} of the scores of", f"{len(influences.weights)} checkpoints"))
        facts.append(("predictions and training losses", "of the first of them"))
    if influences.evidence:
        facts.append(("evidence", ", ".join(influences.evidence)))
    over = influences.curvature_samples
    if over != len(influences.train_ids):
        facts.append(("H and 1/N are of the first", f"{over:,} training samples"))
    facts.append(("results in the cache", influences.path.name))
    return facts


def _script() -> str:
    """Return the page's script, all of it in one function."""
    parts = [(TEMPLATE / name).read_text(encoding="utf-8") for name in SCRIPTS]
    return '(() => {\n"use strict";\n' + "\n".join(parts) + "})();\n"


def _hash(text: str) -> str:
    """Return what a page's policy names a script or a style by, that nothing else be run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
