"""The device, the precision and the seed, decided in one place and printed."""

import logging
import os
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.settings import stop

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Hardware:
    """Where and in what precision a model runs."""

    device: str  # "cuda" or "cpu"
    precision: str  # "fp32", "bf16" or "fp16"
    name: str

    @property
    def dtype(self) -> "torch.dtype":
        """The dtype of the arithmetic."""
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    def autocast(self) -> AbstractContextManager:
        """Mixed precision for a forward pass of fp32 weights; does nothing in fp32."""
        import torch

        return torch.autocast(self.device, self.dtype, enabled=self.precision != "fp32")

    def synchronize(self) -> None:
        """Wait for the GPU; without this a clock measures the launch alone."""
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()


def detect(precision: str) -> Hardware:
    """The hardware at hand; `precision` is the flag. Call it before anything touches CUDA.

    auto is fp16 on a GPU before compute capability 8.0 (a T4: torch counts its emulated bf16 as support), bf16 from
    there on, fp32 on a CPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        stop("these scripts run as one process so far: start them with python instead of torchrun")
    # One process drives one GPU: with two in sight Trainer falls into nn.DataParallel, and a 4-bit model would split.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    _quiet_libraries()
    import torch

    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        auto = "bf16" if capability[0] >= 8 else "fp16"
        hardware = Hardware("cuda", auto if precision == "auto" else precision, torch.cuda.get_device_name())
        if hardware.precision == "bf16" and capability[0] < 8:
            stop(f"{hardware.name} has no bf16 arithmetic: pass --precision fp16 or leave it at auto")
    else:
        hardware = Hardware(
            "cpu", "fp32" if precision == "auto" else precision, f"CPU, {torch.get_num_threads()} threads"
        )
        if hardware.precision == "fp16":
            stop(
                "fp16 needs a GPU and none is in sight: pass --precision fp32, or bf16 on a processor with AVX512-BF16"
            )
    print(f"running on {hardware.name} in {hardware.precision}")
    return hardware


def _quiet_libraries() -> None:
    """Silence what a user cannot act on, at its source; errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else a warning at every fork
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an optional kernel is not installed
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers.modeling_utils")  # peft's old call


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch: the new classification head, dropout and the order of training."""
    import transformers

    transformers.set_seed(seed)
