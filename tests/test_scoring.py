import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CPU

from common import device, encoding, llms, memory, metrics, models, scoring, verbalizer
from common.verbalizer import LABEL_WORDS, PROMPT

TEXTS = [
    "Dull.",
    "",
    "The plot is not funny. " * 12,
    "😀 moving, Привет, 世界 \x00\x07",
    "The acting is good, but the story is dull.",
    "ok " * 90,
]


def test_batches_hold_every_review_once_under_the_token_budget():
    lengths = np.random.default_rng(0).integers(3, 60, 200)
    batches = scoring.batches_by_length(lengths, 128)
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    assert all(len(rows) * lengths[rows].max() <= 128 for rows in batches)
    assert len(scoring.batches_by_length(np.array([500, 500]), 128)) == 2


def test_pooling_ignores_padding():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]])
    pooled = models.pool(hidden, torch.tensor([[1, 1, 0]]))
    assert pooled.tolist() == [[[1.0, 2.0], [2.0, 3.0]]]


def test_a_batch_of_prompts_equals_each_unpadded_prompt_alone_in_order(tiny):
    tokenizer, model = models.load_tokenizer(str(tiny / "mistral")), llms.load_llm(str(tiny / "mistral"), CPU)
    ids = verbalizer.encode_prompts(tokenizer, TEXTS, PROMPT, 128)
    labels, contiguous, masks = verbalizer.label_token_ids(tokenizer, PROMPT, LABEL_WORDS), [], []
    head, attention = model.get_output_embeddings(), model.model.layers[0].self_attn
    spies = [
        head.register_forward_pre_hook(lambda _, given: contiguous.append(given[0].is_contiguous())),
        attention.register_forward_pre_hook(lambda *given: masks.append(given[2]["attention_mask"]), with_kwargs=True),
    ]
    together = scoring.score_llm(model, ids, labels, tokenizer.pad_token_id, CPU, 512)
    for spy in spies:
        spy.remove()
    assert contiguous and all(contiguous)  # of a slice PyTorch copies the head's frozen weights once a prompt
    assert set(masks) == {None}  # a causal LM reads the padding after the review, and the fast kernels run
    for row, one in enumerate(ids):
        with torch.inference_mode():  # the plain way: no mask, no positions, all logits
            logits = model(input_ids=torch.tensor(one[None].astype(np.int64))).logits[0, -1]
        alone = logits.float().log_softmax(-1)[labels].numpy()
        assert together[row] == pytest.approx(alone, abs=1e-3)


def test_in_bf16_log_odds_are_not_rounded_to_the_steps_of_large_logits(tiny):
    tokenizer, model = models.load_tokenizer(str(tiny / "mistral")), llms.load_llm(str(tiny / "mistral"), CPU)
    bf16, head = device.Hardware("cpu", "bf16", "test"), model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach() * 40)
    ids = verbalizer.encode_prompts(tokenizer, [f"It is {n} of 10." for n in range(40)], PROMPT, 128)
    labels = verbalizer.label_token_ids(tokenizer, PROMPT, LABEL_WORDS)
    states = []
    spy = head.register_forward_hook(lambda _, given, logits: states.append(given[0][:, -1]))
    made = metrics.log_odds(scoring.score_llm(model, ids, labels, tokenizer.pad_token_id, bf16, 4000))
    spy.remove()
    with torch.inference_mode():
        both = head.weight[labels].double()
        by_length = states[0].double() @ (both[1] - both[0])
        rounded = (states[0].bfloat16() @ both.bfloat16().T).float()
    rounded = (rounded[:, 1] - rounded[:, 0]).numpy()
    exact = by_length.numpy()[np.argsort(np.argsort([-len(one) for one in ids], kind="stable"), kind="stable")]
    assert np.abs(made - exact).max() < 0.1 * np.abs(rounded - by_length.numpy()).max()
    assert not head._forward_hooks


@pytest.mark.parametrize("role", ["roberta", "distilbert"])
def test_a_model_prepared_for_scoring_casts_its_linear_layers_once_and_scores_the_same(tiny, role):
    bf16 = device.Hardware("cpu", "bf16", "test")
    tokenizer, model = models.load_tokenizer(str(tiny / role)), models.load_classifier(str(tiny / role)).eval()
    ids = encoding.encode(tokenizer, TEXTS, 64)
    cast_each_time = scoring.score_encoder(model, ids, tokenizer.pad_token_id, bf16, 256, [1, 2])
    prepared = models.prepare_for_scoring(model, bf16)
    once = scoring.score_encoder(prepared, ids, tokenizer.pad_token_id, bf16, 256, [1, 2])
    for name in ("scores", "features"):
        np.testing.assert_array_equal(once[name], cast_each_time[name])
    weights = {name: weight.dtype for name, weight in prepared.named_parameters()}
    assert weights[next(name for name in weights if "word_embeddings" in name)] is torch.float32
    linear = [module for module in prepared.modules() if isinstance(module, torch.nn.Linear)]
    assert linear and all(module.weight.dtype is torch.bfloat16 for module in linear)
    assert not prepared.training


def test_a_score_that_is_not_finite_is_never_passed_on(tiny, stops):
    tokenizer, model = models.load_tokenizer(str(tiny / "distilbert")), models.load_classifier(str(tiny / "distilbert"))
    torch.nn.init.constant_(model.classifier.bias, float("nan"))
    ids = encoding.encode(tokenizer, TEXTS, 64)
    stops(lambda: scoring.score_encoder(model.eval(), ids, 0, CPU, 256), "NaN", "--precision fp32")


def reviews_of(n: int) -> pd.DataFrame:
    return pd.DataFrame(
        {"example_id": [f"train/{row:05d}" for row in range(n)], "text": [str(row) for row in range(n)]}
    )


def score(texts: list[str]) -> dict[str, np.ndarray]:
    numbers = np.array([float(text) for text in texts], np.float32)
    return {"scores": np.stack([numbers, -numbers], 1), "features": numbers[:, None, None].astype(np.float16)}


def in_chunks(folder, n: int, how=score) -> None:
    scoring.in_chunks(folder, "train", reviews_of(n), scoring.LOGITS, how, chunk=10, arrays=("features",))


def test_chunks_join_in_order_into_a_table_and_an_array_and_nothing_that_is_there_is_scored_again(tmp_path):
    in_chunks(tmp_path, 25)
    table = pd.read_parquet(tmp_path / "train.parquet")
    assert table["example_id"].tolist() == reviews_of(25)["example_id"].tolist()
    assert table["logit_negative"].tolist() == list(range(25))
    assert np.load(tmp_path / "train_features.npy", mmap_mode="r")[:, 0, 0].tolist() == list(range(25))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.parquet", "train_features.npy"]
    in_chunks(tmp_path, 25, how=None)
    (tmp_path / "train_features.npy").unlink()  # which --force does not take over if it is damaged
    in_chunks(tmp_path, 25)
    assert (tmp_path / "train_features.npy").exists()


def test_scores_are_joined_by_example_id_and_a_gap_or_a_repeat_is_refused(tmp_path, stops):
    table = pd.DataFrame({"example_id": ["train/3", "train/1", "train/2"], "logit_negative": 0.0})
    table = table.assign(logit_positive=[3.0, 1.0, 2.0])
    table.to_parquet(tmp_path / "train.parquet")

    def read(*ids: str):
        return scoring.read_scores(tmp_path, "train", pd.DataFrame({"example_id": ids}), "02.py")

    scores, rows = read("train/1", "train/3")
    assert scores.tolist() == [[0, 1], [0, 3]] and rows.tolist() == [1, 0]
    stops(lambda: read("train/9"), "1 of 1", "run 02.py")
    table.assign(example_id="train/1").to_parquet(tmp_path / "train.parquet")
    stops(lambda: read("train/1"), "twice", "run 02.py --force")


def assert_same_files(folder, other) -> None:
    for name in ("train.parquet", "train_features.npy"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("damage", [None, b"", b"garbage"])
def test_an_interrupted_scoring_continues_with_its_whole_undamaged_chunks_to_the_same_files(tmp_path, capsys, damage):
    calls = []

    def interrupted(texts):
        calls.append(texts[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(texts)

    in_chunks(tmp_path / "whole", 40)
    with pytest.raises(KeyboardInterrupt):
        in_chunks(tmp_path / "stopped", 40, interrupted)
    if damage is not None:
        (tmp_path / "stopped" / "train_chunks" / "0000000.npz").write_bytes(damage)
    in_chunks(tmp_path / "stopped", 40, interrupted)
    assert calls == ["0", "10", "20", *([] if damage is None else ["0"]), "20", "30"]
    assert ("is damaged" in capsys.readouterr().out) == (damage is not None)
    assert_same_files(tmp_path / "whole", tmp_path / "stopped")


def test_a_scoring_that_is_out_of_time_stops_after_a_chunk_and_continues_to_the_same_files(tmp_path, monkeypatch):
    in_chunks(tmp_path / "whole", 45)
    monkeypatch.setattr(device, "out_of_time", lambda: True)
    for _ in range(4):
        with pytest.raises(SystemExit, match="3"):
            in_chunks(tmp_path / "stopped", 45)
    in_chunks(tmp_path / "stopped", 45)  # makes the last chunk, and the split is finished
    assert_same_files(tmp_path / "whole", tmp_path / "stopped")


def test_a_batch_that_does_not_fit_names_the_flag_that_helps(tmp_path, stops):
    def fails(error):
        def score(texts):
            raise error

        return lambda: in_chunks(tmp_path, 3, score)

    stops(fails(torch.OutOfMemoryError("CUDA out of memory")), "does not fit", "--batch-tokens")
    with pytest.raises(RuntimeError, match="another fault"):
        fails(RuntimeError("another fault"))()


def test_soft_labels_of_another_origin_are_deleted_and_those_of_the_same_stay(tmp_path, stops):
    folder = tmp_path / "soft_labels"
    for split in ("train", "transfer"):
        scoring.delete_unless_made_from(folder, split, {"weights": "a", "texts": 1})
        (folder / f"{split}.parquet").write_bytes(b"")
        (folder / f"{split}_chunks").mkdir()
    scoring.delete_unless_made_from(folder, "train", {"weights": "a", "texts": 1})
    scoring.delete_unless_made_from(folder, "transfer", {"weights": "a", "texts": 2})  # another number of reviews
    assert (folder / "train.parquet").exists() and (folder / "train_chunks").exists()
    assert not list(folder.glob("transfer*"))
    scoring.refuse_stale(folder, "train", {"weights": "a"}, "02_finetune_roberta.py")
    stops(lambda: scoring.refuse_stale(folder, "train", {"weights": "b"}, "02_finetune_roberta.py"), "other weights")


def test_host_memory_does_not_grow_with_the_number_of_reviews(tmp_path):
    def score(texts):
        features = np.ones((len(texts), 6, 2, 256), np.float16)
        return {"scores": np.zeros((len(texts), 2), np.float32), "features": features}

    peaks = []
    for n in (2_000, 20_000):
        reviews = pd.DataFrame({"example_id": np.arange(n).astype(str), "text": "a film"})
        if (resident := memory.restart_host_peak()) is None:
            pytest.skip("this system cannot restart a process's peak memory")
        scoring.in_chunks(tmp_path / str(n), "transfer", reviews, scoring.LOGITS, score, arrays=("features",))
        peaks.append(memory.host_peak_mb() - resident)
    written = (tmp_path / "20000" / "transfer_features.npy").stat().st_size / 1e6
    assert written > 120 and peaks[1] - peaks[0] < 30, peaks
