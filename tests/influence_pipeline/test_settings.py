"""Settings are checked where they are made; a wrong one is named with its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import influence_pipeline as ip
from influence_pipeline.settings import parse_bytes
from stages.s_test import solvers

GOOD = """
experiment = "digits.py:experiment"
cache = "runs/digits"

[tests.few]
per_class = 3
start = 2

[grad_z]
parameters = ["0.*"]
encoding = "float32"

[s_test]
solver = "lissa"
damping = { relative = 0.5 }

[influence]
top_k = 20
store_scores = false

[runtime]
memory = "1.5 GiB"
workers = 2
log_file = "log.txt"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "settings.toml"
    path.write_text(text)
    return path


def test_every_section_is_read(tmp_path: Path) -> None:
    settings = ip.Settings.from_toml(write(tmp_path, GOOD))
    assert settings.tests["few"].per_class == 3
    assert settings.grad_z.parameters == ("0.*",)
    assert settings.grad_z.encoding == "float32"
    assert settings.s_test.solver == "lissa"
    assert settings.s_test.model_dump()["damping"] == {"relative": 0.5}
    assert settings.influence.top_k == 20
    assert not settings.influence.store_scores
    assert settings.runtime.memory == 3 * 2**29
    assert settings.runtime.workers == 2


def test_paths_are_relative_to_the_settings_file(tmp_path: Path) -> None:
    settings = ip.Settings.from_toml(write(tmp_path, GOOD))
    assert settings.experiment == f"{tmp_path / 'digits.py'}:experiment"
    assert settings.cache == tmp_path / "runs" / "digits"
    assert settings.runtime.log_file == tmp_path / "log.txt"
    absolute = ip.Settings.from_toml(write(tmp_path, 'experiment = "package.module:make"\ncache = "/runs"'))
    assert absolute.experiment == "package.module:make"
    assert absolute.cache == Path("/runs")


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert ip.Settings.from_toml(write(tmp_path, "")) == ip.Settings()
    assert ip.Settings().s_test.solver == "cg"
    assert ip.Settings().s_test.model_dump()["damping"] == "auto"
    assert ip.Settings().grad_z.encoding == "float16"


@pytest.mark.parametrize(
    ("text", "setting", "problem"),
    [
        ("[grad_z]\nencodign = 'float32'", "grad_z.encodign", "unknown setting"),
        ("[grad]\nencoding = 'float32'", "grad", "unknown setting"),
        ("workers = 2", "workers", "unknown setting"),
        ("[grad_z]\nencoding = 'float64'", "grad_z.encoding", "'float16'"),
        ("[grad_z]\nparameters = []", "grad_z.parameters", "at least 1"),
        ("[grad_z]\nstore = 'perhaps'", "grad_z.store", "'perhaps'"),
        ("[s_test]\nsolver = 'newton'", "s_test", "newton"),
        ("[s_test]\nsolver = 'cg'\nrecursion_depth = 5", "s_test.recursion_depth", "unknown setting"),
        ("[s_test]\ndamping = -1", "s_test.damping", ": must be greater than or equal to 0 (found -1)"),
        ("[s_test]\ndamping = 'automatic'", "s_test.damping", ": must be 'auto' (found 'automatic')"),
        ("[s_test]\nsolver = 'kfac'\ndamping = 'auto'", "s_test.damping", '"auto" is for "exact", "cg" and "lissa"'),
        ("[s_test]\ndamping = '0.1'", "s_test.damping", ": must be a number, without quotes (found '0.1')"),
        ("[s_test]\ndamping = { relative = '1' }", "s_test.damping.relative", "without quotes (found '1')"),
        ("[s_test]\nmax_iterations = '3'", "s_test.max_iterations", "without quotes (found '3')"),
        ("[s_test]\ndamping = { relativ = 0.1 }", "s_test.damping", "unknown setting"),
        ("[s_test]\ntolerance = 0.0", "s_test.tolerance", "greater than 0"),
        ("[s_test]\nmax_iterations = 2.5", "s_test.max_iterations", "2.5"),
        ("[influence]\ntop_k = 0", "influence.top_k", "greater than 0"),
        ("[influence]\ntop_k = 'all'", "influence.top_k", "'all'"),
        ("[runtime]\nmemory = '2 GiBs'", "runtime.memory", "'2 GiBs' is no amount of memory"),
        ("[runtime]\nmemory = 'much'", "runtime.memory", "no amount of memory"),
        ("[runtime]\nmemory = '1.2.3 GiB'", "runtime.memory", "no amount of memory"),
        ("[runtime]\nmemory = 0", "runtime.memory", "greater than 0"),
        ("[runtime]\nmemory = '0 GiB'", "runtime.memory", "greater than 0"),
        ("[runtime]\nworkers = 0", "runtime.workers", "greater than 0"),
        ("[runtime]\ndevice_batch = 0", "runtime.device_batch", "greater than 0"),
        ("[tests.few]\nstart = 1", "tests.few.per_class", "required"),
        ("[tests.few]\nper_class = -1", "tests.few.per_class", "greater than 0"),
        ("[tests.few]\nper_class = 1\nstart = -1", "tests.few.start", "greater than or equal to 0"),
        ("[tests.'a/b']\nper_class = 1", "'a/b'", "letters, digits"),
        ("[tests.'']\nper_class = 1", "''", "letters, digits"),
        ("cache = 3", "cache", "3"),
        ("experiment = ['a']", "experiment", "string"),
    ],
)
def test_a_wrong_setting_is_refused_with_file_and_setting(
    tmp_path: Path, text: str, setting: str, problem: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ip.RequestError) as refused:
        ip.Settings.from_toml(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert setting in str(refused.value)
    assert problem in str(refused.value)
    assert refused.value.exit_code == 2
    assert len(str(refused.value).splitlines()) <= 4


def test_all_wrong_settings_are_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(ip.RequestError) as refused:
        ip.Settings.from_toml(write(tmp_path, "[influence]\ntop_k = 0\n[runtime]\nworkers = 0\ncolour = 'red'"))
    assert "3 settings are wrong" in str(refused.value)
    for setting in ("influence.top_k", "runtime.workers", "runtime.colour"):
        assert setting in str(refused.value)


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ip.RequestError, match=r"absent\.toml: no such file"):
        ip.Settings.from_toml(tmp_path / "absent.toml")
    with pytest.raises(ip.RequestError, match="cannot be read"):
        ip.Settings.from_toml(tmp_path)
    with pytest.raises(ip.RequestError, match=r"settings\.toml: not valid TOML.*line 2"):
        ip.Settings.from_toml(write(tmp_path, "cache = 'a'\n[grad_z\n"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ip.RequestError, match=r"bytes\.toml: cannot be read"):
        ip.Settings.from_toml(tmp_path / "bytes.toml")


def test_settings_by_keyword_are_checked_too() -> None:
    with pytest.raises(ip.RequestError, match=r"influence\.top_k"):
        ip.Settings(influence={"top_k": 0})
    with pytest.raises(ip.RequestError, match="a/b"):
        ip.Settings(tests={"a/b": {"per_class": 1}})


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ip.Settings().influence.top_k = 3  # type: ignore[misc]


def test_a_solver_is_chosen_by_name_and_cg_where_none_is() -> None:
    for name, kind in solvers().items():
        assert type(ip.Settings(s_test={"solver": name}).s_test) is kind
    assert ip.Settings(s_test={"tolerance": 0.5}).s_test.solver == "cg"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("2 GiB", 2 * 2**30),
        ("2GiB", 2 * 2**30),
        (" 1.5 MiB ", 3 * 2**19),
        ("100 MB", 10**8),
        ("7", 7),
        ("7 B", 7),
        ("1 TiB", 2**40),
        (5, 5),
    ],
)
def test_amounts_of_memory(text: Any, count: int) -> None:
    assert parse_bytes(text) == count


def test_a_pipeline_from_toml_needs_experiment_and_cache(tmp_path: Path) -> None:
    with pytest.raises(ip.RequestError, match="experiment is missing"):
        ip.Pipeline.from_toml(write(tmp_path, "cache = 'runs'"))
    with pytest.raises(ip.RequestError, match="cache is missing"):
        ip.Pipeline.from_toml(write(tmp_path, "experiment = 'a.py:b'"))
