"""The example experiments load and run, and the demo's claim holds: the most harmful ids are mostly wrong labels."""

from __future__ import annotations

import functools
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

import influence_pipeline as ip

IDENTITY = ip.Settings(s_test={"solver": "identity"}, runtime={"progress": False})
SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = ("digits_cnn", "digits_logistic", "diabetes")
"""Examples that are trained in seconds; the others are run here with other weights."""
MODULES = ("train", "digits", "demo", "resnet", "images", "text", *SMALL)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the scripts with weights of its own, in which everything they write stays."""
    folder = tmp_path_factory.mktemp("checkout") / "scripts"
    shutil.copytree(SCRIPTS, folder, ignore=shutil.ignore_patterns("weights", "__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        patch.syspath_prepend(folder)
        train = import_module("train")
        for name in SMALL:
            train.train(name)
        yield folder
        for name in MODULES:
            sys.modules.pop(name, None)


def settings_file(scripts: Path, name: str, changes: str) -> Path:
    """Write other settings of an example."""
    path = scripts / f"{name}_test.toml"
    path.write_text(f'experiment = "{name}.py:experiment"\ncache = "../runs/{name}_test"\n{changes}', encoding="utf-8")
    return path


def test_digits_logistic(scripts: Path) -> None:
    """Its optimum is one, and its exact solutions are exact."""
    influences = ip.Pipeline.from_toml(scripts / "digits_logistic.toml").run()["holdout"]
    assert influences.scores.shape == (360, 1437)
    assert influences.residual is not None
    assert influences.residual.max() < 1e-4
    assert influences.gradient_norm is not None
    assert influences.gradient_norm < 1e-5


def test_digits_logistic_predicts_what_training_again_gives(scripts: Path) -> None:
    solver = '[s_test]\nsolver = "exact"\ndamping = 0.0\n'
    evaluate = "[evaluate]\nsubsets = 8\nseeds = 1\nleave_one_out = 4\n"
    path = settings_file(scripts, "digits_logistic", solver + evaluate)
    found = ip.Pipeline.from_toml(path).evaluate()["holdout"]
    assert found.lds is not None
    assert found.lds.mean > 0.8
    assert found.leave_one_out is not None
    assert found.leave_one_out.pearson > 0.98


def test_diabetes(scripts: Path) -> None:
    influences = ip.Pipeline.from_toml(scripts / "diabetes.toml").run()["holdout"]
    assert influences.scores.shape == (100, 342)
    example = import_module("diabetes").experiment()
    shown = example.show(example.train[0])
    assert list(shown)[:2] == ["age", "sex"]
    assert list(shown.values()) == pytest.approx(example.train[0][0].tolist(), abs=0.006)
    assert influences.residual is not None
    assert np.median(influences.residual) < 0.05
    assert np.isfinite(influences.mean_scores()).all()


def test_most_harmful_digits_are_mislabelled(scripts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A smaller form of the demo: fewer test digits, a coarser solution."""
    path = settings_file(
        scripts,
        "digits_cnn",
        '[s_test]\nsolver = "cg"\ndamping = 0.015\ntolerance = 0.3\nsample = 128\n'
        '[tests.few]\nof = "trusted"\nper_class = 3\n',
    )
    influences = ip.Pipeline.from_toml(path).run("few")["few"]
    data = import_module("digits").digits(flipped=0.1, held_out=0)
    assert len(data.flipped) == 180
    assert (data.train.tensors[1] != data.true_labels).nonzero().flatten().tolist() == data.flipped.tolist()

    ids, scores = influences.harmful_on_average(50)
    hits = int(np.isin(ids, data.flipped).sum())
    assert hits >= 35, f"{hits} of the 50 most harmful ids have wrong labels; by chance 5"
    assert (scores < 0).all()

    import_module("demo").show(influences, data)
    assert f"first   50: {hits:>4} wrong" in capsys.readouterr().out


def test_images_of_a_narrow_network(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That was not trained: scores of every digit, and labels that are wrong at the ids that are said."""
    images, train = import_module("images"), import_module("train")
    narrow = functools.partial(import_module("resnet").ResNet18, width=2)
    torch.manual_seed(0)
    torch.save(narrow().state_dict(), train.FOLDER / "images.pt")
    monkeypatch.setattr(images, "network", narrow)
    monkeypatch.setattr(images, "SIZE", 8)
    settings = ip.Settings.from_toml(scripts / "images.toml").model_copy(update={"s_test": IDENTITY.s_test})
    found = ip.Pipeline(images.experiment(), scripts.parent / "runs" / "images", settings).run()["holdout"]
    assert found.scores.shape == (100, 1497)
    data = import_module("digits").digits(flipped=0.1, held_out=300)
    assert len(data.flipped) == 150
    assert images.experiment().train[0][0].shape == (3, 8, 8)


def test_text_of_a_network_that_was_hardly_trained(scripts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, train = import_module("text"), import_module("train")
    torch.manual_seed(0)
    network = text.network()
    data, tests = text.data()
    train.by_adam(network, text.TASK, data, epochs=2)
    torch.save(network.state_dict(), train.FOLDER / "text.pt")
    found = ip.Pipeline(text.experiment(), scripts.parent / "runs" / "text", IDENTITY).run()["facts"]
    assert found.scores.shape == (len(tests), len(data))
    sentences, asked = text.sentences()
    said = {sentence.text for sentence in sentences}
    assert not any(sentence.text in said for sentence in asked), "a test is a training sentence"
    assert sum(float(sample["token_weights"].sum()) for sample in tests) == len(tests)
    text.show(found)
    assert "most helpful" in capsys.readouterr().out
    assert [text.sentence(sample) for sample in tests] == [sentence.text for sentence in asked]
    said_last = [sentence.text.split()[-1] for sentence in asked]
    batch = next(iter(torch.utils.data.DataLoader(tests, len(tests))))
    with torch.no_grad():
        outputs = text.TASK.outputs(network.eval(), batch)
    assert [text.WORDS[word] for word in text.TASK.labels(batch)] == said_last
    assert text.TASK.correct(outputs, batch).shape == (len(tests),)


def test_settings_of_the_examples_are_right() -> None:
    """Each names an experiment beside it, and a cache that git ignores."""
    files = sorted(SCRIPTS.glob("*.toml"))
    assert {path.stem for path in files} == {"images", "text", *SMALL}
    for path in files:
        settings = ip.Settings.from_toml(path)
        assert settings.experiment is not None
        assert Path(settings.experiment.partition(":")[0]).samefile(path.with_suffix(".py"))
        assert settings.cache is not None
        assert settings.cache.resolve().parent == SCRIPTS.parent / "runs"


def test_scripts_are_the_commands(
    scripts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = settings_file(scripts, "diabetes", '[s_test]\nsolver = "identity"\n')

    def run(script: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, str(path)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(scripts / script), run_name="__main__")
        said = capsys.readouterr()
        assert not stop.value.code, said.err
        return said.out

    assert "grad_z: 1 of 1 blocks computed" in run("run_grad_z.py")
    assert "blocks computed" in run("run_s_test.py")
    shown = run("run_influence.py")
    assert "most harmful" in shown
    assert run("run_all.py") == shown
    assert "0 of 1 blocks computed" in run("run_grad_z.py")


def test_missing_weights(scripts: Path, tmp_path: Path) -> None:
    """The command that makes them is in the message, and no traceback."""
    folder = tmp_path / "scripts"
    shutil.copytree(scripts, folder, ignore=shutil.ignore_patterns("weights", "__pycache__"))
    command = [sys.executable, str(folder / "run_all.py"), str(folder / "diabetes.toml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no weights yet" in done.stderr
    assert f"{folder / 'train.py'} diabetes" in done.stderr
    assert "Traceback" not in done.stderr


def test_weights_of_another_model(scripts: Path) -> None:
    shutil.copy(scripts / "weights" / "diabetes.pt", scripts / "weights" / "other.pt")
    with pytest.raises(ip.RequestError, match=r"is of another model.*--again"):
        import_module("train").trained("other", import_module("digits_cnn").network())
