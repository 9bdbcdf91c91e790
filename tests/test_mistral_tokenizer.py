"""The prompt and the label words under Mistral-7B-v0.1's own vocabulary, which PyPI's mistral-common carries."""

from importlib.resources import files

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from common import verbalizer
from common.verbalizer import PROMPT


@pytest.fixture(scope="module")
def sentencepiece():
    return SentencePieceProcessor(model_file=str(files("mistral_common") / "data" / "tokenizer.model.v1"))


@pytest.fixture(scope="module")
def tokenizer(sentencepiece):
    """A fast tokenizer as the hub's tokenizer.json describes it: a BPE over SentencePiece's pieces, ranked by score."""
    pieces = [sentencepiece.id_to_piece(token) for token in range(sentencepiece.vocab_size())]
    rank = {piece: token for token, piece in enumerate(pieces)}
    merges = []
    for piece in pieces[259:]:  # after <unk>, <s>, </s> and 256 bytes; a lower id has a higher score
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in splits if left in rank and right in rank]
        merges += sorted(known, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    fast = Tokenizer(models.BPE(rank, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_the_label_words_are_the_tokens_that_sentencepiece_puts_after_the_prompt(tokenizer, sentencepiece):
    ids = verbalizer.label_token_ids(tokenizer, PROMPT, ("negative", "positive"))
    assert ids == [7087, 5278]
    prompt = PROMPT.format(review="Fine.")
    for word, token in zip(("negative", "positive"), ids, strict=True):
        assert sentencepiece.encode(f"{prompt} {word}") == [*sentencepiece.encode(prompt), token]


def test_a_prompt_is_what_sentencepiece_makes_of_it(tokenizer, sentencepiece):
    review = "An odd, brave film: 10/10 — naïve 😀"
    (ids,) = verbalizer.encode_prompts(tokenizer, [review], PROMPT, 512)
    # Review and prompt are encoded apart, and SentencePiece puts a space before any text: hence the one in the review.
    assert ids.tolist() == [1, *sentencepiece.encode(PROMPT.format(review=f" {review}"))]


def test_digits_as_label_words_share_their_first_token_and_are_refused(tokenizer, stops):
    stops(lambda: verbalizer.label_token_ids(tokenizer, PROMPT, ("0", "1")), "not one token", "--label-words")
