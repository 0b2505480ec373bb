from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.device_batch import DeviceBatch
from stages.grad_z import GradZ, hooks, loop, vmap
from stages.grad_z.choose import choose
from stages.parameters import ModelFunction, evaluating
from tests.oracles import CPU, ClassTask, Data, SquaredTask, WeightedTask

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

COUNT, CLASSES = 6, 3


CHOOSE = importlib.import_module("stages.grad_z.choose")


@pytest.fixture
def second_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have hooks used on small models too where some parameters need a second pass."""
    monkeypatch.setattr(CHOOSE, "SECOND_PASS", 0)


class Problem:
    """A model with a batch; ``rest`` are the parameters that hooks leave to another technique."""

    def __init__(
        self,
        model: nn.Module,
        *shape: int,
        rest: tuple[str, ...] = (),
        tokens: bool = False,
        globs: tuple[str, ...] = ("*",),
    ) -> None:
        self.model, self.shape, self.rest, self.tokens, self.globs = model, shape, rest, tokens, globs

    def batch(self, count: int, dtype: torch.dtype, seed: int = 0) -> Any:
        generator = torch.Generator().manual_seed(seed)
        if self.tokens:
            x = torch.randint(0, 7, (count, *self.shape), generator=generator)
        else:
            x = torch.randn(count, *self.shape, generator=generator, dtype=torch.float64).to(dtype)
        return x, torch.arange(count) % CLASSES


class Ends(nn.Module):
    """Any layer between its input and three outputs."""

    def __init__(self, *layers: nn.Module, width: int = 0) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, CLASSES) if width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


class Shared(nn.Module):
    """One layer called three times, once with a keyword, between two in-place changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        once = self.linear(x).relu_()
        twice = self.linear(input=once)
        twice += x
        return self.head(self.linear(twice.tanh()))


class Tied(nn.Module):
    """An embedding whose weight is a layer's too; ``direct`` uses it without calling that layer."""

    def __init__(self, direct: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embedding.weight
        self.direct = direct
        self.bend = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.bend(self.embedding(x)).tanh()
        outputs = functional.linear(hidden, self.embedding.weight) if self.direct else self.out(hidden)
        return outputs.mean(1)


class Block(nn.Module):
    """A transformer block with hand-written attention; ``positions`` is a parameter of its own."""

    def __init__(self, positions: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8, padding_idx=0)
        self.positions = nn.Parameter(torch.randn(5, 8)) if positions else None
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8, bias=False)
        self.qkv, self.project = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.positions is not None:
            x += self.positions
        parts = self.qkv(self.first(x)).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.project(functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        out = self.mlp(self.second(x))
        out += x
        return self.head(out.mean(1))


class Positions(nn.Module):
    """A table of positions that is looked up once for all samples, as (P,) or as (1, P); or for tokens too."""

    def __init__(self, lead: bool = False, tokens_too: bool = False) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 4), nn.Embedding(9, 4)
        self.head = nn.Linear(4, CLASSES)
        self.lead, self.tokens_too = lead, tokens_too

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1])
        x = self.tokens(tokens) + self.positions(positions[None] if self.lead else positions)
        if self.tokens_too:
            x += self.positions(tokens)
        return self.head(x.tanh().mean(1))


class Residual(nn.Module):
    """Convolutions with everything done in place."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.one(x)))
        y = self.two(x)
        y += x
        return self.head(self.relu(y).mean((2, 3)))


class Scaled(nn.Module):
    """A parameter that belongs to no layer, and one that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.ghost = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3))
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x) * self.scale)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.two = nn.Linear(40, 24)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.head(self.two(self.attention(x, x, x, need_weights=False)[0].flatten(1)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(7, 12), nn.LSTM(12, 3, batch_first=True)
        self.wide, self.head = nn.Linear(15, 20), nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wide(self.lstm(self.embedding(x))[0].flatten(1)))


class Sideways(nn.Module):
    """One layer with the batch first, one with positions first, one on samples and positions as one dimension."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4 * length, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x).transpose(0, 1)).tanh().transpose(0, 1)
        return self.head(self.three(x.reshape(-1, 4)).view(x.shape).tanh().flatten(1))


class Own(nn.Linear):
    """A layer with a forward pass of its own, and one with a parameter of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.square(), self.bias)


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names)
    return model


def warmed(model: nn.Module, *shape: int) -> nn.Module:
    """Give running statistics and affine weights other values than those of a new module."""
    model.train()
    with torch.no_grad():
        model(2 + 3 * torch.randn(16, *shape))
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def conv(kind: Callable[..., nn.Module], dims: int, **options: Any) -> Callable[[], Problem]:
    def make() -> Problem:
        shape = (4, *(7, 6, 5)[:dims])
        body = kind(4, 6, **{"kernel_size": 3, **options})
        width = body(torch.zeros(1, *shape)).numel()
        return Problem(Ends(body, nn.ReLU(inplace=True), width=width), *shape)

    return make


TRANSFORMER = (
    "self_attn.in_proj_weight",
    "self_attn.in_proj_bias",
    "self_attn.out_proj.weight",
    "self_attn.out_proj.bias",
)
PROBLEMS: dict[str, Callable[[], Problem]] = {
    "linear": lambda: Problem(Ends(nn.Linear(4, 5), nn.Tanh(), width=5), 4),
    "linear-without-bias": lambda: Problem(Ends(nn.Linear(4, 5, bias=False), nn.ReLU(inplace=True), width=5), 4),
    "linear-over-positions": lambda: Problem(Ends(nn.Linear(4, 5), nn.ReLU(inplace=True), width=15), 3, 4),
    "linear-over-a-grid": lambda: Problem(Ends(nn.Linear(4, 5), nn.Hardtanh(inplace=True), width=30), 3, 2, 4),
    "conv1d": conv(nn.Conv1d, 1),
    "conv1d-same-dilated": conv(nn.Conv1d, 1, kernel_size=4, padding="same", dilation=2),
    "conv1d-circular": conv(nn.Conv1d, 1, padding=2, padding_mode="circular"),
    "conv2d": conv(nn.Conv2d, 2, bias=False),
    "conv2d-valid": conv(nn.Conv2d, 2, padding="valid", kernel_size=(2, 3)),
    "conv2d-stride-padding": conv(nn.Conv2d, 2, stride=(2, 3), padding=(1, 2)),
    "conv2d-same-even": conv(nn.Conv2d, 2, kernel_size=(2, 4), padding="same"),
    "conv2d-reflect-dilated": conv(nn.Conv2d, 2, padding=2, dilation=(1, 2), padding_mode="reflect"),
    "conv2d-replicate-same": conv(nn.Conv2d, 2, padding="same", kernel_size=(4, 3), padding_mode="replicate"),
    "conv2d-groups": conv(nn.Conv2d, 2, groups=2, stride=2, padding=1),
    "conv2d-pointwise": conv(nn.Conv2d, 2, kernel_size=1),
    "conv2d-depthwise": lambda: Problem(Ends(nn.Conv2d(4, 8, 3, groups=4), width=32), 4, 4, 4),
    "conv3d": conv(nn.Conv3d, 3, stride=(1, 2, 2), padding=1, groups=2),
    "embedding": lambda: Problem(Ends(nn.Embedding(7, 4), nn.Tanh(), width=20), 5, tokens=True),
    "embedding-padding": lambda: Problem(Ends(nn.Embedding(7, 4, padding_idx=2), width=20), 5, tokens=True),
    "embedding-one-token": lambda: Problem(Ends(nn.Embedding(7, 4), width=4), tokens=True),
    "layer-norm": lambda: Problem(warmed(Ends(nn.LayerNorm(4), width=12), 3, 4), 3, 4),
    "layer-norm-two-dims": lambda: Problem(warmed(Ends(nn.LayerNorm((3, 4)), width=24), 2, 3, 4), 2, 3, 4),
    "group-norm": lambda: Problem(warmed(Ends(nn.GroupNorm(2, 4), nn.ReLU(inplace=True), width=20), 4, 5), 4, 5),
    "batch-norm": lambda: Problem(warmed(Ends(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(True), width=5), 4), 4),
    "residual-in-place": lambda: Problem(warmed(Residual(), 2, 5, 5), 2, 5, 5),
    "shared-module": lambda: Problem(Shared(), 4),
    "tied": lambda: Problem(Tied(direct=False), 5, tokens=True),
    "tied-and-used-directly": lambda: Problem(Tied(direct=True), 5, tokens=True, rest=("embedding.weight",)),
    "transformer-block": lambda: Problem(Block(), 5, tokens=True),
    "transformer-block-positions": lambda: Problem(Block(True), 5, tokens=True, rest=("positions",)),
    "positions": lambda: Problem(Positions(), 5, tokens=True),
    "positions-as-many-as-samples": lambda: Problem(Positions(), COUNT, tokens=True),
    "positions-in-a-batch-of-one": lambda: Problem(Positions(lead=True), 5, tokens=True),
    "positions-and-tokens": lambda: Problem(Positions(tokens_too=True), 5, tokens=True),
    "own-parameter": lambda: Problem(Scaled(), 4, rest=("scale", "ghost")),
    "attention": lambda: Problem(
        Attention(), 5, 8, rest=tuple(f"attention.{n.removeprefix('self_attn.')}" for n in TRANSFORMER)
    ),
    "encoder-layer": lambda: Problem(
        nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 16, 0.0, batch_first=True), nn.Flatten(), nn.Linear(20, CLASSES)
        ),
        5,
        4,
        rest=tuple(f"0.{n}" for n in TRANSFORMER),
    ),
    "lstm": lambda: Problem(
        Recurrent(),
        5,
        tokens=True,
        rest=("lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.bias_ih_l0", "lstm.bias_hh_l0"),
    ),
    "frozen": lambda: Problem(frozen(Shared(), "linear.weight", "head.bias"), 4),
    "globs": lambda: Problem(Block(), 5, tokens=True, globs=("mlp.2.*", "qkv.weight", "embedding.*")),
    "parametrized": lambda: Problem(
        Ends(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), width=5),
        4,
        rest=("body.0.parametrizations.weight.original0", "body.0.parametrizations.weight.original1"),
        globs=("head.*", "body.0.parametrizations.weight.original0", "body.0.bias"),
    ),
    "own-forward": lambda: Problem(Ends(Own(4, 3), nn.Linear(3, 9), width=9), 4, rest=("body.0.weight", "body.0.bias")),
    "sideways": lambda: Problem(Sideways(9), 9, 4, rest=("two.weight", "two.bias", "three.weight", "three.bias")),
    "sideways-of-equal-length": lambda: Problem(
        Sideways(COUNT), COUNT, 4, rest=("two.weight", "two.bias", "three.weight", "three.bias")
    ),
}


def make(name: str, dtype: torch.dtype = torch.float64) -> tuple[ModelFunction, Problem]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name))
        problem = PROBLEMS[name]()
    model = problem.model.to(dtype).eval()
    return ModelFunction(model, ClassTask(), problem.globs, CPU), problem


def rest_of(function: ModelFunction, problem: Problem) -> set[str]:
    return set(problem.rest) & set(function.params)


# ---- right answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBLEMS)
def test_hooks_are_chosen_and_give_what_the_loop_gives(name: str, second_pass: None) -> None:
    function, problem = make(name)
    with evaluating(problem.model):
        technique = choose(function, function.losses, problem.batch(COUNT, torch.float64))
        assert isinstance(technique, hooks.Hooks)
        assert set(function.params) - technique.names == rest_of(function, problem)
        for count in (1, 5):
            batch = problem.batch(count, torch.float64, seed=1)
            found, values = technique(function, function.losses, batch)
            expected, expected_values = loop.gradients(function, function.losses, batch)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
            torch.testing.assert_close(values, expected_values)
            assert not found.requires_grad
            assert not values.requires_grad


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "lstm"])
def test_hooks_are_vmap_to_rounding_in_single_precision(name: str, second_pass: None) -> None:
    function, problem = make(name, torch.float32)
    batch = problem.batch(COUNT, torch.float32)
    with evaluating(problem.model):
        technique = choose(function, function.losses, batch)
        assert isinstance(technique, hooks.Hooks)
        found, _ = technique(function, function.losses, batch)
        expected, _ = vmap.gradients(function, function.losses, batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_patches_are_laid_out_a_few_samples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    function, problem = make("conv2d-groups")
    batch = problem.batch(COUNT, torch.float64)
    whole = hooks.gradients(function, function.losses, batch, frozenset(function.params))[0]
    monkeypatch.setattr("stages.grad_z.layers.PATCH_BYTES", 1)
    assert torch.equal(hooks.gradients(function, function.losses, batch, frozenset(function.params))[0], whole)


def test_measurements_of_dict_batches() -> None:
    class Margin(WeightedTask):
        def measurements(self, outputs: Tensor, batch: Any) -> Tensor:
            return outputs.gather(1, batch["labels"].unsqueeze(1))[:, 0] * batch["weight"]

    function = ModelFunction(nn.Linear(4, CLASSES).double(), Margin(), ("*",), CPU)
    x = torch.randn(COUNT, 4, dtype=torch.float64)
    ones = torch.rand(COUNT, dtype=torch.float64)
    batch = {"inputs": {"x": x, "temperature": 1 + ones}, "labels": torch.arange(COUNT) % CLASSES, "weight": ones}
    technique = choose(function, function.measurements, batch)
    assert isinstance(technique, hooks.Hooks)
    found, _ = technique(function, function.measurements, batch)
    torch.testing.assert_close(found, loop.gradients(function, function.measurements, batch)[0])


def test_a_model_of_two_dtypes() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = nn.Linear(4, 4), nn.Linear(4, CLASSES).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.high(self.low(x.float()).tanh().double())

    function = ModelFunction(Two(), ClassTask(), ("*",), CPU)
    batch = (torch.randn(COUNT, 4), torch.arange(COUNT) % CLASSES)
    found = hooks.gradients(function, function.losses, batch, frozenset(function.params))[0]
    torch.testing.assert_close(found, loop.gradients(function, function.losses, batch)[0], rtol=1e-5, atol=1e-6)
    assert found.dtype == torch.float64


def test_users_hooks_see_and_change_what_they_did_without_ours() -> None:
    function, problem = make("linear")
    problem.model.body[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    problem.model.body[0].register_forward_hook(lambda module, args, output: output.square())
    batch = problem.batch(COUNT, torch.float64)
    technique = choose(function, function.losses, batch)
    assert isinstance(technique, hooks.Hooks)
    assert technique.names == set(function.params)
    found = technique(function, function.losses, batch)[0]
    torch.testing.assert_close(found, loop.gradients(function, function.losses, batch)[0])
    assert len(problem.model.body[0]._forward_hooks) == 1


# ---- what falls back -----------------------------------------------------------------------------------------------


def test_what_falls_back_is_said(second_pass: None, caplog: pytest.LogCaptureFixture) -> None:
    function, problem = make("transformer-block-positions")
    with caplog.at_level(logging.INFO, "stages"), evaluating(problem.model):
        choose(function, function.losses, problem.batch(COUNT, torch.float64))
    assert "gradients by layer hooks; by vmap for positions" in caplog.text


def test_a_second_pass_is_not_worth_it_on_a_small_model_that_vmap_can_do() -> None:
    function, problem = make("transformer-block-positions")
    with evaluating(problem.model):
        assert choose(function, function.losses, problem.batch(COUNT, torch.float64)) is vmap.gradients


@pytest.mark.parametrize(
    "table",
    [nn.Embedding(7, 4, max_norm=0.5), nn.Embedding(7, 4, scale_grad_by_freq=True), nn.Embedding(7, 4, sparse=True)],
    ids=["max-norm", "frequencies", "sparse"],
)
def test_embeddings_with_these_options_are_not_for_hooks(table: nn.Module) -> None:
    assert hooks.owners(ModelFunction(nn.Sequential(table), ClassTask(), ("*",), CPU)) == []


def test_a_model_that_is_mostly_its_own_parameters_is_done_without_hooks(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(Own(4, 20), nn.Linear(20, CLASSES)).double()
    function = ModelFunction(model, ClassTask(), ("*",), CPU)
    batch = (torch.randn(COUNT, 4, dtype=torch.float64), torch.arange(COUNT) % CLASSES)
    with caplog.at_level(logging.INFO, "stages"):
        assert choose(function, function.losses, batch) is vmap.gradients
    assert "gradients by vmap: layer hooks do not follow 0.weight, 0.bias" in caplog.text


class Stale(nn.Module):
    """Overwrites a layer's inputs after their use, unseen by autograd where a batch says so."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.clone()
        outputs = self.linear(inputs).exp()
        if x[0, 0] > 10:
            with torch.no_grad():
                inputs.zero_()
        return outputs


def test_inputs_that_change_after_use_never_give_wrong_gradients() -> None:
    model = Stale().double()
    function = ModelFunction(model, SquaredTask(), ("*",), CPU)
    x, targets = torch.randn(COUNT, 4, dtype=torch.float64), torch.zeros(COUNT, CLASSES, dtype=torch.float64)
    technique = choose(function, function.losses, (x, targets))
    assert isinstance(technique, hooks.Hooks)
    x = x.clone()
    x[0, 0] = 11
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        technique(function, function.losses, (x, targets))


class Routed(nn.Module):
    """Gives a layer those samples alone that have positive sums: all of them in some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        chosen = x.sum(1) > 0
        out = torch.zeros(len(x), CLASSES, dtype=x.dtype)
        out[chosen] = self.linear(x[chosen])
        return out


def test_a_batch_that_a_layer_sees_in_part_is_done_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    function = ModelFunction(Routed().double(), ClassTask(), ("*",), CPU)
    x, labels = torch.rand(COUNT, 4, dtype=torch.float64), torch.arange(COUNT) % CLASSES
    technique = choose(function, function.losses, (x, labels))
    assert isinstance(technique, hooks.Hooks)
    x[2] = -1
    with caplog.at_level(logging.INFO, "stages"):
        found = technique(function, function.losses, (x, labels))[0]
    assert "do not follow linear.bias, linear.weight there" in caplog.text
    torch.testing.assert_close(found, loop.gradients(function, function.losses, (x, labels))[0])
    assert not found[2].any()


# ---- the model stays as it was -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual-in-place", "encoder-layer", "shared-module"])
def test_no_hooks_are_left_and_nothing_is_changed(name: str, second_pass: None) -> None:
    function, problem = make(name)
    model = problem.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = problem.batch(COUNT, torch.float64)
    stage = GradZ(function, Data(batch), COUNT, "float32", DeviceBatch(4), lambda rows: rows)
    with evaluating(model):
        stage.prepare()
        stage.compute(stage.grid.block((0,)))
        found = stage.per_sample._technique
        assert isinstance(found, hooks.Hooks)
        with pytest.raises(ZeroDivisionError):
            found(function, lambda params, batch: function.losses(params, batch) / (1 // 0), batch)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_hooks_with_kwargs
        assert not module._forward_pre_hooks
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad and p.grad_fn is None for p in model.parameters())
