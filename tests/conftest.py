"""Settings that must hold before torch is imported, here and in the processes that tests start."""

import os

# Tiny tensors gain nothing from threads, and beside any other busy process OpenMP's spinning
# threads make them fifteen times slower. One thread also gives the same bits on every machine.
os.environ["OMP_NUM_THREADS"] = "1"
