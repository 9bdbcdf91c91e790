"""What experiments/ runs: students by their recipes, teachers by 02 and 03, each kept by the product's artifacts."""

import argparse
import dataclasses
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling

from common import artifacts, baseline, data, device, distill, models, scoring, verbalizer

sys.path.insert(0, str(ROOT))
from experiments import distillation, few_labels, tables
from experiments import scoring as comparison

CPU = device.Hardware("cpu", "fp32", "CPU")
GOLD = [1, 0] * 4
SAYS = np.array([2.0, -2.0] * 4, np.float32)  # a teacher's log-odds
SOFT = {split: verbalizer.teacher_logits(SAYS) for split in ("train", "transfer")}
ALONE = distillation.CONTROL | {"epochs": 8}
TAUGHT = distillation.STUDENT | {"epochs": 8}


def fake_step(args, step: str, **facts) -> Path:
    """A finished step of a numbered script, without files."""
    same = {name: getattr(args, name) for name in distillation.SAME}
    run = {"step": step, "settings": same | {"max_length": 16}, "inputs": {}}
    artifacts.write_json(
        Path(args.output_dir, step, "run.json"), run | {"facts": {"labels": list(data.LABELS)} | facts}
    )
    return Path(args.output_dir, step)


@pytest.fixture
def study(tmp_path, tiny):
    """A study of the tests' tiny student and eight reviews a split; 02's files hold the last review first."""
    reviews = {}
    for split in ("train", "validation", "transfer", "test"):
        texts = [f"{word} {split} {row}" for row, word in enumerate(["good", "bad"] * 4)]
        ids = [f"{split}/{row}" for row in range(8)]
        reviews[split] = pd.DataFrame({"example_id": ids, "text": texts, "label": GOLD})
    reviews["transfer"]["label"] = data.UNLABELLED
    flags = ["--student-model", str(tiny / "distilbert"), "--max-length", "16", "--learning-rate", "1e-3"]
    flags += ["--output-dir", str(tmp_path / "outputs"), "--llm-test-samples", "4"]
    args = distillation.make_parser("", distillation.RUNS).parse_args(flags)
    folder = fake_step(args, "02_roberta")
    shutil.copytree(tiny / "roberta", folder / "model")
    for split in ("train", "transfer", "validation"):
        table = pd.DataFrame({"example_id": reviews[split]["example_id"]})
        table["logit_negative"], table["logit_positive"] = -SAYS / 2, SAYS / 2
        artifacts.write_table(folder / "soft_labels" / f"{split}.parquet", table.iloc[::-1])
        numbers = np.arange(8, dtype=np.float16)[::-1].reshape(8, 1, 1, 1)
        np.save(folder / "soft_labels" / f"{split}_features.npy", numbers)
    return distillation.Study(args, CPU, data.Reviews(**reviews, fingerprints={}), origin=args)


def folder_of(study, name: str, of: str = "runs") -> Path:
    return Path(study.args.output_dir, of, name)


def weights_written(study, name: str) -> int:
    return (folder_of(study, name) / "model" / "model.safetensors").stat().st_mtime_ns


def test_a_finished_run_is_not_trained_again_and_holds_what_a_table_needs(study):
    distillation.make_student(study, "logits", TAUGHT, 1)
    written = weights_written(study, "logits-1")
    distillation.make_student(study, "logits", TAUGHT, 1)
    assert weights_written(study, "logits-1") == written
    row, predictions = tables.read_finished(folder_of(study, "logits-1"))
    expected = {"column": "logits-1", "run": "logits", "seed": "1", "labels": "", "gold": "8", "transfer": "8"}
    expected |= {
        "teacher": "teacher",
        "epochs": "8",
        "alpha": "0.9",
        "student_model": "distilbert",
        "precision": "fp32",
    }
    assert expected.items() <= row.items() and int(row["seconds"]) >= 0
    for split in ("train", "validation", "transfer", "test"):
        assert row[f"{split}_reviews"] == data.fingerprint(getattr(study.reviews, split))
    assert row["teacher_weights"] == models.weights_digest(folder_of(study, "model", "02_roberta"))
    assert predictions.groupby("split").size().to_dict() == {"test": 8, "validation": 8}
    model = folder_of(study, "logits-1") / "model"
    on_test = distillation.score(study, model, 16, study.reviews.test)
    np.testing.assert_array_equal(predictions.loc[predictions["split"] == "test", "log_odds"], on_test)


def test_a_run_of_another_recipe_precision_or_teacher_is_not_taken_for_this_one(study, stops):
    distillation.make_student(study, "logits", TAUGHT, 1)
    make = lambda study, **changed: distillation.make_student(study, "logits", TAUGHT | changed, 1)  # noqa: E731
    stops(lambda: make(study, alpha=0.5), "runs/logits-1/ was finished with other settings", "alpha was 0.9, is 0.5")
    in_bf16 = dataclasses.replace(study, hardware=dataclasses.replace(CPU, precision="bf16"))
    stops(lambda: make(in_bf16), "arithmetic was fp32, is bf16")
    others = dataclasses.replace(study.reviews, transfer=study.reviews.transfer.assign(text="another"))
    stops(
        lambda: make(dataclasses.replace(study, reviews=others)),
        "teachers/teacher-42/ was finished",
        "transfer_reviews",
    )
    fake_step(study.args, "02_roberta", trained="again")
    stops(lambda: make(study), "teachers/teacher-42/ was finished", "02_roberta")
    distillation.make_teacher(study, "teacher", force=True)
    stops(lambda: make(study), "runs/logits-1/ was finished with other settings", "teacher_run")
    study.args.force = True
    distillation.make_student(study, "logits", TAUGHT, 1)


def test_an_interrupted_run_continues_and_knows_no_time_of_it(study, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(artifacts, "finish", interrupted)
        distillation.make_student(study, "control", ALONE, 1)
    assert not (folder_of(study, "control-1") / "run.json").exists()
    written = weights_written(study, "control-1")
    distillation.make_student(study, "control", ALONE, 1)
    assert weights_written(study, "control-1") == written
    assert tables.read_finished(folder_of(study, "control-1"))[0]["seconds"] == ""


def test_a_student_at_chance_is_no_measure_but_an_old_mistake_is_shown_as_it_falls(study, stops):
    study.args.learning_rate = 1e-9
    stops(lambda: distillation.make_student(study, "control", ALONE, 1), "control is no measure")
    assert not (folder_of(study, "control-1") / "run.json").exists()
    distillation.make_student(study, "label_sorted", distillation.LABEL_SORTED, 1)
    assert tables.read_finished(folder_of(study, "label_sorted-1"))[0]["gold"] == "4"


def trained_with(study, monkeypatch, name: str, soft=SOFT, reads_validation: bool = True) -> dict:
    """What a run hands to the product's train_student."""
    got = {}
    monkeypatch.setattr(
        distill,
        "train_student",
        lambda *args, **more: got.update(zip("args _ _ train validation".split(), args), **more),
    )
    run = distillation.RUNS[name]
    args = argparse.Namespace(**vars(study.args) | run | {"reads_validation": reads_validation})
    distillation.train(study, args, run, Path("nowhere"), soft)
    return got


def test_a_run_trains_by_its_recipe_on_its_own_reviews(study, monkeypatch):
    final = trained_with(study, monkeypatch, "final")
    assert (final["epochs"], final["alpha"], final["feature_weight"], final["teacher_width"]) == (4, 0.9, 0.0, None)
    assert (final["args"].soft_loss, final["args"].learning_rate) == ("kl", 1e-3)
    assert final["train"].labels.tolist() == GOLD + [distill.IGNORED] * 8
    np.testing.assert_array_equal(final["train"].arrays["teacher_logits"], np.concatenate([*SOFT.values()]))
    assert final["validation"].labels.tolist() == GOLD
    tokenizer = models.load_tokenizer(study.args.student_model)
    ids = data.encode(tokenizer, [*study.reviews.train["text"], *study.reviews.transfer["text"]], 16)
    assert [one.tolist() for one in final["train"].ids] == [one.tolist() for one in ids]

    control = trained_with(study, monkeypatch, "control", soft={})
    assert (control["epochs"], control["alpha"], len(control["train"])) == (6, 0.0, 8) and not control["train"].arrays
    assert trained_with(study, monkeypatch, "margin")["args"].soft_loss == "margin"
    assert trained_with(study, monkeypatch, "final", reads_validation=False)["validation"] is None

    swapped = {split: -logits for split, logits in SOFT.items()}  # gold where it is known, else the teacher's
    argmax = trained_with(study, monkeypatch, "argmax_labels", swapped)
    assert argmax["alpha"] == 0.0 and not argmax["train"].arrays
    assert argmax["train"].labels.tolist() == GOLD + [0, 1] * 4

    features = trained_with(study, monkeypatch, "logits_features")  # 02's files hold the last review first
    read = [features["train"][row]["teacher_features"].item() for row in range(16)]
    assert read == [*range(8), *range(8)] and features["teacher_width"] == 1


def test_the_surest_part_of_the_transfer_set_is_that_of_the_largest_log_odds():
    gold, log_odds = np.array([1, 0, 1, 0]), np.array([0.1, -3, 2, -0.2, 5, 1, -4, 0.5])
    rows = distillation.chosen_rows(distillation.RUNS["confident"], gold, verbalizer.teacher_logits(log_odds))
    assert rows["train"].tolist() == [0, 1, 2, 3] and rows["transfer"].tolist() == [1, 2, 4, 5, 6, 7]
    rows = distillation.chosen_rows(distillation.RUNS["label_sorted"], gold, None)
    assert gold[rows["train"]].tolist() == [0, 0] and "transfer" not in rows


def test_the_encoders_soft_labels_are_02s_by_example_id_and_bad_ones_are_refused(study, tmp_path, stops):
    for split, log_odds, words in (
        ("train", -SAYS[::-1], "its label order is swapped"),
        ("transfer", np.full(8, 2.0), "100% of the transfer set positive"),
    ):
        file = folder_of(study, "soft_labels", "02_roberta") / f"{split}.parquet"
        table = pd.read_parquet(file)
        artifacts.write_table(file, table.assign(logit_positive=log_odds, logit_negative=-log_odds))
        stops(lambda: distillation.make_teacher(study, "teacher"), words)
        artifacts.write_table(file, table)
    soft = distillation.read_soft_labels(study, distillation.make_teacher(study, "teacher"))
    for split in ("train", "transfer"):
        np.testing.assert_array_equal(soft[split], SOFT[split])
    row, predictions = tables.read_finished(folder_of(study, "teacher-42", "teachers"))
    assert (row["run"], row["gold"], row["transfer"], row["teacher"]) == ("teacher", "8", "0", "")
    assert set(predictions["split"]) == {"train", "transfer", "validation", "test"}
    elsewhere = argparse.Namespace(**vars(study.args) | {"output_dir": str(tmp_path / "fewer")})  # --teachers-from
    fewer = dataclasses.replace(study.reviews, transfer=study.reviews.transfer[:4])
    fewer = dataclasses.replace(study, args=elsewhere, reviews=fewer)
    soft = distillation.read_soft_labels(fewer, distillation.make_teacher(fewer, "teacher"))
    np.testing.assert_array_equal(soft["transfer"], SOFT["transfer"][:4])
    shutil.rmtree(Path(study.args.output_dir, "02_roberta"))
    stops(lambda: distillation.make_teacher(study, "teacher"), "run 02_finetune_roberta.py first")


@pytest.fixture
def llm_study(study, tiny):
    """The study after a 03 that has asked the tests' tiny LLM."""
    facts = {"base": str(tiny / "mistral"), "max_length": 96, "prompt": verbalizer.PROMPT}
    fake_step(study.args, "03_mistral", **facts, label_words=list(verbalizer.LABEL_WORDS))
    return study


def llm_says(study, split: str, prompt: str = verbalizer.PROMPT, adapter: Path | None = None) -> np.ndarray:
    """The tiny LLM's log-odds of a split, by the product's functions."""
    name = artifacts.read_run(study.args, "03_mistral")["facts"]["base"]
    tokenizer, llm = models.load_tokenizer(name), models.load_llm(name, CPU, adapter)
    ids = verbalizer.encode_prompts(tokenizer, getattr(study.reviews, split)["text"].tolist(), prompt, 96)
    words = verbalizer.label_token_ids(tokenizer, prompt, verbalizer.LABEL_WORDS)
    return verbalizer.log_odds(scoring.score_llm(llm, ids, words, tokenizer.pad_token_id, CPU, 256))


def teacher_log_odds(study, name: str, split: str) -> np.ndarray:
    """A teacher's log-odds of a split, from the folder that its students read."""
    file = Path(study.args.output_dir, distillation.make_teacher(study, name), "predictions.parquet")
    table = pd.read_parquet(file)
    return table.loc[table["split"] == split, "log_odds"].to_numpy()


def test_the_llm_is_asked_and_calibrated_as_by_04b(llm_study, stops):
    expected = {split: llm_says(llm_study, split) for split in ("train", "transfer", "test")}
    for name, bias in (("zero_shot_teacher", 0.0), ("zero_shot_batch_teacher", expected["transfer"].mean())):
        for split in ("train", "transfer"):
            np.testing.assert_allclose(teacher_log_odds(llm_study, name, split), expected[split] - bias, atol=1e-4)
        on_test = teacher_log_odds(llm_study, name, "test")
        read = np.isfinite(on_test)
        assert read.sum() == 4
        np.testing.assert_allclose(on_test[read], (expected["test"] - bias)[read], atol=1e-4)
    assert np.ptp(expected["test"]) > 0.1 and abs(expected["transfer"].mean()) > 0.1  # or nothing was tested
    assert len(list(Path(llm_study.args.output_dir, "llm").glob("*/"))) == 1  # scored once for both calibrations
    llm_study.args.llm_test_samples = 8
    stops(lambda: teacher_log_odds(llm_study, "zero_shot_teacher", "test"), "llm_test_samples was 4, is 8")
    llm_study.args.llm_test_samples = 4
    fake_step(llm_study.args, "03_mistral", base="another")
    stops(
        lambda: teacher_log_odds(llm_study, "zero_shot_teacher", "train"),
        "zero_shot_teacher-42/ was finished",
        "03_mistral",
    )


def test_the_tuned_llm_is_asked_with_03s_adapter_and_the_mistake_by_another_prompt(llm_study, script):
    base = artifacts.read_run(llm_study.args, "03_mistral")["facts"]["base"]
    flags = argparse.Namespace(gradient_checkpointing=False, lora_r=4, lora_alpha=8, lora_dropout=0.0)
    model, adapter = (
        script("03").with_lora(flags, models.load_llm(base, CPU)),
        folder_of(llm_study, "adapter", "03_mistral"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero until it is trained
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(adapter)
    odds = {}
    for name, prompt in (("tuned_teacher", verbalizer.PROMPT), ("other_prompt_teacher", distillation.OTHER_PROMPT)):
        says = llm_says(llm_study, "transfer", prompt, adapter)
        with pytest.MonkeyPatch.context() as patched:  # a random LLM may call all reviews one class
            patched.setattr(distill, "refuse_one_class", lambda *_: None)
            patched.setattr(distill, "refuse_bad_teacher", lambda *_: None)
            odds[name] = teacher_log_odds(llm_study, name, "transfer")
        np.testing.assert_allclose(odds[name], says - says.mean(), atol=1e-4)
    untuned = llm_says(llm_study, "transfer")
    assert np.abs(odds["tuned_teacher"] - (untuned - untuned.mean())).max() > 0.05
    assert np.abs(odds["tuned_teacher"] - odds["other_prompt_teacher"]).max() > 0.05


def test_nb_svm_is_01s_of_the_same_labels(study, monkeypatch, stops):
    stops(lambda: distillation.make_nb_svm(study), "run 01_baseline.py first")
    fake_step(study.args, "01_baseline")
    (folder_of(study, "nb_svm", "01_baseline")).mkdir()
    says = argparse.Namespace(logits=lambda texts: np.stack([np.zeros(8), np.arange(8.0)], axis=1))
    monkeypatch.setattr(baseline, "load_baseline", lambda _: says)
    distillation.make_nb_svm(study)
    row, predictions = tables.read_finished(folder_of(study, "nb_svm-42"))
    assert (row["gold"], row["transfer"], row["teacher"]) == ("8", "0", "")
    assert predictions["log_odds"].tolist() == list(range(8)) and set(predictions["split"]) == {"test"}
    fewer = dataclasses.replace(study, reviews=dataclasses.replace(study.reviews, train=study.reviews.train[:4]))
    stops(lambda: distillation.make_nb_svm(fewer), "nb_svm-42/ was finished with other settings", "train_reviews")


def test_masked_language_modelling_moves_the_weights_that_a_student_starts_from(study, monkeypatch, stops):
    bases, train = [], distillation.train

    def note(study, args, *others):
        bases.append(args.student_model)
        train(study, args, *others)

    monkeypatch.setattr(distillation, "train", note)
    run = ALONE | {"mlm_epochs": 2}
    distillation.make_student(study, "control_levers", run, 1)
    before, after = (models.load_classifier(name).state_dict() for name in (study.args.student_model, bases[0]))
    assert any("transformer.layer.0" in name for name in before if not torch.equal(before[name], after[name]))
    row = tables.read_finished(folder_of(study, "control_levers-1"))[0]
    assert row["student_model"] == "distilbert" and row["transfer"] == "8"  # these reviews were read
    study.args.learning_rate = 2e-3
    stops(lambda: distillation.make_student(study, "control_levers", run, 2), "mlm/2/ was finished with other settings")


@pytest.mark.parametrize("architecture", ["distilbert", "roberta"])
def test_the_loss_of_masked_tokens_alone_is_that_of_transformers_over_all(tiny, architecture):
    name = str(tiny / architecture)
    tokenizer, model = models.load_tokenizer(name), AutoModelForMaskedLM.from_pretrained(name).eval()
    ids = data.encode(tokenizer, ["a good film and a long one", "bad", "it was all right, I think"] * 2, 32)
    batch = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.4)([{"input_ids": one} for one in ids])
    theirs = model(**batch)
    assert distillation.masked_loss(model, batch).item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    assert model(**batch).logits.shape == theirs.logits.shape  # the hook is gone


@pytest.mark.parametrize(("labels", "seed"), [(0, 1), (50, 1), (500, 2)])
def test_with_few_labels_each_student_learns_from_a_teacher_of_its_own_labels(study, monkeypatch, labels, seed):
    flags = ["--labels", str(labels), "--seeds", str(seed), "--student-model", "x", "--output-dir", "here"]
    made, loaded = {}, []

    def load_reviews(args, reads):
        loaded.append((args.seed, args.max_train_samples, reads))
        return study.reviews

    def make_student(study, name, run, seed, reads_validation):
        made[name] = (
            run["teacher"],
            run["labelled"],
            reads_validation,
            study.column(name, seed),
            study.origin.output_dir,
        )

    monkeypatch.setattr(few_labels, "LABELS", few_labels.LABELS | {labels: (8, 8)})
    monkeypatch.setattr(data, "load_reviews", load_reviews)
    monkeypatch.setattr(distillation, "make_student", make_student)
    monkeypatch.setattr(
        distillation, "make_nb_svm", lambda study: made.update(nb_svm=study.column("nb_svm", study.origin.seed))
    )
    few_labels.main(flags)
    assert loaded == [(41 + seed, 8, ("train", "transfer")), (42, 2000, ("test",))]  # draws differ, test does not
    if labels == 0:
        column = "student_of_llm-0-1"
        assert made == {"student_of_llm": ("zero_shot_batch_teacher", "none", False, column, "here/3000-42")}
        return
    place = [labels >= 500, f"-{labels}-{seed}", f"here/{labels}-{41 + seed}"]
    teachers = {"control": "", "student_of_encoder": "teacher", "student_of_llm": "tuned_teacher"}
    expected = {name: (teacher, "all", place[0], name + place[1], place[2]) for name, teacher in teachers.items()}
    assert made == expected | {"nb_svm": f"nb_svm-{labels}-{41 + seed}"}


def test_with_few_labels_the_control_takes_as_many_steps_as_the_students():
    for gold in (34, 400, 2000):
        control = few_labels.recipe("control", 500, gold, transfer=4000, batch=32)
        steps, of_students = control["epochs"] * -(-gold // 32), 4 * -(-(gold + 4000) // 32)
        assert steps == pytest.approx(of_students, rel=0.03) and control["alpha"] == 0


def test_flags_that_a_run_would_ignore_are_refused(capsys):
    for parse in (few_labels.parse_args, distillation.main):
        for flags in (["--epochs", "3"], ["--seeds", "-1"], ["--num-processes", "2"]):
            with pytest.raises(SystemExit) as left:
                parse(flags)
            assert left.value.code == 2, flags
    for flag in ("--max-train-samples", "--validation-samples"):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            few_labels.parse_args([flag, "500"])
        assert "--labels decides" in capsys.readouterr().err


def test_the_committed_runs_are_of_the_recipes_that_stand_in_the_code():
    checked = 0
    for question in ("distillation", "more_unlabelled", "few_labels"):
        _, runs = tables.read_question(ROOT / "results" / question)
        for column, row in runs[runs["epochs"] != ""].iterrows():
            run = distillation.RUNS.get(row["run"])
            if question == "few_labels":
                run = few_labels.recipe(row["run"], int(row["labels"]), int(row["gold"]), 4000, int(row["batch_size"]))
            if run:
                assert row[list(run)].to_dict() == {name: str(value) for name, value in run.items()}, column
                checked += 1
            else:
                assert row["run"] == "whole_prompt"  # its code is that of row["commit"]
    assert checked == 41
    lists = [tables.read_question(ROOT / "results" / one)[1] for one in ("distillation", "more_unlabelled")]
    shared = [column for column in lists[1].index if not column.startswith(("final-", "teacher-"))]
    assert {"control-1", "final_longer-1", "nb_svm-42"} <= set(shared)
    assert lists[0].loc["teacher-42", "weights"] == lists[1].loc["teacher-42", "weights"]
    pd.testing.assert_frame_equal(lists[0].loc[shared], lists[1].loc[shared])


def test_run_sh_asks_for_runs_that_there_are():
    text = (ROOT / "experiments" / "run.sh").read_text()
    asked = {name for names in re.findall(r"--runs ((?:[a-z_]+ ?)+)", text) for name in names.split()}
    assert {"control", "tuned", "nb_svm"} <= asked <= {*distillation.RUNS, "nb_svm"}


def test_all_ways_of_scoring_call_short_reviews_alike(tiny, study):
    flags = ["--encoder", str(tiny / "roberta"), "--output", "x", "--max-length", "64"]
    methods = comparison.encoder_methods(comparison.parse_args(flags), CPU)
    seconds, labels = comparison.time_methods(methods, study.reviews.test["text"].tolist(), 2, CPU)
    assert seconds.keys() == labels.keys() and min(seconds.values()) > 0
    for name, called in labels.items():
        assert called.tolist() == labels["ours"].tolist() and len(called) == 8, name
