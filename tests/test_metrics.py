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


def by_hand_f1(labels, predictions):
    precision, recall = labels[predictions == 1].mean(), predictions[labels == 1].mean()
    return 2 * precision * recall / (precision + recall)


def test_accuracy_f1_and_nll_equal_their_definitions():
    predictions = LOGITS.argmax(axis=1)
    assert metrics.accuracy(LABELS, predictions) == sklearn_metrics.accuracy_score(LABELS, predictions)
    assert metrics.describe(LABELS, LOGITS)["f1"] == pytest.approx(by_hand_f1(LABELS, predictions), abs=1e-6)
    probabilities = np.exp(log_softmax(LOGITS, axis=1))
    assert metrics.nll(LABELS, LOGITS) == pytest.approx(sklearn_metrics.log_loss(LABELS, probabilities))


def test_f1_is_zero_where_nothing_is_positive():
    nothing = np.zeros(3, dtype=int)
    assert metrics.describe(nothing, np.array([[1.0, 0.0]] * 3))["f1"] == 0.0


def test_nll_stays_finite_at_huge_logits():
    assert metrics.nll(np.array([0]), np.array([[-1000.0, 1000.0]])) == pytest.approx(2000.0)


def test_ece_by_hand():
    # Two reviews at 0.9 of which one is right (gap 0.4), two at 0.6 both right (gap 0.4); equal-width bins part them.
    logits = np.log(np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]]))
    assert metrics.expected_calibration_error(np.array([0, 1, 1, 1]), logits) == pytest.approx(0.4)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_mcnemar_equals_statsmodels(shift):
    a, b = RNG.random(300) < 0.8 + shift * 0.3, RNG.random(300) < 0.8
    table = [[np.sum(a & b), np.sum(a & ~b)], [np.sum(~a & b), np.sum(~a & ~b)]]
    assert metrics.mcnemar_p(a, b) == pytest.approx(mcnemar(table, exact=True).pvalue)


def test_mcnemar_of_equal_models_is_one():
    assert metrics.mcnemar_p(np.array([True, False]), np.array([True, False])) == 1.0
