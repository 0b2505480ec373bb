"""SelfInfluence: what a user does with that result. Reads the cache; needs neither model nor data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from influence_pipeline.cache import Cache, Group
from influence_pipeline.errors import MissingStage
from influence_pipeline.influences import check_k, refuse_several
from influence_pipeline.location import Location
from stages.influence.ranking import top_k
from stages.stage import Array


@dataclass(frozen=True)
class SelfInfluence:
    """The influence of N training samples on their own losses, gᵢᵀ (H + λI)⁻¹ gᵢ / N.

    A value predicts the loss of a sample after training without it, minus what it is now: large where nothing else in
    the training set speaks for the sample, as of outliers and wrong labels.

    Attributes:
        ids: (N,) int64, the id of each training sample.
        values: (N,) float32, zero where a gradient is.
        residual: (N,) float64, the solver's evidence |g − (H + λI) x| / |g|.
        damping: λ, absolute.
        labels: (N,) float64, of training samples; None where gradients are not in the cache.
        path: the folder in the cache.
    """

    ids: Array
    values: Array
    residual: Array
    damping: float
    labels: Array | None
    path: Location

    @classmethod
    def open(cls, cache: Location | str, key: str | None = None) -> SelfInfluence:
        """Open the result in a cache; by its key where several are cached.

        Raises:
            MissingStage: nothing is cached, or it is not complete.
            RequestError: several are cached and none is chosen.
        """
        folder = Cache(cache)
        found = [group for group in folder.groups("self_influence") if key in (None, group.path.name)]
        first = "First: pipeline.self_influence(), or `influence-pipeline self-influence …`"
        if not found:
            what = f" with key {key}" if key else ""
            raise MissingStage(f"no self-influence{what} in {folder.path}. {first}")
        if len(found) > 1:
            whole = {group.path.name: group.attributes["identity"] for group in found}
            refuse_several(whole, f"results of self-influence in {folder.path}")
        group = found[0]
        missing = sum(group.whole(block) is None for block in group.layout.grid)
        if missing:
            raise MissingStage(
                f"self-influence in {group.path} is not complete: {missing} of {len(group.layout.grid)} blocks are "
                f"missing. {first}"
            )
        return cls.read(folder, group)

    @classmethod
    def read(cls, cache: Cache, group: Group) -> SelfInfluence:
        """Read a result that is complete; use :meth:`open` or a Pipeline."""
        names = ("train_ids", "self_influence", "residual", "damping")
        ids, values, residual, damping = (group.array(name)[:] for name in names)
        trained = cache.find("grad_z", group.attributes["reads"]["grad_z"])
        labels = None if trained is None else trained.array("label")[:]
        return cls(ids, values, residual, float(damping[0]), labels, group.path)

    def highest(self, k: int = 10) -> tuple[Array, Array]:
        """Return ids (k,) int64 and values (k,) float32, largest first; equal values by ascending id.

        Raises:
            RequestError: k is more than there are.
        """
        check_k(k, len(self.ids))
        ids, values = top_k(self.values[np.newaxis], self.ids, k)
        return ids[0], values[0]
