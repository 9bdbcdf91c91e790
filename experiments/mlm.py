#!/usr/bin/env python
"""The student after masked-language modelling on all reviews but test and validation (Gururangan et al. 2020).

    python experiments/mlm.py --dataset path/to/imdb --output-dir FOLDER --student-model FOLDER --max-length 64

A trial. It writes FOLDER/mlm, from which a student starts by --student-model.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import data, device, models, settings, training
from experiments import distillation


class Texts(torch.utils.data.Dataset):
    """Token ids alone."""

    def __init__(self, ids: list[np.ndarray]):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        return {"input_ids": self.ids[row].tolist()}


class MaskedTokens(training.ReviewTrainer):
    """Cross-entropy of the masked tokens. The vocabulary's logits are computed for those 15% alone."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
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


def main() -> None:
    args = settings.parse(distillation.make_parser(__doc__, []), "distillation", None)
    hardware, folder = device.detect(args), Path(args.output_dir) / "mlm"
    if folder.exists():
        return
    args.max_train_samples, args.epochs = None, 1
    reviews = data.load_reviews(args, reads=("train", "transfer"))
    tokenizer = models.load_tokenizer(args.student_model)
    ids = data.encode(tokenizer, [*reviews.train["text"], *reviews.transfer["text"]], args.max_length)
    device.seed_everything(args.seed)
    model = AutoModelForMaskedLM.from_pretrained(args.student_model, dtype=torch.float32)
    checkpoints, own = folder.with_name("mlm_checkpoints"), training.WITHOUT_VALIDATION | {"num_train_epochs": 1}
    own |= {"save_strategy": "steps", "save_steps": 300}
    trainer = MaskedTokens(
        model=model,
        args=training.training_arguments(args, hardware, checkpoints, len(ids), **own),
        train_dataset=Texts(ids),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
    )
    training.train(trainer, hardware)
    training.save(model, tokenizer, folder, checkpoints)


if __name__ == "__main__":
    main()
