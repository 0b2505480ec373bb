"""The page as a file: what is in it, what samples look like, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import zlib
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import influence_pipeline as ip
from influence_pipeline import report
from influence_pipeline.cli import app
from influence_pipeline.report.appearance import (
    LARGEST_SIDE,
    MOST_TEXT,
    MOST_VALUES,
    Appearance,
    Picture,
    Problem,
    Text,
    Values,
)
from influence_pipeline.report.distribution import FEW, Histogram, drawn, spread
from influence_pipeline.report.encoded import numbers
from tests import tiny

Make = Callable[..., ip.Pipeline]
N, T = 60, 10
HOSTILE = [
    "</script><script>window.stolen = 1</script>",
    "<img src=x onerror='window.stolen = 1'>",
    '" onmouseover="window.stolen = 1" \' &amp; {{ 7 * 7 }} ${7 * 7} <!-- ]]>',
    "שלום \u202eabc\u202c مرحبا",
    "👩‍👩‍👧‍👦 🏳️‍🌈 é \ud83d",
    "https://example.org/x.js \u2028\x00\x07 \\u003c",
]
PLAIN = re.compile(r'<script type="text/plain" id="block-([\w-]+)">([^<]*)</script>')


def blocks(page: Path) -> dict[str, Any]:
    """Return all data of a page, decoded as a browser does."""
    found = PLAIN.findall(page.read_text(encoding="utf-8"))
    assert len({name for name, _ in found}) == len(found) > 0
    return {name: json.loads(zlib.decompress(base64.b64decode(text, validate=True))) for name, text in found}


def listed(found: dict[str, Any], name: str) -> list[Any]:
    """Return a list that is cut into blocks."""
    parts = [
        found[f"{name}-{number}"]
        for number in range(sum(re.fullmatch(rf"{name}-\d+", key) is not None for key in found))
    ]
    return [entry for part in parts for entry in part]


def opened(picture: Picture) -> Image.Image:
    image = Image.open(io.BytesIO(picture.data))
    assert image.format == picture.kind.upper()
    return image


def look(sample: Any, show: Any = None, few: Any = None) -> Any:
    return Appearance(show, [sample] if few is None else few)(sample)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Return digits (1797, 8, 8) with values from 0 to 16."""
    return torch.tensor(load_digits().images, dtype=torch.float32)


# ---- what samples look like ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (8, 8, 1), (3, 9, 8), (9, 8, 3), (4, 8, 8), (28, 20)], ids=str)
@pytest.mark.parametrize("kind", ["uint8", "float", "numpy", "bool", "bfloat16"])
def test_arrays_of_the_shape_of_images_are_pictures(shape: tuple[int, ...], kind: str) -> None:
    values = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    values.view(-1)[:2] = torch.tensor([0, 255], dtype=torch.uint8)
    expected = values if kind not in {"bool", "bfloat16"} else 255 * (values > 99).to(torch.uint8)
    given: Any = {
        "uint8": values,
        "float": values.float() / 255,
        "numpy": values.numpy(),
        "bool": values > 99,
        "bfloat16": (values > 99).to(torch.bfloat16),
    }[kind]
    found = look((given, torch.tensor(3)))
    assert isinstance(found, Picture)
    channels_last = expected.movedim(0, -1) if shape[0] in {1, 3, 4} else expected
    np.testing.assert_array_equal(np.asarray(opened(found)), channels_last.squeeze(-1).numpy())
    assert found.size == (channels_last.shape[1], channels_last.shape[0])


def test_values_of_pixels_mean_what_they_do_in_the_training_set(images: torch.Tensor) -> None:
    few = [(image, 0) for image in images[:32]]
    found = look((images[40], 0), few=few)
    np.testing.assert_array_equal(np.asarray(opened(found)), (images[40] / 16 * 255).round().numpy())
    normalised = (images / 16 - 0.3) / 0.4
    found = look(normalised[40], few=list(normalised[:32]))
    np.testing.assert_allclose(np.asarray(opened(found)), (images[40] / 16 * 255).numpy(), atol=0.51)
    broken = images[40].clone()
    broken[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert np.asarray(opened(look(broken, few=few)))[0, :3].tolist() == [0, 255, 0]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "1", "P", "LA", "CMYK", "I;16", "I", "F"])
def test_images_of_pil_are_pictures(mode: str) -> None:
    image = Image.linear_gradient("L").resize((20, 30))
    found = look((image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode), 1))
    assert isinstance(found, Picture)
    assert found.size == (20, 30)
    grey = np.asarray(opened(found).convert("L"), np.int64)
    assert grey[0].max() <= 16
    assert grey[-1].min() >= 239


def test_large_pictures_are_made_smaller_and_keep_their_size_in_words() -> None:
    found = look(torch.rand(3, 300, 200))
    assert found.size == (200, 300)
    assert found.kind == "jpeg"
    assert max(opened(found).size) == LARGEST_SIDE
    assert look(torch.rand(4, 300, 200)).kind == "png"  # it may be transparent


def test_flat_vectors_are_pictures_only_where_that_is_clear(images: torch.Tensor) -> None:
    flat = images.flatten(1)
    draw = np.random.default_rng(0)
    found = look(flat[50], few=list(flat[:32]))
    np.testing.assert_array_equal(np.asarray(opened(found)), (images[50] / 16 * 255).round().numpy())
    series = np.cumsum(draw.normal(size=(32, 64)), axis=1)
    series = (series - series.min()) / (series.max() - series.min())
    others = {
        "uniform": draw.random((32, 64)),
        "normal": draw.normal(size=(32, 64)),
        "one hot": np.eye(64)[:32],
        "series": series,
        "constant": np.ones((32, 64)),
        "no square": flat[:, :63].numpy(),
        "short": flat[:, :49].numpy(),
        "with negative entries": flat.numpy() - 1,
    }
    assert {name for name, of in others.items() if not isinstance(look(of[0], few=list(of)), Values)} == set()
    shuffled = flat[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    assert isinstance(look(shuffled[50], few=list(shuffled[:32])), Values)


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ((torch.tensor([0.25, -1.0]), 1), Values(("0.25", "-1"))),
        (torch.tensor([1 / 3]), Values(("0.3333",))),
        (torch.arange(3), Text("0 1 2")),
        (([5, 6, 7], 1), Text("5 6 7")),
        ([5, 6, 7], Text("5 6 7")),
        ((torch.tensor(4.5), 1), Text("4.5")),
        (("a text", 1), Text("a text")),
        ("a text", Text("a text")),
        ({"text": "a text", "label": 1}, Text("a text")),
        ({"question": "one", "answer": "two", "label": 1}, Values(("one", "two"), ("question", "answer"))),
        ({"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0], "labels": 1}, Text("5 6")),
        ({"input_ids": torch.tensor([5, 6, 0])}, Text("5 6 0")),
        ({"age": 31, "height": 1.751, "labels": 2}, Values(("31", "1.751"), ("age", "height"))),
        ((torch.zeros(12, 9, 9), 1), Text("float32 tensor of shape (12, 9, 9)")),
        ((torch.zeros(2, 2), 1), Text("float32 tensor of shape (2, 2)")),
        ((np.zeros((2, 9, 9, 9), np.int8), 1), Text("int8 array of shape (2, 9, 9, 9)")),
        ((torch.zeros(3, dtype=torch.complex64), 1), Text("complex64 tensor of shape (3,)")),
        (([[1, 2], [3]], 1), Text("a list")),
        ((None, 1), Text("a NoneType")),
        ((object(), 1), Text("a object")),
        (({"age": 3.0}, 1), Values(("3",), ("age",))),
    ],
    ids=lambda value: str(value) if isinstance(value, (Text, Values)) else "",  # others tell their address
)
def test_other_samples_are_texts_or_values(sample: Any, expected: Any) -> None:
    assert look(sample) == expected


def test_a_mapping_with_an_image_is_that_picture() -> None:
    assert isinstance(look({"labels": torch.rand(8, 8), "pixel_values": torch.rand(3, 8, 8)}), Picture)
    assert isinstance(look({"id": "x", "image": Image.new("RGB", (9, 9))}), Picture)


def test_what_is_long_is_cut_and_says_so() -> None:
    assert look("x" * (MOST_TEXT + 5)).text == "x" * MOST_TEXT + f" … ({MOST_TEXT + 5:,} characters)"
    found = look(torch.rand(MOST_VALUES + 9))
    assert (len(found.values), found.more) == (MOST_VALUES, 9)
    assert look({str(i): i for i in range(MOST_VALUES + 2)}).more == 2


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("text", Text("text")),
        (
            {"a": 1, "b": "two", "c": True, "d": [1.5, 2], "e": None},
            Values(("1", "two", "True", "1.5 2", "None"), tuple("abcde")),
        ),
        ({"a": torch.zeros(9, 9)}, Values(("float32 tensor of shape (9, 9)",), ("a",))),
        ({}, Values(())),
        (torch.tensor(3), Text("3")),
        (None, Problem("show returned a NoneType: no image, text or mapping")),
        (torch.zeros(2, 2), Problem("show returned float32 tensor of shape (2, 2): no image, text or mapping")),
    ],
    ids=str,
)
def test_show_returns_an_image_a_text_or_a_mapping(returned: Any, expected: Any) -> None:
    assert look(torch.rand(8, 8), show=lambda sample: returned) == expected


def test_show_has_the_sample_as_the_data_set_yields_it() -> None:
    sample = (torch.rand(64), torch.tensor(2))
    seen: list[Any] = []
    found = look(sample, show=lambda given: seen.append(given) or given[0].reshape(8, 8))
    assert all(given is sample for given in seen)
    assert isinstance(found, Picture)


def test_a_show_that_raises_is_a_problem_of_one_sample() -> None:
    def show(sample: int) -> str:
        return f"sample {10 // sample}"

    shown = Appearance(show, [0, 1])
    assert shown(0) == Problem("show raised ZeroDivisionError: integer division or modulo by zero")
    assert shown(2) == Text("sample 5")


# ---- distributions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", [[-1.0, 0.0, 0.5, 3.0], [1.0, 2.0], [-3.0, -2.0], [0.0], [1e-30, 2e-30]], ids=str)
def test_a_histogram_counts_every_score_on_its_side_of_zero(scores: list[float]) -> None:
    histogram = Histogram.between(min(scores), max(scores))
    histogram.add(np.array(scores, np.float32))
    assert histogram.counts.sum() == len(scores)
    assert np.abs(histogram.edges).min() == 0
    below = int(histogram.counts[histogram.edges[1:] <= 0].sum())
    assert below == sum(score < 0 for score in scores)
    picture = drawn(histogram, higher_is_better=False)
    assert len(picture.bars) == (histogram.counts > 0).sum()
    assert sum(bar.helpful for bar in picture.bars) == (histogram.counts[histogram.edges[1:] > 0] > 0).sum()
    assert all(
        0 <= bar.x <= picture.width and bar.y >= 0 and bar.y + bar.height <= picture.height for bar in picture.bars
    )
    assert len(picture.across) >= 3


def test_the_share_of_few_samples_is_of_all_scores_that_are_stored(finished: Path) -> None:
    influences = ip.Influences.open(finished, "holdout")
    found = spread(influences)
    sizes = np.sort(np.abs(influences.scores[:].astype(np.float64)), axis=1)
    assert found.shares is not None
    np.testing.assert_allclose(found.shares, sizes[:, -FEW:].sum(axis=1) / sizes.sum(axis=1))
    assert found.ranks == N
    assert found.scores is not None
    assert found.scores.counts.sum() == N * T
    assert found.means.counts.sum() == N


@pytest.mark.parametrize("top_k", [1, 15, 45, N])
def test_the_share_of_few_samples_is_of_the_ranks_that_were_kept_where_scores_were_not(
    done: Path, make: Make, finished: Path, top_k: int
) -> None:
    influences = make(influence={"top_k": top_k, "store_scores": False}).run()["holdout"]
    found = spread(influences)
    assert found.scores is None
    if top_k == 1:
        assert found.shares is None
        return
    scores = np.sort(ip.Influences.open(finished, "holdout").scores[:].astype(np.float64), axis=1)
    kept = scores if 2 * top_k >= N else np.hstack([scores[:, :top_k], scores[:, -top_k:]])
    sizes = np.sort(np.abs(kept), axis=1)
    assert found.ranks == kept.shape[1]
    assert found.shares is not None
    np.testing.assert_allclose(found.shares, sizes[:, -FEW:].sum(axis=1) / sizes.sum(axis=1), rtol=1e-5)


def test_numbers_are_rounded_but_whole_ones_are_exact() -> None:
    values = np.array([1234567.0, 0.123456789, -0.0, np.nan, np.inf, -3.0, 1e300])
    assert json.dumps(numbers(values)) == "[1234567, 0.12346, 0, null, null, -3, " + json.dumps(int(1e300)) + "]"
    assert numbers(np.array([[1.5], [np.nan]])) == [[1.5], [None]]


# ---- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(done: Path, make: Make, tmp_path: Path) -> Path:
    """Return the page of the tiny experiment."""
    return make().report("holdout", tmp_path / "report.html", k=4)


def test_the_page_has_what_the_results_are(page: Path, done: Path) -> None:
    found, influences = blocks(page), ip.Influences.open(done, "holdout")
    tests, training = found["tests-table"], found["training-table"]
    ids = np.array(training["id"])
    for side, (helpful, scores) in enumerate((influences.helpful(4), influences.harmful(4))):
        for row, ranks in enumerate(listed(found, "ranks")):
            np.testing.assert_array_equal(ids[ranks[2 * side]], helpful[row])
            np.testing.assert_allclose(ranks[2 * side + 1], scores[row], rtol=1e-4)
    points, others = tiny.points(T, 2), tiny.points(N, 1)
    assert tests["id"] == list(range(T))
    assert tests["label"] == [int(label) for _, label in points]
    assert training["label"] == [int(others[i][1]) for i in ids]
    with torch.no_grad():
        outputs = tiny.model()(points.tensors[0])
    predicted = outputs.argmax(1)
    assert tests["prediction"] == predicted.tolist()
    assert tests["right"] == (predicted == points.tensors[1]).int().tolist()
    losses = torch.nn.functional.cross_entropy(outputs, points.tensors[1], reduction="none")
    np.testing.assert_allclose(tests["loss"], losses, rtol=1e-4)
    np.testing.assert_allclose(training["loss"], np.asarray(influences.losses())[ids], rtol=1e-4)
    np.testing.assert_allclose(training["mean"], influences.mean_scores()[ids], rtol=1e-4)
    mean = influences.mean_scores()
    order = [i for i in influences.harmful_on_average(N)[0] if mean[i] < 0]
    np.testing.assert_array_equal(ids[found["listed"]], order)
    shown = listed(found, "tests-looks")
    assert len(shown) == T
    assert shown[3] == {"values": [f"{value:.4g}" for value in points[3][0].tolist()], "names": [], "more": 0}


def test_the_page_refers_to_nothing_outside_of_itself(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    plain = PLAIN.sub("", text)
    assert "default-src 'none'" in plain
    assert not re.search(r"https?:|\bsrc\s*=\s*[\"']|url\(|@import|\bfetch\(|XMLHttpRequest|WebSocket|import\(", plain)
    assert re.findall(r'href="([^"]*)"', plain) == ["data:,"]
    assert text.count("<script") == len(PLAIN.findall(text)) + 1
    for kind, content in re.findall(r"<(style|script)>(.*?)</\1>", plain, re.DOTALL):
        digest = base64.b64encode(__import__("hashlib").sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in plain


def test_the_same_results_are_the_same_page(page: Path, make: Make) -> None:
    again = make().report("holdout", page.with_name("again.html"), k=4)
    assert again.read_bytes() == page.read_bytes()


def test_every_picture_is_kept_once(done: Path, make: Make, tmp_path: Path) -> None:
    def show(sample: Any) -> torch.Tensor:
        return torch.full((8, 8), int(sample[1]), dtype=torch.uint8)

    found = blocks(make(show=show).report("holdout", tmp_path / "report.html"))
    pictures = listed(found, "pictures")
    assert len(pictures) == 3
    assert all(picture.startswith("png;base64,") for picture in pictures)
    labels = found["tests-table"]["label"]
    shown = [entry["picture"] for entry in listed(found, "tests-looks")]
    assert len(set(zip(labels, shown, strict=True))) == len(set(labels))


@pytest.fixture
def hostile(done: Path, make: Make, tmp_path: Path) -> Path:
    """Return a page of which every text is hostile."""

    def show(sample: Any) -> str:
        return HOSTILE[round(abs(float(sample[0][0])) * 1000) % len(HOSTILE)]

    return make(show=show, label_names=HOSTILE[:3]).report("holdout", tmp_path / "report.html")


def test_hostile_texts_are_data_and_nothing_else(hostile: Path) -> None:
    found, text = blocks(hostile), hostile.read_text(encoding="utf-8")
    assert {entry["text"] for entry in listed(found, "training-looks")} <= set(HOSTILE)
    assert set(found["head"]["names"].values()) <= set(HOSTILE[:3])
    assert len(found["head"]["names"]) == 3
    assert not any(piece in text for piece in ("stolen", "onerror=", "example.org", "7 * 7", "שלום"))


def test_ids_are_those_of_the_experiment(make: Make, tmp_path: Path) -> None:
    names = [1000 - 3 * i for i in range(N)]
    pipeline = make(train_ids=names, tests={"few": ip.per_class(tiny.points(30, 2), 2)})
    influences = pipeline.run()["few"]
    found = blocks(pipeline.report("few", tmp_path / "report.html", k=3))
    training, ranks = found["training-table"], listed(found, "ranks")
    np.testing.assert_array_equal(np.array(training["id"])[[of[0] for of in ranks]], influences.helpful(3)[0])
    labels = {name: int(tiny.points(N, 1)[i][1]) for i, name in enumerate(names)}
    assert training["label"] == [labels[i] for i in training["id"]]
    assert found["tests-table"]["id"] == influences.test_ids.tolist()
    assert found["tests-table"]["label"] == [0, 0, 1, 1, 2, 2]


def test_a_show_that_raises_is_told_by_id_and_the_page_goes_on(
    done: Path, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = {float(tiny.points(T, 2)[row][0][0]) for row in (2, 7)}

    def show(sample: Any) -> str:
        if float(sample[0][0]) in bad:
            raise KeyError("no such picture")
        return "a text"

    pipeline = make(show=show)
    with caplog.at_level(logging.WARNING):
        found = blocks(pipeline.report("holdout", tmp_path / "report.html"))
    assert "samples of 'holdout' cannot be shown: 2, 7; show raised KeyError: 'no such picture'" in caplog.text
    shown = listed(found, "tests-looks")
    assert [row for row, entry in enumerate(shown) if "problem" in entry] == [2, 7]
    assert shown[2]["problem"] == "show raised KeyError: 'no such picture'"


def test_where_scores_were_not_stored_rankings_are_shown(done: Path, make: Make, tmp_path: Path) -> None:
    pipeline = make(influence={"top_k": 3, "store_scores": False})
    influences = pipeline.run()["holdout"]
    page = pipeline.report("holdout", tmp_path / "report.html")
    found = blocks(page)
    assert all(len(side) == 3 for ranks in listed(found, "ranks") for side in ranks)
    np.testing.assert_array_equal(
        np.array(found["training-table"]["id"])[[ranks[2] for ranks in listed(found, "ranks")]],
        influences.harmful(3)[0],
    )
    assert "Scores were not stored" in page.read_text(encoding="utf-8")
    assert found["tests-table"]["share"] is None
    with pytest.raises(ip.RequestError, match="k = 4, and 3 ranks were kept"):
        pipeline.report("holdout", page, k=4)


class Margin(ip.Classification):
    higher_is_better = True

    def measurements(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return -self.losses(outputs, batch)


def test_higher_is_better_turns_what_helps(done: Path, make: Make, tmp_path: Path) -> None:
    pipeline = make(task=Margin(l2=0.01))
    influences = pipeline.run()["holdout"]
    page = pipeline.report("holdout", tmp_path / "report.html", k=2)
    found = blocks(page)
    assert found["head"]["higherIsBetter"]
    assert found["head"]["measure"] == "measurement"
    assert min(found["training-table"]["mean"][number] for number in found["listed"]) > 0
    assert all(
        ranks[1][0] == pytest.approx(best, rel=1e-4)
        for ranks, best in zip(listed(found, "ranks"), influences.scores[:].min(1), strict=True)
    )
    text = page.read_text(encoding="utf-8")
    assert '<span class="help">negative scores help</span>' in text
    assert "is predicted to\n    rise most" in text


def test_regression_shows_what_is_predicted_and_no_verdict(make: Make, tmp_path: Path) -> None:
    def points(count: int, seed: int) -> TensorDataset:
        inputs, _ = tiny.points(count, seed).tensors
        return TensorDataset(inputs, inputs[:, :1])

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Linear(6, 1)

    pipeline = make(task=ip.Regression(l2=0.1), model=model(), train=points(N, 1), tests={"holdout": points(T, 2)})
    pipeline.run()
    table = blocks(pipeline.report("holdout", tmp_path / "report.html"))["tests-table"]
    np.testing.assert_allclose(
        table["prediction"], model()(points(T, 2).tensors[0]).detach()[:, 0], rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(table["label"], points(T, 2).tensors[1][:, 0], rtol=1e-4)
    assert table["right"] is None


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_nothing_is_computed_for_a_page(make: Make, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    with pytest.raises(ip.MissingStage, match=r"influence of holdout is not complete.*pipeline.influence\('holdout'\)"):
        make().report("holdout", out)
    assert not out.exists()
    assert tiny.blocks(cache) == set()
    with pytest.raises(ip.RequestError, match="no test set 'nope'"):
        make().report("nope", out)


def test_results_of_other_samples_are_refused(done: Path, make: Make, tmp_path: Path) -> None:
    with pytest.raises(ip.CacheMismatch, match="not what"):
        make(train=tiny.points(N, 5)).report("holdout", tmp_path / "report.html")


@pytest.mark.parametrize("module", ["jinja2", "PIL"])
def test_a_missing_package_is_refused_with_what_installs_it(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == module else util.find_spec(name))
    result = CliRunner().invoke(app, ["report", str(project), "--out", str(tmp_path / "report.html")])
    assert result.exit_code == 2, result.output
    package = {"jinja2": "jinja2", "PIL": "pillow"}[module]
    assert f'the page needs {package}: pip install "influence-pipeline[report]"' in result.stderr


def test_a_page_without_a_place_is_refused_before_anything_is_read(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ip.RequestError, match="it is a folder"):
        make().report("holdout", tmp_path)
    with pytest.raises(ip.RequestError, match="no folder"):
        make().report("holdout", tmp_path / "absent" / "report.html")


def test_a_page_that_cannot_be_written_leaves_the_one_before(
    page: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = page.read_bytes()

    def full(path: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(ip.WorkError, match=r"report.html cannot be written.*No space"):
            make().report("holdout", page, k=2)
    assert page.read_bytes() == before
    assert [path.name for path in page.parent.glob(".*")] == []


class Unsaid(ip.Classification):
    def predictions(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        raise LookupError("nobody knows")


def test_a_task_that_raises_is_named(done: Path, make: Make, tmp_path: Path) -> None:
    with pytest.raises(ip.RequestError, match="the model or the task raised LookupError: nobody knows"):
        make(task=Unsaid(l2=0.01)).report("holdout", tmp_path / "report.html")


@pytest.mark.parametrize("names", ["cat", [], {1: 2}, {"one": "cat"}, [1, 2], 3], ids=str)
def test_names_of_labels_are_texts_by_numbers(names: Any) -> None:
    with pytest.raises(ip.RequestError, match="label_names must be texts"):
        tiny.experiment(label_names=names)
    with pytest.raises(ip.RequestError, match="show must be a function"):
        tiny.experiment(show="picture")


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_of_the_only_test_set(project: Path, done: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    words = ["report", str(project), "--out", str(out), "-k", "3"]
    early = CliRunner().invoke(app, words)
    assert early.exit_code == 2, early.output
    assert "influence-pipeline influence --tests holdout" in early.stderr
    project.write_text(project.read_text().replace('"runs"', f'"{done}"'))
    written = CliRunner().invoke(app, words)
    assert written.exit_code == 0, written.output
    assert str(out) in written.stdout
    assert all(len(side) == 3 for ranks in listed(blocks(out), "ranks") for side in ranks)
    (project.parent / "experiment.py").write_text(
        "from tests import tiny\n\n\ndef experiment():\n"
        "    return tiny.experiment(tests={'holdout': tiny.points(10, 2), 'more': tiny.points(3, 3)})\n"
    )
    several = CliRunner().invoke(app, words)
    assert several.exit_code == 2, several.output
    assert "--tests is needed; the experiment has: holdout, more" in several.stderr
    assert CliRunner().invoke(app, [*words, "--tests", "holdout"]).exit_code == 0
