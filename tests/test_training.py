import argparse
import contextlib
import itertools
import math
import os
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import CPU, training_args
from transformers import TrainerCallback

from common import callbacks, device, encoding, models, training


@pytest.fixture
def often(monkeypatch):
    """Checkpoints within an epoch too, though it lasts no minute."""
    monkeypatch.setattr(callbacks.SaveOften, "seconds", 0)


ARGS = {"epochs": 2, "batch_size": 8, "micro_batch_size": 8}


@pytest.fixture
def args():
    return training_args(**ARGS)


def first_is_best(_):
    return {"accuracy": 0.0}


def make_trainer(tiny, tmp_path, args, metric=training.validation_accuracy, **more):
    tokenizer = models.load_tokenizer(str(tiny / "distilbert"))
    texts = [f"{'good fun' if row % 2 else 'bad dull'} {'film ' * (row % 7)}" for row in range(32)]
    dataset = encoding.ReviewDataset(encoding.encode(tokenizer, texts, 32), np.arange(32) % 2)
    device.seed_everything(args.seed)
    model = models.load_classifier(str(tiny / "distilbert"))
    return training.ReviewTrainer(
        model=model,
        args=training.training_arguments(args, CPU, tmp_path / "checkpoints", 32, **more),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=encoding.Collator(tokenizer.pad_token_id),
        compute_metrics=metric,
    )


def test_accumulation_changes_neither_the_loss_nor_the_gradient(tiny, tmp_path, args):
    steps = []
    for micro in (8, 2):
        args.micro_batch_size, args.epochs = micro, 1
        options = {"logging_steps": 1, "save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False}
        trainer = make_trainer(tiny, tmp_path, args, **options)
        trainer.train_dataset = encoding.ReviewDataset(trainer.train_dataset.ids[:8], np.arange(8) % 2)
        trainer.model.dropout.p = 0.0
        trainer.train()
        steps.append(next(entry for entry in trainer.state.log_history if "grad_norm" in entry))
    assert steps[0]["loss"] == pytest.approx(steps[1]["loss"], rel=1e-4)  # without the division it would be fourfold
    assert steps[0]["grad_norm"] == pytest.approx(steps[1]["grad_norm"], rel=1e-3)


def test_an_epochs_order_depends_on_seed_and_epoch_alone_and_groups_by_length_and_evaluation_keeps_the_rows_order(
    tiny, tmp_path, args
):
    trainer = make_trainer(tiny, tmp_path, args)
    sampler = trainer._get_train_sampler()

    def order(epoch: float) -> list[int]:
        trainer.state.epoch = epoch
        return list(sampler)

    first, second = order(0.0), order(1.0)
    torch.rand(7)  # as dropout would, and on each process by another number
    assert (order(0.0), order(1.4)) == (first, second)  # 1.4: where an interruption fell
    assert first != second and sorted(first) == sorted(second) == list(range(32))
    lengths = np.array([len(ids) for ids in trainer.train_dataset.ids])[first].reshape(4, 8)
    assert np.ptp(lengths, axis=1).mean() < np.ptp(lengths)
    assert trainer.predict(trainer.eval_dataset).label_ids.tolist() == trainer.eval_dataset.labels.tolist()


TOO_LARGE = torch.OutOfMemoryError("CUDA out of memory")


def limit(trainer, fails, error=TOO_LARGE) -> None:
    """Let the loss in training raise an error where `fails` says so of a micro-step and its number of rows."""
    compute = trainer.compute_loss

    def limited(model, inputs, *rest, **more):
        second = any(weight.grad is not None for weight in model.parameters())
        if model.training and fails(second, len(inputs["input_ids"])):
            raise error
        return compute(model, inputs, *rest, **more)

    trainer.compute_loss = limited


def test_a_micro_batch_that_does_not_fit_is_halved_and_changes_neither_batch_nor_loss(tiny, tmp_path, args, capsys):
    losses = []
    for fits in (8, 2):
        trainer = make_trainer(tiny, tmp_path / str(fits), args, logging_steps=1)
        trainer.model.dropout.p = 0.0
        limit(trainer, lambda _, rows, fits=fits: rows > fits)
        training.train(trainer, CPU)
        assert f"fits with micro-batch {fits} (x {8 // fits} accumulated" in capsys.readouterr().out
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize(
    ("fails", "error", "ends", "said"),
    [
        (lambda second, rows: second and rows > 2, TOO_LARGE, contextlib.nullcontext(), "micro-batch 2 (x 4 acc"),
        (lambda _, rows: rows > 2, CUBLAS, contextlib.nullcontext(), "micro-batch 2 (x 4 acc"),
        (lambda *_: True, TOO_LARGE, pytest.raises(SystemExit, match="too little memory.*--max-length"), "error: "),
        (lambda *_: True, RuntimeError("shapes"), pytest.raises(RuntimeError, match="shapes"), ""),
    ],
    ids=["beside the first micro-step's gradients", "cuBLAS allocates by itself", "never", "another error"],
)
def test_the_trial_step_finds_what_fits_or_says_what_to_change_and_hides_no_other_error(
    fails, error, ends, said, tiny, tmp_path, args, capsys
):
    args.micro_batch_size = 4
    trainer = make_trainer(tiny, tmp_path, args)
    limit(trainer, fails, error)
    with ends:
        training.fit_memory(trainer, CPU)
    assert said in "".join(capsys.readouterr())


def test_a_full_disk_is_told_before_training(tiny, tmp_path, args, stops, monkeypatch):
    trainer = make_trainer(tiny, tmp_path, args)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    stops(lambda: training.train(trainer, CPU), "GB of disk", "--output-dir")


@pytest.mark.parametrize(("seconds", "saved"), [(0, 10), (60, 5)])
def test_checkpoints_are_a_tenth_of_the_run_and_a_minute_apart_and_never_more_than_three(
    seconds, saved, tiny, tmp_path, args, monkeypatch
):
    monkeypatch.setattr(callbacks.SaveOften, "seconds", seconds)
    args.epochs = 5
    trainer, most = make_trainer(tiny, tmp_path, args), []

    class Count(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            most.append(len(list((tmp_path / "checkpoints").glob("checkpoint-*"))))

    trainer.add_callback(Count())
    training.train(trainer, CPU)
    assert len(most) == saved and max(most) <= 2  # one more while it is written: 12.8 GB of RoBERTa-large


@pytest.mark.parametrize(
    ("batch", "processes", "at_most", "micro"),
    [(32, 1, 8, 8), (32, 2, 8, 8), (16, 2, 5, 4), (12, 2, 4, 3), (8, 1, 32, 8)],
)
def test_the_micro_batch_divides_each_processes_share_of_the_batch(batch, processes, at_most, micro):
    assert training.micro_batch_of(batch, processes, at_most) == micro


FILES = "model.safetensors optimizer.pt trainer_state.json scheduler.pt rng_state.pth config.json sizes.json".split()
# A file of a checkpoint and the bytes that are left of it. None: it is deleted.
DAMAGES = [*((name, 100) for name in FILES), ("model.safetensors", 0), ("optimizer.pt", None), ("sizes.json", None)]


def test_instead_of_a_damaged_checkpoint_the_one_before_is_taken_and_none_whose_best_is_damaged(
    tiny, tmp_path, args, capsys
):
    make_trainer(tiny, tmp_path, args, first_is_best).train()
    checkpoints = tmp_path / "checkpoints"
    best, newest = sorted(checkpoints.iterdir())
    assert training.newest_checkpoint(checkpoints) == newest
    for name, size in DAMAGES:
        copy = tmp_path / f"{name}-{size}"
        shutil.copytree(checkpoints, copy)
        file = copy / newest.name / name
        file.unlink() if size is None else os.truncate(file, size)
        assert training.newest_checkpoint(copy) == copy / best.name, file
        assert "is damaged" in capsys.readouterr().out
    os.truncate(best / "model.safetensors", 0)
    assert training.newest_checkpoint(checkpoints) is None and "the best so far" in capsys.readouterr().out


def test_a_checkpoint_records_its_files_when_every_process_has_saved_its_own(tiny, tmp_path, args, monkeypatch):
    newest, trainer = tmp_path / "checkpoints" / "checkpoint-8", make_trainer(tiny, tmp_path, args)

    def gather(value, last=False):  # another process saves its random state as the last one
        if newest.exists():
            (newest / "rng_state_1.pth").touch()
        return [value]

    monkeypatch.setattr(callbacks.device, "gather", gather)
    trainer.train()
    assert training.newest_checkpoint(newest.parent) == newest
    (newest / "rng_state_1.pth").unlink()
    assert training.newest_checkpoint(newest.parent) != newest


def test_a_best_checkpoint_that_is_gone_at_the_end_is_no_success(tiny, tmp_path, args, stops, often):
    interrupt(make_trainer(tiny, tmp_path, args), 1.5)
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-4")
    continued = make_trainer(tiny, tmp_path, args, first_is_best)
    stops(lambda: training.train(continued, CPU), "best checkpoint", "delete", "checkpoints/")


def interrupt(trainer, epoch):
    """Train until this (part of an) epoch is over, and then break off."""

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.epoch >= epoch:
                raise KeyboardInterrupt

    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        training.train(trainer, CPU)


def break_off_a_step_after_a_checkpoint(start, monkeypatch):
    interrupt(start(), 1.25)


def break_off_in_the_evaluation(start, monkeypatch):
    monkeypatch.setattr(callbacks.SaveOften, "seconds", 0)  # a checkpoint just before would be taken for evaluated
    trainer = start()
    trainer.compute_metrics = mock.Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        training.train(trainer, CPU)


def stop_for_time_again_and_again(start, monkeypatch):
    clock = itertools.cycle([False, True])
    monkeypatch.setattr(device, "out_of_time", lambda: next(clock))
    for step in (2, 4, 6):  # inside an epoch and at its end; the last run's time is over with its last step
        trainer = start()
        with pytest.raises(SystemExit, match="3"):
            training.train(trainer, CPU)
        assert trainer.state.global_step == step


def break_off_an_fp16_run(start, monkeypatch):  # and continue in another precision
    interrupt(trainer := start(), 1.0)
    checkpoint = training.newest_checkpoint(Path(trainer.args.output_dir))
    torch.save(torch.amp.GradScaler("cpu").state_dict(), checkpoint / "scaler.pt")


def ending(trainer):
    """What a training leaves: its evaluations, the weights of each epoch, and those that are kept."""
    evaluated = [(e["epoch"], e["eval_loss"]) for e in trainer.state.log_history if "eval_loss" in e]
    files = sorted(Path(trainer.args.output_dir).glob("*/model.safetensors"))
    weights = {name: weight.tolist() for name, weight in trainer.model.state_dict().items()}
    return evaluated, {file.parent.name: file.read_bytes() for file in files}, weights


@pytest.fixture(scope="module")
def unbroken(tiny, tmp_path_factory):
    trainer = make_trainer(tiny, tmp_path_factory.mktemp("whole"), training_args(**ARGS), first_is_best)
    training.train(trainer, CPU)
    return ending(trainer)


@pytest.mark.parametrize(
    "break_off",
    [
        break_off_a_step_after_a_checkpoint,
        break_off_in_the_evaluation,
        stop_for_time_again_and_again,
        break_off_an_fp16_run,
    ],
)
def test_an_interrupted_training_goes_on_in_another_folder_and_ends_as_an_uninterrupted_one(
    break_off, unbroken, tiny, tmp_path, args, monkeypatch
):
    break_off(lambda: make_trainer(tiny, tmp_path / "first", args, first_is_best), monkeypatch)
    shutil.move(tmp_path / "first", tmp_path / "second")  # as a Kaggle session's outputs come to the next
    continued = make_trainer(tiny, tmp_path / "second", args, first_is_best)
    training.train(continued, CPU)
    assert ending(continued) == unbroken
    assert [epoch for epoch, _ in unbroken[0]] == [1.0, 2.0] and unbroken[1].keys() == {"checkpoint-4", "checkpoint-8"}
    assert continued.state.best_model_checkpoint == str(tmp_path / "second/checkpoints/checkpoint-4")


def test_each_log_and_each_evaluation_is_one_line_without_a_dictionary(tiny, tmp_path, args, capsys):
    training.train(make_trainer(tiny, tmp_path, args, logging_steps=2), CPU)
    lines = capsys.readouterr().out.splitlines()[1:]  # the first tells of the trial step
    assert "".join("L" if "  step " in line else "E" if "  after epoch " in line else "?" for line in lines) == "LLELLE"
    assert "{" not in "".join(lines) and "min left" in lines[0] and "validation accuracy" in lines[2]


def test_a_training_that_diverges_is_refused_before_anything_is_saved(tiny, tmp_path, args, stops):
    trainer = make_trainer(tiny, tmp_path, args)
    torch.nn.init.constant_(trainer.model.classifier.bias, float("nan"))
    stops(lambda: training.train(trainer, CPU), "became NaN", "--learning-rate")
    assert trainer.state.global_step < trainer.state.max_steps  # and long before its end


def test_a_single_nan_is_logged_once_and_ends_no_training(tiny, tmp_path, args):
    trainer = make_trainer(tiny, tmp_path, args, logging_steps=1)
    loss_of, steps = trainer.compute_loss, []

    def compute_loss(*given, **more):  # as when a batch overflows in fp16: its gradient is skipped
        if trainer.is_in_train and trainer.model.training:
            steps.append(math.nan if len(steps) == 1 else 0.0)
            return loss_of(*given, **more) + steps[-1]
        return loss_of(*given, **more)

    trainer.compute_loss = compute_loss
    training.train(trainer, CPU)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) > 4 and [not math.isfinite(loss) for loss in logged].count(True) == 1


def test_gradients_that_are_never_finite_end_a_training_though_the_loss_is(stops):
    def log(*gradients):
        entries = [{"loss": 0.7, "grad_norm": norm} for norm in gradients]
        callbacks.RefuseNaN().on_log(None, argparse.Namespace(log_history=entries), None)

    for fine in ([math.inf] * 4, [math.nan] * 4 + [1.0]):  # as while the scaler looks for its scale
        log(*fine)
    stops(lambda: log(1.0, *[math.nan, math.inf] * 3), "gradient became NaN", "--precision fp32")


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9, 0.95])
def test_on_skewed_classes_a_good_model_passes_and_one_that_follows_the_majority_is_told_what_helps(
    share, stops, capsys
):
    labels = (np.arange(300) < 300 * share).astype(int)
    negatives = np.flatnonzero(labels == 0)
    predicted = labels.copy()
    predicted[negatives[::4]] = 1  # a quarter of the rarer class is missed
    predicted[:6] = 0
    training.refuse_collapse(np.eye(2)[predicted], labels, "train longer")
    assert "warning" not in capsys.readouterr().out
    one_class = np.eye(2)[np.ones(300, int)]
    told = stops(
        lambda: training.refuse_collapse(one_class, labels, "train longer"), "every validation review positive"
    )
    assert ("add negative reviews" in told and f"{share:.0%}" in told) == (share > 0.6) and "train longer" in told
    one_class[0] = [1, 0]  # one verdict of the other class, and a wrong one
    stops(lambda: training.refuse_collapse(one_class, labels, "train longer"), "no better than chance")
    predicted[: int(0.3 * 300 * share)] = 0
    training.refuse_collapse(np.eye(2)[predicted], labels, "")
    assert ("warning: the model has accuracy" in capsys.readouterr().out) == (share > 0.7)
