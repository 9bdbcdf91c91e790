#!/usr/bin/env bash
# Two commands for a GPU at hand, also on a machine without network. From the top folder:
#     bash experiments/gpu.sh true_size    # three minutes: what the real sizes cost, a T4's conditions first
#     bash experiments/gpu.sh imdb         # the scripts on IMDB at 512 tokens, from the parts in outputs/gpu/parts
#     bash experiments/gpu.sh imdb --tiny  # the same on a CPU in two minutes, from tiny parts that it makes itself
# `python experiments/real_weights.py --parts` makes the parts; true_size reads packages.zip and parts.json alone.
# imdb ends after HOURS (five minutes) and keeps what is finished; the same command continues. The results go to OUT.
# Seconds of arithmetic at 150 TFLOP/s (true_size.flop, IMDB's lengths): 02 training 45, scoring 25; 04a student 19,
# control 19; 05 10; 03 9; 04b scoring 22, student 11. Each script adds about 25 for imports, reading and tokenising.
set -euo pipefail
stop() { echo "error: $1" >&2 && exit 2; }
what=${1:-} tiny=${2:-} python=${PYTHON:-python}
[[ $what =~ ^(true_size|imdb)$ && $tiny =~ ^(--tiny)?$ ]] || stop "pass true_size or imdb, and --tiny on a CPU"
if [[ $tiny ]]; then
    work=${WORK:-outputs/gpu/work}/tiny parts=$work/parts out=${OUT:-$work} hours=${HOURS:-1}
    small=(--validation-samples 50 --max-length 96 --epochs 4 --learning-rate 1e-3 --batch-size 8)
else
    work=${WORK:-outputs/gpu/work} parts=outputs/gpu/parts out=${OUT:-results/gpu} hours=${HOURS:-0.083} small=()
fi
data=$work/data outputs=$work/data/outputs needed=40  # GiB of GPU: 02 at 64 x 512 tokens takes about 36
[[ $hours =~ ^[0-9]*\.?[0-9]+$ && $hours =~ [1-9] ]] || stop "HOURS=$hours is not a number of hours above 0"
total=$(awk "BEGIN {print int(3600 * $hours)}")
export HF_HUB_OFFLINE=1 PYTHONPATH=$work/packages${PYTHONPATH:+:$PYTHONPATH}
weights() { "$python" experiments/real_weights.py "$@"; }

true_size() {
    [[ ! -f $parts/parts.json ]] || weights --join "$parts" --output-dir "$work" --packages-only
    "$python" experiments/true_size.py --output-dir "$out" --modes as_t4 as_itself $tiny
}

make_tiny_parts() {
    local made=$work/made reviews=$work/made/demo/reviews
    weights --tiny --output-dir "$made"
    "$python" 01_baseline.py --dataset "$reviews" --output-dir "$made" --validation-samples 50
    weights --parts "$parts" --output-dir "$made" --dataset "$reviews" --baseline "$made/01_baseline"
}

step() {  # seconds to leave, script, flags; returns 3 when out of time and ends the run when the script fails
    local seconds=$((total - SECONDS - $1 - 15)) code=0  # 15 for imports, and for what ends a chunk or a step
    ((seconds >= 15)) || return 3
    "$python" "${@:2}" --dataset "$data/reviews" --output-dir "$outputs" \
        --max-hours "$(awk "BEGIN {print $seconds / 3600}")" || code=$?
    [[ $code == [03] ]] || exit "$code"
    return "$code"
}
teach() { step 90 "$@" "${small[@]}"; }  # 90 s are for 05; if a flag occurs twice, the last one counts

benchmark() {  # if a step was finished since the last table, or the last table is not finished
    local folder=$outputs/05_benchmark run
    for run in "$outputs"/0[234]*/run.json; do
        if [[ -d $folder && $run -nt $folder/started.json ]]; then bring_back && rm -rf "$folder"; fi
    done
    [[ ! -f $run || -f $folder/run.json ]] || step 0 05_benchmark.py --max-llm-samples 5000 --batch-tokens 32768
}
bring_back() { "$python" experiments/parts.py "$outputs" "$out"; }

imdb() {
    [[ ! $tiny || -f $parts/parts.json ]] || make_tiny_parts
    weights --join "$parts" --output-dir "$work"
    rm -f "$out"/{benchmark.csv,predictions.parquet,environment.json,steps.json}
    trap bring_back EXIT  # also after a failure
    local flags=(--student-model "$data/minilm-l6" --epochs 2 --batch-size 128 --micro-batch-size 128 --learning-rate 2e-4)
    teach 02_finetune_roberta.py --roberta-model "$data/mpnet-base" --epochs 2 --learning-rate 4e-5 \
        --batch-size 64 --micro-batch-size 64 --batch-tokens 32768 ${tiny:+--student-layers 2} &&
        teach 04a_distill_from_roberta.py "${flags[@]}" && benchmark && ((total - SECONDS > 150)) &&
        { weights --output-dir "$data" || exit; } &&  # makes the LLM's folder of its 4-bit file
        teach 03_finetune_mistral.py --mistral-model "$data/smollm2-135m" --learning-rate 3e-4 --lora-dropout 0 \
            --batch-size 32 --micro-batch-size 32 --no-gradient-checkpointing --batch-tokens 32768 &&
        teach 04b_distill_from_mistral.py "${flags[@]}" --batch-tokens 32768 || true
    benchmark || true
}

mkdir -p "$out"
if [[ ! $tiny ]]; then
    gib=$("$python" -c "from torch.cuda import *; print(is_available() and mem_get_info()[1] >> 30)")  # all of it
    [[ $gib != False ]] || stop "no GPU is in sight: pass --tiny to try the command on a CPU"
    [[ $what == true_size ]] || ((gib >= needed)) || stop "this GPU has $gib GiB, and imdb's batches need $needed"
fi
"$what" 2>&1 | tee "$out/$what.log"
