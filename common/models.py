"""Models and tokenizers: load an encoder, a 4-bit causal LM or an adapter; count parameters."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from common import hub, patches
from common.data import LABELS
from common.device import Hardware
from common.settings import stop

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

MIN_LENGTH = 8


def load_tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """The tokenizer of a hub name or folder. If it has no pad token, its end-of-text token becomes one."""
    from transformers import AutoTokenizer

    with _explained(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if not tokenizer.is_fast:
        stop(f"{name} has no fast tokenizer (tokenizer.json): convert it with the tokenizers library")
    # Without tokenizer files transformers gives a BERT-like folder an empty vocabulary. Every word would be [UNK].
    if 2 * len(tokenizer) < load_config(name).vocab_size:
        stop(f"{name} has no tokenizer files ({len(tokenizer)} tokens): copy tokenizer.json and the like into it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_config(name: str) -> "PretrainedConfig":
    """The configuration of a hub name or folder, without its weights."""
    from transformers import AutoConfig

    with _explained(name):
        return AutoConfig.from_pretrained(name)


def load_classifier(name: str) -> "PreTrainedModel":
    """A two-class encoder in fp32 with this project's label names; a base checkpoint gets a new head."""
    import torch
    from transformers import AutoModelForSequenceClassification

    labels = {"id2label": dict(enumerate(LABELS)), "label2id": dict(zip(LABELS, (0, 1)))}
    with _explained(name), _quiet():
        model = AutoModelForSequenceClassification.from_pretrained(name, dtype=torch.float32, num_labels=2, **labels)
    patches.divide_loss_by_accumulation(model)
    patches.save_weights_by_todays_names(model)
    return model


def prepare_for_scoring(model: "PreTrainedModel", hardware: Hardware) -> "PreTrainedModel":
    """The model in eval mode on the device, with its linear layers cast to the dtype of the arithmetic.

    In inference mode autocast has no cache and casts fp32 weights at every forward pass. For one review that doubles
    the memory traffic. The logits stay the same. Count parameters and bytes before this call.
    """
    import torch

    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.to(hardware.dtype)
    return model.to(hardware.device).eval()


def load_llm(name: str, hardware: Hardware, adapter: Path | None = None) -> "PreTrainedModel | PeftModel":
    """A causal LM in 4 bits (nf4, double quantisation; QLoRA, Dettmers et al. 2023), with or without a LoRA adapter.

    An adapter runs on the 4-bit base that it was trained on. On the unquantised base its scores would differ.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=hardware.dtype,  # the library's default, float32, is 20x slower on a T4
    )
    # The device has a number: "auto" would split the model, and safetensors takes a bare "cuda" for the first GPU.
    device = f"cuda:{torch.cuda.current_device()}" if hardware.device == "cuda" else "cpu"
    patches.load_weights_in_turn()
    with _explained(name), _quiet():
        # Mistral's stored dtype is bf16, which a T4 only emulates. Unquantised weights get the hardware's dtype.
        model = AutoModelForCausalLM.from_pretrained(
            name, quantization_config=quantization, dtype=hardware.dtype, device_map={"": device}
        )
    patches.keep_4bit_differentiable(model)
    patches.load_adapters_beside_other_processes()
    if adapter is not None:
        model = _with_adapter(model, name, adapter, device, hardware.dtype)
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8:
        patches.avoid_gqa_kernel()
    return model.eval()


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


def check_length(max_length: int, name: str, flag: str = "--max-length") -> None:
    """Stop when the length in `flag` is more than the model's positions or too short for a review."""
    config = load_config(name)
    # In RoBERTa and MPNet positions begin after the padding id.
    offset = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet") else 0
    longest = getattr(config, "max_position_embeddings", max_length + offset) - offset
    if max_length > longest:
        stop(f"{flag} {max_length} is more than the {longest} positions of {name}")
    if max_length < MIN_LENGTH:
        stop(f"{flag} {max_length} is too short for a review: pass at least {MIN_LENGTH}")


def pool(hidden: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
    """Pool (n, tokens, width) hidden states to (n, 2, width): the first token's, and the mean without padding.

    Two tokenizers' positions do not correspond, so no single position is matched between teacher and student.
    """
    import torch

    weights = mask.unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
    return torch.stack([hidden[:, 0], mean], dim=1)


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


def weights_digest(folder: Path) -> str:
    """SHA-256 over a folder's safetensors files, to identify the weights."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()[:16]


def count(model: "PreTrainedModel | PeftModel") -> tuple[int, int]:
    """The number of parameters and the bytes of the weights in memory; a tied tensor counts once.

    A 4-bit tensor holds two parameters per byte. Its quantisation constants count as bytes, not as parameters.
    """
    parameters = weight_bytes = 0
    for tensor in model.parameters():
        state = getattr(tensor, "quant_state", None)
        parameters += tensor.numel() if state is None else state.shape.numel()
        constants = [] if state is None else [state.absmax, state.code]
        if state is not None and state.nested:
            constants += [state.state2.absmax, state.state2.code, state.offset]
        weight_bytes += tensor.nbytes + sum(constant.nbytes for constant in constants)
    return parameters, weight_bytes


def forward_flops(model: "PreTrainedModel | PeftModel") -> tuple[int, int]:
    """Floating-point operations of a forward pass for a token, and for a pair of tokens: a·t + b·t² for t tokens.

    Two a multiply-add of the blocks' linear layers, and of QKᵀ and AV over all pairs (PaLM, Chowdhery et al. 2022,
    appendix B). The head runs on one position and is left out.
    """
    import torch

    model = getattr(model, "get_base_model", lambda: model)()
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    linear = (module for module in model.base_model.modules() if isinstance(module, torch.nn.Linear))
    per_token = 2 * sum(module.in_features * module.out_features for module in linear)
    return per_token, 4 * config.num_hidden_layers * heads * size


def planned_size(name: str) -> tuple[int, tuple[int, int]]:
    """The parameters and the `forward_flops` of a hub name or folder, from its config alone."""
    import torch
    import transformers

    config = load_config(name)
    with torch.device("meta"):
        model = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
        model = model.from_config(config) if model is transformers.AutoModel else model(config)
    return sum(tensor.numel() for tensor in model.parameters()), forward_flops(model)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn the errors that a user can make in loading `name` into one sentence."""
    from safetensors import SafetensorError

    is_folder, remedy = Path(name).is_dir(), "pass a folder written by save_pretrained or a hub name"
    if is_folder and not Path(name, "config.json").exists():
        stop(f"{name} is no model folder (it has no config.json): {remedy}")
    if not is_folder and (name.startswith((".", "/")) or name.count("/") > 1):
        stop(f"the model folder {name} does not exist: {remedy}")
    try:
        with nullcontext() if is_folder else hub.explained(name, "pass a local folder"):
            yield
    # ValueError: an unknown kind of model or tokenizer. RuntimeError: weights of other shapes, or too little memory.
    # ImportError: a library that is needed only without tokenizer.json, or for 4 bits.
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as problem:
        remedy = "check the name and its files, or pass a local folder instead"
        stop(f"{name} cannot be loaded ({hub.reason(problem)}): {remedy}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide progress bars and the report that a base checkpoint has no classification head: fine-tuning adds it."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
