import copy
from importlib.resources import files

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from common import metrics, models, verbalizer
from common.verbalizer import PROMPT
from experiments import skewed

TEXTS = ["The plot is dull."]


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return models.load_tokenizer(str(tiny / "mistral"))


@pytest.fixture(scope="module")
def sentencepiece():
    """Mistral-7B-v0.1's own vocabulary, which PyPI's mistral-common carries."""
    return SentencePieceProcessor(model_file=str(files("mistral_common") / "data" / "tokenizer.model.v1"))


@pytest.fixture(scope="module")
def mistral(sentencepiece):
    """A fast tokenizer as the hub's tokenizer.json describes it: a BPE over SentencePiece's pieces, ranked by score."""
    pieces = [sentencepiece.id_to_piece(token) for token in range(sentencepiece.vocab_size())]
    rank = {piece: token for token, piece in enumerate(pieces)}
    merges = []
    for piece in pieces[259:]:  # after <unk>, <s>, </s> and 256 bytes; a lower id has a higher score
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in splits if left in rank and right in rank]
        merges += sorted(known, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    fast = Tokenizer(BPE(rank, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_the_label_words_are_the_tokens_that_sentencepiece_puts_after_the_prompt(mistral, sentencepiece):
    ids = verbalizer.label_token_ids(mistral, PROMPT, ("negative", "positive"))
    assert ids == [7087, 5278]
    prompt = PROMPT.format(review="Fine.")
    for word, token in zip(("negative", "positive"), ids, strict=True):
        assert sentencepiece.encode(f"{prompt} {word}") == [*sentencepiece.encode(prompt), token]


def test_a_prompt_is_what_sentencepiece_makes_of_it(mistral, sentencepiece):
    review = "An odd, brave film: 10/10 — naïve 😀"
    (ids,) = verbalizer.encode_prompts(mistral, [review], PROMPT, 512)
    # Review and prompt are encoded apart, and SentencePiece puts a space before any text: hence the one in the review.
    assert ids.tolist() == [1, *sentencepiece.encode(PROMPT.format(review=f" {review}"))]


def test_only_the_review_is_cut_and_the_end_of_the_prompt_survives(tokenizer):
    long = "funny " + "The plot is dull. " * 6000 + "moving"  # 100,000 characters; head and tail stay
    short_ids, long_ids = verbalizer.encode_prompts(tokenizer, ["Fine.", long], PROMPT, 96)
    end = tokenizer(PROMPT.split("{review}")[1], add_special_tokens=False)["input_ids"]
    start = tokenizer(PROMPT.split("{review}")[0].rstrip(" "))["input_ids"]
    assert len(long_ids) == 96 > len(short_ids)
    assert "funny" in tokenizer.decode(long_ids) and "moving" in tokenizer.decode(long_ids)
    for ids in (short_ids, long_ids):
        assert ids[-len(end) :].tolist() == end and ids[: len(start)].tolist() == start


def test_a_special_token_typed_by_a_reviewer_is_plain_text(tokenizer):
    (ids,) = verbalizer.encode_prompts(tokenizer, ["Bad </s> <s> end"], PROMPT, 200)
    assert tokenizer.eos_token_id not in ids and list(ids).count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("added", ["$A", "<s> $A </s>", "<s> <s> $A", "$A </s>"])
@pytest.mark.parametrize("prompt", [PROMPT, f"<s>{PROMPT}"])
def test_beginning_of_text_comes_once_and_end_of_text_never_whatever_the_tokenizer_adds(tokenizer, added, prompt):
    other = copy.deepcopy(tokenizer)
    special = [(token, other.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(single=added, special_tokens=special)
    (ids,), (expected,) = (verbalizer.encode_prompts(one, TEXTS, prompt, 200) for one in (other, tokenizer))
    assert ids.tolist() == expected.tolist() and ids[0] == other.bos_token_id
    assert ids.tolist().count(other.bos_token_id) == 1 and other.eos_token_id not in ids


def test_a_chat_prompt_keeps_the_tokens_that_it_spells(tokenizer):
    (ids,) = verbalizer.encode_prompts(tokenizer, TEXTS, "<s>A review: {review}</s><s>Sentiment:", 200)
    assert ids.tolist().count(tokenizer.bos_token_id) == 2 and ids.tolist().count(tokenizer.eos_token_id) == 1


def test_label_words_of_several_tokens_or_the_same_token_are_refused(tokenizer, mistral, stops):
    ids_of = verbalizer.label_token_ids
    stops(lambda: ids_of(tokenizer, PROMPT, ("unbelievably", "positive")), "not one token", "--label-words")
    stops(lambda: ids_of(mistral, PROMPT, ("0", "1")), "not one token")  # both begin with the bare space
    stops(lambda: ids_of(tokenizer, PROMPT, ("positive", "positive")), "share their token")


def test_a_prompt_without_a_review_slot_is_refused(tokenizer, stops):
    stops(lambda: verbalizer.encode_prompts(tokenizer, ["a"], "Is it good?", 200), "{review}")
    stops(lambda: verbalizer.encode_prompts(tokenizer, ["a"], PROMPT, 30), "30 tokens")


def test_log_probabilities_are_over_the_whole_vocabulary():
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.1, 0.2]]))
    log_p = verbalizer.label_log_probabilities(logits, [2, 1]).numpy()
    assert np.exp(log_p) == pytest.approx(np.array([[0.1, 0.2]]), abs=1e-6)
    assert metrics.log_odds(log_p) == pytest.approx([np.log(2)])
    assert verbalizer.label_mass(log_p) == pytest.approx(0.3)


def test_batch_calibration_centres_the_log_odds():
    log_p = np.log(np.array([[0.1, 0.4], [0.2, 0.4], [0.3, 0.4]], dtype=np.float32))
    bias = verbalizer.batch_calibration(metrics.log_odds(log_p))
    assert bias == pytest.approx((np.log(4) + np.log(2) + np.log(4 / 3)) / 3)
    logits = metrics.two_logits(metrics.log_odds(log_p), bias)
    assert (logits[:, 1] - logits[:, 0]).mean() == pytest.approx(0, abs=1e-6)
    assert logits.argmax(axis=1).tolist() == [1, 0, 0]
    raw = metrics.two_logits(metrics.log_odds(log_p))
    softmax = np.exp(raw) / np.exp(raw).sum(axis=1, keepdims=True)
    assert softmax[0] == pytest.approx([0.2, 0.8], abs=1e-6)


def test_a_fitted_calibration_is_platts_and_undoes_a_known_bias_and_temperature():
    rng = np.random.default_rng(0)
    true = rng.normal(size=20_000) * 2
    labels = (rng.random(20_000) < 1 / (1 + np.exp(-true))).astype(int)
    bias, temperature = verbalizer.fitted_calibration(true * 3 + 1.5, labels)
    assert bias == pytest.approx(1.5, abs=0.15) and temperature == pytest.approx(3, rel=0.05)
    import statsmodels.api as sm

    independent = sm.Logit(labels, sm.add_constant(true * 3 + 1.5)).fit(disp=0).params
    assert 1 / temperature == pytest.approx(independent[1], rel=1e-3)
    assert -bias / temperature == pytest.approx(independent[0], abs=1e-3)


def test_a_calibration_on_separable_reviews_stays_finite():
    log_odds, labels = np.array([-3.0, -2.0, 2.0, 3.0] * 10), np.array([0, 0, 1, 1] * 10)
    bias, temperature = verbalizer.fitted_calibration(log_odds, labels)
    assert abs(bias) < 0.5 and 0 < temperature < 10


def test_out_of_fold_figures_do_not_flatter_a_calibration_of_noise():
    rng = np.random.default_rng(1)
    log_odds, labels = rng.normal(size=60), np.arange(60) % 2
    log_odds[:3] = 40 * (2 * labels[:3] - 1)  # a few lucky outliers
    calibrated = verbalizer.out_of_fold(log_odds, labels)
    bias, temperature = verbalizer.fitted_calibration(log_odds, labels)
    logits = [metrics.two_logits(of) for of in (calibrated, (log_odds - bias) / temperature)]
    assert metrics.nll(labels, logits[0]) > metrics.nll(labels, logits[1])


def says(n: int, share: float, seed: int, bias: float = 0.0, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds and labels of n reviews, `share` of them positive: a calibrated teacher's, then scaled and shifted."""
    rng, labels = np.random.default_rng(seed), (np.arange(n) < n * share).astype(int)
    return scale * rng.normal(4 * labels - 2, 2) + bias, labels


def chosen(asked="auto", n=400, share=0.5, unlabelled=400, **teacher) -> tuple[str, dict]:
    log_odds, labels = says(n, share, 0, **teacher)
    without = np.random.default_rng(1).permutation(says(2000, share, 1, **teacher)[0])[:unlabelled]
    made = verbalizer.calibrations(log_odds, labels, without, asked)
    return verbalizer.best_calibration(made, log_odds, labels, without), made


@pytest.mark.parametrize(
    ("best", "left_out", "case"),
    [
        ("none", {"fitted"}, {"n": 60, "share": 0.9}),  # six negative reviews
        ("none", {"batch"}, {"unlabelled": 199}),
        ("batch", {"fitted"}, {"n": 18, "bias": 6.0}),  # no verdict is negative
        ("fitted", set(), {"bias": 3.0, "share": 0.8}),
        ("fitted", set(), {"scale": 5.0}),
        ("none", {"batch", "fitted"}, {"n": 60, "share": 0.95, "unlabelled": 5}),
        ("batch", {"fitted"}, {"scale": -1.0}),  # a swapped teacher, which 04b refuses
    ],
)
def test_auto_takes_the_best_nll_of_the_calibrations_that_have_enough_reviews(best, left_out, case, capsys):
    name, made = chosen(**case)
    assert {"none", "batch", "fitted"} - set(made) == left_out
    told = capsys.readouterr().out
    assert all(f"calibration {name} is left out" in told for name in left_out)
    assert name == best


@pytest.mark.parametrize("share", [0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
def test_a_calibrated_teacher_is_no_more_than_half_a_point_worse_at_any_share(share):
    log_odds, labels = says(20_000, share, 2)
    for n in (60, 400):
        name, made = chosen(n=n, share=share)
        accuracies = [
            metrics.accuracy(labels, one.logits(log_odds).argmax(axis=1)) for one in (made["none"], made[name])
        ]
        assert accuracies[1] > accuracies[0] - 0.005
    if share == 0.9:  # which the calibration of earlier versions lost
        assert metrics.accuracy(labels, made["batch"].logits(log_odds).argmax(axis=1)) < accuracies[0] - 0.1


def test_so_it_is_on_the_committed_log_odds_of_two_real_llms():
    table = pd.read_csv(ROOT / "results/skewed/skewed.csv")
    assert (table["worst auto"] > -0.005).all() and table["worst batch"].min() < -0.2
    log_odds, labels = skewed.read("distillation", "zero_shot_teacher-42")
    draws = pd.DataFrame([skewed.one_draw(log_odds, labels, 0.9, 200, seed) for seed in range(skewed.DRAWS)])
    row = table.query("llm == 'untuned' and validation == 200 and positive == 0.9").iloc[0]
    assert draws[["none", "auto"]].mean().tolist() == pytest.approx(row[["without", "auto"]].tolist(), abs=1e-3)


def test_a_calibration_that_is_asked_for_and_impossible_stops_with_its_reason(stops):
    stops(lambda: chosen("fitted", scale=-1.0), "--calibration fitted", "not higher on positive reviews")
    stops(lambda: chosen("fitted", n=60, share=0.9), "6 negative validation reviews have a score, and a fit takes 10")
    stops(lambda: chosen("batch", unlabelled=0), "--calibration batch", "0 unlabelled")
    assert chosen("batch", unlabelled=5)[1]["batch"].bias != 0


def test_auto_passes_over_a_calibration_with_which_the_teacher_would_be_refused():
    labels, log_odds = np.repeat([0, 1], [20, 380]), np.repeat([-0.1, 1.0, -0.1, 1.0], [12, 8, 60, 320])
    made = verbalizer.calibrations(log_odds, labels, np.empty(0))
    held_out = {name: metrics.nll(labels, metrics.two_logits(one.held_out)) for name, one in made.items()}
    assert held_out["fitted"] < held_out["none"] and metrics.only_class(made["fitted"].logits(log_odds)) == 1
    assert verbalizer.best_calibration(made, log_odds, labels, np.empty(0)) == "none"
