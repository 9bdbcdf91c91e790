"""Repairs of faults in libraries. Each one names the versions that need it and the test that shows the fault."""

import atexit
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def save_weights_by_todays_names(model: "PreTrainedModel") -> None:
    """transformers 5.0.0, not 5.23: a loaded model saves its LayerNorms as gamma and beta, which Trainer cannot read.

    Trainer would restore checkpoints without them. With its record of old names deleted, the model saves today's names.
    Test: test_an_interrupted_training_goes_on_in_another_folder_and_ends_as_an_uninterrupted_one, by
    `make kaggle-check`.
    """
    vars(model).pop("_weight_conversions", None)


def load_weights_in_turn() -> None:
    """transformers 5.0.0, not 5.23: threads copy weights to the GPU faster than it can quantise them.

    Seven billion unquantised weights do not fit (transformers issue 43032).
    Test: test_an_adapter_and_its_base_are_loaded_on_the_processes_own_gpu_a_weight_at_a_time, for the setting only.
    """
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"


def keep_4bit_differentiable(model: "nn.Module") -> None:
    """bitsandbytes 0.50, with AVX512-BF16: the first forward pass in eval() repacks the weights permanently.

    The repacked kernel has no backward pass. Gradients after an evaluation have a cosine of 0.12 with the true ones.
    Test: test_neither_an_evaluation_before_nor_gradient_checkpointing_changes_a_gradient, on such a processor.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def load_adapters_beside_other_processes() -> None:
    """peft 0.19 with transformers 5.0.0: in several processes peft imports a class that transformers lacks.

    The class is for tensor parallelism. No weight is split here, so the function that needs it has nothing to do.
    Test: test_under_torchrun_both_ranks_hold_the_same_adapter_and_it_is_that_of_one_process, by `make kaggle-check`.
    """
    from peft.utils import save_and_load
    from transformers.integrations import tensor_parallel

    if not hasattr(tensor_parallel, "EmbeddingParallel") and hasattr(save_and_load, "_maybe_shard_state_dict_for_tp"):
        save_and_load._maybe_shard_state_dict_for_tp = lambda *_: None


def exchange_through_host_memory() -> None:
    """accelerate to 1.15 at least: beside a second RTX 40 with a driver before 550.40.07 it raises NotImplementedError.

    It asks for these variables instead, which `accelerate launch` sets. NCCL reads them when processes join.
    Test: test_gpus_that_cannot_reach_each_other_exchange_through_host_memory, for the setting only.
    """
    from accelerate.utils import check_cuda_p2p_ib_support

    if not check_cuda_p2p_ib_support():
        for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
            os.environ.setdefault(name, "1")


def read_adapters_to_the_own_gpu() -> None:
    """peft 0.19 to 0.21 at least: Trainer reads a checkpoint's adapter through GPU 0 in every process.

    It costs the other processes a CUDA context there, some 200 MB.
    Test: test_each_process_reads_an_adapter_to_its_own_gpu, for the setting only.
    """
    import peft.peft_model
    import torch

    peft.peft_model.infer_device = lambda: f"cuda:{torch.cuda.current_device()}"


def avoid_gqa_kernel() -> None:
    """transformers 5.0.0 to 5.23 at least: attention without a mask uses SDPA's enable_gqa.

    03's and 04b's prompts need no mask. Below compute capability 8.0, and in fp32, only the slow math kernel has it
    (transformers issues 48633 and 45636).
    Test: test_below_8_0_and_in_fp32_grouped_queries_are_repeated, for the setting only.
    """
    from transformers.integrations import sdpa_attention

    if hasattr(sdpa_attention, "use_gqa_in_sdpa"):
        sdpa_attention.use_gqa_in_sdpa = lambda *args, **kwargs: False


def attend_without_cudnn() -> None:
    """torch 2.11 on an H100 in bf16: SDPA may choose cuDNN's attention, which plans each new shape anew.

    Reviews have many lengths. Without it and flash attention, in fp16, the student's shape scored a mix of lengths at
    8,633 reviews/s instead of 1,805, and one length at 4,769 instead of 5,476 (results/gpu/true_size.csv).
    Test: test_a_gpu_attends_without_cudnn, for the setting only.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def pause_at_exit() -> None:
    """torch 2.13: gloo's threads release their tensors a moment after the last collective.

    If the interpreter has ended by then, SIGABRT ends the process after its work is done (pytorch pull request 179291).
    On two cores this happened to 8 of 24 pairs of processes; destroy_process_group() does not help.
    Test: test_processes_that_leave_right_after_their_last_collective_leave_in_peace.
    """
    atexit.register(time.sleep, 0.5)


def read_to_a_numbered_cpu() -> None:
    """transformers 5.0.0, not 5.23: in several processes on CPUs, Trainer reads the optimizer's state to "cpu:0".

    torch knows no such place. This teaches it one: the memory where the state is already.
    Test: test_two_processes_stop_together_when_the_first_ones_time_is_over_and_continue_to_the_bit, by
    `make kaggle-check`.
    """
    import torch

    torch.serialization.register_package(
        100, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
    )
