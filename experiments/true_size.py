"""What the real sizes cost: memory, reviews/s and TFLOP/s of 02, 03 and 04a on the GPU at hand, without a download.

Builds the shapes of RoBERTa-large, Mistral-7B-v0.1 and DistilBERT with random weights and runs the project's own
loaders, trainers and scoring on random tokens, under the scripts' defaults on Kaggle. Nothing here tells accuracy.

    python experiments/true_size.py               # a row per mode, step and work, in results/gpu/true_size.csv
    python experiments/true_size.py --simulate    # each step's memory on one of two T4s, in memory.csv; needs no GPU
    python experiments/true_size.py --plan        # the expected time of all six steps, in plan.csv; needs no GPU
    python experiments/true_size.py --tiny        # the first two on tiny shapes, also without a GPU

Modes: `as_t4` in fp16, in a T4's memory, without the attention kernels that a T4 lacks, as one of two processes.
That answers whether a T4 could hold it. `as_itself` in the GPU's own precision. The speed is the GPU's own in both.
"""

import argparse
import copy
import dataclasses
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import device, encoding, llms, memory, models, scoring, storage
from experiments import plan
from experiments.plan import ENCODER_LENGTHS, GPUS, LLM_LENGTHS, flop, script, shapes

if TYPE_CHECKING:
    import peft
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, Trainer

ROOT = Path(__file__).parent.parent
STEPS, MODES = ("02", "03", "04a"), ("as_t4", "as_itself")
WORKS = ("training", "scoring", "scoring a mix")  # the first two at --max-length, the longest that a script can meet
MODELS = {"02": "02", "03": "03", "04a": "04a", "control": "04a", "04b": "04a"}  # whose shape a step trains
WARM_UP_STEPS, TIMED_STEPS = 3, 4  # optimizer steps; fp16 may skip its first ones until the loss scale is found
SCORED = {"02": 640, "03": 80, "04a": 2560}  # reviews: a minute or less on a T4
T4_GIB = 14.5  # of a T4's 15.0, what is left beside CUDA's own context
LEFT_OUT_GIB = 0.6  # assumed for what a simulation leaves out
SIMULATED = [  # step, work, and which of MODELS does it
    ("02", "training", "02"),
    ("02", "scoring with hidden states", "02"),
    ("03", "training", "03"),
    ("04a", "training, student", "04a"),
    ("04a", "training, control", "control"),
    ("04b", "scoring, Mistral", "03"),
    ("04b", "training, student", "04b"),
    ("05", "scoring, RoBERTa", "02"),
    ("05", "scoring, Mistral", "03"),
    ("05", "scoring, student", "04a"),
]
LABEL_IDS = [5, 6]
TINY_FLAGS = ["--max-length", "32", "--batch-size", "4", "--micro-batch-size", "2"]


def defaults(step: str, tiny: bool) -> argparse.Namespace:
    """The flags of a step's script on Kaggle; 04a's student is scored in the batches of 05."""
    args = script("04a" if step == "control" else step).parse_args(TINY_FLAGS if tiny else [])
    if "batch_tokens" not in args:
        args.batch_tokens = None
    return args


def in_4_bits(weights: "torch.Tensor", how: dict) -> "torch.nn.Parameter":
    """The weights quantised where they lie, as in transformers; `how` names bitsandbytes' settings."""
    from bitsandbytes.nn import Params4bit

    return Params4bit(weights, requires_grad=False, **how).to(weights.device)


def random_llm(
    config: "PretrainedConfig", quantise: Callable, quantization_config, dtype, device_map: dict
) -> "PreTrainedModel":
    """What from_pretrained makes of a checkpoint in 4 bits, with random weights: each is made on the device and
    quantised there before the next, so neither host nor GPU ever holds 7 billion unquantised ones."""
    import torch
    from accelerate import init_empty_weights
    from bitsandbytes.nn import Params4bit
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    target = torch.device(device_map[""])
    quantizer = AutoHfQuantizer.from_config(quantization_config, pre_quantized=False)
    with unset_fake_temporarily():  # for --simulate: bitsandbytes' parameters cannot be fake
        with init_empty_weights(include_buffers=False):  # buffers hold what no checkpoint has: rotary frequencies
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
        quantizer.preprocess_model(model, device_map=device_map)  # every nn.Linear but the head becomes a Linear4bit
    for module in model.modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            value = torch.ones(empty.shape, dtype=dtype, device=target)  # norms stay so
            if empty.ndim > 1:
                value.normal_(std=config.initializer_range)
            is_4_bit = isinstance(empty, Params4bit)
            setattr(module, name, quantise(value, vars(empty)) if is_4_bit else torch.nn.Parameter(value))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = buffer.to(target)
    model.hf_quantizer, model.hf_device_map = quantizer, device_map
    quantizer.postprocess_model(model)
    return model


@contextmanager
def random_weights(
    configs: dict[str, "PretrainedConfig"], where: str = "cpu", quantise: Callable = in_4_bits
) -> Iterator[None]:
    """Inside, the loaders of models.py and llms.py take a step for a name and make its shape with random weights.

    So precision, quantisation and every repair after loading are the product's own. Encoders are made on the device
    `where`; an adapter is a new one by 03's settings.
    """
    import peft
    import torch

    def made(step: str, kind: type, config: "PretrainedConfig", dtype, **how) -> "PreTrainedModel":
        if "device_map" in how:
            return random_llm(config, quantise, dtype=dtype, **how)
        with torch.device(where):
            return kind.from_config(config, dtype=dtype)

    def adapter(model: "PreTrainedModel", *_, **__) -> "peft.PeftModel":
        with patch.object(
            peft, "prepare_model_for_kbit_training", lambda model, **_: model
        ):  # scoring needs none of it
            return script("03").with_lora(script("03").parse_args([]), model).requires_grad_(False)

    with (
        patch.object(models, "load_config", lambda step: copy.deepcopy(configs[step])),
        patch.object(models, "pretrained", made),
        patch.object(llms, "refuse_reading_ahead", lambda *_: None),  # --simulate has no numbers
        patch.object(peft.PeftModel, "from_pretrained", adapter),
    ):
        yield


@contextmanager
def conditions(mode: str, hardware: device.Hardware) -> Iterator[device.Hardware]:
    """The hardware as `mode` sees it; inside, what a T4 lacks is switched off."""
    if mode == "as_itself":
        yield hardware
        return
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers.integrations import sdpa_attention

    on_gpu = hardware.device == "cuda"
    if on_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, T4_GIB * 2**30 / total))
    # As load_llm does below 8.0.
    no_gqa = patch.object(sdpa_attention, "use_gqa_in_sdpa", lambda *_, **__: False, create=True)
    try:  # the kernels that are left out need 8.0
        with no_gqa, sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            precision = "fp16" if on_gpu else hardware.precision
            yield dataclasses.replace(hardware, precision=precision, processes=GPUS)  # one of two
    finally:
        if on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0)


def reviews(config: "PretrainedConfig", lengths: list[int]) -> list[np.ndarray]:
    """Random ids of these lengths, none of them a special token."""
    random = np.random.default_rng(0)
    return [random.integers(5, config.vocab_size, length, dtype=np.int32) for length in lengths]


def make_trainer(
    step: str, args: argparse.Namespace, configs: dict, hardware: device.Hardware, folder: Path
) -> "Trainer":
    """The step's own trainer, as its script builds it, on one process's share of reviews of the longest length.

    "control" is that of 04a. Nothing is saved or logged: neither may take part in what is measured.
    """
    from common import callbacks, distill, training

    config = configs[MODELS[step]]
    rows = args.batch_size // hardware.processes * (WARM_UP_STEPS + TIMED_STEPS)
    dataset = encoding.ReviewDataset(reviews(config, [args.max_length] * rows), np.arange(rows) % 2)
    steps_only = training.WITHOUT_VALIDATION | {"num_train_epochs": 1, "logging_steps": 10**6}
    if hardware.device == "cpu":
        steps_only["fp16"] = False  # of a simulated T4: Trainer refuses it without a GPU
    shared = {
        "args": training.training_arguments(args, hardware, folder / "checkpoints", rows, **steps_only),
        "train_dataset": dataset,
        "data_collator": encoding.Collator(config.pad_token_id),
    }
    if step == "02":
        trainer = training.ReviewTrainer(model=models.load_classifier(step), **shared)
    elif step == "03":
        model = script(step).with_lora(args, llms.load_llm(step, hardware))
        trainer = training.LabelWordTrainer(model=model, label_ids=LABEL_IDS, **shared)
    else:
        width = configs["02"].hidden_size if step == "04a" else None  # of the teacher's states
        random = np.random.default_rng(1)
        if step != "control":
            dataset.arrays["teacher_logits"] = random.normal(size=(rows, 2)).astype(np.float32)
        if width:
            features = random.normal(size=(rows, config.num_hidden_layers, 2, width)).astype(np.float16)
            dataset.arrays["teacher_features"] = features
        loss = {name: getattr(args, name, 0.0) for name in ("alpha", "temperature", "feature_weight")}
        loss |= {"alpha": 0.0} if step == "control" else {}
        student = distill.Student(models.load_classifier("04a"), width)
        trainer = distill.DistillationTrainer(model=student, **loss, **shared)
    trainer.remove_callback(callbacks.SaveOften)
    return trainer


def time_training(trainer: "Trainer", args: argparse.Namespace, hardware: device.Hardware) -> float:
    """Reviews/s of one process over the timed optimizer steps."""
    import torch
    from transformers import TrainerCallback

    from common import training

    class Clock(TrainerCallback):
        def __init__(self):
            self.ends, self.buckets = [], None

        def on_train_begin(self, *_, **__) -> None:
            if hardware.processes > 1:  # the gradients' second copy, in which DistributedDataParallel exchanges them
                trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
                self.buckets = torch.empty(trainable, dtype=torch.float32, device=hardware.device)

        def on_step_end(self, *_, **__) -> None:
            hardware.synchronize()
            self.ends.append(time.perf_counter())

    clock = Clock()
    trainer.add_callback(clock)
    training.train(trainer, hardware)  # finds the micro-batch that fits, as in the scripts
    if not trainer.optimizer.state:
        raise RuntimeError("every optimizer step was skipped: its state is missing from the memory that was measured")
    share = args.batch_size // hardware.processes
    return share * TIMED_STEPS / (clock.ends[-1] - clock.ends[WARM_UP_STEPS - 1])


def make_score(
    step: str, args: argparse.Namespace, configs: dict, hardware: device.Hardware, folder: Path
) -> Callable[[list[np.ndarray]], object]:
    """Ids to scores, as the scripts load and call the model; 02 takes hidden states along, 03 and 04b an adapter."""
    from common import distill

    pad_id = configs[MODELS[step]].pad_token_id
    if step == "03":
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / file).touch()  # `random_weights` reads neither
        model = llms.load_llm(step, hardware, folder)
        return lambda ids: scoring.score_llm(model, ids, LABEL_IDS, pad_id, hardware, args.batch_tokens)
    model = models.prepare_for_scoring(models.load_classifier(step), hardware)
    saved = getattr(args, "student_layers", None)
    layers = distill.mapped_layers(saved, model.config.num_hidden_layers) if saved else None
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

    args, config = defaults(step, tiny), configs[step]
    lora_r = getattr(args, "lora_r", 0)
    if work == "training":
        trainer = make_trainer(step, args, configs, hardware, folder)
        rate = time_training(trainer, args, hardware)
        lengths, micro_batch = [args.max_length], trainer.args.per_device_train_batch_size
        each = flop(config, args.max_length, True, lora_r, getattr(args, "gradient_checkpointing", False))
    else:
        lengths, micro_batch = [args.max_length], (args.batch_tokens or hardware.batch_tokens) // args.max_length
        if work == "scoring a mix":
            of_512 = LLM_LENGTHS if step == "03" else ENCODER_LENGTHS
            lengths = [math.ceil(length * args.max_length / 512) for length in of_512]
        ids = reviews(config, lengths * ((20 if tiny else SCORED[step]) // len(lengths)))
        rate = time_scoring(make_score(step, args, configs, hardware, folder), ids, hardware)
        each = np.mean([flop(config, length, lora_r=lora_r) for length in lengths])
    peak = memory.peak_mb() * 1e6 / 2**30
    reserved = torch.cuda.max_memory_reserved() / 2**30 if hardware.device == "cuda" else peak
    return {
        "tokens": round(float(np.mean(lengths)), 1),
        "micro_batch": micro_batch,
        "peak_gib": round(peak, 3),
        "reserved_gib": round(reserved, 3),
        "fits": reserved <= T4_GIB,
        "reviews_per_second": float(f"{rate:.4g}"),
        "tflops": float(f"{rate * each / 1e12:.4g}"),
    }


def run(output: Path, tiny: bool) -> pd.DataFrame:
    """Measure each step in each mode, what is wanted most first; the table is on disk after every row.

    Each row makes its own model in freed memory. One that fails says why, and the next is measured.
    """
    hardware = device.detect(argparse.Namespace(precision="auto"))  # in its own precision
    configs, rows = shapes(tiny), []
    for mode, work, step in itertools.product(MODES, WORKS, STEPS):
        started = time.perf_counter()
        row = {"gpu": hardware.name, "mode": mode, "step": step, "work": work}
        try:
            memory.free()
            with (
                conditions(mode, hardware) as here,
                random_weights(configs, here.device),
                tempfile.TemporaryDirectory() as folder,
            ):
                row |= {"precision": here.precision, "processes": here.processes}
                row |= measure(step, work, tiny, configs, here, Path(folder))
        except (Exception, SystemExit) as problem:  # SystemExit: a loader's or trainer's own stop
            row |= {"fits": False, "error": " ".join(f"{type(problem).__name__}: {problem}".split())}
        row["seconds"] = round(time.perf_counter() - started, 1)
        rows.append(row)
        print(row, flush=True)
        storage.write_table(output / "true_size.csv", pd.DataFrame(rows))
    return pd.DataFrame(rows)


def simulate(step: str, work: str, model: str, tiny: bool, configs: dict) -> dict:
    """The simulated memory of a step at its script's defaults, on one of two T4s; 05 uses one alone."""
    from experiments import simulate as fake

    args = defaults(model, tiny)
    with (
        conditions("as_t4", fake.FakeT4("cpu", "fp16", "a simulated T4")) as hardware,
        fake.fake_tensors() as live,
        random_weights(configs, quantise=fake.in_4_bits),
        tempfile.TemporaryDirectory() as folder,
    ):
        if work.startswith("training"):
            trainer = make_trainer(model, args, configs, hardware, Path(folder))
            micro_batch = trainer.args.per_device_train_batch_size
            resident = fake.train(live, trainer, hardware)
        else:
            args.student_layers = args.student_layers if step == "02" else None  # 05 takes no hidden states along
            micro_batch = (args.batch_tokens or hardware.batch_tokens) // args.max_length
            ids = reviews(configs[model], [args.max_length] * micro_batch)
            resident = fake.score(live, make_score(model, args, configs, hardware, Path(folder)), ids)
    row = {"step": step, "work": work, "micro_batch": micro_batch, "processes": 1 if step == "05" else GPUS}
    row |= {"resident_gib": round(resident / 2**30, 3), "peak_gib": round(live.peak / 2**30, 3)}
    return row | {"fits": row["peak_gib"] + LEFT_OUT_GIB <= T4_GIB}


def run_simulation(output: Path, tiny: bool) -> None:
    """Print the simulated memory beside a T4's, and write it after every row."""
    configs, rows = shapes(tiny), []
    print(
        "Simulated with fake tensors, not measured. Left out: CUDA's context, NCCL's buffers, workspaces and "
        f"fragmentation.\nA step fits if its peak and {LEFT_OUT_GIB} GiB for these (assumed) are at most {T4_GIB} GiB.",
        flush=True,
    )
    for step, work, model in SIMULATED:
        rows.append(simulate(step, work, model, tiny, configs))
        storage.write_table(output / "memory.csv", pd.DataFrame(rows))
    print(pd.DataFrame(rows).assign(there_gib=T4_GIB).to_string(index=False))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output-dir", type=Path, default=ROOT / "results" / "gpu", help="where the table is written")
    add("--plan", action="store_true", help="only the expected times")
    add("--simulate", action="store_true", help="only the simulated memory")
    add("--tiny", action="store_true", help="tiny shapes")
    args = parser.parse_args(argv)
    if args.plan:
        parts = plan.make()
        storage.write_table(args.output_dir / "plan.csv", parts.round(3))
        plan.show(parts)
    elif args.simulate:
        run_simulation(args.output_dir, args.tiny)
    else:
        print(run(args.output_dir, args.tiny).to_string(index=False))


if __name__ == "__main__":
    main()
