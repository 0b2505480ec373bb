"""Data sets are read by position, are the same every time, and are named where they are at fault."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import influence_pipeline as ip
from influence_pipeline import samples
from influence_pipeline.samples import DataSet, check_dataset, digest
from tests import tiny

Make = Callable[..., ip.Pipeline]


class Samples(Dataset[Any]):
    """Any list as a data set."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> Any:
        return self.samples[position]


class Broken(Samples):
    """Raises at one sample."""

    def __init__(self, samples: list[Any], at: int) -> None:
        super().__init__(samples)
        self.at = at

    def __getitem__(self, position: int) -> Any:
        if position == self.at:
            raise ValueError("no such file")
        return self.samples[position]


class Augmented(Samples):
    """Gives one sample with new noise each time."""

    def __init__(self, samples: list[Any], at: int) -> None:
        super().__init__(samples)
        self.at, self.fetched = at, 0

    def __getitem__(self, position: int) -> Any:
        inputs, label = self.samples[position]
        self.fetched += 1
        return (inputs + self.fetched, label) if position == self.at else (inputs, label)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([1, 2, 3])


def listed(count: int = 60) -> list[Any]:
    return [tuple(sample) for sample in tiny.points(count, 1)]


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_random_augmentation_is_refused_with_the_sample(make: Make) -> None:
    with pytest.raises(ip.CacheMismatch, match=r"data set 'train': sample 15 differs when fetched twice.*augmentation"):
        make(train=Augmented(listed(), at=15)).grad_z()
    with pytest.raises(ip.CacheMismatch, match="data set 'holdout': sample 5 differs when fetched twice"):
        make(tests={"holdout": Augmented(listed(10), at=5)}).s_test("holdout")


def test_an_augmentation_that_was_not_seen_at_first_is_refused_when_it_is_read_again() -> None:
    data = DataSet(Augmented(listed(), at=38), "train")
    data.check_fixed([0, 15, 30])
    data.batch([37, 38])
    with pytest.raises(ip.CacheMismatch, match="sample 38 differs"):
        data.batch([38, 39])


@pytest.mark.parametrize("data", [Stream(), [], Samples([]), 42, iter([1, 2])], ids=lambda data: type(data).__name__)
def test_what_cannot_be_read_by_position_is_refused(data: Any) -> None:
    with pytest.raises(ip.RequestError, match=r"data set 'train' is (empty|a .*__getitem__ and __len__)"):
        check_dataset(data, "train")


def test_streams_and_empty_sets_are_refused_by_a_pipeline(make: Make) -> None:
    with pytest.raises(ip.RequestError, match="data set 'train' is a Stream"):
        make(train=Stream()).run()
    with pytest.raises(ip.RequestError, match="data set 'train' is empty"):
        make(train=Samples([])).run()
    with pytest.raises(ip.RequestError, match="data set 'holdout' is empty"):
        make(tests={"holdout": Samples([])}).run()
    with pytest.raises(ip.RequestError, match="no test set"):
        make(tests={}).run()


def test_an_error_in_the_data_set_names_the_sample_and_keeps_what_is_done(make: Make) -> None:
    with pytest.raises(ip.WorkError, match="data set 'train' raised at sample 38: ValueError: no such file") as failed:
        make(train=Broken(listed(), at=38)).grad_z()
    assert failed.value.exit_code == 1
    assert make(train=Samples(listed())).grad_z().computed == 2


def test_samples_that_cannot_be_collated_are_refused() -> None:
    ragged = DataSet(Samples([(torch.zeros(2), 0), (torch.zeros(3), 1)]), "train")
    with pytest.raises(ip.RequestError, match=r"data set 'train': its samples cannot be collated.*`collate`"):
        ragged.batch([0, 1])


def test_a_collate_that_loses_samples_is_refused() -> None:
    data = DataSet(Samples(listed()), "train", collate=lambda samples: torch.stack([s[0] for s in samples[1:]]))
    with pytest.raises(ip.RequestError, match="3 samples collate to a batch of 2"):
        data.batch([0, 1, 2])


def test_a_collate_without_tensors_is_refused(make: Make) -> None:
    with pytest.raises(ip.RequestError, match="tensors with the batch first"):
        make(collate=lambda samples: ["no tensor"]).grad_z()


# ---- batches ---------------------------------------------------------------------------------------------------------


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return len(one) == len(other) and all(itertools.starmap(same, zip(one, other, strict=True)))


@pytest.mark.parametrize("kind", [dict, UserDict, OrderedDict])
def test_mappings_of_every_kind_become_dicts(kind: type) -> None:
    samples = [kind(x=torch.full((2,), float(i)), inner=kind(y=torch.tensor(i)), labels=i % 2) for i in range(4)]
    batch = DataSet(Samples(samples), "train").batch([1, 3])
    assert type(batch) is dict
    assert type(batch["inner"]) is dict
    assert torch.equal(batch["x"], torch.tensor([[1.0, 1.0], [3.0, 3.0]]))
    assert torch.equal(batch["inner"]["y"], torch.tensor([1, 3]))


def test_a_collate_that_gives_a_userdict_gives_a_dict() -> None:
    data = DataSet(Samples(listed()), "train", collate=lambda samples: UserDict(x=torch.stack([s[0] for s in samples])))
    batch = data.batch([0, 1])
    assert type(batch) is dict
    assert batch["x"].shape == (2, 6)


def test_leaves_that_are_no_tensors_are_dropped_unless_the_task_keeps_them() -> None:
    samples = [{"x": torch.ones(2), "text": f"sample {i}", "note": "n"} for i in range(3)]
    assert set(DataSet(Samples(samples), "train").batch([0, 1])) == {"x"}
    kept = DataSet(Samples(samples), "train", keep_entries=("text",)).batch([2, 0])
    assert set(kept) == {"x", "text"}
    assert kept["text"] == ["sample 2", "sample 0"]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_loader_workers_give_the_same_batches_and_digests() -> None:
    alone, loaded = DataSet(Samples(listed()), "train"), DataSet(Samples(listed()), "train", workers=2)
    ids = [5, 3, 40, 41, 59, 0, 7]
    batches = list(loaded.batches(ids, 3))
    assert [len(batch[1]) for batch in batches] == [3, 3, 1]
    assert all(itertools.starmap(same, zip(batches, alone.batches(ids, 3), strict=True)))
    assert loaded._known.sum() == len(ids)
    np.testing.assert_array_equal(loaded.digests(ids), alone.digests(ids))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_loader_workers_give_samples_as_the_data_set_does() -> None:
    samples = [(np.full(3, float(i)), [i, str(i)]) for i in range(6)]
    loaded = DataSet(Samples(samples), "train", workers=1)
    list(loaded.batches(range(6), 4))
    loaded.check_fixed(range(6))


def test_a_kept_data_set_never_mixes_samples_with_others_texts() -> None:
    samples = [{"x": torch.tensor([float(i)]), "text": str(i)} for i in range(6)]
    data = DataSet(Samples(samples), "train", keep_entries=("text",), keep_bytes=2**20)
    data.keep()
    batch = data.batch([4, 1])
    assert (batch["x"].flatten().tolist(), batch["text"]) == ([4.0, 1.0], ["4", "1"])


@pytest.mark.parametrize(("num", "start"), [(0, 0), (1, -1)])
def test_per_class_refuses_numbers_that_select_nothing(num: int, start: int) -> None:
    with pytest.raises(ip.RequestError, match="num must be at least 1"):
        ip.per_class(tiny.points(9, 1), num, start)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_an_error_in_a_loader_worker_names_the_sample() -> None:
    data = DataSet(Broken(listed(), at=7), "train", workers=1)
    with pytest.raises(ip.WorkError, match="data set 'train' raised at sample 7: ValueError: no such file"):
        list(data.batches(range(10), 4))


def test_a_kept_data_set_gives_the_same_batches_without_reading() -> None:
    read: list[int] = []

    class Counted(Samples):
        def __getitem__(self, position: int) -> Any:
            read.append(position)
            return super().__getitem__(position)

    kept = DataSet(Counted(listed()), "train", keep_bytes=10**6)
    kept.keep()
    read.clear()
    fresh = DataSet(Samples(listed()), "train")
    for ids in ([3], [5, 3, 59], range(60)):
        assert same(kept.batch(ids), fresh.batch(ids))
    assert read == []


def test_a_data_set_that_does_not_fit_is_not_kept() -> None:
    data = DataSet(Samples(listed()), "train", keep_bytes=60 * 32 - 1)
    data.keep()
    assert data._kept is None
    fits = DataSet(Samples(listed()), "train", keep_bytes=60 * 32)
    fits.keep()
    assert fits._kept is not None


# ---- digests ---------------------------------------------------------------------------------------------------------

X = torch.arange(6.0)
DIFFERENT = [
    X,
    X.double(),
    X.reshape(2, 3),
    X.flip(0),
    X + 1e-6,
    X.numpy(),
    X.numpy().astype(np.int32),
    X.numpy().reshape(3, 2),
    X.tolist(),
    [X.tolist()],
    (X, 1),
    (X, 1.0),
    (X, True),
    (X, "1"),
    (X, None),
    (X, torch.tensor(1)),
    (X, np.int64(1)),
    {"x": X},
    {"y": X},
    {"x": X, "y": X},
    b"bytes",
    "bytes",
    None,
    0,
    -0.0,
    0.0,
    "",
    b"",
    [],
    {},
    X[:0],
]


def test_digests_differ_by_type_shape_and_value() -> None:
    assert len({digest(sample) for sample in DIFFERENT}) == len(DIFFERENT)


def test_digests_are_equal_for_equal_samples_however_they_lie_in_memory() -> None:
    assert digest((X, 3)) == digest((X.clone(), 3))
    table = torch.arange(12.0).reshape(3, 4)
    assert digest(table.T) == digest(table.T.contiguous())
    assert digest(table.numpy().T) == digest(np.ascontiguousarray(table.numpy().T))
    assert digest(X.requires_grad_(False)) == digest(X.clone().requires_grad_(True))
    assert digest({"x": X}) == digest(UserDict(x=X)) == digest(OrderedDict(x=X))


def test_digests_are_the_same_in_every_process() -> None:
    assert digest((torch.tensor([1.0, 2.0]), 3)).hex() == "31dbb0759ae1a4da8c3c45b4c7781038"


def test_objects_are_read_by_their_attributes() -> None:
    class Point:
        def __init__(self, x: float) -> None:
            self.x = x

    assert digest(Point(1.0)) == digest(Point(1.0))
    assert digest(Point(1.0)) != digest(Point(2.0))


def test_what_has_no_stable_bytes_is_refused() -> None:
    with pytest.raises(ip.RequestError, match="of which no digest can be taken"):
        digest((X, object()))


def test_pictures_are_read_by_their_pixels() -> None:
    image = pytest.importorskip("PIL.Image")
    one, other = image.new("L", (3, 3), 1), image.new("L", (3, 3), 2)
    assert digest(one) == digest(image.new("L", (3, 3), 1))
    assert digest(one) != digest(other)


# ---- the same number of each class -----------------------------------------------------------------------------------


def labelled(labels: list[int]) -> TensorDataset:
    return TensorDataset(torch.arange(float(len(labels)))[:, None], torch.tensor(labels))


def test_per_class_takes_the_first_of_each_class_after_some() -> None:
    data = labelled([2, 0, 1, 0, 2, 1, 0, 2, 1])
    assert ip.per_class(data, 2).indices == [1, 3, 2, 5, 0, 4]
    assert ip.per_class(data, 1, start=2).indices == [6, 8, 7]
    chosen = ip.per_class(data, 2)
    assert [int(chosen[i][1]) for i in range(len(chosen))] == [0, 0, 1, 1, 2, 2]


def test_per_class_reads_labels_of_tuples_mappings_and_targets() -> None:
    tuples = Samples([(torch.zeros(1), label) for label in [1, 0, 1, 0]])
    mappings = Samples([UserDict(x=torch.zeros(1), labels=torch.tensor(label)) for label in [1, 0, 1, 0]])
    with_targets = Samples(["unreadable"] * 4)
    with_targets.targets = torch.tensor([1, 0, 1, 0])  # type: ignore[attr-defined]
    assert [ip.per_class(data, 1).indices for data in (tuples, mappings, with_targets)] == [[1, 0]] * 3


def test_per_class_refuses_a_class_that_is_too_small_with_the_counts() -> None:
    data = labelled([0, 0, 1, 2, 2])
    with pytest.raises(ip.RequestError, match="needs 2 samples of each class; there are only 1 of class 1"):
        ip.per_class(data, 2)
    with pytest.raises(ip.RequestError, match="per_class = 1, start = 1"):
        ip.per_class(data, 1, start=1)


def test_a_test_set_cut_by_settings_keeps_the_positions_of_its_origin(make: Make) -> None:
    pipeline = make(s_test={"solver": "identity"})
    pipeline.settings = pipeline.settings.model_copy(
        update={"tests": {"few": ip.Settings(tests={"few": {"per_class": 1}}).tests["few"]}}
    )
    few = pipeline.run()["few"]
    labels = [int(label) for _, label in tiny.points(10, 2)]
    assert few.test_ids.tolist() == [labels.index(label) for label in sorted(set(labels))]


@pytest.mark.parametrize("keep_bytes", [0, 2**20], ids=["read ahead", "kept"])
def test_a_stream_is_the_batches_of_its_parts(keep_bytes: int) -> None:
    data = DataSet(Samples([torch.tensor(float(i)) for i in range(10)]), "train", keep_bytes=keep_bytes)
    data.keep()
    parts = [[3, 1], [1], [9, 0, 4]]
    assert all(itertools.starmap(same, zip(data.stream(parts), map(data.batch, parts), strict=True)))


def test_a_sample_that_raises_while_it_is_read_ahead_is_an_error_that_names_it() -> None:
    data = DataSet(Broken([torch.tensor(float(i)) for i in range(10)], at=7), "train")
    with pytest.raises(ip.WorkError, match="'train' raised at sample 7: ValueError: no such file"):
        list(data.batches(range(10), 2))
    assert not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


# ---- digests of very many samples ------------------------------------------------------------------------------------


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a handful of samples be very many."""
    monkeypatch.setattr(samples, "AT_ONCE", 3)
    monkeypatch.setattr(samples, "AROUND", 4)


class Watched:
    """An array that says which rows were read."""

    def __init__(self, array: Any) -> None:
        self.array, self.shape, self.read = array, array.shape, list[slice]()

    def __getitem__(self, rows: slice) -> Any:
        self.read.append(rows)
        return self.array[rows]


def test_digests_of_very_many_samples_are_read_when_they_are_asked_for(many: None) -> None:
    right = DataSet(tiny.points(30, 1), "points").digests(range(30))
    data, first, other = DataSet(tiny.points(30, 1), "points"), Watched(right[:20]), Watched(right)
    data.sample(5)
    data.expect(first, slice(0, 20))
    data.expect(other, slice(10, 26))
    data.expect(other, slice(26, 28))
    assert first.read == []
    assert other.read == [slice(26, 28)], "few are read at once"
    assert data.expected.tolist() == list(range(28))
    np.testing.assert_array_equal(data.digests(range(7, 9)), right[7:9])
    assert first.read == [slice(4, 8), slice(8, 12)]
    np.testing.assert_array_equal(data.digests([21, 3]), right[[21, 3]])
    np.testing.assert_array_equal(data.digests(range(30)), right)
    read = len(first.read), len(other.read)
    np.testing.assert_array_equal(data.digests(range(30)), right)
    assert (len(first.read), len(other.read)) == read, "each is read once"
    assert data.fingerprint(30) == DataSet(tiny.points(30, 1), "points").fingerprint(30)


def test_changed_samples_are_seen_among_very_many(many: None) -> None:
    right = DataSet(tiny.points(30, 1), "points").digests(range(30))
    wrong = right.copy()
    wrong[17] ^= 1
    data = DataSet(tiny.points(30, 1), "points")
    data.expect(Watched(wrong), slice(0, 30))
    assert list(data.changed(list(range(30)))) == [17]
    data.sample(16)
    with pytest.raises(ip.CacheMismatch, match="sample 17 is not what it was"):
        data.sample(17)
    data.forget()
    assert not data.expected.size
    data.expect(Watched(right), slice(0, 30))
    assert data.changed(list(range(30))) == {}
    data.sample(17)


def test_some_of_those_that_are_expected_are_chosen_without_a_list(many: None) -> None:
    data, digests = DataSet(tiny.points(30, 1), "points"), np.zeros((30, 16), np.uint8)
    for part in (slice(0, 2), slice(11, 19), slice(29, 30), slice(40, 50)):
        data.expect(digests, part)
    expected = data.expected.tolist()
    assert data.expected_among(lambda count: list(range(count))) == expected
    assert data.expected_among(lambda count: [count - 1, 0]) == [29, 0]
    assert DataSet(tiny.points(3, 1), "points").expected_among(lambda count: list(range(count))) == []
