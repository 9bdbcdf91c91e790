import numpy as np
import pandas as pd
import pytest

from common import data

ALL = ("train", "transfer", "test")


def rewrite(folder, split, change):
    """Put a changed table in the place of a split's file."""
    file = folder / f"{split}.parquet"
    change(pd.read_parquet(file)).to_parquet(file)


def test_a_label_sorted_dataset_never_yields_a_one_class_subset(data_args):
    data_args.max_train_samples, data_args.max_test_samples = 16, 7
    reviews = data.load_reviews(data_args, ALL)
    assert reviews.train["label"].value_counts().tolist() == [8, 8]
    assert reviews.validation["label"].value_counts().tolist() == [10, 10]
    assert sorted(reviews.test["label"].value_counts()) == [3, 4]
    for n in range(2, len(reviews.train)):
        assert reviews.train["label"].iloc[:n].nunique() == 2, "a prefix of train is one class"


def test_a_smaller_subset_lies_within_a_larger_one_and_validation_stays_until_the_seed_changes(data_args):
    large = data.load_reviews(data_args, ALL)
    data_args.max_train_samples, data_args.max_transfer_samples = 20, 10
    small = data.load_reviews(data_args, ALL)
    assert set(small.train["example_id"]) < set(large.train["example_id"])
    assert set(small.transfer["example_id"]) < set(large.transfer["example_id"])
    assert small.validation.equals(large.validation)
    assert not set(small.train["example_id"]) & set(small.validation["example_id"])
    data_args.seed += 1
    other = data.load_reviews(data_args, ALL)
    assert other.validation["example_id"].tolist() != small.validation["example_id"].tolist()


def test_texts_of_test_and_repeats_leave_train_and_transfer_but_never_test(data_args, reviews_folder):
    test = pd.read_parquet(reviews_folder / "test.parquet")
    train = pd.read_parquet(reviews_folder / "train.parquet")
    shared = test["text"].iloc[0].upper().replace(" ", "<br /><br />")  # cleaning and case must not hide it
    more = pd.DataFrame({"text": [shared, train["text"].iloc[5]], "label": [0, 0]})
    unlabelled = pd.DataFrame({"text": [shared, train["text"].iloc[7], "new", "new"], "label": -1})
    rewrite(reviews_folder, "train", lambda table: pd.concat([table, more]))
    rewrite(reviews_folder, "unsupervised", lambda _: unlabelled)
    rewrite(reviews_folder, "test", lambda table: pd.concat([table, table.iloc[:1]]))
    reviews = data.load_reviews(data_args, ALL)
    assert len(reviews.train) + len(reviews.validation) == 80
    assert reviews.transfer["text"].tolist() == ["new"]
    assert len(reviews.test) == 21
    test_texts = set(reviews.test["text"].str.lower())
    for part in (reviews.train, reviews.validation, reviews.transfer):
        assert not test_texts & set(part["text"].str.lower())


def test_an_example_id_names_the_row_of_the_file(data_args, reviews_folder):
    rows = pd.read_parquet(reviews_folder / "train.parquet")["text"]
    for example_id, text in data.load_reviews(data_args, ALL).train[["example_id", "text"]].to_numpy():
        split, row = example_id.split("/")
        assert split == "train" and rows[int(row)] == text


@pytest.mark.parametrize("column", ["text", "label"])
def test_the_fingerprint_changes_with_a_text_or_a_label(data_args, reviews_folder, column):
    before = data.load_reviews(data_args, ALL).fingerprints
    changed = {"text": "another", "label": 1}[column]
    rewrite(reviews_folder, "train", lambda table: table.assign(**{column: [changed, *table[column][1:]]}))
    after = data.load_reviews(data_args, ALL).fingerprints
    assert before["dataset/train"] != after["dataset/train"]
    assert before["dataset/test"] == after["dataset/test"]


def test_texts_lose_markup_and_empty_ones_leave_train_but_not_test(data_args, reviews_folder, capsys):
    raw = ["Good.<br /><br />Fun!", "  two\n\tlines ", "Привет 世界 😀", None, " <br /> "]
    for split in ("train", "test"):
        rewrite(reviews_folder, split, lambda table: table.assign(text=[*raw, *table["text"][5:]]))
    (reviews_folder / "unsupervised.parquet").unlink()
    reviews = data.load_reviews(data_args, ALL)
    assert reviews.test["text"].tolist()[:5] == ["Good. Fun!", "two lines", "Привет 世界 😀", "", ""]
    assert len(reviews.train) + len(reviews.validation) == 75 and len(reviews.transfer) == 0
    out = capsys.readouterr().out
    assert "train: left out 2 reviews without text" in out and "no unlabelled reviews" in out


@pytest.mark.parametrize(
    ("split", "change", "words"),
    [
        ("train", lambda table: table.assign(label=0), ("no positive",)),
        ("train", lambda table: table.assign(text=table["text"].str.encode("utf-8")), ("bytes or lists",)),
        ("train", lambda table: table.assign(text=table["text"].str.split()), ("bytes or lists",)),
        ("train", lambda table: table.assign(label=table["label"].where(table.index > 2)), ("3 train reviews have",)),
        ("test", lambda table: table.assign(label=table["label"].where(table.index > 4)), ("5 test reviews have no",)),
        ("train", lambda table: table.iloc[::3], ("27 reviews", "32 would do")),
        ("train", lambda table: table.iloc[::2], ("40 reviews", "--validation-samples 30", "24 would do")),
    ],
)
def test_a_table_that_is_no_table_of_reviews_is_refused(data_args, reviews_folder, stops, split, change, words):
    data_args.validation_samples = 30
    rewrite(reviews_folder, split, change)
    stops(lambda: data.load_reviews(data_args, ALL), *words)


@pytest.mark.parametrize(("rows", "validation"), [(400, 40), (40, 16), (30_000, 2500)])
def test_validation_is_by_default_a_tenth_of_train_within_bounds_and_becomes_a_setting(
    data_args, reviews_folder, rows, validation
):
    rewrite(reviews_folder, "train", lambda _: pd.DataFrame({"text": range(rows), "label": np.arange(rows) % 2}))
    data_args.validation_samples = None
    assert len(data.load_reviews(data_args, ALL).validation) == data_args.validation_samples == validation


@pytest.mark.parametrize("asked", [None, 20])
def test_a_validation_file_is_validation_within_the_flags_bound_and_its_texts_leave_train(
    data_args, reviews_folder, capsys, asked
):
    train = pd.read_parquet(reviews_folder / "train.parquet")
    shared = train.iloc[[0, -1]]
    train.assign(text="valid " + train["text"]).pipe(lambda own: pd.concat([own, shared])).to_csv(
        reviews_folder / "Valid.csv", index=False
    )
    data_args.validation_samples = asked
    reviews = data.load_reviews(data_args, ALL)
    assert len(reviews.train) == 78 and len(reviews.validation) == data_args.validation_samples == (asked or 82)
    assert not set(reviews.train["text"]) & set(shared["text"])
    assert "dataset/validation" in reviews.fingerprints and "a split of its own" in capsys.readouterr().out


def test_without_a_test_split_a_fifth_becomes_it_and_stays_when_rows_move_or_are_added(
    data_args, reviews_folder, capsys
):
    texts = [f"film {row}" for row in range(2000)]
    table = pd.DataFrame({"text": [*texts, *texts[:50]], "label": [*np.arange(2000) % 2, *np.arange(50) % 2]})
    table.to_csv(reviews_folder / "all.csv", index=False)
    data_args.dataset = str(reviews_folder / "all.csv")
    first = data.load_reviews(data_args, ALL)
    assert 350 < len(first.test) < 450 and len(first.train) + len(first.validation) + len(first.test) == 2000
    assert not set(first.test["text"]) & {*first.train["text"], *first.validation["text"]}
    assert "there is no test split: a fifth" in capsys.readouterr().out
    benchmark = data.load_reviews(data_args, ("test",))
    assert benchmark.test.equals(first.test) and benchmark.fingerprints.items() <= first.fingerprints.items()
    more = pd.DataFrame({"text": ["another"] * 2 + ["a third"], "label": [0, 1, 1]})
    pd.concat([more, table.sample(frac=1, random_state=1)]).to_csv(reviews_folder / "all.csv", index=False)
    assert set(first.test["text"]) == set(data.load_reviews(data_args, ALL).test["text"]) - {"another", "a third"}


def test_of_few_reviews_without_a_test_split_the_sentence_says_which_number_would_do(data_args, stops, tmp_path):
    table = pd.DataFrame({"text": [f"film {row}" for row in range(48)], "label": np.arange(48) % 2})
    data_args.dataset, data_args.validation_samples = str(tmp_path / "all.csv"), None
    table[:30].to_csv(data_args.dataset, index=False)
    stops(lambda: data.load_reviews(data_args, ALL), "30 reviews are too few", "48 would do")
    table.to_csv(data_args.dataset, index=False)
    assert len(data.load_reviews(data_args, ALL).train) >= 16


@pytest.mark.parametrize("labels", [-1, None, "absent"])
def test_a_test_split_without_labels_serves_its_texts_alone_and_may_have_labels_later(
    data_args, reviews_folder, stops, labels, capsys
):
    full = pd.read_parquet(reviews_folder / "test.parquet")
    bare = full.drop(columns="label") if labels == "absent" else full.assign(label=labels)
    rewrite(reviews_folder, "test", lambda _: bare)
    assert len(data.load_reviews(data_args, ("train", "transfer")).train) == 60
    assert "warning: the test reviews have no labels, and 05" in capsys.readouterr().out  # hours before 05 says so
    unscored = data.load_reviews(data_args, ("train", "test"), scores_test=False)
    assert len(unscored.test) == 20 and not data.is_labelled(unscored.test)
    stops(lambda: data.load_reviews(data_args, ("test",)), "test reviews have no labels", "add labels to the test file")
    for texts, same in ((full["text"], True), (full["text"] + "!", False)):
        full.assign(text=texts).to_parquet(reviews_folder / "test.parquet")
        scored = data.load_reviews(data_args, ("test",)).fingerprints
        shared = scored.keys() & unscored.fingerprints.keys()
        assert "dataset/test texts" in shared
        assert same == all(scored[key] == unscored.fingerprints[key] for key in shared)
