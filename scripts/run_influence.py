"""Scores and rankings: ``python scripts/run_influence.py EXPERIMENT.toml`` is ``influence-pipeline influence …``."""

import sys

from influence_pipeline.cli import app

if __name__ == "__main__":
    app(["influence", *sys.argv[1:]], prog_name="influence-pipeline")
