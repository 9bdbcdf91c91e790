import inspect

import numpy as np
import pytest
import torch

from common import data, device, llms, models, patches

CPU = device.Hardware("cpu", "fp32", "test")


@pytest.mark.parametrize("role", ["roberta", "distilbert"])
def test_an_encoders_input_is_what_its_own_tokenizer_makes_of_a_short_text(tiny, role):
    tokenizer = models.load_tokenizer(str(tiny / role))
    texts = ["The plot is dull.", "", "😀 Привет 世界"]
    for ids, text in zip(data.encode(tokenizer, texts, 64), texts):
        assert ids.tolist() == tokenizer(text)["input_ids"]


def test_truncation_keeps_a_quarter_of_the_head_and_the_rest_of_the_tail(tiny):
    assert data.head_and_tail(list(range(100)), 8) == [0, 1, 94, 95, 96, 97, 98, 99]
    assert data.head_and_tail([1, 2], 8) == [1, 2]
    tokenizer = models.load_tokenizer(str(tiny / "distilbert"))
    (ids,) = data.encode(tokenizer, ["dull " * 400], 32)
    assert len(ids) == 32 and ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id


@pytest.mark.parametrize(("role", "typed"), [("roberta", "</s> <mask>"), ("distilbert", "[SEP] [MASK]")])
def test_a_special_token_in_a_review_is_plain_text(tiny, role, typed):
    tokenizer = models.load_tokenizer(str(tiny / role))
    (ids,) = data.encode(tokenizer, [f"good {typed} bad"], 64)
    assert not set(ids[1:-1].tolist()) & (set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})


def test_parameters_and_bytes_are_counted(tiny):
    model = models.load_classifier(str(tiny / "roberta"))
    parameters = sum(np.prod(tensor.shape) for tensor in model.state_dict().values() if tensor.is_floating_point())
    assert models.count(model) == (parameters, 4 * parameters)


def test_a_4_bit_models_parameters_are_those_of_the_model_before_quantisation(tiny):
    from transformers import AutoModelForCausalLM

    unquantised = AutoModelForCausalLM.from_pretrained(tiny / "mistral", dtype=torch.float32)
    parameters, weight_bytes = models.count(llms.load_llm(str(tiny / "mistral"), CPU))
    assert parameters == unquantised.num_parameters()
    linear = sum(m.weight.numel() for n, m in unquantised.named_modules() if n.endswith("_proj"))
    others = parameters - linear
    # Half a byte a weight, then one 8-bit constant for each 64 of them and what double quantisation adds.
    assert 4 * others + linear * 0.5 < weight_bytes < 4 * others + linear * (0.5 + 1 / 64) + 40_000


def test_a_folder_that_is_no_model_and_a_missing_folder_are_told_apart(tmp_path, stops):
    stops(lambda: models.load_tokenizer(str(tmp_path)), "no config.json")
    stops(lambda: models.load_classifier("./nowhere"), "does not exist")


def test_an_adapter_and_its_base_are_loaded_on_the_processes_own_gpu_a_weight_at_a_time(tiny, tmp_path, monkeypatch):
    import os

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
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", pretrained)
    monkeypatch.setattr(llms, "refuse_reading_ahead", lambda *_: None)
    monkeypatch.setattr(peft.PeftModel, "from_pretrained", adapter)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).touch()
    llms.load_llm(str(tiny / "mistral"), device.Hardware("cuda", "fp16", "pretended", 2), tmp_path)
    assert loaded == {"device_map": {"": "cuda:1"}, "torch_device": "cuda:1", "loads_in_turn": "1"}


def test_below_8_0_grouped_queries_are_repeated(monkeypatch):
    from transformers.integrations import sdpa_attention

    if not hasattr(sdpa_attention, "use_gqa_in_sdpa"):
        pytest.skip("this transformers repeats them always")
    keys = [torch.ones(1, 2, 4, 8)] * (len(inspect.signature(sdpa_attention.use_gqa_in_sdpa).parameters) - 1)
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)
    assert sdpa_attention.use_gqa_in_sdpa(None, *keys)  # without a mask, as in a batch of equal lengths
    patches.avoid_gqa_kernel()
    assert not sdpa_attention.use_gqa_in_sdpa(None, *keys)
