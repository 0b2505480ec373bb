"""Harm runs and caches as the tests of faults do, more often: ``python scripts/faults.py --kills 1000``."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.faults import children, flips, kills, together
from tests.faults.kills import Tally, Told

NEW = 0.05
"""Share of kills that are of new processes."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, metavar="N", help="kill so many runs at random moments")
    parser.add_argument("--flips", type=int, metavar="N", help="harm so many files of a finished cache")
    parser.add_argument("--together", type=int, metavar="N", help="run processes at the same time, so often")
    asked = vars(parser.parse_args())
    if not any(asked.values()):
        asked = {"kills": 200, "flips": 500, "together": 50}
    began, rows, wrong = time.monotonic(), [], []
    with tempfile.TemporaryDirectory() as name, children.server(Path(name) / "server") as server:
        folder = Path(name)
        reference = kills.Reference(server, folder)
        for what, count in asked.items():
            if not count:
                continue
            (folder / what).mkdir()
            told = progress(what, count)
            if what == "kills":
                new = round(NEW * count)
                tally = kills.many(server, reference, folder / what, count - new, new, 0, told)
            elif what == "flips":
                tally = flips.many(server, folder / what, count, told)
            else:
                tally = together.many(server, reference, folder / what, count, told)
            told(tally)
            print(file=sys.stderr)
            rows += table(what, tally)
            wrong += [f"{what}: {text}" for text in (*tally.wrong, *(f"left over: {text}" for text in tally.left))]
    width = max(len(row[0]) for row in rows)
    for fault, tried, outcome in [("fault", "tried", "outcome"), *rows]:
        print(f"{fault:<{width}}  {tried:>6}  {outcome}")
    print(f"{len(wrong)} wrong, {time.monotonic() - began:.0f} s")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


def progress(what: str, count: int) -> Told:
    """Return what shows on one line how far something is."""
    began, last = time.monotonic(), [-1]

    def told(tally: Tally) -> None:
        wrong, seconds = len(tally.wrong) + len(tally.left), time.monotonic() - began
        if tally.tried != last[0]:
            print(
                f"\r{what}: {tally.tried} of {count}, {wrong} wrong, {seconds:.0f} s",
                end="",
                file=sys.stderr,
                flush=True,
            )
            last[0] = tally.tried

    return told


def table(what: str, tally: Tally) -> list[tuple[str, str, str]]:
    """Return lines of the final table: what was done, how often, and what came of it."""
    good = {
        "kills": "went on to the same bytes",
        "flips": "refused or read as before, then mended to the same bytes",
        "together": "the bytes of one process, nothing computed in vain",
    }[what]
    bad = [f"{len(tally.wrong)} wrong"] * bool(tally.wrong) + [f"{len(tally.left)} files left over"] * bool(tally.left)
    shown = {
        "kills": {f"killed, {kind}": kind for kind in (*kills.ORDER, kills.CLAIMING)},
        "flips": {kind: kind for kind in sorted(tally.kinds)},
        "together": {kind: kind for kind in dict.fromkeys(together.KINDS)},
    }[what]
    kinds = Counter(tally.kinds)
    return [
        (what, str(tally.tried), ", ".join(bad) or good),
        *((f"  {text}", str(kinds[kind]), "") for text, kind in shown.items()),
    ]


if __name__ == "__main__":
    sys.exit(main())
