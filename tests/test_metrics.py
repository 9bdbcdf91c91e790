import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn import metrics as sklearn_metrics
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from common import metrics

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 2, 400)
LOGITS = RNG.normal(size=(400, 2)) + 1.5 * np.eye(2)[LABELS]


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (7, 10), (10, 10), (23_500, 25_000)])
def test_wilson_interval_equals_statsmodels(hits, n):
    assert metrics.wilson_interval(hits, n) == pytest.approx(proportion_confint(hits, n, method="wilson"), abs=1e-12)


@pytest.mark.parametrize(
    ("labels", "logits"),
    [(LABELS, LOGITS), (np.zeros(3, int), np.array([[1.0, 0.0]] * 3)), (np.array([0, 1]), 10.0 * np.eye(2)[[1, 0]])],
    ids=["random", "nothing is positive", "sure and wrong"],
)
def test_accuracy_f1_and_nll_equal_their_definitions(labels, logits):
    predictions, scores = logits.argmax(axis=1), metrics.describe(labels, logits)
    assert metrics.accuracy(labels, predictions) == sklearn_metrics.accuracy_score(labels, predictions)
    assert scores["f1"] == pytest.approx(sklearn_metrics.f1_score(labels, predictions, zero_division=0), abs=1e-6)
    probabilities = np.exp(log_softmax(logits, axis=1))
    assert metrics.nll(labels, logits) == pytest.approx(
        sklearn_metrics.log_loss(labels, probabilities, labels=[0, 1]), rel=1e-6
    )


def skewed(positive: int, negatives_found: int, positives_found: int) -> tuple[np.ndarray, np.ndarray]:
    """100 labels with so many positive ones, and (100, 2) logits that find so many of each class."""
    labels = np.repeat([1, 0], [positive, 100 - positive])
    right = np.concatenate([np.arange(positive) < positives_found, np.arange(100 - positive) < negatives_found])
    return labels, np.eye(2)[np.where(right, labels, 1 - labels)]


def test_the_majoritys_share_and_macro_f1_stand_beside_an_accuracy_that_skewed_classes_flatter():
    labels, logits = skewed(positive=90, negatives_found=0, positives_found=90)
    scores = metrics.describe(labels, logits)
    assert (scores["accuracy"], scores["majority_share"], scores["balanced_accuracy"]) == (0.9, 0.9, 0.5)
    assert scores["f1_macro"] == pytest.approx((0 + 2 * 0.9 / 1.9) / 2, abs=1e-6)  # nothing of class negative is found
    assert "majority 0.9000, balanced accuracy 0.5000; it always says" in metrics.in_words(scores)
    assert "always" not in metrics.in_words(metrics.describe(*skewed(90, 1, 89)))
    assert "majority" not in metrics.in_words(metrics.describe(LABELS, LOGITS))


def test_a_model_is_above_chance_by_what_it_knows_of_both_classes_not_by_following_the_majority():
    assert (
        metrics.standard_errors_above_chance(*skewed(90, 0, 90)) == 0 and metrics.only_class(skewed(90, 0, 90)[1]) == 1
    )
    labels, good = skewed(90, 7, 86)
    found = good.argmax(axis=1).mean()
    by_hand = (7 / 10 + 86 / 90 - 1) / 2 / np.sqrt(found * (1 - found) * (1 / 10 + 1 / 90) / 4)
    assert metrics.standard_errors_above_chance(labels, good) == pytest.approx(by_hand) and by_hand > 2
    assert metrics.standard_errors_above_chance(*skewed(90, 1, 81)) == pytest.approx(0)  # accuracy 0.82 by chance
    assert metrics.only_class(good) is None


@pytest.mark.parametrize(
    ("positive_share", "n", "negative_verdicts", "absent"),
    [(0.5, 100, 1, 0), (0.5, 100, 3, None), (0.5, 5, 0, None), (0.95, 2000, 0, 0), (0.95, 2000, 5, None)]
    + [(0.95, 100, 0, None), (0.95, 100, 99, 1)],
)  # fmt: skip
def test_a_class_is_absent_where_labels_let_expect_more_of_it(positive_share, n, negative_verdicts, absent):
    labels = (np.arange(100) < 100 * positive_share).astype(int)
    logits = np.eye(2)[(np.arange(n) >= negative_verdicts).astype(int)]
    assert metrics.absent_class(logits, labels) == absent


def test_nll_stays_finite_at_huge_logits():
    assert metrics.nll(np.array([0]), np.array([[-1000.0, 1000.0]])) == pytest.approx(2000.0)


def test_ece_by_hand():
    # Two reviews at 0.9 of which one is right (gap 0.4), two at 0.6 both right (gap 0.4); equal-width bins part them.
    logits = np.log(np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]]))
    assert metrics.expected_calibration_error(np.array([0, 1, 1, 1]), logits) == pytest.approx(0.4)


@pytest.mark.parametrize("shift", [0.0, 0.5, None])
def test_mcnemar_equals_statsmodels(shift):
    a, b = RNG.random(300) < 0.8 + (shift or 0) * 0.3, RNG.random(300) < 0.8
    b = a if shift is None else b  # a model against itself
    table = [[np.sum(a & b), np.sum(a & ~b)], [np.sum(~a & b), np.sum(~a & ~b)]]
    assert metrics.mcnemar_p(a, b) == pytest.approx(mcnemar(table, exact=True).pvalue)
