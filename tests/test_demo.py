import pytest
from conftest import TINY_SIZES

from common import encoding, files
from demo import make as demo


def test_reviews_of_both_labels_use_the_same_words():
    # What a bag of words cannot read: each adjective stands in reviews of both labels.
    corpus = demo.write_reviews({"train": 2000, "test": 2, "unsupervised": 2}, 1)["train"]
    assert corpus["text"].is_unique
    for word in (word for words in demo.ADJECTIVES for word in words):
        share = corpus.loc[corpus["text"].str.contains(word), "label"].mean()
        assert 0.15 < share < 0.85, word


def test_the_demo_is_what_load_reviews_reads_and_is_made_once(tiny, capsys):
    before = {path: path.stat().st_mtime_ns for path in tiny.rglob("*")}
    demo.main(["--output-dir", str(tiny)])
    assert {path: path.stat().st_mtime_ns for path in tiny.rglob("*")} == before
    assert "exists already" in capsys.readouterr().out
    assert set(files._find(tiny / "reviews")) == {"train", "test", "transfer"}


def test_the_same_seed_gives_the_same_weights_and_vocabularies(tiny, tmp_path):
    demo.make(tmp_path / "again", sizes=TINY_SIZES, effort=0.01)
    files = [path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()]
    assert {"model.safetensors", "tokenizer.json", "train.parquet"} <= {file.name for file in files}
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (tiny / file).read_bytes(), file


@pytest.mark.parametrize("role", ["roberta", "mistral"])
def test_no_byte_of_any_alphabet_is_lost(tiny, role):
    from common import models

    tokenizer, text = models.load_tokenizer(str(tiny / role)), "Привет 世界 😀 naïve"
    (ids,) = encoding.token_ids(tokenizer, [text])
    assert tokenizer.decode(ids).strip() == text
