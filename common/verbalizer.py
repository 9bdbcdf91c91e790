"""The prompt, the label words, and what a causal LM's next-token probabilities say about a review."""

from typing import TYPE_CHECKING

import numpy as np

from common.models import head_and_tail, token_ids
from common.settings import stop

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

PROMPT = "[INST] Is the sentiment of this movie review positive or negative?\n\n{review} [/INST] Sentiment:"
LABEL_WORDS = ("negative", "positive")  # by label: 0, 1


def prompt_parts(prompt: str) -> tuple[str, str]:
    """The text before and after the review."""
    if prompt.count("{review}") != 1:
        stop("--prompt needs {review} once, where the review goes")
    before, after = prompt.split("{review}")
    return before, after


def encode_prompts(
    tokenizer: "PreTrainedTokenizerFast", texts: list[str], prompt: str, max_length: int
) -> list[np.ndarray]:
    """The one way from a review to the LLM's input, in training (03), scoring (04b) and the benchmark (05).

    Each prompt is an int32 array of at most `max_length` ids. Only the review is ever truncated, head and tail kept.
    """
    before, after = prompt_parts(prompt)
    start = tokenizer(before.rstrip(" "))["input_ids"]  # the space before a review belongs to its first token
    if start and start[-1] == tokenizer.eos_token_id:
        start = start[:-1]
    # As the model reads it: right after a review, so without a beginning-of-text token.
    end = tokenizer(after, add_special_tokens=False)["input_ids"]
    budget = max_length - len(start) - len(end)
    if budget < 8:
        stop(f"--max-length {max_length} leaves {max(budget, 0)} tokens for the review beside the prompt's {len(start) + len(end)}")
    encoded = []
    for begin in range(0, len(texts), 1000):
        for ids in token_ids(tokenizer, texts[begin : begin + 1000]):
            encoded.append(np.array([*start, *head_and_tail(ids, budget), *end], dtype=np.int32))
    return encoded


def label_token_ids(tokenizer: "PreTrainedTokenizerFast", prompt: str, label_words: tuple[str, str]) -> list[int]:
    """The id of each label word as it follows the prompt; stops unless each is one token and they differ.

    The word alone would mislead: with SentencePiece `encode(" positive")[0]` is the lone "▁" for both words.
    """
    after = prompt_parts(prompt)[1]
    bare = tokenizer(after, add_special_tokens=False)["input_ids"]
    ids = []
    for word in label_words:
        continued = tokenizer(f"{after} {word}", add_special_tokens=False)["input_ids"]
        if continued[: len(bare)] != bare or len(continued) != len(bare) + 1:
            pieces = tokenizer.convert_ids_to_tokens(continued[len(bare) :])
            stop(f"the label word {word!r} is not one token after the prompt but {pieces}: choose another with --label-words")
        ids.append(continued[-1])
    if ids[0] == ids[1]:
        stop(f"the label words {' and '.join(label_words)} share their token: choose others with --label-words")
    return ids


def label_log_probabilities(logits: "torch.Tensor", label_ids: list[int]) -> "torch.Tensor":
    """log p(label word | prompt) over the whole vocabulary: (n, vocabulary) logits to (n, 2), in float32."""
    return logits.float().log_softmax(dim=-1)[:, label_ids]


def log_odds(log_probabilities: np.ndarray) -> np.ndarray:
    """log p(positive) − log p(negative) of (n, 2) label log-probabilities."""
    return log_probabilities[:, 1].astype(np.float64) - log_probabilities[:, 0]


def label_mass(log_probabilities: np.ndarray) -> float:
    """Mean of p(positive) + p(negative): how much the LLM says of either label word, rather than anything else."""
    return float(np.exp(log_probabilities.astype(np.float64)).sum(axis=1).mean())


def batch_calibration(unlabelled_log_odds: np.ndarray) -> float:
    """The bias that batch calibration subtracts (Zhou et al. 2023; for two words, the mean log-odds over reviews).

    It needs no labels, and assumes that the two classes are equally frequent among these reviews.
    """
    return float(np.mean(unlabelled_log_odds))


def teacher_logits(log_probabilities: np.ndarray, bias: float) -> np.ndarray:
    """(n, 2) logits whose softmax is the verbalizer's two-word distribution after subtracting `bias` from the log-odds."""
    half = (log_odds(log_probabilities) - bias) / 2
    return np.stack([-half, half], axis=1).astype(np.float32)
