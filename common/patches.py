"""Repairs of faults in libraries. Each names the versions that need it, and the test that shows the fault."""

import atexit
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def divide_loss_by_accumulation(model: "nn.Module") -> None:
    """transformers 5.0 to 5.23: Trainer believes that a classifier with **kwargs normalises its own loss.

    It then skips the division by the accumulation steps and multiplies by the number of processes.
    Test: test_accumulation_changes_neither_the_loss_nor_the_gradient.
    """
    model.accepts_loss_kwargs = False


def save_weights_by_todays_names(model: "PreTrainedModel") -> None:
    """transformers 5.0.0, not 5.23: a loaded model saves its LayerNorms as gamma and beta, which Trainer cannot read.

    No best or interrupted checkpoint would be restored whole. Without its record the model saves today's names.
    Test: test_an_interrupted_training_ends_with_the_weights_of_an_uninterrupted_one, by `make kaggle-check`.
    """
    vars(model).pop("_weight_conversions", None)


def load_weights_in_turn() -> None:
    """transformers 5.0.0, not 5.23: threads put unquantised weights on the GPU faster than they are quantised.

    Seven billion of them do not fit (transformers issue 43032).
    Test: test_an_adapter_and_its_base_are_loaded_on_the_processes_own_gpu_a_weight_at_a_time, on the setting alone.
    """
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"


def keep_4bit_differentiable(model: "nn.Module") -> None:
    """bitsandbytes 0.50, with AVX512-BF16: the first forward pass in eval() repacks weights for good.

    The repacked kernel has no backward pass: gradients after an evaluation have a cosine of 0.12 with the true ones.
    Test: test_gradients_are_the_same_whether_or_not_an_evaluation_ran_before, on such a processor.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def load_adapters_beside_other_processes() -> None:
    """peft 0.19 with transformers 5.0.0: in several processes it imports a class of tensor parallelism that came later.

    No weight is split here, so the function that needs the class has nothing to do.
    Test: test_under_torchrun_both_ranks_hold_the_same_adapter_and_it_is_that_of_one_process, by `make kaggle-check`.
    """
    from peft.utils import save_and_load
    from transformers.integrations import tensor_parallel

    if not hasattr(tensor_parallel, "EmbeddingParallel") and hasattr(save_and_load, "_maybe_shard_state_dict_for_tp"):
        save_and_load._maybe_shard_state_dict_for_tp = lambda *_: None


def avoid_gqa_kernel() -> None:
    """transformers after 5.0.0, to 5.23 at least: SDPA's enable_gqa, in a batch without padding.

    Below compute capability 8.0 only the slow math kernel takes it (transformers issue 48633).
    Test: test_below_8_0_grouped_queries_are_repeated, on the setting alone.
    """
    from transformers.integrations import sdpa_attention

    if hasattr(sdpa_attention, "use_gqa_in_sdpa"):
        sdpa_attention.use_gqa_in_sdpa = lambda *args, **kwargs: False


def pause_at_exit() -> None:
    """torch 2.13: gloo's threads let go of their tensors a moment after the last collective.

    Where the interpreter is gone by then, SIGABRT ends a process that has done its work (pytorch pull request 179291).
    On two cores that met 8 of 24 pairs; destroy_process_group() is no cure.
    Test: test_processes_that_leave_right_after_their_last_collective_leave_in_peace.
    """
    atexit.register(time.sleep, 0.5)
