"""The paper's runs as functions that return full configurations. An ablation is an edited copy.

Each recipe says what it reproduces, on what hardware it was run by the authors, and the score to expect; what has not been
measured with this code is marked "unmeasured".
"""

from collections.abc import Callable

from dcris.config import (
    DataConfig,
    DenseCrossConfig,
    HeadConfig,
    ModelConfig,
    RunConfig,
    TextAdapterConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
)
from dcris.errors import DcrisError

VISION_TOWERS: dict[str, VisionConfig] = {
    tower.name: tower
    for tower in (
        VisionConfig(name="dinov2-small", width=384, heads=6),
        VisionConfig(name="dinov2-base"),
        VisionConfig(name="dinov2-large", width=1024, depth=24, heads=16),
        VisionConfig(name="dinov2-giant", width=1536, depth=40, heads=24, mlp="swiglu"),
        VisionConfig(name="dinov3-small", family="dinov3", width=384, heads=6, patch=16),
        VisionConfig(name="dinov3-base", family="dinov3", patch=16),
        VisionConfig(name="dinov3-large", family="dinov3", width=1024, depth=24, heads=16, patch=16),
    )
}
"""The published DINOv2 towers with registers, and DINOv3's, by name."""

TEXT_TOWERS: dict[str, TextConfig] = {
    tower.name: tower
    for tower in (
        TextConfig(name="clip-vit-base-patch16"),
        TextConfig(name="clip-vit-base-patch32"),
        TextConfig(name="clip-vit-large-patch14", width=768, heads=12, sentence_width=768),
    )
}
"""The published CLIP text towers, by name."""


def dcris_b() -> RunConfig:
    """DCRIS-B on RefCOCO (table 1): two A100, batch 32, 50 epochs. Paper: IoU 76.4 / 77.9 / 73.7. Here: unmeasured."""
    return RunConfig(recipe="dcris_b")


def dcris_l() -> RunConfig:
    """DCRIS-L on RefCOCO (table 1): four A100, batch 64, 50 epochs. Paper: IoU 77.9 / 79.0 / 75.0. Here: unmeasured."""
    return RunConfig(
        recipe="dcris_l",
        model=ModelConfig(
            vision=VISION_TOWERS["dinov2-large"],
            visual_adapter=DenseCrossConfig(layers=(2, 6, 10, 14, 18, 22)),
            head=HeadConfig(taps=(8, 16)),
        ),
        train=TrainConfig(batch_size=64, lr=2e-4),
    )


def dcris_l_mixed() -> RunConfig:
    """DCRIS-L on RefCOCO, RefCOCO+ and G-Ref mixed (table 1). Paper, RefCOCO testA, testB: IoU 82.9 / 77.9. Here: unmeasured.

    The paper does not say whether photographs of the test splits are trained on; here they are not.
    """
    return dcris_l().model_copy(update={"recipe": "dcris_l_mixed", "data": DataConfig(dataset="mixed")})


def detris_b() -> RunConfig:
    """DETRIS-B, the successor, on RefCOCO: batch 32, 65 epochs. Theirs: mIoU 76.0 / 78.2 / 73.5. Here: unmeasured.

    It is DCRIS-B with dense text adapters and a longer schedule.
    """
    return RunConfig(
        recipe="detris_b",
        model=ModelConfig(text_adapter=TextAdapterConfig(kind="dense")),
        train=TrainConfig(epochs=65, milestones=(35, 55)),
    )


def detris_l() -> RunConfig:
    """DETRIS-L on RefCOCO: batch 32, 50 epochs. Theirs: mIoU 77.3 / 79.0 / 75.2. Here: unmeasured."""
    model = dcris_l().model.model_copy(update={"text_adapter": TextAdapterConfig(kind="dense")})
    return RunConfig(recipe="detris_l", model=model)


def detris_l_mixed() -> RunConfig:
    """DETRIS-L, wide adapters, on RefCOCO, RefCOCO+ and G-Ref mixed. Theirs: mIoU 81.0 / 81.9 / 79.0. Here: unmeasured.

    The scores are RefCOCO's. As theirs, it trains on photographs of the test splits too; `--dataset mixed` leaves those out.
    """
    adapters = {
        "visual_adapter": DenseCrossConfig(layers=tuple(range(1, 24)), width=384),
        "text_adapter": TextAdapterConfig(kind="dense", layers=tuple(range(1, 12)), width=384),
    }
    model = dcris_l().model.model_copy(update=adapters)
    return RunConfig(recipe="detris_l_mixed", model=model, data=DataConfig(dataset="mixed-unfiltered"))


TINY_VISION = VisionConfig(name="tiny-vision", width=128, depth=12, heads=4, grid=8)
TINY_TEXT = TextConfig(
    name="tiny-text", tokenizer="tiny", width=96, depth=12, heads=4, vocabulary=129, length=24, sentence_width=96
)


def dcris_tiny() -> RunConfig:
    """DCRIS on the towers that ship with the package and on generated scenes: minutes on two CPU cores.

    Twelve blocks as in DCRIS-B, so the paper's layer lists apply. The towers have never seen a photograph. The run is short,
    so the adapters start as the identity, the optimiser's memory is short and single gradients are held down.
    """
    return RunConfig(
        recipe="dcris_tiny",
        model=ModelConfig(
            vision=TINY_VISION,
            text=TINY_TEXT,
            visual_adapter=DenseCrossConfig(width=32, attention_width=32, heads=4, dropout=0.0, zero_init=True),
            text_adapter=TextAdapterConfig(width=24, zero_init=True),
            head=HeadConfig(width=64, heads=4, feedforward=64, dropout=0.0, bias=-2.0),
        ),
        data=DataConfig(dataset="scenes", image_size=112, word_length=14, val_split=None, workers=0),
        train=TrainConfig(
            epochs=1,
            batch_size=8,
            lr=2e-3,
            schedule="cosine",
            warmup_steps=40,
            betas=(0.9, 0.98),
            clip_norm=0.3,
            precision="float32",
            max_steps=1700,
            save_every=500,
        ),
    )


def fixed_tiny() -> RunConfig:
    """The tiny model without adapters ("fix backbone", table 2): only the head is trained."""
    config = dcris_tiny()
    model = config.model.model_copy(update={"visual_adapter": None, "text_adapter": None})
    return config.model_copy(update={"recipe": "fixed_tiny", "model": model})


RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe
    for recipe in (dcris_b, dcris_l, dcris_l_mixed, detris_b, detris_l, detris_l_mixed, dcris_tiny, fixed_tiny)
}


def get_recipe(name: str) -> RunConfig:
    """The configuration of that recipe. Raises DcrisError listing the recipes there are."""
    if name not in RECIPES:
        raise DcrisError(
            f"there is no recipe {name!r}; choose one of {', '.join(RECIPES)} (`dcris recipes` describes them)"
        )
    return RECIPES[name]()
