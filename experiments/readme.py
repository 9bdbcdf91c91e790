#!/usr/bin/env python
"""The tables of results in README.md and results/README.md, made from the CSVs: no figure there is typed by hand.

    python experiments/readme.py            # rewrite them, draw README's picture and the curve of unlabelled reviews
    python experiments/readme.py --check    # exit code 1 when they differ (the tests run this)

A table stands between `<!-- FILE -->`, which names its CSV, and `<!-- end -->`.
"""

import argparse
import re
import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import pictures, report, settings, storage

ROOT = Path(__file__).parent.parent
FILES = (ROOT / "README.md", ROOT / "results" / "README.md")
SCREEN = ROOT / "results" / "imdb"  # whose benchmark is on README's first screen
CURVE = ROOT / "results" / "how_much_unlabelled"
# A training, and its students by the folder of their claims. Their control reads no unlabelled review.
TRAININGS = {
    "CPU, bf16, 4 epochs": {"distillation": ["no_transfer_set", "final"], "more_unlabelled": ["final"]},
    "H100, bf16, 4 epochs": {"unlabelled": ["both_8000"]},
    "CPU, fp32, 2 epochs": {"how_much_unlabelled": ["encoder_short_both_2000", "encoder_short_both_8000"]},
}
TABLE = re.compile(
    r"<!-- (?P<file>results/\S+\.csv)(?P<form>: first screen|: console|) -->\n.*?<!-- end -->", re.DOTALL
)


def by_run(table: pd.DataFrame) -> pd.DataFrame:
    """One row per run: of several seeds the mean and their range, of one seed the 95% interval."""
    of_test = ["gap_closed", "mcnemar_p", "agreement"]  # validation has none
    table = table.rename(columns={"n": "n_test"})
    table = table.reindex(columns=table.columns.union(of_test, sort=False))
    rows = []
    for name, seeds in table.groupby("run", sort=False):
        accuracy, one = seeds["accuracy"], seeds.iloc[0]
        low, high = (one["ci_low"], one["ci_high"]) if len(seeds) == 1 else (accuracy.min(), accuracy.max())
        shape = "{:.4f} [{:.4f}, {:.4f}]" if len(seeds) == 1 else "{:.4f} ({:.4f} to {:.4f})"
        row = {"run": name, "accuracy": shape.format(accuracy.mean(), low, high), "seeds": len(seeds)}
        row["gap closed"] = f"{seeds['gap_closed'].mean():.0%}"
        row["McNemar p"] = ", ".join("<0.001" if p < 0.001 else f"{p:.2g}" for p in seeds["mcnemar_p"])
        row |= {key: f"{seeds[key].mean():.3f}" for key in ("agreement", "nll", "ece")} | {"n": one["n_test"]}
        rows.append({key: "" if "nan" in str(value) else value for key, value in row.items()})
    return pd.DataFrame(rows)


def by_claim(table: pd.DataFrame) -> pd.DataFrame:
    """One row per claim: the lead in accuracy, and the part of the gap that it closes, with their 95% intervals."""
    shown = table[["student", "against"]].copy()
    shown["seeds"] = [f"{ours}, {theirs}" for ours, theirs in zip(table["seeds"], table["against_seeds"])]
    for name in ("student_accuracy", "against_accuracy"):
        shown[name.replace("_", " ")] = table[name].map("{:.4f}".format)
    shown["lead"] = table["lead"].map("{:+.4f}".format)
    for name, ends in (("over reviews", "ci"), ("over seeds too", "seeds")):
        shown[name] = [f"[{low:+.4f}, {high:+.4f}]" for low, high in zip(table[f"{ends}_low"], table[f"{ends}_high"])]
    shown["gap closed"] = [percent(*gap) for gap in table[["gap_closed", "gap_low", "gap_high"]].to_numpy(float)]
    if (table[["seeds", "against_seeds"]] == 1).all(axis=None):  # the two intervals are the same
        shown = shown.drop(columns="over seeds too")
    return shown.assign(n=table["n_test"])


def by_unlabelled(table: pd.DataFrame) -> pd.DataFrame:
    """One row per student: number of unlabelled reviews, its accuracy, its control's, and the gap that it closes."""
    shown = table[["training"]].assign(unlabelled=table["unlabelled"].map("{:,}".format))
    shown["seeds"] = [f"{ours}, {theirs}" for ours, theirs in zip(table["seeds"], table["against_seeds"])]
    shown["student"], shown["control"] = (
        table[f"{name}_accuracy"].map("{:.4f}".format) for name in ("student", "against")
    )
    shown["gap closed"] = [percent(*gap) for gap in table[["gap_closed", "gap_low", "gap_high"]].to_numpy(float)]
    return shown.assign(n=table["n_test"])


def percent(share: float, low: float, high: float) -> str:
    """A share and its interval, where they are known."""
    if pd.isna(share):
        return ""
    return f"{share:.0%}" if pd.isna(low) else f"{share:.0%} [{low:.0%}, {high:.0%}]"


def by_labels(table: pd.DataFrame) -> pd.DataFrame:
    """One row per run, one column per number of labels: mean accuracy of the draws; and how many draws and reviews."""
    table = table.sort_values("labels", ascending=False, kind="stable")  # all runs have the most labels: their order
    wide = table.pivot_table(index="run", columns="labels", values="accuracy", sort=False).sort_index(axis=1)
    wide = wide.map(lambda value: "" if pd.isna(value) else f"{value:.4f}").rename_axis(columns=None)
    of_run = table.groupby("run")
    wide["draws"] = of_run.apply(lambda rows: ", ".join(map(str, rows.groupby("labels").size().unique())))
    wide["n"] = of_run["n_test"].max()
    return wide.reset_index()


def by_share(table: pd.DataFrame) -> pd.DataFrame:
    """One row per share of the reviews that a student hands on to its teacher; * marks validation's choice."""
    shown = table[["student", "seed"]].copy()
    shown["handed on"] = [f"{share:.0%}{' *' * chosen}" for share, chosen in zip(table["share"], table["chosen"])]
    shown["p from, to"] = [f"{low:.3f}, {1 - low:.3f}" if 0 < low < 1 else "" for low in table["p_low"]]
    for name in ("validation accuracy", "test accuracy"):
        shown[name] = table[name.replace(" ", "_")].map("{:.4f}".format)
    shown = shown.assign(**{"handed on in test": table["test_share"].map("{:.1%}".format), "n": table["n_test"]})
    return shown.drop(columns=[name for name in ("student", "seed") if shown[name].nunique() == 1])


def by_work(table: pd.DataFrame) -> pd.DataFrame:
    """A row per step and work that a GPU was measured at under a T4's conditions, at the full length."""
    table = table[(table["mode"] == "as_t4") & (table["work"] != "scoring a mix")]
    shown = table[["step", "work", "micro_batch"]].copy()
    shown["peak GiB"] = table["peak_gib"].map("{:.2f}".format)
    shown["reserved GiB"] = table["reserved_gib"].map("{:.2f}".format)
    return shown.assign(**{"reviews/s": table["reviews_per_second"].map("{:,.0f}".format)})


def curve() -> pd.DataFrame:
    """How much of the gap each student of TRAININGS closes, by the number of unlabelled reviews that it read."""
    rows = []
    for training, folders in TRAININGS.items():
        for folder, students in folders.items():
            claims, runs = (pd.read_csv(ROOT / "results" / folder / name) for name in ("claims.csv", "runs.csv"))
            of_control = claims[claims["against"].isin(["control", "short_control"])].set_index("student")
            read = runs.groupby("run")["transfer"].first()
            for name in filter(of_control.index.__contains__, students):  # a retrained teacher's rows may be gone
                rows.append({"training": training, "unlabelled": read[name], **of_control.loc[name]})
    seen = ["seeds", "against_seeds", "student_accuracy", "against_accuracy"]
    return pd.DataFrame(rows)[["training", "unlabelled", *seen, "gap_closed", "gap_low", "gap_high", "n_test"]]


def draw_curve(table: pd.DataFrame, file: Path) -> None:
    """The gap closed, with its interval, against the number of unlabelled reviews, one line per training."""
    from matplotlib.figure import Figure

    figure, counts = Figure(figsize=(7, 4.2), layout="constrained"), sorted(table["unlabelled"].unique())
    axes = figure.subplots()
    for number, (training, part) in enumerate(table.groupby("training", sort=False)):
        places = [counts.index(count) + 0.06 * (number - 1) for count in part["unlabelled"]]
        ends = [part["gap_closed"] - part["gap_low"], part["gap_high"] - part["gap_closed"]]
        axes.errorbar(places, part["gap_closed"], ends, marker="o", capsize=3, label=training)
    axes.set_xticks(range(len(counts)), [f"{count:,}" for count in counts])
    axes.set(xlabel="unlabelled reviews, beside 2,000 labelled ones", ylabel="gap closed (95% interval)")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    with storage.whole(file) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def on_first_screen(table: pd.DataFrame) -> pd.DataFrame:
    """The better baseline, the fine-tuned teacher, the control and the students."""
    table = table[table["Type"] != "teacher, 4-bit + LoRA"]
    baseline = table["Type"] == "baseline"
    return table[~baseline | (table["Accuracy"] == table.loc[baseline, "Accuracy"].max())]


def first_screen(table: pd.DataFrame) -> str:
    """The rows of the first screen in few columns."""
    table = on_first_screen(table)
    figures = {"ms a review": "Latency (ms)", "reviews/s": "Throughput (samp/s)", "MB": "Size (MB)"}
    shown = table[["Model", "Type"]].rename(columns={"Model": "model", "Type": "role"})
    intervals = zip(table["Accuracy"], table["ci_low"], table["ci_high"])
    shown["accuracy [95%]"] = [f"{accuracy:.3f} [{low:.3f}, {high:.3f}]" for accuracy, low, high in intervals]
    for name, column in figures.items():
        shown[name] = [f"{value:,.0f}" if value >= 20 else f"{value:.1f}" for value in table[column]]
    return report.markdown(shown).strip()


def console(table: pd.DataFrame) -> str:
    """The table that 05 prints, without its weaker baseline, cascade, and the forms but int8."""
    left_out = ("cascade", "form, eager fp32", "form, eager bf16", "form, ONNX fp32")
    shown = table[(table["Model"] != "TF-IDF + naive Bayes") & ~table["Type"].isin(left_out)]
    return f"```\n{report.as_text(shown)}\n```"


def as_markdown(table: pd.DataFrame) -> str:
    """A README's form of a CSV, by what its columns are."""
    if "Model" in table:
        return report.as_markdown(table).strip()
    forms = {
        "unlabelled": by_unlabelled,
        "test_share": by_share,
        "lead": by_claim,
        "labels": by_labels,
        "seed": by_run,
        "tflops": by_work,
    }
    form = next((form for column, form in forms.items() if column in table), lambda table: table)
    shown = form(table)
    return report.markdown(shown.loc[:, (shown.notna() & (shown != "")).any()]).strip()  # no column is all empty


def with_tables(text: str) -> str:
    """A README's text with each marked table made anew from its CSV."""

    def table(found: re.Match) -> str:
        if not (ROOT / found["file"]).exists():
            settings.stop(f"{found['file']} is missing: make it by experiments/run.sh")
        form = {": first screen": first_screen, ": console": console}.get(found["form"], as_markdown)
        return f"<!-- {found['file']}{found['form']} -->\n{form(pd.read_csv(ROOT / found['file']))}\n<!-- end -->"

    return TABLE.sub(table, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; tell whether the tables are up to date")
    check, differ = parser.parse_args(argv).check, False
    points, file = curve(), CURVE / "curve.csv"
    if check:
        differ = points.to_csv(index=False) != file.read_text(encoding="utf-8")
    else:
        storage.write_table(file, points)
        draw_curve(points, file.with_suffix(".png"))
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        made = with_tables(text)
        differ |= made != text
        if not check:
            file.write_text(made, encoding="utf-8")
    if not check:
        shown = on_first_screen(pd.read_csv(SCREEN / "benchmark.csv"))
        pictures.draw_accuracy_latency(shown, SCREEN / "accuracy_latency.png")
    return int(check and differ)


if __name__ == "__main__":
    sys.exit(main())
