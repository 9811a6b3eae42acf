#!/usr/bin/env bash
# The small-scale study: scripts/grid.sh with one small backbone (schedules A, B, sequential, alternate; experts matched in
# images and in exposure). Verdicts on the abstract's claims: OUT/claims.md; scores: OUT/summary.md and OUT/comparison.
#   scripts/study.sh DATA_ROOT WEIGHTS
# DATA_ROOT   prepared splits: face_hq, face_lq, body and object, each with a train split (see scripts/prepare_real.sh)
# WEIGHTS     safetensors file of MODEL
# FORM=full     three seeds, 112 pixels, 900 steps of 64 images: for a GPU
# FORM=reduced  one seed, 96 pixels, 300 steps: for two CPU cores within an hour (default without a GPU)
# After a stop, the same command continues. The environment variables of scripts/grid.sh (SEEDS, IMAGES, JOBS, OUT, ...)
# also apply.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# = 2 ] || { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
for domain in face_hq face_lq body object; do
    [ -e "$1/$domain/train/index.json" ] || { echo "error: $1 has no $domain/train; see scripts/prepare_real.sh" >&2; exit 2; }
done
[ -f "$2" ] || { echo "error: $2: no such file of weights" >&2; exit 2; }
case $2 in *[[:space:]]*) echo "error: $2: spaces in the path; move the file, or link to it" >&2; exit 2 ;; esac
export DATA=$1 MODEL=${MODEL:-tf_efficientnet_lite0}
: "${FORM:=$(python -c 'import torch; print("full" if torch.cuda.is_available() else "reduced")')}"
case $FORM in
    full) : "${SEEDS:=0 1 2}" "${SIDE:=112}" "${IMAGES:=57600}" "${JOBS:=4}" "${OMP_NUM_THREADS:=4}" ;;
    reduced) : "${SEEDS:=0}" "${SIDE:=96}" "${IMAGES:=19200}" "${JOBS:=2}" "${OMP_NUM_THREADS:=1}" ;;
    *) echo "error: FORM=$FORM: want full or reduced" >&2; exit 2 ;;
esac
: "${OUT:=runs/study}"
export SEEDS IMAGES JOBS OUT OMP_NUM_THREADS
# For a small backbone and few images: other learning rates, scale and margins, no layer-wise decay; the same in all cells.
export TRAIN="--weights $2 --image-size $SIDE --batch 64 --lr 2e-4 --head-lr 1e-3 --layer-decay 1 --margin-ramp 0.3
    --crop-scale object=0.5,face_hq=0.9,face_lq=0.9,body=0.7 --loss cosface:m=0.2,s=32;object=softmax:s=30
    --cache ram --workers 0 ${TRAIN:-}"
export SEQUENTIAL="--eval-every $((IMAGES / 64 / 4)) ${SEQUENTIAL:-}"  # at the end of each of the four stages
scripts/grid.sh
runs=()
while IFS= read -r run; do runs+=("$run"); done < <(scripts/grid.sh list | cut -f2)
python evaluate.py compare "${runs[@]}" --out "$OUT/comparison"
