"""A classifier's figures: accuracy with its interval, F1, NLL, ECE; and what two classifiers differ by."""

import numpy as np

SKEWED = 0.6  # the share of one class above which an accuracy by itself misleads


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Share of equal entries of two (n,) arrays."""
    return float(np.mean(np.asarray(labels) == np.asarray(predictions)))


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95% score interval (Wilson 1927) of `hits` in `n` trials."""
    from scipy.stats import binomtest

    interval = binomtest(hits, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def log_odds(logits: np.ndarray) -> np.ndarray:
    """log p(positive) − log p(negative), (n,) float64, of (n, 2) logits or log-probabilities."""
    return logits[:, 1].astype(np.float64) - logits[:, 0]


def two_logits(log_odds: np.ndarray, bias: float = 0.0, temperature: float = 1.0) -> np.ndarray:
    """(n, 2) float32 logits whose log-odds are (log_odds − bias) / temperature."""
    half = (log_odds - bias) / temperature / 2
    return np.stack([-half, half], axis=1).astype(np.float32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of (n, classes) logits, in float64."""
    from scipy.special import log_softmax

    return log_softmax(logits.astype(np.float64), axis=1)


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


def fit_temperature(labels: np.ndarray, logits: np.ndarray, most: float = 20) -> float:
    """The T > 0 with the least NLL of logits / T (temperature scaling, Guo et al. 2017, section 4.2).

    It is kept within 1/most and most: reviews that are all called right would ask for T = 0.
    """
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(lambda log_t: nll(labels, logits / np.exp(log_t)), bounds=(-np.log(most), np.log(most)))
    return float(np.exp(found.x))


def mcnemar_p(correct_a: np.ndarray, correct_b: np.ndarray) -> float:
    """Exact two-sided p of McNemar's test, a binomial test that the discordant pairs split evenly."""
    from scipy.stats import binomtest

    only_a, only_b = int(np.sum(correct_a & ~correct_b)), int(np.sum(~correct_a & correct_b))
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired_difference(correct_a: np.ndarray, correct_b: np.ndarray) -> tuple[float, float, float]:
    """Accuracy of a minus accuracy of b on the same reviews, and its 95% interval (Student's t of the differences)."""
    from scipy.stats import ttest_1samp

    differences = correct_a.astype(float) - correct_b.astype(float)
    if np.ptp(differences) == 0:  # two models with the same mistakes, or none: the t-interval would be NaN
        return 3 * (float(differences[0]),)
    interval = ttest_1samp(differences, 0).confidence_interval()
    return float(differences.mean()), float(interval.low), float(interval.high)


def verdict(low: float, high: float) -> str:
    """Whether a difference with this interval is above 0: yes, no, or not shown."""
    return "yes" if low > 0 else "no" if high < 0 else "not shown"


def in_words(scores: dict[str, float | int]) -> str:
    """The accuracy that `describe` returns, as text with its interval and n; on skewed classes with what it hides."""
    text = f"{scores['accuracy']:.4f} [{scores['ci_low']:.4f}, {scores['ci_high']:.4f}], n {scores['n']:,}"
    if scores["majority_share"] <= SKEWED:
        return text
    share, balanced = scores["majority_share"], scores["balanced_accuracy"]
    always = "; it always says the more frequent class" if (scores["accuracy"], balanced) == (share, 0.5) else ""
    return f"{text} (majority {share:.4f}, balanced accuracy {balanced:.4f}{always})"


def only_class(logits: np.ndarray) -> int | None:
    """The class that (n, 2) logits always predict; None if they predict both."""
    predicted = np.unique(logits.argmax(axis=1))
    return int(predicted[0]) if len(predicted) == 1 else None


def standard_errors_above_chance(labels: np.ndarray, logits: np.ndarray) -> float:
    """By how many standard errors the balanced accuracy of (n, 2) logits is above one half; 0 if they say one class.

    It is Matthews' correlation times sqrt(n). Unlike accuracy, it is no better for a model that follows the majority.
    """
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, logits.argmax(axis=1)) * np.sqrt(len(labels)))


def absent_class(logits: np.ndarray, labels: np.ndarray) -> int | None:
    """The class that (n, 2) logits of unlabelled reviews hardly ever predict; None if there is none.

    It gets less than 4% of the verdicts that its share of the gold `labels` predicts. Of 1,000 reviews that is under 20
    where half are of this class, and under 2 where 5% are. Below 20 expected verdicts nothing is absent.
    """
    expected = len(logits) * np.bincount(labels, minlength=2) / len(labels)
    found = np.bincount(logits.argmax(axis=1), minlength=2)
    absent = np.flatnonzero((expected >= 20) & (found < 0.04 * expected))
    return int(absent[0]) if len(absent) else None


def describe(labels: np.ndarray, logits: np.ndarray) -> dict[str, float | int]:
    """The figures of (n, 2) logits against (n,) labels: accuracy with its 95% interval, NLL, ECE, and what skew hides.

    `f1` is that of class positive, `f1_macro` the mean of both classes', `majority_share` that of the frequent class.
    """
    from sklearn.metrics import f1_score

    predictions = logits.argmax(axis=1)
    recalls = [np.mean(predictions[labels == label] == label) for label in np.unique(labels)]
    low, high = wilson_interval(int(np.sum(predictions == labels)), len(labels))
    scores = {
        "accuracy": accuracy(labels, predictions),
        "ci_low": low,
        "ci_high": high,
        "majority_share": np.bincount(labels).max() / len(labels),
        "balanced_accuracy": np.mean(recalls),
        "f1": f1_score(labels, predictions, zero_division=0.0),
        "f1_macro": f1_score(labels, predictions, average="macro", labels=[0, 1], zero_division=0.0),
        "nll": nll(labels, logits),
        "ece": expected_calibration_error(labels, logits),
    }
    return {"n": len(labels)} | {name: round(float(value), 6) for name, value in scores.items()}
