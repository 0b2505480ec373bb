"""A damaged file is an error or is not noticed, and never gives other numbers; verifying and running mends it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import influence_pipeline as ip
from influence_pipeline.cache import Group
from influence_pipeline.cli import app
from tests import tiny
from tests.faults import flips
from tests.faults.children import Server
from tests.faults.kills import Tally

Make = Callable[..., ip.Pipeline]
FLIPS, THOROUGH = 60, 500


@pytest.fixture(scope="module")
def count(thorough: bool) -> int:
    return THOROUGH if thorough else FLIPS


@pytest.fixture(scope="module")
def flipped(server: Server, tmp_path_factory: pytest.TempPathFactory, count: int) -> Tally:
    """Return what came of files that were harmed at random."""
    return flips.many(server, tmp_path_factory.mktemp("flips"), count)


def test_damage_of_all_kinds_was_tried(flipped: Tally, count: int, thorough: bool) -> None:
    assert flipped.tried == count
    for kind in ("flipped", "cut", "emptied", "deleted"):
        assert sum(flipped.kinds[f"{kind}, {of}"] for of in ("data", "description")) >= 1, flipped.kinds
    assert min(flipped.kinds["flipped, data"], flipped.kinds["flipped, description"]) >= count / 6, flipped.kinds
    for what, share in {"refused": 6, "read as before": 6, "verify finds it": 3}.items():
        assert flipped.kinds[what] >= count / share, flipped.kinds
    assert not thorough or all(flipped.kinds[other] >= 1 for other in flips.OTHERS), flipped.kinds


def test_nothing_is_read_as_other_numbers(flipped: Tally) -> None:
    wrong = [text for text in flipped.wrong if flips.NUMBERS in text]
    assert not wrong, "\n".join(wrong)


def test_all_of_it_is_found_named_and_mended(flipped: Tally) -> None:
    wrong = [text for text in flipped.wrong if flips.NUMBERS not in text]
    assert not wrong, "\n".join(wrong)


def test_no_damage_to_the_description_of_the_cache_makes_it_one_of_another_format(done: Path, make: Make) -> None:
    path, draw, wrong = done / "zarr.json", random.Random(0), []
    data = path.read_bytes()
    for at in range(len(data)):
        byte = draw.choice([byte for byte in range(256) if byte != data[at]])
        path.write_bytes(data[:at] + bytes([byte]) + data[at + 1 :])
        try:
            make()
        except ip.InfluenceError as error:
            if not isinstance(error, ip.CacheDamaged) or "delete that file" not in str(error):
                wrong.append(f"byte {at}, {data[at : at + 1]!r} → {bytes([byte])!r}: {error}")
    assert not wrong, "\n".join(wrong)


# ---- verify ----------------------------------------------------------------------------------------------------------


def flip_bit(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def test_verify_finds_a_flipped_bit_in_any_array_and_names_it(done: Path, make: Make) -> None:
    draw, before = random.Random(0), tiny.files(done)
    arrays = sorted({path.parent for path in done.glob("*/*/*/zarr.json")})
    for array in arrays:
        path = draw.choice(sorted(path for path in array.rglob("*") if path.is_file() and path.name != "zarr.json"))
        flip_bit(path, draw)
        found = make().verify()
        assert found.exit_code == 1
        assert len(found.damaged) == 1
        assert array.name in found.damaged[0]
        assert str(array.parent.relative_to(done)) in found.damaged[0]
        for name in before.keys() - tiny.files(done).keys() | {str(path.relative_to(done))}:
            (done / name).write_bytes(before[name])
    assert len(arrays) >= 40
    assert make().verify().exit_code == 0


def test_verify_finds_whole_files_in_the_place_of_each_other(done: Path, make: Make) -> None:
    """Each has a checksum of its own that fits."""
    found = 0
    for array in sorted({path.parent for path in done.glob("*/*/*/zarr.json")}):
        files = [path for path in sorted(array.glob("c/**/*")) if path.is_file()]
        alike = [
            (one, other)
            for one, other in itertools.pairwise(files)
            if one.stat().st_size == other.stat().st_size and one.read_bytes() != other.read_bytes()
        ]
        if array.name in {"blocks", "finished"} or not alike:
            continue
        one, other = alike[0]
        before = one.read_bytes(), other.read_bytes()
        one.write_bytes(before[1])
        other.write_bytes(before[0])
        said = make().verify().damaged
        assert said, array
        assert all(str(array.parent) in text and array.name in text for text in said)
        one.write_bytes(before[0])
        other.write_bytes(before[1])
        make().run()
        found += 1
    assert found > 8
    assert make().verify().exit_code == 0


def test_verify_with_a_sample_finds_a_flipped_bit_and_blames_the_file_not_the_model(done: Path, make: Make) -> None:
    draw, before = random.Random(1), tiny.files(done)
    for path in sorted(done.glob("grad_z/*/gradients/c/*/0")):
        flip_bit(path, draw)
        found = make().verify(sample=60)
        assert found.exit_code == 1
        assert str(path) in found.damaged[0]
        assert found.differing == []
        assert found.rows == 60 - (tiny.ROWS if path.parent.name != "3" else 60 % tiny.ROWS)
        make().run()
        assert tiny.files(done) == before


def test_verify_with_a_sample_finds_numbers_that_were_wrong_when_they_were_written(done: Path, make: Make) -> None:
    """A bit that flips in memory has a checksum that fits."""
    group = Group(next(done.glob("grad_z/*/zarr.json")).parent)
    block = group.layout.grid.block((1,))
    record = group.record(block)
    assert record is not None
    values = {
        spec.name: np.array(
            (group.rows if spec.encoding else group.array)(spec.name)[spec.region(group.layout.grid, block)]
        )
        for spec in group.layout.stored
        if spec.name != "scale"
    }
    row = values["gradients"][3]
    row[np.abs(row).argmax()] *= -1  # one bit
    tiny.commit(group, block, values, record.samples, record.inputs)
    assert make().verify().exit_code == 0
    found = make().verify(sample=60)
    assert found.exit_code == 2
    assert [text.split(" has ")[0] for text in found.differing] == ["training sample 19"]


def test_the_command_line_verifies(project: Path) -> None:
    def invoke(*words: str) -> tuple[int, str]:
        found = CliRunner().invoke(app, [*words[:1], str(project), *words[1:]])
        return found.exit_code, found.output

    assert invoke("run")[0] == 0
    assert invoke("verify", "--sample", "5")[0] == 0
    path = next(project.parent.glob("runs/s_test/*/vectors/c/1/0"))
    flip_bit(path, random.Random(2))
    code, said = invoke("verify", "--sample", "5")
    assert code == 1
    assert str(path) in said
    assert invoke("run")[0] == 0
    assert invoke("verify", "--sample", "60")[0] == 0
