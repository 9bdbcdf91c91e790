import pandas as pd
import pytest

from common import data

ALL = ("train", "transfer", "test")


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
    pd.concat([train, more]).to_parquet(reviews_folder / "train.parquet")
    unlabelled = pd.DataFrame({"text": [shared, train["text"].iloc[7], "new", "new"], "label": -1})
    unlabelled.to_parquet(reviews_folder / "unsupervised.parquet")
    pd.concat([test, test.iloc[:1]]).to_parquet(reviews_folder / "test.parquet")

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


def test_the_fingerprint_changes_with_a_text_or_a_label(data_args, reviews_folder):
    before = data.load_reviews(data_args, ALL).fingerprints
    table = pd.read_parquet(reviews_folder / "train.parquet")
    table.loc[0, "label"] = 1
    table.to_parquet(reviews_folder / "train.parquet")
    after = data.load_reviews(data_args, ALL).fingerprints
    assert before["dataset/train"] != after["dataset/train"]
    assert before["dataset/test"] == after["dataset/test"]


def test_markup_and_white_space_are_removed_and_other_alphabets_kept():
    raw = ["Good.<br /><br />Fun!", "  two\n\tlines ", "Привет 世界 😀", "", None]
    cleaned = data._clean(pd.DataFrame({"text": raw, "label": 1}), "test")
    assert cleaned["text"].tolist() == ["Good. Fun!", "two lines", "Привет 世界 😀", "", ""]


def test_reviews_without_text_leave_train_but_stay_in_test(data_args, reviews_folder, capsys):
    for split in ("train", "test"):
        table = pd.read_parquet(reviews_folder / f"{split}.parquet")
        table.loc[0, "text"] = " <br /> "
        table.to_parquet(reviews_folder / f"{split}.parquet")
    reviews = data.load_reviews(data_args, ALL)
    assert len(reviews.train) + len(reviews.validation) == 79 and len(reviews.test) == 20
    assert "train: left out 1 reviews without text" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("negative", "positive"),
    [("negative", "positive"), ("neg", "pos"), ("0", "1"), (" NEGATIVE", "Positive "), (0.0, 1.0)],
)
def test_labels_may_be_words_or_numbers(data_args, reviews_folder, negative, positive):
    table = pd.read_parquet(reviews_folder / "train.parquet")
    gold = table["label"].tolist()
    table["label"] = [(negative, positive)[label] for label in gold]
    table.to_parquet(reviews_folder / "train.parquet")
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


def test_json_lines_read_like_parquet(data_args, reviews_folder):
    expected = data.load_reviews(data_args, ALL)
    table = pd.read_parquet(reviews_folder / "train.parquet")
    (reviews_folder / "train.parquet").unlink()
    table.to_json(reviews_folder / "train.jsonl", orient="records", lines=True)
    assert data.load_reviews(data_args, ALL).fingerprints == expected.fingerprints


def test_a_missing_transfer_set_is_said_and_empty(data_args, reviews_folder, capsys):
    (reviews_folder / "unsupervised.parquet").unlink()
    assert len(data.load_reviews(data_args, ALL).transfer) == 0
    assert "no unlabelled reviews" in capsys.readouterr().out


def test_one_class_data_is_refused(data_args, reviews_folder, stops):
    table = pd.read_parquet(reviews_folder / "train.parquet").assign(label=0)
    table.to_parquet(reviews_folder / "train.parquet")
    stops(lambda: data.load_reviews(data_args, ALL), "no positive")


def test_too_few_rows_are_refused(data_args, stops):
    data_args.validation_samples = 70
    stops(lambda: data.load_reviews(data_args, ALL), "too few", "--validation-samples")


def test_unknown_labels_are_named(data_args, reviews_folder, stops):
    table = pd.read_parquet(reviews_folder / "train.parquet")
    table["label"] = table["label"].map({0: "1 star", 1: "5 stars"})
    table.to_parquet(reviews_folder / "train.parquet")
    stops(lambda: data.load_reviews(data_args, ALL), "'1 star'", "negative and positive")


def test_unknown_columns_are_named(data_args, reviews_folder, stops):
    pd.DataFrame({"body": ["a"], "stars": [1]}).to_parquet(reviews_folder / "train.parquet")
    stops(lambda: data.load_reviews(data_args, ALL), "body, stars", "text and label")


def test_a_folder_without_a_test_file_and_a_missing_folder_are_told_apart(data_args, reviews_folder, stops):
    (reviews_folder / "test.parquet").unlink()
    stops(lambda: data.load_reviews(data_args, ALL), "no test file")
    data_args.dataset = "./nowhere"
    stops(lambda: data.load_reviews(data_args, ALL), "does not exist")


def test_only_files_named_for_a_split_are_read(data_args, reviews_folder):
    before = data.load_reviews(data_args, ALL).fingerprints
    for name in ("train_predictions.parquet", "testament.parquet", "train.parquet.bak"):
        (reviews_folder / name).write_bytes((reviews_folder / "train.parquet").read_bytes())
    assert data.load_reviews(data_args, ALL).fingerprints == before


def test_parts_of_a_split_are_joined_in_order(data_args, reviews_folder):
    before = data.load_reviews(data_args, ALL).fingerprints
    table = pd.read_parquet(reviews_folder / "train.parquet")
    (reviews_folder / "train.parquet").unlink()
    table.iloc[:30].to_parquet(reviews_folder / "train-00000-of-00002.parquet")
    table.iloc[30:].to_parquet(reviews_folder / "train-00001-of-00002.parquet")
    assert data.load_reviews(data_args, ALL).fingerprints == before


def test_a_split_in_two_formats_is_refused(data_args, reviews_folder, stops):
    pd.read_parquet(reviews_folder / "test.parquet").to_csv(reviews_folder / "test.csv", index=False)
    stops(lambda: data.load_reviews(data_args, ALL), "several formats", "test.csv, test.parquet")


def test_a_csv_with_unquoted_commas_is_refused_instead_of_losing_text(data_args, reviews_folder, stops):
    (reviews_folder / "train.parquet").unlink()
    rows = "\n".join(f"first half {row}, rest,{row % 2}" for row in range(60))
    (reviews_folder / "train.csv").write_text(f"text,label\n{rows}\n")
    stops(lambda: data.load_reviews(data_args, ALL), "train.csv", "cannot be read")


@pytest.mark.parametrize("text", [b"bytes", ["a", "list"]])
def test_text_that_is_no_text_is_refused(stops, text):
    stops(lambda: data._clean(pd.DataFrame({"text": [text], "label": 1}), "train"), "bytes or lists")


def test_a_file_instead_of_its_folder_is_named(data_args, reviews_folder, stops):
    data_args.dataset = str(reviews_folder / "train.parquet")
    stops(lambda: data.load_reviews(data_args, ALL), "is a file", "the folder")


def test_a_broken_file_is_named(data_args, reviews_folder, stops):
    (reviews_folder / "train.parquet").write_bytes(b"PAR1 no")
    stops(lambda: data.load_reviews(data_args, ALL), "train.parquet", "cannot be read")


def test_without_the_hub_one_sentence_says_what_to_pass_instead(data_args, stops, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    data_args.dataset = "stanfordnlp/imdb"
    stops(lambda: data.load_reviews(data_args, ALL), "stanfordnlp/imdb", "--dataset a folder")
