#!/usr/bin/env bash
# The run of results/cpu_imdb: all six scripts on real IMDB reviews, with the stand-ins of results/real_weights.py.
# Two CPU cores with AVX512-BF16 (leave out --precision bf16 elsewhere). From the top folder, in the environment of `make install`:
#
#     pip install -r results/requirements.txt
#     python results/real_weights.py --output-dir results/weights
#     bash results/cpu_imdb/run.sh path/to/imdb      # a folder of train, test and unsupervised parquet files
#
# An interrupted run continues where it stopped.
set -euo pipefail
common=(--dataset "${1:?the folder of the reviews}" --output-dir outputs/cpu_imdb)
small=(--validation-samples 300 --max-train-samples 2000)
transfer=(--max-transfer-samples 4000)
bf16=(--precision bf16)

python 01_baseline.py "${common[@]}"

python 02_finetune_roberta.py "${common[@]}" "${small[@]}" "${transfer[@]}" "${bf16[@]}" \
    --roberta-model results/weights/mpnet-base --max-length 128 \
    --epochs 2 --learning-rate 4e-5 --batch-size 16 --micro-batch-size 16

python 03_finetune_mistral.py "${common[@]}" "${small[@]}" "${bf16[@]}" \
    --mistral-model results/weights/smollm2-135m --max-length 128 \
    --learning-rate 3e-4 --batch-size 16 --micro-batch-size 8 --no-gradient-checkpointing --lora-dropout 0

python 04a_distill_from_roberta.py "${common[@]}" "${small[@]}" "${transfer[@]}" "${bf16[@]}" \
    --student-model results/weights/minilm-l6 --max-length 128 --epochs 2 --learning-rate 1e-4 --batch-size 32

python 04b_distill_from_mistral.py "${common[@]}" "${small[@]}" "${transfer[@]}" "${bf16[@]}" \
    --student-model results/weights/minilm-l6 --max-length 128 --epochs 2 --learning-rate 1e-4 --batch-size 32

python 05_benchmark.py "${common[@]}" "${bf16[@]}" --max-test-samples 2000 --max-llm-samples 600

python results/head_only.py --dataset "$1" --model outputs/cpu_imdb/04a_student_from_roberta/model --max-length 128 \
    --max-test-samples 2000 "${bf16[@]}" --output results/cpu_imdb/head_only.csv

# What is kept: the table, and of each step how it was run and what it says on validation.
cp outputs/cpu_imdb/05_benchmark/{benchmark.csv,benchmark.md,environment.json} results/cpu_imdb/
for step in outputs/cpu_imdb/0*/; do
    mkdir -p "results/cpu_imdb/$(basename "$step")"
    find "$step" -maxdepth 1 \( -name run.json -o -name metrics.json \) -exec cp {} "results/cpu_imdb/$(basename "$step")/" \;
done
