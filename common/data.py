"""Reviews: load, clean, de-duplicate, split, draw stratified subsets; every review has a stable example_id."""

import argparse
import hashlib
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from common import hub
from common.settings import stop

LABELS = ("negative", "positive")  # their index is the label: 0, 1
UNLABELLED = -1
MIN_TRAIN = 16
# What people call the three files, and the columns, elsewhere (the IMDB CSV of Kaggle has "review" and "sentiment").
FILE_NAMES = {
    "train": ("train",),
    "test": ("test",),
    "transfer": ("unsupervised", "unlabelled", "unlabeled", "transfer"),
}
SUFFIXES = (".parquet", ".csv", ".json", ".jsonl")
TEXT_COLUMNS = ("text", "review", "sentence")
LABEL_COLUMNS = ("label", "sentiment")
LABEL_VALUES = {
    **dict.fromkeys(("0", "0.0", "negative", "neg"), 0),
    **dict.fromkeys(("1", "1.0", "positive", "pos"), 1),
    **dict.fromkeys(("-1", "-1.0", "", "nan", "none", "<na>"), UNLABELLED),
}


@dataclass(frozen=True)
class Reviews:
    """Four tables with the columns example_id, text, label (transfer: label -1); those not asked for are empty."""

    train: pd.DataFrame
    validation: pd.DataFrame
    transfer: pd.DataFrame
    test: pd.DataFrame
    fingerprints: dict[str, str]  # of what was read, by split, before any subset


def load_reviews(args: argparse.Namespace, reads: tuple[str, ...]) -> Reviews:
    """Load the splits named in `reads` (train, transfer, test) and draw the subsets that the flags ask for.

    Test texts are removed from train and transfer, train texts from transfer, duplicates and empty texts from both;
    test stays as it is. Validation is drawn from train before --max-train-samples, so that it is the same for all.
    """
    name = args.dataset
    # The test split is read even where only train is asked for: its texts must leave train and transfer.
    needed = list(dict.fromkeys((*reads, "test")))
    read = _read_folder(Path(name), needed) if Path(name).is_dir() else _read_hub(name, needed)
    splits = {split: _clean(table, split) for split, table in read.items()}
    fingerprints = {f"dataset/{split}": fingerprint(table) for split, table in splits.items()}

    seen = set(splits["test"]["text"].str.lower())
    for split in ("train", "transfer"):
        if split in splits:
            splits[split] = _without_repeats(splits[split], seen, split)
            seen |= set(splits[split]["text"].str.lower())

    nothing = splits["test"].iloc[:0]
    train = validation = nothing
    if "train" in reads:
        train, validation = _split_train(splits["train"], args.validation_samples, args.max_train_samples, args.seed)
    transfer = splits["transfer"] if "transfer" in reads else nothing
    if "transfer" in reads and args.max_transfer_samples:
        transfer = transfer.iloc[np.sort(stratified_order(transfer["label"], args.seed)[: args.max_transfer_samples])]
    test = nothing
    if "test" in reads:
        test = stratified_subset(splits["test"], args.max_test_samples, args.seed, "test")
    print(
        f"reviews: train {len(train):,}, validation {len(validation):,}, transfer {len(transfer):,}, test {len(test):,}"
    )
    tables = (table.reset_index(drop=True) for table in (train, validation, transfer, test))
    return Reviews(*tables, fingerprints=fingerprints)


def stratified_order(labels: pd.Series | np.ndarray, seed: int) -> np.ndarray:
    """Row numbers shuffled so that every prefix holds each class in its share, to within one review.

    Prefixes of one seed are nested: the 500 reviews of a small run are among the 2,000 of a larger one.
    """
    labels = np.asarray(labels)
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = pd.Series(labels[shuffled]).groupby(labels[shuffled])
    place = (by_class.cumcount() + 0.5) / by_class.transform("size")
    return shuffled[np.argsort(place.to_numpy(), kind="stable")]


def stratified_subset(table: pd.DataFrame, n: int | None, seed: int, split: str) -> pd.DataFrame:
    """`n` rows (None: all) with the classes in their shares, in the table's order; both classes must be there."""
    if n is not None and n < len(table):
        table = table.iloc[np.sort(stratified_order(table["label"], seed)[:n])]
    missing = [name for label, name in enumerate(LABELS) if not (table["label"] == label).any()]
    if missing:
        stop(f"the {len(table)} {split} reviews hold no {' and no '.join(missing)} one: a model needs both classes")
    return table


def _split_train(
    table: pd.DataFrame, n_validation: int, n_train: int | None, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    if len(table) < n_validation + MIN_TRAIN:
        stop(f"train has {len(table)} reviews: too few for --validation-samples {n_validation} and {MIN_TRAIN} more")
    if n_train is not None and n_train < MIN_TRAIN:
        stop(f"--max-train-samples {n_train} is too few to train on: pass at least {MIN_TRAIN}")
    if n_validation < MIN_TRAIN:
        stop(f"--validation-samples {n_validation} is too few to choose by: pass at least {MIN_TRAIN}")
    order = stratified_order(table["label"], seed)
    validation = stratified_subset(table.iloc[np.sort(order[:n_validation])], None, seed, "validation")
    # The rest keeps the shuffled order, so that a prefix of train is never one class, whatever reads it.
    return stratified_subset(table.iloc[order[n_validation:][:n_train]], None, seed, "train"), validation


def _read_folder(folder: Path, needed: list[str]) -> dict[str, pd.DataFrame]:
    """Each split's files: train.csv, or parts like train-00000-of-00002.parquet, joined in order of name."""
    found = {}
    for split in needed:
        named = re.compile(rf"({'|'.join(FILE_NAMES[split])})([-_]?\d+(-of-\d+)?)?", re.IGNORECASE)
        files = [file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES and named.fullmatch(file.stem)]
        if len({file.suffix for file in files}) > 1:
            stop(f"{folder} has {split} in several formats ({', '.join(file.name for file in files)}): keep one")
        if files:
            found[split] = pd.concat([_read_file(file) for file in files], ignore_index=True)
        elif split == "transfer":
            print(f"{folder} has no unlabelled reviews (unsupervised.*): the transfer set is empty")
            found[split] = pd.DataFrame({"text": [], "label": []})
        else:
            stop(f"{folder} has no {split} file: name it {split}.parquet, {split}.csv or {split}.jsonl")
    return found


def _read_file(file: Path) -> pd.DataFrame:
    try:
        if file.suffix == ".parquet":
            return pd.read_parquet(file)
        if file.suffix == ".csv":
            with warnings.catch_warnings():  # a row with more cells than the header: an unquoted comma in its text
                warnings.simplefilter("error", pd.errors.ParserWarning)
                # "NA" and "null" are words of reviews; no column is an index
                return pd.read_csv(file, dtype=str, keep_default_na=False, index_col=False)
        lines = file.suffix == ".jsonl" or file.read_text(encoding="utf-8").lstrip()[:1] == "{"
        return pd.read_json(file, lines=lines, dtype=False, convert_dates=False)
    except (ValueError, OSError, pd.errors.ParserWarning) as problem:  # pandas' and pyarrow's errors are ValueErrors
        stop(f"{file} cannot be read as {file.suffix[1:]}: {str(problem).splitlines()[0]}")


def _read_hub(name: str, needed: list[str]) -> dict[str, pd.DataFrame]:
    """Each split of a dataset on the model hub (or in its cache), by the `datasets` library."""
    if Path(name).is_file():
        stop(f"{name} is a file: pass --dataset the folder that holds it, with train and test files")
    if name.count("/") != 1 or name.startswith((".", "/")):
        stop(f"the dataset folder {name} does not exist: pass --dataset a folder or a hub name like stanfordnlp/imdb")
    import datasets

    datasets.utils.logging.disable_progress_bar()
    instead = "pass --dataset a folder of parquet or CSV files"
    try:
        with hub.explained(f"the dataset {name}", instead):
            tables = datasets.load_dataset(name)
    # DatasetsError: a file that is no table; RuntimeError: a dataset that is a script
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as problem:
        stop(f"the dataset {name} cannot be read ({hub.reason(problem)}): {instead}")
    found = {}
    for split in needed:
        parts = [tables[key].to_pandas() for key in tables if key in FILE_NAMES[split]]
        if not parts and split != "transfer":
            stop(f"the dataset {name} has no {split} split: pass --dataset a folder with a {split} file")
        if not parts:
            print(f"the dataset {name} has no unlabelled reviews (unsupervised): the transfer set is empty")
        found[split] = pd.concat(parts) if parts else pd.DataFrame({"text": [], "label": []})
    return found


def _clean(table: pd.DataFrame, split: str) -> pd.DataFrame:
    """One table with example_id, text (no <br />, single spaces) and label (0, 1 or -1)."""
    text_column = next((name for name in TEXT_COLUMNS if name in table), None)
    label_column = next((name for name in LABEL_COLUMNS if name in table), None)
    if text_column is None or label_column is None and split != "transfer":
        stop(f"the {split} reviews have the columns {', '.join(map(str, table.columns))}: name them text and label")
    missing = table[text_column].isna()
    if table.loc[~missing, text_column].map(lambda text: isinstance(text, bytes | list | dict | np.ndarray)).any():
        stop(f"the {split} reviews hold bytes or lists where text should be: decode them to strings first")
    texts = ["" if absent else str(text) for text, absent in zip(table[text_column], missing)]
    # split() and join() are 2x faster than a regular expression for white space over 100,000 reviews.
    texts = [" ".join(text.replace("<br />", " ").replace("<br>", " ").replace("<br/>", " ").split()) for text in texts]
    labels = UNLABELLED if split == "transfer" else _parse_labels(table[label_column], split)
    ids = [f"{split}/{row:05d}" for row in range(len(texts))]
    cleaned = pd.DataFrame({"example_id": ids, "text": texts, "label": labels}).astype(
        {"text": "str", "label": "int64"}
    )
    if split != "test":
        empty = cleaned["text"] == ""
        if empty.any():
            print(f"{split}: {empty.sum()} reviews without text left out")
        cleaned = cleaned[~empty]
    return cleaned


def _parse_labels(column: pd.Series, split: str) -> np.ndarray:
    words = column.astype(str).str.strip().str.lower()
    labels = words.map(LABEL_VALUES)
    if labels.isna().any():
        unknown = column[labels.isna()].astype(str).unique()[:3]
        stop(f"the {split} labels include {', '.join(map(repr, unknown))}: use 0 and 1, or negative and positive")
    if (labels == UNLABELLED).any():
        stop(f"{(labels == UNLABELLED).sum()} {split} reviews have no label: move them to an unsupervised file")
    return labels.to_numpy(dtype=np.int64)


def _without_repeats(table: pd.DataFrame, seen: set[str], split: str) -> pd.DataFrame:
    keys = table["text"].str.lower()
    known, repeated = keys.isin(seen), keys.duplicated()
    if known.any() or repeated.any():
        earlier = "test" if split == "train" else "test or train"
        print(
            f"{split}: {known.sum()} reviews that stand in {earlier} and {(repeated & ~known).sum()} repeats left out"
        )
    return table[~known & ~repeated]


def fingerprint(table: pd.DataFrame) -> str:
    """SHA-256 over ids, texts and labels of a split, in order."""
    digest = hashlib.sha256("\0".join(table["example_id"]).encode())
    digest.update("\0".join(table["text"]).encode("utf-8", "surrogatepass"))
    digest.update(table["label"].to_numpy().tobytes())
    return digest.hexdigest()[:16]
