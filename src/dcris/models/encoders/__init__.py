"""Frozen vision and text towers, and the registries that a new one is added to."""

from dcris.config import TEXT_FAMILIES, VISION_FAMILIES, TextConfig, VisionConfig
from dcris.models.encoders.bert import BERT
from dcris.models.encoders.clip_text import CLIP_TEXT
from dcris.models.encoders.clip_vision import CLIP_VISION
from dcris.models.encoders.dino import DINOV2, DINOV3
from dcris.models.encoders.efficientnet import EFFICIENTNET

VISION_FAMILIES.update(dinov2=DINOV2, dinov3=DINOV3, clip=CLIP_VISION, efficientnet=EFFICIENTNET)
TEXT_FAMILIES.update(clip=CLIP_TEXT, bert=BERT)

VISION_TOWERS: dict[str, VisionConfig] = {
    config.name: config for family in VISION_FAMILIES.values() for config, _ in family.published
}
"""The configurations of the published vision towers, by name."""

TEXT_TOWERS: dict[str, TextConfig] = {
    config.name: config for family in TEXT_FAMILIES.values() for config, _ in family.published
}
"""The configurations of the published text towers, by name."""
