"""A file of another LLM's answers: its forms, what is matched, what is left out, and what cannot teach."""

import argparse
import dataclasses

import numpy as np
import pandas as pd
import pytest
from scipy.special import logit

from common import data, teacher_scores

LOGIT_95 = logit(0.95)


@pytest.fixture
def reviews(data_args):
    """60 labelled, 20 validation and 30 unlabelled reviews."""
    return data.load_reviews(data_args, reads=("train", "transfer"))


@pytest.fixture
def read(data_args, reviews, tmp_path):
    """What is read of a table, or of a file."""

    def call(table, name="llm.csv", of=reviews, **flags) -> tuple[data.Reviews, teacher_scores.Teacher, dict]:
        file = tmp_path / name
        if isinstance(table, pd.DataFrame):
            (table.to_parquet if name.endswith("arquet") else table.to_csv)(file, index=False)
        defaults = {"teacher_scores": str(file), "teacher_name": None, "soft_labels": "transfer"}
        args = argparse.Namespace(**vars(data_args) | defaults | flags)
        return teacher_scores.read_file(args, of)

    return call


@pytest.fixture
def table(reviews):
    """The unlabelled texts, and a probability of each."""
    p = np.linspace(0.05, 0.95, len(reviews.transfer)).round(3)
    return pd.DataFrame({"text": reviews.transfer["text"], "p_positive": p})


@pytest.mark.parametrize(("name", "stem"), [("gpt-4.1.csv.gz", "gpt-4.1"), ("some.llm.Parquet", "some.llm")])
def test_each_column_gives_the_log_odds_of_the_reviews(read, table, reviews, name, stem):
    p, by_id = table["p_positive"], table.drop(columns="text").assign(example_id=reviews.transfer["example_id"])
    odds, words = logit(p), np.where(p > 0.5, "Positive.", "negative")
    ids = by_id[["example_id"]]
    cases = [
        (table, odds),
        (table.sample(frac=1, random_state=1).assign(text=lambda rows: rows["text"].str.upper() + "<br />"), odds),
        (by_id, odds),
        (table.assign(example_id=by_id["example_id"].to_numpy()[::-1]), odds),  # the text comes first
        (table[["text"]].rename(columns={"text": "Review"}).assign(**{"log-odds": 9 * odds}), 9 * odds),
        (table.assign(log_odds=3 * odds, label=-1), 3 * odds),  # the most informative one
        (ids.assign(label=words), np.where(p > 0.5, LOGIT_95, -LOGIT_95)),
        (ids.assign(sentiment=np.where(p > 0.5, 2, 1)), np.where(p > 0.5, LOGIT_95, -LOGIT_95)),
    ]
    for content, expected in cases:
        left, teacher, _ = read(content, name)
        np.testing.assert_allclose(teacher.log_odds["transfer"], expected, atol=1e-6)
        assert len(left.transfer) == 30 and teacher.name == stem and "train" not in teacher.log_odds
        assert np.isnan(teacher.log_odds["validation"]).all()


def test_texts_are_compared_without_case_and_saved_scores_hold_the_scored_reviews_alone(read, reviews, table, tmp_path):
    shouted = dataclasses.replace(reviews, transfer=reviews.transfer.assign(text=reviews.transfer["text"].str.upper()))
    left, teacher, _ = read(table, of=shouted)
    assert len(left.transfer) == 30
    validation = np.array([0.5, *[np.nan] * 19])
    teacher_scores.save_scores(tmp_path / "made", left, teacher.log_odds | {"validation": validation})
    assert [len(pd.read_parquet(tmp_path / f"made/{split}.parquet")) for split in ("transfer", "validation")] == [30, 1]


def test_zero_and_one_are_clipped_and_several_answers_are_averaged(read, table, capsys):
    table["p_positive"] = [0.0, 1.0, *table["p_positive"][2:]]
    more = pd.DataFrame({"text": [table["text"][5]] * 2, "p_positive": [0.9, 0.3]})
    _, teacher, _ = read(pd.concat([table, more, table[8:9]]))
    mean = (table["p_positive"][5] + 1.2) / 3
    expected = logit([1e-4, 1 - 1e-4, *table["p_positive"][2:]])
    expected[5] = logit(mean)
    np.testing.assert_allclose(teacher.log_odds["transfer"], expected, atol=1e-9)
    assert "1 reviews have several scores" in capsys.readouterr().out
    votes = pd.DataFrame({"text": [*table["text"], *table["text"][:2]], "label": ["pos", "neg"] * 16})
    _, teacher, _ = read(votes.assign(label=[*votes["label"][:-2], "neg", "neg"]))
    assert teacher.log_odds["transfer"][:2].tolist() == pytest.approx([0, -LOGIT_95])


@pytest.mark.parametrize(
    ("column", "answer"), [("p_positive", None), ("p_positive", "I cannot judge this."), ("label", "neutral")]
)
def test_failed_answers_and_reviews_without_one_are_left_out_with_their_counts(read, table, capsys, column, answer):
    words = table["p_positive"] if column == "p_positive" else pd.Series(["positive", "negative"] * 15)
    answered = table[["text"]].assign(**{column: words.astype(object)})
    answered.loc[[3, 7], column] = answer
    strangers = pd.DataFrame({"text": ["another review"] * 4, column: words[:4]})
    left, teacher, _ = read(pd.concat([answered[:25], strangers]))
    out = capsys.readouterr().out
    assert "left out 2 " in out and "transfer: left out 7 reviews without a score" in out
    assert "for 23 of 30 unlabelled, 0 of 60 labelled and 0 of 20 validation" in out and "4 of 27 rows" in out
    kept = table["text"][:25].drop([3, 7]).tolist()
    assert left.transfer["text"].tolist() == kept and len(teacher.log_odds["transfer"]) == 23
    facts = teacher.facts["scores"]
    assert (facts["scored"]["transfer"], facts["transfer_left_out"], facts["rows_unmatched"]) == (23, 7, 4)


@pytest.mark.parametrize(
    ("negative", "positive", "other"), [("0", "1", "?"), ("1", "2", "HTTP 429"), ("bad", "good", "n/a")]
)
def test_words_among_the_answers_are_left_out_and_other_answers_are_told_with_their_file(
    read, table, stops, capsys, negative, positive, other
):
    answers = np.where(table["p_positive"] > 0.5, positive, negative).astype(object)
    answers[:3] = other
    answered = table[["text"]].assign(answer=answers)
    left, teacher, _ = read(answered)
    assert len(left.transfer) == 27 and teacher.log_odds["transfer"][0] == pytest.approx(-LOGIT_95)
    capsys.readouterr()
    read(answered[3:])
    assert (f"labels: {negative} is negative" in capsys.readouterr().out) == negative.isdigit()
    mixed = answered.assign(answer=["negative", "0", "positive", "1", *answers[4:]])
    stops(lambda: read(mixed), "answer of llm.csv are", "'negative'", "--negative-labels")
    stops(lambda: read(answered.replace(other, "3")), "answer of llm.csv are", "'3'", "negative and positive")


REFUSED = [
    (lambda t: t.assign(p_positive=100 * t["p_positive"]), "from 5 to 95", "divide a percentage by 100"),
    (lambda t: t.assign(p_positive=t["p_positive"] - 0.5), "from -0.45", "log_odds"),
    (lambda t: t.assign(p_positive="93%"), "'93%'", "write numbers such as 0.93"),
    (lambda t: t.assign(p_positive="0,93"), "'0,93'", "write numbers such as 0.93"),
    (lambda t: t.assign(p_positive=np.nan), "no score", "name one of them"),
    (lambda t: t.assign(p_positive=0.7), "is 0.7 in each of the 30 rows", "of 30: a teacher needs different"),
    (lambda t: t.assign(log_odds=np.inf), "infinite", "p_positive"),
    (
        lambda t: pd.concat([t.assign(p_positive=0.7), pd.DataFrame({"text": ["a stranger"], "p_positive": [0.1]})]),
        "is 0.7 in each of the 30 rows",
        "of 31: a teacher needs different",
    ),
    (lambda t: t.assign(p_positive=["HTTP 429", *t["p_positive"][1:]]), "'HTTP 429'", "write numbers such as 0.93"),
    (lambda t: t.assign(text="short"), "'short'", "--dataset", "no text was cut", "example_id"),
    (lambda t: t[:0], "no rows"),
    (lambda t: t[["text"]], "llm.csv has the columns text", "p_positive (0 to 1)"),
    (lambda t: t[["p_positive"]], "none is text or example_id", "rename one"),
    (lambda t: t[["p_positive"]].assign(example_id="unsupervised/1"), "'unsupervised/1'", "'train/", "--dataset"),
    (lambda t: t.rename(columns={"p_positive": "score"}), "fractions in score", "p_positive (0 to 1)"),
    (lambda t: t[["text"]].assign(label="positive"), "all labels of llm.csv are positive", "both classes"),
]


@pytest.mark.parametrize(("change", "words"), [(change, words) for change, *words in REFUSED])
def test_scores_that_cannot_be_read_rightly_are_refused_with_a_remedy(read, table, stops, change, words):
    stops(lambda: read(change(table)), "llm.csv", *words)


def test_unclear_labels_lists_and_a_name_that_is_no_file_are_refused(read, table, stops):
    rated = table[["text"]].assign(label=[*"125"] * 10)
    stops(lambda: read(rated), "'1', '2', '5'", "--negative-labels")
    stops(lambda: read(rated.assign(label=rated["label"].map(list)), "llm.parquet"), "llm.parquet labels are lists")
    stops(lambda: read(None, "absent.csv"), "absent.csv is no file")
    stops(lambda: read(None, "."), "is no file")


def test_the_label_flags_name_the_files_labels_or_those_of_the_reviews(read, table):
    rated = table[["text"]].assign(prediction=["1", "3", "5"] * 10, label="1")
    flags = {"negative_labels": ["1", "2"], "positive_labels": ["4", "5"]}
    left, teacher, _ = read(rated, **flags)
    assert len(left.transfer) == 20 and np.sign(teacher.log_odds["transfer"][:2]).tolist() == [-1, 1]
    left, teacher, _ = read(table[["text"]].assign(label=["pos", "neg"] * 15), **flags)
    assert np.sign(teacher.log_odds["transfer"][:2]).tolist() == [1, -1]


def test_labelled_reviews_are_taught_softly_only_if_all_have_a_score(read, table, reviews, stops):
    of_train = pd.DataFrame({"text": reviews.train["text"], "p_positive": 0.2 + 0.6 * reviews.train["label"]})
    both = pd.concat([table, of_train])
    assert "train" not in read(both)[1].log_odds
    odds = read(both, soft_labels="all")[1].log_odds["train"]
    np.testing.assert_allclose(odds, logit(of_train["p_positive"]))
    assert "train" not in read(both[:-1], soft_labels="all")[1].log_odds
    stops(lambda: read(of_train[1:]), "no unlabelled review has a score", "1 of 60 labelled")
    left, teacher, _ = read(of_train)
    assert len(left.transfer) == 0 and np.isfinite(teacher.log_odds["train"]).all()


def test_a_changed_file_or_another_reading_of_it_has_another_fingerprint(read, table):
    rated = table[["text"]].assign(label=["1", "5"] * 15)
    ways = [{"negative_labels": [one], "positive_labels": [other]} for one, other in ("15", "51")]
    one, other = (read(rated, **flags)[2] for flags in ways)
    assert one["teacher-scores/sha256"] == other["teacher-scores/sha256"] and one != other
    changed = read(rated.assign(label=["5", "1", "1", "5", *rated["label"][4:]]), **ways[0])[2]
    assert changed["teacher-scores/sha256"] != one["teacher-scores/sha256"]


@pytest.mark.parametrize(
    ("n", "share", "calibration"), [(0, 0.5, "none"), (9, 0.5, "none"), (14, 1.0, "none"), (80, 0.5, "fitted")]
)
def test_the_teachers_figures_need_ten_scored_validation_reviews_of_each_class(script, n, share, calibration, stops):
    labels, odds = np.arange(100) % 2, np.full(100, np.nan)
    rows = np.flatnonzero(labels >= share)[:n] if share == 1.0 else np.arange(n)
    odds[rows] = 20 * labels[rows] - 10 + 7.0 * np.random.default_rng(0).normal(size=len(rows))
    transfer = np.tile([-5.0, 5.0], 100)
    teacher = teacher_scores.Teacher("llm", "", {"validation": odds, "transfer": transfer}, {}, "these scores")
    chosen, _, figures = script("04b").calibrate("auto", teacher, labels)
    assert chosen == calibration
    if calibration == "none":
        assert figures["teacher"].startswith(f"absent: {len(rows)} of 100")
        stops(lambda: script("04b").calibrate("fitted", teacher, labels), "--calibration fitted is impossible")
        one_class = teacher._replace(log_odds={"validation": odds, "transfer": np.abs(transfer)})
        stops(lambda: script("04b").calibrate("auto", one_class, labels), "100% of the transfer set positive")
    else:
        assert figures["teacher_none"]["n"] == n
        chance = teacher._replace(log_odds={"validation": np.abs(odds) * (-1) ** (np.arange(100) // 2)})
        stops(lambda: script("04b").calibrate("auto", chance, labels), "chance", "these scores")


def test_few_validation_reviews_that_all_have_a_score_are_judged_as_an_llms_are(script):
    labels = (np.arange(40) > 4).astype(int)
    teacher = teacher_scores.Teacher("llm", "", {"validation": 8.0 * labels - 4}, {}, "")
    chosen, _, figures = script("04b").calibrate("auto", teacher, labels)
    assert chosen == "none" and figures["teacher_none"]["accuracy"] == 1


@pytest.mark.parametrize("flag", [["--prompt", "{review}"], ["--mistral-model", "a/b"], ["--prompt-length", "64"]])
def test_a_file_of_scores_takes_no_flags_of_an_llm(script, capsys, flag):
    with pytest.raises(SystemExit):
        script("04b").parse_args(["--teacher-scores", "x.csv", *flag])
    assert f"drop {flag[0]}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script("04b").parse_args(["--teacher-name", "x"])
    assert "pass both" in capsys.readouterr().err
