"""Causal LMs in 4 bits and their adapters."""

import inspect
import os

import numpy as np
import pytest
import torch
from conftest import CPU, training_args

from common import device, encoding, llms, models, patches, scoring, training, verbalizer
from common.verbalizer import LABEL_WORDS, PROMPT

TEXTS = ["The plot is dull.", "The plot is not dull at all.", "A moving film, " * 8, "ok"]


@pytest.fixture(scope="module")
def batch(tiny):
    tokenizer = models.load_tokenizer(str(tiny / "mistral"))
    ids = verbalizer.encode_prompts(tokenizer, TEXTS, PROMPT, 128)
    labels = verbalizer.label_token_ids(tokenizer, PROMPT, LABEL_WORDS)
    return ids, labels, tokenizer


def gradients(model, batch) -> dict[str, torch.Tensor]:
    ids, labels, tokenizer = batch
    model.train()
    model.zero_grad()
    logits = llms.last_logits(model, *encoding.pad(ids, tokenizer.pad_token_id)).float()
    torch.nn.functional.cross_entropy(logits, torch.tensor([labels[row % 2] for row in range(len(ids))])).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_neither_an_evaluation_before_nor_gradient_checkpointing_changes_a_gradient(with_lora, batch):
    # With AVX512-BF16 bitsandbytes would repack the weights in the evaluation, and the gradients would be others.
    ids, labels, tokenizer = batch
    fresh, evaluated = gradients(with_lora(), batch), with_lora()
    scoring.score_llm(evaluated.eval(), ids, labels, tokenizer.pad_token_id, CPU, 512)
    for model in (evaluated, with_lora(gradient_checkpointing=True)):
        for name, gradient in gradients(model, batch).items():
            assert gradient.norm() > 0
            torch.testing.assert_close(gradient, fresh[name], rtol=1e-4, atol=1e-7, msg=name)


def test_every_linear_projection_is_quantised_and_adapted_and_only_adapters_train(with_lora):
    import bitsandbytes

    model = with_lora()
    names = {name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert names == {"base_layer"}
    adapted = {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_the_loss_is_that_of_the_label_token_in_the_full_sequence(with_lora, batch, tmp_path):
    ids, labels, tokenizer = batch
    model = with_lora().eval()
    dataset = encoding.ReviewDataset(ids, np.array([0, 1, 1, 0]))
    trainer = training.LabelWordTrainer(
        label_ids=labels,
        model=model,
        args=training.training_arguments(training_args(), CPU, tmp_path, 4),
        train_dataset=dataset,
        eval_dataset=dataset,
    )
    inputs = encoding.Collator(tokenizer.pad_token_id)([dataset[row] for row in range(4)])
    losses = []
    for one, label in zip(ids, dataset.labels):  # the plain way: prompt and label word, every other token ignored
        sequence = torch.tensor([[*one.tolist(), labels[label]]])
        target = torch.full_like(sequence, -100)
        target[0, -1] = labels[label]
        losses.append(model(input_ids=sequence, labels=target).loss.item())
    assert trainer.compute_loss(model, inputs).item() == pytest.approx(np.mean(losses), abs=1e-4)


def test_a_saved_adapter_scores_as_it_did_in_the_precision_that_it_computes_in(tiny, with_lora, batch, tmp_path):
    ids, labels, tokenizer = batch
    bf16, model = device.Hardware("cpu", "bf16", "CPU"), with_lora().eval()
    before = scoring.score_llm(model, ids, labels, tokenizer.pad_token_id, CPU, 512)
    training.save(model, tokenizer, tmp_path / "adapter", tmp_path / "none")
    again = llms.load_llm(str(tiny / "mistral"), CPU, tmp_path / "adapter")
    after = scoring.score_llm(again, ids, labels, tokenizer.pad_token_id, CPU, 512)
    np.testing.assert_allclose(after, before, atol=1e-5)
    model = llms.load_llm(str(tiny / "mistral"), bf16, tmp_path / "adapter")
    adapter = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    assert {parameter.dtype for parameter in adapter} == {torch.bfloat16}
    scores = scoring.score_llm(model, ids, labels, tokenizer.pad_token_id, bf16, 512)
    for parameter in adapter:
        parameter.data = parameter.data.float()  # as peft loads it: autocast casts it at every call
    assert np.array_equal(scoring.score_llm(model, ids, labels, tokenizer.pad_token_id, bf16, 512), scores)


def test_an_adapter_of_another_base_is_refused(tiny, with_lora, batch, tmp_path, stops):
    from transformers import AutoModelForCausalLM

    training.save(with_lora(), batch[2], tmp_path / "adapter", tmp_path / "none")
    config = models.load_config(str(tiny / "mistral"))
    config.intermediate_size *= 2
    batch[2].save_pretrained(tmp_path / "other")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    stops(lambda: llms.load_llm(str(tmp_path / "other"), CPU, tmp_path / "adapter"), "is no adapter of", "--force")


def test_03_trains_with_a_plain_optimizer(script, tmp_path):
    """A paged one cannot go on in two processes: its saved state comes back as memory that CUDA does not page."""
    for hardware in (CPU, device.Hardware("cuda", "fp32", "pretended", 2)):
        assert training.training_arguments(training_args(), hardware, tmp_path, 4).optim.startswith("adamw_torch")
    assert "optim" not in inspect.getsource(script("03"))


def test_a_4_bit_models_parameters_are_those_of_the_model_before_quantisation(tiny):
    from transformers import AutoModelForCausalLM

    unquantised = AutoModelForCausalLM.from_pretrained(tiny / "mistral", dtype=torch.float32)
    parameters, weight_bytes = models.count(llms.load_llm(str(tiny / "mistral"), CPU))
    assert parameters == unquantised.num_parameters()
    linear = sum(m.weight.numel() for n, m in unquantised.named_modules() if n.endswith("_proj"))
    others = parameters - linear
    # Half a byte a weight, then one 8-bit constant for each 64 of them and what double quantisation adds.
    assert 4 * others + linear * 0.5 < weight_bytes < 4 * others + linear * (0.5 + 1 / 64) + 40_000


@pytest.mark.parametrize(
    ("precision", "capability", "slow"), [("fp16", (7, 5), True), ("fp32", (9, 0), True), ("bf16", (9, 0), False)]
)
def test_an_adapter_and_its_base_are_loaded_on_the_processes_own_gpu_a_weight_at_a_time(
    tiny, tmp_path, monkeypatch, precision, capability, slow
):
    import peft
    from transformers import AutoModelForCausalLM

    loaded, base = {}, llms.load_llm(str(tiny / "mistral"), CPU)

    def pretrained(name, **how):
        loaded.update(device_map=how["device_map"], loads_in_turn=os.environ.get("HF_DEACTIVATE_ASYNC_LOAD"))
        return base, {"missing_keys": [], "mismatched_keys": []}

    def adapter(model, folder, torch_device):
        loaded.update(torch_device=torch_device)
        return model

    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD", raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    repaired = []
    for name in ("avoid_gqa_kernel", "read_adapters_to_the_own_gpu"):
        monkeypatch.setattr(patches, name, lambda name=name: repaired.append(name))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", pretrained)
    monkeypatch.setattr(llms, "refuse_reading_ahead", lambda *_: None)
    monkeypatch.setattr(peft.PeftModel, "from_pretrained", adapter)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).touch()
    llms.load_llm(str(tiny / "mistral"), device.Hardware("cuda", precision, "pretended", 2), tmp_path)
    assert repaired == ["read_adapters_to_the_own_gpu", *["avoid_gqa_kernel"] * slow]
    assert loaded == {"device_map": {"": "cuda:1"}, "torch_device": "cuda:1", "loads_in_turn": "1"}


def test_each_process_reads_an_adapter_to_its_own_gpu(tiny, tmp_path, monkeypatch):
    import peft

    model = peft.get_peft_model(
        llms.load_llm(str(tiny / "mistral"), CPU), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path)
    asked, read = [], peft.peft_model.load_peft_weights
    monkeypatch.setattr(
        peft.peft_model, "load_peft_weights", lambda name, device, **more: asked.append(device) or read(name, "cpu")
    )
    monkeypatch.setattr(peft.peft_model, "infer_device", lambda: "cuda")  # what peft finds on a machine with GPUs
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    model.load_adapter(tmp_path, "default", is_trainable=True)  # Trainer's call
    patches.read_adapters_to_the_own_gpu()
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert asked == ["cuda", "cuda:1"]


def test_below_8_0_and_in_fp32_grouped_queries_are_repeated(monkeypatch):
    from transformers.integrations import sdpa_attention

    if not hasattr(sdpa_attention, "use_gqa_in_sdpa"):
        pytest.skip("this transformers repeats them always")
    keys = [torch.ones(1, 2, 4, 8)] * (len(inspect.signature(sdpa_attention.use_gqa_in_sdpa).parameters) - 1)
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)
    assert sdpa_attention.use_gqa_in_sdpa(None, *keys)  # without a mask, as in a batch of equal lengths
    patches.avoid_gqa_kernel()
    assert not sdpa_attention.use_gqa_in_sdpa(None, *keys)
