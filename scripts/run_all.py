"""All stages: ``python scripts/run_all.py EXPERIMENT.toml`` is ``influence-pipeline run …``."""

import sys

from influence_pipeline.cli import app

if __name__ == "__main__":
    app(["run", *sys.argv[1:]], prog_name="influence-pipeline")
