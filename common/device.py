"""The device, the precision, the seed, one process per GPU and what they exchange, and the time limit."""

import argparse
import ctypes
import datetime
import logging
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, TypeVar

from common import patches, settings
from common.settings import stop

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
# Set in the processes that `one_process_per_gpu` starts. Their parent has printed the settings and opened the folder.
STARTED = "SENTIMENT_STARTED_BY"
# How long processes wait for rank 0. Its longest task is joining 75,000 reviews' features on a slow disk.
PATIENCE = datetime.timedelta(hours=2)
_deadline = math.inf  # on the clock of time.monotonic(); `detect` sets it from --max-hours


@dataclass(frozen=True)
class Hardware:
    """The device and the precision in which a model runs."""

    device: str  # "cuda" (this process's GPU) or "cpu"
    precision: str  # "fp32", "bf16" or "fp16"
    name: str
    processes: int = 1  # in this run, on all machines together

    @property
    def dtype(self) -> "torch.dtype":
        """The dtype of the arithmetic."""
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    @property
    def batch_tokens(self) -> int:
        """Padded tokens per scoring batch: enough to fill a GPU, few enough for a CPU's caches."""
        return 8192 if self.device == "cuda" else 2048

    def autocast(self) -> AbstractContextManager:
        """A context for mixed precision on fp32 weights; it does nothing in fp32."""
        import torch

        return torch.autocast(self.device, self.dtype, enabled=self.precision != "fp32")

    def synchronize(self) -> None:
        """Wait for the GPU. Without this a clock measures only the launch."""
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()


def world_size() -> int:
    """The number of processes that share this step: torchrun's count, or 1 under plain python."""
    return int(os.environ["WORLD_SIZE"]) if _under_torchrun() else 1


def rank() -> int:
    """This process's number among them. Rank 0 prints and writes."""
    return int(os.environ["RANK"]) if _under_torchrun() else 0


def _under_torchrun() -> bool:
    """Whether all of torchrun's variables are set. Some schedulers set WORLD_SIZE or RANK alone."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def start(args: argparse.Namespace, script: str) -> Hardware:
    """Detect the hardware, then print the settings; only rank 0 prints."""
    hardware = detect(args)
    settings.start(args, script)
    return hardware


def detect(args: argparse.Namespace) -> Hardware:
    """Join the other processes, if there are any, and detect the hardware. Nothing may touch CUDA before this call."""
    global _deadline
    import torch

    _deadline = time.monotonic() + 3600 * (getattr(args, "max_hours", None) or math.inf)
    if begun_by_parent():  # Ctrl-C reaches every process, and the parent reports it
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    _quiet_libraries()
    gpus, processes = torch.cuda.device_count(), world_size()
    if gpus and "num_processes" in args:
        patches.exchange_through_host_memory()
    if processes > 1:
        if "num_processes" not in args:
            stop("this script measures one process on one GPU: start it with python instead of torchrun")
        _join(gpus)
    else:
        processes = getattr(args, "num_processes", 1) or max(1, gpus)
        if gpus and processes > gpus:
            stop(f"--num-processes {processes} is more than the {gpus} GPUs in sight")
        if processes == 1:
            # With two GPUs in sight Trainer would use nn.DataParallel, and a 4-bit model would be split.
            os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if getattr(args, "batch_size", 0) % processes:
        stop(f"--batch-size {args.batch_size} does not divide by {processes} processes: pass a multiple of {processes}")
    if gpus:
        patches.attend_without_cudnn()
        name, old = _examine(min(gpus, int(os.environ.get("LOCAL_WORLD_SIZE", processes))))
        auto = "fp16" if old else "bf16"  # torch says that a T4 supports bf16, but its compute capability is 7.5
        auto = "fp16" if "fp16" in gather(auto) else auto  # fp16's gradients are scaled, so no machine may differ
        if old and args.precision == "bf16":
            stop(f"{name} has no bf16 arithmetic: pass --precision fp16 or leave it at auto")
    else:
        name, auto = f"CPU, {torch.get_num_threads()} threads", "fp32"
        if args.precision == "fp16":
            remedy = "pass --precision fp32, or bf16 on a processor with AVX512-BF16"
            stop(f"fp16 needs a GPU and none is in sight: {remedy}")
    precision = auto if args.precision == "auto" else args.precision
    shown = f"{processes} x {name} in {precision}, one process each" if processes > 1 else f"{name} in {precision}"
    print(f"running on {shown}")
    return Hardware("cuda" if gpus else "cpu", precision, name, processes)


def _examine(gpus: int) -> tuple[str, bool]:
    """The name of this process's GPU, and whether one of the first `gpus` is too old for bf16.

    Stops if the driver or this torch cannot use one of them. torch counts GPUs without asking.
    """
    import torch

    otherwise = "or set CUDA_VISIBLE_DEVICES= to use the CPU"
    try:
        name, capabilities = torch.cuda.get_device_name(), [torch.cuda.get_device_capability(i) for i in range(gpus)]
    except RuntimeError as problem:
        stop(f"the GPU cannot be used ({str(problem).splitlines()[0]}): update its driver, {otherwise}")
    builds = [build for build in torch.cuda.get_arch_list() if "_" in build]  # sm_75, compute_90; AMD's have no "_"
    for capability in capabilities:
        if builds and not any(_runs_on(capability, *build.split("_")) for build in builds):
            lack = f"a GPU has compute capability {'.'.join(map(str, capability))}, and this torch has no code for it"
            stop(f"{lack} ({' '.join(builds)}): take another GPU (on Kaggle GPU T4 x2), or another torch, {otherwise}")
    return name, min(capabilities) < (8, 0)


def _runs_on(capability: tuple[int, int], kind: str, number: str) -> bool:
    """Whether a GPU runs code built for `number`: machine code ("sm") of its generation, or any earlier "compute"."""
    *major, minor = number.rstrip("af")
    build = int("".join(major)), int(minor)
    return build <= capability and (kind == "compute" or build[0] == capability[0])


def one_process_per_gpu(args: argparse.Namespace, hardware: Hardware, script: str, argv: list[str] | None) -> None:
    """Start the same command once per GPU and exit with its exit code; with one process just return.

    A script calls it after it has checked flags and inputs and opened its folder. The new processes run the same lines
    silently and return from here. Under torchrun the processes exist already, and all return.
    """
    if world_size() > 1:
        if rank() == 0:
            sys.stdout = sys.__stdout__
    elif hardware.processes > 1:
        _launch(hardware.processes, [script, *(sys.argv[1:] if argv is None else argv)])


def _launch(processes: int, command: list[str]) -> NoReturn:
    """Run torchrun in this process, and exit with the code of the process that failed first, or with 0."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    os.environ[STARTED] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # exit code 2 has printed its error
    sys.stdout.flush()
    # The loopback address is given because some containers cannot resolve their own host name.
    torchrun_flags = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}"]
    # This process has done what --force asks. A second --force would delete the folder that it opened.
    overrides = ["--no-force"] + ([f"--max-hours={max(seconds_left(), 1) / 3600}"] if _deadline < math.inf else [])
    try:
        torchrun([*torchrun_flags, *command, *overrides])
    except ChildFailedError as failed:
        _, failure = failed.get_first_failure()
        if failure.exitcode < 0:
            killer = signal.Signals(-failure.exitcode).name
            guess = " (often out of memory)" if killer == "SIGKILL" else ""
            ended = f"{killer} ended process {failure.local_rank}{guess}"
            print(f"error: {ended}: the same command continues", file=sys.stderr)
        raise SystemExit(failure.exitcode if failure.exitcode > 0 else 1) from None
    except SignalException as interrupted:
        print(f"{interrupted.sigval.name} ended all processes: the same command continues", file=sys.stderr)
        raise SystemExit(128 + interrupted.sigval) from None
    finally:
        del os.environ[STARTED]
    raise SystemExit(0)


def begun_by_parent() -> bool:
    """Whether the parent process has opened the step's folder and holds its lock."""
    return STARTED in os.environ and world_size() > 1


def first_alone(action: Callable[[], T]) -> T | None:
    """Run `action` on rank 0 while the other ranks wait and get None. If it stops, all exit with its exit code."""
    if world_size() == 1:
        return action()
    from torch.distributed import is_initialized

    if not is_initialized():
        stop("this script runs as one process: start it with python instead of torchrun")
    result = code = None
    if rank() == 0:
        try:
            result = action()
        except SystemExit as stopped:
            code = stopped.code or 0
    code = share(code)
    if code is not None:
        raise SystemExit(code)
    return result


def seconds_left() -> float:
    """The seconds that --max-hours leaves; infinite without the flag."""
    return _deadline - time.monotonic()


def out_of_time(needed: float = 0.0) -> bool:
    """Whether --max-hours leaves less than `needed` seconds, by rank 0's clock, so that all processes agree."""
    return _deadline < math.inf and share(seconds_left() <= needed)


def stop_for_time() -> NoReturn:
    """Exit with code 3 in all processes together. The work on disk is complete, and another run continues it."""
    print("out of time (--max-hours): the same command continues", flush=True)
    gather(None, last=True)  # rank 0 prints before any process exits, because the first exit ends all
    raise SystemExit(3)


def share(value: T) -> T:
    """Rank 0's value, on every rank."""
    return gather(value)[0]


def gather(value: T, last: bool = False) -> list[T]:
    """The values of all ranks in order, on every rank. `last` also destroys the process group.

    NCCL warns of a process group that is not destroyed. A failing process must not do it: it might wait for the others.
    """
    if world_size() == 1:
        return [value]
    from torch.distributed import all_gather_object, destroy_process_group

    values: list[T] = [value] * world_size()
    all_gather_object(values, value)
    if last:
        destroy_process_group()
    return values


def _join(gpus: int) -> None:
    """Join the other processes. Only rank 0 prints; if its parent does too, not before `one_process_per_gpu`."""
    import torch

    local_rank, started_by = int(os.environ.get("LOCAL_RANK", "0")), os.environ.get(STARTED)
    if gpus:
        if local_rank >= gpus:
            stop(f"process {local_rank} of this machine has no GPU: {gpus} in sight")
        torch.cuda.set_device(local_rank)
    if started_by and sys.platform == "linux":  # with its parent this process ends: kill -9 leaves no orphan on a GPU
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(started_by):
            raise SystemExit(1)
    if rank() > 0 or started_by:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    if rank() > 0:
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        warnings.simplefilter("ignore")
    if gpus:
        gpu = torch.device("cuda", local_rank)
        torch.distributed.init_process_group("nccl", timeout=PATIENCE, device_id=gpu)
    else:
        torch.distributed.init_process_group("gloo", timeout=PATIENCE)
        patches.pause_at_exit()
        patches.read_to_a_numbered_cpu()


def _quiet_libraries() -> None:
    """Silence messages that a user cannot act on; errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # otherwise every fork prints a warning
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an optional kernel is not installed
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers.modeling_utils")  # peft's old call
    # Trainer orders checkpoints of the same second by number, which is right. It warns or logs, depending on version.
    warnings.filterwarnings("ignore", message="mtime may not be reliable")
    logging.getLogger("transformers.trainer_utils").addFilter(lambda record: "mtime" not in record.getMessage())


def cpu(precision: str) -> Hardware:
    """This machine's processor."""
    import torch

    return Hardware("cpu", precision, f"CPU, {torch.get_num_threads()} threads")


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch: the new classification head, dropout and the order of training."""
    import transformers

    transformers.set_seed(seed)
