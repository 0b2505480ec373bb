"""The main job on the digits network: train it, run the pipeline, and count wrong labels among the most harmful ids.

One in ten of the 1797 labels was made wrong, at known ids, which nothing but the last table looks at. The tests are
a hundred digits with right labels; influence tells what training without a sample would do to their loss. What is
cached is not computed again.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
from digits import Digits, digits
from train import FOLDER, train

import influence_pipeline as ip

SETTINGS = Path(__file__).resolve().parent / "digits_cnn.toml"


def main() -> None:
    if not (FOLDER / "digits_cnn.pt").is_file():
        train("digits_cnn")
    pipeline = ip.Pipeline.from_toml(SETTINGS)
    print(f"\n{pipeline.plan()}\n", flush=True)
    gradients = pipeline.grad_z()
    print(f"grad_z     {gradients.seconds:.1f} s", flush=True)
    solutions = pipeline.s_test("trusted")
    print(f"s_test     {solutions.seconds:.1f} s", flush=True)
    influences = pipeline.influence("trusted")
    show(influences, digits(flipped=0.1, held_out=0))

    cache = pipeline.cache.path.resolve()
    command = shutil.which("influence-pipeline") or Path(sys.executable).with_name("influence-pipeline")
    print(
        f"\nresults    {influences.path.resolve()}\n"
        f"once more  {command} show {SETTINGS}\n"
        f'in Python  ip.Influences.open("{cache}", "trusted").harmful(k=10)'
    )


def show(influences: ip.Influences, data: Digits) -> None:
    """Print the most harmful ids of a training set of digits, and how many of them have wrong labels."""
    given, true, wrong = data.train.tensors[1], data.true_labels, set(data.flipped.tolist())
    ids, scores = influences.harmful_on_average(len(wrong))
    total = len(influences.train_ids)

    print(f"\nmost harmful of {total} training digits, on average over {len(influences)} test digits:")
    print(f"{'rank':>6}{'id':>8}{'score':>14}   label   in truth")
    for rank, (i, score) in enumerate(zip(ids[:10], scores[:10], strict=True), 1):
        print(f"{rank:>6}{i:>8}{score:>+14.3e}{given[i]:>8}{true[i]:>11}{'   wrong' if int(i) in wrong else ''}")

    print(f"\nwrong labels among the most harmful ids (in all of the training set: {len(wrong)} of {total}):")
    hits = np.cumsum([int(i) in wrong for i in ids])
    for k in (10, 50, 100, len(wrong)):
        hit, chance = hits[k - 1], k * len(wrong) / total
        print(f"   first {k:>4}: {hit:>4} wrong = {hit / k:4.0%}   (by chance {chance:.0f})")


if __name__ == "__main__":
    try:
        main()
    except ip.InfluenceError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
