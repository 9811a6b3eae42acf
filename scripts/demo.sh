#!/usr/bin/env bash
# All stages on a synthetic corpus: prepare -> train -> evaluate -> analyze. No download, no GPU.
#   scripts/demo.sh [FOLDER]      (default: demo; repeat the command to continue)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-demo}
run=$out/runs/clip-tiny-B
set -x
python -m data_prep demo --out "$out/data"
python -m data_prep verify "$out/data/face_hq/test"
python -m data_prep show "$out/data/face_hq/train"
# a small network with random weights needs higher learning rates, smaller scale and margins than large backbones
python train.py --backbone clip --size tiny --weights none --schedule B --data "$out/data" --out "$run" --resume \
    --image-size 64 --batch 64 --images 102400 --lr 3e-3 --head-lr 1e-2 --layer-decay 1 \
    --loss 'object=softmax:s=24;face_hq=cosface:m=0.1,s=24;face_lq=cosface:m=0.1,s=24;body=cosface:m=0.1,s=24'
python evaluate.py --run "$run"
python analyze.py --run "$run" --components 24
python analyze.py claims "$out/runs"
