"""The figures after Koh & Liang (2017), on a few digits: what they compute is what they say."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import influence_pipeline as ip
from tests.marks import thoroughly

FIGURES = Path(__file__).parents[2] / "scripts" / "figures"
MODULES = (
    *("shared", "left_out", "similarity", "mislabelled", "removal", "digits", "train"),
    *("drop_harmful", "keep_influential"),
)


@pytest.fixture(scope="module")
def figures() -> Iterator[Any]:
    """The scripts as modules."""
    with pytest.MonkeyPatch.context() as patch:
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        patch.syspath_prepend(FIGURES)
        yield SimpleNamespace(**{name: import_module(name) for name in MODULES})
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("figures")


def quick(script: ModuleType, folder: Path) -> Any:
    """Return the options of a look at a script."""
    return import_module("shared").options(script.__file__, "", ["--quick", "--folder", str(folder)])


def test_optimum_is_one_from_wherever_training_begins(figures: Any) -> None:
    """With and without a sample; and the whitening is |H|^(-1/2)."""
    data = figures.shared.in_double(figures.digits.digits(held_out=1697).train)
    task, weights = ip.Classification(l2=1e-2), torch.ones(100).double()
    weights[3] = 0
    torch.manual_seed(0)
    objective = figures.shared.Objective(figures.left_out.logistic(), task, data)
    whitening = objective.to_optimum()
    assert objective.gradient().abs().max() < 1e-5
    identity = whitening.T @ objective.hessian() @ whitening
    torch.testing.assert_close(identity, torch.eye(650, dtype=torch.float64), rtol=0, atol=1e-8)

    retrain = figures.shared.Retraining(objective, whitening)
    without = nn.utils.parameters_to_vector(retrain(data, 0, weights).parameters()).detach()
    assert objective.gradient().abs().max() < 1e-5, "training again moved the model itself"
    again = figures.shared.Objective(figures.left_out.logistic(), task, data)
    again.move(torch.zeros(650, dtype=torch.float64))
    for _ in range(5):
        again.descend(again.whitening(), weights)
    torch.testing.assert_close(without, again.theta, rtol=0, atol=1e-4)
    assert again.gradient(weights).abs().max() < 1e-5
    assert again.gradient().abs().max() > 1e-3, "the sample that was left out makes no difference"


@pytest.mark.thorough
def test_left_out(figures: Any, folder: Path) -> None:
    """Predictions are of the samples with the largest influence, and right where the model is convex."""
    exact, stochastic, network = figures.left_out.panels(quick(figures.left_out, folder))
    assert exact.predicted.shape == (3, 20)
    assert network.predicted.shape == (3, 10)
    assert (np.diff(np.abs(exact.predicted), axis=1) <= 0).all()
    assert exact.correlations.min() > 0.9
    assert stochastic.correlations.min() > 0.8
    assert 0.9 < exact.slope < 1.5
    assert (np.abs(network.found) > 0).all()
    text = figures.left_out.table([exact, stochastic, network])
    assert f"{exact.correlations.mean():.3f}" in text
    assert "r = 0.86" in text


def test_similarity(figures: Any, folder: Path) -> None:
    """Influence is its formula, and each variant is the formula without what it is said to be without."""
    similarity = figures.similarity
    parts = similarity.components(quick(similarity, folder))
    data = figures.digits.digits(held_out=1600)
    (x, y), (x_test, y_test) = (
        [tensor.numpy() for tensor in similarity.two_digits(each).tensors] for each in (data.train, data.test)
    )
    x_test, y_test = x_test[:4], y_test[:4]
    count = len(x)
    saved = torch.load(folder / "similarity-quick" / "weights.pt", weights_only=True)
    theta = saved["theta"].numpy()
    sigma, sigma_test = (1 / (1 + np.exp(labels * (images @ theta))) for images, labels in ((x, y), (x_test, y_test)))
    hessian = (x.T * (sigma * (1 - sigma))) @ x / count + 1e-2 * np.eye(64)
    signs, products = y_test[:, None] * y, x_test @ np.linalg.solve(hessian, x.T)
    whole = sigma_test[:, None] * sigma * signs * products / count

    def close(found: np.ndarray, expected: np.ndarray) -> None:
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

    close(parts.influence, whole)
    close(parts.variants["without the training loss"], sigma_test[:, None] * signs * products / count)
    close(parts.variants["without H⁻¹"], sigma_test[:, None] * sigma * signs * (x_test @ x.T) / count)
    close(parts.variants["inner product of images"], signs * (x_test @ x.T))
    assert (parts.same_label == (signs > 0)).all()
    r, top = similarity.agreement(parts.influence, parts.found)
    assert r > 0.95
    assert top > 0.7
    assert r > similarity.agreement(parts.variants["inner product of images"], parts.found)[0]
    test, sample = similarity.shown(parts)
    assert parts.same_label[test, sample]
    assert parts.influence[test, sample] == parts.influence[parts.same_label].min()


def test_mislabelled(figures: Any, folder: Path) -> None:
    """What is found first is wrong, mending it helps, and what was computed once is not computed again."""
    script = figures.mislabelled
    given = quick(script, folder)
    found = script.checked(given)
    assert found.mended.shape == found.accuracy.shape == (1, 4, 7)
    assert (found.mended[:, :, 0] == 0).all()
    assert (np.diff(found.mended, axis=2) >= 0).all()
    assert found.auc[:, 0].min() > 0.8
    assert (found.mended[:, 0, -1] > found.mended[:, 3, -1]).all()
    assert found.accuracy[:, 0, -1].mean() > found.accuracy[:, 0, 0].mean()
    (given.folder / "seed-0.npz").unlink()
    with pytest.MonkeyPatch.context() as patch:
        computed = []
        patch.setattr(script, "checked_once", lambda seed, held_out: computed.append(seed) or script_once[seed])
        script_once = {0: {name: getattr(found, name)[0] for name in ("auc", "mended", "accuracy", "clean")}}
        again = script.checked(given)
    assert computed == [0]
    np.testing.assert_array_equal(again.accuracy, found.accuracy)


def test_removal(figures: Any, folder: Path) -> None:
    """Harm goes first, and with it the wrong labels; without the helpful the model gets worse."""
    found = figures.removal.curves(quick(figures.removal, folder))
    assert found.without.shape == (1, 3, 8)
    assert found.alone.shape == (1, 2, 7)
    whole = found.without[:, :, :1]
    assert (found.without[:, :, 0] == whole[:, 0]).all()
    assert (found.alone[:, :, -1] == whole[:, 0]).all()
    harmful, helpful, _ = (found.without - whole).mean(axis=0)
    assert harmful[3] > 0.01
    assert helpful[3] < -0.01


def test_drop_harmful(figures: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is what the curves of removal have, with the wrong labels counted."""
    given = quick(figures.removal, folder)
    found, curves = figures.drop_harmful.dropped(given), figures.removal.curves(given)
    columns = [figures.removal.LEFT_OUT.index(share) for share in figures.drop_harmful.SHARES]
    np.testing.assert_array_equal(found.before, curves.without[:, 0, 0])
    np.testing.assert_array_equal(found.harmful, curves.without[:, 0, columns])
    np.testing.assert_array_equal(found.at_random, curves.without[:, 2, columns])
    assert found.wrong[0, 0] > 0.7
    assert (found.wrong <= 1).all()
    figures.drop_harmful.main(["--quick", "--folder", str(folder)])
    said = capsys.readouterr().out
    assert f"| 10% | {found.wrong[0, 1]:.0%} | {found.harmful[0, 1]:.1%} | {found.at_random[0, 1]:.1%} |" in said


def test_keep_influential(figures: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The most helpful have few wrong labels, the most influential many; random ones are those of the curves."""
    given = quick(figures.removal, folder)
    found, curves = figures.keep_influential.kept(given), figures.removal.curves(given)
    columns = [figures.removal.KEPT.index(share) for share in figures.keep_influential.SHARES]
    np.testing.assert_array_equal(found.whole, curves.without[:, 0, 0])
    np.testing.assert_array_equal(found.alone[:, 1:], curves.alone[:, :, columns])
    assert found.wrong[0, 0, 0] > 0.3
    assert found.wrong[0, 1, 0] < 0.1
    figures.keep_influential.main(["--quick", "--folder", str(folder)])
    assert f"{found.alone[0, 0, 3]:.1%} (" in capsys.readouterr().out


@pytest.mark.parametrize(("first", "second", "said"), [([0.5], [0.4], "+10.0%"), ([1, 0], [0, 1], "+0.0% ± 100.0%")])
def test_differences_have_their_standard_error(
    figures: Any, first: list[float], second: list[float], said: str
) -> None:
    assert figures.removal.difference(np.array(first), np.array(second)) == said


@pytest.mark.parametrize("name", ["similarity", "mislabelled", "removal", *thoroughly(["left_out"])])
def test_figure_is_drawn(figures: Any, folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And is small; the table comes first. What the other tests computed is there already."""
    pytest.importorskip("matplotlib")
    getattr(figures, name).main(["--quick", "--folder", str(folder)])
    said = capsys.readouterr().out
    png = folder / f"{name}-quick" / f"{name}.png"
    assert said.startswith("|")
    assert str(png) in said
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert png.stat().st_size < 100_000


def test_without_matplotlib(figures: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ip.RequestError, match=r"influence-pipeline\[figures\]"):
        figures.shared.figure(1)
