import argparse

import numpy as np
import pandas as pd
import pytest
import torch

from common import data, device, llms, models, scoring, training, verbalizer
from common.verbalizer import LABEL_WORDS, PROMPT

CPU = device.Hardware("cpu", "fp32", "test")
load_llm = llms.load_llm
TEXTS = ["The plot is dull.", "The plot is not dull at all.", "A moving film, " * 8, "ok"]


@pytest.fixture(scope="module")
def batch(tiny):
    tokenizer = models.load_tokenizer(str(tiny / "mistral"))
    ids = verbalizer.encode_prompts(tokenizer, TEXTS, PROMPT, 128)
    labels = verbalizer.label_token_ids(tokenizer, PROMPT, LABEL_WORDS)
    return ids, labels, tokenizer


def with_lora(tiny, script, checkpointing=False):
    args = argparse.Namespace(gradient_checkpointing=checkpointing, lora_r=4, lora_alpha=8, lora_dropout=0.0)
    torch.manual_seed(0)
    model = script("03").with_lora(args, llms.load_llm(str(tiny / "mistral"), CPU))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, and then lora_A would have no gradient to compare
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def gradients(model, batch) -> dict[str, torch.Tensor]:
    ids, labels, tokenizer = batch
    model.train()
    model.zero_grad()
    logits = llms.last_logits(model, *data.pad(ids, tokenizer.pad_token_id)).float()
    torch.nn.functional.cross_entropy(logits, torch.tensor([labels[row % 2] for row in range(len(ids))])).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_neither_an_evaluation_before_nor_gradient_checkpointing_changes_a_gradient(tiny, script, batch):
    # With AVX512-BF16 bitsandbytes would repack the weights in the evaluation, and the gradients would be others.
    ids, labels, tokenizer = batch
    fresh, evaluated = gradients(with_lora(tiny, script), batch), with_lora(tiny, script)
    scoring.score_llm(evaluated.eval(), ids, labels, tokenizer.pad_token_id, CPU, 512)
    for model in (evaluated, with_lora(tiny, script, checkpointing=True)):
        for name, gradient in gradients(model, batch).items():
            assert gradient.norm() > 0
            torch.testing.assert_close(gradient, fresh[name], rtol=1e-4, atol=1e-7, msg=name)


def test_every_linear_projection_is_quantised_and_adapted_and_only_adapters_train(tiny, script):
    import bitsandbytes

    model = with_lora(tiny, script)
    names = {name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert names == {"base_layer"}
    adapted = {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_the_loss_is_that_of_the_label_token_in_the_full_sequence(tiny, script, batch, tmp_path):
    ids, labels, tokenizer = batch
    model = with_lora(tiny, script).eval()
    args = argparse.Namespace(epochs=1, learning_rate=1e-3, batch_size=4, micro_batch_size=4, weight_decay=0.0,
                              warmup_fraction=0.0, seed=0)  # fmt: skip
    dataset = data.ReviewDataset(ids, np.array([0, 1, 1, 0]))
    trainer = training.LabelWordTrainer(
        label_ids=labels,
        model=model,
        args=training.training_arguments(args, CPU, tmp_path, 4),
        train_dataset=dataset,
        eval_dataset=dataset,
    )
    inputs = data.Collator(tokenizer.pad_token_id)([dataset[row] for row in range(4)])
    losses = []
    for one, label in zip(ids, dataset.labels):  # the plain way: prompt and label word, every other token ignored
        sequence = torch.tensor([[*one.tolist(), labels[label]]])
        target = torch.full_like(sequence, -100)
        target[0, -1] = labels[label]
        losses.append(model(input_ids=sequence, labels=target).loss.item())
    assert trainer.compute_loss(model, inputs).item() == pytest.approx(np.mean(losses), abs=1e-4)


def test_a_saved_adapter_scores_as_it_did_in_the_precision_that_it_computes_in(tiny, script, batch, tmp_path):
    ids, labels, tokenizer = batch
    bf16, model = device.Hardware("cpu", "bf16", "CPU"), with_lora(tiny, script).eval()
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


def test_an_adapter_of_another_base_is_refused(tiny, script, batch, tmp_path, stops):
    from transformers import AutoModelForCausalLM

    training.save(with_lora(tiny, script), batch[2], tmp_path / "adapter", tmp_path / "none")
    config = models.load_config(str(tiny / "mistral"))
    config.intermediate_size *= 2
    batch[2].save_pretrained(tmp_path / "other")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    stops(lambda: llms.load_llm(str(tmp_path / "other"), CPU, tmp_path / "adapter"), "is no adapter of", "--force")


def test_03_trains_with_the_same_plain_optimizer_on_a_gpu_as_here(tiny, script, tmp_path, monkeypatch):
    """A paged one cannot go on in two processes: its saved state comes back as memory that CUDA does not page."""
    script_03, chosen = script("03"), []
    arguments = training.training_arguments

    def recorded(args, hardware, checkpoints, rows, **more):
        chosen.append(arguments(args, CPU, checkpoints, rows, **more).optim)  # a CPU has no GPU's arguments
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "training_arguments", recorded)
    monkeypatch.setattr(llms, "load_llm", lambda name, hardware: load_llm(name, CPU))
    flags = ["--mistral-model", str(tiny / "mistral"), "--max-length", "96"]
    args, tokenizer = script_03.parse_args(flags), models.load_tokenizer(str(tiny / "mistral"))
    reviews = pd.DataFrame({"text": TEXTS, "label": [0, 0, 1, 1]})
    part = data.Reviews(train=reviews, validation=reviews, transfer=reviews, test=reviews, fingerprints={})
    for hardware in (device.Hardware("cuda", "fp16", "pretended", 2), CPU):
        with pytest.raises(KeyboardInterrupt):
            script_03.finetune(args, hardware, tmp_path, tokenizer, [5, 6], part)
    assert chosen[0] == chosen[1] and "paged" not in chosen[0] and "8bit" not in chosen[0]


def test_no_token_of_a_padded_batch_is_without_a_token_to_attend_to(tiny, batch):
    """A causal LM reads the padding after the review, so the padding changes nothing and attention needs no mask."""
    ids, _, tokenizer = batch
    model, masks = llms.load_llm(str(tiny / "mistral"), CPU), []
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda _, args, given: masks.append(given["attention_mask"]), with_kwargs=True)
    with torch.inference_mode():
        together = llms.last_logits(model, *data.pad(ids, tokenizer.pad_token_id))
        alone = torch.cat([llms.last_logits(model, *data.pad([one], tokenizer.pad_token_id)) for one in ids])
    assert len({len(one) for one in ids}) > 1 and masks == [None] * (1 + len(ids))
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)
