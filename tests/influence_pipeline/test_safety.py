"""A cache that comes from elsewhere runs nothing: no pickle in it, none of its descriptions is trusted."""

from __future__ import annotations

import ast
import contextlib
import functools
import itertools
import json
import pickle
import pickletools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import influence_pipeline as ip
from influence_pipeline import inventory
from influence_pipeline.cache import Cache
from influence_pipeline.cache.layout import seal
from tests import tiny
from tests.conftest import ROOT

Make = Callable[..., ip.Pipeline]

CODECS = {"bytes", "blosc", "crc32c", "sharding_indexed"}
TYPES = {"float16", "float32", "float64", "int64", "uint8"}


def descriptions(cache: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_bytes()) for path in cache.rglob("zarr.json")]


def codecs(found: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the names of codecs, those inside shards too."""
    for codec in found:
        yield codec["name"]
        for inner in ("codecs", "index_codecs"):
            yield from codecs(codec.get("configuration", {}).get(inner, []))


def is_pickle(data: bytes) -> bool:
    """Say whether bytes are a pickle, of any protocol, from beginning to end."""
    try:
        return sum(1 for _ in pickletools.genops(data)) > 0
    except Exception:
        return False


def test_a_pickle_is_found_where_there_is_one() -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert is_pickle(pickle.dumps({"a": [1.0]}, protocol))
    assert not is_pickle(json.dumps({"a": 1}).encode())


@pytest.mark.parametrize("solver", ["cg", "exact"])
def test_nothing_in_a_cache_is_a_pickle(make: Make, cache: Path, solver: str) -> None:
    make(s_test={"solver": solver}, grad_z={"encoding": "float32" if solver == "exact" else "float16"}).run()
    files = tiny.files(cache)
    assert {path.name for path in map(Path, files) if "c" not in path.parts} == {"zarr.json"}
    assert not [name for name, data in files.items() if is_pickle(data) or b"pickle" in data]
    arrays = [found for found in descriptions(cache) if found["node_type"] == "array"]
    assert {name for found in arrays for name in codecs(found["codecs"])} <= CODECS
    assert {found["data_type"] for found in arrays} <= TYPES


class Trap:
    """Writes a file when it is read as a pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "pickle": lambda d: d["codecs"].append({"name": "numcodecs.pickle", "configuration": {"protocol": 2}}),
    "only pickle": lambda d: d.update(codecs=[{"name": "numcodecs.pickle"}]),
    "first pickle": lambda d: d["codecs"].insert(0, {"name": "pickle"}),
    "unknown": lambda d: d["codecs"].append({"name": "unheard-of"}),
    "json": lambda d: d.update(codecs=[{"name": "numcodecs.json2"}]),
    "object": lambda d: d.update(data_type="object"),
    "structure": lambda d: d.update(data_type={"name": "numpy.object", "configuration": {}}),
    "no codec": lambda d: d.update(codecs=[]),
    "codec of a number": lambda d: d.update(codecs=[5]),
    "filter": lambda d: d["codecs"].append({"name": "numcodecs.fixedscaleoffset", "configuration": {}}),
    "transformer": lambda d: d.update(storage_transformers=[{"name": "pickle"}]),
}


def spoil(cache: Path, stage: str, edit: Callable[[dict[str, Any]], Any], sealed: bool, trap: Path) -> None:
    """Edit the descriptions of a stage's arrays, and have its files be traps."""
    for path in cache.glob(f"{stage}/*/*/zarr.json"):
        described = json.loads(path.read_bytes())
        edit(described)
        path.write_text(json.dumps(described))
        if sealed:
            seal(path)
    for path in cache.glob(f"{stage}/*/*/c/**/*"):
        if path.is_file():
            path.write_bytes(pickle.dumps(Trap(trap)))


@pytest.mark.parametrize("stage", ["influence", "grad_z"])
@pytest.mark.parametrize("sealed", [True, False], ids=["with a checksum that fits", "with the old checksum"])
def test_arrays_of_other_codecs_and_types_are_refused_and_run_nothing(
    done: Path, tmp_path: Path, make: Make, stage: str, sealed: bool
) -> None:
    told = {path: path.read_bytes() for path in done.glob(f"{stage}/*/*/zarr.json")}
    for name, edit in EDITS.items():
        for path, text in told.items():
            path.write_bytes(text)
        spoil(done, stage, edit, sealed, tmp_path / "sprung")
        with pytest.raises(ip.InfluenceError):
            ip.Influences.open(done, "holdout").labels()
        if name == "only pickle":
            with contextlib.suppress(ip.InfluenceError):  # or it is mended
                assert np.isfinite(make().run()["holdout"].scores[:]).all()
        assert not (tmp_path / "sprung").exists(), name


@pytest.mark.parametrize("stage", ["influence", "grad_z"])
def test_a_codec_that_zarr_knows_and_no_cache_has_is_refused(
    done: Path, tmp_path: Path, make: Make, stage: str
) -> None:
    spoil(done, stage, lambda d: d.update(codecs=[{"name": "vlen-utf8"}]), True, tmp_path / "sprung")
    with pytest.raises(ip.InfluenceError):
        ip.Influences.open(done, "holdout").labels()
    with pytest.raises(ip.CacheDamaged, match="vlen-utf8"):
        make().run()


ELSEWHERE = [
    ("influence", "identity", "s_test", "residual"),
    ("influence", "identity", "grad_z", "labels"),
    ("s_test", "reads", "curvature", "gradient_norm"),
]


@pytest.mark.parametrize(("stage", "entry", "other", "asked"), ELSEWHERE, ids=[names[2] for names in ELSEWHERE])
def test_a_group_that_names_others_outside_of_the_cache_is_refused(
    done: Path, tmp_path: Path, stage: str, entry: str, other: str, asked: str
) -> None:
    path = next(done.glob(f"{stage}/*/zarr.json"))
    described = json.loads(path.read_bytes())
    described["attributes"][entry][other] = f"../../elsewhere/{next((done / other).iterdir()).name}"
    path.write_text(json.dumps(described))
    seal(path)
    (done / other).rename(tmp_path / "elsewhere")
    with pytest.raises(ip.InfluenceError, match=r"elsewhere/.* is no name of arrays"):
        getattr(ip.Influences.open(done, "holdout"), asked)


FORGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no identity": lambda a: a.pop("identity"),
    "identity of a number": lambda a: a.update(identity=5),
    "no bands": lambda a: a.pop("bands"),
    "a band of nothing": lambda a: a.update(bands=dict.fromkeys(a["bands"], 0)),
    "other axes": lambda a: a.update(bands={"height": 3, "width": 4, "depth": 5}),
    "arrays of a number": lambda a: a.update(arrays=5),
    "arrays elsewhere": lambda a: a["arrays"].append("../../elsewhere"),
    "no arrays": lambda a: a.update(arrays=[]),
    "reads of a number": lambda a: a.update(reads={"grad_z": 5}),
    "tests of a number": lambda a: a.update(tests=5),
    "no attributes": lambda a: a.clear(),
}


@pytest.mark.parametrize("stage", ["grad_z", "curvature", "s_test", "influence"])
@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED.keys())
def test_a_forged_description_of_a_group_is_an_error_of_the_cache(
    done: Path, make: Make, stage: str, forge: Callable[[dict[str, Any]], Any]
) -> None:
    """Its checksum fits, so that it may say anything."""
    path = next(done.glob(f"{stage}/*/zarr.json"))
    described = json.loads(path.read_bytes())
    forge(described["attributes"])
    path.write_text(json.dumps(described))
    seal(path)
    for look in (
        lambda: make().run(),
        lambda: make().plan(),
        lambda: make().verify(),
        lambda: make().garbage(),
        lambda: ip.Influences.open(done, "holdout").helpful(3),
        lambda: inventory.listed(Cache(done)),
    ):
        with contextlib.suppress(ip.InfluenceError):
            look()


@functools.cache
def all_calls() -> list[tuple[str, Path, ast.Call]]:
    """List every call in the project, tests aside, with the name of what is called."""
    paths = [path for folder in ("influence_pipeline", "stages", "scripts") for path in (ROOT / folder).rglob("*.py")]
    paths = [path for path in paths if "site-packages" not in path.parts]  # an environment of the benchmark's
    nodes = [(path, node) for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    return [(ast.unparse(node.func), path, node) for path, node in nodes if isinstance(node, ast.Call)]


def calls(name: str) -> list[tuple[Path, ast.Call]]:
    return [(path, call) for called, path, call in all_calls() if called == name]


def test_weights_are_loaded_as_weights_only() -> None:
    assert calls("torch.load")
    for path, call in calls("torch.load"):
        only = {keyword.arg: keyword.value for keyword in call.keywords}.get("weights_only")
        assert isinstance(only, ast.Constant), f"{path}:{call.lineno}"
        assert only.value is True, f"{path}:{call.lineno}"


def test_pickles_are_read_from_what_this_run_wrote_alone() -> None:
    for module, name in itertools.product(("pickle", "cloudpickle", "joblib", "dill"), ("load", "loads")):
        if (module, name) != ("cloudpickle", "loads"):
            assert not calls(f"{module}.{name}"), f"{module}.{name}"
    for path, call in calls("np.load"):
        allowed = {keyword.arg: keyword.value for keyword in call.keywords}.get("allow_pickle")
        assert isinstance(allowed, ast.Constant), f"{path}:{call.lineno}"
        assert allowed.value is False, f"{path}:{call.lineno}"
    assert [path.name for path, _ in calls("cloudpickle.loads")] == ["runner.py"]
