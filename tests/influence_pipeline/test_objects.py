"""Caches in object stores: the same files as in a folder, whatever happens to requests."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import influence_pipeline as ip
from influence_pipeline import plan
from influence_pipeline.cache import Cache, Group, Layout, claims, objects
from influence_pipeline.cache.record import FileSum
from influence_pipeline.cache.store import Files, files_at
from influence_pipeline.cli import app
from influence_pipeline.location import Location, ObjectPath, located, without_secrets
from stages.stage import ArraySpec, Axis, Grid
from tests import tiny
from tests.conftest import SETTINGS
from tests.s3 import SECRETS, Fault, Server

Make = Callable[..., ip.Pipeline]
SMALL_TILES = {"TILE_ROWS": 4, "TILE_COLUMNS": 128, "TILE_ENTRIES": 512}


@pytest.fixture(params=["folder", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """Return where files may be, each kind in turn."""
    if request.param == "folder":
        (tmp_path / "below").mkdir()
        return tmp_path / "below"
    if request.param == "memory":
        return located(f"memory://{tmp_path.name}/below")
    return located(f"{request.getfixturevalue('s3').bucket()}/below")


@pytest.fixture
def files(place: Location) -> Files:
    return files_at(place)


def below(url: str) -> dict[str, bytes]:
    """Return the content of every object below a URL."""
    found = files_at(located(url))
    return {file.name: found.read(file.name) for file in found.walk()}


# ---- the contract ----------------------------------------------------------------------------------------------------


def test_files_are_read_as_they_were_put(files: Files) -> None:
    assert (files.length("a/b"), files.exists("a/b")) == (0, False)
    with pytest.raises(FileNotFoundError) as refused:
        files.read("a/b")
    assert refused.value.filename.endswith("a/b")
    files.put("a/b", b"first")
    files.put("a/b", b"second")
    files.put("c", b"")
    assert files.read("a/b") == b"second"
    assert (files.length("a/b"), files.exists("a/b"), files.exists("a")) == (6, True, isinstance_of_folder(files))
    assert list(files.read_all(["a/b", "none", "c"])) == [b"second", None, b""]
    assert files.lengths(["a/b", "none", "c"]) == [6, 0, 0]
    assert files.lengths(["a/b", *(f"none/{i}" for i in range(40))]) == [6, *(0 for _ in range(40))]
    assert list(files.together([lambda: 1, lambda: 2])) == [1, 2]
    assert b"".join(files.stream("a/b")) == b"second"
    assert {(found.name, found.length) for found in files.walk()} == {("a/b", 6), ("c", 0)}
    assert all(abs(found.written - time.time()) < 3600 for found in files.walk())
    assert sorted(files.names("")) == ["a", "c"]
    assert files.names("a") == ["b"]
    assert files.names("none") == []
    files.remove("a/b", "none")
    assert [found.name for found in files.walk()] == ["c"]


def isinstance_of_folder(files: Files) -> bool:
    return not files.far


def test_parts_are_read_without_the_rest(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * 8
    files.put("data", data)
    with files.reading("data") as found:
        assert found.tail(10) == data[-10:]
        places = [(0, 5), (5, 5), (700, 3), (1500, 20), (2040, 100)]
        assert [bytes(part) for part in found.parts(places)] == [data[o : o + n] for o, n in places]
    monkeypatch.setattr(objects, "GAP", 0)
    with files.reading("data") as found:
        found.tail(10)
        assert list(found.parts(places)) == [data[o : o + n] for o, n in places]
    with pytest.raises(FileNotFoundError), files.reading("none") as found:
        found.tail(10)


def test_what_grows_appears_whole(files: Files) -> None:
    files.put("grown/0", b"old")
    for end in ("appear", "abandon"):
        growing = files.grow("grown/0")
        growing.write(b"new " * 300_000)
        growing.write(b"end")
        growing.finish()
        before = files.read("grown/0")
        getattr(growing, end)()
        growing.abandon()
        expected = {"appear": b"new " * 300_000 + b"end", "abandon": before}[end]
        assert files.read("grown/0") == expected
        assert growing.sum == FileSum().then(b"new " * 300_000 + b"end")
    assert [found.name for found in files.walk()] == ["grown/0"]


def test_a_folder_is_laid_out_and_removed(place: Location, files: Files) -> None:
    folder = files_at(place / "stage" / "key")
    assert not folder.there
    for content in (b"1", b"2"):
        with folder.laying_out("sign") as new:
            new.put("array/zarr.json", content)
            new.put("sign", content)
    assert folder.there
    assert folder.read("sign") == (b"2" if folder.far else b"1")
    assert [path.name for path in files_at(place / "stage").folders()] == ["key"]
    files.remove_folder("stage/key", "sign")
    assert not folder.there
    assert list(files.walk()) == []


def test_of_many_that_create_a_file_one_does(files: Files) -> None:
    found, start = [], threading.Barrier(8)

    def create(number: int) -> None:
        start.wait()
        if files.create("claim", b"%d" % number):
            found.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = found
    looked = files.look("claim")
    assert looked is not None
    assert looked[0] == b"%d" % winner


def test_a_claim_is_touched_and_buried_only_as_it_was_looked_at(files: Files) -> None:
    assert files.look("claim") is None
    assert files.create("claim", b"mine")
    content, mark = looked(files)
    time.sleep(0.01)
    files.touch("claim", b"mine, alive", mark)
    now, changed = looked(files)
    assert changed != mark
    if files.far:
        files.bury("claim", content, mark)  # as it was, not as it is
        assert files.look("claim") is not None
    files.bury("claim", now, changed)
    assert files.look("claim") is None
    assert files.create("claim", b"theirs")
    assert looked(files)[0] == b"theirs"
    files.bury("claim", b"mine", changed)
    assert looked(files)[0] == b"theirs"
    assert not files.create("claim", b"mine")


def looked(files: Files) -> tuple[bytes, Any]:
    found = files.look("claim")
    assert found is not None
    return found


def test_claims_are_taken_expire_and_are_found_out_about(place: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "EXPIRY", 0.4)
    monkeypatch.setattr(claims, "_heart", claims._Heart())
    files_at(place).put("placeholder", b"")
    with claims.exclusively(place / "3.claim") as mine:
        assert str(os.getpid()) in str(claims.taken(place / "3.claim"))
        monkeypatch.setattr(claims, "_machine", lambda: "elsewhere")
        looks = [claims.take(place / "3.claim") for _ in range(9) if not time.sleep(0.1)]  # type: ignore[func-returns-value]
        assert not any(looks), "it shows that it is alive"
        monkeypatch.setattr(claims.Claim, "touch", lambda claim: None)
        time.sleep(0.2)
        assert claims.take(place / "3.claim") is None
        time.sleep(0.6)
        theirs = claims.take(place / "3.claim")
        assert theirs is not None
        assert not mine.held()
        mine.release()
        assert theirs.held()
        theirs.release()
    assert claims.taken(place / "3.claim") is None
    assert files_at(place).names("") == ["placeholder"]


def test_an_object_that_changed_while_it_was_read_is_no_mixture(s3: Server) -> None:
    files = files_at(located(s3.bucket()))
    files.put("data", b"a" * 1000)
    with files.reading("data") as found:
        found.tail(10)
        files.put("data", b"b" * 1000)
        with pytest.raises(ValueError, match="written anew"):
            list(found.parts([(0, 10)]))
    with files.reading("data") as found:
        assert found.tail(10) == b"b" * 10


def test_what_another_process_wrote_anew_is_read_whatever_was_known_of_it(
    s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where tiles are in a file is kept, until it is another one."""
    for name, value in SMALL_TILES.items():
        monkeypatch.setattr(plan, name, value)
    spec = ArraySpec("gradients", ("sample", "coordinate"), (32, 700))
    layout, url = Layout(Grid((Axis("sample", 32, 16),)), [spec]), s3.bucket()
    identity = {"identity": {}, "tests": None, "reads": {}, "stage": "grad_z"}
    group = Cache(located(url)).create("grad_z", "key", layout, identity)
    values = np.random.default_rng(0).standard_normal((32, 700)).astype(np.float32)
    values[16:] = np.round(values[16:])  # compresses better: its tiles are elsewhere in the file
    for block in layout.grid:
        tiny.commit(group, block, {"gradients": values[block.bounds["sample"]]})
    assert group.kept("gradients").shards
    np.testing.assert_array_equal(group.rows("gradients")[:16], values[:16])
    second = files_at(group.path).read("gradients/c/1/0")
    assert len(second) != files_at(group.path).length("gradients/c/0/0")
    s3.put(f"{group.path}/gradients/c/0/0", second)
    np.testing.assert_array_equal(group.rows("gradients")[:16], values[16:])


def test_descriptions_are_asked_for_once_and_anew_by_whoever_claims_something(s3: Server) -> None:
    url = s3.bucket()
    files = files_at(located(url))
    s3.put(f"{url}/zarr.json", b"1")
    s3.requests.clear()
    for _ in range(3):
        assert (files.read("zarr.json"), files.length("zarr.json")) == (b"1", 1)
    assert len(s3.requests) == 1
    files.put("zarr.json", b"22")
    assert (files.read("zarr.json"), files.length("zarr.json")) == (b"22", 2)
    s3.put(f"{url}/zarr.json", b"333")
    assert files.create("some.claim", b"token")
    assert files.read("zarr.json") == b"333"


# ---- requests that fail ----------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PAUSE", 0.01)


def test_requests_that_fail_are_made_again(s3: Server, quick: None) -> None:
    files = files_at(located(s3.bucket()))
    data = bytes(range(256)) * 1000
    s3.delay = 0.02
    for what in ("slow down", "break", "lose"):
        for method in ("PUT", "GET"):
            s3.faults[:] = [Fault(what, method, "data", times=2)]
            if (what, method) == ("break", "PUT"):
                continue  # its answer has no body
            files.put("data", data)
            assert files.read("data") == data
            with files.reading("data") as found:
                assert found.tail(7) == data[-7:]
                assert list(found.parts([(3, 500)])) == [data[3:503]]
            assert s3.faults[0].times <= 0, (what, method)
        s3.faults[:] = [Fault(what, "PUT", "claim")]
        assert files.create(f"{what}.claim", b"mine")
        assert not files.create(f"{what}.claim", b"theirs")
        mark = files.look(f"{what}.claim")
        assert mark is not None
        s3.faults[:] = [Fault(what, "PUT", "claim")]
        files.touch(f"{what}.claim", b"mine still", mark[1])
        s3.faults[:] = [Fault(what, "GET", "claim")]
        assert (
            files.look(
                f"{what}.claim",
            )[0]
            == b"mine still"
        )  # type: ignore[index]


def test_a_store_that_does_not_answer_is_given_up(s3: Server, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PATIENCE", 0.5)
    files = files_at(located(s3.bucket()))
    s3.down = True
    with pytest.raises(ip.WorkError, match=r"s3://.*/data cannot be read: "):
        files.read("data")
    with pytest.raises(OSError, match=r"."):
        files.put("data", b"")


# ---- the pipeline ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished cache of the tiny experiment, one block of each stage."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    ip.Pipeline(tiny.experiment(), folder, tiny.settings()).run()
    return folder


def run(url: str) -> dict[str, ip.Influences]:
    return ip.Pipeline(tiny.experiment(), url, tiny.settings()).run()


def test_a_cache_in_memory_has_the_files_of_a_folder(make: Make, finished: Path, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/some/where"
    found = make(url).run()["holdout"]
    assert below(url) == tiny.files(finished)
    expected = ip.Influences.open(finished, "holdout")
    np.testing.assert_array_equal(found.scores[:], expected.scores[:])
    assert str(found.path).startswith(url)
    with pytest.raises(ip.RequestError, match="of this process alone"):
        make(url, runtime={"workers": 2})


def test_a_cache_in_s3_has_the_files_of_a_folder_whatever_happens_to_requests(
    s3: Server, quick: None, whole: Path
) -> None:
    url = f"{s3.bucket()}/some/where"
    s3.faults[:] = [
        *(Fault(what, method, times=2, after=after) for what, after in (("slow down", 3), ("lose", 9), ("break", 5))
          for method in ("GET", "PUT")),
    ]  # fmt: skip
    run(url)
    assert all(fault.times <= 0 for fault in s3.faults if (fault.what, fault.method) != ("break", "PUT"))
    s3.reset()
    assert below(url) == tiny.files(whole)
    found = ip.Influences.open(url, "holdout")
    expected = ip.Influences.open(whole, "holdout")
    np.testing.assert_array_equal(found.scores[:], expected.scores[:])
    np.testing.assert_array_equal(found.helpful(5)[0], expected.helpful(5)[0])
    s3.reset()
    run(url)
    assert not [path for method, path in s3.requests if method == "PUT" and "claim" not in path], "nothing to do"


def test_the_command_line_speaks_of_a_cache_in_s3(
    s3: Server, tmp_path: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, log, project = f"{s3.bucket()}/runs", tmp_path / "log.txt", tmp_path / "settings.toml"
    (tmp_path / "experiment.py").write_text("from tests import tiny\n\nexperiment = tiny.experiment\n")
    text = SETTINGS.replace('"runs"', f'"{url}"').replace("[runtime]", f'[runtime]\nlog_file = "{log}"')
    project.write_text(text)
    copy(whole, url)
    (key,) = {name.split("/")[1] for name in below(url) if name.startswith("influence/holdout")}
    said = ""
    with caplog.at_level(logging.DEBUG):
        for command in (["rm", key, "--yes"], ["run"], ["status"], ["show", "--test", "3"]):
            found = CliRunner().invoke(app, [command[0], str(project), *command[1:]])
            assert found.exit_code == 0, found.output
            said += found.output
            assert (f"influence/{key}" in " ".join(below(url))) is (command[0] != "rm")
    assert said.count(url) >= 3
    assert below(url) == tiny.files(whole)
    written = b"".join(below(url).values()) + log.read_bytes() + (said + caplog.text).encode()
    for secret in SECRETS.values():
        assert secret.encode() not in written


def test_damage_in_s3_is_found_and_computed_anew(s3: Server, whole: Path) -> None:
    url = f"{s3.bucket()}/runs"
    copy(whole, url)
    files = files_at(located(url))
    (name,) = (file.name for file in files.walk() if "/gradients/c/" in file.name)
    data = bytearray(files.read(name))
    data[len(data) // 2] ^= 1
    files.put(name, bytes(data))
    found = ip.Pipeline(tiny.experiment(), url, tiny.settings()).verify()
    assert [text for text in found.damaged if name in text]
    assert len(found.damaged) == 1
    assert f"{name.split('/gradients')[0]}/blocks/c/0/0" not in below(url), "its record is gone: it is computed anew"


def copy(folder: Path, url: str) -> None:
    files = files_at(located(url))
    for name, data in tiny.files(folder).items():
        files.put(name, data)


def test_two_writers_of_a_block_leave_one_whole(s3: Server) -> None:
    axis = Axis("sample", 4, 4)
    layout = Layout(Grid((axis,)), [ArraySpec("numbers", ("sample",), (4,), about="some")])
    identity = {"identity": {}, "tests": None, "reads": {}, "stage": "grad_z"}
    group = Cache(s3.bucket()).create("grad_z", "key", layout, identity)
    block = group.layout.grid.block((0,))

    class Lost:
        """A claim that is lost after so many looks at it."""

        def __init__(self, looks: int) -> None:
            self.looks = looks

        def held(self) -> bool:
            self.looks -= 1
            return self.looks >= 0

    mine, theirs = np.arange(4, dtype=np.float32), np.arange(4, 8, dtype=np.float32)
    assert not tiny.commit(group, block, {"numbers": mine}, claim=Lost(0))  # type: ignore[arg-type]
    assert group.whole(block) is None
    assert tiny.commit(group, block, {"numbers": theirs})
    record = group.whole(block)
    assert not tiny.commit(group, block, {"numbers": theirs}, claim=Lost(0))  # type: ignore[arg-type]
    assert group.whole(block) == record

    # The other one finishes between what is written here and the record of it.
    appear = objects.ObjectFiles.put_once

    def late(files: objects.ObjectFiles, name: str, data: bytes) -> bool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(objects.ObjectFiles, "put_once", appear)
            assert tiny.commit(group, block, {"numbers": theirs})
        files_at(group.path / "numbers").put("c/0", files_at(group.path / "numbers").read("c/0")[::-1])  # ours, late
        return appear(files, name, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects.ObjectFiles, "put_once", late)
        assert not tiny.commit(group, block, {"numbers": mine}, inputs=b"m" * 16, claim=Lost(2))  # type: ignore[arg-type]
    assert group.whole(block) is None, "files that are not those of the record do not stay"
    assert tiny.commit(group, block, {"numbers": theirs})
    np.testing.assert_array_equal(group.array("numbers")[:], theirs)


def test_a_run_whose_connection_is_lost_goes_on_where_it_was(
    s3: Server, quick: None, small_blocks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "PATIENCE", 0.3)
    monkeypatch.setattr(objects, "TRIES", 2)
    url = f"{s3.bucket()}/runs"
    commit, kept = Group.commit, []

    def committed(group: Group, block: Any, *args: Any, **kwargs: Any) -> bool:
        found = commit(group, block, *args, **kwargs)
        kept.append(block.index)
        s3.down = len(kept) == 2
        return found

    monkeypatch.setattr(Group, "commit", committed)
    with pytest.raises(ip.WorkError, match=r"Finished blocks are kept|cannot be read"):
        ip.Pipeline(tiny.experiment(), url, tiny.settings()).grad_z()
    s3.reset()
    ip.Pipeline(tiny.experiment(), url, tiny.settings()).grad_z()
    assert sorted(kept) == [(0,), (1,), (2,), (3,)]
    ip.Pipeline(tiny.experiment(), tmp_path / "cache", tiny.settings()).grad_z()
    assert below(url) == tiny.files(tmp_path / "cache")


# ---- reading ahead ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["float16", "float32", "int8"])
def test_what_is_read_ahead_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    for name, value in SMALL_TILES.items():
        monkeypatch.setattr(plan, name, value)
    axis = Axis("sample", 40, 16)
    layout = Layout(Grid((axis,)), [ArraySpec("gradients", ("sample", "coordinate"), (40, 700), "float32", encoding)])
    identity = {"identity": {}, "tests": None, "reads": {}, "stage": "grad_z"}
    group = Cache(f"memory://{tmp_path.name}").create("grad_z", "key", layout, identity)
    values = np.random.default_rng(0).standard_normal((40, 700)).astype(np.float32)
    for block in group.layout.grid:
        tiny.commit(group, block, {"gradients": values[block.bounds["sample"]]})
    rows = group.rows("gradients")
    items = [[(slice(r, min(r + 4, 40)), slice(c, min(c + 128, 700))) for c in range(0, 700, 128)]
             for r in range(0, 40, 4)]  # fmt: skip
    fetched = []
    fetch = type(rows).fetch
    monkeypatch.setattr(type(rows), "fetch", lambda rows, parts: (fetched.append(len(parts)), fetch(rows, parts))[1])
    with rows.ahead(items, 2, 40_000) as ahead:  # type: ignore[attr-defined]
        assert ahead is not rows
        for part in [part for item in reversed(items) for part in item] + [items[0][0]]:
            np.testing.assert_array_equal(ahead[part], rows[part])
            if rows.factors is not None:  # type: ignore[attr-defined]
                out, expected = np.empty((2, 4, part[1].stop - part[1].start), np.float32)
                ahead.read_into(part, out)
                rows.read_into(part, expected)  # type: ignore[attr-defined]
                np.testing.assert_array_equal(out, expected)
    assert sum(fetched) == sum(map(len, items))
    assert max(fetched) > 1, "tiles side by side are fetched together"


def test_scores_are_the_same_when_tiles_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "TILE_ROWS", 8)
    monkeypatch.setattr(plan, "TILE_COLUMNS", 16)
    monkeypatch.setattr(plan, "TILE_ENTRIES", 128)
    found = [run(str(cache))["holdout"].scores[:] for cache in (tmp_path / "cache", f"memory://{tmp_path.name}/runs")]
    np.testing.assert_array_equal(*found)


# ---- what users get wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", [
    "s3://key:secret@bucket/runs", "s3://bucket/runs?secret=secret", "ftp://bucket/runs", "s3://", "s3:///runs",
    "s3://bucket/../runs", "http://secret@host/x",
])  # fmt: skip
def test_urls_that_cannot_be_used_are_refused_without_their_secrets(url: str, project: Path) -> None:
    project.write_text(project.read_text().replace('"runs"', f'"{url}"'))
    for refused in (lambda: ip.Settings.from_toml(project), lambda: Cache(url)):
        with pytest.raises(ip.RequestError, match="URL") as error:
            refused()
        assert "secret" not in str(error.value).replace("'secret'", "")


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    assert located(f"file://{tmp_path}/with%20space") == tmp_path / "with space"
    assert located(str(tmp_path)) == tmp_path
    assert Cache(f"file://{tmp_path}/cache").path == tmp_path / "cache"
    assert str(located("s3://bucket//a/b/")) == "s3://bucket/a/b"
    assert (located("s3://bucket/a/b").name, located("s3://bucket/a/b").parent) == ("b", ObjectPath("s3://bucket", "a"))


def test_nothing_of_credentials_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abcd+efgh")
    said = without_secrets("at https://me:word@host/x?sig=12&y=3 (key abcd+efgh) as 'https://host/z?sig=4'.")
    assert said == "at https://…@host/x?… (key …) as 'https://host/z?…'."


@pytest.mark.parametrize(("change", "code", "match"), [
    ({"bucket": "no-such-bucket"}, 2, "there is no s3://no-such-bucket"),
    ({"environment": {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}}, 1, "cannot be reached"),
    ({"environment": {"AWS_ENDPOINT_URL": "http://no-such-host.invalid"}}, 1, "cannot be reached"),
    ({"environment": dict.fromkeys(SECRETS)}, 2, "no credentials were found"),
])  # fmt: skip
def test_a_store_that_cannot_be_used_is_refused_in_a_few_lines(
    s3: Server, project: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], code: int, match: str
) -> None:
    url = f"s3://{change['bucket']}/runs" if "bucket" in change else f"{s3.bucket()}/runs"
    for name, value in change.get("environment", {}).items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    project.write_text(project.read_text().replace('"runs"', f'"{url}"'))
    found = CliRunner().invoke(app, ["status", str(project)])
    assert found.exit_code == code, found.output
    assert match in found.output
    assert len(found.output.splitlines()) <= 6
    assert not any(secret in found.output for secret in SECRETS.values())


def test_a_bucket_with_other_things_in_it_is_refused(s3: Server) -> None:
    bucket = s3.bucket()
    files_at(located(bucket)).put("other/things", b"")
    with pytest.raises(ip.RequestError, match="other things"):
        Cache(bucket)
    assert not Cache(f"{bucket}/runs").exists
