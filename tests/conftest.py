"""One thread per process: the tensors are tiny, and threads that wait for a busy core cost minutes."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
