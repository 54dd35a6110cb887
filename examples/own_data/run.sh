#!/usr/bin/env bash
# From a folder of pictures to a model that was tuned on them, in two to three minutes on one CPU core: bash run.sh [FOLDER]
# With DINOv2's and CLIP's weights and a GPU the way is the same: the recipe is then dcris_b, and --from a model of that recipe.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=${1:-runs/own_data}
python=${PYTHON:-python3}
dcris() { "$python" -m dcris "$@"; }

echo "== 1. The data: pictures, an annotation tool's export, and phrases. Here they are drawn."
"$python" "$here/make_pictures.py" "$work"
rm -f "$work/things.jsonl"
dcris data import-coco "$work/instances.json" --images "$work/pictures" --phrases "$work/phrases.json" --val 0.2 \
  --out "$work/things.jsonl"
dcris data check "$work/things.jsonl" --deep

echo "== 2. A model to start from. This one learns from generated scenes for a minute, and has never seen a fish."
[ -e "$work/scenes" ] || dcris data scenes "$work/scenes" --train 400 --val 0 --test 0
dcris train dcris_tiny --data "$work/scenes" --out "$work/base" --resume --train.epochs 10 --train.max_steps 300
dcris evaluate "$work/base" --data "$work/things.jsonl" --out "$work/before.json"

echo "== 3. Fine-tuning: the same recipe, from the other's adapters and head."
dcris train dcris_tiny --data "$work/things.jsonl" --from "$work/base" --out "$work/tuned" --resume \
  --train.epochs 100 --train.max_steps 200

echo "== 4. What came of it, on pictures that it was not trained on."
dcris evaluate "$work/tuned" --data "$work/things.jsonl" --out "$work/after.json" --report "$work/report.html"
dcris predict "$work/tuned" "$work/pictures/010.png" -e "left fish" -e "the house" --out "$work/predictions"
