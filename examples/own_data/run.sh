#!/usr/bin/env bash
# Fine-tune the packaged model `photos` on 30 images of your own: bash run.sh [FOLDER [ROOT]]. It takes less than five
# minutes on two CPU cores. The images are drawn things that the model does not know; with ROOT, a folder with the data set
# cocomini, they are photographs. With a GPU and the weights of DINOv2 and CLIP, use the recipe dcris_b and a model of that
# recipe for --from.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=${1:-runs/own_data}
python=${PYTHON:-python3}
dcris() { "$python" -m dcris "$@"; }

echo "== 1. The data: images, a COCO export, and expressions."
rm -rf "$work/pictures" "$work/things.jsonl"
"$python" "$here/make_pictures.py" "$work" ${2+"$2"}
dcris data import "$work/instances.json" --images "$work/pictures" --phrases "$work/phrases.json" --val 0.25 \
  --out "$work/things.jsonl"
dcris data check "$work/things.jsonl" --deep

echo "== 2. The model to start from, on the validation images."
dcris evaluate photos --data "$work/things.jsonl" --out "$work/before.json"

echo "== 3. Fine-tuning: the same recipe, starting from the adapters and head of that model."
# Without validation, which would choose the checkpoint by the images that are scored below.
dcris train dcris_photos --data "$work/things.jsonl" --from photos --out "$work/tuned" --resume \
  --train.max_steps 80 --train.warmup_steps 10 --train.lr 5e-4 --data.cache_features 4 --data.val_split null

echo "== 4. Evaluation and prediction on the validation images."
dcris evaluate "$work/tuned" --data "$work/things.jsonl" --out "$work/after.json" --report "$work/report.html"
picture=$(ls "$work"/pictures/* | tail -n 1)
if [ $# -lt 2 ]; then phrases=(-e "the tree" -e mug); else phrases=(-e person -e "left person"); fi
dcris predict "$work/tuned" "$picture" "${phrases[@]}" --out "$work/predictions"
