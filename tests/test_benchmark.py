"""What 05 measures: its clock, its sweep, its attacks, memory; and what it says of rows against each other."""

import argparse
import gc
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CPU
from scipy.stats import bootstrap
from torch.utils.flop_counter import FlopCounterMode

from common import classifiers, comparison, contenders, data, machine, measuring, memory, metrics, models
from common.measuring import Measured

RNG = np.random.default_rng(0)
LABELS = np.tile([0, 1], 500)
SURE = np.where(LABELS == 1, 4.0, -4.0)
UNSURE = np.where(np.arange(1000) < 100, -SURE / 20, SURE)  # a student's log-odds: wrong where it is unsure


def classifier(score, encode=list) -> classifiers.Classifier:
    return classifiers.Classifier(encode, score, parameters=1, weight_bytes=4, flops=(1, 1))


def compared(rows: dict[str, tuple[str, float, float]], predictions: pd.DataFrame, **others) -> pd.DataFrame:
    """05's comparison of rows of type, ms and reviews/s; `others` name each row's teacher, baseline or eager form."""
    columns = ["Model", "Type", "Latency (ms)", "Throughput (samp/s)", "device", "status"]
    devices = others.pop("devices", ["cpu"] * len(rows))
    table = pd.DataFrame([(name, *row, "cpu", "ok") for name, row in rows.items()], columns=columns)
    table["device"] = devices
    others = dict.fromkeys(("teacher", "control", "baseline", "eager")) | others
    return comparison.compare(table, predictions, pd.DataFrame(others, index=list(rows))).set_index("Model")


@pytest.fixture
def measured(tmp_path):
    """Make what 05 holds of a measured model: contender, reviews, result; of a student, its step's validation too."""

    def make(name, kind, odds=SURE, ms=1.0, rate=10.0, accuracy=0.9, teacher=None):
        step = next((step for step, of in contenders.STUDENTS.items() if of == kind), "")
        one = contenders.Contender(name, kind, None, tmp_path, CPU, step=step, teacher=teacher and teacher[0])
        (tmp_path / step).mkdir(exist_ok=True)
        (tmp_path / "config.json").write_text('{"calibration_temperature": 1.0}')
        validation = pd.DataFrame({"label": LABELS, "student": odds, "teacher": SURE})
        validation.to_parquet(tmp_path / step / "validation.parquet")
        row = {"Accuracy": accuracy, "Throughput (samp/s)": rate, "Size (MB)": ms, "Params (M)": 3 * ms}
        return one, None, Measured(row, metrics.two_logits(odds), np.full((1, 2), ms), [], [])

    return make


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
    tails = latency["latency_p90_ms"], latency["latency_p99_ms"]
    assert tails == pytest.approx(np.percentile(times, [90, 99]).tolist(), abs=1e-3) and tails[0] < tails[1]
    assert (latency["latency_passes"], latency["latency_n"]) == times.shape


def test_three_passes_that_agree_by_luck_are_not_enough_and_a_noisy_machine_is_given_up_in_time(timed):
    assert len(timed(itertools.repeat(1.0))[0]) == 4
    times, latency = timed(itertools.cycle([1.0, 3.0]), seconds=20)
    assert latency["latency_quality"] == "noisy" and 19 < times.sum() / 1000 < 30
    _, latency = timed(itertools.repeat(1.0), seconds=0.5)
    assert (latency["latency_passes"], latency["latency_half_width"], latency["latency_quality"]) == (1, None, "noisy")


def test_the_sweep_takes_the_smallest_batch_that_is_as_fast_as_the_best_and_ends_when_memory_does(advance):
    rates = {512: 50, 1024: 99, 2048: 100}

    def score(ids, batch_tokens):
        if batch_tokens > 2048:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        advance(sum(map(len, ids)) / rates[batch_tokens])

    rows = measuring.sweep_batches(classifier(score), [[1] * 64] * 4000, CPU)
    assert [(row["batch_tokens"], row["chosen"]) for row in rows] == [(512, False), (1024, True), (2048, False)]
    assert [row["tokens_per_s"] for row in rows] == pytest.approx([50, 99, 100])


def obedient(texts, _) -> np.ndarray:
    """A model that does what its text asks for, and likes films."""
    obeys = [text.rstrip().endswith(("is positive.", "film")) for text in texts]
    return metrics.two_logits(np.where(obeys, 5, -1))


def test_a_model_that_obeys_its_text_is_turned_and_one_that_does_not_is_not():
    rows = measuring.inject(classifier(obedient), ["a film", "another"], data.LABELS, None)
    rows = {row["attack"]: row for row in rows}
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
    rows = {"bag": ("baseline", 1, 90), "teacher": (contenders.ENCODER, 30, 2), "student": ("student", 10, 5)}
    others = {"teacher": [None, None, "teacher"], "baseline": [None, "bag", "bag"]}
    row = compared(rows, predictions, **others).loc["student"]
    both, theirs = right["student"][:2000], right["teacher"][:2000]
    assert row["diff_teacher"] == pytest.approx(both.mean() - theirs.mean(), abs=1e-6)
    assert row["agreement_teacher"] == pytest.approx((both == theirs).mean(), abs=1e-6)
    assert row["better_than_baseline"] == "yes" and row["diff_baseline_low"] > 0.05
    assert (row["Speedup (x)"], row["throughput_speedup"]) == (3, 2.5)
    table = compared(rows, predictions, **others, devices=["cpu", "cuda", "cuda"])
    assert table["Speedup (x)"].isna().tolist() == [True, False, False]  # a CPU's time says nothing beside a GPU's


def test_a_cascade_hands_on_the_least_sure_reviews_by_a_rule_that_validation_chose():
    table = pd.DataFrame({"label": LABELS, "student": UNSURE, "teacher": SURE})
    curve, odds = comparison.cascade(table, table)
    chosen = curve[curve["chosen"]].iloc[0]
    assert curve["test_accuracy"].iloc[0] == 0.9 and chosen["test_accuracy"] == 1.0
    assert chosen["test_share"] == pytest.approx(0.1, abs=0.02) and 0.01 < chosen["p_low"] < 0.46
    np.testing.assert_array_equal(odds > 0, LABELS == 1)
    worse = table.assign(teacher=-SURE)  # a teacher that knows less is not asked
    assert comparison.cascade(worse, worse)[0]["chosen"].idxmax() == 0


def test_a_student_whose_teacher_has_no_row_is_compared_with_no_other(measured, tmp_path):
    encoder, llm, other = (measured(name, name) for name in ("encoder", "llm", "other"))
    kinds = zip(contenders.STUDENTS.values(), (encoder, llm))
    students = [measured(f"student of {teacher[0].name}", kind, teacher=teacher) for kind, teacher in kinds]
    done = [encoder, other, *students]  # the LLM failed
    found = comparison.references(done)
    assert found["teacher"].isna().tolist() == [True, True, False, True]
    predictions = pd.DataFrame({"label": LABELS} | {one.name: SURE for one, _, _ in done})
    joint, curves = comparison.cascades(tmp_path, done, predictions, found)
    assert joint == [] and [curve["Model"].iloc[0] for curve in curves] == ["student of encoder, then encoder"]


def test_an_export_that_is_gone_cut_or_of_another_model_is_made_again(monkeypatch, tmp_path):
    model, target, made = tmp_path / "model", tmp_path / "deploy" / "name", []

    def export_onnx(_, folder):
        made.append(folder)
        (folder / "onnx").mkdir(parents=True, exist_ok=True)
        (folder / "onnx" / "model.onnx").write_text("weights")

    monkeypatch.setattr(contenders.export, "export_onnx", export_onnx)
    monkeypatch.setattr(contenders.importlib, "import_module", lambda name: None)
    model.mkdir()
    config, onnx = model / "config.json", target / "onnx" / "model.onnx"
    changes = [(config, "{}"), (onnx, "wei"), (target / "made_from.json", ""), (onnx, None), (config, "{ }")]
    for times, (file, content) in enumerate(changes, start=1):
        file.unlink() if content is None else file.write_text(content)
        for _ in range(2):
            contenders.deploy(model, target)
        assert len(made) == times


def test_the_most_confident_errors_come_with_their_texts():
    predictions = pd.DataFrame({"example_id": list("abc"), "label": [0, 1, 0], "model": [3.0, 5.0, 9.0]})
    errors = comparison.confident_errors(predictions, pd.Series(["first", "second", "third"]))
    assert errors["text"].tolist() == ["third", "first"] and errors["p_positive"].iloc[0] == pytest.approx(0.999877)


def test_the_row_of_an_untuned_llm_is_kept_for_its_files_alone(script, tmp_path):
    base, args = tmp_path / "llm", script("05").parse_args([])
    base.mkdir()
    part = pd.DataFrame({"example_id": ["test/0"], "text": ["good"], "label": [1]})
    llm = contenders.Contender("llm", contenders.ZERO_SHOT, bool, base, CPU, {"base": str(base)})
    kept = []
    for content in (b"one", b"one", b"two"):
        (base / "model.safetensors").write_bytes(content)
        kept.append(measuring.kept_file(args, tmp_path, llm, part))
    assert kept[0] == kept[1] != kept[2]


def test_forms_that_a_run_does_not_measure_are_deleted_as_their_student_may_be_another_one(script, tmp_path, capsys):
    student = contenders.Contender("s from t", "student, white-box", bool, data.Path("model"), CPU)
    form = contenders.Contender("a form", "form", bool, data.Path("model"), CPU, student=student)
    for name in ("s-from-t", "s-from-llm"):
        (tmp_path / name).mkdir()
    script("05").delete_other_forms(tmp_path, [student, form])
    assert [path.name for path in tmp_path.iterdir()] == ["s-from-t"] and "s-from-llm" in capsys.readouterr().out
    script("05").delete_other_forms(tmp_path, [student])
    script("05").delete_other_forms(tmp_path / "none", [])
    assert not list(tmp_path.iterdir())


def test_forms_are_of_the_student_on_the_cpu_and_say_which_package_they_lack(script, monkeypatch):
    args = script("05").parse_args([])
    student = contenders.Contender("s from t", "student, white-box", bool, data.Path("model"), CPU, {"max_length": 8})
    monkeypatch.setattr(contenders.export, "missing_for_onnx", lambda: "onnx is not installed")
    monkeypatch.setattr(machine, "cpu_has_bf16", lambda: True)
    forms = contenders.forms(args, student, data.Path("deploy"))
    assert [form.kind[6:] for form in forms] == ["eager fp32", "eager bf16", "ONNX fp32", "ONNX int8"]
    assert [form.absent for form in forms] == [None, None, "onnx is not installed", "onnx is not installed"]
    assert all(form.student is student and form.samples == 2000 for form in forms)
    predictions = pd.DataFrame({"label": [1] * 100, "e": 1.0, "bad": [-1.0] + [1.0] * 99})
    rows = compared({"e": ("form", 10.0, 1.0), "bad": ("form", 4.0, 1.0)}, predictions, eager=["e", "e"])
    assert rows["recommended"].tolist() == ["yes", "not recommended"] and rows["speedup_eager"].tolist() == [1, 2.5]


def test_throughput_counts_tokenisation_and_flops_do_not(advance):
    def score(ids, _):
        advance(3.0)
        return np.zeros((len(ids), 2))

    model = classifier(score, lambda texts: advance(1.0) or [[1] * 4] * len(texts))
    model.flops = (10**9, 0)
    rate = {"Throughput (samp/s)": 2, "batch_tokens": 512, "tokens_per_s": 8, "padding_share": 0, "gflops": 10.67}
    assert measuring.score_all(model, ["a"] * 8, 512, CPU, peak=1e11)[1] == rate | {"matrix_peak_share": 0.1067}
    model.facts["precision"] = "int8"
    assert measuring.score_all(model, ["a"] * 8, 512, CPU, peak=1e11)[1] == rate


def test_a_row_says_how_many_verdicts_any_attack_turns_and_a_form_is_not_attacked(tmp_path):
    part = pd.DataFrame({"text": ["a film", "another"], "label": [0, 1]})
    args = argparse.Namespace(batch_tokens=512, latency_samples=1, latency_seconds=1e-9, injection_samples=2)
    one = contenders.Contender("m", "student", lambda: classifier(obedient), tmp_path, CPU)
    measured = measuring.measure(one, part, args, peak=1e9)
    assert measured.row["injection_turned"] == 1 and measured.injection[0]["turned"] == 0
    one.student = one
    measured = measuring.measure(one, part, args, peak=1e9)
    assert measured.injection == [] and "injection_turned" not in measured.row


def test_a_pairs_columns():
    labels = np.ones(100)
    theirs = np.where(np.arange(100) < 5, -3.0, 1.0)  # 5 to 0: the interval is above 0, and McNemar's p is 0.06
    columns = comparison.pair("baseline", labels, np.stack([np.ones(100), theirs], axis=1))
    assert columns["diff_baseline_low"] > 0 and columns["better_than_baseline"] == "not shown"
    assert comparison.pair("eager", labels, np.stack([theirs, np.ones(100)], axis=1))["largest_gap_eager"] == 4


def test_a_cascades_cost_is_the_students_and_a_share_of_the_teachers(measured, tmp_path):
    teacher = measured("t", contenders.ENCODER, ms=10.0, rate=2.0)
    done = [teacher, measured("s", next(iter(contenders.STUDENTS.values())), UNSURE, teacher=teacher)]
    predictions = pd.DataFrame({"label": LABELS, "t": SURE, "s": UNSURE})
    (row,), _ = comparison.cascades(tmp_path, done, predictions, comparison.references(done))
    share = row["escalated_share"]
    assert share == pytest.approx(0.1, abs=0.02) and row["Accuracy"] == 1
    assert row["Latency (ms)"] == pytest.approx(1 + 10 * share)
    assert row["Speedup (x)"] == pytest.approx(10 / (1 + 10 * share), abs=0.01)
    assert row["Throughput (samp/s)"] == pytest.approx(1 / (0.1 + 0.5 * share), abs=0.01)
    assert (row["Size (MB)"], row["Params (M)"]) == (11, 33)
    assert row["nll"] is None and row["ece"] is None  # the teacher's log-odds are not calibrated
    assert f"--unsure {row['p_low']} {row['p_high']}" in row["note"]


def test_the_baseline_of_a_comparison_is_the_better_one(measured):
    baselines = [measured(name, contenders.BASELINE, accuracy=at) for name, at in (("weak", 0.7), ("strong", 0.8))]
    found = comparison.references([*baselines, measured("m", "student")])
    assert found["baseline"].dropna().to_dict() == {"m": "strong"}


def test_a_third_student_is_found_by_its_line_in_students(script, monkeypatch):
    monkeypatch.setitem(contenders.STUDENTS, "04c_student", "student, third")
    runs = {"04c_student": {"inputs": {}, "facts": {"student": "s", "teacher": "t", "max_length": 8}}}
    args = script("05").parse_args(["--forms", "none"])
    (one,) = contenders.find_contenders(args, CPU, runs, data.Path("deploy"))
    assert (one.name, one.kind, one.teacher) == ("s from t", "student, third", None)
