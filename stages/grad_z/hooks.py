"""Per-sample gradients of a whole batch by one backward pass, layer by layer.

Hooks record what goes into each layer; the gradient of the sum of all samples' values with respect to what comes out
of it has each sample's gradient in the sample's place, as long as samples do not influence one another. Of the two
together comes the gradient of every parameter for every sample (see :mod:`stages.grad_z.layers`).

Parameters that are used otherwise (a module's own ``nn.Parameter``, recurrent layers, ``nn.MultiheadAttention``)
are left to another technique.

Shapes: ``B`` samples in a batch, ``D`` coordinates.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from stages.batch import size
from stages.grad_z.layers import Layer, layer_of
from stages.grad_z.technique import Technique, Values
from stages.parameters import ModelFunction
from stages.stage import Batch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """A module that has selected parameters, with their names in the module and in the model."""

    module: nn.Module
    layer: Layer
    names: Mapping[str, str]


@dataclass(frozen=True)
class Call:
    """One call of a layer: its inputs, their version then, and where the gradient of its outputs is found."""

    owner: Owner
    inputs: Tensor
    version: int
    edge: GradientEdge


@dataclass
class Recording:
    """What hooks saw in one forward pass.

    Attributes:
        calls: in order.
        unfit: parameters, by name, of layers that were called on something else than one row for each sample.
    """

    calls: list[Call] = field(default_factory=list)
    unfit: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Hooks:
    """The technique: layers that are known by hooks, other parameters by another technique.

    Attributes:
        names: the parameters that are done by hooks.
        other: the technique for all others, and for a batch that layers are called on in another way.
        shared: those of ``names`` whose layers are called once for all samples alike.
    """

    names: frozenset[str]
    other: Technique
    shared: frozenset[str] = frozenset()

    def __call__(self, function: ModelFunction, values: Values, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return each sample's gradient (B, D) and value (B,)."""
        out_BD, results, unfit = gradients(function, values, batch, self.names, self.shared)
        if unfit:
            log.info("a batch without layer hooks, which do not follow %s there", ", ".join(sorted(unfit)))
            return self.other(function, values, batch)
        rest = [name for name in function.params if name not in self.names]
        if rest:
            fixed = {name: function.params[name] for name in self.names}
            part = function.part(rest)
            rows, _ = self.other(part, lambda params, batch: values({**fixed, **params}, batch), batch)
            columns = function.columns()
            for name, own in part.columns().items():
                out_BD[:, columns[name]] = rows[:, own]
        return out_BD, results


def owners(function: ModelFunction) -> list[Owner]:
    """List the modules whose selected parameters, each of them, belong to known layers alone."""
    selected = {id(p): name for name, p in function.model.named_parameters() if name in function.params}
    known: list[Owner] = []
    unknown: set[str] = set()
    for module in function.model.modules():
        own = {
            n: selected[id(p)]
            for n, p in module.named_parameters(recurse=False, remove_duplicate=False)
            if id(p) in selected
        }
        layer = layer_of(module)
        if layer is None or not set(own) <= {"weight", "bias"}:
            unknown |= set(own.values())
        elif own:
            known.append(Owner(module, layer, own))
    return [Owner(o.module, o.layer, {n: full for n, full in o.names.items() if full not in unknown}) for o in known]


@contextmanager
def recording(owned: list[Owner], count: int, shared: frozenset[str]) -> Iterator[Recording]:
    """Have hooks on modules record their calls on ``count`` samples, and take the hooks away afterwards.

    What layers with ``shared`` parameters give for all samples alike is spread over them: as every sample's own copy,
    so that it has a gradient for each.
    """
    seen = Recording()

    def hook_of(owner: Owner) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if not output.requires_grad:  # nothing that is differentiated comes of it
                return None
            inputs = next(iter((*args, *kwargs.values())))
            if shared & set(owner.names.values()):
                if inputs.ndim == 1:  # positions alone
                    inputs, output = inputs.unsqueeze(0), output.unsqueeze(0)
                if len(inputs) == 1:
                    inputs, output = (one.expand(count, *one.shape[1:]) for one in (inputs, output))
            if not owner.layer.takes(module, inputs, count):
                seen.unfit.update(owner.names.values())
                return None
            # Changing a view in place replaces its history; changing another tensor adds to it.
            result = output if output._base is None else output.clone()
            seen.calls.append(Call(owner, inputs.detach(), inputs._version, get_gradient_edge(result)))
            return result

        return hook

    with ExitStack() as hooks:
        for owner in owned:
            # First of the module's hooks, so that it sees what the layer itself returned.
            handle = owner.module.register_forward_hook(hook_of(owner), prepend=True, with_kwargs=True)
            hooks.callback(handle.remove)
        yield seen


def gradients(
    function: ModelFunction, values: Values, batch: Batch, names: frozenset[str], shared: frozenset[str] = frozenset()
) -> tuple[Tensor, Tensor, set[str]]:
    """Compute the gradients of some parameters by hooks.

    Args:
        function: the model.
        values: what is differentiated.
        batch: the samples.
        names: the parameters.
        shared: those of them whose layers are called once for all samples alike.

    Returns:
        Gradients (B, D), whose columns are not filled for other parameters than ``names`` less the last value;
        values (B,); and those of ``names`` that hooks cannot follow on this batch.
    """
    count = size(batch)
    owned = [owner for owner in owners(function) if names & set(owner.names.values())]
    params = {n: p.detach().requires_grad_() if n in names else p for n, p in function.params.items()}
    with torch.enable_grad(), recording(owned, count, shared) as seen:
        results = values(params, batch)
    edges = [call.edge for call in seen.calls]
    grads: tuple[Tensor | None, ...] = ()
    if edges and results.requires_grad:
        grads = torch.autograd.grad(results.sum(), edges, allow_unused=True)
    for call in seen.calls:
        if call.inputs._version != call.version:
            seen.unfit.update(call.owner.names.values())
    out_BD = torch.empty(count, function.size, dtype=function.dtype, device=function.device)
    with torch.no_grad():
        fill(
            out_BD,
            function,
            [(c, g) for c, g in zip(seen.calls, grads, strict=False) if g is not None],
            names - seen.unfit,
        )
    return out_BD, results.detach(), seen.unfit & names


def fill(out_BD: Tensor, function: ModelFunction, calls: list[tuple[Call, Tensor]], names: frozenset[str]) -> None:
    """Write the gradients of parameters into their columns, summed over all calls; zero where there was none."""
    columns = function.columns()
    written: set[str] = set()
    for call, grads in calls:
        inputs = call.inputs.to(grads.dtype) if call.inputs.is_floating_point() else call.inputs
        for own, name in call.owner.names.items():
            if name not in names:
                continue
            target = out_BD[:, columns[name]].view(len(out_BD), *function.params[name].shape)
            if name not in written and target.dtype == grads.dtype:
                call.owner.layer.write(call.owner.module, own, inputs, grads, target)
            else:
                part = torch.empty(target.shape, dtype=grads.dtype, device=target.device)
                call.owner.layer.write(call.owner.module, own, inputs, grads, part)
                target.copy_(part) if name not in written else target.add_(part)
            written.add(name)
    for name in names - written:
        out_BD[:, columns[name]] = 0
