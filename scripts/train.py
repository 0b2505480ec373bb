"""Train the models of the example experiments once: ``python scripts/train.py [NAME …]``, default all of them.

An experiment loads its model and never trains it, because the same training gives other weights on another
machine, and influence is about one model. Weights that are there already are kept unless ``--again`` is given.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import influence_pipeline as ip

FOLDER = Path(__file__).resolve().parent / "weights"


def trained(name: str, model: nn.Module, command: str | None = None) -> nn.Module:
    """Load the weights that were trained for an example into its model; ``command`` trains it, by default this script.

    Raises:
        RequestError: they were not trained yet, or are of another model.
    """
    path = FOLDER / f"{name}.pt"
    command = command or f"{sys.executable} {Path(__file__)} {name}"
    if not path.is_file():
        raise ip.RequestError(f"{path}: no weights yet. First: {command}")
    try:
        model.load_state_dict(torch.load(path, weights_only=True))
    except RuntimeError as error:
        raise ip.RequestError(f"{path} is of another model. Train again: {command} --again\n{error}") from None
    return model


def to_optimum(model: nn.Module, task: ip.Task, data: Dataset) -> None:
    """Minimise the mean loss + (l2/2)·|θ|² by L-BFGS in float64, until the gradient vanishes."""
    model.double()
    batch = [leaf.double() if leaf.is_floating_point() else leaf for leaf in next(iter(DataLoader(data, len(data))))]
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=5000, tolerance_grad=1e-9, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        value = _objective(model, task, batch)
        value.backward()
        return value

    optimizer.step(objective)
    model.float()


def by_adam(model: nn.Module, task: ip.Task, data: Dataset, epochs: int = 20, step: float = 2e-3) -> None:
    """Minimise the same by Adam, over batches of 64, with a step that falls to zero."""
    optimizer = torch.optim.Adam(model.parameters(), lr=step)
    loader = DataLoader(data, 64, shuffle=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            _objective(model, task, batch).backward()
            optimizer.step()
            schedule.step()


def _objective(model: nn.Module, task: ip.Task, batch: list[torch.Tensor]) -> torch.Tensor:
    penalty = sum(parameter.square().sum() for parameter in model.parameters())
    return task.losses(task.outputs(model, batch), batch).mean() + task.l2 / 2 * penalty


EXAMPLES: dict[str, Callable[[nn.Module, ip.Task, Dataset], None]] = {
    "digits_logistic": to_optimum,
    "digits_cnn": by_adam,
    "diabetes": to_optimum,
    "images": partial(by_adam, epochs=6, step=1e-3),
    "text": partial(by_adam, epochs=80),
}


def train(name: str) -> None:
    """Train one example and keep its weights."""
    example = import_module(name)
    began = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # batches are small; and the same weights on any number of cores
    torch.manual_seed(0)
    model, (data, _) = example.network(), example.data()
    EXAMPLES[name](model, example.TASK, data)
    torch.set_num_threads(threads)
    print(f"{keep(name, model)}: trained in {time.perf_counter() - began:.1f} s")


def keep(name: str, model: nn.Module) -> Path:
    """Write a model's weights; return where."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.pt"
    partial = path.with_suffix(".partial")
    torch.save(model.state_dict(), partial)
    partial.replace(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXAMPLES) + "; default all")
    parser.add_argument("--again", action="store_true", help="also where weights are there")
    options = parser.parse_args()
    if unknown := set(options.names) - set(EXAMPLES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are: {', '.join(EXAMPLES)}")
    for name in options.names or EXAMPLES:
        path = FOLDER / f"{name}.pt"
        if path.is_file() and not options.again:
            print(f"{path}: is there")
        else:
            train(name)


if __name__ == "__main__":
    main()
