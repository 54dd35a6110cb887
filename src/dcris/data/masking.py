"""Masked copies of training samples (`train.masking`), as in MaskRIS (Lee et al. 2024).

Of the image, a share of the patches of a grid is hidden. Of the expression, each token is masked
with some probability: 80% of the masked ones become the mask token, 10% a random token, and 10%
stay, as in BERT. Source: util/aug_mask.py and data/dataset_refer_bert.py of naver-ai/maskris.

Shape letters: B batch, H W pixels, L text tokens, G patches along a side.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dcris.config import MaskingConfig
from dcris.data.tokenizer import PADDING, Tokenizer

_TO_MASK, _TO_RANDOM = 0.8, 0.1
"""Shares of the chosen tokens that become the mask token, and a random one."""


def hidden_patches(config: MaskingConfig, generator: np.random.Generator) -> Tensor:
    """Draw which patches of an image are hidden: [G, G] bool.

    Their number is exact: the visible ones are rounded down, as in the published code.
    """
    patches = config.grid**2
    hidden = np.ones(patches, np.bool_)
    hidden[generator.permutation(patches)[: int(patches * (1 - config.image))]] = False
    return torch.from_numpy(hidden.reshape(config.grid, config.grid))


def mask_tokens(tokens: Tensor, config: MaskingConfig, tokenizer: Tokenizer, generator: np.random.Generator) -> Tensor:
    """Return tokens [L] int64 with some of them masked.

    Start token, end token and padding stay. Unlike in the published code, no random token is one of
    these (it is the mask token instead): another end token or padding would change what the text
    tower takes for the phrase.
    """
    row = tokens.numpy().copy()
    words = slice(1, int((row == tokenizer.end_token).argmax()))
    special = [PADDING, int(row[0]), tokenizer.end_token]
    count = words.stop - words.start
    fate = generator.random(count)
    random = generator.integers(tokenizer.vocabulary_size, size=count)
    masked = (fate < _TO_MASK * config.words) | np.isin(random, special)
    chosen = np.where(masked, tokenizer.mask_token, random)
    row[words] = np.where(fate < (_TO_MASK + _TO_RANDOM) * config.words, chosen, row[words])
    return torch.from_numpy(row)


def hide(images: Tensor, hidden: Tensor) -> Tensor:
    """Return normalised images [B, 3, H, W] with 0, the mean colour, in the patches `hidden`
    [B, G, G] bool."""
    visible = F.interpolate(1 - hidden[:, None].to(images.dtype), images.shape[-2:], mode="nearest")
    return images * visible
