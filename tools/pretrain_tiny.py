"""Pretrain the package's tiny towers on generated scenes.

    python tools/pretrain_tiny.py --out src/dcris/assets/tiny_towers.safetensors

The objective is supervised by the attributes of the generated objects:

- vision, per patch: shape, colour, texture and size class of the object under the patch, its centre
  and radius, the sixteenths of the patch that it covers, its rank among the objects of its shape,
  and which shapes and colours the object is left of, right of, above and below; predicted from
  blocks 4, 8 and 12.
- text: the next word, and from the sentence feature the words that describe the target, those that
  describe its landmark, and those that describe a second target.

The towers are trained separately; adapters and head learn to link words to patches. The scenes come
from a random stream of their own (scenes.scene_rng), so none of them is in a data set of
`dcris data scenes`.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from dcris.config import CLIP_MEAN, CLIP_STD
from dcris.data import scene_phrases as language
from dcris.data import scenes
from dcris.data.tokenizer import TinyTokenizer
from dcris.models.encoders.clip_text import ClipTextTower
from dcris.models.encoders.dino import DinoTower
from dcris.recipes import TINY_TEXT, TINY_VISION

SIDE, GRID, PATCH, FINE = 112, 8, 14, 4
CELLS_WEIGHT, BESIDE_WEIGHT = 8.0, 4.0
SHAPES_AND_COLOURS = (*language.SHAPES, *language.COLOURS)
RANKS = 4  # ranks 0 to 2, and "3 or more"
LENGTH = 17
# Standard deviation of the sentence feature. The head multiplies by this feature, so its scale
# matters more than any other setting of the tiny model.
SENTENCE_DEVIATION = 0.5
SYNONYMS = {"little": "small", "tiny": "small", "large": "big", "largest": "biggest", "over": "above", "under": "below"}
SYNONYMS |= {"1st": "first", "2nd": "second", "3rd": "third", "4th": "fourth", "center": "middle", "near": "next"}
SYNONYMS |= {"closest": "next", "leftmost": "left", "rightmost": "right", "highest": "top", "lowest": "bottom"}
SYNONYMS |= {"both": "two"}
SILENT = {"the", "on", "at", "in", "of", "to", "from", "and", "one", "thing", "shape"}

Targets = dict[str, Tensor]


class PatchLabels:
    """The labels of a patch, and the loss of their predictions."""

    classes = {  # noqa: RUF012
        "shape": len(language.SHAPES),
        "colour": len(language.COLOURS),
        "texture": len(language.TEXTURES),
        "size": len(language.SIZES),
        "left": RANKS,
        "right": RANKS,
        "above": RANKS,
        "below": RANKS,
        "larger": RANKS,
        "smaller": RANKS,
    }
    weights = {"shape": 3.0}  # noqa: RUF012
    numbers = 3  # offset to the centre x and y, radius
    beside = 4 * (len(language.SHAPES) + len(language.COLOURS))
    outputs = 1 + FINE * FINE + numbers + beside + sum(classes.values())

    @classmethod
    def of(cls, scene: scenes.Scene) -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
        """Return the labels of one scene by patch.

        `thing` is 0 where no object covers a quarter of the patch.
        """
        things = scene.things
        tiles = scene.owners.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(GRID * GRID, -1)
        cover = np.stack([(tiles == number).sum(axis=1) for number in range(len(things))], axis=1)
        owner = cover.argmax(axis=1)
        covered = cover.max(axis=1) >= PATCH * PATCH // 4
        # A fine cell is 3.5 pixels wide; its middle pixel decides.
        middles = ((np.arange(FINE) + 0.5) * PATCH / FINE).astype(int)
        cells = tiles.reshape(-1, PATCH, PATCH)[:, middles][:, :, middles].reshape(GRID * GRID, -1)
        names = {
            "shape": language.SHAPES,
            "colour": tuple(language.COLOURS),
            "texture": language.TEXTURES,
            "size": language.SIZES,
        }
        table = {key: [options.index(getattr(thing, key)) for thing in things] for key, options in names.items()}
        ranks: dict[str, list[int]] = {key: [] for key in ("left", "right", "above", "below", "larger", "smaller")}
        for thing in things:
            alike = [other for other in things if other is not thing and other.shape == thing.shape]
            ranks["left"].append(sum(other.x < thing.x for other in alike))
            ranks["right"].append(sum(other.x > thing.x for other in alike))
            ranks["above"].append(sum(other.y < thing.y for other in alike))
            ranks["below"].append(sum(other.y > thing.y for other in alike))
            ranks["larger"].append(sum(other.radius > 1.12 * thing.radius for other in alike))
            ranks["smaller"].append(sum(1.12 * other.radius < thing.radius for other in alike))
        table |= {key: [min(rank, RANKS - 1) for rank in values] for key, values in ranks.items()}
        centres = (np.stack(np.meshgrid(range(GRID), range(GRID)), axis=-1).reshape(-1, 2) + 0.5) / GRID
        place = np.array([(thing.x, thing.y) for thing in things])[owner] - centres
        radius = np.array([thing.radius for thing in things])[owner]
        labels: dict[str, NDArray[np.float32] | NDArray[np.int64]] = {
            key: np.array(values, dtype=np.int64)[owner] for key, values in table.items()
        }
        labels["thing"] = covered.astype(np.float32)
        labels["cells"] = (cells == owner[:, None]).astype(np.float32)
        sides = [language.sides(thing, things) for thing in things]
        beside = [
            [any(name in (other.shape, other.colour) for other in side) for side in each for name in SHAPES_AND_COLOURS]
            for each in sides
        ]
        labels["beside"] = np.array(beside, dtype=np.float32)[owner]
        labels["numbers"] = np.concatenate((place * 5, radius[:, None] * 10), axis=1).astype(np.float32)
        return labels

    @classmethod
    def loss(cls, predictions: Tensor, targets: Targets) -> Tensor:
        """Return the sum of the losses of all labels; `predictions` is [B, N, outputs]."""
        thing, cells, numbers, beside, *choices = predictions.split(
            (1, FINE * FINE, cls.numbers, cls.beside, *cls.classes.values()), dim=-1
        )
        covered = targets["thing"]
        share = covered / covered.sum()
        total = F.binary_cross_entropy_with_logits(thing.squeeze(-1), covered)
        total = total + CELLS_WEIGHT * F.binary_cross_entropy_with_logits(cells, targets["cells"])
        each = F.binary_cross_entropy_with_logits(beside, targets["beside"], reduction="none").mean(-1)
        total = total + BESIDE_WEIGHT * (each * share).sum()
        total = total + 2 * (F.smooth_l1_loss(numbers, targets["numbers"], reduction="none").sum(-1) * share).sum()
        for (key, _), choice in zip(cls.classes.items(), choices, strict=True):
            each = F.cross_entropy(choice.flatten(0, 1), targets[key].flatten(), reduction="none")
            total = total + cls.weights.get(key, 1.0) * (each * share.flatten()).sum()
        return total


class SceneStream(IterableDataset[tuple[Tensor, Targets]]):
    """Batches of scenes that never repeat.

    Each worker makes every n-th batch, so the order does not depend on the number of workers.
    """

    def __init__(self, seed: int, batch: int, steps: int) -> None:
        self.seed, self.batch, self.steps = seed, batch, steps

    def __iter__(self) -> Iterator[tuple[Tensor, Targets]]:
        cv2.setNumThreads(1)  # its threads would compete with those of the training
        info = torch.utils.data.get_worker_info()
        first, stride = (info.id, info.num_workers) if info else (0, 1)
        mean, deviation = (np.array(values, np.float32) for values in (CLIP_MEAN, CLIP_STD))
        for step in range(first, self.steps, stride):
            numbers = range(step * self.batch, (step + 1) * self.batch)
            made = [scenes.make_scene(scenes.scene_rng(self.seed, "pretraining", number), SIDE) for number in numbers]
            pixels = (np.stack([scene.image for scene in made]).astype(np.float32) / 255 - mean) / deviation
            labels = [PatchLabels.of(scene) for scene in made]
            targets = {key: torch.from_numpy(np.stack([label[key] for label in labels])) for key in labels[0]}
            yield torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), targets


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate: linear warm-up over 3% of the steps, then a half cosine to zero."""
    warmup = max(1, steps * 3 // 100)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def pretrain_vision(steps: int, batch: int, seed: int) -> DinoTower:
    """Train the vision tower with prediction heads and return the tower."""
    torch.manual_seed(seed)
    tower = DinoTower(TINY_VISION)
    width = TINY_VISION.width
    for block in tower.blocks:  # with LayerScale at 1, the outputs of 12 blocks start too large
        block.scale1.gamma.data.fill_(0.3)  # type: ignore[union-attr, operator]
        block.scale2.gamma.data.fill_(0.3)  # type: ignore[union-attr, operator]
    heads = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, PatchLabels.outputs)) for _ in range(3))
    trained = [parameter for module in (tower, heads) for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.03)
    loader = DataLoader(SceneStream(seed, batch, steps), batch_size=None, num_workers=1, prefetch_factor=4)
    begin, running = time.time(), 0.0
    for step, (images, targets) in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 1e-3)
        state = tower.advance(tower.start(images), feature_layers=(4, 8))
        outputs = (*state.layer_outputs, tower.finish(state))
        losses = [
            PatchLabels.loss(head(x[:, tower.num_prefix_tokens :]), targets)
            for head, x in zip(heads, outputs, strict=True)
        ]
        loss = 0.3 * losses[0] + 0.5 * losses[1] + losses[2]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        running += losses[2].item()
        if (step + 1) % 100 == 0:
            print(f"vision {step + 1}/{steps} loss {running / 100:.3f} {time.time() - begin:.0f} s", flush=True)
            running = 0.0
    return tower.eval()


def word_roles(text: str, words: list[str]) -> Tensor:
    """Return [3, words] of 0 and 1: the words that describe the target, its landmark, and the
    second of two targets.

    Synonyms count as one word, and a plural as its noun and "all".
    """
    roles = torch.zeros(3, len(words))
    spoken = [SYNONYMS.get(word, word) for word in text.split()]
    role = 0
    for word, following in zip(spoken, [*spoken[1:], ""], strict=True):
        if word in {"above", "below", "next"} or following == "of":
            role = 1  # the relation and all words after it describe the landmark
        elif word == "and":
            role = 2
        noun = language.singular(word)
        for each in (word,) if noun is None else (noun, "all"):
            if each not in SILENT:
                roles[role, words.index(each)] = 1
    return roles


def phrases(rng: np.random.Generator) -> Iterator[str]:
    """Yield expressions without end, from arrangements that are not drawn."""
    while True:
        things = scenes.arrange(rng)
        for thing in things:
            yield from (phrase.text for phrase in language.make_phrases(things, thing, rng))
            found = language.plural_phrase(things, language.pick(rng, language.PLURAL_KINDS), rng)
            yield from () if found is None else (found[0].text,)


def pretrain_text(steps: int, batch: int, seed: int) -> ClipTextTower:
    """Train the text tower to predict the next word and the words' roles, and return it."""
    torch.manual_seed(seed)
    tower, tokenizer = ClipTextTower(TINY_TEXT), TinyTokenizer.embedded()
    nn.init.normal_(tower.token_embedding.weight, std=0.3)
    words = language.vocabulary()
    reader = nn.Linear(TINY_TEXT.sentence_width, 3 * len(words))
    trained = [parameter for module in (tower, reader) for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.03)
    source = phrases(scenes.scene_rng(seed, "pretraining", 2**31))
    begin = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 2e-3)
        texts = [next(source) for _ in range(batch)]
        tokens = tokenizer(texts, LENGTH)
        features = tower(tokens)
        roles = torch.stack([word_roles(text, words) for text in texts])
        spoken = (
            F.binary_cross_entropy_with_logits(reader(features.sentence), roles.flatten(1), reduction="sum") / batch
        )
        guesses = features.tokens[:, :-1] @ tower.token_embedding.weight.T / TINY_TEXT.width**0.5
        following = F.cross_entropy(guesses.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=0)
        loss = spoken + following
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(
                f"text {step + 1}/{steps} roles {spoken.item():.3f} next {following.item():.3f} {time.time() - begin:.0f} s",
                flush=True,
            )
    tower.eval()
    with torch.no_grad():
        tokens = tokenizer([next(source) for _ in range(2000)], LENGTH)
        tower.projection.mul_(SENTENCE_DEVIATION / tower(tokens).sentence.std())
    return tower


def main() -> None:
    """Pretrain both towers and write them to one safetensors file in float16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vision-steps", type=int, default=5000)
    parser.add_argument("--text-steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="number of threads; changes the last digits of the weights (default: %(default)s)",
    )
    args = parser.parse_args()
    from safetensors.torch import save_file

    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    text = pretrain_text(args.text_steps, 128, args.seed)
    vision = pretrain_vision(args.vision_steps, args.batch, args.seed)
    tensors = {
        f"{name}.{key}": value.half()
        for name, tower in (("vision", vision), ("text", text))
        for key, value in tower.state_dict().items()
    }
    save_file(tensors, args.out)
    print(f"{args.out}: {sum(value.numel() for value in tensors.values()):,} weights")


if __name__ == "__main__":
    main()
