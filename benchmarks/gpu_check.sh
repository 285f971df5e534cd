#!/usr/bin/env bash
# The checks that need a GPU, without network: prints tables, of as many checks as fit in the budget.
#
#   PEER_SCRIPT=path/to/diffusers/examples/text_to_image/train_text_to_image.py benchmarks/gpu_check.sh
#   benchmarks/gpu_check.sh tests rows            # only some of the parts, which may be spread over several calls
#
# Parts: rows script nccl validation tests peer stall plan; of SHAPE=sdxl rows tests plan. Those that matter most come
# first; no new check begins once BUDGET seconds are over, none lasts longer than GRACE more, and what was left out is
# said. Models have random weights and are made on the spot. Without PEER_SCRIPT the comparison is left out. PYTHON names
# the interpreter, ONLY a pattern of rows. DEVICE=cpu SHAPE=tiny RESOLUTION=64 tries the script itself, all but the
# tests.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-500}
GRACE=${GRACE:-40}
SHAPE=${SHAPE:-sd15}
DEVICE=${DEVICE:-cuda}
ONLY=${ONLY:-}
case $SHAPE in  # all weights of SDXL at batch 8, which the other parts train, need more memory than a GPU has
    *sdxl) USUAL=1024 ALL_PARTS="rows tests plan" ;;
    *) USUAL=512 ALL_PARTS="rows script nccl validation tests peer stall plan" ;;
esac
RESOLUTION=${RESOLUTION:-$USUAL}
PARTS=${*:-$ALL_PARTS}
for part in $PARTS; do
    case " $ALL_PARTS " in
        *" $part "*) ;;
        *) echo "error: $part is no part of SHAPE=$SHAPE: choose from $ALL_PARTS" >&2; exit 2 ;;
    esac
done
BF16="--mixed_precision bf16"
# A checkpoint of a full-size model has 14 GB: in memory where there is room for some, since disks may take a minute.
ROOM=$(df --output=avail /dev/shm 2>/dev/null | tail -n 1)
[ "${ROOM:-0}" -gt 50000000 ] && export TMPDIR=/dev/shm
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
failed=0

"$PYTHON" - "$DEVICE" <<'PY' || exit 2
import importlib.util, sys
missing = [name for name in ("torch", "diffusers", "transformers", "accelerate", "datasets", "pydantic")
           if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"error: {sys.executable} lacks {', '.join(missing)}: set PYTHON to the interpreter of an environment that "
             "has them")
import torch
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("error: torch sees no CUDA device; this check needs one (make test needs none)")
device = torch.cuda.get_device_name() if sys.argv[1] == "cuda" else "CPU"
print(f"{device}, torch {torch.__version__}, CUDA {torch.version.cuda}")
PY
"$PYTHON" -m sd_recipes.commands.env 2>/dev/null | grep -iE "missing|older|not installed"
date -u +"%Y-%m-%d %H:%M UTC"
"$PYTHON" benchmarks/make_model.py --shape "$SHAPE" --work_dir "$WORK" || exit 2

in_time() {  # no new check after the budget; it is said which were left out
    [ "$SECONDS" -lt "$BUDGET" ] || { printf '%-34s left out: %s s are over\n' "$1" "$BUDGET"; return 1; }
}

limited() {  # COMMAND…: ended where the budget and the grace are over
    timeout --kill-after=10 "$((BUDGET + GRACE > SECONDS ? BUDGET + GRACE - SECONDS : 1))" "$@"
}

check() {  # NAME COMMAND…: how long it took, or the end of what it said; fails if it was left out too
    local name=$1 began=$SECONDS; shift
    in_time "$name" || return 1
    if limited "$@" >"$WORK/log" 2>&1; then
        printf '%-34s %8s s\n' "$name" "$((SECONDS - began))"
    else
        printf '%-34s FAILED: %s\n' "$name" "$(tail -n 1 "$WORK/log")"
        failed=1
        return 1
    fi
}

TRAIN="train_text_to_image.py --pretrained_model_name_or_path $WORK/$SHAPE/model --train_data_dir $WORK/$SHAPE/pictures
    --cache_dir $WORK/cache --resolution $RESOLUTION --train_batch_size 8 --logging_steps 10 --lr_warmup_steps 0
    --checkpointing_steps 1000000 --learning_rate 1e-5 --seed 0 --device $DEVICE --output_dir $WORK/out"

part_rows() {
    echo "--- the training loop: $SHAPE shape, $RESOLUTION pixels"
    limited "$PYTHON" benchmarks/gpu_rows.py --shape "$SHAPE" --work_dir "$WORK" --device "$DEVICE" --only "$ONLY" \
        --resolution "$RESOLUTION" --budget "${ROWS_BUDGET:-240}" 2>"$WORK/rows" || { failed=1; tail -n 3 "$WORK/rows"; }
}

part_script() {
    echo "--- the whole script: its end, and what it leaves"
    check "bf16, exported" env PEAK_FILE="$WORK/peak" "$PYTHON" benchmarks/measured_run.py $TRAIN $BF16 \
        --max_train_steps 10 && [ "$DEVICE" = cuda ] && limit_memory
    check "drawn by stock diffusers" "$PYTHON" - "$WORK/out" "$DEVICE" "$RESOLUTION" <<'PY'
import sys, numpy as np
from diffusers import StableDiffusionPipeline
folder, device, side = sys.argv[1], sys.argv[2], int(sys.argv[3])
pipeline = StableDiffusionPipeline.from_pretrained(folder).to(device)
picture = pipeline("a boat", num_inference_steps=4, height=side, width=side, output_type="np").images[0]
assert np.isfinite(picture).all() and picture.shape == (side, side, 3)
PY
    rm -rf "$WORK/out"
    check "single file in fp16" "$PYTHON" -m sd_recipes.commands.cli export "$WORK/$SHAPE/model" --to single_file \
        --output "$WORK/one.safetensors"
    check "sampled from in bf16" "$PYTHON" -m sd_recipes.commands.cli sample --device "$DEVICE" --dtype bf16 \
        --pretrained_model_name_or_path "$WORK/one.safetensors" --base "$WORK/$SHAPE/model" --steps 4 \
        --resolution "$RESOLUTION" --prompts "a boat" "two boats" --output_dir "$WORK/drawn"
}

limit_memory() {  # with less than a step took, which is then done again with fewer images at once
    local limit
    limit=$("$PYTHON" -c "print(0.85e-9 * int(open('$WORK/peak').read()))")
    rm -rf "$WORK/out"
    check "bf16, OOM replay" env PEAK_FILE="$WORK/peak" LIMIT_GB="$limit" "$PYTHON" benchmarks/measured_run.py $TRAIN \
        $BF16 --max_train_steps 10 || return 0
    grep -o "No memory for 8 images at once" "$WORK/log" || { echo "it had memory enough: FAILED"; failed=1; }
}

part_nccl() {
    rm -rf "$WORK/out"
    check "one process under torchrun" "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node 1 $TRAIN \
        $BF16 --max_train_steps 4 && grep -E "^ +(global batch|device) " "$WORK/log"
    rm -rf "$WORK/out"
}

part_validation() {
    echo "--- validations"
    in_time validation && { limited "$PYTHON" benchmarks/validation.py --shape "$SHAPE" --work_dir "$WORK" \
        --device "$DEVICE" --resolution "$RESOLUTION" 2>"$WORK/log" || { failed=1; tail -n 1 "$WORK/log"; }; }
}

part_tests() {
    [ "$DEVICE" = cuda ] || return 0
    echo "--- GPU tests"
    in_time "GPU tests" && { limited "$PYTHON" -m pytest -q -W default -n 4 tests/test_gpu.py \
        "tests/runtime/test_gradients.py::test_gradients_summed_over_one_process_are_its_own" || failed=1; }
}

part_peer() {
    if [ -z "${PEER_SCRIPT:-}" ]; then
        echo "against diffusers' script: left out, PEER_SCRIPT is not set"
        return 0
    fi
    echo "--- against diffusers' script, bf16, in turn"
    in_time "diffusers" && { limited "$PYTHON" benchmarks/vs_diffusers.py --peer_script "$PEER_SCRIPT" --shape "$SHAPE" \
        --mixed_precision bf16 --repeats 1 --device "$DEVICE" --resolution "$RESOLUTION" --work_dir "$WORK" || failed=1; }
}

part_stall() {
    echo "--- checkpoints: what a save stalls the loop for"
    in_time "checkpoint" && { limited "$PYTHON" benchmarks/checkpoint.py stall --shape "$SHAPE" --runs 1 \
        --work_dir "$WORK" 2>"$WORK/log" || { failed=1; tail -n 1 "$WORK/log"; }; }
}

part_plan() {
    echo "--- memory, planned against measured"
    in_time "plan" && { limited "$PYTHON" benchmarks/plan_accuracy.py --device "$DEVICE" --only "320 " || failed=1; }
}

for part in $PARTS; do
    "part_$part"
done
echo "took $SECONDS s"
exit "$failed"
