"""The prompt, the label words, and a review's score from a causal LM's next-token probabilities."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common import metrics
from common.encoding import head_and_tail, special_ids, token_ids
from common.settings import stop

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

PROMPT = "[INST] Is the sentiment of this movie review positive or negative?\n\n{review} [/INST] Sentiment:"
LABEL_WORDS = ("negative", "positive")  # by label: 0, 1
MIN_UNLABELLED, MIN_OF_A_CLASS = 200, 10  # reviews for batch calibration, and of each class for a fitted one
TOLERATED_ACCURACY = 0.005  # of a teacher's accuracy, by the calibration that is chosen for it


def prompt_parts(tokenizer: "PreTrainedTokenizerFast", prompt: str) -> tuple[list[int], str]:
    """The ids before the review, and the text after it.

    Beginning-of-text comes once, and end-of-text never, whatever the tokenizer adds. A prompt may spell either.
    """
    if prompt.count("{review}") != 1:
        stop("--prompt needs {review} once, where the review goes")
    before, after = prompt.split("{review}")
    # The space before a review belongs to its first token. SentencePiece tokenizers add a space before any text.
    start = tokenizer(before.rstrip(" "), add_special_tokens=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    begin = [token_id for token_id in special_ids(tokenizer)[0] if token_id not in (bos, eos)]
    if bos is not None and start[:1] != [bos]:
        begin = [bos, *begin]
    (first, *_) = tokenizer.tokenize("x")
    if first.startswith(("▁", "Ġ")):
        after = after.removeprefix(" ")
    return [*begin, *start], after


def encode_prompts(
    tokenizer: "PreTrainedTokenizerFast", texts: list[str], prompt: str, max_length: int
) -> list[np.ndarray]:
    """The LLM's input for each review, the same in training (03), scoring (04b) and the benchmark (05).

    Each prompt is an int32 array of at most `max_length` ids. Review and prompt are encoded separately. So only the
    review is truncated (head and tail stay), and no review can change the prompt around it.
    """
    start, after = prompt_parts(tokenizer, prompt)
    end = tokenizer(after, add_special_tokens=False)["input_ids"]
    used = len(start) + len(end)
    budget = max_length - used
    if budget < 8:
        stop(f"{max_length} tokens are too few for a review and the prompt's {used} tokens: pass a larger length")
    reviews = (head_and_tail(ids, budget) for ids in token_ids(tokenizer, texts))
    return [np.array([*start, *review, *end], dtype=np.int32) for review in reviews]


def label_token_ids(tokenizer: "PreTrainedTokenizerFast", prompt: str, label_words: tuple[str, str]) -> list[int]:
    """The id of each label word after the prompt; stops unless each is one token and the two differ.

    A word by itself cannot be encoded: with SentencePiece `encode(" positive")[0]` is "▁" for both words.
    """
    after = prompt_parts(tokenizer, prompt)[1]
    bare = tokenizer(after, add_special_tokens=False)["input_ids"]
    ids = []
    for word in label_words:
        if not word.strip():
            stop("a label word is empty: pass two words to --label-words")
        continued = tokenizer(f"{after} {word}", add_special_tokens=False)["input_ids"]
        if continued[: len(bare)] != bare or len(continued) != len(bare) + 1:
            pieces = tokenizer.convert_ids_to_tokens(continued[len(bare) :])
            stop(f"the label word {word!r} is not one token after the prompt, but {pieces}: pass other --label-words")
        ids.append(continued[-1])
    if ids[0] == ids[1]:
        stop(f"the label words {' and '.join(label_words)} share their token: pass other --label-words")
    return ids


def label_log_probabilities(logits: "torch.Tensor", label_ids: list[int]) -> "torch.Tensor":
    """log p(label word | prompt), normalised over the vocabulary: (n, vocabulary) logits to (n, 2), in float32."""
    return logits.float().log_softmax(dim=-1)[:, label_ids]


def label_mass(log_probabilities: np.ndarray) -> float:
    """Mean of p(positive) + p(negative): the share of the LLM's probability that goes to the two label words."""
    return float(np.exp(log_probabilities.astype(np.float64)).sum(axis=1).mean())


class Calibration(NamedTuple):
    """Calibrated log-odds are (log_odds − bias) / temperature.

    `held_out` (n,) are those of validation, out of fold: on the reviews of its own fit a calibration looks too good.
    """

    bias: float
    temperature: float
    held_out: np.ndarray

    def logits(self, log_odds: np.ndarray) -> np.ndarray:
        """(n, 2) calibrated logits of (n,) raw log-odds."""
        return metrics.two_logits(log_odds, self.bias, self.temperature)


class CannotFit(Exception):
    """Why no bias and temperature can be fitted, in words."""


def calibrations(
    log_odds: np.ndarray, labels: np.ndarray, unlabelled: np.ndarray, asked: str = "auto"
) -> dict[str, Calibration]:
    """The calibrations "none", "batch" and "fitted" of a teacher, from its log-odds on validation and `unlabelled`.

    One is left out, with its reason printed, where there are too few reviews for it. Stops if `asked` names it.
    """
    made, reasons = {"none": Calibration(0.0, 1.0, log_odds)}, {}
    if len(unlabelled) >= (1 if asked == "batch" else MIN_UNLABELLED):
        bias = batch_calibration(unlabelled)
        made["batch"] = Calibration(bias, 1.0, log_odds - bias)
    else:
        reasons["batch"] = f"{len(unlabelled)} unlabelled reviews are too few for a mean"
    try:
        held_out = out_of_fold(log_odds, labels)  # it counts the reviews before it fits anything
        made["fitted"] = Calibration(*fitted_calibration(log_odds, labels), held_out)
    except CannotFit as reason:
        reasons["fitted"] = str(reason)
    if asked in reasons:
        stop(f"--calibration {asked} is impossible ({reasons[asked]}): leave the flag out")
    for name, reason in reasons.items():
        print(f"calibration {name} is left out: {reason}")
    return made


def best_calibration(
    made: dict[str, Calibration], log_odds: np.ndarray, labels: np.ndarray, unlabelled: np.ndarray
) -> str:
    """The name of the calibration with the best held-out NLL on validation.

    One that costs more than TOLERATED_ACCURACY of held-out accuracy comes last, and before it one with which 04b would
    stop (`refuse_collapse`, `refuse_one_class`).
    """
    held_out = {name: metrics.two_logits(one.held_out) for name, one in made.items()}
    accuracies = {name: metrics.accuracy(labels, logits.argmax(axis=1)) for name, logits in held_out.items()}

    def rank(name: str) -> tuple[bool, bool, float]:
        at_chance = metrics.standard_errors_above_chance(labels, made[name].logits(log_odds)) < 2
        refused = at_chance or metrics.absent_class(made[name].logits(unlabelled), labels) is not None
        worse = accuracies["none"] - accuracies[name] > TOLERATED_ACCURACY + 1e-9
        return worse, refused, metrics.nll(labels, held_out[name])

    return min(made, key=rank)


def batch_calibration(unlabelled_log_odds: np.ndarray) -> float:
    """The bias that batch calibration subtracts: the mean log-odds over reviews.

    Zhou et al. 2023 average probabilities instead: log(mean p(positive) / mean p(negative)). It needs no labels. It
    assumes that both classes are equally frequent among these reviews.
    """
    return float(np.mean(unlabelled_log_odds))


def fitted_calibration(log_odds: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Bias b and temperature T of p(positive) = sigmoid((log_odds − b) / T), fitted on labelled reviews.

    This is Platt scaling. Its smoothed targets (Platt 1999, equation 10) keep T above 0 on separable reviews. Raises
    CannotFit if positive reviews do not have the higher log-odds.
    """
    from sklearn.linear_model import LogisticRegression

    positives = int(labels.sum())
    target = np.where(labels == 1, (positives + 1) / (positives + 2), 1 / (len(labels) - positives + 2))
    twice, answers = np.concatenate([log_odds, log_odds])[:, None], np.repeat([1, 0], len(labels))
    model = LogisticRegression(C=1e6).fit(twice, answers, sample_weight=np.concatenate([target, 1 - target]))
    slope, intercept = float(model.coef_[0, 0]), float(model.intercept_[0])
    if slope <= 0:
        raise CannotFit("log-odds are not higher on positive reviews: the label words are swapped, or it cannot teach")
    return -intercept / slope, 1 / slope


def out_of_fold(log_odds: np.ndarray, labels: np.ndarray, folds: int = 5) -> np.ndarray:
    """(n,) log-odds, calibrated in each fold by a bias and a temperature that were fitted on the other folds.

    Raises CannotFit if a class has fewer than MIN_OF_A_CLASS reviews, or a fold's fit is impossible.
    """
    from sklearn.model_selection import StratifiedKFold

    counts = np.bincount(labels, minlength=2)
    if counts.min() < MIN_OF_A_CLASS:
        rarer = LABEL_WORDS[counts.argmin()]
        raise CannotFit(f"{counts.min()} {rarer} validation reviews have a score, and a fit takes {MIN_OF_A_CLASS}")
    calibrated = np.empty(len(log_odds))
    for others, fold in StratifiedKFold(folds, shuffle=True, random_state=0).split(log_odds, labels):
        bias, temperature = fitted_calibration(log_odds[others], labels[others])
        calibrated[fold] = (log_odds[fold] - bias) / temperature
    return calibrated
