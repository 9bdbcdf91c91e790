"""Memory: free it between models, measure its peak, find the micro-batch that fits."""

import ctypes
import gc
import re
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

OUT_OF_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory|ALLOC_FAILED")
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
    return host_peak_mb()


def highest_peak_mb() -> float:
    """The peak over the whole step, across all calls of `free`."""
    return max(_earlier_peak, peak_mb())


def restart_host_peak() -> float | None:
    """Free memory, then let the host's peak start anew. Returns the MB (10⁶ bytes) that this process holds now.

    None where the system has no such reset: it is Linux's alone, and a container may forbid it.
    """
    global _earlier_peak
    _earlier_peak = max(_earlier_peak, peak_mb())
    free()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # musl has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)  # freed memory counts until the allocator returns it
            Path("/proc/self/clear_refs").write_text("5")
            return host_peak_mb()
    return None


def host_peak_mb() -> float:
    """Peak resident memory of this process in MB since `restart_host_peak`, or since its start."""
    with suppress(OSError, StopIteration):  # getrusage would count the peak of the process that started this one
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 1e6 if sys.platform == "darwin" else used * 1024 / 1e6


def is_lacking(problem: BaseException) -> bool:
    """Whether an exception says that memory is too small. torch raises a RuntimeError for the host's as for a GPU's."""
    return isinstance(problem, MemoryError) or bool(OUT_OF_MEMORY.search(str(problem)))


def fits(step: Callable[[], None]) -> bool:
    """Whether `step` runs without an out-of-memory error."""
    try:
        step()
        return True
    except (RuntimeError, MemoryError) as problem:
        if not is_lacking(problem):
            raise
    free()  # after the except clause: its exception holds the failed step's tensors
    return False


def largest_that_fits(step: Callable[[int], None], micro_batch: int) -> int | None:
    """Halve the micro-batch until `step(micro_batch)` fits in memory; None if not even one review fits."""
    while micro_batch and not fits(partial(step, micro_batch)):
        micro_batch //= 2
    return micro_batch or None
