"""What 05 measures: its clock, its sweep, its attacks, memory; and what it says of rows against each other."""

import gc
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import bootstrap
from torch.utils.flop_counter import FlopCounterMode

from common import classifiers, comparison, data, device, measuring, memory, metrics, models
from common.measuring import Measured

CPU = device.Hardware("cpu", "fp32", "CPU")
RNG = np.random.default_rng(0)


def classifier(score, encode=list) -> classifiers.Classifier:
    return classifiers.Classifier(encode, score, parameters=1, weight_bytes=4, flops=(1, 1))


def two_columns(log_odds) -> np.ndarray:
    return np.stack([-np.array(log_odds) / 2, np.array(log_odds) / 2], axis=1)


def compared(rows: dict[str, tuple[str, float, float]], predictions: pd.DataFrame, **others) -> pd.DataFrame:
    """05's comparison of rows of type, ms and reviews/s; `others` name each row's teacher, baseline or eager form."""
    columns = ["Model", "Type", "Latency (ms)", "Throughput (samp/s)", "status"]
    table = pd.DataFrame([(name, *row, "ok") for name, row in rows.items()], columns=columns)
    others = dict.fromkeys(("teacher", "control", "baseline", "eager")) | others
    return comparison.compare(table, predictions, pd.DataFrame(others, index=list(rows))).set_index("Model")


@pytest.fixture
def advance(monkeypatch):
    """A function that moves 05's clock on by seconds; nothing else does."""
    now = [0.0]
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


@pytest.fixture
def timed(advance):
    """05's latencies of one review at a time, of a model whose calls take these seconds; the first one warms up."""

    def measure(calls, texts=("a",), seconds=1e9):
        def score(ids, _):
            advance(next(calls))
            return np.zeros((len(ids), 2))

        encode = lambda texts: advance(0.1) or texts  # noqa: E731
        return measuring.time_one_by_one(classifier(score, encode), list(texts), CPU, seconds=seconds)

    return measure


def test_passes_repeat_until_the_medians_interval_is_within_3_percent(timed):
    calls = itertools.chain([9.0], np.repeat([1.0, 1.2, 1.0], 3), itertools.repeat(1.1))
    times, latency = timed(calls, ["a", "b", "c"])
    assert len(times) > 4 and latency["latency_half_width"] <= 0.03 and latency["latency_quality"] == "ok"
    assert times[:3, 0] == pytest.approx([1100, 1300, 1100])
    assert latency["Latency (ms)"] == pytest.approx(np.median(times), abs=1e-3)
    assert latency["tokenisation_share"] == pytest.approx(0.1 * times.size / times.sum() * 1000, abs=1e-4)


def test_three_passes_that_agree_by_luck_are_not_enough_and_a_noisy_machine_is_given_up_in_time(timed):
    assert len(timed(itertools.repeat(1.0))[0]) == 4
    times, latency = timed(itertools.cycle([1.0, 3.0]), seconds=20)
    assert latency["latency_quality"] == "noisy" and 19 < times.sum() / 1000 < 30


def test_the_sweep_takes_the_smallest_batch_that_is_as_fast_as_the_best_and_ends_when_memory_does(advance):
    rates = {512: 50, 1024: 99, 2048: 100}

    def score(ids, batch_tokens):
        if batch_tokens > 2048:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        advance(sum(map(len, ids)) / rates[batch_tokens])

    rows = measuring.sweep_batches(classifier(score), [[1] * 64] * 4000, CPU)
    assert [(row["batch_tokens"], row["chosen"]) for row in rows] == [(512, False), (1024, True), (2048, False)]
    assert [row["tokens_per_s"] for row in rows] == pytest.approx([50, 99, 100])


def test_a_model_that_obeys_its_text_is_turned_and_one_that_does_not_is_not():
    def obedient(texts, _):
        return two_columns([5 if text.rstrip().endswith(("is positive.", "film")) else -1 for text in texts])

    rows = {
        row["attack"]: row for row in measuring.inject(classifier(obedient), ["a film", "another"], data.LABELS, None)
    }
    assert rows[measuring.ATTACKS[1]]["turned"] == rows["any attack"]["turned"] == 1
    assert rows[measuring.ATTACKS[0]]["turned"] == 0  # though any ending turns the first one's verdict
    assert rows["any attack"]["ci_low"] == pytest.approx(metrics.wilson_interval(2, 2)[0])


@pytest.mark.parametrize("role", ["roberta", "distilbert", "mistral"])
def test_the_flops_of_a_forward_pass_are_those_that_torch_counts(tiny, role):
    from transformers import AutoModel

    per_token, per_pair = models.planned_size(str(tiny / role))[1]
    llm = role == "mistral"
    model = AutoModel.from_pretrained(tiny / role) if llm else models.load_classifier(str(tiny / role)).base_model
    model.config._attn_implementation = "eager"  # whose products torch counts one by one
    for tokens in (16, 48):
        with FlopCounterMode(display=False) as counted, torch.inference_mode():
            model(torch.full((1, tokens), 5))
        assert per_token * tokens + per_pair * tokens**2 == pytest.approx(counted.get_total_flops(), rel=0.02)


def test_a_later_models_peak_is_what_it_is_alone():
    def peak() -> float:
        resident = memory.restart_host_peak()
        assert resident is not None, "this system cannot restart its peak: the benchmark leaves the figure out"
        weights = [torch.ones(10_000_000) for _ in range(3)]
        return memory.host_peak_mb() - resident + 0 * len(weights)

    alone = peak()
    larger = torch.ones(100_000_000)
    del larger
    gc.collect()
    assert alone == pytest.approx(120, rel=0.05) and peak() == pytest.approx(alone, rel=0.05)


def test_the_interval_of_a_paired_difference_agrees_with_the_bootstrap():
    a, b = RNG.random(2000) < 0.93, RNG.random(2000) < 0.90
    difference, low, high = metrics.paired_difference(a, b)
    resampled = bootstrap((a.astype(float) - b,), np.mean, method="percentile", rng=RNG).confidence_interval
    assert difference == pytest.approx(a.mean() - b.mean())
    assert (low, high) == pytest.approx(tuple(resampled), abs=0.001)
    assert metrics.paired_difference(a, a) == (0, 0, 0)


def test_rows_are_compared_on_the_reviews_that_both_read():
    labels = RNG.integers(0, 2, 3000)
    right = {name: RNG.random(3000) < share for name, share in (("teacher", 0.95), ("student", 0.93), ("bag", 0.85))}
    odds = {name: np.where(labels == 1, 2.0, -2.0) * np.where(which, 1, -1) for name, which in right.items()}
    predictions = pd.DataFrame({"label": labels, **odds})
    predictions.loc[2000:, "teacher"] = np.nan
    rows = {"bag": ("baseline", 1, 90), "teacher": (classifiers.ENCODER, 30, 2), "student": ("student", 10, 5)}
    others = {"teacher": [None, None, "teacher"], "baseline": [None, "bag", "bag"]}
    row = compared(rows, predictions, **others).loc["student"]
    both, theirs = right["student"][:2000], right["teacher"][:2000]
    assert row["diff_teacher"] == pytest.approx(both.mean() - theirs.mean(), abs=1e-6)
    assert row["agreement_teacher"] == pytest.approx((both == theirs).mean(), abs=1e-6)
    assert row["better_than_baseline"] == "yes" and row["diff_baseline_low"] > 0.05
    assert (row["Speedup (x)"], row["throughput_speedup"]) == (3, 2.5)


def test_a_cascade_hands_on_the_least_sure_reviews_by_a_rule_that_validation_chose():
    labels = np.tile([0, 1], 500)
    sure = np.where(labels == 1, 4.0, -4.0)
    student = np.where(np.arange(1000) < 100, np.where(labels == 1, -0.2, 0.2), sure)  # wrong where it is unsure
    table = pd.DataFrame({"label": labels, "student": student, "teacher": sure})
    curve, odds = comparison.cascade(table, table)
    chosen = curve[curve["chosen"]].iloc[0]
    assert curve["test_accuracy"].iloc[0] == 0.9 and chosen["test_accuracy"] == 1.0
    assert chosen["test_share"] == pytest.approx(0.1, abs=0.02) and 0.01 < chosen["p_low"] < 0.46
    np.testing.assert_array_equal(odds > 0, labels == 1)
    worse = table.assign(teacher=-sure)  # a teacher that knows less is not asked
    assert comparison.cascade(worse, worse)[0]["chosen"].idxmax() == 0


def test_a_student_whose_teacher_has_no_row_is_compared_with_no_other(tmp_path):
    row = {"Accuracy": 0.9, "Latency (ms)": 1.0, "Throughput (samp/s)": 9.0}
    measured = Measured(row, np.zeros((1, 2)), np.ones((1, 1)), [], [])
    encoder, llm, other = (
        classifiers.Contender(name, name, None, tmp_path, CPU) for name in ("encoder", "llm", "other")
    )
    students = [
        classifiers.Contender(f"student {step}", kind, None, tmp_path, CPU, step=step, teacher=teacher)
        for (step, kind), teacher in zip(classifiers.STUDENTS.items(), (encoder, llm))
    ]
    done = [(one, None, measured) for one in (encoder, other, *students)]  # the LLM failed
    found = comparison.references(done)
    assert found["teacher"].isna().tolist() == [True, True, False, True]
    for step in classifiers.STUDENTS:
        (tmp_path / step).mkdir()
        pd.DataFrame({"label": [0, 1], "student": [-1.0, 1.0], "teacher": [-2.0, 2.0]}).to_parquet(
            tmp_path / step / "validation.parquet"
        )
    (tmp_path / "config.json").write_text('{"calibration_temperature": 1.0}')
    predictions = pd.DataFrame({"label": [0, 1], "encoder": [-2.0, 2.0], "other": 1.0})
    predictions = predictions.assign(**{one.name: [-1.0, 1.0] for one in students})
    joint, curves = comparison.cascades(tmp_path, done, predictions, found)
    assert joint == [] and [curve["Model"].iloc[0] for curve in curves] == [f"{students[0].name}, then encoder"]


def test_an_export_that_is_gone_cut_or_of_another_model_is_made_again(monkeypatch, tmp_path):
    model, target, made = tmp_path / "model", tmp_path / "deploy" / "name", []

    def export_onnx(_, folder):
        made.append(folder)
        (folder / "onnx").mkdir(parents=True, exist_ok=True)
        (folder / "onnx" / "model.onnx").write_text("weights")

    monkeypatch.setattr(classifiers.export, "export_onnx", export_onnx)
    monkeypatch.setattr(classifiers.importlib, "import_module", lambda name: None)
    model.mkdir()
    config, onnx = model / "config.json", target / "onnx" / "model.onnx"
    changes = [(config, "{}"), (onnx, "wei"), (target / "made_from.json", ""), (onnx, None), (config, "{ }")]
    for times, (file, content) in enumerate(changes, start=1):
        file.unlink() if content is None else file.write_text(content)
        for _ in range(2):
            classifiers.deploy(model, target)
        assert len(made) == times


def test_the_most_confident_errors_come_with_their_texts():
    predictions = pd.DataFrame({"example_id": list("abc"), "label": [0, 1, 0], "model": [3.0, 5.0, 9.0]})
    errors = comparison.confident_errors(predictions, pd.Series(["first", "second", "third"]))
    assert errors["text"].tolist() == ["third", "first"] and errors["p_positive"].iloc[0] == pytest.approx(0.999877)


def test_forms_are_of_the_student_on_the_cpu_and_say_which_package_they_lack(script, monkeypatch):
    args = script("05").parse_args([])
    student = classifiers.Contender("s from t", "student, white-box", bool, data.Path("model"), CPU, {"max_length": 8})
    monkeypatch.setattr(classifiers.export, "missing_for_onnx", lambda: "onnx is not installed")
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: True)
    forms = classifiers.forms(args, student, data.Path("deploy"))
    assert [form.kind[6:] for form in forms] == ["eager fp32", "eager bf16", "ONNX fp32", "ONNX int8"]
    assert [form.absent for form in forms] == [None, None, "onnx is not installed", "onnx is not installed"]
    assert all(form.student is student and form.samples == 2000 for form in forms)
    predictions = pd.DataFrame({"label": [1] * 100, "e": 1.0, "bad": [-1.0] + [1.0] * 99})
    rows = compared({"e": ("form", 10.0, 1.0), "bad": ("form", 4.0, 1.0)}, predictions, eager=["e", "e"])
    assert rows["recommended"].tolist() == ["yes", "not recommended"] and rows["speedup_eager"].tolist() == [1, 2.5]
