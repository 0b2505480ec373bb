from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stages import curvature as curvature_module
from stages import work
from stages.curvature import KEPT_PART, extreme_eigenvalues, few_random_signs, random_signs
from stages.jacobian import ggn_products
from stages.parameters import evaluating
from stages.stage import Progress
from stages.work import Work
from tests import oracles
from tests.oracles import CASES, Case, ClassTask, Data, make

KINDS = pytest.mark.parametrize("kind", ["hessian", "ggn"])
EXACT = {"rtol": 1e-10, "atol": 1e-12}
dense = functools.cache(oracles.dense)


def vectors_for(case: Case, count: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, len(case.theta), generator=generator, dtype=torch.float64)


def symmetric(eigenvalues: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    basis, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator).double())
    return basis @ torch.diag(eigenvalues.double()) @ basis.T


# ---- products ------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_the_dense_matrix(case: Case, kind: str) -> None:
    vectors = vectors_for(case)
    torch.testing.assert_close(case.curvature(kind).product(vectors), vectors @ dense(case, kind), **EXACT)


@KINDS
@pytest.mark.parametrize("case", CASES)
def test_products_with_unit_vectors_make_a_symmetric_matrix(case: Case, kind: str) -> None:
    matrix = case.curvature(kind, 64).product(torch.eye(len(case.theta), dtype=torch.float64))
    torch.testing.assert_close(matrix, matrix.T, **EXACT)
    torch.testing.assert_close(matrix, dense(case, kind), **EXACT)


@KINDS
@pytest.mark.parametrize("case", CASES)
def test_device_batches_do_not_change_products(case: Case, kind: str) -> None:
    vectors = vectors_for(case, 2)
    expected = case.curvature(kind, 64).product(vectors)
    for batch_size in (1, 4, 7):
        torch.testing.assert_close(case.curvature(kind, batch_size).product(vectors), expected, **EXACT)


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many vectors each call of ``vmap`` took at once."""
    seen: list[int] = []
    vmap = curvature_module.vmap

    def watched(function: Any) -> Any:
        def mapped(tangents: Any) -> Any:
            seen.append(len(next(iter(tangents.values()))))
            return vmap(function)(tangents)

        return mapped

    monkeypatch.setattr(curvature_module, "vmap", watched)
    return seen


@KINDS
@pytest.mark.parametrize("case", CASES)
def test_vectors_one_by_one_give_the_same_as_vectors_together(
    case: Case, kind: str, chunks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Work, "jacobian_pays", lambda self, vectors, together: False)
    vectors = vectors_for(case, 7)
    together = case.curvature(kind, 64).product(vectors)
    assert set(chunks) == {7}
    chunks.clear()
    monkeypatch.setattr(work, "TOGETHER", 1)
    one_by_one = case.curvature(kind, 64).product(vectors)
    assert not chunks
    torch.testing.assert_close(together, one_by_one, **EXACT)
    monkeypatch.setattr(work, "TOGETHER", 3 * max(len(case.theta), case.curvature(kind)._sizes(whole(case)).widest))
    in_chunks = case.curvature(kind, 64).product(vectors)
    assert set(chunks) == {3}
    torch.testing.assert_close(in_chunks, one_by_one, **EXACT)


# ---- by the Jacobian -----------------------------------------------------------------------------------------------


def whole(case: Case) -> Any:
    return case.data.batch(range(len(case.data)))


@pytest.fixture
def jacobians(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Multiply by the Jacobian wherever that is possible; how many samples' Jacobians were asked for at once."""
    seen: list[int] = []

    def watched(function: Any, batch: Any, vectors: Tensor, together: int, *way: Any) -> Tensor:
        seen.append(together)
        return ggn_products(function, batch, vectors, together, *way)

    monkeypatch.setattr(Work, "jacobian_pays", lambda self, vectors, together: self.outputs > 0)
    monkeypatch.setattr(curvature_module, "ggn_products", watched)
    return seen


@pytest.mark.parametrize("together", [1, 4, 100])
@pytest.mark.parametrize("case", CASES)
def test_products_by_the_jacobian_are_those_of_the_dense_matrix(
    case: Case, together: int, jacobians: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Work, "samples_together", lambda self, numbers: together)
    vectors = vectors_for(case)
    torch.testing.assert_close(case.curvature("ggn", 64).product(vectors), vectors @ dense(case, "ggn"), **EXACT)
    assert together in jacobians


class _Attending(nn.Module):
    """Tokens are embedded, attend to one another within their sample, and are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        mixed: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return self.head(mixed.mean(1))


def attending() -> Case:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 7, (6, 5), generator=generator)
    torch.manual_seed(0)
    model = _Attending().double().eval()
    return Case("attention", model, ClassTask(0.01), Data((tokens, torch.randint(0, 3, (6,), generator=generator))))


def test_attention_and_embeddings_have_the_same_products_by_the_jacobian(jacobians: list[int]) -> None:
    case = attending()
    vectors = vectors_for(case)
    with evaluating(case.model):
        expected = vectors @ dense(case, "ggn")
        torch.testing.assert_close(case.curvature("ggn", 6).product(vectors), expected, **EXACT)
    assert jacobians


class _LooksAtValues(nn.Module):
    """A model that ``vmap`` cannot follow, nor layer hooks if it has a parameter of its own."""

    def __init__(self, *, own: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(3)) if own else 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale * (1.0 if float(x.detach().abs().sum()) >= 0 else 2.0)


@pytest.mark.parametrize(("own", "tried"), [(True, 1), (False, 5)])
def test_a_model_that_vmap_cannot_follow_is_followed_by_hooks_or_linearised(
    own: bool, tried: int, jacobians: list[int]
) -> None:
    torch.manual_seed(0)
    case = Case("", _LooksAtValues(own=own).double(), ClassTask(0.1), make(oracles.mlp).data)
    curvature, vectors = case.curvature("ggn"), vectors_for(case)
    torch.testing.assert_close(curvature.product(vectors), vectors @ dense(case, "ggn"), **EXACT)
    assert len(jacobians) == tried, "two ways once, and then each batch; or one way once"


def test_a_jacobian_that_is_wrong_is_not_used(
    jacobians: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(curvature_module, "ggn_products", lambda f, b, v, n, *w: 1.01 * ggn_products(f, b, v, n, *w))
    case = make(oracles.mlp)
    vectors = vectors_for(case)
    torch.testing.assert_close(case.curvature("ggn").product(vectors), vectors @ dense(case, "ggn"), **EXACT)
    assert "without the Jacobian" in caplog.text


CONVOLUTIONS = Work(samples=32, outputs=10, dim=42_026, entries=42_026, formed=42_026, backward=3.0e6, widest=401_408)


def test_the_jacobian_pays_for_convolutions_and_many_vectors_only() -> None:
    assert CONVOLUTIONS.jacobian_pays(64, 2**22)
    assert not CONVOLUTIONS.jacobian_pays(1, 2**22)
    linear = Work(samples=32, outputs=10, dim=39_760, entries=39_760, formed=39_760, backward=8.0e4, widest=25_088)
    assert not linear.jacobian_pays(64, 2**22)
    assert not replace(CONVOLUTIONS, outputs=0).jacobian_pays(64, 2**22)


def test_a_jacobian_is_of_no_more_samples_than_fit_and_not_larger_than_the_vectors() -> None:
    assert CONVOLUTIONS.samples_together(2**22) == 2**22 // 420_260
    wide = Work(samples=32, outputs=10, dim=650, entries=650, formed=650, backward=3.0e6, widest=401_408)
    assert wide.samples_together(2**22) == 2**22 // 125_440, "what makes it is larger than the Jacobian"
    assert wide.samples_together(1) == wide.vectors_together(1) == 1
    assert CONVOLUTIONS.vectors_together(2**22) == 10
    assert CONVOLUTIONS.jacobian_pays(30, 1)
    assert not CONVOLUTIONS.jacobian_pays(29, 1), "a third of the vectors is smaller than ten of their rows"
    assert CONVOLUTIONS.jacobian_pays(29, 420_260)


@KINDS
@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("dim", [7, 42_026, 10**7])
@pytest.mark.parametrize("memory", [1, 2**20, 2**26, 2**31])
def test_products_take_a_quarter_of_the_memory_or_what_one_vector_takes(
    kind: str, itemsize: int, dim: int, memory: int
) -> None:
    numbers = work.together(dim, kind, memory, itemsize)
    arrays = work.ARRAYS[kind] * itemsize
    assert numbers == dim or dim < numbers <= work.TOGETHER
    assert numbers == dim or arrays * numbers <= memory / 4
    if dim < numbers < work.TOGETHER:
        assert arrays * (numbers + 1) > memory / 4, "no less than there is room for"


def test_work_is_counted_by_sizes() -> None:
    case = Case("", nn.Linear(4, 3).double(), ClassTask(), make(oracles.mlp).data)
    found = work.count(case.function, whole(case))
    assert (found.samples, found.outputs, found.dim) == (12, 3, 15)
    assert found.backward == 2 * 4 * 3


@KINDS
def test_products_over_some_samples_are_means_over_these(kind: str) -> None:
    case, ids = make(oracles.mlp), [7, 1, 4]
    part = Case("", case.model, case.task, Data(case.data.batch(ids)))
    vectors = vectors_for(case)
    expected = vectors @ dense(part, kind)
    torch.testing.assert_close(case.curvature(kind, 2).product(vectors, ids), expected, **EXACT)
    torch.testing.assert_close(case.curvature(kind).on(case.data.batch(ids))(vectors), expected, **EXACT)


@pytest.mark.parametrize(("memory", "forward_passes"), [(2**30, 0), (3 * 3 * 43 * 8 * KEPT_PART - 1, 2)])
def test_a_jacobian_that_fits_is_made_once_for_products_that_are_taken_again(
    memory: int, forward_passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Work, "kept_jacobian_pays", lambda self, together: True)
    case, ids = make(oracles.mlp), [1, 4, 7]
    curvature, vectors = case.curvature("ggn", 2, memory), vectors_for(case)
    expected = vectors @ dense(Case("", case.model, case.task, Data(case.data.batch(ids))), "ggn")
    product = curvature.over(ids)
    torch.testing.assert_close(product(vectors), expected, **EXACT)
    passes: list[int] = []
    case.model[0].register_forward_hook(lambda *_: passes.append(1))
    torch.testing.assert_close(product(vectors[:1]), expected[:1], **EXACT)
    assert len(passes) == forward_passes
    assert forward_passes or curvature.kept_bytes(len(ids)) >= 3 * 3 * 43 * 8


def test_hessians_are_not_multiplied_by_a_jacobian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Work, "kept_jacobian_pays", lambda self, together: True)
    case, ids = make(oracles.mlp), [1, 4, 7]
    curvature, vectors = case.curvature("hessian", 2), vectors_for(case)
    torch.testing.assert_close(curvature.over(ids)(vectors), curvature.product(vectors, ids), **EXACT)
    assert not curvature.kept_bytes(len(ids))


@pytest.mark.parametrize("case", CASES)
def test_gauss_newton_is_positive_semi_definite_and_equals_the_hessian_of_a_linear_model(case: Case) -> None:
    matrix = dense(case, "ggn")
    found = case.curvature("ggn").product(torch.eye(len(matrix), dtype=torch.float64))
    eigenvalues = torch.linalg.eigvalsh(found)
    assert eigenvalues[0] > -1e-12 * eigenvalues[-1]
    close = torch.allclose(found, case.curvature("hessian").product(torch.eye(len(matrix)).double()), atol=1e-10)
    assert close == (case.name in {"softmax-regression", "dict-batches"})


@KINDS
def test_products_of_selected_parameters_are_the_block_of_the_whole(kind: str) -> None:
    case = make(oracles.mlp)
    part = Case("", case.model, case.task, case.data, ("2.*",))
    vectors = vectors_for(case)[:, 25:]
    torch.testing.assert_close(part.curvature(kind).product(vectors), vectors @ dense(case, kind)[25:, 25:], **EXACT)


@KINDS
def test_l2_adds_its_weight_to_the_diagonal_by_glob(kind: str) -> None:
    case = make(oracles.mlp)
    vectors = vectors_for(case)
    without = Case("", case.model, ClassTask(0.0), case.data).curvature(kind).product(vectors)
    by_number = Case("", case.model, ClassTask(0.25), case.data).curvature(kind).product(vectors)
    torch.testing.assert_close(by_number, without + 0.25 * vectors, **EXACT)
    globs: dict[str, float] = {"2.bias": 0.5, "*.weight": 2.0, "*": 0.125}
    by_glob = Case("", case.model, ClassTask(globs), case.data).curvature(kind).product(vectors)
    weights = torch.cat([torch.full((n,), w) for n, w in ((20, 2.0), (5, 0.125), (15, 2.0), (3, 0.5))]).double()
    torch.testing.assert_close(by_glob, without + weights * vectors, **EXACT)


@KINDS
def test_losses_over_sequences_have_products_too(kind: str) -> None:
    class Sequences(ClassTask):
        def outputs(self, model: nn.Module, batch: Any) -> Tensor:
            return model(batch[0]).transpose(1, 2)

        def losses(self, outputs: Tensor, batch: Any) -> Tensor:
            return super().losses(outputs, batch).mean(1)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, 2, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (6, 4), generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    case = Case("", model, Sequences(0.01), Data((x, labels)))
    vectors = vectors_for(case)
    torch.testing.assert_close(case.curvature(kind, 4).product(vectors), vectors @ dense(case, kind), **EXACT)


@KINDS
def test_float32_products_are_right_to_rounding(kind: str) -> None:
    case = make(oracles.mlp)
    model = oracles.mlp().model.float()
    model.load_state_dict(case.model.state_dict())
    single = Case("", model, case.task, Data((case.data.tree[0].float(), case.data.tree[1])))
    vectors = vectors_for(case)
    found = single.curvature(kind).product(vectors.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), vectors @ dense(case, kind), rtol=1e-5, atol=1e-6)


def test_a_products_progress_ends_at_the_number_of_samples() -> None:
    case, seen = make(oracles.mlp), list[Progress]()
    case.curvature("ggn", 5).product(vectors_for(case, 1), report=seen.append)
    assert [(p.done, p.total) for p in seen] == [(5, 12), (10, 12), (12, 12)]


def halves(case: Case) -> tuple[range, range]:
    """Return two parts of the training set, which no batch of five ends with."""
    count = len(case.data)
    return range(count // 2), range(count // 2, count)


# ---- the objective's gradient ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_the_mean_one_with_the_penaltys(case: Case) -> None:
    expected = oracles.gradients(case).mean(0) + oracles.penalty(case) * case.theta
    curvature = case.curvature("ggn", 5)
    first, second = (curvature.gradient_sum(ids) for ids in halves(case))
    torch.testing.assert_close(curvature.gradient(first + second), expected, **EXACT)


def test_the_gradient_is_zero_at_an_optimum() -> None:
    torch.manual_seed(0)
    case = Case("", nn.Linear(4, 3).double(), ClassTask(0.1), make(oracles.softmax_regression).data)
    solver = torch.optim.LBFGS(case.parameters, max_iter=200, tolerance_grad=1e-13, tolerance_change=0)

    def closure() -> Tensor:
        solver.zero_grad()
        objective = torch.stack(oracles.sample_losses(case)).mean() + 0.05 * sum(
            p.square().sum() for p in case.parameters
        )
        objective.backward()
        return objective

    def norm() -> float:
        curvature = case.curvature("ggn")
        return float(curvature.gradient(curvature.gradient_sum(range(12))).norm())

    assert norm() > 0.1
    solver.step(closure)
    assert norm() < 1e-9


# ---- eigenvalues ---------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("case", CASES)
def test_the_mean_eigenvalue_is_the_mean_of_quadratic_forms_and_near_trace_over_dimension(
    case: Case, kind: str
) -> None:
    matrix, curvature = dense(case, kind), case.curvature(kind, 5)
    signs = random_signs(32, len(matrix), case.theta, seed=0)
    assert signs.abs().eq(1).all()
    first, second = (curvature.forms(signs, ids) for ids in halves(case))
    found = curvature.mean_eigenvalue(first + second)
    assert found == pytest.approx(float((signs @ matrix * signs).sum()) / 32 / len(matrix), rel=1e-9, abs=1e-12)
    # One probe's variance is twice the squared norm of what is off the diagonal (Hutchinson, 1990).
    error = (2 * (matrix - torch.diag(matrix.diagonal())).square().sum() / 32).sqrt() / len(matrix)
    assert abs(found - float(matrix.trace()) / len(matrix)) < 4 * error


def test_random_signs_depend_on_the_seed_and_have_the_type_of_what_they_are_like() -> None:
    like = torch.zeros((), dtype=torch.float64)
    first, again, other = (random_signs(3, 20, like, seed) for seed in (0, 0, 1))
    some = list(few_random_signs(3, 20, like, 0, together=2))
    assert [len(part) for part in some] == [2, 1]
    torch.testing.assert_close(torch.cat(some), first, rtol=0, atol=0)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == torch.float64


@KINDS
@pytest.mark.parametrize("case", CASES)
def test_extreme_eigenvalues_are_near_the_dense_ones(case: Case, kind: str) -> None:
    eigenvalues = torch.linalg.eigvalsh(dense(case, kind))
    found = extreme_eigenvalues(case.curvature(kind).product, len(eigenvalues), case.theta, seed=0, steps=24)
    spread = float(eigenvalues[-1] - eigenvalues[0])
    assert found[0] == pytest.approx(float(eigenvalues[0]), abs=0.01 * spread)
    assert found[1] == pytest.approx(float(eigenvalues[-1]), abs=0.01 * spread)


@pytest.mark.parametrize(
    "eigenvalues",
    [[0.0] * 6, [2.0] * 6, [-3.0] * 6, [-5.0, 0.0, 0.0, 0.0, 0.0, 1e-9], [1e-12, 1.0, 1e6], [7.0]],
    ids=["zero", "multiple", "negative", "rank two", "wide", "one"],
)
def test_extreme_eigenvalues_of_degenerate_spectra(eigenvalues: list[float]) -> None:
    matrix = symmetric(torch.tensor(eigenvalues, dtype=torch.float64))
    found = extreme_eigenvalues(lambda v: v @ matrix, len(matrix), matrix, seed=0)
    size = max(map(abs, eigenvalues))
    assert found[0] == pytest.approx(min(eigenvalues), abs=1e-6 * size)
    assert found[1] == pytest.approx(max(eigenvalues), abs=1e-6 * size)


def test_extreme_eigenvalues_lie_inside_the_spectrum_however_few_steps() -> None:
    matrix = symmetric(torch.linspace(-1, 3, 50))
    for steps in (1, 2, 5, 12):
        smallest, largest = extreme_eigenvalues(lambda v: v @ matrix, 50, matrix, seed=1, steps=steps)
        assert -1 - 1e-12 <= smallest <= largest <= 3 + 1e-12
