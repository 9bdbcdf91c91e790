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


def test_a_smaller_subset_lies_within_a_larger_one_and_validation_stays(data_args):
    large = data.load_reviews(data_args, ALL)
    data_args.max_train_samples, data_args.max_transfer_samples = 20, 10
    small = data.load_reviews(data_args, ALL)
    assert set(small.train["example_id"]) < set(large.train["example_id"])
    assert set(small.transfer["example_id"]) < set(large.transfer["example_id"])
    assert small.validation.equals(large.validation)
    assert not set(small.train["example_id"]) & set(small.validation["example_id"])


def test_subsets_depend_on_the_seed_alone(data_args):
    first, again = (data.load_reviews(data_args, ALL).validation["example_id"].tolist() for _ in range(2))
    data_args.seed += 1
    assert first == again != data.load_reviews(data_args, ALL).validation["example_id"].tolist()


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


def test_markup_and_white_space_are_removed_and_other_alphabets_kept():
    raw = ["Good.<br /><br />Fun!", "  two\n\tlines ", "Привет 世界 😀", "", None]
    cleaned = data._clean(pd.DataFrame({"text": raw, "label": 1}), "test")
    assert cleaned["text"].tolist() == ["Good. Fun!", "two lines", "Привет 世界 😀", "", ""]


def test_reviews_without_text_leave_train_but_stay_in_test(data_args, reviews_folder, capsys):
    for split in ("train", "test"):
        rewrite(reviews_folder, split, lambda table: table.assign(text=[" <br /> ", *table["text"][1:]]))
    reviews = data.load_reviews(data_args, ALL)
    assert len(reviews.train) + len(reviews.validation) == 79 and len(reviews.test) == 20
    assert "train: left out 1 reviews without text" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [("negative", "positive"), ("neg", "pos"), ("0", "1"), (" NEGATIVE", "Positive "), (0.0, 1.0)]
)
def test_labels_may_be_words_or_numbers(words):
    gold = [0, 1, 1, 0]
    table = pd.DataFrame({"text": "a", "label": [words[label] for label in gold]})
    assert data._clean(table, "train")["label"].tolist() == gold


def test_a_csv_with_quotes_commas_newlines_and_kaggles_column_names(data_args, reviews_folder):
    table = pd.read_parquet(reviews_folder / "train.parquet")
    (reviews_folder / "train.parquet").unlink()
    table.loc[0, "text"] = 'He said "no, never",\nand NULL left; NA'
    table.loc[1, "text"] = "NA"
    named = pd.DataFrame({"review": table["text"], "sentiment": table["label"].map({0: "negative", 1: "positive"})})
    named.to_csv(reviews_folder / "train.csv", index=False)
    reviews = data.load_reviews(data_args, ALL)
    both = pd.concat([reviews.train, reviews.validation]).set_index("example_id")
    assert both.loc["train/00000", "text"] == 'He said "no, never", and NULL left; NA'
    assert both.loc["train/00001", "text"] == "NA"
    assert both["label"].value_counts().tolist() == [40, 40]


def as_json_lines(train):
    table = pd.read_parquet(train)
    train.unlink()
    table.to_json(train.with_suffix(".jsonl"), orient="records", lines=True)


def in_parts(train):
    table = pd.read_parquet(train)
    train.unlink()
    table.iloc[:30].to_parquet(train.with_name("train-00000-of-00002.parquet"))
    table.iloc[30:].to_parquet(train.with_name("train-00001-of-00002.parquet"))


def beside_other_files(train):
    for name in ("train_predictions.parquet", "testament.parquet", "train.parquet.bak"):
        train.with_name(name).write_bytes(train.read_bytes())


@pytest.mark.parametrize("change", [as_json_lines, in_parts, beside_other_files])
def test_the_same_reviews_in_other_files_are_the_same_dataset(data_args, reviews_folder, change):
    before = data.load_reviews(data_args, ALL).fingerprints
    change(reviews_folder / "train.parquet")
    assert data.load_reviews(data_args, ALL).fingerprints == before


def test_a_missing_transfer_set_is_said_and_empty(data_args, reviews_folder, capsys):
    (reviews_folder / "unsupervised.parquet").unlink()
    assert len(data.load_reviews(data_args, ALL).transfer) == 0
    assert "no unlabelled reviews" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: table.assign(label=0), ("no positive",)),
        (lambda table: table.assign(label=np.where(table["label"], "5 stars", "1 star")), ("'1 star'", "negative and")),
        (lambda table: table.rename(columns={"text": "body", "label": "stars"}), ("body, stars", "text and label")),
        (lambda table: table.assign(text=table["text"].str.encode("utf-8")), ("bytes or lists",)),
        (lambda table: table.assign(text=table["text"].str.split()), ("bytes or lists",)),
        (lambda table: table.iloc[::3], ("too few", "--validation-samples")),
    ],
)
def test_a_table_that_is_no_table_of_reviews_is_refused(data_args, reviews_folder, stops, change, words):
    rewrite(reviews_folder, "train", change)
    stops(lambda: data.load_reviews(data_args, ALL), *words)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train.parquet", b"PAR1 no", ("train.parquet", "cannot be read")),
        ("test.parquet", None, ("no test file",)),
        ("test.csv", b"text,label\na,0\n", ("several formats", "test.csv, test.parquet")),
        # An unquoted comma must not cut a text short.
        ("train.csv", b"text,label\n" + 60 * b"first half, rest,1\n", ("train.csv", "cannot be read")),
    ],
)
def test_a_file_that_cannot_be_read_is_named(data_args, reviews_folder, stops, name, content, words):
    if name == "train.csv":
        (reviews_folder / "train.parquet").unlink()
    (reviews_folder / name).unlink() if content is None else (reviews_folder / name).write_bytes(content)
    stops(lambda: data.load_reviews(data_args, ALL), *words)


def test_a_file_instead_of_its_folder_and_a_missing_folder_are_named(data_args, reviews_folder, stops):
    data_args.dataset = str(reviews_folder / "train.parquet")
    stops(lambda: data.load_reviews(data_args, ALL), "is a file", "the folder")
    data_args.dataset = "./nowhere"
    stops(lambda: data.load_reviews(data_args, ALL), "does not exist")
