"""Checkpoints of many architectures and habits, tiny and random: read rightly, or refused in one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from conftest import CPU
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaForCausalLM,
)

from common import checks, encoding, llms, models, scoring, verbalizer

TEXTS = ["The plot is dull.", "The plot is not dull at all. " * 3, "A moving film", "ok"]
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
ROBERTA = {"max_position_embeddings": 66}  # positions begin after the padding id
BART = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
MORE = {
    "albert": {"embedding_size": 16}, "electra": {"embedding_size": 16}, "deberta-v2": {"pooler_hidden_size": 32},
    "roberta": ROBERTA, "mpnet": ROBERTA, "data2vec-text": ROBERTA,
    "longformer": ROBERTA | {"attention_window": [8, 8]}, "gpt2": {"n_positions": 64},
    "modernbert": {"layer_types": ["full_attention", "sliding_attention"]},
    "gemma2": {"layer_types": ["full_attention", "sliding_attention"]},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "bart": BART,
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}, "t5": {"d_ff": 64, "d_kv": 8},
}  # fmt: skip
DECODERS = ("gpt2", "llama", "gemma2", "opt", "bloom", "falcon", "mixtral", "xlnet")


def role_of(kind: str) -> str:
    if kind in DECODERS:
        return "mistral"
    return "roberta" if kind in ("roberta", "mpnet", "data2vec-text", "longformer", "bart", "t5") else "distilbert"


@pytest.fixture
def checkpoint(tiny, tmp_path) -> Callable[..., str]:
    """Write a random checkpoint of a kind of model, with a tokenizer of the demo; returns its folder."""

    def make(kind: str, auto: type = AutoModel, **settings) -> str:
        source, plain = tiny / role_of(kind), AutoConfig.for_model(kind)
        tokenizer = models.load_tokenizer(str(source))
        sizes = {key: value for key, value in SMALL.items() if key in plain or key in plain.attribute_map}
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
        config = AutoConfig.for_model(kind, **(sizes | ids | {"vocab_size": len(tokenizer)} | MORE.get(kind, {})))
        torch.manual_seed(0)
        auto.from_config(config).save_pretrained(tmp_path / kind)
        for file in source.glob("token*"):
            shutil.copy(file, tmp_path / kind)
        change(tmp_path / kind, **settings)
        return str(tmp_path / kind)

    return make


def change(folder: Path | str, file: str = "config.json", **settings) -> None:
    """Set keys of a JSON file."""
    path = Path(folder, file)
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def check(name: str, max_length: int = 64, texts=TEXTS, hardware=CPU):
    return checks.check_encoder(name, max_length, texts, hardware)


@pytest.mark.parametrize(
    "kind",
    ["bert", "albert", "electra", "deberta-v2", "distilbert", "roberta", "mpnet", "data2vec-text", "longformer",
     "modernbert", *DECODERS[:4]],
)  # fmt: skip
def test_an_encoder_of_any_architecture_scores_a_padded_batch_as_each_review_alone(checkpoint, stops, kind):
    name = checkpoint(kind)
    tokenizer = check(name)
    stops(lambda: check(name, 65), "--max-length 65", "64 positions")
    torch.manual_seed(0)
    model = models.load_classifier(name, tokenizer).eval()
    ids = encoding.encode(tokenizer, TEXTS, 64)
    together, *alone = (
        scoring.score_encoder(model, part, tokenizer.pad_token_id, CPU, 64, [0, 2])
        for part in (ids, *([one] for one in ids))
    )
    for name, tolerance in (("scores", 1e-4), ("features", 2e-3)):  # features are stored in float16
        np.testing.assert_allclose(together[name], np.concatenate([one[name] for one in alone]), atol=tolerance)
    assert together["features"].shape == (len(TEXTS), 2, 2, 32)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "opt", "bloom"])
def test_an_llm_of_any_architecture_runs_in_4_bits(checkpoint, kind):
    name = checkpoint(kind, AutoModelForCausalLM)
    tokenizer = checks.check_llm(name, 64, TEXTS)
    model = llms.load_llm(name, CPU)
    found = llms.quantisation(model)
    assert (found["type"], found["compute"]) == ("nf4", "float32") and found["share"] > 0.5
    ids = verbalizer.encode_prompts(tokenizer, TEXTS, "Is it good? {review} Sentiment:", 60)
    together = scoring.score_llm(model, ids, [5, 6], tokenizer.pad_token_id, CPU, 512)
    alone = [scoring.score_llm(model, [one], [5, 6], tokenizer.pad_token_id, CPU, 512) for one in ids]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-3)


@pytest.mark.parametrize(
    ("wanted", "kind", "reason"),
    [(AutoModel, "xlnet", "padding"), (AutoModel, "fnet", "padding"), (AutoModel, "mamba", "SequenceClassification"),
     (AutoModel, "bart", "encoder-decoder"), (AutoModelForCausalLM, "falcon", "0% of the blocks' weights"),
     (AutoModelForCausalLM, "mixtral", "of the blocks' weights"), (AutoModelForCausalLM, "t5", "encoder-decoder"),
     (AutoModelForCausalLM, "bert", "masked language model")],
)  # fmt: skip
def test_an_architecture_that_does_not_fit_is_refused_before_any_work(checkpoint, stops, wanted, kind, reason):
    name = checkpoint(kind, wanted if kind in DECODERS else AutoModel)
    stops(lambda: check(name, 32) if wanted is AutoModel else checks.check_llm(name, 32, TEXTS), reason, kind)


def test_a_model_whose_scores_depend_on_later_tokens_is_no_llm(tiny, stops, monkeypatch):
    monkeypatch.setattr(llms, "last_logits", lambda model, rows, mask: rows[:, -1:] * torch.rand(50))
    stops(lambda: llms.load_llm(str(tiny / "mistral"), CPU), "no causal LM")


def test_a_base_saved_in_4_bits_keeps_its_type_and_computes_in_the_hardwares_dtype(checkpoint, tmp_path):
    name = checkpoint("llama", AutoModelForCausalLM)
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.bfloat16}
    saved = AutoModelForCausalLM.from_pretrained(
        name, quantization_config=BitsAndBytesConfig(**how), device_map={"": "cpu"}
    )
    models.load_tokenizer(name).save_pretrained(tmp_path / "saved")
    saved.save_pretrained(tmp_path / "saved")
    checks.check_llm(str(tmp_path / "saved"), 64, TEXTS)
    found = llms.quantisation(llms.load_llm(str(tmp_path / "saved"), CPU))
    assert (found["type"], found["compute"]) == ("fp4", "float32")


HABITS = {
    "three labels": {
        "problem_type": "multi_label_classification", "id2label": {0: "a", 1: "b", 2: "c"},
        "output_hidden_states": True, "output_attentions": True,
    },
    "a regression": {
        "problem_type": "regression", "id2label": {0: "stars"}, "return_dict": False, "gradient_checkpointing": True,
        "dtype": "bfloat16",
    },
}  # fmt: skip


@pytest.mark.parametrize("habit", HABITS)
def test_a_checkpoint_gives_its_weights_and_not_its_habits(checkpoint, tmp_path, capsys, habit):
    settings, name = HABITS[habit], checkpoint("bert")
    options = {"num_labels": len(settings["id2label"]), "problem_type": settings["problem_type"]}
    AutoModelForSequenceClassification.from_pretrained(name, **options).save_pretrained(name)
    change(name, **settings)
    tokenizer = check(name)
    assert "a new head for two" in capsys.readouterr().out
    model = models.load_classifier(name, tokenizer)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    (ids,) = encoding.encode(tokenizer, TEXTS[:1], 64)
    made = model.eval()(input_ids=torch.tensor([ids.tolist()]), labels=torch.tensor([1]))
    assert made.logits.shape == (1, 2) and set(made) == {"loss", "logits"}
    assert made.loss.item() == pytest.approx(-made.logits.log_softmax(dim=-1)[0, 1].item())  # of one class, no others


def test_ids_beyond_the_embeddings_get_new_rows_in_an_encoder_and_are_refused_in_an_llm(checkpoint, stops, capsys):
    name, llm = checkpoint("bert"), checkpoint("llama", AutoModelForCausalLM)
    for folder in (name, llm):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(["imdb"])
        tokenizer.save_pretrained(folder)
    model = models.load_classifier(name, check(name))
    assert model.get_input_embeddings().num_embeddings == len(AutoTokenizer.from_pretrained(name))
    assert "start at random" in capsys.readouterr().out
    stops(lambda: checks.check_llm(llm, 64, TEXTS), "'imdb' is beyond")


@pytest.mark.parametrize("pad", [-1, 99_999, None])
def test_a_pad_id_beyond_the_embeddings_is_replaced(checkpoint, pad):
    name = checkpoint("llama", AutoModelForCausalLM, pad_token_id=pad)
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(name)
    assert checks.check_llm(name, 64, TEXTS).pad_token == "</s>"
    assert models.load_classifier(name, check(name)).config.pad_token_id == tokenizer.eos_token_id
    roberta = checkpoint("roberta", pad_token_id=pad)  # counts positions from it
    assert models.load_classifier(roberta, check(roberta)).config.pad_token_id == 1


def test_a_cased_vocabulary_is_not_lower_cased_by_its_tokenizers_class(checkpoint, tmp_path, capsys):
    name = checkpoint("bert")
    state = json.loads(Path(name, "tokenizer.json").read_text())
    state["normalizer"]["lowercase"] = False
    state["model"]["vocab"]["FILM"] = len(state["model"]["vocab"])
    Path(name, "tokenizer.json").write_text(json.dumps(state))
    change(name, "tokenizer_config.json", tokenizer_class="BertTokenizer", do_lower_case=True)
    tokenizer = models.load_tokenizer(name)
    assert tokenizer.tokenize("FILM") == ["FILM"] and "BertTokenizer reads text otherwise" in capsys.readouterr().out
    shutil.copy(Path(name, "config.json"), tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(str(tmp_path)).tokenize("FILM") == ["FILM"]  # as `pipeline` reads it


def test_a_vocabulary_that_does_not_know_the_reviews_is_named_before_training(checkpoint, stops, capsys):
    name = checkpoint("bert")
    stops(lambda: check(name, texts=["映画はとても面白かった"]), "does not know", "language")
    check(name, texts=["the film is dull 映画"])
    assert "warning" in capsys.readouterr().out


def test_a_head_whose_labels_are_the_other_way_round_is_turned(checkpoint, capsys):
    name = checkpoint("bert", AutoModelForSequenceClassification)
    before = models.load_classifier(name).classifier
    change(name, id2label={0: "POSITIVE", 1: "NEGATIVE"})
    after = models.load_classifier(name).classifier
    assert torch.equal(after.weight, before.weight.flip(0)) and torch.equal(after.bias, before.bias.flip(0))
    assert "its head is turned" in capsys.readouterr().out


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("words", "damage"),
    [
        ("lacks 16 weights", lambda folder: change(folder, num_hidden_layers=3)),
        ("quantised", lambda folder: change(folder, quantization_config={"quant_method": "bitsandbytes"})),
        ("multiple of the number", lambda folder: change(folder, hidden_size=33)),
        ("cannot be loaded", lambda folder: change(folder, model_type="unheard of")),
        ("cannot be loaded", lambda folder: (folder / "tokenizer.json").write_text('{"model": {}}')),
        ("no tokenizer files", lambda folder: [file.unlink() for file in folder.glob("token*")]),
        ("cannot be loaded", lambda folder: shorten(folder / "model.safetensors")),
    ],
)
def test_a_damaged_checkpoint_is_one_sentence(checkpoint, stops, words, damage):
    name = checkpoint("bert")
    damage(Path(name))
    stops(lambda: check(name), words, name)


def test_an_llms_weights_are_compared_with_its_config_by_their_headers(checkpoint, stops):
    name = checkpoint("llama", AutoModelForCausalLM)
    tensors = safetensors.numpy.load_file(Path(name, "model.safetensors"))
    more = tensors | {"value_head.weight": np.ones((1, 32), np.float32)}
    safetensors.numpy.save_file(more, Path(name, "model.safetensors"), {"format": "pt"})
    checks.check_llm(name, 64, TEXTS)
    change(name, intermediate_size=80)
    stops(lambda: checks.check_llm(name, 64, TEXTS), "contradicts its config.json")
    shorten(Path(name, "model.safetensors"))
    stops(lambda: checks.check_llm(name, 64, TEXTS), "cannot be loaded")


def test_infinite_logits_are_named_and_a_bug_of_our_own_keeps_its_traceback(checkpoint, stops, monkeypatch):
    name = checkpoint("llama", AutoModelForCausalLM)
    tensors = safetensors.numpy.load_file(Path(name, "model.safetensors"))
    tensors["model.norm.weight"][:] = np.inf
    safetensors.numpy.save_file(tensors, Path(name, "model.safetensors"), {"format": "pt"})
    stops(lambda: llms.load_llm(name, CPU), "infinite logits in fp32")
    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda self: None)
    with pytest.raises(AttributeError):
        llms.load_llm(name, CPU)
