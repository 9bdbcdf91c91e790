#!/usr/bin/env python
"""01: two baselines that count words, multinomial naive Bayes on TF-IDF and the stronger NB-SVM.

Both are tuned by cross-validation on train and validation, fitted on the two together, and tested once.
A student that does not beat them is not worth a GPU. Where words are not separated by spaces, characters are counted.

Reads   the reviews
Writes  outputs/01_baseline/  naive_bayes/  nb_svm/  metrics.json  run.json
Takes   about 3 minutes and 2 GB on two CPU cores; no GPU

    python 01_baseline.py
    python 01_baseline.py --dataset path/to/folder
"""

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from common import artifacts, data, metrics, settings

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from common.baseline import Baseline

STEP = "01_baseline"
# Lengths of n-grams: of words, or of characters where words are not separated by spaces.
NGRAM_RANGES = {"word": ((1, 1), (1, 2), (1, 3)), "char": ((1, 2), (1, 3), (1, 4))}
MIN_DFS = (2, 5)
FOLDS = 3
ALPHAS = (0.1, 0.03, 0.01)
NB_SVM_CS = (3.0, 10.0, 30.0)
NB_SVM_BETAS = (0.5, 0.75, 1.0)  # Wang & Manning 2012 interpolate with 0.25
# Both models read whether a review contains an n-gram. For naive Bayes that is times idf, and a review adds up to 1.
TFIDF = {"use_idf": True, "norm": "l1"}
SCALED = {"use_idf": False, "norm": "l2"}
CHUNK = re.compile(r"\w(?:\S*\w)?")  # what stands between spaces, without outer punctuation


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = settings.make_parser(__doc__, reads=("train", "test"), precision=False)
    return settings.parse(parser, STEP, argv)


def choose_analyzer(train_texts: list[str], validation_texts: list[str]) -> str:
    """ "word" if words of train hold at least half of validation's characters, spaces left out; else "char".

    Chinese, Japanese and Thai have whole clauses between spaces, which do not come back. Emoji are no words.
    """
    known = {word for text in train_texts for word in CHUNK.findall(text.lower())}
    covered = sum(len(word) for text in validation_texts for word in CHUNK.findall(text.lower()) if word in known)
    coverage = covered / sum(len(text) - text.count(" ") for text in validation_texts)
    analyzer = "word" if coverage >= 0.5 else "char"
    print(f"counting {analyzer} n-grams: words of train cover {coverage:.0%} of validation", flush=True)
    return analyzer


@dataclass(frozen=True)
class Counts:
    """Which n-grams the labelled reviews contain: (n, terms) ones and zeros."""

    matrix: "csr_matrix"
    terms: np.ndarray
    analyzer: str

    def candidates(self) -> Iterator[dict]:
        """The n-gram lengths and min_df that leave any n-gram."""
        most = np.bincount(self.matrix.indices).max()
        for ngram_range in NGRAM_RANGES[self.analyzer]:
            for min_df in [min_df for min_df in MIN_DFS if min_df <= most] or [1]:
                yield {"ngram_range": ngram_range, "min_df": min_df}

    def features(self, ngram_range: tuple[int, int], min_df: int, use_idf: bool, norm: str):
        """A candidate's columns of `matrix`, these columns, the same weighted, and their idf."""
        from sklearn.feature_extraction.text import TfidfTransformer

        length = np.array([term.count(" ") + 1 if self.analyzer == "word" else len(term) for term in self.terms])
        frequency = np.bincount(self.matrix.indices, minlength=len(self.terms))
        columns = np.flatnonzero((length <= ngram_range[1]) & (frequency >= min_df))
        binary = self.matrix[:, columns]
        weighting = TfidfTransformer(use_idf=use_idf, norm=norm).fit(binary)
        return columns, binary, weighting.transform(binary), weighting.idf_ if use_idf else None


def count_once(texts: list[str], analyzer: str) -> Counts:
    """The n-grams of all candidates; those of one review alone only where no n-gram is in two."""
    from sklearn.feature_extraction.text import CountVectorizer

    from common.baseline import units

    widest = (1, max(high for _, high in NGRAM_RANGES[analyzer]))
    counter = CountVectorizer(ngram_range=widest, min_df=min(MIN_DFS), **units(analyzer))
    try:
        matrix = counter.fit_transform(texts)
    except ValueError:  # scikit-learn's, when min_df leaves no n-gram
        matrix = counter.set_params(min_df=1).fit_transform(texts)
    return Counts(matrix, counter.get_feature_names_out(), analyzer)


def folds_of(labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows to fit on and rows to score, of each fold. Neighbours of one class in the file share a fold.

    They are often of one film, and test has other films. Shuffled folds of IMDB choose an alpha a tenth as large,
    as names of films tell the label there.
    """
    from sklearn.model_selection import StratifiedKFold

    folds = min(FOLDS, np.bincount(labels).min())  # train and validation hold each class, so at least 2
    return list(StratifiedKFold(folds).split(labels, labels))


def tune_naive_bayes(counts: Counts, labels: np.ndarray) -> dict:
    """The n-grams, min_df and alpha with the best accuracy over the folds, of equals the smoothest; a temperature.

    Reviews that add up to 1 have log-odds near 0, whatever their label. The temperature makes them probabilities.
    """
    from sklearn.model_selection import cross_val_predict
    from sklearn.naive_bayes import MultinomialNB

    tried, how = [], {"cv": folds_of(labels), "method": "predict_log_proba"}
    for candidate in counts.candidates():
        _, _, x, _ = counts.features(**candidate, **TFIDF)
        for alpha in ALPHAS:
            logits = cross_val_predict(MultinomialNB(alpha=alpha), x, labels, **how)
            accuracy = metrics.accuracy(labels, logits.argmax(axis=1))
            tried.append((accuracy, candidate | {"alpha": alpha, "logits": logits}))
    chosen = best(tried)
    temperature = metrics.fit_temperature(labels, chosen.pop("logits"), most=1000)
    return chosen | {"temperature": round(temperature, 6)}


def best(tried: list[tuple[float, dict]]) -> dict:
    """The settings with the highest accuracy, and that accuracy; of equals the first."""
    accuracy, setting = max(tried, key=lambda trial: trial[0])
    return {"cross_validated_accuracy": round(float(accuracy), 6)} | setting


def log_count_ratio(x: "csr_matrix", labels: np.ndarray) -> np.ndarray:
    """r = log((p/‖p‖₁)/(q/‖q‖₁)) of the smoothed counts by class, p and q (Wang & Manning 2012, section 2.2)."""
    p, q = (1 + np.asarray(x[labels == label].sum(axis=0)).ravel() for label in (1, 0))
    return np.log((p / p.sum()) / (q / q.sum())).astype(np.float32)


def fit_nb_svm(x: "csr_matrix", labels: np.ndarray, c: float) -> tuple[np.ndarray, float]:
    """(coefficients, intercept) of a linear classifier on x∘r. The logistic loss makes its scores probabilities."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, solver="liblinear", dual=True, max_iter=1000, random_state=0).fit(x, labels)
    return model.coef_[0], float(model.intercept_[0])


def interpolate(w: np.ndarray, beta: float) -> np.ndarray:
    """w' = (1 − beta)·mean|w| + beta·w (Wang & Manning 2012, equation 6)."""
    return (1 - beta) * np.abs(w).mean() + beta * w


def tune_nb_svm(counts: Counts, labels: np.ndarray) -> dict:
    """The n-grams, C and beta with the best accuracy over the folds."""
    tried = []
    for candidate in counts.candidates():
        if candidate["min_df"] > min(MIN_DFS) or candidate["ngram_range"] == NGRAM_RANGES[counts.analyzer][0]:
            continue  # rare n-grams and bigrams helped in every trial, and each candidate takes seconds
        _, binary, scaled, _ = counts.features(**candidate, **SCALED)
        right = {(c, beta): 0 for c in NB_SVM_CS for beta in NB_SVM_BETAS}
        for fit, score in folds_of(labels):
            x = scaled.multiply(log_count_ratio(binary[fit], labels[fit])).tocsr()
            x_fit, x_score = x[fit], x[score]
            for c in NB_SVM_CS:
                w, b = fit_nb_svm(x_fit, labels[fit], c)
                for beta in NB_SVM_BETAS:
                    right[c, beta] += np.sum((x_score @ interpolate(w, beta) + b > 0) == labels[score])
        tried += [(hits / len(labels), candidate | {"c": c, "beta": beta}) for (c, beta), hits in right.items()]
    return best(tried)


def refit(name: str, chosen: dict, counts: Counts, labels: np.ndarray) -> "Baseline":
    """The model with the chosen settings, fitted on train and validation. NB-SVM's weights include the ratios r."""
    from sklearn.naive_bayes import MultinomialNB

    from common.baseline import Baseline, make_vectorizer, units

    options = {"ngram_range": chosen["ngram_range"]} | (TFIDF if name == "naive_bayes" else SCALED)
    columns, binary, x, idf = counts.features(min_df=chosen["min_df"], **options)
    vectorizer = make_vectorizer(counts.terms[columns], idf, **options, **units(counts.analyzer))
    if name == "naive_bayes":
        model = MultinomialNB(alpha=chosen["alpha"]).fit(x, labels)
        weights, bias = model.feature_log_prob_.T, model.class_log_prior_
        return Baseline(vectorizer, weights / chosen["temperature"], bias / chosen["temperature"])
    r = log_count_ratio(binary, labels)
    w, b = fit_nb_svm(x.multiply(r).tocsr(), labels, chosen["c"])
    w = r * interpolate(w, chosen["beta"])
    return Baseline(vectorizer, np.stack([-w / 2, w / 2], axis=1), np.array([-b / 2, b / 2]))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    settings.start(args, __file__)
    reviews = data.load_reviews(args, reads=("train", "test"), scores_test=False)
    folder = artifacts.begin(args, STEP, inputs=reviews.fingerprints)

    train, validation, test = reviews.train, reviews.validation, reviews.test
    analyzer = choose_analyzer(train["text"], validation["text"])
    labelled = pd.concat([train, validation]).sort_values("example_id")  # the file's neighbours stay neighbours
    labels, counts = labelled["label"].to_numpy(), count_once(labelled["text"].tolist(), analyzer)
    print("tuning by cross-validation", flush=True)
    results = {}
    for name, tune in (("naive_bayes", tune_naive_bayes), ("nb_svm", tune_nb_svm)):
        chosen = tune(counts, labels) | {"analyzer": analyzer}
        setting = ", ".join(f"{key} {value}" for key, value in chosen.items())
        print(f"{name}: {setting}; refitting on train and validation", flush=True)
        model = refit(name, chosen, counts, labels)
        model.save(folder / name)
        results[name] = chosen
        if data.is_labelled(test):
            results[name]["test"] = metrics.describe(test["label"].to_numpy(), model.logits(test["text"]))
    artifacts.finish(args, folder, {"labels": data.LABELS}, results)
    for name, result in results.items():
        scores = metrics.in_words(result["test"]) if "test" in result else "unknown: the test reviews have no labels"
        print(f"{name}: test accuracy {scores}")
    print(f"next: {settings.next_command('02_finetune_roberta.py')}")


if __name__ == "__main__":
    main()
