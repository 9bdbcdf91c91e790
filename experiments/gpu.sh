#!/usr/bin/env bash
# For a GPU at hand, also on a machine without network. From the top folder, with the parts in outputs/gpu/parts:
#     bash experiments/gpu.sh true_size    # three minutes: what the real sizes cost, a T4's conditions first
#     bash experiments/gpu.sh imdb         # the scripts on all of IMDB at 512 tokens, the encoder beside the LLM
#     bash experiments/gpu.sh study        # students by number of unlabelled reviews, three seeds
#     bash experiments/gpu.sh imdb --tiny  # the same on a CPU in two minutes, from tiny parts that it makes itself
# `python experiments/real_weights.py --parts` makes the parts; true_size reads packages.zip.* and parts.json alone.
# Each ends after HOURS and keeps what is finished; the same command continues. The results go to OUT.
set -euo pipefail
stop() { echo "error: $1" >&2 && exit 2; }
what=${1:-} tiny=${2:-} python=${PYTHON:-python}
[[ $what =~ ^(true_size|imdb|study)$ && $tiny =~ ^(--tiny)?$ ]] || stop "pass true_size, imdb or study, and --tiny on a CPU"
if [[ $tiny ]]; then
    work=${WORK:-outputs/gpu/work}/tiny parts=$work/parts out=${OUT:-$work} hours=${HOURS:-1} subset=(--validation-samples 50 --max-train-samples 150)
    faster=(--max-length 96 --learning-rate 1e-3 --batch-size 8) small=("${subset[@]}" --epochs 4 "${faster[@]}")
else
    work=${WORK:-outputs/gpu/work} parts=outputs/gpu/parts out=${OUT:-results/gpu} hours=${HOURS:-1} small=() faster=()
    subset=(--validation-samples 1000 --max-train-samples 2000)
fi
data=$work/data needed=60  # GiB of GPU for 02 beside 03
[[ $hours =~ ^[0-9]*\.?[0-9]+$ && $hours =~ [1-9] ]] || stop "HOURS=$hours is not a number of hours above 0"
total=$(awk "BEGIN {print int(3600 * $hours)}")
export HF_HUB_OFFLINE=1 PYTHONPATH=$work/packages${PYTHONPATH:+:$PYTHONPATH}
weights() { "$python" experiments/real_weights.py "$@"; }
models=("$data/mpnet-base" "$data/smollm2-135m" "$data/minilm-l6")
encoder=(--roberta-model "${models[0]}" --epochs 2 --learning-rate 4e-5 --batch-tokens 32768 ${tiny:+--student-layers 2})
llm=(--mistral-model "${models[1]}" --learning-rate 3e-4 --lora-dropout 0 --no-gradient-checkpointing --batch-tokens 32768)
student=(--student-model "${models[2]}" --batch-size 128 --micro-batch-size 128 --learning-rate 2e-4)

run() {  # seconds to leave for later steps, script, flags; of a flag given twice the last one counts
    local left=$((total - SECONDS - $1))
    ((left > 15)) || { echo "out of time before $2" && return 3; }
    "$python" "${@:2}" --dataset "$data/reviews" --max-hours "$(awk "BEGIN {print $left / 3600}")"
}

join() {
    if [[ $tiny && ! -f $parts/parts.json ]]; then
        local made=$work/made reviews=$work/made/demo/reviews
        weights --tiny --output-dir "$made"
        "$python" 01_baseline.py --dataset "$reviews" --output-dir "$made" --validation-samples 50
        weights --parts "$parts" --output-dir "$made" --dataset "$reviews" --baseline "$made/01_baseline"
    fi
    weights --join "$parts" --output-dir "$work"
    [[ -d ${models[1]} ]] || weights --output-dir "$data"  # makes the LLM's folder of its 4-bit file
}

true_size() {
    [[ ! -f $parts/parts.json ]] || weights --join "$parts" --output-dir "$work" --packages-only
    "$python" experiments/true_size.py --output-dir "$out" $tiny
}

imdb() {
    join
    local outputs=$data/outputs back code=0
    back=$(realpath "$out")
    local shared=(--output-dir "$outputs" "${small[@]}")
    (run 90 02_finetune_roberta.py "${encoder[@]}" --batch-size 64 --micro-batch-size 32 "${shared[@]}" &&
        run 90 04a_distill_from_roberta.py "${student[@]}" --epochs 2 "${shared[@]}") &
    (run 90 03_finetune_mistral.py "${llm[@]}" --batch-size 32 --micro-batch-size 32 "${shared[@]}" &&
        run 90 04b_distill_from_mistral.py "${student[@]}" --epochs 2 --max-transfer-samples all \
            --batch-tokens 32768 "${shared[@]}") || code=$?
    wait $! || code=$?
    run 0 05_benchmark.py --output-dir "$outputs" --max-llm-samples 5000 --batch-tokens 32768 --force \
        ${tiny:+--latency-seconds 5} || code=$?
    (cd "$outputs" && find . -maxdepth 2 \( -name '*.json' -o -name benchmark.csv -o -path '*/05_*/predictions.parquet' \) \
        -exec cp --parents {} "$back" \;)  # how each step was run, its figures, and the benchmark
    return $code
}

study() {  # of 2,000 labels at 128 tokens; the students of one seed in one process
    join
    local outputs=$data/study
    local shared=(--output-dir "$outputs" "${subset[@]}" --max-length 128) students=() one code=0
    local distil=(experiments/distillation.py "${student[@]}" "${shared[@]}" "${faster[@]}" --max-transfer-samples all)
    distil+=(--batch-tokens 32768)
    shared+=("${small[@]}")
    run 0 02_finetune_roberta.py "${encoder[@]}" --batch-size 16 --micro-batch-size 16 "${shared[@]}"
    run 0 "${distil[@]}" --runs teacher
    for one in 1 2 3; do
        run 0 "${distil[@]}" --seeds $one --runs control both_2000 both_8000 both_32000 final &
        students+=($!)
    done
    for one in "${students[@]}"; do wait "$one" || code=$?; done
    "$python" experiments/tables.py "$out/unlabelled" --collect "$outputs"/{teachers,runs} --read-test || code=$?
    return $code
}

mkdir -p "$out"
if [[ ! $tiny ]]; then
    gib=$("$python" -c "from torch.cuda import *; print(is_available() and mem_get_info()[1] >> 30)")  # all of it
    [[ $gib != False ]] || stop "no GPU is in sight: pass --tiny to try the command on a CPU"
    [[ $what == true_size ]] || ((gib >= needed)) || stop "this GPU has $gib GiB, and $what's batches need $needed"
fi
"$what" 2>&1 | tee "$out/$what.log"
