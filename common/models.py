"""Encoders and tokenizers: load them whatever their habits; count parameters, bytes and operations."""

import hashlib
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from common import hub, memory, patches
from common.data import LABELS
from common.device import Hardware
from common.settings import stop
from common.storage import sha256

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

    rows = getattr(load_config(name).get_text_config(), "vocab_size", 0)
    with explained(name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        file = cached_file(name, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
        raw = Tokenizer.from_file(file) if file else None
    if not tokenizer.is_fast:
        stop(f"{name} has no fast tokenizer (tokenizer.json): convert it with the tokenizers library")
    # Without tokenizer files transformers gives a BERT-like folder an empty vocabulary. Every word would be [UNK].
    if 2 * len(tokenizer) < rows:
        stop(f"{name} has no tokenizer files ({len(tokenizer)} tokens): copy tokenizer.json and the like into it")
    if raw is not None:
        raw.no_truncation()
        raw.no_padding()
        ids = raw.encode(PROBE, add_special_tokens=False).ids
        # From transformers 5 on, a tokenizer's class rebuilds its rules. It may lower-case a cased vocabulary.
        if tokenizer(PROBE, add_special_tokens=False)["input_ids"] != ids:
            say(f"{name}: {type(tokenizer).__name__} reads text otherwise than its tokenizer.json, which is used")
            tokenizer = PreTrainedTokenizerFast.from_pretrained(name)
        if tokenizer(PROBE, add_special_tokens=False)["input_ids"] != ids:
            stop(f"{name}: tokenizer_config.json contradicts tokenizer.json: make one of them right")
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
    for part in (config, config.get_text_config()):
        for habit, value in HABITS.items():
            if hasattr(part, habit):
                setattr(part, habit, value)
        # A pad id may be null, -1, or one too high. RoBERTa counts positions from it, so it has its class's again.
        rows, pad = getattr(part, "vocab_size", 0), getattr(part, "pad_token_id", None)
        if rows and (pad is None or not 0 <= pad < rows):
            pad = getattr(type(part)(), "pad_token_id", None)
            part.pad_token_id = pad if pad is not None and 0 <= pad < rows else None
    return config


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
    model = pretrained(name, AutoModelForSequenceClassification, config, dtype=torch.float32)
    if first.startswith("pos") and classes == 2:
        say(f"{name} calls class 0 {first}: its head is turned, and 0 is negative")
        for key, tensor in model.named_parameters():
            if not key.startswith(model.base_model_prefix) and tensor.shape[0] == 2:
                tensor.data = tensor.data.flip(0)
    if tokenizer is not None:
        _fit_to_tokenizer(model, tokenizer, name)
    patches.save_weights_by_todays_names(model)
    return model


def pretrained(name: str, kind: type, config: "PretrainedConfig", **how: object) -> "PreTrainedModel":
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
    rows, needed = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values()) + 1
    if needed > rows:
        say(f"{name} has embeddings for {rows:,} ids and its tokenizer {needed:,}: the new ones start at random")
        model.resize_token_embeddings(needed, mean_resizing=False)
    # RoBERTa counts positions from its pad id. A decoder that classifies looks for the last token before the padding.
    if not any(first for first, _ in position_embeddings(model)):
        for part in (model.config, model.config.get_text_config()):
            part.pad_token_id = tokenizer.pad_token_id


def position_embeddings(model: "PreTrainedModel") -> list[tuple[int, int]]:
    """The first usable row of each table of learned absolute positions, and its number of rows."""
    import torch

    named = re.compile(r"(^|\.)(embed_positions|positions?_embed(ding)?s?|wpe)$")
    found = [module for name, module in model.named_modules() if named.search(name)]
    tables = [(module, module.padding_idx) for module in found if isinstance(module, torch.nn.Embedding)]
    # RoBERTa's positions begin after the padding id, and those of OPT after two unused rows.
    return [(getattr(table, "offset", 0) if pad is None else pad + 1, table.num_embeddings) for table, pad in tables]


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


def pool(hidden: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
    """Pool (n, tokens, width) hidden states to (n, 2, width): the first token's, and the mean without padding.

    Two tokenizers' positions do not correspond, so no single position is matched between teacher and student.
    """
    import torch

    weights = mask.unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
    return torch.stack([hidden[:, 0], mean], dim=1)


def weights_digest(folder: Path) -> str:
    """SHA-256 over a folder's safetensors files, to identify the weights."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(bytes.fromhex(sha256(file)))
    return digest.hexdigest()[:16]


def sampled_digest(name: str) -> str | None:
    """A digest that tells a folder's model from another in its place; None for a hub name.

    It covers each file's name, size, and up to three MiB: the first, the middle and the last. All of a 7B model would
    take a minute to read.
    """
    if not Path(name).is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(path for path in Path(name).iterdir() if path.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as handle:
            for start in (0, size // 2, max(0, size - 2**20)):
                handle.seek(start)
                digest.update(handle.read(2**20))
    return digest.hexdigest()[:16]


def numel(tensor: "torch.Tensor") -> int:
    """The parameters in a tensor; a 4-bit tensor holds two in a byte."""
    state = getattr(tensor, "quant_state", None)
    return tensor.numel() if state is None else state.shape.numel()


def count(model: "PreTrainedModel | PeftModel") -> tuple[int, int]:
    """The number of parameters and the bytes of the weights in memory; a tied tensor counts once.

    The constants of 4-bit quantisation count as bytes, not as parameters.
    """
    tensors, constants = list(model.parameters()), []
    for state in (tensor.quant_state for tensor in tensors if getattr(tensor, "quant_state", None) is not None):
        constants += [state.absmax, state.code]
        if state.nested:
            constants += [state.state2.absmax, state.state2.code, state.offset]
    return sum(map(numel, tensors)), sum(tensor.nbytes for tensor in tensors + constants)


def forward_flops(model: "PreTrainedModel | PeftModel") -> tuple[int, int]:
    """Floating-point operations of a forward pass for a token, and for a pair of tokens: a·t + b·t² for t tokens.

    Two a multiply-add of the blocks' linear layers, and of QKᵀ and AV over all pairs (PaLM, Chowdhery et al. 2022,
    appendix B). The head runs on one position and is left out.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    model = getattr(model, "get_base_model", lambda: model)()
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)  # Mamba has none
    size = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    groups = getattr(config, "num_hidden_groups", None)  # ALBERT runs one group of weights for many layers
    runs = 1 if groups is None else config.num_hidden_layers / (groups * config.inner_group_num)
    per_token = 0
    for name, module in model.base_model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):  # the latter is GPT-2's linear layer
            per_token += 2 * numel(module.weight) * (runs if "layer_groups" in name else 1)
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


@contextmanager
def refused(name: str, hardware: Hardware) -> Iterator[None]:
    """Turn a model's failure to run at all into one sentence; a lack of memory and our own faults pass through."""
    try:
        yield
    except Exception as problem:
        *_, (frame, _) = traceback.walk_tb(problem.__traceback__)
        if memory.is_lacking(problem) or frame.f_globals["__name__"].startswith("common."):
            raise
        remedy = "pass --precision fp32" if hardware.precision != "fp32" else "pass another model"
        stop(f"{name} cannot run here in {hardware.precision} ({hub.reason(problem)}): {remedy}")


def refuse_infinite(logits: "torch.Tensor", name: str, hardware: Hardware) -> None:
    """Stop when any of a model's logits is infinite or no number."""
    if not logits.isfinite().all():
        stop(f"{name} gives infinite logits in {hardware.precision}: pass --precision fp32, or another model")


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
    # Only libraries run here, and they raise anything. tokenizers raises a bare Exception for a damaged file, and torch
    # an AssertionError for a pad id beyond the embeddings. huggingface_hub has its own for a contradictory config.
    except Exception as problem:
        small = memory.is_lacking(problem)
        remedy = "pass a smaller model" if small else "check the name and its files, or pass a local folder instead"
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
