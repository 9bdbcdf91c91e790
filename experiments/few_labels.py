#!/usr/bin/env python
"""Test accuracy against the number of gold labels: where does a teacher pay, where is a plain fine-tune enough?

At each number of labels, those of validation included: the control, fine-tuned on the labels alone; a student of the
encoder and one of the LLM, both tuned on the same labels, both with unlabelled reviews; 01's NB-SVM; and what a user
would pick instead, a logistic regression on the encoder's frozen embeddings, or SetFit. SetFit runs only if it is named
in --runs: it wants an environment of its own (pip install setfit==1.2.0 "transformers<5"), and few labels, as it trains
on pairs. Without labels the LLM teaches as it is, calibrated on the transfer set. With fewer than 500 labels no student
reads validation, and its last epoch is kept. Seed 1 draws the labels by seed 42, seed 2 by 43, and so on; test stays
the same. 01, 02 and 03 of each draw have run before with its subsets, in --teachers-from/LABELS-DRAW (0 labels: that
with most of them).

    common="--dataset path/to/imdb --output-dir outputs/few_labels"
    common="$common --student-model outputs/weights/minilm-l6 --roberta-model outputs/weights/mpnet-base"
    python experiments/few_labels.py $common --labels 50 --seeds 1 2 3
    python experiments/few_labels.py $common --runs setfit --labels 50
    python experiments/tables.py results/few_labels --collect outputs/few_labels/runs --read-test
"""

import argparse
import dataclasses
import math
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import data, device, encoding, models, scoring, settings, storage
from experiments import distillation

LABELS = {0: (1000, 2000), 50: (16, 34), 500: (100, 400), 3000: (1000, 2000)}  # reviews of validation and of train
RUNS = ("control", "student_of_encoder", "student_of_llm", "nb_svm", "frozen_embeddings")
ALTERNATIVES = ("frozen_embeddings", "setfit")
EMBEDDINGS_CS = [10.0**power for power in range(-2, 4)]  # inverse L2 penalties; embeddings have length 1
READS_VALIDATION = 500  # fewer labels are too few to choose an epoch by
FIRST_DRAW = 42


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = distillation.make_parser(__doc__, (*RUNS, "setfit"))
    parser.set_defaults(max_transfer_samples=4000, runs=list(RUNS))
    add = parser.add_argument
    add("--labels", nargs="+", type=int, choices=LABELS, default=list(LABELS), help="numbers of labels")
    add("--roberta-model", help="folder of the encoder of frozen_embeddings and setfit")
    add("--embedded-test-samples", type=settings.positive_int, default=500, help="test reviews that it embeds")
    args = settings.parse(parser, "few_labels", argv)
    if any(getattr(args, name) != parser.get_default(name) for name in ("max_train_samples", "validation_samples")):
        parser.error("--labels decides the subsets: leave out --max-train-samples and --validation-samples")
    if needs := [name for name in ALTERNATIVES if name in args.runs and not Path(args.roberta_model).is_dir()]:
        parser.error(f"{needs[0]} needs --roberta-model, a folder: pass it, or --runs without {needs[0]}")
    return args


def recipe(name: str, labels: int, gold: int, transfer: int, batch: int) -> dict:
    """A run's settings; the control takes as many steps as the students."""
    if name == "control":
        steps = distillation.FINAL["epochs"] * math.ceil((gold + transfer) / batch)
        return distillation.CONTROL | {"epochs": round(steps / math.ceil(gold / batch))}
    if name == "student_of_encoder":
        return distillation.FINAL
    if labels:
        return distillation.FINAL | {"teacher": "tuned_teacher"}
    return distillation.FINAL | {"teacher": "zero_shot_batch_teacher", "labelled": "none", "alpha": 1.0}


def study_of(args: argparse.Namespace, hardware: device.Hardware, labels: int, seed: int) -> distillation.Study:
    """The reviews of a draw of labels, with the same test reviews for all, and the place of its 01, 02 and 03."""
    (validation, train), draw = LABELS[labels], FIRST_DRAW + seed - 1
    folder = Path(args.teachers_from or args.output_dir, f"{labels or max(LABELS)}-{draw}")
    subset = {"validation_samples": validation, "max_train_samples": train, "seed": draw, "output_dir": str(folder)}
    origin = argparse.Namespace(**vars(args) | subset)
    reviews = data.load_reviews(origin, reads=("train", "transfer"))
    if (len(reviews.validation), len(reviews.train)) != (validation, train):
        settings.stop(f"{args.dataset} has too few labelled reviews: pass other --labels than {labels}")
    reviews = dataclasses.replace(reviews, test=data.load_reviews(args, reads=("test",)).test)
    return distillation.Study(args, hardware, reviews, origin, str(labels))


def embed(study: distillation.Study, reviews: pd.DataFrame) -> pd.DataFrame:
    """(n, width) embeddings by example_id: the mean of the encoder's last hidden states, scaled to length 1.

    This is how sentence-transformers embeds by MPNet and MiniLM. Each distinct review is embedded once: the file in
    --output-dir/embeddings grows by 100 reviews at a time, so a run that was ended continues.
    """
    args, encoder, size = study.args, study.args.roberta_model, 100
    of_dataset = study.reviews.fingerprints["dataset/train"]
    name = f"{models.weights_digest(Path(encoder))}-{args.max_length}-{of_dataset}.parquet"
    file = Path(args.output_dir, "embeddings", name)
    known = storage.read_table(file).set_index("example_id") if file.exists() else pd.DataFrame()
    missing = reviews[~reviews["example_id"].isin(known.index)]
    if len(missing):
        layer, tokenizer = models.load_config(encoder).num_hidden_layers, models.load_tokenizer(encoder)
        model = models.prepare_for_scoring(models.load_classifier(encoder), study.hardware)
    for start in range(0, len(missing), size):
        part = missing.iloc[start : start + size]
        ids = encoding.encode(tokenizer, part["text"].tolist(), args.max_length)
        arrays = scoring.score_encoder(model, ids, tokenizer.pad_token_id, study.hardware, args.batch_tokens, [layer])
        mean = arrays["features"][:, 0, 1].astype(np.float32)
        mean /= np.linalg.norm(mean, axis=1, keepdims=True)
        new = pd.DataFrame(mean, pd.Index(part["example_id"], name="example_id"), map(str, range(mean.shape[1])))
        known = pd.concat([known, new])
        storage.write_table(file, known.reset_index())
        print(f"  {min(start + size, len(missing)):,} of {len(missing):,} embedded", flush=True)
    return known.loc[reviews["example_id"]]


def frozen_embeddings(study: distillation.Study, labelled: pd.DataFrame, test: pd.DataFrame) -> tuple[np.ndarray, dict]:
    """Test log-odds of a logistic regression on frozen embeddings of the labelled reviews, and its C.

    Five-fold cross-validation chooses C by log-loss: accuracy on 50 labels has steps of 2 points.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    test, embedded = embed(study, test), embed(study, labelled)
    model = GridSearchCV(LogisticRegression(max_iter=1000), {"C": EMBEDDINGS_CS}, scoring="neg_log_loss", cv=5)
    model.fit(embedded.to_numpy(), labelled["label"])
    return model.decision_function(test.to_numpy()), {"c": model.best_params_["C"]}


def setfit(study: distillation.Study, labelled: pd.DataFrame, test: pd.DataFrame) -> tuple[np.ndarray, dict]:
    """Test log-odds of SetFit (Tunstall et al. 2022) with its library's defaults: one epoch over pairs of reviews.

    It reads the tokens that the students read: head and tail of a review.
    """
    import datasets
    from setfit import SetFitModel, Trainer, TrainingArguments

    args = study.args
    model = SetFitModel.from_pretrained(args.roberta_model, labels=list(data.LABELS))
    model.model_body.max_seq_length = args.max_length
    cut = [
        model.model_body.tokenizer.batch_decode(
            encoding.encode(model.model_body.tokenizer, part["text"].tolist(), args.max_length),
            skip_special_tokens=True,
        )
        for part in (labelled, test)
    ]
    pairs = datasets.Dataset.from_dict({"text": cut[0], "label": labelled["label"].tolist()})
    how = {"save_strategy": "no", "report_to": "none", "seed": study.origin.seed}
    Trainer(model, TrainingArguments(args.output_dir, **how), train_dataset=pairs).train()
    return np.log(model.predict_proba(cut[1], as_numpy=True)) @ [-1, 1], {}


def make_alternative(study: distillation.Study, name: str) -> None:
    """The test predictions of `frozen_embeddings` or `setfit`, fitted to all labelled reviews, as a run.

    An encoder is slow on a CPU, so --embedded-test-samples of test are read, and the others have NaN.
    """
    args, reviews = study.args, study.reviews
    flags = {flag: getattr(args, flag) for flag in ("max_length", "embedded_test_samples")}
    flags = distillation.settings_of(study, name, study.origin.seed, **flags)
    inputs = study.fingerprints("train", "validation", "test")
    inputs["encoder"] = models.weights_digest(Path(args.roberta_model))
    folder = distillation.begun(flags, f"runs/{study.column(name, flags.seed)}", inputs)
    if folder is None:
        return
    started = time.time()
    rows = np.sort(data.stratified_order(reviews.test["label"], args.seed)[: args.embedded_test_samples])
    labelled, odds = pd.concat([reviews.train, reviews.validation]), np.full(len(reviews.test), np.nan)
    fit = setfit if name == "setfit" else frozen_embeddings
    odds[rows], facts = fit(study, labelled, reviews.test.iloc[rows])
    facts |= {"gold": len(labelled), "transfer": 0, "teacher": "", "seconds": round(time.time() - started)}
    distillation.finish(flags, folder, {"test": reviews.test}, {"test": odds}, **facts)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    hardware = device.detect(args)
    for labels, seed in [(labels, seed) for labels in args.labels for seed in args.seeds]:
        study = study_of(args, hardware, labels, seed)
        for name in args.runs if labels else {"student_of_llm"} & set(args.runs):
            print(f"{labels} labels: {name}, seed {seed}", flush=True)
            if name == "nb_svm":
                distillation.make_nb_svm(study)
            elif name in ALTERNATIVES:
                make_alternative(study, name)
            else:
                sizes = len(study.reviews.train), len(study.reviews.transfer)
                run = recipe(name, labels, *sizes, args.batch_size)
                distillation.make_student(study, name, run, seed, labels >= READS_VALIDATION)


if __name__ == "__main__":
    main()
