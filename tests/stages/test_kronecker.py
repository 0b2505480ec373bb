"""``kfac`` and ``ekfac`` against the dense matrices that they stand for."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import influence_pipeline as ip
from stages import kronecker
from stages.draws import Draws
from stages.kronecker import factored
from stages.projection import Projection
from stages.s_test.ekfac import Ekfac
from stages.s_test.kfac import EigenbasisSolver, Kfac
from stages.s_test.solver import NotPositiveDefinite, Solution
from stages.stage import StageError, silent
from tests import oracles
from tests.oracles import CPU, Case, ClassTask, Data

SOLVERS: dict[str, type[EigenbasisSolver]] = {"kfac": Kfac, "ekfac": Ekfac}
EVERY = pytest.mark.parametrize("name", SOLVERS)


class Sequences(nn.Module):
    """A table with padding, a layer called twice at every position, and parameters that have no factors."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=0)
        self.inner = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.free = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        inner = torch.tanh(self.inner(self.table(ids)))
        return self.head((self.norm(self.inner(inner)) * self.free).mean(1))


def perceptron() -> Case:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return Case("perceptron", model, ip.Classification(0.03), Data(labelled(23, 4)))


def squares() -> Case:
    data = Data((torch.randn(23, 4, dtype=torch.float64), torch.randn(23, 2, dtype=torch.float64)))
    return Case("squares", nn.Sequential(nn.Linear(4, 3), nn.Softplus(), nn.Linear(3, 2)), ip.Regression(0.05), data)


def convolutions(height: int) -> Case:
    layers = [nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.Softplus(), nn.Flatten(2), nn.Conv1d(4, 3, 2)]
    width = 2 * math.ceil(height / 2) - 1
    model = nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(3 * width, 3))
    return Case(f"convolutions of {height} rows", model, ip.Classification(0.02), Data(labelled(19, 2, height, 4)))


def sequences(length: int) -> Case:
    ids = torch.randint(0, 7, (21, length))
    return Case(f"sequences of {length}", Sequences(), ip.Classification(0.02), Data((ids, torch.arange(21) % 3)))


class ByHand(nn.Module):
    """A layer whose weight is used without calling it, so that hooks do not follow it, and one that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(nn.functional.linear(x, self.first.weight, self.first.bias)))


def by_hand() -> Case:
    return Case("a layer that is not called", ByHand(), ip.Classification(0.02), Data(labelled(17, 4)))


def l2_of_weights() -> Case:
    return replace(
        perceptron(), name="l2 of weights alone", task=ip.Classification({"0.weight": 0.1, "2.weight": 0.05})
    )


def labelled(count: int, *shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, *shape, dtype=torch.float64), torch.randint(0, 3, (count,))


def cases() -> list[Case]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = [perceptron(), squares(), convolutions(6), convolutions(2), sequences(6), sequences(2)]
        made += [by_hand(), l2_of_weights()]
        return [replace(case, model=case.model.double().eval()) for case in made]


CASES = cases()
EACH = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
MLP = CASES[0]


def solve(solver: EigenbasisSolver, case: Case, rhs: Tensor, batch_size: int = 6, parts: int = 3) -> Solution:
    curvature = case.curvature("ggn", batch_size)
    solver.check_size(case.function, 2**30)
    return solver.start(curvature, oracles.prepared(solver, curvature, parts))(rhs, silent)


def drawn(case: Case, seed: int) -> Any:
    return lambda outputs, batch, i: case.task.sample(outputs, batch, Draws(seed, [i], CPU))


def error(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


# ---- against dense matrices ----------------------------------------------------------------------------------------


@EVERY
@EACH
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_solutions_are_those_of_the_dense_kronecker_factored_matrix(case: Case, fisher: str, name: str) -> None:
    rhs = oracles.gradients(case)[:5]
    draw = drawn(case, 3) if fisher == "sampled" else None
    expected = oracles.solution(oracles.second_moments(case, name, draw), 0.01, rhs)
    found = solve(SOLVERS[name](fisher=fisher, damping=0.01, seed=3), case, rhs)
    assert error(found.vectors, expected) < 1e-9
    assert found.residual.max() < 1e-12
    assert not found.iterations.any()


@EVERY
@EACH
def test_little_is_laid_out_at_once_and_nothing_changes(case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rhs = oracles.gradients(case)[:3]
    solver = SOLVERS[name](fisher="empirical", damping=0.01)
    expected = solve(solver, case, rhs, batch_size=100, parts=1).vectors
    monkeypatch.setattr(kronecker, "CHUNK", 40)
    torch.testing.assert_close(solve(solver, case, rhs, batch_size=7, parts=5).vectors, expected, rtol=1e-9, atol=1e-12)


@EVERY
def test_single_precision_is_near(name: str) -> None:
    case = CASES[2]
    rhs = oracles.gradients(case)[:4]
    expected = oracles.solution(oracles.second_moments(case, name), 0.01, rhs)
    single = Data(tuple(t.float() if t.is_floating_point() else t for t in case.data.tree))
    case = replace(case, model=copy.deepcopy(case.model).float(), data=single)
    found = solve(SOLVERS[name](fisher="empirical", damping=0.01), case, rhs.float())
    assert error(found.vectors, expected) < 1e-4
    assert found.residual.max() < 1e-6


# ---- what layers have ----------------------------------------------------------------------------------------------


def names(case: Case) -> list[tuple[str, ...]]:
    return [layer.names for layer in factored(case.function)]


def test_layers_that_have_factors_are_those_whose_weight_is_theirs_alone() -> None:
    assert names(MLP) == [("0.weight", "0.bias"), ("2.weight", "2.bias")]
    assert names(CASES[4]) == [("table.weight",), ("inner.weight", "inner.bias"), ("head.weight",)]
    assert names(l2_of_weights()) == [("0.weight",), ("2.weight",)]
    tied = oracles.make(oracles.tied)
    assert names(tied) == []
    assert names(replace(MLP, globs=("0.bias", "2.weight"))) == [("2.weight",)]


@pytest.mark.parametrize("positions", [1, 3])
def test_a_weight_that_lies_with_its_inputs_first_is_a_linear_layers(positions: int) -> None:
    """GPT-2's linear layer."""
    utils = pytest.importorskip("transformers.pytorch_utils")
    turned, plain = nn.Sequential(utils.Conv1D(3, 4)), nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        plain[0].weight.copy_(turned[0].weight.T)
        plain[0].bias.copy_(turned[0].bias)
    inputs, labels = labelled(15, positions, 4) if positions > 1 else labelled(15, 4)

    class Task(ip.Classification):
        def outputs(self, model: nn.Module, batch: Any) -> Tensor:
            return super().outputs(model, batch).reshape(len(batch[0]), -1)

    solver, found = Ekfac(fisher="empirical", damping=0.1), []
    for model in (turned, plain):
        case = Case("", model.double(), Task(), Data((inputs, labels)))
        weights, biases = torch.split(solve(solver, case, oracles.gradients(case)[:3]).vectors, [12, 3], dim=1)
        weights = weights.view(3, 4, 3).mT if model is turned else weights.view(3, 3, 4)
        found.append(torch.cat([weights.flatten(1), biases], dim=1))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_a_layer_called_on_something_else_than_samples_is_refused_with_its_name() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 8:
                x = x.repeat(2, 1)
            return self.layer(x)[: len(x) // (2 if len(x) > 8 else 1)]

    case = Case("", Folded().double(), ip.Classification(), Data(labelled(20, 4)))
    with pytest.raises(StageError, match=r"layer.bias, layer.weight: at training samples 0 to 19 .* no factors there"):
        solve(Kfac(fisher="empirical"), case, torch.zeros(1, 15), batch_size=64, parts=1)


def test_eigenvectors_of_layers_that_are_not_followed_any_more_are_refused() -> None:
    curvature = MLP.curvature("ggn")
    prepared = oracles.prepared(Kfac(), curvature)
    lost = Case("", MLP.model, MLP.task, MLP.data).curvature("ggn")
    lost.__dict__["hooks"] = replace(lost.hooks, names=frozenset())
    with pytest.raises(StageError, match=r"factors of 0.weight, 2.weight are cached, and layer hooks do not follow"):
        Ekfac().sums(lost, range(5), prepared, silent)


# ---- damping and evidence ------------------------------------------------------------------------------------------


@EVERY
def test_relative_damping_is_that_many_mean_eigenvalues(name: str) -> None:
    matrix, rhs = oracles.second_moments(MLP, name), oracles.gradients(MLP)[:3]
    solver = SOLVERS[name](fisher="empirical", damping={"relative": 0.3})
    prepared = oracles.prepared(solver, MLP.curvature("ggn"))
    mean = float(matrix.trace()) / len(matrix)
    assert float(prepared["mean_eigenvalue"]) == pytest.approx(mean, rel=1e-10)
    assert solver.resolved(prepared) == pytest.approx(0.3 * mean, rel=1e-10)
    assert error(solve(solver, MLP, rhs).vectors, oracles.solution(matrix, 0.3 * mean, rhs)) < 1e-9


def test_ekfac_keeps_the_trace_of_the_fisher_matrix() -> None:
    """Rotations keep the squares of gradients, whatever the eigenvectors are."""
    prepared = oracles.prepared(Ekfac(fisher="empirical"), CASES[4].curvature("ggn"))
    expected = float(oracles.gradients(CASES[4]).square().sum(1).mean())
    assert float(prepared["eigenvalues"].sum()) == pytest.approx(expected, rel=1e-10)


@EVERY
def test_zero_eigenvalues_without_damping_are_refused_with_a_damping_that_works(name: str) -> None:
    case = replace(MLP, task=ip.Classification())
    with pytest.raises(NotPositiveDefinite, match=r"Use damping = (\S+) or more\.") as caught:
        solve(SOLVERS[name](damping=0.0), case, torch.ones(1, 43))
    enough = float(str(caught.value).partition("Use damping = ")[2].split()[0])
    assert solve(SOLVERS[name](damping=enough), case, torch.ones(1, 43)).residual.max() < 1e-6
    assert solve(SOLVERS[name](damping=0.0), MLP, torch.ones(1, 43)).residual.max() < 1e-9  # l2 is there


@EVERY
def test_what_is_prepared_has_the_distance_from_an_optimum(name: str) -> None:
    found = oracles.prepared(SOLVERS[name](), MLP.curvature("ggn"))
    expected = oracles.gradients(MLP).mean(0) + oracles.penalty(MLP) * MLP.theta
    assert float(found["gradient_norm"]) == pytest.approx(float(expected.norm()), rel=1e-10)


@EVERY
def test_a_vector_does_not_depend_on_its_neighbours_and_zero_gives_zero(name: str) -> None:
    rhs = oracles.gradients(MLP)[:3] * torch.tensor([[1.0], [0.0], [1e-6]])
    solver = SOLVERS[name](damping=0.1)
    together = solve(solver, MLP, rhs)
    alone = torch.cat([solve(solver, MLP, row.unsqueeze(0)).vectors for row in rhs])
    torch.testing.assert_close(together.vectors, alone, rtol=1e-10, atol=0)
    assert not together.vectors[1].any()
    assert together.residual[1] == 0


# ---- draws ---------------------------------------------------------------------------------------------------------


@EVERY
def test_what_is_drawn_depends_on_the_seed_and_on_nothing_else(name: str) -> None:
    rhs = oracles.gradients(MLP)[:2]
    found = [
        solve(SOLVERS[name](damping=0.01, seed=seed), MLP, rhs, batch_size, parts).vectors
        for seed, batch_size, parts in ((0, 64, 1), (0, 5, 4), (1, 64, 1))
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    assert error(found[2], found[0]) > 0.01


def test_what_targets_are_drawn_of_is_named_where_a_task_has_no_draws() -> None:
    for case in (replace(MLP, task=ClassTask()), replace(MLP, task=ip.Task.from_loss(nn.functional.mse_loss, name=""))):
        with pytest.raises(Exception, match=r'fisher = "sampled" draws targets by \w+\.sample.*fisher = "empirical"'):
            case.function.sample(torch.zeros(1, 3), case.data.batch([0]), Draws(0, [0], CPU))


# ---- refusals ------------------------------------------------------------------------------------------------------


@EVERY
def test_projected_gradients_are_refused(name: str) -> None:
    case = replace(MLP, projection=Projection(dim=20))
    with pytest.raises(
        StageError, match=rf'solver = "{name}" needs the entries of weights, which \[grad_z\] projection'
    ):
        SOLVERS[name]().check_size(case.function, 2**30)


@EVERY
def test_a_model_without_layers_that_have_factors_is_refused(name: str) -> None:
    with pytest.raises(StageError, match=r"weight of its own, and first.weight, second.bias are none"):
        SOLVERS[name]().check_size(oracles.make(oracles.tied).function, 2**30)


@EVERY
def test_factors_that_do_not_fit_are_refused_with_the_largest(name: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 20_000))
    function = Case("", model.to_empty(device="cpu"), ip.Classification(), MLP.data).function
    with pytest.raises(
        StageError, match=r"factors of 2 layers, and runtime.memory is 2.0 GiB; 1.weight alone has .* 3.0 G"
    ):
        SOLVERS[name]().check_size(function, 2 * 2**30)
    SOLVERS[name]().check_size(function, 32 * 2**30)
