"""--teacher-scores: any LLM's answers for the reviews, read from a file, matched with them, and as log-odds."""

import argparse
import dataclasses
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from common import columns, data, device, files, metrics, scoring, storage
from common.settings import stop

# The columns of a file, from the most informative one on. Names are compared as columns.plain_name does.
LOG_ODDS, P_POSITIVE = "log_odds logodds logit", "p_positive p_pos prob_positive positive_probability"
ANSWERS = "prediction predicted_label answer"  # they come before the reviews' own labels
REMEDY = "these scores cannot teach: check that texts and scores of the file belong together"
NEEDED = "name one of them log_odds, p_positive (0 to 1) or label"
LEAST_P = 1e-4  # APIs round a probability to 0 or 1, whose log-odds are infinite
LABEL_P = 0.95  # of a bare label: LLMs judge 92 to 96 of 100 reviews right; a fitted calibration rescales it


class Teacher(NamedTuple):
    """An LLM that 04b has asked, or one that is known by its scores alone.

    `log_odds` (n,) are by split, in the order of the reviews, and NaN where a validation review has none. Train is
    absent if no loss reads it.
    """

    name: str
    role: str  # what it did for its student, in the card
    log_odds: dict[str, np.ndarray]
    facts: dict
    remedy: str  # if it cannot teach
    measured: dict = {}


def read_file(args: argparse.Namespace, reviews: data.Reviews) -> tuple[data.Reviews, Teacher, dict[str, str]]:
    """The reviews without unlabelled ones that lack a score, the teacher, and fingerprints of what was read of it.

    Sets `args.soft_labels` to "transfer" if labelled reviews learn from their gold label alone.
    Stops, with what is there and what to do, if the file cannot be read or cannot teach.
    """
    file = Path(args.teacher_scores).expanduser()
    if not file.is_file():
        stop(f"{file} is no file: pass --teacher-scores one, as text,p_positive in CSV")
    table = next(files.tables(file), pd.DataFrame())
    by, keys = _keys(table, args, file.name)
    column, scores, to_log_odds = _scores(table, args, file.name)
    found, n_unmatched = _match(by, keys, scores, to_log_odds, reviews, f"{column} of {file.name}")
    counts = {split: int(np.isfinite(odds).sum()) for split, odds in found.items()}
    words = {"transfer": "unlabelled", "train": "labelled", "validation": "validation"}
    shown = [f"{counts[split]:,} of {len(found[split]):,} {word}" for split, word in words.items()]
    print(f"{file.name}: {column} by {by}, for {shown[0]}, {shown[1]} and {shown[2]} reviews")
    if n_unmatched:
        why = "of test, repeated, not drawn, cut, or of another --dataset"
        print(f"{file.name}: {n_unmatched:,} of {len(scores):,} rows match none of these reviews ({why})")
    left_out = len(reviews.transfer) - counts["transfer"]
    reviews = _keep_scored(args, reviews, found, file.name)

    digest = storage.sha256(file)
    of_odds = hashlib.sha256(b"".join(odds.tobytes() for odds in found.values())).hexdigest()
    facts = {"file": str(file), "sha256": digest, "column": str(column), "matched_by": by, "scored": counts}
    facts |= {"transfer_left_out": left_out, "rows_unmatched": n_unmatched}
    role = f"whose scores of the reviews are those of {file.name} ({column})"
    while file.suffix.lower() in (*files.FORMATS, *files.PACKED):  # gpt-4.1.jsonl.gz is gpt-4.1
        file = file.with_suffix("")
    teacher = Teacher(args.teacher_name or file.name, role, found, {"scores": facts}, REMEDY)
    return reviews, teacher, {"teacher-scores/sha256": digest, "teacher-scores/log_odds": of_odds[:16]}


def _keep_scored(
    args: argparse.Namespace, reviews: data.Reviews, found: dict[str, np.ndarray], owner: str
) -> data.Reviews:
    """The reviews without unlabelled ones that lack a score. It changes `found` and `args.soft_labels` accordingly.

    Labelled reviews learn from scores only with --soft-labels all, and only if each of them has one.
    """
    scored, lacking = np.isfinite(found["transfer"]), int(np.isnan(found["train"]).sum())
    if not scored.all():
        print(f"transfer: left out {(~scored).sum():,} reviews without a score")
    if not scored.any() and lacking:
        whose = f"{lacking:,} of {len(reviews.train):,} labelled reviews have none either"
        stop(f"no unlabelled review has a score in {owner}, and {whose}: score the unlabelled ones")
    if scored.any() and (lacking or args.soft_labels == "transfer"):
        args.soft_labels = "transfer"
        del found["train"]
        print("labelled reviews learn from their gold label (--soft-labels transfer)")
    found["transfer"] = found["transfer"][scored]
    return dataclasses.replace(reviews, transfer=reviews.transfer[scored].reset_index(drop=True))


def save_scores(folder: Path, reviews: data.Reviews, log_odds: dict[str, np.ndarray]) -> None:
    """Write the matched scores as an LLM's soft labels are: raw log-probabilities by example_id, one file per split."""
    for split, odds in log_odds.items():
        logs = metrics.log_softmax(metrics.two_logits(odds)).astype(np.float32)
        table = getattr(reviews, split)[["example_id"]].assign(**dict(zip(scoring.LOG_PROBABILITIES, logs.T))).dropna()
        if len(table):
            device.first_alone(partial(storage.write_table, folder / f"{split}.parquet", table))


def _keys(table: pd.DataFrame, args: argparse.Namespace, owner: str) -> tuple[str, pd.Series]:
    """What rows are matched by (text, or else example_id), and that of each row, as duplicates are compared."""
    if not len(table):
        stop(f"{owner} holds no rows: write one a review, as in text,p_positive")
    # A flag for the reviews' own column may name the file's too.
    text = columns.find(table, None, f"{columns.plain_name(args.text_column or '')} {columns.TEXT_NAMES}", owner)
    example_id = columns.find(table, None, "example_id", owner)
    if text is None and example_id is None:
        shown = ", ".join(map(str, table.columns[:12]))
        stop(f"{owner} has the columns {shown}, and none is text or example_id: rename one so")
    by, column = ("example_id", example_id) if text is None else ("text", text)
    texts = data.clean_texts(table[column], owner)
    return by, pd.Series(texts, table.index, dtype="str").str.lower()


def _scores(table: pd.DataFrame, args: argparse.Namespace, owner: str) -> tuple[object, pd.Series, Callable]:
    """The most informative column, its values without failed answers, and the log-odds of such values."""
    typed = columns.plain_name(args.label_column or "")
    names = f"{LOG_ODDS} {P_POSITIVE} {ANSWERS} {typed} {columns.LABEL_NAMES}"
    column = columns.find(table, None, names, owner)
    if column is None:
        shown = ", ".join(map(str, table.columns[:12]))
        stop(f"{owner} has the columns {shown}, and none is a score: {NEEDED}")
    of_p = columns.plain_name(column) in P_POSITIVE.split()
    if of_p or columns.plain_name(column) in LOG_ODDS.split():
        scores, to_log_odds = _numbers(table[column], f"{column} of {owner}", of_p), _logit if of_p else np.asarray
    else:
        scores, to_log_odds = _labels(table[column], args, owner), _label_log_odds
    without = scores.isna()
    if without.all():
        stop(f"{column} of {owner} holds no score: {NEEDED}")
    if without.any():
        print(f"{owner}: left out {without.sum():,} of {len(table):,} rows without a score")
    return column, scores[~without].astype(float), to_log_odds


def _numbers(cells: pd.Series, owner: str, of_p: bool) -> pd.Series:
    """The numbers, NaN where a cell has no digit; stops at another one that is no number or out of range."""
    words = cells.astype(str).str.strip()
    scores = pd.to_numeric(words, errors="coerce").astype(float)
    wrong = scores.isna() & words.str.contains(r"\d")
    if wrong.any():
        cell = f"{wrong.sum():,} of {len(cells):,} cells are no numbers, such as {words[wrong].iloc[0][:40]!r}"
        stop(f"{owner}: {cell}: write numbers such as 0.93, and leave the cell of a failed answer empty")
    if np.isinf(scores).any():
        stop(f"{owner} holds infinite numbers: write finite ones, or p_positive from 0 to 1 instead")
    low, high = scores.min(), scores.max()
    if of_p and (low < 0 or high > 1):
        remedy = "divide a percentage by 100, and name the column of log-odds log_odds"
        stop(f"{owner} goes from {low:g} to {high:g}, and a probability from 0 to 1: {remedy}")
    return scores


def _labels(cells: pd.Series, args: argparse.Namespace, owner: str) -> pd.Series:
    """0, 1 or NaN by the labels that the flags or `columns` know; where LLMs answer in words, others are left out."""
    cells = cells.astype(object).map(lambda cell: cell.strip(" \r\n\t.!*\"'") if isinstance(cell, str) else cell)
    known = set(map(columns.plain_label, cells)) - {""}
    if len(known) == 1:
        stop(f"all labels of {owner} are {known.pop()}: a student needs answers of both classes")
    if len(known) > 2 and (pd.to_numeric(cells.astype(str), errors="coerce") % 1 > 0).any():
        stop(f"{owner} holds fractions in {cells.name}, so no labels: {NEEDED}")
    flags = args.negative_labels, args.positive_labels
    if not known & {columns.plain_label(word) for words in flags for word in words or []}:
        flags = None, None  # they name the reviews' own labels
    pairs = [pair for pair in columns.PAIRS if set(pair) <= known and not any(map(_may_be_a_label, known - set(pair)))]
    if flags == (None, None) and cells.map(np.isscalar).all():  # `number_labels` refuses lists
        if not pairs:
            shown = ", ".join(map(repr, sorted(known)[:8]))
            remedy = "write negative and positive, or name them by --negative-labels and --positive-labels"
            stop(f"the answers in {cells.name} of {owner} are {shown}: {remedy}")
        if known != set(pairs[0]):  # words of a failed answer are no label
            flags = pairs[0][:1], pairs[0][1:]
    labels = columns.number_labels({owner: pd.DataFrame({"label": cells})}, *flags)[owner]["label"]
    return labels.where(labels != columns.UNLABELLED)


def _may_be_a_label(answer: str) -> bool:
    """Whether an answer is no mere word of a failed call: a number, negative or positive."""
    return answer in ("negative", "positive") or answer.lstrip("-").replace(".", "", 1).isdigit()


def _logit(p: pd.Series) -> np.ndarray:
    p = np.clip(p, LEAST_P, 1 - LEAST_P)
    return np.log(p) - np.log1p(-p)


def _label_log_odds(share: pd.Series) -> np.ndarray:
    """A review's log-odds from the share of its answers that say positive; each is right with LABEL_P."""
    return _logit(LABEL_P * share + (1 - LABEL_P) * (1 - share))


def _match(
    by: str, keys: pd.Series, scores: pd.Series, to_log_odds: Callable, reviews: data.Reviews, owner: str
) -> tuple[dict[str, np.ndarray], int]:
    """By split the (n,) log-odds of its reviews, NaN where there are none; and how many rows match no review.

    A review's log-odds are those of its mean score. Stops if no row matches, or if the scores are constant.
    """
    keys = keys[scores.index]
    groups = scores.groupby(keys)
    if several := int((groups.nunique() > 1).sum()):
        print(f"{owner}: {several:,} reviews have several scores, whose mean is used")
    means = groups.mean()
    log_odds = pd.Series(to_log_odds(means), means.index)
    of_reviews = {split: getattr(reviews, split)[by].str.lower() for split in ("train", "validation", "transfer")}
    found = {split: log_odds.reindex(theirs).to_numpy(np.float64) for split, theirs in of_reviews.items()}
    matched = keys.isin(pd.concat(of_reviews.values()))
    if not matched.any():
        example = f"such as {keys.iloc[0][:60]!r}"
        if by == "text":
            how = "compared without case, <br /> and repeated spaces"
            remedy = "check --dataset, and that no text was cut; a file without texts is matched by example_id"
        else:
            how = f"theirs are as {reviews.validation['example_id'].iloc[0]!r}"
            remedy = "check --dataset, or write the texts instead, in a column text"
        stop(f"no {by} beside {owner} ({example}) is one of the reviews' ({how}): {remedy}")
    if np.ptp(log_odds[keys[matched].unique()]) < 1e-6:
        same = f"{owner} is {scores[matched].iloc[0]:g} in each of the {matched.sum():,} rows that match a review"
        stop(f"{same}, of {len(scores):,}: a teacher needs different scores, and texts that were not cut")
    return found, int((~matched).sum())
