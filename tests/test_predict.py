"""predict.py: a saved model labels a file of reviews, and its folder says how it is to be used."""

import argparse

import numpy as np
import pandas as pd
import pytest
from conftest import CPU

import predict
from common import data, encoding, export, metrics, models, scoring, storage

TEXTS = ["good fun", "bad <br /> dull", "", "a film that is " + "good and " * 40 + "bad in the end"]


@pytest.fixture
def model(tiny, tmp_path):
    """A model folder as the scripts leave it."""
    folder = tmp_path / "04a" / "model"
    tokenizer, classifier = (load(str(tiny / "distilbert")) for load in (models.load_tokenizer, models.load_classifier))
    tokenizer.model_max_length = 24
    classifier.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    args = argparse.Namespace(dataset="org/reviews", epochs=2, learning_rate=1e-4, batch_size=8, max_length=24, seed=1)
    labels = np.arange(40) % 2
    logits = np.stack([-(labels - 0.4), labels - 0.4], axis=1) * np.tile([3.0, 3.0, -1.0, -1.0], 10)[:, None]
    tables = {name: pd.DataFrame({"label": labels}) for name in ("train", "validation")}
    export.add_temperature_and_card(args, folder, "A student.", "org/base", argparse.Namespace(**tables), logits)
    return folder, labels, logits


def test_each_review_gets_the_label_and_probability_of_the_trained_reading(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict, "CHUNK", 1)  # so that a chunk has no text
    (tmp_path / "reviews_labels.csv.partial").write_text("row,label\n0,positive\n")  # of an interrupted run
    file = tmp_path / "reviews.csv.gz"
    pd.DataFrame({"review": TEXTS, "body": TEXTS}).to_csv(file, index=False)
    predict.main([str(model[0]), str(file)])
    made = pd.read_csv(tmp_path / "reviews_labels.csv")
    assert list(made["row"]) == [0, 1, 2, 3] and pd.isna(made["label"][2]) and made["text"][1] == "bad dull"
    tokenizer, classifier = models.load_tokenizer(str(model[0])), models.load_classifier(str(model[0]))
    ids = encoding.encode(tokenizer, [TEXTS[0], "bad dull", TEXTS[3]], 24)
    logits = scoring.score_encoder(classifier.eval(), ids, tokenizer.pad_token_id, CPU, None)["scores"]
    expected = 1 / (1 + np.exp((logits[:, 0] - logits[:, 1]) / classifier.config.calibration_temperature))
    assert made["p_positive"].dropna().to_numpy() == pytest.approx(expected, abs=1e-4)
    assert list(made["label"].dropna()) == [data.LABELS[int(p > 0.5)] for p in expected]
    out = capsys.readouterr().out
    assert "reviews_labels.csv: " in out and out.count("reads the column review, not body") == 1  # in four chunks


def test_an_unsure_review_gets_the_second_models_answer_and_both_models_are_verified(model, tmp_path, monkeypatch):
    verified = []
    monkeypatch.setattr(predict.artifacts, "verify", verified.append)
    pd.DataFrame({"text": TEXTS}).to_csv(tmp_path / "reviews.csv", index=False)
    command = [str(model[0]), str(tmp_path / "reviews.csv"), "--escalate", str(model[0])]
    for name, unsure, answered in (("none", ["0", "0"], {"student"}), ("all", ["1", "0"], {"teacher"})):
        predict.main([*command, "--unsure", *unsure, "--output", str(tmp_path / f"{name}.csv")])
        assert set(pd.read_csv(tmp_path / f"{name}.csv")["model"].dropna()) == answered
    assert verified == 4 * [model[0]]


def test_what_cannot_be_labelled_is_refused_and_nothing_is_overwritten(model, tiny, tmp_path, stops):
    file, made = tmp_path / "reviews.csv", tmp_path / "reviews_labels.csv"
    stops(lambda: predict.main([str(model[0]), str(file)]), str(file), "does not exist")
    (tmp_path / "reviews.doc").touch()
    stops(lambda: predict.main([str(model[0]), str(tmp_path / "reviews.doc")]), "reviews.doc", ".parquet")
    file.write_text("words\nno text column\n")
    stops(lambda: predict.main([str(model[0]), str(file)]), "words", "named text")
    stops(lambda: predict.main([str(model[0]), str(file), "--text-column", "body"]), "words", "--text-column body")
    file.write_text("text\n")
    stops(lambda: predict.main([str(model[0]), str(file)]), "no reviews")
    file.write_text("text\ngood\n")
    made.write_text("finished work")
    stops(lambda: predict.main([str(model[0]), str(file)]), "exists", "--force")
    assert made.read_text() == "finished work"
    stops(lambda: predict.main([str(model[0]), str(file), "--force", "--output", str(tmp_path)]), "no name of a CSV")
    stops(lambda: predict.main([str(model[0]), str(file), "--output", "x.parquet"]), "x.parquet", "no name of a CSV")
    stops(lambda: predict.main([str(model[0]), str(file), "--force", "--output", str(file)]), "file of the reviews")
    stops(lambda: predict.main(["mistyped", str(file), "--force"]), "mistyped is no folder")
    (model[0] / "onnx").mkdir()
    stops(lambda: predict.main([str(model[0]), str(file), "--force"]), "an ONNX form")
    (model[0] / "onnx").rmdir()
    stops(lambda: predict.main([str(tiny / "distilbert"), str(file), "--force"]), "no model of 02, 04a or 04b")
    with pytest.raises(SystemExit, match="2"):
        predict.main([str(model[0]), str(file), "--force", "--unsure", "0.2", "0.8"])
    assert made.read_text() == "finished work" and (tmp_path / "04a").exists()


def test_the_folder_carries_length_temperature_and_a_card_that_the_hub_can_read(model):
    from huggingface_hub import ModelCard
    from transformers import AutoTokenizer

    folder, labels, logits = model
    card = ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data.datasets) == (["org/base"], ["org/reviews"])
    assert card.data.pipeline_tag == "text-classification" and "40 labelled reviews" in card.text
    temperature = storage.read_json(folder / "config.json")["calibration_temperature"]
    assert metrics.in_words(metrics.describe(labels, logits)) in card.text and f"{temperature:.2f}" in card.text
    ids = AutoTokenizer.from_pretrained(folder)(TEXTS[3], truncation=True)["input_ids"]
    assert len(ids) == 24  # as `pipeline(…, truncation=True)` reads it


def test_the_temperature_has_the_least_nll_of_all(model):
    _, labels, logits = model
    temperature = metrics.fit_temperature(labels, logits)
    grid = np.exp(np.linspace(-2.9, 2.9, 2001))
    best = grid[np.argmin([metrics.nll(labels, logits / t) for t in grid])]
    assert temperature == pytest.approx(best, rel=0.01) and temperature > 1.2  # these logits are too sure
    assert 0.04 < metrics.fit_temperature(labels, np.stack([1.0 - labels, labels], axis=1)) < 0.06
