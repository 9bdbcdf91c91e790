"""How the three lines of `pipeline`, which keep the head of a long review alone, compare with head+tail truncation.

    python results/head_only.py --model outputs/cpu_imdb/04a_student_from_roberta/model --max-length 128 \
        --dataset path/to/imdb --max-test-samples 2000 --output results/cpu_imdb/head_only.csv
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import artifacts, data, device, metrics, models, scoring, settings


def main() -> None:
    parser = settings.make_parser(__doc__, reads=("test",))
    parser.add_argument("--model", required=True, help="folder of a student or teacher")
    parser.add_argument("--max-length", type=settings.positive_int, default=512, help="tokens of a review")
    parser.add_argument("--output", type=Path, required=True, help="the CSV to write")
    args: argparse.Namespace = settings.parse(parser, "head_only", None)
    hardware = device.detect(args)
    test = data.load_reviews(args, reads=("test",)).test
    texts, labels = test["text"].tolist(), test["label"].to_numpy()

    from transformers import pipeline

    tokenizer = models.load_tokenizer(args.model)
    model = models.prepare_for_scoring(models.load_classifier(args.model), hardware)
    ids = models.encode(tokenizer, texts, args.max_length)
    long = np.array([len(one) == args.max_length for one in ids])
    ours = scoring.score_encoder(model, ids, tokenizer.pad_token_id, hardware, None)["scores"].argmax(1)
    classify = pipeline("text-classification", args.model, device=hardware.device, batch_size=32)
    with hardware.autocast():
        called = classify(texts, truncation=True, max_length=args.max_length)
    head = np.array([data.LABELS.index(one["label"]) for one in called])
    rows = []
    for truncation, predictions in (("head+tail", ours), ("head (pipeline)", head)):
        accuracy = metrics.accuracy(labels, predictions)
        low, high = metrics.wilson_interval(int(np.sum(predictions == labels)), len(labels))
        rows.append({"truncation": truncation, "n": len(labels), "accuracy": accuracy, "ci_low": low, "ci_high": high})
    table = pd.DataFrame(rows)
    table["mcnemar_p"] = metrics.mcnemar_p(ours == labels, head == labels)
    table["share_truncated"] = long.mean()
    artifacts.write_table(args.output, table.round(6))
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
