"""Influences: what a user does with the result. Reads the cache; needs neither model nor data."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np

from influence_pipeline import export
from influence_pipeline.by_parameter import columns_by_parameter, grouped, products
from influence_pipeline.cache import Cache, Group, group_name, told_apart
from influence_pipeline.cache.record import digest
from influence_pipeline.errors import CacheDamaged, MissingStage, RequestError
from influence_pipeline.location import Location
from influence_pipeline.relative import KINDS, Relative, Scaled, inverse, ranked, read_rows, row_norms
from influence_pipeline.report import check_installed
from stages.influence.ranking import bottom_k, top_k
from stages.stage import Array, Block, Grid, Ids

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure
    from torch.utils.data import Dataset, Subset

Found = TypeVar("Found")
Side = Literal["helpful", "harmful"]
Which = Literal["influential", "helpful", "harmful", "not-harmful"]
NOT_STORED = "scores were not stored (influence.store_scores = false): only rankings are there"


class Influences:
    """The influence of N training samples on T test samples, by one model or the combined scores of several.

    ``scores[t, i]`` predicts the measurement of test sample t after training without sample i, minus what it is
    now. For a loss, positive is helpful and negative is harmful; for a task with ``higher_is_better`` it is the
    other way round. Ids are those of the training samples, everywhere.

    Attributes:
        tests: name of the test set.
        key: of these results in the cache.
        train_ids: (N,) int64, the id of each column of ``scores``.
        test_ids: (T,) int64, the id of each row.
        curvature_samples: how many training samples H and 1/N are of; fewer than N where these were kept as the
            training set got longer.
        offset: (T,) what to add to a row to predict retraining on a mean over N − 1 samples.
        seconds: spent by this process on computing them, 0 where all was cached.
        combination: "mean" or "sum" where these are the combined scores of several models, "" where they are of one.
        weights: what the scores of each of these models were multiplied by, by the names of their results.
    """

    def __init__(self, cache: Cache, group: Group, seconds: float = 0.0) -> None:
        """Read results; use :meth:`open` or a Pipeline."""
        self._cache, self._group = cache, group
        identity = group.attributes["identity"]
        self.tests: str = group.attributes["tests"]
        self.key = group.path.name.removeprefix(f"{self.tests}-")
        self.higher_is_better: bool = identity["higher_is_better"]
        self.train_ids: Array = group.array("train_ids")[:]
        self.test_ids: Array = group.array("test_ids")[:]
        self.offset: Array = group.array("offset")[:]
        self.curvature_samples = int(group.array("curvature_samples")[()])
        self.seconds = seconds
        self.combination: str = identity.get("combination", "")
        self.weights: dict[str, float] = identity.get("members", {})
        gradients = "newton" if "newton" in identity else "grad_z"
        # Combined scores are made of none of these themselves.
        self._solved = None if self.weights else cache.find("s_test", identity["s_test"])
        self._trained = None if self.weights else cache.find(gradients, identity[gradients])
        prepared = self._solved.attributes["reads"].get("curvature") if self._solved else None
        self._prepared = cache.find("curvature", prepared) if prepared else None

    @classmethod
    def open(cls, cache: Location | str, tests: str, key: str | None = None) -> Influences:
        """Open results by the name of their test set; by key, too, where several are cached.

        Where scores of several models were combined, these are opened, and those of one of the models by key alone.

        Raises:
            MissingStage: nothing is cached, or it is not complete.
            RequestError: several are cached and none is chosen.
            CacheDamaged: it is complete, and damaged.
        """
        folder = Cache(cache)
        found = [
            group
            for group in cached_results(folder, tests, with_members=key is not None)
            if key in (None, group.path.name.removeprefix(f"{tests}-"))
        ]
        if not found:
            refuse_damaged(folder, tests)
            there = sorted({group.attributes["tests"] for group in cached_results(folder)}) or ["nothing"]
            what = f"{tests!r}" + (f" with key {key}" if key else "")
            raise MissingStage(f"no results for {what} in {folder.path}; there is: {', '.join(there)}")
        if len(found) > 1:
            whole = {group.path.name.removeprefix(f"{tests}-"): _whole_identity(folder, group) for group in found}
            refuse_several(whole, f"results for {tests!r} in {folder.path}")
        group = found[0]
        again = "run the pipeline again, it is made anew"
        if not group.merged():
            if damage := group.damage_of_merged():
                raise CacheDamaged(f"{damage}: {again}", group.path)
            raise MissingStage(f"the results for {tests!r} in {folder.path} are not complete: run the pipeline again")
        grid = group.layout.grid
        records = zip(grid, group.readable(grid), strict=True)
        lost = next((b.index for b, record in records if record is None or record.rows != b.rows), None)
        if lost:
            raise CacheDamaged(f"block {lost} of {group.path} has lost files: {again}", group.path)
        return cls(folder, group)

    @property
    def path(self) -> Location:
        """The folder in the cache that these results are in."""
        return self._group.path

    @property
    def scores(self) -> Any:
        """The zarr array (T, N) float32; slice it, since it may be larger than memory.

        Raises:
            RequestError: scores were not stored.
        """
        if "scores" not in self._group:
            raise RequestError("scores were not stored (influence.store_scores = false): only rankings are there")
        return self._group.zarr_array("scores")

    @functools.cached_property
    def members(self) -> tuple[Influences, ...]:
        """The results of each model whose scores were combined; none where these are of one, or that were removed."""
        groups = [self._cache.find("influence", name) for name in self.weights]
        return tuple(Influences(self._cache, group) for group in groups if group is not None and group.finished)

    @property
    def stored(self) -> bool:
        """Whether all scores are there, not only rankings."""
        return "scores" in self._group

    @property
    def ranks(self) -> int:
        """How many helpful and harmful samples of each test were kept in their order (influence.top_k)."""
        return int(self._group.array("helpful_ids").shape[1])

    def score_rows(self, most_bytes: int = 2**26) -> Iterator[tuple[slice, Array]]:
        """Yield all stored scores, some rows at a time: which, and their values (t, N) float32.

        Args:
            most_bytes: of the values that are read at once; a row at least.
        """
        scores, rows = self._group.array("scores"), max(1, most_bytes // (4 * len(self.train_ids)))
        for start in range(0, len(self), rows):
            part = slice(start, min(start + rows, len(self)))
            yield part, scores[part, :]

    @property
    def residual(self) -> Array | None:
        """The solver's evidence, |v − (H + λI) x| / |v| for each test, (T,); None where s_test was removed.

        Of several models the largest.
        """
        if self.weights:
            found = self._of_members(lambda one: one.residual)
            return None if found is None else np.max(found, axis=0)
        return None if self._solved is None else np.asarray(self._solved.array("residual")[:])

    @property
    def damping(self) -> float | None:
        """λ, absolute; None where s_test was removed, or where several models have each their own."""
        if self.weights:
            found = self._of_members(lambda one: one.damping)
            return found[0] if found is not None and len(set(found)) == 1 else None
        return None if self._solved is None else float(self._solved.array("damping")[0])

    @property
    def gradient_norm(self) -> float | None:
        """How far the model is from an optimum, |ḡ + l2·θ|, where influence assumes 0; None where not measured.

        Of several models the largest.
        """
        if self.weights:
            found = self._of_members(lambda one: one.gradient_norm)
            return None if found is None else max(found)
        group = self._prepared
        while group is not None and "gradient_norm" not in group:  # it was measured for what this was prepared of
            before = group.attributes["reads"].get("curvature")
            group = self._cache.find("curvature", before) if before else None
        return None if group is None else float(group.array("gradient_norm")[()])

    def _of_members(self, asked: Callable[[Influences], Found | None]) -> list[Found] | None:
        """Ask all models whose scores were combined; None where one of them does not know."""
        found = [value for value in map(asked, self.members) if value is not None]
        return found if len(found) == len(self.weights) else None

    def _mean_of_members(self, asked: Callable[[Influences], Array | None]) -> Array | None:
        found = self._of_members(asked)
        return None if found is None else np.asarray(np.mean(found, axis=0, dtype=np.float32))

    @property
    def evidence(self) -> tuple[str, ...]:
        """What speaks for the numbers, in pieces, as far as it is cached."""
        found = []
        dampings = sorted({one.damping for one in self.members or [self] if one.damping is not None})
        if dampings and self.residual is not None:
            shown = " to ".join(f"{damping:.4g}" for damping in dict.fromkeys([dampings[0], dampings[-1]]))
            found += [f"λ = {shown}", f"largest residual {self.residual.max():.2g}"]
        if self.gradient_norm is not None:
            found.append(f"|ḡ + l2·θ| = {self.gradient_norm:.2g} (influence assumes an optimum, 0)")
        return tuple(found)

    @property
    def meaning(self) -> str:
        """What a score is, and its sign, in a line."""
        plus, minus = ("harms", "helps") if self.higher_is_better else ("helps", "harms")
        return f"score: change of the measurement (a loss, say) when trained without the sample; + {plus}, - {minus}"

    def by_parameter(
        self,
        samples: Sequence[int] | Array,
        tests: Sequence[int] | Array | None = None,
        *,
        layers: Sequence[str] = (),
    ) -> dict[str, Array]:
        """Return the part of scores that comes through each parameter's coordinates of the training gradient.

        The parts of a score add up to it, but for rounding: S and G have columns for each parameter, and a part is
        the product of these alone. The inverse of H mixes parameters in S: a part says what moving this parameter
        along the sample's gradient does to the measurement once all others have followed, not what the model would
        do with this parameter alone.

        Args:
            samples: ids of training samples (n); :meth:`helpful` and :meth:`harmful` give some to ask about.
            tests: ids of test samples (t); by default all.
            layers: globs over the names of parameters, as ``"layer1.*"``: what the first of them matches is summed
                under the glob. A parameter that none matches stays by itself.

        Returns:
            (t, n) float32 by name of parameter, or by glob. What is held of S and G beside these is some 64 MiB, or
            two rows of their tiles where these are wider.

        Raises:
            RequestError: an id or a glob is not there, or the parameters share their coordinates.
            MissingStage: gradients or solutions are not in the cache, or others than these scores are of.
        """
        if self.weights:
            return self._by_parameter_of_members(samples, tests, layers)
        solved, trained = self._inputs("scores by parameter")
        columns = columns_by_parameter(trained.attributes["identity"])
        names = grouped(list(columns), layers)
        rows = _positions(self.test_ids, self.test_ids if tests is None else tests, "test")
        ids = _positions(self.train_ids, samples, "training")
        self._refuse_other_inputs(rows, ids, "scores by parameter")
        found = products(solved, trained, rows, ids, columns)
        of_names = {name: np.sum([found.pop(one) for one in own], axis=0) for name, own in names.items()}
        return {name: (total / self.curvature_samples).astype(np.float32) for name, total in of_names.items()}

    def _by_parameter_of_members(
        self, samples: Sequence[int] | Array, tests: Sequence[int] | Array | None, layers: Sequence[str]
    ) -> dict[str, Array]:
        """Combine the parts of each model's scores as these were.

        Raises:
            MissingStage: scores of a model are not in the cache, or others than these are combined of.
        """
        members = self.members
        for block in self._group.layout.grid:
            record = self._group.record(block)
            now = read_by_combined(block, [(one._group.layout.grid, one._content) for one in members])
            if record is None or record.inputs != now:
                raise MissingStage(
                    "no scores by parameter: those of a model were removed, or are others than these are combined of: "
                    "run the pipeline again"
                )
        parts: dict[str, Array] = {}
        for one, weight in zip(members, self.weights.values(), strict=True):
            for name, part in one.by_parameter(samples, tests, layers=layers).items():
                more = weight * part.astype(np.float64)
                parts[name] = parts[name] + more if name in parts else more
        return {name: part.astype(np.float32) for name, part in parts.items()}

    def _content(self, block: Block) -> bytes | None:
        """Return a digest of what a block of scores holds, None where it is not there."""
        record = self._group.record(block)
        return None if record is None else record.content

    def relative_scores(self, relative: Relative, tests: Sequence[int] | Array | None = None) -> Array:
        """Return scores relative to norms, (t, N) float32.

        Samples that weigh on every test, as outliers and wrong labels do, have large scores on all of them; relative
        to what they do anyway, those come first that matter for this test. With s the solution of a test and g the
        gradient of a training sample:

        - ``"cosine"``: sᵀg / (|s| |g|), within ±1 but for the encoding of g;
        - ``"l-relatif"``: sᵀg / √(gᵀ(H + λI)⁻¹g) and ``"theta-relatif"``: sᵀg / |(H + λI)⁻¹g|, of Barshan et al.
          (2020). They need :meth:`Pipeline.self_influence`.

        A sample whose gradient is zero, and a test whose solution is, have 0.

        Args:
            relative: to which norms.
            tests: ids of test samples (t); by default all.

        Raises:
            RequestError: an id is not there, or scores were not stored.
            MissingStage: what norms are of is not in the cache, or other than what these scores are of.
        """
        positions = _positions(self.test_ids, self.test_ids if tests is None else tests, "test")
        return read_rows(self._relative(relative), positions, self._tile)

    def helpful(self, k: int = 10, relative: Relative | None = None) -> tuple[Array, Array]:
        """Return ids (T, k) int64 and scores (T, k) float32, most helpful first; equal scores by ascending id.

        Args:
            k: ranks.
            relative: rank by scores relative to these norms, and return them; see :meth:`relative_scores`.

        Raises:
            RequestError: k is more than there are, or more than were kept.
        """
        return self._ranked("helpful", k, relative)

    def harmful(self, k: int = 10, relative: Relative | None = None) -> tuple[Array, Array]:
        """Return ids (T, k) int64 and scores (T, k) float32, most harmful first; equal scores by ascending id.

        Args:
            k: ranks.
            relative: rank by scores relative to these norms, and return them; see :meth:`relative_scores`.

        Raises:
            RequestError: k is more than there are, or more than were kept.
        """
        return self._ranked("harmful", k, relative)

    def rankings(self, rows: slice, side: Side, k: int = 10) -> tuple[Array, Array]:
        """Return ids and scores of some test samples, (t, k), as :meth:`helpful` or :meth:`harmful` has them.

        Args:
            rows: of test samples, one after the other. Beyond the ranks that were kept, their scores are read whole.
            side: "helpful" or "harmful".
            k: ranks.

        Raises:
            RequestError: k is more than there are, or more than were kept.
        """
        if side not in get_args(Side):
            raise RequestError(f"side = {side!r}: must be one of {', '.join(map(repr, get_args(Side)))}")
        return self._ranked(side, k, None, rows)

    def scores_of(self, row: int) -> Array:
        """Return all scores of one test sample, by its row, (N,) float32.

        Raises:
            RequestError: there is no such row, or scores were not stored.
        """
        self.check_row(row)
        if not self.stored:
            raise RequestError(NOT_STORED)
        return self._group.array("scores")[row]

    def check_row(self, row: Any) -> None:
        """Refuse a row of no test sample.

        Raises:
            RequestError: it is one.
        """
        whole = isinstance(row, (int, np.integer)) and not isinstance(row, bool)
        if not whole or not 0 <= row < len(self):
            raise RequestError(f"test = {row!r}: {self.tests!r} has {len(self)} test samples; their rows begin at 0")

    def mean_scores(self) -> Array:
        """Return the scores averaged over the tests, (N,) float32."""
        mean: Array = self._group.array("mean_scores")[:]
        return mean

    def helpful_on_average(self, k: int = 10) -> tuple[Array, Array]:
        """Return ids (k,) and mean scores (k,), most helpful first.

        Raises:
            RequestError: k is more than there are.
        """
        return self._on_average(bottom_k if self.higher_is_better else top_k, k)

    def harmful_on_average(self, k: int = 10) -> tuple[Array, Array]:
        """Return ids (k,) and mean scores (k,), most harmful first: the first candidates for wrong labels.

        Raises:
            RequestError: k is more than there are.
        """
        return self._on_average(top_k if self.higher_is_better else bottom_k, k)

    def subset(self, train: Dataset[Any], k: int = 1000, which: Which = "influential") -> Subset[Any]:
        """Return some training samples by their mean influence over the tests, to train on; a DataLoader takes them.

        Args:
            train: the training set that the influences are of.
            k: how many.
            which: "influential", the k with the largest influence of either sign; "helpful" or "harmful", the k that
                are most so, as :meth:`helpful_on_average` has them; "not-harmful", all but the k most harmful ones, in
                the order of the training set.

        Raises:
            RequestError: k is more than there are, nothing would be left, or ``train`` has another length.
        """
        from torch.utils.data import Subset

        from influence_pipeline.samples import check_dataset

        if which not in get_args(Which):
            raise RequestError(f"which = {which!r}: must be one of {', '.join(map(repr, get_args(Which)))}")
        self._check_k(k)
        count = check_dataset(train, "train")
        if count != len(self.train_ids):
            raise RequestError(f"train has {count} samples, the influences are of {len(self.train_ids)}")
        if which == "not-harmful" and k == count:
            raise RequestError(f"k = {k}: without all {count} training samples nothing is left to train on")
        if which == "influential":
            ids = top_k(np.abs(self.mean_scores())[None], self.train_ids, k)[0][0]
        else:
            ids, _ = self.helpful_on_average(k) if which == "helpful" else self.harmful_on_average(k)
        positions = _positions(self.train_ids, ids, "training")
        if which == "not-harmful":
            positions = np.delete(np.arange(count), positions)
        return Subset(train, positions.tolist())

    def to_json(self, path: Path | str, k: int | None = None) -> None:
        """Write the JSON of pytorch_influence_functions, with the sign of this package (positive = helpful).

        For each test id: ``label``, ``num_in_dataset`` (row among the test samples), ``time_calc_influence_s`` (what
        this process spent, by test; 0 where all was cached), ``influence`` (all scores, where they are stored),
        ``harmful`` and ``helpful`` (all ids where scores are stored, else those that were kept).

        Args:
            path: the file, which appears when all of it is written.
            k: ranks at most.

        Raises:
            RequestError: k is more than there are, or the path is none of a file in a folder.
            WorkError: the file cannot be written.
        """
        if k is not None:
            self._check_k(k)
        export.to_json(self, path, k)

    def to_csv(self, path: Path | str, k: int | None = None) -> None:
        """Write a table of the rankings, a line for each rank: test_id, rank, kind (helpful, harmful), train_id, score.

        Args:
            path: the file, which appears when all of it is written.
            k: ranks of each kind for each test sample; by default those that were kept ([influence] top_k).

        Raises:
            RequestError: k is more than there are or were kept, or the path is none of a file in a folder.
            WorkError: the file cannot be written.
        """
        if k is not None:
            self._check_k(k)
        export.to_csv(self, path, k)

    def to_npy(self, path: Path | str) -> None:
        """Write all scores as a NumPy array (T, N) float32: rows as in ``test_ids``, columns as in ``train_ids``.

        Args:
            path: the file, which appears when all of it is written.

        Raises:
            RequestError: scores were not stored, or the path is none of a file in a folder.
            WorkError: the file cannot be written.
        """
        export.to_npy(self, path)

    def to_xarray(self) -> xarray.DataArray:
        """Return the scores with dims test and train, and their ids as coordinates, read into memory.

        For more than fits there, open :attr:`path` with ``xarray.open_zarr(path, consolidated=False)``.

        Raises:
            RequestError: xarray is not installed, or scores were not stored.
        """
        try:
            import xarray
        except ImportError:
            raise RequestError('to_xarray needs xarray: pip install "influence-pipeline[xarray]"') from None
        return xarray.DataArray(
            self.scores[:],
            dims=("test", "train"),
            coords={"test": self.test_ids, "train": self.train_ids, "offset": ("test", self.offset)},
            name="influence",
            attrs={"tests": self.tests, "key": self.key},
        )

    def plot(
        self,
        test: int = 0,
        *,
        train: Dataset[Any],
        tests: Dataset[Any],
        k: int = 5,
        show: Callable[[Any], Any] | None = None,
        label_names: Sequence[str] | Mapping[int, str] | None = None,
    ) -> Figure:
        """Draw a test sample beside its most helpful and most harmful training samples, with ids, labels and scores.

        Args:
            test: row of the test sample.
            train: the training set that the influences are of.
            tests: the test set.
            k: training samples of each kind.
            show: what to show of a sample, as for ``Experiment(show=…)``; by default what its shape and type suggest.
            label_names: what labels are called, by their numbers.

        Returns:
            A figure of matplotlib; ``savefig`` writes it, and a notebook shows it.

        Raises:
            RequestError: matplotlib is not installed, or there is no such test sample, data set or rank.
        """
        check_installed("pictures need")
        from influence_pipeline.report import pictures

        return pictures.plot(self, test, train, tests, k, show, label_names)

    def plot_distribution(self, test: int | None = None) -> Figure:
        """Draw how many training samples have which score: of a test sample, by its row, or on average over the tests.

        Raises:
            RequestError: matplotlib is not installed, there is no such test sample, or scores were not stored.
        """
        check_installed("pictures need")
        from influence_pipeline.report import pictures

        return pictures.plot_distribution(self, test)

    def plot_cumulative(self, test: int | None = None) -> Figure:
        """Draw what share of all influence the k largest scores carry, of a test sample or on average over the tests.

        Raises:
            RequestError: matplotlib is not installed, there is no such test sample, or scores were not stored.
        """
        check_installed("pictures need")
        from influence_pipeline.report import pictures

        return pictures.plot_cumulative(self, test)

    def labels(self) -> tuple[Array | None, Array | None]:
        """Return the labels of tests (T,) and training samples (N,), float64; None where they are not cached."""
        if self.weights:
            return self.members[0].labels() if self.members else (None, None)
        tests = None if self._solved is None else self._solved.array("label")[:]
        trains = None if self._trained is None else self._trained.array("label")[:]
        return tests, trains

    def measurements(self) -> Array | None:
        """Return what influence is asked about at each test, (T,) float32; None where s_test was removed.

        Of several models the mean.
        """
        if self.weights:
            return self._mean_of_members(lambda one: one.measurements())
        return None if self._solved is None else np.asarray(self._solved.array("measurement")[:])

    def losses(self) -> Array | None:
        """Return the training losses, (N,) float32; None where gradients are not cached. Of several models the mean."""
        if self.weights:
            return self._mean_of_members(lambda one: one.losses())
        return None if self._trained is None else np.asarray(self._trained.array("loss")[:])

    def __len__(self) -> int:
        """Count the test samples."""
        return len(self.test_ids)

    def __repr__(self) -> str:
        """Say what these are."""
        sizes = f"{len(self.train_ids)} training samples on {len(self)} tests {self.tests!r}"
        return f"<Influences of {sizes}, {self._group.path}>"

    def _repr_html_(self) -> str:
        from influence_pipeline.report.notebook import table

        return table(self)

    # ---- rankings ------------------------------------------------------------------------------------------------

    def _ranked(self, side: Side, k: int, relative: Relative | None, rows: slice = slice(None)) -> tuple[Array, Array]:
        """Return ids and scores of some test samples; of all where they are relative.

        Raises:
            RequestError: k is more than there are, or more than were kept.
        """
        self._check_k(k)
        best = (side == "helpful") != self.higher_is_better
        end = "helpful" if best else "harmful"
        if relative is None and k <= self.ranks:
            return self._group.array(f"{end}_ids")[rows, :k], self._group.array(f"{end}_scores")[rows, :k]
        if relative is None and not self.stored:
            raise RequestError(
                f"k = {k}, and {self.ranks} ranks were kept: run with a larger influence.top_k, "
                "or with influence.store_scores = true"
            )
        pick = top_k if best else bottom_k
        if rows != slice(None):
            return pick(self._group.array("scores")[rows], self.train_ids, k)
        scores = self._group.array("scores") if relative is None else self._relative(relative)
        return ranked(scores, self.train_ids, k, pick, self._tile)

    @property
    def _tile(self) -> tuple[int, int]:
        """How many rows and columns of the scores are best read at once."""
        tests, samples = self._group.zarr_array("scores").chunks
        return tests, samples

    def _on_average(self, pick: Any, k: int) -> tuple[Array, Array]:
        self._check_k(k)
        ids, scores = pick(self.mean_scores()[None], self.train_ids, k)
        return ids[0], scores[0]

    def _relative(self, relative: Relative) -> Scaled:
        """Return the scores relative to norms.

        Raises:
            RequestError: there are no such norms, or scores were not stored.
            MissingStage: what the norms are of is not in the cache, or other than what the scores are of.
        """
        if relative not in KINDS:
            raise RequestError(f"relative = {relative!r}: must be one of {', '.join(map(repr, KINDS))}")
        if self.weights:
            raise RequestError(
                "relative scores are of one model, and these are combined of several: ask one of `members`, or the "
                "pipeline of one, pipeline.members[…]"
            )
        if not self.stored:
            raise RequestError(
                "relative scores are made of the stored ones, and these were not (influence.store_scores = false): "
                "run with store_scores = true"
            )
        solved, trained = self._inputs("relative scores")
        self._refuse_other_inputs(np.arange(len(self)), np.arange(len(self.train_ids)), "relative scores")
        scores, over = self._group.array("scores"), float(self.curvature_samples)
        if relative == "cosine":
            tests = row_norms(solved.rows("vectors"), solved.zarr_array("vectors").chunks)
            return Scaled(scores, over * inverse(tests), inverse(trained.array("norm")[:]))
        group = self._self_influence(solved, trained)
        if relative == "theta-relatif":
            norms = group.array("change")[:]
        else:  # below zero is what a solver has left of nearly nothing
            norms = np.sqrt(over * np.maximum(group.array("self_influence")[:], 0, dtype=np.float64))
        return Scaled(scores, np.full(len(self), over), inverse(norms))

    def _inputs(self, what: str) -> tuple[Group, Group]:
        """Return the solutions and the gradients that the scores are of.

        Raises:
            MissingStage: they are not in the cache; ``what`` is missed.
        """
        if self._trained is None:
            raise MissingStage(
                f"no {what}: the gradients are not in the cache. They were removed, or never kept "
                "([grad_z] store = false): run grad_z with store = true"
            )
        if self._solved is None:
            raise MissingStage(f"no {what}: the solutions were removed: run s_test again")
        return self._solved, self._trained

    def _self_influence(self, solved: Group, trained: Group) -> Group:
        """Return the self-influence of the training samples under the curvature that solutions are of.

        Raises:
            RequestError: the scores are of corrected gradients.
            MissingStage: it is not in the cache, not complete, or of other gradients or another curvature.
        """
        if trained.attributes["stage"] != "grad_z":
            raise RequestError(
                "RelatIF is of scores without [influence] correction; relative = 'cosine' is there for both"
            )
        of = {name: solved.attributes["identity"][name] for name in ("l2", "s_test")}
        group = self._cache.find("self_influence", group_name(None, {**trained.attributes["identity"], **of}))
        prepared = prepared_contents(self._prepared)

        def there(block: Block) -> bool:
            assert group is not None
            record, samples = group.whole(block), block.bounds["sample"]
            gradients = trained.contents(covering(trained.layout.grid, samples))
            now = read_by_self_influence(block, gradients, prepared, self.curvature_samples, self.train_ids)
            return record is not None and record.inputs == now

        grid = None if group is None else group.layout.grid
        if group is None or grid is None or grid.axes[0].length != len(self.train_ids) or not all(map(there, grid)):
            raise MissingStage(
                "the self-influence of the training samples, under the solver of these scores, is not in the cache, "
                "or not complete. First: pipeline.self_influence(), or `influence-pipeline self-influence …`"
            )
        return group

    def _refuse_other_inputs(self, tests: Array, samples: Array, what: str) -> None:
        """Refuse gradients and solutions that the scores of some pairs are not of.

        Raises:
            MissingStage: they changed since; ``what`` is missed.
        """
        solved, trained = self._inputs(what)
        of_tests, of_samples = self._group.layout.grid.axes
        for test, sample in itertools.product(set(tests // of_tests.band), set(samples // of_samples.band)):
            block = self._group.layout.grid.block((int(test), int(sample)))
            record = self._group.record(block)
            solutions = solved.contents(covering(solved.layout.grid, block.bounds["test"]))
            gradients = trained.contents(covering(trained.layout.grid, block.bounds["sample"]))
            now = read_by_scores(block, solutions, gradients, self.curvature_samples, self.train_ids, self.test_ids)
            if record is None or record.inputs != now:
                raise MissingStage(
                    f"no {what}: gradients or solutions in the cache are others than these scores are of: "
                    "run the pipeline again"
                )

    def _check_k(self, k: Any) -> None:
        check_k(k, len(self.train_ids))


def shown_label(labels: Array | None, position: int) -> str:
    """Return a label as people read it, "" where there is none."""
    label = float("nan") if labels is None else float(labels[position])
    if math.isnan(label):
        return ""
    return f"{label:.0f}" if label.is_integer() else f"{label:.4g}"


def check_k(k: Any, count: int) -> None:
    """Refuse a number of ranks that there are not.

    Raises:
        RequestError: it is none, or more than training samples.
    """
    whole = isinstance(k, (int, np.integer)) and not isinstance(k, bool)
    if not whole or not 0 < k <= count:
        raise RequestError(f"k = {k!r}: there are {count} training samples, and k is a whole number from 1 to that")


def refuse_several(identities: Mapping[str, Mapping[str, Any]], what: str) -> None:
    """Refuse to choose one of several results, given what each depends on by its key.

    Raises:
        RequestError: with what tells them apart.
    """
    differing = zip(identities, told_apart(list(identities.values())), strict=True)
    raise RequestError(f"several {what}; choose one:\n" + "\n".join(f'  key="{key}"  {how}' for key, how in differing))


def read_by_self_influence(
    block: Block, gradients: bytes, prepared: bytes, curvature_samples: int, train_ids: Ids
) -> bytes:
    """Return a digest of what a block of self-influence is of, given those of what it reads."""
    return digest([gradients, prepared, curvature_samples.to_bytes(8, "little"), train_ids[block.bounds["sample"]]])


def prepared_contents(prepared: Group | None) -> bytes:
    """Return a digest of what a solver prepared."""
    return digest([]) if prepared is None else prepared.contents(prepared.layout.grid)


def read_by_scores(
    block: Block, solutions: bytes, gradients: bytes, curvature_samples: int, train_ids: Ids, test_ids: Array
) -> bytes:
    """Return a digest of what a block of scores is of, given those of the blocks that it reads."""
    tests, samples = block.bounds["test"], block.bounds["sample"]
    return digest([solutions, gradients, curvature_samples.to_bytes(8, "little"), train_ids[samples], test_ids[tests]])


def read_by_combined(block: Block, parts: Iterable[tuple[Grid, Callable[[Block], bytes | None]]]) -> bytes:
    """Return a digest of what a block of combined scores is of.

    Args:
        block: of theirs.
        parts: of each model the grid of its scores, and what gives the digest of a block, None where it is not there.
    """
    found = []
    for grid, content in parts:
        bands = zip(grid.axes, (block.bounds[axis.name] for axis in grid.axes), strict=True)
        spans = [range(part.start // axis.band, -(-part.stop // axis.band)) for axis, part in bands]
        found += [content(grid.block(index)) or b"missing" for index in itertools.product(*spans)]
    return digest(found)


def covering(grid: Grid, part: slice) -> Sequence[Block]:
    """Return the blocks of a one-dimensional grid that cover a part of it."""
    band = grid.axes[0].band
    return [grid.block((i,)) for i in range(part.start // band, -(-part.stop // band))]


def _positions(known: Array, ids: Sequence[int] | Array, of: str) -> Array:
    """Return the positions of some ids.

    Raises:
        RequestError: an id is not known.
    """
    found = {int(one): position for position, one in enumerate(known)}
    missing = [one for one in ids if int(one) not in found]
    if missing or not len(ids):
        what = f"{', '.join(map(str, missing[:10]))}{', …' * (len(missing) > 10)}" if missing else "none"
        raise RequestError(
            f"{of} samples: {what}; there are {len(known)}, with ids from {known.min()} to {known.max()}"
        )
    return np.array([found[int(one)] for one in ids], np.int64)


def cached_results(cache: Cache, tests: str | None = None, *, with_members: bool = False) -> list[Group]:
    """Return results of a test set, or all: combined ones, and those of one model that none of these is made of.

    Args:
        cache: where.
        tests: the test set.
        with_members: also those that some are made of.

    Raises:
        CacheDamaged: the description of a combined result is, so that it is not known what that is made of.
    """
    there = [path for path in cache.paths("combined") if tests in (None, path.name.rpartition("-")[0])]
    combined = [Group(path) for path in there]
    members = {name for group in combined for name in group.attributes["identity"]["members"]}
    return [
        *combined,
        *(
            group
            for group in cache.groups("influence")
            if tests in (None, group.attributes["tests"]) and (with_members or group.path.name not in members)
        ),
    ]


def _whole_identity(cache: Cache, group: Group) -> dict[str, Any]:
    """Return what results depend on, with what was read for them in the place of its keys."""
    identity = dict(group.attributes["identity"])
    if "members" in identity:
        combination, members = identity.pop("combination"), identity.pop("members")
        first = cache.find("influence", min(members))
        whole = {} if first is None else _whole_identity(cache, first)
        whole.pop("weights", None)
        return {**whole, **identity, "combined": described(combination, members)}
    for stage, name in group.attributes["reads"].items():
        del identity[stage]
        read = cache.find(stage, name)
        identity |= read.attributes["identity"] if read else {stage: name}
    return identity


def described(combination: str, members: Mapping[str, float]) -> str:
    """Say what is combined, and how."""
    keys = {name.rpartition("-")[2]: weight for name, weight in members.items()}
    if combination == "mean":
        return f"mean of {len(keys)}: {', '.join(keys)}"
    return f"sum of {len(keys)}: {' + '.join(f'{weight:g} · {key}' for key, weight in keys.items())}"


def refuse_damaged(cache: Cache, tests: str | None = None) -> None:
    """Refuse to say that there are no results, of a test set or at all, where their description is damaged.

    Raises:
        CacheDamaged: one is.
    """
    for path in (*cache.paths("influence"), *cache.paths("combined")):
        if tests in (None, path.name.rpartition("-")[0]):
            Group(path)
