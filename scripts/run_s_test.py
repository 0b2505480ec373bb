"""The solution for every test sample: ``python scripts/run_s_test.py EXPERIMENT.toml``, the same as ``influence-pipeline s-test``."""

import sys

from influence_pipeline.cli import app

if __name__ == "__main__":
    app(["s-test", *sys.argv[1:]], prog_name="influence-pipeline")
