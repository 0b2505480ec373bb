"""A run that finds everything cached looks at each block a few times, whatever there is, and at a few samples."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import influence_pipeline as ip
from influence_pipeline import samples
from influence_pipeline.cache.store import _LocalFiles
from influence_pipeline.context import SENTINELS
from tests import tiny

Make = Callable[..., ip.Pipeline]

BLOCKS = 6
"""Of gradients."""
opened: Counter[str] | None = None
"""How often each file was opened, by its path, while somebody counts."""


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and opened is not None and isinstance(arguments[0], (str, Path)):
        opened[str(arguments[0])] += 1


sys.addaudithook(_hook)  # sees whatever opens a file, zarr's own ways too; it stays, and is idle while nobody counts


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Counter[str]]:
    """Return how often each file was opened and its length asked for, and how many digests were taken, from now on."""
    found: dict[str, Counter[str]] = {"opened": Counter(), "lengths": Counter(), "digests": Counter()}
    monkeypatch.setattr(sys.modules[__name__], "opened", found["opened"])
    length, sample, several = _LocalFiles.length, samples.digest, samples.digest_of

    def counted_length(files: _LocalFiles, name: str) -> int:
        found["lengths"][f"{files._text}/{name}"] += 1
        return length(files, name)

    def counted_sample(value: Any) -> bytes:
        found["digests"]["sample"] += 1
        return sample(value)

    def counted_several(parts: Any) -> bytes:
        found["digests"]["whole"] += 1
        return several(parts)

    monkeypatch.setattr(_LocalFiles, "length", counted_length)
    monkeypatch.setattr(samples, "digest", counted_sample)
    monkeypatch.setattr(samples, "digest_of", counted_several)
    return found


@pytest.mark.parametrize("sets", [1, 2])
def test_a_run_with_nothing_to_do_looks_at_each_block_a_few_times(
    make: Make, cache: Path, sets: int, request: pytest.FixtureRequest
) -> None:
    tests = {f"test{number}": tiny.points(10, 2 + number) for number in range(sets)}
    train = tiny.points(BLOCKS * tiny.ROWS, 1)
    make(train=train, tests=tests).run()
    pipeline = make(train=train, tests=tests)
    pipeline.experiment  # noqa: B018 - builds it
    counts = request.getfixturevalue("counts")
    assert len(pipeline.run()) == sets

    def most(what: str, pattern: str) -> int:
        """Return how often a file of a pattern was looked at, at most."""
        paths = list(cache.glob(pattern))
        assert paths, pattern
        return max(counts[what][str(path)] for path in paths)

    # Compared with the samples, looked for, and, by each test set, read by scores.
    assert len(list(cache.glob("grad_z/*/blocks/c/*/0"))) == BLOCKS
    assert most("opened", "grad_z/*/blocks/c/*/0") == 2 + sets
    assert most("opened", "s_test/*/blocks/c/*/0") == 3
    assert most("opened", "influence/*/blocks/c/*/*/0") == 2
    assert most("opened", "*/*/digests/c/*/*") == 1
    for array in ("gradients", "scale", "norm", "vectors", "scores"):
        assert most("opened", f"*/*/{array}/c/**/*") == 0
    assert most("lengths", "grad_z/*/*/c/**/*") == 2
    assert most("lengths", "s_test/*/*/c/**/*") == 3
    assert most("lengths", "influence/*/*/c/**/*") == 1
    # However many blocks there are: of a solver's preparation, and of descriptions.
    assert most("opened", "curvature/*/blocks/c/*/0") <= 6 * sets
    assert most("opened", "**/zarr.json") <= 16 * sets
    assert counts["digests"]["sample"] <= SENTINELS + sum(map(len, tests.values()))
    assert counts["digests"]["whole"] == 1


@pytest.mark.parametrize("gone", ["grad_z/*/blocks/c/1/0", "s_test/*/blocks/c/1/0", "grad_z/*"])
@pytest.mark.parametrize("scored", [True, False], ids=["scored", "not scored"])
def test_what_goes_away_between_two_stages_of_a_run_is_missed(
    done: Path, make: Make, monkeypatch: pytest.MonkeyPatch, gone: str, scored: bool
) -> None:
    if not scored:
        shutil.rmtree(done / "influence")
    s_test = ip.Pipeline.s_test

    def losing(pipeline: ip.Pipeline, tests: str, **asked: Any) -> Any:
        outcome = s_test(pipeline, tests, **asked)
        for path in [path for path in done.glob(gone) if path.name != "zarr.json"]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return outcome

    with monkeypatch.context() as patch:
        patch.setattr(ip.Pipeline, "s_test", losing)
        with pytest.raises(ip.WorkError, match="removed meanwhile: run again"):
            make().run()
    make().run()
    assert make().plan().complete
