"""Review sets in the forms that people have: each is read as its owner means it, or refused with a remedy."""

import argparse
import gzip
import json
import sys

import datasets
import numpy as np
import pandas as pd
import pytest

from common import data, files

ALL = ("train", "transfer", "test")
WORDS = {0: "negative", 1: "positive", -1: ""}


@pytest.fixture
def form(data_args, reviews_folder, tmp_path):
    """Write the reviews in a form, by a function of folder, split and table; returns the flags that name it."""
    folder = tmp_path / "my reviews"
    folder.mkdir()
    args = argparse.Namespace(**vars(data_args) | {"dataset": str(folder)})

    def write(change, splits=("train", "test", "unsupervised")):
        for split in splits:
            change(folder, split, pd.read_parquet(reviews_folder / f"{split}.parquet"))
        return args

    write.folder, write.expected = folder, data.load_reviews(data_args, ALL)
    return write


def save(name="{}.csv", change=lambda table: table, **options):
    """Write a changed table by pandas, in the format of the file's name."""
    kind = next((kind for kind in ("parquet", "xlsx", "json") if kind in name), "csv")
    way = f"to_{kind}".replace("xlsx", "excel")
    plain = {"orient": "records", "lines": True} if "jsonl" in name else {} if kind == "json" else {"index": False}
    return lambda folder, split, table: getattr(change(table), way)(folder / name.format(split), **plain | options)


def content(name, written):
    return lambda folder, split, table: (folder / name.format(split)).write_bytes(written)


def each(*writers):
    return lambda *form: [write(*form) for write in writers]


def ending(words):
    return lambda table: table.assign(text=table["text"] + words)


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


def without_quotes(folder, split, table):
    """Tabs between the columns, and a quotation mark that only opens."""
    lines = [f"{label}\t{text}" for text, label in table.to_numpy()]
    lines[3] = lines[3].replace("\t", '\t"')
    (folder / f"{split}.tsv").write_text("label\ttext\n" + "\n".join(lines) + "\n", encoding="utf-8")


ONE_A_LINE = ['5" screen, and dull', '"so-so", they said', 'it is 6" wide', "", "fine"]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (None, ["A good film.\nI loved it, all of it.", 'A "bad" one.\n\nHated it.', "fine"]),
        ("text\n" + "\n".join(ONE_A_LINE) + "\n", ONE_A_LINE),
        ('text,label\n"good, and\nlong",1\n"bad, and\nlong",0\n', ["good, and\nlong", "bad, and\nlong"]),
        ('text,label\n5" screen,1\n"so-so" and 6" wide,0\n', ['5" screen', '"so-so" and 6" wide']),
    ],
)
def test_a_quoted_text_of_several_lines_is_one_review_and_a_lone_quotation_mark_is_a_texts_own(
    tmp_path, content, texts
):
    file = tmp_path / "reviews.csv"
    file.write_text(content or pd.DataFrame({"text": texts}).to_csv(index=False))
    assert next(files.tables(file))["text"].tolist() == texts


FORMS = {
    "a backup beside": each(save(), save("{}_2.csv", lambda table: table.assign(label=1)), save("{}.csv.bak")),
    "capital names and another order": save(
        "{}.CSV", lambda table: table.rename(columns={"text": "Review Text", "label": " Sentiment "}).iloc[:, ::-1]
    ),
    "longer names": save("imdb_{}set.csv"),
    "quotation marks alone": without_quotes,
    "semicolons, a byte order mark and Windows line ends": save(
        change=ending(", x; y"), sep=";", encoding="utf-8-sig", lineterminator="\r\n"
    ),
    "UTF-16 from a spreadsheet": save("{}.txt", sep="\t", encoding="utf-16"),
    "cp1252 from a spreadsheet": save(change=ending(" caf\u00e9"), encoding="cp1252"),
    "backslashes before quotes": save(change=ending(', "a, b" c'), doublequote=False, escapechar="\\"),
    "a blank first line": lambda folder, split, table: (folder / f"{split}.csv").write_text("\n" + table.to_csv()),
    "gzipped": save("{}.csv.gz"),
    "zipped": save("{}.csv.zip"),
    "Excel": save("{}.xlsx"),
    "JSON lines named .json": save("{}.json", orient="records", lines=True),
    "JSON columns": save("{}.json"),
    "JSON rows under their names": as_json(lambda rows: {f"-N{number}": row for number, row in enumerate(rows)}),
    "JSON rows under a key": as_json(lambda rows: {"version": 1, "data": rows}),
    "a label tool's lists": as_json(lambda rows: [row | {"label": [row["label"]]} for row in rows]),
    "the hub's cache": in_parts("snapshots/abc/data/{split}-0000{number}-of-00002-5f3a9c11d2b0{number}4aa.parquet"),
    "Spark's folders": in_parts("{split}/part-0000{number}-1a2b3c4d-99ab-c000.snappy.parquet"),
    "numbered parts": in_parts("{split}_{number}.parquet"),
    "Stanford's folders": stanford,
    "save_to_disk": saved,
    "class names the other way round": named_the_other_way,
    "a column of categories": save(
        "{}.parquet", lambda table: table.assign(label=table["label"].map(WORDS).astype("category"))
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_each_form_is_the_same_reviews_as_parquet_files_are(form, name):
    reviews = data.load_reviews(form(FORMS[name]), ALL)
    for split in ("train", "validation", "transfer", "test"):
        made, expected = getattr(reviews, split), getattr(form.expected, split)
        assert made[["label", "example_id"]].equals(expected[["label", "example_id"]])
        for text, original in zip(made["text"], expected["text"]):
            assert original in text.replace('"', "") and len(text) < len(original) + 15


PAIRS = [(" NEGATIVE", "Positive "), ("neg", "pos"), ("Bad", "Good"), ("no", "yes"), ("LABEL_0", "LABEL_1")]
PAIRS += [("f", "t"), (False, True), ("0", "1"), (0.0, 1.0), (-1, 1), ("-1", "+1"), (1, 2), (0, 4)]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_of_labels_is_known_by_its_two_values(form, pair, suffix, capsys):
    def change(table):
        return table.assign(stars=table["label"].map(dict(enumerate(pair)))).drop(columns="label")

    reviews = data.load_reviews(form(save(f"{{}}.{suffix}", change)), ALL)
    assert reviews.train["label"].equals(form.expected.train["label"])
    assert reviews.test["label"].equals(form.expected.test["label"])
    negative, positive = (str(value).strip() for value in pair)
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
    def change(table):
        label = table["label"].map({0: values[0], 1: values[2]})
        return table.assign(label=label.where(table.index % 5 > 0, values[1]))

    args = form(save(change=change), ("train", "test"))
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


def test_a_typed_column_goes_before_common_names_and_of_two_candidates_the_read_one_is_printed(form, stops, capsys):
    def change(table):
        return pd.DataFrame({"review": "x", "Content": table["text"], "stars": 5, "the label": table["label"]})

    args = form(save(change=change))
    args.text_column, args.label_column = "content", "The Label"
    assert data.load_reviews(args, ALL).train.equals(form.expected.train)
    args.label_column = "gold"
    stops(lambda: data.load_reviews(args, ALL), "review, Content, stars, the label", "--label-column gold")
    args.text_column = args.label_column = None
    with pytest.raises(SystemExit):
        data.load_reviews(args, ("test",))
    said = capsys.readouterr()
    assert "test.csv: reads the column review, not Content: pass --text-column to change it" in said.out
    assert "all labels are '5'" in said.err


def test_texts_that_look_like_numbers_and_missing_values_stay_texts_and_blank_rows_are_left_out(form, capsys):
    texts = ["007", "1e5", "NA", "null", "1.50", 'He said "no, never",\nand left']
    blank = pd.DataFrame({"text": ["", " "], "label": ["", ""]})

    def change(table):
        return pd.concat([table.assign(text=[*texts, *table["text"][len(texts) :]]), blank])

    read = data.load_reviews(form(save(change=change)), ALL).test["text"].tolist()
    assert len(read) == 20 and read[:6] == [*texts[:5], 'He said "no, never", and left']
    assert "test: left out 2 reviews without text" in capsys.readouterr().out


def test_each_file_that_is_read_is_printed_with_its_rows_and_what_is_left_out_is_named(form, capsys):
    (form.folder / "old").mkdir()
    data.load_reviews(form(FORMS["a backup beside"]), ALL)
    out = capsys.readouterr().out
    assert "train.csv: 80 rows, train\n" in out and "unsupervised.csv: 30 rows, transfer\n" in out
    assert "left out: old/, test_2.csv, train_2.csv, unsupervised_2.csv\n" in out


def class_folders(folder, split, table):
    for row, (text, label) in enumerate(table.to_numpy()):
        (folder / "txt" / WORDS[label].title()).mkdir(parents=True, exist_ok=True)
        (folder / "txt" / WORDS[label].title() / f"{row}.TXT").write_text(text)


@pytest.mark.parametrize("write", [save("IMDB Dataset.csv"), class_folders])
def test_a_set_without_splits_is_read_whatever_else_lies_there(form, write):
    for name in ("notes.txt", "README.md", ".hidden.csv", "~$a.xlsx", "dataset-metadata.json", "picture.png"):
        (form.folder / name).write_text("{}")
    reviews = data.load_reviews(form(write, ("train",)), ALL)
    assert len(reviews.train) + len(reviews.validation) + len(reviews.test) == 80 and len(reviews.test) > 5
    assert all(("funny" in text) == label for text, label in reviews.test[["text", "label"]].to_numpy())


def test_a_one_column_file_keeps_its_commas(form):
    def write(folder, split, table):
        lines = ["review", *(table["text"] + ", and more")]
        (folder / f"{split}.csv").write_text("\n".join(lines) if split != "train" else table.to_csv(index=False))

    reviews = data.load_reviews(form(write), ("train", "transfer", "test"), scores_test=False)
    assert reviews.test["text"].str.endswith(", and more").all() and len(reviews.test) == 20
    assert np.isin(reviews.transfer["label"], -1).all() and len(reviews.transfer) == 30


REFUSED = {
    "no header line": (save(header=False), ("none is named text", "--text-column", "text,label")),
    "no header line, tabs": (save("{}.txt", ending(", x, y"), sep="\t", header=False), (", x, y, 0, and none",)),
    "an unquoted comma": (content("{}.csv", b"text,label\n" + 60 * b"half, rest,1\n"), ("train.csv", "quote texts")),
    "no labels": (save(change=lambda table: table[["text"]]), ("none is named label", "--label-column")),
    "labels that are lists": (
        as_json(lambda rows: [row | {"label": [row["label"]] * 2} for row in rows]),
        ("lists or objects", "--label-column"),
    ),
    "more labels in one split": (
        save(change=lambda table: table.assign(label=table["label"] + (len(table) == 20))),
        ("'0', '1', '2'", "not clear"),
    ),
    "a missing part": (
        save("{}-00000-of-00002.parquet"),
        ("part 2 of 2", "train-00000-of-00002.parquet"),
    ),
    "a gap in the numbers": (each(save("{}_1.csv"), save("{}_3.csv")), ("lacks part 2",)),
    "years": (each(save("{}_2019.csv"), save("{}_2020.csv")), ("several candidates for train",)),
    "two formats": (each(save(), save("{}.tsv")), ("several candidates for train (train.csv, train.tsv)", "keep one")),
    "no test and a file of another name": (
        each(save("train.csv"), save("holdout.csv")),
        ("has no test file, but holdout.csv", "a fifth of train"),
    ),
    "unlabelled reviews alone": (save("unsup.csv"), ("has no train file (it holds unsup.csv)",)),
    "texts without labels": (save("{}a.txt"), ("has no train file (it holds testa.txt, traina.txt", "text and label")),
    "files of other names": (
        lambda folder, split, table: table.to_csv(folder / f"a{len(table)}.csv", index=False),
        ("several candidates for one table (a20.csv, a30.csv, a80.csv)", "pass one of them as --dataset"),
    ),
    "sets in two folders": (
        lambda *form: [in_parts(f"{name}/{{split}}_{{number}}.parquet")(*form) for name in "ab"],
        ("several review sets (a, b)", "one of these folders"),
    ),
    "an empty folder": (lambda *form: None, ("it holds nothing",)),
    "another alphabet's encoding": (
        save(change=lambda table: table.assign(text="\u0444\u0438\u043b\u044c\u043c"), encoding="cp1251"),
        ("save it as CSV UTF-8",),
    ),
    "a cut gzip": (content("{}.csv.gz", gzip.compress(b"text,label\n" * 99)[:-9]), ("train.csv.gz cannot be read",)),
    "a damaged parquet": (content("{}.parquet", b"PAR1 no"), ("train.parquet cannot be read",)),
    "splits in one JSON": (
        as_json(lambda rows: {"train": rows, "test": rows}),
        ("several tables (train, test)", "a file of its own"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_rightly_is_refused_with_what_is_there_and_a_remedy(form, name, stops):
    write, words = REFUSED[name]
    stops(lambda: data.load_reviews(form(write), ALL), *words)


@pytest.mark.parametrize("name", ["reviews.csv", "reviews.jsonl", "reviews.parquet"])
def test_a_large_file_comes_in_tables_of_few_rows(tmp_path, name):
    save(name)(tmp_path, "", pd.DataFrame({"text": [*"abcde"]}))
    made = [table["text"].tolist() for table in files.tables(tmp_path / name, 2)]
    assert made == [["a", "b"], ["c", "d"], ["e"]]


def test_without_openpyxl_an_excel_file_says_what_to_install(form, stops, monkeypatch):
    args = form(FORMS["Excel"])
    monkeypatch.setitem(sys.modules, "openpyxl", None)  # so importing it fails
    stops(lambda: data.load_reviews(args, ALL), "pip install openpyxl", "CSV UTF-8")


def test_a_name_that_is_nowhere_says_what_a_dataset_may_be(data_args, stops):
    for name in ("./nowhere", "imdb.csv", "C:\\reviews"):
        data_args.dataset = name
        stops(lambda: data.load_reviews(data_args, ALL), name, "does not exist", "stanfordnlp/imdb")


def test_a_hub_name_may_have_a_configuration_and_its_class_names_are_obeyed(data_args, monkeypatch, stops, capsys):
    kinds = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["good", "bad"])}
    )
    splits = {}
    for name in ("train", "validation", "test", "extra"):
        labels = [-1] * 40 if name == "test" else [0, 1] * 20
        rows = {"sentence": [f"{name} {row}" for row in range(40)], "label": labels}
        splits[name] = datasets.Dataset.from_dict(rows, kinds)

    def load_dataset(name, configuration):
        assert name == "some/glue"
        if configuration is None:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['cola', 'sst2']")
        return {"sst2": splits}[configuration]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data_args.dataset = "some/glue:sst2"
    reviews = data.load_reviews(data_args, ("train", "transfer"))
    assert len(reviews.validation) == 20 and len(reviews.train) == 40
    assert all(int(text.split()[1]) % 2 != label for text, label in reviews.train[["text", "label"]].to_numpy())
    assert "left out: extra" in capsys.readouterr().out
    data_args.dataset = "some/glue"
    stops(lambda: data.load_reviews(data_args, ALL), "cola, sst2", "--dataset some/glue:cola")
