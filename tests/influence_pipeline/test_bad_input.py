"""Names lead nowhere but into the cache; ids and k are whole numbers, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

import influence_pipeline as ip
from influence_pipeline.settings import check_name
from tests import tiny

Make = Callable[..., ip.Pipeline]
N, T = 60, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad")


# ---- names -----------------------------------------------------------------------------------------------------------

NASTY = [
    "",
    ".",
    "..",
    "../c",
    "../../decoy/influence/holdout",
    "/",
    "/etc",
    "a/b",
    "a\\b",
    "\0",
    "a\0",
    ".a",
    "-a",
    "a\n",
]
NASTY += ["a" * 65, "a" * 5000, "ä", "a b", "\ud800", "~", "*", "holdout/", "holdout\0", "C:x", "\u202e"]
NAMES = st.one_of(st.sampled_from(NASTY), st.text(max_size=6), st.text("aZ09_-./", max_size=70))
NO_NAMES = [None, 5, True, 1.5, float("nan"), b"a", ("a",), frozenset()]


@given(st.one_of(NAMES, st.sampled_from(NO_NAMES)))
def test_a_name_is_one_plain_part_of_a_path_or_refused(name: Any) -> None:
    plain = isinstance(name, str) and name.isascii() and 0 < len(name) <= 64 and name[0] not in ".-"
    plain = plain and set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")
    attempts: list[Callable[[], Any]] = [
        lambda: check_name(name, "tests"),
        lambda: tiny.experiment(tests={name: None}),
        lambda: tiny.experiment(train_name=name),
        lambda: ip.Settings(tests={name: {"per_class": 1}}),
    ]
    for attempt in attempts[: 4 if isinstance(name, str) else 3]:
        if plain:
            attempt()
        else:
            with pytest.raises(ip.RequestError) as refused:
                attempt()
            assert repr(name)[:70] in str(refused.value)
            assert len(str(refused.value)) < 300


@pytest.mark.parametrize("name", ["a..b", "_", "a" * 64, "0", "x.partial", "zarr.json", "blocks", "holdout-0123"])
def test_odd_names_stay_inside_the_cache(tmp_path: Path, make: Make, name: str) -> None:
    pipeline = make(
        tmp_path / "a" / "b" / "cache",
        tests={name: tiny.points(3, 2)},
        train_name=name,
        s_test={"solver": "identity"},
    )
    assert pipeline.run()[name].scores.shape == (3, N)
    assert ip.Influences.open(pipeline.cache.path, name).scores.shape == (3, N)
    assert pipeline.plan(name).complete
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in (tmp_path / "a").rglob("*")][:2] == ["b", "cache"]
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["cache"]
    assert {path.name for path in pipeline.cache.path.iterdir() if path.is_dir()} <= {"grad_z", "s_test", "influence"}


@pytest.fixture(scope="module")
def beside(finished: Path, folder: Path) -> tuple[Path, dict[str, bytes]]:
    """Return a finished cache beside another one, and all files of both."""
    for name in ("cache", "decoy"):
        shutil.copytree(finished, folder / name)
    return folder / "cache", tiny.files(folder / "decoy")


@given(NAMES, st.one_of(st.none(), NAMES))
@example("../../decoy/influence/holdout", None)
@example("holdout", "../../../decoy/influence/holdout")
@example("holdout", "")
def test_no_name_and_no_key_leads_out_of_the_cache(
    beside: tuple[Path, dict[str, bytes]], tests: str, key: str | None
) -> None:
    cache, decoy = beside
    for where in (cache, cache.parent / "nowhere" / "cache"):
        with pytest.raises(ip.MissingStage) as refused:
            ip.Influences.open(where, tests, key)
        assert repr(tests) in str(refused.value)
    assert tiny.files(cache.parent / "decoy") == decoy
    assert not (cache.parent / "nowhere").exists()


@given(NAMES)
def test_a_pipeline_refuses_names_of_no_test_set(beside: tuple[Path, dict[str, bytes]], name: str) -> None:
    cache, decoy = beside
    pipeline = ip.Pipeline(tiny.experiment(), cache.parent / "new", tiny.settings())
    selected = ip.Pipeline(tiny.experiment(), cache, ip.Settings(tests={"few": {"per_class": 1, "of": name}}))
    for call in (pipeline.run, pipeline.s_test, pipeline.influence, pipeline.plan, lambda of: selected.plan()):
        with pytest.raises(ip.RequestError) as refused:
            call(name)
        assert f"no test set {name!r}; the experiment has: holdout" in str(refused.value)
    assert not (cache.parent / "new").exists()
    assert tiny.files(cache.parent / "decoy") == decoy


@pytest.mark.parametrize("path", ["\0", "a" * 5000, "a\0/b", None, 5], ids=["NUL", "long", "NUL inside", "None", "5"])
def test_a_cache_that_no_disk_can_have_is_refused(path: Any) -> None:
    with pytest.raises(ip.RequestError, match="cache"):
        ip.Influences.open(path, "holdout")
    if path is not None:
        with pytest.raises(ip.RequestError, match="cache"):
            ip.Pipeline(tiny.experiment(), path)


@pytest.mark.parametrize(
    "device",
    ["", "\0", "é", "CPU", "cuda:99", "cuda:" + "9" * 30, "meta", "hpu"],
)
def test_a_device_that_cannot_compute_is_refused(make: Make, cache: Path, device: str) -> None:
    with pytest.raises(ip.RequestError, match=r"runtime\.device = .* cannot be used here"):
        make(runtime={"device": device}).run()
    assert not cache.exists()


# ---- ids and k -------------------------------------------------------------------------------------------------------

KS = st.one_of(
    st.integers(-3, N + 3),
    st.sampled_from([10**30, 1.0, 2.5, float("nan"), float("inf"), "3", b"3", None, True, False, 3 + 0j, [3], (), {}]),
    st.sampled_from([
        np.int64(3),
        np.uint8(3),
        np.int32(-1),
        np.float64(3),
        np.bool_(True),
        np.array([3]),
        np.int64(61),
    ]),
)


@given(KS)
def test_any_k_gives_k_ids_or_is_refused(finished: Path, folder: Path, k: Any) -> None:
    influences, train, path = ip.Influences.open(finished, "holdout"), tiny.points(N, 1), folder / "out.json"
    path.unlink(missing_ok=True)
    asked: list[Callable[[], Any]] = [
        lambda: [ids.shape for ids in influences.helpful(k)] == [(T, k)] * 2,
        lambda: [ids.shape for ids in influences.harmful(k)] == [(T, k)] * 2,
        lambda: [ids.shape for ids in influences.helpful_on_average(k)] == [(k,)] * 2,
        lambda: [ids.shape for ids in influences.harmful_on_average(k)] == [(k,)] * 2,
        lambda: len(influences.subset(train, k)) == k,
        lambda: (
            influences.to_json(path, k) or len(json.loads(path.read_text())["0"]["helpful"]) == (N if k is None else k)
        ),
    ]
    whole = isinstance(k, (int, np.integer)) and not isinstance(k, bool) and 0 < k <= N
    for ask in asked:
        if whole or (k is None and ask is asked[-1]):
            assert ask()
        else:
            with pytest.raises(ip.RequestError, match=r"k = .*: there are 60 training samples"):
                ask()
            assert not path.exists()


def test_what_cannot_be_written_is_refused_with_the_path(finished: Path, tmp_path: Path) -> None:
    influences = ip.Influences.open(finished, "holdout")
    for path in (tmp_path, tmp_path / "none" / "out.json", tmp_path / ("a" * 300)):
        with pytest.raises(ip.InfluenceError, match="cannot be written"):
            influences.to_json(path)
    with pytest.raises(ip.RequestError, match="train"):
        influences.subset(None, 3)  # type: ignore[arg-type]


@given(st.permutations(range(N)), st.sampled_from([np.int8, np.int64, np.uint64, list, tuple, torch.tensor]))
def test_different_whole_numbers_are_ids(ids: list[int], kind: Any) -> None:
    made = np.asarray(ids, kind) if isinstance(kind, type) and issubclass(kind, np.generic) else kind(ids)
    found = tiny.experiment(train_ids=made).train_ids()
    assert found.dtype == np.int64
    assert found.tolist() == ids


GOOD = list(range(N))
WRONG = {
    "duplicate": [*GOOD[:-1], 0],
    "negative": [*GOOD[:-1], -1],
    "float": [float(i) for i in GOOD],
    "nan": [*GOOD[:-1], float("nan")],
    "short": GOOD[:-1],
    "long": [*GOOD, N],
    "none": [],
    "text": list(map(str, GOOD)),
    "nothing": [None] * N,
    "ragged": [[1], [2, 3]],
    "table": np.arange(N)[:, None],
    "number": 5,
    "words": "abc",
    "beyond int64": [2**63 + i for i in GOOD],
    "beyond uint64": [2**64 + i for i in GOOD],
    "bools": [True] * N,
    "set": set(GOOD),
    "iterator": iter(GOOD),
    "bfloat16": torch.arange(N).bfloat16(),
    "with gradient": torch.arange(float(N)).requires_grad_(),
}


@pytest.mark.parametrize("ids", WRONG.values(), ids=WRONG.keys())
def test_what_names_no_samples_is_refused(ids: Any) -> None:
    with pytest.raises(ip.RequestError, match=r"train_ids must be .*whole numbers"):
        tiny.experiment(train_ids=ids).train_ids()


@given(st.permutations(range(N)), st.integers(0, N - 1), st.one_of(st.integers(0, N - 1), st.integers(-(2**40), -1)))
def test_one_wrong_id_is_enough(ids: list[int], at: int, wrong: int) -> None:
    assume(ids[at] != wrong)
    ids[at] = wrong
    with pytest.raises(ip.RequestError, match="train_ids must be 60 different whole numbers"):
        tiny.experiment(train_ids=ids).train_ids()


@pytest.mark.parametrize("workers", ["2", 1.5, None, -1])
def test_loader_workers_that_are_no_number_are_refused(workers: Any) -> None:
    with pytest.raises(ip.RequestError, match="loader_workers must be a whole number"):
        tiny.experiment(loader_workers=workers)
