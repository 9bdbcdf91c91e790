import argparse
import dataclasses
import shutil

import numpy as np
import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from common import device, models, training

CPU = device.Hardware("cpu", "fp32", "test")


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
    dataset = training.ReviewDataset(models.encode(tokenizer, texts, 32), np.arange(32) % 2)
    device.seed_everything(args.seed)
    model = models.load_classifier(str(tiny / "distilbert"))
    return training.ReviewTrainer(
        model=model,
        args=training.training_arguments(args, CPU, tmp_path / "checkpoints", 32, **more),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=training.Collator(tokenizer.pad_token_id),
        compute_metrics=training.validation_accuracy,
    )


def test_accumulation_changes_neither_the_loss_nor_the_gradient(tiny, tmp_path, args):
    steps = []
    for micro in (8, 2):
        args.micro_batch_size, args.epochs = micro, 1
        options = {"logging_steps": 1, "save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False}
        trainer = make_trainer(tiny, tmp_path, args, **options)
        trainer.train_dataset = training.ReviewDataset(trainer.train_dataset.ids[:8], np.arange(8) % 2)
        trainer.model.dropout.p = 0.0
        trainer.train()
        steps.append(next(entry for entry in trainer.state.log_history if "grad_norm" in entry))
    assert steps[0]["loss"] == pytest.approx(steps[1]["loss"], rel=1e-4)  # without the division it would be fourfold
    assert steps[0]["grad_norm"] == pytest.approx(steps[1]["grad_norm"], rel=1e-3)


def test_evaluation_keeps_the_rows_in_order_though_training_groups_by_length(tiny, tmp_path, args):
    trainer = make_trainer(tiny, tmp_path, args)
    predicted = trainer.predict(trainer.eval_dataset)
    assert predicted.label_ids.tolist() == trainer.eval_dataset.labels.tolist()
    grouping = getattr(trainer.args, "train_sampling_strategy", None) or trainer.args.group_by_length
    assert grouping in ("group_by_length", True)


def test_walking_a_dataset_for_its_lengths_reads_no_features_and_hides_no_error():
    dataset = training.ReviewDataset([np.arange(3), np.arange(5)], np.array([0, 1]), teacher_features=[])
    assert [len(row["input_ids"]) for row in dataset] == [3, 5]
    with pytest.raises(IndexError):
        dataset[0]


def test_the_shim_passes_only_fields_of_this_transformers(args, tmp_path):
    made = training.training_arguments(args, CPU, tmp_path, 100, num_train_epochs=3)
    assert made.num_train_epochs == 3 and made.warmup_steps == 0
    assert {field.name for field in dataclasses.fields(TrainingArguments)} >= {"eval_strategy", "use_cpu"}


def damaged(checkpoint, kind):
    files = {"weights": "model.safetensors", "optimizer": "optimizer.pt"}
    if kind.startswith("cut "):
        file = checkpoint / files[kind.removeprefix("cut ")]
        file.write_bytes(file.read_bytes()[:1000])
    else:
        (checkpoint / kind).unlink()


KINDS = ["cut weights", "cut optimizer", "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"]


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tiny, tmp_path, args, capsys):
    make_trainer(tiny, tmp_path, args, save_total_limit=2).train()
    checkpoints = tmp_path / "checkpoints"
    older, newest = sorted(checkpoints.iterdir())
    assert training.newest_checkpoint(checkpoints) == newest
    for kind in KINDS:
        copy = tmp_path / kind.replace(" ", "_")
        shutil.copytree(checkpoints, copy)
        damaged(copy / newest.name, kind)
        assert training.newest_checkpoint(copy) == copy / older.name, kind
        assert "is damaged" in capsys.readouterr().out


def interrupt(trainer):
    """Train until the second epoch begins."""

    class Stop(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            if state.epoch >= 1:
                raise KeyboardInterrupt

    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        training.train(trainer)


def test_an_interrupted_training_ends_with_the_weights_of_an_uninterrupted_one(tiny, tmp_path, args):
    whole = make_trainer(tiny, tmp_path / "whole", args)
    training.train(whole)
    interrupt(make_trainer(tiny, tmp_path / "stopped", args))
    continued = make_trainer(tiny, tmp_path / "stopped", args)
    training.train(continued)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, continued.model.state_dict()[name]), name


def test_a_training_continued_in_another_folder_still_ends_with_its_best_checkpoint(tiny, tmp_path, args):
    interrupt(make_trainer(tiny, tmp_path / "first", args))
    shutil.move(tmp_path / "first", tmp_path / "second")  # as a Kaggle session's outputs come to the next
    continued = make_trainer(tiny, tmp_path / "second", args)
    continued.compute_metrics = lambda _: {"accuracy": 0.0}  # so that the first epoch stays the best
    best = next((tmp_path / "second" / "checkpoints").iterdir())
    training.train(continued)
    assert continued.state.best_model_checkpoint == str(best)


def test_a_training_that_diverges_is_refused_before_anything_is_saved(tiny, tmp_path, args, stops):
    trainer = make_trainer(tiny, tmp_path, args)
    torch.nn.init.constant_(trainer.model.classifier.bias, float("nan"))
    stops(lambda: training.train(trainer), "became NaN", "--learning-rate")


def test_a_model_that_calls_everything_one_class_is_refused(stops):
    labels = np.arange(100) % 2
    one_class = np.tile([1.0, 0.0], (100, 1))
    stops(lambda: training.refuse_collapse(one_class, labels, "do this"), "every validation review negative", "do this")
    chance = np.eye(2)[np.arange(100) // 2 % 2]
    stops(lambda: training.refuse_collapse(chance, labels, "do this"), "no better than chance")
    assert training.refuse_collapse(np.eye(2)[labels], labels, "") == 1.0
