"""What a user does with results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import TensorDataset

import influence_pipeline as ip
from influence_pipeline.experiment import weights_hash
from tests import tiny

Make = Callable[..., ip.Pipeline]
N, T = 60, 10


@pytest.fixture(scope="module")
def influences(finished: Path) -> ip.Influences:
    return ip.Influences.open(finished, "holdout")


def order(scores: np.ndarray, ids: np.ndarray, best_first: bool) -> np.ndarray:
    """Rank ids by score, equal scores by id."""
    return ids[np.lexsort((ids, -scores if best_first else scores))]


# ---- rankings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 7, N])
def test_helpful_and_harmful_are_the_ends_of_the_scores(influences: ip.Influences, k: int) -> None:
    scores = influences.scores[:]
    for (ids, found), best_first in ((influences.helpful(k), True), (influences.harmful(k), False)):
        assert ids.shape == found.shape == (T, k)
        assert ids.dtype == np.int64
        assert found.dtype == np.float32
        for row in range(T):
            np.testing.assert_array_equal(ids[row], order(scores[row], influences.train_ids, best_first)[:k])
            np.testing.assert_array_equal(found[row], scores[row, ids[row]])


def test_averages_are_over_the_tests(influences: ip.Influences) -> None:
    mean = influences.mean_scores()
    assert mean.shape == (N,)
    np.testing.assert_allclose(mean, influences.scores[:].astype(np.float64).mean(axis=0), rtol=1e-5, atol=1e-9)
    ids, scores = influences.helpful_on_average(5)
    np.testing.assert_array_equal(ids, order(mean, influences.train_ids, best_first=True)[:5])
    np.testing.assert_array_equal(scores, mean[ids])
    ids, _ = influences.harmful_on_average(5)
    np.testing.assert_array_equal(ids, order(mean, influences.train_ids, best_first=False)[:5])


def test_the_offset_is_the_mean_score_with_the_other_sign(influences: ip.Influences) -> None:
    np.testing.assert_allclose(influences.offset, -influences.scores[:].astype(np.float64).mean(axis=1), rtol=1e-6)


@pytest.mark.parametrize("k", [0, -1, N + 1])
def test_a_k_that_cannot_be_is_refused_with_the_number(influences: ip.Influences, tmp_path: Path, k: int) -> None:
    train = tiny.points(N, 1)
    for ask in (
        lambda: influences.helpful(k),
        lambda: influences.harmful(k),
        lambda: influences.helpful_on_average(k),
        lambda: influences.harmful_on_average(k),
        lambda: influences.subset(train, k),
        lambda: influences.to_json(tmp_path / "out.json", k),
    ):
        with pytest.raises(ip.RequestError, match=f"k = {k}: there are 60 training samples"):
            ask()
    assert not (tmp_path / "out.json").exists()


def test_ranks_that_were_not_kept_are_refused_where_scores_were_not_stored(make: Make, cache: Path) -> None:
    found = make(influence={"top_k": 3, "store_scores": False}).run()["holdout"]
    stored = make(cache.parent / "stored", influence={"top_k": 3}).run()["holdout"]
    for ours, theirs in ((found.helpful(3), stored.helpful(3)), (found.harmful(3), stored.harmful(3))):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(found.mean_scores(), stored.mean_scores())
    np.testing.assert_array_equal(found.offset, stored.offset)
    with pytest.raises(ip.RequestError, match=r"k = 4, and 3 ranks were kept.*top_k"):
        found.helpful(4)
    with pytest.raises(ip.RequestError, match="store_scores = false"):
        found.scores  # noqa: B018
    with pytest.raises(ip.RequestError, match="store_scores = false"):
        found.to_xarray()
    assert not list(cache.glob("influence/*/scores"))


def test_more_ranks_than_samples_are_refused_and_the_default_is_all(make: Make) -> None:
    with pytest.raises(ip.RequestError, match=r"influence\.top_k = 61, and there are 60 training samples"):
        make(influence={"top_k": 61}).run()
    pipeline = make()
    pipeline.settings = pipeline.settings.model_copy(update={"influence": ip.Settings().influence})
    found = pipeline.run()["holdout"]
    assert found.helpful(N)[0].shape == (T, N)


def test_equal_scores_are_ranked_by_id(make: Make) -> None:
    inputs, labels = tiny.points(1, 1).tensors
    same = TensorDataset(
        inputs.repeat(48, 1), labels.repeat(48)
    )  # whole tiles: products of other shapes round otherwise
    found = make(train=same, s_test={"solver": "identity"}, influence={"top_k": 3}).run()["holdout"]
    for ids, _ in (found.helpful(3), found.harmful(3)):
        assert (ids == [0, 1, 2]).all()
    assert found.helpful_on_average(48)[0].tolist() == list(range(48))


class Margin(ip.Classification):
    higher_is_better = True


def test_higher_is_better_turns_what_helpful_means_and_not_the_scores(make: Make, cache: Path, tmp_path: Path) -> None:
    loss = make().run()["holdout"]
    margin = make(cache.parent / "margin", task=Margin(l2=0.01)).run()["holdout"]
    np.testing.assert_array_equal(margin.scores[:], loss.scores[:])
    np.testing.assert_array_equal(margin.helpful(4), loss.harmful(4))
    np.testing.assert_array_equal(margin.harmful(1), loss.helpful(1))
    np.testing.assert_array_equal(margin.helpful_on_average(4), loss.harmful_on_average(4))
    assert ip.Influences.open(cache.parent / "margin", "holdout").higher_is_better
    for found, name in ((loss, "loss"), (margin, "margin")):
        found.to_json(tmp_path / f"{name}.json", k=4)
    ours, theirs = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("margin", "loss"))
    assert all(ours[test]["helpful"] == theirs[test]["harmful"] for test in theirs)


# ---- ids -------------------------------------------------------------------------------------------------------------


def test_every_id_shown_is_one_of_the_train_ids(make: Make, cache: Path, tmp_path: Path) -> None:
    names = [1000 - 3 * i for i in range(N)]
    found = make(train_ids=names).run()["holdout"]
    plain = make(cache.parent / "plain").run()["holdout"]
    assert found.train_ids.tolist() == names
    np.testing.assert_array_equal(found.scores[:], plain.scores[:])
    np.testing.assert_array_equal(found.helpful(5)[0], np.asarray(names)[plain.helpful(5)[0]])
    np.testing.assert_array_equal(found.harmful(1)[0], np.asarray(names)[plain.harmful(1)[0]])
    np.testing.assert_array_equal(found.helpful_on_average(5)[0], np.asarray(names)[plain.helpful_on_average(5)[0]])
    assert found.subset(tiny.points(N, 1), 5).indices == plain.subset(tiny.points(N, 1), 5).indices
    found.to_json(tmp_path / "out.json", k=2)
    assert set(json.loads((tmp_path / "out.json").read_text())["3"]["helpful"]) <= set(names)


def test_other_train_ids_rank_anew_over_the_same_gradients(done: Path, make: Make) -> None:
    before = {path: path.read_bytes() for path in done.glob("grad_z/**/c/**/*") if path.is_file()}
    names = list(range(100, 100 + N))
    found = make(train_ids=names).run()["holdout"]
    assert (found.helpful(1)[0] >= 100).all()
    assert all(path.read_bytes() == data for path, data in before.items())
    assert (make().run()["holdout"].helpful(1)[0] < N).all()


@pytest.mark.parametrize("ids", [list(range(59)), [0] * N, [0.5 + i for i in range(N)], [-1 - i for i in range(N)]])
def test_train_ids_that_name_no_samples_are_refused(make: Make, ids: list[int]) -> None:
    with pytest.raises(ip.RequestError, match="train_ids must be 60 different whole numbers"):
        make(train_ids=ids).run()


def test_a_subset_has_the_samples_of_largest_mean_influence(influences: ip.Influences) -> None:
    train = tiny.points(N, 1)
    subset = influences.subset(train, 6)
    mean = np.abs(influences.mean_scores())
    assert len(subset) == 6
    assert set(subset.indices) == set(np.argsort(-mean, kind="stable")[:6].tolist())
    with pytest.raises(ip.RequestError, match="train has 50 samples, the influences are of 60"):
        influences.subset(tiny.points(50, 1), 6)


# ---- other forms -----------------------------------------------------------------------------------------------------


def test_json_has_the_schema_and_all_ids(influences: ip.Influences, tmp_path: Path) -> None:
    influences.to_json(tmp_path / "all.json")
    found = json.loads((tmp_path / "all.json").read_text())
    assert list(found) == [str(i) for i in range(T)]
    for row, entry in enumerate(found.values()):
        assert list(entry) == ["label", "num_in_dataset", "time_calc_influence_s", "influence", "harmful", "helpful"]
        assert entry["label"] == int(tiny.points(T, 2)[row][1])
        assert entry["num_in_dataset"] == row
        assert entry["time_calc_influence_s"] == 0
        assert entry["influence"] == influences.scores[row].tolist()
        assert entry["helpful"] == influences.helpful(N)[0][row].tolist()
        assert entry["harmful"] == influences.harmful(N)[0][row].tolist()


def test_json_is_limited_by_k_and_by_what_was_kept(influences: ip.Influences, make: Make, tmp_path: Path) -> None:
    influences.to_json(tmp_path / "two.json", k=2)
    two = json.loads((tmp_path / "two.json").read_text())
    assert all(len(entry["helpful"]) == len(entry["harmful"]) == 2 for entry in two.values())
    assert len(two["0"]["influence"]) == N
    found = make(influence={"top_k": 3, "store_scores": False}).run()["holdout"]
    found.to_json(tmp_path / "kept.json")
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert all(len(entry["helpful"]) == len(entry["harmful"]) == 3 for entry in kept.values())
    assert kept["0"]["influence"] == []
    assert kept["0"]["time_calc_influence_s"] > 0


def test_xarray_has_ids_as_coordinates(influences: ip.Influences) -> None:
    pytest.importorskip("xarray")
    table = influences.to_xarray()
    assert table.dims == ("test", "train")
    np.testing.assert_array_equal(table.sel(test=3, train=7), influences.scores[3, 7])
    np.testing.assert_array_equal(table["offset"], influences.offset)
    assert table.attrs["tests"] == "holdout"


def test_labels_and_evidence_come_with_results(influences: ip.Influences) -> None:
    tests, trains = influences.labels()
    assert tests is not None
    assert trains is not None
    assert tests.tolist() == [int(label) for _, label in tiny.points(T, 2)]
    assert trains.tolist() == [int(label) for _, label in tiny.points(N, 1)]
    assert influences.residual is not None
    assert influences.residual.shape == (T,)
    assert influences.damping is not None
    assert influences.damping > 0
    assert len(influences) == T
    assert "60 training samples on 10 tests 'holdout'" in repr(influences)


def test_results_stand_without_what_they_were_made_of(done: Path, tmp_path: Path) -> None:
    for stage in ("grad_z", "s_test", "curvature"):
        shutil.rmtree(done / stage)
    found = ip.Influences.open(done, "holdout")
    assert found.helpful(5)[0].shape == (T, 5)
    assert found.labels() == (None, None)
    assert found.residual is None
    assert found.damping is None
    found.to_json(tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["0"]["label"] is None


# ---- opening ---------------------------------------------------------------------------------------------------------


def test_results_open_by_key_where_there_are_several(done: Path, make: Make) -> None:
    one = ip.Influences.open(done, "holdout")
    two = make(s_test={"solver": "identity"}).run()["holdout"]
    with pytest.raises(ip.RequestError, match="several results for 'holdout'") as refused:
        ip.Influences.open(done, "holdout")
    for found in (one, two):
        assert f'key="{found.key}"' in str(refused.value)
        again = ip.Influences.open(done, "holdout", key=found.key)
        np.testing.assert_array_equal(again.scores[:], found.scores[:])
    assert "s_test.solver = identity" in str(refused.value)
    assert "weights" not in str(refused.value)


def test_results_of_other_weights_are_told_apart_by_them(done: Path, make: Make) -> None:
    make(model=lambda: tiny.model(1)).run(new=True)
    with pytest.raises(ip.RequestError, match="several results") as refused:
        ip.Influences.open(done, "holdout")
    hashes = {weights_hash(tiny.model(seed)) for seed in (0, 1)}
    lines = str(refused.value).splitlines()[1:]
    assert {line.partition('"  ')[2] for line in lines} == {f"weights = {found}" for found in hashes}


def test_what_is_not_there_is_said_with_what_is(done: Path, tmp_path: Path) -> None:
    with pytest.raises(ip.MissingStage, match=r"no results for 'nope' in .*; there is: holdout"):
        ip.Influences.open(done, "nope")
    with pytest.raises(ip.MissingStage, match="no results for 'holdout' with key 0123"):
        ip.Influences.open(done, "holdout", key="0123")
    with pytest.raises(ip.MissingStage, match="there is: nothing"):
        ip.Influences.open(tmp_path / "empty", "holdout")
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize("emptied", [False, True])
@pytest.mark.parametrize("lost", ["blocks/c/0/0/0", "finished/c/0", "scores/c/2/1", "helpful_ids/c/0/0", "offset/c/0"])
def test_results_that_have_lost_a_file_do_not_open(done: Path, make: Make, lost: str, emptied: bool) -> None:
    path = next(done.glob(f"influence/*/{lost}"))
    path.write_bytes(b"") if emptied else path.unlink()
    gone = lost.startswith("blocks") or (lost.startswith("finished") and not emptied)
    with pytest.raises(ip.MissingStage if gone else ip.CacheDamaged, match=r"run the pipeline again"):
        ip.Influences.open(done, "holdout")
    make().run()
    assert ip.Influences.open(done, "holdout").scores.shape == (T, N)


@pytest.mark.parametrize("name", ["helpful_ids", "scores"])
def test_results_with_a_cut_file_are_damaged(done: Path, name: str) -> None:
    path = next(done.glob(f"influence/*/{name}/c/0/0"))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ip.CacheDamaged, match="run the pipeline again"):
        ip.Influences.open(done, "holdout")
