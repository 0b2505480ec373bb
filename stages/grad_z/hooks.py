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
from stages.coordinates import Entries, Kronecker, Map
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
            if not function.coordinates.separate:
                return out_BD.add_(rows), results
            for name, own in part.coordinates.columns.items():
                out_BD[:, function.coordinates.columns[name]] = rows[:, own]
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


@dataclass(frozen=True)
class Recorded:
    """What one forward and one backward pass gave.

    Attributes:
        calls: of layers, each with the gradients of its outputs; those without any are left out.
        values: (B,), what was differentiated.
        unfit: parameters that hooks cannot follow on this batch.
    """

    calls: list[tuple[Call, Tensor]]
    values: Tensor
    unfit: set[str]


def recorded(
    function: ModelFunction, values: Values, batch: Batch, names: frozenset[str], shared: frozenset[str] = frozenset()
) -> Recorded:
    """Run a forward and a backward pass with hooks on the layers of some parameters.

    Args:
        function: the model.
        values: what is differentiated.
        batch: the samples.
        names: the parameters.
        shared: those of them whose layers are called once for all samples alike.
    """
    owned = [owner for owner in owners(function) if names & set(owner.names.values())]
    params = {n: p.detach().requires_grad_() if n in names else p for n, p in function.params.items()}
    with torch.enable_grad(), recording(owned, size(batch), shared) as seen:
        results = values(params, batch)
    edges = [call.edge for call in seen.calls]
    grads: tuple[Tensor | None, ...] = ()
    if edges and results.requires_grad:
        grads = torch.autograd.grad(results.sum(), edges, allow_unused=True)
    for call in seen.calls:
        if call.inputs._version != call.version:
            seen.unfit.update(call.owner.names.values())
    known = [(call, grad) for call, grad in zip(seen.calls, grads, strict=False) if grad is not None]
    return Recorded(known, results.detach(), seen.unfit & names)


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
    found = recorded(function, values, batch, names, shared)
    out_BD = empty(function, size(batch))
    with torch.no_grad():
        fill(out_BD, function, found.calls, names - found.unfit)
    return out_BD, found.values, found.unfit


def jacobian(function: ModelFunction, batch: Batch, hooks: Hooks) -> tuple[Tensor, Tensor] | None:
    """Return each sample's Jacobian (B, K, D) and outputs (B, …), by a backward pass for each of their K entries.

    None where hooks do not follow every parameter on this batch.
    """
    count, names = size(batch), frozenset(function.params)
    if hooks.names != names:
        return None
    params = {n: p.detach().requires_grad_() for n, p in function.params.items()}
    with torch.enable_grad(), recording(owners(function), count, hooks.shared) as seen:
        outputs = function.outputs(params, batch)
        flat_BK = outputs.reshape(count, -1)
    if seen.unfit or not outputs.requires_grad or any(call.inputs._version != call.version for call in seen.calls):
        return None
    rows_BKD = empty(function, count, flat_BK.shape[1])
    edges = [call.edge for call in seen.calls]
    for entry in range(flat_BK.shape[1]):
        grads = torch.autograd.grad(flat_BK[:, entry].sum(), edges, allow_unused=True, retain_graph=True)
        with torch.no_grad():
            known = [(call, grad) for call, grad in zip(seen.calls, grads, strict=True) if grad is not None]
            fill(rows_BKD[:, entry], function, known, names)
    return rows_BKD, outputs.detach()


def formed(function: ModelFunction) -> int:
    """Return how many entries of one gradient are formed at once on the way to its coordinates."""
    known = {name: owner.layer for owner in owners(function) for name in owner.names.values()}
    maps = function.coordinates.maps
    if any(name not in known for name in maps):
        return function.entries
    never = {name for name, one in maps.items() if isinstance(one, Kronecker) and known[name].factors is not None}
    return max(function.size, *(function.params[name].numel() for name in maps if name not in never), 0)


def empty(function: ModelFunction, *lead: int) -> Tensor:
    """Return room for gradients, (*lead, D); zeros where several parameters are summed."""
    make = torch.empty if function.coordinates.separate else torch.zeros
    return make(*lead, function.size, dtype=function.dtype, device=function.device)


def fill(out_BD: Tensor, function: ModelFunction, calls: list[tuple[Call, Tensor]], names: frozenset[str]) -> None:
    """Write the gradients of parameters into their columns, summed over all calls; zero where there was none."""
    columns, maps, separate = function.coordinates.columns, function.coordinates.maps, function.coordinates.separate
    written: set[str] = set()
    for call, grads in calls:
        inputs = call.inputs.to(grads.dtype) if call.inputs.is_floating_point() else call.inputs
        for own, name in call.owner.names.items():
            if name not in names:
                continue
            target = out_BD[:, columns[name]]
            first = name not in written and separate
            shape = (len(out_BD), *function.params[name].shape)
            if first and isinstance(maps[name], Entries) and target.dtype == grads.dtype:
                call.owner.layer.write(call.owner.module, own, inputs, grads, target.view(shape))
            else:
                part = _coordinates(call, own, inputs, grads, out_BD.dtype, shape, maps[name])
                target.copy_(part) if first else target.add_(part)
            written.add(name)
    if separate:
        for name in names - written:
            out_BD[:, columns[name]] = 0


def _coordinates(
    call: Call, own: str, inputs: Tensor, grads: Tensor, dtype: torch.dtype, shape: tuple[int, ...], one: Map
) -> Tensor:
    """Return the coordinates of one parameter's gradients in one call, (B, size)."""
    factors = call.owner.layer.factors
    if isinstance(one, Kronecker) and own == "weight" and factors is not None:
        exact = inputs.to(dtype) if inputs.is_floating_point() else inputs
        found = factors(call.owner.module, exact, grads.to(dtype), one)
        if found is not None:
            return torch.bmm(*found).flatten(1)
    part = torch.empty(shape, dtype=grads.dtype, device=grads.device)
    call.owner.layer.write(call.owner.module, own, inputs, grads, part)
    return one.project(part.to(dtype))
