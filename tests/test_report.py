import itertools

import matplotlib
import matplotlib.text
import numpy as np
import pandas as pd
import pytest

from common import report

matplotlib.use("agg")
STUDENT = "distilbert-base-uncased"


@pytest.fixture
def table():
    """Seven models, three of them in nearly the same place, and one that failed."""
    rows = [
        ("TF-IDF + naive Bayes", "baseline", 0.886, 5.9),
        ("NB-SVM (logistic)", "baseline", 0.918, 0.6),
        ("roberta-large", "teacher, fine-tuned", 0.966, 25.0),
        ("Mistral-7B-v0.1", "teacher, 4-bit + LoRA", 0.96, 240.0),
        (f"{STUDENT} from roberta-large", "student, white-box", 0.9502, 4.0),
        (f"{STUDENT} control", "control, no teacher", 0.9500, 4.01),
        (f"{STUDENT} from Mistral-7B-v0.1", "student, black-box", 0.9501, 4.02),
        ("broken", "baseline", np.nan, np.nan),
    ]
    table = pd.DataFrame(rows, columns=["Model", "Type", "Accuracy", "Latency (ms)"])
    table["ci_low"], table["ci_high"] = table["Accuracy"] - 0.003, table["Accuracy"] + 0.003
    table["Throughput (samp/s)"], table["Speedup (x)"], table["n"] = 123456.789, 40.0, 25000.0
    table["Size (MB)"], table["Params (M)"] = 1421.5, 355.4
    table["status"] = ["ok"] * 7 + ["failed: it broke"]
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
    front = report.pareto_front(table[table["status"] == "ok"])
    assert front["Model"].tolist() == ["NB-SVM (logistic)", f"{STUDENT} from roberta-large", "roberta-large"]


def test_no_name_in_the_picture_covers_another_or_leaves_it(table, tmp_path, monkeypatch):
    table.loc[0, "Model"], table.loc[1, "Model"] = "a-folder-with-a-name-" * 8, r"a_b$\frac$"
    placed, label = [], report.label_points
    monkeypatch.setattr(report, "label_points", lambda axes, shown: placed.append((axes, label(axes, shown))))
    report.draw_accuracy_latency(table, tmp_path / "picture.png")
    ((axes, boxes),) = placed
    assert len(boxes) == 7
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    for name, box in zip(axes.texts, boxes, strict=True):
        drawn = matplotlib.text.Text.get_window_extent(name)  # of the words alone, without the line to the point
        np.testing.assert_allclose(drawn.extents, box.extents, atol=3)
        assert axes.bbox.contains(*drawn.min) and axes.bbox.contains(*drawn.max)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_markdown_table_has_every_model_with_its_interval(table):
    lines = report.as_markdown(table).splitlines()
    assert len(lines) == 2 + 8 and "0.9660 [0.9630, 0.9690]" in lines[4]
