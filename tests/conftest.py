"""Settings and fixtures that all tests share."""

from __future__ import annotations

import os

# Before torch and FAISS are imported, here and in the subprocesses of tests: the models are tiny, and OpenMP threads
# that spin for one another slow such work down, tenfold on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
