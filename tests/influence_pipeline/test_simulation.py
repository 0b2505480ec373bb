"""What is simulated is what a run does: blocks, files and bytes to the last one; rates divide what there is to do."""

from __future__ import annotations

import dataclasses
import math
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from typer.testing import CliRunner

import influence_pipeline as ip
from influence_pipeline.cli import app
from influence_pipeline.plan import Plan, StagePlan, Timing
from influence_pipeline.simulation import Scale, simulate
from tests import tiny

SCALE = Scale(samples=60, tests=10, dim=7)
LARGE = Scale(samples=10**9, tests=1000, dim=4096, workers=64, network=1e9, latency=1e-3)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"grad_z": {"encoding": "int8"}, "s_test": {"solver": "exact"}},
        {"grad_z": {"encoding": "float32"}, "s_test": {"solver": "identity"}, "influence": {"store_scores": False}},
        {"grad_z": {"projection": {"kind": "sparse", "dim": 7}}, "s_test": {"solver": "fisher"}},
        {"grad_z": {"store": False}},
        {"s_test": {"solver": "exact"}, "influence": {"correction": "newton"}},
    ],
    ids=str,
)
def test_blocks_files_and_bytes_are_those_of_a_run(
    cache: Path, small_blocks: None, sections: dict[str, dict[str, Any]]
) -> None:
    settings = tiny.settings(**sections)
    entries = 8 if settings.grad_z.projection else 7
    generator = torch.Generator().manual_seed(0)

    def points(count: int) -> torch.utils.data.TensorDataset:
        return torch.utils.data.TensorDataset(
            torch.randn(count, entries, generator=generator), torch.randn(count, 1, generator=generator)
        )

    model = torch.nn.Linear(entries, 1, bias=False)
    pipeline = ip.Pipeline(ip.Experiment(model, ip.Regression(), points(60), {"tests": points(10)}), cache, settings)
    pipeline.run()
    found = []
    for stage in pipeline.plan().stages:
        arrays = zarr.open_group(cache / stage.stage / stage.key, mode="r").arrays()
        found.append((stage.stage, stage.total, stage.files, sum(array.nbytes for _, array in arrays)))
    simulated = simulate(SCALE, settings)
    assert [(stage.name, stage.blocks, stage.files, stage.bytes) for stage in simulated.stages] == found


def test_a_billion_samples_take_a_moment_and_no_memory() -> None:
    tracemalloc.start()
    found = simulate(LARGE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * 2**20
    assert found["grad_z"].blocks == math.ceil(10**9 / 1024)
    assert found["grad_z"].bytes > 2 * 4096 * 10**9
    assert found["influence"].read_bytes > 2 * 4096 * 10**9
    assert "1000000000 training samples × 4096 coordinates" in str(found)


def test_each_resource_binds_where_its_rate_is_low() -> None:
    for name, changes in {
        "compute": {"gradients": 1.0},
        "disk": {"disk": 1e6},
        "network": {"network": 1e4},
        "bookkeeping": {"latency": 100.0},
    }.items():
        stage = simulate(dataclasses.replace(LARGE, **changes))["grad_z"]
        assert stage.binds == name
        assert stage.seconds >= getattr(stage, name)


def test_rates_divide_what_there_is_to_do() -> None:
    one = simulate(dataclasses.replace(LARGE, samples=2**20, workers=1))["grad_z"]
    assert one.compute == pytest.approx(2**20 / 1000)
    assert one.disk == pytest.approx(one.bytes / 2e9)
    many = simulate(dataclasses.replace(LARGE, samples=2**20, workers=64))["grad_z"]
    assert many.compute == pytest.approx(one.compute / 64)
    assert many.disk == one.disk
    idle = simulate(dataclasses.replace(LARGE, samples=2**20, workers=1000))["grad_z"]
    assert idle.compute == pytest.approx(one.compute / 512)  # of 1024 blocks, two are some worker's


def test_twice_the_samples_take_twice_the_passes_over_gradients() -> None:
    one, two = (simulate(dataclasses.replace(LARGE, samples=n * 2**23))["influence"] for n in (1, 2))
    assert two.read_bytes == pytest.approx(2 * one.read_bytes, rel=1e-3)
    assert two.compute == pytest.approx(2 * one.compute, rel=1e-3)
    assert two.requests == pytest.approx(2 * one.requests, rel=1e-3)


def test_gradients_that_are_not_kept_are_computed_for_each_pass() -> None:
    scale = dataclasses.replace(LARGE, samples=2**20, tests=2048)
    found = simulate(scale, ip.Settings(grad_z={"store": False}, s_test={"solver": "identity"}))
    assert [stage.name for stage in found.stages] == ["s_test", "influence"]
    assert found["influence"].compute > 2 * 2**20 / 1000 / 64


def test_scales_are_read_with_units() -> None:
    found = Scale.read("samples=1e9, tests=1000, dim=4096, workers=64, disk=2GB/s, network=1GiB/s, latency=20ms,")
    assert found == Scale(10**9, 1000, 4096, 64, 2e9, 2**30, 0.02)
    assert isinstance(found.samples, int)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("samples=1e6,tests=10", "dim must be given"),
        ("samples=1e6,tests=10,dim=4,memory=3", "'memory' is none of samples, tests, dim"),
        ("samples=1e6,samples=3,tests=10,dim=4", "'samples' is given twice"),
        ("samples=1.5,tests=10,dim=4", "samples must be a whole number"),
        ("samples=0,tests=10,dim=4", "samples must be a whole number, for example 1e6, above 0 (found '0')"),
        ("samples=10,tests=10,dim=4,disk=2 parsecs", "disk must be a number, for example 2e9, 2GB/s"),
        ("samples=10,tests=10,dim=4,disk=1e999", "disk must be a number"),
        ("samples=10,tests=10,dim=4,disk=1.2.3", "disk must be a number"),
        ("", "'' is none of"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, said: str) -> None:
    with pytest.raises(ip.RequestError) as error:
        Scale.read(text)
    assert said in str(error.value)


def test_measured_rates_take_the_place_of_others() -> None:
    def stage(name: str, rows: int, *blocks: tuple[int, float], ready: float = 2.0) -> StagePlan:
        timing = Timing(ready, blocks) if blocks else None
        return StagePlan(name, "key", 0, 1, rows, 0, 0, 0, 0, False, 0, "", timing=timing)

    stages = (
        stage("grad_z", 1000, (10, 3.0), (10, 2.0)),
        stage("curvature", 16, (1, 4.0), ready=8.0),
        stage("s_test", 10, (10, 5.0)),
        stage("influence", 10),
    )
    found = SCALE.measured(Plan("", stages))
    assert (found.gradients, found.curvature, found.solutions) == pytest.approx((5, 1000 / (64 + 6), 2))
    assert found.start == 2.0
    assert SCALE.measured(Plan("", stages[3:])) == SCALE


def test_the_command_needs_no_experiment_and_takes_one(project: Path) -> None:
    sizes = "samples=1e6,tests=100,dim=512,workers=4"
    alone = CliRunner().invoke(app, ["plan", "--simulate", sizes])
    assert alone.exit_code == 0, alone.output
    assert "1000000 training samples × 512 coordinates (float16), 100 tests, solver cg, top_k 500" in alone.stdout
    assert "1000 gradients" in alone.stdout
    measured = CliRunner().invoke(app, ["plan", str(project), "--measure", "--simulate", sizes])
    assert measured.exit_code == 0, measured.output
    assert "top_k 1," in measured.stdout
    assert " 1000 gradients" not in measured.stdout
    for words in (["plan"], ["plan", "--measure", "--simulate", sizes]):
        refused = CliRunner().invoke(app, words)
        assert refused.exit_code == 2
        assert "settings file" in refused.stderr
