"""Models as they come: ResNet, BERT, GPT-2, recurrent ones; and what is said of those that cannot be."""

from __future__ import annotations

import importlib
import logging
import sys
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import influence_pipeline as ip
from influence_pipeline.samples import DataSet
from stages.grad_z import hooks, loop, vmap
from stages.grad_z.choose import choose
from stages.parameters import evaluating
from tests.oracles import Case, Data, flat_grad, gradients, penalty, sample_losses

pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop because we have not yet implemented the batching rule"
)

COUNT, LENGTH, CLASSES, TOKENS = 8, 6, 3, 11
TINY = {"vocab_size": TOKENS, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def transformers() -> Any:
    return pytest.importorskip("transformers")


def resnet(width: int = 2, classes: int = CLASSES) -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "scripts")
        made: nn.Module = importlib.import_module("resnet").ResNet18(classes, width)
    return made


def bert() -> nn.Module:
    """BERT with its dropout, as its configuration makes it."""
    shape = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}
    config = transformers().BertConfig(**TINY, **shape, max_position_embeddings=LENGTH + 2, num_labels=CLASSES)
    made: nn.Module = transformers().BertForSequenceClassification(config)
    return made


def gpt2(**options: Any) -> nn.Module:
    """GPT-2: its embedding is its last layer too, its other layers are transposed."""
    shape = {"n_positions": LENGTH + 2, "n_embd": 4, "n_layer": 1, "n_head": 2}
    made: nn.Module = transformers().GPT2LMHeadModel(transformers().GPT2Config(**TINY, **shape, **options))
    return made


class Recurrent(nn.Module):
    """A recurrent layer, read at its last position."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(TOKENS, 3), kind(3, 4, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens))[0][:, -1])


class Encoder(nn.Module):
    """PyTorch's own transformer with a padding mask, and a table of positions that is looked up once for all."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(TOKENS, 4), nn.Embedding(LENGTH, 4)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), 1)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.head(self.body(x, src_key_padding_mask=tokens == 0)[:, 0])


def images() -> Any:
    return torch.randn(COUNT, 3, 8, 8, dtype=torch.float64), torch.arange(COUNT) % CLASSES


def padded(labels: bool) -> dict[str, Tensor]:
    """Sequences of different lengths with their masks."""
    mask = (torch.arange(LENGTH) < torch.tensor([LENGTH - i % 4 for i in range(COUNT)])[:, None]).long()
    found = {"input_ids": torch.randint(1, TOKENS, (COUNT, LENGTH)) * mask, "attention_mask": mask}
    return found | ({"labels": torch.arange(COUNT) % CLASSES} if labels else {})


def tokens() -> Any:
    return padded(labels=False)["input_ids"], torch.arange(COUNT) % CLASSES


def weighed() -> dict[str, Tensor]:
    return {**padded(labels=False), "token_weights": torch.rand(COUNT, LENGTH, dtype=torch.float64)}


CLASSIFY = ip.Classification(l2=0.01)
MODELS: dict[str, tuple[Callable[[], nn.Module], ip.Task, Callable[[], Any]]] = {
    "resnet": (resnet, CLASSIFY, images),
    "bert": (bert, CLASSIFY, lambda: padded(labels=True)),
    "gpt2": (gpt2, ip.LanguageModel(l2=0.01), lambda: padded(labels=False)),
    "gpt2-eager": (lambda: gpt2(attn_implementation="eager"), ip.LanguageModel(0.01, "sum"), weighed),
    "encoder": (Encoder, CLASSIFY, tokens),
    "lstm": (lambda: Recurrent(nn.LSTM), CLASSIFY, tokens),
    "gru": (lambda: Recurrent(nn.GRU), CLASSIFY, tokens),
}
_made: dict[str, Case] = {}


def make(name: str) -> Case:
    """Make a case in double precision, with weights and statistics that are not those of a new model."""
    if name not in _made:
        model, task, data = MODELS[name]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(len(name))
            case = Case(name, model().double(), task, Data(data()))
            for parameter in case.model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
            if name == "resnet":
                case.model.train()(2 * images()[0])
            case.model.eval()
        _made[name] = case
    return _made[name]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


# ---- right answers ---------------------------------------------------------------------------------------------------

BY_HOOKS = ("resnet", "bert", "gpt2", "gpt2-eager")
BY_VMAP = ("resnet", "gpt2-eager", "encoder")


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_one_sample_at_a_time(name: str) -> None:
    """By the technique that is chosen, which is layer hooks for all parameters where it can be."""
    case, function = make(name), make(name).function
    with evaluating(case.model):
        expected_BD = gradients(case)
        technique = choose(function, function.losses, case.data.batch(range(COUNT)))
        for ids in (range(COUNT), range(1, 6), [LENGTH, *range(LENGTH - 1)], [3]):
            found_BD, _ = technique(function, function.losses, case.data.batch(ids))
            close(found_BD, expected_BD[list(ids)])
    if name in BY_HOOKS:
        assert isinstance(technique, hooks.Hooks)
        assert technique.names == set(function.params)
    assert (name in BY_VMAP) == (technique is vmap.gradients or getattr(technique, "other", None) is vmap.gradients)


@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_explicit_derivatives(name: str) -> None:
    case = make(name)
    vectors_TD = torch.randn(2, len(case.theta), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with evaluating(case.model):
        close(case.curvature("ggn").product(vectors_TD), ggn_products(case, vectors_TD))
        gradient_D = flat_grad(torch.stack(sample_losses(case)).mean(), case.parameters, again=True)
        hessian_TD = torch.stack([flat_grad(gradient_D @ vector, case.parameters) for vector in vectors_TD])
        close(case.curvature("hessian").product(vectors_TD), hessian_TD + penalty(case) * vectors_TD)


def ggn_products(case: Case, vectors_TD: Tensor) -> Tensor:
    """Return (1/N) Σ JᵢᵀAᵢJᵢ v + l2·v with explicit Jᵢ (K, D) and Aᵢ (K, K)."""
    total_TD = torch.zeros_like(vectors_TD)
    for i in range(len(case.data)):
        batch = case.data.batch([i])
        outputs = case.task.outputs(case.model, batch)
        rows_KD = torch.stack([flat_grad(entry, case.parameters) for entry in outputs.reshape(-1)])
        inner_KK = torch.autograd.functional.hessian(
            lambda o, batch=batch, like=outputs: case.task.losses(o.reshape(like.shape), batch).sum(),
            outputs.detach().reshape(-1),
        )
        total_TD += vectors_TD @ rows_KD.T @ inner_KK @ rows_KD
    return total_TD / len(case.data) + penalty(case) * vectors_TD


@pytest.mark.parametrize("name", ["resnet", "bert", "gpt2", "lstm"])
def test_a_run_solves_and_scores(name: str, tmp_path: Path) -> None:
    """Its solutions s have (H + λI) s = g by explicit products, and its scores are s·g / N."""
    case, damping = make(name), 1.0
    found = run(case.model, case.task, case.data, tmp_path, damping=damping, tolerance=1e-5)
    (vectors,) = tmp_path.glob("s_test/*/vectors")
    solutions_TD = torch.tensor(importlib.import_module("zarr").open_array(vectors, mode="r")[...]).double()
    with evaluating(case.model):
        grads_ND = gradients(case)
        close(ggn_products(case, solutions_TD) + damping * solutions_TD, grads_ND[:2], 1e-3)
    close(torch.tensor(found).double(), solutions_TD @ grads_ND.T / COUNT, 1e-4)


def run(
    model: nn.Module,
    task: ip.Task,
    data: Any,
    cache: Path,
    kind: Callable[[Any], Any] = lambda sample: sample,
    **solver: Any,
) -> np.ndarray:
    """Return the scores of the first two samples as tests, from the whole pipeline."""

    def sample(i: int) -> Any:
        batch = data.batch([i])
        if isinstance(batch, dict):
            return kind({key: value[0] for key, value in batch.items()})
        return kind(tuple(value[0] for value in batch))

    samples = [sample(i) for i in range(COUNT)]
    solver = {"solver": "cg", "damping": 1.0, "tolerance": 1e-4} | solver
    settings = ip.Settings(grad_z={"encoding": "float32"}, s_test=solver, runtime={"progress": False, "device": "cpu"})
    experiment = ip.Experiment(model=model, task=task, train=samples, tests={"holdout": samples[:2]})
    found: np.ndarray = ip.Pipeline(experiment, cache, settings).run()["holdout"].scores[:]
    return found


def test_resnet_at_its_full_width_is_torchvisions() -> None:
    with torch.device("meta"):
        model = resnet(64, 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_173_962
    names = [name for name, _ in model.named_parameters()]
    assert names[:4] == ["conv1.weight", "bn1.weight", "bn1.bias", "layer1.0.conv1.weight"]
    assert {"layer2.0.downsample.0.weight", "layer2.0.downsample.1.bias", "layer4.1.bn2.weight", "fc.bias"} < set(names)


# ---- batches of transformers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [UserDict, lambda entries: transformers().BatchEncoding(entries)])
def test_samples_of_transformers_are_mappings(kind: Callable[[Any], Any], tmp_path: Path) -> None:
    case = make("bert")
    expected = run(case.model, case.task, case.data, tmp_path / "dicts", tolerance=0.5)
    found = run(case.model, case.task, case.data, tmp_path / "others", kind, tolerance=0.5)
    np.testing.assert_array_equal(found, expected)


def test_lists_of_tokens_are_rows() -> None:
    samples = [{"input_ids": [i, 1, 2], "words": ["a", "b"], "labels": i} for i in range(3)]
    batch = DataSet(samples, "train").batch([0, 2])  # type: ignore[arg-type]
    assert batch["input_ids"].tolist() == [[0, 1, 2], [2, 1, 2]]
    assert batch["labels"].tolist() == [0, 2]


def test_mappings_within_samples_become_dicts() -> None:
    samples = [(transformers().BatchEncoding({"x": torch.ones(2) * i}), i) for i in range(3)]
    batch = DataSet(samples, "train").batch([0, 2])  # type: ignore[arg-type]
    assert type(batch[0]) is dict
    assert batch[0]["x"].tolist() == [[0, 0], [2, 2]]


# ---- language models -------------------------------------------------------------------------------------------------


def losses(task: ip.LanguageModel, batch: Any) -> Tensor:
    with torch.no_grad():
        return task.losses(task.outputs(make("gpt2").model, batch), batch)


def test_the_loss_of_a_sequence_is_that_of_transformers() -> None:
    """Which takes -100 for what does not count, and averages over a batch of one."""
    model, batch = make("gpt2").model, padded(labels=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[1, :3] = -100
    with torch.no_grad():
        expected = torch.stack([
            model(input_ids=ids[None], attention_mask=mask[None], labels=own[None]).loss
            for ids, mask, own in zip(batch["input_ids"], batch["attention_mask"], labels, strict=True)
        ])
    expected = expected.double()  # computed in single precision
    close(losses(ip.LanguageModel(), {**batch, "labels": labels}), expected, 1e-6)
    other = [i for i in range(COUNT) if i != 1]
    close(losses(ip.LanguageModel(), batch)[other], expected[other], 1e-6)
    counts = (labels[:, 1:] != -100).sum(1)
    close(losses(ip.LanguageModel(reduction="sum"), {**batch, "labels": labels}), expected * counts, 1e-6)


def test_token_weights_weigh_the_loss_of_their_token() -> None:
    batch = padded(labels=False)
    weights = torch.zeros(COUNT, LENGTH)
    weights[:, 0] = 7  # of the first token, which nothing predicts
    weights[:, 2] = 0.5
    only = batch["input_ids"].where(torch.arange(LENGTH) == 2, -100)
    alone = losses(ip.LanguageModel(), {**batch, "labels": only})
    close(losses(ip.LanguageModel(), {**batch, "token_weights": weights}), alone)
    close(losses(ip.LanguageModel(reduction="sum"), {**batch, "token_weights": weights}), alone / 2)


def test_batches_of_tokens_alone_or_with_labels() -> None:
    table = nn.Embedding(TOKENS, TOKENS)
    ids = torch.randint(0, TOKENS, (4, 5))
    expected = functional.cross_entropy(table(ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
    task = ip.LanguageModel()
    for batch in (ids, (ids,), (ids, ids), [ids, ids]):
        torch.testing.assert_close(task.losses(task.outputs(table, batch), batch), expected)
    nothing = (ids, torch.full_like(ids, -100))
    assert not task.losses(table(ids), nothing).any()


def test_what_does_not_fit_a_language_model_is_refused() -> None:
    task, ids = ip.LanguageModel(), torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ip.RequestError, match=r"targets \(B, S\) .* got \(2, 3\), \(2, 5\)"):
        task.losses(torch.zeros(2, 3), {"input_ids": ids})
    with pytest.raises(ip.RequestError, match=r"token_weights .* got \(2, 5, 3\), \(2, 5\), \(2, 4\)"):
        task.losses(torch.zeros(2, 5, 3), {"input_ids": ids, "token_weights": torch.ones(2, 4)})
    with pytest.raises(ip.RequestError, match="neither labels nor input_ids; it has \\('x',\\)"):
        task.losses(torch.zeros(2, 5, 3), {"x": ids})
    with pytest.raises(ip.RequestError, match='reduction must be "mean" or "sum", got \'none\''):
        ip.LanguageModel(reduction="none")  # type: ignore[arg-type]


def test_the_reduction_is_part_of_the_identity() -> None:
    mean, total = ip.LanguageModel().identity(), ip.LanguageModel(reduction="sum").identity()
    assert {key for key in mean if mean[key] != total[key]} == {"reduction"}


# ---- what is wrapped around models -----------------------------------------------------------------------------------


class Net(nn.Module):
    """Something around, or in the place of, its body."""

    def __init__(self, body: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.body = body or nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))

    def forward(self, x: Tensor) -> Any:
        return self.body(self.first(x))


SAMPLES = Data((torch.randn(COUNT, 4, generator=torch.Generator().manual_seed(0)), torch.arange(COUNT) % CLASSES))


def never(*arguments: Any) -> Any:
    raise AssertionError("compiled")


def compiled_inside(model: Net) -> nn.Module:
    model.body = torch.compile(model.body, backend=never)
    return model


WRAPPERS: dict[str, Callable[[Net], nn.Module]] = {
    "data parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend=never),
    "compiled inside": compiled_inside,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_what_is_wrapped_around_a_model_changes_nothing(wrap: Callable[[Net], nn.Module], tmp_path: Path) -> None:
    plain, inner = Net(), Net()
    inner.load_state_dict(plain.state_dict())
    expected = run(plain, CLASSIFY, SAMPLES, tmp_path / "plain", tolerance=0.5)
    found = run(wrap(inner), CLASSIFY, SAMPLES, tmp_path / "wrapped", tolerance=0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


class Output(dict[str, Tensor]):
    """As transformers return."""

    @property
    def logits(self) -> Tensor:
        return self["logits"]


class Named(Net):
    def forward(self, x: Tensor) -> Any:
        return Output(logits=super().forward(x))


def test_logits_are_taken_from_a_named_output_of_inputs_that_are_no_mapping(tmp_path: Path) -> None:
    assert run(Named(), CLASSIFY, SAMPLES, tmp_path).any()


# ---- what cannot be, and the change that mends it --------------------------------------------------------------------


class Tuple(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Hidden(Net):
    def forward(self, x: Tensor) -> Any:
        return {"last_hidden_state": super().forward(x)}


class Checkpointed(Net):
    reentrant, first_of_all = False, False

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.body, x if self.first_of_all else self.first(x), use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


class ReentrantFirst(Reentrant):
    """Whose gradients autograd would drop in silence."""

    first_of_all = True


class Demanding(Net):
    """As a model of transformers with gradient checkpointing switched on, in eval() mode."""

    def forward(self, x: Tensor) -> Any:
        return self.body(self.first(x).requires_grad_())


class Fused(Net):
    def forward(self, x: Tensor) -> Any:
        parts = self.first(x).view(-1, 1, 2, 2)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            mixed = functional.scaled_dot_product_attention(parts, parts, parts)
        return self.body(mixed.flatten(1))


class Deciding(Net):
    def forward(self, x: Tensor) -> Any:
        hidden = self.first(x)
        return self.body(2 * hidden if hidden.sum() > 0 else hidden)


def by_batch() -> nn.Module:
    return Net(nn.Sequential(nn.Linear(4, CLASSES), nn.BatchNorm1d(CLASSES, track_running_stats=False)))


CANNOT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tuple": (Tuple, r"got tuple: write a Task whose .* as in `return super\(\).outputs\(model, batch\)\[0\]`"),
    "mapping": (Hidden, r"got dict of last_hidden_state: write a Task .*batch\)\['last_hidden_state'\]`"),
    "checkpoint": (Checkpointed, r"needs derivatives .*: a layer is checkpointed, .* without torch.utils.checkpoint"),
    "reentrant": (Reentrant, "a layer is checkpointed, .* without torch.utils.checkpoint"),
    "reentrant first": (ReentrantFirst, r"Gradients will be None\n  .*test_models.*\na layer is checkpointed, .*"),
    "demanding": (Demanding, "needs derivatives .*: something calls requires_grad_.*disable_input_require_grads"),
    "fused": (Fused, r"needs derivatives .*: fused attention has no second derivative: .*\(sdpa_kernel\) out of"),
    "deciding": (Deciding, "differs by .* an `if` on values of the whole batch"),
    "batch norm": (by_batch, "body.1 normalises over the batch, .* track_running_stats=True, or with GroupNorm"),
}


@pytest.mark.parametrize(("model", "told"), CANNOT.values(), ids=CANNOT.keys())
def test_what_cannot_be_says_what_would_mend_it(model: Callable[[], nn.Module], told: str, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = model()
    with pytest.raises(ip.RequestError, match=f"(?s){told}"):
        run(made, CLASSIFY, SAMPLES, tmp_path)


class Asking(Net):
    """Looks at values, to no effect, and has a parameter that layer hooks do not follow."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Any:
        if x.abs().max() > 1000:
            raise ValueError("too large")
        return self.body(self.first(x) * self.scale)


def test_what_vmap_cannot_follow_is_logged_with_its_line(caplog: pytest.LogCaptureFixture) -> None:
    case = Case("asking", Asking(), CLASSIFY, SAMPLES)
    with caplog.at_level(logging.INFO, "stages"):
        technique = choose(case.function, case.function.losses, SAMPLES.batch(range(COUNT)))
    assert getattr(technique, "other", None) is loop.gradients
    assert "use torch.where there" in caplog.text
    assert f"at {__file__}, line " in caplog.text
    assert "if x.abs().max() > 1000:" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "stages"):
        choose(make("bert").function, make("bert").function.losses, make("bert").data.batch(range(COUNT)))
    assert caplog.messages == ["gradients by layer hooks"]


def test_layers_of_transformers_are_known_only_where_they_were_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    function = make("gpt2").function
    monkeypatch.delitem(sys.modules, "transformers.pytorch_utils")
    known = {name for owner in hooks.owners(function) for name in owner.names.values()}
    assert {name for name in function.params if "attn" in name or "mlp" in name}.isdisjoint(known)


def test_evaluating_leaves_everything_as_it_was() -> None:
    model = Recurrent(nn.LSTM)
    before = (torch.backends.cudnn.enabled, torch.backends.mha.get_fastpath_enabled())
    with evaluating(model):
        assert not torch.backends.cudnn.enabled
        assert not torch.backends.mha.get_fastpath_enabled()
    assert (torch.backends.cudnn.enabled, torch.backends.mha.get_fastpath_enabled()) == before
    with evaluating(Net()):
        assert torch.backends.cudnn.enabled == before[0]
