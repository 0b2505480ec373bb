"""Settings: frozen, checked once where they are made, unknown keys refused; from TOML or by keyword.

A setting that changes results is part of the identity of the arrays that it changes. ``[runtime]`` changes none.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from influence_pipeline.errors import RequestError
from influence_pipeline.location import ObjectPath, located, without_secrets
from stages.numbers import Count, Fraction, Whole, no_switch
from stages.projection import Projection
from stages.s_test import solvers
from stages.s_test.cg import Cg
from stages.s_test.solver import RelativeDamping, Solver


def _named(given: Any) -> Any:
    """Take cg where no solver is named.

    Raises:
        ValueError: the name is no text.
    """
    if not isinstance(given, dict):
        return given
    if not isinstance(given.get("solver", ""), str):
        raise ValueError("solver must be a text, the name of one")
    return {"solver": "cg", **given}


if TYPE_CHECKING:
    AnySolver = Solver
else:
    AnySolver = Annotated[
        Union[tuple(solvers().values())],  # noqa: UP007 - of what is found
        Field(discriminator="solver"),
        BeforeValidator(_named),
    ]

BYTES = {"": 1, "B": 1} | {f"{p}iB": 2 ** (10 * n) for n, p in enumerate("KMGT", 1)} | {
    f"{p}B": 10 ** (3 * n) for n, p in enumerate("KMGT", 1)
}  # fmt: skip
"""Units of amounts of memory."""
MOST_BYTES = 2**60


def parse_bytes(value: Any) -> Any:
    """Read a number of bytes, or a text such as "2 GiB".

    Raises:
        ValueError: the text is no amount of bytes.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", value)
    if not match or match[2] not in BYTES:
        raise ValueError(f'{_show(value)} is no amount of memory: write a number of bytes, or for example "2 GiB"')
    amount = float(match[1]) * BYTES[match[2]]
    return int(min(amount, 2.0 * MOST_BYTES))


def check_path(value: Any) -> Any:
    """Refuse what names no file.

    Raises:
        ValueError: the path is empty, or has a NUL character.
    """
    if isinstance(value, (str, Path)) and (not str(value).strip() or "\0" in str(value)):
        raise ValueError("a path must not be empty, and has no NUL character")
    return value


CLUSTERS = {
    "dask": 'its scheduler, for example address = "tcp://10.0.0.1:8786"',
    "ray": 'its head, for example address = "10.0.0.1:6379", or "auto" on a machine of the cluster',
}
NO_PROCESSES = ("threading", "sequential", "multiprocessing")


def _of_processes(backend: str) -> str:
    """Refuse the backends of joblib whose workers would share a model, or what PyTorch began before a fork.

    Raises:
        ValueError: it is one of them.
    """
    if backend in NO_PROCESSES:
        raise ValueError(f"{backend!r} does not start processes of their own: use 'loky', or workers = 1")
    return backend


Bytes = Annotated[int, BeforeValidator(parse_bytes), BeforeValidator(no_switch), Field(gt=0, le=MOST_BYTES)]
AnyPath = Annotated[Path, BeforeValidator(check_path)]


def _located(given: Any) -> Any:
    return located(given) if isinstance(given, (str, Path)) else given


AnyLocation = Annotated[Path | ObjectPath, BeforeValidator(_located)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GradZSettings(_Section):
    """``[grad_z]``.

    Attributes:
        parameters: globs over the names of trainable parameters; what matches none is an error.
        projection: of the gradients to fewer coordinates; see :class:`~stages.projection.Projection`.
        encoding: how gradients are kept, "float16" scaled by row, "int8" scaled by row and group, or "float32".
        store: keep the gradients; false computes them again for every test set, for users without the disk.
    """

    parameters: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)
    projection: Projection | None = None
    encoding: Literal["float32", "float16", "int8"] = "float16"
    store: bool = True


class InfluenceSettings(_Section):
    """``[influence]``.

    Attributes:
        top_k: ranks kept for each test sample; the default is 500, or all where there are fewer samples.
        store_scores: keep every score (test, sample), not the rankings alone.
        correction: "newton" has scores tell what leaving a sample out does to H, too, by gradients that are corrected
            for it; by default they are of first order.
    """

    top_k: Count = 500
    store_scores: bool = True
    correction: Literal["newton"] | None = None


class EvaluateSettings(_Section):
    """``[evaluate]``: which models are trained again to see whether scores are right.

    Attributes:
        subsets: random subsets of the training set for the linear datamodeling score, 0 for none.
        share: of the training set that each of them keeps.
        leave_one_out: single samples that are left out, 0 for none.
        by: whether these are chosen at random, or are those with the largest mean size of scores.
        shares: of the training set for curves: without the most helpful, the most harmful or random samples, and with
            no more than the most helpful or random ones.
        seeds: of training, for each of these; what is measured is averaged over them.
        self_influence: where wrong labels are known, also how well they are found by self-influence, which has a
            solution for each training sample.
        seed: of what is chosen at random.
    """

    subsets: Whole = 100
    share: Fraction = 0.5
    leave_one_out: Whole = 0
    by: Literal["random", "influence"] = "random"
    shares: tuple[Fraction, ...] = ()
    seeds: Count = 3
    self_influence: bool = False
    seed: Whole = 0


class RuntimeSettings(_Section):
    """``[runtime]``: changes no result beyond the rounding of float32.

    Attributes:
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", …
        workers: processes that compute blocks at once; by default 1 on this machine, and all that a cluster has.
        backend: what starts them: "loky" on this machine; "dask" or "ray", a cluster that is there; or one that was
            registered with joblib.
        address: of the cluster: of dask's scheduler, or of ray's head.
        memory: what one process may hold at once for its work, beside model and data set.
        device_batch: samples on the device at once, for gradients and for curvature products.
        device_memory: what these may hold there; by default half of what a GPU has free, a quarter of ``memory`` on
            the CPU.
        progress: show progress bars.
        log_file: a file that gets a line for everything that happens.
    """

    device: str = "auto"
    workers: Count | None = None
    backend: Annotated[str, AfterValidator(_of_processes)] = "loky"
    address: str | None = None
    memory: Bytes = 2 * 2**30
    device_batch: Literal["auto"] | Count = "auto"
    device_memory: Literal["auto"] | Bytes = "auto"
    progress: bool = True
    log_file: AnyPath | None = None

    @property
    def on_cluster(self) -> bool:
        """Whether blocks are computed by workers that somebody else started."""
        return self.backend in CLUSTERS

    @property
    def processes(self) -> int:
        """How many processes compute blocks on this machine."""
        return 1 if self.on_cluster else self.workers or 1

    @model_validator(mode="after")
    def _addressed(self) -> RuntimeSettings:
        if self.on_cluster and not self.address:
            raise ValueError(f"backend = {self.backend!r} needs the address of {CLUSTERS[self.backend]}")
        if self.address and not self.on_cluster:
            raise ValueError(f"address is of a cluster, and backend = {self.backend!r} is none: use 'dask' or 'ray'")
        return self


class TestSelection(_Section):
    """``[tests.NAME]``: a further test set, cut out of one that the experiment has.

    Attributes:
        of: the experiment's test set; may be left out where there is only one.
        per_class: samples of each class.
        start: how many of each class to pass over first.
    """

    __test__ = False

    of: str | None = None
    per_class: Count
    start: Whole = 0


class Settings(_Section):
    """All settings of a pipeline.

    Attributes:
        experiment: "file.py:function"; a file is looked for beside the settings file.
        cache: the folder of the cache, beside the settings file where it is relative; or a URL.
        tests: further test sets by name.
        grad_z: see :class:`GradZSettings`.
        s_test: the solver's settings, chosen by ``solver``.
        influence: see :class:`InfluenceSettings`.
        evaluate: see :class:`EvaluateSettings`.
        runtime: see :class:`RuntimeSettings`.
    """

    experiment: str | None = None
    cache: AnyLocation | None = None
    tests: dict[str, TestSelection] = {}
    grad_z: GradZSettings = GradZSettings()
    s_test: AnySolver = Cg()
    influence: InfluenceSettings = InfluenceSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    runtime: RuntimeSettings = RuntimeSettings()

    @model_validator(mode="after")
    def _names(self) -> Settings:
        for name in self.tests:
            check_name(name, "tests")
        return self

    @model_validator(mode="after")
    def _correction(self) -> Settings:
        if self.influence.correction is not None:
            reason = self.s_test.uncorrectable()
            if not self.grad_z.store:
                reason = "corrected gradients are kept, and [grad_z] store = false keeps none"
            if reason:
                raise RequestError(f'influence.correction = "{self.influence.correction}": {reason}')
        return self

    def __init__(self, /, **values: Any) -> None:
        """Check the settings.

        Raises:
            RequestError: some setting is unknown or out of its range; all such are listed.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise RequestError(_explain(error)) from None

    @classmethod
    def from_toml(cls, path: str | Path) -> Settings:
        """Read settings from a TOML file; relative paths in it are relative to its folder.

        Raises:
            RequestError: the file is missing, is no TOML, or has a setting that is unknown or out of its range.
        """
        path = Path(path)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RequestError(f"{path}: no such file") from None
        except tomllib.TOMLDecodeError as error:
            raise RequestError(f"{path}: not valid TOML: {error}") from None
        except (OSError, ValueError, RecursionError) as error:
            # Beside the disk's: bytes that are no text, numbers and nesting that are beyond what Python reads.
            raise RequestError(f"{path}: cannot be read: {error}") from None
        try:
            settings = cls(**values)
        except RequestError as error:
            raise RequestError(f"{path}: {error}") from None
        return settings.relative_to(path.parent)

    def relative_to(self, folder: Path) -> Settings:
        """Return these settings with relative paths made relative to a folder."""
        changed: dict[str, Any] = {}
        if isinstance(self.cache, Path):
            changed["cache"] = Path(os.path.normpath(folder / self.cache))
        if self.experiment is not None and self.experiment.partition(":")[0].endswith(".py"):
            changed["experiment"] = os.path.normpath(folder / self.experiment)
        if self.runtime.log_file is not None:
            changed["runtime"] = self.runtime.model_copy(update={"log_file": folder / self.runtime.log_file})
        return self.model_copy(update=changed)


def check_name(name: Any, where: str) -> str:
    """Refuse a name that cannot be part of a folder's name.

    Raises:
        RequestError: the name has other characters than letters, digits, "_", "-" and ".", or begins with "-" or ".".
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", name):
        raise RequestError(
            f"{where}: {_show(name)} must be made of letters, digits, '_', '-' and '.', at most 64 of them, and begin "
            "with a letter, a digit or '_'"
        )
    return name


MOST_LINES = 20


def _explain(error: ValidationError) -> str:
    """List what is wrong, a line for each setting."""
    lines: dict[str, list[str]] = {}
    sections: tuple[type[BaseModel], ...] = (
        *(Settings, GradZSettings, Projection, InfluenceSettings, EvaluateSettings, RuntimeSettings, TestSelection),
        *solvers().values(),
    )
    known = {name for section in sections for name in section.model_fields} | {"relative"}
    for problem in error.errors():
        tests = problem["loc"][1:2] if problem["loc"][:1] == ("tests",) else ()
        unknown = problem["type"] == "extra_forbidden"
        last = problem["loc"][-1:] if unknown else ()
        place = ".".join(_key(part) for part in problem["loc"] if part in known or part in tests or part in last)
        message, found = (
            problem["msg"].removeprefix("Value error, ").replace("Input should ", "must "),
            problem["input"],
        )
        if unknown:
            close = difflib.get_close_matches(str(last[0]), _neighbours(problem["loc"]), 1)
            message = "unknown setting" + (f"; did you mean {close[0]!r}?" if close else "")
        elif problem["type"] == "union_tag_invalid":
            place, found = f"{place}.solver", found["solver"] if isinstance(found, dict) else found
            message = f"must be one of {problem['ctx']['expected_tags']} (found {_show(found)})"
        elif problem["type"] != "missing":
            message += f" (found {_show(found)})"
        lines.setdefault(place or "settings", []).append(message)
    wrong = f"{len(lines)} setting{'s are' if len(lines) > 1 else ' is'} wrong"
    shown = [f"  {place}: {'; or: '.join(messages)}" for place, messages in lines.items()]
    more = [f"  … and {len(shown) - MOST_LINES} more"] if len(shown) > MOST_LINES else []
    return "\n".join([wrong, *shown[:MOST_LINES], *more])


def _neighbours(place: tuple[str | int, ...]) -> Iterable[str]:
    """Return the settings that could be meant by an unknown one at this place."""
    if len(place) == 1:
        return Settings.model_fields
    if place[0] == "s_test":
        return solvers()[str(place[1])].model_fields if len(place) == 3 else RelativeDamping.model_fields
    if place[:2] == ("grad_z", "projection"):
        return Projection.model_fields
    sections: dict[Any, type[BaseModel]] = {
        "grad_z": GradZSettings, "influence": InfluenceSettings, "evaluate": EvaluateSettings,
        "runtime": RuntimeSettings, "tests": TestSelection,
    }  # fmt: skip
    return sections[place[0]].model_fields


def _key(part: str | int) -> str:
    """Write a key as TOML does: quoted where it is more than letters, digits, "_" and "-"."""
    return part if isinstance(part, str) and re.fullmatch(r"[A-Za-z0-9_-]+", part) else _show(part)


def _show(value: Any) -> str:
    """Show what was given, in a part of a line."""
    try:
        text = without_secrets(repr(value))
    except (ValueError, RecursionError):  # a number of thousands of digits, or endless nesting
        return f"a {type(value).__name__} too large to be shown"
    return text if len(text) <= 80 else f"{text[:77]}…"
