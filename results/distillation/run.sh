#!/usr/bin/env bash
# The runs of results/distillation, on real IMDB reviews with the stand-ins of results/real_weights.py.
# Two CPU cores with AVX512-BF16 (leave out --precision bf16 elsewhere), about 40 core hours. From the top folder,
# `make results DATASET=path/to/imdb` does everything in results/, this included; or, in the environment of `make install`:
#
#     pip install -r results/requirements.txt
#     python results/real_weights.py --output-dir results/weights
#     bash results/distillation/run.sh path/to/imdb [part]    # white_box black_box few_labels more_unlabelled textbrewer
#     python results/readme.py
#
# An interrupted part continues where it stopped, on another machine of the same precision too: finished runs are those in
# runs/ and more_unlabelled/runs/. To make them all again, or in another precision, delete both folders first. textbrewer is
# timed anew each time, and replaces its CSV.
set -euo pipefail
dataset=${1:?the folder of the reviews}
parts=${2:-white_box black_box few_labels more_unlabelled textbrewer}
output=outputs/distillation
bf16=(--precision bf16)
common=(--dataset "$dataset" "${bf16[@]}")
subset=(--validation-samples 1000 --max-train-samples 2000)
student=(--student-model results/weights/minilm-l6)
encoder=(--roberta-model results/weights/mpnet-base --max-length 128 --learning-rate 4e-5 --batch-size 16)
encoder+=(--micro-batch-size 16)
tune=(--mistral-model results/weights/smollm2-135m --max-length 128 --learning-rate 3e-4 --batch-size 16 --micro-batch-size 8)
tune+=(--no-gradient-checkpointing --lora-dropout 0)

kept() { # what a run or a teacher says is enough: its model is not made again
    local run
    for run; do [ -e "results/distillation/runs/$run.json" ] || return 1; done
}

teacher() { # 02 of all labels, which white_box, few_labels and textbrewer read: its folder, its unlabelled reviews
    python 02_finetune_roberta.py "${common[@]}" --output-dir "$1" "${subset[@]}" --max-transfer-samples "$2" \
        "${encoder[@]}" --epochs 2
}

tuned_llm() { # 03 of all labels, which black_box and few_labels read
    python 03_finetune_mistral.py "${common[@]}" --output-dir $output "${subset[@]}" "${tune[@]}"
}

white_box() {
    kept teacher-42 features-1 logits_features-1 no_transfer_set-1 || teacher $output 8000
    local run=(python results/distillation.py "${common[@]}" --output-dir $output "${student[@]}" --read-test)
    "${run[@]}" --runs control final --seeds 1 2 3
    "${run[@]}" --runs logits argmax_labels label_sorted features logits_features no_transfer_set --seeds 1
    "${run[@]}" --runs control_levers control_longer confident margin --seeds 1 # the levers
    "${run[@]}" --runs final_longer --seeds 1 # beside more_unlabelled: as many steps, without more reviews
}

black_box() {
    kept {zero_shot,zero_shot_batch,tuned,other_prompt,whole_prompt}_teacher-42 || tuned_llm
    local run=(python results/black_box.py "${common[@]}" --output-dir $output "${student[@]}" --read-test)
    "${run[@]}" --runs control tuned --seeds 1 2 3
    "${run[@]}" --seeds 1
}

baseline() { # 01 reads no precision
    python 01_baseline.py --dataset "$dataset" "$@" --max-test-samples 5000
}

few_labels_teachers() { # labels, those of them for validation and for training, epochs of 02 and of 03: enough for so few
    local few=(--output-dir "$output/few_labels/$1" --validation-samples "$2" --max-train-samples "$3")
    kept few_labels/$1/{nb_svm-42,student_of_encoder-1,student_of_llm-1} && return
    baseline "${few[@]}"
    python 02_finetune_roberta.py "${common[@]}" "${few[@]}" --max-transfer-samples 4000 "${encoder[@]}" --epochs "$4"
    python 03_finetune_mistral.py "${common[@]}" "${few[@]}" "${tune[@]}" --epochs "$5"
}

few_labels() {
    kept few_labels/3000/teacher-42 || teacher $output 8000
    kept zero_shot_batch_teacher-42 || tuned_llm
    kept few_labels/3000/nb_svm-42 || baseline --output-dir $output "${subset[@]}"
    few_labels_teachers 50 16 34 20 10
    few_labels_teachers 500 100 400 5 2
    python results/few_labels.py "${common[@]}" --output-dir $output "${student[@]}" --read-test
}

more_unlabelled() { # the recipe of white_box once more, with four times the unlabelled reviews; what it stands beside is copied
    local more=results/distillation/more_unlabelled
    kept teacher-42 control-{1,2,3} final_longer-1 few_labels/3000/nb_svm-42 ||
        { echo "error: more_unlabelled stands beside runs of white_box and few_labels: make these first" >&2; return 2; }
    local run=(python results/distillation.py "${common[@]}" --output-dir ${output}_more --max-transfer-samples 32000)
    run+=("${student[@]}" --tables $more --read-test)
    if [ ! -e $more/runs/teacher-42.json ]; then
        teacher ${output}_more 32000
        "${run[@]}" --runs final --seeds # keeps what the teacher says, and makes no student
    fi
    if ! cmp -s <(grep weights results/distillation/runs/teacher-42.json) <(grep weights $more/runs/teacher-42.json); then
        echo "error: $more/runs is of another teacher than the runs beside it: delete that folder" >&2
        return 2
    fi
    mkdir -p $more/runs/beside
    cp results/distillation/runs/control-[123].* $more/runs/
    cp results/distillation/runs/{final_longer-1,few_labels/3000/nb_svm-42}.* $more/runs/beside/
    "${run[@]}" --runs control final --seeds 1 2 3
    python results/tables.py --tables $more
}

textbrewer() { # on an otherwise quiet machine: this one is timed, with a teacher of its own, as runs/ may hold another's
    teacher ${output}_textbrewer 100
    python results/side_by_side.py "${common[@]}" --output-dir ${output}_textbrewer "${student[@]}"
}

for part in $parts; do "$part"; done
python results/tables.py
