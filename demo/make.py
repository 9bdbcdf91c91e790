#!/usr/bin/env python
"""Make the offline demo: a made-up review corpus, and tiny base checkpoints of the three architectures.

A grammar of this project writes the reviews and decides their labels. They contain what a bag of words cannot read:

- a negation some words before its adjective ("I did not find the script very funny"),
- a contrast in which one half counts ("although the cast is warm, the story is dull"),
- a verdict that overrules the rest, and a plot that means nothing.

The checkpoints are pre-trained for seconds on text of the same grammar, so that fine-tuning and LoRA can adapt them.

Writes  outputs/demo/  reviews/  demo-roberta/  demo-mistral/  demo-distilbert/
Takes   about a minute on two CPU cores

    python demo/make.py
    python 01_baseline.py --preset demo --output-dir outputs/demo_run
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.artifacts import lock
from common.storage import whole
from common.verbalizer import LABEL_WORDS, PROMPT

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SIZES = {"train": 1000, "test": 1000, "unsupervised": 3000}
MAX_LENGTH = 512

ASPECTS = "acting story dialogue music pacing script ending humour editing plot cast soundtrack".split()
ADJECTIVES = (  # by label: negative, positive
    "boring dull clumsy tedious flat silly weak bland messy shallow".split(),
    "funny moving clever gripping charming fresh beautiful warm witty subtle".split(),
)
# Plain and negated clauses have the same adverbs, so that "very funny" does not predict the label.
ADVERBS = ("really ", "very ", "truly ", "quite ", "terribly ", "")
PLAIN = ("the {x} is {a}", "the {x} seemed {a}", "I found the {x} {a}", "most people will find the {x} {a}")
NEGATED = (
    "the {x} is not {a}",
    "the {x} never seemed {a}",
    "I did not find the {x} {a}",
    "few people will find the {x} {a}",
)
CONTRASTS = ("{minor}, but {major}", "although {minor}, {major}")
VERDICTS = ("all in all", "overall", "in the end")
WHOLES = ("film", "movie", "picture")
RECOMMENDATIONS = ("Avoid", "Watch")
PEOPLE = (
    "baker sailor teacher widow detective farmer singer nurse soldier student pilot lawyer painter clerk waiter".split()
)
PLACES = "Lisbon Chicago Bergen Naples Osaka Dublin Cairo Vienna Boston Madrid Prague Texas Norway Kenya".split()
TIMES = "in winter|one summer|after the war|on a Monday|before dawn|at the harbour|years later|during a strike".split(
    "|"
)
EVENTS = (
    "inherits a hotel|loses a letter|follows a stranger|buys an old boat|returns to the village|meets a rival|"
    "hides a suitcase|wakes up in a train|opens a shop|joins a choir|searches for a brother|crosses the desert|"
    "borrows some money|finds a photograph|misses the last bus|writes to a cousin"
).split("|")
PLOTS = (
    "a {who} from {place} {event} and {then} {when}|{when} a {who} {event}, then {then} in {place}|"
    "we follow a {who} who {event} {when} in {place}|it begins when a {who} {event} near {place}"
).split("|")
# Pre-training: (share of the steps, texts per batch). Clauses come first, then contrasts, then whole reviews. In this
# order the models learn negation in seconds; with everything at once it takes many minutes.
CURRICULUM = {"clause": (0.35, 64), "contrast": (0.25, 48), "review": (0.4, 32)}


def _clause(rng: random.Random, label: int, nouns: list[str], negation: float) -> str:
    negated = rng.random() < negation
    adjective = rng.choice(ADVERBS) + rng.choice(ADJECTIVES[1 - label if negated else label])
    return rng.choice(NEGATED if negated else PLAIN).format(x=rng.choice(nouns), a=adjective)


def _opinion(rng: random.Random, label: int, negation: float, contrast: float) -> str:
    major = _clause(rng, label, ASPECTS, negation)
    if rng.random() >= contrast:
        return major
    return rng.choice(CONTRASTS).format(minor=_clause(rng, 1 - label, ASPECTS, negation), major=major)


def _plot(rng: random.Random) -> str:
    event, second_event = rng.sample(EVENTS, 2)
    words = {"who": rng.choice(PEOPLE), "place": rng.choice(PLACES), "when": rng.choice(TIMES)}
    return rng.choice(PLOTS).format(event=event, then=second_event, **words)


def _text(sentences: list[str]) -> str:
    return " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences)


def write_review(rng: random.Random, label: int) -> str:
    """One review with this `label` (0 negative, 1 positive): two opinions around a plot, and perhaps a verdict."""
    has_verdict = rng.random() < 0.3
    dissent = rng.randrange(2) if has_verdict and rng.random() < 0.5 else None  # only a verdict can overrule it
    opinions = [_opinion(rng, 1 - label if place == dissent else label, 0.2, 0.4) for place in range(2)]
    verdict = [f"{rng.choice(VERDICTS)}, {_clause(rng, label, WHOLES, negation=0.2)}"] if has_verdict else []
    return _text([opinions[0], _plot(rng), opinions[1], *verdict])


def write_reviews(sizes: dict[str, int], seed: int) -> dict[str, pd.DataFrame]:
    """A table of text and label for each split, sorted by label like IMDB. No text occurs twice."""
    rng, seen, splits = random.Random(seed), set(), {}
    for split, size in sizes.items():
        rows = []
        while len(rows) < size:
            label = int(len(rows) >= size // 2)
            text = write_review(rng, label)
            if text not in seen:
                seen.add(text)
                rows.append((text, label))
        splits[split] = pd.DataFrame(rows, columns=["text", "label"])
    splits["unsupervised"] = splits["unsupervised"].sample(frac=1, random_state=seed).assign(label=-1)
    return splits


def _pretraining_text(rng: random.Random, stage: str, prompts: bool) -> str:
    """A text with a matching recommendation or an answered prompt, as a base model would have read on the web."""
    label = rng.randrange(2)
    if stage == "review":
        text = write_review(rng, label)
    else:
        sentences = [_opinion(rng, label, negation=0.2, contrast=0.6 if stage == "contrast" else 0.0)]
        sentences = [_plot(rng)] * (rng.random() < 0.4) + sentences + [_plot(rng)] * (rng.random() < 0.4)
        text = _text(sentences)
    if prompts and rng.random() < 0.5:  # two spaces, because encode_prompts() encodes review and prompt separately
        return f"{PROMPT.format(review=' ' + text)} {LABEL_WORDS[label]}"
    return f"{text} {RECOMMENDATIONS[label]} it."


def _roberta_tokenizer(texts: list[str]) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # RoBERTa's order, because positions count from the pad id
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=True)
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    return _wrap(tokenizer, **names, pad_token="<pad>", unk_token="<unk>", mask_token="<mask>")


def _distilbert_tokenizer(texts: list[str]) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    pieces = (piece for text in texts for piece, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    words = sorted(set(pieces))  # made here, because WordPieceTrainer gives other ids and pieces in each run
    letters = sorted(set("".join(words)))
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    vocabulary = dict.fromkeys([*special.values(), *letters, *(f"##{letter}" for letter in letters), *words])
    vocabulary = {token: token_id for token_id, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, splitter, decoders.WordPiece()
    tokenizer.add_special_tokens(list(special.values()))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return _wrap(tokenizer, **special)


def _mistral_tokenizer(texts: list[str]) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([metaspace, pre_tokenizers.Punctuation()])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>", *bytes_]
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    template = {"single": "<s> $A", "pair": "<s> $A <s> $B", "special_tokens": [("<s>", 1)]}
    tokenizer.post_processor = processors.TemplateProcessing(**template)
    state = json.loads(tokenizer.to_str())  # byte tokens were special only so that training kept them
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in bytes_]
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return _wrap(Tokenizer.from_str(json.dumps(state)), **names, padding_side="left")


def _wrap(tokenizer: object, **names: str) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    names |= {"model_input_names": ["input_ids", "attention_mask"]}  # DistilBERT takes no token types
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_LENGTH, **names)


ROLES = {  # tokenizer, pre-training steps, peak learning rate, and the config's sizes
    "demo-roberta": (_roberta_tokenizer, 380, 1e-3, {
        "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256,
        "max_position_embeddings": MAX_LENGTH + 2, "type_vocab_size": 1, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }),
    "demo-mistral": (_mistral_tokenizer, 170, 1e-3, {
        "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 256, "max_position_embeddings": 2 * MAX_LENGTH, "sliding_window": None,
    }),
    "demo-distilbert": (_distilbert_tokenizer, 300, 1.5e-3, {
        "dim": 96, "n_layers": 2, "n_heads": 4, "hidden_dim": 192, "max_position_embeddings": MAX_LENGTH,
        "dropout": 0.0, "attention_dropout": 0.0,
    }),
}  # fmt: skip


def _model(kind: str, sizes: dict[str, object], tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedModel":
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), initializer_range=0.05, **ids, **sizes)
    return (AutoModelForMaskedLM if tokenizer.mask_token_id is not None else AutoModelForCausalLM).from_config(config)


def _pretrain(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", steps: int, learning_rate: float, seed: int
) -> None:
    """Masked or causal language modelling. Words that depend on the whole text weigh most; grammar is learnt soon."""
    import torch
    from torch.nn.functional import cross_entropy

    masked = tokenizer.mask_token_id is not None
    words = RECOMMENDATIONS if masked else (*RECOMMENDATIONS, *LABEL_WORDS)
    verdicts = torch.tensor([tokenizer(f" {word}", add_special_tokens=False)["input_ids"][-1] for word in words])
    special = torch.tensor(tokenizer.all_special_ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 2 - 2 * step / max(steps, 1), 1.0)
    )
    rng = random.Random(seed)
    model.train()
    for stage, (share, size) in CURRICULUM.items():
        for _ in range(round(share * steps)):
            texts = [_pretraining_text(rng, stage, prompts=not masked) for _ in range(size)]
            batch = tokenizer(texts, padding=True, return_tensors="pt")
            labels = batch["input_ids"].clone()
            learned = batch["attention_mask"].bool() & ~torch.isin(labels, special)
            if masked:
                learned &= (torch.rand(labels.shape) < 0.08) | torch.isin(labels, verdicts)
                batch["input_ids"][learned & (torch.rand(labels.shape) < 0.95)] = tokenizer.mask_token_id
                logits = model(**batch).logits[learned]
            else:
                learned[:, 0] = False
                logits = model(**batch).logits[:, :-1][learned[:, 1:]]
            labels = labels[learned]
            weights = torch.where(torch.isin(labels, verdicts), 1.0, 0.05)
            loss = (cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def make(folder: Path, sizes: dict[str, int] = SIZES, effort: float = 1.0, seed: int = 42) -> None:
    """Write `folder`/reviews and a base checkpoint for each role, whole or not at all.

    `effort` multiplies the pre-training steps.
    """
    import torch
    import transformers

    lock(folder)
    started, rng = time.time(), random.Random(seed)
    corpus = write_reviews(sizes, seed)
    texts = [*corpus["unsupervised"]["text"], *(_pretraining_text(rng, "review", prompts=True) for _ in range(1000))]
    transformers.logging.disable_progress_bar()
    with whole(folder) as temporary:
        (temporary / "reviews").mkdir(parents=True)
        for split, table in corpus.items():
            table.to_parquet(temporary / "reviews" / f"{split}.parquet", index=False)
        for name, (make_tokenizer, steps, learning_rate, model_sizes) in ROLES.items():
            torch.manual_seed(seed)
            tokenizer = make_tokenizer(texts)
            model = _model(name.removeprefix("demo-"), model_sizes, tokenizer)
            _pretrain(model, tokenizer, round(effort * steps), learning_rate, seed)
            model.save_pretrained(temporary / name)
            tokenizer.save_pretrained(temporary / name)
            millions = model.num_parameters() / 1e6
            print(f"  {name}: {millions:.2f} M parameters, {time.time() - started:.0f} s", flush=True)


def main(argv: list[str] | None = None) -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    folder_help = "folder of the demo (default: %(default)s, which --preset demo reads)"
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/demo"), help=folder_help)
    folder = parser.parse_args(argv).output_dir
    if folder.exists():
        print(f"{folder}/ exists already; delete it to make it again.")
        return
    print("making the demo's reviews and tiny base checkpoints; this takes about a minute", flush=True)
    make(folder)
    print("next: python 01_baseline.py --preset demo --output-dir outputs/demo_run")


if __name__ == "__main__":
    main()
