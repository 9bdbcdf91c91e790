"""Causal LMs in 4 bits: load one with its adapter, read its next-token logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from common import hub, models, patches
from common.device import Hardware
from common.settings import stop

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


def load_llm(name: str, hardware: Hardware, adapter: Path | None = None) -> "PreTrainedModel | PeftModel":
    """A causal LM in 4 bits (nf4, double quantisation; QLoRA, Dettmers et al. 2023), with or without a LoRA adapter.

    A checkpoint that was saved in 4 bits keeps its own type. An adapter runs on the 4-bit base that it was trained on.
    On the unquantised base its scores would differ.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = models.load_config(name)
    how = {"dtype": hardware.dtype}  # Mistral's stored dtype is bf16, which a T4 only emulates
    if getattr(config, "quantization_config", None) is None:
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=hardware.dtype,  # the library's default, float32, is 20x slower on a T4
        )
    # The device has a number: "auto" would split the model, and safetensors takes a bare "cuda" for the first GPU.
    device = f"cuda:{torch.cuda.current_device()}" if hardware.device == "cuda" else "cpu"
    patches.load_weights_in_turn()
    model = models.pretrained(name, AutoModelForCausalLM, config, device_map={"": device}, **how)
    for module in _in_4_bits(model):  # a stored compute dtype may be one that this GPU lacks
        module.compute_dtype, module.compute_type_is_set = hardware.dtype, True
        module.weight.quant_state.dtype = hardware.dtype
    refuse_few_in_4_bits(model, name)
    patches.keep_4bit_differentiable(model)
    patches.load_adapters_beside_other_processes()
    if adapter is not None:
        model = _with_adapter(model, name, adapter, device, hardware.dtype)
    if hardware.device == "cuda" and hardware.processes > 1:
        patches.read_adapters_to_the_own_gpu()
    if hardware.device == "cuda" and (hardware.precision == "fp32" or torch.cuda.get_device_capability()[0] < 8):
        patches.avoid_gqa_kernel()
    refuse_reading_ahead(model.eval(), name, hardware)
    return model


def _in_4_bits(model: "PreTrainedModel | PeftModel") -> list["torch.nn.Module"]:
    import bitsandbytes

    return [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


def quantisation(model: "PreTrainedModel | PeftModel") -> dict[str, object]:
    """`type` (nf4 or fp4), `compute` (a dtype's name) and `share` of the blocks' weights in 4 bits, off the modules.

    Of a model on the meta device, `share` is what bitsandbytes would quantise; `type` and `compute` are None.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    four, sizes = _in_4_bits(model), {True: 0, False: 0}
    base = getattr(model, "get_base_model", lambda: model)().base_model
    for name, module in base.named_modules():
        if not isinstance(module, torch.nn.Embedding) and ".lora_" not in name:
            planned = type(module) in (torch.nn.Linear, Conv1D) and module.weight.is_meta
            matrices = [tensor for tensor in module.parameters(recurse=False) if tensor.dim() > 1]
            sizes[module in four or planned] += sum(map(models.numel, matrices))
    types = {module.weight.quant_type for module in four}
    computes = {str(module.compute_dtype).removeprefix("torch.") for module in four}
    words = {"type": "+".join(sorted(types)) or None, "compute": "+".join(sorted(computes)) or None}
    return words | {"share": round(sizes[True] / max(sum(sizes.values()), 1), 4)}


def refuse_few_in_4_bits(model: "PreTrainedModel", name: str) -> None:
    """Stop when less than half of the blocks' weights are, or on the meta device would be, in 4 bits."""
    share = quantisation(model)["share"]
    if share < 0.5:
        reason = f"bitsandbytes quantises {share:.0%} of the blocks' weights of a {model.config.model_type}"
        stop(f"{name} cannot be run in 4 bits ({reason}; others are no nn.Linear, or saved whole): pass another LLM")


def refuse_reading_ahead(model: "PreTrainedModel | PeftModel", name: str, hardware: Hardware) -> None:
    """Stop unless the model runs in this precision, and its logits depend on no later token (as those of BERT do)."""
    import torch

    rows = torch.arange(12, device=model.device).repeat(2, 1) % model.config.get_text_config().vocab_size
    rows[1, 6:] = rows[1, 6:].flip(0)
    mask = torch.ones_like(rows)
    mask[:, 6:] = 0
    with torch.inference_mode(), hardware.autocast(), models.refused(name, hardware):
        logits = last_logits(model, rows, mask).float()
    models.refuse_infinite(logits, name, hardware)
    if not (logits[0] - logits[1]).abs().mean() < 0.1 * logits[0].std():
        stop(f"{name} is no causal LM (its scores depend on later tokens): pass one like Mistral or Llama")


def _with_adapter(model: "PreTrainedModel", name: str, adapter: Path, device: str, dtype: "torch.dtype") -> "PeftModel":
    from peft import PeftModel
    from safetensors import SafetensorError

    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / file).is_file():
            stop(f"{adapter}/ is not an adapter (it has no {file}): run 03_finetune_mistral.py --force")
    try:
        model = PeftModel.from_pretrained(model, str(adapter), torch_device=device)
    # Causes: other modules, weights of other shapes, a file that lacks keys or is cut short.
    except (ValueError, RuntimeError, KeyError, SafetensorError) as problem:
        remedy = "pass the LLM that it was trained on, or run 03_finetune_mistral.py --force"
        stop(f"{adapter}/ is no adapter of {name} ({hub.reason(problem)}): {remedy}")
    # With float32 adapters autocast would cast them, and peft the activations, at every call. Results are the same.
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = parameter.data.to(dtype)
    return model


def last_logits(model: "PreTrainedModel", input_ids: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
    """(n, vocabulary) next-token logits after each prompt; the head runs on the last real position alone.

    The prompts are padded at the end. A causal LM's real tokens never see that padding, so attention needs no mask, and
    its fast kernels run. Padding at the beginning would attend to nothing: the likely cause of a training that became
    NaN after 30 steps, on an H100 in bf16 at 512 tokens.
    """
    import torch

    rows, last = torch.arange(len(mask), device=mask.device), mask.sum(-1) - 1

    def keep_last(_module, inputs):
        return (inputs[0][rows, last].unsqueeze(1),)

    unwrapped = getattr(model, "module", model)  # several processes train inside DistributedDataParallel
    hook = unwrapped.get_output_embeddings().register_forward_pre_hook(keep_last)
    try:
        return model(input_ids=input_ids, use_cache=False).logits[:, -1]
    finally:
        hook.remove()


@contextmanager
def exact_logits(model: "PreTrainedModel | PeftModel", token_ids: list[int]) -> Iterator[None]:
    """Within this context the head computes the logits of these tokens in float32, and returns all logits as float32.

    bf16 rounds logits from 8 to 16 to steps of 1/16, and logits from 16 to 32 to steps of 1/8. It gave 149 of 2,000
    reviews log-odds of exactly 0, which predict no class.
    """
    import torch
    import torch.nn.functional as F

    head = model.get_output_embeddings()

    def replace(_module, inputs, logits):
        bias = None if getattr(head, "bias", None) is None else head.bias[token_ids].float()
        with torch.autocast(logits.device.type, enabled=False):
            exact = F.linear(inputs[0].float(), head.weight[token_ids].float(), bias)
        logits = logits.float()
        logits[..., token_ids] = exact
        return logits

    hook = head.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()
