from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stages.device_batch import DeviceBatch
from stages.grad_z import ComputedRows, GradZ, PerSample, hooks, loop, vmap
from stages.grad_z.choose import choose
from stages.parameters import ModelFunction, evaluating, select
from stages.stage import Block, StageError
from tests import oracles
from tests.oracles import CASES, CPU, Case, ClassTask, Data, SquaredTask, make


def function_of(model: nn.Module, task: Any = None, globs: tuple[str, ...] = ("*",)) -> ModelFunction:
    return ModelFunction(model, task or ClassTask(), globs, CPU)


def per_sample(model: nn.Module, data: Data, task: Any = None, batch_size: int = 4) -> PerSample:
    function = function_of(model, task)
    return PerSample(function, function.losses, data, DeviceBatch(batch_size))


def all_rows(per: PerSample) -> Tensor:
    return torch.cat([rows.grads for rows in per.rows(range(len(per.samples)))])


def everything(case: Case) -> Any:
    return case.data.batch(range(len(case.data)))


def labelled(count: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return x, torch.arange(count) % 3


def perceptron(*between: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), *between, nn.Linear(6, 3)).double().eval()


def by_hooks(function: ModelFunction, values: Any, batch: Any) -> tuple[Tensor, Tensor]:
    names = frozenset(name for owner in hooks.owners(function) for name in owner.names.values())
    return hooks.Hooks(names, loop.gradients)(function, values, batch)


TECHNIQUES = [
    pytest.param(vmap.gradients, id="vmap"),
    pytest.param(loop.gradients, id="loop"),
    pytest.param(by_hooks, id="hooks"),
]


# ---- right answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("case", CASES)
def test_each_technique_gives_the_gradients_of_plain_autograd(case: Case, technique: Any) -> None:
    function = case.function
    grads, losses = technique(function, function.losses, everything(case))
    torch.testing.assert_close(grads, oracles.gradients(case), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(losses, torch.stack(oracles.sample_losses(case)).detach(), rtol=1e-12, atol=0)
    assert not grads.requires_grad
    assert not losses.requires_grad


@pytest.mark.parametrize("case", CASES)
def test_hooks_are_chosen_wherever_they_are_right(case: Case) -> None:
    function = case.function
    technique = choose(function, function.losses, everything(case))
    if "ghost" in function.params:  # belongs to no layer, and a second pass for it does not pay
        assert technique is vmap.gradients
    else:
        assert technique == hooks.Hooks(frozenset(function.params), vmap.gradients)


@pytest.fixture
def no_known_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have hooks follow no layer at all."""
    monkeypatch.setattr(hooks, "owners", lambda function: [])


@pytest.mark.parametrize("case", CASES)
def test_vmap_is_chosen_where_hooks_follow_no_layer(case: Case, no_known_layers: None) -> None:
    function = case.function
    assert choose(function, function.losses, everything(case)) is vmap.gradients


@pytest.mark.parametrize("case", CASES)
def test_the_stage_returns_gradients_norms_losses_and_labels_of_its_block(case: Case) -> None:
    stage = GradZ(case.function, case.data, 5, "float32", DeviceBatch(3), lambda rows: rows)
    stage.prepare()
    expected, losses = oracles.gradients(case).numpy(), torch.stack(oracles.sample_losses(case)).detach().numpy()
    for block in stage.grid:
        rows = block.bounds["sample"]
        found = stage.compute(block)
        np.testing.assert_allclose(found["gradients"], expected[rows], rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(found["norm"], np.linalg.norm(expected[rows], axis=1), rtol=1e-6)
        np.testing.assert_allclose(found["loss"], losses[rows], rtol=1e-6)
        labels = case.task.labels(case.data.batch(block.ids("sample")))
        np.testing.assert_array_equal(found["label"], np.nan if labels is None else labels.numpy())
        assert [found[spec.name].dtype for spec in stage.arrays] == [np.dtype(spec.dtype) for spec in stage.arrays]


def test_an_unused_parameter_has_zero_gradients_between_those_of_the_others() -> None:
    case = make(oracles.unused)
    grads = all_rows(per_sample(case.model, case.data))
    # In the model's order, a module's own parameters come before its children's.
    assert next(iter(dict(case.model.named_parameters()))) == "ghost"
    assert grads[:, :5].eq(0).all()
    assert grads[:, 5:].ne(0).any(dim=0).all()


def test_tied_weights_are_counted_once_with_the_sum_of_both_uses() -> None:
    case = make(oracles.tied)
    assert list(case.function.params) == ["first.weight", "second.bias"]
    assert case.function.size == 20
    apart = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4)).double().eval()
    state = case.model.state_dict()
    names = {"0.weight": "first.weight", "2.weight": "second.weight", "2.bias": "second.bias"}
    apart.load_state_dict({new: state[old] for new, old in names.items()})
    both = all_rows(per_sample(apart, case.data))
    expected = torch.cat([both[:, :16] + both[:, 16:32], both[:, 32:]], dim=1)
    torch.testing.assert_close(all_rows(per_sample(case.model, case.data)), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batch_size", [1, 3, 7, 11, 64])
def test_any_device_batch_gives_the_same_rows_to_rounding(batch_size: int, dtype: torch.dtype) -> None:
    case = make(oracles.conv)
    model = oracles.conv().model.to(dtype)
    model.load_state_dict(case.model.state_dict())
    data = Data((case.data.tree[0].to(dtype), case.data.tree[1]))
    rounding = 10 * torch.finfo(dtype).eps
    rows = all_rows(per_sample(model, data, batch_size=batch_size))
    torch.testing.assert_close(rows, oracles.gradients(case).to(dtype), rtol=rounding, atol=rounding)


def test_a_bfloat16_model_has_gradients() -> None:
    x, labels = labelled()
    stage = GradZ(
        function_of(perceptron(nn.Tanh()).bfloat16()),
        Data((x.bfloat16(), labels)),
        12,
        "float32",
        DeviceBatch(4),
        lambda rows: rows,
    )
    stage.prepare()
    found = stage.compute(stage.grid.block((0,)))
    expected = all_rows(per_sample(perceptron(nn.Tanh()), Data((x, labels)))).numpy()
    assert np.abs(found["gradients"] - expected).max() < 0.03 * np.abs(expected).max()


def test_each_measurement_is_differentiated_where_it_is_asked_for() -> None:
    class Margin(ClassTask):
        def measurements(self, outputs: Tensor, batch: Any) -> Tensor:
            return outputs.gather(1, batch[1].unsqueeze(1))[:, 0]

    x, labels = labelled()
    function = function_of(nn.Linear(4, 3).double(), Margin())
    [(_, grads, values, *_)] = PerSample(function, function.measurements, Data((x, labels)), DeviceBatch(12)).rows(
        range(12)
    )
    ones = torch.nn.functional.one_hot(labels, 3).double()
    expected = torch.cat([(ones.unsqueeze(2) * x.unsqueeze(1)).flatten(1), ones], dim=1)
    torch.testing.assert_close(grads, expected, rtol=1e-14, atol=0)
    weight, bias = function.params.values()
    torch.testing.assert_close(values, ((x @ weight.T + bias) * ones).sum(1))


def test_uncached_rows_slice_as_the_cached_ones() -> None:
    case = make(oracles.mlp)
    stage = GradZ(case.function, case.data, 5, "float32", DeviceBatch(4), lambda rows: rows)
    computed: list[tuple[int, ...]] = []

    def rows(block: Block) -> Any:
        computed.append(block.index)
        return stage.compute(block)["gradients"]

    lazy, expected = ComputedRows(stage, rows), oracles.gradients(case).float().numpy()
    assert lazy.shape == expected.shape
    for part in (slice(0, 3), slice(3, 5), slice(6, 10), slice(10, 12)):
        for columns in (slice(0, 20), slice(20, 43)):
            np.testing.assert_allclose(lazy[part, columns], expected[part, columns], rtol=1e-6, atol=1e-9)
    assert computed == [(0,), (1,), (2,)]


# ---- selection -----------------------------------------------------------------------------------------------------


def test_globs_select_parameters_in_the_models_order() -> None:
    model = perceptron(nn.Tanh())
    assert list(select(model, ["2.bias", "0.*"])) == ["0.weight", "0.bias", "2.bias"]


def test_only_the_selected_columns_change_nothing_else() -> None:
    case = make(oracles.mlp)
    function = case.function
    whole, _ = vmap.gradients(function, function.losses, everything(case))
    chosen = function_of(case.model, case.task, ("2.*",))
    part, _ = vmap.gradients(chosen, chosen.losses, everything(case))
    torch.testing.assert_close(part, whole[:, 25:], rtol=1e-12, atol=1e-14)


def test_frozen_parameters_are_left_out() -> None:
    model = perceptron(nn.Tanh())
    model[0].weight.requires_grad_(False)
    assert list(select(model, ["*"])) == ["0.bias", "2.weight", "2.bias"]
    with pytest.raises(StageError, match=r"0\.weight.*requires a gradient"):
        select(model, ["0.weight"])


def test_a_glob_that_matches_nothing_is_named_with_what_there_is() -> None:
    with pytest.raises(StageError, match=r"'head\.\*' matches no parameter.*0\.weight, 0\.bias"):
        select(perceptron(), ["0.*", "head.*"])


def test_an_l2_glob_that_matches_nothing_is_named() -> None:
    function = function_of(perceptron(), ClassTask({"head.*": 0.1}))
    with pytest.raises(StageError, match=r"l2: 'head\.\*' matches no parameter"):
        function.l2()


def test_flatten_and_unflatten_are_inverse_in_the_models_order() -> None:
    case = make(oracles.mlp)
    function = case.function
    vectors = torch.randn(2, 3, function.size, dtype=torch.float64)
    assert torch.equal(function.flatten(function.unflatten(vectors)), vectors)
    assert torch.equal(function.flatten(function.params), case.theta)


# ---- the model stays as it was -------------------------------------------------------------------------------------


def test_modules_are_evaluated_and_get_their_own_modes_back() -> None:
    model = perceptron(nn.Dropout(0.5), nn.Tanh(), nn.BatchNorm1d(6).double())
    model.train()
    model[3].eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    data = Data(labelled())
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        rows, again = all_rows(per_sample(model, data)), all_rows(per_sample(model, data))
    assert torch.equal(rows, again)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ZeroDivisionError), evaluating(model):
        _ = 1 / 0
    assert [module.training for module in model.modules()] == modes


class Counting(nn.Module):
    """Counts its calls in a buffer, in ``eval()`` mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * self.calls


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_buffers_parameters_and_their_gradients_are_untouched(technique: Any) -> None:
    model = Counting().double().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    function = function_of(model)
    batch = labelled()
    first, _ = technique(function, function.losses, batch)
    second, _ = technique(function, function.losses, batch)
    assert torch.equal(first, second), "a buffer was carried from one call to the next"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "said"),
    [
        (nn.BatchNorm1d(6, track_running_stats=False), "one alone cannot"),
        (
            nn.Sequential(nn.Unflatten(1, (2, 3)), nn.BatchNorm1d(2, track_running_stats=False), nn.Flatten()),
            "differs by",
        ),
    ],
    ids=["values", "maps"],
)
def test_batch_norm_without_running_statistics_is_refused(norm: nn.Module, said: str) -> None:
    with pytest.raises(StageError, match=rf"(?s){said}.*1.* normalises over the batch.*track_running_stats=True"):
        per_sample(perceptron(norm, nn.Tanh()), Data(labelled())).check()


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("bad", [[0], [4], [2, 5], [0, 3, 11]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_gradient_that_is_not_finite_names_its_samples(dtype: torch.dtype, bad: list[int], value: float) -> None:
    x, labels = labelled()
    x[bad, 1] = value
    per = per_sample(perceptron(nn.ReLU()).to(dtype), Data((x.to(dtype), labels)))
    with pytest.raises(StageError, match="NaN or infinite") as caught:
        list(per.rows([*range(6), *range(6, 12)]))
    first_batch = [i for i in bad if i // 4 == bad[0] // 4]
    assert f"for sample{'s' * (len(first_batch) > 1)} {', '.join(map(str, first_batch))}:" in str(caught.value)


def test_an_infinite_gradient_of_a_finite_loss_is_named_by_its_id() -> None:
    class Root(ClassTask):
        def losses(self, outputs: Tensor, batch: Any) -> Tensor:
            return outputs.square().sum(1).sqrt()

    x, labels = labelled(40)
    model = nn.Linear(4, 3, bias=False).double()
    x[33] = 0.0
    with pytest.raises(StageError, match="for sample 33:"):
        list(per_sample(model, Data((x, labels)), Root()).rows([7, 20, 33, 39]))


def test_an_infinite_loss_with_a_finite_gradient_is_named() -> None:
    class Log(ClassTask):
        def losses(self, outputs: Tensor, batch: Any) -> Tensor:
            return outputs.sum(1) - batch[1].log()

    x, labels = labelled(40)
    labels = torch.where(torch.arange(40) == 17, 0.0, 1.0).double()
    with pytest.raises(StageError, match="for sample 17:"):
        list(per_sample(nn.Linear(4, 3).double(), Data((x, labels)), Log()).rows(range(40)))


def test_a_sample_that_makes_its_neighbours_nan_is_no_sample_of_its_own() -> None:
    class Centred(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.where(x.isnan().any(), x.mean(0) + x, x))

    x, labels = labelled()
    x[11, 0] = float("nan")
    with pytest.raises(StageError, match="with the samples around it"):
        per_sample(Centred(4, 3).double(), Data((x, labels))).check()


def test_all_zero_gradients_are_refused() -> None:
    model = perceptron(nn.ReLU())
    with torch.no_grad():
        model[0].bias.fill_(-1e6)
    function = function_of(model, globs=("0.*",))
    with pytest.raises(StageError, match=r"every gradient is zero for all of 0\.weight, 0\.bias"):
        PerSample(function, function.losses, Data(labelled()), DeviceBatch(4)).check()


def test_gradients_that_are_zero_for_the_probed_samples_alone_are_not_refused() -> None:
    class Hinge(ClassTask):
        def losses(self, outputs: Tensor, batch: Any) -> Tensor:
            return batch[1] * outputs.sum(1)

    x, _ = labelled(40)
    labels = torch.zeros(40, dtype=torch.float64)
    labels[3] = 1.0
    per_sample(nn.Linear(4, 3).double(), Data((x, labels)), Hinge()).check()


@pytest.mark.parametrize("cut", ["detached", "unused"])
def test_a_loss_that_does_not_depend_on_the_parameters_is_refused(cut: str) -> None:
    class Cut(ClassTask):
        def outputs(self, model: nn.Module, batch: Any) -> Tensor:
            return model(batch[0]).detach() if cut == "detached" else batch[0][:, :3]

    with pytest.raises(
        StageError, match=r"(?s)every gradient is zero for all of .*does not depend on these parameters"
    ):
        per_sample(perceptron(nn.Tanh()), Data(labelled()), Cut()).check()


@pytest.mark.parametrize("shape", ["scalar", "column", "list"])
def test_a_loss_that_is_not_one_number_for_each_sample_is_refused(shape: str) -> None:
    class Wrong(ClassTask):
        def losses(self, outputs: Tensor, batch: Any) -> Any:
            each = super().losses(outputs, batch)
            return {"scalar": each.mean(), "column": each.unsqueeze(1), "list": each.tolist()}[shape]

    with pytest.raises(StageError, match=r"(?s)Task\.losses must return one number for each sample.*reduction"):
        per_sample(perceptron(nn.Tanh()), Data(labelled()), Wrong()).check()


def test_outputs_that_are_no_tensor_are_refused() -> None:
    class Pair(ClassTask):
        def outputs(self, model: nn.Module, batch: Any) -> Any:
            return (model(batch[0]), None)

    with pytest.raises(StageError, match=r"Task\.outputs must return a tensor, got tuple"):
        per_sample(perceptron(nn.Tanh()), Data(labelled()), Pair()).check()


# ---- what vmap cannot follow ---------------------------------------------------------------------------------------


class WithItem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * torch.stack([torch.tensor(1.0 + row[0].item() ** 2) for row in x]).unsqueeze(1)


class WithBranch(WithItem):
    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for row in x:
            if row.sum() > 0:  # depends on the data
                rows.append(self.linear(row))
            else:
                rows.append(self.linear(-2 * row).tanh())
        return torch.stack(rows)


class WithShape(WithItem):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.stack([row * len(row[row > 0]) for row in x]))


@pytest.mark.parametrize("kind", [WithItem, WithShape])
def test_hooks_follow_whole_batches_where_vmap_cannot(kind: type[nn.Module]) -> None:
    case = Case("", kind().double().eval(), ClassTask(), Data(labelled()))
    function = case.function
    assert choose(function, function.losses, everything(case)) == hooks.Hooks(
        frozenset(function.params), loop.gradients
    )
    torch.testing.assert_close(all_rows(per_sample(case.model, case.data)), oracles.gradients(case), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [WithItem, WithBranch, WithShape])
def test_a_model_that_vmap_cannot_follow_is_done_by_the_loop(
    kind: type[nn.Module], no_known_layers: None, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    case = Case("", kind().double().eval(), ClassTask(), Data(labelled()))
    function = case.function
    with caplog.at_level(logging.INFO, "stages"):
        assert choose(function, function.losses, everything(case)) is loop.gradients
    assert "one sample at a time" in caplog.text
    torch.testing.assert_close(all_rows(per_sample(case.model, case.data)), oracles.gradients(case), rtol=1e-12, atol=0)


def test_a_vmap_that_is_silently_wrong_is_found_and_not_used(
    no_known_layers: None, caplog: pytest.LogCaptureFixture
) -> None:
    class Scale(torch.autograd.Function):
        """Multiplies by the largest entry of the batch's first row; the rule for vmap forgets to."""

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad

        @staticmethod
        def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, int]:
            return x * 3, in_dims[0]

    class Scaled(WithItem):
        def forward(self, x: Tensor) -> Tensor:
            return Scale.apply(self.linear(x))

    case = Case("", Scaled().double().eval(), ClassTask(), Data(labelled()))
    function = case.function
    assert choose(function, function.losses, everything(case)) is loop.gradients
    assert "vmap differs from the loop" in caplog.text
    torch.testing.assert_close(all_rows(per_sample(case.model, case.data)), oracles.gradients(case), rtol=1e-12, atol=0)


@pytest.mark.parametrize("followed", [True, False], ids=["hooks", "loop"])
def test_a_batch_with_texts_is_not_done_by_vmap(followed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not followed:
        monkeypatch.setattr(hooks, "owners", lambda function: [])

    class Texts(SquaredTask):
        def outputs(self, model: nn.Module, batch: Any) -> Tensor:
            return model(batch["x"] * torch.tensor([[len(text)] for text in batch["texts"]]))

        def losses(self, outputs: Tensor, batch: Any) -> Tensor:
            return outputs.square().sum(1)

    class Listed(Data):
        def batch(self, ids: Any) -> Any:
            return {"x": self.tree[0][list(ids)], "texts": ["a" * (i + 1) for i in ids]}

    x, labels = labelled()
    model = nn.Linear(4, 3).double()
    weighted = Data((x * torch.arange(1, 13).unsqueeze(1), torch.zeros(12, 3, dtype=torch.float64)))
    expected = all_rows(per_sample(model, weighted, SquaredTask()))
    per = per_sample(model, Listed((x, labels)), Texts())
    torch.testing.assert_close(all_rows(per), expected, rtol=1e-12, atol=0)
    assert isinstance(per._technique, hooks.Hooks) if followed else per._technique is loop.gradients


def test_a_sample_that_uses_no_selected_parameter_has_a_zero_row() -> None:
    class Routed(ClassTask):
        def outputs(self, model: nn.Module, batch: Any) -> Tensor:
            return torch.stack([model(x) if label.item() else x[:3] for x, label in zip(*batch, strict=True)])

        def losses(self, outputs: Tensor, batch: Any) -> Tensor:
            return outputs.square().sum(1)

    x, _ = labelled(9)
    labels = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1])
    found = all_rows(per_sample(nn.Linear(4, 3).double(), Data((x, labels)), Routed()))
    assert found.any(dim=1).tolist() == labels.bool().tolist()
