"""Results as files for other programs: JSON, CSV, NPY. A file appears when all of it is written, or not at all.

Shapes: ``T`` test samples, ``N`` training samples.
"""

from __future__ import annotations

import contextlib
import json
import math
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from influence_pipeline.errors import RequestError, WorkError

if TYPE_CHECKING:
    from influence_pipeline.influences import Influences

MOST_BYTES = 2**26
"""Of scores that are read at once, or a row of them."""
AS_OBJECTS = 2**22
"""Likewise where each becomes a Python number."""


def to_json(influences: Influences, path: Path | str, k: int | None = None) -> None:
    """Write what :meth:`Influences.to_json` says.

    Raises:
        RequestError: k is more than there are, or the path is none of a file in a folder.
        WorkError: the file cannot be written.
    """
    stored = influences.stored
    ranks = min(k or len(influences.train_ids), len(influences.train_ids) if stored else influences.ranks)
    labels, _ = influences.labels()
    row, seconds = 0, influences.seconds / len(influences)
    parts = influences.score_rows(AS_OBJECTS) if stored else ((rows, None) for rows in _bands(influences, AS_OBJECTS))
    with written(path) as file:
        file.write(b"{")
        for rows, part in parts:
            scores = [[]] * (rows.stop - rows.start) if part is None else part.tolist()
            harmful, _ = influences.rankings(rows, "harmful", ranks)
            helpful, _ = influences.rankings(rows, "helpful", ranks)
            columns = (influences.test_ids[rows].tolist(), scores, harmful.tolist(), helpful.tolist())
            for test, *found in zip(*columns, strict=True):
                entry = {
                    "label": None if labels is None else _label(float(labels[row])),
                    "num_in_dataset": row,
                    "time_calc_influence_s": seconds,
                    **dict(zip(("influence", "harmful", "helpful"), found, strict=True)),
                }
                file.write(f"{',' if row else ''}\n{json.dumps(str(test))}: {json.dumps(entry)}".encode())
                row += 1
        file.write(b"\n}\n")


def to_csv(influences: Influences, path: Path | str, k: int | None = None) -> None:
    """Write what :meth:`Influences.to_csv` says.

    Raises:
        RequestError: k is more than there are or were kept, or the path is none of a file in a folder.
        WorkError: the file cannot be written.
    """
    ranks = influences.ranks if k is None else k
    with written(path) as file:
        file.write(b"test_id,rank,kind,train_id,score\n")
        for rows in _bands(influences, MOST_BYTES):
            found = {"helpful": influences.rankings(rows, "helpful", ranks)}
            found["harmful"] = influences.rankings(rows, "harmful", ranks)
            for row, test in enumerate(influences.test_ids[rows].tolist()):
                for side, (ids, scores) in found.items():
                    cells = zip(ids[row].tolist(), scores[row].astype(str).tolist(), strict=True)
                    lines = [f"{test},{rank},{side},{i},{score}\n" for rank, (i, score) in enumerate(cells, 1)]
                    file.write("".join(lines).encode())


def to_npy(influences: Influences, path: Path | str) -> None:
    """Write what :meth:`Influences.to_npy` says.

    Raises:
        RequestError: scores were not stored, or the path is none of a file in a folder.
        WorkError: the file cannot be written.
    """
    descr = {"descr": "<f4", "fortran_order": False, "shape": influences.scores.shape}
    with written(path) as file:
        np.lib.format.write_array_header_1_0(file, descr)
        for _, scores in influences.score_rows(MOST_BYTES):
            file.write(scores.astype("<f4", order="C", copy=False).tobytes())


def _bands(influences: Influences, most_bytes: int) -> Iterator[slice]:
    """Yield the rows of test samples whose scores are so many bytes, or a row."""
    step = max(1, most_bytes // (4 * len(influences.train_ids)))
    return (slice(start, min(start + step, len(influences))) for start in range(0, len(influences), step))


def _label(label: float) -> int | float | None:
    if math.isnan(label):
        return None
    return int(label) if label.is_integer() else label


# ---- files that appear whole -----------------------------------------------------------------------------------------


def check_target(path: Path | str) -> Path:
    """Return where a file of this name is to be: behind a link, so that the link stays one.

    Raises:
        RequestError: there is no such folder, or the path is none of a file.
    """
    if "\0" in str(path):
        raise RequestError(f"{path!r} cannot be written: there is a zero byte in it")
    try:
        target = Path(path)
        if target.is_dir():
            raise RequestError(f"{path} cannot be written: it is a folder; name a file")
        if target.exists() and not target.is_file():
            return target  # a pipe or a device
        target = target.resolve()
        if not target.parent.is_dir():
            raise RequestError(f"{path} cannot be written: there is no folder {target.parent}; make it first")
    except (OSError, ValueError, RuntimeError) as error:
        raise RequestError(f"{path} cannot be written: {error}") from error
    return target


@contextmanager
def written(path: Path | str) -> Iterator[BinaryIO]:
    """Yield a file to write, which appears at its path after the ``with``; where that fails, all stays as it was.

    What is no plain file, a pipe or a device, is written as it comes.

    Raises:
        RequestError: there is no such folder, or the path is none of a file.
        WorkError: the disk refused.
    """
    target = check_target(path)
    aside = target.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        if target.exists() and not target.is_file():
            with target.open("wb") as file:
                yield file
            return
        with aside.open("xb") as file:
            yield file
        aside.replace(target)
    except OSError as error:
        raise WorkError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
