#!/usr/bin/env bash
# The whole job on a corpus that the project draws itself: prepare -> train -> evaluate -> analyze. No download, no GPU.
#   scripts/demo.sh [FOLDER]      (default: demo; run again, it continues where it stopped)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-demo}
run=$out/runs/clip-tiny-B
set -x
python -m data_prep demo --out "$out/data"
python train.py --backbone clip --size tiny --weights none --schedule B --data "$out/data" --out "$run" --resume \
    --batch 64 --images 25600 --lr 1e-3 --layer-decay 1 --image-size 64
python evaluate.py --run "$run"
python analyze.py --run "$run"
