"""What Trainer does beside training: checkpoints, the time limit, one line a log, the end of a run that diverges."""

import math
import time

from transformers import TrainerCallback, TrainerState

from common import device
from common.settings import stop

DIVERGED = "the training loss became NaN: pass --force with a smaller --learning-rate, or --precision fp32"
FORECAST_STEPS = 50  # after so many, training prints how long the rest will take


def all_of_them() -> list[TrainerCallback]:
    """One of each, for one training."""
    return [SaveOften(), MaxHours(), RefuseNaN(), Progress()]


def within_epoch(state: TrainerState) -> bool:
    """Whether training goes on in this epoch.

    A checkpoint at its end must wait for the evaluation: a run that continued from an earlier one would never make it.
    """
    return state.epoch % 1 != 0 and state.global_step < state.max_steps


class SaveOften(TrainerCallback):
    """Saves a checkpoint at least every tenth of the run, beside those that end an epoch."""

    def on_train_begin(self, args, state, control, **_):
        # trainer_state.json keeps this: a checkpoint of an fp16 run has a gradient scaler too, see training._damage.
        state.stateful_callbacks["fp16"] = args.fp16

    def on_step_end(self, args, state, control, **_):
        if state.global_step % math.ceil(state.max_steps / 10) == 0 and within_epoch(state):
            control.should_save = True


class MaxHours(TrainerCallback):
    """Ends training with a checkpoint, at a step's end, when the time of --max-hours is over."""

    def on_train_begin(self, args, state, control, **_):
        self.started, self.first_step = time.monotonic(), state.global_step

    def on_step_end(self, args, state, control, **_):
        steps = state.global_step - self.first_step
        if steps == FORECAST_STEPS:
            seconds = (time.monotonic() - self.started) / steps * (state.max_steps - state.global_step)
            print(f"about {seconds / 60:.0f} minutes of training are left, evaluations not counted", flush=True)
            if seconds > device.seconds_left():
                print("warning: --max-hours is too short for them; the run will stop with a checkpoint", flush=True)
        if within_epoch(state) and device.out_of_time():
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **_):
        if within_epoch(state):  # stopped inside the epoch: Trainer would evaluate it as if it were complete
            control.should_evaluate = control.should_save = False
        elif device.out_of_time():
            control.should_training_stop = True


class RefuseNaN(TrainerCallback):
    """Stops a training whose loss is no number in two logs (a tenth of the run) on end.

    One may be a batch that overflowed in fp16, which the gradient scaler skips.
    """

    def on_log(self, args, state, control, **_):
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry][-2:]
        if len(losses) == 2 and not any(map(math.isfinite, losses)):
            stop(DIVERGED)


class Progress(TrainerCallback):
    """Prints one line a log and one an evaluation, the same in a terminal and in a notebook."""

    def on_train_begin(self, args, state, control, **_):
        self.started = self.logged = time.monotonic()
        self.first_step = self.logged_step = state.global_step

    def on_log(self, args, state, control, logs=None, **_):
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        now, step = time.monotonic(), state.global_step
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        rate = (step - self.logged_step) * batch / (now - self.logged)
        left = (now - self.started) / (step - self.first_step) * (state.max_steps - step)
        terms = ", ".join(f"{name} {logs[name]:.3f}" for name in ("kl", "margin", "ce", "features") if name in logs)
        print(
            f"  step {step:,}/{state.max_steps:,}, epoch {state.epoch:.2f}, loss {logs['loss']:.4f}"
            f"{f' ({terms})' if terms else ''}, gradient {logs.get('grad_norm', math.nan):.2f}, "
            f"lr {logs['learning_rate']:.1e}, {rate:.1f} reviews/s, {left / 60:.0f} min left",
            flush=True,
        )
        self.logged, self.logged_step = now, step

    def on_evaluate(self, args, state, control, metrics=None, **_):
        if state.is_world_process_zero:
            accuracy, loss = metrics["eval_accuracy"], metrics["eval_loss"]
            print(f"  after epoch {state.epoch:.2g}: validation accuracy {accuracy:.4f}, loss {loss:.4f}", flush=True)
