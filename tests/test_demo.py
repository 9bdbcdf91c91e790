import random

import pandas as pd
import pytest

from common import data
from demo import make as demo

SMALL = {"train": 60, "test": 40, "unsupervised": 50}


def test_the_corpus_is_the_same_for_the_same_seed_and_another_for_another():
    first, again, other = (demo.write_reviews(SMALL, seed) for seed in (1, 1, 2))
    for split in SMALL:
        pd.testing.assert_frame_equal(first[split], again[split])
    assert not set(first["train"]["text"]) & set(other["train"]["text"])


def test_the_corpus_is_sorted_by_label_like_imdb_and_no_text_occurs_twice():
    corpus = demo.write_reviews(SMALL, 1)
    assert corpus["train"]["label"].tolist() == [0] * 30 + [1] * 30
    assert set(corpus["unsupervised"]["label"]) == {-1}
    texts = pd.concat(corpus.values())["text"]
    assert texts.is_unique and len(texts) == sum(SMALL.values())


def test_the_grammar_decides_the_label():
    rng = random.Random(0)
    for label in (0, 1):
        for _ in range(50):
            adjective = demo._clause(rng, label, ["plot"], negation=0.0).split()[-1]
            assert adjective in demo.ADJECTIVES[label]
            negated = demo._clause(rng, label, ["plot"], negation=1.0).split()[-1]
            assert negated in demo.ADJECTIVES[1 - label]


def test_reviews_of_both_labels_use_the_same_words():
    # What a bag of words cannot read: each adjective stands in reviews of both labels.
    corpus = demo.write_reviews({"train": 2000, "test": 2, "unsupervised": 2}, 1)["train"]
    for word in (word for words in demo.ADJECTIVES for word in words):
        share = corpus.loc[corpus["text"].str.contains(word), "label"].mean()
        assert 0.15 < share < 0.85, word


def test_the_demo_is_what_load_reviews_reads_and_is_made_once(tiny, capsys):
    before = {path: path.stat().st_mtime_ns for path in tiny.rglob("*")}
    demo.main(["--output-dir", str(tiny)])
    assert {path: path.stat().st_mtime_ns for path in tiny.rglob("*")} == before
    assert "exists already" in capsys.readouterr().out
    assert set(data._read_folder(tiny / "reviews", ["train", "test", "transfer"])) == {"train", "test", "transfer"}


@pytest.mark.parametrize(
    ("role", "architecture"),
    [("roberta", "RobertaForMaskedLM"), ("mistral", "MistralForCausalLM"), ("distilbert", "DistilBertForMaskedLM")],
)
def test_the_checkpoints_are_of_the_true_architectures(tiny, role, architecture):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny / role)
    assert config.architectures == [architecture]
    if role == "mistral":
        assert config.num_key_value_heads < config.num_attention_heads and config.sliding_window is None


def test_the_same_seed_gives_the_same_weights_and_vocabularies(tmp_path):
    for name in ("first", "again"):
        demo.make(tmp_path / name, sizes=SMALL, effort=0.01)
    files = [path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file()]
    assert {"model.safetensors", "tokenizer.json", "train.parquet"} <= {file.name for file in files}
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


@pytest.mark.parametrize("role", ["roberta", "mistral"])
def test_no_byte_of_any_alphabet_is_lost(tiny, role):
    from common import models

    tokenizer, text = models.load_tokenizer(str(tiny / role)), "Привет 世界 😀 naïve"
    (ids,) = data.token_ids(tokenizer, [text])
    assert tokenizer.decode(ids).strip() == text
