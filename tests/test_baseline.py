"""01's models: words or characters, by what the reviews are; saved, loaded, and as their names say."""

import numpy as np
import pandas as pd
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline

from common import baseline

NOUNS = {
    "English": ["the film", "a plot", "this actor", "their music"],
    "Hindi": ["यह फिल्म", "इसकी कहानी", "वह अभिनेता", "इसका संगीत"],
    "Chinese": ["电影", "剧情", "演员", "音乐"],
    "emoji": ["🎬", "📖", "🎭", "🎵"],
}
WORDS = {
    "English": (["was dull!", "is weak,", "bored me"], ["was great!", "is warm,", "moved me"]),
    "Hindi": (["बेकार है।", "कमज़ोर है,", "बुरी थी"], ["अच्छी है।", "शानदार है,", "बढ़िया थी"]),
    "Chinese": (["很差。", "无聊，", "糟糕"], ["很好。", "精彩，", "感人"]),
    "emoji": (["👎👎", "😡", "💩"], ["👍👍", "😍", "🎉"]),
}
SPACED = ("English", "Hindi")


def texts_of(language: str, n: int = 80) -> tuple[list[str], np.ndarray]:
    """n reviews of four clauses, positive where the row is odd."""
    rng, joint = np.random.default_rng(1), " " if language in SPACED else ""
    texts = [
        joint.join(joint.join([rng.choice(NOUNS[language]), rng.choice(WORDS[language][row % 2])]) for _ in range(4))
        for row in range(n)
    ]
    return texts, np.arange(n) % 2


@pytest.mark.parametrize("language", NOUNS)
def test_characters_are_counted_where_words_are_not_separated(script, language):
    texts, labels = texts_of(language)
    first = script("01")
    analyzer = first.choose_analyzer(texts[:60], texts[60:])
    assert analyzer == ("word" if language in SPACED else "char")
    counts = first.count_once(texts[:60], analyzer)
    for name, tune in (("naive_bayes", first.tune_naive_bayes), ("nb_svm", first.tune_nb_svm)):
        model = first.refit(name, tune(counts, labels[:60]), counts, labels[:60])
        assert (model.logits(texts[60:]).argmax(axis=1) == labels[60:]).mean() == 1


@pytest.mark.parametrize(
    ("train", "validation", "analyzer"),
    [
        ("a fine film 👍👍👍", "a fine plot, a fine film 👎👎👎", "word"),
        ("ok 👍😍🎉👍", "ok 👎😡💩👎", "char"),
        ("电影很差 film", "剧情无聊太烂了 film", "char"),
    ],
)
def test_the_larger_part_of_mixed_reviews_decides(script, train, validation, analyzer):
    assert script("01").choose_analyzer([train], [validation]) == analyzer


@pytest.mark.parametrize("analyzer", ["word", "char"])
def test_where_no_ngram_is_in_two_reviews_those_of_one_review_count(script, analyzer):
    texts = [chr(0x4E00 + row) for row in range(20)]
    first, labels = script("01"), np.arange(20) % 2
    counts = first.count_once(texts, analyzer)
    assert counts.matrix.shape == (20, 20)
    for name, tune in (("naive_bayes", first.tune_naive_bayes), ("nb_svm", first.tune_nb_svm)):
        assert first.refit(name, tune(counts, labels), counts, labels).logits(texts).shape == (20, 2)


@pytest.mark.parametrize("analyzer", ["word", "char"])
def test_naive_bayes_is_scikit_learns_on_tf_idf_and_survives_its_folder(script, tmp_path, analyzer):
    texts, labels = texts_of("English")
    first = script("01")
    counts = first.count_once(texts, analyzer)
    chosen = {"ngram_range": (1, 2), "min_df": 2, "alpha": 0.1, "temperature": 0.5}
    model = first.refit("naive_bayes", chosen, counts, labels)
    how = baseline.units(analyzer) | {"ngram_range": (1, 2), "min_df": 2, "norm": "l1"}
    theirs = make_pipeline(TfidfVectorizer(**how), MultinomialNB(alpha=0.1)).fit(texts, labels)
    model.save(tmp_path / "naive_bayes")
    assert baseline.load_baseline(tmp_path / "naive_bayes").weights.flags.c_contiguous  # else each review copies them
    for one in (model, baseline.load_baseline(tmp_path / "naive_bayes")):
        odds = 0.5 * one.logits(texts)
        np.testing.assert_allclose(np.exp(odds[:, 1]) / np.exp(odds).sum(1), theirs.predict_proba(texts)[:, 1], 1e-4)
    found = first.tune_naive_bayes(counts, labels)
    assert 0 < found["temperature"] < 1  # reviews that add up to 1 are unsure of themselves
    svm = first.refit("nb_svm", chosen | {"c": 3.0, "beta": 0.75}, counts, labels)
    svm.save(tmp_path / "nb_svm")
    np.testing.assert_allclose(baseline.load_baseline(tmp_path / "nb_svm").logits(texts), svm.logits(texts), rtol=1e-4)


def test_neighbours_of_one_class_share_a_fold(script):
    labels = np.array([0] * 9 + [1] * 6)
    scored = [score.tolist() for _, score in script("01").folds_of(labels)]
    assert scored == [[0, 1, 2, 9, 10], [3, 4, 5, 11, 12], [6, 7, 8, 13, 14]]


def test_two_reviews_of_a_class_are_enough(script, tmp_path, capsys):
    for split, rows in (("train", 40), ("test", 20)):
        labels = [1] * (rows - 2) + [0] * 2
        texts = [f"{split} film {row} was {'good' if label else 'bad'}" for row, label in enumerate(labels)]
        pd.DataFrame({"text": texts, "label": labels}).to_csv(tmp_path / f"{split}.csv", index=False)
    script("01").main(f"--dataset {tmp_path} --output-dir {tmp_path}/out --validation-samples 20".split())
    assert "nb_svm: test accuracy" in capsys.readouterr().out
