"""Checkpoints: several sets of weights of one model, from other seeds or saved along one training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from influence_pipeline.errors import InfluenceError, RequestError
from influence_pipeline.settings import check_name
from stages.grad_z.choose import describe

State = Mapping[str, Any]
WRAPPERS = ("module.", "_orig_mod.")
"""What names in a state begin with that was taken of a model inside of another one."""


@dataclass(frozen=True)
class Checkpoint:
    """One set of weights.

    Attributes:
        state: a state dict, the path of a file that ``torch.save`` made of one, or a function that returns one.
        weight: what the scores of these weights are multiplied by before all are summed: for TracIn the learning rate.
            None for the mean of all scores; one checkpoint has a weight where all have.
    """

    state: State | str | Path | Callable[[], State]
    weight: float | None = None


def checked(checkpoints: Any) -> dict[str, Checkpoint]:
    """Return checkpoints by name, whatever was given for each.

    Raises:
        RequestError: there are none, or one has a name, a state or a weight that cannot be, or only some have weights.
    """
    if not isinstance(checkpoints, Mapping):
        what = type(checkpoints).__name__
        raise RequestError(f'checkpoints must be weights by name, for example {{"seed0": "seed0.pt"}}, got {what}')
    if not checkpoints:
        raise RequestError("checkpoints is empty: name some, or leave it out, and the model's own weights count")
    found = {
        check_name(name, "checkpoints"): given if isinstance(given, Checkpoint) else Checkpoint(given)
        for name, given in checkpoints.items()
    }
    for name, checkpoint in found.items():
        state, weight = checkpoint.state, checkpoint.weight
        if isinstance(state, nn.Module) or not (isinstance(state, (Mapping, str, Path)) or callable(state)):
            raise RequestError(
                f"checkpoints: {name!r} must be a state dict, the path of one, a function that returns one, or an "
                f"ip.Checkpoint of these, got {type(state).__name__}"
            )
        real = isinstance(weight, Real) and not isinstance(weight, bool)
        if weight is not None and not (real and math.isfinite(weight) and weight):
            raise RequestError(f"checkpoints: the weight of {name!r} must be a finite number, not 0, got {weight!r}")
    without = [name for name, checkpoint in found.items() if checkpoint.weight is None]
    if 0 < len(without) < len(found):
        raise RequestError(
            f"checkpoints: {', '.join(map(repr, without))} without a weight, and others with one. Give each a weight, "
            "and the weighted sum of their scores is taken, or none, and their mean is"
        )
    return found


def loaded(model: nn.Module, name: str, checkpoint: Checkpoint) -> nn.Module:
    """Return a copy of a model with the weights of a checkpoint.

    Raises:
        RequestError: these cannot be read, are of another model, or are not finite.
    """
    state = _state(name, checkpoint.state)
    try:
        found = copy.deepcopy(model)
    except Exception as error:
        raise RequestError(f"checkpoints: the model cannot be copied ({type(error).__name__}: {error})") from error
    for prefix in WRAPPERS:
        if all(entry.startswith(prefix) for entry in state):
            state = {entry.removeprefix(prefix): value for entry, value in state.items()}
    try:
        found.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        inside = [entry for entry, value in state.items() if isinstance(value, Mapping)]
        hint = f". Is it in {inside[0]!r} of that? Give a function that returns it" if inside else ""
        raise RequestError(f"checkpoint {name!r} does not fit the experiment's model{hint}: {error}") from error
    for entry, parameter in found.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise RequestError(f"checkpoint {name!r}: {entry} has numbers that are not finite")
    return found


def _state(name: str, given: Any) -> dict[str, Any]:
    """Return a state dict, read or made where it is not given.

    Raises:
        RequestError: it cannot be, or is none.
    """
    where = ""
    if isinstance(given, (str, Path)):
        given, where = _read(name, Path(given)), f" ({given})"
    elif not isinstance(given, Mapping):
        given = _made(name, given)
    if not isinstance(given, Mapping) or not given or not all(isinstance(entry, str) for entry in given):
        raise RequestError(
            f"checkpoint {name!r}{where} is no state dict but {_shown(given)}: give what model.state_dict() returns"
        )
    return dict(given)


def _made(name: str, make: Callable[[], Any]) -> Any:
    """Call a function that makes a state dict.

    Raises:
        InfluenceError: what it raised of that kind.
        RequestError: it raised anything else.
    """
    try:
        return make()
    except InfluenceError:
        raise
    except Exception as error:
        raise RequestError(f"checkpoint {name!r}: its function raised {describe(error)}") from error


def _read(name: str, path: Path) -> Any:
    """Return what ``torch.save`` put into a file; nothing of it is run.

    Raises:
        RequestError: there is no such file, or it holds something else than tensors.
    """
    if not path.is_file():
        raise RequestError(f"checkpoint {name!r}: {path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise RequestError(
            f"checkpoint {name!r}: {path} cannot be read ({what}). It must be what torch.save made of "
            "model.state_dict(); otherwise give a function that returns that"
        ) from error


def _shown(given: Any) -> str:
    if isinstance(given, Tensor):
        return "a tensor"
    return f"{'an empty ' if isinstance(given, Mapping) and not given else 'a '}{type(given).__name__}"
