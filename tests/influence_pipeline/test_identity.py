"""Each key covers what changes its arrays, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import influence_pipeline as ip
from influence_pipeline.cache import differences, key_of, nearest
from tests import tiny

Make = Callable[..., ip.Pipeline]
STAGES = ("grad_z", "curvature", "s_test", "influence")


def keys(pipeline: ip.Pipeline) -> dict[str, str]:
    return {stage.stage: stage.key for stage in pipeline.plan("holdout").stages}


class Loss(ip.Classification):
    pass


class Margin(ip.Classification):
    def measurements(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return outputs.gather(1, batch[1][:, None])[:, 0]


def tasks(kind: type[ip.Classification], **attributes: Any) -> ip.Classification:
    task = kind(l2=attributes.pop("l2", 0.01))
    for name, value in attributes.items():
        setattr(task, name, value)
    return task


def buffered() -> torch.nn.Module:
    model = tiny.model()
    model.register_buffer("offset", torch.ones(3))
    return model


ALL, SOLVED, RANKED = set(STAGES), {"curvature", "s_test", "influence"}, {"influence"}
CHANGES: list[tuple[str, dict[str, Any], set[str]]] = [
    ("weights", {"model": lambda: tiny.model(1)}, ALL),
    ("buffers", {"model": buffered}, ALL),
    ("parameters", {"grad_z": {"parameters": ["2.*"]}}, ALL),
    ("encoding", {"grad_z": {"encoding": "float32"}}, {"grad_z", "influence"}),
    ("the loss's class", {"task": tasks(Loss)}, set()),
    ("the task's version", {"task": tasks(ip.Classification, version=2)}, ALL),
    ("a public attribute of the task", {"task": tasks(ip.Classification, smoothing=0.1)}, ALL),
    ("a private attribute of the task", {"task": tasks(ip.Classification, _cache=3)}, set()),
    ("the training set's name", {"train_name": "other"}, ALL),
    ("l2", {"task": tasks(ip.Classification, l2=0.02)}, SOLVED),
    ("the measurement", {"task": tasks(Margin)}, {"s_test", "influence"}),
    (
        "an attribute of the measurement",
        {"task": tasks(ip.Classification, measurement_class=3)},
        {"s_test", "influence"},
    ),
    ("which way is better", {"task": tasks(ip.Classification, higher_is_better=True)}, RANKED),
    ("the solver", {"s_test": {"solver": "lissa"}}, SOLVED),
    ("the curvature", {"s_test": {"curvature": "hessian"}}, SOLVED),
    ("damping", {"s_test": {"damping": {"relative": 0.2}}}, {"s_test", "influence"}),
    ("the tolerance", {"s_test": {"tolerance": 1e-5}}, {"s_test", "influence"}),
    ("ranks", {"influence": {"top_k": 2}}, RANKED),
    ("which scores are kept", {"influence": {"store_scores": False}}, RANKED),
    ("runtime", {"runtime": {"workers": 2, "memory": "1 GiB", "device_batch": 3, "progress": False}}, set()),
    ("how samples are read", {"loader_workers": 0, "collate": torch.utils.data.default_collate}, set()),
    ("more training samples", {"train": tiny.points(70, 1)}, set()),
    ("more test samples", {"tests": {"holdout": tiny.points(13, 2)}}, set()),
    ("another test set beside it", {"tests": {"holdout": tiny.points(10, 2), "other": tiny.points(3, 4)}}, set()),
]


@pytest.mark.parametrize(("what", "changes", "changed"), CHANGES, ids=[what for what, _, _ in CHANGES])
def test_a_change_gives_other_keys_to_what_it_changes_and_to_nothing_else(
    make: Make, cache: Path, what: str, changes: dict[str, Any], changed: set[str]
) -> None:
    before, after = keys(make()), keys(make(**changes))
    assert {stage for stage in STAGES if before[stage] != after[stage]} == changed


def test_the_name_of_a_test_set_is_part_of_what_is_of_it(make: Make) -> None:
    plan = make(tests={"one": tiny.points(10, 2), "two": tiny.points(10, 2)}).plan()
    solved = [stage.key for stage in plan.stages if stage.stage == "s_test"]
    assert solved[0].startswith("one-")
    assert solved[1].startswith("two-")
    assert solved[0].removeprefix("one-") != solved[1].removeprefix("two-")


def test_keys_do_not_depend_on_the_order_of_entries() -> None:
    assert key_of({"a": 1, "b": {"c": 2, "d": 3}}) == key_of({"b": {"d": 3, "c": 2}, "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 1.5})


def test_differences_are_named_with_both_values() -> None:
    cached = {"weights": "9f3c", "s_test": {"damping": 0.01, "solver": "cg"}, "l2": 0.0}
    wanted = {"weights": "17ab", "s_test": {"damping": 0.02, "solver": "cg"}}
    assert differences(wanted, cached) == ("l2: 0.0 ≠ nothing", "s_test.damping: 0.01 ≠ 0.02", "weights: 9f3c ≠ 17ab")
    near = {**cached, "weights": "17ab"}
    assert nearest(wanted, [cached, near]) == ("l2: 0.0 ≠ nothing", "s_test.damping: 0.01 ≠ 0.02")
    assert nearest(wanted, []) == ()


def test_a_plan_names_what_differs_from_the_nearest_that_is_cached(done: Path, make: Make) -> None:
    make(s_test={"damping": {"relative": 0.2}}).run()
    plan = make(s_test={"damping": {"relative": 0.3}}).plan("holdout")
    assert plan["grad_z"].differs == plan["curvature"].differs == ()
    assert plan["s_test"].differs in (
        ("s_test.damping.relative: 0.1 ≠ 0.3",),
        ("s_test.damping.relative: 0.2 ≠ 0.3",),
    )
    assert "differs from what is cached: s_test.damping.relative" in str(plan)


def test_a_group_whose_attributes_say_something_else_is_damaged(done: Path, make: Make) -> None:
    path = next(done.glob("s_test/*/zarr.json"))
    path.write_text(path.read_text().replace('"relative": 0.1', '"relative": 0.2'))
    with pytest.raises(ip.CacheDamaged, match="checksum does not fit"):
        make().plan()
    before = tiny.files(done)
    make().run()
    assert {name for name, data in tiny.files(done).items() if before[name] != data} == {str(path.relative_to(done))}
