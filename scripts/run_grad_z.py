"""All training gradients: ``python scripts/run_grad_z.py EXPERIMENT.toml`` is ``influence-pipeline grad-z …``."""

import sys

from influence_pipeline.cli import app

if __name__ == "__main__":
    app(["grad-z", *sys.argv[1:]], prog_name="influence-pipeline")
