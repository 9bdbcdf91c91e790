"""Trainer's callbacks: checkpoints, the time limit, one printed line per log, a stop when the loss becomes NaN."""

import math
import time
from pathlib import Path

from transformers import TrainerCallback, TrainerState

from common import device
from common.settings import stop
from common.storage import write_json

SIZES = "sizes.json"  # of a checkpoint's files


def within_epoch(state: TrainerState) -> bool:
    """Whether training continues within this epoch.

    At its end the checkpoint must wait: one saved before the epoch's evaluation would make a resumed run skip it.
    """
    return state.epoch % 1 != 0 and state.global_step < state.max_steps


class RecordFiles(TrainerCallback):
    """Writes the size of each file into a checkpoint, last, when every process has saved its random state."""

    def on_save(self, args, state, control, **_):
        device.gather(None)
        if device.rank() == 0:
            checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
            sizes = {file.name: file.stat().st_size for file in checkpoint.iterdir() if file.name != SIZES}
            write_json(checkpoint / SIZES, sizes)


class SaveOften(TrainerCallback):
    """Saves a checkpoint every tenth of the run, unless the last one is younger than a minute, and one per epoch.

    A tenth of a run can be seconds: about seven for a small student on an H100.
    """

    seconds = 60

    def on_train_begin(self, args, state, control, **_):
        self.saved = time.monotonic()

    on_save = on_train_begin

    def on_step_end(self, args, state, control, **_):
        if state.global_step % math.ceil(state.max_steps / 10) == 0 and within_epoch(state):
            control.should_save = device.share(time.monotonic() - self.saved >= self.seconds)


class MaxHours(TrainerCallback):
    """Ends training with a checkpoint after the step in which --max-hours is over."""

    def on_step_end(self, args, state, control, **_):
        # Several processes have to agree, which costs them a synchronisation: they do so every tenth step.
        due = device.world_size() == 1 or state.global_step % 10 == 0
        if due and within_epoch(state) and device.out_of_time():
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **_):
        if within_epoch(state):  # Trainer would evaluate and save an epoch that was cut short as if it were complete
            control.should_evaluate = control.should_save = False
        elif device.out_of_time():
            control.should_save = control.should_training_stop = True


class RefuseNaN(TrainerCallback):
    """Stops training when the loss is not finite in two logs in a row, or the gradient in five. A run has 20 or more.

    A single log may hold a batch that overflowed in fp16. The gradient scaler skips such a batch, and the first few
    while it looks for a scale. If it skips all, the loss stays finite and nothing is learned.
    """

    def on_log(self, args, state, control, **_):
        logged = [entry for entry in state.log_history if "loss" in entry]
        for name, words, enough in (("loss", "the training loss", 2), ("grad_norm", "the gradient", 5)):
            last = [entry.get(name, 0) for entry in logged[-enough:]]
            if len(last) == enough and not any(map(math.isfinite, last)):
                stop(f"{words} became NaN: pass --force with a smaller --learning-rate, or --precision fp32")


class Progress(TrainerCallback):
    """Prints one line per log and per evaluation, the same in a terminal and in a notebook."""

    def on_train_begin(self, args, state, control, **_):
        self.started = self.logged = time.monotonic()
        self.first_step = self.logged_step = state.global_step

    def on_log(self, args, state, control, logs, **_):
        if "loss" not in logs:
            return
        clock, step = time.monotonic(), state.global_step
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        rate = (step - self.logged_step) * batch / (clock - self.logged)
        left = (clock - self.started) / (step - self.first_step) * (state.max_steps - step)
        terms = ", ".join(f"{name} {logs[name]:.3f}" for name in ("kl", "ce", "features") if name in logs)
        print(
            f"  step {step:,}/{state.max_steps:,}, epoch {state.epoch:.2f}, loss {logs['loss']:.4f}"
            f"{f' ({terms})' if terms else ''}, gradient {logs.get('grad_norm', math.nan):.2f}, "
            f"lr {logs['learning_rate']:.1e}, {rate:.1f} reviews/s, {left / 60:.0f} min left",
            flush=True,
        )
        self.logged, self.logged_step = clock, step

    def on_evaluate(self, args, state, control, metrics, **_):
        accuracy, loss = metrics["eval_accuracy"], metrics["eval_loss"]
        print(f"  after epoch {state.epoch:.2g}: validation accuracy {accuracy:.4f}, loss {loss:.4f}", flush=True)
