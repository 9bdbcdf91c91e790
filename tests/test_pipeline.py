"""All six scripts on a stranger's file and tiny models, by the commands that they print; each without its input."""

import argparse
import contextlib
import io
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import quick_preset, write_reviews

from common import artifacts, distill, export, llms, machine, measuring, report, settings, training

NUMBERS = ("01", "02", "03", "04a", "04b", "05")
LLM_STEPS = ("03_mistral", "04b_student_from_mistral")


def write_awkward(root: Path) -> Path:
    """One semicolon file of stars with odd names, no test split, in a folder whose name needs quotes."""
    folder = root / "my reviews, 2026"
    source = write_reviews(root / "source", train=190, transfer=60)
    folder.mkdir()
    for split, name in (("train", "All of them.CSV"), ("unsupervised", "unlabelled.csv")):
        table = pd.read_parquet(source / f"{split}.parquet")
        stars = (table["label"] * 3 + 1 + table.index % 2).where(np.arange(len(table)) % 9 > 0, 3)
        table = pd.DataFrame({"Title": "a; title", "What they wrote": table["text"], "Their stars": stars})
        table.to_csv(folder / name, sep=";", index=False)
    return folder


@pytest.fixture(scope="module")
def flags(tiny, tmp_path_factory, script):
    """The command line of each script. The first one is typed, and the others are what the scripts print."""
    root = tmp_path_factory.mktemp("pipeline")
    quick = quick_preset(tiny) | {"04b_student_from_mistral.max_transfer_samples": 50}
    first = ["01_baseline.py", "--output-dir", str(root / "my outputs"), "--dataset", str(write_awkward(root))]
    first += "--seed 5 --validation-samples 30 --negative-labels 1 2 --positive-labels 4 5 --preset demo".split()
    first += ["--text-column", "what they wrote", "--label-column", "their stars"]
    printed, done = [shlex.join(["python", *first])], {}
    teacher, aside = root / "my outputs/02_roberta/model", root / "aside"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(settings.PRESETS, "demo", quick)
        while waiting := sorted(line for line in printed if line.split()[1].partition("_")[0] not in done):
            _, name, *given = shlex.split(waiting[0])  # the earliest step
            number, out = name.partition("_")[0], io.StringIO()
            if number == "04a":  # it must not need the teacher's model
                teacher.rename(aside)
            with contextlib.redirect_stdout(out):
                assert script(number).main(given) in (None, 0), waiting[0]
            if number == "04a":
                aside.rename(teacher)
            done[number] = given
            lines = [line.strip() for line in out.getvalue().splitlines()]
            printed += [line.partition(": ")[2] for line in lines if line.startswith(("next: ", "or: "))]
        assert tuple(done) == NUMBERS
        yield done


@pytest.fixture(scope="module")
def outputs(flags):
    """The folder after all six scripts."""
    return Path(flags["01"][1])


@pytest.fixture(scope="module")
def main(flags, script):
    """Run a script by its number, with its flags and more."""
    return lambda number, *more: script(number).main([*flags[number], *map(str, more)])


@pytest.fixture
def here(main, tmp_path):
    """Run a script in this test's own output folder."""
    return lambda number, *more: main(number, "--output-dir", tmp_path, *more)


@pytest.fixture
def copied(outputs, tmp_path):
    """Copy finished steps to this test's own output folder."""

    def copy(*steps: str) -> None:
        for step in steps:
            shutil.copytree(outputs / step, tmp_path / step)

    return copy


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def finish_again(step: Path) -> None:
    """Finish a step with the files that it has now, as another run of it would."""
    run = read(step, "run.json")
    (step / "run.json").unlink()
    artifacts.finish(argparse.Namespace(**run["settings"]), step, run["facts"])


def test_the_benchmark_has_the_promised_columns_and_a_row_for_every_model(outputs):
    table = pd.read_csv(outputs / "05_benchmark" / "benchmark.csv")
    assert table.columns[:8].tolist() == [
        "Model", "Type", "Accuracy", "Latency (ms)", "Throughput (samp/s)", "Speedup (x)", "Size (MB)", "Params (M)",
    ]  # fmt: skip
    students = ["student, white-box", "control, no teacher", "student, black-box"]
    forms = table["Type"].str.startswith("form")
    assert (table["status"] == "ok").all() and (table.loc[forms, "n"] == 10).all()
    assert {"form, eager fp32", "form, ONNX fp32", "form, ONNX int8"} <= set(table["Type"])
    assert table.loc[forms, "Model"].str.startswith("demo-distilbert from ").all() and table["Model"].is_unique
    table = table[~forms & (table["Type"] != "cascade")]
    assert table["Type"].tolist() == ["baseline"] * 2 + ["teacher, fine-tuned", "teacher, 4-bit + LoRA"] + students
    assert table["n"].tolist() == [42, 42, 42, 20, 42, 42, 42]
    assert table["calibration"].dropna().isin(["none", "fitted"]).tolist() == [True]  # 04b's choice, without batch
    assert (table["ci_low"] <= table["Accuracy"]).all() and (table["Accuracy"] <= table["ci_high"]).all()
    teacher = table[table["Type"] == "teacher, fine-tuned"].iloc[0]
    assert teacher["Speedup (x)"] == 1
    assert table["Speedup (x)"].to_numpy() == pytest.approx(teacher["Latency (ms)"] / table["Latency (ms)"], abs=0.01)
    assert not table["Model"].str.contains("RoBERTa-L|Mistral-7B", case=False).any()  # these are stand-ins


def test_saved_predictions_give_the_tables_accuracies(outputs):
    table = pd.read_csv(outputs / "05_benchmark" / "benchmark.csv")
    predictions = pd.read_parquet(outputs / "05_benchmark" / "predictions.parquet")
    for name, accuracy in table[["Model", "Accuracy"]].to_numpy():
        rows = predictions.dropna(subset=[name])
        assert ((rows[name] > 0) == (rows["label"] == 1)).mean() == pytest.approx(accuracy, abs=1e-6)


def test_02_saves_logits_and_features_by_example_id(outputs):
    folder = outputs / "02_roberta" / "soft_labels"
    for split, n in (("train", 96), ("validation", 30), ("transfer", 60)):
        table = pd.read_parquet(folder / f"{split}.parquet")
        assert len(table) == n and table["example_id"].is_unique
        if split != "validation":  # which no student trains on
            features = np.load(folder / f"{split}_features.npy", mmap_mode="r", allow_pickle=False)
            assert features.shape[:3] == (n, 2, 2) and features.dtype == np.float16
    assert not (folder / "validation_features.npy").exists()
    facts = read(outputs / "02_roberta", "run.json")["facts"]
    assert facts["feature_layers"][-1] == facts["teacher_layers"]


def test_a_saved_teacher_loads_with_pipeline_and_says_negative_and_positive(outputs):
    from transformers import pipeline

    classify = pipeline("text-classification", str(outputs / "02_roberta" / "model"), device="cpu")
    assert classify(["dull weak silly film"])[0]["label"] == "negative"
    assert classify(["funny warm fresh film"])[0]["label"] == "positive"


def test_each_saved_encoder_has_a_card_its_length_and_a_temperature(outputs):
    for folder, words in {
        "02_roberta/model": "A fine-tuned encoder",
        "04a_student_from_roberta/model": "feature weight",
        "04a_student_from_roberta/control": "without a teacher",
        "04b_student_from_mistral/model": "two label words",
    }.items():
        config, tokenizer = (read(outputs / folder, f"{name}.json") for name in ("config", "tokenizer_config"))
        run = read((outputs / folder).parent, "run.json")
        assert config["calibration_temperature"] > 0
        assert tokenizer["model_max_length"] == run["settings"]["max_length"]
        card = (outputs / folder / "README.md").read_text(encoding="utf-8")
        assert words in card and "accuracy on validation" in card
        assert f"{folder.split('/')[1]}/README.md" not in run["files"]  # so that its owner may edit it


@pytest.mark.parametrize(
    ("step", "names"), [("04a", ["student", "control", "teacher"]), ("04b", ["student", "teacher"])]
)
def test_both_student_steps_keep_what_student_and_teacher_say_of_validation(outputs, step, names):
    folder = next(outputs.glob(f"{step}_*"))
    table = pd.read_parquet(folder / "validation.parquet")
    assert table.columns.tolist() == ["example_id", "label", *names] and len(table) == 30
    figures = read(folder, "metrics.json")["validation"]
    for name in names[:-1]:
        assert ((table[name] > 0) == (table["label"] == 1)).mean() == pytest.approx(figures[name]["accuracy"], abs=1e-6)
    teacher = outputs / "02_roberta" if step == "04a" else folder
    soft_labels = pd.read_parquet(teacher / "soft_labels/validation.parquet")
    if step == "04b":  # asks the LLM as 03 did
        said = pd.read_parquet(outputs / "03_mistral/validation.parquet")
        pd.testing.assert_frame_equal(said, soft_labels, atol=1e-4)
    odds = soft_labels.iloc[:, 2] - soft_labels.iloc[:, 1]
    assert np.corrcoef(odds, table["teacher"])[0, 1] > 0.999  # 04b's are calibrated


def test_no_checkpoint_half_file_or_pickle_is_left(outputs):
    paths = list(outputs.rglob("*"))
    assert not [path for path in paths if path.name.endswith((".partial", "_chunks")) or "checkpoint" in path.name]
    kinds = {path.suffix for path in paths if path.is_file()}
    kinds -= {".lock", ".json", ".csv", ".md", ".parquet", ".npy", ".safetensors", ".jinja", ".txt", ".png"}
    assert kinds <= {".npz", ".onnx", ".html"}  # 05's


@pytest.mark.parametrize("number", NUMBERS[:-1])
def test_a_finished_script_says_so_and_refuses_other_settings(outputs, flags, main, number, stops, capsys):
    dataset = Path(flags[number][flags[number].index("--dataset") + 1])
    for more in ((), ("--dataset", dataset / ".." / dataset.name)):  # the same reviews by another path
        with pytest.raises(SystemExit) as left:
            main(number, *more)
        assert left.value.code == 0 and "is finished with these settings" in capsys.readouterr().out
    changed = ["--temperature", 3] if number in ("04a", "04b") else ["--seed", 6]
    stops(lambda: main(number, *changed), "was finished with other settings", "--force")


def test_04a_refuses_another_split_and_other_reviews_than_02_read(outputs, main, stops, tmp_path):
    stops(lambda: main("04a", "--validation-samples", 20), "--validation-samples 30")
    other = write_awkward(tmp_path)
    (other / "unlabelled.csv").write_text("What they wrote;Their stars\nanother film;\n")
    stops(lambda: main("04a", "--dataset", other), "02_finetune_roberta.py read other reviews")


def test_04a_takes_its_students_layers_from_those_that_02_saved_and_names_missing_ones(outputs, flags, script, stops):
    module = script("04a")
    args = module.parse_args(flags["04a"])
    lacking = {"feature_layers": [1, 3], "teacher_layers": 5}
    stops(lambda: module.student_to_teacher_layers(args, lacking), "--student-layers")
    reviews = module.data.load_reviews(args, reads=("train", "transfer"))
    facts = {"feature_layers": [2, 4, 6, 8, 10, 12], "teacher_layers": 12}
    teacher, of_validation = module.read_teacher(args, reviews, facts)
    assert of_validation.shape == (len(reviews.validation), 2)
    assert teacher["teacher_features"].layers == [2, 5]  # of a student of two layers: 6 and 12


@pytest.mark.parametrize(("number", "missing"), [("04a", "02_finetune_roberta.py"), ("04b", "03_finetune_mistral.py")])
def test_without_its_input_a_script_names_the_one_to_run(number, missing, here, stops):
    stops(lambda: here(number), f"run {missing} first")


@pytest.fixture
def no_report(monkeypatch):
    """05 without its pictures, which take seconds."""
    monkeypatch.setattr(report, "write_report", lambda folder: None)


def test_a_benchmark_needs_one_step_and_measures_again_what_another_machine_measured_and_by_force(
    copied, here, stops, tmp_path, monkeypatch, capsys, no_report
):
    stops(lambda: here("05"), "no finished step")
    copied("01_baseline")
    with pytest.raises(SystemExit):
        here("05", "--max-hours", "1e-9")  # after its first row
    environment = machine.environment
    monkeypatch.setattr(machine, "environment", lambda hardware: environment(hardware) | {"cpu": "another"})
    for more in ((), ("--force",)):
        assert here("05", *more) == 0
        assert "kept: " not in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "05_benchmark" / "benchmark.csv")
    assert len(table) == 2 and table["Speedup (x)"].isna().all()


def run_out_of_time(run, number: str) -> list[int]:
    """The exit codes of a script that is always out of time, until it ends otherwise."""
    codes = []
    while not codes or codes[-1] == 3:
        try:
            codes.append(run(number, "--max-hours", "1e-9") or 0)
        except SystemExit as left:
            codes.append(left.code)
        assert len(codes) < 50
    return codes


def test_models_that_fail_are_rows_that_say_so_even_without_time_and_the_exit_is_not_zero(
    copied, here, tmp_path, capsys, no_report
):
    copied("01_baseline", "02_roberta")
    for file in tmp_path.glob("01_baseline/nb_svm/*.npy"):
        file.write_bytes(b"x" * file.stat().st_size)
    shutil.rmtree(tmp_path / "02_roberta/model")
    assert run_out_of_time(here, "05") == [3, 2]  # after the one model that works, and at the end
    table = pd.read_csv(tmp_path / "05_benchmark" / "benchmark.csv")
    assert table["status"].str.startswith("failed").tolist() == [False, True, True]
    assert not (tmp_path / "05_benchmark" / "run.json").exists()
    assert here("05", "--report-only") == 0  # of a run with failures too
    for file in tmp_path.glob("01_baseline/*/*.npy"):
        file.write_bytes(b"")
    capsys.readouterr()
    assert here("05", "--force") == 2  # a user error: each is told with its remedy
    told = capsys.readouterr().err
    assert told.count("01_baseline.py --force") == 2 and "3 of 3 models failed" in told
    table = pd.read_csv(tmp_path / "05_benchmark" / "benchmark.csv")
    assert table["status"].str.startswith("failed").tolist() == [True] * 3


def test_a_benchmark_that_time_stops_after_each_row_keeps_what_it_measured(
    outputs, copied, here, tmp_path, capsys, no_report, monkeypatch
):
    copied("01_baseline", "04a_student_from_roberta")
    with monkeypatch.context() as slow, pytest.raises(SystemExit, match="3"):
        slow.setattr(measuring, "planned_minutes", lambda *_: 60.0)
        here("05", "--forms", "none", "--max-hours", "0.5")  # which is too short for a second row
    codes = run_out_of_time(lambda *more: here(*more, "--forms", "none"), "05")
    out = capsys.readouterr().out
    whole, made = (pd.read_csv(folder / "05_benchmark" / "benchmark.csv") for folder in (outputs, tmp_path))
    same = ["Model", "Type", "Accuracy", "nll", "Size (MB)", "n", "mcnemar_p_control", "status"]
    whole = whole[whole["Model"].isin(made["Model"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(whole[same], made[same])
    assert codes == [3, 3, 0]
    assert out.count("measuring ") == 4  # none is measured twice
    for name in made["Model"].iloc[:-1]:
        assert f"kept: {name} (" in out
    whole, made = (pd.read_parquet(folder / "05_benchmark" / "predictions.parquet") for folder in (outputs, tmp_path))
    pd.testing.assert_frame_equal(whole[made.columns], made)


def test_the_baselines_take_a_time_limit_and_finish(here):
    assert run_out_of_time(here, "01") == [0]


def test_the_benchmark_measures_again_only_what_changed_and_says_what_is_stale(
    outputs, copied, here, tmp_path, capsys, no_report
):
    copied("01_baseline", "02_roberta", "04a_student_from_roberta", "05_benchmark")
    columns = ["Model", "Accuracy", "Latency (ms)", "Throughput (samp/s)", "measured_at"]
    assert here("05", "--forms", "none") == 0
    assert "measuring" not in capsys.readouterr().out
    whole, made = (pd.read_csv(folder / "05_benchmark/benchmark.csv")[columns] for folder in (outputs, tmp_path))
    pd.testing.assert_frame_equal(made[:5], whole[whole["Model"].isin(made["Model"])][:5].reset_index(drop=True))
    figures = tmp_path / "02_roberta" / "metrics.json"
    figures.write_text(figures.read_text() + " ")
    finish_again(tmp_path / "02_roberta")
    config = tmp_path / "04a_student_from_roberta" / "model" / "config.json"
    config.write_text(config.read_text() + " ")
    finish_again(tmp_path / "04a_student_from_roberta")
    rows = (tmp_path / "05_benchmark" / "rows").glob("*.npz")
    row = next(row for row in rows if "naive Bayes" in str(np.load(row)["about"]))
    change_last_byte(row)
    assert here("05", "--forms", "none") == 0
    out = capsys.readouterr().out
    assert "warning: 04a_student_from_roberta is of an earlier 02_roberta" in out
    assert "run 04a_distill_from_roberta.py --force" in out and f"{row} is damaged" in out
    student = pd.read_csv(tmp_path / "05_benchmark/benchmark.csv").set_index("Type").loc["student, white-box"]
    assert np.isnan(student["diff_teacher"]) and "its teacher's step was made again" in student["note"]
    assert out.count("measuring ") == 2 and "measuring demo-distilbert from demo-roberta" in out


def test_the_report_is_drawn_again_from_the_files_alone(outputs, main, capsys):
    folder = outputs / "05_benchmark"
    before = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    assert main("05", "--report-only") == 0
    assert (folder / "report.html").read_bytes() == before
    assert "NB-SVM (logistic)" in capsys.readouterr().out


def test_a_mistake_beside_force_deletes_nothing(outputs, main, stops, tiny):
    zero_shot = ["--force", "--no-adapter", "--mistral-model", tiny / "mistral"]
    for wrong in (["--label-words", "unbelievably", "good"], ["--prompt", "no slot"]):
        stops(lambda wrong=wrong: main("03", "--force", *wrong), "error")
        stops(lambda wrong=wrong: main("04b", *zero_shot, *wrong), "error")
    stops(lambda: main("03", "--force", "--max-length", 20), "error")
    stops(lambda: main("04b", *zero_shot, "--prompt-length", 20), "error")
    stops(lambda: main("04a", "--force", "--max-length", 5000), "--max-length 5000")
    stops(lambda: main("02", "--force", "--num-processes", 3), "--batch-size 8")
    for step in ("02_roberta", "03_mistral", "04a_student_from_roberta", "04b_student_from_mistral"):
        assert (outputs / step / "run.json").exists()
    assert (outputs / "04b_student_from_mistral" / "soft_labels" / "transfer.parquet").exists()


def test_02_runs_in_bf16_on_a_cpu(here, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "refuse_collapse", lambda *_: None)  # of a training this short
    here("02", "--precision", "bf16", "--epochs", 1, "--max-transfer-samples", 20)
    features = np.load(tmp_path / "02_roberta" / "soft_labels" / "train_features.npy")
    assert features.dtype == np.float16 and np.isfinite(features).all()


def test_a_zero_shot_llm_teaches_without_03_and_has_its_own_row(here, tiny, tmp_path, monkeypatch, no_report):
    # The tiny LLM knows nothing: what is tested is the way of its scores, not their worth.
    monkeypatch.setattr(training, "refuse_collapse", lambda *_: None)
    monkeypatch.setattr(distill, "refuse_bad_teacher", lambda *_: None)
    monkeypatch.setattr(distill, "refuse_one_class", lambda *_: None)
    prompt = "Review: {review} Sentiment:"
    llm = ["--no-adapter", "--mistral-model", tiny / "mistral", "--prompt-length", 96, "--prompt", prompt]
    here("04b", *llm, "--epochs", 1, "--soft-labels", "all")
    assert len(pd.read_parquet(tmp_path / "04b_student_from_mistral" / "soft_labels" / "train.parquet")) == 96
    run = read(tmp_path / "04b_student_from_mistral", "run.json")
    assert run["facts"]["llm"]["prompt"] == prompt and not run["facts"]["llm"]["adapter"]
    assert "03_mistral" not in run["inputs"]
    assert here("05", "--forms", "none") == 0
    table = pd.read_csv(tmp_path / "05_benchmark" / "benchmark.csv").set_index("Type")
    assert table.loc["teacher, 4-bit zero-shot", "calibration"] == run["facts"]["calibration"]


def test_a_file_of_scores_teaches_without_an_llm_and_the_benchmark_says_whose_they_are(
    here, flags, script, stops, tmp_path
):
    module = script("04b")
    reviews = module.data.load_reviews(module.parse_args(flags["04b"]), reads=("train", "transfer"))
    texts = pd.concat([reviews.validation["text"], reviews.transfer["text"]])
    scores = pd.DataFrame({"text": texts, "p_positive": texts.str.startswith("funny") * 0.7 + 0.1})
    scores.to_csv(file := tmp_path / "answers.csv", index=False)
    folder = tmp_path / "04b_student_from_mistral"
    (folder / "soft_labels").mkdir(parents=True)
    (folder / "soft_labels" / "transfer.parquet").write_bytes(b"of an LLM")
    asked = ["--teacher-scores", file, "--teacher-name", "some/llm"]
    here("04b", "--force", *asked)

    run, figures = (read(folder, f"{name}.json") for name in ("run", "metrics"))
    assert "03_mistral" not in run["inputs"] and run["settings"]["soft_labels"] == "transfer"
    assert run["facts"]["scores"]["scored"] == {"train": 0, "validation": 30, "transfer": 50}
    assert figures["validation"]["teacher_none"]["accuracy"] == 1
    assert (folder / "soft_labels" / "transfer.parquet").read_bytes() == b"of an LLM"
    kept = pd.read_parquet(folder / "teacher_scores" / "transfer.parquet")
    assert kept["example_id"].tolist() == reviews.transfer["example_id"].tolist()
    np.testing.assert_allclose(np.exp(kept["log_p_positive"]), scores["p_positive"][30:], rtol=1e-5)
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert "A student of llm" in card and "answers.csv" in card

    assert here("05", "--forms", "none") == 0
    table = pd.read_csv(tmp_path / "05_benchmark" / "benchmark.csv")
    assert table["Model"].tolist() == ["demo-distilbert from llm"] and table["diff_teacher"].isna().all()
    assert "answers.csv" in table["note"].item()
    stops(lambda: here("04b", *asked[:2]), "other settings (teacher_name was some/llm")
    scores.assign(p_positive=scores["p_positive"] + 0.01).to_csv(file, index=False)
    stops(lambda: here("04b", *asked), "other settings (teacher-scores/log_odds was", "--force")


@pytest.fixture
def trained_by(here, flags, script, monkeypatch):
    """What 04a or 04b hands to train_student, call by call. The calls return the validation logits named here."""

    def collect(number: str, answers: tuple[str, ...], *more) -> list[dict]:
        module, calls = script(number), []
        labels = module.data.load_reviews(module.parse_args(flags[number]), reads=("train",)).validation["label"]
        logits = {"right": 4.0 * np.eye(2)[labels] - 2, "collapsed": np.tile([2.0, -2.0], (len(labels), 1))}

        def train_student(args, hardware, target, train, validation, **weights):
            calls.append({"target": target.name, "train": train, "validation": validation} | weights)
            return logits[answers[len(calls) - 1]]

        monkeypatch.setattr(distill, "train_student", train_student)
        monkeypatch.setattr(export, "add_temperature_and_card", lambda *_, **__: None)  # no folder was written
        here(number, *more)
        return calls

    return collect


def test_04a_trains_the_student_with_its_teacher_and_a_control_without_for_as_many_steps(
    copied, trained_by, tmp_path, capsys
):
    copied("02_roberta")
    student, control = trained_by("04a", ("right", "right"), "--alpha", 0.7, "--feature-weight", 0.2)
    assert (student["target"], student["alpha"], student["feature_weight"]) == ("model", 0.7, 0.2)
    assert student["teacher_width"] == read(tmp_path / "02_roberta", "run.json")["facts"]["teacher_width"]
    assert (student["train"].labels == -100).sum() == 60 and len(student["train"]) == 156
    saved = [pd.read_parquet(tmp_path / f"02_roberta/soft_labels/{split}.parquet") for split in ("train", "transfer")]
    logits = pd.concat(saved)[["logit_negative", "logit_positive"]].to_numpy()
    np.testing.assert_array_equal(student["train"].arrays["teacher_logits"], logits)
    assert (control["target"], control["alpha"], control.get("feature_weight", 0)) == ("control", 0.0, 0)
    assert len(control["train"]) == 96 and not control["train"].arrays and set(control["train"].labels) == {0, 1}
    assert control["epochs"] * 96 == student["epochs"] * 156 == 4 * 156
    assert len(student["validation"]) == len(control["validation"]) == 30
    assert "next: python 03_finetune_mistral.py" in capsys.readouterr().out  # which 04b needs


@pytest.mark.parametrize("answers", [("collapsed", "right"), ("right", "collapsed")])
def test_a_student_or_control_that_collapsed_ends_04a_with_the_cause(copied, trained_by, stops, tmp_path, answers):
    copied("02_roberta")
    stops(lambda: trained_by("04a", answers), "every validation review negative", "--force")
    assert not (tmp_path / "04a_student_from_roberta" / "run.json").exists()


@pytest.mark.parametrize("calibration", ["auto", "batch", "fitted", "none"])
def test_04b_trains_the_student_on_the_kept_soft_labels_calibrated(
    copied, trained_by, monkeypatch, tmp_path, calibration
):
    copied(*LLM_STEPS)
    monkeypatch.setattr(llms, "load_llm", None)  # other settings of the student need no LLM
    (student,) = trained_by("04b", ("right",), "--force", "--alpha", 0.7, "--calibration", calibration)
    assert (student["alpha"], student["epochs"], student.get("feature_weight", 0)) == (0.7, 4, 0)
    folder = tmp_path / "04b_student_from_mistral"
    table = pd.read_parquet(folder / "soft_labels" / "transfer.parquet")
    odds = (table["log_p_positive"] - table["log_p_negative"]).to_numpy(float)
    facts = read(folder, "run.json")["facts"]
    bias, temperature = facts["bias"], facts["calibration_temperature"]
    figures, used = read(folder, "metrics.json")["validation"], facts["calibration"]
    made = {name: scores["nll"] for name, scores in figures.items() if name.startswith("teacher_")}  # with each of them
    assert set(made) == {f"teacher_{name}" for name in {"none", "fitted", calibration} - {"auto"}}
    assert figures["calibration"] == used == (min(made, key=made.get)[8:] if calibration == "auto" else calibration)
    assert (temperature == 1) == (used != "fitted")
    if used != "fitted":
        assert bias == pytest.approx(odds.mean() if used == "batch" else 0, abs=1e-5)
    assert student["soft_labels"] == "transfer"  # no loss reads the teacher's logits of labelled reviews
    taught = student["train"].arrays["teacher_logits"][student["train"].labels == -100]
    np.testing.assert_allclose(taught[:, 1] - taught[:, 0], (odds - bias) / temperature, rtol=1e-4, atol=1e-4)
    assert len(taught) == 50


def test_the_llm_scores_again_only_damaged_soft_labels_and_another_number_of_reviews(
    copied, trained_by, tmp_path, capsys
):
    copied(*LLM_STEPS)
    folder = tmp_path / "04b_student_from_mistral" / "soft_labels"
    before = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.parquet")}
    assert set(before) == {"validation.parquet", "transfer.parquet"}
    validation = pd.read_parquet(folder / "validation.parquet")
    (folder / "validation.parquet").write_bytes(b"")
    trained_by("04b", ("right",), "--force", "--max-transfer-samples", 40)
    assert "validation.parquet is damaged: it is made again" in capsys.readouterr().out
    made_again = {file.name for file in folder.glob("*.parquet") if file.stat().st_mtime_ns != before[file.name]}
    assert made_again == set(before)
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "validation.parquet"), validation)
    assert len(pd.read_parquet(folder / "transfer.parquet")) == 40


def test_another_llm_in_the_place_of_an_untuned_one_scores_anew(outputs, flags, script, tiny, tmp_path, monkeypatch):
    module, base, asked = script("04b"), tmp_path / "llm", []
    args = module.parse_args(flags["04b"])
    reviews = module.data.load_reviews(args, reads=("train", "transfer"))
    llm = read(outputs / "03_mistral", "run.json")["facts"] | {"base": str(base), "adapter": False}
    shutil.copytree(tiny / "mistral", base)

    def score(_, ids, *rest):
        asked.append(len(ids))
        return np.full((len(ids), 2), -1.0, np.float32)

    monkeypatch.setattr(module.scoring, "score_llm", score)
    monkeypatch.setattr(module.llms, "load_llm", lambda *_: None)
    for change, scored in ((None, [30, 50]), (Path.touch, []), (change_last_byte, [30, 50])):
        if change:
            change(base / "model.safetensors")
        asked.clear()
        module.save_soft_labels(args, None, tmp_path / "soft_labels", reviews, llm)
        assert asked == scored


def change_last_byte(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def spoiled(**columns) -> Callable[[Path], None]:
    """Write a table with other columns, and record it in run.json."""

    def spoil(file: Path) -> None:
        table = pd.read_parquet(file)
        table.assign(**columns).to_parquet(file, index=False)
        finish_again(file.parents[1])

    return spoil


AGAIN = "02_finetune_roberta.py --force"
ONE_CLASS = {"logit_negative": 1.0, "logit_positive": 2.0}
SWAPPED = {
    "logit_negative": lambda table: -table["logit_negative"],
    "logit_positive": lambda table: -table["logit_positive"],
}


@pytest.mark.parametrize(
    ("number", "name", "damage", "words"),
    [
        ("04a", "02_roberta/soft_labels/train_features.npy", change_last_byte, ("train_features.npy", AGAIN)),
        ("04a", "02_roberta/model/model.safetensors", change_last_byte, ("other weights", "02_finetune")),
        ("04a", "02_roberta/soft_labels/train.parquet", spoiled(**SWAPPED), ("label order",)),
        ("04a", "02_roberta/soft_labels/transfer.parquet", spoiled(**ONE_CLASS), ("100% of the transfer set",)),
        ("04b", "03_mistral/adapter/adapter_model.safetensors", change_last_byte, ("adapter_model", "03_finetune")),
    ],
)
def test_a_damaged_teacher_or_one_that_cannot_teach_ends_its_students_step_with_the_cause(
    copied, here, stops, tmp_path, number, name, damage, words
):
    copied(name.split("/")[0])
    damage(tmp_path / name)
    stops(lambda: here(number), *words)


def test_another_prompt_than_03s_is_refused_beside_its_adapter(outputs, main, stops):
    for wrong in (
        ["--prompt", "{review} Good or bad?"],
        ["--label-words", "bad", "good"],
        ["--prompt-length", 64],
        ["--prompt-length", 512],
        ["--mistral-model", "another/model"],
    ):
        stops(lambda wrong=wrong: main("04b", *wrong), "03's adapter", "--no-adapter")


@pytest.mark.parametrize("preset", settings.PRESETS)
def test_without_an_adapter_the_llm_is_that_of_03_at_its_length(script, preset):
    ours, theirs = (script(number).parse_args(["--preset", preset]) for number in ("04b", "03"))
    ours.adapter = False
    llm = script("04b").find_llm(ours)
    assert [llm["base"], llm["max_length"], llm["prompt"]] == [theirs.mistral_model, theirs.max_length, theirs.prompt]


@pytest.mark.parametrize("number", ["04a", "04b"])
def test_without_unlabelled_reviews_the_labelled_ones_learn_from_the_teacher_too(script, monkeypatch, number):
    module, asked = script(number), []
    data_of = argparse.Namespace(labels=None)
    monkeypatch.setattr(distill, "student_datasets", lambda *_: (data_of, data_of, data_of))
    monkeypatch.setattr(distill, "train_student", lambda *_, soft_labels, **how: asked.append(soft_labels))
    monkeypatch.setattr(training, "refuse_collapse", lambda *_: None)
    args = module.parse_args(["--soft-labels", "transfer"])
    args.control = False
    for unlabelled in ([], ["a review"]):
        reviews = argparse.Namespace(transfer=unlabelled)
        if number == "04a":
            module.train_students(args, None, Path("folder"), reviews, {}, 8)
        else:
            module.train_student(args, None, Path("folder"), reviews, {})
    assert asked == ["all", "transfer"]


def test_a_base_that_is_not_03s_any_more_is_refused(outputs, flags, script, stops):
    module = script("04b")
    args = module.parse_args(flags["04b"])
    reviews = module.data.load_reviews(args, reads=("train", "transfer"))
    facts = read(outputs / "03_mistral", "run.json")["facts"]
    folder = outputs / "04b_student_from_mistral" / "soft_labels"
    log_p, _ = module.scoring.read_scores(folder, "validation", reviews.validation, "04b")
    labels = reviews.validation["label"].to_numpy()
    assert 0 < module.check_scores(facts, log_p, labels) <= 1
    facts["validation_accuracy"] = 0.6
    stops(lambda: module.check_scores(facts, log_p, labels), "0.600 in 03", "still the base")


def test_models_whose_folders_end_alike_keep_their_own_predictions(script):
    facts = {"teacher": "a/roberta/1", "student": "a/distilbert/1", "base": "a/mistral/1"}
    facts |= {"max_length": 8, "llm": {"adapter": True}, "prompt": "", "label_words": ()}
    facts |= {"calibration": "none", "bias": 0, "calibration_temperature": 1}
    runs = {step: {"facts": facts} for step in list(artifacts.SCRIPTS)[1:5]}
    module = script("05")
    args = module.parse_args(["--output-dir", "nowhere", "--forms", "none"])
    names = [contender.name for contender in module.find_contenders(args, None, runs, Path("deploy"))]
    assert len(names) == len(set(names)) == 4
    # The same runs, but 04b read a file of scores: 03's LLM is no teacher of its student.
    facts = {name: value for name, value in facts.items() if name != "llm"} | {"scores": {"file": "x/llm.csv"}}
    runs["04b_student_from_mistral"] = {"facts": facts | {"teacher": "llm"}}
    *_, llm, from_encoder, from_file = module.find_contenders(args, None, runs, Path("deploy"))
    assert llm.facts["calibration"] == "none (04b has not calibrated it)"
    assert from_encoder.teacher and from_encoder.note is None
    assert (from_file.name, from_file.teacher) == ("1 from llm", None) and "llm.csv" in from_file.note
