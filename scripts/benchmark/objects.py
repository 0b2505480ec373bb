"""Object stores: what 20 ms for each request cost ``influence``, and obstore beside s3fs.

    python scripts/benchmark/objects.py latency [--samples 12288] [--delay 0.02] [--tests 64]
    python scripts/benchmark/objects.py clients        (needs moto[server] and s3fs)

``latency``: gradients of the small CNN, in a folder and in an object store in this process's memory, whose requests
each wait before they are made. ``clients``: a process of moto's server on loopback; it takes most of the time, so that
the client's own processor time is what to look at.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # this checkout's packages, whatever is installed
sys.path.insert(0, str(Path(__file__).resolve().parent))

import workload  # noqa: E402

import influence_pipeline as ip  # noqa: E402
from influence_pipeline.cache import objects  # noqa: E402
from influence_pipeline.cache.store import files_at  # noqa: E402
from influence_pipeline.location import located  # noqa: E402

TIMES = 3
LARGER = 4
"""How many times as many samples the second size has."""


def latency(samples: int, tests: int, delay: float) -> None:
    """Time ``influence`` from a folder, from memory, and from memory with a delay, in turn, at two sizes.

    What a run asks for once, whatever its size, is in both; the difference is what reading more takes.
    """
    folder, url = Path(tempfile.mkdtemp(prefix="objects_")), "memory://benchmark"
    again = objects.ObjectFiles._again
    pause = 0.0

    def delayed(files: objects.ObjectFiles, name: str, request: Callable[[], Any]) -> Any:
        time.sleep(pause)
        return again(files, name, request)

    objects.ObjectFiles._again = delayed  # type: ignore[method-assign]
    found: list[tuple[float, dict[str, float]]] = []
    try:
        for count in (samples, LARGER * samples):
            experiment = workload.experiment(count, {"holdout": tests})
            here = ip.Pipeline(experiment, folder / str(count), workload.settings())
            here.grad_z()
            here.s_test("holdout")
            there = ip.Pipeline(experiment, f"{url}/{count}", workload.settings())
            source, target = files_at(folder / str(count)), files_at(located(f"{url}/{count}"))
            for file in list(source.walk()):
                target.put(file.name, source.read(file.name))
            size = 4e-9 * count * next(here.cache.groups("grad_z")).rows("gradients").shape[1]
            seconds: dict[str, list[float]] = {"folder": [], "memory": [], f"memory + {1e3 * delay:.0f} ms": []}
            for _ in range(TIMES + 1):
                for name, took in seconds.items():
                    pipeline = here if name == "folder" else there
                    for group in pipeline.cache.paths("influence"):
                        pipeline.cache.remove(group)
                    pause = delay if "+" in name else 0.0
                    began = time.perf_counter()
                    pipeline.influence("holdout")
                    took.append(time.perf_counter() - began)
                    pause = 0.0
            print(f"{count} samples, {tests} tests, {size:.2f} GB as float32; median of {TIMES} in turn, after a first")
            medians = {name: statistics.median(took[1:]) for name, took in seconds.items()}
            for name, took in seconds.items():
                print(f"{name:<16} {medians[name]:7.3f} s   ({min(took[1:]):.3f} to {max(took[1:]):.3f})", flush=True)
            found.append((size, medians))
            shutil.rmtree(folder / str(count))
        (less, before), (more, after) = found
        print(f"{more - less:.2f} GB more")
        for name, took in after.items():
            print(f"{name:<16} {took - before[name]:7.3f} s  {(more - less) / (took - before[name]):5.2f} GB/s")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clients() -> None:
    """Time small writes and reads, and large ones side by side."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-c", "import sys; from moto.server import main; main(sys.argv[1:])", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    os.environ.update(AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret", AWS_REGION="us-east-1")
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        _compare(endpoint)
    finally:
        server.kill()
        server.wait()


def _compare(endpoint: str) -> None:
    import obstore
    import s3fs
    from obstore.store import S3Store

    fs = s3fs.S3FileSystem(endpoint_url=endpoint, use_listings_cache=False)
    fs.mkdir("bucket")
    store = S3Store("bucket", endpoint=endpoint, client_options={"allow_http": True, "timeout": timedelta(seconds=60)})
    small, large, count, ranges = os.urandom(4096), os.urandom(2**25), 100, 64
    step = len(large) // ranges
    pool = ThreadPoolExecutor(16)

    async def at_once() -> None:
        gate = asyncio.Semaphore(16)

        async def one(i: int) -> None:
            async with gate:
                await session._cat_file("bucket/large", start=i * step, end=(i + 1) * step)

        session = s3fs.S3FileSystem(endpoint_url=endpoint, asynchronous=True, skip_instance_cache=True)
        await asyncio.gather(*(one(i) for i in range(ranges)))

    work: dict[str, dict[str, Callable[[], Any]]] = {
        f"{count} × put 4 KiB": {
            "obstore": lambda: [obstore.put(store, f"o{i}", small) for i in range(count)],
            "s3fs": lambda: [fs.pipe_file(f"bucket/s{i}", small) for i in range(count)],
        },
        f"{count} × get 4 KiB": {
            "obstore": lambda: [obstore.get(store, f"o{i}").bytes() for i in range(count)],
            "s3fs": lambda: [fs.cat_file(f"bucket/s{i}") for i in range(count)],
        },
        f"{ranges} ranges of {step // 1024} KiB, 16 at once": {
            "obstore": lambda: list(
                pool.map(lambda i: obstore.get_range(store, "large", start=i * step, length=step), range(ranges))
            ),
            "s3fs": lambda: asyncio.run(at_once()),
        },
    }
    obstore.put(store, "large", large)
    for what, sides in work.items():
        for name, side in sides.items():
            taken = []
            for _ in range(3):
                began, used = time.perf_counter(), time.process_time()
                side()
                taken.append((time.perf_counter() - began, time.process_time() - used))
            seconds, processor = (statistics.median(column) for column in zip(*taken, strict=True))
            print(f"{what:<36} {name:<8} {seconds:6.2f} s, of which {processor:5.2f} s on this side's processor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["latency", "clients"])
    parser.add_argument("--samples", type=int, default=12288)
    parser.add_argument("--tests", type=int, default=64)
    parser.add_argument("--delay", type=float, default=0.02)
    given = parser.parse_args()
    if given.what == "latency":
        latency(given.samples, given.tests, given.delay)
    else:
        clients()


if __name__ == "__main__":
    main()
