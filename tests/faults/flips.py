"""Flips bytes of a finished cache, and cuts, empties and deletes files; then reads, verifies and runs again."""

from __future__ import annotations

import itertools
import json
import logging
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import influence_pipeline as ip
from influence_pipeline import plan
from tests import tiny
from tests.faults import children
from tests.faults.children import Server
from tests.faults.kills import LANES, Tally, Told

BLOCKS = 32, 8, 8
"""Rows of a block of gradients, of solutions and of scores: two of each, since there are many runs."""
Values = dict[str, Any]
NUMBERS = "OTHER NUMBERS"
"""What is worst of all that can be wrong."""
OTHERS: dict[str, dict[str, dict[str, Any]]] = {
    "other ranks": {"influence": {"top_k": 2}},
    "other damping": {"s_test": {"solver": "cg", "damping": {"relative": 0.2}}},
    "other solver": {"s_test": {"solver": "identity"}},
}
"""Settings that read what is cached of the first run."""


def make(cache: Path, **sections: dict[str, Any]) -> ip.Pipeline:
    return ip.Pipeline(tiny.experiment(), cache, tiny.settings(**sections))


JSON = "to_json"


# ---- reading ---------------------------------------------------------------------------------------------------------


def reads(cache: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield all that the results of a cache can be asked."""
    found = ip.Influences.open(cache, "holdout")
    for side, k in itertools.product(("helpful", "harmful"), (1, 3, 60)):
        yield f"{side}({k})", lambda side=side, k=k: getattr(found, side)(k)
        yield f"{side}_on_average({k})", lambda side=side, k=k: getattr(found, f"{side}_on_average")(k)
    for name in ("mean_scores", "labels", "__len__"):
        yield name, getattr(found, name)
    for name in (
        *("train_ids", "test_ids", "offset", "curvature_samples", "residual", "damping", "gradient_norm"),
        *("tests", "key", "higher_is_better"),
    ):
        yield name, lambda name=name: getattr(found, name)
    yield JSON, lambda: _json(found, cache)
    yield "subset", lambda: found.subset(tiny.points(60, 1), 5).indices


def _json(found: ip.Influences, cache: Path) -> Any:
    path = cache.parent / "shown.json"
    found.to_json(path, k=1)
    return json.loads(path.read_text())


def same(one: Any, other: Any) -> bool:
    """Say whether two things are exactly equal: type, shape and every bit."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    return type(one) is type(other) and bool(one == other)


# ---- harm ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Harm:
    """What is done to a file."""

    kind: str
    name: str
    what: str


KINDS = {"flipped": 80, "cut": 5, "emptied": 5, "deleted": 5, "another length": 5}
"""What is done to files, and how often; the last to descriptions of arrays alone, whose every digit matters."""


def harm(cache: Path, draw: random.Random) -> Harm:
    """Do something to a file: mostly, change a byte."""
    kind = draw.choices(tuple(KINDS), tuple(KINDS.values()))[0]
    paths = sorted(path for path in cache.rglob("*") if path.is_file())
    if kind == "another length":
        paths = [path for path in paths if path.name == "zarr.json" and _digits(path.read_bytes())]
    path = draw.choice(paths)
    name, data = str(path.relative_to(cache)), bytearray(path.read_bytes())
    if kind in ("flipped", "another length"):
        among = bytes(range(256)) if kind == "flipped" else b"0123456789"
        at = draw.randrange(len(data)) if kind == "flipped" else draw.choice(_digits(data))
        was, data[at] = data[at], draw.choice([byte for byte in among if byte != data[at]])
        path.write_bytes(data)
        return Harm(kind, name, f"byte {at} {bytes([was])!r} → {bytes([data[at]])!r}")
    if kind == "cut":
        length = draw.randrange(1, len(data))
        path.write_bytes(data[:length])
        return Harm(kind, name, f"to {length} of {len(data)} bytes")
    path.write_bytes(b"") if kind == "emptied" else path.unlink()
    return Harm(kind, name, "")


def _digits(description: bytes | bytearray) -> list[int]:
    """Return where the digits of an array's shape are."""
    shape = re.search(rb'"shape": \[[^]]*', description)
    return [] if shape is None else [at for at in range(*shape.span()) if description[at : at + 1].isdigit()]


# ---- one fault -------------------------------------------------------------------------------------------------------


class Flips:
    """A finished cache that is harmed, looked at and mended again and again."""

    def __init__(self, folder: Path) -> None:
        """Make one in a folder, and note what is to be read from it, and what other settings make of it."""
        self.cache = folder / "cache"
        make(self.cache).run()
        self.files = tiny.files(self.cache)
        self.groups = {path for path in self.cache.glob("*/*") if path.is_dir()}
        self.values: Values = {name: read() for name, read in reads(self.cache)}
        self.others = {name: self._other(name) for name in OTHERS}
        assert tiny.files(self.cache) == self.files
        assert all(self.others.values())

    def _other(self, name: str) -> dict[str, bytes]:
        """Run with other settings; return the files of what is new, which is removed again."""
        try:
            make(self.cache, **OTHERS[name]).run()
            found = tiny.files(self.cache)
        finally:
            for path in self.cache.glob("*/*"):
                if path.is_dir() and path not in self.groups:
                    shutil.rmtree(path)
        return {name: content for name, content in found.items() if not self._known(name)}

    def _known(self, name: str) -> bool:
        return name.count("/") < 2 or (self.cache / Path(*Path(name).parts[:2])) in self.groups

    def one(self, seed: int) -> tuple[Harm, list[str], list[str]]:
        """Harm a file; return how, what happened, and what was wrong, after which the cache is whole again."""
        draw = random.Random(seed)
        done = harm(self.cache, draw)
        wrong, refused = self._read(draw)
        happened = ["refused"] if refused else ["read as before"]
        if draw.random() < 0.12:
            name = draw.choice(sorted(OTHERS))
            happened.append(name)
            wrong += self._run_other(name)
        wrong += self._mended(happened)
        after = tiny.files(self.cache)
        for name in sorted(after.keys() | self.files.keys()):
            if after.get(name) != self.files.get(name):
                wrong.append(f"{name} is not what it was, after verify and run")
        if wrong:
            self._restore()
        return done, happened, wrong

    def _read(self, draw: random.Random) -> tuple[list[str], int]:
        """Read everything in any order; return what was wrong, and how often it was refused."""
        wrong, refused = [], 0
        try:
            found = list(reads(self.cache))
        except ip.InfluenceError:
            return [], 1
        except Exception as error:
            return [f"opening raises {error!r}"], 0
        draw.shuffle(found)
        if draw.random() < 0.7:  # it takes as long as all others, and reads the same
            found = [(name, read) for name, read in found if name != JSON]
        for name, read in found:
            try:
                value = read()
            except ip.InfluenceError:
                refused += 1
            except Exception as error:
                wrong.append(f"{name} raises {error!r}")
            else:
                if not same(value, self.values[name]):
                    wrong.append(f"{NUMBERS}: {name} gives {value!r}")
        return wrong, refused

    def _run_other(self, name: str) -> list[str]:
        """Run with other settings on what was harmed; what it makes must be what it makes of a whole cache."""
        self._follow_advice()
        try:
            found = self._other(name)
        except Exception as error:
            return [f"{name}: running raises {error!r}"]
        expected = self.others[name]
        differ = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
        return [f"{NUMBERS}: with {name}, {differ} are not what they are of a whole cache"] if differ else []

    def _mended(self, happened: list[str]) -> list[str]:
        """Verify, which must find what is wrong still, and run."""
        self._follow_advice()
        before, wrong = tiny.files(self.cache), []
        harmed = [name for name, content in before.items() if self.files.get(name) != content]
        try:
            found = make(self.cache).verify()
            if found.changed or found.differing:
                wrong.append(f"verify says: {found}")
            if harmed and not found.damaged and self.files.keys() <= before.keys():  # no record was removed before
                wrong.append("verify finds nothing")
            happened.append("verify finds it" if found.damaged else "nothing left for verify")
        except Exception as error:
            wrong.append(f"verify raises {error!r}")
        try:
            influences = make(self.cache).run()["holdout"]
            if not same(influences.helpful(60), self.values["helpful(60)"]):
                wrong.append(f"{NUMBERS} after verify and run")
        except Exception as error:
            wrong.append(f"running raises {error!r}")
        return wrong

    def _follow_advice(self) -> None:
        """Delete the root's description where the error says so."""
        try:
            ip.Pipeline(tiny.experiment(), self.cache)
        except ip.CacheDamaged as damage:
            if "delete that file" in str(damage):
                (self.cache / "zarr.json").unlink()
        except ip.InfluenceError:
            pass  # is seen by whoever runs next

    def _restore(self) -> None:
        shutil.rmtree(self.cache)
        for name, content in self.files.items():
            (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
            (self.cache / name).write_bytes(content)


def some(folder: str, seeds: tuple[int, int], progress: str) -> dict[str, Any]:
    """Harm a cache once for each seed of a range, in a child; a byte is added to a file after each."""
    children.prepare()
    plan.MOST_ROWS, plan.MOST_TESTS, plan.MOST_SCORED_TESTS = BLOCKS
    logging.disable()
    Path(folder).mkdir(parents=True)
    flips, kinds, wrong = Flips(Path(folder)), Counter[str](), []
    for seed in range(*seeds):
        done, what, texts = flips.one(seed)
        kinds.update([f"{done.kind}, {'description' if done.name.endswith('zarr.json') else 'data'}", *what])
        wrong += [f"seed {seed}: {done.name} {done.kind} {done.what}: {text}" for text in texts]
        with open(progress, "ab") as file:
            file.write(b".")
    return {"tried": len(range(*seeds)), "kinds": kinds, "wrong": wrong}


def many(server: Server, folder: Path, count: int, told: Told = lambda tally: None) -> Tally:
    """Harm so many files; ``told`` hears how far this is."""
    edges = [count * lane // LANES for lane in range(LANES + 1)]
    progress = [folder / f"{lane}.progress" for lane in range(LANES)]
    running = [
        server.start(
            "tests.faults.flips:some",
            hangs=None,
            folder=folder / str(lane),
            seeds=edges[lane : lane + 2],
            progress=path,
        )
        for lane, path in enumerate(progress)
    ]
    while any(child.exit is None for child in running):
        time.sleep(0.2)
        told(Tally(sum(path.stat().st_size for path in progress if path.exists())))
    total = Tally()
    for child in running:
        if child.exit != 0:
            raise RuntimeError(child.said)
        found = child.value
        total.add(Tally(found["tried"], kinds=Counter(found["kinds"]), wrong=found["wrong"]))
    return total
