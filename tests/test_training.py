import argparse
import shutil

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from common import callbacks, data, device, models, training

CPU = device.Hardware("cpu", "fp32", "test")


@pytest.fixture
def often(monkeypatch):
    """Checkpoints within an epoch too, though it lasts no minute."""
    monkeypatch.setattr(callbacks.SaveOften, "seconds", 0)


@pytest.fixture
def args():
    return argparse.Namespace(
        epochs=2,
        learning_rate=1e-3,
        batch_size=8,
        micro_batch_size=8,
        weight_decay=0.0,
        warmup_fraction=0.0,
        seed=3,
    )


def make_trainer(tiny, tmp_path, args, **more):
    tokenizer = models.load_tokenizer(str(tiny / "distilbert"))
    texts = [f"{'good fun' if row % 2 else 'bad dull'} {'film ' * (row % 7)}" for row in range(32)]
    dataset = data.ReviewDataset(data.encode(tokenizer, texts, 32), np.arange(32) % 2)
    device.seed_everything(args.seed)
    model = models.load_classifier(str(tiny / "distilbert"))
    return training.ReviewTrainer(
        model=model,
        args=training.training_arguments(args, CPU, tmp_path / "checkpoints", 32, **more),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=data.Collator(tokenizer.pad_token_id),
        compute_metrics=training.validation_accuracy,
    )


def test_accumulation_changes_neither_the_loss_nor_the_gradient(tiny, tmp_path, args):
    steps = []
    for micro in (8, 2):
        args.micro_batch_size, args.epochs = micro, 1
        options = {"logging_steps": 1, "save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False}
        trainer = make_trainer(tiny, tmp_path, args, **options)
        trainer.train_dataset = data.ReviewDataset(trainer.train_dataset.ids[:8], np.arange(8) % 2)
        trainer.model.dropout.p = 0.0
        trainer.train()
        steps.append(next(entry for entry in trainer.state.log_history if "grad_norm" in entry))
    assert steps[0]["loss"] == pytest.approx(steps[1]["loss"], rel=1e-4)  # without the division it would be fourfold
    assert steps[0]["grad_norm"] == pytest.approx(steps[1]["grad_norm"], rel=1e-3)


def test_evaluation_keeps_the_rows_in_order_though_training_groups_by_length(tiny, tmp_path, args):
    trainer = make_trainer(tiny, tmp_path, args)
    predicted = trainer.predict(trainer.eval_dataset)
    assert predicted.label_ids.tolist() == trainer.eval_dataset.labels.tolist()


def epochs_of(trainer, *epochs):
    sampler = trainer._get_train_sampler()
    orders = []
    for epoch in epochs:
        trainer.state.epoch = epoch
        orders.append(list(sampler))
    return orders


def test_an_epochs_order_depends_on_seed_and_epoch_alone_and_groups_by_length(tiny, tmp_path, args):
    trainer = make_trainer(tiny, tmp_path, args)
    first = epochs_of(trainer, 0.0, 1.0)
    torch.rand(7)  # as dropout would, and on each process by another number
    assert epochs_of(trainer, 0.0, 1.4) == first  # 1.4: where an interruption fell
    assert first[0] != first[1] and sorted(first[0]) == sorted(first[1]) == list(range(32))
    lengths = np.array([len(ids) for ids in trainer.train_dataset.ids])[first[0]].reshape(4, 8)
    assert np.ptp(lengths, axis=1).mean() < np.ptp(lengths)


def test_a_micro_batch_that_does_not_fit_is_halved_and_changes_neither_batch_nor_loss(
    tiny, tmp_path, args, capsys, monkeypatch
):
    losses = []
    for fits in (8, 2):
        trainer = make_trainer(tiny, tmp_path / str(fits), args, logging_steps=1)
        trainer.model.dropout.p = 0.0
        compute = trainer.compute_loss

        def limited(model, inputs, *rest, compute=compute, fits=fits, **more):
            if model.training and len(inputs["input_ids"]) > fits:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return compute(model, inputs, *rest, **more)

        monkeypatch.setattr(trainer, "compute_loss", limited)
        training.train(trainer, CPU)
        assert f"fits with micro-batch {fits} (x {8 // fits} accumulated" in capsys.readouterr().out
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_trial_meets_the_second_micro_step_beside_the_gradients_of_the_first(
    tiny, tmp_path, args, capsys, monkeypatch
):
    trainer = make_trainer(tiny, tmp_path, args)
    compute = trainer.compute_loss

    def limited(model, inputs, *rest, **more):
        with_gradients = any(weight.grad is not None for weight in model.parameters())
        if with_gradients and len(inputs["input_ids"]) > 2 and trainer.optimizer is None:  # in the trial
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(model, inputs, *rest, **more)

    monkeypatch.setattr(trainer, "compute_loss", limited)
    args.micro_batch_size = trainer.args.per_device_train_batch_size = 4
    trainer.args.gradient_accumulation_steps = 2
    training.train(trainer, CPU)
    assert "fits with micro-batch 2 (x 4 accumulated" in capsys.readouterr().out


def test_a_gpu_too_small_for_one_review_is_told_before_training(tiny, tmp_path, args, stops, monkeypatch):
    trainer = make_trainer(tiny, tmp_path, args)

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "compute_loss", out_of_memory)
    stops(lambda: training.train(trainer, CPU), "too little memory", "--max-length")


def test_other_errors_of_the_trial_step_are_not_taken_for_lack_of_memory(tiny, tmp_path, args, monkeypatch):
    trainer = make_trainer(tiny, tmp_path, args)

    def broken(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(trainer, "compute_loss", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        training.train(trainer, CPU)


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


def damaged(checkpoint, kind):
    verb, name = kind.split()
    file = checkpoint / name
    if verb == "delete":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 100 if verb == "cut" else 0])


FILES = "model.safetensors optimizer.pt trainer_state.json scheduler.pt rng_state.pth config.json sizes.json".split()
KINDS = [*(f"cut {name}" for name in FILES), "empty model.safetensors", "delete optimizer.pt", "delete sizes.json"]


def test_a_damaged_best_checkpoint_is_noticed_before_training_goes_on(tiny, tmp_path, args, capsys):
    trainer = make_trainer(tiny, tmp_path, args)
    accuracies = iter([0.9, 0.5])
    trainer.compute_metrics = lambda _: {"accuracy": next(accuracies)}
    trainer.train()
    best, newest = sorted((tmp_path / "checkpoints").iterdir())
    assert training.newest_checkpoint(tmp_path / "checkpoints") == newest
    damaged(best, "empty model.safetensors")
    assert training.newest_checkpoint(tmp_path / "checkpoints") is None
    assert "the best so far" in capsys.readouterr().out


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


def test_an_fp16_checkpoint_continues_in_another_precision(tiny, tmp_path, args):
    interrupt(make_trainer(tiny, tmp_path, args), 1.0)
    checkpoint = training.newest_checkpoint(tmp_path / "checkpoints")
    torch.save(torch.amp.GradScaler("cpu").state_dict(), checkpoint / "scaler.pt")
    continued = make_trainer(tiny, tmp_path, args)
    training.train(continued, CPU)
    assert continued.state.global_step == continued.state.max_steps


def test_a_best_checkpoint_that_is_gone_at_the_end_is_no_success(tiny, tmp_path, args, stops, often):
    interrupt(make_trainer(tiny, tmp_path, args), 1.5)
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-4")
    continued = make_trainer(tiny, tmp_path, args)
    continued.compute_metrics = lambda _: {"accuracy": 0.0}
    stops(lambda: training.train(continued, CPU), "best checkpoint", "delete", "checkpoints/")


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tiny, tmp_path, args, capsys):
    make_trainer(tiny, tmp_path, args).train()
    checkpoints = tmp_path / "checkpoints"
    older, newest = sorted(checkpoints.iterdir())
    assert training.newest_checkpoint(checkpoints) == newest
    for kind in KINDS:
        copy = tmp_path / kind.replace(" ", "_")
        shutil.copytree(checkpoints, copy)
        damaged(copy / newest.name, kind)
        assert training.newest_checkpoint(copy) == copy / older.name, kind
        assert "is damaged" in capsys.readouterr().out


def interrupt(trainer, epoch):
    """Train until this (part of an) epoch is over, and then break off."""

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.epoch >= epoch:
                raise KeyboardInterrupt

    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        training.train(trainer, CPU)


def test_an_interrupted_training_ends_with_the_weights_of_an_uninterrupted_one(tiny, tmp_path, args, often):
    args.epochs = 3
    whole = make_trainer(tiny, tmp_path / "whole", args)
    training.train(whole, CPU)
    interrupt(make_trainer(tiny, tmp_path / "stopped", args), 2.25)  # a step after its last checkpoint
    continued = make_trainer(tiny, tmp_path / "stopped", args)
    training.train(continued, CPU)
    accuracies = ([e["eval_accuracy"] for e in t.state.log_history if "eval_accuracy" in e] for t in (whole, continued))
    assert next(accuracies) == next(accuracies)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, continued.model.state_dict()[name]), name


def run_until_out_of_time(tiny, folder, args, monkeypatch, questions: int):
    """Train; the clock says that the time is over from this question on. The trainer, and the code that ended it."""
    asked = iter([False] * (questions - 1))
    monkeypatch.setattr(device, "out_of_time", lambda: next(asked, True))
    trainer = make_trainer(tiny, folder, args)
    try:
        training.train(trainer, CPU)
        return trainer, None
    except SystemExit as left:
        return trainer, left.code


def test_a_training_that_time_stops_again_and_again_ends_with_the_weights_of_an_unstopped_one(
    tiny, tmp_path, args, monkeypatch, capsys
):
    whole = make_trainer(tiny, tmp_path / "whole", args)
    training.train(whole, CPU)
    capsys.readouterr()
    steps, code = [0], 3
    while code == 3:
        stopped, code = run_until_out_of_time(tiny, tmp_path / "stopped", args, monkeypatch, 2)
        assert stopped.state.global_step > steps[-1]  # each run makes a step at least
        steps.append(stopped.state.global_step)
        assert code is None or "out of time" in capsys.readouterr().out
    assert code is None and steps == [0, 2, 4, 6, 8]  # inside an epoch and at its end
    evaluated = [
        [(e["epoch"], e["eval_accuracy"]) for e in t.state.log_history if "eval_loss" in e] for t in (whole, stopped)
    ]
    assert evaluated[0] == evaluated[1] and [epoch for epoch, _ in evaluated[0]] == [1.0, 2.0]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, stopped.model.state_dict()[name]), name


def test_each_log_and_each_evaluation_is_one_line_without_a_dictionary(tiny, tmp_path, args, capsys):
    training.train(make_trainer(tiny, tmp_path, args, logging_steps=2), CPU)
    lines = capsys.readouterr().out.splitlines()[1:]  # the first tells of the trial step
    assert "".join("L" if "  step " in line else "E" if "  after epoch " in line else "?" for line in lines) == "LLELLE"
    assert "{" not in "".join(lines) and "min left" in lines[0] and "validation accuracy" in lines[2]


def test_an_epoch_whose_evaluation_was_interrupted_is_evaluated_all_the_same(tiny, tmp_path, args, often):
    stopped = make_trainer(tiny, tmp_path, args)

    def interrupted(_):
        raise KeyboardInterrupt

    stopped.compute_metrics = interrupted
    with pytest.raises(KeyboardInterrupt):
        training.train(stopped, CPU)
    continued = make_trainer(tiny, tmp_path, args)
    training.train(continued, CPU)
    evaluated = [entry["epoch"] for entry in continued.state.log_history if "eval_accuracy" in entry]
    assert evaluated == [1.0, 2.0]  # a checkpoint saved just before would have been taken for evaluated


def test_a_training_continued_in_another_folder_still_ends_with_its_best_checkpoint(tiny, tmp_path, args):
    interrupt(make_trainer(tiny, tmp_path / "first", args), 1.0)
    shutil.move(tmp_path / "first", tmp_path / "second")  # as a Kaggle session's outputs come to the next
    continued = make_trainer(tiny, tmp_path / "second", args)
    continued.compute_metrics = lambda _: {"accuracy": 0.0}  # so that the first epoch stays the best
    training.train(continued, CPU)
    assert continued.state.best_model_checkpoint == str(tmp_path / "second" / "checkpoints" / "checkpoint-4")


def test_a_training_that_diverges_is_refused_before_anything_is_saved(tiny, tmp_path, args, stops):
    trainer = make_trainer(tiny, tmp_path, args)
    torch.nn.init.constant_(trainer.model.classifier.bias, float("nan"))
    stops(lambda: training.train(trainer, CPU), "became NaN", "--learning-rate")
    assert trainer.state.global_step < trainer.state.max_steps  # and long before its end


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
