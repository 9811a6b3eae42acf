#!/usr/bin/env bash
# Prepare real data sets, in the layouts below, into one data root:
#   scripts/prepare_real.sh SOURCE DATA_ROOT [SIZE] [OBJECT_SIZE]
#   SOURCE/face_hq/{train,test}/<Name>/<Name>_0001.jpg and face_hq/pairs.txt (LFW format); face_lq the same
#   SOURCE/body/{bounding_box_train,bounding_box_test,query} (Market-1501 names)
#   SOURCE/object/{train,val}/<class>/*, object/classes.txt (folder<TAB>name)
#   SOURCE/ood_pacs/{photo,art_painting,cartoon,sketch}/<class>/*
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
src=$1 data=$2 size=${3:-112} object_size=${4:-${3:-112}}
prepare() { python -m data_prep "$@" --size "$size"; }
for domain in face_hq face_lq; do
    prepare lfw --src "$src/$domain/train" --out "$data/$domain/train"
    prepare lfw --src "$src/$domain/test" --pairs "$src/$domain/pairs.txt" --out "$data/$domain/test"
done
prepare market --src "$src/body" --out "$data/body/train"
prepare market --src "$src/body" --out "$data/body/test"
for part in train val; do
    python -m data_prep folder --src "$src/object/$part" --names "$src/object/classes.txt" --size "$object_size" \
        --out "$data/object/$part"
done
# class means and neighbours come from photographs; the other styles are the distribution shift
prepare folder --src "$src/ood_pacs/photo" --reference pacs-photo --ood --out "$data/object/pacs-photo"
for kind in art_painting cartoon sketch; do
    prepare folder --src "$src/ood_pacs/$kind" --reference pacs-photo --ood --out "$data/object/pacs-$kind"
done
