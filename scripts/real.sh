#!/usr/bin/env bash
# The main job on real images: faces sharp and degraded, bodies, objects, and objects out of distribution.
#   scripts/real.sh DATA_ROOT WEIGHTS [MODEL] [IMAGE_SIZE] [IMAGES] [OUT]
# DATA_ROOT   prepared splits: face_hq, face_lq, body and object, each with a train split (see scripts/prepare_real.sh)
# WEIGHTS     safetensors file of MODEL (default tf_efficientnet_lite0, at 112 pixels)
# IMAGES      length of each run, all domains together (default 28800: 450 steps of 64)
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1 weights=$2 model=${3:-tf_efficientnet_lite0} size=${4:-112} images=${5:-28800} out=${6:-runs}
for schedule in A B; do
    run=$out/$model-$schedule
    # a small foundation and few images: other rates, scale and margins than the defaults, no layer-wise decay
    python train.py --model "$model" --weights "$weights" --image-size "$size" --data "$data" --schedule $schedule \
        --batch 64 --images "$images" --lr 2e-4 --head-lr 1e-3 --layer-decay 1 --margin-ramp 0.3 \
        --crop-scale object=0.5,face_hq=0.9,face_lq=0.9,body=0.7 --scale object=30,face_hq=32,face_lq=32,body=32 \
        --margin-additive object=0,face_hq=0.2,face_lq=0.2,body=0.2 --out "$run" --resume
    python evaluate.py --run "$run" --cache "$out/embeddings"
    python analyze.py --run "$run" --cache "$out/embeddings"
done
python analyze.py claims "$out"
