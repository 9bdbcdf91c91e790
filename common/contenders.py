"""The rows of the benchmark: the models of finished steps, and the forms in which a student can be deployed."""

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from common import artifacts, classifiers, device, export, machine, storage
from common.classifiers import Classifier
from common.device import Hardware
from common.settings import short

BASELINE, CONTROL, ENCODER = "baseline", "control, no teacher", "teacher, fine-tuned"
EAGER = "form, eager fp32"
LLM, ZERO_SHOT = "teacher, 4-bit + LoRA", "teacher, 4-bit zero-shot"
STUDENTS = {"04a_student_from_roberta": "student, white-box", "04b_student_from_mistral": "student, black-box"}
UNCALIBRATED = {"calibration": "none (04b has not calibrated it)", "bias": 0.0, "calibration_temperature": 1.0}


@dataclass
class Contender:
    """A row of the benchmark before it is measured."""

    name: str
    kind: str
    load: Callable[[], Classifier]
    files: Path  # the folder that it is made of
    hardware: Hardware
    facts: dict = field(default_factory=dict)  # what else decides its verdicts: prompt, length, calibration
    step: str = ""  # that made it
    teacher: "Contender | None" = None  # whose soft labels it learned, or which it is a control for
    note: str | None = None
    samples: int | None = None  # of the test reviews, stratified; None: all
    student: "Contender | None" = None  # of which it is a form
    prepare: Callable[[], object] | None = None  # runs before the clock
    absent: str | None = None  # the package that it lacks
    packages: tuple[str, ...] = ("torch", "transformers", "tokenizers", "numpy")  # that run it


def find_contenders(
    args: argparse.Namespace, hardware: Hardware, runs: dict[str, dict], deployed: Path
) -> list[Contender]:
    """The models of the finished steps `runs` (run.json by step), in their order, then the students' forms.

    The forms are written into the folder `deployed`. A student is stale if its teacher has been made again.
    """
    root, facts = Path(args.output_dir), {step: run["facts"] for step, run in runs.items()}
    stale = {step for step, run in runs.items() if artifacts.made_again(args, run)}
    found = _baselines(root / "01_baseline") if "01_baseline" in runs else []
    teachers = _teachers(args, hardware, facts, stale)
    found += teachers.values()
    for step in filter(runs.__contains__, STUDENTS):
        found += _students(root / step, facts[step], hardware, teachers.get(step), step in stale)
    # Predictions are stored by name, so names must differ. Kaggle's folders may all end in a version number.
    names = [contender.name for contender in found] + 2 * ["example_id", "label"]
    for contender in found:
        if names.count(contender.name) > 1:
            contender.name = f"{contender.name} ({contender.kind})"
    return found + [form for student in _to_deploy(args, found) for form in forms(args, student, deployed)]


def _baselines(folder: Path) -> list[Contender]:
    importlib.import_module("common.baseline")  # so that its first model does not pay for scikit-learn
    found, cpu = [], device.cpu("fp32")
    for name, part in (("TF-IDF + naive Bayes", "naive_bayes"), ("NB-SVM (logistic)", "nb_svm")):
        load, packages = partial(classifiers.baseline_classifier, folder / part), ("scikit-learn", "numpy")
        found.append(Contender(name, BASELINE, load, folder / part, cpu, packages=packages))
    return found


def _teachers(args: argparse.Namespace, hardware: Hardware, facts: dict, stale: set[str]) -> dict[str, Contender]:
    """02's encoder, the LLM with 03's adapter, the LLM as it is if it taught: each by the student's step, if any."""
    root, found = Path(args.output_dir), {}
    white_box, black_box = "04a_student_from_roberta", "04b_student_from_mistral"
    if "02_roberta" in facts:
        teacher, folder = facts["02_roberta"], root / "02_roberta" / "model"
        found[white_box] = _encoder(short(teacher["teacher"]), ENCODER, folder, hardware, teacher)
    student = facts.get(black_box, {})
    llm = student.get("llm")  # None too if the student learned from a file of scores: that LLM has no row
    tuned = llm and llm["adapter"]
    if "03_mistral" in facts:
        calibration = student if tuned and black_box not in stale else UNCALIBRATED
        folder, taught = root / "03_mistral" / "adapter", black_box if tuned else ""
        found[taught] = _llm(args, hardware, LLM, folder, facts["03_mistral"], calibration)
    if llm and not tuned:
        found[black_box] = _llm(args, hardware, ZERO_SHOT, None, llm, student)
    return found


def _students(folder: Path, facts: dict, hardware: Hardware, teacher: Contender | None, stale: bool) -> list[Contender]:
    """The student of a step, and its control if there is one. A stale one is compared with no teacher."""
    step, student = folder.name, short(facts["student"])
    note = f"its teacher's step was made again: run {artifacts.SCRIPTS[step]} --force" if stale else None
    if scores := facts.get("scores"):
        note = f"its teacher has no row: its scores are those of {Path(scores['file']).name}"
    of = {"step": step, "teacher": None if stale else teacher, "note": note}
    name = f"{student} from {short(facts['teacher'])}"
    found = [_encoder(name, STUDENTS[step], folder / "model", hardware, facts, **of)]
    if (folder / "control").is_dir():
        found.append(_encoder(f"{student} control", CONTROL, folder / "control", hardware, facts, **of))
    return found


def _to_deploy(args: argparse.Namespace, found: list[Contender]) -> list[Contender]:
    """The students that 05 exports: by --forms none, all, or the one that validation prefers."""
    students = [one for one in found if one.kind in STUDENTS.values()] if args.forms != "none" else []
    if args.forms == "best" and len(students) > 1:
        files = [artifacts.require(args, one.step, "metrics.json") for one in students]
        figures = [storage.read_json(file)["validation"]["student"] for file in files]
        students = [students[int(np.argmax([scores["accuracy"] for scores in figures]))]]
    return students


def _encoder(name: str, kind: str, folder: Path, hardware: Hardware, facts: dict, **more: object) -> Contender:
    max_length = facts["max_length"]
    load = partial(classifiers.encoder_classifier, folder, hardware, max_length)
    return Contender(name, kind, load, folder, hardware, {"max_length": max_length}, **more)


def _llm(
    args: argparse.Namespace, hardware: Hardware, kind: str, adapter: Path | None, llm: dict, calibration: dict
) -> Contender:
    facts = {key: llm[key] for key in ("base", "prompt", "label_words", "max_length")}
    facts |= {key: calibration[key] for key in UNCALIBRATED}
    load, files = partial(classifiers.llm_classifier, adapter, hardware, facts), adapter or Path(llm["base"])
    one = Contender(short(llm["base"]), kind, load, files, hardware, facts, samples=args.max_llm_samples)
    one.packages += ("peft", "bitsandbytes")
    return one


def form_folder(deployed: Path, student: Contender) -> Path:
    """Where a student's ONNX forms are written."""
    return deployed / student.name.replace(" ", "-")


def forms(args: argparse.Namespace, student: Contender, deployed: Path) -> list[Contender]:
    """The forms in which a student can be deployed, each on the CPU."""
    found, target = [], form_folder(deployed, student)
    for precision in ("fp32", "bf16") if machine.cpu_has_bf16() else ("fp32",):
        name, cpu = f"eager {precision}", device.cpu(precision)
        found.append(_encoder(f"{student.name}, {name}", f"form, {name}", student.files, cpu, student.facts))
    for precision in export.ONNX_FILES:
        name = f"ONNX {precision}"
        form = _encoder(f"{student.name}, {name}", f"form, {name}", student.files, found[0].hardware, student.facts)
        form.load = partial(classifiers.onnx_classifier, target, precision, student.facts["max_length"])
        form.prepare, form.absent = partial(deploy, student.files, target), export.missing_for_onnx()
        form.packages += ("onnx", "onnxruntime")
        found.append(form)
    for form in found:
        form.student, form.teacher, form.note, form.samples = student, student.teacher, student.note, args.form_samples
    return found


def deploy(model_folder: Path, target: Path) -> None:
    """Write the ONNX form of a saved encoder to `target`, unless it is there, whole and of the same model."""
    artifacts.verify(model_folder)
    importlib.import_module("onnxruntime")  # so that no row pays for it
    record, versions = target / "made_from.json", artifacts.versions()
    origin = {"model": artifacts.digest(model_folder)}
    origin |= {name: versions[name] for name in ("torch", "onnx", "onnxruntime")}
    written = {"made_from": origin, "digest": artifacts.digest(target, but=record.name)}
    if storage.intact_json(record) == written:
        return
    export.export_onnx(model_folder, target)
    storage.write_json(record, written | {"digest": artifacts.digest(target, but=record.name)})
