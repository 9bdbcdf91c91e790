import importlib.util
import sys
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from common import device, memory, models

CPU = device.Hardware("cpu", "fp32", "test")
FILE = Path(__file__).parent.parent / "results" / "true_size.py"


@pytest.fixture(scope="module")
def true_size():
    spec = importlib.util.spec_from_file_location("true_size", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_each_step_gets_its_rows_of_finite_figures(true_size, tmp_path, monkeypatch):
    monkeypatch.setattr(true_size, "WARM_UP_STEPS", 1)
    monkeypatch.setattr(true_size, "TIMED_STEPS", 2)
    flash = torch.backends.cuda.flash_sdp_enabled()
    true_size.main(["--tiny", "--modes", "as_t4", "--output-dir", str(tmp_path)])
    table = pd.read_csv(tmp_path / "true_size.csv", dtype={"step": str})
    assert list(zip(table["step"], table["work"])) == [(s, w) for s in true_size.STEPS for w in true_size.WORKS]
    figures = table[["tokens", "micro_batch", "peak_gib", "reserved_gib", "reviews_per_second", "tflops"]].to_numpy()
    assert np.isfinite(figures).all() and (figures > 0).all()
    assert table["fits"].all()
    assert torch.backends.cuda.flash_sdp_enabled() == flash  # a mode leaves nothing behind


def test_without_memory_a_row_says_so_and_the_next_is_measured(true_size, tmp_path, monkeypatch):
    def measure(step, work, *_):
        if work == "training":
            raise torch.OutOfMemoryError("too large")
        return {"fits": True, "reviews_per_second": 1.0}

    monkeypatch.setattr(true_size, "measure", measure)
    table = true_size.run(tmp_path, ["02"], ["as_itself"], tiny=True)
    assert table["fits"].tolist() == [False, True, True]
    assert np.isnan(table["reviews_per_second"][0])


def test_the_shapes_are_those_of_the_real_models(true_size):
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    millions = {}
    for step, config in true_size.shapes(tiny=False).items():
        kind = AutoModelForCausalLM if step == "03" else AutoModelForSequenceClassification
        with init_empty_weights():
            model = kind.from_config(config)
        millions[step] = round(model.num_parameters() / 1e6, 1)
        blocks = sum(p.numel() for name, p in model.named_parameters() if "layer" in name and p.ndim == 2)
        assert blocks == config.num_hidden_layers * sum(a * b for a, b in true_size.matrices(config))
    # RobertaForSequenceClassification has 355.4 M with its head, DistilBert's 67.0 M, Mistral 7,241.7 M
    assert millions == {"02": 355.4, "03": 7241.7, "04a": 67.0}


def counted(model, tokens: int, learn: bool = False) -> int:
    """FLOP that torch counts on one review; eager attention, for a CPU's fused kernel has no formula there."""
    from torch.utils.flop_counter import FlopCounterMode

    model.set_attn_implementation("eager")
    inputs = {"input_ids": torch.full((1, tokens), 7), "attention_mask": torch.ones(1, tokens, dtype=torch.int64)}
    if model.config.model_type == "mistral":
        inputs |= {"logits_to_keep": 1, "use_cache": False}
    with FlopCounterMode(display=False) as counter:
        logits = model.train(learn)(**inputs).logits
        if learn:
            logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("step", ["02", "04a"])
def test_the_formula_counts_what_torch_counts_in_an_encoder(true_size, step, learn):
    configs = true_size.shapes(tiny=True)
    with true_size.random_weights(configs):
        assert true_size.flop(configs[step], 24, learn) == counted(models.load_classifier(step), 24, learn)


@pytest.mark.parametrize("learn, checkpointing", [(False, False), (True, False), (True, True)])
def test_the_formula_counts_what_torch_counts_in_an_llm_with_lora(true_size, learn, checkpointing):
    from transformers import AutoModelForCausalLM

    config, args = true_size.shapes(tiny=True)["03"], true_size.defaults("03", tiny=True)
    args.gradient_checkpointing = checkpointing
    ours, torchs = [], []
    for layers in (2, 3):
        config.num_hidden_layers = layers
        model = AutoModelForCausalLM.from_config(config)  # unquantised: torch cannot see into products in 4 bits
        model.is_loaded_in_4bit = True  # else peft leaves checkpointing off
        torchs.append(counted(true_size.script("03").with_lora(args, model), 24, learn))
        ours.append(true_size.flop(config, 24, learn, args.lora_r, checkpointing))
    # A block is counted to the operation, but for its last product: no gradient asks to have it computed again.
    last = 2 * 24 * args.lora_r * config.hidden_size if checkpointing else 0
    assert ours[1] - ours[0] == torchs[1] - torchs[0] + last
    # The first block has less to do in training, for nothing before it learns.
    # (Below zero: transformers 5.0 computes the rotary angles as a matrix product.)
    assert -1e-3 <= (ours[0] - torchs[0]) / ours[0] <= learn * 0.2


def test_an_llm_made_in_4_bits_is_built_as_a_loaded_one(true_size, tiny):
    from bitsandbytes.nn import Linear4bit

    def described(model):
        return {
            "modules": {name: type(module) for name, module in model.named_modules()},
            "weights": {name: (type(p), p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()},
            "buffers": {name: (b.shape, b.dtype, b.sum().item()) for name, b in model.named_buffers()},
            "4-bit": {
                name: (m.compute_dtype, m.weight.quant_type, m.weight.quant_state.nested, m.support_avx512bf16_for_cpu)
                for name, m in model.named_modules()
                if isinstance(m, Linear4bit)
            },
            "marks": (model.is_loaded_in_4bit, model.is_quantized, model.quantization_method, model.training),
            "size": models.count(model),
        }

    loaded = models.load_llm(str(tiny / "mistral"), CPU)
    with true_size.random_weights({"03": models.load_config(str(tiny / "mistral"))}):
        made = models.load_llm("03", CPU)
    assert described(made) == described(loaded)
    assert len(described(made)["4-bit"]) == 7 * made.config.num_hidden_layers
    assert type(made.lm_head) is torch.nn.Linear
    with torch.inference_mode():
        assert made(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_a_measured_model_leaves_memory_before_the_next(true_size, tmp_path, monkeypatch):
    monkeypatch.setattr(true_size, "TIMED_STEPS", 1)
    configs, args = true_size.shapes(tiny=True), true_size.defaults("03", tiny=True)
    with true_size.random_weights(configs):
        trainer = true_size.make_trainer("03", args, configs, CPU, tmp_path)
        true_size.time_training(trainer, args, CPU)
    trainer.args.optim, trainer.optimizer = "paged_adamw_8bit", None
    trainer.create_optimizer()  # a GPU's, which keeps the embeddings
    parts = [weakref.ref(module) for module in trainer.model.modules()]
    del trainer
    memory.free()
    assert not any(part() for part in parts)


def test_the_plan_adds_up_and_stays_under_its_limit(true_size, tmp_path, capsys):
    true_size.main(["--plan", "--output-dir", str(tmp_path)])
    plan = pd.read_csv(tmp_path / "plan.csv", dtype={"step": str})
    assert sorted(set(plan["step"])) == ["01", "02", "03", "04a", "04b", "05"]
    reviews = plan.set_index(["step", "work"])["reviews"]
    assert reviews["02", "RoBERTa, soft labels"] == 75_000
    assert reviews["04b", "Mistral, soft labels"] == 45_000
    assert reviews["04a", "student, training"] == reviews["04a", "control, training"] == 4 * 72_500
    on_gpus = plan[plan["gpus"] > 0]
    for rate in true_size.RATES:
        minutes = on_gpus["pflop"] * 1e15 / (rate * 1e12 * on_gpus["gpus"]) / 60
        assert np.allclose(minutes, on_gpus[f"minutes_at_{rate}"], atol=0.002)
        assert plan[f"minutes_at_{rate}"].sum() < 60 * true_size.LIMIT_HOURS
    assert f"under {true_size.LIMIT_HOURS} h" in capsys.readouterr().out


def test_a_batch_in_dataset_order_is_padded_to_its_longest(true_size):
    assert true_size.padded([10, 20], 1) == [15]
    assert true_size.padded([10, 20], 2) == [17.5]  # of four pairs one is short
