# %% [markdown]
# # A tour: from a trained model to better data
#
# Softmax regression on 1300 handwritten digits, a tenth of whose labels are wrong. Which training samples help, which
# harm, which have a wrong label, and does it help to leave those out?
#
# `pip install -e ".[examples,report,xarray]"`, then `python scripts/tour.py` runs all of it in half a minute; editors
# and Jupyter (with jupytext) open this file as a notebook. What it writes is in `runs/`, where it is run.

# %%
# ruff: noqa: D100 - the cell above says what this is
import sys
from pathlib import Path

import numpy as np
import torch
import xarray
import zarr
from digits import digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, Subset, TensorDataset
from train import to_optimum

import influence_pipeline as ip

QUICK = "--quick" in sys.argv  # fewer samples, for tests
FOLDER = Path("runs") / ("tour-quick" if QUICK else "tour")
FOLDER.mkdir(parents=True, exist_ok=True)
torch.set_num_threads(1)  # all is small

# %% [markdown]
# ## Data and model
#
# Ids of training samples are their positions in the training set. `data.flipped` are the ids whose labels were changed;
# nothing but the comparison at the end looks at them. Influence is asked about a hundred digits that are known to be
# right (`trusted`); accuracy is measured on the other digits that were held out (`tests`).

# %%
data = digits(flipped=0.1, held_out=1200 if QUICK else 497)
train = data.train
trusted, tests = (TensorDataset(*data.test[part]) for part in (slice(100), slice(100, None)))
TASK = ip.Classification(l2=1e-3)  # cross-entropy, and the weight decay of the training


def network() -> nn.Module:
    """Make the model, untrained: 650 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def retrain(dataset: Dataset, seed: int) -> nn.Module:
    """Train on some samples to the optimum, which is one, whatever the seed."""
    made = network()
    to_optimum(made, TASK, dataset)
    return made


def quality(of: nn.Module) -> tuple[float, float]:
    """Return the share of the tests that a model classifies rightly, and its mean loss on them."""
    images, labels = tests.tensors
    with torch.no_grad():
        outputs = of(images)
    return float((outputs.argmax(1) == labels).double().mean()), float(cross_entropy(outputs, labels))


# %% [markdown]
# Influence is about one model, so a model is trained once and loaded from then on.

# %%
model, weights = network(), FOLDER / "weights.pt"
if not weights.is_file():
    torch.save(retrain(train, seed=0).state_dict(), weights)
model.load_state_dict(torch.load(weights, weights_only=True))
print(f"trained on {len(train)} digits, {len(data.flipped)} with wrong labels: test accuracy {quality(model)[0]:.1%}")

# %% [markdown]
# ## The plan
#
# An experiment is what belongs to the model; a pipeline computes over a cache, which is a folder. A plan says what is
# there and what is missing, and computes nothing. (Run this twice: the second time all is there.)

# %%
experiment = ip.Experiment(model, TASK, train, {"trusted": trusted}, retrain=retrain)
settings = ip.Settings(s_test={"solver": "exact", "curvature": "hessian", "damping": 0.0})
pipeline = ip.Pipeline(experiment, FOLDER / "cache", settings)
print(pipeline.plan())

# %% [markdown]
# ## Three stages
#
# `grad_z`: the gradient of every training sample's loss. Computed once for a model, whatever is asked afterwards.

# %%
gradients = pipeline.grad_z()
print(f"grad_z: {gradients.computed} of {gradients.total} blocks computed in {gradients.seconds:.1f} s")

# %% [markdown]
# `s_test`: for every test sample, (H + λI)⁻¹ ∇M, where M is what is asked about (here the loss) and H the second
# derivative of the training loss. The model is convex and at its optimum, so H is solved exactly and λ is 0.

# %%
solutions = pipeline.s_test("trusted")
print(f"s_test: {solutions.computed} of {solutions.total} blocks computed in {solutions.seconds:.1f} s")

# %% [markdown]
# `influence`: the products of both, over N. (`pipeline.run()` does all three.)

# %%
influences = pipeline.influence("trusted")
print(influences)
influences  # noqa: B018 - a notebook shows a table

# %% [markdown]
# ## What the sign means
#
# `scores[t, i]` predicts the loss of test `t` after training **without** sample `i`, minus what it is now:
# positive = helpful, negative = harmful. So train without the most helpful and without the most harmful sample, and
# look. (What trains on a mean over N − 1 samples, as here, moves every prediction by `offset`.)

# %%
extremes = [int(influences.helpful_on_average(1)[0][0]), int(influences.harmful_on_average(1)[0][0])]
measured = pipeline.retrained("trusted", [[], *([i] for i in extremes)]).values[0].mean(axis=1)
for number, i in enumerate(extremes, 1):
    predicted = float((influences.scores[:, i] + influences.offset).mean())
    print(f"without {i:>4}: predicted {predicted:+.2e}, found {measured[number] - measured[0]:+.2e}")

# %% [markdown]
# ## Wrong labels
#
# What harms on average is the first place to look for them. A tenth would be wrong by chance.

# %%
suspects, _ = influences.harmful_on_average(len(data.flipped))
wrong = np.isin(suspects, data.flipped.numpy())
for k in (10, len(suspects) // 2, len(suspects)):
    print(f"of the {k:>3} most harmful, {wrong[:k].mean():.0%} have a wrong label")

# %% [markdown]
# ## A picture
#
# The test sample that one training sample harms most, with what helped and what harmed it. `plot_distribution` and
# `plot_cumulative` draw how many samples have which score, and what share of all influence few of them carry.

# %%
row = int(influences.harmful(1)[1].argmin())
figure = influences.plot(row, train=train, tests=trusted)
figure.savefig(FOLDER / "harmed.png")
influences.plot_cumulative(row).savefig(FOLDER / "cumulative.png")
print(f"drawn: {FOLDER / 'harmed.png'}, {FOLDER / 'cumulative.png'}")
figure  # noqa: B018 - a notebook shows it

# %% [markdown]
# ## Leave out what harms, and train again
#
# `subset` is a `torch.utils.data.Subset`, for a DataLoader of your own. Nearly all of the first half were wrong labels:
# these go. Against it: as many random samples less. (Accuracy on so few tests moves by chance, the loss much less;
# `scripts/drop_harmful.py` does this ten times over.)

# %%
k = len(data.flipped) // 2
kept = influences.subset(train, k, which="not-harmful")
at_random = Subset(train, np.random.default_rng(0).permutation(len(train))[k:].tolist())
results = {"all samples": quality(model)}
for name, subset in ((f"without the {k} most harmful", kept), (f"without {k} random ones", at_random)):
    results[name] = quality(retrain(subset, seed=0))
for name, (accuracy, loss) in results.items():
    print(f"{name:<28} test accuracy {accuracy:.1%}, loss {loss:.3f}")

# %% [markdown]
# ## The cache without this package
#
# Every array is plain Zarr with named dimensions; the group's attributes say what it is of.

# %%
scores = zarr.open_array(influences.path / "scores", mode="r")
print(scores.shape, scores.dtype, scores[0, :3])
opened = xarray.open_zarr(influences.path, consolidated=False)
print({name: dict(array.sizes) for name, array in opened.items() if name in {"scores", "helpful_ids", "mean_scores"}})

# %% [markdown]
# Also: `influence-pipeline run|plan|show|export|status|verify EXPERIMENT.toml` for all of this on the command line,
# `influences.to_xarray()`, `to_csv`, `to_npy`; `pipeline.evaluate()` for how far rankings are to be believed; and
# other solvers for models that are no 650 parameters (README).
