#!/usr/bin/env bash
# results/scoring: our scoring against plain loops, `pipeline` and `generate`, one CPU thread, after results/cpu_imdb/run.sh.
#
#     bash results/scoring/run.sh path/to/imdb
set -euo pipefail
export OMP_NUM_THREADS=1
run=(python results/scoring.py --dataset "${1:?the folder of the reviews}" --precision bf16 --output results/scoring/scoring.csv)

"${run[@]}" --reviews 250 --rounds 1 --llm results/weights/smollm2-135m --adapter outputs/cpu_imdb/03_mistral/adapter
"${run[@]}" --reviews 500 --rounds 2 --encoder outputs/cpu_imdb/04a_student_from_roberta/model
"${run[@]}" --reviews 300 --rounds 2 --encoder outputs/cpu_imdb/02_roberta/model
