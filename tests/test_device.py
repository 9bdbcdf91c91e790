import pytest
import torch

from common import device


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that a GPU of this compute capability is there."""

    def pretend(*capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "pretended")

    return pretend


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_is_fp16_on_a_t4_and_bf16_from_8_0_on(gpu, capability, precision):
    gpu(*capability)
    assert device.detect("auto").precision == precision


def test_emulated_bf16_on_a_t4_is_refused(gpu, stops):
    gpu(7, 5)
    stops(lambda: device.detect("bf16"), "no bf16", "--precision fp16")


def test_a_cpu_runs_in_fp32_or_on_request_in_bf16_and_never_in_fp16(stops):
    assert device.detect("auto").precision == "fp32"
    assert device.detect("bf16").dtype is torch.bfloat16
    stops(lambda: device.detect("fp16"), "fp16 needs a GPU")


def test_only_the_first_of_several_gpus_is_in_sight(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    device.detect("auto")
    assert device.os.environ["CUDA_VISIBLE_DEVICES"] == "2"


def test_several_processes_are_refused(monkeypatch, stops):
    monkeypatch.setenv("WORLD_SIZE", "2")
    stops(lambda: device.detect("auto"), "torchrun")
