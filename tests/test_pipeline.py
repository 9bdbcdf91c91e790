"""All six scripts, end to end, on tiny models and a few reviews; and each script without its input."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import write_reviews

from common import artifacts, device

NUMBERS = ("01", "02", "03", "04a", "04b", "05")


@pytest.fixture(scope="module")
def flags(tiny, tmp_path_factory):
    """The command line of each script in one shared output folder."""
    root = tmp_path_factory.mktemp("pipeline")
    shared = [
        *("--dataset", str(write_reviews(root / "reviews", train=140, test=40, transfer=60))),
        *("--output-dir", str(root / "outputs"), "--seed", "5"),
    ]
    trained = ["--validation-samples", "40", "--learning-rate", "1e-3", "--batch-size", "8", "--epochs", "4"]
    student = ["--student-model", str(tiny / "distilbert"), "--max-length", "32"]
    return {
        "01": [*shared, "--validation-samples", "40"],
        "02": [
            *shared,
            *trained,
            "--roberta-model",
            str(tiny / "roberta"),
            "--max-length",
            "40",
            "--student-layers",
            "2",
        ],
        "03": [*shared, *trained, "--mistral-model", str(tiny / "mistral"), "--max-length", "96"],
        "04a": [*shared, *trained, *student],
        "04b": [*shared, *trained, *student, "--max-transfer-samples", "50"],
        "05": [*shared, "--max-llm-samples", "20", "--latency-samples", "5"],
    }


@pytest.fixture(scope="module")
def outputs(flags, script):
    """The folder after all six scripts."""
    from pathlib import Path

    folder = Path(flags["05"][3])
    for number in NUMBERS:
        assert script(number).main(flags[number]) in (None, 0), number
        if number == "02":  # 04a must not need the teacher: without its model folder it still runs
            (folder / "02_roberta" / "model").rename(folder / "set_aside")
        if number == "04a":
            (folder / "set_aside").rename(folder / "02_roberta" / "model")
    return folder


def test_the_benchmark_has_the_promised_columns_and_a_row_for_every_model(outputs):
    table = pd.read_csv(outputs / "05_benchmark" / "benchmark.csv")
    assert table.columns[:8].tolist() == [
        "Model", "Type", "Accuracy", "Latency (ms)", "Throughput (samp/s)", "Speedup (x)", "Size (MB)", "Params (M)",
    ]  # fmt: skip
    students = ["student, white-box", "control, no teacher", "student, black-box"]
    assert table["Type"].tolist() == ["baseline"] * 2 + ["teacher, fine-tuned", "teacher, 4-bit + LoRA"] + students
    assert (table["status"] == "ok").all()
    assert table["n"].tolist() == [40, 40, 40, 20, 40, 40, 40]
    assert (table["ci_low"] <= table["Accuracy"]).all() and (table["Accuracy"] <= table["ci_high"]).all()
    teacher = table[table["Type"] == "teacher, fine-tuned"].iloc[0]
    assert teacher["Speedup (x)"] == 1
    assert table["Speedup (x)"].to_numpy() == pytest.approx(teacher["Latency (ms)"] / table["Latency (ms)"], abs=0.01)
    assert not table["Model"].str.contains("RoBERTa-L|Mistral-7B", case=False).any()  # these are stand-ins


def test_saved_predictions_give_the_tables_accuracies(outputs):
    table = pd.read_csv(outputs / "05_benchmark" / "benchmark.csv")
    predictions = pd.read_parquet(outputs / "05_benchmark" / "predictions.parquet")
    for name, accuracy in table[["Model", "Accuracy"]].to_numpy():
        read = predictions.dropna(subset=[name])
        assert ((read[name] > 0) == (read["label"] == 1)).mean() == pytest.approx(accuracy, abs=1e-6)


def test_02_saves_logits_and_features_by_example_id(outputs):
    folder = outputs / "02_roberta" / "soft_labels"
    for split, n in (("train", 100), ("validation", 40), ("transfer", 60)):
        table = pd.read_parquet(folder / f"{split}.parquet")
        assert len(table) == n and table["example_id"].is_unique
        if split != "validation":  # which no student trains on
            features = np.load(folder / f"{split}_features.npy", mmap_mode="r", allow_pickle=False)
            assert features.shape[:3] == (n, 2, 2) and features.dtype == np.float16
    assert not (folder / "validation_features.npy").exists()
    run = json.loads((outputs / "02_roberta" / "run.json").read_text())
    assert run["facts"]["feature_layers"][-1] == run["facts"]["teacher_layers"]


def test_a_saved_teacher_loads_with_pipeline_and_says_negative_and_positive(outputs):
    from transformers import pipeline

    classify = pipeline("text-classification", str(outputs / "02_roberta" / "model"), device="cpu")
    assert classify(["dull weak silly film"])[0]["label"] == "negative"
    assert classify(["funny warm fresh film"])[0]["label"] == "positive"


def test_checkpoints_and_half_files_are_gone_when_a_step_is_finished(outputs):
    assert not [
        path for path in outputs.rglob("*") if path.name.endswith((".partial", "_chunks")) or "checkpoint" in path.name
    ]


def test_04b_records_its_calibration_and_the_benchmark_applies_it(outputs):
    facts = json.loads((outputs / "04b_student_from_mistral" / "run.json").read_text())["facts"]
    log_p = pd.read_parquet(outputs / "04b_student_from_mistral" / "soft_labels" / "transfer.parquet")
    odds = (log_p["log_p_positive"] - log_p["log_p_negative"]).astype(float)
    assert facts["calibration"] == "batch" and facts["bias"] == pytest.approx(odds.mean(), abs=1e-5)
    table = pd.read_csv(outputs / "05_benchmark" / "benchmark.csv")
    assert table.loc[table["Type"] == "teacher, 4-bit + LoRA", "calibration"].item() == "batch"


def test_04b_tells_how_good_its_teacher_is_with_each_calibration(outputs):
    figures = json.loads((outputs / "04b_student_from_mistral" / "metrics.json").read_text())["validation"]
    for name in ("teacher_none", "teacher_batch", "teacher_fitted"):
        assert {"nll", "ece", "accuracy"} <= figures[name].keys()


def test_nothing_is_pickled(outputs):
    kinds = {path.suffix for path in outputs.rglob("*") if path.is_file()}
    assert kinds <= {".lock", ".json", ".csv", ".md", ".parquet", ".npy", ".safetensors", ".jinja", ".txt", ".png"}, (
        kinds
    )


@pytest.mark.parametrize("number", NUMBERS)
def test_run_again_a_finished_script_says_so_and_stops(outputs, flags, script, number, capsys):
    with pytest.raises(SystemExit) as left:
        script(number).main(flags[number])
    assert left.value.code == 0 and "is finished with these settings" in capsys.readouterr().out


@pytest.mark.parametrize("number", NUMBERS)
def test_other_settings_on_a_finished_folder_are_refused(outputs, flags, script, number, stops):
    changed = ["--seed", "6"] if number in ("01", "02", "03", "05") else ["--temperature", "3"]
    stops(lambda: script(number).main([*flags[number], *changed]), "was finished with other settings", "--force")


def test_04a_refuses_another_split_and_other_reviews_than_02_read(outputs, flags, script, stops, tmp_path):
    stops(lambda: script("04a").main([*flags["04a"], "--validation-samples", "30"]), "--validation-samples 40")
    other = write_reviews(tmp_path / "other", train=150, test=40, transfer=60)
    stops(
        lambda: script("04a").main([*flags["04a"], "--dataset", str(other)]),
        "02_finetune_roberta.py read other reviews",
    )


def test_04a_refuses_a_student_whose_layers_02_did_not_save(outputs, flags, script, stops, tiny):
    module = script("04a")
    args = module.parse_args([*flags["04a"], "--student-model", str(tiny / "roberta")])
    facts = {"feature_layers": [1, 3], "teacher_layers": 5}
    stops(lambda: module.student_to_teacher_layers(args, facts), "--student-layers")


def test_04a_takes_its_own_layers_from_among_those_that_02_saved(outputs, flags, script):
    module = script("04a")
    args = module.parse_args(flags["04a"])
    reviews = module.data.load_reviews(args, reads=("train", "transfer"))
    facts = {"feature_layers": [2, 4, 6, 8, 10, 12], "teacher_layers": 12}
    teacher = module.read_teacher(args, reviews, facts)
    assert teacher["teacher_features"].layers == [2, 5]  # of a student of two layers: 6 and 12


@pytest.mark.parametrize(("number", "missing"), [("04a", "02_finetune_roberta.py"), ("04b", "03_finetune_mistral.py")])
def test_without_its_input_a_script_names_the_one_to_run(number, missing, flags, script, stops, tmp_path):
    stops(lambda: script(number).main([*flags[number], "--output-dir", str(tmp_path)]), f"run {missing} first")


def test_the_benchmark_of_nothing_and_of_one_step(outputs, flags, script, stops, tmp_path, capsys):
    stops(lambda: script("05").main([*flags["05"], "--output-dir", str(tmp_path)]), "no finished step")
    (tmp_path / "01_baseline").symlink_to(outputs / "01_baseline")
    assert script("05").main([*flags["05"], "--output-dir", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "05_benchmark" / "benchmark.csv")
    assert len(table) == 2 and table["Speedup (x)"].isna().all()


def test_a_model_that_fails_is_a_row_that_says_so_and_a_non_zero_exit(outputs, flags, script, tmp_path):
    (tmp_path / "01_baseline").symlink_to(outputs / "01_baseline")
    (tmp_path / "02_roberta").mkdir()
    (tmp_path / "02_roberta" / "model").mkdir()
    for name in ("run.json", "started.json"):
        (tmp_path / "02_roberta" / name).write_bytes((outputs / "02_roberta" / name).read_bytes())
    for file in (outputs / "02_roberta" / "model").iterdir():
        content = file.read_bytes()
        (tmp_path / "02_roberta" / "model" / file.name).write_bytes(
            content[:500] if file.suffix == ".safetensors" else content
        )
    assert script("05").main([*flags["05"], "--output-dir", str(tmp_path)]) == 1
    table = pd.read_csv(tmp_path / "05_benchmark" / "benchmark.csv")
    assert table["status"].str.startswith("failed").tolist() == [False, False, True]
    assert not (tmp_path / "05_benchmark" / "run.json").exists()


def step_of(number: str) -> str:
    return next(step for step, file in artifacts.SCRIPTS.items() if file.startswith(number))


def run_out_of_time(main, flags: list[str]) -> int:
    """Run a script that is always out of time until it ends otherwise; how many times it stopped."""
    for stopped in range(50):
        try:
            assert main([*flags, "--max-hours", "1e-9"]) in (None, 0)
            return stopped
        except SystemExit as left:
            assert left.code == 3
    raise AssertionError("no end after 50 runs")


def test_a_benchmark_that_time_stops_after_each_row_keeps_what_it_measured(outputs, flags, script, tmp_path, capsys):
    for step in set(artifacts.SCRIPTS) - {"05_benchmark"}:
        (tmp_path / step).symlink_to(outputs / step)
    stopped = run_out_of_time(script("05").main, [*flags["05"], "--output-dir", str(tmp_path)])
    out = capsys.readouterr().out
    tables = [pd.read_csv(folder / "05_benchmark" / "benchmark.csv") for folder in (outputs, tmp_path)]
    same = ["Model", "Type", "Accuracy", "nll", "Size (MB)", "n", "mcnemar_p_control", "status"]
    pd.testing.assert_frame_equal(tables[0][same], tables[1][same])
    assert stopped == len(tables[1]) - 1 and out.count("measuring ") == len(tables[1])  # none is measured twice
    for name in tables[1]["Model"]:
        assert out.count(f"kept: {name} (") >= 1 or name == tables[1]["Model"].iloc[-1]
    predictions = [(folder / "05_benchmark" / "predictions.parquet").read_bytes() for folder in (outputs, tmp_path)]
    assert predictions[0] == predictions[1]
    assert not (tmp_path / "05_benchmark" / "rows").exists()


def test_a_model_that_fails_does_not_keep_a_benchmark_without_time_from_its_end(outputs, flags, script, tmp_path):
    for step in ("01_baseline", "02_roberta"):
        shutil.copytree(outputs / step, tmp_path / step)
    for weights in (tmp_path / "01_baseline" / "nb_svm").glob("*.npy"):
        weights.write_bytes(b"x" * weights.stat().st_size)
    codes = []
    while not codes or codes[-1] == 3:
        try:
            codes.append(script("05").main([*flags["05"], "--output-dir", str(tmp_path), "--max-hours", "1e-9"]))
        except SystemExit as left:
            codes.append(left.code)
        assert len(codes) < 5
    assert codes == [3, 1]


def test_a_row_that_another_machine_measured_is_measured_again(outputs, flags, script, tmp_path, monkeypatch, capsys):
    (tmp_path / "01_baseline").symlink_to(outputs / "01_baseline")
    benchmark = script("05")
    with pytest.raises(SystemExit):
        benchmark.main([*flags["05"], "--output-dir", str(tmp_path), "--max-hours", "1e-9"])
    monkeypatch.setattr(benchmark, "environment", lambda hardware: {"device": "another"})
    assert benchmark.main([*flags["05"], "--output-dir", str(tmp_path)]) == 0
    assert "kept: " not in capsys.readouterr().out


def test_the_baselines_take_a_time_limit_and_finish(outputs, flags, script, tmp_path):
    assert run_out_of_time(script("01").main, [*flags["01"], "--output-dir", str(tmp_path)]) == 0


@pytest.mark.slow  # four scripts, each begun some ten to twenty times
@pytest.mark.parametrize("number", ["02", "03", "04a", "04b"])
def test_a_step_that_time_stops_again_and_again_ends_with_the_files_of_an_unstopped_one(
    outputs, flags, script, tmp_path, monkeypatch, number
):
    for step in set(artifacts.SCRIPTS) - {step_of(number)}:
        (tmp_path / step).symlink_to(outputs / step)
    asked = iter(range(10**6))
    monkeypatch.setattr(device, "out_of_time", lambda: next(asked) % 5 == 4)
    main, stopped = script(number).main, 0
    while True:
        try:
            main([*flags[number], "--output-dir", str(tmp_path)])
            break
        except SystemExit as left:
            assert left.code == 3
            stopped += 1
            assert not (tmp_path / step_of(number) / "run.json").exists()
    assert stopped > 8
    made, whole = tmp_path / step_of(number), outputs / step_of(number)
    files = sorted(str(file.relative_to(whole)) for file in whole.rglob("*") if file.is_file())
    assert files == sorted(str(file.relative_to(made)) for file in made.rglob("*") if file.is_file())
    for name in files:
        if name.endswith((".safetensors", ".npy", ".parquet")):
            assert (made / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_table_of_failures_alone_is_written_too(outputs, flags, script, tmp_path, capsys):
    shutil.copytree(outputs / "01_baseline", tmp_path / "01_baseline")
    for weights in (tmp_path / "01_baseline").glob("*/*.npy"):
        weights.write_bytes(b"")
    assert script("05").main([*flags["05"], "--output-dir", str(tmp_path)]) == 1
    assert "2 of 2 models failed" in capsys.readouterr().err
    table = pd.read_csv(tmp_path / "05_benchmark" / "benchmark.csv")
    assert table["status"].str.startswith("failed").all() and len(table) == 2


def test_a_finished_benchmark_shows_its_table_again(outputs, flags, script, capsys):
    with pytest.raises(SystemExit) as ended:
        script("05").main(flags["05"])
    assert ended.value.code == 0 and "| TF-IDF + naive Bayes" in capsys.readouterr().out


def test_a_student_of_a_teacher_that_was_made_again_is_refused(outputs, flags, script, stops, tmp_path):
    for step in ("02_roberta", "04a_student_from_roberta"):
        (tmp_path / step).mkdir()
        for file in (outputs / step).glob("*.json"):
            (tmp_path / step / file.name).write_bytes(file.read_bytes())
    made_again = tmp_path / "02_roberta" / "run.json"
    made_again.write_text(made_again.read_text().replace('"wall_time_s": ', '"wall_time_s": 1'))
    stops(
        lambda: script("05").main([*flags["05"], "--output-dir", str(tmp_path)]), "04a_distill_from_roberta.py --force"
    )


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("train_features.npy", None, "02_finetune_roberta.py --force"),
        ("transfer.parquet", None, "02_finetune_roberta.py --force"),
        ("train_features.npy", 500, "02_finetune_roberta.py --force"),
        ("transfer.parquet", 500, "02_finetune_roberta.py --force"),
    ],
)
def test_a_missing_or_cut_file_of_02_is_named(outputs, flags, script, stops, tmp_path, file, damage, words):
    shutil.copytree(outputs / "02_roberta", tmp_path / "02_roberta")
    path = tmp_path / "02_roberta" / "soft_labels" / file
    content = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(content[:damage])
    stops(lambda: script("04a").main([*flags["04a"], "--output-dir", str(tmp_path)]), file, words)


def test_a_mistake_beside_force_deletes_nothing(outputs, flags, script, stops, tiny):
    for wrong in (["--label-words", "unbelievably", "good"], ["--prompt", "no slot"], ["--max-length", "20"]):
        stops(lambda wrong=wrong: script("03").main([*flags["03"], "--force", *wrong]), "error")
        zero_shot = [*flags["04b"], "--force", "--no-adapter", "--mistral-model", str(tiny / "mistral")]
        wrong = ["--prompt-length", "20"] if wrong[0] == "--max-length" else wrong
        stops(lambda wrong=wrong, zero_shot=zero_shot: script("04b").main([*zero_shot, *wrong]), "error")
    stops(lambda: script("04a").main([*flags["04a"], "--force", "--max-length", "5000"]), "--max-length 5000")
    stops(lambda: script("02").main([*flags["02"], "--force", "--num-processes", "3"]), "--batch-size 8")
    for step in ("02_roberta", "03_mistral", "04a_student_from_roberta", "04b_student_from_mistral"):
        assert (outputs / step / "run.json").exists()
    assert (outputs / "04b_student_from_mistral" / "soft_labels" / "transfer.parquet").exists()


def test_a_missing_adapter_is_told_before_04b_deletes_its_student(outputs, flags, script, stops, tmp_path):
    for step in ("03_mistral", "04b_student_from_mistral"):
        shutil.copytree(outputs / step, tmp_path / step)
    weights = tmp_path / "03_mistral" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    run = [*flags["04b"], "--output-dir", str(tmp_path), "--force"]
    stops(lambda: script("04b").main(run), "adapter_model.safetensors", "03_finetune_mistral.py --force")
    assert (tmp_path / "04b_student_from_mistral" / "run.json").exists()


def test_damaged_soft_labels_of_04b_are_scored_again(outputs, flags, script, tmp_path, capsys):
    for step in ("03_mistral", "04b_student_from_mistral"):
        shutil.copytree(outputs / step, tmp_path / step)
    table = tmp_path / "04b_student_from_mistral" / "soft_labels" / "transfer.parquet"
    before = pd.read_parquet(table)
    table.write_bytes(b"")
    script("04b").main([*flags["04b"], "--output-dir", str(tmp_path), "--force"])
    assert "are damaged: scoring transfer again" in capsys.readouterr().out
    pd.testing.assert_frame_equal(pd.read_parquet(table), before)


def test_02_runs_in_bf16_on_a_cpu(flags, script, tmp_path):
    script("02").main([*flags["02"], "--output-dir", str(tmp_path), "--precision", "bf16"])
    features = np.load(tmp_path / "02_roberta" / "soft_labels" / "train_features.npy")
    assert features.dtype == np.float16 and np.isfinite(features).all()


def test_other_student_settings_of_04b_keep_the_llms_soft_labels(outputs, flags, script, tmp_path, monkeypatch):
    for step in ("03_mistral", "04b_student_from_mistral"):
        shutil.copytree(outputs / step, tmp_path / step)
    module = script("04b")
    monkeypatch.setattr(module.models, "load_llm", None)  # it must not be needed
    module.main([*flags["04b"], "--output-dir", str(tmp_path), "--alpha", "0.5", "--force"])
    run = json.loads((tmp_path / "04b_student_from_mistral" / "run.json").read_text())
    assert run["settings"]["alpha"] == 0.5


def test_another_number_of_unlabelled_reviews_costs_the_llm_no_other_split(outputs, flags, script, tmp_path):
    for step in ("03_mistral", "04b_student_from_mistral"):
        shutil.copytree(outputs / step, tmp_path / step)
    folder = tmp_path / "04b_student_from_mistral" / "soft_labels"
    before = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.parquet")}
    fewer = ["--max-transfer-samples", "40", "--force", "--epochs", "1"]
    script("04b").main([*flags["04b"], "--output-dir", str(tmp_path), *fewer])
    made_again = {file.name for file in folder.glob("*.parquet") if file.stat().st_mtime_ns != before[file.name]}
    assert made_again == {"transfer.parquet"} and len(pd.read_parquet(folder / "transfer.parquet")) == 40


def test_a_zero_shot_llm_teaches_without_03_and_has_its_own_row(flags, script, tiny, tmp_path, monkeypatch):
    module = script("04b")
    at_chance = {"collapse": module.CANNOT_TEACH, "swap": "swapped"}
    from common import distill, training

    # The tiny LLM knows nothing: what is tested is the way of its scores, not their worth.
    monkeypatch.setattr(training, "refuse_collapse", lambda logits, labels, remedy: remedy in at_chance.values())
    monkeypatch.setattr(distill, "refuse_bad_teacher", lambda *_: None)
    monkeypatch.setattr(distill, "refuse_one_class", lambda *_: None)
    llm = ["--no-adapter", "--mistral-model", str(tiny / "mistral"), "--prompt-length", "96"]
    prompt = ["--prompt", "Review: {review} Sentiment:"]
    module.main([*flags["04b"], "--output-dir", str(tmp_path), *llm, *prompt, "--epochs", "1"])
    run = json.loads((tmp_path / "04b_student_from_mistral" / "run.json").read_text())
    assert run["facts"]["llm"]["prompt"] == prompt[1] and not run["facts"]["llm"]["adapter"]
    assert "03_mistral" not in run["inputs"]
    assert script("05").main([*flags["05"], "--output-dir", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "05_benchmark" / "benchmark.csv").set_index("Type")
    assert table.loc["teacher, 4-bit zero-shot", "calibration"] == "batch"


def trained_by(script, number: str, flags: list[str], monkeypatch, *logits: np.ndarray) -> list[dict]:
    """What 04a or 04b hands to train_student, call by call; `logits` are what the calls return."""
    from common import distill

    calls, answers = [], iter(logits)

    def train_student(args, hardware, target, train, validation, **weights):
        calls.append({"target": target.name, "train": train, "validation": validation, "args": args} | weights)
        return next(answers)

    monkeypatch.setattr(distill, "train_student", train_student)
    script(number).main(flags)
    return calls


def right_of_validation(module, flags: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are right for every validation review, and logits of one class alone."""
    reviews = module.data.load_reviews(module.parse_args(flags), reads=("train",))
    right = 4.0 * np.eye(2)[reviews.validation["label"]] - 2
    return right, np.tile([2.0, -2.0], (len(right), 1))


def test_04a_trains_the_student_with_its_teacher_and_a_control_without_for_as_many_steps(
    outputs, flags, script, monkeypatch, tmp_path
):
    shutil.copytree(outputs / "02_roberta", tmp_path / "02_roberta")
    command = [*flags["04a"], "--output-dir", str(tmp_path), "--alpha", "0.7", "--feature-weight", "0.2"]
    right, _ = right_of_validation(script("04a"), command)
    student, control = trained_by(script, "04a", command, monkeypatch, right, right)
    assert (student["target"], student["alpha"], student["feature_weight"]) == ("model", 0.7, 0.2)
    assert (
        student["teacher_width"] == json.loads((tmp_path / "02_roberta/run.json").read_text())["facts"]["teacher_width"]
    )
    assert (student["train"].labels == -100).sum() == 60 and len(student["train"]) == 160
    saved = [pd.read_parquet(tmp_path / f"02_roberta/soft_labels/{split}.parquet") for split in ("train", "transfer")]
    logits = pd.concat(saved)[["logit_negative", "logit_positive"]].to_numpy()
    np.testing.assert_array_equal(student["train"].arrays["teacher_logits"], logits)
    assert (control["target"], control["alpha"], control.get("feature_weight", 0)) == ("control", 0.0, 0)
    assert len(control["train"]) == 100 and not control["train"].arrays and set(control["train"].labels) == {0, 1}
    assert control["epochs"] * 100 == student["epochs"] * 160 == 4 * 160
    assert len(student["validation"]) == len(control["validation"]) == 40


def test_04b_trains_the_student_on_the_calibrated_log_odds(outputs, flags, script, monkeypatch, tmp_path):
    for step in ("03_mistral", "04b_student_from_mistral/soft_labels"):
        shutil.copytree(outputs / step, tmp_path / step)
    command = [*flags["04b"], "--output-dir", str(tmp_path), "--alpha", "0.7"]
    right, _ = right_of_validation(script("04b"), command)
    (student,) = trained_by(script, "04b", command, monkeypatch, right)
    assert (student["alpha"], student["epochs"], student.get("feature_weight", 0)) == (0.7, 4, 0)
    folder = tmp_path / "04b_student_from_mistral" / "soft_labels"
    odds = {}
    for split in ("train", "transfer"):
        table = pd.read_parquet(folder / f"{split}.parquet")
        odds[split] = (table["log_p_positive"] - table["log_p_negative"]).to_numpy()
    taught = student["train"].arrays["teacher_logits"]
    expected = np.concatenate([*odds.values()]) - odds["transfer"].mean()
    np.testing.assert_allclose(taught[:, 1] - taught[:, 0], expected, atol=1e-4)
    assert (student["train"].labels == -100).sum() == 50


@pytest.mark.parametrize("who", ["student", "control"])
def test_a_student_or_control_that_collapsed_ends_04a_with_the_cause(
    outputs, flags, script, monkeypatch, stops, tmp_path, who
):
    shutil.copytree(outputs / "02_roberta", tmp_path / "02_roberta")
    command = [*flags["04a"], "--output-dir", str(tmp_path)]
    right, collapsed = right_of_validation(script("04a"), command)
    answers = (collapsed, right) if who == "student" else (right, collapsed)
    stops(
        lambda: trained_by(script, "04a", command, monkeypatch, *answers), "every validation review negative", "--force"
    )
    assert not (tmp_path / "04a_student_from_roberta" / "run.json").exists()


def swap(table: pd.DataFrame) -> pd.DataFrame:
    """The soft labels in the other order of the labels."""
    return table.assign(logit_negative=table["logit_positive"], logit_positive=table["logit_negative"])


@pytest.mark.parametrize(
    ("split", "spoil", "words"),
    [
        ("train", swap, "label order"),
        ("train", lambda table: table.assign(logit_negative=1.0, logit_positive=2.0), "constant"),
        ("transfer", lambda table: table.assign(logit_negative=1.0, logit_positive=2.0), "100% of the transfer set"),
        ("transfer", lambda table: table.assign(logit_negative=np.nan), "not all finite"),
        ("transfer", lambda table: table.assign(example_id=table.example_id.iloc[0]), "twice"),
    ],
)
def test_a_teacher_that_cannot_teach_ends_04a_with_the_cause(
    outputs, flags, script, stops, tmp_path, split, spoil, words
):
    shutil.copytree(outputs / "02_roberta", tmp_path / "02_roberta")
    file = tmp_path / "02_roberta" / "soft_labels" / f"{split}.parquet"
    spoil(pd.read_parquet(file)).to_parquet(file, index=False)
    run = json.loads((tmp_path / "02_roberta" / "run.json").read_text())
    run["files"][f"soft_labels/{split}.parquet"] = file.stat().st_size
    (tmp_path / "02_roberta" / "run.json").write_text(json.dumps(run))
    stops(lambda: script("04a").main([*flags["04a"], "--output-dir", str(tmp_path)]), words)


def test_another_prompt_than_03s_is_refused_beside_its_adapter(outputs, flags, script, stops):
    wrongs = (
        ["--prompt", "{review} Good or bad?"],
        ["--label-words", "bad", "good"],
        ["--prompt-length", "64"],
        ["--prompt-length", "512"],
    )
    for wrong in (*wrongs, ["--mistral-model", "another/model"]):
        stops(lambda wrong=wrong: script("04b").main([*flags["04b"], *wrong]), "03's adapter", "--no-adapter")


def test_a_fitted_calibration_is_recorded_applied_and_judged_out_of_fold(outputs, flags, script, tmp_path):
    for step in ("03_mistral", "04b_student_from_mistral"):
        shutil.copytree(outputs / step, tmp_path / step)
    common = ["--output-dir", str(tmp_path)]
    script("04b").main([*flags["04b"], *common, "--calibration", "fitted", "--force"])
    folder = tmp_path / "04b_student_from_mistral"
    facts = json.loads((folder / "run.json").read_text())["facts"]
    figures = json.loads((folder / "metrics.json").read_text())["validation"]
    assert facts["calibration"] == "fitted" and facts["calibration_temperature"] > 0
    for name in ("teacher_none", "teacher_batch", "teacher_fitted"):
        assert {"nll", "ece", "accuracy"} <= figures[name].keys()
    assert script("05").main([*flags["05"], *common]) == 0
    table = pd.read_csv(tmp_path / "05_benchmark" / "benchmark.csv").set_index("Type")
    assert table.loc["teacher, 4-bit + LoRA", "calibration"] == "fitted"


def test_soft_labels_of_other_weights_are_refused(outputs, flags, script, stops, tmp_path):
    shutil.copytree(outputs / "02_roberta", tmp_path / "02_roberta")
    weights = tmp_path / "02_roberta" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    stops(lambda: script("04a").main([*flags["04a"], "--output-dir", str(tmp_path)]), "other weights", "02_finetune")


def test_a_base_that_is_not_03s_any_more_is_refused(outputs, flags, script, stops, tmp_path):
    for step in ("03_mistral", "04b_student_from_mistral"):
        shutil.copytree(outputs / step, tmp_path / step)
    module = script("04b")
    args = module.parse_args([*flags["04b"], "--output-dir", str(tmp_path)])
    reviews = module.data.load_reviews(args, reads=("train", "transfer"))
    facts = json.loads((tmp_path / "03_mistral" / "run.json").read_text())["facts"] | {"validation_accuracy": 0.6}
    folder = tmp_path / "04b_student_from_mistral" / "soft_labels"
    stops(lambda: module.read_teacher(args, reviews, facts, folder), "0.600 in 03", "still the base")


def test_models_whose_folders_end_alike_keep_their_own_predictions(script):
    facts = {
        "labels": [],
        "teacher": "a/roberta/1",
        "student": "a/distilbert/1",
        "base": "a/mistral/1",
        "max_length": 8,
        "llm": {"adapter": True},
    }
    runs = {step: {"facts": facts} for step in list(artifacts.SCRIPTS)[1:5]}
    module = script("05")
    args = module.parse_args(["--output-dir", "nowhere"])
    names = [contender.name for contender in module.find_contenders(args, None, runs)]
    assert len(names) == len(set(names)) == 4


def test_every_script_has_a_step(script):
    assert [script(number).STEP for number in NUMBERS] == list(artifacts.SCRIPTS)
