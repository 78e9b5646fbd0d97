#!/usr/bin/env bash
# What docs/results was measured with, on a GPU machine without a network: bases made on the spot, trained with both
# backends, exported at real size. From the repository's root:
#
#   scripts/lab/gpu_session.sh OUT TRAIN.jsonl VALIDATION.jsonl STAGE...
#
# Stages: tiny  8k  full  export. OUT receives the records. The bundle (make gpu-bundle) is unpacked if it is there.
# Every step has its own time limit, and one that fails does not stop the next.
set -uo pipefail
out=$(realpath -m "$1"); train=$(realpath "$2"); validation=$(realpath "$3"); shift 3
work=${FORGE_WORK:-$(mktemp -d)}
mkdir -p "$out" "$work"
export FORGE_CACHE=${FORGE_CACHE:-$work/cache} PYTHONUNBUFFERED=1
bundle=gpu-bundle/forge-gpu-bundle.tar.gz
if [ -f "$bundle" ]; then
    [ -d "$work/forge-gpu-bundle" ] || tar xzf "$bundle" -C "$work"
    # shellcheck disable=SC1091
    source "$work/forge-gpu-bundle/activate.sh"
fi
forge() { python3 -m forge.training "$@"; }
note() { echo "[$(date +%T)] $*"; }
# step SECONDS NAME COMMAND...: its output to OUT/NAME.log, its end shown
step() {
    local limit=$1 name=$2 code; shift 2
    local started=$SECONDS
    timeout -k 10 "$limit" "$@" >"$out/$name.log" 2>&1; code=$?
    note "$name: exit $code after $((SECONDS - started)) s"
    tail -n "${TAIL:-4}" "$out/$name.log"
}
keep() { cp "$work/$1/run.json" "$out/$1.run.json" && cp "$work/$1/steps.jsonl" "$out/$1.steps.jsonl"; }
documents=(--set "data.train=$train" --set "data.validation=$validation")
steps=${FORGE_STEPS:-36}
tiny=${FORGE_TINY:-tiny} # a directory saves the minute that making it takes
big=(--set model.path=qwen2-7b "${documents[@]}" --set "training.max_steps=$steps")

for stage in "$@"; do
    case $stage in
    tiny)
        step 240 base-tiny python3 -m forge.training base "$tiny"
        for backend in unsloth trl; do
            step 240 "tiny-$backend" python3 -m forge.training train smoke --backend "$backend" \
                --set "model.path=$tiny" --set model.dtype=bfloat16 -o "$work/tiny-$backend"
            step 120 "tiny-$backend-evaluate" python3 -m forge.training evaluate "$work/tiny-$backend"
            step 120 "tiny-$backend-export" python3 -m forge.training export "$work/tiny-$backend"
            keep "tiny-$backend"
            cp "$work/tiny-$backend/evaluation.json" "$out/tiny-$backend.evaluation.json"
            cp "$work/tiny-$backend/export/export.json" "$out/tiny-$backend.export.json"
        done
        ;;
    8k)
        step 180 base-7b python3 -m forge.training base qwen2-7b
        for backend in unsloth trl; do
            step 300 "8k-$backend" python3 -m forge.training train genome_8k --backend "$backend" "${big[@]}" -o "$work/8k-$backend"
            keep "8k-$backend"
        done
        ;;
    full)
        step 180 base-7b python3 -m forge.training base qwen2-7b
        step 300 full-unsloth python3 -m forge.training train genome_full --backend unsloth "${big[@]}" -o "$work/full-unsloth"
        keep full-unsloth
        ;;
    export)
        step 500 full-export python3 -m forge.training export "$work/full-unsloth" --quant f16,q4_k_m --force
        cp "$work/full-unsloth/export/export.json" "$out/full-unsloth.export.json"
        cp "$work/full-unsloth/export/SHA256SUMS" "$out/full-unsloth.SHA256SUMS"
        ls -l "$work/full-unsloth/export" >>"$out/full-export.log"
        df -h "$work" | tail -1
        ;;
    *) note "no stage $stage"; exit 2 ;;
    esac
done
