"""Targets that are drawn from a model's own distribution: for each sample by itself, with the right second moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import influence_pipeline as ip
from stages.draws import Draws

CPU = torch.device("cpu")
MANY = 20_000


def draws(ids: Sequence[int] = range(MANY), seed: int = 0) -> Draws:
    return Draws(seed, ids, CPU)


# ---- numbers -------------------------------------------------------------------------------------------------------


def test_a_samples_numbers_do_not_depend_on_its_batch() -> None:
    together, alone = draws(range(5)), draws([3])
    torch.testing.assert_close(together.uniform(2, 3)[3:4], alone.uniform(2, 3), rtol=0, atol=0)
    torch.testing.assert_close(together.normal(4)[3:4], alone.normal(4), rtol=0, atol=0)


def test_numbers_go_on_and_differ_between_samples_and_seeds() -> None:
    stream = draws(range(100))
    first, second, other = stream.uniform(3), stream.uniform(3), draws(range(100), 1).uniform(3)
    assert len(torch.cat([first, second, other]).unique()) == 900
    assert first.shape == (100, 3)
    assert draws(range(4)).uniform().shape == (4,)


def test_numbers_are_uniform_and_normal_and_independent() -> None:
    stream = draws()
    uniform, normal = stream.uniform(2), stream.normal(2)
    assert ((uniform > 0) & (uniform < 1)).all()
    counts, _ = np.histogram(uniform.numpy(), bins=20, range=(0, 1))
    assert (abs(counts - MANY / 10) < 5 * np.sqrt(MANY / 10)).all()
    columns = torch.cat([uniform * np.sqrt(12), normal], dim=1)
    torch.testing.assert_close(columns.T.cov(), torch.eye(4, dtype=torch.float64), rtol=0, atol=0.05)
    along = torch.corrcoef(torch.stack([normal[:-1, 0], normal[1:, 0]]))[0, 1]
    assert abs(float(along)) < 0.05
    assert abs(float((normal**4).mean()) - 3) < 0.3


# ---- tasks ---------------------------------------------------------------------------------------------------------


def logits(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


CASES: list[tuple[str, ip.Task, Tensor, Any]] = [
    ("classes", ip.Classification(), logits(1, 3), (torch.zeros(1, 2), torch.tensor([1]))),
    ("probabilities", ip.Classification(), logits(1, 3), (torch.zeros(1, 2), torch.full((1, 3), 1 / 3).double())),
    ("positions", ip.Classification(), logits(1, 3, 2), (torch.zeros(1, 2), torch.tensor([[1, 2]]))),
    ("a mapping", ip.Classification(), logits(1, 3), {"inputs": torch.zeros(1, 2), "labels": torch.tensor([1])}),
    ("numbers", ip.Regression(), logits(1, 3), (torch.zeros(1, 2), torch.zeros(1, 3).double())),
    ("one number", ip.Regression(), logits(1, 1), (torch.zeros(1, 2), torch.zeros(1).double())),
    ("tokens", ip.LanguageModel(), logits(1, 3, 4), torch.tensor([[1, 2, 3]])),
    ("tokens, summed", ip.LanguageModel(reduction="sum"), logits(1, 3, 4), (torch.tensor([[1, 2, 3]]),)),
    (
        "tokens of which one does not count",
        ip.LanguageModel(),
        logits(1, 4, 3),
        {"input_ids": torch.tensor([[1, 2, 0, 1]]), "labels": torch.tensor([[1, 2, -100, 1]])},
    ),
    (
        "weighted tokens",
        ip.LanguageModel(),
        logits(1, 4, 3),
        {"input_ids": torch.tensor([[1, 2, 0, 1]]), "token_weights": torch.tensor([[1.0, 0.5, 2.0, 0.0]])},
    ),
    (
        "weighted tokens, summed",
        ip.LanguageModel(reduction="sum"),
        logits(1, 3, 3),
        {"input_ids": torch.tensor([[1, 2, 0]]), "token_weights": torch.tensor([[1.0, 0.5, 3.0]])},
    ),
]


def repeated(batch: Any, count: int) -> Any:
    if isinstance(batch, dict):
        return {key: repeated(value, count) for key, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(repeated(value, count) for value in batch)
    return batch.expand(count, *batch.shape[1:])


@pytest.mark.parametrize(("task", "outputs", "batch"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_gradients_of_drawn_targets_have_the_hessian_as_their_second_moments(
    task: ip.Task, outputs: Tensor, batch: Any
) -> None:
    """In the outputs, so that the Fisher matrix is the Gauss-Newton matrix in expectation."""
    flat = outputs.flatten()
    hessian = torch.autograd.functional.hessian(lambda o: task.losses(o.view(outputs.shape), batch).sum(), flat)
    many = outputs.expand(MANY, *outputs.shape[1:]).clone().requires_grad_()
    drawn = task.sample(many.detach(), repeated(batch, MANY), draws())
    losses = task.sampled_losses(many, drawn)
    assert losses.shape == (MANY,)
    gradients = torch.autograd.grad(losses.sum(), many)[0].flatten(1)
    moments = gradients.T @ gradients / MANY
    torch.testing.assert_close(moments, hessian, rtol=0, atol=0.04 * float(hessian.abs().max()))
    torch.testing.assert_close(gradients.mean(0), torch.zeros_like(flat), rtol=0, atol=0.05)


@pytest.mark.parametrize(("task", "outputs", "batch"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_batch_with_drawn_targets_has_the_inputs_that_it_had(task: ip.Task, outputs: Tensor, batch: Any) -> None:
    class Given(torch.nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            found: Tensor = next(iter((*args, *kwargs.values())))
            return found

    drawn = task.sample(outputs, batch, draws([0]))
    torch.testing.assert_close(task.outputs(Given(), drawn), task.outputs(Given(), batch), rtol=0, atol=0)


def test_a_task_without_draws_is_refused_with_what_would_do() -> None:
    task = ip.Task.from_loss(torch.nn.functional.mse_loss, name="mse")
    with pytest.raises(ip.RequestError, match=r'_FromLoss.sample\(outputs, batch, generator\).*fisher = "empirical"'):
        task.sampling_identity()
    assert ip.Classification().sampling_identity() == {
        "sample": "influence_pipeline.Classification", "losses": "influence_pipeline.Classification"
    }  # fmt: skip
