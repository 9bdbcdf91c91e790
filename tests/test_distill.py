import numpy as np
import pytest
import torch
from conftest import CPU, training_args
from scipy.special import log_softmax, rel_entr, softmax

from common import device, distill, encoding, models, scoring, training

RNG = np.random.default_rng(0)


def tensor(array) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float32)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0])
def test_soft_label_loss_is_t_squared_times_the_mean_kl_of_scipy(temperature):
    student, teacher = RNG.normal(size=(5, 2)), RNG.normal(size=(5, 2))
    p, q = softmax(teacher / temperature, axis=1), softmax(student / temperature, axis=1)
    expected = temperature**2 * rel_entr(p, q).sum(axis=1).mean()
    ours = distill.soft_label_loss(tensor(student), tensor(teacher), temperature).mean()
    assert ours.item() == pytest.approx(expected, rel=1e-5)


def test_hard_label_loss_counts_labelled_reviews_alone():
    logits, labels = RNG.normal(size=(4, 2)), np.array([0, -100, 1, -100])
    by_hand = -(log_softmax(logits, axis=1)[[0, 2], [0, 1]]).sum() / (4 * 0.5)
    ours = distill.hard_label_loss(tensor(logits), torch.tensor(labels), labelled_share=0.5)
    assert ours.item() == pytest.approx(by_hand, rel=1e-5)
    # The mean over micro-batches is the loss of the batch, however labels fall: here one of the two has none.
    parts = [
        distill.hard_label_loss(tensor(logits)[rows], torch.tensor(labels)[rows], labelled_share=0.5)
        for rows in ([0, 2], [1, 3])
    ]
    assert parts[1] == 0 and torch.stack(parts).mean().item() == pytest.approx(by_hand, rel=1e-5)


def test_feature_loss_by_hand():
    student = tensor([[[[3.0, 4.0]]]])  # normalised (0.6, 0.8)
    teacher = tensor([[[[0.0, 2.0]]]])  # normalised (0, 1)
    assert distill.feature_loss(student, teacher).item() == pytest.approx(0.36 + 0.04, rel=1e-5)
    assert distill.feature_loss(10 * student, student).item() == pytest.approx(0, abs=1e-6)
    assert distill.feature_loss(-student, student).item() == pytest.approx(4, rel=1e-5)


def test_the_last_layer_meets_the_last_layer():
    assert distill.mapped_layers(6, 24) == [4, 8, 12, 16, 20, 24]
    assert distill.mapped_layers(6, 12) == [2, 4, 6, 8, 10, 12]
    assert distill.mapped_layers(6, 16) == [3, 5, 8, 11, 13, 16]  # rounded, not cut: 2.67, 5.33, 8, 10.67, 13.33, 16
    assert distill.mapped_layers(2, 5)[-1] == 5 and distill.mapped_layers(3, 3) == [1, 2, 3]


@pytest.fixture
def args(tiny):
    return training_args(student_model=str(tiny / "distilbert"), max_length=32, temperature=2.0)


def datasets(tiny, teacher_width: int = 0, layers: int = 2):
    tokenizer = models.load_tokenizer(str(tiny / "distilbert"))
    ids = encoding.encode(
        tokenizer, [("good fun " if row % 2 else "bad dull ") * (1 + row % 3) for row in range(12)], 32
    )
    gold = np.arange(12) % 2
    labels = np.where(np.arange(12) < 6, gold, distill.IGNORED)
    teacher = {"teacher_logits": (4 * np.eye(2)[gold] - 2).astype(np.float32)}
    if teacher_width:
        teacher["teacher_features"] = RNG.normal(size=(12, layers, 2, teacher_width)).astype(np.float16)
    return encoding.ReviewDataset(ids, labels, **teacher), encoding.ReviewDataset(ids, gold)


@pytest.fixture
def trainer(tiny, args, tmp_path):
    """A trainer with all three terms, whose student has projections into a width of 24."""
    train, _ = datasets(tiny, teacher_width=24)
    student = distill.Student(models.load_classifier(args.student_model), teacher_width=24)
    arguments = training.training_arguments(args, CPU, tmp_path, 12)
    weights = {"alpha": 0.7, "temperature": 2.0, "feature_weight": 0.3}
    return distill.DistillationTrainer(student, arguments, train_dataset=train, eval_dataset=train, **weights)


def batch_of(trainer, rows: int) -> dict[str, torch.Tensor]:
    return encoding.Collator(0)([trainer.train_dataset[row] for row in range(rows)])


def test_the_loss_is_the_weighted_sum_of_its_terms_and_reaches_the_projections_and_the_student(trainer):
    batch, student = batch_of(trainer, 12), trainer.model.train()
    loss, output = trainer.compute_loss(student, batch, return_outputs=True)
    kl = distill.soft_label_loss(output["logits"], batch["teacher_logits"], 2.0).mean()
    ce = distill.hard_label_loss(output["logits"], batch["labels"], 0.5)
    features = distill.feature_loss(output["features"], batch["teacher_features"].float())
    assert loss.item() == pytest.approx((0.7 * kl + 0.3 * ce + 0.3 * features).item(), rel=1e-5)
    features.backward()
    assert [projection.weight.shape[0] for projection in student.projections] == [24, 24]
    words = student.model.distilbert.embeddings.word_embeddings
    assert all(layer.weight.grad.norm() > 0 for layer in (*student.projections, words))


def test_with_one_term_per_review_gold_labels_teach_the_labelled_and_the_teacher_the_rest(trainer):
    trainer.one_term, trainer.feature_weight, trainer.alpha = True, 0.0, 0.0  # alpha weighs nothing here
    batch = batch_of(trainer, 12)
    batch["teacher_logits"][batch["labels"] != distill.IGNORED] = 0  # what 04b has where its LLM has not read
    loss, output = trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)
    terms = []
    for student, teacher, label in zip(output["logits"], batch["teacher_logits"], batch["labels"], strict=True):
        if label == distill.IGNORED:
            terms.append(distill.soft_label_loss(student[None], teacher[None], 2.0).mean())
        else:
            terms.append(torch.nn.functional.cross_entropy(student[None], label[None]))
    assert 0 < sum(label != distill.IGNORED for label in batch["labels"]) < 12
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)


def test_each_weighted_term_is_logged_and_they_add_up_to_the_loss(trainer):
    trainer.args.logging_steps, trainer.data_collator = 1, encoding.Collator(0)
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.args.load_best_model_at_end = False
    training.train(trainer, CPU)
    assert trainer.model_accepts_loss_kwargs is False  # else accumulated losses would add up
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    for entry in logged:
        assert entry["kl"] + entry["ce"] + entry["features"] == pytest.approx(entry["loss"], abs=2e-3)


def test_the_students_features_are_the_pooled_states_of_its_layers_after_the_embeddings(trainer):
    student = trainer.model.eval()
    inputs = {name: batch_of(trainer, 4)[name] for name in ("input_ids", "attention_mask")}
    student.training = True  # alone: no dropout
    features, states = student(**inputs)["features"], student.model(**inputs, output_hidden_states=True).hidden_states
    for layer in (0, 1):
        first = states[layer + 1][:, 0] @ student.projections[layer].weight.T
        torch.testing.assert_close(features[:, layer, 0], first)


def test_a_student_is_trained_as_it_is_asked_to(tiny, args, tmp_path, monkeypatch):
    made = {}

    def train(trainer, hardware):
        made["trainer"] = trainer

    monkeypatch.setattr(training, "train", train)
    args.temperature, args.seed = 3.0, 7
    train_set, validation = datasets(tiny, teacher_width=24)
    weights = {"epochs": 5, "alpha": 0.6, "feature_weight": 0.3, "teacher_width": 24, "soft_labels": "transfer"}
    distill.train_student(args, CPU, tmp_path / "model", train_set, validation, **weights)
    trainer = made["trainer"]
    assert (trainer.alpha, trainer.feature_weight, trainer.temperature, trainer.one_term) == (0.6, 0.3, 3.0, True)
    assert (trainer.args.num_train_epochs, trainer.args.seed) == (5, 7)
    device.seed_everything(7)
    again = distill.Student(models.load_classifier(args.student_model), 24)
    saved = models.load_classifier(str(tmp_path / "model"))  # not trained: the new head is the seed's
    torch.testing.assert_close(saved.classifier.weight, again.model.classifier.weight)


def test_a_trained_student_learns_and_leaves_no_projections_or_checkpoints(tiny, args, tmp_path):
    train, validation = datasets(tiny, teacher_width=24)
    args.epochs = 8
    logits = distill.train_student(
        args, CPU, tmp_path / "model", train, validation, epochs=8, alpha=0.9, feature_weight=0.1, teacher_width=24
    )
    assert (logits.argmax(axis=1) == validation.labels).all()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    saved = models.load_classifier(str(tmp_path / "model"))
    assert not [name for name in saved.state_dict() if "projection" in name]
    again = distill.train_student(args, CPU, tmp_path / "model", train, validation, epochs=8, alpha=0.9)
    np.testing.assert_array_equal(again, logits)  # what is saved is what was scored; it is not trained twice


def test_a_student_of_a_teacher_alone_needs_neither_gold_labels_nor_validation(tiny, args, tmp_path):
    taught, labelled = datasets(tiny)
    unlabelled = encoding.ReviewDataset(
        taught.ids, np.full(len(taught), distill.IGNORED), teacher_logits=taught.arrays["teacher_logits"]
    )
    assert distill.train_student(args, CPU, tmp_path / "model", unlabelled, None, epochs=8, alpha=1.0) is None
    model = models.load_classifier(str(tmp_path / "model")).eval()
    tokenizer = models.load_tokenizer(str(tmp_path / "model"))
    logits = scoring.score_encoder(model, labelled.ids, tokenizer.pad_token_id, CPU, None)["scores"]
    assert (logits.argmax(axis=1) == labelled.labels).mean() > 0.9


def test_features_come_from_the_right_file_row_and_layer():
    first, second = RNG.normal(size=(3, 4, 2, 5)), RNG.normal(size=(2, 4, 2, 5))
    rows = distill.FeatureRows([(first, np.array([2, 0])), (second, np.array([1]))], layers=[1, 3])
    np.testing.assert_array_equal(rows[0], first[2][[1, 3]])
    np.testing.assert_array_equal(rows[2], second[1][[1, 3]])


def test_constant_and_swapped_teachers_are_refused(stops):
    labels = np.arange(100) % 2
    constant, right = np.tile([1.0, 2.0], (100, 1)), np.eye(2)[labels]
    stops(lambda: distill.refuse_bad_teacher(constant, labels, "train"), "constant")
    stops(lambda: distill.refuse_bad_teacher(right[:, ::-1], labels, "train"), "label order is swapped")
    stops(lambda: distill.refuse_bad_teacher(np.where(right == 1, np.nan, 0), labels, "train"), "not all finite")
    distill.refuse_bad_teacher(right, labels, "train")
    worse, chance = right.copy(), right.copy()
    worse[:61], chance[:55] = worse[:61, ::-1], chance[:55, ::-1]  # right for 39 and for 45 of 100
    stops(lambda: distill.refuse_bad_teacher(worse, labels, "train"), "0.390, below chance")
    distill.refuse_bad_teacher(chance, labels, "train")
    cautious = right.copy()
    cautious[labels == 1] = np.eye(2)[[0]]  # half of the reviews are positive, and it finds few: biased, not swapped
    cautious[1] = right[1]
    distill.refuse_bad_teacher(
        np.concatenate([cautious[labels == 0][:10], cautious[labels == 1]]), np.repeat([0, 1], [10, 50]), "train"
    )


def test_a_transfer_set_of_one_class_is_refused(stops):
    one_class, labels = np.tile([2.0, 1.0], (100, 1)), np.arange(40) % 2
    stops(lambda: distill.refuse_one_class(one_class, labels), "100% of the transfer set negative", "--dataset")
    stops(lambda: distill.refuse_one_class(one_class[:, ::-1], labels), "positive, and 50% of the labelled")
    stops(lambda: distill.refuse_one_class(np.nan * one_class, labels), "transfer are not all finite")
    distill.refuse_one_class(one_class[:30], labels)  # a set this small does no harm beside labelled reviews
    one_class[:3] = [1.0, 2.0]
    distill.refuse_one_class(one_class, labels)
