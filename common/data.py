"""Reviews: cleaned, split, and drawn in subsets."""

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from common import columns, files
from common.columns import UNLABELLED
from common.settings import stop

LABELS = ("negative", "positive")  # their index is the label: 0, 1
MIN_REVIEWS = 16  # to train on, and to choose a checkpoint by
MOST_VALIDATION = 2500  # by default: more reviews hardly narrow the choice of a checkpoint


@dataclass(frozen=True)
class Reviews:
    """Tables with the columns example_id, text and label (-1: none). A split that is not read is empty."""

    train: pd.DataFrame
    validation: pd.DataFrame
    transfer: pd.DataFrame
    test: pd.DataFrame
    fingerprints: dict[str, str]  # by split, taken before subsets are drawn


def load_reviews(args: argparse.Namespace, reads: tuple[str, ...], scores_test: bool = True) -> Reviews:
    """Load the splits named in `reads` (train, transfer, test) and draw the subsets that the flags ask for.

    Test texts leave the other splits, validation's leave train, and train's leave transfer. All but test lose
    duplicates and empty texts. Without a test split a fifth of train becomes it. Without a validation split it is drawn
    from train before --max-train-samples, so it is the same for every number of samples. `args.validation_samples`
    becomes a number if it is None. Test may lack labels unless the caller reads and `scores_test`.
    """
    seed = args.seed
    splits = {split: _clean(table, split) for split, table in files.read(args, reads).items()}
    if "test" not in splits:
        splits["train"], splits["test"] = _draw_test(splits["train"])
    labelled, scored = is_labelled(splits["test"]), "test" in reads and scores_test
    if not labelled:
        lack = "the test reviews have no labels, and 05 compares models on them"
        remedy = "add labels to the test file; or pass --dataset a folder without it, and a fifth of train becomes test"
        if scored:
            stop(f"{lack}: {remedy}, in all steps again")
        print(f"warning: {lack}: {remedy}")
    fingerprints = {f"dataset/{split}": fingerprint(table) for split, table in splits.items()}
    if scored or not labelled:  # labels may be added after other steps
        fingerprints["dataset/test texts"] = fingerprint(splits["test"].assign(label=UNLABELLED))
    if not labelled:
        del fingerprints["dataset/test"]
    if "train" in reads and args.validation_samples is None:
        n = len(splits["validation"]) if "validation" in splits else len(splits["train"]) // 10
        args.validation_samples = min(max(n, MIN_REVIEWS), MOST_VALIDATION)

    seen, earlier = set(splits["test"]["text"].str.lower()), ["test"]
    for split in ("validation", "train", "transfer"):
        if split in splits:
            splits[split] = _without_repeats(splits[split], split, seen, earlier)
            seen |= set(splits[split]["text"].str.lower())
            earlier.append(split)

    subsets = dict.fromkeys(("train", "validation", "transfer", "test"), splits["test"].iloc[:0])
    if "train" in reads:
        subsets["train"], subsets["validation"] = _split_train(splits, args)
    if "transfer" in reads:
        order = stratified_order(splits["transfer"]["label"], seed)
        subsets["transfer"] = splits["transfer"].iloc[np.sort(order[: args.max_transfer_samples])]
    if "test" in reads:
        subsets["test"] = splits["test"]
        if labelled:
            subsets["test"] = stratified_subset(splits["test"], args.max_test_samples, seed, "test")
    print("reviews:", ", ".join(f"{split} {len(table):,}" for split, table in subsets.items()))
    subsets = {split: table.reset_index(drop=True) for split, table in subsets.items()}
    return Reviews(**subsets, fingerprints=fingerprints)


def is_labelled(table: pd.DataFrame) -> bool:
    """Whether the reviews have labels; all of a split have, or none."""
    return bool((table["label"] != UNLABELLED).any())


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
        lack = " and no ".join(missing)
        flag = "--validation-samples" if split == "validation" else f"--max-{split}-samples"
        stop(f"the {len(table)} {split} reviews contain no {lack} one, and both are needed: add some, or raise {flag}")
    return table


def _draw_test(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train and test of one table without duplicates; a text stays in its part when rows move or are added."""
    table = _without_repeats(table, "train", set(), [])
    digests = (hashlib.sha256(text.lower().encode("utf-8", "surrogatepass")).digest() for text in table["text"])
    is_test = np.array([int.from_bytes(digest[:8], "big") % 5 == 0 for digest in digests], dtype=bool)
    chosen = f"{is_test.sum():,} of {len(table):,} reviews"
    print(f"there is no test split: a fifth, {chosen}, becomes it, chosen by a hash of the text")
    if (~is_test).sum() < 2 * MIN_REVIEWS or not is_test.any():
        stop(f"{len(table)} reviews are too few for train, validation and test: {3 * MIN_REVIEWS} would do")
    return table[~is_test], table[is_test]


def _split_train(splits: dict[str, pd.DataFrame], args: argparse.Namespace) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train in its shuffled order, so that no prefix of it is of one class, and validation."""
    table, validation = splits["train"], splits.get("validation")
    n_validation, n_train, seed = args.validation_samples, args.max_train_samples, args.seed
    if n_train is not None and n_train < MIN_REVIEWS:
        stop(f"--max-train-samples {n_train} is too few to train on: pass at least {MIN_REVIEWS}")
    if n_validation < MIN_REVIEWS:
        stop(f"--validation-samples {n_validation} is too few to choose a checkpoint: pass at least {MIN_REVIEWS}")
    order = stratified_order(table["label"], seed)
    if validation is None:
        most = len(table) - MIN_REVIEWS
        if most < MIN_REVIEWS:
            stop(f"train has {len(table)} reviews, too few: {2 * MIN_REVIEWS} would do, half of them for validation")
        if n_validation > most:
            stop(f"train has {len(table)} reviews, too few for --validation-samples {n_validation}: {most} would do")
        order, validation = order[n_validation:], table.iloc[np.sort(order[:n_validation])]
    else:
        print("validation is a split of its own: --validation-samples bounds it, and none of train is held out")
        if min(len(validation), len(table)) < MIN_REVIEWS:
            held = f"validation has {len(validation)} reviews and train {len(table)}"
            stop(f"{held}, too few: {MIN_REVIEWS} of each would do; without a validation file it is drawn from train")
    validation = stratified_subset(validation, n_validation, seed, "validation")
    return stratified_subset(table.iloc[order[:n_train]], None, seed, "train"), validation


def read_in_chunks(file: Path, size: int, column: str | None = None) -> Iterator[pd.DataFrame]:
    """Tables of at most `size` reviews, with `row` (the number in the file, from 0) and the cleaned `text`."""
    first, found = 0, ""
    for table in files.tables(file, size):
        if found not in table:  # in most files it is found once
            found = columns.find_text(table, column, str(file))
        texts = clean_texts(table[found], str(file))
        yield pd.DataFrame({"row": range(first, first + len(texts)), "text": texts})
        first += len(texts)


def clean_texts(column: pd.Series, owner: str) -> list[str]:
    """The text of each row, with single spaces and without line breaks of HTML; "" where there is none."""
    missing = column.isna()
    if column[~missing].map(lambda text: isinstance(text, bytes | list | dict | np.ndarray)).any():
        stop(f"{owner}: bytes or lists stand where text should be: decode them to strings first")
    texts = ("" if absent else str(text) for text, absent in zip(column, missing))
    # On 100,000 reviews split() and join() are twice as fast as a regular expression for white space.
    return [" ".join(text.replace("<br />", " ").replace("<br>", " ").replace("<br/>", " ").split()) for text in texts]


def _clean(table: pd.DataFrame, split: str) -> pd.DataFrame:
    """A table with example_id, text (no <br />, single spaces) and label; stops if only some reviews have labels."""
    texts = clean_texts(table["text"], f"the {split} reviews")
    ids = [f"{split}/{row:05d}" for row in table.index]
    cleaned = pd.DataFrame({"example_id": ids, "text": texts, "label": table["label"].to_numpy()})
    cleaned = cleaned.astype({"text": "str", "label": "int64"})
    unlabelled = cleaned["label"] == UNLABELLED
    empty = (cleaned["text"] == "") & (unlabelled | (split != "test"))
    if empty.any():
        print(f"{split}: left out {empty.sum()} reviews without text")
    unlabelled &= ~empty
    if split != "transfer" and unlabelled.any() and (split != "test" or is_labelled(cleaned)):
        stop(f"{unlabelled.sum()} {split} reviews have no label: move them to an unsupervised file")
    return cleaned[~empty]


def _without_repeats(table: pd.DataFrame, split: str, seen: set[str], earlier: list[str]) -> pd.DataFrame:
    keys = table["text"].str.lower()
    known = keys.isin(seen)
    repeated = keys.duplicated() & ~known
    if known.any() or repeated.any():
        shared = f"{known.sum()} reviews that {' or '.join(earlier)} holds too, and " if earlier else ""
        print(f"{split}: left out {shared}{repeated.sum()} duplicates")
    return table[~known & ~repeated]


def fingerprint(table: pd.DataFrame) -> str:
    """SHA-256 over the ids, texts and labels of a split, in order."""
    digest = hashlib.sha256("\0".join(table["example_id"]).encode())
    digest.update("\0".join(table["text"]).encode("utf-8", "surrogatepass"))
    digest.update(table["label"].to_numpy().tobytes())
    return digest.hexdigest()[:16]
