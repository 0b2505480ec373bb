"""Whatever is written into settings and globs is taken as it is meant, or refused by its name."""

from __future__ import annotations

import copy
import fnmatch
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import influence_pipeline as ip
from influence_pipeline.cache import key_of
from stages.parameters import select
from stages.stage import StageError
from tests import tiny

Make = Callable[..., ip.Pipeline]

# ---- settings --------------------------------------------------------------------------------------------------------

VALID: dict[str, Any] = {
    "experiment": "digits.py:experiment",
    "cache": "runs",
    "tests": {"few": {"per_class": 3, "start": 2, "of": "holdout"}},
    "grad_z": {"parameters": ["0.*"], "encoding": "float32", "store": True},
    "s_test": {
        "solver": "cg",
        "curvature": "ggn",
        "damping": {"relative": 0.5},
        "seed": 3,
        "tolerance": 0.01,
        "max_iterations": 50,
        "sample": 20,
    },
    "influence": {"top_k": 20, "store_scores": False},
    "runtime": {"device": "cpu", "workers": 2, "memory": "1 GiB", "device_batch": 8, "progress": False},
}
LISSA = {"solver": "lissa", "recursion_depth": 9, "repeats": 2, "scale": 4.0, "batch_size": 8, "tolerance": 0.1}
Path_ = tuple[str, ...]
MANY = hypothesis_settings(max_examples=200)


def places(table: dict[str, Any], before: Path_ = ()) -> list[Path_]:
    """List every key of nested tables."""
    found = []
    for key, value in table.items():
        found.append((*before, key))
        found += places(value, (*before, key)) if isinstance(value, dict) else []
    return found


def changed(table: dict[str, Any], place: Path_, value: Any, key: str | None = None) -> dict[str, Any]:
    """Return a copy with another value at a place, or the same one under another key."""
    table = copy.deepcopy(table)
    section = table
    for part in place[:-1]:
        section = section[part]
    if key is not None:
        value = section.pop(place[-1])
    section[place[-1] if key is None else key] = value
    return table


def refusal(values: dict[str, Any]) -> str | None:
    """Return what settings are refused with, None where they are taken; nothing else may be raised."""
    try:
        settings = ip.Settings(**values)
    except ip.RequestError as error:
        lines = str(error).splitlines()
        assert len(lines) <= 22
        assert max(map(len, lines)) < 700
        return str(error)
    assert key_of(settings.s_test.model_dump(mode="json"))  # finite numbers, and JSON
    return None


NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.integers(20, 6000).map(lambda digits: 10**digits),
    st.sampled_from([0, -1, 2**63, 2**64, 1e308, -0.0, float("nan"), float("inf")]),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.text(max_size=8),
    st.dates(),
    st.datetimes(),
    st.times(),
    st.binary(max_size=4),
)
KEYS = st.one_of(
    st.sampled_from([
        *VALID,
        "parameters",
        "top_k",
        "solver",
        "damping",
        "memory",
        "few",
        "self",
        "values",
        "",
        "..",
        "a/b",
    ]),
    st.text(max_size=6),
)
WILD = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=6,
)


def test_the_valid_settings_are_valid() -> None:
    assert refusal(VALID) is None
    assert refusal({**VALID, "s_test": LISSA}) is None


@MANY
@given(st.dictionaries(KEYS, WILD, max_size=5))
@example({"self": 1})
@example({"values": 1})
@example({"cache": ""})
@example({"runtime": {"log_file": "\0"}})
@example({"tests": {"": {"per_class": 1}}})
@example({str(i): i for i in range(100)})
def test_tables_of_any_kind_are_settings_or_refused_by_key(values: dict[str, Any]) -> None:
    text = refusal(values)
    assert text is None or any(key in text or repr(key)[1:-1] in text for key in values)


@MANY
@given(st.sampled_from(places(VALID)), WILD)
@example(("runtime", "memory"), "9" * 400)
@example(("runtime", "memory"), "9" * 400 + " TB")
@example(("runtime", "workers"), True)
@example(("s_test", "damping"), True)
@example(("s_test", "seed"), 10**30)
@example(("s_test", "damping", "relative"), float("nan"))
@example(("cache",), "a\0b")
def test_a_value_of_any_kind_is_taken_or_refused_at_its_place(place: Path_, value: Any) -> None:
    text = refusal(changed(VALID, place, value))
    assert text is None or ".".join(place) in text or (place[-1] == "solver" and "s_test" in text)


@pytest.mark.parametrize("place", [p for p in places(VALID) if p[-1] not in ("solver", "tests")], ids=".".join)
def test_numbers_that_cannot_be_written_out_are_refused_at_their_place(place: Path_) -> None:
    for value in (10**5000, {"x": 10**5000}, [10**5000]):
        assert ".".join(place) in (refusal(changed(VALID, place, value)) or "")
    assert "s_test" in (refusal({"s_test": {"solver": 10**5000}}) or "")


COUNTS = [("s_test", "max_iterations"), ("s_test", "sample"), ("influence", "top_k"), ("runtime", "workers")]
COUNTS += [("runtime", "memory"), ("runtime", "device_batch"), ("tests", "few", "per_class")]
OUT_OF_RANGE = st.one_of(st.integers(max_value=0), st.integers(min_value=2**61), st.floats(0.01, 0.99))


@MANY
@given(st.sampled_from(COUNTS), st.one_of(OUT_OF_RANGE, st.sampled_from([float("nan"), float("inf"), True, False])))
def test_a_count_that_is_out_of_range_is_refused_at_its_place(place: Path_, value: Any) -> None:
    text = refusal(changed(VALID, place, value))
    assert text is not None
    assert f"  {'.'.join(place)}: " in text


@MANY
@given(st.sampled_from([k for k in LISSA if k != "solver"]), st.one_of(st.integers(max_value=0), st.just(float("nan"))))
def test_numbers_of_lissa_are_refused_at_their_place(key: str, value: Any) -> None:
    text = refusal({**VALID, "s_test": {**LISSA, key: value}})
    assert text is not None
    assert f"  s_test.{key}: " in text


@MANY
@given(st.data())
def test_a_misspelt_key_is_named_and_the_right_one_is_suggested(data: st.DataObject) -> None:
    place = data.draw(st.sampled_from([p for p in places(VALID) if p[:2] != ("tests", "few") or len(p) > 2]))
    key = place[-1]
    at = data.draw(st.integers(0, len(key) - 1))
    misspelt = data.draw(st.sampled_from([key[:at] + key[at + 1 :], key[:at] + key[at] + key[at:], f"{key}x"]))
    assume(misspelt and misspelt not in {*VALID, *VALID["s_test"]} and place != ("s_test", "solver"))
    text = refusal(changed(VALID, place, None, misspelt))
    assert text is not None
    line = next(line for line in text.splitlines() if "unknown setting" in line)
    assert line.startswith(f"  {'.'.join((*place[:-1], misspelt))}: ")
    assert len(key) < 4 or line.endswith(f"did you mean {key!r}?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad")


PIECES = [*"[]{}=.,\n\"' \\#\0", "[[", '"""', "grad_z", "s_test", "damping", "relative", "cache", "tests", "memory"]
PIECES += [
    "1",
    "-1",
    "1e999",
    "nan",
    "inf",
    "0x" + "f" * 5000,
    "9" * 5000,
    "1979-05-27",
    "true",
    "\ufeff",
    "ä",
    "\\uD800",
]
TOML = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@MANY
@given(st.one_of(st.binary(max_size=40), st.text(max_size=40).map(str.encode), TOML.map(str.encode)))
@example(b"a = " + b"[" * 3000)
@example(b"a." * 3000 + b"b = 1")
@example(b"cache." + b"a." * 3000 + b"b = 1")
@example(b"x = " + b"9" * 5000)
@example(b"self = 1")
@example(b"s_test.damping = 0x" + b"f" * 5000)
def test_a_file_of_any_bytes_is_settings_or_refused_by_its_name(folder: Path, content: bytes) -> None:
    path, text = folder / "settings.toml", None
    path.write_bytes(content)
    try:
        settings = ip.Settings.from_toml(path)
        assert settings.cache is None or settings.cache.is_absolute()
    except ip.RequestError as error:
        text = str(error)
    assert text is None or (text.startswith(f"{path}: ") and len(text) < 3000)


@pytest.mark.parametrize("name", ["\0", "a" * 5000, "a/\0.toml"])
def test_a_settings_file_that_no_disk_can_have_is_refused(name: str) -> None:
    with pytest.raises(ip.RequestError, match="cannot be read"):
        ip.Settings.from_toml(name)


# ---- globs -----------------------------------------------------------------------------------------------------------

ODD = ["", "*", "?", "[", "]", "[!", "[!]", "[]", "**", "[z-a]", "[[:x:]]", "[a&&b]", "[a--b]", "\0", "ä"]
PARTS = ["*", "?", "[02]", "[!0]", "[a-z]", ".", "0", "2", "weight", "bias", "[", "]", "!", "\\", "é"]
GLOBS = st.one_of(st.sampled_from(ODD), st.lists(st.sampled_from(PARTS), max_size=6).map("".join), st.text(max_size=5))


@MANY
@given(st.lists(GLOBS, min_size=1, max_size=3))
def test_globs_select_what_fnmatch_does_or_are_refused_by_name(globs: list[str]) -> None:
    model = tiny.model()
    model[2].bias.requires_grad_(False)
    matched = {
        glob: [name for name, _ in model.named_parameters() if fnmatch.fnmatchcase(name, glob)] for glob in globs
    }
    wanted = {name for names in matched.values() for name in names} - {"2.bias"}
    idle = [glob for glob, names in matched.items() if not names]
    if idle or not wanted:
        with pytest.raises(StageError) as refused:
            select(model, globs)
        assert repr(idle[0] if idle else globs) in str(refused.value)
        assert "0.weight, 0.bias, 2.weight, 2.bias" in str(refused.value)
    else:
        assert set(select(model, globs)) == wanted


@pytest.mark.parametrize("glob", ["", "[", "0.WEIGHT", "weight", "0.weight\n", "ä*"])
def test_a_glob_without_parameters_is_refused_by_a_pipeline(make: Make, cache: Path, glob: str) -> None:
    with pytest.raises(ip.RequestError, match=re.escape(f"parameters: {glob!r} matches no parameter")):
        make(grad_z={"parameters": [glob]}).run()
    assert not cache.exists()
