"""Other packages, to be put beside this one: an environment of their own, and how each scores.

They are installed, with this package and a pinned torch, into ``.peers-env`` beside this file. Only :func:`install`
and :func:`ask` are for the process that compares; what scores runs in a child, in that environment.

Each is used as its documentation has it for many test sets: what it can prepare once is prepared by the function, and
the function that this returns scores a test set, (T, N), in the package's own sign and scale.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset, TensorDataset

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE / ".peers-env"
TORCH = "torch==2.13.0"
INSTALL = {
    "torch": [TORCH],
    "influence_pipeline": ["--editable", f"{HERE.parent}[examples]"],
    # Without what it asks for and never imports: torchvision, built for another torch.
    "kronfluence": ["accelerate>=0.31", "einops", "einconv", "opt-einsum", "safetensors", "tqdm"],
    "kronfluence itself": ["--no-deps", "kronfluence==1.0.1"],
    "traker": ["traker==0.3.2"],
    "captum": ["captum==0.9.0"],
    "plots": ["matplotlib"],
}
MODULES = {"traker": "trak"}
"""What is imported, where it has another name than the package."""
BATCH = 64


def install() -> tuple[Path, dict[str, str]]:
    """Make the environment; return its Python, and why what could not be installed."""
    python, failed = ENVIRONMENT / "bin" / "python", {}
    if not python.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    for name, what in INSTALL.items():
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what, TORCH]
        if "--no-deps" in what:
            command.remove(TORCH)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            failed[name.partition(" ")[0]] = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    return python, failed


def ask(python: Path, program: str, arguments: Sequence[object], limit: float) -> Any:
    """Run a program in the environment; return what the last line of its output is in JSON, or what went wrong."""
    command = [str(python), program, *map(str, arguments)]
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        return f"not done within {limit:.0f} s"
    if done.returncode:
        return f"failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    return json.loads(done.stdout.splitlines()[-1])


# ---- how each scores: classifiers and (inputs, labels) ---------------------------------------------------------------

Score = Callable[["TensorDataset"], "Tensor"]


def kronfluence(model: nn.Module, data: Dataset[Any], folder: Path, **factors: Any) -> Callable[..., Tensor]:
    """Fit EK-FAC factors by ``FactorArguments``; what is returned takes ``ScoreArguments``, too."""
    import torch
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch.nn import functional

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(batch[0])
            labels = torch.multinomial(logits.detach().softmax(1), 1).flatten() if sample else batch[1]
            return functional.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    task = Classification()
    analyzer = Analyzer("model", prepare_model(model, task), task, cpu=True, disable_tqdm=True, output_dir=str(folder))
    chosen = FactorArguments("ekfac", **factors)
    analyzer.fit_all_factors("factors", data, per_device_batch_size=256, factor_args=chosen)

    def score(tests: TensorDataset, **arguments: Any) -> Tensor:
        analyzer.compute_pairwise_scores(
            *("scores", "factors", tests, data),
            per_device_query_batch_size=BATCH,
            per_device_train_batch_size=256,
            score_args=ScoreArguments(**arguments),
            overwrite_output_dir=True,
        )
        found: Tensor = analyzer.load_pairwise_scores("scores")["all_modules"]
        return found

    return score


def traker(model: nn.Module, data: Dataset[Any], folder: Path, dimensions: int = 512) -> Score:
    """Featurize with a random projection to so many dimensions; scores are of the margin that traker measures."""
    import torch
    from torch.utils.data import DataLoader
    from trak import TRAKer

    samples, asked = len(data), iter(range(2**30))  # type: ignore[arg-type]
    tracer = TRAKer(
        *(model, "image_classification", samples),
        save_dir=str(folder),
        device="cpu",
        proj_dim=dimensions,
        use_half_precision=False,
        logging_level=logging.ERROR,
    )
    tracer.load_checkpoint(model.state_dict(), model_id=0)
    for batch in DataLoader(data, BATCH):
        tracer.featurize(batch, num_samples=len(batch[0]))
    tracer.finalize_features()
    if tracer.projector.num_blocks == 1:  # its matrix was freed, and is made again where there are several blocks only
        tracer.projector.generate_sketch_matrix(tracer.projector.generator_states[0])

    def score(tests: TensorDataset) -> Tensor:
        name = f"tests{next(asked)}"
        tracer.start_scoring_checkpoint(name, model.state_dict(), model_id=0, num_targets=len(tests))
        tracer.score(tests.tensors, num_samples=len(tests))
        return torch.as_tensor(tracer.finalize_scores(name)).T

    return score


def captum(model: nn.Module, data: Dataset[Any], folder: Path, **settings: Any) -> Score:
    """Find the projections of ``ArnoldiInfluenceFunction``, with batched gradients."""
    import torch
    from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction
    from torch import nn

    checkpoint = folder / "weights.pt"
    torch.save(model.state_dict(), checkpoint)
    influence = ArnoldiInfluenceFunction(
        *(model, data, str(checkpoint)),
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=BATCH,
        sample_wise_grads_per_batch=True,
        **settings,
    )
    return lambda tests: influence.influence(tuple(tests.tensors))
