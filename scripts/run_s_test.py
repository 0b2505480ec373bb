"""All solutions: ``python scripts/run_s_test.py EXPERIMENT.toml`` is ``influence-pipeline s-test …``."""

import sys

from influence_pipeline.cli import app

if __name__ == "__main__":
    app(["s-test", *sys.argv[1:]], prog_name="influence-pipeline")
