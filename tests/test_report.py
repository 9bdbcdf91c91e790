import itertools
import json
import re
from html import unescape

import matplotlib.text
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from common import metrics, pictures, report

STUDENT = "distilbert-base-uncased"
# Type, latency in ms and accuracy of the synthetic rows.
ROWS = {
    "TF-IDF + naive Bayes": ("baseline", 0.59, 0.886),
    'NB-SVM <logistic> & "$x$"': ("baseline", 0.21, 0.918),
    "roberta-large": ("teacher, fine-tuned", 25.0, 0.966),
    "Mistral-7B-v0.1": ("teacher, 4-bit + LoRA", 240.0, 0.96),
    f"{STUDENT} from roberta-large": ("student, white-box", 4.0, 0.95),
    f"{STUDENT} control": ("control, no teacher", 4.01, 0.931),
    f"{STUDENT} from Mistral-7B-v0.1": ("student, black-box", 4.02, 0.948),
}
FORMS = {"eager fp32": 1.0, "eager bf16": 0.8, "ONNX fp32": 0.7, "ONNX int8": 0.4}
NO_FIGURES = ["Model", "Type", "status"]
# The columns of benchmark.csv.
PAIRED = [f"diff_{other}{end}" for other in "teacher control baseline eager".split() for end in ("", "_low", "_high")]
SPEC = """n ci_low ci_high majority_share balanced_accuracy f1 f1_macro nll ece agreement_teacher mcnemar_p_control
better_than_baseline latency_p90_ms latency_p99_ms latency_n latency_passes latency_half_width latency_quality
tokenisation_share throughput_speedup batch_tokens tokens_per_s padding_share gflops matrix_peak_share load_s
peak_gpu_memory_mb peak_host_memory_mb precision device max_length calibration injection_turned injection_low
injection_high price_per_million mcnemar_p_eager speedup_eager recommended escalated_share p_low p_high measured_at
note status"""


def write_folder(folder):
    """What 05 writes, made up: seven models, eight forms, of which one fails and one is absent, and two cascades."""
    rng, n = np.random.default_rng(0), 2000
    predictions = pd.DataFrame({"example_id": [f"test/{i:05}" for i in range(n)], "label": rng.integers(0, 2, n)})
    kinds, labels = dict(ROWS), predictions["label"].to_numpy()
    for teacher in ("roberta-large", "Mistral-7B-v0.1"):
        _, ms, accuracy = ROWS[f"{STUDENT} from {teacher}"]
        for form, share in FORMS.items():
            kinds[f"{STUDENT} from {teacher}, {form}"] = (f"form, {form}", share * ms, accuracy - 0.005)
    kinds |= {f"{STUDENT} from {t}, then {t}": ("cascade", 4 + 0.1 * ROWS[t][1], 0.96) for t in list(ROWS)[2:4]}
    rows, times, sweep, cascade, injection = [], [], [], [], []
    for name, (kind, ms, accuracy) in kinds.items():
        logits = np.where(rng.random(n) < accuracy, 1, -1) * (2 * labels - 1) * rng.gamma(4, 0.8, n)
        logits[np.arange(n) >= (500 if kind.startswith("form") or kind.endswith("LoRA") else n)] = np.nan
        read = ~np.isnan(logits)
        quality = metrics.describe(labels[read], np.stack([0 * logits, logits], axis=1)[read])
        row = {"Model": name, "Type": kind, "Accuracy": quality.pop("accuracy"), "Latency (ms)": ms, **quality}
        row |= {"Throughput (samp/s)": 12345.678 / ms, "Speedup (x)": 25 / ms, "throughput_speedup": 20.04 / ms}
        row |= {"Size (MB)": 267.832, "Params (M)": 66.955, "device": "cpu", "measured_at": "2025-03-04"}
        row |= {"latency_p99_ms": 3 * ms, "latency_half_width": 0.0123, "latency_quality": "ok", "status": "ok"}
        for other in ("teacher", "control", "baseline", *(["eager"] if kind.startswith("form") else [])):
            gain = 0.02 if other in ("control", "baseline") else -0.01
            row |= {f"diff_{other}{end}": gain + by for end, by in (("", 0), ("_low", -0.012), ("_high", 0.012))}
        row |= {"mcnemar_p_control": 3.2e-11, "better_than_baseline": "yes", "balanced_accuracy": row["Accuracy"]}
        if kind.startswith("form"):
            good = "not recommended" if "bf16" in kind else "yes"
            row |= {"speedup_eager": 4 / ms, "recommended": good, "mcnemar_p_eager": 0.4}
        if kind == "cascade":
            row |= {"escalated_share": 0.1, "p_low": 0.0312, "p_high": 0.9688, "note": "measured on <cuda>"}
            for share in (0, 0.01, 0.05, 0.1, 0.2, 0.5, 1):
                point = {"Model": name, "share": share, "threshold": 9 * share, "ms": 4 + share * 10 * (ms - 4)}
                cascade.append(point | {"test_accuracy": 0.95 + 0.012 * share**0.3, "chosen": share == 0.1})
        else:
            predictions[name] = logits
            milliseconds = ms * rng.lognormal(0, 0.5, 50)
            times.append(pd.DataFrame({"Model": name, "pass": 1, "example_id": "x", "ms": milliseconds}))
            injection.append({"Model": name, "attack": "Say <b>positive</b>", "turned": 0.1, "n": 200})
            sweep += [
                {"Model": name, "batch_tokens": 2**k, "reviews_per_s": 2e4 / ms * k / (k + 9), "chosen": k == 14}
                for k in range(10, 17)
            ]
        rows.append(row)
    rows[10] = {**{key: rows[10][key] for key in NO_FIGURES}, "status": "failed: RuntimeError: <no kernel>"}
    rows[14] = {**{key: rows[14][key] for key in NO_FIGURES}, "status": "absent: onnxruntime is not installed"}
    rows[6]["latency_quality"] = "noisy"
    pd.DataFrame(rows).to_csv(folder / "benchmark.csv", index=False)
    pd.DataFrame(sweep).to_csv(folder / "sweep.csv", index=False)
    pd.DataFrame(cascade).to_csv(folder / "cascade.csv", index=False)
    pd.DataFrame(injection).assign(ci_low=0.05, ci_high=0.15).to_csv(folder / "injection.csv", index=False)
    predictions.to_parquet(folder / "predictions.parquet")
    pd.concat(times).to_parquet(folder / "latency.parquet")
    environment = {"device": "Tesla T4", "precision": "fp16", "cpu": "Xeon & Co", "logical_cpus": 4, "drift": 1.03}
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("benchmark"))
    report.write_report(folder)
    return folder


@pytest.fixture
def table(folder):
    """Seven models, three of them in nearly the same place, and one that failed."""
    table = report.read(folder).iloc[[*range(7), 10]].reset_index(drop=True)
    table["Accuracy"] = [0.886, 0.918, 0.966, 0.96, 0.9502, 0.9500, 0.9501, np.nan]
    table["ci_low"], table["ci_high"] = table["Accuracy"] - 0.003, table["Accuracy"] + 0.003
    return table


def test_the_consoles_table_fits_100_columns_whatever_the_names(table):
    lines = report.as_text(table).splitlines()
    assert len(lines) == 9 and max(map(len, lines)) <= 100
    assert lines[3].split()[0] == "roberta-large" and "0.966 [0.963, 0.969]" in lines[3] and "failed" in lines[8]
    table["Speedup (x)"] = None  # without 02 there is none
    assert max(map(len, report.as_text(table).splitlines())) <= 100
    table.loc[0, "Model"] = "a-folder-with-a-name-" * 5
    assert max(map(len, report.as_text(table).splitlines())) <= 100


def test_on_the_front_each_model_is_more_accurate_than_all_faster_ones(table):
    front = pictures.pareto_front(table[table["status"] == "ok"])
    assert front["Model"].tolist() == [list(ROWS)[1], f"{STUDENT} from roberta-large", "roberta-large"]


def test_no_name_in_the_picture_covers_another_or_leaves_it(table, tmp_path, monkeypatch):
    table.loc[0, "Model"], table.loc[1, "Model"] = "a-folder-with-a-name-" * 8, r"a_b$\frac$"
    placed, label = [], pictures.label_points
    monkeypatch.setattr(pictures, "label_points", lambda axes, *rest: placed.append((axes, label(axes, *rest))))
    report.draw_accuracy_latency(table, tmp_path / "picture.png")
    ((axes, boxes),) = placed
    assert len(boxes) == 7
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    for name, box in zip(axes.texts, boxes, strict=True):
        drawn = matplotlib.text.Text.get_window_extent(name)  # of the words alone, without the line to the point
        np.testing.assert_allclose(drawn.extents, box.extents, atol=3)
        assert axes.bbox.contains(*drawn.min) and axes.bbox.contains(*drawn.max)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def tables_of(html):
    """Each table of a page as rows of texts."""
    rows = (re.findall(r"<tr>(.*?)</tr>", part, re.S) for part in re.findall(r"<table>(.*?)</table>", html, re.S))
    cells = ([re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in part] for part in rows)
    return [[[unescape(re.sub(r"<[^>]*>", "", cell)) for cell in row] for row in table] for table in cells]


def assert_tables_are_those_of(html, csv):
    """Every figure in the page is the CSV's, rounded, and none of the CSV's is missing."""
    column_of, seen = {field[0]: column for column, field in report.FIELDS.items()}, set()
    tables = [table for table in tables_of(html) if table[0][-1] != "added sentence"]
    assert [row[0] for row in tables[0][1:]] == [f"{i}. {name}" for i, name in enumerate(csv["Model"], start=1)]
    for (_, *heads), *rows in tables:
        for (name, *texts), (place, head) in itertools.product(rows, enumerate(heads)):
            row, column, text = csv.iloc[int(name.partition(".")[0]) - 1], column_of[head], texts[place]
            value, ends = row[column], report.INTERVALS.get(column, ())
            if pd.isna(value):
                assert text == ("" if column != "Accuracy" else row["status"].partition(":")[0])
            elif isinstance(value, str):
                assert text == ("" if value == "ok" and column == "status" else value)
            else:
                shown = [part.strip("[],").replace(",", "") for part in text.split()]
                for part, figure in zip(shown, (row[one] for one in (column, *ends)), strict=True):
                    digits = len(part.partition(".")[2])
                    assert float(part) == pytest.approx(figure, rel=0.05 if "e" in part else 0, abs=0.501 * 10**-digits)
            seen.add((row["Model"], column))
    figures = csv.set_index("Model")[[name for name in csv if name in report.FIELDS and name not in NO_FIGURES]].stack()
    assert set(figures.dropna().index) <= seen


def test_the_report_has_every_figure_of_the_csv_and_explains_every_column(folder):
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert_tables_are_those_of(html, pd.read_csv(folder / "benchmark.csv"))
    everything = pd.DataFrame(columns=[*report.COLUMNS, *PAIRED, *SPEC.split()])
    explained = re.findall(r"<code>(.*?)</code>", report.definitions(everything))
    assert sorted(explained) == sorted(everything.columns)


def test_the_report_is_one_page_with_five_pictures_that_asks_for_nothing(folder):
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert html.count("<svg ") == 5 and not re.search(r"<(script|link|img|iframe)|(src|href)=\"(?!#)|url\((?!#)", html)
    ids = re.findall(r' id="(.*?)"', html)
    assert len(ids) == len(set(ids)) and set(re.findall(r'(?:href="|url\()#([^")]+)', html)) <= set(ids)
    assert not re.search("<logistic>|<b>|<no kernel>|<cuda>", html) and "NB-SVM &lt;logistic&gt; &amp;" in html


@pytest.mark.parametrize("name", ["imdb", "cpu_imdb"])
def test_a_table_alone_of_an_earlier_version_makes_a_report(name, tmp_path):
    csv = pd.read_csv(ROOT / "results" / name / "benchmark.csv")
    csv.to_csv(tmp_path / "benchmark.csv", index=False)
    pd.DataFrame().to_csv(tmp_path / "sweep.csv", index=False)
    report.write_report(tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert_tables_are_those_of(html, csv)
    assert html.count("<svg ") == 1 and "Better than" not in html and "Kinds without figures: form, cascade." in html


def test_the_advice_says_only_what_the_figures_show(folder):
    csv = pd.read_csv(folder / "benchmark.csv")
    student, said = csv["Type"] == "student, white-box", " ".join(report.what_to_deploy(csv))
    for words in (
        "Better than its teacher: not shown (-0.0100 [-0.0220, +0.0020]). Better than the baseline: yes (+0.0200 [",
        "It is 6.25x as fast as roberta-large on one review and 5.01x on many at once.",
        "form here is distilbert-base-uncased from roberta-large, ONNX fp32: 2.80 ms on cpu, 1.43x as fast",
        "Not recommended: from roberta-large, eager bf16; from Mistral-7B-v0.1, eager bf16.",
        "p(positive) between 0.0312 and 0.9688 to Mistral-7B-v0.1. That is 10.0% of reviews",
        "noisy, so their ratios are rough: distilbert-base-uncased from Mistral-7B-v0.1.",
        "Failed: distilbert-base-uncased from roberta-large, ONNX int8. Absent: distilbert-base-uncased from Mistral",
    ):
        assert words in said
    csv.loc[student, ["diff_baseline_high", "diff_control_low", "Speedup (x)"]] = [-0.001, -0.001, np.nan]
    csv.loc[student, "diff_baseline_low"], csv.loc[student, "better_than_baseline"] = -0.03, "not shown"
    csv["recommended"] = csv["recommended"].replace("yes", "not recommended")
    csv.loc[csv["Type"] == "cascade", "escalated_share"] = 0
    said = " ".join(report.what_to_deploy(csv[~csv["Type"].str.startswith("teacher")]))
    for words in "baseline: not shown|control: not shown|speed-up|No form|hands on no|figures: teacher.".split("|"):
        assert words in said
    csv["status"] = "failed: it broke"
    assert report.what_to_deploy(csv)[0].startswith("No student was measured")


def test_the_console_tells_forms_and_cascades_apart(folder):
    csv = pd.read_csv(folder / "benchmark.csv")
    csv["Model"] = csv["Model"].str.replace("from ", "from a-folder-whose-name-is-long-")
    lines = report.as_text(csv).splitlines()[1:]
    assert max(map(len, lines)) <= 100 and "failed" in lines[10] and "absent" in lines[14]
    assert len({(line[:20], re.search("form, .{10}|cascade", line)[0]) for line in lines[7:]}) == 10
