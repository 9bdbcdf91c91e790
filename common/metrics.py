"""What a careful reader asks of a classifier: accuracy with its interval, F1, NLL, ECE, paired comparisons."""

import math

import numpy as np


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Share of equal entries of two (n,) arrays."""
    return float(np.mean(np.asarray(labels) == np.asarray(predictions)))


def wilson_interval(p: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval (Wilson 1927) of a proportion `p` seen in `n` trials; z = 1.96 gives 95%."""
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def f1_positive(labels: np.ndarray, predictions: np.ndarray) -> float:
    """F1 of the positive class; 0 where nothing is, or is called, positive."""
    hits = np.sum((labels == 1) & (predictions == 1))
    total = np.sum(labels == 1) + np.sum(predictions == 1)
    return float(2 * hits / total) if total else 0.0


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of (n, classes) logits, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def nll(labels: np.ndarray, logits: np.ndarray) -> float:
    """Mean negative log-likelihood of the gold labels, in nats."""
    return float(-log_softmax(logits)[np.arange(len(labels)), labels].mean())


def expected_calibration_error(labels: np.ndarray, logits: np.ndarray, bins: int = 15) -> float:
    """ECE over equal-width bins of the winning probability (Guo et al. 2017, equation 3)."""
    probabilities = np.exp(log_softmax(logits))
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(bin_of, weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def mcnemar_p(correct_a: np.ndarray, correct_b: np.ndarray) -> float:
    """Exact two-sided p of McNemar's test: are the discordant pairs split evenly (binomial)?"""
    from scipy.stats import binomtest

    only_a, only_b = int(np.sum(correct_a & ~correct_b)), int(np.sum(~correct_a & correct_b))
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def in_words(scores: dict[str, float | int]) -> str:
    """The accuracy of `describe` for a person, with its interval and n."""
    return f"{scores['accuracy']:.4f} [{scores['ci_low']:.4f}, {scores['ci_high']:.4f}], n {scores['n']:,}"


def describe(labels: np.ndarray, logits: np.ndarray) -> dict[str, float | int]:
    """Accuracy with its 95% interval, F1, NLL and ECE of (n, 2) logits against (n,) labels."""
    predictions = logits.argmax(axis=1)
    acc = accuracy(labels, predictions)
    low, high = wilson_interval(acc, len(labels))
    scores = {
        "accuracy": acc,
        "ci_low": low,
        "ci_high": high,
        "f1": f1_positive(labels, predictions),
        "nll": nll(labels, logits),
        "ece": expected_calibration_error(labels, logits),
    }
    return {"n": len(labels)} | {name: round(value, 6) for name, value in scores.items()}
