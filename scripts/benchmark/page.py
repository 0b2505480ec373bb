"""What the page costs: seconds to write one of many tests, its size, and seconds until a browser shows it.

    python scripts/benchmark/page.py [--tests 5000] [--side 8] [--times 5]

Training samples are scikit-learn's digits, tests noisy copies of them, so that every picture is another one; scores are
products of gradients of a linear model. Needs Chromium on PATH, and playwright.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's packages, whatever is installed

import influence_pipeline as ip

if TYPE_CHECKING:
    from playwright.sync_api import Page


def experiment(tests: int, side: int) -> ip.Experiment:
    """Return a linear model of digits of so many pixels, and so many tests."""
    bunch, generator = load_digits(), torch.Generator().manual_seed(0)
    images = torch.tensor(bunch.images / 16, dtype=torch.float32)[:, None]
    images = images if side == 8 else functional.interpolate(images, side, mode="bilinear")
    labels = torch.tensor(bunch.target)
    of = torch.randint(0, len(images), (tests,), generator=generator)
    noise = torch.randn((tests, 1, side, side), generator=generator) * 0.05 * (images[of] > 0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(side**2, 10))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / side)
    noisy = (images[of] + noise).clamp(0, 1)
    return ip.Experiment(
        model, ip.Classification(l2=1e-3), TensorDataset(images, labels), {"noisy": TensorDataset(noisy, labels[of])}
    )


def seconds_to_open(page: Page, path: Path) -> tuple[float, float]:
    """Return when a page shows its first test, and how long another one takes that is far from it."""
    began = time.perf_counter()
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready=yes]", state="attached")
    page.wait_for_function("document.querySelectorAll('#test .card').length > 0")
    opened = time.perf_counter() - began
    began = time.perf_counter()
    page.focus("#list")
    page.keyboard.press("End")
    last = page.evaluate("document.querySelector('#rows .row[aria-selected=true] b').textContent")
    page.wait_for_function("last => document.querySelector('#test h2').textContent === `Test ${last}`", arg=last)
    return opened, time.perf_counter() - began


def measure(tests: int, side: int, times: int, folder: Path) -> None:
    """Write the page and open it in new browsers."""
    from playwright.sync_api import sync_playwright

    settings: dict[str, Any] = {"s_test": {"solver": "identity"}, "runtime": {"progress": False, "device": "cpu"}}
    pipeline = ip.Pipeline(experiment(tests, side), folder / "cache", ip.Settings(**settings))
    pipeline.run()
    path, wrong, found = folder / "report.html", list[str](), list[tuple[float, float]]()
    began, before = time.perf_counter(), time.process_time()
    pipeline.report("noisy", path)
    took, busy = time.perf_counter() - began, time.process_time() - before
    print(f"{tests} tests, {len(pipeline.experiment.train)} training samples of {side} × {side} pixels")
    print(f"written in        {took:.1f} s, {busy:.1f} s of them on a processor, {path.stat().st_size / 2**20:.1f} MiB")
    with sync_playwright() as driver:
        for _ in range(times):
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page()
            page.on("console", lambda message: wrong.append(message.text))
            page.on("pageerror", lambda error: wrong.append(str(error)))
            found.append(seconds_to_open(page, path))
            browser.close()
    opened, jumped = zip(*found, strict=True)
    print(f"opened in         {statistics.median(opened):.2f} s (median of {times}; most {max(opened):.2f})")
    print(f"last test after   {statistics.median(jumped):.2f} s")
    print(f"console           {wrong or 'empty'}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=int, default=5000)
    parser.add_argument("--side", type=int, default=8, help="pixels of a picture's row")
    parser.add_argument("--times", type=int, default=5, help="browsers that open it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments.tests, arguments.side, arguments.times, Path(folder))


if __name__ == "__main__":
    main()
