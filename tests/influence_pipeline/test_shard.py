"""Shards: fixed shares of the blocks, which make together what one process makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import influence_pipeline as ip
from influence_pipeline.cli import app
from influence_pipeline.shard import Shard
from stages.stage import Axis, Blocks, Grid
from tests import tiny

Make = Callable[..., ip.Pipeline]
GRIDS = [Grid((Axis("sample", 60, 16),)), Grid((Axis("test", 10, 4), Axis("sample", 60, 16))), Grid((Axis("a", 0, 3),))]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("grid", range(len(GRIDS)))
def test_every_block_is_of_one_shard(grid: int, count: int) -> None:
    blocks = Blocks(GRIDS[grid], np.arange(len(GRIDS[grid])))
    shares = [Shard(index, count).of(blocks) for index in range(count)]
    assert sorted(block.index for share in shares for block in share) == [block.index for block in blocks]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    missing = blocks[1:]
    assert list(Shard(0, count).of(missing)) == [block for block in shares[0] if block in missing]


@pytest.mark.parametrize("text", ["0", "1/", "/2", "2/2", "3/2", "-1/2", "a/b", "0/0", "1.0/2", "1/2/3", ""])
def test_what_is_no_shard_is_refused(project: Path, text: str) -> None:
    said = CliRunner().invoke(app, ["grad-z", str(project), "--shard", text])
    assert said.exit_code == 2
    assert "--shard" in said.output
    assert not (project.parent / "runs").exists()


def test_shares_one_after_the_other_make_what_one_process_makes(make: Make, cache: Path, tmp_path: Path) -> None:
    """Each stage's last share merges; the others say how many blocks are left."""
    experiment = tiny.experiment()
    parts = [ip.Pipeline(experiment, cache, tiny.settings(), shard=f"{index}/3") for index in range(3)]
    assert [(part.grad_z().computed, part.grad_z().left) for part in parts] == [(2, 2), (1, 1), (1, 0)]
    done = make(tmp_path / "whole")
    done.run()
    for file in (tmp_path / "whole" / "grad_z").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (cache / file.relative_to(tmp_path / "whole")).read_bytes()
    assert make().run()["holdout"].scores[...].tobytes() == (
        ip.Influences.open(tmp_path / "whole", "holdout").scores[...].tobytes()
    )


def test_the_command_says_what_is_left_to_others(project: Path) -> None:
    runner = CliRunner()
    said = runner.invoke(app, ["grad-z", str(project), "--shard", "0/2"])
    assert said.exit_code == 0, said.output
    assert "grad_z: 2 of 4 blocks computed" in said.output
    assert "; 2 of other shards are missing" in said.output
    missing = runner.invoke(app, ["influence", str(project), "--shard", "0/2"])
    assert missing.exit_code == 2
    assert "grad_z is not complete: 2 of 4" in missing.output
    said = runner.invoke(app, ["grad-z", str(project), "--shard", "1/2"])
    assert "missing" not in said.output


def test_damage_of_another_share_is_mended(done: Path) -> None:
    """Whoever finds it computes it anew: the shard that made it may be gone."""
    rotten = next(done.glob("grad_z/*/gradients/c/1/0"))
    right = rotten.read_bytes()
    rotten.write_bytes(right[:40] + bytes(40) + right[80:])
    own = GRIDS[1].block((2, 1))  # scores of these gradients
    assert GRIDS[1].number(own) % 3 == 0
    next(done.glob("influence/*/blocks/")).joinpath("c", "2", "1", "0").unlink()
    next(done.glob("influence/*/finished/c/0")).unlink()
    pipeline = ip.Pipeline(tiny.experiment(), done, tiny.settings(), shard="0/3")
    assert pipeline.run()["holdout"].scores.shape == (10, 60)
    assert rotten.read_bytes() == right
