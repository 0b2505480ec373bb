"""Results as a notebook shows them: what they are, and the training samples that help and harm most on average."""

from __future__ import annotations

from html import escape

from influence_pipeline.influences import Influences, shown_label
from stages.stage import Array

SHOWN = 10
"""Ranks."""
CELL = 'style="text-align: right; padding: 1px 8px; font-variant-numeric: tabular-nums"'
TITLE = 'colspan="3" style="text-align: center; padding: 1px 8px"'


def table(influences: Influences) -> str:
    """Return HTML in which everything is escaped."""
    k = min(SHOWN, len(influences.train_ids))
    sides = [influences.helpful_on_average(k), influences.harmful_on_average(k)]
    _, labels = influences.labels()
    rows = [
        "".join(_cells(influences, labels, int(ids[rank]), float(scores[rank])) for ids, scores in sides)
        for rank in range(k)
    ]
    head = "".join(f"<th {CELL}>{name}</th>" for name in ("id", "score", "label")) * len(sides)
    titles = "".join(f"<th {TITLE}>most {side} on average</th>" for side in ("helpful", "harmful"))
    facts = ", ".join(influences.evidence)
    return (
        f"<div><b>Influences</b> of {len(influences.train_ids):,} training samples on {len(influences):,} tests "
        f"<b>{escape(influences.tests)}</b><br>{escape(facts)}"
        f'<table style="margin: 6px 0"><thead><tr>{titles}</tr><tr>{head}</tr></thead>'
        f"<tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table>"
        f"{escape(influences.meaning)}<br>"
        f"<code>{escape(str(influences.path))}</code></div>"
    )


def _cells(influences: Influences, labels: Array | None, i: int, score: float) -> str:
    texts = (str(i), f"{score:+.3e}", shown_label(labels, int((influences.train_ids == i).argmax())))
    return "".join(f"<td {CELL}>{escape(text)}</td>" for text in texts)
