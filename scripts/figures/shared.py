"""What the figures share: their options, models at an optimum and how these are trained again, and how they are drawn.

Shapes: ``N`` training samples, ``D`` parameters.
"""

from __future__ import annotations

import argparse
import copy
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader, Dataset, TensorDataset

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from digits import Digits, digits  # noqa: E402, F401 - of the examples' folder, for all figures

import influence_pipeline as ip  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Found = TypeVar("Found")
"""What a figure shows."""
ROUNDS = 20
"""Times at most that an optimum is approached with the curvature of where it has come to."""
STEPS = 200
"""Steps of L-BFGS at most in each of them, and from an optimum to that of a few samples less."""
CONVERGED = 1e-6
"""Largest entry of the gradient, in coordinates in which the Hessian is the identity, at which a model is trained."""
DIRECTIONS = 8
"""That the Hessian is multiplied by at once: the fastest of 1, 8 and 32."""


@dataclass(frozen=True)
class Options:
    """What a figure's command line says.

    Attributes:
        quick: tiny sizes, for a look whether everything runs.
        folder: caches and trained weights.
        figure: the PNG that is drawn.
    """

    quick: bool
    folder: Path
    figure: Path


def options(script: str, description: str | None, arguments: Sequence[str] | None) -> Options:
    """Read the options that all figures have."""
    torch.set_num_threads(1)  # all is small; and the same figures on any number of cores
    name = Path(script).stem
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, drawn into FOLDER")
    parser.add_argument("--folder", type=Path, default=HERE.parents[1] / "runs" / "figures", help="caches and weights")
    given = parser.parse_args(arguments)
    folder = given.folder / (f"{name}-quick" if given.quick else name)
    folder.mkdir(parents=True, exist_ok=True)
    return Options(given.quick, folder, (folder if given.quick else HERE) / f"{name}.png")


def make(
    script: str,
    description: str | None,
    compute: Callable[[Options], Found],
    table: Callable[[Found], str],
    draw: Callable[[Found, Path], None],
    arguments: Sequence[str] | None = None,
) -> None:
    """Make a figure: compute what its options ask for, print the numbers, draw it."""
    given = options(script, description, arguments)
    found = compute(given)
    print(table(found))
    draw(found, given.figure)


def command(main: Callable[[], None]) -> None:
    """Run a script; of an error that says what to do, show that alone."""
    try:
        main()
    except ip.InfluenceError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def settings(**solver: Any) -> ip.Settings:
    """Return settings with unrounded gradients and a solver."""
    return ip.Settings(grad_z={"encoding": "float32"}, s_test=solver, runtime={"progress": False, "device": "cpu"})


def in_double(data: TensorDataset) -> TensorDataset:
    """Return a data set with its images in float64."""
    images, *others = data.tensors
    return TensorDataset(images.double(), *others)


def logistic() -> nn.Module:
    """Make softmax regression, untrained: 650 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


# ---- optima --------------------------------------------------------------------------------------------------------


class Objective:
    """Σ wᵢ L(zᵢ) / N + (l2/2)·|θ|² of a model, all samples at once, in float64; and how it is minimised.

    Attributes:
        model: a copy of the one given, whose parameters are where it was left.
    """

    def __init__(self, model: nn.Module, task: ip.Task, data: Dataset[Any]) -> None:
        """Begin at the model's parameters."""
        self.model, self.task = copy.deepcopy(model).double(), task
        self._batch = next(iter(DataLoader(data, len(data))))  # type: ignore[arg-type]
        self._parameters = list(self.model.parameters())

    @property
    def theta(self) -> Tensor:
        """The parameters, (D,)."""
        return parameters_to_vector(self._parameters).detach()

    def move(self, theta: Tensor) -> None:
        """Go to other parameters, (D,)."""
        vector_to_parameters(theta, self._parameters)

    def value(self, weights: Tensor | None = None) -> Tensor:
        """Return the objective with a weight for each sample, (N,), by default 1."""
        losses = self.task.losses(self.task.outputs(self.model, self._batch), self._batch)
        penalty = sum(parameter.square().sum() for parameter in self._parameters)
        return (losses if weights is None else losses * weights).mean() + self.task.l2 / 2 * penalty

    def gradient(self, weights: Tensor | None = None) -> Tensor:
        """Return its gradient, (D,)."""
        return torch.cat([part.flatten() for part in torch.autograd.grad(self.value(weights), self._parameters)])

    def hessian(self) -> Tensor:
        """Return its second derivative, (D, D), by products with some directions at a time."""
        names, shapes = zip(*((name, part.shape) for name, part in self.model.named_parameters()), strict=True)

        def mean_loss(theta: Tensor) -> Tensor:
            parts = theta.split([shape.numel() for shape in shapes])
            there = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
            return self.task.losses(functional_call(self.model, there, self._batch[0]), self._batch).mean()

        theta = self.theta
        directions = torch.eye(len(theta), dtype=theta.dtype)
        matrix = vmap(lambda v: grad(lambda at: grad(mean_loss)(at) @ v)(theta), chunk_size=DIRECTIONS)(directions)
        return (matrix + matrix.T) / 2 + self.task.l2 * directions

    def whitening(self) -> Tensor:
        """Return W (D, D), so that the objective has about unit curvature in φ, where θ = now + Wφ.

        That is |H|^(-1/2): directions of negative curvature count by its size, so that steps lead away from a saddle.
        """
        eigenvalues, vectors = torch.linalg.eigh(self.hessian())
        return vectors * eigenvalues.abs().clamp_min(self.task.l2 / 2).rsqrt()

    def descend(self, whitening: Tensor, weights: Tensor | None = None) -> None:
        """Go on by L-BFGS in whitened coordinates, until the gradient there has vanished or for so many steps."""
        start = self.theta
        phi = torch.zeros_like(start).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [phi], max_iter=STEPS, tolerance_grad=CONVERGED, tolerance_change=0.0, line_search_fn="strong_wolfe"
        )

        def objective() -> Tensor:
            self.move(start + whitening @ phi.detach())
            phi.grad = whitening.T @ self.gradient(weights)
            return self.value(weights).detach()

        optimizer.step(objective)
        self.move(start + whitening @ phi.detach())

    def converged(self, whitening: Tensor) -> bool:
        """Say whether the gradient over all samples vanishes in whitened coordinates."""
        return bool((whitening.T @ self.gradient()).abs().max() <= CONVERGED)

    def to_optimum(self) -> Tensor:
        """Go to a minimum nearby, and return the whitening there, (D, D).

        Raises:
            WorkError: the gradient has not vanished.
        """
        for _ in range(ROUNDS):
            whitening = self.whitening()
            if self.converged(whitening):
                return whitening
            self.descend(whitening)
        raise ip.WorkError(f"no optimum was reached in {ROUNDS} rounds of {STEPS} steps")


def at_optimum(path: Path, objective: Objective, begin: Callable[[nn.Module], None] | None = None) -> Tensor:
    """Go to an optimum, or to what was stored if it is one, and return the whitening there.

    Args:
        path: where it is stored.
        objective: whose optimum.
        begin: brings the model into its neighbourhood first.
    """
    if path.is_file():
        found = torch.load(path, weights_only=True)
        if found["theta"].shape == objective.theta.shape:
            start = objective.theta
            objective.move(found["theta"])
            if objective.converged(found["whitening"]):
                return found["whitening"]
            objective.move(start)
    if begin is not None:
        begin(objective.model)
    whitening = objective.to_optimum()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    torch.save({"theta": objective.theta, "whitening": whitening}, unfinished)
    unfinished.replace(path)
    return whitening


class Retraining:
    """The ``retrain`` of an experiment whose model is at an optimum: goes on from there without some samples.

    It draws nothing, so that a seed changes nothing, and what changes is due to the samples alone.
    """

    def __init__(self, objective: Objective, whitening: Tensor) -> None:
        """Begin every time at where the objective is now."""
        self._objective, self._whitening, self._start = copy.deepcopy(objective), whitening, objective.theta

    def __call__(self, dataset: Dataset[Any], seed: int, weights: Tensor) -> nn.Module:
        """Return the model trained with a weight for each sample, (N,)."""
        self._objective.move(self._start)
        self._objective.descend(self._whitening, weights)
        return copy.deepcopy(self._objective.model)


def changes(pipeline: ip.Pipeline, tests: str, left_out: Sequence[int]) -> np.ndarray:
    """Return each test's loss after training on without each of some samples, minus that with all, (T, K)."""
    measured = [pipeline.retrained(tests, ids).values[0] for ids in ([[sample] for sample in left_out], [[]])]
    return (measured[0] - measured[1]).T


# ---- drawing -------------------------------------------------------------------------------------------------------

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#737373")
"""Told apart by the colour-blind, too (Okabe & Ito)."""
SHADES = 64
"""Colours that a PNG keeps: enough for points that shine through one another, and a third of the bytes."""


def figure(panels: int, width: float = 3.4, height: float = 3.4) -> tuple[Figure, Any]:
    """Return a figure of panels side by side, white on any page, and their axes.

    Raises:
        RequestError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise ip.RequestError('figures are drawn by matplotlib: pip install "influence-pipeline[figures]"') from None
    mpl.use("agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(1, panels, figsize=(width * panels, height), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return drawn, axes[0]


def save(drawn: Figure, path: Path) -> None:
    """Write a figure as a small PNG, and say where."""
    from matplotlib import pyplot
    from PIL import Image

    buffer = io.BytesIO()
    drawn.savefig(buffer, dpi=130, facecolor="white")
    pyplot.close(drawn)
    Image.open(buffer).convert("RGB").quantize(SHADES).save(path, optimize=True)
    print(f"\n{path}: {path.stat().st_size / 1000:.0f} kB")


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return Pearson's r."""
    return float(np.corrcoef(first, second)[0, 1])
