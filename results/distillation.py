#!/usr/bin/env python
"""The proof of the white-box method: students of one teacher against students without, on real reviews and weights.

Each run trains a student on the same gold reviews. Levers are chosen on validation; test is read when the recipe is
frozen, by --read-test. An interrupted part continues where it stopped: finished runs are not trained again. The teacher
is 02's folder under --output-dir, made by 02_finetune_roberta.py with the same subsets.

    common="--dataset path/to/imdb --output-dir outputs/results --student-model results/weights/minilm-l6"
    python results/distillation.py $common --runs control logits --seeds 1
    python results/distillation.py $common --read-test

Writes results/distillation/validation.csv, and with --read-test white_box.csv (one row a run) and claim.csv.
`results/distillation/run.sh` holds the commands of all tables.
"""

import argparse
import hashlib
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import artifacts, data, device, metrics, models, scoring, settings

TABLES = Path(__file__).parent / "distillation"
COLUMNS = "run seed gold transfer n_test accuracy ci_low ci_high gap_closed mcnemar_p agreement nll ece seconds".split()
TEACHER_STEP = "02_roberta"
SAME = ("seed", "validation_samples", "max_train_samples")  # a teacher has learned from the same labels, no more
# What a run is. `transfer`: share of the unlabelled reviews beside the gold ones, the teacher's surest first, of
# `transfer_samples` or else --max-transfer-samples; `labels`: the teacher's "logits", its "argmax", or none; `gold`:
# "all" gold reviews, "none", or the negative ones first of a label-sorted file, cut (the old mistake); `base`: the
# student as downloaded, after masked-language modelling ("mlm"), or as another run of the same seed left it.
GOLD_EPOCHS, TRANSFER_EPOCHS, FINAL_EPOCHS, MLM_EPOCHS = 6, 2, 4, 2
STUDENT = {
    "transfer": 1.0,
    "labels": "logits",
    "gold": "all",
    "feature_weight": 0.0,
    "alpha": 0.9,
    "epochs": TRANSFER_EPOCHS,
    "base": "downloaded",
}
FINAL = STUDENT | {"epochs": FINAL_EPOCHS}  # the longer schedule: the one lever that led on validation
ALONE = STUDENT | {"transfer": 0.0, "epochs": GOLD_EPOCHS}
CONTROL = ALONE | {"labels": "none", "alpha": 0.0}
RUNS = {
    "control": CONTROL,
    "control_longer": CONTROL | {"epochs": 20},  # as many reviews pass as of final at 8,000 unlabelled ones
    "logits": STUDENT,
    "features": STUDENT | {"alpha": 0.0, "feature_weight": 0.1},
    "logits_features": STUDENT | {"feature_weight": 0.1},
    "margin": STUDENT | {"soft_loss": "margin"},
    "argmax_labels": STUDENT | {"labels": "argmax", "alpha": 0.0},
    "no_transfer_set": ALONE | {"feature_weight": 0.1},
    "gold_last": CONTROL | {"base": "logits", "epochs": 1, "learning_rate": 2e-5},
    "more_transfer": STUDENT | {"transfer_samples": 16000},
    "final": FINAL,
    "confident": STUDENT | {"transfer": 0.75},
    "control_levers": CONTROL | {"base": "mlm"},
    "after_mlm": STUDENT | {"base": "mlm"},
    "label_sorted": ALONE | {"gold": "label-sorted", "epochs": TRANSFER_EPOCHS},
}


def make_parser(description: str, runs: dict[str, dict]) -> argparse.ArgumentParser:
    """The flags of a proof: subsets, student and training, the same for all its runs."""
    parser = settings.make_parser(description, reads=("train", "transfer", "test"))
    subsets = {"max_train_samples": 2000, "validation_samples": 1000, "max_transfer_samples": 8000}
    parser.set_defaults(**subsets, max_test_samples=5000)
    add = parser.add_argument
    add("--student-model", help="hub name or folder of the student")
    add("--max-length", type=settings.positive_int, default=128, help="tokens of a review")
    settings.add_training_flags(parser, epochs=2, learning_rate=1e-4, batch_size=32, micro_batch_size=32)
    add("--temperature", type=settings.positive, default=2.0, help="of the KL term")
    add("--batch-tokens", type=settings.count_or_auto, default="auto", help=settings.BATCH_TOKENS_HELP)
    add("--runs", nargs="+", choices=list(runs), default=list(runs), help="which to train; the table holds all found")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of the student's training; the subsets are --seed's")
    add("--tables", type=Path, default=TABLES, help="where the tables are written")
    add("--read-test", action="store_true", help="train nothing: test the finished runs and write their table")
    return parser


def score(args, hardware: device.Hardware, model_folder: Path, reviews: pd.DataFrame, file: Path) -> np.ndarray:
    """A model's (n, 2) logits of the reviews, saved in `file` once for these reviews."""
    record, of = file.with_suffix(".json"), {"reviews": data.fingerprint(reviews)}
    if not record.exists() or artifacts.read_json(record) != of:
        tokenizer = models.load_tokenizer(str(model_folder))
        model = models.load_classifier(str(model_folder)).to(hardware.device).eval()
        ids = models.encode(tokenizer, reviews["text"].tolist(), args.max_length)
        scores = scoring.score_encoder(model, ids, tokenizer.pad_token_id, hardware, args.batch_tokens)["scores"]
        with artifacts.whole(file) as temporary, open(temporary, "wb") as handle:
            np.save(handle, scores)
        artifacts.write_json(record, of)
    return np.load(file)


def read_soft_labels(folder: Path, split: str, table: pd.DataFrame) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """The teacher's logits, and (features, rows), of a table's reviews."""
    from common import distill

    in_file, scores = scoring.read_scores(folder, split, scoring.LOGITS)
    rows = distill.teacher_rows(in_file, table["example_id"], split, "02_finetune_roberta.py")
    return scores[rows], (artifacts.read_array(folder / f"{split}_features.npy", len(in_file)), rows)


class Texts(Dataset):
    """Token ids alone, for masked-language modelling."""

    def __init__(self, ids: list[np.ndarray]):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        return {"input_ids": self.ids[row].tolist()}


def masked_loss(model, inputs: dict):
    """Cross-entropy of the masked tokens, with the vocabulary's logits computed for those alone.

    They are 15% of all; over every token the head costs as much arithmetic as MiniLM's blocks.
    """
    import torch.nn.functional as F

    masked = inputs["labels"] != -100

    def keep_masked(_module, _inputs, output):
        output.last_hidden_state = output.last_hidden_state[masked].unsqueeze(0)
        return output

    hook = model.base_model.register_forward_hook(keep_masked)
    try:
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[0]
    finally:
        hook.remove()
    return F.cross_entropy(logits.float(), inputs["labels"][masked])


def pretrain(args, hardware: device.Hardware, tokenizer, ids: list[np.ndarray], folder: Path) -> None:
    """The student after in-domain masked-language modelling on train and transfer reviews (Gururangan et al. 2020)."""
    if folder.exists():
        return
    import torch
    from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling

    from common import training

    class MaskedTokens(training.ReviewTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return masked_loss(model, inputs)

    device.seed_everything(args.seed)
    model = AutoModelForMaskedLM.from_pretrained(args.student_model, dtype=torch.float32)
    model.accepts_loss_kwargs = False
    checkpoints = folder.with_name("mlm_checkpoints")
    own = training.WITHOUT_VALIDATION | {"num_train_epochs": MLM_EPOCHS}
    trainer = MaskedTokens(
        model=model,
        args=training.training_arguments(args, hardware, checkpoints, len(ids), **own),
        train_dataset=Texts(ids),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
    )
    training.train(trainer, hardware)
    training.save(model, tokenizer, folder, checkpoints)


def base_of(args, run: dict, seed: int, folder: Path) -> str:
    """The folder or name of the weights that a run's student starts from."""
    if run["base"] == "downloaded":
        return args.student_model
    base = folder / "mlm" if run["base"] == "mlm" else folder / f"{run['base']}-{seed}" / "model"
    if not base.exists():
        settings.stop(f"{base} is missing: put {run['base']} before the run that starts from it")
    return str(base)


def chosen_rows(run: dict, gold: np.ndarray, transfer_logits: np.ndarray | None) -> dict[str, np.ndarray]:
    """The rows of each split that a run trains on: of the transfer set those of which the teacher is surest."""
    rows = {"train": np.arange(len(gold))} if run["gold"] != "none" else {}
    if run["gold"] == "label-sorted":
        rows["train"] = np.argsort(gold, kind="stable")[: len(gold) // 2]
    if run["transfer"]:
        surest = np.argsort(-np.abs(transfer_logits[:, 1] - transfer_logits[:, 0]), kind="stable")
        rows["transfer"] = np.sort(surest[: round(run["transfer"] * len(surest))])
    return rows


def train_run(args, hardware, run: dict, seed: int, folder: Path, base: str, reviews, ids: dict, soft: dict) -> None:
    """Train a run's student into folder/model."""
    from common import distill, training

    gold = reviews.train["label"].to_numpy()
    rows = chosen_rows(run, gold, soft["transfer"][0] if run["transfer"] else None)
    hard = {"train": gold, "transfer": np.full(len(ids["transfer"]), distill.IGNORED)}
    hard = np.concatenate([hard[split][kept] for split, kept in rows.items()])
    arrays, width = {}, None
    if run["labels"] != "none":
        logits = np.concatenate([soft[split][0][kept] for split, kept in rows.items()])
        if run["labels"] == "argmax":  # the teacher's hard labels where no gold one is known
            hard = np.where(hard == distill.IGNORED, logits.argmax(axis=1), hard)
        else:
            arrays["teacher_logits"] = logits
    if run["feature_weight"] > 0:
        parts = [(soft[split][1][0], soft[split][1][1][kept]) for split, kept in rows.items()]
        arrays["teacher_features"] = distill.FeatureRows(parts, list(range(parts[0][0].shape[1])))
        width = parts[0][0].shape[-1]
    own = {"seed": seed, "soft_loss": run.get("soft_loss", "kl"), "student_model": base}
    own["learning_rate"] = run.get("learning_rate", args.learning_rate)
    distill.train_student(
        argparse.Namespace(**vars(args) | own),
        hardware,
        folder / "model",
        training.ReviewDataset([ids[split][row] for split, kept in rows.items() for row in kept], hard, **arrays),
        training.ReviewDataset(ids["validation"], reviews.validation["label"].to_numpy())
        if ids["validation"]
        else None,
        epochs=run["epochs"],
        alpha=run["alpha"],
        feature_weight=run["feature_weight"],
        teacher_width=width,
    )


def made_from(args, run: dict, seed: int, folder: Path, reviews: data.Reviews, soft: dict) -> dict:
    """What decides a run's student: its recipe, the settings, the reviews and the teacher's logits.

    `transfer_reviews` counts the unlabelled ones that it reads, or that the run read from which it starts.
    """
    names = "student_model max_length learning_rate batch_size weight_decay warmup_fraction temperature".split()
    about = {"run": run, "seed": seed} | {name: getattr(args, name) for name in names}
    share = 1.0 if run["base"] == "mlm" else run["transfer"]
    splits = ["train", "validation"] + (["transfer"] if share else [])
    about |= {split: data.fingerprint(getattr(reviews, split)) for split in splits}
    about["transfer_reviews"] = round(share * len(reviews.transfer))
    if run["base"] not in ("downloaded", "mlm"):
        before = artifacts.read_json(Path(base_of(args, run, seed, folder)).with_name("made_from.json"))
        about["transfer_reviews"] = before["transfer_reviews"]
    if run["labels"] != "none":
        about["teacher"] = {split: hashlib.sha256(logits.tobytes()).hexdigest() for split, (logits, _) in soft.items()}
    return about


def make_run(args, hardware, run: dict, name: str, seed: int, folder: Path, reviews, ids: dict, soft: dict) -> None:
    """A run's student, unless it is there; stops when the one that is there was made from something else."""
    here = folder / f"{name}-{seed}"
    artifacts.lock(here)
    record, about, continued = here / "made_from.json", made_from(args, run, seed, folder, reviews, soft), here.exists()
    if not continued:
        artifacts.write_json(record, about)
    if artifacts.read_json(record) != about:
        settings.stop(f"{here}/ was made with other settings, reviews or teacher: delete it to make it again")
    if (here / "seconds.json").exists():
        return
    print(f"{name}, seed {seed}", flush=True)
    if run["base"] == "mlm":
        tokenizer = models.load_tokenizer(args.student_model)
        pretrain(args, hardware, tokenizer, ids["train"] + ids["transfer"], folder / "mlm")
    started = time.time()
    train_run(args, hardware, run, seed, here, base_of(args, run, seed, folder), reviews, ids, soft)
    # An interrupted training's seconds are not known: the time of its first part is gone.
    artifacts.write_json(here / "seconds.json", {"seconds": None if continued else round(time.time() - started)})


def finished(folder: Path, runs: dict[str, dict]) -> list[tuple[str, int]]:
    """The (name, seed) of the runs that are trained, by seed within a name."""
    found = []
    for name in runs:
        seeds = [int(file.parent.name.rpartition("-")[2]) for file in folder.glob(f"{name}-*/seconds.json")]
        found += [(name, seed) for seed in sorted(seeds)]
    return found


def describe_teacher(args, name: str, gold: int, labels: np.ndarray, logits: np.ndarray) -> dict:
    """The row of a teacher that has learned from `gold` labelled reviews."""
    quality = metrics.describe(labels, logits)
    row = {"run": name, "seed": args.seed, "gold": gold, "transfer": 0, "n_test": quality["n"]}
    scores = {key: quality[key] for key in ("accuracy", "ci_low", "ci_high", "nll", "ece")}
    return row | scores


def gap_closed(labels: np.ndarray, student: np.ndarray, control: np.ndarray, teacher: np.ndarray) -> float | None:
    """(student - control) / (teacher - control) of accuracies, by (n, 2) logits; None where the teacher leads by less
    than a point."""
    of_student, of_control, of_teacher = (
        metrics.accuracy(labels, logits.argmax(axis=1)) for logits in (student, control, teacher)
    )
    return (of_student - of_control) / (of_teacher - of_control) if of_teacher - of_control >= 0.01 else None


def make_table(
    args, folder: Path, labels: np.ndarray, runs: dict[str, dict], teachers: dict[str, np.ndarray]
) -> pd.DataFrame:
    """One row a tested run, compared with its teacher and with the control of its seed.

    A run's teacher is (n, 2) logits, NaN where it has not read the review: gap and agreement are of the others.
    """
    tested = {
        (name, seed): np.load(folder / f"{name}-{seed}" / "test_logits.npy") for name, seed in finished(folder, runs)
    }
    rows = []
    for (name, seed), logits in tested.items():
        control, teacher, gap, p = tested.get(("control", seed)), teachers[name], None, None
        both = np.isfinite(teacher[:, 0])
        if control is not None and name != "control":
            gap = gap_closed(labels[both], logits[both], control[both], teacher[both])
            p = metrics.mcnemar_p(logits.argmax(axis=1) == labels, control.argmax(axis=1) == labels)
        quality = metrics.describe(labels, logits)
        rows.append(
            {
                "run": name,
                "seed": seed,
                "gold": args.max_train_samples // (2 if runs[name]["gold"] == "label-sorted" else 1),
                "transfer": artifacts.read_json(folder / f"{name}-{seed}" / "made_from.json")["transfer_reviews"],
                "n_test": quality["n"],
                **{key: quality[key] for key in ("accuracy", "ci_low", "ci_high")},
                "gap_closed": gap,
                "mcnemar_p": p,
                "agreement": metrics.accuracy(teacher[both].argmax(axis=1), logits[both].argmax(axis=1)),
                "nll": quality["nll"],
                "ece": quality["ece"],
                "seconds": artifacts.read_json(folder / f"{name}-{seed}" / "seconds.json")["seconds"],
            }
        )
    return pd.DataFrame(rows)


def claim(right: dict[str, np.ndarray], student: str, controls: list[str], teacher: str | None = None) -> dict:
    """How far `student` leads the best of `controls` by seed-mean accuracy, and how much of the gap to `teacher` it
    closes.

    `right` holds (seeds, n) booleans by run: whether each test review was called right. The interval is a bootstrap
    over the reviews (Efron 1979), paired: of each review's share of right seeds, the student's less the control's. The
    gap is that to the first of the controls.
    """
    from scipy.stats import bootstrap

    best = max(controls, key=lambda name: right[name].mean())
    lead = right[student].mean(axis=0) - right[best].mean(axis=0)
    interval = bootstrap((lead,), np.mean, n_resamples=9999, batch=100, method="percentile", rng=0).confidence_interval
    row = {"student": student, "against": best, "seeds": len(right[student]), "n_test": len(lead)}
    row |= {"student_accuracy": right[student].mean(), "against_accuracy": right[best].mean(), "lead": lead.mean()}
    row |= {"ci_low": interval.low, "ci_high": interval.high, "gap_closed": None}
    if teacher is not None:
        first = right[controls[0]].mean()
        row["gap_closed"] = (right[student].mean() - first) / (right[teacher].mean() - first)
    return row


def right_by_run(folder: Path, labels: np.ndarray, student: str, controls: list[str]) -> dict[str, np.ndarray]:
    """(seeds, n) booleans by run, of the student's seeds: itself, and those of the controls that have all of them.

    Empty where the student or the first of the controls, against which gaps are measured, is not finished.
    """
    made = finished(folder, dict.fromkeys([student, *controls], {}))
    seeds = [seed for name, seed in made if name == student]
    names = [student, *(name for name in controls if all((name, seed) in made for seed in seeds))]
    if not seeds or controls[0] not in names:
        return {}
    files = {name: [folder / f"{name}-{seed}" / "test_logits.npy" for seed in seeds] for name in names}
    return {name: np.stack([np.load(file).argmax(axis=1) == labels for file in of]) for name, of in files.items()}


def read_test(args, hardware, folder: Path, test: pd.DataFrame, runs: dict[str, dict]) -> None:
    """Test logits of every finished run."""
    if not finished(folder, runs):
        settings.stop(f"{folder}/ holds no finished run: leave out --read-test first")
    for name, seed in finished(folder, runs):
        print(f"testing {name}, seed {seed}", flush=True)
        score(args, hardware, folder / f"{name}-{seed}" / "model", test, folder / f"{name}-{seed}" / "test_logits.npy")


def write_runs(file: Path, table: pd.DataFrame) -> None:
    """Write and print a table of runs."""
    table = table[COLUMNS].astype({"seconds": "Int64"}).round(6)
    artifacts.write_table(file, table)
    print(table.to_string(index=False), flush=True)


def write_validation(args, hardware, folder: Path, validation: pd.DataFrame, runs: dict[str, dict], file: str) -> None:
    """One row a finished run: what it says on validation, by which levers and epochs are chosen."""
    labels, rows = validation["label"].to_numpy(), []
    for name, seed in finished(folder, runs):
        here = folder / f"{name}-{seed}"
        quality = metrics.describe(labels, score(args, hardware, here / "model", validation, here / "validation.npy"))
        rows.append({"run": name, "seed": seed} | {key: value for key, value in quality.items() if key != "f1"})
    artifacts.write_table(args.tables / file, pd.DataFrame(rows))


def write_white_box(args, hardware, folder: Path, of_teacher: Path, test: pd.DataFrame) -> None:
    """white_box.csv, and claim.csv of the seeds that all its runs have."""
    labels = test["label"].to_numpy()
    read_test(args, hardware, folder, test, RUNS)
    teacher = score(args, hardware, of_teacher, test, folder / "teacher" / "test_logits.npy")
    first = pd.DataFrame([describe_teacher(args, "teacher", args.max_train_samples, labels, teacher)])
    made = make_table(args, folder, labels, RUNS, dict.fromkeys(RUNS, teacher))
    write_runs(args.tables / "white_box.csv", pd.concat([first, made]))
    right = right_by_run(folder, labels, "final", ["control", "control_longer", "control_levers"])
    if right:
        controls = [name for name in right if name != "final"]
        right["teacher"] = (teacher.argmax(axis=1) == labels)[None]
        row = claim(right, "final", controls, "teacher")
        artifacts.write_table(args.tables / "claim.csv", pd.DataFrame([row]).round(6))


def encode_reviews(args, reviews: data.Reviews) -> dict[str, list[np.ndarray]]:
    """The student's token ids of every split that it trains on or is chosen by."""
    tokenizer = models.load_tokenizer(args.student_model)
    return {
        split: models.encode(tokenizer, getattr(reviews, split)["text"].tolist(), args.max_length)
        for split in ("train", "validation", "transfer")
    }


def make_runs(args, hardware: device.Hardware, names: list[str], folder: Path) -> None:
    """The students of the named runs, which read the same transfer set."""
    reviews, soft = data.load_reviews(args, reads=("train", "transfer")), {}
    ids = encode_reviews(args, reviews)
    if any(RUNS[name]["labels"] != "none" for name in names):  # the others can run while 02 still scores
        artifacts.refuse_conflict(args, artifacts.read_run(args, TEACHER_STEP), reviews.fingerprints, SAME)
        of_teacher = artifacts.require(args, TEACHER_STEP, "soft_labels")
        soft = {split: read_soft_labels(of_teacher, split, getattr(reviews, split)) for split in ("train", "transfer")}
    for seed in args.seeds:
        for name in names:
            make_run(args, hardware, RUNS[name], name, seed, folder, reviews, ids, soft)
            write_validation(args, hardware, folder, reviews.validation, RUNS, "validation.csv")


def main() -> None:
    args = settings.parse(make_parser(__doc__, RUNS), "distillation", None)
    hardware = device.detect(args)
    folder = Path(args.output_dir, "distillation")
    if args.read_test:
        of_teacher = artifacts.require(args, TEACHER_STEP, "model")
        test = data.load_reviews(args, reads=("train", "test")).test
        return write_white_box(args, hardware, folder, of_teacher, test)
    samples = {name: RUNS[name].get("transfer_samples", args.max_transfer_samples) for name in args.runs}
    for count in dict.fromkeys(samples.values()):
        part = argparse.Namespace(**vars(args) | {"max_transfer_samples": count})
        make_runs(part, hardware, [name for name in args.runs if samples[name] == count], folder)


if __name__ == "__main__":
    main()
