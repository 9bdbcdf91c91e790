"""Review sets in the forms that people have: each is read as its owner means it, or refused with a remedy."""

import argparse
import builtins
import gzip
import json
import zipfile

import datasets
import numpy as np
import pandas as pd
import pytest
from conftest import write_reviews

from common import data

ALL = ("train", "transfer", "test")
WORDS = {0: "negative", 1: "positive", -1: ""}


@pytest.fixture
def form(data_args, tmp_path):
    """Write the reviews in a form, by a function of folder, split and table; returns the flags that name it."""
    source = write_reviews(tmp_path / "source")
    folder = tmp_path / "my reviews"
    folder.mkdir()
    data_args.dataset = str(folder)

    def write(change, splits=("train", "test", "unsupervised")):
        for split in splits:
            change(folder, split, pd.read_parquet(source / f"{split}.parquet"))
        return data_args

    expected = argparse.Namespace(**vars(data_args) | {"dataset": str(source)})
    write.expected = data.load_reviews(expected, ALL)
    write.folder = folder
    return write


def csv(name="{}.csv", change=lambda table: table, **options):
    return lambda folder, split, table: change(table).to_csv(folder / name.format(split), index=False, **options)


def ending(words):
    return lambda table: table.assign(text=table["text"] + words)


def json_lines(name):
    return lambda folder, split, table: table.to_json(folder / name.format(split), orient="records", lines=True)


def as_json(content):
    def write(folder, split, table):
        (folder / f"{split}.json").write_text(json.dumps(content(table.to_dict("records"))), encoding="utf-8")

    return write


def in_parts(name):
    def write(folder, split, table):
        for number, part in enumerate((table[:7], table[7:])):
            file = folder / name.format(split=split, number=number)
            file.parent.mkdir(parents=True, exist_ok=True)
            part.to_parquet(file)

    return write


def stanford(folder, split, table):
    for row, (text, label) in enumerate(table.to_numpy()):
        inner = folder / "aclImdb" / ("train/unsup" if label < 0 else f"{split}/{('neg', 'pos')[label]}")
        inner.mkdir(parents=True, exist_ok=True)
        (inner / f"{row:03d}_7.txt").write_text(text, encoding="utf-8")
        (folder / "aclImdb" / "README").write_text("a card")
        (inner.parent / "urls_pos.txt").write_text("http://")


def saved(folder, split, table):
    datasets.disable_progress_bars()
    datasets.Dataset.from_pandas(table, preserve_index=False).save_to_disk(str(folder / split))
    (folder / "dataset_dict.json").write_text("{}")


def named_the_other_way(folder, split, table):
    names = datasets.ClassLabel(names=["positive", "negative"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    flipped = table.assign(label=(1 - table["label"]).where(table["label"] >= 0, -1))
    made = datasets.Dataset.from_pandas(flipped, features=features, preserve_index=False)
    made.to_parquet(str(folder / f"{split}.parquet"))


def zipped(folder, split, table):
    with zipfile.ZipFile(folder / f"{split}.csv.zip", "w") as archive:
        archive.writestr("some.csv", table.to_csv(index=False))


def without_quotes(folder, split, table):
    """Tabs between the columns, and a quotation mark that only opens."""
    lines = [f"{label}\t{text}" for text, label in table.to_numpy()]
    lines[3] = lines[3].replace("\t", '\t"')
    (folder / f"{split}.tsv").write_text("label\ttext\n" + "\n".join(lines) + "\n", encoding="utf-8")


FORMS = {
    "other files beside": lambda *form: (csv()(*form), csv("{}_predictions.csv")(*form), csv("{}.csv.bak")(*form)),
    "a backup beside": lambda *form: (csv()(*form), csv("{}_2.csv", lambda table: table.assign(label=1))(*form)),
    "the order of columns": csv(change=lambda table: table[["label", "text"]]),
    "capital names": csv("{}.CSV", lambda table: table.rename(columns={"text": "Review Text", "label": " Sentiment "})),
    "longer names": csv("imdb_{}.csv"),
    "tabs": csv("{}.tsv", sep="\t"),
    "tabs in .txt": csv("{}.txt", sep="\t"),
    "quotation marks alone": without_quotes,
    "semicolons": csv(change=ending(", x; y"), sep=";"),
    "a byte order mark and Windows line ends": csv(encoding="utf-8-sig", lineterminator="\r\n"),
    "UTF-16 from a spreadsheet": csv("{}.txt", sep="\t", encoding="utf-16"),
    "cp1252 from a spreadsheet": csv(
        change=lambda table: table.assign(text=table["text"] + " caf\u00e9"), encoding="cp1252"
    ),
    "backslashes before quotes": csv(change=ending(', a "one"'), doublequote=False, escapechar="\\"),
    "gzipped": csv("{}.csv.gz"),
    "zipped": zipped,
    "Excel": lambda folder, split, table: table.to_excel(folder / f"{split}.xlsx", index=False),
    "JSON lines": lambda folder, split, table: table.to_json(folder / f"{split}.jsonl", orient="records", lines=True),
    "JSON lines named .json": lambda folder, split, table: table.to_json(
        folder / f"{split}.json", orient="records", lines=True
    ),
    "JSON columns": lambda folder, split, table: table.to_json(folder / f"{split}.json"),
    "JSON records": as_json(lambda rows: rows),
    "JSON under a key": as_json(lambda rows: {"version": 1, "data": rows}),
    "the hub's layout": in_parts("plain_text/{split}-0000{number}-of-00002.parquet"),
    "the hub's converted layout": in_parts("default/{split}/000{number}.parquet"),
    "the hub's cache": in_parts("snapshots/abc/data/{split}-0000{number}-of-00002.parquet"),
    "numbered parts": in_parts("{split}_{number}.parquet"),
    "Stanford's folders": stanford,
    "save_to_disk": saved,
    "class names the other way round": named_the_other_way,
    "a column of categories": lambda folder, split, table: table.assign(
        label=table["label"].map(WORDS).astype("category")
    ).to_parquet(folder / f"{split}.parquet"),
}


@pytest.mark.parametrize("name", FORMS)
def test_each_form_is_the_same_reviews_as_parquet_files_are(form, name):
    reviews = data.load_reviews(form(FORMS[name]), ALL)
    for split in ("train", "validation", "transfer", "test"):
        made, expected = getattr(reviews, split), getattr(form.expected, split)
        assert made["label"].tolist() == expected["label"].tolist()
        assert made["example_id"].tolist() == expected["example_id"].tolist()
        for text, original in zip(made["text"], expected["text"]):
            assert original in text.replace('"', "") and len(text) < len(original) + 15


PAIRS = {
    "words": (" NEGATIVE", "Positive "),
    "short words": ("neg", "pos"),
    "numbers": ("0", "1"),
    "floats": (0.0, 1.0),
    "signs": (-1, 1),
    "signs in text": ("-1", "+1"),
    "from one": (1, 2),
    "four": (0, 4),
    "booleans": (False, True),
    "names of transformers": ("LABEL_0", "LABEL_1"),
    "good": ("Bad", "Good"),
    "yes": ("no", "yes"),
}


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_of_labels_is_known_by_its_two_values(form, pair, suffix, capsys):
    def write(folder, split, table):
        table = table.assign(stars=table.pop("label").map(dict(enumerate(PAIRS[pair]))))
        file = folder / f"{split}.{suffix}"
        table.to_csv(file, index=False) if suffix == "csv" else table.to_json(file, orient="records", lines=True)

    reviews = data.load_reviews(form(write), ALL)
    assert reviews.train["label"].equals(form.expected.train["label"])
    assert reviews.test["label"].equals(form.expected.test["label"])
    negative, positive = (str(value).strip() for value in PAIRS[pair])
    printed = f"labels: {negative} is negative, {positive} is positive"
    assert (printed in capsys.readouterr().out) == (negative.lower() not in ("neg", "negative", "bad"))


@pytest.mark.parametrize(
    ("values", "flags"),
    [
        ((1, 3, 5), (["1", "2"], ["4", "5.0"])),
        (("Negative", "Neutral", "Positive"), (["negative"], ["POSITIVE"])),
        ((-1, 0, 1), (["-1"], ["1"])),
        (("Olumsuz", "x", "Olumlu"), (["olumsuz"], ["OLUMLU"])),
    ],
)
def test_labels_of_several_classes_are_refused_until_flags_name_two_and_the_rest_is_left_out_with_a_count(
    form, stops, capsys, values, flags
):
    def write(folder, split, table):
        label = table["label"].map({0: values[0], 1: values[2]}).where(table.index % 5 > 0, values[1])
        table.assign(label=label).to_csv(folder / f"{split}.csv", index=False)

    args = form(write, ("train", "test"))
    stops(lambda: data.load_reviews(args, ALL), repr(str(values[1])), "--negative-labels", "--positive-labels")
    args.negative_labels, args.positive_labels = flags
    reviews = data.load_reviews(args, ALL)
    assert len(reviews.train) + len(reviews.validation) == 64 and len(reviews.test) == 16
    labels = form.expected.train.set_index("example_id")["label"]
    for example_id, label in reviews.train[["example_id", "label"]].to_numpy():
        assert labels.get(example_id, label) == label
    assert "train: left out 16 reviews with other labels" in capsys.readouterr().out
    args.negative_labels = ["nothing"]
    stops(lambda: data.load_reviews(args, ALL), "no review has a label of --negative-labels", repr(str(values[2])))


def test_a_pair_holds_only_if_all_splits_together_have_these_two_values(form, stops):
    half = csv(change=lambda table: table.assign(label=table["label"] + 1 if len(table) == 20 else table["label"]))
    stops(lambda: data.load_reviews(form(half, ("train", "test")), ALL), "'0', '1', '2'", "not clear")


def test_a_typed_column_goes_before_common_names_and_of_two_candidates_the_read_one_is_printed(form, stops, capsys):
    def change(table):
        return pd.DataFrame({"review": "x", "Content": table["text"], "stars": 5, "the label": table["label"]})

    args = form(csv(change=change))
    args.text_column, args.label_column = "content", "The Label"
    assert data.load_reviews(args, ALL).train.equals(form.expected.train)
    args.label_column = "gold"
    stops(lambda: data.load_reviews(args, ALL), "review, Content, stars, the label", "--label-column gold")
    args.text_column = args.label_column = None
    with pytest.raises(SystemExit):
        data.load_reviews(args, ("test",))
    said = capsys.readouterr()
    assert "test.csv: reads the column review, not Content; --text-column changes it" in said.out
    assert "all labels are '5'" in said.err


def test_texts_that_look_like_numbers_and_missing_values_stay_texts(form):
    texts = ["007", "1e5", "NA", "null", "1.50", 'He said "no, never",\nand left']

    def write(folder, split, table):
        table["text"] = [*texts, *table["text"][len(texts) :]]
        table.to_csv(folder / f"{split}.csv", index=False)

    assert data.load_reviews(form(write), ALL).test["text"].tolist()[:6] == [
        *texts[:5],
        'He said "no, never", and left',
    ]


def test_blank_rows_are_left_out_with_a_count(form, capsys):
    blank = pd.DataFrame({"text": ["", " "], "label": ["", ""]})
    reviews = data.load_reviews(form(csv(change=lambda table: pd.concat([table, blank]))), ALL)
    assert reviews.train.equals(form.expected.train) and reviews.test.equals(form.expected.test)
    assert "test: left out 2 reviews without text" in capsys.readouterr().out


def test_each_file_that_is_read_is_printed_with_its_rows_and_a_left_out_one_is_named(form, capsys):
    data.load_reviews(form(FORMS["a backup beside"]), ALL)
    out = capsys.readouterr().out
    assert "train.csv: 80 rows, train\n" in out and "unsupervised.csv: 30 rows, transfer\n" in out
    assert "left out: test_2.csv, train_2.csv, unsupervised_2.csv\n" in out


def only_train(name, **options):
    return lambda folder, split, table: split == "train" and csv(name, **options)(folder, split, table)


REFUSED = {
    "no header line": (csv(header=False), ("none is named text", "--text-column", "text,label")),
    "an unquoted comma": (
        lambda folder, split, table: (folder / f"{split}.csv").write_text("text,label\n" + 60 * "first half, rest,1\n"),
        ("train.csv cannot be read", "quote texts"),
    ),
    "no labels": (csv(change=lambda table: table[["text"]]), ("none is named label", "--label-column")),
    "a missing part": (
        lambda folder, split, table: table.to_parquet(folder / f"{split}-00000-of-00002.parquet"),
        ("part 2 of 2", "train-00000-of-00002.parquet"),
    ),
    "a gap in the numbers": (lambda *form: (csv("{}_1.csv")(*form), csv("{}_3.csv")(*form)), ("lacks part 2",)),
    "two formats": (
        lambda *form: (csv()(*form), csv("{}.tsv", sep="\t")(*form)),
        ("several candidates for train (train.csv, train.tsv)", "keep one"),
    ),
    "two versions": (lambda *form: (csv("{}_old.csv")(*form), csv("{}_new.csv")(*form)), ("several candidates",)),
    "two validation files": (
        lambda *form: (csv()(*form), only_train("dev.csv")(*form), only_train("valid.csv")(*form)),
        ("several candidates for validation",),
    ),
    "no test and a file of another name": (
        lambda *form: (only_train("train.csv")(*form), only_train("holdout.csv")(*form)),
        ("has no test file, but holdout.csv", "a fifth of train"),
    ),
    "no train": (
        lambda folder, split, table: split == "test" and csv()(folder, split, table),
        ("has no train file (it holds test.csv)", "pass --dataset"),
    ),
    "files of other names": (
        lambda folder, split, table: table.to_csv(folder / f"a{len(table)}.csv", index=False),
        ("several candidates for one table (a20.csv, a30.csv, a80.csv)", "pass one of them as --dataset"),
    ),
    "sets in two folders": (
        lambda folder, split, table: [
            ((folder / name).mkdir(exist_ok=True), csv()(folder / name, split, table)) for name in "ab"
        ],
        ("several review sets (a, b)", "one of these folders"),
    ),
    "old Excel": (lambda folder, split, table: (folder / f"{split}.xls").touch(), ("train.xls", ".csv, .tsv")),
    "an empty folder": (lambda *form: None, ("it holds nothing",)),
    "another alphabet's encoding": (
        csv(change=lambda table: table.assign(text="\u0444\u0438\u043b\u044c\u043c"), encoding="cp1251"),
        ("save it as CSV UTF-8",),
    ),
    "a cut gzip": (
        lambda folder, split, table: (folder / f"{split}.csv.gz").write_bytes(
            gzip.compress(table.to_csv(index=False).encode())[:-9]
        ),
        ("train.csv.gz cannot be read",),
    ),
    "a damaged parquet": (
        lambda folder, split, table: (folder / f"{split}.parquet").write_bytes(b"PAR1 no"),
        ("train.parquet cannot be read",),
    ),
    "splits in one JSON": (
        as_json(lambda rows: {"train": rows, "test": rows}),
        ("several tables (train, test)", "a file of its own"),
    ),
    "labels that are lists": (
        as_json(lambda rows: [row | {"label": [row["label"]]} for row in rows]),
        ("lists or objects", "--label-column"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_rightly_is_refused_with_what_is_there_and_a_remedy(form, name, stops):
    write, words = REFUSED[name]
    stops(lambda: data.load_reviews(form(write), ALL), *words)


def test_folders_of_texts_without_a_split_are_one_set(form):
    def write(folder, split, table):
        for row, (text, label) in enumerate(table.to_numpy()):
            (folder / "txt" / str(label)).mkdir(parents=True, exist_ok=True)
            (folder / "txt" / str(label) / f"{row}.txt").write_text(text)

    reviews = data.load_reviews(form(write, ("train",)), ALL)
    assert len(reviews.train) + len(reviews.validation) + len(reviews.test) == 80 and len(reviews.test) > 5
    assert all(("funny" in text) == label for text, label in reviews.test[["text", "label"]].to_numpy())


def test_without_openpyxl_an_excel_file_says_what_to_install(form, stops, monkeypatch):
    args, real = form(FORMS["Excel"]), builtins.__import__

    def refuse(name, *more, **named):
        if name.startswith("openpyxl"):
            raise ImportError("no openpyxl", name="openpyxl")
        return real(name, *more, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    stops(lambda: data.load_reviews(args, ALL), "pip install openpyxl", "CSV UTF-8")


def test_a_name_that_is_nowhere_says_what_a_dataset_may_be(data_args, stops):
    for name in ("./nowhere", "imdb.csv", "C:\\reviews"):
        data_args.dataset = name
        stops(lambda: data.load_reviews(data_args, ALL), name, "does not exist", "stanfordnlp/imdb")


def test_a_one_column_file_keeps_its_commas(form):
    def write(folder, split, table):
        if split == "train":
            return table.to_csv(folder / "train.csv", index=False)
        (folder / f"{split}.csv").write_text("review\n" + "\n".join(table["text"] + ", and more") + "\n")

    reviews = data.load_reviews(form(write), ("train", "transfer", "test"), scores_test=False)
    assert reviews.test["text"].str.endswith(", and more").all() and len(reviews.test) == 20
    assert np.isin(reviews.transfer["label"], -1).all() and len(reviews.transfer) == 30
