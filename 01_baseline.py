#!/usr/bin/env python
"""01: two baselines that count words, multinomial naive Bayes on TF-IDF and the stronger NB-SVM.

Both are tuned on the validation split, refitted on train and validation together, and tested once.
A student that does not beat them is not worth a GPU.

Reads   the reviews
Writes  outputs/01_baseline/  naive_bayes/  nb_svm/  metrics.json  run.json
Takes   about 3 minutes and 2.2 GB on two CPU cores; no GPU

    python 01_baseline.py
    python 01_baseline.py --dataset path/to/folder
"""

import argparse

import numpy as np

from common import artifacts, data, metrics, settings

STEP = "01_baseline"
NGRAM_RANGES = ((1, 1), (1, 2), (1, 3))
MIN_DFS = (2, 5)
ALPHAS = (0.01, 0.03, 0.1, 0.3, 1.0)
NB_SVM_CS = (0.1, 0.3, 1.0, 3.0)
NB_SVM_BETAS = (0.25, 0.5, 1.0)  # Wang & Manning 2012 interpolate with 0.25


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = settings.make_parser(__doc__, reads=("train", "test"), precision=False)
    return settings.parse(parser, STEP, argv)


def count_once(train_texts, validation_texts):
    """Counts of all candidate n-grams in train and validation. Each candidate's features are columns of them."""
    from sklearn.feature_extraction.text import CountVectorizer

    from common.baseline import TOKEN_PATTERN

    widest = (1, max(high for _, high in NGRAM_RANGES))
    counter = CountVectorizer(ngram_range=widest, min_df=min(MIN_DFS), token_pattern=TOKEN_PATTERN, dtype=np.float32)
    train, validation = counter.fit_transform(train_texts), counter.transform(validation_texts)
    length = np.array([term.count(" ") + 1 for term in counter.get_feature_names_out()])
    frequency = np.asarray((train > 0).sum(axis=0)).ravel()
    columns = {
        (ngrams, min_df): np.flatnonzero((length <= ngrams[1]) & (frequency >= min_df))
        for ngrams in NGRAM_RANGES
        for min_df in MIN_DFS
    }
    return train.tocsc(), validation.tocsc(), columns


def tune_naive_bayes(counts, labels, validation_labels) -> dict:
    """The n-grams, min_df, sublinear tf and alpha with the best validation accuracy."""
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.naive_bayes import MultinomialNB

    train, validation, columns = counts
    tried = []
    for (ngrams, min_df), chosen in columns.items():
        for sublinear in (False, True):
            weighting = TfidfTransformer(sublinear_tf=sublinear)
            x = weighting.fit_transform(train[:, chosen].tocsr())
            x_validation = weighting.transform(validation[:, chosen].tocsr())
            for alpha in ALPHAS:
                accuracy = MultinomialNB(alpha=alpha).fit(x, labels).score(x_validation, validation_labels)
                setting = {"ngram_range": ngrams, "min_df": min_df, "sublinear_tf": sublinear, "alpha": alpha}
                tried.append({"validation_accuracy": round(accuracy, 6), **setting})
    return max(tried, key=lambda trial: trial["validation_accuracy"])


def log_count_ratio(x, labels):
    """r = log((p/‖p‖₁)/(q/‖q‖₁)) of the smoothed counts by class, p and q (Wang & Manning 2012, section 2.2)."""
    p, q = (1 + np.asarray(x[labels == label].sum(axis=0)).ravel() for label in (1, 0))
    return np.log((p / p.sum()) / (q / q.sum())).astype(np.float32)


def fit_nb_svm(x, labels, c: float):
    """(coefficients, intercept) of a linear classifier on x∘r. The logistic loss makes its scores probabilities."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, solver="liblinear", dual=True, max_iter=1000, random_state=0).fit(x, labels)
    return model.coef_[0], float(model.intercept_[0])


def interpolate(w, beta: float):
    """w' = (1 − beta)·mean|w| + beta·w (Wang & Manning 2012, equation 6)."""
    return (1 - beta) * np.abs(w).mean() + beta * w


def tune_nb_svm(counts, labels, validation_labels) -> dict:
    """The n-grams, C and beta with the best validation accuracy, on binary counts."""
    train, validation, columns = counts
    tried = []
    for (ngrams, min_df), chosen in columns.items():
        if min_df != min(MIN_DFS) or ngrams[1] == 1:
            continue  # rare n-grams and bigrams helped in every trial, and each candidate takes seconds
        x, x_validation = ((part[:, chosen] > 0).astype("float32").tocsr() for part in (train, validation))
        r = log_count_ratio(x, labels)
        x, x_validation = x.multiply(r).tocsr(), x_validation.multiply(r).tocsr()
        for c in NB_SVM_CS:
            w, b = fit_nb_svm(x, labels, c)
            for beta in NB_SVM_BETAS:
                accuracy = float((((x_validation @ interpolate(w, beta) + b) > 0) == validation_labels).mean())
                setting = {"ngram_range": ngrams, "min_df": min_df, "c": c, "beta": beta}
                tried.append({"validation_accuracy": round(accuracy, 6), **setting})
    return max(tried, key=lambda trial: trial["validation_accuracy"])


def refit_naive_bayes(chosen: dict, texts, labels):
    """Naive Bayes with the chosen settings, fitted on all these reviews."""
    from sklearn.naive_bayes import MultinomialNB

    from common.baseline import Baseline, make_tfidf

    vectorizer = make_tfidf(chosen["ngram_range"], chosen["sublinear_tf"], min_df=chosen["min_df"])
    model = MultinomialNB(alpha=chosen["alpha"]).fit(vectorizer.fit_transform(texts), labels)
    return Baseline(vectorizer, model.feature_log_prob_.T, model.class_log_prior_)


def refit_nb_svm(chosen: dict, texts, labels):
    """NB-SVM with the chosen settings, fitted on all these reviews. Its weights include the ratios r."""
    from common.baseline import Baseline, make_binary

    vectorizer = make_binary(chosen["ngram_range"], min_df=chosen["min_df"])
    x = vectorizer.fit_transform(texts)
    r = log_count_ratio(x, labels)
    w, b = fit_nb_svm(x.multiply(r).tocsr(), labels, chosen["c"])
    w = r * interpolate(w, chosen["beta"])
    return Baseline(vectorizer, np.stack([-w / 2, w / 2], axis=1), np.array([-b / 2, b / 2]))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    settings.start(args, __file__)
    reviews = data.load_reviews(args, reads=("train", "test"), scores_test=False)
    folder = artifacts.begin(args, STEP, inputs=reviews.fingerprints)

    train, validation, test = reviews.train, reviews.validation, reviews.test
    labels, validation_labels = train["label"].to_numpy(), validation["label"].to_numpy()
    print("counting n-grams", flush=True)
    counts = count_once(train["text"], validation["text"])
    print("tuning on the validation split", flush=True)
    chosen = {
        "naive_bayes": tune_naive_bayes(counts, labels, validation_labels),
        "nb_svm": tune_nb_svm(counts, labels, validation_labels),
    }
    del counts
    texts, labels = [*train["text"], *validation["text"]], [*labels, *validation_labels]
    results = {}
    for name, refit in (("naive_bayes", refit_naive_bayes), ("nb_svm", refit_nb_svm)):
        setting = ", ".join(f"{key} {value}" for key, value in chosen[name].items())
        print(f"{name}: {setting}; refitting on train and validation", flush=True)
        model = refit(chosen[name], texts, np.array(labels))
        model.save(folder / name)
        results[name] = chosen[name]
        if data.is_labelled(test):
            results[name]["test"] = metrics.describe(test["label"].to_numpy(), model.logits(test["text"]))
    artifacts.finish(args, folder, {"labels": data.LABELS}, results)
    for name, result in results.items():
        scores = metrics.in_words(result["test"]) if "test" in result else "unknown: the test reviews have no labels"
        print(f"{name}: test accuracy {scores}")
    print(f"next: {settings.next_command('02_finetune_roberta.py')}")


if __name__ == "__main__":
    main()
