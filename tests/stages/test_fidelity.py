"""The receipt of an encoding: how near scores of gradients as they are kept are to those of the exact ones."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from influence_pipeline.cache.encoding import round_trip
from stages.grad_z.fidelity import PROBES, OfEncoding, probe_bytes, probes_within, spearman
from stages.stage import Array


def gradients(count: int = 300, dim: int = 700) -> Array:
    draw = np.random.default_rng(0)
    spread = np.exp(draw.normal(size=(count, 1)) + draw.normal(size=dim))
    return (draw.normal(size=(count, dim)) * spread).astype(np.float32)


@pytest.mark.parametrize("ties", [False, True])
def test_the_correlation_is_spearmans(ties: bool) -> None:
    draw = np.random.default_rng(1)
    first = draw.normal(size=200)
    second = first + draw.normal(size=200)
    if ties:
        first, second = np.round(first), np.round(second)
    assert spearman(first, second) == pytest.approx(spearmanr(first, second).statistic, abs=1e-12)
    assert spearman(first, np.zeros(200)) == 1


def test_figures_are_those_of_whole_products_however_rows_come() -> None:
    rows = gradients()

    def coarse(part: Array) -> Array:
        return np.round(part).astype(np.float32)

    exact, kept = rows[:16] @ rows.T, rows[:16] @ coarse(rows).T
    pairs = list(zip(exact, kept, strict=True))
    expected = [
        np.mean([spearmanr(a, b).statistic for a, b in pairs]),
        np.mean([len({*np.argsort(-a)[:30]} & {*np.argsort(-b)[:30]}) / 30 for a, b in pairs]),
    ]
    assert expected[0] < 0.9999
    fidelity = OfEncoding(coarse)
    for start in range(0, 300, 64):
        fidelity.take(rows[start : start + 64])
    np.testing.assert_allclose(fidelity.figures(), expected, atol=1e-5)


@pytest.mark.parametrize(("encoding", "least"), [("float32", 1.0), ("float16", 0.99999), ("int8", 0.999)])
def test_encodings_keep_the_order_of_scores(encoding: str, least: float) -> None:
    fidelity = OfEncoding(lambda rows: round_trip(rows, encoding))
    fidelity.take(gradients())
    found, same = fidelity.figures()
    assert found >= least
    assert same > 0.97


def test_few_gradients_tell_nothing() -> None:
    fidelity = OfEncoding(lambda rows: rows)
    fidelity.take(gradients(9))
    assert np.isnan(fidelity.figures()).all()


def test_as_many_unprojected_gradients_are_held_as_there_is_memory_for() -> None:
    assert probes_within(1000, 4, 2**20) == PROBES
    assert probes_within(10**8, 4, 2**30) == 1
    assert probes_within(10**8, 4, 2**29) == 0
    assert probe_bytes(0, 10**8, 4) == 0
    for entries in (10**5, 10**6, 10**8):
        assert probe_bytes(probes_within(entries, 4, 2**24), entries, 4) <= 2**24
