#!/usr/bin/env bash
# Makes models/default again: teacher's captioner, student, captioner, both together twice, bundle.
#
#   models/make.sh FLICKR8K UNLABELLED TEACHER WORK [DISTILL OPTION...]
#
# FLICKR8K is the set's folder, UNLABELLED a folder of photos without captions, TEACHER the weights of an InceptionV3, WORK
# a folder for everything that is made. Each stage goes on where it stopped, so after any stop the same command goes on. On
# a new machine the student goes on from the one that is committed; DISTILL OPTIONs, such as --rounds 48, are handed on.
set -euo pipefail
if [ $# -lt 4 ]; then
  echo "usage: ${0##*/} FLICKR8K UNLABELLED TEACHER WORK [DISTILL OPTION...]" >&2
  exit 2
fi
data=$1 unlabelled=$2 teacher=$3 work=$4
shift 4
here=$(cd "$(dirname "$0")" && pwd)

caption-train train "$data" "$work/teacher" --set extractor.weights="$teacher" --set extractor.layer=mixed8
if [ ! -d "$work/teacher-bundle" ]; then
  caption-export "$work/teacher" "$work/teacher-bundle" --photos "$data/images" --dataset "$data" --precision int8
fi
start=()
if [ -f "$here/checkpoints/student/small.npz" ]; then
  start=(--start-from "$here/checkpoints/student/small.npz")
fi
caption-train distill "$data/images" "$unlabelled" --exclude "$data/Flickr_8k.devImages.txt" \
  --teacher-bundle "$work/teacher-bundle" --captioner "$work/teacher" --captions "$data" \
  --out "$work/student" "${start[@]}" "$@"
caption-train train "$data" "$work/captioner" --config "$here/captioner.toml" --set extractor.weights="$work/student"
caption-train train "$data" "$work/joint" --start-from "$work/captioner" --config "$here/joint.toml"
# Once more from a high learning rate; the student's own is twice as high.
caption-train train "$data" "$work/again" --start-from "$work/joint" --config "$here/joint.toml" \
  --set extractor.learning_rate=1e-4
caption-export "$work/again" "$here/default" --photos "$data/images" --dataset "$data" \
  --precision int8 --precision fp16 --name default --license Apache-2.0 --beam 3 --overwrite \
  --teacher "$work/teacher" --notes "$here/card.md" \
  --description "A small residual network and a GRU of 256 units, trained on Flickr8k from random initialisation"
# What an export needs without any training: the run without its optimisers, and the teacher's scores.
python "$here/keep.py" "$work/again" "$here/checkpoints/default"
mkdir -p "$here/checkpoints/teacher"
cp "$work/teacher/scores.json" "$here/checkpoints/teacher/"
