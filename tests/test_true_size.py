"""What the real sizes cost: measured on tiny shapes, simulated and planned; figures by hand or by another library."""

import dataclasses
import re
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CPU
from transformers import Trainer

from common import llms, memory, models, settings
from experiments import plan, true_size

GPU_RESULTS = plan.ROOT / "results" / "gpu"


@pytest.fixture
def few_steps(monkeypatch):
    for name, few in {"WARM_UP_STEPS": 1, "TIMED_STEPS": 2, "MODES": ["as_t4"]}.items():
        monkeypatch.setattr(true_size, name, few)


def test_each_step_gets_its_rows_of_finite_figures(tmp_path, few_steps):
    flash = torch.backends.cuda.flash_sdp_enabled()
    true_size.main(["--tiny", "--output-dir", str(tmp_path)])
    table = pd.read_csv(tmp_path / "true_size.csv")
    assert table.groupby(["work", "step"], sort=False).size().tolist() == [1] * 9
    figures = table[["tokens", "micro_batch", "peak_gib", "reserved_gib", "reviews_per_second", "tflops"]].to_numpy()
    assert np.isfinite(figures).all() and (figures > 0).all()
    assert table["fits"].all() and "error" not in table
    assert torch.backends.cuda.flash_sdp_enabled() == flash  # a mode leaves nothing behind


def test_a_row_that_fails_says_why_in_one_line_and_the_next_is_measured(tmp_path, monkeypatch):
    def measure(step, work, *_):
        if (step, work) == ("02", "training"):
            raise torch.OutOfMemoryError("too\nlarge")
        if step == "03":
            settings.stop("no adapter")
        return {"fits": True}

    monkeypatch.setattr(true_size, "measure", measure)
    true_size.main(["--tiny", "--output-dir", str(tmp_path)])
    table = pd.read_csv(tmp_path / "true_size.csv")
    assert table["mode"].tolist() == ["as_t4"] * 9 + ["as_itself"] * 9
    assert table["fits"].tolist() == [False, False, True, True, False, True, True, False, True] * 2
    assert table["error"].dropna().tolist()[:2] == ["OutOfMemoryError: too large", "Stop: no adapter"]


@pytest.mark.parametrize("step, processes", [("02", 2), ("04a", 1)])
def test_timed_steps_are_a_share_of_the_batch_without_a_checkpoint(tmp_path, monkeypatch, few_steps, step, processes):
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda *_, **__: pytest.fail("a checkpoint was written"))
    configs, args = plan.shapes(tiny=True), true_size.defaults(step, tiny=True)
    hardware = dataclasses.replace(CPU, processes=processes)
    with true_size.random_weights(configs):
        trainer = true_size.make_trainer(step, args, configs, hardware, tmp_path)
        assert true_size.time_training(trainer, args, hardware) > 0
    batch = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    assert batch * processes == 4 and trainer.state.global_step == 3
    parts = [weakref.ref(module) for module in trainer.model.modules()]
    del trainer
    memory.free()
    assert not any(part() for part in parts)  # it leaves memory before the next is measured


def test_the_shapes_are_those_of_the_real_models():
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    millions = {}
    for step, config in plan.shapes().items():
        kind = AutoModelForCausalLM if step == "03" else AutoModelForSequenceClassification
        with init_empty_weights():
            model = kind.from_config(config)
        millions[step] = round(model.num_parameters() / 1e6, 1)
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
def test_the_formula_counts_what_torch_counts_in_an_encoder(step, learn):
    configs = plan.shapes(tiny=True)
    with true_size.random_weights(configs):
        assert plan.flop(configs[step], 24, learn) == counted(models.load_classifier(step), 24, learn)


@pytest.mark.parametrize("learn, checkpointing", [(False, False), (True, False), (True, True)])
def test_the_formula_counts_what_torch_counts_in_an_llm_with_lora(learn, checkpointing):
    from transformers import AutoModelForCausalLM

    config, args = plan.shapes(tiny=True)["03"], true_size.defaults("03", tiny=True)
    args.gradient_checkpointing = checkpointing
    ours, torchs = [], []
    for layers in (2, 3):
        config.num_hidden_layers = layers
        model = AutoModelForCausalLM.from_config(config)  # unquantised: torch cannot see into products in 4 bits
        model.is_loaded_in_4bit = True  # else peft leaves checkpointing off
        torchs.append(counted(plan.script("03").with_lora(args, model), 24, learn))
        ours.append(plan.flop(config, 24, learn, args.lora_r, checkpointing))
    # A block is counted to the operation, but for its last product: no gradient asks to have it computed again.
    last = 2 * 24 * args.lora_r * config.hidden_size if checkpointing else 0
    assert ours[1] - ours[0] == torchs[1] - torchs[0] + last
    # The first block has less to do in training, for nothing before it learns.
    # (Below zero: transformers 5.0 computes the rotary angles as a matrix product.)
    assert -1e-3 <= (ours[0] - torchs[0]) / ours[0] <= learn * 0.2


def test_an_llm_made_in_4_bits_is_built_as_a_loaded_one(tiny):
    from bitsandbytes.nn import Linear4bit

    def described(model):
        in_4_bits = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
        return (
            [(m.compute_dtype, m.weight.quant_type, m.weight.quant_state.nested) for m in in_4_bits.values()],
            {name: type(module) for name, module in model.named_modules()},
            {name: (type(p), p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()},
            {name: (b.shape, b.dtype, b.sum().item()) for name, b in model.named_buffers()},
            (model.is_loaded_in_4bit, model.is_quantized, model.quantization_method, model.training),
            models.count(model),
        )

    loaded = llms.load_llm(str(tiny / "mistral"), CPU)
    with true_size.random_weights({"03": models.load_config(str(tiny / "mistral"))}):
        made = llms.load_llm("03", CPU)
    assert described(made) == described(loaded) and len(described(made)[0]) == 7 * made.config.num_hidden_layers
    with torch.inference_mode():
        assert made(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()


@pytest.mark.slow
def test_every_default_fits_one_of_two_t4s(tmp_path, capsys):
    true_size.main(["--simulate", "--output-dir", str(tmp_path)])
    now, committed = (pd.read_csv(folder / "memory.csv", dtype={"step": str}) for folder in (tmp_path, GPU_RESULTS))
    assert now["fits"].all()
    assert now.drop(columns=["resident_gib", "peak_gib"]).equals(committed.drop(columns=["resident_gib", "peak_gib"]))
    assert np.allclose(now["resident_gib"], committed["resident_gib"], rtol=0.02)
    assert np.allclose(now["peak_gib"], committed["peak_gib"], rtol=0.05)  # other versions keep a little more or less
    assert "Left out: CUDA's context" in capsys.readouterr().out


def test_the_committed_plan_is_what_the_code_makes_and_its_figures_add_up(tmp_path, capsys):
    true_size.main(["--plan", "--output-dir", str(tmp_path)])
    assert capsys.readouterr().out.count("under 12 h") == 2
    assert (tmp_path / "plan.csv").read_bytes() == (GPU_RESULTS / "plan.csv").read_bytes()
    table = pd.read_csv(tmp_path / "plan.csv", dtype={"step": str})
    rows = table.set_index(["step", "work"])
    assert rows["reviews"]["04a", "student, training"] == rows["reviews"]["04a", "control, training"] == 4 * 72_500
    assert rows["gb"]["02", "RoBERTa, checkpoints"] == pytest.approx(12 * 4.26, rel=0.01)
    assert rows["gb"]["02", "RoBERTa, gradient exchange"] == pytest.approx(3 * 22_500 / 32 * 1.42, rel=0.01)
    on_gpus, moved = table[table["gpus"] > 0], table[table["gb"].notna()]
    minutes = on_gpus["pflop"] * 1e15 / (9e12 * on_gpus["gpus"]) / 60
    assert np.allclose(minutes, on_gpus["minutes_at_9"], atol=0.002)
    assert np.allclose(moved["gb"] / moved["gb_per_s"] / 60, moved["minutes_at_9"], atol=0.002)


def test_readme_and_scripts_promise_what_the_plan_says():
    table, memory = (pd.read_csv(GPU_RESULTS / f"{one}.csv", dtype={"step": str}) for one in ("plan", "memory"))
    readme = " ".join((plan.ROOT / "README.md").read_text().split())
    steps = table.groupby("step")[["minutes_at_12", "minutes_at_9"]].sum()
    fast, slow = steps.sum() / 60
    assert f"{slow:.1f} hours at 9 TFLOP/s" in readme and f"{fast:.1f} at 12" in readme
    for step, gib in memory.groupby("step")["peak_gib"].max().items():
        assert re.search(rf"python {step}_\w+\.py # planned +\d+ minutes, +{gib:.1f} GiB", readme), step
    for step, (low, high) in zip(steps.index, steps.to_numpy()):
        assert re.search(rf"python {step}_\w+\.py # planned +{high:.0f} minutes", readme), step
        text = next(plan.ROOT.glob(f"{step}_*.py")).read_text()
        assert step == "01" or f"planned {low:.0f} to {high:.0f} minutes" in " ".join(text.split()), step


def test_the_committed_memory_is_what_the_code_takes_now():
    table = pd.read_csv(GPU_RESULTS / "memory.csv", dtype={"step": str})
    assert list(zip(table["step"], table["work"])) == [(step, work) for step, work, _ in true_size.SIMULATED]
    assert table["fits"].all()
    for number in (3, 9):  # a student in training and in scoring
        now, then = true_size.simulate(*true_size.SIMULATED[number], False, plan.shapes()), table.iloc[number]
        assert now["peak_gib"] == pytest.approx(then["peak_gib"], rel=0.05)
        assert now["resident_gib"] == pytest.approx(then["resident_gib"], rel=0.02)
