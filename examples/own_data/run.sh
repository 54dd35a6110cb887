#!/usr/bin/env bash
# Train on your own data, from a folder of images to a tuned model: bash run.sh [FOLDER]. It takes two to three minutes on
# one CPU core. With a GPU and the weights of DINOv2 and CLIP, use the recipe dcris_b and a model of that recipe for --from.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=${1:-runs/own_data}
python=${PYTHON:-python3}
dcris() { "$python" -m dcris "$@"; }

echo "== 1. The data: images, a COCO export, and expressions. This example draws the images."
"$python" "$here/make_pictures.py" "$work"
rm -f "$work/things.jsonl"
dcris data import-coco "$work/instances.json" --images "$work/pictures" --phrases "$work/phrases.json" --val 0.2 \
  --out "$work/things.jsonl"
dcris data check "$work/things.jsonl" --deep

echo "== 2. A model to start from, trained on generated scenes for a minute. They contain none of the objects of step 1."
[ -e "$work/scenes" ] || dcris data scenes "$work/scenes" --train 400 --val 0 --test 0
dcris train dcris_tiny --data "$work/scenes" --out "$work/base" --resume --train.epochs 10 --train.max_steps 300
dcris evaluate "$work/base" --data "$work/things.jsonl" --out "$work/before.json"

echo "== 3. Fine-tuning: the same recipe, starting from the adapters and head of that model."
dcris train dcris_tiny --data "$work/things.jsonl" --from "$work/base" --out "$work/tuned" --resume \
  --train.epochs 100 --train.max_steps 200

echo "== 4. Evaluation and prediction on the validation images."
dcris evaluate "$work/tuned" --data "$work/things.jsonl" --out "$work/after.json" --report "$work/report.html"
dcris predict "$work/tuned" "$work/pictures/010.png" -e "left fish" -e "the house" --out "$work/predictions"
