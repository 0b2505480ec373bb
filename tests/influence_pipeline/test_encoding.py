"""Half precision with a power of two for each row loses rounding and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from influence_pipeline.cache.encoding import convert, round_trip, scaled, scales

NORMAL = float(np.finfo(np.float32).tiny)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)
matrices = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=finite)


def row(largest: float, count: int = 1000) -> np.ndarray:
    """Return one row of entries of either sign down to a thousandth of the largest."""
    draw = np.random.default_rng(0)
    entries = draw.uniform(1e-3, 1, count) * draw.choice([-1, 1], count)
    entries[0] = 1
    return (entries * largest).astype(np.float32)[None]


@given(matrices)
def test_entries_that_are_not_tiny_keep_eleven_bits(rows: np.ndarray) -> None:
    error = np.abs(round_trip(rows, "float16").astype(np.float64) - rows)
    largest = np.abs(rows.astype(np.float64)).max(axis=1, keepdims=True)
    relative = 2.0**-11 * np.abs(rows.astype(np.float64))
    assert (error <= np.maximum(relative, 2.0**-38 * largest) + NORMAL * 2.0**-11).all()


@given(matrices)
def test_scales_are_powers_of_two_whose_inverses_are_normal(rows: np.ndarray) -> None:
    scale = scales(rows, "float16")
    found = np.empty(rows.shape, np.float16)
    convert(scaled(rows, scale, "float16"), found)
    assert scale.shape == (len(rows), 1)
    assert scale.dtype == np.float32
    mantissa, _ = np.frexp(scale)
    assert (mantissa == 0.5).all()
    assert (scale >= NORMAL).all()
    assert (1 / scale >= NORMAL).all()
    assert np.isfinite(found).all()


@given(matrices)
def test_a_row_does_not_depend_on_its_neighbours(rows: np.ndarray) -> None:
    together = round_trip(rows, "float16")
    for index in range(len(rows)):
        np.testing.assert_array_equal(round_trip(rows[index : index + 1], "float16")[0], together[index])


@given(matrices)
def test_encoding_what_was_decoded_changes_nothing(rows: np.ndarray) -> None:
    once = round_trip(rows, "float16")
    np.testing.assert_array_equal(round_trip(once, "float16"), once)


@given(matrices)
def test_float32_is_exact(rows: np.ndarray) -> None:
    assert round_trip(rows, "float32").tobytes() == rows.tobytes()


def test_zeros_stay_zeros_with_scale_one() -> None:
    rows = np.array([[0, 0, 0], [1, 0, -2]], np.float32)
    assert scales(rows, "float16")[0] == 1
    np.testing.assert_array_equal(round_trip(rows, "float16"), rows)


@pytest.mark.parametrize("exponent", [-37, -30, -20, -5, 0, 3, 10, 20, 30, 38])
def test_rows_of_every_magnitude_keep_eleven_bits(exponent: int) -> None:
    rows = row(10.0**exponent)
    error = np.abs(round_trip(rows, "float16") - rows.astype(np.float64))
    allowed = np.maximum(2.0**-11 * np.abs(rows.astype(np.float64)), 2.0**-149)
    assert (error <= allowed).all()


def test_a_row_at_the_end_of_float32_keeps_what_half_precision_can() -> None:
    rows = row(1e-38)
    error = np.abs(round_trip(rows, "float16") - rows.astype(np.float64))
    assert (error <= 2.0**-10 * 1e-38).all()
    assert np.isfinite(round_trip(np.full((1, 3), np.finfo(np.float32).max), "float16")).all()


def test_magnitudes_of_neighbouring_rows_do_not_mix() -> None:
    rows = np.concatenate([row(1e-30), row(1e30), row(1.0)])
    error = np.abs(round_trip(rows, "float16").astype(np.float64) - rows)
    assert (error <= 2.0**-11 * np.abs(rows.astype(np.float64)) * 1.001).all()
