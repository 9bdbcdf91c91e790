"""The offline demo: a made-up review corpus, and tiny base checkpoints of the three architectures.

The reviews come from a small grammar of this project, not from any corpus. It has what a bag of words cannot read: a negation
some words before its adjective ("I did not find the script very funny"), a contrast in which one half counts ("although the
cast is warm, the story is dull"), and a closing verdict that overrules what came before. The grammar decides the label.
The checkpoints are pre-trained for seconds on text of the same grammar, so that fine-tuning has something to adapt.
"""

import json
import os
import random
import shutil
import tempfile
import time
from pathlib import Path

PROMPT = "[INST] Is the sentiment of this movie review positive or negative?\n\n{review} [/INST] Sentiment:"  # that of verbalizer.py
LABEL_WORDS = (" negative", " positive")
MAX_LENGTH = 512

ASPECTS = (
    "acting story dialogue music pacing script ending humour editing direction romance mystery plot cast soundtrack "
    "photography premise finale opening structure"
).split()
ADJECTIVES = (  # by polarity: negative, positive
    "boring dull clumsy tedious predictable flat silly weak lazy bland messy forgettable shallow annoying "
    "lifeless hollow".split(),
    "funny moving clever gripping charming fresh beautiful memorable touching warm witty elegant original convincing "
    "lively subtle enjoyable".split(),
)
# The same adverbs stand in plain and in negated clauses, so "very funny" as a pair of words says nothing about "not very funny".
ADVERBS = ["really ", "very ", "particularly ", "truly ", "quite ", "terribly ", "all that ", "", "", "", ""]
PLAIN = (
    "the {x} is {a}|the {x} seemed {a}|the {x} felt {a}|I found the {x} {a}|I would call the {x} {a}|"
    "most people will find the {x} {a}|the {x} turns out {a}|everybody finds the {x} {a}"
).split("|")
NEGATED = (
    "the {x} is not {a}|the {x} never seemed {a}|the {x} hardly felt {a}|I did not find the {x} {a}|"
    "I would never call the {x} {a}|few people will find the {x} {a}|the {x} is by no means {a}|nobody finds the {x} {a}"
).split("|")
CONTRASTS = (
    "{minor}, but {major}|{minor}, yet {major}|although {minor}, {major}|while {minor}, {major}|"
    "{major}, although {minor}|{major}, even if {minor}"
).split("|")
VERDICTS = ["all in all", "overall", "in the end", "to sum up", "in short"]
RECOMMENDATIONS = ("Avoid", "Watch")
WHOLES = ["film", "movie", "picture", "feature", "whole"]

PEOPLE = "baker sailor teacher widow detective farmer singer nurse soldier student pilot lawyer painter clerk doctor waiter".split()
PLACES = "Lisbon Chicago Bergen Naples Osaka Dublin Cairo Vienna Boston Madrid Prague Texas Norway Kenya".split()
TIMES = "in winter|one summer|after the war|on a Monday|before dawn|at the harbour|years later|during a strike".split("|")
EVENTS = (
    "inherits a hotel|loses a letter|follows a stranger|buys an old boat|returns to the village|meets a rival|hides a suitcase|"
    "wakes up in a train|opens a shop|joins a choir|searches for a brother|crosses the desert|borrows some money|"
    "finds a photograph|misses the last bus|writes to a cousin"
).split("|")
PLOTS = (
    "a {who} from {place} {event} and {then} {when}|{when} a {who} {event}, then {then} in {place}|"
    "we follow a {who} who {event} {when} in {place}|it begins when a {who} {event} near {place}"
).split("|")


def _clause(rng: random.Random, polarity: int, nouns: list[str], negation: float) -> str:
    negated = rng.random() < negation
    adjective = rng.choice(ADVERBS) + rng.choice(ADJECTIVES[1 - polarity if negated else polarity])
    return rng.choice(NEGATED if negated else PLAIN).format(x=rng.choice(nouns), a=adjective)


def _opinion(rng: random.Random, polarity: int, negation: float, contrast: float) -> str:
    major = _clause(rng, polarity, ASPECTS, negation)
    if rng.random() >= contrast:
        return major
    return rng.choice(CONTRASTS).format(minor=_clause(rng, 1 - polarity, ASPECTS, negation), major=major)


def _plot(rng: random.Random) -> str:
    event, then = rng.sample(EVENTS, 2)
    return rng.choice(PLOTS).format(
        who=rng.choice(PEOPLE), place=rng.choice(PLACES), when=rng.choice(TIMES), event=event, then=then
    )


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def write_review(rng: random.Random, label: int) -> str:
    """One review that means `label` (0 negative, 1 positive): two or three opinions, a plot, and perhaps a verdict."""
    has_verdict = rng.random() < 0.4  # only a review that ends in a verdict may hold opinions against its label
    opinions = []
    for _ in range(rng.choice([2, 3, 3])):
        dissent = has_verdict and rng.random() < 0.3
        opinions.append(_opinion(rng, 1 - label if dissent else label, negation=0.15, contrast=0.3))
    opinions.insert(rng.randrange(len(opinions)), _plot(rng))
    if has_verdict:
        opinions.append(f"{rng.choice(VERDICTS)}, {_clause(rng, label, WHOLES, negation=0.15)}")
    return " ".join(_sentence(opinion) for opinion in opinions)


def write_reviews(seed: int = 42, train: int = 2000, test: int = 1000, unsupervised: int = 4000) -> dict[str, list[tuple]]:
    """The corpus: per split a list of (text, label), sorted by label like IMDB; no text occurs twice in any split."""
    rng, seen, splits = random.Random(seed), set(), {}
    for split, size in (("train", train), ("test", test), ("unsupervised", unsupervised)):
        rows = []
        while len(rows) < size:
            label = int(len(rows) >= size // 2)
            text = write_review(rng, label)
            if text not in seen:
                seen.add(text)
                rows.append((text, label))
        if split == "unsupervised":
            rng.shuffle(rows)
            rows = [(text, -1) for text, _ in rows]
        splits[split] = rows
    return splits


def _pretraining_text(rng: random.Random, progress: float, prompts: bool) -> str:
    """Opinions that agree and a recommendation (or an answered prompt): the web text on which a base model meets language."""
    polarity = rng.randrange(2)
    easy = progress < 0.6  # one clause at first, then contrasts and more sentences: negation is learnt in seconds, not minutes
    count, contrast = (1, 0.0) if easy else (rng.choice([1, 2, 3]), 0.3)
    text = " ".join(_sentence(_opinion(rng, polarity, negation=Q, contrast=contrast)) for _ in range(count))
    if prompts and rng.random() < 0.5:
        return PROMPT.format(review=text) + LABEL_WORDS[polarity]
    return f"{text} {RECOMMENDATIONS[polarity]} it."


def _roberta_tokenizer(texts: list[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # in RoBERTa's order: positions count from the pad id
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=True)
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    return _wrap(tokenizer, **names, pad_token="<pad>", unk_token="<unk>", mask_token="<mask>")


def _distilbert_tokenizer(texts: list[str]):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special_tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=2000, special_tokens=special_tokens, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    return _wrap(tokenizer, **names)


def _mistral_tokenizer(texts: list[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation()]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    state = json.loads(tokenizer.to_str())  # the byte tokens were special only so that training kept them
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in byte_tokens]
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return _wrap(Tokenizer.from_str(json.dumps(state)), **names, padding_side="left")


def _wrap(tokenizer, **names):
    from transformers import PreTrainedTokenizerFast

    inputs = ["input_ids", "attention_mask"]  # DistilBERT takes no token types
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=MAX_LENGTH, model_input_names=inputs, **names
    )


def _roberta(tokenizer):
    from transformers import RobertaConfig, RobertaForMaskedLM

    return RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256,
            max_position_embeddings=MAX_LENGTH + 2, type_vocab_size=1, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.05,
        )
    )  # fmt: skip


def _distilbert(tokenizer):
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    return DistilBertForMaskedLM(
        DistilBertConfig(
            vocab_size=len(tokenizer), dim=96, n_layers=2, n_heads=4, hidden_dim=192, max_position_embeddings=MAX_LENGTH,
            pad_token_id=tokenizer.pad_token_id, dropout=0.0, attention_dropout=0.0, initializer_range=0.05,
        )
    )  # fmt: skip


def _mistral(tokenizer):
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=256, max_position_embeddings=1024, sliding_window=None, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, initializer_range=0.05,
        )
    )  # fmt: skip


def _last_id(tokenizer, word: str) -> int:
    return tokenizer(f" {word.strip()}", add_special_tokens=False)["input_ids"][-1]


EASY=.7
def _pretrain(model, tokenizer, steps: int, seed: int, learning_rate: float = 1e-3) -> None:
    """Masked or causal language modelling, with most of the weight on opinion words: the rest is grammar, soon known."""
    import torch
    from torch.nn.functional import cross_entropy

    masked = tokenizer.mask_token is not None
    if masked:
        positions = model.base_model.embeddings.position_embeddings.weight
        angles = torch.arange(len(positions))[:, None] / 10000 ** (torch.arange(0, positions.shape[1], 2) / positions.shape[1])
        positions.data = SIN * torch.cat([angles.sin(), angles.cos()], dim=1)
    verdict_ids = torch.tensor([_last_id(tokenizer, word) for word in (*RECOMMENDATIONS, *LABEL_WORDS)])
    adjective_ids = torch.tensor([_last_id(tokenizer, word) for words in ADJECTIVES for word in words])
    special_ids = torch.tensor(tokenizer.all_special_ids)
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1, pct_start=0.1)
    model.train()
    for step in range(steps):
        texts = [_pretraining_text(rng, 0.1 if step < steps * EASY else .9, prompts=not masked) for _ in range(32)]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"]
        is_verdict, is_adjective = torch.isin(labels, verdict_ids), torch.isin(labels, adjective_ids)
        weights = (0.05 + 0.25 * is_adjective + 0.95 * is_verdict) * batch["attention_mask"]
        if masked:
            chosen = torch.rand(labels.shape) < M[0] + M[1] * is_adjective + M[2] * is_verdict
            chosen &= ~torch.isin(labels, special_ids)
            batch["input_ids"] = torch.where(chosen, tokenizer.mask_token_id, labels)
            logits, labels, weights = model(**batch).logits[chosen], labels[chosen], weights[chosen]
        else:
            logits, labels, weights = model(**batch).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), weights[:, 1:].flatten()
        loss = (cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if DEBUG and step % 100 == 99:
            print(step + 1, round(loss.item(), 3), (logits[torch.isin(labels,verdict_ids[:4])].argmax(-1)==labels[torch.isin(labels,verdict_ids)]).float().mean().item(), round(time.process_time() - T0, 1), flush=True)
    model.eval()

DEBUG, T0 = 0, time.process_time()
SIN=.1
M=(.03,.07,.87)
Q=.3
