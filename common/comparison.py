"""The benchmark's tables: its rows against each other, cascades and confident errors, from predictions alone."""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from common import artifacts, metrics
from common.classifiers import BASELINE, CONTROL, ENCODER, LLM, STUDENTS, ZERO_SHOT
from common.report import COLUMNS

SHARES = (*np.round(np.arange(0, 0.51, 0.01), 2), 1.0)  # of the reviews that a cascade hands to the teacher
ERRORS = 100  # a model
TOLERATED_LOSS = 0.003  # of a form's accuracy against eager fp32


def write_tables(args: argparse.Namespace, folder: Path, test: pd.DataFrame, done: list, without: list[dict]) -> None:
    """Write benchmark.csv and the files of which the report is drawn.

    `done` holds (contender, reviews, measured) of each model, `without` the rows without figures.
    """
    predictions, latency, sweep, injection = test[["example_id", "label"]].copy(), [], [], []
    for contender, part, measured in done:
        name, (passes, n) = contender.name, measured.latency.shape
        predictions.loc[part.index, name] = measured.logits[:, 1] - measured.logits[:, 0]
        timed = {
            "pass": np.repeat(np.arange(passes) + 1, n),
            "example_id": np.tile(part["example_id"].iloc[:n], passes),
        }
        latency.append(pd.DataFrame({"Model": name, **timed, "ms": measured.latency.ravel().round(4)}))
        sweep += [{"Model": name} | row for row in measured.sweep]
        injection += [{"Model": name} | row for row in measured.injection]
    rows, others = [measured.row for _, _, measured in done], references(done)
    joint, curves = cascades(Path(args.output_dir), done, predictions, others)
    keys = (key for row in [*rows, *joint] for key in row)
    columns = dict.fromkeys([*COLUMNS, "n", "ci_low", "ci_high", *keys, "status"])
    table = compare(pd.DataFrame([*rows, *joint, *without], columns=list(columns)), predictions, others)
    if args.price_per_hour:
        table["price_per_million"] = (args.price_per_hour / 3600 * 1e6 / table["Throughput (samp/s)"]).round(4)
    empty = [pd.DataFrame({"Model": []})]
    files = {
        "benchmark.csv": table[[*table.columns.drop("status"), "status"]],
        "predictions.parquet": predictions,
        "latency.parquet": pd.concat(latency or empty),
        "sweep.csv": pd.DataFrame(sweep or empty[0]),
        "injection.csv": pd.DataFrame(injection or empty[0]),
        "cascade.csv": pd.concat(curves or empty),
        "errors.csv": confident_errors(predictions, test["text"]),
    }
    for name, content in files.items():
        artifacts.write_table(folder / name, content)


def compare(table: pd.DataFrame, predictions: pd.DataFrame, compared_with: pd.DataFrame) -> pd.DataFrame:
    """The table with each row compared with others on the reviews that both models read.

    `predictions` holds the label, and log-odds by model. `compared_with` names by model (its index) the rows that it
    is compared with: `teacher`, `control`, `baseline` and `eager`. Speed-ups are over 02's model.
    """
    labels = predictions["label"] == 1
    for row, name in table["Model"].items():
        for other, their_name in compared_with.loc[name].dropna().items() if name in compared_with.index else ():
            if name == their_name or not {name, their_name} <= set(predictions):
                continue
            read = predictions[[name, their_name]].notna().all(axis=1)
            verdicts = predictions.loc[read, [name, their_name]].to_numpy() > 0
            correct, theirs = (verdicts == labels[read].to_numpy()[:, None]).T
            difference, low, high = metrics.paired_difference(correct, theirs)
            ends = {"": difference, "_low": low, "_high": high}
            for end, value in ends.items():
                table.loc[row, f"diff_{other}{end}"] = round(value, 6)
            if other == "teacher":
                table.loc[row, "agreement_teacher"] = (verdicts[:, 0] == verdicts[:, 1]).mean().round(6)
            elif other == "baseline":
                table.loc[row, "better_than_baseline"] = "yes" if low > 0 else "no" if high < 0 else "not shown"
            else:
                table.loc[row, f"mcnemar_p_{other}"] = metrics.mcnemar_p(correct, theirs)
    teacher = table[(table["Type"] == ENCODER) & (table["status"] == "ok")]
    if len(teacher):
        table["Speedup (x)"] = (teacher["Latency (ms)"].item() / table["Latency (ms)"]).round(2)
        table["throughput_speedup"] = (table["Throughput (samp/s)"] / teacher["Throughput (samp/s)"].item()).round(2)
    latency = table.set_index("Model")["Latency (ms)"]
    for row, name in table["Model"].items():
        if pd.notna(eager := compared_with["eager"].get(name)):
            table.loc[row, "speedup_eager"] = round(latency[eager] / latency[name], 2)
            lost = -table.loc[row, "diff_eager"] if name != eager else 0.0
            table.loc[row, "recommended"] = "yes" if lost <= TOLERATED_LOSS else "not recommended"
    return table


def cascade(validation: pd.DataFrame, test: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """The student first, its least sure reviews to the teacher: a row a share, and the test log-odds of the chosen one.

    Both tables hold label, and calibrated log-odds: student, teacher. The chosen share is the smallest with which the
    cascade is as accurate on validation as the teacher alone. Test chooses nothing. The rule is p_low, of four digits:
    a review whose probability of "positive" is from p_low to 1 - p_low is handed on.
    """
    from scipy.special import expit, logit

    doubt = expit(-validation["student"].abs())  # the probability of the verdict that the student rejects
    rows, odds = [], []
    for share in SHARES:
        row = {"share": share, "p_low": round(float(doubt.quantile(1 - share)), 4) if 0 < share < 1 else 1 - share}
        row["threshold"] = float(logit(1 - row["p_low"]))
        for split, table in (("validation", validation), ("test", test)):
            handed_on = between(expit(table["student"]), row["p_low"]) & (share > 0)
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


def references(done: list) -> pd.DataFrame:
    """By model, the rows that it is compared with: teacher, control, the better baseline, and eager for a form.

    `done` holds (contender, reviews, measured) of each model.
    """
    by_kind = {contender.kind: contender.name for contender, _, _ in done}
    encoder, llm = by_kind.get(ENCODER), by_kind.get(ZERO_SHOT, by_kind.get(LLM))
    teachers = {"student, white-box": encoder, CONTROL: encoder, "student, black-box": llm}
    baselines = {
        contender.name: measured.row["Accuracy"] for contender, _, measured in done if contender.kind == BASELINE
    }
    best = max(baselines, key=baselines.get, default=None)
    eager = {one.student.name: one.name for one, _, _ in done if one.kind == "form, eager fp32"}
    rows = {}
    for contender, _, _ in done:
        student = contender.student or contender
        rows[contender.name] = {
            "teacher": teachers.get(student.kind),
            "control": by_kind.get(CONTROL),
            "baseline": None if contender.kind == BASELINE else best,
            "eager": eager.get(student.name) if contender.student else None,
        }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["teacher", "control", "baseline", "eager"])


def cascades(
    root: Path, done: list, predictions: pd.DataFrame, compared_with: pd.DataFrame
) -> tuple[list[dict], list[pd.DataFrame]]:
    """For each student that gains by handing its least sure reviews to its teacher, a row; and every student's curve.

    The joint verdicts become a column of `predictions`, and the row's references one of `compared_with`. Cost is
    counted, not timed: the student's on all reviews and the teacher's on the share that it reads.
    """
    rows, curves = [], []
    encoder = next((contender.name for contender, _, _ in done if contender.kind == ENCODER), None)
    measured = {contender.name: result.row for contender, _, result in done}
    for contender, _, _ in done:
        name, teacher, file = (
            contender.name,
            compared_with.loc[contender.name, "teacher"],
            root / contender.step / "validation.parquet",
        )
        if contender.kind not in STUDENTS.values() or teacher is None or not file.exists():
            continue
        temperature = artifacts.read_json(contender.files / "config.json")["calibration_temperature"]
        validation = artifacts.read_table(file)
        test = predictions[["label"]].assign(student=predictions[name], teacher=predictions[teacher]).dropna()
        for table in (validation, test):
            table["student"] /= temperature
        curve, odds = cascade(validation, test)
        first, second = measured[name], measured[teacher]
        curve["ms"] = first["Latency (ms)"] + curve["test_share"] * second["Latency (ms)"]
        joint = f"{name}, then {teacher}"
        curves.append(curve.assign(Model=joint))
        best = curve[curve["chosen"]].iloc[0]
        if not 0 < best["share"] < 1:
            continue
        predictions.loc[test.index, joint] = odds
        compared_with.loc[joint] = compared_with.loc[name]
        share = best["test_share"]
        quality = metrics.describe(test["label"].to_numpy(), np.stack([-odds / 2, odds / 2], axis=1))
        row = {"Model": joint, "Type": "cascade", "Accuracy": quality.pop("accuracy")}
        row["Latency (ms)"] = round(best["ms"], 3)
        row["Throughput (samp/s)"] = round(
            1 / (1 / first["Throughput (samp/s)"] + share / second["Throughput (samp/s)"]), 2
        )
        row |= {key: first[key] + second[key] for key in ("Size (MB)", "Params (M)")} | quality
        row |= {"escalated_share": round(share, 4), "p_low": best["p_low"], "p_high": round(1 - best["p_low"], 4)}
        how = f"predict.py {contender.files} FILE --escalate {root / '02_roberta' / 'model'}"
        note = (
            f"python {how} --unsure {row['p_low']} {row['p_high']}"
            if compared_with.loc[name, "teacher"] == encoder
            else ""
        )
        rows.append(row | {"note": f"cost counted from the two rows; {note}".rstrip("; "), "status": "ok"})
    return rows, curves


def between(p_positive: pd.Series, p_low: float) -> pd.Series:
    """Whether each probability is from `p_low` to 1 - `p_low`."""
    return p_positive.between(p_low, round(1 - p_low, 4))


def confident_errors(predictions: pd.DataFrame, texts: pd.Series) -> pd.DataFrame:
    """Of each model the ERRORS wrong verdicts with the largest log-odds, with the text."""
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
