"""``s_test``: one step of LiSSA for 64 test samples, against as many plain products by double backward."""

from __future__ import annotations

from dataclasses import replace

import torch
import workload
from common import Bench, Row, Side, alternate
from torch import Tensor, nn
from torch.nn import functional

from influence_pipeline.context import Context


def plain_hessian(model: nn.Module, batch: list[Tensor], vector: list[Tensor]) -> tuple[Tensor, ...]:
    """Return H v by differentiating twice, over one batch."""
    parameters = list(model.parameters())
    loss = functional.cross_entropy(model(batch[0]), batch[1])
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    return torch.autograd.grad(gradients, parameters, vector)


def plain_ggn(model: nn.Module, batch: list[Tensor], vector: list[Tensor]) -> tuple[Tensor, ...]:
    """Return JᵀAJ v likewise: J v is the derivative of Jᵀu in u."""
    parameters = list(model.parameters())
    outputs = model(batch[0])
    cotangent = torch.zeros_like(outputs, requires_grad=True)
    transposed = torch.autograd.grad(outputs, parameters, cotangent, create_graph=True)
    (tangent,) = torch.autograd.grad(transposed, cotangent, vector, retain_graph=True)
    leaf = outputs.detach().requires_grad_()
    (inner,) = torch.autograd.grad(functional.cross_entropy(leaf, batch[1]), leaf, create_graph=True)
    (curved,) = torch.autograd.grad(inner, leaf, tangent)
    return torch.autograd.grad(outputs, parameters, curved)


PLAIN = {"ggn": plain_ggn, "hessian": plain_hessian}


def steps(bench: Bench, kind: str, minibatch: int, count: int) -> list[float]:
    """Return the seconds of one step for all test samples, and of one product after the other."""
    options = {"solver": "lissa", "damping": 0.1, "scale": 10.0, "curvature": kind}
    context = Context(workload.experiment(bench.size(4096, 16), {}), workload.settings(s_test=options))
    context.train.keep()
    curvature, model = context.curvature(len(context.train)), workload.trained_cnn()
    batch = context.train.batch(list(range(minibatch)))
    vectors_TD = torch.randn(count, context.dim, generator=torch.Generator().manual_seed(0))
    each = [list(context.function.unflatten(vector).values()) for vector in vectors_TD]

    def step() -> Tensor:
        with context.evaluating():
            gap = vectors_TD - curvature.on(batch)(vectors_TD) - 0.1 * vectors_TD
            return vectors_TD + gap / 10

    def one_after_the_other() -> list[tuple[Tensor, ...]]:
        return [PLAIN[kind](model, batch, vector) for vector in each]

    with context.evaluating():
        found = curvature.on(batch)(vectors_TD[:1])[0] - curvature.l2 * vectors_TD[0]
    expected = torch.cat([part.flatten() for part in PLAIN[kind](model, batch, each[0])])
    off = float((found - expected).norm() / expected.norm())
    assert off < 1e-3, f"{kind} products are {off:.1%} off"
    return alternate(bench, Side(step), Side(one_after_the_other))


def row(bench: Bench, name: str, minibatch: int, bar: float) -> Row:
    """Compare steps over a minibatch with the default curvature; in the note is the other kind, measured once."""
    count, minibatch = bench.size((64, minibatch), (2, 8))
    ours, theirs = steps(bench, "ggn", minibatch, count)
    hessian = steps(replace(bench, repeats=1), "hessian", minibatch, count)
    return Row(
        *(name, f"a LiSSA step, T = {count}, Gauss-Newton, minibatch {minibatch}"),
        *(f"{count} plain double-backward products", ours, theirs, "s", bar),
        note=f"Hessian: {hessian[1] / hessian[0]:.2f}x ({hessian[0]:.3g} against {hessian[1]:.3g} s)",
    )


ROWS = {
    "lissa_32": lambda bench: row(bench, "lissa_32", 32, 4),
    "lissa_512": lambda bench: row(bench, "lissa_512", 512, 1.5),
}
