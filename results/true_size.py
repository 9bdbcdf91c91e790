"""What the real sizes cost: memory, reviews/s and TFLOP/s of 02, 03 and 04a on the GPU at hand, without a download.

Builds the shapes of RoBERTa-large, Mistral-7B-v0.1 and DistilBERT with random weights and runs the project's own
loaders, trainers and scoring on random tokens, under the scripts' defaults on Kaggle. Nothing here tells accuracy.

    python results/true_size.py --output-dir results/gpu    # a row per mode, step and work, in true_size.csv
    python results/true_size.py --plan                      # the expected time of all six steps; needs no GPU
    python results/true_size.py --tiny                      # the same code on tiny shapes, also without a GPU

Modes: `as_itself` in the GPU's own precision; `as_t4` in fp16, in a T4's memory and without the attention kernels that
a T4 lacks. That answers whether a T4 could hold it. The speed is the GPU's own in both.
"""

import argparse
import copy
import dataclasses
import importlib.util
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import artifacts, device, memory, models, scoring

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, Trainer

ROOT = Path(__file__).parent.parent
STEPS, MODES = ("02", "03", "04a"), ("as_itself", "as_t4")
WORKS = ("training", "scoring", "scoring a mix")  # the first two at --max-length, the longest that a script can meet
WARM_UP_STEPS, TIMED_STEPS = 3, 8  # optimizer steps; fp16 may skip its first ones until the loss scale is found
SCORED = {"02": 640, "03": 80, "04a": 2560}  # reviews: a minute or less on a T4
T4_GIB, FITS_GIB = 15.0, 14.5  # all of a T4; what is left beside CUDA's own context
LABEL_IDS = [5, 6]
TINY_FLAGS = ["--max-length", "32", "--batch-size", "4", "--micro-batch-size", "2"]

# Tokens of IMDB's reviews cut at 512, at the 2.5th, 7.5th … 97.5th percentile of 4,000 reviews of each split:
#   texts = pd.read_parquet(file_of_split)["text"].sample(4000, random_state=0).tolist()
#   np.percentile([len(ids) for ids in models.encode(tokenizer, texts, 512)], np.arange(2.5, 100, 5))
# with BERT's uncased vocabulary, which is DistilBERT's (the mpnet-base of real_weights.py): mean 276.2
ENCODER_LENGTHS = [69, 106, 141, 154, 164, 174, 185, 197, 211, 226, 245, 265, 290, 322, 360, 406, 470, 512, 512, 512]
# and with Mistral's own (tokenizer.model.v1 of PyPI's mistral-common), the prompt's 23 tokens included: mean 301.9
LLM_LENGTHS = [93, 132, 167, 182, 191, 202, 213, 226, 240, 257, 275, 297, 323, 357, 397, 446, 512, 512, 512, 512]

IMDB = {"train": 25_000, "transfer": 50_000, "test": 25_000}  # reviews (Maas et al. 2011)
GPUS, RATES, LIMIT_HOURS = 2, (12, 20), 6  # T4s; TFLOP/s that plain and tuned fp16 sustain on one of them


def script(number: str) -> ModuleType:
    """A numbered script by its beginning ("04a"); its name is no identifier, so import cannot."""
    file = next(ROOT.glob(f"{number}_*.py"))
    spec = importlib.util.spec_from_file_location(f"script_{number}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def defaults(step: str, tiny: bool) -> argparse.Namespace:
    """The flags of a step's script on Kaggle; 04a's student is scored in the batches of 05."""
    args = script(step).parse_args(TINY_FLAGS if tiny else [])
    if "batch_tokens" not in args:
        args.batch_tokens = None
    return args


def detect() -> device.Hardware:
    """The hardware at hand in its own precision: the one place that asks."""
    return device.detect(argparse.Namespace(precision="auto"))


def shapes(tiny: bool) -> dict[str, "PretrainedConfig"]:
    """Each step's model by the numbers of its config.json on the hub; tiny ones differ in numbers alone."""
    from transformers import DistilBertConfig, MistralConfig, RobertaConfig

    # width, layers, heads, feed-forward width, vocabulary
    roberta, mistral, distilbert, key_value_heads = (
        (1024, 24, 16, 4096, 50265),
        (4096, 32, 32, 14336, 32000),
        (768, 6, 12, 3072, 30522),
        8,
    )
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


def random_llm(config: "PretrainedConfig", quantization_config, dtype, device_map: dict) -> "PreTrainedModel":
    """What from_pretrained makes of a checkpoint in 4 bits, with random weights: each is made on the device and
    quantised there before the next, so neither host nor GPU ever holds 7 billion unquantised ones."""
    import torch
    from accelerate import init_empty_weights
    from bitsandbytes.nn import Params4bit
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    target = torch.device(device_map[""])
    with init_empty_weights(include_buffers=False):  # buffers hold what no checkpoint has: rotary frequencies
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    quantizer = AutoHfQuantizer.from_config(quantization_config, pre_quantized=False)
    quantizer.preprocess_model(model, device_map=device_map)  # every nn.Linear but the head becomes a Linear4bit
    for module in model.modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            value = torch.ones(empty.shape, dtype=dtype, device=target)  # norms stay so
            if empty.ndim > 1:
                value.normal_(std=config.initializer_range)
            if isinstance(empty, Params4bit):
                full = Params4bit(value, requires_grad=False, **vars(empty)).to(target)  # quantises, as in transformers
            else:
                full = torch.nn.Parameter(value)
            setattr(module, name, full)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = buffer.to(target)
    model.hf_quantizer, model.hf_device_map = quantizer, device_map
    quantizer.postprocess_model(model)
    return model


@contextmanager
def random_weights(configs: dict[str, "PretrainedConfig"]) -> Iterator[None]:
    """Inside, the loaders of common/models.py take a step for a name and make its shape with random weights.

    So precision, quantisation and every repair after loading are the product's own.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    def classifier(step: str, dtype, **labels) -> "PreTrainedModel":
        config = copy.deepcopy(configs[step])
        config.update(labels)
        return AutoModelForSequenceClassification.from_config(config, dtype=dtype)

    def llm(step: str, **how) -> "PreTrainedModel":
        return random_llm(configs[step], **how)

    with (
        patch.object(AutoModelForSequenceClassification, "from_pretrained", classifier),
        patch.object(AutoModelForCausalLM, "from_pretrained", llm),
    ):
        yield


@contextmanager
def conditions(mode: str, hardware: device.Hardware) -> Iterator[device.Hardware]:
    """The hardware as `mode` sees it; inside, what a T4 lacks is switched off."""
    if mode == "as_itself":
        yield hardware
        return
    import torch
    from transformers.integrations import sdpa_attention

    on_gpu, kernels = hardware.device == "cuda", torch.backends.cuda
    flash, cudnn = kernels.flash_sdp_enabled(), kernels.cudnn_sdp_enabled()  # both need compute capability 8.0
    kernels.enable_flash_sdp(False)
    kernels.enable_cudnn_sdp(False)
    no_gqa = nullcontext()
    if hasattr(sdpa_attention, "use_gqa_in_sdpa"):  # as load_llm does below 8.0
        no_gqa = patch.object(sdpa_attention, "use_gqa_in_sdpa", lambda *_, **__: False)
    if on_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, T4_GIB * 2**30 / total))
    try:
        with no_gqa:
            yield dataclasses.replace(hardware, precision="fp16") if on_gpu else hardware
    finally:
        kernels.enable_flash_sdp(flash)
        kernels.enable_cudnn_sdp(cudnn)
        if on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0)


def reviews(config: "PretrainedConfig", lengths: list[int]) -> list[np.ndarray]:
    """Random ids of these lengths, none of them a special token."""
    random = np.random.default_rng(0)
    return [random.integers(5, config.vocab_size, length, dtype=np.int32) for length in lengths]


def make_trainer(
    step: str, args: argparse.Namespace, configs: dict, hardware: device.Hardware, folder: Path
) -> "Trainer":
    """The step's own trainer, as its script builds it, on reviews of the longest length."""
    from common import distill, training

    config, rows = configs[step], args.batch_size * (WARM_UP_STEPS + TIMED_STEPS)
    dataset = training.ReviewDataset(reviews(config, [args.max_length] * rows), np.arange(rows) % 2)
    steps_only = training.WITHOUT_VALIDATION | {"num_train_epochs": 1}
    if step == "03" and hardware.device == "cuda":
        steps_only["optim"] = "paged_adamw_8bit"  # 03's choice
    shared = {
        "args": training.training_arguments(args, hardware, folder / "checkpoints", rows, **steps_only),
        "train_dataset": dataset,
        "data_collator": training.Collator(config.pad_token_id, left=step == "03"),
    }
    if step == "02":
        return training.ReviewTrainer(model=models.load_classifier(step), **shared)
    if step == "03":
        model = script(step).with_lora(args, models.load_llm(step, hardware))
        return training.LabelWordTrainer(model=model, label_ids=LABEL_IDS, **shared)
    width, random = configs["02"].hidden_size, np.random.default_rng(1)
    dataset.arrays = {
        "teacher_logits": random.normal(size=(rows, 2)).astype(np.float32),
        "teacher_features": random.normal(size=(rows, config.num_hidden_layers, 2, width)).astype(np.float16),
    }
    student = distill.Student(models.load_classifier(step), width)
    loss = {name: getattr(args, name) for name in ("alpha", "temperature", "feature_weight")}
    return distill.DistillationTrainer(model=student, **loss, **shared)


def time_training(trainer: "Trainer", args: argparse.Namespace, hardware: device.Hardware) -> float:
    """Reviews/s over the timed optimizer steps."""
    from transformers import TrainerCallback

    from common import training

    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__) -> None:
            hardware.synchronize()
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    training.train(trainer, hardware)  # finds the micro-batch that fits, as in the scripts
    if not trainer.optimizer.state:
        raise RuntimeError("every optimizer step was skipped: its state is missing from the memory that was measured")
    return args.batch_size * TIMED_STEPS / (ends[-1] - ends[WARM_UP_STEPS - 1])


def make_score(
    step: str, args: argparse.Namespace, configs: dict, hardware: device.Hardware, adapter: Path | None
) -> Callable[[list[np.ndarray]], object]:
    """Ids to scores, as the scripts load and call the model; 02 takes hidden states along."""
    from common import distill

    pad_id = configs[step].pad_token_id
    if step == "03":
        model = models.load_llm(step, hardware, adapter)
        return lambda ids: scoring.score_llm(model, ids, LABEL_IDS, pad_id, hardware, args.batch_tokens)
    model = models.load_classifier(step).to(hardware.device).eval()
    layers = distill.mapped_layers(args.student_layers, model.config.num_hidden_layers) if step == "02" else None
    return lambda ids: scoring.score_encoder(model, ids, pad_id, hardware, args.batch_tokens, layers)


def time_scoring(score: Callable, ids: list[np.ndarray], hardware: device.Hardware) -> float:
    """Reviews/s from ids to scores, after a warm-up on a tenth of them."""
    score(ids[-math.ceil(len(ids) / 10) :])
    hardware.synchronize()
    started = time.perf_counter()
    score(ids)
    hardware.synchronize()
    return len(ids) / (time.perf_counter() - started)


def measure(step: str, work: str, tiny: bool, configs: dict, hardware: device.Hardware, folder: Path) -> dict:
    """The figures of one row.

    `peak_gib` is what tensors took (without a GPU: this process, so far), `reserved_gib` what PyTorch held of the GPU
    for them, which is what must fit.
    """
    import torch

    args, config, adapter = defaults(step, tiny), configs[step], folder / "adapter"
    lora_r = getattr(args, "lora_r", 0)
    if work == "training":
        trainer = make_trainer(step, args, configs, hardware, folder)
        rate = time_training(trainer, args, hardware)
        if step == "03":
            trainer.model.save_pretrained(adapter)  # scored next
        lengths, micro_batch = [args.max_length], trainer.args.per_device_train_batch_size
        each = flop(config, args.max_length, True, lora_r, getattr(args, "gradient_checkpointing", False))
    else:
        lengths, micro_batch = [args.max_length], (args.batch_tokens or hardware.batch_tokens) // args.max_length
        if work == "scoring a mix":
            of_512 = LLM_LENGTHS if step == "03" else ENCODER_LENGTHS
            lengths = [math.ceil(length * args.max_length / 512) for length in of_512]
        ids = reviews(config, lengths * ((20 if tiny else SCORED[step]) // len(lengths)))
        score = make_score(step, args, configs, hardware, adapter if adapter.is_dir() else None)
        rate = time_scoring(score, ids, hardware)
        each = np.mean([flop(config, length, lora_r=lora_r) for length in lengths])
    peak = memory.peak_mb() * 1e6 / 2**30
    reserved = torch.cuda.max_memory_reserved() / 2**30 if hardware.device == "cuda" else peak
    return {
        "tokens": round(float(np.mean(lengths)), 1),
        "micro_batch": micro_batch,
        "peak_gib": round(peak, 3),
        "reserved_gib": round(reserved, 3),
        "fits": reserved <= FITS_GIB,
        "reviews_per_second": float(f"{rate:.4g}"),
        "tflops": float(f"{rate * each / 1e12:.4g}"),
    }


def run(output: Path, steps: list[str], modes: list[str], tiny: bool) -> pd.DataFrame:
    """Measure each step in each mode; the table is on disk after every row."""
    import torch

    hardware, configs, rows = detect(), shapes(tiny), []
    for mode in modes:
        for step in steps:
            with conditions(mode, hardware) as here, random_weights(configs), tempfile.TemporaryDirectory() as folder:
                for work in WORKS:
                    memory.free()
                    row = {"gpu": here.name, "mode": mode, "precision": here.precision, "step": step, "work": work}
                    try:
                        row |= measure(step, work, tiny, configs, here, Path(folder))
                    except torch.OutOfMemoryError as problem:
                        print(f"out of memory: {problem}")
                        row["fits"] = False
                    rows.append(row)
                    print(row, flush=True)
                    artifacts.write_table(output / "true_size.csv", pd.DataFrame(rows))
    return pd.DataFrame(rows)


def padded(lengths: list[int], batch: int) -> list[float]:
    """The expected longest of `batch` reviews of equally likely lengths: a batch in dataset order is padded to it."""
    share = np.arange(len(lengths) + 1) / len(lengths)
    return [float(np.sum(np.sort(lengths) * np.diff(share**batch)))]


def plan() -> pd.DataFrame:
    """The expected minutes of each part of the six steps, at the scripts' defaults and at each of RATES on one T4.

    Arithmetic alone, shared evenly among the GPUs except in 05, which times one: reading, tokenising, downloads,
    start-up, dequantisation, and padding where batches are of similar length, are left out.
    """
    configs, parts = shapes(tiny=False), []
    args = {step: script(step).parse_args([]) for step in ("02", "03", "04a", "04b", "05")}

    def count(step: str, split: str) -> int:
        """Reviews of a split that a step reads."""
        available = IMDB[split] - (args[step].validation_samples if split == "train" else 0)
        return min(available, getattr(args[step], f"max_{split}_samples") or available)

    def add(step: str, work: str, model: str, n: float, learn: bool = False, batch: int = 0) -> None:
        """`n` reviews through the model of step `model`; `batch`: so many at a time, in dataset order."""
        lengths, lora = ENCODER_LENGTHS, ()
        if model == "03":
            lengths, lora = LLM_LENGTHS, (args["03"].lora_r, args["03"].gradient_checkpointing)
        lengths = padded(lengths, batch) if batch else lengths
        total = n * np.mean([flop(configs[model], length, learn, *lora) for length in lengths])
        gpus = 1 if step == "05" else GPUS
        minutes = {f"minutes_at_{rate}": total / (rate * 1e12 * gpus) / 60 for rate in RATES}
        parts.append({"step": step, "work": work, "reviews": round(n), "gpus": gpus, "pflop": total / 1e15} | minutes)

    def train(step: str, name: str, model: str, n: int, epochs: float) -> None:
        """`n` reviews an epoch, and Trainer's evaluation after each."""
        add(step, f"{name}, training", model, n * epochs, learn=True)
        evaluated = args[step].validation_samples * math.ceil(epochs)
        add(step, f"{name}, evaluation", model, evaluated, batch=2 * args[step].micro_batch_size)

    measured = json.loads((ROOT / "results/cpu_imdb/01_baseline/run.json").read_text())["wall_time_s"] / 60
    minutes = {f"minutes_at_{rate}": measured for rate in RATES}
    parts.append({"step": "01", "work": "baselines, measured on two CPU cores", "gpus": 0} | minutes)

    validation, gold = args["02"].validation_samples, count("02", "train")
    train("02", "RoBERTa", "02", gold, args["02"].epochs)
    add("02", "RoBERTa, soft labels", "02", validation + gold + count("02", "transfer"))
    train("03", "Mistral", "03", count("03", "train"), args["03"].epochs)
    add("03", "Mistral, validation", "03", validation)
    gold = count("04a", "train")
    both = gold + count("04a", "transfer")
    train("04a", "student", "04a", both, args["04a"].epochs)
    train("04a", "control", "04a", gold, args["04a"].epochs * both / gold)
    add("04a", "both, validation", "04a", 2 * validation)
    both = count("04b", "train") + count("04b", "transfer")
    add("04b", "Mistral, soft labels", "03", validation + both)
    train("04b", "student", "04a", both, args["04b"].epochs)
    add("04b", "student, validation", "04a", validation)
    extra = args["05"].latency_samples + 20  # one at a time, and warm-up
    add("05", "RoBERTa", "02", count("05", "test") + extra)
    add("05", "Mistral", "03", args["05"].max_llm_samples + extra)
    add("05", "two students, control", "04a", 3 * (count("05", "test") + extra))
    return pd.DataFrame(parts)


def print_plan(parts: pd.DataFrame) -> None:
    """The parts, each step's minutes, and whether the whole stays under the limit."""
    columns = [f"minutes_at_{rate}" for rate in RATES]
    print(parts.round(2).to_string(index=False, na_rep=""))
    print(parts.groupby("step")[columns].sum().round(1).to_string())
    for rate, column in zip(RATES, columns):
        hours = parts[column].sum() / 60
        alone = (parts[column] * parts["gpus"].clip(lower=1)).sum() / 60
        verdict = "under" if hours < LIMIT_HOURS else "NOT under"
        print(f"at {rate} TFLOP/s: {hours:.1f} h on {GPUS} T4s, {verdict} {LIMIT_HOURS} h ({alone:.1f} h on one)")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output-dir", type=Path, default=ROOT / "results" / "gpu", help="where true_size.csv or plan.csv is written")
    add("--plan", action="store_true", help="only the expected times")
    add("--tiny", action="store_true", help="tiny shapes")
    add("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="which to measure")
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help="how to measure them")
    args = parser.parse_args(argv)
    if args.plan:
        parts = plan()
        artifacts.write_table(args.output_dir / "plan.csv", parts.round(3))
        print_plan(parts)
    else:
        print(run(args.output_dir, args.steps, args.modes, args.tiny).to_string(index=False))


if __name__ == "__main__":
    main()
