#!/usr/bin/env python
"""The tables of results/, made from two files a question: what each run predicts, and what each run is.

    python experiments/tables.py results/distillation                      # no reviews, no weights: check every figure
    python experiments/tables.py results/distillation --collect outputs/distillation/runs [--read-test]

predictions.parquet has one row per review of validation and test (example_id, split, label) and one column per run. The
column holds the log-odds of "positive", and nothing where the run has not read the review. runs.csv has one row per
run: settings, fingerprints of the reviews, teacher, versions, commit. --collect adds finished runs, or replaces their
columns. Test predictions are added only with --read-test, once the recipe is frozen.

Writes validation.csv, white_box.csv, black_box.csv (one row per run), claims.csv and cascade.csv; or few_labels.csv and
its plot.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import artifacts, comparison, metrics, settings, storage

CONTROLS = ("control", "control_longer", "control_levers", "short_control")
# A claim compares with these though they read other unlabelled reviews, or none.
BESIDE = ("final_longer", "nb_svm", "naive_bayes")
CLAIMS = (  # a student, the teacher whose gap it closes, and the runs that it is compared with
    ("no_transfer_set", "teacher", ("control",)),
    ("final", "teacher", (*CONTROLS, *BESIDE)),
    ("tuned", "tuned_teacher", ("control", "nb_svm", "tuned_teacher")),
    ("both_8000", "teacher", ("control",)),
    ("tuned_both_16000", "tuned_teacher", ("control", "tuned_teacher")),
    ("short_one_2000", "tuned_teacher", ("short_both_2000",)),
    ("short_one_4000", "tuned_teacher", ("short_both_2000", "short_one_2000")),
    ("encoder_short_one_2000", "teacher", ("encoder_short_both_2000",)),
    ("encoder_short_both_2000", "teacher", ("short_control",)),
    ("encoder_short_both_8000", "teacher", ("short_control", "encoder_short_both_2000")),
)
FEW_LABELS = ("control", "student_of_encoder", "student_of_llm", "nb_svm", "frozen_embeddings", "setfit")
CASCADED = (0, 0.05, 0.1, 0.15, 0.2, 0.3, 1)  # shares of the reviews that the student hands on
MADE = "validation.csv white_box.csv black_box.csv claims.csv cascade.csv few_labels.csv few_labels.png".split()
# runs.csv, in this order. `labels`: gold labels in all, where a table compares numbers of them.
NAMES = "column run seed labels gold transfer teacher seconds".split()
# Some columns of a recipe are of finished comparisons, whose code is that of the row's `commit`.
RECIPE = "labelled transfer_share transfer_samples soft_labels terms soft_loss alpha feature_weight epochs mlm_epochs"
SHARED = "student_model max_length learning_rate batch_size weight_decay warmup_fraction temperature precision".split()
READ = ["train_reviews", "validation_reviews", "transfer_reviews", "test_reviews"]  # fingerprints of the reviews
MADE_BY = "weights teacher_weights device commit python torch transformers peft bitsandbytes".split()
COLUMNS = [*NAMES, *RECIPE.split(), *SHARED, "subset_seed", *READ, *MADE_BY]
REVIEW = ["example_id", "split", "label"]
RESAMPLES = 9999  # of a bootstrap


def read_question(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A question's predictions and runs. `runs` is text, "" where nothing is known, by the column's name."""
    files = [folder / "predictions.parquet", folder / "runs.csv"]
    if not files[0].exists():
        return pd.DataFrame(columns=REVIEW), pd.DataFrame(columns=COLUMNS, dtype=str).set_index("column")
    predictions, runs = pd.read_parquet(files[0]), pd.read_csv(files[1], dtype=str, keep_default_na=False)
    if list(runs) != COLUMNS or sorted([*REVIEW, *runs["column"]]) != sorted(predictions):
        settings.stop(f"{files[1]} does not describe {files[0].name}: delete both and collect again")
    return predictions, runs.set_index("column")


def write_question(folder: Path, predictions: pd.DataFrame, runs: pd.DataFrame) -> None:
    """Write both files, each whole. Log-odds are of half precision in 32 bits, whose zeros zstd removes."""
    with storage.whole(folder / "predictions.parquet") as temporary:
        predictions.to_parquet(temporary, index=False, compression="zstd")
    storage.write_table(folder / "runs.csv", runs.reset_index()[COLUMNS])


def scores_of(predictions: pd.DataFrame, split: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A split's gold labels, and by column the (n, 2) logits of each run that has read it."""
    rows = predictions[predictions["split"] == split]
    read = {name: rows[name].to_numpy(np.float32) for name in rows if name not in REVIEW and rows[name].notna().any()}
    return rows["label"].to_numpy(), {name: metrics.two_logits(odds) for name, odds in read.items()}


def is_teacher(runs: pd.DataFrame) -> pd.Series:
    """Whether each run is a teacher: "teacher" is the encoder, NAME_teacher an LLM."""
    return runs["run"].str.endswith("teacher")


def white_box(runs: pd.DataFrame) -> pd.DataFrame:
    """The encoder, its students and those without a teacher, in this order.

    A run of BESIDE is left out unless it read the unlabelled reviews of `final`: it serves the claims alone.
    """
    read = set(runs.loc[runs["run"] == "final", "transfer_reviews"]) or set(runs["transfer_reviews"]) - {""}
    for_claims = runs["run"].isin(BESIDE) & ~runs["transfer_reviews"].isin(read)
    return in_order(runs[~by_llm(runs) & ~for_claims])


def black_box(runs: pd.DataFrame) -> pd.DataFrame:
    """The LLMs, the control and the LLMs' students, in this order; empty when the control would be alone."""
    black = in_order(runs[by_llm(runs) | (runs["run"] == "control")])
    return black if by_llm(black).any() else black.iloc[:0]


def by_llm(runs: pd.DataFrame) -> pd.Series:
    """Whether each run is an LLM or learned from one."""
    return runs["run"].str.endswith("_teacher") | runs["teacher"].str.endswith("_teacher")


def in_order(runs: pd.DataFrame) -> pd.DataFrame:
    """Teachers, runs without a teacher, students; each as in runs.csv, the seeds of one run together."""
    rank = np.select([is_teacher(runs), runs["teacher"] == ""], [0, 1], 2)
    first = {name: place for place, name in reversed(list(enumerate(runs["run"])))}
    return runs.iloc[np.lexsort((runs["seed"].astype(int), runs["run"].map(first), rank))]


def refuse_mixed(runs: pd.DataFrame) -> None:
    """Stop when runs of one table differ in settings, in reviews, or in the teacher that they name alike."""
    for key in (*SHARED, "test_reviews"):
        refuse_other(runs, key)
    few = (runs["labels"] != "").any()
    # Of another number of labels, or another draw of them, train and validation are other reviews.
    for _, part in runs.groupby(["labels", "subset_seed"]) if few else [("", runs)]:
        refuse_other(part, "train_reviews")
        refuse_other(part, "validation_reviews")
        for name in set(part["teacher"]) - {""}:
            of_students = part.loc[part["teacher"] == name, "teacher_weights"]
            refuse_other(pd.concat([part.loc[part["run"] == name, "weights"], of_students]).to_frame(name), name)
    same = [part for _, part in runs.groupby("subset_seed")] if few else [white_box(runs), black_box(runs)]
    for part in [*same, *(part for _, part in runs.groupby(["run", *(["subset_seed"] if few else [])]))]:
        refuse_other(part, "transfer_reviews")


def refuse_other(runs: pd.DataFrame, key: str) -> None:
    """Stop when runs have different values of `key`; "" is none."""
    known = runs.loc[runs[key] != "", key]
    for column in known.index[known != known.iloc[0]] if len(known) else []:
        settings.stop(
            f"{column} has another {key} ({known[column]}) than {known.index[0]} ({known.iloc[0]}): one table compares "
            "runs of the same settings, reviews and teacher; use another results folder"
        )


def gap_closed(student: float, control: float, teacher: float) -> float | None:
    """(student - control) / (teacher - control) of accuracies; None where the teacher leads by less than a point."""
    return (student - control) / (teacher - control) if teacher - control >= 0.01 else None


def compare(run: pd.Series, labels: np.ndarray, logits: np.ndarray, teacher, control) -> dict:
    """A run's row: its figures on test, compared with its teacher's and with those of the control of its seed.

    Reviews that a teacher has not read (NaN) are left out of the comparison with it.
    """
    read = np.isfinite(logits[:, 0])
    row = {"run": run["run"]} | {name: int(run[name]) for name in ("seed", "gold", "transfer")}
    row["seconds"] = int(run["seconds"]) if run["seconds"] else None
    quality = metrics.describe(labels[read], logits[read])
    row |= {"n_test": quality["n"], "gap_closed": None, "mcnemar_p": None, "agreement": None}
    row |= {name: quality[name] for name in ("accuracy", "ci_low", "ci_high", "nll", "ece")}
    if control is not None:
        row["mcnemar_p"] = metrics.mcnemar_p(logits.argmax(axis=1) == labels, control.argmax(axis=1) == labels)
    if teacher is not None:
        both = np.isfinite(teacher[:, 0])
        row["agreement"] = metrics.accuracy(teacher[both].argmax(axis=1), logits[both].argmax(axis=1))
        if control is not None:
            three = (metrics.accuracy(labels[both], one[both].argmax(axis=1)) for one in (logits, control, teacher))
            row["gap_closed"] = gap_closed(*three)
    return row


def table_of_runs(
    runs: pd.DataFrame, labels: np.ndarray, scores: dict[str, np.ndarray], of_controls: str
) -> pd.DataFrame:
    """One row per run, compared with the teacher that it names; the controls, which name none, with `of_controls`."""
    teachers = {run["run"]: scores[column] for column, run in runs[is_teacher(runs)].iterrows() if column in scores}
    rows = []
    for column, run in runs[runs.index.isin(scores)].iterrows():
        alone = run["run"].endswith("control") or run["run"] in teachers
        controls = () if alone else (f"{name}-{run['seed']}" for name in ("control", "short_control"))
        control = next((scores[name] for name in controls if name in scores), None)
        teacher = None if run["run"] in teachers else teachers.get(run["teacher"] or of_controls)
        rows.append(compare(run, labels, scores[column], teacher, control))
    order = "run seed gold transfer n_test accuracy ci_low ci_high gap_closed mcnemar_p agreement nll ece seconds"
    return pd.DataFrame(rows, columns=order.split()).astype({"seconds": "Int64"})


def claim(student: np.ndarray, against: np.ndarray, teacher: np.ndarray | None = None) -> dict:
    """How far a student leads another model by seed-mean accuracy, and how much of the gap to `teacher` it closes.

    Each is (seeds, n) booleans: whether each test review was called right. The intervals are of a bootstrap (Efron
    1979), percentile, 9,999 times. `ci` resamples the reviews, the same for all models, so it holds for these trained
    models. `seeds` and `gap` resample each model's seeds as well. Three seeds make these too narrow, by a third or more
    in what they add; one seed adds nothing.
    """
    rng, n = np.random.default_rng(0), student.shape[1]
    models = np.concatenate([student, against, *([] if teacher is None else [teacher])]).astype(np.float64)
    drawn = np.stack([models @ np.bincount(rng.integers(n, size=n), minlength=n) / n for _ in range(RESAMPLES)])
    of_student, of_against, of_teacher = np.split(drawn, np.cumsum([len(student), len(against)]), axis=1)
    row = {"seeds": len(student), "against_seeds": len(against), "n_test": n}
    row |= {"student_accuracy": student.mean(), "against_accuracy": against.mean()}
    row["lead"] = student.mean() - against.mean()
    row |= interval("ci", of_student.mean(axis=1) - of_against.mean(axis=1))
    of_student, of_against = (  # seeds drawn anew for each resample
        np.take_along_axis(seeds, rng.integers(seeds.shape[1], size=seeds.shape), axis=1).mean(axis=1)
        for seeds in (of_student, of_against)
    )
    row |= interval("seeds", of_student - of_against)
    gap = None if teacher is None else gap_closed(student.mean(), against.mean(), teacher.mean())
    row |= {"gap_closed": gap, "gap_low": None, "gap_high": None}
    if gap is not None and (of_teacher[:, 0] > of_against).all():  # else the ratio has no bounds
        row |= interval("gap", (of_student - of_against) / (of_teacher[:, 0] - of_against))
    return row


def interval(name: str, resampled: np.ndarray) -> dict[str, float]:
    """The middle 95% of a bootstrap's resamples."""
    low, high = np.quantile(resampled, (0.025, 0.975))
    return {f"{name}_low": float(low), f"{name}_high": float(high)}


def claims(runs: pd.DataFrame, labels: np.ndarray, scores: dict[str, np.ndarray]) -> pd.DataFrame:
    """What CLAIMS names, a row each, on the reviews that both models have read.

    An LLM may have read a part. There it is compared with its student, and no gap to it is known.
    """

    def odds(name: str) -> np.ndarray:
        """(seeds, n); NaN where a review has not been read."""
        return np.array([scores[column][:, 1] for column in runs.index[runs["run"] == name] if column in scores])

    rows = []
    for student, teacher, against in CLAIMS:
        for other in (one for one in against if min(len(odds(student)), len(odds(teacher)), len(odds(one)))):
            read = np.isfinite(odds(other)).all(axis=0)
            right = {name: (odds(name)[:, read] > 0) == labels[read] for name in (student, other, teacher)}
            gap_to = right[teacher] if other in CONTROLS and np.isfinite(odds(teacher)).all() else None
            rows.append({"student": student, "against": other} | claim(right[student], right[other], gap_to))
    return pd.DataFrame(rows)


def table_of_validation(runs: pd.DataFrame, labels: np.ndarray, scores: dict[str, np.ndarray]) -> pd.DataFrame:
    """One row per run: its figures on the reviews that it has read."""
    rows = []
    for column, run in runs[runs.index.isin(scores)].iterrows():
        read = np.isfinite(scores[column][:, 0])
        figures = metrics.describe(labels[read], scores[column][read])
        rows.append({"run": run["run"], "seed": int(run["seed"])} | figures)
    return pd.DataFrame(rows, columns=["run", "seed", "n", "accuracy", "ci_low", "ci_high", "nll", "ece"])


def table_of_cascades(runs: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    """Each student of CLAIMS with its teacher behind it, where both read validation and test; the chosen share too."""
    rows, teachers = [], {run["run"]: column for column, run in runs[is_teacher(runs)].iterrows()}
    claimed = runs["run"].isin([student for student, _, _ in CLAIMS]) & runs["teacher"].isin(teachers)
    for column, run in runs[claimed].iterrows():
        names = {column: "student", teachers[run["teacher"]]: "teacher"}
        read = predictions[["split", "label", *names]].dropna().rename(columns=names)
        validation, test = (read[read["split"] == split].reset_index() for split in ("validation", "test"))
        if not len(validation) or not len(test):
            continue
        logits = metrics.two_logits(validation["student"].to_numpy())
        temperature = metrics.fit_temperature(validation["label"].to_numpy(), logits)
        for table in (validation, test):
            table["student"] /= temperature
        curve, _ = comparison.cascade(validation, test)
        shown = curve[curve["chosen"] | curve["share"].isin(CASCADED)]
        rows.append(shown.assign(student=run["run"], seed=int(run["seed"]), teacher=run["teacher"], n_test=len(test)))
    table = pd.concat(rows) if rows else pd.DataFrame()
    return table[[*table.columns[-4:], *table.columns[:-4]]]


def table_of_few_labels(runs: pd.DataFrame, labels: np.ndarray, scores: dict[str, np.ndarray]) -> pd.DataFrame:
    """One row per run and number of gold labels."""
    table = table_of_validation(runs, labels, scores).rename(columns={"n": "n_test"})
    table["labels"] = runs.loc[runs.index.isin(scores), "labels"].astype(int).tolist()
    table = table.iloc[np.lexsort((table["seed"], table["run"].map(FEW_LABELS.index), table["labels"]))]
    return table[["labels", "run", "seed", "accuracy", "ci_low", "ci_high", "n_test"]]


def plot_few_labels(table: pd.DataFrame, file: Path) -> None:
    """Accuracy with its interval against labels, one line per run (seed mean); no labels stand at the left edge."""
    from matplotlib.figure import Figure

    counts, figure = sorted(table["labels"].unique()), Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    shift = dict(zip(FEW_LABELS, np.linspace(-0.12, 0.12, len(FEW_LABELS)), strict=True))
    for run in filter(set(table["run"]).__contains__, shift):
        mean = table[table["run"] == run].groupby("labels")[["accuracy", "ci_low", "ci_high"]].mean()
        below, above = mean["accuracy"] - mean["ci_low"], mean["ci_high"] - mean["accuracy"]
        places = np.array([counts.index(labels) for labels in mean.index]) + shift[run]
        axes.errorbar(places, mean["accuracy"], [below, above], marker="o", capsize=3, label=run.replace("_", " "))
    axes.set_xticks(range(len(counts)), [f"{labels:,}" for labels in counts])
    axes.set(xlabel="gold labels, validation included", ylabel="test accuracy (95% interval)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")  # where lines that rise with the labels leave room
    figure.savefig(file, dpi=120)


def make_tables(folder: Path) -> dict[str, pd.DataFrame]:
    """Every table of a question by its file's name, written beside its two files; tables of no run any more go."""
    predictions, runs = read_question(folder)
    if not len(runs):
        settings.stop(f"{folder}/ has no predictions.parquet: pass --collect the folder of finished runs")
    refuse_mixed(runs)
    made = {}
    test, validation = scores_of(predictions, "test"), scores_of(predictions, "validation")
    if (runs["labels"] != "").any():
        made["few_labels.csv"] = table_of_few_labels(runs, *test)
    else:
        white, black = white_box(runs), black_box(runs)
        every = pd.concat([white, black])
        made["validation.csv"] = table_of_validation(every[~every.index.duplicated()], *validation)
        made["white_box.csv"] = table_of_runs(white, *test, "teacher")
        made["black_box.csv"] = table_of_runs(black, *test, "tuned_teacher")
        made["claims.csv"] = claims(runs, *test)
        made["cascade.csv"] = table_of_cascades(runs, predictions)
    made = {file: table.round(6) for file, table in made.items() if len(table)}
    for file in MADE:
        (folder / file).unlink(missing_ok=True)
    for file, table in made.items():
        storage.write_table(folder / file, table)
    if "few_labels.csv" in made:
        plot_few_labels(made["few_labels.csv"], folder / "few_labels.png")
    return made


def read_finished(folder: Path) -> tuple[dict[str, str], pd.DataFrame]:
    """A finished run's row of runs.csv and its predictions."""
    args, step = argparse.Namespace(output_dir=str(folder.parent)), folder.name
    run = artifacts.read_run(args, step)
    known = run["facts"] | run["settings"] | run["versions"] | run["inputs"] | {"commit": run["git_commit"]}
    known |= {"column": step, "precision": known.get("arithmetic")}
    known |= {"student_model": Path(known["student_model"]).name} if "student_model" in known else {}
    known |= {} if known["teacher"] else {"terms": ""}  # what a review without soft labels has no choice of
    row = {name: "" if known.get(name) is None else str(known[name]) for name in COLUMNS}
    return row, storage.read_table(artifacts.require(args, step, "predictions.parquet"))


def collect(folder: Path, finished: list[Path], read_test: bool, replace_teachers: bool = False) -> None:
    """Add the finished runs of these folders to a question, or replace their columns.

    Stops before it writes when a run is of other reviews or settings than the question's. With `replace_teachers`, the
    students of a teacher that is replaced go.
    """
    predictions, runs = read_question(folder)
    for run_folder in finished:
        row, predicted = read_finished(run_folder)
        wanted = ["test"] * read_test + ["validation"] * (row["labels"] == "")  # few labels: validation is many sets
        column = pd.Series(np.nan, predictions.index, np.float32)
        for split, part in predicted[predicted["split"].isin(wanted)].groupby("split", sort=False):
            if not (predictions["split"] == split).any():
                predictions = pd.concat([predictions, part[REVIEW]], ignore_index=True)
                column = column.reindex(predictions.index)
            here = predictions["split"] == split
            if predictions.loc[here, REVIEW].to_numpy().tolist() != part[REVIEW].to_numpy().tolist():
                settings.stop(f"{run_folder}/ is of other {split} reviews than {folder}/: use another results folder")
            column[here] = part["log_odds"].to_numpy(np.float16)  # its sign, so its label, is that of full precision
        predictions[row["column"]] = column
        runs.loc[row["column"]] = [row[name] for name in runs]
    if replace_teachers:
        weights = runs["teacher"].map(runs[is_teacher(runs)].set_index("run")["weights"])
        stale = runs.index[weights.notna() & (weights != runs["teacher_weights"])]
        predictions, runs = predictions.drop(columns=stale), runs.drop(index=stale)
    refuse_mixed(runs)
    write_question(folder, predictions, runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder of results/")
    parser.add_argument("--collect", type=Path, nargs="+", default=[], help="runs to add first, or folders of runs")
    parser.add_argument(
        "--read-test", action="store_true", help="the recipe is frozen: take their test predictions too"
    )
    parser.add_argument("--replace-teachers", action="store_true", help="students of a replaced teacher go")
    args = parser.parse_args()
    finished = [
        file.parent for path in args.collect for ending in ("", "*/") for file in path.glob(f"{ending}run.json")
    ]
    if finished:
        collect(args.folder, sorted(finished), args.read_test, args.replace_teachers)
    for file, table in make_tables(args.folder).items():
        print(f"{file}\n{table.to_string(index=False)}\n")


if __name__ == "__main__":
    main()
