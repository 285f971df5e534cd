#!/usr/bin/env bash
# Every check that needs a GPU, in one command without network: prints one table.
#
#   PEER_SCRIPT=path/to/diffusers/examples/text_to_image/train_text_to_image.py benchmarks/gpu_check.sh
#
# Models have random weights and are made on the spot. Without PEER_SCRIPT the comparison is left out,
# and the table says so. PYTHON names the interpreter; BUDGET the seconds after which no new check begins.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-480}
SHAPE=${SHAPE:-sd15}
# A checkpoint of a full-size model has 14 GB: in memory where there is room for some, since disks may take a minute.
ROOM=$(df --output=avail /dev/shm 2>/dev/null | tail -n 1)
[ "${ROOM:-0}" -gt 50000000 ] && export TMPDIR=/dev/shm
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
failed=0

"$PYTHON" - <<'PY' || exit 2
import sys
try:
    import torch
except ImportError:
    sys.exit(f"error: {sys.executable} has no torch: set PYTHON to the interpreter of an environment that has it")
if not torch.cuda.is_available():
    sys.exit("error: torch sees no CUDA device; this check needs one (make test needs none)")
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
PY
date -u +"%Y-%m-%d %H:%M UTC"

in_time() {  # no new check after the budget; it is said which were left out
    [ "$SECONDS" -lt "$BUDGET" ] || { printf '%-34s left out: %s s are over\n' "$1" "$BUDGET"; return 1; }
}

echo "--- GPU tests"
in_time "GPU tests" && { "$PYTHON" -m pytest -q -W default -n 4 tests/test_gpu.py || failed=1; }

"$PYTHON" benchmarks/make_model.py --shape "$SHAPE" --work_dir "$WORK" || exit 2

train() {  # NAME FLAGS…: some steps of the real script; speed and peak memory; then the command in $THEN
    # EXPECTED is a pattern that its log has to have, LIMIT_GB the memory of the GPU that torch may take.
    local name=$1; shift
    in_time "$name" || return 0
    if PEAK_FILE=$WORK/peak.json "$PYTHON" benchmarks/measured_run.py train_text_to_image.py \
        --pretrained_model_name_or_path "$WORK/$SHAPE/model" --train_data_dir "$WORK/$SHAPE/pictures" \
        --cache_dir "$WORK/cache" --resolution 512 --train_batch_size 8 --max_train_steps 20 --logging_steps 10 \
        --checkpointing_steps 1000000 --lr_warmup_steps 0 --learning_rate 1e-5 --seed 0 --output_dir "$WORK/out" \
        --device cuda "$@" >"$WORK/log" 2>&1; then
        "$PYTHON" - "$name" "$WORK" <<'PY'
import json, math, pathlib, sys
name, work = sys.argv[1], pathlib.Path(sys.argv[2])
last = [json.loads(line) for line in (work / "out/metrics.jsonl").read_text().splitlines() if "train_loss" in line][-1]
peak = json.loads((work / "peak.json").read_text())
assert math.isfinite(last["train_loss"])
(work / "allocated_gb").write_text(str(last["memory_gb"]))
print(
    f"{name:<34} {last['images_per_second']:8.1f} images/s {last['memory_gb'] / 1.073741824:8.2f} GiB allocated "
    f"{peak / 2**30:8.2f} reserved   loss {last['train_loss']:.4f}"
)
PY
        if [ -n "${EXPECTED:-}" ] && ! grep -q "$EXPECTED" "$WORK/log"; then
            printf '%-34s FAILED: its log lacks "%s"\n' "$name" "$EXPECTED"
            failed=1
        fi
        if [ -n "${THEN:-}" ] && ! "$PYTHON" -m sd_recipes.commands.cli $THEN >"$WORK/log" 2>&1; then
            printf '%-34s FAILED: %s\n' "$name, ${THEN%% *}" "$(tail -n 1 "$WORK/log")"
            failed=1
        elif [ -n "${THEN:-}" ]; then
            grep -E "^(held-out loss|image-text|AuthPct)" "$WORK/log"
        fi
    else
        printf '%-34s FAILED: %s\n' "$name" "$(tail -n 1 "$WORK/log")"
        failed=1
    fi
    rm -rf "$WORK/out"
}

run_command() {  # NAME COMMAND FLAGS…: a command of sd-recipes, and how long it took
    local name=$1 began=$SECONDS; shift
    in_time "$name" || return 0
    if "$PYTHON" -m sd_recipes.commands.cli "$@" >"$WORK/log" 2>&1; then
        printf '%-34s %8s s\n' "$name" "$((SECONDS - began))"
    else
        printf '%-34s FAILED: %s\n' "$name" "$(tail -n 1 "$WORK/log")"
        failed=1
    fi
}

echo "--- the training loop: $SHAPE shape, 512 pixels, batch 8, 20 steps each"
in_time "speed and memory" && { "$PYTHON" benchmarks/gpu_rows.py --shape "$SHAPE" --work_dir "$WORK" --budget 150 \
    2>"$WORK/log" || { failed=1; tail -n 5 "$WORK/log"; }; }

echo "--- the whole script"
train "bf16"                        --mixed_precision bf16
# With less than that took: in the first step, or the second, which has the optimizer's state from its start.
LIMIT_GB=$("$PYTHON" -c "print(0.85 * float(open('$WORK/allocated_gb').read()))" 2>/dev/null || echo 24)
LIMIT_GB=$LIMIT_GB EXPECTED="No memory for 8 images at once .*: 4 at once from step [12] on" \
train "bf16, OOM replay"            --mixed_precision bf16
THEN="evaluate $WORK/out --num_pictures 4 --feature_model sd-recipes/tiny-clip --validation_inference_steps 4" \
train "bf16, EMA, held-out rows"    --mixed_precision bf16 --use_ema --validation_split 0.25 --validation_steps 10 \
    --validation_samples 32 --validation_pictures 2 --validation_inference_steps 4 --export best

echo "--- memory, planned against measured"
in_time "plan" && { "$PYTHON" benchmarks/plan_accuracy.py --device cuda --only "320 " || failed=1; }

echo "--- $SHAPE shape, exported and drawn with"
run_command "export, single file in fp16" export "$WORK/$SHAPE/model" --to single_file --output "$WORK/one.safetensors"
run_command "sample from it in bf16" sample --pretrained_model_name_or_path "$WORK/one.safetensors" \
    --base "$WORK/$SHAPE/model" --device cuda --dtype bf16 --steps 10 --resolution 512 --prompts "a boat" "two boats" \
    --output_dir "$WORK/drawn"

if [ -n "${PEER_SCRIPT:-}" ]; then
    echo "--- against diffusers' script, bf16, in turn"
    in_time "diffusers, $SHAPE" && { "$PYTHON" benchmarks/vs_diffusers.py --peer_script "$PEER_SCRIPT" --shape "$SHAPE" \
        --mixed_precision bf16 --repeats 2 --work_dir "$WORK" || failed=1; }
    in_time "diffusers, sd2" && { "$PYTHON" benchmarks/vs_diffusers.py --peer_script "$PEER_SCRIPT" --shape sd2 \
        --mixed_precision bf16 --repeats 1 || failed=1; }
else
    echo "against diffusers' script: left out, PEER_SCRIPT is not set"
fi
echo "took $SECONDS s"
exit "$failed"
