import itertools
import json
import re
import shutil
import subprocess
from html import unescape

import matplotlib.text
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from common import pictures, report

STUDENT, TEACHER, ODD = "demo-distilbert from demo-mistral", "demo-mistral", 'NB-SVM <logistic> & "$x$"'
NO_FIGURES = ["Model", "Type", "status"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --allow-file-access-from-files --enable-logging=stderr --hide-scrollbars
--proxy-server=127.0.0.1:9 --virtual-time-budget=5000""".split()
# Chromium's own window is never as narrow as a phone, but a frame is.
PHONE = """<title></title><iframe src="report.html" style="width:380px;height:2000px;border:0"></iframe><script>
onload = () => {
  const page = frames[0], root = page.document.documentElement
  document.title = [page.innerWidth, root.scrollWidth, page.performance.getEntriesByType("resource").length]
}
</script>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What 05 writes: the demo's table with more that can happen, and results/deploy's files for three of its rows."""
    folder, rng = tmp_path_factory.mktemp("benchmark"), np.random.default_rng(0)
    names = {"NB-SVM (logistic)": ODD, "minilm-l6 from mpnet-base": STUDENT}
    csv = report.read(ROOT / "results/demo").replace({"Model": names})
    csv.loc[csv["Model"] == ODD, "latency_quality"] = "noisy"
    csv.loc[csv["Type"] == "form, ONNX int8", "recommended"] = "not recommended"
    joint = csv[csv["Model"] == STUDENT].assign(Model=f"{STUDENT}, then {TEACHER}", Type="cascade", latency_n=np.nan)
    joint = joint.assign(escalated_share=0.04, p_low=0.2, p_high=0.8, note="measured on <cuda>")
    csv = pd.concat([csv[csv["Type"] != "cascade"], joint])  # the demo's student may be as good as its teacher
    failed = (f"{STUDENT}, eager bf16", "form, eager bf16", "failed: RuntimeError: <no kernel>")
    absent = ("demo-distilbert from demo-roberta, ONNX fp32", "form, ONNX fp32", "absent: onnxruntime is not installed")
    csv = pd.concat([csv, pd.DataFrame([failed, absent], columns=NO_FIGURES)])
    csv.to_csv(folder / "benchmark.csv", index=False)
    for name in ("sweep", "injection"):
        pd.read_csv(ROOT / f"results/deploy/{name}.csv").replace({"Model": names}).to_csv(folder / f"{name}.csv")
    pd.read_parquet(ROOT / "results/deploy/predictions.parquet").rename(columns=names).to_parquet(
        folder / "predictions.parquet"
    )
    times = csv.dropna(subset="latency_n").loc[:, ["Model", "Latency (ms)"]].loc[lambda rows: rows.index.repeat(50)]
    times.assign(ms=times["Latency (ms)"] * rng.lognormal(0, 0.5, len(times))).to_parquet(folder / "latency.parquet")
    curve = pd.DataFrame({"Model": f"{STUDENT}, then {TEACHER}", "ms": [4, 6, 24], "test_accuracy": [0.95, 0.96, 0.96]})
    curve.assign(chosen=[False, True, False]).to_csv(folder / "cascade.csv", index=False)
    (folder / "environment.json").write_text(json.dumps({"device": "Tesla <T4>", "logical_cpus": 4, "drift": 1.03}))
    report.write_report(folder)
    return folder


@pytest.fixture
def table(folder):
    """Seven models, three of them in nearly the same place, and one that failed."""
    table = report.read(folder)
    table = table[~table["Type"].str.match("form.*(32|8)|cascade")].reset_index(drop=True)
    table["Latency (ms)"] = [0.59, 0.21, 25, 240, 4, 4.01, 4.02, np.nan]
    table["Accuracy"] = [0.886, 0.918, 0.966, 0.96, 0.9502, 0.9500, 0.9501, np.nan]
    table["ci_low"], table["ci_high"] = table["Accuracy"] - 0.003, table["Accuracy"] + 0.003
    return table


def test_the_consoles_table_fits_100_columns_and_tells_forms_and_cascades_apart_whatever_the_names(folder, table):
    lines = report.as_text(table).splitlines()
    assert len(lines) == 9 and max(map(len, lines)) <= 100
    assert lines[3].split()[0] == "demo-roberta" and "0.966 [0.963, 0.969]" in lines[3] and "failed" in lines[8]
    table["Speedup (x)"] = None  # without 02 there is none
    assert max(map(len, report.as_text(table).splitlines())) <= 100
    csv = report.read(folder)
    csv["Model"] = csv["Model"].str.replace("from ", "from a-folder-whose-name-is-long-")
    csv.loc[0, "Model"] = "a-folder-with-a-name-" * 5
    lines = report.as_text(csv).splitlines()
    assert max(map(len, lines)) <= 100 and "failed" in lines[-2] and "absent" in lines[-1]
    assert len({re.match(".*(form, .{10}|cascade)", line)[0] for line in lines[8:]}) == len(csv) - 7


def test_on_the_front_each_model_is_more_accurate_than_all_faster_ones_and_no_control_stands_there(
    table, tmp_path, monkeypatch
):
    front, drawn, of = [ODD, "demo-distilbert from demo-roberta", "demo-roberta"], [], pictures.pareto_front
    assert of(table[table["status"] == "ok"])["Model"].tolist() == front
    monkeypatch.setattr(pictures, "pareto_front", lambda rows: drawn.append(of(rows)) or drawn[-1])
    table.loc[table["Type"] == "control, no teacher", "Latency (ms)"] = 3.0  # only noise makes it faster
    pictures.draw_accuracy_latency(table, tmp_path / "picture.png")
    assert drawn[0]["Model"].tolist() == front


def test_no_name_in_the_picture_covers_another_or_leaves_it(table, tmp_path, monkeypatch):
    table.loc[0, "Model"], table.loc[1, "Model"] = "a-folder-with-a-name-" * 8, r"a_b$\frac$"
    placed, label = [], pictures.label_points
    monkeypatch.setattr(pictures, "label_points", lambda axes, *rest: placed.append((axes, label(axes, *rest))))
    pictures.draw_accuracy_latency(table, tmp_path / "picture.png")
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
    html, csv = (folder / "report.html").read_text(encoding="utf-8"), pd.read_csv(folder / "benchmark.csv")
    assert_tables_are_those_of(html, csv)
    explained = re.findall(r"<code>(.*?)</code>", html.partition("<dl>")[2])
    assert sorted(explained) == sorted(csv.columns)


def test_the_report_is_one_page_with_five_pictures_that_asks_for_nothing(folder):
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert html.count("<svg ") == 5 and not re.search(r"<(script|link|img|iframe)|(src|href)=\"(?!#)|url\((?!#)", html)
    ids = re.findall(r' id="(.*?)"', html)
    assert len(ids) == len(set(ids)) and set(re.findall(r'(?:href="|url\()#([^")]+)', html)) <= set(ids)
    assert not re.search("<logistic>|<no kernel>|<cuda>|<T4>|</s>", html) and "NB-SVM &lt;logistic&gt; &amp;" in html


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
    student, rows = csv["Model"] == STUDENT, csv.set_index("Model")
    csv.loc[student, ["diff_teacher", "diff_teacher_low", "diff_teacher_high"]] = -0.01, -0.022, 0.002
    best, form, cascade = (rows.loc[f"{STUDENT}{end}"] for end in ("", ", ONNX fp32", f", then {TEACHER}"))
    one, many = best["Speedup (x)"], best["throughput_speedup"]
    said = " ".join(report.what_to_deploy(csv))
    for words in (
        "Better than its teacher: not shown (-0.0100 [-0.0220, +0.0020]). Better than the baseline: yes (+0.",
        f"It is {one:.2f}x as fast as demo-roberta on one review and {many:.2f}x on many at once.",
        f"form here is {form.name}: {form['Latency (ms)']:.2f} ms on cpu, {form['speedup_eager']:.2f}x as fast",
        "Not recommended: from demo-mistral, ONNX int8.",
        f"p(positive) between {cascade['p_low']:.4f} and {cascade['p_high']:.4f} to {TEACHER}. "
        f"That is {cascade['escalated_share']:.1%} of reviews",
        f"noisy, so their ratios are rough: {ODD}",
        f"Failed: {STUDENT}, eager bf16. Absent: demo-distilbert from demo-roberta, ONNX fp32.",
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


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_shows_the_figures_asks_for_nothing_and_prints_no_error_and_a_phone_shows_the_width(folder):
    (folder / "phone.html").write_text(PHONE, encoding="utf-8")
    pages = {}
    for name in ("report.html", "phone.html"):
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", (folder / name).as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert "CONSOLE" not in done.stderr
        pages[name] = done.stdout
    assert_tables_are_those_of(pages["report.html"], pd.read_csv(folder / "benchmark.csv"))
    measured = re.search("<title>(.*?)</title>", pages["phone.html"])[1]
    assert measured == "380,380,0"  # the frame's width, the page's, and the files that it asked for
