"""Memory between models: give it back, and say how much was used at the peak."""

import gc
import resource
import sys


def free() -> None:
    """Drop what no name holds any more and return cached GPU memory; call it after `del model`."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_mb() -> float:
    """Peak memory in MB (10⁶ bytes): of the GPU since the last `free`, or of this process where no GPU is in use."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 1e6 if sys.platform == "darwin" else used * 1024 / 1e6
