"""Memory: free it between models, measure its peak, find the micro-batch that fits."""

import gc
import re
import resource
import sys
from collections.abc import Callable

OUT_OF_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory")
_earlier_peak = 0.0


def free() -> None:
    """Collect garbage and return cached GPU memory; call it once no variable holds the model."""
    global _earlier_peak
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        _earlier_peak = max(_earlier_peak, peak_mb())
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_mb() -> float:
    """Peak memory in MB (10⁶ bytes): the GPU's since the last `free`, or this process's if it uses no GPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 1e6 if sys.platform == "darwin" else used * 1024 / 1e6


def highest_peak_mb() -> float:
    """The peak over the whole step, across all calls of `free`."""
    return max(_earlier_peak, peak_mb())


def largest_that_fits(step: Callable[[int], None], micro_batch: int) -> int | None:
    """Halve the micro-batch until `step(micro_batch)` fits in memory; None if not even one review fits."""
    while micro_batch:
        try:
            step(micro_batch)
            return micro_batch
        except (RuntimeError, MemoryError) as problem:
            # torch.OutOfMemoryError is a RuntimeError, and the CPU's allocator raises a plain one.
            if not isinstance(problem, MemoryError) and not OUT_OF_MEMORY.search(str(problem)):
                raise
        free()  # after the except clause: its exception holds the failed step's tensors
        micro_batch //= 2
    return None
