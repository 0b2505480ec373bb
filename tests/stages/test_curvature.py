from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stages import curvature as curvature_module
from stages.curvature import extreme_eigenvalues, mean_eigenvalue
from stages.stage import Progress
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

    def watched(function: Any, chunk_size: int) -> Any:
        seen.append(chunk_size)
        return vmap(function, chunk_size=chunk_size)

    monkeypatch.setattr(curvature_module, "vmap", watched)
    return seen


@KINDS
def test_vectors_one_by_one_give_the_same_as_vectors_together(kind: str, chunks: list[int]) -> None:
    x = torch.randn(9000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    case = Case("", model, ClassTask(0.1), Data((x, (x.sum(1) > 0).long())))
    vectors = vectors_for(case, 3)
    one_by_one = case.curvature(kind, 9000).product(vectors)
    assert not chunks
    together = case.curvature(kind, 1000).product(vectors)
    assert set(chunks) == {16}
    torch.testing.assert_close(together, one_by_one, **EXACT)


@KINDS
@pytest.mark.parametrize("case", CASES)
def test_more_vectors_than_fit_together_are_cut_into_chunks(case: Case, kind: str, chunks: list[int]) -> None:
    vectors = vectors_for(case, 1500)
    found = case.curvature(kind, 64).product(vectors)
    assert max(chunks) < 1500
    torch.testing.assert_close(found, vectors @ dense(case, kind), **EXACT)


@KINDS
def test_products_over_some_samples_are_means_over_these(kind: str) -> None:
    case, ids = make(oracles.mlp), [7, 1, 4]
    part = Case("", case.model, case.task, Data(case.data.batch(ids)))
    vectors = vectors_for(case)
    expected = vectors @ dense(part, kind)
    torch.testing.assert_close(case.curvature(kind, 2).product(vectors, ids), expected, **EXACT)
    torch.testing.assert_close(case.curvature(kind).batch_product(case.data.batch(ids), vectors), expected, **EXACT)


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


# ---- the objective's gradient ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_the_mean_one_with_the_penaltys(case: Case) -> None:
    expected = oracles.gradients(case).mean(0) + oracles.penalty(case) * case.theta
    torch.testing.assert_close(case.curvature("ggn").gradient(), expected, **EXACT)


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

    assert case.curvature("ggn").gradient().norm() > 0.1
    solver.step(closure)
    assert case.curvature("ggn").gradient().norm() < 1e-9


# ---- eigenvalues ---------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("case", CASES)
def test_the_mean_eigenvalue_is_near_trace_over_dimension(case: Case, kind: str) -> None:
    matrix = dense(case, kind)
    found = mean_eigenvalue(case.curvature(kind).product, len(matrix), case.theta, seed=0)
    # One probe's variance is twice the squared norm of what is off the diagonal (Hutchinson, 1990).
    error = (2 * (matrix - torch.diag(matrix.diagonal())).square().sum() / 32).sqrt() / len(matrix)
    assert abs(found - float(matrix.trace()) / len(matrix)) < 4 * error


def test_the_mean_eigenvalue_of_a_diagonal_matrix_is_exact_and_probes_depend_on_the_seed() -> None:
    diagonal = torch.arange(10, dtype=torch.float64)
    assert mean_eigenvalue(lambda v: v * diagonal, 10, diagonal, seed=3) == pytest.approx(4.5, rel=1e-12)
    matrix = symmetric(diagonal)
    found = [mean_eigenvalue(lambda v: v @ matrix, 10, diagonal, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


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
