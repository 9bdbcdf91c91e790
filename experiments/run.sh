#!/usr/bin/env bash
# Everything in results/ that comes from real IMDB reviews, with the stand-ins of real_weights.py. From the top folder, in
# the environment of `make install`:
#
#     pip install -r experiments/requirements.txt
#     python experiments/real_weights.py --output-dir outputs/weights
#     bash experiments/run.sh path/to/imdb [part]   # cpu_imdb white_box black_box few_labels more_unlabelled
#
# Two CPU cores with AVX512-BF16, at most 45 core hours. Run it again to continue. One table holds one precision: elsewhere
# leave out --precision bf16, and delete predictions.parquet and runs.csv of the folders first. A teacher made here replaces
# the committed one, and the rows of its students go. Today's code cannot make all of these again (results/README.md names
# the commits): they stay in git.
set -euo pipefail
dataset=${1:?the folder of the reviews}
parts=${2:-cpu_imdb white_box black_box few_labels more_unlabelled}
weights=outputs/weights
reviews=(--dataset "$dataset")
bf16=(--precision bf16)
subset=(--validation-samples 1000 --max-train-samples 2000)
student=(--student-model $weights/minilm-l6)
encoder=("${reviews[@]}" "${bf16[@]}" --roberta-model $weights/mpnet-base --max-length 128)
encoder+=(--learning-rate 4e-5 --batch-size 16 --micro-batch-size 16)
llm=("${reviews[@]}" "${bf16[@]}" --mistral-model $weights/smollm2-135m --max-length 128)
llm+=(--learning-rate 3e-4 --batch-size 16 --micro-batch-size 8 --no-gradient-checkpointing --lora-dropout 0)

cpu_imdb() { # the six scripts
    local output=(--output-dir outputs/cpu_imdb) small=(--validation-samples 300 --max-train-samples 2000)
    local transfer=(--max-transfer-samples 4000)
    local distil=("${reviews[@]}" "${output[@]}" "${small[@]}" "${transfer[@]}" "${bf16[@]}" "${student[@]}")
    distil+=(--max-length 128 --epochs 2 --learning-rate 1e-4 --batch-size 32)
    python 01_baseline.py "${reviews[@]}" "${output[@]}"
    python 02_finetune_roberta.py "${encoder[@]}" "${output[@]}" "${small[@]}" "${transfer[@]}" --epochs 2
    python 03_finetune_mistral.py "${llm[@]}" "${output[@]}" "${small[@]}"
    python 04a_distill_from_roberta.py "${distil[@]}"
    python 04b_distill_from_mistral.py "${distil[@]}"
    python 05_benchmark.py "${reviews[@]}" "${output[@]}" "${bf16[@]}" --max-test-samples 2000 --max-llm-samples 600
    cp outputs/cpu_imdb/05_benchmark/{benchmark.csv,benchmark.md,environment.json} results/cpu_imdb/
    local step
    for step in outputs/cpu_imdb/0*/; do # of each step: how it was run, and its figures on validation
        mkdir -p "results/cpu_imdb/$(basename "$step")"
        find "$step" -maxdepth 1 \( -name run.json -o -name metrics.json \) \
            -exec cp {} "results/cpu_imdb/$(basename "$step")/" \;
    done
}

students() { # output folder, results folder, flags
    local output=$1 results=$2
    shift 2
    python experiments/distillation.py "${reviews[@]}" "${bf16[@]}" "${student[@]}" --output-dir "$output" "$@"
    python experiments/tables.py "$results" --collect "$output"/{teachers,runs} --read-test --replace-teachers
}

white_box() { # 02 scores the unlabelled reviews of more_unlabelled too
    local output=outputs/distillation results=results/distillation
    python 02_finetune_roberta.py "${encoder[@]}" "${subset[@]}" --output-dir $output --max-transfer-samples 32000 --epochs 2
    python 01_baseline.py "${reviews[@]}" "${subset[@]}" --output-dir $output --max-test-samples 5000
    students $output $results --runs control final --seeds 1 2 3
    students $output $results --runs control_longer logits final_longer nb_svm
}

black_box() {
    local output=outputs/distillation results=results/distillation
    python 03_finetune_mistral.py "${llm[@]}" "${subset[@]}" --output-dir $output
    students $output $results --max-transfer-samples 4000 --runs control tuned --seeds 1 2 3
    students $output $results --max-transfer-samples 4000 --runs zero_shot_batch
}

few_labels_teachers() { # labels, those for validation and for training, epochs of 02 and of 03 (few labels need more)
    local few=(--output-dir "outputs/few_labels/$1-42" --validation-samples "$2" --max-train-samples "$3")
    python 01_baseline.py "${reviews[@]}" "${few[@]}" --max-test-samples 5000
    python 02_finetune_roberta.py "${encoder[@]}" "${few[@]}" --max-transfer-samples 4000 --epochs "$4"
    python 03_finetune_mistral.py "${llm[@]}" "${few[@]}" --epochs "$5"
}

few_labels() {
    few_labels_teachers 50 16 34 20 10
    few_labels_teachers 500 100 400 5 2
    few_labels_teachers 3000 1000 2000 2 1
    local few=("${reviews[@]}" "${bf16[@]}" "${student[@]}" --output-dir outputs/few_labels)
    few+=(--roberta-model $weights/mpnet-base)
    python experiments/few_labels.py "${few[@]}"
    python experiments/few_labels.py "${few[@]}" --labels 50 500 3000 --seeds 2 3 --runs frozen_embeddings
    python experiments/tables.py results/few_labels --collect outputs/few_labels/runs --read-test
}

more_unlabelled() { # final once more, with four times the unlabelled reviews, compared with runs of white_box
    local results=results/more_unlabelled white=outputs/distillation
    students outputs/more_unlabelled $results --teachers-from $white --max-transfer-samples 32000 --runs final --seeds 1 2 3
    python experiments/tables.py $results --collect $white/runs/{control-[123],final_longer-1,nb_svm-42} --read-test
}

for part in $parts; do "$part"; done
python experiments/readme.py
