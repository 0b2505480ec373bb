"""Corrected gradients, against the Newton step without each sample by dense matrices in double precision."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stages.device_batch import DeviceBatch
from stages.grad_z.hooks import Hooks
from stages.jacobian import jacobian, one_by_one
from stages.newton import Newton, correction
from stages.projection import Projection
from stages.s_test.cg import Cg
from stages.s_test.exact import Exact
from stages.s_test.identity import Identity
from stages.s_test.lissa import Lissa
from stages.s_test.solver import Solver
from stages.stage import StageError
from tests import oracles
from tests.oracles import CASES, Case, ClassTask, Data, SquaredTask
from tests.stages.test_projection import matrix_of

DAMPING = 0.05
SOLVERS = {"exact": Exact(damping=DAMPING), "cg": Cg(damping=DAMPING, tolerance=1e-9)}


class First:
    """The first samples of a data set, as one that got longer since."""

    def __init__(self, data: Data, count: int) -> None:
        self.batch, self.batches, self.stream, self._count = data.batch, data.batches, data.stream, count

    def __len__(self) -> int:
        return self._count


def newton(case: Case, solver: Solver, over: int | None = None, batch: int = 5) -> Newton:
    curvature = case.curvature(getattr(solver, "curvature", "ggn"), batch)
    if over is not None:
        curvature.samples = First(case.data, over)  # type: ignore[assignment]
    prepared = oracles.prepared(solver, curvature)
    return Newton(solver, curvature, prepared, case.data, 7, "float32", DeviceBatch(batch), lambda rows: rows)


def computed(stage: Newton) -> dict[str, np.ndarray]:
    """Compute all blocks."""
    blocks = [stage.compute(block) for block in stage.grid]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def assert_close(found: Any, expected: Tensor, within: float = 1e-6) -> None:
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=within * float(expected.abs().max()))


@pytest.mark.parametrize("solver", [*SOLVERS, "hessian"])
@pytest.mark.parametrize("case", CASES)
def test_products_with_corrected_gradients_are_those_of_the_newton_step(case: Case, solver: str) -> None:
    chosen, matrix, damping = SOLVERS.get(solver), oracles.ggn(case), DAMPING
    if chosen is None:
        matrix = oracles.hessian(case)
        damping += max(0.0, -float(torch.linalg.eigvalsh(matrix)[0]))
        chosen = Exact(damping=damping, curvature="hessian")
    whole, parts = matrix + damping * torch.eye(len(matrix)), oracles.sample_ggns(case)
    found = computed(newton(case, chosen))
    expected = oracles.corrected(whole, parts, oracles.gradients(case))
    assert_close(found["gradients"], expected)
    assert_close(found["norm"], expected.norm(dim=1))
    shares = torch.linalg.eigvals(torch.linalg.solve(len(parts) * whole, parts)).real.amax(1)
    assert_close(found["leverage"], shares)
    assert 0.01 < shares.max() < 1, "no leverage to speak of: this test shows nothing"
    assert found["residual"].max() < 1e-8


@pytest.mark.parametrize("case", CASES)
def test_every_way_to_the_jacobian_gives_the_same(case: Case) -> None:
    batch = case.data.batch(range(4))
    rows, outputs = one_by_one(case.function, batch)
    by_vmap, same = jacobian(case.function, batch)
    torch.testing.assert_close(by_vmap, rows)
    torch.testing.assert_close(same, outputs)


class Branching(nn.Linear):
    """A layer of its own kind, which asks for the value of a tensor: nothing but plain autograd follows it."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x if float(x.detach().sum()) < 1e9 else 2 * x, self.weight) + self.bias


def test_a_model_that_vmap_cannot_follow_is_done_sample_by_sample() -> None:
    torch.manual_seed(0)
    data = Data((torch.randn(9, 4, dtype=torch.float64), torch.randint(0, 3, (9,))))
    case = Case("branching", Branching(4, 3).double().eval(), ClassTask(0.03), data)
    stage = newton(case, SOLVERS["exact"])
    whole = oracles.ggn(case) + DAMPING * torch.eye(len(case.theta))
    expected = oracles.corrected(whole, oracles.sample_ggns(case), oracles.gradients(case))
    assert_close(computed(stage)["gradients"], expected)
    assert stage._jacobian is one_by_one


def test_projected_layers_are_done_by_their_hooks() -> None:
    case = oracles.make(oracles.mlp)
    projection = Projection(kind="kronecker", dim=16)
    stage = newton(replace(case, projection=projection, task=ClassTask(0.03)), SOLVERS["exact"])
    phi = matrix_of(stage.curvature.function.coordinates)
    parts = phi @ oracles.sample_ggns(case) @ phi.T
    whole = parts.mean(0) + (0.03 + DAMPING) * torch.eye(len(phi))
    found = computed(stage)
    assert_close(found["gradients"], oracles.corrected(whole, parts, oracles.gradients(case) @ phi.T))
    assert isinstance(stage._jacobian, partial)
    assert isinstance(stage._jacobian.keywords["hooks"], Hooks)
    assert "projection_fidelity" not in found


def test_a_sample_that_h_is_not_of_is_not_corrected() -> None:
    case, over = oracles.make(oracles.softmax_regression), 8
    first = Case("first", case.model, case.task, Data(tuple(part[:over] for part in case.data.tree)))
    found = computed(newton(case, SOLVERS["exact"], over))
    whole = oracles.ggn(first) + DAMPING * torch.eye(len(case.theta))
    expected = oracles.corrected(whole, oracles.sample_ggns(first), oracles.gradients(first))
    assert_close(found["gradients"][:over], expected)
    assert_close(found["gradients"][over:], oracles.gradients(case)[over:])
    assert (found["leverage"][over:] == 0).all()


def test_the_correction_is_that_of_the_general_inverse() -> None:
    generator = torch.Generator().manual_seed(0)
    inner = torch.randn(6, 4, 4, generator=generator, dtype=torch.float64)
    inner = inner + inner.mT  # indefinite: not every loss is convex
    root = 0.2 * torch.randn(6, 4, 2, generator=generator, dtype=torch.float64)
    middle = root @ root.mT  # singular, as of softmax outputs
    slopes = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    extra, leverage = correction(inner, middle, slopes)
    unit = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(slopes + extra, torch.linalg.solve(unit - inner @ middle, slopes))
    torch.testing.assert_close(leverage, torch.linalg.eigvals(inner @ middle).real.amax(1))


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_sample_without_which_a_direction_is_free_is_named() -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 1, dtype=torch.float64)
    inputs[:, 2] = 0
    inputs[4, 2] = 1.5  # nothing else says what this weight is
    case = Case("alone", nn.Linear(3, 1, bias=False).double().eval(), SquaredTask(), Data((inputs, targets)))
    with pytest.raises(StageError, match=r"training sample 4 has a leverage of 1.* larger damping or l2"):
        computed(newton(case, Exact(damping=0.0)))
    found = computed(newton(case, Exact(damping=0.01)))
    assert 0.9 < found["leverage"][4] < 1


def test_a_loss_without_a_second_derivative_is_named() -> None:
    class Root(SquaredTask):
        def losses(self, outputs: Tensor, batch: Any) -> Tensor:
            return (outputs - batch[1]).abs().pow(1.5).sum(1)

    torch.manual_seed(0)
    inputs = torch.randn(6, 3, dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double().eval()
    nn.init.zeros_(model.weight)  # so that outputs are 0 on every machine
    targets = torch.ones(6, 1, dtype=torch.float64)
    case = Case("root", model, Root(0.1), Data((inputs, targets)))
    stage = newton(case, Exact(damping=0.1))
    targets[5] -= 1
    with pytest.raises(StageError, match=r"training sample 5 has .* NaN or infinite"):
        computed(stage)


def test_losses_that_know_more_of_the_model_than_its_outputs_are_refused() -> None:
    class Penalised(ClassTask):
        def outputs(self, model: nn.Module, batch: Any) -> Tensor:
            self.penalty = model.weight.square().sum()
            return super().outputs(model, batch)

        def losses(self, outputs: Tensor, batch: Any) -> Tensor:
            return super().losses(outputs, batch) + self.penalty

    case = oracles.make(oracles.softmax_regression)
    stage = newton(Case("penalised", case.model, Penalised(0.03), case.data), SOLVERS["exact"])
    with pytest.raises(StageError, match="must depend on the model through the outputs alone"):
        stage.prepare()


@pytest.mark.parametrize(
    ("solver", "why"),
    [
        (Cg(sample=5), "sample = 5"),
        (Lissa(), 'solver = "lissa" is less precise'),
        (Identity(solver="identity"), 'solver = "identity" has no H'),
        (Cg(), ""),
        (Exact(), ""),
    ],
)
def test_solvers_say_why_they_cannot_be_corrected_with(solver: Solver, why: str) -> None:
    assert solver.uncorrectable().startswith(why)
    assert bool(solver.uncorrectable()) == bool(why)
