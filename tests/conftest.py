"""What tests of the machine share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from joblib.externals.loky import reusable_executor

import influence_pipeline as ip
from influence_pipeline import plan
from tests import s3 as s3_of_tests
from tests import tiny

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None, max_examples=50)
hypothesis.settings.load_profile("fixed")

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="what takes long too, and faults as often as it takes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked as thorough where it was not asked for."""
    if not config.getoption("--thorough"):
        left = [item for item in items if item.get_closest_marker("thorough") is not None]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item.get_closest_marker("thorough") is None]


@pytest.fixture(scope="session")
def thorough(request: pytest.FixtureRequest) -> bool:
    """Return whether tests that try something at random are to try it as often as it takes."""
    return bool(request.config.getoption("--thorough"))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[s3_of_tests.Server]:
    with s3_of_tests.served() as server:
        yield server


@pytest.fixture
def s3(s3_server: s3_of_tests.Server, monkeypatch: pytest.MonkeyPatch) -> s3_of_tests.Server:
    """Return a server of objects with which all is well, and have the environment name it."""
    s3_server.reset()
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut every stage of the tiny experiment into several blocks."""
    remember_blocks(monkeypatch)
    tiny.shrink_blocks()


def remember_blocks(patch: pytest.MonkeyPatch) -> None:
    """Have the sizes of blocks set back at the end."""
    for name in ("MOST_ROWS", "MOST_TESTS", "MOST_SCORED_TESTS", "LEAST_SUMMED"):
        patch.setattr(plan, name, getattr(plan, name))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def make(cache: Path, small_blocks: None) -> Callable[..., ip.Pipeline]:
    """Return what makes a pipeline of the tiny experiment; takes sections of settings, and arguments of Experiment."""

    def make(folder: Path = cache, **changes: Any) -> ip.Pipeline:
        sections = {name: changes.pop(name) for name in tiny.SECTIONS if name in changes}
        return ip.Pipeline(tiny.experiment(**changes), folder, tiny.settings(**sections))

    return make


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished cache of the tiny experiment, to be copied."""
    folder = tmp_path_factory.mktemp("finished") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        remember_blocks(patch)
        tiny.shrink_blocks()
        ip.Pipeline(tiny.experiment(), folder, tiny.settings()).run()
    return folder


@pytest.fixture
def done(finished: Path, cache: Path) -> Path:
    """Return a finished cache that a test may damage."""
    shutil.copytree(finished, cache)
    return cache


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Small tensors are faster, and sums always the same, on one thread; each of two workers has one on two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def new_workers() -> None:
    """Have worker processes started anew, which have no small blocks yet."""
    end_workers()


@pytest.fixture(scope="session", autouse=True)
def no_workers_left() -> Iterator[None]:
    """Leave no worker processes behind; each module uses those of the one before, since they take seconds to start."""
    yield
    end_workers()


def end_workers() -> None:
    if reusable_executor._executor is not None:
        reusable_executor._executor.shutdown(wait=True, kill_workers=True)


EXPERIMENT = """\
from tests import tiny

tiny.shrink_blocks()


class Data:
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, position):
        return self.data[position]


def experiment():
    return tiny.experiment(train=Data(tiny.points(60, 1)))


def broken():
    width = 0
    return 1 / width


def nothing():
    return 42
"""
SETTINGS = """\
experiment = "experiment.py:experiment"
cache = "runs"
[s_test]
damping = { relative = 0.1 }
[influence]
top_k = 1
[runtime]
device = "cpu"
"""


@pytest.fixture
def project(tmp_path: Path, small_blocks: None) -> Path:
    """Return the settings file of a project of its own folder, whose experiment is the tiny one."""
    (tmp_path / "experiment.py").write_text(EXPERIMENT)
    (tmp_path / "settings.toml").write_text(SETTINGS)
    return tmp_path / "settings.toml"
