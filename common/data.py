"""Reviews from the file to the padded batch: read, clean, split and draw them; then token ids, dataset, padding."""

import argparse
import hashlib
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pyarrow.parquet import ParquetFile

from common import hub
from common.settings import stop

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

LABELS = ("negative", "positive")  # their index is the label: 0, 1
UNLABELLED = -1
MIN_TRAIN = 16
# Sun et al. 2019 (How to Fine-Tune BERT), 5.3.1: on IMDB 128 head and 382 tail tokens beat 510 tokens of either.
HEAD_SHARE = 0.25
# Common names of the three files and of the columns. Kaggle's IMDB CSV has "review" and "sentiment".
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
    """Tables with the columns example_id, text and label (-1 in transfer). A split that is not read is empty."""

    train: pd.DataFrame
    validation: pd.DataFrame
    transfer: pd.DataFrame
    test: pd.DataFrame
    fingerprints: dict[str, str]  # by split, taken before subsets are drawn


def load_reviews(args: argparse.Namespace, reads: tuple[str, ...]) -> Reviews:
    """Load the splits named in `reads` (train, transfer, test) and draw the subsets that the flags ask for.

    Test texts leave train and transfer, and train texts leave transfer. Both lose duplicates and empty texts. Test
    stays as it is. Validation is drawn before --max-train-samples, so it is the same for every number of samples.
    """
    name, seed = args.dataset, args.seed
    needed = list(dict.fromkeys((*reads, "test")))  # always test, because its texts leave train and transfer
    tables = _read_folder(Path(name), needed) if Path(name).is_dir() else _read_hub(name, needed)
    splits = {split: _clean(table, split) for split, table in tables.items()}
    fingerprints = {f"dataset/{split}": fingerprint(table) for split, table in splits.items()}

    seen = set(splits["test"]["text"].str.lower())
    for split in ("train", "transfer"):
        if split in splits:
            splits[split] = _without_repeats(splits[split], seen, split)
            seen |= set(splits[split]["text"].str.lower())

    train = validation = transfer = test = splits["test"].iloc[:0]
    if "train" in reads:
        train, validation = _split_train(splits["train"], args.validation_samples, args.max_train_samples, seed)
    if "transfer" in reads:
        transfer = splits["transfer"]
        transfer = transfer.iloc[np.sort(stratified_order(transfer["label"], seed)[: args.max_transfer_samples])]
    if "test" in reads:
        test = stratified_subset(splits["test"], args.max_test_samples, seed, "test")
    subsets = {"train": train, "validation": validation, "transfer": transfer, "test": test}
    print("reviews:", ", ".join(f"{split} {len(table):,}" for split, table in subsets.items()))
    subsets = {split: table.reset_index(drop=True) for split, table in subsets.items()}
    return Reviews(**subsets, fingerprints=fingerprints)


def stratified_order(labels: pd.Series | np.ndarray, seed: int) -> np.ndarray:
    """Row numbers, shuffled so that every prefix holds each class in its share, to within one review.

    Prefixes of one seed are nested: a run on 2,000 reviews includes the 500 of a smaller run.
    """
    labels = np.asarray(labels)
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = pd.Series(labels[shuffled]).groupby(labels[shuffled])
    place = (by_class.cumcount() + 0.5) / by_class.transform("size")
    return shuffled[np.argsort(place.to_numpy(), kind="stable")]


def stratified_subset(table: pd.DataFrame, n: int | None, seed: int, split: str) -> pd.DataFrame:
    """`n` rows (None: all) in the table's order, with each class in its share; stops if a class is missing."""
    if n is not None and n < len(table):
        table = table.iloc[np.sort(stratified_order(table["label"], seed)[:n])]
    missing = [name for label, name in enumerate(LABELS) if not (table["label"] == label).any()]
    if missing:
        stop(f"the {len(table)} {split} reviews contain no {' and no '.join(missing)} one: a model needs both classes")
    return table


def _split_train(table: pd.DataFrame, n_validation: int, n_train: int | None, seed: int) -> tuple[pd.DataFrame, ...]:
    if len(table) < n_validation + MIN_TRAIN:
        stop(f"train has {len(table)} reviews: too few for --validation-samples {n_validation} and {MIN_TRAIN} more")
    if n_train is not None and n_train < MIN_TRAIN:
        stop(f"--max-train-samples {n_train} is too few to train on: pass at least {MIN_TRAIN}")
    if n_validation < MIN_TRAIN:
        stop(f"--validation-samples {n_validation} is too few to choose a checkpoint: pass at least {MIN_TRAIN}")
    order = stratified_order(table["label"], seed)
    validation = stratified_subset(table.iloc[np.sort(order[:n_validation])], None, seed, "validation")
    # Train keeps the shuffled order, so that no prefix of it is of one class.
    return stratified_subset(table.iloc[order[n_validation:][:n_train]], None, seed, "train"), validation


def _read_folder(folder: Path, needed: list[str]) -> dict[str, pd.DataFrame]:
    """The table of each split, from one file (train.csv) or from parts (train-00000-of-00002.parquet)."""
    tables = {}
    for split in needed:
        named = re.compile(rf"({'|'.join(FILE_NAMES[split])})([-_]?\d+(-of-\d+)?)?", re.IGNORECASE)
        files = [file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES and named.fullmatch(file.stem)]
        if len({file.suffix for file in files}) > 1:
            stop(f"{folder} has {split} in several formats ({', '.join(file.name for file in files)}): keep one")
        if files:
            tables[split] = pd.concat([_read_file(file) for file in files], ignore_index=True)
        elif split == "transfer":
            print(f"{folder} has no unlabelled reviews (unsupervised.*): the transfer set is empty")
            tables[split] = pd.DataFrame({"text": [], "label": []})
        else:
            stop(f"{folder} has no {split} file: name it {split}.parquet, {split}.csv or {split}.jsonl")
    return tables


def _read_file(file: Path) -> pd.DataFrame:
    return next(_tables(file))


def _tables(file: Path, size: int | None = None) -> Iterator[pd.DataFrame]:
    """The file's rows as one table, or as tables of `size` rows; stops if it cannot be read.

    JSON is one table, but JSON lines are not.
    """
    try:
        if file.suffix == ".parquet":
            whole = size is None
            yield from (
                [pd.read_parquet(file)] if whole else (b.to_pandas() for b in ParquetFile(file).iter_batches(size))
            )
        elif file.suffix == ".csv":
            # pandas warns of a row with too many cells: its text has an unquoted comma.
            warnings.filterwarnings("error", category=pd.errors.ParserWarning)
            # "NA" and "null" are words of a review, and no column is an index.
            found = pd.read_csv(file, dtype=str, keep_default_na=False, index_col=False, chunksize=size)
            yield from [found] if size is None else found
        else:
            lines = file.suffix == ".jsonl" or file.read_text(encoding="utf-8").lstrip()[:1] == "{"
            options = {"dtype": False, "convert_dates": False, "lines": lines}
            found = pd.read_json(file, **options, chunksize=size if lines else None)
            yield from found if lines and size else [found]
    except (ValueError, OSError, pd.errors.ParserWarning) as problem:  # pandas' and pyarrow's errors are ValueErrors
        stop(f"{file} cannot be read as {file.suffix[1:]}: {hub.reason(problem)}")


def read_in_chunks(file: Path, size: int) -> Iterator[pd.DataFrame]:
    """Tables of at most `size` reviews, with `row` (the number in the file, from 0) and the cleaned `text`."""
    if file.suffix not in SUFFIXES:
        stop(f"{file} is no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file: convert it to one of these")
    first = 0
    for table in _tables(file, size):
        texts = _clean_texts(table, str(file))
        yield pd.DataFrame({"row": range(first, first + len(texts)), "text": texts})
        first += len(texts)


def _read_hub(name: str, needed: list[str]) -> dict[str, pd.DataFrame]:
    """The table of each split of a dataset from the model hub or its cache."""
    import datasets

    if Path(name).is_file():
        stop(f"{name} is a file: pass --dataset the folder that holds it, with train and test files")
    if name.count("/") != 1 or name.startswith((".", "/")):
        stop(f"the dataset folder {name} does not exist: pass --dataset a folder or a hub name like stanfordnlp/imdb")
    datasets.utils.logging.disable_progress_bar()
    remedy = "pass --dataset a folder of parquet or CSV files"
    try:
        with hub.explained(f"the dataset {name}", remedy):
            dataset = datasets.load_dataset(name)
    # DatasetsError: a file that is not a table; RuntimeError: a dataset that is a script
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as problem:
        stop(f"the dataset {name} cannot be read ({hub.reason(problem)}): {remedy}")
    tables = {}
    for split in needed:
        parts = [dataset[key].to_pandas() for key in dataset if key in FILE_NAMES[split]]
        if not parts and split != "transfer":
            stop(f"the dataset {name} has no {split} split: pass --dataset a folder with a {split} file")
        if not parts:
            print(f"the dataset {name} has no unlabelled reviews (unsupervised): the transfer set is empty")
        tables[split] = pd.concat(parts) if parts else pd.DataFrame({"text": [], "label": []})
    return tables


def _clean_texts(table: pd.DataFrame, owner: str) -> list[str]:
    """The text of each row, with single spaces and without line breaks of HTML; "" where there is none."""
    column = next((name for name in TEXT_COLUMNS if name in table), None)
    if column is None:
        stop(
            f"{owner}: none of the columns {', '.join(map(str, table.columns))} is named text: rename the reviews' one"
        )
    missing = table[column].isna()
    if table.loc[~missing, column].map(lambda text: isinstance(text, bytes | list | dict | np.ndarray)).any():
        stop(f"{owner}: bytes or lists stand where text should be: decode them to strings first")
    texts = ("" if absent else str(text) for text, absent in zip(table[column], missing))
    # On 100,000 reviews split() and join() are twice as fast as a regular expression for white space.
    return [" ".join(text.replace("<br />", " ").replace("<br>", " ").replace("<br/>", " ").split()) for text in texts]


def _clean(table: pd.DataFrame, split: str) -> pd.DataFrame:
    """A table with example_id, text (no <br />, single spaces) and label (0, 1 or -1)."""
    label_column = next((name for name in LABEL_COLUMNS if name in table), None)
    if not set(TEXT_COLUMNS) & set(table) or label_column is None and split != "transfer":
        stop(f"the {split} reviews have the columns {', '.join(map(str, table.columns))}: name them text and label")
    texts = _clean_texts(table, f"the {split} reviews")
    labels = UNLABELLED if split == "transfer" else _parse_labels(table[label_column], split)
    ids = [f"{split}/{row:05d}" for row in range(len(texts))]
    cleaned = pd.DataFrame({"example_id": ids, "text": texts, "label": labels})
    cleaned = cleaned.astype({"text": "str", "label": "int64"})
    empty = (cleaned["text"] == "") & (split != "test")
    if empty.any():
        print(f"{split}: left out {empty.sum()} reviews without text")
    return cleaned[~empty]


def _parse_labels(column: pd.Series, split: str) -> np.ndarray:
    labels = column.astype(str).str.strip().str.lower().map(LABEL_VALUES)
    if labels.isna().any():
        unknown = column[labels.isna()].astype(str).unique()[:3]
        stop(f"the {split} labels include {', '.join(map(repr, unknown))}: use 0 and 1, or negative and positive")
    if (labels == UNLABELLED).any():
        stop(f"{(labels == UNLABELLED).sum()} {split} reviews have no label: move them to an unsupervised file")
    return labels.to_numpy(dtype=np.int64)


def _without_repeats(table: pd.DataFrame, seen: set[str], split: str) -> pd.DataFrame:
    keys = table["text"].str.lower()
    known = keys.isin(seen)
    repeated = keys.duplicated() & ~known
    if known.any() or repeated.any():
        earlier = "test" if split == "train" else "test or train"
        print(f"{split}: left out {known.sum()} reviews that {earlier} holds too, and {repeated.sum()} duplicates")
    return table[~known & ~repeated]


def fingerprint(table: pd.DataFrame) -> str:
    """SHA-256 over the ids, texts and labels of a split, in order."""
    digest = hashlib.sha256("\0".join(table["example_id"]).encode())
    digest.update("\0".join(table["text"]).encode("utf-8", "surrogatepass"))
    digest.update(table["label"].to_numpy().tobytes())
    return digest.hexdigest()[:16]


def token_ids(tokenizer: "PreTrainedTokenizerFast", texts: list[str]) -> Iterator[list[int]]:
    """The ids of each text, without special tokens. If a reviewer typed one, it is plain text."""
    for start in range(0, len(texts), 1000):  # Python ints of all 75,000 reviews at once would take gigabytes
        encoded = tokenizer(
            texts[start : start + 1000],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about long texts, which are truncated next
        )
        yield from encoded["input_ids"]


def head_and_tail(ids: list[int], budget: int) -> list[int]:
    """At most `budget` ids: a quarter from the beginning and the rest from the end."""
    if len(ids) <= budget:
        return ids
    head = int(budget * HEAD_SHARE)
    return ids[:head] + ids[len(ids) - (budget - head) :]


def special_ids(tokenizer: "PreTrainedTokenizerFast") -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text. XLNet's all come after it."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = [at for at in range(len(whole)) if whole[at : at + len(bare)] == bare]
    if not bare or not starts:
        stop("the tokenizer reads a text otherwise with special tokens than without: pass a model with another")
    return whole[: starts[0]], whole[starts[0] + len(bare) :]


def encode(tokenizer: "PreTrainedTokenizerFast", texts: list[str], max_length: int) -> list[np.ndarray]:
    """Each text as at most `max_length` int32 ids: the tokenizer's special tokens around head+tail of the review."""
    before, after = special_ids(tokenizer)
    budget = max_length - len(before) - len(after)
    reviews = (head_and_tail(ids, budget) for ids in token_ids(tokenizer, texts))
    return [np.array([*before, *review, *after], dtype=np.int32) for review in reviews]


def pad(ids: list[np.ndarray], pad_id: int) -> tuple["torch.Tensor", "torch.Tensor"]:
    """One (n, longest) int64 tensor of ids, padded at the end, and its attention mask."""
    import torch

    longest = max(map(len, ids))
    padded = np.full((len(ids), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(ids), longest), dtype=np.int64)
    for row, review in enumerate(ids):
        padded[row, : len(review)], mask[row, : len(review)] = review, 1
    return torch.from_numpy(padded), torch.from_numpy(mask)


class ReviewDataset:
    """Token ids and labels by row, with optional arrays such as a teacher's logits and memory-mapped features."""

    def __init__(self, ids: list[np.ndarray], labels: np.ndarray, **arrays: np.ndarray):
        self.ids, self.labels, self.arrays = ids, np.asarray(labels), arrays

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return {"input_ids": self.ids[row], "labels": self.labels[row]} | {k: a[row] for k, a in self.arrays.items()}

    def longest_first(self) -> "ReviewDataset":
        """The same reviews without their arrays, in the order with the least padding: evaluation needs no order."""
        order = sorted(range(len(self)), key=lambda row: -len(self.ids[row]))
        return ReviewDataset([self.ids[row] for row in order], self.labels[order])


class Collator:
    """Pads a micro-batch to its longest review and stacks the other arrays."""

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, rows: list[dict[str, np.ndarray]]) -> dict[str, "torch.Tensor"]:
        import torch

        input_ids, mask = pad([row["input_ids"] for row in rows], self.pad_id)
        others = {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0] if key != "input_ids"}
        return {"input_ids": input_ids, "attention_mask": mask, **others}
