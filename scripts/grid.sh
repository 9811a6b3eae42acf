#!/usr/bin/env bash
# A grid of runs: for every backbone and seed, the four schedules and two experts per domain, matched to a unified run in
# "images" (the same number in all) or in "exposure" (the same number of their domain). Each cell is trained, evaluated
# and, if unified, analysed; complete cells are skipped. SCHEDULE+NAME is a schedule with the options of VARIANT_NAME,
# e.g. sequential+replay.
#   scripts/grid.sh             every cell, one after another, then the summary
#   scripts/grid.sh list        number and run folder of every cell
#   scripts/grid.sh summary     the scores of all evaluated cells and the verdicts on the abstract's claims
# CELL=N (or a SLURM array, see scripts/slurm.sbatch) selects one cell. Exit code 75: stopped with a checkpoint; repeat the
# command. Other environment variables and their defaults are below. A first trial, ten minutes on a CPU:
#   python -m data_prep demo --out demo/data
#   export DATA=demo/data OUT=demo/grid BACKBONES=clip SIZE=tiny SEEDS=0 IMAGES=12800 ANALYZE="--components 24"
#   export TRAIN="--weights none --image-size 64 --batch 64 --lr 3e-3 --head-lr 1e-2 --layer-decay 1
#       --loss cosface:s=24;object=softmax:s=24"
#   scripts/grid.sh
set -eufo pipefail  # -f: no globbing in lists
cd "$(dirname "$0")/.."
: "${DATA:=data}" "${OUT:=runs/grid}"
: "${BACKBONES:=clip eva02 dinov3}" "${SIZE:=large}" "${SEEDS:=0 1 2}"
: "${MODEL:=}"                    # any timm or open_clip model instead of BACKBONES and SIZE (--weights: in TRAIN)
: "${DOMAINS:=object face_hq face_lq body}"  # in the order of the sequential run
: "${SCHEDULES:=A B sequential alternate}" "${MATCH:=images exposure}"
: "${IMAGES:=2000000}"            # of a unified run, over all domains
: "${EXPOSURE:=A}"                # exposure of experts: that of A (equal shares, as in sequential and alternate) or B
: "${LAUNCH:=python}"             # e.g. "torchrun --standalone --nproc-per-node=8"
: "${TRAIN:=}" "${EVALUATE:=}" "${ANALYZE:=}"  # more options for train.py, evaluate.py, analyze.py (none: no analysis)
: "${SEQUENTIAL:=}"               # more options for the sequential cells, e.g. "--eval-every N" for their task matrix
: "${VARIANT_replay:=--replay 0.1}" "${VARIANT_l2sp:=--retain l2sp=0.01}" "${VARIANT_features:=--retain features=1}"
: "${VARIANT_lora:=--lora 8}" "${VARIANT_reversed:=--domains $(printf '%s\n' $DOMAINS | tac | paste -sd,)}"
: "${JOBS:=1}"                    # number of cells run at once, each in its own process
: "${CELL:=${SLURM_ARRAY_TASK_ID:-}}"

[ -z "$MODEL" ] || BACKBONES=$MODEL
refuse() { echo "error: $1" >&2; exit 2; }

cells() {  # backbone, seed and kind of every cell
    for backbone in $BACKBONES; do for seed in $SEEDS; do
        for schedule in $SCHEDULES; do echo "$backbone $seed $schedule"; done
        for domain in $DOMAINS; do for match in $MATCH; do echo "$backbone $seed $domain-$match"; done; done
    done; done
}

folder() { if [ -n "$MODEL" ]; then echo "$OUT/${1//\//-}-$3-s$2"; else echo "$OUT/$1-$SIZE-$3-s$2"; fi; }

exposure() {  # images of domain $3 in the unified run of backbone $1, seed $2
    [ "$EXPOSURE" = B ] || { set -- $DOMAINS; echo $((IMAGES / $#)); return; }
    config=$(folder "$1" "$2" B)/config.json
    [ -e "$config" ] || refuse "EXPOSURE=B needs $config: start that cell first"
    python -c 'import json, sys; print(json.load(open(sys.argv[1]))["facts"]["counts"][sys.argv[2]])' "$config" "$3"
}

run_cell() {  # called with `set -e` off: every step handles its own failure
    local run variant options images=$IMAGES code=0 network=(--backbone "$1" --size "$SIZE")
    [ -z "$MODEL" ] || network=(--model "$MODEL")
    run=$(folder "$@")
    if [[ $3 = *-* ]]; then  # an expert
        [[ $3 != *-exposure ]] || images=$(exposure "$1" "$2" "${3%-*}") || return
        options=(--domains "${3%-*}" --images "$images")
    else
        options=(--schedule "${3%+*}" --domains "${DOMAINS// /,}" --images "$images")
        [ "${3%+*}" != sequential ] || options+=($SEQUENTIAL)
        variant=VARIANT_${3#*+}
        [[ $3 != *+* ]] || options+=(${!variant})
    fi
    if [ ! -e "$run/done.json" ]; then
        rm -f "$run/STOP"
        $LAUNCH train.py "${network[@]}" --seed "$2" --data "$DATA" --out "$run" --resume \
            "${options[@]}" $TRAIN || code=$?
        # torchrun turns every exit code into 1: the STOP file marks a stopped run
        [ $code = 0 ] || [ ! -e "$run/STOP" ] || code=75
        [ $code = 0 ] || return $code
    fi
    [ "$run/eval/results.json" -nt "$run/done.json" ] || python evaluate.py --run "$run" \
        --cache "$OUT/embeddings" $EVALUATE || return  # all cells share the embeddings of the untouched backbone
    [[ $3 = *-* || $ANALYZE = none || $run/analysis/analysis.json -nt $run/eval/results.json ]] ||  # an expert: one task
        python analyze.py --run "$run" --cache "$OUT/embeddings" $ANALYZE
}

summarise() {
    python - "$OUT" <<'PYTHON' || return
import sys
from collections import defaultdict
from pathlib import Path

from data_prep import join_config, literal
from protocols.results import read_rows
from reports.rows import as_table, headlines
from reports.tables import write_text

out, values = Path(sys.argv[1]), defaultdict(lambda: defaultdict(list))
for path in sorted(out.glob("*/eval/results.json")):
    name = path.parts[-3].rpartition("-s")[0]
    options = join_config(path.parent.parent / "config.json")
    network = options["model"] or f"{options['backbone']}-{options['size']}"
    for (domain, split), pair in headlines(read_rows(path.parent)).items():
        for weights, row in pair.items():
            cell = name if weights == "tuned" else f"{network}, untouched"
            values[cell][f"{domain}/{split} {row.metric}"].append(100 * row.value)
if not values:
    sys.exit(f"error: {out}: no evaluated run yet")
columns = list(dict.fromkeys(column for scores in values.values() for column in scores))
table = [[literal(cell), *(f"{sum(v) / len(v):.1f}" + f" ({min(v):.1f}, {max(v):.1f})" * (min(v) < max(v)) if v else ""
                           for v in (scores[column] for column in columns))] for cell, scores in values.items()]
lines = ["Percent; over several seeds: mean (minimum, maximum).", "", *as_table(["", *map(literal, columns)], table)]
write_text(out / "summary.md", "\n".join(lines) + "\n")
print("\n".join(lines))
PYTHON
    python analyze.py claims "$OUT"
}

[[ $SEEDS =~ ^[0-9\ ]+$ ]] || refuse "SEEDS=$SEEDS: want whole numbers"
[[ $IMAGES =~ ^[1-9][0-9]*$ ]] || refuse "IMAGES=$IMAGES: want a whole number of images"
[[ $EXPOSURE =~ ^[AB]$ ]] || refuse "EXPOSURE=$EXPOSURE: want A or B"
[[ $JOBS =~ ^[1-9][0-9]*$ ]] || refuse "JOBS=$JOBS: want the number of cells to run at once"
for schedule in $SCHEDULES; do
    variant=VARIANT_${schedule#*+}
    [[ $schedule != *+* || -n ${!variant:-} ]] || refuse "$schedule: no variable $variant with its options"
done
grid=()
while read -r cell; do grid+=("$cell"); done < <(cells)
if [ -n "$CELL" ]; then
    [[ $CELL =~ ^[0-9]+$ ]] && [ "$CELL" -lt ${#grid[@]} ] || refuse "CELL=$CELL: want 0 to $((${#grid[@]} - 1))"
fi
case ${1:-} in
    list) for number in ${CELL:-${!grid[@]}}; do printf '%s\t%s\n' "$number" "$(folder ${grid[number]})"; done; exit ;;
    summary) summarise; exit ;;
    ?*) refuse "$1: no such command; want list, summary or nothing" ;;
esac
if [ -z "$CELL" ] && [ "$JOBS" -gt 1 ]; then  # cells that are incomplete after this are retried below
    export "${!VARIANT_@}" BACKBONES SEEDS DOMAINS SCHEDULES MATCH IMAGES EXPOSURE LAUNCH TRAIN EVALUATE ANALYZE SEQUENTIAL DATA OUT SIZE MODEL
    # xargs stops at exit code 255: after a cell was stopped, no other is started
    printf '%s\n' "${!grid[@]}" | xargs -P "$JOBS" -I{} bash -c 'CELL={} "$0" || { [ $? != 75 ] || exit 255; }' "$0" ||
        exit 75
fi
failed=()
for number in ${CELL:-${!grid[@]}}; do
    code=0
    run_cell ${grid[number]} || code=$?
    [ -z "$CELL" ] && [ $code != 75 ] || exit $code
    [ $code = 0 ] || failed+=("$(folder ${grid[number]})")
done
summarise || failed+=("$OUT/summary.md")
[ ${#failed[@]} = 0 ] || { echo "error: not complete: ${failed[*]}" >&2; exit 1; }
