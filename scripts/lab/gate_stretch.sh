#!/usr/bin/env bash
# One stretch of the gate on a GPU machine without a network, from the repository's root:
#
#   scripts/lab/gate_stretch.sh OUT TRAIN.jsonl [perf|parity|export|reliability ...] [-- PYTEST OPTION ...]
#
# OUT receives store.tar.gz (all runs, trials and probes), benchmark.json, gate.log, report.md and report.html. The store
# is packed after every run, so that a kill costs the pair that it met and nothing before. scripts/lab/keep_gate.py takes OUT up.
#
#   LIMIT   seconds until all is written (default 560)
#   STORE   a store or store.tar.gz to resume from; one that this machine still has from its last stretch goes first
#   BUNDLE  what `make gpu-bundle` made (default: where it makes it; without it this machine's own packages serve)
#   OTHER_GPU=1  measure although the store is of another GPU: nothing in it counts here
#
# The exit code is the gate's: 0 all claims passed, 1 not, 2 stopped, 4 no GPU or another one than the store's,
# no base or no bundle.
set -uo pipefail
set -m # else what runs in the background could not be interrupted
[ $# -ge 2 ] || { sed -n '2,/^set /{/^#/p}' "$0"; exit 2; }
mkdir -p "$1" || exit 6
out=$(realpath "$1") train=$(realpath -e "$2") || exit 2
shift 2
suites=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do suites+=("harness/$1"); shift; done
[ $# -eq 0 ] || shift
options=("$@")
[ ${#suites[@]} -gt 0 ] || suites=(harness/perf)
limit=${LIMIT:-560} bundle=${BUNDLE:-gpu-bundle/forge-gpu-bundle.tar.gz}
work=${FORGE_WORK:-${XDG_CACHE_HOME:-$HOME/.cache}/forge-gate}
export FORGE_CACHE=${FORGE_CACHE:-$work/cache} PYTHONUNBUFFERED=1
gate='' watch='' limiter=''
mkdir -p "$work"
rm -f "$work"/benchmark.json*
exec 3>&1 >"$out/gate.log" 2>&1

note() { echo "[stretch, second $SECONDS of $limit] $*"; }
pack() { # complete under its name or as it was; a file that changes meanwhile is packed by the next call
    [ -d "$work/store" ] || return 0
    touch "$work/packed"
    tar czf "$work/store.tar.gz" --exclude=.lock -C "$work" store || [ $? -eq 1 ] || return 1
    cp "$work/store.tar.gz" "$out/store.part" && mv "$out/store.part" "$out/store.tar.gz"
}
finish() {
    local code=$?
    trap - EXIT
    trap '' TERM INT # what is left takes seconds
    for group in $watch $limiter; do kill -- "-$group"; done 2>/dev/null
    if [ -n "$gate" ] && kill -INT -- "-$gate" 2>/dev/null; then
        for _ in $(seq 100); do kill -0 "$gate" 2>/dev/null && sleep 0.1; done
        kill -KILL -- "-$gate" 2>/dev/null
    fi
    pack || note "the store could not be packed"
    local json=$work/benchmark.json
    [ -f "$json" ] || json=$json.partial
    if [ -f "$json" ]; then
        cp "$json" "$out/benchmark.json"
        timeout -k 5 40 python3 -m harness.report "$json" -o "$out" --store "$work/store"
    fi
    note "exit code $code"
    tail -n 60 "$out/gate.log" >&3
    exit "$code"
}
trap finish EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

if [ -f "$bundle" ]; then
    place=$work/bundle-$(sha256sum "$bundle" | cut -c1-12)
    if [ ! -f "$place/forge-gpu-bundle/MANIFEST.json" ]; then # the archive's last file
        mkdir -p "$place" && tar xzf "$bundle" -C "$place" || exit 4
        note "bundle unpacked"
        (cd "$place/forge-gpu-bundle" && python3 -m compileall -q -j 0 site legacy) >/dev/null 3>&- &
        compiling=$!
    fi
    # shellcheck disable=SC1091
    source "$place/forge-gpu-bundle/activate.sh"
fi
if [ -n "${STORE:-}" ] && [ ! -d "$work/store" ]; then
    if [ -d "$STORE" ]; then cp -r "$STORE" "$work/store"; else tar xzf "$STORE" -C "$work"; fi || exit 3
    note "resuming from $(find "$work/store/runs" -name '*.json' | wc -l) runs"
fi
gpu=$(python3 -c 'from forge.training.system.environment import describe_gpu as gpu; print((gpu() or {}).get("name", ""))')
others=$(grep -rhoE '"gpu": "[^"]+"' "$work/store" 2>/dev/null | sort -u)
if [ -n "$gpu" ] && [ -n "$others" ] && [ -z "${OTHER_GPU:-}" ] && ! grep -qF "\"$gpu\"" <<<"$others"; then
    note "this GPU is \"$gpu\", the store is of ${others//$'\n'/, }: nothing in it would count (OTHER_GPU=1 measures anew)"
    exit 4
fi
if [ -z "${GATE_MODEL:-}" ] && [ "${suites[*]}" != harness/parity ]; then # the ladder has a base of its own
    timeout 200 python3 -m forge.training base qwen2-7b || exit 4
    note "base is there"
fi
[ -z "${compiling:-}" ] || wait "$compiling" # byte code of everything that every run imports
touch -d @0 "$work/packed"
(while sleep 3 && kill -0 $$; do [ -z "$(find "$work/store" -name '*.json' -newer "$work/packed" -print -quit 2>/dev/null)" ] || pack; done) 3>&- &
watch=$!
judge() { # SECONDS that are left for measuring, SECONDS until it is interrupted
    python3 -m pytest -m gpu "${suites[@]}" --tb=line --gate-train "$train" --gate-store "$work/store" \
        --gate-seconds "$1" --gate-run-seconds 400 ${GATE_MODEL:+--gate-model "$GATE_MODEL"} \
        --benchmark-json "$work/benchmark.json" "${options[@]}" 3>&- &
    gate=$!
    (sleep "$2" && kill -INT -- "-$gate") 3>&- & # it ends by itself, unless a run hangs
    limiter=$!
    wait "$gate"
    local code=$?
    gate=''
    kill -- "-$limiter" 2>/dev/null
    return $code
}
left=$((limit - SECONDS))
judge $((left > 80 ? left - 70 : 10)) $((left > 80 ? left - 50 : 30))
code=$?
[ -f "$work/benchmark.json" ] || judge 0 20 # interrupted: what the store has is recorded all the same
exit $code
