"""The command line: ``influence-pipeline COMMAND EXPERIMENT.toml``.

Exit codes: 0 done; 1 the work failed, trying again may help; 2 the request was wrong, trying again will not;
130 or 143 interrupted by Ctrl-C or SIGTERM, progress kept.
"""

from __future__ import annotations

import functools
import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import numpy as np
import typer

import influence_pipeline as ip

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Training data attribution with influence functions: which training samples help, which harm.",
)

SettingsFile = Annotated[Path, typer.Argument(metavar="EXPERIMENT.toml", help="the settings file")]
TestNames = Annotated[list[str] | None, typer.Option("--tests", help="a test set; again for more; default all")]
New = Annotated[bool, typer.Option("--new", help="start training gradients anew beside others of the same set")]


class Terminated(BaseException):
    """SIGTERM came."""


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what goes wrong into a few lines and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        def terminate(number: int, frame: FrameType | None) -> None:
            raise Terminated

        before = signal.signal(signal.SIGTERM, terminate)
        try:
            command(*args, **kwargs)
        except ip.InfluenceError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(error.exit_code) from None
        except (KeyboardInterrupt, Terminated) as stop:
            typer.echo("interrupted: finished blocks are kept, the same command goes on from there", err=True)
            raise typer.Exit(130 if isinstance(stop, KeyboardInterrupt) else 143) from None
        except BrokenPipeError:
            sys.stderr.close()
            raise typer.Exit(0) from None
        except OSError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None
        finally:
            signal.signal(signal.SIGTERM, before)

    return run


@app.callback()
def _main() -> None:
    terminal = logging.StreamHandler()
    # Warnings, and how solvers fared; what a log file gets beyond that is for the file alone.
    terminal.addFilter(lambda record: record.levelno >= logging.WARNING or record.name.startswith("stages"))
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[terminal])
    logging.getLogger("stages").setLevel(logging.INFO)


@app.command()
@_guarded
def run(settings: SettingsFile, tests: TestNames = None, new: New = False) -> None:
    """Do all that is missing: grad_z, then s_test and influence of every test set."""
    pipeline = ip.Pipeline.from_toml(settings)
    for name, influences in pipeline.run(*tests or (), new=new).items():
        _summary(name, influences)


@app.command()
@_guarded
def plan(settings: SettingsFile, tests: TestNames = None) -> None:
    """Say what is cached, what is missing and what it would take; compute nothing."""
    typer.echo(ip.Pipeline.from_toml(settings).plan(*tests or ()))


@app.command("grad-z")
@_guarded
def grad_z(settings: SettingsFile, new: New = False) -> None:
    """Compute the gradient of every training sample."""
    outcome = ip.Pipeline.from_toml(settings).grad_z(new=new)
    typer.echo(f"grad_z: {outcome.computed} of {outcome.total} blocks computed in {outcome.seconds:.1f} s")


@app.command("s-test")
@_guarded
def s_test(settings: SettingsFile, tests: TestNames = None) -> None:
    """Solve (H + λI) x = ∇M for every test sample."""
    pipeline = ip.Pipeline.from_toml(settings)
    for name in tests or pipeline.tests:
        outcome = pipeline.s_test(name)
        typer.echo(f"s_test {name}: {outcome.computed} of {outcome.total} blocks computed in {outcome.seconds:.1f} s")


@app.command()
@_guarded
def influence(settings: SettingsFile, tests: TestNames = None) -> None:
    """Stream both, score and rank."""
    pipeline = ip.Pipeline.from_toml(settings)
    for name in tests or pipeline.tests:
        _summary(name, pipeline.influence(name))


@app.command()
@_guarded
def status(settings: SettingsFile) -> None:
    """List what is cached; needs neither model nor data."""
    from influence_pipeline.cache import STAGES, Cache
    from influence_pipeline.plan import show_bytes

    cache = Cache(_cache(settings))
    found = [(stage, group) for stage in STAGES for group in cache.groups(stage)]
    typer.echo(f"{cache.path}: " + (f"{len(found)} sets of arrays" if found else "nothing is cached"))
    for stage, group in found:
        done, total = group.progress()
        age = (time.time() - group.path.stat().st_mtime) / 3600
        size = show_bytes(group.bytes_on_disk())
        typer.echo(f"{stage:<10} {group.path.name:<28} {done:>6} / {total:<6} blocks  {size:>9}  {age:.1f} h old")
        typer.echo(f"{'':<11}{_brief(stage, group.attributes['identity'])}")
        for line in _receipts(group):
            typer.echo(f"{'':<11}{line}")


@app.command()
@_guarded
def show(
    settings: SettingsFile,
    tests: Annotated[str | None, typer.Option("--tests", help="the test set; default the only one cached")] = None,
    test: Annotated[int | None, typer.Option(help="row of one test sample; default the average over all")] = None,
    k: Annotated[int | None, typer.Option("-k", help="how many ids; default 10")] = None,
    key: Annotated[str | None, typer.Option(help="which results, where several are cached")] = None,
) -> None:
    """Print the most helpful and most harmful training ids; needs neither model nor data.

    Raises:
        RequestError: it is not clear of what, or there is no such test sample.
    """
    from influence_pipeline.cache import Cache

    folder = _cache(settings)
    names = sorted({group.attributes["tests"] for group in Cache(folder).groups("influence")})
    if tests is None:
        if len(names) != 1:
            raise ip.RequestError(f"--tests is needed; results are cached for: {', '.join(names) or 'nothing'}")
        tests = names[0]
    influences = ip.Influences.open(folder, tests, key)
    if test is not None and not 0 <= test < len(influences):
        raise ip.RequestError(f"--test {test}: {tests!r} has {len(influences)} test samples")
    _table(influences, test, min(10, len(influences.train_ids)) if k is None else k)


def _cache(path: Path) -> Path:
    settings = ip.Settings.from_toml(path)
    if settings.cache is None:
        raise ip.RequestError(f"{path}: cache is missing")
    return settings.cache


def _summary(name: str, influences: ip.Influences) -> None:
    """Print what came out for one test set."""
    k = min(10, len(influences.train_ids))
    typer.echo(f"\n{name}: {len(influences)} tests × {len(influences.train_ids)} training samples")
    typer.echo(", ".join(_evidence(influences)))
    _table(influences, None, k)


def _evidence(influences: ip.Influences) -> list[str]:
    """Say what speaks for the numbers, in pieces."""
    pieces = []
    if influences.damping is not None and influences.residual is not None:
        pieces += [f"λ = {influences.damping:.4g}", f"largest residual {influences.residual.max():.2g}"]
    if influences.gradient_norm is not None:
        pieces.append(f"|ḡ + l2·θ| = {influences.gradient_norm:.2g} (influence assumes an optimum, 0)")
    return pieces


def _table(influences: ip.Influences, test: int | None, k: int) -> None:
    (helpful, helps), (harmful, harms) = (
        (influences.helpful_on_average(k), influences.harmful_on_average(k))
        if test is None
        else tuple((ids[test], scores[test]) for ids, scores in (influences.helpful(k), influences.harmful(k)))
    )
    tests, trains = influences.labels()
    what = "on average over the tests"
    if test is not None:
        what = f"for test {influences.test_ids[test]}" + _label(tests, test)
    typer.echo(f"{'most helpful ' + what:<44}{'most harmful ' + what}")
    positions = {int(i): row for row, i in enumerate(influences.train_ids)}
    for left, right in zip(zip(helpful, helps, strict=True), zip(harmful, harms, strict=True), strict=True):
        cells = [f"{i:>8}  {score:+.3e}{_label(trains, positions[int(i)])}" for i, score in (left, right)]
        typer.echo(f"{cells[0]:<44}{cells[1]}")
    typer.echo(f"in {influences.path}")


def _label(labels: Any, row: int) -> str:
    if labels is None or labels[row] != labels[row]:
        return ""
    return f"  label {labels[row]:g}"


def _brief(stage: str, identity: dict[str, Any]) -> str:
    """Say in a line what a set of arrays is of."""
    if stage == "influence":
        return f"grad_z {identity['grad_z']}, s_test {identity['s_test']}, top_k {identity['top_k']}"
    parts = [f"train {identity['train']}", f"weights {identity['weights']}", f"loss {identity['task']['losses']}"]
    if stage == "grad_z":
        parts.append(identity["encoding"])
    if stage == "s_test":
        parts += [f"{name} {value}" for name, value in identity["s_test"].items()]
    if stage == "curvature":
        parts += [f"{name} {identity[name]}" for name in ("curvature", "l2")]
    return ", ".join(parts)


def _receipts(group: Any) -> Sequence[str]:
    """Say what was measured on the way, of what is there already."""
    lines = []
    numbers = {
        "gradient_norm": "distance from an optimum |ḡ + l2·θ| (influence assumes 0)",
        "mean_eigenvalue": "mean eigenvalue",
        "largest_eigenvalue": "largest eigenvalue",
    }
    for name, about in numbers.items():
        value = float(group.array(name)[()]) if name in group else math.nan
        if math.isfinite(value):
            lines.append(f"{about}: {value:.3g}")
    if "residual" in group:
        residual, iterations = group.array("residual")[:], group.array("iterations")[:]
        there = np.isfinite(residual)
        if there.any():
            lines.append(
                f"λ = {group.array('damping')[:][there][0]:.4g}, largest residual {residual[there].max():.2g}, "
                f"iterations {iterations[there].min()} to {iterations[there].max()}"
            )
    return lines


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
