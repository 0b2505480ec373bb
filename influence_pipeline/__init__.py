"""Training data attribution with influence functions, as a disk-backed pipeline that resumes.

``import influence_pipeline as ip`` is all a user needs; names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from influence_pipeline.checkpoints import Checkpoint
    from influence_pipeline.errors import (
        CacheDamaged,
        CacheMismatch,
        InfluenceError,
        MissingStage,
        RequestError,
        WorkError,
    )
    from influence_pipeline.experiment import Experiment
    from influence_pipeline.influences import Influences
    from influence_pipeline.pipeline import Pipeline
    from influence_pipeline.samples import per_class
    from influence_pipeline.self_influences import SelfInfluence
    from influence_pipeline.settings import Settings
    from influence_pipeline.task import Classification, LanguageModel, Regression, Task

__version__ = "0.1.0"

_HOMES = {
    "CacheDamaged": "errors",
    "CacheMismatch": "errors",
    "Checkpoint": "checkpoints",
    "Classification": "task",
    "Experiment": "experiment",
    "InfluenceError": "errors",
    "Influences": "influences",
    "LanguageModel": "task",
    "MissingStage": "errors",
    "Pipeline": "pipeline",
    "Regression": "task",
    "RequestError": "errors",
    "SelfInfluence": "self_influences",
    "Settings": "settings",
    "Task": "task",
    "WorkError": "errors",
    "per_class": "samples",
}

__all__ = [
    "CacheDamaged",
    "CacheMismatch",
    "Checkpoint",
    "Classification",
    "Experiment",
    "InfluenceError",
    "Influences",
    "LanguageModel",
    "MissingStage",
    "Pipeline",
    "Regression",
    "RequestError",
    "SelfInfluence",
    "Settings",
    "Task",
    "WorkError",
    "per_class",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used.

    Raises:
        AttributeError: there is no such name.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted([*globals(), *__all__])
