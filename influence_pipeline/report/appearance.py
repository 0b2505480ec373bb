"""What a sample looks like: a picture, a text or named values; as the experiment's ``show`` says, else as it is.

Shapes: ``H`` rows and ``W`` columns of pixels, ``C`` channels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from influence_pipeline.experiment import Show
from influence_pipeline.task import LABEL_KEYS
from stages.stage import Array

CHANNELS = (1, 3, 4)
LEAST_SIDE = 4
"""Pixels; arrays with fewer rows or columns are no pictures."""
LEAST_FLAT = 64
"""Entries from which a vector may be a picture that was made flat."""
LARGEST_SIDE = 128
"""Pixels; larger pictures are made smaller."""
EXACT_PIXELS = 64 * 64
"""Up to so many pixels pictures are kept without loss; larger ones, without transparency, as photographs are."""
MOST_TEXT = 2000
"""Characters of a text, the rest is left out; of a value a tenth."""
MOST_VALUES = 64
"""Of a vector or a mapping."""
RELATED = 0.25
"""Correlation that neighbouring pixels have at least, for a flat vector to be taken for a picture."""


@dataclass(frozen=True)
class Picture:
    """An encoded picture.

    Attributes:
        data: the file's content.
        kind: "png" or "jpeg".
        size: width and height of what it shows, which may be larger.
    """

    data: bytes
    kind: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Text:
    """A text, cut where it is very long."""

    text: str


@dataclass(frozen=True)
class Values:
    """Values by name.

    Attributes:
        values: as people read them.
        names: of these; none for a plain vector.
        more: how many were left out.
    """

    values: tuple[str, ...]
    names: tuple[str, ...] = ()
    more: int = 0


@dataclass(frozen=True)
class Problem:
    """What stands in the place of a sample that cannot be shown."""

    text: str


Look = Picture | Text | Values | Problem


@dataclass(frozen=True)
class Range:
    """What values of pixels are between, black and white."""

    low: float
    high: float

    @classmethod
    def of(cls, arrays: Sequence[Array]) -> Range:
        """Return the range of some arrays: [0, 1] where they are within, bytes' where these are, else their own."""
        finite = [array[np.isfinite(array)] for array in arrays]
        low = min((float(array.min()) for array in finite if array.size), default=0.0)
        high = max((float(array.max()) for array in finite if array.size), default=1.0)
        if low >= 0 and high <= 1:
            return cls(0.0, 1.0)
        if all(array.dtype == np.uint8 for array in arrays):
            return cls(0.0, 255.0)
        return cls(min(low, 0.0), high)

    def applied(self, pixels: Array) -> Array:
        """Return pixels as numbers from 0 to 255; what is not finite is black."""
        if pixels.dtype == np.uint8 and (self.low, self.high) == (0.0, 255.0):
            return pixels
        share = (pixels.astype(np.float64) - self.low) / ((self.high - self.low) or 1.0)
        return (np.nan_to_num(share, nan=0.0).clip(0.0, 1.0) * 255).round().astype(np.uint8)


class Appearance:
    """How the samples of an experiment look. What pictures' values mean is learnt of a few samples."""

    def __init__(self, show: Show | None, few: Sequence[Any]) -> None:
        """Look at a few samples of the training set."""
        self._show = show
        arrays = []
        for sample in few:
            try:
                found = _main(sample) if show is None else show(sample)
            except Exception:  # noqa: BLE001 - it is told where the sample is shown
                continue
            array = _array(_picture_in(found) if isinstance(found, Mapping) else found)
            if array is not None:
                arrays.append(array)
        flat = [array for array in arrays if array.ndim == 1]
        self._square = show is None and bool(flat) and len(flat) == len(arrays) and are_square(flat)
        pictures = flat if self._square else [pixels for array in arrays if (pixels := _pixels(array)) is not None]
        self._range = Range.of(pictures)

    def __call__(self, sample: Any) -> Look:
        """Return what one sample looks like; a problem where ``show`` raises, or gives what cannot be shown."""
        if self._show is None:
            return self._default(_main(sample))
        try:
            found = self._show(sample)
            return Values((), ()) if isinstance(found, Mapping) and not found else self._given(found)
        except Exception as error:  # noqa: BLE001 - a user's function, and there are other samples
            return Problem(_cut(f"show raised {type(error).__name__}: {error}", MOST_TEXT // 4))

    def _given(self, found: Any) -> Look:
        """Return what something looks like that ``show`` returned."""
        if isinstance(found, Mapping):
            return named(found)
        look = self._look(found)
        return Problem(f"show returned {described(found)}: no image, text or mapping") if look is None else look

    def _default(self, inputs: Any) -> Look:
        """Return what a sample's inputs look like."""
        if isinstance(inputs, Mapping):
            return self._of_mapping(inputs)
        look = self._look(inputs)
        return Text(described(inputs)) if look is None else look

    def _of_mapping(self, entries: Mapping[Any, Any]) -> Look:
        """Return what a mapping's inputs look like: its picture, its text, its tokens, else all of its entries."""
        if (picture := _picture_in(entries)) is not None and (look := self._look(picture)) is not None:
            return look
        texts = {key: value for key, value in entries.items() if isinstance(value, str)}
        if len(texts) == 1:
            return Text(_cut(next(iter(texts.values())), MOST_TEXT))
        if texts:
            return named(texts)
        if (tokens := _array(entries.get("input_ids"))) is not None:
            mask = _array(entries.get("attention_mask"))
            return _tokens(tokens[mask != 0] if mask is not None and mask.shape == tokens.shape else tokens)
        return named({key: value for key, value in entries.items() if key not in LABEL_KEYS})

    def _look(self, value: Any) -> Look | None:
        """Return what an image, a text, a number or an array looks like; None for anything else."""
        if isinstance(value, str):
            return Text(_cut(value, MOST_TEXT))
        if _is_image(value):
            return self._of_image(value)
        array = _array(value)
        if array is None:
            return None
        if self._square and array.ndim == 1 and math.isqrt(array.size) ** 2 == array.size:
            side = math.isqrt(array.size)
            return encoded(Image.fromarray(self._range.applied(array.reshape(side, side))))
        if (pixels := _pixels(array)) is not None:
            return encoded(Image.fromarray(self._range.applied(pixels)))
        if array.ndim == 1 and array.dtype.kind in "iu":
            return _tokens(array)
        if array.ndim <= 1:
            shown = tuple(_number(entry) for entry in array.reshape(-1)[:MOST_VALUES])
            return Text(shown[0]) if array.ndim == 0 else Values(shown, more=array.size - len(shown))
        return None

    def _of_image(self, image: Any) -> Look | None:
        """Return what an image of PIL looks like; those whose values are no bytes are arrays."""
        if image.mode.startswith(("I", "F")):
            pixels = np.asarray(image, np.float64)
            return encoded(Image.fromarray(Range.of([pixels]).applied(pixels)))
        if image.mode not in {"L", "RGB", "RGBA"}:
            image = image.convert("RGBA" if image.mode in {"LA", "PA"} or "transparency" in image.info else "RGB")
        return encoded(image)


def encoded(image: Image.Image) -> Picture:
    """Return an image of mode L, RGB or RGBA as a file, made smaller where it is large."""
    size, file = image.size, io.BytesIO()
    if max(size) > LARGEST_SIDE:
        image = image.copy()
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    if image.mode == "RGBA" or image.width * image.height <= EXACT_PIXELS:
        image.save(file, "PNG")
        return Picture(file.getvalue(), "png", size)
    image.save(file, "JPEG", quality=85)
    return Picture(file.getvalue(), "jpeg", size)


def named(entries: Mapping[Any, Any]) -> Values:
    """Return what entries of a mapping look like."""
    shown = [(_cut(str(key), MOST_TEXT // 10), _value(value)) for key, value in list(entries.items())[:MOST_VALUES]]
    return Values(tuple(value for _, value in shown), tuple(key for key, _ in shown), len(entries) - len(shown))


def described(value: Any) -> str:
    """Say what something is of which no more can be shown."""
    if isinstance(value, (Tensor, np.ndarray)):
        kind = "tensor" if isinstance(value, Tensor) else "array"
        return f"{str(value.dtype).removeprefix('torch.')} {kind} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def are_square(vectors: Sequence[Array]) -> bool:
    """Say whether vectors are pictures that were made flat, which must be clear.

    So they are where all have one length, a square of a whole number; no entry is below zero; and entries are like
    those beside and below them in the square, and more so than like those half a row further on, as in a picture and
    in no series.
    """
    sizes = {vector.size for vector in vectors}
    size = sizes.pop()
    side = math.isqrt(size)
    if sizes or size < LEAST_FLAT or side**2 != size:
        return False
    squares = np.stack(vectors).astype(np.float64).reshape(-1, side, side)
    if not np.isfinite(squares).all() or squares.min() < 0:
        return False
    flat, half = squares.reshape(-1, size), side // 2
    beside = _correlation(squares[:, :, :-1], squares[:, :, 1:])
    below = _correlation(squares[:, :-1], squares[:, 1:])
    further = _correlation(flat[:, :-half], flat[:, half:])
    return min(beside, below) > RELATED and below > further + RELATED / 2


def _correlation(one: Array, other: Array) -> float:
    one, other = one.ravel() - one.mean(), other.ravel() - other.mean()
    sizes = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / sizes if sizes else 0.0


def _main(sample: Any) -> Any:
    """Return the inputs of a sample: its first entry, or itself where it has none."""
    if isinstance(sample, (tuple, list)) and sample and not isinstance(sample[0], Number):
        return sample[0]
    return sample


def _picture_in(entries: Mapping[Any, Any]) -> Any:
    """Return the first entry of a mapping that is a picture, None where none is."""
    for key, value in entries.items():
        array = None if key in LABEL_KEYS or isinstance(value, str) else _array(value)
        if _is_image(value) or (array is not None and array.dtype.kind in "fu" and _pixels(array) is not None):
            return value
    return None


def _is_image(value: Any) -> bool:
    return isinstance(value, Image.Image)


def _array(value: Any) -> Array | None:
    """Return real numbers as an array, None where something is none."""
    if isinstance(value, Tensor):
        if value.is_complex() or value.is_sparse or value.is_quantized or value.device.type == "meta":
            return None
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()
    if value is None or isinstance(value, (str, bytes, Mapping)) or _is_image(value):
        return None
    try:
        array = np.asarray(value)
    except ValueError:  # rows of different lengths
        return None
    return array if array.dtype.kind in "biuf" else None


def _pixels(array: Array) -> Array | None:
    """Return an array as (H, W) or (H, W, C), None where it is no picture."""
    shape = array.shape
    if array.ndim == 3 and shape[0] in CHANNELS and min(shape[1:]) >= LEAST_SIDE:
        array = np.moveaxis(array, 0, -1)
    elif array.ndim not in {2, 3} or min(shape[:2]) < LEAST_SIDE or (array.ndim == 3 and shape[2] not in CHANNELS):
        return None
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    return np.ascontiguousarray(array.astype(np.uint8) if array.dtype == bool else array)


def _tokens(ids: Array) -> Look:
    return Text(_cut(" ".join(map(str, ids.ravel().tolist())), MOST_TEXT))


def _value(value: Any) -> str:
    """Return a value of a mapping as people read it."""
    array = None if isinstance(value, (str, bool, np.bool_)) else _array(value)
    if array is not None and array.ndim == 0:
        return _number(array[()])
    if array is not None and array.ndim == 1 and array.size <= MOST_VALUES:
        return _cut(" ".join(map(_number, array)), MOST_TEXT // 10)
    plain = value is None or isinstance(value, (str, bool, np.bool_))
    return _cut(str(value), MOST_TEXT // 10) if plain else described(value)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} … ({len(text):,} characters)"
