"""What a technique for per-sample gradients is.

A technique is a function ``(function, values, batch) -> (gradients (B, D), values (B,))``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from stages.parameters import ModelFunction, Parameters
from stages.stage import Batch

Values = Callable[[Parameters, Batch], Tensor]
"""A value for each sample of a batch, (B,), as a function of the parameters."""

Technique = Callable[[ModelFunction, Values, Batch], tuple[Tensor, Tensor]]
