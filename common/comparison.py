"""The benchmark's tables: its rows against each other, cascades and confident errors, from predictions alone."""

import argparse
import shlex
from pathlib import Path

import numpy as np
import pandas as pd

from common import metrics, storage
from common.contenders import BASELINE, CONTROL, EAGER, ENCODER, STUDENTS
from common.data import LABELS
from common.report import COLUMNS, FIELDS, INTERVALS, TOLERATED_LOSS

SHARES = (*np.round(np.arange(0, 0.51, 0.01), 2), 1.0)  # of the reviews that a cascade hands to the teacher
ERRORS = 100  # a model
WORDS = ("better_than_baseline", "recommended")  # what `compare` says in words


def write_tables(args: argparse.Namespace, folder: Path, test: pd.DataFrame, done: list, without: list[dict]) -> None:
    """Write benchmark.csv and the files from which the report is drawn.

    `done` holds (contender, reviews, measured) of each model, `without` the rows without figures.
    """
    predictions, rows, latency, sweep, injection = test[["example_id", "label"]].copy(), [], [], [], []
    for contender, part, measured in done:
        name, (passes, n) = contender.name, measured.latency.shape
        predictions.loc[part.index, name] = metrics.log_odds(measured.logits)
        times = {
            "pass": np.repeat(np.arange(passes) + 1, n),
            "example_id": np.tile(part["example_id"].iloc[:n], passes),
        }
        latency.append(pd.DataFrame({"Model": name, **times, "ms": measured.latency.ravel().round(4)}))
        sweep += [{"Model": name} | row for row in measured.sweep]
        injection += [{"Model": name} | row for row in measured.injection]
        only = metrics.only_class(measured.logits)
        notes = [contender.note, None if only is None else f"it always says {LABELS[only]}"]
        rows.append(measured.row | {"note": "; ".join(filter(None, notes)) or None})
    others = references(done)
    joint, curves = cascades(Path(args.output_dir), done, predictions, others)
    named = (name for column in FIELDS for name in (column, *INTERVALS.get(column, ())))
    columns = list(dict.fromkeys([*COLUMNS, "n", "ci_low", "ci_high", *named]))  # the same in every run; status is last
    table = pd.DataFrame([*rows, *joint, *without], columns=columns)
    table = compare(table.astype(dict.fromkeys(WORDS, object)), predictions, others)
    if args.price_per_hour:
        table["price_per_million"] = (args.price_per_hour / 3600 * 1e6 / table["Throughput (samp/s)"]).round(4)
    empty = pd.DataFrame({"Model": []})
    storage.write_table(folder / "benchmark.csv", table)
    storage.write_table(folder / "predictions.parquet", predictions)
    storage.write_table(folder / "latency.parquet", pd.concat(latency) if latency else empty)
    storage.write_table(folder / "sweep.csv", pd.DataFrame(sweep or empty))
    storage.write_table(folder / "injection.csv", pd.DataFrame(injection or empty))
    storage.write_table(folder / "cascade.csv", pd.concat(curves) if curves else empty)
    storage.write_table(folder / "errors.csv", confident_errors(predictions, test["text"]))


def references(done: list) -> pd.DataFrame:
    """By model, the rows that it is compared with: teacher, control, the better baseline, and eager for a form."""
    measured = {contender.name: result.row["Accuracy"] for contender, _, result in done}
    control = next((one.name for one, _, _ in done if one.kind == CONTROL), None)
    baselines = [one.name for one, _, _ in done if one.kind == BASELINE]
    best = max(baselines, key=measured.get, default=None)
    eager = {one.student.name: one.name for one, _, _ in done if one.kind == EAGER}
    rows = []
    for contender, _, _ in done:
        teacher = contender.teacher.name if contender.teacher and contender.teacher.name in measured else None
        baseline = None if contender.kind == BASELINE else best
        rows.append((teacher, control, baseline, contender.student and eager.get(contender.student.name)))
    return pd.DataFrame(rows, list(measured), ["teacher", "control", "baseline", "eager"])


def cascades(
    root: Path, done: list, predictions: pd.DataFrame, compared_with: pd.DataFrame
) -> tuple[list[dict], list[pd.DataFrame]]:
    """For each student that gains by handing its least sure reviews to its teacher, a row; and every student's curve.

    The joint verdicts become a column of `predictions`, and the row's references a row of `compared_with`.
    """
    rows, curves = [], []
    results = {contender.name: result for contender, _, result in done}
    for contender, _, first in done:
        name, teacher, file = contender.name, contender.teacher, root / contender.step / "validation.parquet"
        if contender.kind not in STUDENTS.values() or teacher is None or teacher.name not in results:
            continue
        second = results[teacher.name]
        temperature = storage.read_json(contender.files / "config.json")["calibration_temperature"]
        validation = storage.read_table(file)
        test = predictions[["label"]].assign(student=predictions[name], teacher=predictions[teacher.name]).dropna()
        for table in (validation, test):
            table["student"] /= temperature
        curve, odds = cascade(validation, test)
        curve["ms"] = first.latency.mean() + curve["test_share"] * second.latency.mean()
        joint = f"{name}, then {teacher.name}"
        curves.append(curve.assign(Model=joint))
        rule = curve[curve["chosen"]].iloc[0]
        if not 0 < rule["p_low"] < 1:
            continue
        predictions.loc[test.index, joint] = odds
        compared_with.loc[joint] = compared_with.loc[name]
        quality = metrics.describe(test["label"].to_numpy(), metrics.two_logits(odds))
        row = joint_row(rule, first.row, second.row) | quality | {"Model": joint, "Accuracy": quality["accuracy"]}
        if teacher.kind == ENCODER:
            row["Speedup (x)"] = round(second.latency.mean() / rule["ms"], 2)
            command = ["python", "predict.py", str(contender.files), "FILE", "--escalate", str(teacher.files)]
            row["note"] += f": {shlex.join([*command, '--unsure', str(rule['p_low']), str(rule['p_high'])])}"
        rows.append(row | {"nll": None, "ece": None})  # the teacher's log-odds are not calibrated
    return rows, curves


def cascade(validation: pd.DataFrame, test: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """The student first, its least sure reviews to the teacher: one row per share, and the chosen one's test log-odds.

    Both tables hold label, and log-odds: student (calibrated) and teacher. The chosen share is the smallest with which
    the cascade is as accurate on validation as the teacher alone. Test chooses nothing. The rule has six digits: a
    review whose probability of "positive" is from p_low to p_high is handed on.
    """
    from scipy.special import expit

    doubt = expit(-validation["student"].abs())  # the probability of the verdict that the student rejects
    rows, odds = [], []
    for share in SHARES:
        row = {"share": share, "p_low": round(float(doubt.quantile(1 - share)), 6) if 0 < share < 1 else 1 - share}
        row["p_high"] = round(1 - row["p_low"], 6)
        for split, table in (("validation", validation), ("test", test)):
            handed_on = expit(table["student"]).between(row["p_low"], row["p_high"]) & (share > 0)
            joint = table["teacher"].where(handed_on, table["student"])
            row[f"{split}_accuracy"] = float(((joint > 0) == (table["label"] == 1)).mean())
            row[f"{split}_share"] = float(handed_on.mean())
        rows.append(row)
        odds.append(joint.to_numpy())
    curve = pd.DataFrame(rows)
    accuracy = curve["validation_accuracy"]
    chosen = int((accuracy >= accuracy.iloc[-1]).idxmax())
    curve["chosen"] = curve.index == chosen
    return curve, odds[chosen]


def joint_row(rule: pd.Series, student: dict, teacher: dict) -> dict:
    """A cascade's cost, counted and not timed: the student's row on all reviews, the teacher's on a share of them."""
    share, seconds = rule["test_share"], [1 / one["Throughput (samp/s)"] for one in (student, teacher)]
    return {
        "Type": "cascade",
        "Latency (ms)": round(rule["ms"], 3),
        "Throughput (samp/s)": round(1 / (seconds[0] + share * seconds[1]), 2),
        **{column: round(student[column] + teacher[column], 3) for column in ("Size (MB)", "Params (M)")},
        "escalated_share": round(share, 4),
        "p_low": rule["p_low"],
        "p_high": rule["p_high"],
        "note": "cost counted from the two rows",
        "status": "ok",
    }


def compare(table: pd.DataFrame, predictions: pd.DataFrame, compared_with: pd.DataFrame) -> pd.DataFrame:
    """The table with each row compared with others on the reviews that both models read.

    `predictions` holds the label, and log-odds by model. `compared_with` names by model (its index) the rows that it
    is compared with: `teacher`, `control`, `baseline` and `eager`. Speed-ups are over 02's model.
    """
    for row, name in table["Model"].items():
        for other, their_name in compared_with.loc[name].dropna().items() if name in compared_with.index else ():
            if name != their_name and {name, their_name} <= set(predictions):
                both = predictions[["label", name, their_name]].dropna()
                for column, value in pair(other, both["label"].to_numpy(), both[[name, their_name]].to_numpy()).items():
                    table.loc[row, column] = value
    add_speedups(table)
    recommend(table, compared_with["eager"])
    return table


def pair(other: str, labels: np.ndarray, odds: np.ndarray) -> dict[str, float | str]:
    """A row's columns against its teacher, control, baseline or eager form; `odds` (n, 2) are its own, and theirs."""
    verdicts = odds > 0
    correct, theirs = (verdicts == (labels == 1)[:, None]).T
    difference, low, high = metrics.paired_difference(correct, theirs)
    ends = {"": difference, "_low": low, "_high": high}
    columns: dict[str, float | str] = {f"diff_{other}{end}": round(value, 6) for end, value in ends.items()}
    p = metrics.mcnemar_p(correct, theirs)
    if other == "teacher":
        columns["agreement_teacher"] = round(float((verdicts[:, 0] == verdicts[:, 1]).mean()), 6)
    elif other == "baseline":
        columns["better_than_baseline"] = metrics.verdict(low, high) if p < 0.05 else "not shown"
    else:
        columns[f"mcnemar_p_{other}"] = p
    if other == "eager":
        columns["largest_gap_eager"] = round(float(np.abs(odds[:, 0] - odds[:, 1]).max()), 6)
    return columns


def add_speedups(table: pd.DataFrame) -> None:
    """Set the speed-ups over 02's model, of rows of its device: others would show the machines' ratio.

    A cascade has no device. Its latency is a mean, and so is what `cascades` compares it with.
    """
    teacher = table[(table["Type"] == ENCODER) & (table["status"] == "ok")]
    if not len(teacher):
        return
    latency, rate, device = (teacher[column].item() for column in ("Latency (ms)", "Throughput (samp/s)", "device"))
    alike, joint = table["device"] == device, table["Type"] == "cascade"
    table.loc[alike, "Speedup (x)"] = (latency / table["Latency (ms)"]).round(2)
    table.loc[alike | joint, "throughput_speedup"] = (table["Throughput (samp/s)"] / rate).round(2)


def recommend(table: pd.DataFrame, eager_forms: pd.Series) -> None:
    """Set each form's speed-up over the eager fp32 form of its student, and whether it loses too much against it."""
    latency = table.set_index("Model")["Latency (ms)"]
    for row, name in table["Model"].items():
        if pd.notna(eager := eager_forms.get(name)):
            table.loc[row, "speedup_eager"] = round(latency[eager] / latency[name], 2)
            lost = -table.loc[row, "diff_eager"] if name != eager else 0.0
            table.loc[row, "recommended"] = "yes" if lost <= TOLERATED_LOSS else "not recommended"


def confident_errors(predictions: pd.DataFrame, texts: pd.Series) -> pd.DataFrame:
    """The ERRORS most confident wrong verdicts of each model, with their texts."""
    from scipy.special import expit

    parts = []
    for name in predictions.columns.drop(["example_id", "label"]):
        wrong = (predictions[name] > 0) != (predictions["label"] == 1)
        odds = predictions.loc[wrong & predictions[name].notna(), name]
        rows = odds.abs().nlargest(ERRORS).index
        part = predictions.loc[rows, ["example_id", "label"]].assign(p_positive=expit(odds[rows]).round(6))
        parts.append(part.assign(Model=name, text=texts[rows]))
    columns = ["Model", "example_id", "label", "p_positive", "text"]
    return pd.concat(parts)[columns] if parts else pd.DataFrame(columns=columns)
