#!/usr/bin/env bash
# A dose-response study: one small backbone is fine-tuned on four tasks at several learning rates (the dose), by
# schedules A and B, one task per step in turn (alternate), one task after another (sequential, also in reverse order
# and with the remedies --retain and --replay), and on each task alone (experts, matched in images and in exposure).
#   scripts/study.sh DATA_ROOT WEIGHTS
# DATA_ROOT   prepared splits of face_hq, face_lq, body and object, each with `train` and `valid` (scripts/prepare_real.sh)
# WEIGHTS     safetensors file of MODEL
# 1. The experts at every rate, one seed. 2. The choice of the rate whose experts score best on validation identities,
# OUT/rate.md. 3. Everything at that rate, one seed. 4. A, B, alternate and sequential at the other rates. 5. The other
# seeds at the chosen rate. 6. OUT/study.md, study.csv, study.png; the verdicts on the claims are in OUT/lr-RATE/claims.md.
# FORM=full     112 pixels, 900 steps of 64 images: for a GPU
# FORM=reduced  64 pixels, 400 steps: about four hours of two CPU cores (default without a GPU)
# Complete runs are skipped, so the same command continues after a stop. The environment variables of scripts/grid.sh
# (SEEDS, IMAGES, JOBS, OUT, EVALUATE="--humans object/edges=edge.csv", ...) also apply.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# = 2 ] || { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
refuse() { echo "error: $1" >&2; exit 2; }
: "${DOMAINS:=object face_hq face_lq body}"
for domain in $DOMAINS; do for split in train valid; do
    [ -e "$1/$domain/$split/index.json" ] || refuse "$1: no $domain/$split in it; see scripts/prepare_real.sh"
done; done
[ -f "$2" ] || refuse "$2: no such file of weights"
case $2 in *[[:space:]]*) refuse "$2: spaces in the path; move the file, or link to it" ;; esac
: "${FORM:=$(python -c 'import torch; print("full" if torch.cuda.is_available() else "reduced")')}"
case $FORM in
    full) : "${SIDE:=112}" "${IMAGES:=57600}" "${JOBS:=4}" "${OMP_NUM_THREADS:=4}" ;;
    reduced) : "${SIDE:=64}" "${IMAGES:=25600}" "${JOBS:=2}" "${OMP_NUM_THREADS:=1}" ;;
    *) refuse "FORM=$FORM: want full or reduced" ;;
esac
: "${OUT:=runs/study}" "${SEEDS:=0 1 2}" "${RATES:=2e-4 6e-4 2e-3}"
: "${SCHEDULES:=A B alternate sequential sequential+reversed sequential+l2sp sequential+features sequential+replay}"
valid=$(for domain in $DOMAINS; do printf '%s/valid,' "$domain"; done)
tests=$(cd "$1" && ls -d */*/index.json | sed 's,/index.json,,' | grep -v -e /train$ -e /valid$ | paste -sd,)
# For a small backbone and few images: learning rates, scale and margins other than the defaults, no layer-wise decay;
# the same in every run.
common="--weights $2 --image-size $SIDE --batch 64 --head-lr 1e-3 --layer-decay 1 --margin-ramp 0.3
    --crop-scale object=0.5,face_hq=0.9,face_lq=0.9,body=0.7 --loss cosface:m=0.2,s=32;object=softmax:s=30
    --cache ram --workers 0 --eval-every $((IMAGES / 64 / 4)) --splits ${valid%,} ${TRAIN:-}"
export DATA=$1 MODEL=${MODEL:-tf_efficientnet_lite0} DOMAINS IMAGES JOBS OMP_NUM_THREADS
export EVALUATE="--no-flip --splits $tests ${EVALUATE:-}" ANALYZE=${ANALYZE:---no-flip}

runs() {  # at rate $1 with the variables $2...; grid.sh skips complete cells
    env OUT="$OUT/lr-$1" TRAIN="$common --lr $1" "${@:2}" scripts/grid.sh
}
for rate in $RATES; do runs "$rate" SEEDS="${SEEDS%% *}" SCHEDULES=" " MATCH=images; done
chosen=$(python -m tools.study choose "$OUT")
echo "learning rate chosen by the experts' validation: $chosen ($OUT/rate.md)"
runs "$chosen" SEEDS="${SEEDS%% *}" SCHEDULES="$SCHEDULES" MATCH="images exposure"
plain=$(for schedule in $SCHEDULES; do case $schedule in *+*) ;; *) printf '%s ' "$schedule" ;; esac; done)
for rate in $RATES; do
    [ "$rate" = "$chosen" ] || runs "$rate" SEEDS="${SEEDS%% *}" SCHEDULES="$plain" MATCH=images ANALYZE=none
done
runs "$chosen" SEEDS="$SEEDS" SCHEDULES="$SCHEDULES" MATCH="images exposure"
python -m tools.study report "$OUT"
