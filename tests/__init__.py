"""Tests. They, and the processes that they start, compute on one thread each: two of them share two cores."""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # before NumPy or PyTorch is loaded
