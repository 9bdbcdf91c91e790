"""What experiments/ runs: students by their recipes, teachers by 02 and 03, each kept by the product's artifacts."""

import argparse
import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from conftest import CPU, ROOT

from common import (
    artifacts,
    baseline,
    data,
    distill,
    encoding,
    llms,
    metrics,
    models,
    scoring,
    storage,
    verbalizer,
)
from experiments import distillation, few_labels, tables

GOLD = [1, 0] * 4
SAYS = np.array([2.0, -2.0] * 4, np.float32)  # a teacher's log-odds
SOFT = {split: metrics.two_logits(SAYS) for split in ("train", "transfer")}
ALONE, TAUGHT = distillation.CONTROL | {"epochs": 8}, distillation.FINAL | {"epochs": 8}
# Their code is that of row["commit"].
FINISHED = set(
    "control_levers margin argmax_labels features logits_features no_transfer_set confident label_sorted zero_shot "
    "other_prompt whole_prompt tuned_label_sorted".split()
)


def fake_step(args, step: str, **facts) -> Path:
    """A finished step of a numbered script, without files."""
    same = {name: getattr(args, name) for name in distillation.SAME} | {"max_length": 16}
    run = {"step": step, "settings": same, "inputs": {}, "facts": {"labels": list(data.LABELS)} | facts, "files": {}}
    storage.write_json(Path(args.output_dir, step, "run.json"), run | {"sha256": artifacts._digest_of(run)})
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
        storage.write_table(folder / "soft_labels" / f"{split}.parquet", table.iloc[::-1])
    return distillation.Study(args, CPU, data.Reviews(**reviews, fingerprints={}), origin=args)


def folder_of(study, name: str, of: str = "runs") -> Path:
    return Path(study.args.output_dir, of, name)


def weights_written(study, name: str) -> int:
    return (folder_of(study, name) / "model" / "model.safetensors").stat().st_mtime_ns


def test_a_finished_run_is_not_trained_again_and_holds_what_a_table_needs(study):
    run = TAUGHT | {"transfer_samples": 4}
    distillation.make_student(study, "both_4", run, 1)
    written = weights_written(study, "both_4-1")
    distillation.make_student(study, "both_4", run, 1)
    assert weights_written(study, "both_4-1") == written
    row, predictions = tables.read_finished(folder_of(study, "both_4-1"))
    expected = {"column": "both_4-1", "run": "both_4", "seed": "1", "labels": "", "gold": "8", "transfer": "4"}
    expected |= {"teacher": "teacher", "epochs": "8", "alpha": "0.9", "transfer_samples": "4", "terms": "both"}
    expected |= {"student_model": "distilbert", "precision": "fp32", "feature_weight": ""}
    assert expected.items() <= row.items() and int(row["seconds"]) >= 0
    for split in ("train", "validation", "transfer", "test"):
        assert row[f"{split}_reviews"] == data.fingerprint(getattr(study.reviews, split))
    assert row["teacher_weights"] == models.weights_digest(folder_of(study, "model", "02_roberta"))
    assert predictions.groupby("split").size().to_dict() == {"test": 8, "validation": 8}
    on_test = distillation.score(study, folder_of(study, "both_4-1") / "model", study.args.student_model, 16, "test")
    np.testing.assert_array_equal(predictions.loc[predictions["split"] == "test", "log_odds"], on_test)


def test_a_run_of_another_recipe_precision_or_teacher_is_not_taken_for_this_one(study, stops):
    def make(study=study, **changed):
        distillation.make_student(study, "logits", TAUGHT | changed, 1)

    make()
    stops(lambda: make(alpha=0.5, terms="one"), "runs/logits-1/ was finished", "alpha was 0.9, is 0.5; terms was both")
    in_bf16 = dataclasses.replace(study, hardware=dataclasses.replace(CPU, precision="bf16"))
    stops(lambda: make(in_bf16), "arithmetic was fp32, is bf16")
    others = dataclasses.replace(study.reviews, transfer=study.reviews.transfer.assign(text="another"))
    stops(lambda: make(dataclasses.replace(study, reviews=others)), "teachers/teacher-42/", "transfer_reviews")
    fake_step(study.args, "02_roberta", trained="again")
    stops(make, "teachers/teacher-42/ was finished", "02_roberta")
    distillation.make_teacher(study, "teacher", force=True)
    stops(make, "runs/logits-1/ was finished with other settings", "teacher_run")


def test_a_student_at_chance_is_no_measure_and_an_interrupted_run_continues(study, monkeypatch, stops):
    with monkeypatch.context() as patched:
        patched.setattr(study.args, "learning_rate", 1e-9)
        stops(lambda: distillation.make_student(study, "control", ALONE, 2), "control is no measure")
    assert not (folder_of(study, "control-2") / "run.json").exists()
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(artifacts, "finish", lambda *_: 1 / 0)
        distillation.make_student(study, "control", ALONE, 1)
    written = weights_written(study, "control-1")
    distillation.make_student(study, "control", ALONE, 1)
    assert weights_written(study, "control-1") == written
    row = tables.read_finished(folder_of(study, "control-1"))[0]
    # The time of its first part is gone.
    assert (row["seconds"], row["gold"], row["transfer"], row["terms"]) == ("", "8", "0", "")


def trained_with(study, monkeypatch, name: str, soft=SOFT, reads_validation: bool = True, **changed) -> dict:
    """What a run hands to the product's train_student."""
    got, names = {}, "args hardware target train validation".split()
    monkeypatch.setattr(distill, "train_student", lambda *args, **more: got.update(zip(names, args), **more))
    run = distillation.RUNS[name] | changed
    args = argparse.Namespace(**vars(study.args) | run | {"reads_validation": reads_validation})
    distillation.train(study, args, distillation.chosen_rows(study, run), Path("nowhere"), soft)
    return got


def test_a_run_trains_by_its_recipe_on_its_own_reviews(study, monkeypatch):
    final = trained_with(study, monkeypatch, "final")
    assert (final["epochs"], final["alpha"], final["soft_labels"]) == (4, 0.9, "all")
    assert final["args"].learning_rate == 1e-3
    assert final["train"].labels.tolist() == GOLD + [distill.IGNORED] * 8
    np.testing.assert_array_equal(final["train"].arrays["teacher_logits"], np.concatenate([*SOFT.values()]))
    assert final["validation"].labels.tolist() == GOLD
    tokenizer = models.load_tokenizer(study.args.student_model)
    ids = encoding.encode(tokenizer, [*study.reviews.train["text"], *study.reviews.transfer["text"]], 16)
    assert [one.tolist() for one in final["train"].ids] == [one.tolist() for one in ids]

    control = trained_with(study, monkeypatch, "control", soft={})
    assert (control["epochs"], control["alpha"], len(control["train"])) == (6, 0.0, 8) and not control["train"].arrays
    assert trained_with(study, monkeypatch, "short_one_2000")["soft_labels"] == "transfer"
    assert trained_with(study, monkeypatch, "final", reads_validation=False)["validation"] is None
    soft_alone = trained_with(study, monkeypatch, "final", labelled="none")["train"].labels.tolist()
    assert soft_alone == [distill.IGNORED] * 8


def test_fewer_unlabelled_reviews_are_those_that_the_scripts_draw(study, data_args):
    reviews, drawn = (
        data.load_reviews(argparse.Namespace(**vars(data_args) | {"max_transfer_samples": n}), ("train", "transfer"))
        for n in (None, 5)
    )
    study = dataclasses.replace(study, reviews=reviews, origin=data_args)
    rows = distillation.chosen_rows(study, distillation.RUNS["both_8000"] | {"transfer_samples": 5})["transfer"]
    assert reviews.transfer["text"].iloc[rows].tolist() == drawn.transfer["text"].tolist() and len(rows) == 5


def test_the_encoders_soft_labels_are_02s_by_example_id_and_bad_ones_are_refused(study, tmp_path, stops):
    for split, log_odds, words in (
        ("train", -SAYS[::-1], "its label order is swapped"),
        ("transfer", np.full(8, np.nan), "not all finite"),
    ):
        file = folder_of(study, "soft_labels", "02_roberta") / f"{split}.parquet"
        table = pd.read_parquet(file)
        storage.write_table(file, table.assign(logit_positive=log_odds, logit_negative=-log_odds))
        stops(lambda: distillation.make_teacher(study, "teacher"), words)
        storage.write_table(file, table)
    elsewhere = argparse.Namespace(**vars(study.args) | {"output_dir": str(tmp_path / "fewer")})  # --teachers-from
    fewer = dataclasses.replace(study.reviews, transfer=study.reviews.transfer[:4])
    for one in (study, dataclasses.replace(study, args=elsewhere, reviews=fewer)):
        soft = distillation.read_soft_labels(one, distillation.make_teacher(one, "teacher"))
        for split in ("train", "transfer"):
            np.testing.assert_array_equal(soft[split], SOFT[split][: len(getattr(one.reviews, split))])
    row, predictions = tables.read_finished(folder_of(study, "teacher-42", "teachers"))
    assert (row["run"], row["gold"], row["transfer"], row["teacher"]) == ("teacher", "8", "0", "")
    assert set(predictions["split"]) == {"train", "transfer", "validation", "test"}


@pytest.fixture
def llm_study(study, tiny):
    """The study after a 03 that has asked the tests' tiny LLM."""
    facts = {"base": str(tiny / "mistral"), "max_length": 96, "prompt": verbalizer.PROMPT}
    fake_step(study.args, "03_mistral", **facts, label_words=list(verbalizer.LABEL_WORDS))
    return study


def llm_says(study, split: str, adapter: Path | None = None) -> np.ndarray:
    """The tiny LLM's log-odds of a split, by the product's functions."""
    name = artifacts.read_run(study.args, "03_mistral")["facts"]["base"]
    tokenizer, llm = models.load_tokenizer(name), llms.load_llm(name, CPU, adapter)
    texts = getattr(study.reviews, split)["text"].tolist()
    ids = verbalizer.encode_prompts(tokenizer, texts, verbalizer.PROMPT, 96)
    words = verbalizer.label_token_ids(tokenizer, verbalizer.PROMPT, verbalizer.LABEL_WORDS)
    return metrics.log_odds(scoring.score_llm(llm, ids, words, tokenizer.pad_token_id, CPU, 256))


def teacher_log_odds(study, name: str, split: str) -> np.ndarray:
    """A teacher's log-odds of a split, from the folder that its students read."""
    file = Path(study.args.output_dir, distillation.make_teacher(study, name), "predictions.parquet")
    table = pd.read_parquet(file)
    return table.loc[table["split"] == split, "log_odds"].to_numpy()


@pytest.mark.parametrize("name", distillation.ADAPTER)
def test_the_llm_is_asked_and_calibrated_as_by_04b_and_a_tuned_one_with_03s_adapter(
    llm_study, with_lora, monkeypatch, stops, name
):
    adapter = folder_of(llm_study, "adapter", "03_mistral")
    with_lora(std=0.2).save_pretrained(adapter)
    for refuse in ("refuse_one_class", "refuse_bad_teacher"):  # a random LLM may call all reviews one class
        monkeypatch.setattr(distill, refuse, lambda *_: None)
    used, other = (adapter, None) if name == "tuned_teacher" else (None, adapter)
    expected = {split: llm_says(llm_study, split, used) for split in ("train", "transfer", "test")}
    bias = expected["transfer"].mean()
    assert np.abs(expected["test"] - llm_says(llm_study, "test", other)).max() > 0.05  # or nothing is tested
    assert np.ptp(expected["test"]) > 0.1 and abs(bias) > 0.1
    for split in ("train", "transfer"):
        np.testing.assert_allclose(teacher_log_odds(llm_study, name, split), expected[split] - bias, atol=1e-4)
    on_test = teacher_log_odds(llm_study, name, "test")
    read = np.isfinite(on_test)
    assert read.sum() == 4
    np.testing.assert_allclose(on_test[read], (expected["test"] - bias)[read], atol=1e-4)
    llm_study.args.llm_test_samples = 8
    stops(lambda: teacher_log_odds(llm_study, name, "test"), "llm_test_samples was 4, is 8")


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


def test_frozen_embeddings_are_means_of_length_1_each_review_embedded_once_and_part_of_test_read(study, monkeypatch):
    reviews = pd.concat([study.reviews.train, study.reviews.validation])
    study = dataclasses.replace(study, labels="16")
    study = dataclasses.replace(study, reviews=dataclasses.replace(study.reviews, fingerprints={"dataset/train": "x"}))
    study.args.roberta_model = str(folder_of(study, "model", "02_roberta"))
    study.args.embedded_test_samples = 4
    embedded, real = [], scoring.score_encoder
    monkeypatch.setattr(scoring, "score_encoder", lambda *args: embedded.extend(args[1]) or real(*args))
    few_labels.make_alternative(study, "frozen_embeddings")
    assert len(embedded) == 4 + 16
    row, predictions = tables.read_finished(folder_of(study, "frozen_embeddings-16-42"))
    assert (row["gold"], row["transfer"], row["teacher"]) == ("16", "0", "")
    assert predictions["log_odds"].notna().sum() == 4 and len(predictions) == 8
    found = few_labels.embed(study, reviews)
    assert len(embedded) == 20 and found.index.tolist() == reviews["example_id"].tolist()
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    tokenizer = models.load_tokenizer(study.args.roberta_model)
    model = transformers.AutoModel.from_pretrained(study.args.roberta_model).eval()
    tokens = torch.tensor(encoding.encode(tokenizer, ["good train 0"], 16)[0][None].astype(np.int64))
    mean = model(tokens).last_hidden_state[0].mean(0).detach().numpy()
    np.testing.assert_allclose(found.loc["train/0"], mean / np.linalg.norm(mean), atol=2e-3)


def test_flags_that_a_run_would_ignore_are_refused():
    for parse in (few_labels.parse_args, distillation.main):
        for flags in (["--epochs", "3"], ["--seeds", "-1"], ["--num-processes", "2"]):
            with pytest.raises(SystemExit, match="2"):
                parse(["--runs", "control", *flags])


def test_the_committed_runs_are_of_the_recipes_that_stand_in_the_code():
    checked, asked = 0, "distillation more_unlabelled few_labels unlabelled whose_soft_labels how_much_unlabelled"
    for question in asked.split():
        _, runs = tables.read_question(ROOT / "results" / question)
        for column, row in runs[(runs["epochs"] != "") & ~runs["run"].isin(FINISHED)].iterrows():
            run = distillation.RUNS.get(row["run"])
            if question == "few_labels":
                run = few_labels.recipe(row["run"], int(row["labels"]), int(row["gold"]), 4000, int(row["batch_size"]))
            assert row[list(run)].to_dict() == {name: str(value) for name, value in run.items()}, column
            checked += 1
    assert checked == 61 and not FINISHED & set(distillation.RUNS)
    lists = [tables.read_question(ROOT / "results" / one)[1] for one in ("distillation", "more_unlabelled")]
    shared = [column for column in lists[1].index if not column.startswith(("final-", "teacher-"))]
    assert {"control-1", "final_longer-1", "nb_svm-42"} <= set(shared)
    pd.testing.assert_frame_equal(lists[0].loc[shared], lists[1].loc[shared])


@pytest.mark.parametrize("file", ["run.sh", "gpu.sh"])
def test_a_shell_script_asks_for_runs_that_there_are(file):
    text = (ROOT / "experiments" / file).read_text().replace("\\\n", "")
    asked = {name for names in re.findall(r"--runs ((?: *[a-z_\d]+)+)", text) for name in names.split()}
    assert {"control"} < asked <= {*distillation.RUNS, *few_labels.RUNS, *distillation.TEACHERS}
