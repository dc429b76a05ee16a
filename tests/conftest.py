"""Settings that must hold before torch is imported, here and in the processes that tests start."""

import gc
import os
import tempfile

# Tiny tensors gain nothing from threads, and beside any other busy process OpenMP's spinning
# threads make them fifteen times slower. One thread also gives the same bits on every machine.
os.environ["OMP_NUM_THREADS"] = "1"

# Tokens of a test must come from that test, and leave nothing behind.
_cache = tempfile.TemporaryDirectory(prefix="cola-cache-")
os.environ["COLA_CACHE"] = _cache.name


def pytest_collection_finish(session: object) -> None:
    """What collecting made stays to the end: no later pass of the collector looks at it again."""
    gc.collect()
    gc.freeze()
