"""The machine on which 05 measures: what it is, and how fast it multiplies matrices."""

import os
import platform
import time
from pathlib import Path

from common.device import Hardware


def environment(hardware: Hardware) -> dict:
    """The machine on which figures are measured."""
    import torch

    return {
        "device": hardware.name,
        "precision": hardware.precision,
        "cpu": _cpu_info("model name") or platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "logical_cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "cuda": torch.version.cuda,
    }


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies in bf16 (AVX512-BF16 or AMX); others emulate it, slower than fp32."""
    return bool({"avx512_bf16", "amx_bf16"} & set(_cpu_info("flags").split()))


def _cpu_info(key: str) -> str:
    """The first processor's entry in /proc/cpuinfo; empty where there is none."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith(key)), "")


def matrix_peak(hardware: Hardware) -> float:
    """FLOP/s of a large square matrix product in this precision, the best of five."""
    import torch

    size = 8192 if hardware.device == "cuda" else 1024
    left, right = torch.randn(2, size, size, device=hardware.device, dtype=hardware.dtype)
    seconds = []
    for _ in range(6):  # the first one warms up
        hardware.synchronize()
        started = time.perf_counter()
        left @ right
        hardware.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds[1:])
