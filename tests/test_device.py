import argparse

import pytest
import torch

from common import device


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that GPUs of this compute capability are there, the last one perhaps of another, and what torch has."""

    def pretend(*capability, count=1, last=None, builds=""):
        capabilities = [capability] * (count - 1) + [last or capability]
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "pretended")
        monkeypatch.setattr(torch.cuda, "get_arch_list", builds.split)

    return pretend


def detect(precision="auto", **flags):
    return device.detect(argparse.Namespace(precision=precision, **flags))


@pytest.mark.parametrize(
    ("capability", "asked", "expected"),
    [
        ((7, 5), "auto", "fp16"),
        ((7, 5), "bf16", "no bf16 arithmetic: pass --precision fp16"),  # torch would emulate it
        ((8, 0), "auto", "bf16"),
        ((9, 0), "auto", "bf16"),
        (None, "auto", "fp32"),
        (None, "bf16", "bf16"),
        (None, "fp16", "fp16 needs a GPU and none is in sight: pass --precision fp32"),
    ],
)
def test_a_device_runs_in_the_precision_that_it_has_and_refuses_another(gpu, stops, capability, asked, expected):
    if capability:
        gpu(*capability)
    if ":" in expected:
        stops(lambda: detect(asked), expected)
    else:
        dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        assert detect(asked).dtype is dtypes[expected]


def test_every_gpu_in_sight_gets_a_process_unless_told_otherwise_and_one_process_sees_the_first_alone(
    gpu, monkeypatch, stops
):
    gpu(7, 5, count=2)
    for flags, processes, seen in (({"num_processes": None}, 2, "2,3"), ({"num_processes": 1}, 1, "2"), ({}, 1, "2")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")  # the benchmark has no such flag
        assert detect(**flags).processes == processes and device.os.environ["CUDA_VISIBLE_DEVICES"] == seen
    stops(lambda: detect(num_processes=3), "--num-processes 3", "2 GPUs")


def test_gpus_of_two_generations_train_in_one_precision(gpu, monkeypatch):
    gpu(8, 6, count=2, last=(7, 5))
    assert detect(num_processes=None).precision == "fp16"  # bf16 has no scaler, and they average their gradients
    gpu(8, 6, count=2, last=(7, 5))
    assert detect(num_processes=1).precision == "bf16"
    gpu(8, 6, count=3, last=(7, 5))
    assert detect(num_processes=2).precision == "bf16"  # the third GPU is not used
    gpu(8, 6)
    monkeypatch.setattr(device, "gather", lambda mine: [mine, "fp16"])  # the GPU of another machine
    assert detect().precision == "fp16"


KAGGLES = "sm_70 sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"


@pytest.mark.parametrize(
    ("capability", "builds", "runs"),
    [
        ((6, 0), KAGGLES, False),  # a P100, which Kaggle offers too
        ((7, 5), KAGGLES, True),
        ((8, 9), KAGGLES, True),  # machine code of an earlier minor version
        ((7, 0), "sm_75 sm_80", False),
        ((9, 0), "sm_75 sm_80", False),  # machine code of an earlier generation
        ((12, 1), "sm_90a compute_90", True),
        ((8, 0), "sm_90a compute_90", False),
        ((6, 0), "", True),  # a torch that does not say
        ((9, 4), "gfx90a gfx942", True),  # AMD's
    ],
)
def test_a_gpu_for_which_torch_has_no_code_is_refused_before_anything_is_downloaded(
    gpu, stops, capability, builds, runs
):
    gpu(*capability, builds=builds)
    if runs:
        assert detect().device == "cuda"
    else:
        stops(detect, "no code for it", "GPU T4 x2", "CUDA_VISIBLE_DEVICES=")


def test_a_driver_too_old_for_torch_is_one_sentence(gpu, monkeypatch, stops):
    gpu(8, 0)

    def fails():
        raise RuntimeError("the driver is too old\nand more")

    monkeypatch.setattr(torch.cuda, "get_device_name", fails)
    stops(detect, "(the driver is too old)", "update its driver")


@pytest.mark.parametrize("reach", [False, True])
def test_gpus_that_cannot_reach_each_other_exchange_through_host_memory(gpu, monkeypatch, reach):
    gpu(8, 9, count=2)
    names = ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE")
    for name in names:
        monkeypatch.setenv(name, "")  # which the test's end takes back
        monkeypatch.delenv(name)
    monkeypatch.setattr("accelerate.utils.check_cuda_p2p_ib_support", lambda: reach)
    detect(num_processes=None)
    assert [device.os.environ.get(name) for name in names] == [None if reach else "1"] * 2


def test_a_gpu_attends_without_cudnn(gpu, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", chosen.append)
    detect()
    assert chosen == []
    gpu(9, 0)
    detect()
    assert chosen == [False]


def torchrun(monkeypatch, rank):
    """Set the variables of one of two processes."""
    for name, value in {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")


def test_the_benchmark_is_no_work_for_several_processes(monkeypatch, stops):
    torchrun(monkeypatch, rank="0")
    stops(detect, "torchrun")
    stops(lambda: device.first_alone(lambda: None), "torchrun")  # as 01 would, which has no GPU to choose


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "2"), ("RANK", "1")])
def test_a_schedulers_variable_alone_is_no_torchrun(monkeypatch, name, value):
    for one in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(one, raising=False)
    monkeypatch.setenv(name, value)
    assert device.world_size() == 1 and device.rank() == 0 and detect().processes == 1


def test_a_process_names_its_own_gpu_to_the_group_and_leaves_it_when_all_is_said(gpu, monkeypatch):
    gpu(7, 5, count=2)
    torchrun(monkeypatch, rank="1")
    joined, left, group = {}, [], torch.distributed
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: joined.update(current=index))
    monkeypatch.setattr(group, "init_process_group", lambda kind, **how: joined.update(how, kind=kind))
    monkeypatch.setattr(group, "all_gather_object", lambda values, value: None)
    monkeypatch.setattr(group, "destroy_process_group", lambda: left.append(True))
    monkeypatch.setattr(device.sys, "stdout", device.sys.stdout)
    detect(num_processes=2, batch_size=2)
    assert (joined["kind"], joined["device_id"], joined["current"]) == ("nccl", torch.device("cuda", 1), 1)
    device.gather(1)
    assert not left
    device.gather(2, last=True)
    assert left


def test_the_first_process_decides_whether_the_time_is_over(monkeypatch):
    detect(max_hours=1e-9)
    assert device.out_of_time() and device.seconds_left() < 0
    monkeypatch.setattr(device, "share", lambda late: not late)  # the first process's clock says otherwise
    assert not device.out_of_time()
    monkeypatch.setattr(device, "share", lambda _: pytest.fail("processes that have no limit need not agree"))
    detect(max_hours=None)
    assert not device.out_of_time()


def test_the_started_processes_get_what_is_left_of_the_time(gpu, monkeypatch):
    gpu(7, 5, count=2)
    given = []
    monkeypatch.setattr("torch.distributed.run.main", given.extend)
    hardware = detect(num_processes=2, max_hours=2.0)
    monkeypatch.setattr(device, "_deadline", device.time.monotonic() + 1800)
    with pytest.raises(SystemExit):
        device.one_process_per_gpu(argparse.Namespace(), hardware, "02.py", ["--max-hours", "2"])
    last = [word for word in given if word.startswith("--max-hours")][-1]
    assert float(last.partition("=")[2]) == pytest.approx(0.5, abs=0.01)
