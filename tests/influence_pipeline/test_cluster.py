"""Handing blocks to a cluster's workers, with one that does what the test says."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

import influence_pipeline as ip
from influence_pipeline.cache import Group, claims
from influence_pipeline.engines import cluster, count, on_ray, worker
from influence_pipeline.engines.cluster import Cluster, Lost
from influence_pipeline.engines.worker import Answer, Order
from influence_pipeline.experiment import forget_files, load
from stages.stage import Block
from tests import tiny

Make = Callable[..., ip.Pipeline]


class Told(Cluster):
    """Workers that do what they are told, each order in turn; they are alive as long as they have a sign."""

    name, remedy, connected = "the cluster", "start some", True

    def __init__(self, *workers: str, does: Callable[[str, Block], Answer | Exception | None]) -> None:
        super().__init__()
        self.there, self.stopped, self.does = list(workers), set[str](), does
        self.orders: list[tuple[str, tuple[int, ...]]] = []
        self.under_way, self.most = 0, 0

    def close(self) -> None:
        pass

    def signs(self) -> Mapping[str, tuple[int, object]]:
        return {worker: (1, 0 if worker in self.stopped else time.monotonic()) for worker in self.there}

    def submit(self, worker: str, *order: Any) -> Future[Answer]:
        _, _, block, _, _ = order
        self.orders.append((worker, block.index))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        answer = Future[Answer]()
        found = self.does(worker, block)

        def give() -> None:
            self.under_way -= 1
            if isinstance(found, Exception):
                answer.set_exception(found)
            else:
                answer.set_result(found)

        if found is not None:
            threading.Timer(0.01, give).start()
        return answer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "LOOK", 0.02)
    monkeypatch.setattr(cluster, "ANSWERS", 0.1)
    monkeypatch.setattr(cluster, "STOPPING", 0.1)


@pytest.fixture
def group(done: Path) -> Group:
    return Group(next(done.glob("grad_z/*/blocks")).parent)


ORDER = Order(lambda: pytest.fail("nothing is computed here"), "token", None, False, "version")


def handed(cluster: Cluster, group: Group, most: int | None = None) -> list[tuple[int, ...]]:
    return cluster.compute(ORDER, group, list(group.layout.grid), most, lambda block: None)


def test_blocks_are_handed_out_once_each_to_all_workers(group: Group) -> None:
    told = Told("a", "b", does=lambda worker, block: Answer(True))
    assert sorted(handed(told, group)) == [block.index for block in group.layout.grid]
    assert sorted(index for _, index in told.orders) == [block.index for block in group.layout.grid]
    assert {worker for worker, _ in told.orders} == {"a", "b"}
    assert told.most == 2


def test_no_more_workers_than_asked_for_are_used_at_once(group: Group) -> None:
    told = Told("a", "b", "c", does=lambda worker, block: Answer(True))
    handed(told, group, most=2)
    assert told.most == 2


def test_blocks_of_workers_that_are_lost_are_handed_out_again(group: Group) -> None:
    lost = {"a"}
    told = Told("a", "b", does=lambda worker, block: Lost() if worker in lost and not lost.clear() else Answer(True))
    assert sorted(handed(told, group)) == [block.index for block in group.layout.grid]
    assert len(told.orders) == len(group.layout.grid) + 1


def test_a_worker_that_vanishes_loses_its_block(group: Group) -> None:
    def does(worker: str, block: Block) -> Answer | None:
        if worker == "a":
            return None
        told.there = ["b"]
        return Answer(True)

    told = Told("a", "b", does=does)
    assert sorted(handed(told, group)) == [block.index for block in group.layout.grid]


def test_a_worker_that_is_silent_loses_its_block_and_gets_no_other(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "EXPIRY", 0.3)
    told = Told("a", "b", does=lambda worker, block: None if worker == "a" else Answer(True))
    told.stopped.add("a")
    for _ in range(2):
        assert sorted(handed(told, group)) == [block.index for block in group.layout.grid]
    assert [worker for worker, _ in told.orders].count("a") == 1


def test_a_block_over_which_workers_are_lost_again_and_again_is_given_up(group: Group) -> None:
    told = Told("a", "b", does=lambda worker, block: Lost() if block.index == (1,) else Answer(True))
    with pytest.raises(ip.WorkError, match=r"3 workers were lost over block \(1,\)"):
        handed(told, group)


def test_workers_that_all_go_away_end_the_run(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "EXPIRY", 0.2)
    told = Told("a", does=lambda worker, block: told.there.clear())
    with pytest.raises(ip.WorkError, match="no worker answers and takes a block"):
        handed(told, group)


def test_a_worker_that_starts_is_waited_for_longer_than_for_signs_of_life(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Restarting(Told):
        """Its worker is lost over its first block, and takes a while to start."""

        starting = 0

        def signs(self) -> Mapping[str, tuple[int, object]]:
            self.starting -= bool(self.starting)
            return {"a": (0 if self.starting else 1, time.monotonic())}

    def does(worker: str, block: Block) -> Answer | Exception:
        if len(told.orders) > 1:
            return Answer(True)
        told.starting = 20
        return Lost()

    monkeypatch.setattr(claims, "EXPIRY", 0.1)
    told = Restarting("a", does=does)
    assert sorted(handed(told, group)) == [block.index for block in group.layout.grid]


def test_a_cluster_without_workers_is_refused(group: Group) -> None:
    with pytest.raises(ip.RequestError, match="the cluster has no workers: start some"):
        handed(Told(does=lambda worker, block: Answer(True)), group)


def test_what_a_worker_raises_ends_the_run_and_takes_blocks_back(group: Group) -> None:
    def does(worker: str, block: Block) -> Answer | None:
        return Answer(error=ip.RequestError("no")) if worker == "b" else None

    told = Told("a", "b", does=does)
    with pytest.raises(ip.RequestError, match="no"):
        handed(told, group)
    assert told._jobs["a"].answer.cancelled()


def test_another_version_of_the_package_is_refused(group: Group) -> None:
    block = group.layout.grid.block((0,))
    answer = worker.block_on_cluster(ORDER, group.path, block, "token", 1)
    with pytest.raises(ip.RequestError, match=f"has influence-pipeline {ip.__version__}, not version"):
        raise answer.error or AssertionError


def test_a_cache_that_a_worker_does_not_see_is_refused(group: Group, tmp_path: Path) -> None:
    order = Order(ORDER.rebuild, "token", None, False, ip.__version__)
    answer = worker.block_on_cluster(order, tmp_path / "elsewhere", group.layout.grid.block((0,)), "token", 1)
    with pytest.raises(ip.RequestError, match=r"sees no .*elsewhere: the cache must be on a file system"):
        raise answer.error or AssertionError


def test_an_experiment_that_is_no_file_is_refused(cache: Path) -> None:
    settings = tiny.settings(runtime={"backend": "dask", "address": "tcp://127.0.0.1:1"})
    with pytest.raises(ip.RequestError, match=r"workers of 'dask' load the experiment from a file"):
        ip.Pipeline(tiny.experiment(), cache, settings)


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        ({"backend": "dask"}, "runtime: backend = 'dask' needs the address of its scheduler"),
        ({"address": "tcp://127.0.0.1:1"}, "runtime: address is of a cluster, and backend = 'loky' is none"),
    ],
)
def test_a_cluster_has_an_address_and_nothing_else_has(runtime: dict[str, str], message: str) -> None:
    with pytest.raises(ip.RequestError, match=message):
        tiny.settings(runtime=runtime)


def test_what_a_file_imports_of_its_folder_is_loaded_anew_for_the_next_run(tmp_path: Path) -> None:
    neighbour, file = tmp_path / "neighbour_of_a_cluster.py", tmp_path / "experiment.py"
    neighbour.write_text('name = "one"\n')
    file.write_text(
        "import neighbour_of_a_cluster\nfrom tests import tiny\n\n\ndef experiment():\n"
        "    return tiny.experiment(train_name=neighbour_of_a_cluster.name)\n"
    )
    assert load(f"{file}:experiment").train_name == "one"
    neighbour.write_text('name = "three"\n')
    assert load(f"{file}:experiment").train_name == "one"
    forget_files()
    assert load(f"{file}:experiment").train_name == "three"
    forget_files()
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(("backend", "library"), [("dask", "distributed"), ("ray", "ray")])
def test_a_backend_whose_library_is_not_here_says_what_to_install(
    backend: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    runtime = tiny.settings(runtime={"backend": backend, "address": "127.0.0.1:1"}).runtime
    message = rf'runtime.backend = "{backend}" needs {library} .*pip install "influence-pipeline\[{backend}\]"'
    with pytest.raises(ip.RequestError, match=message):
        count(runtime)


@pytest.mark.parametrize(("answer", "said"), [(b"", "timed out"), (b"HTTP/1.1 400 Bad Request", "does not speak gRPC")])
def test_what_is_no_ray_cluster_is_found_out_at_once(answer: bytes, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    monkeypatch.setattr(on_ray, "ANSWERS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(answer)
                while connection.recv(1000):
                    pass

        threading.Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        runtime = tiny.settings(runtime={"backend": "ray", "address": address}).runtime
        with pytest.raises(ip.RequestError, match=f"no ray cluster answers there.*{said}"):
            count(runtime)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "ray://127.0.0.1:1"])
def test_where_no_ray_cluster_answers_this_is_said_at_once(address: str) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    runtime = tiny.settings(runtime={"backend": "ray", "address": address}).runtime
    with pytest.raises(ip.RequestError, match=f"runtime.address = '{address}': no ray cluster answers there"):
        count(runtime)
