"""The command line: ``influence-pipeline COMMAND EXPERIMENT.toml``.

Exit codes: 0 done; 1 the work failed, trying again may help; 2 the request was wrong, trying again will not;
130 or 143 interrupted by Ctrl-C or SIGTERM, progress kept.
"""

from __future__ import annotations

import functools
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

import influence_pipeline as ip
from influence_pipeline.location import Location

if TYPE_CHECKING:
    from influence_pipeline.runner import Outcome

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Training data attribution with influence functions: which training samples help, which harm.",
)

SettingsFile = Annotated[Path, typer.Argument(metavar="EXPERIMENT.toml", help="the settings file")]
TestNames = Annotated[list[str] | None, typer.Option("--tests", help="a test set; again for more; default all")]
Keep = Annotated[
    bool,
    typer.Option("--keep-curvature", help="of a training set that got longer, score only the new samples, with old H"),
]
Yes = Annotated[bool, typer.Option("--yes", help="do not ask")]
TestSet = Annotated[str | None, typer.Option("--tests", help="the test set; default the only one cached")]
Key = Annotated[str | None, typer.Option(help="which results, where several are cached")]
Shard = Annotated[
    str | None,
    typer.Option("--shard", metavar="I/N", help="compute a fixed share of the blocks, from 0/N to (N-1)/N"),
]
New = Annotated[bool, typer.Option("--new", help="start training gradients anew beside others of the same set")]


class Format(StrEnum):
    """What ``export`` writes."""

    JSON = "json"
    CSV = "csv"
    NPY = "npy"


class Terminated(BaseException):
    """SIGTERM came."""


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what goes wrong into a few lines and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        def terminate(number: int, frame: FrameType | None) -> None:
            raise Terminated

        before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        signal.signal(signal.SIGTERM, terminate)
        try:
            command(*args, **kwargs)
        except ip.InfluenceError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(error.exit_code) from None
        except (KeyboardInterrupt, Terminated) as stop:
            for number in before:  # what is sent from now on finds nothing left to stop
                before[number] = signal.SIG_IGN
                signal.signal(number, signal.SIG_IGN)
            typer.echo("interrupted: finished blocks are kept, the same command goes on from there", err=True)
            raise typer.Exit(130 if isinstance(stop, KeyboardInterrupt) else 143) from None
        except BrokenPipeError:
            sys.stderr.close()
            raise typer.Exit(0) from None
        except OSError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    run.__doc__ = (command.__doc__ or "").partition("\n\n")[0]  # as --help shows it
    return run


@app.callback()
def _main() -> None:
    terminal = logging.StreamHandler()
    said = set[str]()

    def is_news(record: logging.LogRecord) -> bool:
        """Have warnings said, and once how solvers fared; what a log file gets beyond that is for the file alone."""
        text, known = record.getMessage(), len(said)
        if record.name.startswith("stages"):
            said.add(text)
        return record.levelno >= logging.WARNING or len(said) > known

    terminal.addFilter(is_news)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[terminal])
    logging.getLogger("stages").setLevel(logging.INFO)


@app.command()
@_guarded
def run(
    settings: SettingsFile,
    tests: TestNames = None,
    new: New = False,
    keep_curvature: Keep = False,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="read all samples again; compute anew what came of changed ones")
    ] = False,
    accept_data: Annotated[
        bool, typer.Option("--accept-data", help="keep what came of changed samples, if the model sees no change")
    ] = False,
    shard: Shard = None,
) -> None:
    """Do all that is missing: grad_z, then s_test and influence of every test set.

    Raises:
        RequestError: options contradict one another.
    """
    from influence_pipeline.samples import shown_ids

    if refresh and accept_data:
        raise ip.RequestError("--refresh and --accept-data contradict one another")
    pipeline = ip.Pipeline.from_toml(settings, keep_curvature=keep_curvature, shard=shard)
    if refresh or accept_data:
        changed = (pipeline.refresh if refresh else pipeline.accept_data)(*tests or ())
        for name, ids in changed.items():
            typer.echo(f"{'changed' if refresh else 'accepted'} samples of {name!r}: {shown_ids(ids)}")
        if not changed:
            typer.echo("no sample has changed")
    for name, influences in pipeline.run(*tests or (), new=new).items():
        _summary(name, influences)


@app.command()
@_guarded
def plan(
    settings: Annotated[
        Path | None, typer.Argument(metavar="EXPERIMENT.toml", help="the settings file; not needed to simulate")
    ] = None,
    tests: TestNames = None,
    keep_curvature: Keep = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="compute a block of each stage, keep it, and say what all would take")
    ] = False,
    self_influence: Annotated[bool, typer.Option("--self-influence", help="also what that would take")] = False,
    simulate: Annotated[
        str | None,
        typer.Option(
            metavar="samples=1e9,tests=1000,dim=4096,workers=64,disk=2GB/s,…",
            help="say what these sizes and rates would take, under the settings if there are any; with --measure, at "
            "the rates of the experiment here",
        ),
    ] = None,
) -> None:
    """Say what is cached, what is missing and what it would take; compute nothing unless that is to be measured.

    Raises:
        RequestError: there is no settings file.
    """
    if simulate is not None:
        _simulate(simulate, settings, measure=measure)
        return
    if settings is None:
        raise ip.RequestError("name a settings file, EXPERIMENT.toml, or give sizes: --simulate samples=1e6,…")
    pipeline = ip.Pipeline.from_toml(settings, keep_curvature=keep_curvature)
    typer.echo(pipeline.plan(*tests or (), measure=measure, self_influence=self_influence))


def _simulate(text: str, settings: Path | None, *, measure: bool) -> None:
    """Print what some sizes and rates would take.

    Raises:
        RequestError: there is nothing to measure.
    """
    from influence_pipeline.simulation import Scale, simulate

    scale = Scale.read(text)
    if measure:
        if settings is None:
            raise ip.RequestError("--measure measures an experiment: name its settings file")
        scale = scale.measured(ip.Pipeline.from_toml(settings).plan(measure=True))
    typer.echo(simulate(scale, None if settings is None else ip.Settings.from_toml(settings)))


@app.command("grad-z")
@_guarded
def grad_z(settings: SettingsFile, new: New = False, shard: Shard = None) -> None:
    """Compute the gradient of every training sample."""
    _told("grad_z", ip.Pipeline.from_toml(settings, shard=shard).grad_z(new=new))


@app.command()
@_guarded
def newton(settings: SettingsFile, keep_curvature: Keep = False, shard: Shard = None) -> None:
    """Correct the gradient of every training sample for what its absence does to H ([influence] correction)."""
    _told("newton", ip.Pipeline.from_toml(settings, keep_curvature=keep_curvature, shard=shard).newton())


@app.command("s-test")
@_guarded
def s_test(settings: SettingsFile, tests: TestNames = None, keep_curvature: Keep = False, shard: Shard = None) -> None:
    """Solve (H + λI) x = ∇M for every test sample."""
    pipeline = ip.Pipeline.from_toml(settings, keep_curvature=keep_curvature, shard=shard)
    for name in tests or pipeline.tests:
        _told(f"s_test {name}", pipeline.s_test(name))


@app.command()
@_guarded
def influence(
    settings: SettingsFile, tests: TestNames = None, keep_curvature: Keep = False, shard: Shard = None
) -> None:
    """Stream both, score and rank."""
    pipeline = ip.Pipeline.from_toml(settings, keep_curvature=keep_curvature, shard=shard)
    for name, found in pipeline.influences(*(tests or ())).items():
        _summary(name, found)


@app.command("self-influence")
@_guarded
def self_influence(
    settings: SettingsFile,
    k: Annotated[int | None, typer.Option("-k", min=1, help="how many ids; default 10")] = None,
    keep_curvature: Keep = False,
    shard: Shard = None,
) -> None:
    """Compute the influence of every training sample on its own loss; print the highest."""
    found = ip.Pipeline.from_toml(settings, keep_curvature=keep_curvature, shard=shard).self_influence()
    ids, values = found.highest(min(10, len(found.ids)) if k is None else k)
    typer.echo(
        f"highest self-influence of {len(found.ids)} training samples "
        f"(λ = {found.damping:.4g}, largest residual {found.residual.max():.2g})"
    )
    for i, value in zip(ids, values, strict=True):
        typer.echo(f"{i:>8}  {value:+.3e}{_label(found.labels, int((found.ids == i).argmax()))}")
    typer.echo(f"in {found.path}")


@app.command()
@_guarded
def evaluate(
    settings: SettingsFile,
    tests: TestNames = None,
    out: Annotated[Path | None, typer.Option(help="a file for all figures, as JSON")] = None,
    shard: Shard = None,
) -> None:
    """Train again without some samples, and compare what that changes with the scores; all that is missing is run.

    Raises:
        RequestError: there is a file for the figures of one test set, and there are several.
    """
    from influence_pipeline.export import check_target

    pipeline = ip.Pipeline.from_toml(settings, shard=shard)
    names = tests or list(pipeline.tests)
    if out is not None and len(names) != 1:
        raise ip.RequestError(f"--out is for one test set: choose by --tests; there are {', '.join(names)}")
    if out is not None:
        check_target(out)  # before hours of training
    for found in pipeline.evaluate(*names, told=functools.partial(typer.echo, err=True)).values():
        typer.echo(found)
        if out is not None:
            found.to_json(out)


@app.command()
@_guarded
def report(
    settings: SettingsFile,
    tests: Annotated[str | None, typer.Option("--tests", help="the test set; default the only one")] = None,
    out: Annotated[Path, typer.Option("--out", help="the file")] = Path("report.html"),
    k: Annotated[int | None, typer.Option("-k", help="helpful and harmful samples of each test; default 10")] = None,
) -> None:
    """Write results as a page, one HTML file that shows what the samples look like; computes no scores.

    Raises:
        RequestError: it is not clear of which test set.
    """
    from influence_pipeline.plan import show_bytes

    pipeline = ip.Pipeline.from_toml(settings)
    if tests is None:
        if len(pipeline.tests) != 1:
            names = ", ".join(pipeline.tests) or "no test set"
            raise ip.RequestError(f"--tests is needed; the experiment has: {names}")
        tests = pipeline.tests[0]
    path = pipeline.report(tests, out, k)
    typer.echo(f"{path}: {show_bytes(path.stat().st_size)}; open it in a browser")


@app.command()
@_guarded
def status(settings: SettingsFile) -> None:
    """List what is cached; needs neither model nor data."""
    from influence_pipeline import inventory
    from influence_pipeline.cache import Cache

    typer.echo("\n".join(inventory.listed(Cache(_cache(settings)))))


@app.command()
@_guarded
def verify(
    settings: SettingsFile,
    tests: TestNames = None,
    sample: Annotated[int, typer.Option(min=0, help="also compute so many random training gradients again")] = 0,
) -> None:
    """Compare all that is cached with its checksums, and all samples with those that it is of.

    Raises:
        Exit: something is not as it was: 1 where the next run computes it anew, 2 where data or model are others.
    """
    found = ip.Pipeline.from_toml(settings).verify(*tests or (), sample=sample)
    typer.echo(found)
    raise typer.Exit(found.exit_code)


@app.command()
@_guarded
def rm(
    settings: SettingsFile,
    keys: Annotated[list[str], typer.Argument(metavar="KEY…", help="names or keys, as `status` shows them")],
    yes: Yes = False,
) -> None:
    """Remove sets of arrays from the cache."""
    from influence_pipeline import inventory
    from influence_pipeline.cache import Cache

    cache = Cache(_cache(settings))
    _remove(cache, [inventory.named(cache, key) for key in keys], yes)


@app.command()
@_guarded
def gc(settings: SettingsFile, yes: Yes = False) -> None:
    """Remove what belongs to no complete result, nor to the experiment as it is now."""
    pipeline = ip.Pipeline.from_toml(settings)
    paths = pipeline.garbage()
    if not paths:
        typer.echo("nothing to remove")
    _remove(pipeline.cache, paths, yes)


def _remove(cache: Any, paths: Sequence[Location], yes: bool) -> None:
    """Remove folders of the cache, after asking.

    Raises:
        RequestError: there is nobody to ask, or a folder is none of ours.
    """
    from influence_pipeline import inventory
    from influence_pipeline.cache.store import files_at
    from influence_pipeline.plan import show_bytes

    for path in paths:
        inventory.refuse_foreign(path)
        size = sum(file.length for file in files_at(path).walk())
        typer.echo(f"{path.parent.name}/{path.name}  {show_bytes(size)}")
    if paths and not yes:
        if not sys.stdin.isatty():
            raise ip.RequestError("nothing was removed: say --yes")
        if not typer.confirm("remove?"):
            return
    for path in paths:
        cache.remove(path)


@app.command()
@_guarded
def show(
    settings: SettingsFile,
    tests: TestSet = None,
    test: Annotated[int | None, typer.Option(help="row of one test sample; default the average over all")] = None,
    k: Annotated[int | None, typer.Option("-k", help="how many ids; default 10")] = None,
    key: Key = None,
) -> None:
    """Print the most helpful and most harmful training ids; needs neither model nor data.

    Raises:
        RequestError: it is not clear of what, or there is no such test sample.
    """
    influences = _opened(settings, tests, key)
    if test is not None and not 0 <= test < len(influences):
        raise ip.RequestError(f"--test {test}: {influences.tests!r} has {len(influences)} test samples")
    _table(influences, test, min(10, len(influences.train_ids)) if k is None else k)


@app.command()
@_guarded
def export(
    settings: SettingsFile,
    out: Annotated[Path, typer.Option(help="the file, which appears when all of it is written")],
    form: Annotated[
        Format,
        typer.Option(
            "--format",
            help="json: all of each test, as pytorch_influence_functions; csv: a line for each rank; npy: all scores",
        ),
    ],
    tests: TestSet = None,
    k: Annotated[
        int | None, typer.Option("-k", help="ranks of each test; default all in json, in csv those that were kept")
    ] = None,
    key: Key = None,
) -> None:
    """Write the scores or rankings of a test set to a file; needs neither model nor data.

    Raises:
        RequestError: it is not clear of what, or the options do not go together.
    """
    if form is Format.NPY and k is not None:
        raise ip.RequestError(f"-k {k}: npy has all scores; ranks are in --format csv and json")
    influences = _opened(settings, tests, key)
    if form is Format.NPY:
        influences.to_npy(out)
        what = "float32 scores; rows are in the order of test_ids, columns in that of train_ids"
    else:
        (influences.to_json if form is Format.JSON else influences.to_csv)(out, k)
        what = "their rankings" if form is Format.CSV else "their scores and rankings"
    sizes = f"{len(influences)} tests × {len(influences.train_ids)} training samples"
    typer.echo(f"{out}: {sizes}, {what}", err=True)


def _opened(settings: Path, tests: str | None, key: str | None) -> ip.Influences:
    """Open the results of a test set, by default of the only one that is cached.

    Raises:
        RequestError: it is not clear which.
    """
    from influence_pipeline.cache import Cache
    from influence_pipeline.influences import cached_results, refuse_damaged

    folder = _cache(settings)
    names = sorted({group.attributes["tests"] for group in cached_results(Cache(folder))})
    if tests is None:
        if not names:
            refuse_damaged(Cache(folder))
        if len(names) != 1:
            raise ip.RequestError(f"--tests is needed; results are cached for: {', '.join(names) or 'nothing'}")
        tests = names[0]
    return ip.Influences.open(folder, tests, key)


def _cache(path: Path) -> Location:
    settings = ip.Settings.from_toml(path)
    if settings.cache is None:
        raise ip.RequestError(f"{path}: cache is missing")
    return settings.cache


def _told(stage: str, outcome: Outcome) -> None:
    """Say what was done of a stage."""
    line = f"{stage}: {outcome.computed} of {outcome.total} blocks computed in {outcome.seconds:.1f} s"
    typer.echo(f"{line}; {outcome.left} of other shards are missing" if outcome.left else line)


def _summary(name: str, influences: ip.Influences) -> None:
    """Print what came out for one test set."""
    k = min(10, len(influences.train_ids))
    typer.echo(f"\n{name}: {len(influences)} tests × {len(influences.train_ids)} training samples{_models(influences)}")
    typer.echo(", ".join(influences.evidence))
    _table(influences, None, k)


def _models(influences: ip.Influences) -> str:
    """Say how many models' scores were combined, and how."""
    how = {"mean": "averaged", "sum": "summed"}.get(influences.combination)
    return f", {how} over {len(influences.weights)} checkpoints" if how else ""


def _table(influences: ip.Influences, test: int | None, k: int) -> None:
    """Print ids, scores and labels of the most helpful and most harmful samples, side by side."""
    tests, trains = influences.labels()
    if test is None:
        what = f"on average over the {len(influences)} tests of {influences.tests}"
        found = {"most helpful": influences.helpful_on_average(k), "most harmful": influences.harmful_on_average(k)}
    else:
        own = influences.test_ids[test]
        what = f"test {test} of {influences.tests}{_label(tests, test)}" + (f"  id {own}" if own != test else "")
        row = slice(test, test + 1)
        sides = {"most helpful": influences.rankings(row, "helpful", k)}
        sides["most harmful"] = influences.rankings(row, "harmful", k)
        found = {title: (ids[0], scores[0]) for title, (ids, scores) in sides.items()}
    typer.echo(what)
    blocks = [_ranking(title, influences, trains, *each) for title, each in found.items()]
    width = max(map(len, blocks[0]))
    for left, right in zip(*blocks, strict=True):
        typer.echo(f"  {left:<{width}}    {right}")
    typer.echo(influences.meaning)
    over, count = influences.curvature_samples, len(influences.train_ids)
    if over != count:
        typer.echo(f"H and 1/N are of the first {over} of {count} training samples")
    typer.echo(f"in {influences.path}")


def _ranking(title: str, influences: ip.Influences, trains: Any, ids: Any, scores: Any) -> list[str]:
    """Return the lines of a ranking under its title, in columns."""
    from influence_pipeline.influences import shown_label

    labels = [shown_label(trains, int((influences.train_ids == i).argmax())) for i in ids]
    columns = [["id", *map(str, ids)], ["score", *(f"{score:+.3e}" for score in scores)]]
    if any(labels):
        columns.append(["label", *labels])
    widths = [max(map(len, column)) for column in columns]
    rows = zip(*columns, strict=True)
    return [title, *("  ".join(f"{cell:>{n}}" for cell, n in zip(row, widths, strict=True)) for row in rows)]


def _label(labels: Any, row: int) -> str:
    from influence_pipeline.influences import shown_label

    shown = shown_label(labels, row)
    return f"  label {shown}" if shown else ""


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
