#!/usr/bin/env bash
# Several plans of one workload on one machine, one run each, one after another:
#
#   scripts/lab/plans.sh OUT WORKLOAD TRAIN.jsonl 'NAME BACKEND [KEY=VALUE ...]' ...
#
# OUT receives NAME.json (run.json), NAME.steps.jsonl and NAME.log of each, and table.txt. BUNDLE, FORGE_WORK: as in
# gate_stretch.sh. SECONDS_EACH: after so many a run is ended (default 200).
set -uo pipefail
[ $# -ge 4 ] || { sed -n '2,/^set /{/^#/p}' "$0"; exit 2; }
mkdir -p "$1" || exit 6
out=$(realpath "$1") workload=$2 train=$(realpath -e "$3") || exit 2
shift 3
bundle=${BUNDLE:-gpu-bundle/forge-gpu-bundle.tar.gz} work=${FORGE_WORK:-${XDG_CACHE_HOME:-$HOME/.cache}/forge-gate}
export FORGE_CACHE=${FORGE_CACHE:-$work/cache} PYTHONUNBUFFERED=1
mkdir -p "$work"
if [ -f "$bundle" ]; then
    place=$work/bundle-$(sha256sum "$bundle" | cut -c1-12)
    [ -f "$place/forge-gpu-bundle/MANIFEST.json" ] || { mkdir -p "$place" && tar xzf "$bundle" -C "$place"; } || exit 4
    # shellcheck disable=SC1091
    source "$place/forge-gpu-bundle/activate.sh"
fi
for run in "$@"; do
    read -r name backend plan <<<"$run"
    options=()
    for setting in $plan; do
        case $setting in *.*=*) options+=(--set "$setting") ;; *) options+=(--plan "$setting") ;; esac
    done
    rm -rf "$work/plans/$name"
    timeout -k 5 "${SECONDS_EACH:-200}" python3 -m forge.training train "$workload" --backend "$backend" --no-check \
        --plain --set "data.train=$train" --set data.validation=null --set data.validation_share=0 "${options[@]}" \
        -o "$work/plans/$name" >"$out/$name.log" 2>&1
    echo "$name: exit code $?, second $SECONDS"
    cp "$work/plans/$name/run.json" "$out/$name.json" 2>/dev/null
    cp "$work/plans/$name/steps.jsonl" "$out/$name.steps.jsonl" 2>/dev/null
done
tail -n 3 "$out"/*.log | grep -h "error:" 
python3 - "$out" <<'E2' | tee "$out/table.txt"
import json, pathlib, sys
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json")):
    record = json.loads(path.read_text())
    steps = [json.loads(line) for line in path.with_suffix(".steps.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "seconds" in step]
    peak = max((phase["peak_allocated_bytes"] for phase in record["memory"]), default=0) / 2**30
    rate = record["timing"].get("documents_per_second")
    print(f"{path.stem:24} {rate or 0:6.2f} documents/s {peak:7.2f} GiB", end="  ")
    print(" ".join(f"{s['tokens']}:{s['seconds']:.2f}:{s['loss']:.4f}" for s in steps))
E2
