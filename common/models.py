"""Models and tokenizers: load an encoder, a 4-bit causal LM or an adapter; count parameters."""

import hashlib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from common import hub, memory, patches
from common.data import LABELS
from common.device import Hardware
from common.settings import stop

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

# What a checkpoint's config says beyond its architecture. Other values change outputs, losses and `pipeline`'s scores.
HABITS = {
    "problem_type": None,
    "output_hidden_states": False,
    "output_attentions": False,
    "return_dict": True,
    "use_cache": False,
    "gradient_checkpointing": False,
}
# Upper case, accents, digits, punctuation, other scripts and an emoji: whatever a tokenizer may normalise.
PROBE = "The naïve CAFÉ's 1,234th Film (2007) — “so-so”, isn't it?  😀 ﬁn Straße Привет 世界"


def load_tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """The tokenizer of a hub name or folder, which reads text as its tokenizer.json does and can pad."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import cached_file

    rows = getattr(text_config(load_config(name)), "vocab_size", 0)
    with explained(name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        file = cached_file(name, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    if not tokenizer.is_fast:
        stop(f"{name} has no fast tokenizer (tokenizer.json): convert it with the tokenizers library")
    # Without tokenizer files transformers gives a BERT-like folder an empty vocabulary. Every word would be [UNK].
    if 2 * len(tokenizer) < rows:
        stop(f"{name} has no tokenizer files ({len(tokenizer)} tokens): copy tokenizer.json and the like into it")
    if file is not None:
        # From transformers 5 on, a tokenizer's class rebuilds its rules. It may lower-case a cased vocabulary.
        with explained(name):
            raw = Tokenizer.from_file(file)
        raw.no_truncation()
        raw.no_padding()
        expected = raw.encode(PROBE, add_special_tokens=False).ids
        if tokenizer(PROBE, add_special_tokens=False)["input_ids"] != expected:
            made = type(tokenizer).__name__
            with explained(name):
                tokenizer = PreTrainedTokenizerFast.from_pretrained(name)
            if tokenizer(PROBE, add_special_tokens=False)["input_ids"] != expected:
                stop(f"{name}: tokenizer_config.json contradicts tokenizer.json: make one of them right")
            say(f"{name}: the class {made} reads text otherwise than its tokenizer.json, which is used")
    known = (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.sep_token)
    known = [token for token in known if token and tokenizer.convert_tokens_to_ids(token) < (rows or len(tokenizer))]
    if not known:
        stop(f"{name} has no token that can pad: add a pad_token to its tokenizer_config.json")
    if tokenizer.pad_token != known[0]:
        tokenizer.pad_token = known[0]
    return tokenizer


def load_config(name: str) -> "PretrainedConfig":
    """The configuration of a hub name or folder, without its weights and with this project's HABITS."""
    from transformers import AutoConfig

    with explained(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **HABITS)
    for part in (config, text_config(config)):
        for habit, value in HABITS.items():
            if hasattr(part, habit):
                setattr(part, habit, value)
        pad = getattr(part, "pad_token_id", None) or 0
        if not 0 <= pad < getattr(part, "vocab_size", math.inf):  # some of Llama's are -1, or one too high
            part.pad_token_id = None
    return config


def text_config(config: "PretrainedConfig") -> "PretrainedConfig":
    """The part of a config that holds the sizes: a multimodal model's are nested."""
    return config.get_text_config()


def load_classifier(name: str, tokenizer: "PreTrainedTokenizerFast | None" = None) -> "PreTrainedModel":
    """A two-class encoder in fp32 with this project's label names; a base checkpoint gets a new head.

    A head for another number of classes is replaced. One whose label names are the other way round is turned, so that
    training need not unlearn it. With `tokenizer`, the embeddings grow to its ids and the config knows its pad token.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    config = load_config(name)
    classes, first = config.num_labels, str(config.id2label.get(0, "")).lower()
    config.id2label, config.label2id = dict(enumerate(LABELS)), dict(zip(LABELS, (0, 1)))
    config.problem_type = "single_label_classification"
    model = _pretrained(name, AutoModelForSequenceClassification, config, dtype=torch.float32)
    head = {key: tensor for key, tensor in model.named_parameters() if not key.startswith(model.base_model_prefix)}
    if first.startswith("pos") and classes == 2:
        say(f"{name} calls class 0 {first}: its head is turned, and 0 is negative")
        for tensor in head.values():
            if tensor.shape[0] == 2:
                tensor.data = tensor.data.flip(0)
    if tokenizer is not None:
        _fit_to_tokenizer(model, tokenizer, name)
    patches.save_weights_by_todays_names(model)
    return model


def _pretrained(name: str, kind: type, config: "PretrainedConfig", **how: object) -> "PreTrainedModel":
    """The weights of `name` in a model of the auto class `kind`; stops if some are absent or have other shapes.

    A classifier's head may be absent, or be for another number of classes: then it is new.
    """
    with explained(name), quiet():
        options = {"config": config, "ignore_mismatched_sizes": True, "output_loading_info": True}
        model, found = kind.from_pretrained(name, trust_remote_code=False, **options, **how)
    classifies = kind.__name__.endswith("SequenceClassification")

    def is_new(key: str) -> bool:  # a masked language model has no pooler
        return classifies and (not key.startswith(f"{model.base_model_prefix}.") or ".pooler." in key)

    others = [key for key, *_ in found["mismatched_keys"]]
    lost = [key for key in (*found["missing_keys"], *others) if not is_new(key)]
    if lost:
        what = f"{len(lost)} weights of a {config.model_type}, such as {sorted(lost)[0]}"
        stop(f"{name} lacks {what}, or has them in other shapes: check its config.json and weights, or pass another")
    if others:
        say(f"{name} has a head for another number of classes: a new head for two takes its place")
    return model


def _fit_to_tokenizer(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", name: str) -> None:
    """Grow the embeddings to the highest id, and let the config name the pad token where that only ends a text."""
    rows, needed = model.get_input_embeddings().weight.shape[0], highest_id(tokenizer) + 1
    if needed > rows:
        say(f"{name} has embeddings for {rows:,} ids and its tokenizer {needed:,}: the new ones start at random")
        model.resize_token_embeddings(needed, mean_resizing=False)
    # RoBERTa counts positions from its pad id. A decoder that classifies looks for the last token before the padding.
    if first_position(model) == 0:
        for part in (model.config, text_config(model.config)):
            part.pad_token_id = tokenizer.pad_token_id


def highest_id(tokenizer: "PreTrainedTokenizerFast") -> int:
    """The highest id that the tokenizer can make."""
    return max(tokenizer.get_vocab().values())


def position_embeddings(model: "PreTrainedModel") -> list[tuple[int, int]]:
    """The first usable row of each table of learned absolute positions, and its number of rows."""
    import torch

    named = re.compile(r"(^|\.)(embed_positions|positions?_embed(ding)?s?|wpe)$")
    tables = [module for name, module in model.named_modules() if named.search(name)]
    tables = [table for table in tables if isinstance(table, torch.nn.Embedding)]
    # RoBERTa's positions begin after the padding id, and those of OPT after two unused rows.
    firsts = [getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1 for table in tables]
    return [(first, table.num_embeddings) for first, table in zip(firsts, tables)]


def first_position(model: "PreTrainedModel") -> int:
    """The row of the first token's position."""
    return max((first for first, _ in position_embeddings(model)), default=0)


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

    A checkpoint that was saved in 4 bits keeps its own type. An adapter runs on the 4-bit base that it was trained on.
    On the unquantised base its scores would differ.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = load_config(name)
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
    model = _pretrained(name, AutoModelForCausalLM, config, device_map={"": device}, **how)
    for module in _in_4_bits(model):  # a stored compute dtype may be one that this GPU lacks
        module.compute_dtype, module.compute_type_is_set = hardware.dtype, True
        module.weight.quant_state.dtype = hardware.dtype
    refuse_few_in_4_bits(model, name)
    patches.keep_4bit_differentiable(model)
    patches.load_adapters_beside_other_processes()
    if adapter is not None:
        model = _with_adapter(model, name, adapter, device, hardware.dtype)
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8:
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

    four, found, others = _in_4_bits(model), 0, 0
    base = getattr(model, "get_base_model", lambda: model)().base_model
    for name, module in base.named_modules():
        if module in four:
            found += module.in_features * module.out_features
        elif type(module) in (torch.nn.Linear, Conv1D) and module.weight.is_meta:
            found += module.weight.numel()
        elif not isinstance(module, torch.nn.Embedding) and ".lora_" not in name:
            others += sum(tensor.numel() for tensor in module.parameters(recurse=False) if tensor.dim() > 1)
    types = {module.weight.quant_type for module in four}
    computes = {str(module.compute_dtype).removeprefix("torch.") for module in four}
    words = {"type": "+".join(sorted(types)) or None, "compute": "+".join(sorted(computes)) or None}
    return words | {"share": round(found / max(found + others, 1), 4)}


def refuse_few_in_4_bits(model: "PreTrainedModel", name: str) -> None:
    """Stop when less than half of the blocks' weights are, or on the meta device would be, in 4 bits."""
    share = quantisation(model)["share"]
    if share < 0.5:
        reason = f"bitsandbytes quantises {share:.0%} of the blocks' weights of a {model.config.model_type}"
        stop(f"{name} cannot be run in 4 bits ({reason}, as the others are no nn.Linear): pass another causal LM")


def refuse_reading_ahead(model: "PreTrainedModel | PeftModel", name: str, hardware: Hardware) -> None:
    """Stop unless the model runs in this precision, and its logits depend on no later token (as those of BERT do)."""
    import torch

    rows = torch.arange(12, device=model.device).repeat(2, 1) % text_config(model.config).vocab_size
    rows[1, 6:] = rows[1, 6:].flip(0)
    mask = torch.ones_like(rows)
    mask[:, 6:] = 0
    with torch.inference_mode(), hardware.autocast(), refused(name, hardware):
        logits = last_logits(model, rows, mask).float()
    if not (logits[0] - logits[1]).abs().mean() < 0.1 * logits[0].std():
        stop(f"{name} is no causal LM (its scores depend on later tokens): pass one like Mistral or Llama")


@contextmanager
def refused(name: str, hardware: Hardware) -> Iterator[None]:
    """Turn a model's failure to run at all into one sentence; a lack of memory passes through."""
    try:
        yield
    except Exception as problem:
        if memory.OUT_OF_MEMORY.search(str(problem)):
            raise
        remedy = "pass --precision fp32" if hardware.precision != "fp32" else "pass another model"
        stop(f"{name} cannot run here in {hardware.precision} ({hub.reason(problem)}): {remedy}")


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
    from transformers.pytorch_utils import Conv1D

    model = getattr(model, "get_base_model", lambda: model)()
    config = text_config(model.config)
    heads = getattr(config, "num_attention_heads", 0)  # Mamba has none
    size = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    groups = getattr(config, "num_hidden_groups", None)  # ALBERT runs one group of weights for many layers
    runs = 1 if groups is None else config.num_hidden_layers / (groups * config.inner_group_num)
    per_token = 0
    for name, module in model.base_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            per_token += 2 * module.in_features * module.out_features * (runs if "layer_groups" in name else 1)
        elif isinstance(module, Conv1D):  # GPT-2's linear layer
            per_token += 2 * module.weight.numel()
    return int(per_token), 4 * config.num_hidden_layers * heads * size


def planned_size(name: str) -> tuple[int, tuple[int, int]]:
    """The parameters and the `forward_flops` of a hub name or folder, from its config alone."""
    import torch
    import transformers

    config = load_config(name)
    with torch.device("meta"):
        model = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
        model = model.from_config(config) if model is transformers.AutoModel else model(config)
    return sum(tensor.numel() for tensor in model.parameters()), forward_flops(model)


@cache
def say(sentence: str) -> None:
    """Print a sentence once."""
    print(sentence, flush=True)


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn the errors that a user can make in loading `name` into one sentence."""
    is_folder, remedy = Path(name).is_dir(), "pass a folder written by save_pretrained or a hub name"
    if is_folder and not Path(name, "config.json").exists():
        stop(f"{name} is no model folder (it has no config.json): {remedy}")
    if not is_folder and (name.startswith((".", "/")) or name.count("/") > 1):
        stop(f"the model folder {name} does not exist: {remedy}")
    try:
        with nullcontext() if is_folder else hub.explained(name, "pass a local folder"):
            yield
    # Only libraries run here, and they raise of everything: tokenizers a bare Exception for a damaged file, torch an
    # AssertionError for a pad id beyond the embeddings, huggingface_hub its own for a config that contradicts itself.
    except Exception as problem:
        remedy = "check the name and its files, or pass a local folder instead"
        stop(f"{name} cannot be loaded ({hub.reason(problem)}): {remedy}")


@contextmanager
def quiet() -> Iterator[None]:
    """Hide progress bars and the report that a base checkpoint has no classification head: fine-tuning adds it."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
