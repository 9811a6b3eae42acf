#!/usr/bin/env bash
# Prepare real data sets, in the layouts below, as one data root:
#   scripts/prepare_real.sh SOURCE DATA_ROOT [SIZE] [OBJECT_SIZE]
#   SOURCE/face_hq/{train,test}/<Name>/<Name>_0001.jpg and face_hq/pairs.txt (LFW format); face_lq likewise
#   SOURCE/body/{bounding_box_train,bounding_box_test,query} (Market-1501 names)
#   SOURCE/object/{train,val}/<class>/*, object/classes.txt (folder<TAB>name)
#   SOURCE/ood_pacs/{photo,art_painting,cartoon,sketch}/<class>/*
#   SOURCE/humans/{edges,silhouettes}/<category>/*, humans/categories.csv (stimuli of the model-vs-human toolbox)
# A tenth of the training identities and a fifth of the object classes become the splits `valid`, by which
# scripts/study.sh chooses a learning rate; object/unseen holds the test images of these classes.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
src=$(realpath "$1") data=$2 size=${3:-112} object_size=${4:-${3:-112}}
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
prepare() { python -m data_prep "$@"; }
for domain in face_hq face_lq; do
    for split in train valid; do
        prepare folder --src "$src/$domain/train" --size "$size" --holdout 0.1 --out "$data/$domain/$split"
    done
    prepare lfw --src "$src/$domain/test" --pairs "$src/$domain/pairs.txt" --size "$size" --out "$data/$domain/test"
done

mkdir -p "$parts"/body/{train,valid}/{bounding_box_train,bounding_box_test,query}
for image in "$src"/body/bounding_box_train/*.jpg; do  # valid: a person's first image of each camera is a probe
    name=${image##*/}
    person=${name%%_*} camera=${name:0:6}
    if [ $((10#$person % 10)) != 0 ]; then folder=train/bounding_box_train
    elif [ "$camera" != "${last:-}" ]; then folder=valid/query last=$camera
    else folder=valid/bounding_box_test
    fi
    ln -s "$image" "$parts/body/$folder/$name"
done
prepare market --src "$parts/body/train" --size "$size" --source-name body --out "$data/body/train"
prepare market --src "$parts/body/valid" --size "$size" --source-name body --out "$data/body/valid"
prepare market --src "$src/body" --size "$size" --out "$data/body/test"

ls "$src/object/train" | awk 'NR % 5 != 0' > "$parts/train"
ls "$src/object/train" | awk 'NR % 5 == 0' > "$parts/valid"
objects() {  # folder, list of classes, split, further options
    prepare folder --src "$src/object/$1" --list "$parts/$2" --names "$src/object/classes.txt" --size "$object_size" \
        --source-name object --out "$data/object/$3" "${@:4}"
}
objects train train train
objects train valid valid --reference valid
objects val train val
objects val valid unseen --reference valid
# shifts over many classes, for narrow intervals of retention; and shapes without texture
shifts=gaussian_noise-3,gaussian_blur-3,contrast-3,brightness-3,pixelate-3,jpeg_compression-3
prepare degrade --src "$data/object/val" --out "$data/object/val" --shift "$shifts"
for kind in edges silhouettes; do
    prepare stimuli --src "$src/humans/$kind" --classes "$src/humans/categories.csv" --size "$size" \
        --out "$data/object/$kind"
done
# class means and neighbours come from the photographs, relative to which the others are shifted
prepare folder --src "$src/ood_pacs/photo" --size "$size" --reference pacs-photo --ood --out "$data/object/pacs-photo"
for kind in art_painting cartoon sketch; do
    prepare folder --src "$src/ood_pacs/$kind" --size "$size" --reference pacs-photo --ood --out "$data/object/pacs-$kind"
done
