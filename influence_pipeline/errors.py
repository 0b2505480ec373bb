"""What can go wrong, each with the exit code of the command line.

1: the work failed, and trying again may help. 2: the request was wrong, and trying again will not.
"""

from __future__ import annotations

from influence_pipeline.location import Location


class InfluenceError(Exception):
    """Anything that this package refuses or fails at; its text says what, where, and what to do next."""

    exit_code = 1


class WorkError(InfluenceError):
    """The work failed: a disk, a worker, a data set that raised. What was finished is kept."""


class CacheDamaged(WorkError):
    """Something in the cache is not as it was written.

    Attributes:
        path: the folder of the group whose block is computed anew by the next run; None where that is not enough.
    """

    def __init__(self, message: str, path: Location | None = None) -> None:
        """Say what is damaged, and in which group."""
        super().__init__(message)
        self.path = path


class RequestError(InfluenceError):
    """The request was wrong: a bad setting, a missing file, a model or data that cannot be used."""

    exit_code = 2


class MissingStage(RequestError):
    """A stage was asked for before its inputs are complete."""


class CacheMismatch(RequestError):
    """The cache belongs to something else: other weights, other data, another format."""
