"""Checks of a model, by name, before any work.

- Both kinds: the config is no encoder-decoder's. The tokenizer obeys its tokenizer.json and knows the reviews' letters.
  The length fits the positions.
- An encoder: its weights are loaded and run, with padding and at full length, and each has a gradient.
- An LLM, whose weights are larger: the ids fit the embeddings. At least half of the blocks' weights can be in 4 bits.
  The shapes in the headers of its files are the config's. `load_llm` tries the rest.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from common import device, encoding, llms, models, verbalizer
from common.device import Hardware
from common.settings import stop

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

MIN_LENGTH = 8
SAMPLE = 200  # reviews in which unknown tokens are counted: their share is then known to a few points
# The share of the reviews' characters that become unknown tokens. English and a fitting vocabulary: below 0.01. Above a
# half, most of what a model could learn from is gone.
MOST_UNKNOWN, SOME_UNKNOWN = 0.5, 0.1


def check_encoder(name: str, max_length: int, texts: Iterable[str], hardware: Hardware) -> "PreTrainedTokenizerFast":
    """The tokenizer of an encoder that can be trained on these reviews; stops with a sentence otherwise.

    The weights are loaded and tried on the CPU, on a text of `max_length` tokens too. At 512 tokens on one core that
    takes MPNet-base 3 seconds, a tenth of it to load, and 0.7 GB; RoBERTa-large should take three times as much.
    """
    config, tokenizer = _config_and_tokenizer(name, max_length, texts, "--max-length")
    if getattr(config, "quantization_config", None) is not None:
        stop(f"{name} was saved quantised, so it cannot be fine-tuned: pass the checkpoint that it was made from")
    if not device.begun_by_parent():  # which has tried it
        device.first_alone(lambda: _try_encoder(name, tokenizer, max_length, hardware))
    return tokenizer


def check_llm(
    name: str, max_length: int, texts: Iterable[str], flag: str = "--max-length"
) -> "PreTrainedTokenizerFast":
    """The tokenizer of a causal LM that can run in 4 bits; stops with a sentence otherwise. No weight is loaded."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config, tokenizer = _config_and_tokenizer(name, max_length, texts, flag)
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        stop(f"{name} is a masked language model ({config.model_type}): pass a causal LM like Mistral or Llama")
    rows = config.get_text_config().vocab_size
    # A special token is plain text in a review, so its id never comes up.
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    beyond = [word for word, token_id in tokenizer.get_vocab().items() if token_id >= rows and token_id not in special]
    if beyond:
        stop(f"{name} has embeddings for {rows:,} ids, but {beyond[0]!r} is beyond: pass the tokenizer of this model")
    own, model = getattr(config, "quantization_config", None), _on_meta(name, config, AutoModelForCausalLM)
    if own is None:
        llms.refuse_few_in_4_bits(model, name)
        _refuse_other_weights(name, model)
    elif not dict(own).get("load_in_4bit", dict(own).get("_load_in_4bit")):
        stop(f"{name} was saved quantised ({dict(own).get('quant_method')}), not in bitsandbytes' 4 bits: pass another")
    return tokenizer


def check_prompt(
    tokenizer: "PreTrainedTokenizerFast", prompt: str, label_words: tuple[str, str], max_length: int
) -> None:
    """Stop if a label word is no single token, or the prompt leaves no room for a review."""
    label_ids = verbalizer.label_token_ids(tokenizer, prompt, label_words)
    verbalizer.encode_prompts(tokenizer, [""], prompt, max_length)
    print(f"label words {list(label_words)} are the tokens {tokenizer.convert_ids_to_tokens(label_ids)}")


def _config_and_tokenizer(
    name: str, max_length: int, texts: Iterable[str], flag: str
) -> tuple["PretrainedConfig", "PreTrainedTokenizerFast"]:
    """What both kinds of model must have; `flag` names the length in a refusal."""
    config = models.load_config(name)
    if config.is_encoder_decoder:
        stop(f"{name} is an encoder-decoder ({config.model_type}), which this project does not read: pass another")
    tokenizer = models.load_tokenizer(name)
    check_length(max_length, name, flag)
    refuse_unknown(tokenizer, texts, name)
    return config, tokenizer


def check_length(max_length: int, name: str, flag: str = "--max-length") -> None:
    """Stop when the length in `flag` is more than the model's positions or too short for a review."""
    from transformers import AutoModel

    config = models.load_config(name).get_text_config()
    tables = models.position_embeddings(_on_meta(name, config, AutoModel))
    stated = getattr(config, "max_position_embeddings", None) or 0  # XLNet says -1
    longest = min([rows - first for first, rows in tables] + ([stated] if stated > 0 else []), default=math.inf)
    if max_length > longest:
        stop(f"{flag} {max_length} is more than the {longest} positions of {name}")
    if max_length < MIN_LENGTH:
        stop(f"{flag} {max_length} is too short for a review: pass at least {MIN_LENGTH}")


def refuse_unknown(tokenizer: "PreTrainedTokenizerFast", texts: Iterable[str], name: str) -> None:
    """Stop when more than half of the reviews' characters are unknown to the tokenizer; warn from a tenth on."""
    sample = [text for text, _ in zip(texts, range(SAMPLE)) if text]
    if tokenizer.unk_token_id is None or not sample:
        return
    encoded = tokenizer(sample, return_offsets_mapping=True, **encoding.PLAIN_TEXT)
    lost = [
        text[begin:end]
        for text, ids, spans in zip(sample, encoded["input_ids"], encoded["offset_mapping"])
        for token_id, (begin, end) in zip(ids, spans)
        if token_id == tokenizer.unk_token_id
    ]
    unknown, total = (sum(len("".join(text.split())) for text in part) for part in (lost, sample))
    share = unknown / max(total, 1)
    sentence = f"the tokenizer of {name} does not know {share:.0%} of the reviews' characters: pass a model"
    sentence += " of the reviews' language and script"
    if share > MOST_UNKNOWN:
        stop(sentence)
    if share > SOME_UNKNOWN:
        models.say(f"warning: {sentence}")


def _on_meta(name: str, config: "PretrainedConfig", kind: type) -> "PreTrainedModel":
    """The model without weights; stops if there is none of this kind."""
    import torch

    with models.explained(name), models.quiet(), torch.device("meta"):
        return kind.from_config(config)


def _refuse_other_weights(name: str, model: "PreTrainedModel") -> None:
    """Stop when a safetensors file is cut short, or holds a tensor of another shape than the model's.

    Without safetensors there is nothing to see: transformers reads pytorch_model.bin by torch.load(weights_only=True).
    """
    from safetensors import safe_open
    from transformers.utils import cached_file

    own = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    own |= {key.removeprefix(f"{model.base_model_prefix}."): shape for key, shape in own.items()}  # GPT-2's, saved bare
    parts, shapes, absent = ["model.safetensors"], {}, {"_raise_exceptions_for_missing_entries": False}
    with models.explained(name):
        if index := cached_file(name, "model.safetensors.index.json", **absent):
            parts = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
        elif cached_file(name, *parts, **absent) is None:
            return
        for part in parts:
            with safe_open(cached_file(name, part), framework="numpy") as tensors:
                shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    for key, shape in shapes.items():
        if own.get(key, shape) != shape:
            stop(f"{name} stores {key} as {shape}, which contradicts its config.json: pass a whole checkpoint")


def _try_encoder(name: str, tokenizer: "PreTrainedTokenizerFast", max_length: int, hardware: Hardware) -> None:
    """Stop unless the model can be trained here, and gives a text the same logits with padding as without."""
    import torch

    model = models.load_classifier(name, tokenizer).eval()
    kind, sizes = model.config.model_type, model.config.get_text_config()
    full = device.cpu("fp32")
    precision = hardware if hardware.device == "cpu" else full
    short, longer, longest = encoding.encode(tokenizer, ["dull", models.PROBE, "dull " * max_length], max_length)

    def run(ids: "list", precision: Hardware = full, **more: bool) -> "torch.Tensor":
        input_ids, mask = encoding.pad(ids, tokenizer.pad_token_id)
        with models.refused(name, precision), precision.autocast():
            return model(input_ids=input_ids, attention_mask=mask, **more)

    with torch.inference_mode():
        alone, padded = run([short], output_hidden_states=True), run([short, longer]).logits[:1]
        run([longest])
    models.refuse_infinite(alone.logits, name, full)
    if not torch.allclose(alone.logits, padded, rtol=1e-3, atol=1e-4):
        stop(f"{name} ({kind}) gives a review other logits when padding follows it: pass an encoder like RoBERTa")
    states = [tuple(state.shape) for state in alone.hidden_states or ()]
    if set(states[-sizes.num_hidden_layers :]) != {(1, len(short), sizes.hidden_size)}:
        stop(f"{name} ({kind}) has no hidden state for each token and layer: pass an encoder like RoBERTa")
    loss = run([short, longer], precision).logits.float().logsumexp(dim=-1).sum()
    with models.refused(name, precision):
        loss.backward()
    models.refuse_infinite(loss, name, precision)
    idle = [key for key, tensor in model.named_parameters() if tensor.grad is None]
    if idle and hardware.processes > 1:
        stop(f"{len(idle)} weights of {name} ({kind}) get no gradient ({idle[0]}): pass --num-processes 1")
