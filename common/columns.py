"""What a table of reviews means: which columns are its texts and labels, and which labels are negative and positive."""

import argparse
import re
import textwrap

import numpy as np
import pandas as pd

from common.settings import stop

UNLABELLED = -1
# Names are compared without case. The first one of a table's columns wins.
TEXT_NAMES = "text review sentence content review_text reviewtext review_body body reviews comment tweet document"
TEXT_NAMES += " phrase text_a"
LABEL_NAMES = "label sentiment polarity target class labels category is_positive rating stars star_rating overall score"
SYNONYMS = {
    **dict.fromkeys(("neg", "bad"), "negative"),
    **dict.fromkeys(("pos", "good"), "positive"),
    **dict.fromkeys(("false", "f", "no", "n", "label_0"), "0"),
    **dict.fromkeys(("true", "t", "yes", "y", "label_1"), "1"),
    **dict.fromkeys(("nan", "none", "null", "<na>"), ""),
}
# What a set of exactly two labels means: negative, positive. If all labels of test are -1, it has none.
PAIRS = (("0", "1"), ("-1", "1"), ("1", "2"), ("0", "4"), ("negative", "positive"))


def plain_name(name: object) -> str:
    """A column's name for comparison: "Review Text" is review_text."""
    return re.sub(r"[\s_-]+", "_", str(name).strip(" \t\"'").lower())


def plain_label(label: object) -> str:
    """A label for comparison: without case, outer spaces, decimals and synonyms; "" for none."""
    text = str(label).strip(" \t\r\n\"'").casefold()
    text = re.sub(r"^\+?(-?\d+)(\.0+)?$", r"\1", text)
    return SYNONYMS.get(text, text)


def find(table: pd.DataFrame, typed: str | None, common: str, owner: str, flag: str | None = None) -> object | None:
    """The column that was typed with `flag`, or else the first of the common names; None if there is neither.

    Stops if the typed one is not there. If several could be meant, it prints which one is read.
    """
    if typed is not None:
        if typed not in table and plain_name(typed) not in map(plain_name, table):
            stop(f"{owner} has the columns {_shown(table)}, but not {flag} {typed}: pass one of them")
        return typed if typed in table else next(name for name in table if plain_name(name) == plain_name(typed))
    found = [name for wanted in dict.fromkeys(common.split()) for name in table if plain_name(name) == wanted]
    if len(found) > 1:
        remedy = f"pass {flag}" if flag else "leave that one out"
        print(f"{owner}: reads the column {found[0]}, not {', '.join(map(str, found[1:]))}: {remedy} to change it")
    return found[0] if found else None


def find_text(table: pd.DataFrame, typed: str | None, owner: str) -> object:
    """The column of the texts; stops if there is none."""
    column = find(table, typed, TEXT_NAMES, owner, "--text-column")
    if column is None:
        remedy = "pass --text-column, or let the first line name each column, as in text,label"
        stop(f"{owner} has the columns {_shown(table)}, and none is named text: {remedy}")
    return column


def _shown(table: pd.DataFrame) -> str:
    names = [textwrap.shorten(str(name), 40, placeholder=" ...") or "''" for name in table]
    return ", ".join(names[:30]) + (f" and {len(names) - 30} more" if len(names) > 30 else "") or "(none)"


def text_and_label(table: pd.DataFrame, owner: str, args: argparse.Namespace, split: str) -> pd.DataFrame:
    """The two columns as they stand, or NaN for labels: unlabelled reviews need none, and test may lack them."""
    text, label = find_text(table, args.text_column, owner), None
    lacks = args.label_column is not None and plain_name(args.label_column) not in map(plain_name, table)
    if split == "test" and lacks:
        print(f"{owner} has no column {args.label_column}, so its labels are unknown (it has {_shown(table)})")
    elif split != "transfer":
        label = find(table, args.label_column, LABEL_NAMES, owner, "--label-column")
        if label is None and split != "test":
            remedy = "pass --label-column, or call a file without labels unsupervised"
            stop(f"{owner} has the columns {_shown(table)}, and none is named label: {remedy}")
    labels = None if label is None else list(map(_single, table[label].astype(object)))
    return pd.DataFrame({"text": table[text], "label": pd.Series(labels, table.index, dtype=object)})


def _single(label: object) -> object:
    """The label in a list of one, as label tools write it; any other object as it is."""
    return label[0] if isinstance(label, list | np.ndarray) and len(label) == 1 else label


def number_labels(
    tables: dict[str, pd.DataFrame], negative: list[str] | None, positive: list[str] | None
) -> dict[str, pd.DataFrame]:
    """The tables by split with 0, 1 or -1 as label, by the flags or by the pair that all labels make together.

    With the flags, reviews that have other labels are left out. Stops if the labels are no known pair.
    """
    plain, labels = {}, {}  # of each row by split; as written, by plain label
    for split in (split for split in tables if split != "transfer"):
        try:
            of_split = {plain_label(value): str(value).strip() for value in tables[split]["label"].unique()}
        except TypeError:
            stop(f"the {split} labels are lists or objects, not single values: name another --label-column")
        if not (of_split.keys() <= {"", "-1"} and split == "test"):
            plain[split] = tables[split]["label"].map(plain_label)
            labels |= {name: value for name, value in of_split.items() if name}
    flags = [{plain_label(word) for word in words or []} for words in (negative, positive)]
    meaning = _by_flags(labels, *flags) if any(flags) else _by_pair(labels)
    numbered = dict(tables)
    for split, table in tables.items():
        known = pd.Series(plain.get(split, ""), table.index, dtype=object)
        numbered[split] = table.assign(label=known.map(meaning).fillna(UNLABELLED).astype("int64"))
        others = (numbered[split]["label"] == UNLABELLED) & (known.ne("").any() and any(flags))
        if others.any():
            print(f"{split}: left out {others.sum():,} reviews with other labels")
            numbered[split] = numbered[split][~others]
    return numbered


def _by_flags(labels: dict[str, str], negative: set[str], positive: set[str]) -> dict[str, int]:
    if negative & positive:
        stop(f"--negative-labels and --positive-labels share {', '.join(negative & positive)}: pass it to one of them")
    for flag, asked in (("--negative-labels", negative), ("--positive-labels", positive)):
        if not asked & labels.keys():
            stop(f"no review has a label of {flag}: the labels are {_list(labels)}")
    return dict.fromkeys(negative, 0) | dict.fromkeys(positive, 1)


def _by_pair(labels: dict[str, str]) -> dict[str, int]:
    pair = next((pair for pair in PAIRS if labels.keys() == set(pair)), None)
    if pair:
        if "negative" not in pair:
            print(f"labels: {labels[pair[0]]} is negative, {labels[pair[1]]} is positive")
        return dict(zip(pair, (0, 1)))
    if len(labels) == 1:
        stop(f"all labels are {_list(labels)}: a model needs both classes")
    if labels:
        remedy = "name them, as in --negative-labels 1 2 --positive-labels 4 5"
        stop(f"the labels are {_list(labels)}, and it is not clear which mean negative and positive: {remedy}")
    return {}


def _list(labels: dict[str, str]) -> str:
    values = sorted(labels.values())
    return ", ".join(map(repr, values[:8])) + (f" and {len(values) - 8} more" if len(values) > 8 else "")
