"""Rankings: the k largest of many scores, the same ones however the scores were cut into parts.

Shapes: ``T`` test samples, ``n`` training samples, ``k`` ranks.
"""

from __future__ import annotations

import numpy as np

from stages.stage import Array

NO_ID = -1
"""Fills ranks of a part that has fewer than k samples; its score is −inf, so it is never among the k of a whole."""


def top_k(scores_Tn: Array, ids: Array, k: int) -> tuple[Array, Array]:
    """Return ids (T, k) and scores (T, k) of the largest scores, largest first, equal ones by ascending id.

    Args:
        scores_Tn: scores, no NaN.
        ids: (n,), or (T, n) where every row has ids of its own.
        k: ranks; where n is less, the rest is filled with ``NO_ID`` and −inf.

    Returns:
        The ids, int64, and the scores.
    """
    tests, n = scores_Tn.shape
    found_ids = np.full((tests, k), NO_ID, np.int64)
    found = np.full((tests, k), -np.inf, scores_Tn.dtype)
    take = min(k, n)
    if take == 0:
        return found_ids, found
    least = np.partition(scores_Tn, n - take, axis=1)[:, n - take]
    for row in range(tests):
        candidates = np.flatnonzero(scores_Tn[row] >= least[row])
        row_ids = ids[candidates] if ids.ndim == 1 else ids[row, candidates]
        order = np.lexsort((row_ids, -scores_Tn[row, candidates]))[:take]
        found_ids[row, :take] = row_ids[order]
        found[row, :take] = scores_Tn[row, candidates[order]]
    return found_ids, found


def bottom_k(scores_Tn: Array, ids: Array, k: int) -> tuple[Array, Array]:
    """Return ids and scores of the smallest scores, smallest first, equal ones by ascending id; else as top_k."""
    found_ids, found = top_k(-scores_Tn, ids, k)
    return found_ids, -found
