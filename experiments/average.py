#!/usr/bin/env python
"""Validation figures of a run's last weights, and of the mean of its weights over the last quarter of the steps.

distillation.py of this commit keeps both in --output-dir/averaged/RUN-SEED.

    python experiments/average.py --dataset path/to/imdb --output-dir FOLDER --student-model FOLDER \
        --runs encoder_short_one_2000 --seeds 3
"""

import sys
from pathlib import Path

from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import data, device, metrics, models, scoring, settings
from experiments import distillation


def main() -> None:
    args = settings.parse(distillation.make_parser(__doc__, distillation.RUNS), "distillation", None)
    hardware = device.detect(args)
    validation = data.load_reviews(args, reads=("train",)).validation
    tokenizer = models.load_tokenizer(args.student_model)
    ids = data.encode(tokenizer, validation["text"].tolist(), args.max_length)
    for name, seed in ((name, seed) for name in args.runs for seed in args.seeds):
        for file in sorted(Path(args.output_dir, "averaged", f"{name}-{seed}").glob("*.safetensors")):
            model = models.load_classifier(args.student_model, tokenizer)
            model.load_state_dict(load_file(file))
            model = models.prepare_for_scoring(model, hardware)
            logits = scoring.score_encoder(model, ids, tokenizer.pad_token_id, hardware, None)["scores"]
            print(name, seed, file.stem, metrics.describe(validation["label"].to_numpy(), logits))


if __name__ == "__main__":
    main()
