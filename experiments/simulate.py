"""How much of a GPU's memory a step takes, found without a GPU: the live bytes of fake tensors.

PyTorch's fake tensors have shapes and dtypes, but no data. The product's own code runs on them as on a CPU. What CUDA
does otherwise is put in here: its dropout, its memory-efficient attention (the kernel that a T4 has) and what
bitsandbytes dequantises in a product. A CPU's autocast stands for CUDA's: CUDA also computes LayerNorms and losses in
float32, but here their inputs are float32 anyway. `Live` counts a tensor from its birth until nothing holds it.

Left out: CUDA's context, NCCL's buffers, the libraries' workspaces and the allocator's fragmentation.
"""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from bitsandbytes.functional import create_dynamic_map, name2qmap, quantize_4bit
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import device, scoring

if TYPE_CHECKING:
    from transformers import Trainer

BLOCK = 512  # bytes: the CUDA allocator's smallest unit


class Live(TorchDispatchMode):
    """The bytes of all tensors that live, `now` and at the `peak`."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function) == "bitsandbytes.gemm_4bit.default":  # since 0.50; before, it is two visible operations
            unpacked = self._unpacked(args[0], args[2])  # lives during the product  # noqa: F841
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return result

    def _unpacked(self, inputs: torch.Tensor, shape: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """What bitsandbytes (0.50, `_dequant_linear_fallback`) makes for a product of more than 1,536 rows: the weights
        in the inputs' dtype, and a float32 scale for each 64 of them."""
        weights, scales = inputs.new_empty(shape), inputs.new_empty(shape[0] * shape[1] // 64, dtype=torch.float32)
        self._count(weights)
        self._count(scales)
        return weights, scales

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes or tensor.device.type == "meta":
            return
        self.sizes[key] = -(-storage.nbytes() // BLOCK) * BLOCK
        weakref.finalize(storage, self._forget, key)
        self.now += self.sizes[key]
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def dropout(inputs: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """CUDA's dropout keeps a mask of one byte an element."""
    return torch.native_dropout(inputs, p, True)[0] if training and p > 0 else inputs


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_) -> torch.Tensor:
    """The memory-efficient kernel; a boolean mask becomes numbers in the queries' dtype, as in PyTorch's sdp_utils."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
    if attn_mask is not None:
        attn_mask = torch.zeros(attn_mask.shape, dtype=query.dtype).expand(*query.shape[:3], key.shape[2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]


class FakeT4(device.Hardware):
    """A T4 whose tensors say "cpu": fake ones of a GPU need a PyTorch that is built for GPUs."""

    batch_tokens = 8192  # a GPU's


def in_4_bits(weights: torch.Tensor, how: dict) -> torch.nn.Parameter:
    """A fake weight as bitsandbytes' quantisation leaves it; a Params4bit of fake data would be no fake tensor."""
    settings = {name: how[name] for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage")}
    packed, state = quantize_4bit(weights, **settings)
    parameter = torch.nn.Parameter(packed, requires_grad=False)
    for name, value in (how | {"quant_state": state, "bnb_quantized": True}).items():
        setattr(parameter, name, value)
    return parameter


def apply(self: torch.nn.Module, change: Callable, recurse: bool = True) -> torch.nn.Module:
    """nn.Module._apply with new parameters in the old ones' places: fake ones cannot be swapped."""
    for module in self.modules() if recurse else [self]:
        for name, old in module._parameters.items():
            new = old if old is None else change(old.detach())
            if old is not None and (new.dtype, new.device) != (old.dtype, old.device):
                module._parameters[name] = torch.nn.Parameter(new, old.requires_grad)
        module._buffers.update({name: change(old) for name, old in module._buffers.items() if old is not None})
    return self


@contextmanager
def fake_tensors() -> Iterator[Live]:
    """Inside, every new tensor is fake and counted, and computes as on a T4."""

    def first_rows(batches: list[torch.Tensor], order: list[np.ndarray]) -> np.ndarray:
        return np.zeros(torch.cat(batches).shape, np.float32)  # a fake tensor has no numbers

    name2qmap.setdefault("dynamic", create_dynamic_map())  # made once, of real numbers
    with (
        patch.object(scoring, "in_order", first_rows),
        patch.object(torch.nn.Module, "_apply", apply),
        patch.multiple(F, dropout=dropout, scaled_dot_product_attention=attention),
        warnings.catch_warnings(),
        FakeTensorMode(allow_non_fake_inputs=True),
        Live() as live,
    ):
        warnings.simplefilter("ignore")
        yield live


def train(live: Live, trainer: "Trainer", hardware: FakeT4) -> int:
    """Make one optimizer step of up to two accumulated micro-steps at the longest review; resident bytes before it.

    Resident are weights, Adam's two moments and, of several processes, the buckets of DistributedDataParallel.
    """
    model, arguments = trainer.model.train(), trainer.args
    trainable = [p for p in model.parameters() if p.requires_grad]
    buckets = torch.empty(sum(p.numel() for p in trainable) if hardware.processes > 1 else 0)  # noqa: F841
    optimizer = trainer.create_optimizer()
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the moments
    optimizer.zero_grad()
    gc.collect()
    live.peak = resident = live.now
    dataset, micro_batch = trainer.train_dataset, arguments.per_device_train_batch_size
    inputs = trainer.data_collator([dataset[0]] * micro_batch)
    for _ in range(min(2, arguments.gradient_accumulation_steps)):
        with hardware.autocast():
            loss = trainer.compute_loss(model, inputs)
        loss.backward()
        del loss
    optimizer.step()
    return resident


def score(live: Live, score: Callable[[list[np.ndarray]], object], ids: list[np.ndarray]) -> int:
    """Score one batch; resident bytes before it, which are the model's."""
    gc.collect()
    live.peak = resident = live.now
    score(ids)
    return resident
