"""How long the six steps should take on two T4s, by arithmetic at the scripts' defaults; and the real models' shapes.

`python experiments/true_size.py --plan` writes it. What the GPUs compute is counted in floating-point operations.
What they wait for is bytes divided by an assumed rate. Nothing here has been measured on a T4.
"""

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import measuring

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROOT = Path(__file__).parent.parent

# Tokens of IMDB's reviews cut at 512, at the 2.5th, 7.5th … 97.5th percentile of 4,000 reviews of each split:
#   texts = pd.read_parquet(file_of_split)["text"].sample(4000, random_state=0).tolist()
#   np.percentile([len(ids) for ids in encoding.encode(tokenizer, texts, 512)], np.arange(2.5, 100, 5))
# with BERT's uncased vocabulary, which is DistilBERT's (the mpnet-base of real_weights.py): mean 276.2
ENCODER_LENGTHS = [69, 106, 141, 154, 164, 174, 185, 197, 211, 226, 245, 265, 290, 322, 360, 406, 470, 512, 512, 512]
# and with Mistral's own (tokenizer.model.v1 of PyPI's mistral-common), the prompt's 23 tokens included: mean 301.9
LLM_LENGTHS = [93, 132, 167, 182, 191, 202, 213, 226, 240, 257, 275, 297, 323, 357, 397, 446, 512, 512, 512, 512]

IMDB = {"train": 25_000, "transfer": 50_000, "test": 25_000}  # reviews (Maas et al. 2011)
VALIDATION = 2500  # a tenth of train, the scripts' default
GPUS, LIMIT_HOURS = 2, 12  # T4s, and a session's hours on Kaggle
RATES = (9, 12)  # TFLOP/s of plain PyTorch in fp16 on one T4: 8.4 to 9.0 are published (BERT's shapes), 12 is a hope
DOWNLOAD_GB_PER_S = 0.05  # assumed
CPU_FLOPS, INT8_SPEEDUP = 1e11, 2  # of 4 vCPUs in fp32, and of int8 over it; assumed
DISK_GB_PER_S = 0.2  # assumed, reading and writing
PCIE_GB_PER_S = 5.0  # assumed: through the host's memory, for the two T4s have no direct way to each other
START_S = 60.0  # assumed: imports take about 10 s in the starting process, and in those that it starts
DOWNLOADED_GB = {"IMDB": 0.08, "RoBERTa": 1.42, "Mistral": 14.48, "student": 0.27}  # on the hub: fp32, Mistral bf16


def script(number: str) -> ModuleType:
    """A numbered script by its beginning ("04a")."""
    return importlib.import_module(next(ROOT.glob(f"{number}_*.py")).stem)


def shapes(tiny: bool = False) -> dict[str, "PretrainedConfig"]:
    """Each step's model by the numbers of its config.json on the hub; tiny ones differ in numbers alone."""
    from transformers import DistilBertConfig, MistralConfig, RobertaConfig

    # width, layers, heads, feed-forward width, vocabulary
    roberta, mistral = (1024, 24, 16, 4096, 50265), (4096, 32, 32, 14336, 32000)
    distilbert, key_value_heads = (768, 6, 12, 3072, 30522), 8
    if tiny:
        roberta, mistral, distilbert, key_value_heads = *([(32, 2, 4, 64, 100)] * 3), 2
    names = "hidden_size num_hidden_layers num_attention_heads intermediate_size vocab_size".split()
    distilbert_names = "dim n_layers n_heads hidden_dim vocab_size".split()
    # A window of 4,096 tokens, v0.1's, computes the same at --max-length as none.
    more = {"num_key_value_heads": key_value_heads, "sliding_window": None, "pad_token_id": 2}
    return {
        "02": RobertaConfig(**dict(zip(names, roberta)), max_position_embeddings=514, type_vocab_size=1),
        "03": MistralConfig(**dict(zip(names, mistral)), **more),
        "04a": DistilBertConfig(**dict(zip(distilbert_names, distilbert)), max_position_embeddings=512),
    }


def matrices(config: "PretrainedConfig") -> list[tuple[int, int]]:
    """(in, out) of each weight matrix of one block, the queries' first."""
    width, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or width // heads
    keys = size * getattr(config, "num_key_value_heads", heads)
    inner = config.hidden_dim if config.model_type == "distilbert" else config.intermediate_size
    up = [(width, inner)] * (2 if config.model_type == "mistral" else 1)  # a gated block has two
    return [(width, heads * size), (width, keys), (width, keys), (heads * size, width), *up, (inner, width)]


def flop(
    config: "PretrainedConfig", tokens: float, learn: bool = False, lora_r: int = 0, checkpointing: bool = False
) -> float:
    """Floating-point operations to score one review, or to learn from it: two a multiply-add of the matrix products.

    Counted as in PaLM (Chowdhery et al. 2022, appendix B; Kaplan et al. 2020, table 1): 2·parameters·tokens in the
    blocks' matrices, 4·layers·tokens²·width in attention (a causal mask saves nothing), the head on one position.
    Backwards each product has two of its size, the gradients of its two factors, so learning is 3 forward passes.
    Frozen weights need no gradient (QLoRA, Dettmers et al. 2023): 2; checkpointing runs the blocks forward once more.
    That the first block of a frozen model needs no gradient of its input is left out: 0.1% of Mistral's.
    """
    layers, width = config.num_hidden_layers, config.hidden_size
    base = 2 * tokens * layers * sum(rows * columns for rows, columns in matrices(config))
    adapters = 2 * tokens * layers * sum(lora_r * (rows + columns) for rows, columns in matrices(config))
    attention = 4 * tokens**2 * layers * matrices(config)[0][1]
    head = 2 * width * (config.vocab_size if config.model_type == "mistral" else width + 2)
    if not learn:
        return base + adapters + attention + head
    if not lora_r:
        return 3 * (base + attention + head)
    return (2 + checkpointing) * base + (3 + checkpointing) * (adapters + attention) + 2 * head


def make() -> pd.DataFrame:
    """The expected minutes of each part of the six steps, at the scripts' defaults and at each of RATES on one T4.

    Arithmetic alone, shared evenly among the GPUs except in 05, which times one. What the GPUs do not compute has rows
    of its own, by the assumptions above. Left out: the optimizer's step, dequantisation, and padding, for batches are
    of similar length. No transfer is thought to overlap with anything.
    """
    configs, parts = shapes(), []
    args = {step: script(step).parse_args([]) for step in ("02", "03", "04a", "04b", "05")}

    def count(step: str, split: str) -> int:
        """Reviews of a split that a step reads."""
        available = IMDB[split] - (VALIDATION if split == "train" else 0)
        return min(available, getattr(args[step], f"max_{split}_samples") or available)

    def add(step: str, work: str, model: str, n: float, learn: bool = False) -> None:
        """`n` reviews through the model of step `model`."""
        lengths, lora = ENCODER_LENGTHS, ()
        if model == "03":
            lengths, lora = LLM_LENGTHS, (args["03"].lora_r, args["03"].gradient_checkpointing)
        total = n * np.mean([flop(configs[model], length, learn, *lora) for length in lengths])
        gpus = 1 if step == "05" else GPUS
        minutes = {f"minutes_at_{rate}": total / (rate * 1e12 * gpus) / 60 for rate in RATES}
        parts.append({"step": step, "work": work, "reviews": round(n), "gpus": gpus, "pflop": total / 1e15} | minutes)

    def fixed(step: str, work: str, seconds: float, **more: float) -> None:
        """What takes as long at any rate."""
        parts.append({"step": step, "work": work, "gpus": 0} | more | {f"minutes_at_{r}": seconds / 60 for r in RATES})

    def move(step: str, work: str, gb: float, gb_per_s: float) -> None:
        fixed(step, work, gb / gb_per_s, gb=gb, gb_per_s=gb_per_s)

    def train(step: str, name: str, model: str, n: int, epochs: float, weights: float) -> None:
        """`n` reviews an epoch, and what comes with them: an evaluation and a checkpoint after each epoch, a checkpoint
        at every other tenth of the run, and at every step the exchange of the gradients of the trained weights."""
        add(step, f"{name}, training", model, n * epochs, learn=True)
        add(step, f"{name}, evaluation", model, VALIDATION * math.ceil(epochs))
        gb, steps = 4e-9 * weights, math.ceil(n * epochs / args[step].batch_size)
        move(step, f"{name}, checkpoints", (9 + math.ceil(epochs)) * 3 * gb, DISK_GB_PER_S)  # weights, two moments
        move(step, f"{name}, gradient exchange", steps * gb, PCIE_GB_PER_S)

    measured = json.loads((ROOT / "results/baselines/run.json").read_text())["wall_time_s"]
    fixed("01", "baselines, measured on two CPU cores", measured)
    for step in ("01", "02", "03", "04a", "04b", "05"):
        fixed(step, "start-up, reading, tokenising", START_S)
    for step, what in (("01", "IMDB"), ("02", "RoBERTa"), ("03", "Mistral"), ("04a", "student")):
        move(step, f"{what}, download", DOWNLOADED_GB[what], DOWNLOAD_GB_PER_S)
    student = ["student"]
    loads = {"02": ["RoBERTa"] * 2, "03": ["Mistral"] * 2, "04a": student * 4, "04b": ["Mistral"] + student * 2}
    loads["05"] = ["RoBERTa", "Mistral"] + student * 3
    for step, loaded in loads.items():
        move(step, "loading", sum(DOWNLOADED_GB[one] for one in loaded), DISK_GB_PER_S)

    validation, gold = VALIDATION, count("02", "train")
    train("02", "RoBERTa", "02", gold, args["02"].epochs, 355.4e6)
    add("02", "RoBERTa, soft labels", "02", validation + gold + count("02", "transfer"))
    train("03", "Mistral", "03", count("03", "train"), args["03"].epochs, 41.9e6)
    add("03", "Mistral, validation", "03", validation)
    gold = count("04a", "train")
    both = gold + count("04a", "transfer")
    train("04a", "student", "04a", both, args["04a"].epochs, 71.7e6)  # with its projections
    train("04a", "control", "04a", gold, args["04a"].epochs * both / gold, 67.0e6)
    add("04a", "both, validation", "04a", 2 * validation)
    both = count("04b", "train") + count("04b", "transfer")
    scored = both if args["04b"].soft_labels == "all" else count("04b", "transfer")
    add("04b", "Mistral, soft labels", "03", validation + scored)
    train("04b", "student", "04a", both, args["04b"].epochs, 67.0e6)
    add("04b", "student, validation", "04a", validation)
    five = args["05"]
    swept, attacks = 500, len(measuring.ATTACKS) + 1  # so many reviews fill the batches of the sweep
    one_by_one = 4 * five.latency_samples  # it is steady after four passes at the earliest
    extra = swept + one_by_one + attacks * five.injection_samples
    add("05", "RoBERTa", "02", count("05", "test") + extra)
    add("05", "Mistral", "03", five.max_llm_samples + extra)
    add("05", "two students, control", "04a", 3 * (count("05", "test") + extra))
    work = np.mean([flop(configs["04a"], length) for length in ENCODER_LENGTHS]) * (
        five.form_samples + swept + one_by_one
    )
    fixed("05", "a student in 3 forms, on the CPU", (2 + 1 / INT8_SPEEDUP) * work / CPU_FLOPS)
    return pd.DataFrame(parts).sort_values("step", kind="stable")


def show(parts: pd.DataFrame) -> None:
    """The parts, each step's minutes, and whether the whole stays under the limit."""
    columns = [f"minutes_at_{rate}" for rate in RATES]
    print(parts.round(2).to_string(index=False, na_rep=""))
    print(parts.groupby("step")[columns].sum().round(1).to_string())
    for rate, column in zip(RATES, columns):
        hours = parts[column].sum() / 60
        on_one = parts[~parts["work"].str.endswith("exchange")]
        alone = (on_one[column] * on_one["gpus"].clip(lower=1)).sum() / 60
        verdict = "under" if hours < LIMIT_HOURS else "NOT under"
        print(f"at {rate} TFLOP/s: {hours:.1f} h on {GPUS} T4s, {verdict} {LIMIT_HOURS} h ({alone:.1f} h on one)")
