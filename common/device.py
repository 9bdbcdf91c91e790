"""The device, the precision, the seed and one process per GPU, decided in one place and printed."""

import argparse
import atexit
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

from common.settings import stop

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
# Set in the processes that `one_process_per_gpu` starts: their parent has told and begun everything up to there.
STARTED = "SENTIMENT_STARTED_BY"
# What one process does alone while the others wait: the longest is joining 75,000 reviews' features on a slow disk.
PATIENCE = datetime.timedelta(hours=2)


_deadline = math.inf  # by time.monotonic(); `detect` sets it from --max-hours


@dataclass(frozen=True)
class Hardware:
    """Where and in what precision a model runs."""

    device: str  # "cuda" (this process's own GPU) or "cpu"
    precision: str  # "fp32", "bf16" or "fp16"
    name: str
    processes: int = 1  # of this run, on all machines together

    @property
    def dtype(self) -> "torch.dtype":
        """The dtype of the arithmetic."""
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    @property
    def batch_tokens(self) -> int:
        """Padded tokens of a batch in scoring: enough to fill a GPU, few enough for a CPU's caches."""
        return 8192 if self.device == "cuda" else 2048

    def autocast(self) -> AbstractContextManager:
        """Mixed precision for a forward pass of fp32 weights; does nothing in fp32."""
        import torch

        return torch.autocast(self.device, self.dtype, enabled=self.precision != "fp32")

    def synchronize(self) -> None:
        """Wait for the GPU; without this a clock measures the launch alone."""
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()


def world_size() -> int:
    """How many processes share this step (torchrun's count); 1 under plain python."""
    return int(os.environ["WORLD_SIZE"]) if _started_together() else 1


def rank() -> int:
    """This process's number among them; 0 is the first, which speaks and writes."""
    return int(os.environ["RANK"]) if _started_together() else 0


def _started_together() -> bool:
    """Some schedulers set WORLD_SIZE or RANK alone: without the other and an address there is nothing to join."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def detect(args: argparse.Namespace) -> Hardware:
    """The hardware at hand, after joining the other processes where there are some; nothing may touch CUDA before it.

    --precision auto is fp16 on a GPU before compute capability 8.0 (a T4: torch counts its emulated bf16 as support),
    bf16 from there on, fp32 on a CPU. A script without --num-processes runs on one GPU.
    """
    global _deadline
    _deadline = time.monotonic() + 3600 * (getattr(args, "max_hours", None) or math.inf)
    if begun_by_parent():
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C reaches all; the parent tells of it
    _quiet_libraries()
    import torch

    gpus = torch.cuda.device_count()
    if world_size() > 1:
        if "num_processes" not in args:
            stop("this script measures one process on one GPU: start it with python instead of torchrun")
        _join(gpus)
        processes = world_size()
    else:
        processes = getattr(args, "num_processes", 1) or max(1, gpus)
        if gpus and processes > gpus:
            stop(f"--num-processes {processes} is more than the {gpus} GPUs in sight")
        if processes == 1:
            # With two GPUs in sight Trainer falls into nn.DataParallel, and a 4-bit model would split.
            os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if getattr(args, "batch_size", 0) % processes:
        stop(f"--batch-size {args.batch_size} cannot be shared by {processes} processes: pass a multiple of it")
    if gpus:
        capability, name = torch.cuda.get_device_capability(), torch.cuda.get_device_name()
        auto = "bf16" if capability[0] >= 8 else "fp16"
        hardware = Hardware("cuda", auto if args.precision == "auto" else args.precision, name, processes)
        if hardware.precision == "bf16" and capability[0] < 8:
            stop(f"{name} has no bf16 arithmetic: pass --precision fp16 or leave it at auto")
    else:
        precision = "fp32" if args.precision == "auto" else args.precision
        hardware = Hardware("cpu", precision, f"CPU, {torch.get_num_threads()} threads", processes)
        if hardware.precision == "fp16":
            stop(
                "fp16 needs a GPU and none is in sight: pass --precision fp32, or bf16 on a processor with AVX512-BF16"
            )
    times = f"{processes} x " if processes > 1 else ""
    print(f"running on {times}{hardware.name} in {hardware.precision}{', a process each' if times else ''}")
    return hardware


def one_process_per_gpu(args: argparse.Namespace, hardware: Hardware, script: str, argv: list[str] | None) -> None:
    """Start the same command once per GPU and leave with its exit code; return where one process does all the work.

    A script calls it when its flags and inputs are checked and its folder is begun. The started processes come by the
    same lines, in silence, and return from here. Under torchrun, which has started them already, all return.
    """
    if world_size() > 1:
        if rank() == 0:
            sys.stdout = sys.__stdout__
        return
    if hardware.processes == 1:
        return
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    os.environ[STARTED] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // hardware.processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # an exit code of 2 has been explained
    sys.stdout.flush()
    # The loopback address: not every container can resolve its own host name.
    where = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={hardware.processes}"]
    command = sys.argv[1:] if argv is None else argv
    # --force has deleted what it should; a second time it would delete what the first process has begun.
    again = ["--no-force"]
    if _deadline < math.inf:
        again.append(f"--max-hours={max(seconds_left(), 1) / 3600}")
    try:
        torchrun([*where, script, *command, *again])
    except ChildFailedError as failed:
        _, failure = failed.get_first_failure()
        if failure.exitcode < 0:
            killed = signal.Signals(-failure.exitcode).name
            guess = " (often for lack of memory)" if killed == "SIGKILL" else ""
            print(
                f"error: process {failure.local_rank} was ended by {killed}{guess}: the same command continues",
                file=sys.stderr,
            )
        raise SystemExit(failure.exitcode if failure.exitcode > 0 else 1) from None
    except SignalException as interrupted:
        print(f"{interrupted.sigval.name}: all processes ended; the same command continues", file=sys.stderr)
        raise SystemExit(128 + interrupted.sigval) from None
    finally:
        del os.environ[STARTED]
    raise SystemExit(0)


def begun_by_parent() -> bool:
    """Whether the process that started this one has begun the step, and holds its folder."""
    return STARTED in os.environ and world_size() > 1


def first_alone(action: Callable[[], T]) -> T | None:
    """Let the first process act while all others wait, and leave with its exit code if it stops. They get None."""
    if world_size() == 1:
        return action()
    from torch.distributed import is_initialized

    if not is_initialized():
        stop("this script works as one process: start it with python instead of torchrun")
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
    """What --max-hours leaves of this process's time; infinite without the flag."""
    return _deadline - time.monotonic()


def out_of_time() -> bool:
    """Whether the time of --max-hours is over by the first process's clock: the same answer in all."""
    return _deadline < math.inf and share(seconds_left() <= 0)


def stop_for_time() -> NoReturn:
    """Leave with exit code 3, all processes together: the work on disk is whole and can be continued."""
    print("out of time (--max-hours): the same command continues", flush=True)
    gather(None, last=True)  # the first process speaks before any leaves, for the first exit ends all
    raise SystemExit(3)


def share(value: T) -> T:
    """The first process's value, in all."""
    return gather(value)[0]


def gather(value: T, last: bool = False) -> list[T]:
    """The values of all processes, in all, by rank. After the `last` time they have nothing more to say to each other.

    NCCL warns of a process group that nobody destroys. One that fails must not: it could wait there for the others.
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
    """Join the other processes; only the first one speaks, and where a parent has spoken, not before its work."""
    import torch

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if gpus:
        if local_rank >= gpus:
            stop(f"process {local_rank} of this machine has no GPU of its own: {gpus} in sight")
        torch.cuda.set_device(local_rank)
    if STARTED in os.environ:
        _die_with_parent(int(os.environ[STARTED]))
    if rank() > 0 or STARTED in os.environ:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    if rank() > 0:
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        warnings.simplefilter("ignore")
    if gpus:
        own = torch.device("cuda", local_rank)
        torch.distributed.init_process_group("nccl", timeout=PATIENCE, device_id=own)
    else:
        torch.distributed.init_process_group("gloo", timeout=PATIENCE)
        # gloo's threads let go of their tensors a moment after the last collective; where the interpreter is gone by
        # then, SIGABRT ends a process that has done its work (pytorch pull request 179291). With torch 2.13 and two
        # cores that met 8 of 24 pairs like those of tests/test_processes.py. destroy_process_group() is no cure.
        atexit.register(time.sleep, 0.5)


def _die_with_parent(parent: int) -> None:
    """Ask the kernel (Linux) to end this process when its parent is killed: a kill -9 must leave no orphan on a GPU."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            raise SystemExit(1)


def _quiet_libraries() -> None:
    """Silence what a user cannot act on, at its source; errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else a warning at every fork
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an optional kernel is not installed
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers.modeling_utils")  # peft's old call
    # Checkpoints of the same second are told apart by their numbers, as they should be (a warning or a log by version).
    warnings.filterwarnings("ignore", message="mtime may not be reliable")
    logging.getLogger("transformers.trainer_utils").addFilter(lambda record: "mtime" not in record.getMessage())


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch: the new classification head, dropout and the order of training."""
    import transformers

    transformers.set_seed(seed)
