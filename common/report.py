"""05's tables, its advice and its report.html, made from the files of 05 alone."""

import re
from collections import Counter
from collections.abc import Iterable
from html import escape
from pathlib import Path

import pandas as pd

from common import metrics, pictures, storage
from common.contenders import EAGER, ENCODER
from common.settings import stop
from common.storage import whole

COLUMNS = ["Model", "Type", "Accuracy", "Latency (ms)", "Throughput (samp/s)", "Speedup (x)", "Size (MB)", "Params (M)"]
OTHERS = ("baseline", "control", "teacher", "eager")  # with which a row is compared
INTERVALS = {"Accuracy": ("ci_low", "ci_high"), "injection_turned": ("injection_low", "injection_high")}
INTERVALS |= {f"diff_{other}": (f"diff_{other}_low", f"diff_{other}_high") for other in OTHERS}
TOLERATED_LOSS = 0.003  # of a form's accuracy against eager fp32
PAIRED = "on the reviews that both read, with the 95% interval of paired differences"
# The report's tables: for each column of benchmark.csv its head, its format, and what it means.
GROUPS = {
    "All rows": {
        "Model": ("Model", "{}", "Name of the row. Its number is that of the first picture."),
        "Accuracy": ("accuracy", "{:.3f}", "Share of test reviews judged right, with Wilson's 95% interval (1927)."),
        "Latency (ms)": ("ms", "{:,.2f}", "Median milliseconds from text to label, one review at a time (MLPerf "
                         "SingleStream). A cascade's is a mean: the student's and its share of the teacher's."),
        "latency_p99_ms": ("p99 ms", "{:,.2f}", "Milliseconds that 99% of single reviews do not exceed."),
        "Throughput (samp/s)": ("reviews/s", "{:,.1f}", "Reviews a second, all at once (MLPerf Offline)."),
        "Speedup (x)": ("x", "{:,.2f}", "Latency of the fine-tuned teacher of step 02 / latency of the row, on the "
                        "same device. A cascade's is of means."),
        "Size (MB)": ("MB", "{:,.2f}", "Megabytes (10^6 bytes) of weights as loaded, or of the ONNX file."),
        "n": ("n", "{:,.0f}", "Test reviews that the row read. Forms and the LLM read fewer."),
        "Type": ("Type", "{}", "What the row is. A form is a student as it is deployed; a cascade is two models."),
    },
    "Compared with others": {
        "better_than_baseline": ("better than baseline", "{}", "Yes or no, if the interval leaves out zero and "
                                 "McNemar's p is below 0.05; else not shown."),
        "diff_baseline": ("minus baseline", "{:+.4f}", f"Accuracy minus the baseline's, {PAIRED}."),
        "diff_control": ("minus control", "{:+.4f}", f"Accuracy minus that of 04a's control, {PAIRED}."),
        "mcnemar_p_control": ("p, control", "{:.2g}", "Exact two-sided p against the control (McNemar 1947)."),
        "diff_teacher": ("minus teacher", "{:+.4f}", f"Accuracy minus that of the row's own teacher, {PAIRED}."),
        "agreement_teacher": ("agrees with teacher", "{:.4f}", "Share of reviews with the teacher's verdict."),
    },
    "Deployable forms": {
        "recommended": ("recommended", "{}",
            f"Yes, unless it loses more than {100 * TOLERATED_LOSS:.1f} points against eager fp32."),
        "diff_eager": ("minus eager fp32", "{:+.4f}", f"Accuracy minus that of the eager fp32 form, {PAIRED}."),
        "mcnemar_p_eager": ("p, eager", "{:.2g}", "Exact two-sided p against the eager fp32 form (McNemar 1947)."),
        "largest_gap_eager": ("largest gap", "{:.4f}", "Largest difference of a review's log-odds from eager fp32's."),
        "speedup_eager": ("x eager fp32", "{:,.2f}", "Latency of the eager fp32 form / latency of the row."),
    },
    "Cascades": {
        "escalated_share": ("handed on", "{:.4f}", "Share of test reviews that the student hands on."),
        "p_low": ("p from", "{:.4f}", "Lower end of the p(positive) between which a review is handed on."),
        "p_high": ("p to", "{:.4f}", "Upper end of it."),
    },
    "Quality and calibration": {
        "majority_share": ("majority", "{:.4f}", "Share of the more frequent class: the accuracy of always saying it."),
        "balanced_accuracy": ("balanced accuracy", "{:.4f}", "Mean of the accuracies on either class."),
        "f1": ("F1", "{:.4f}", "Harmonic mean of precision and recall of the class positive."),
        "f1_macro": ("macro F1", "{:.4f}", "Mean of both classes' F1."),
        "nll": ("NLL", "{:.4f}", "Mean negative log-likelihood of the true labels in nats, before predict.py's "
                "temperature."),
        "ece": ("ECE", "{:.4f}", "Gap between confidence and accuracy, 15 equal-width bins (Guo et al. 2017)."),
        "calibration": ("calibration", "{}", "How the LLM's log-odds were calibrated."),
    },
    "Speed": {
        "latency_p90_ms": ("p90 ms", "{:,.2f}", "Milliseconds that 90% of single reviews do not exceed."),
        "latency_n": ("timed", "{:,.0f}", "Reviews timed one at a time."),
        "latency_passes": ("passes", "{:,.0f}", "Times that these reviews were read."),
        "latency_half_width": ("half width", "{:.4f}", "Half of the 95% interval of the passes' medians / their mean."),
        "latency_quality": ("quality", "{}", "Noisy, if that half width is too large to trust the ratio; else ok."),
        "tokenisation_share": ("tokenising", "{:.4f}", "Share of the latency that the tokenizer takes."),
        "throughput_speedup": ("x, all at once", "{:,.2f}", "Throughput / that of step 02's teacher, likewise."),
        "batch_tokens": ("tokens a batch", "{:,.0f}", "Most tokens in a bulk batch, padding included; 1 is one "
                         "review at a time."),
        "tokens_per_s": ("tokens/s", "{:,.0f}", "Tokens a second, without padding."),
        "padding_share": ("padding", "{:.4f}", "Share of a batch's tokens that are padding."),
        "gflops": ("GFLOP/s", "{:,.1f}", "10^9 floating-point operations a second of bulk scoring, on real tokens."),
        "matrix_peak_share": ("of peak", "{:.4f}", "That rate / the rate of a large matrix product on this device."),
    },
    "Footprint": {
        "Params (M)": ("million parameters", "{:,.3f}", "Parameters, counted, in millions."),
        "load_s": ("load s", "{:,.2f}", "Seconds to load the model."),
        "peak_gpu_memory_mb": ("GPU MB", "{:,.0f}", "Peak megabytes on the GPU."),
        "peak_host_memory_mb": ("host MB", "{:,.0f}", "Peak megabytes in memory, above the process without a model."),
        "price_per_million": ("per million", "{:,.4f}", "Price of a million reviews, at --price-per-hour."),
        "precision": ("precision", "{}", "Arithmetic."),
        "device": ("device", "{}", "Where it ran."),
        "max_length": ("max tokens", "{:,.0f}", "Tokens after which a review is cut."),
        "measured_at": ("measured", "{}", "Date of the measurement."),
    },
    "Injection": {
        "injection_turned": ("turned", "{:.3f}", "Share of reviews whose verdict at least one of four appended texts "
                             "turned, with Wilson's interval. Each asks for the other verdict. The verdict before is "
                             "that with a harmless sentence appended."),
    },
    "Notes": {
        "note": ("note", "{}", "What else to know about the row."),
        "status": ("status", "{}", "Ok; or failed or absent and why, and then there are no figures."),
    },
}  # fmt: skip
FIELDS = {column: field for group in GROUPS.values() for column, field in group.items()}
STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem;
  overflow-wrap: break-word }
h1, h2, h3 { line-height: 1.2 }
.box { overflow-x: auto; margin: 0 0 1rem }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums }
th, td { padding: 0.25rem 0.5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #8886 }
th { vertical-align: bottom; white-space: normal }
th a, dt code { color: inherit }
.text { text-align: left }
td.text { white-space: normal; min-width: 6.5rem; max-width: 24rem }
th:first-child, td:first-child { position: sticky; left: 0; background: Canvas; text-align: left;
  white-space: normal; min-width: 9rem }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 29rem), 1fr)); gap: 0 2rem }
figure { margin: 0 0 1rem }
svg { max-width: 100%; height: auto; display: block }
figcaption { font-size: 0.85rem }
dt { font-weight: 600; margin-top: 0.6rem }
dd { margin: 0 }
"""


def as_markdown(table: pd.DataFrame) -> str:
    """A Markdown table of COLUMNS and n, with the accuracy's interval."""
    shown = table[COLUMNS].copy()
    shown["Accuracy"] = [
        f"{row['Accuracy']:.4f} [{row['ci_low']:.4f}, {row['ci_high']:.4f}]" if row["status"] == "ok" else state(row)
        for _, row in table.iterrows()
    ]
    shown["n"] = table["n"]
    return markdown(shown)


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table of any cells, padded so that an editor shows its columns aligned."""
    rows = ([("" if pd.isna(v) else str(v).replace("|", "\\|")) for v in row] for row in table.to_numpy(object))
    cells = [list(map(str, table.columns)), *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def as_text(table: pd.DataFrame) -> str:
    """The table for a console, at most 100 characters wide, so that a notebook does not wrap it."""
    heads = ("Model", "Type", "Accuracy", "ms", "reviews/s", "x", "MB", "n")
    rows = [heads]
    for _, row in table.iterrows():
        kind, name = str(row["Type"]), str(row["Model"])
        if kind.startswith("form"):  # the type shows what follows the last comma
            name = pictures.short_name(row).rpartition(",")[0] or name
        elif kind == "cascade":
            name = name.partition(", ")[2] or name
        else:
            name = name.partition(" from ")[0].removesuffix(" control")  # the type shows the rest
        if row["status"] != "ok":
            rows.append((name, kind, state(row), *[""] * 5))
            continue
        accuracy = f"{row['Accuracy']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
        numbers = ("" if pd.isna(row[column]) else f"{row[column]:,.1f}" for column in COLUMNS[3:7])
        rows.append((name, kind, accuracy, *numbers, f"{row['n']:,.0f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    widths[0] = min(widths[0], 99 - sum(widths[1:]) - len(heads))
    lines, seen = [], Counter()
    for name, *cells in rows:
        name = name[: widths[0]]
        seen[name, cells[0]] += 1
        if (count := seen[name, cells[0]]) > 1:  # cut names may be equal
            name = f"{name[: widths[0] - 3]} #{count}"
        left = (cell.ljust(width) for cell, width in zip([name, *cells[:2]], widths))
        right = (cell.rjust(width) for cell, width in zip(cells[2:], widths[3:]))
        lines.append(" ".join([*left, *right]).rstrip())
    return "\n".join(lines)


def state(row: pd.Series) -> str:
    """The first word of a row's status: ok, failed or absent."""
    return str(row["status"]).partition(":")[0]


def cell(row: pd.Series, column: str) -> str:
    """A figure as the report shows it, with its interval where it has one. It is empty where there is none."""
    if pd.isna(row.get(column)):
        return ""
    form, ends = FIELDS[column][1], [row.get(end) for end in INTERVALS.get(column, ())]
    interval = "" if not ends or any(map(pd.isna, ends)) else f" [{', '.join(map(form.format, ends))}]"
    return form.format(row[column]) + interval


def what_to_deploy(table: pd.DataFrame) -> list[str]:
    """The advice that benchmark.csv supports, one line per question, and what it cannot tell."""
    ok = table[table["status"] == "ok"]
    kinds = {kind: ok[ok["Type"].str.startswith(kind)] for kind in pictures.COLOURS}
    lines = [*best_student(kinds), *best_form(kinds["form"]), *(rule(row) for _, row in kinds["cascade"].iterrows())]
    no_better = ok[ok["Accuracy"] <= ok["majority_share"]] if "majority_share" in ok else ok.iloc[:0]
    if len(no_better):
        names = (f"{row['Model']} ({cell(row, 'Accuracy')})" for _, row in no_better.iterrows())
        lines.append(f"No better than always saying the more frequent class: {'; '.join(names)}.")
    if "latency_quality" in ok and len(noisy := ok.loc[ok["latency_quality"] == "noisy", "Model"]):
        lines.append(f"These latencies are noisy, so their ratios are rough: {'; '.join(noisy)}.")
    for word in ("failed", "absent"):
        if names := [row["Model"] for _, row in table.iterrows() if state(row) == word]:
            lines.append(f"{word.capitalize()}: {'; '.join(names)}.")
    if missing := [kind for kind, rows in kinds.items() if not len(rows)]:
        lines.append(f"Kinds without figures: {', '.join(missing)}.")
    return lines


def best_student(kinds: dict[str, pd.DataFrame]) -> list[str]:
    """The student to take: its accuracy, whether it is better than others, its speed and size."""
    students = (kinds["student"] if len(kinds["student"]) else kinds["form"]).sort_values("Accuracy", ascending=False)
    if not len(students):
        return ["No student was measured, so none can be recommended."]
    exported = [name for name in students["Model"] if kinds["form"]["Model"].str.startswith(f"{name}, ").any()]
    chosen = students["Model"] == (exported[0] if len(exported) == 1 else students["Model"].iloc[0])
    best, others = students[chosen].iloc[0], students[~chosen]
    how = "Validation prefers this" if len(exported) == 1 < len(students) else "The most accurate"
    kind = str(best["Type"]).partition(",")[0]
    accuracy = f"{how} {kind}: {best['Model']}, {cell(best, 'Accuracy')} on {cell(best, 'n')} reviews."
    for _, other in others.head(1).iterrows():
        accuracy += f" The other one, {other['Model']}, has {cell(other, 'Accuracy')}."
    verdicts = []
    for other in ("teacher", "baseline", "control"):
        if difference := cell(best, f"diff_{other}"):
            low, high = (best[end] for end in INTERVALS[f"diff_{other}"])
            whose, verdict = "its" if other == "teacher" else "the", metrics.verdict(low, high)
            if other == "baseline":  # McNemar's test has a say there too
                verdict = cell(best, "better_than_baseline") or verdict
            verdicts.append(f"Better than {whose} {other}: {verdict} ({difference}).")
    teachers = kinds["teacher"].loc[kinds["teacher"]["Type"] == ENCODER, "Model"]
    one, many = (cell(best, column) for column in ("Speedup (x)", "throughput_speedup"))
    ratio = "Its speed-up over a teacher was not measured."
    if one and many and len(teachers):
        ratio = f"It is {one}x as fast as {teachers.iloc[0]} on one review and {many}x on many at once."
    tail = f", and 99% take at most {cell(best, 'latency_p99_ms')} ms" if cell(best, "latency_p99_ms") else ""
    cost = f"The median review takes {cell(best, 'Latency (ms)')} ms{where(best)}{tail}. {ratio}"
    cost += f" Its weights take {cell(best, 'Size (MB)')} MB."
    return list(filter(None, [accuracy, " ".join(verdicts), cost]))


def best_form(forms: pd.DataFrame) -> list[str]:
    """The fastest recommended form, and the forms that are not recommended."""
    if "recommended" not in forms or not len(forms):
        return []
    line, good = "No form is recommended.", forms[forms["recommended"] == "yes"].sort_values("Latency (ms)")
    for _, row in good.head(1).iterrows():
        line = f"The fastest recommended form here is {row['Model']}: {cell(row, 'Latency (ms)')} ms{where(row)}"
        if row["Type"] != EAGER and cell(row, "speedup_eager"):
            line += f", {cell(row, 'speedup_eager')}x as fast as eager fp32, {cell(row, 'diff_eager')} in accuracy"
        line += f", n {cell(row, 'n')}."
    if len(bad := forms[forms["recommended"] == "not recommended"]):
        line += f" Not recommended: {'; '.join(pictures.short_name(row) for _, row in bad.iterrows())}."
    return [line]


def rule(row: pd.Series) -> str:
    """What a cascade does, as an instruction with its result."""
    student, _, second = row["Model"].rpartition(", then ")
    if not row.get("escalated_share", 0) > 0:
        return f"The cascade from {student} to {second} hands on no review."
    return (
        f"Cascade: {student} reads all reviews; send those with p(positive) between {cell(row, 'p_low')} and "
        f"{cell(row, 'p_high')} to {second}. That is {row['escalated_share']:.1%} of reviews, with accuracy "
        f"{cell(row, 'Accuracy')} and a mean of {cell(row, 'Latency (ms)')} ms."
    )


def where(row: pd.Series) -> str:
    """The device of a row's times, which may differ from another row's."""
    return f" on {cell(row, 'device')}" if cell(row, "device") else ""


def anchor(column: str) -> str:
    """The id of a column's explanation."""
    return "column-" + re.sub(r"\W+", "-", column).strip("-")


def look(column: str) -> str:
    """The CSS class of a column's cells: figures stand at the right, words at the left."""
    return ' class="text"' if FIELDS[column][1] == "{}" else ""


def group_table(table: pd.DataFrame, group: str) -> str:
    """One group's columns as an HTML table. A column without figures is left out, and so is a row, but not of all."""
    first = group == "All rows"
    columns = [column for column in GROUPS[group] if column in table and table[column].notna().any()]
    shown = list(dict.fromkeys(["Model", *columns]))
    body = []
    for number, (_, row) in enumerate(table.iterrows(), start=1):
        cells = {column: cell(row, column) for column in shown}
        if group == "Notes" and cells.get("status") == "ok":
            cells["status"] = ""
        if first and row["status"] != "ok":
            cells["Accuracy"] = state(row)
        if first or any(cells[column] for column in shown[1:]):
            cells["Model"] = f"{number}. {cells['Model'] if first else pictures.short_name(row)}"
            body.append("".join(f"<td{look(column)}>{escape(cells[column])}</td>" for column in shown))
    heads = (f'<th{look(column)}><a href="#{anchor(column)}">{escape(FIELDS[column][0])}</a></th>' for column in shown)
    return f"<h3>{group}</h3>" + html_table(heads, body) if body else ""


def html_table(heads: Iterable[str], rows: Iterable[str]) -> str:
    """A table that scrolls within its own box, made of HTML heads and rows of cells."""
    head, lines = "".join(heads), "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="box"><table><thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table></div>'


def attack_table(attacks: pd.DataFrame) -> str:
    """The share of reviews that each added sentence turned, folded away."""
    if not len(attacks):
        return ""
    body = [
        f"<td>{escape(row['Model'])}</td><td>{row['turned']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]</td>"
        f'<td>{row["n"]:,.0f}</td><td class="text">{escape(row["attack"])}</td>'
        for _, row in attacks[attacks["attack"] != "any attack"].iterrows()
    ]
    table = html_table((f"<th>{head}</th>" for head in ("Model", "turned", "n", "added sentence")), body)
    return f"<details><summary>Each added sentence; {{wanted}} is the other verdict</summary>{table}</details>"


def definitions(table: pd.DataFrame) -> str:
    """What each column of the table means, as an HTML definition list."""
    lines = []
    for column, (head, _, meaning) in FIELDS.items():
        names = [name for name in (column, *INTERVALS.get(column, ())) if name in table]
        if column in table:
            codes = " ".join(f"<code>{escape(name)}</code>" for name in names)
            shown = codes if head == column else f"{escape(head)} {codes}"
            lines.append(f'<dt id="{anchor(column)}">{shown}</dt><dd>{escape(meaning)}</dd>')
    return "<dl>" + "\n".join(lines) + "</dl>"


def machine(environment: dict) -> str:
    """The machine on which the figures were measured, in one line."""
    forms = {"device": "{}", "precision": "{}", "cpu": "{}", "cpu_capability": "{}", "logical_cpus": "{} logical CPUs"}
    forms |= {"torch_threads": "{} threads", "platform": "{}", "cuda": "CUDA {}"}
    forms |= {"measured_minutes": "last run {:.0f} minutes", "drift": "latency at the end / at the beginning {:.2f}"}
    known = {name: environment[name] for name in forms if environment.get(name) is not None}
    return ", ".join(forms[name].format(fact) for name, fact in known.items())


def read(folder: Path) -> pd.DataFrame:
    """The benchmark's table; stops if it is damaged."""
    try:
        table = read_csv(folder / "benchmark.csv")
    except ValueError as problem:  # pandas' errors are ValueErrors
        stop(f"{folder / 'benchmark.csv'} is damaged ({problem}): run 05_benchmark.py")
    if "status" not in table or table["status"].isna().any():
        stop(f"{folder / 'benchmark.csv'} is damaged (a row has no status): run 05_benchmark.py")
    return table


def read_csv(file: Path) -> pd.DataFrame:
    """A CSV of 05. A model may be named by a number, or NA."""
    return pd.read_csv(file, dtype={"Model": str}, keep_default_na=False, na_values=[""])


def write_report(folder: Path) -> None:
    """Write benchmark.md, accuracy_latency.png and report.html from the other files of 05 in `folder`."""
    table, files = read(folder), {}
    for name in ("latency.parquet", "predictions.parquet", "sweep.csv", "cascade.csv", "injection.csv"):
        file, load = folder / name, read_csv if name.endswith("csv") else storage.read_table
        there = file.exists() and file.stat().st_size > 2  # pandas reads no CSV without columns
        files[file.stem] = load(file) if there else pd.DataFrame()
    environment = storage.intact_json(folder / "environment.json") or {}
    days = sorted(set(table["measured_at"].dropna().astype(str).str[:10])) if "measured_at" in table else []
    facts = [" to ".join(dict.fromkeys([*days[:1], *days[-1:]])), machine(environment)]
    groups = "".join(group_table(table, group) for group in GROUPS)
    advice = "".join(f"<li>{escape(line)}</li>" for line in what_to_deploy(table))
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Sentiment benchmark</title>',
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>',
        f"<h1>Sentiment benchmark</h1><p>{escape('. '.join(filter(None, facts)))}</p>",
        f"<h2>What to deploy</h2><ul>{advice}</ul>",
        f"<h2>Tables</h2>{groups}{attack_table(files['injection'])}",
        f'<h2>Pictures</h2><div class="pictures">{pictures.all_figures(table, files)}</div>',
        f"<h2>What each column means</h2>{definitions(table)}</body></html>",
    ]
    with whole(folder / "benchmark.md") as temporary:
        temporary.write_text(as_markdown(table), encoding="utf-8")
    pictures.draw_accuracy_latency(table, folder / "accuracy_latency.png")
    with whole(folder / "report.html") as temporary:
        temporary.write_text("\n".join(parts) + "\n", encoding="utf-8")
