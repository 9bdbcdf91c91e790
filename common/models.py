"""Models and tokenizers: load an encoder, a 4-bit causal LM, an adapter; count them; truncate reviews head+tail."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common import hub
from common.data import LABELS
from common.device import Hardware
from common.settings import stop

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

# Sun et al. 2019 (How to Fine-Tune BERT), 5.3.1: 128 tokens of the head and 382 of the tail beat either alone on IMDB.
HEAD_SHARE = 0.25
MIN_LENGTH = 8


def load_tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """The tokenizer of a hub name or folder, with a pad token (its end-of-text token where it has none)."""
    from transformers import AutoTokenizer

    with _explained(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if not tokenizer.is_fast:
        stop(f"{name} has no fast tokenizer (tokenizer.json): convert it with the tokenizers library")
    # transformers makes an empty vocabulary for a BERT-like folder without tokenizer files: every word would be [UNK].
    if 2 * len(tokenizer) < load_config(name).vocab_size:
        stop(f"{name} has no tokenizer of its own ({len(tokenizer)} tokens): copy tokenizer.json and its kin into it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_config(name: str) -> "PretrainedConfig":
    """The configuration of a hub name or folder, without its weights."""
    from transformers import AutoConfig

    with _explained(name):
        return AutoConfig.from_pretrained(name)


def load_classifier(name: str) -> "PreTrainedModel":
    """A two-class encoder in fp32 with the project's label names; a base checkpoint gets a new head."""
    import torch
    from transformers import AutoModelForSequenceClassification

    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {name: label for label, name in enumerate(LABELS)}}
    with _explained(name), _quiet():
        model = AutoModelForSequenceClassification.from_pretrained(name, dtype=torch.float32, num_labels=2, **labels)
    # Trainer believes that a classifier with **kwargs normalises its own loss, and skips its division by accumulation.
    model.accepts_loss_kwargs = False
    # transformers 5.0 saves a loaded model's LayerNorms as gamma and beta, which its Trainer does not read back: no
    # best or interrupted checkpoint would be restored whole. Without this record it saves today's names.
    vars(model).pop("_weight_conversions", None)
    return model


def prepare_for_scoring(model: "PreTrainedModel", hardware: Hardware) -> "PreTrainedModel":
    """The model in eval mode on the device, its linear layers cast once to the dtype of the arithmetic.

    Autocast casts fp32 weights at every forward pass, since inference mode switches its cache off: for one review that
    is as much memory traffic as the rest. The logits are the same. Count parameters and bytes before.
    """
    import torch

    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.to(hardware.dtype)
    return model.to(hardware.device).eval()


def load_llm(name: str, hardware: Hardware, adapter: Path | None = None) -> "PreTrainedModel | PeftModel":
    """A causal LM in 4 bits (nf4, double quantisation; QLoRA, Dettmers et al. 2023), with or without a LoRA adapter.

    An adapter is always scored on the 4-bit base that it was trained on: on the unquantised one it differs.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=hardware.dtype,  # the library's default, float32, is 20x slower on a T4
    )
    # This process's own GPU: "auto" would split the model, and safetensors takes a bare "cuda" for the first GPU.
    device = f"cuda:{torch.cuda.current_device()}" if hardware.device == "cuda" else "cpu"
    # Else transformers 5.0 puts unquantised weights on the GPU faster than it quantises them (issue 43032).
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    with _explained(name), _quiet():
        # The stored dtype of Mistral is bf16, which a T4 only emulates: what stays unquantised takes ours.
        model = AutoModelForCausalLM.from_pretrained(
            name, quantization_config=quantization, dtype=hardware.dtype, device_map={"": device}
        )
    _keep_linear4bit_differentiable(model)
    _let_peft_load_beside_other_processes()
    if adapter is not None:
        from peft import PeftModel
        from safetensors import SafetensorError

        for file in ("adapter_config.json", "adapter_model.safetensors"):
            if not (adapter / file).is_file():
                stop(f"{adapter}/ is no adapter (it has no {file}): run 03_finetune_mistral.py --force")
        try:
            model = PeftModel.from_pretrained(model, str(adapter), torch_device=device)
        # other modules, weights of other shapes, a file without its keys or cut short
        except (ValueError, RuntimeError, KeyError, SafetensorError) as problem:
            stop(
                f"{adapter}/ is no adapter of {name} ({hub.reason(problem)}): pass the LLM that it was trained on, or "
                "run 03_finetune_mistral.py --force"
            )
        # Else autocast casts them, and peft the activations to their float32, at every call: same results, slower.
        for name_of, parameter in model.named_parameters():
            if "lora_" in name_of:
                parameter.data = parameter.data.to(hardware.dtype)
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8:
        _avoid_gqa_kernel()
    return model.eval()


def _keep_linear4bit_differentiable(model: "PreTrainedModel") -> None:
    """Keep bitsandbytes (0.50) from repacking weights in the first forward pass after eval() (with AVX512-BF16).

    The repacked kernel has no backward pass and the repacking is for good: after any evaluation, the gradients of a
    training step would silently have a cosine of 0.12 with the true ones.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _let_peft_load_beside_other_processes() -> None:
    """peft 0.19 with transformers 5.0 (Kaggle's) cannot load an adapter once processes have joined: it imports a class
    of tensor parallelism that came later. No weight is split here, so there is nothing for it to do."""
    from peft.utils import save_and_load
    from transformers.integrations import tensor_parallel

    if not hasattr(tensor_parallel, "EmbeddingParallel") and hasattr(save_and_load, "_maybe_shard_state_dict_for_tp"):
        save_and_load._maybe_shard_state_dict_for_tp = lambda *_: None


def _avoid_gqa_kernel() -> None:
    """Below compute capability 8.0 SDPA's enable_gqa leaves only the slow math kernel (transformers issue 48633)."""
    from transformers.integrations import sdpa_attention

    if hasattr(sdpa_attention, "use_gqa_in_sdpa"):
        sdpa_attention.use_gqa_in_sdpa = lambda *args, **kwargs: False


def check_length(max_length: int, name: str, flag: str = "--max-length") -> None:
    """Stop when the length that `flag` asks for is more than a model's positions hold, or too little for a review."""
    config = load_config(name)
    # RoBERTa's and MPNet's positions begin after the padding id.
    offset = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet") else 0
    longest = getattr(config, "max_position_embeddings", max_length + offset) - offset
    if max_length > longest:
        stop(f"{flag} {max_length} is more than the {longest} positions of {name}")
    if max_length < MIN_LENGTH:
        stop(f"{flag} {max_length} leaves nothing of a review: pass at least {MIN_LENGTH}")


def token_ids(tokenizer: "PreTrainedTokenizerFast", texts: list[str]) -> list[list[int]]:
    """The ids of each text without special tokens; a special token that a reviewer typed is plain text."""
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # "longer than the maximum length": it is truncated next
    )
    return encoded["input_ids"]


def head_and_tail(ids: list[int], budget: int) -> list[int]:
    """At most `budget` ids: a quarter from the beginning and the rest from the end."""
    if len(ids) <= budget:
        return ids
    head = int(budget * HEAD_SHARE)
    return ids[:head] + ids[len(ids) - (budget - head) :]


def encode(tokenizer: "PreTrainedTokenizerFast", texts: list[str], max_length: int) -> list[np.ndarray]:
    """Each text as at most `max_length` int32 ids: first special token, head+tail of the review, last special token."""
    around = tokenizer("")["input_ids"]
    if len(around) != 2:
        stop(f"the tokenizer puts {len(around)} special tokens around a text; an encoder's puts 2")
    first, last = around
    encoded = []
    for start in range(0, len(texts), 1000):  # whole lists of Python ints for 75,000 reviews would take gigabytes
        for ids in token_ids(tokenizer, texts[start : start + 1000]):
            encoded.append(np.array([first, *head_and_tail(ids, max_length - 2), last], dtype=np.int32))
    return encoded


def pad(ids: list[np.ndarray], pad_id: int, left: bool = False) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Arrays of ids as one (n, longest) int64 tensor and its attention mask."""
    import torch

    longest = max(map(len, ids))
    padded = np.full((len(ids), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(ids), longest), dtype=np.int64)
    for row, one in enumerate(ids):
        place = slice(longest - len(one), None) if left else slice(len(one))
        padded[row, place], mask[row, place] = one, 1
    return torch.from_numpy(padded), torch.from_numpy(mask)


def pool(hidden: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
    """(n, tokens, width) hidden states to (n, 2, width): the first token's, and the mean over real tokens.

    Two tokenizers' positions do not correspond, so single positions are never matched between teacher and student.
    """
    import torch

    weights = mask.unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
    return torch.stack([hidden[:, 0], mean], dim=1)


def last_logits(model: "PreTrainedModel", input_ids: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
    """(n, vocabulary) next-token logits after left-padded prompts: one pass, the head on the last position alone."""
    import torch

    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    # As an index, not as a count: of a slice, which is not contiguous, PyTorch copies the head's weights once a prompt,
    # a quarter of a 135 M model's time on CPU.
    last = torch.tensor([input_ids.shape[1] - 1], device=input_ids.device)
    return model(
        input_ids=input_ids, attention_mask=mask, position_ids=positions, logits_to_keep=last, use_cache=False
    ).logits[:, -1]


@contextmanager
def exact_logits(model: "PreTrainedModel | PeftModel", token_ids: list[int]) -> Iterator[None]:
    """While it lasts, the head's logits of these tokens are products in float32, and all its logits are float32.

    bf16 leaves steps of 1/16 at logits from 8 to 16, of 1/8 up to 32: of 2,000 reviews 149 had log-odds of exactly 0,
    which are no call.
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
    """SHA-256 of a folder's safetensors files: which weights these are."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()[:16]


def count(model: "PreTrainedModel | PeftModel") -> tuple[int, int]:
    """Parameters and bytes of weights as they lie in memory, counted; a tied tensor counts once.

    A 4-bit weight holds two parameters a byte; the constants of its quantisation are bytes but not parameters.
    """
    parameters = weight_bytes = 0
    for tensor in model.parameters():
        state = getattr(tensor, "quant_state", None)
        weight_bytes += tensor.nbytes
        if state is None:
            parameters += tensor.numel()
        else:
            parameters += state.shape.numel()
            nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
            weight_bytes += sum(constants.nbytes for constants in [state.absmax, state.code, *nested])
    return parameters, weight_bytes


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what can be a person's mistake in loading `name` into one sentence."""
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").exists():
        stop(
            f"{name} is no model folder (it has no config.json): pass a folder written by save_pretrained or a hub name"
        )
    if not folder.is_dir() and (name.startswith((".", "/")) or name.count("/") > 1):
        stop(f"the model folder {name} does not exist: pass a folder written by save_pretrained or a hub name")
    from safetensors import SafetensorError

    try:
        with nullcontext() if folder.is_dir() else hub.explained(name, "pass a local folder"):
            yield
    # ValueError: an unknown kind of model or tokenizer; RuntimeError: weights of other shapes, or too little memory;
    # ImportError: a library that only a model without tokenizer.json, or one in 4 bits, needs.
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as problem:
        reason = hub.reason(problem)
        stop(f"{name} cannot be loaded ({reason}): check the name and its files, or pass a local folder instead")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the report that a base checkpoint lacks a classification head: that is the point of fine-tuning."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
