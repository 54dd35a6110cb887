"""The paper's runs as functions that return full configurations. An ablation is an edited copy.

Each recipe says what it reproduces, on what hardware it was run by the authors, and the score to expect; what has not been
measured with this code is marked "unmeasured". The command is `dcris train RECIPE --data ROOT --out DIR` for all of them. Three
scores are val, testA and testB; the methods of table 2 were run on RefCOCO, as DCRIS-B was.
"""

from collections.abc import Callable
from typing import Any

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
from dcris.data.registry import DATASETS
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
        VisionConfig(
            family="clip",
            name="clip-vit-base-patch16",
            patch=16,
            registers=0,
            grid=14,
            position_rule="plain",
            projected_width=512,
        ),
    )
}
"""The published vision towers by name: DINOv2 with registers, DINOv3, and the image half of a CLIP."""

TEXT_TOWERS: dict[str, TextConfig] = {
    tower.name: tower
    for tower in (
        TextConfig(name="clip-vit-base-patch16"),
        TextConfig(name="clip-vit-base-patch32"),
        TextConfig(name="clip-vit-large-patch14", width=768, heads=12, sentence_width=768),
    )
}
"""The published CLIP text towers, by name."""


SCHEDULES: dict[str, dict[str, Any]] = {
    "paper": {"epochs": 50, "milestones": (35,)},
    "detris": {"epochs": 65, "milestones": (35, 55)},
}
"""The two schedules in circulation: the paper's, and that of the DETRIS repository's base models."""

_PLUS = DataConfig(dataset="refcoco+", split_by="unc")
_UMD = DataConfig(dataset="refcocog", split_by="umd", word_length=DATASETS["refcocog"].word_length)
_GOOGLE = DataConfig(dataset="refcocog", split_by="google", word_length=DATASETS["refcocog"].word_length)


def _edited(base: RunConfig, recipe: str, **sections: Any) -> RunConfig:
    """A recipe with whole sections replaced."""
    return base.model_copy(update={"recipe": recipe, **sections})


def dcris_b() -> RunConfig:
    """DCRIS-B on RefCOCO (table 1): two A100, batch 32, 50 epochs. Paper: IoU 76.4 / 77.9 / 73.7. Here: unmeasured."""
    return RunConfig(recipe="dcris_b")


def dcris_b_plus() -> RunConfig:
    """DCRIS-B on RefCOCO+ (table 1): two A100, batch 32, 50 epochs. Paper: IoU 69.8 / 74.4 / 62.6. Here: unmeasured."""
    return _edited(dcris_b(), "dcris_b_plus", data=_PLUS)


def dcris_b_umd() -> RunConfig:
    """DCRIS-B on G-Ref, umd (table 1): two A100, batch 32, 50 epochs. Paper, val, test: IoU 68.4 / 68.5. Here: unmeasured."""
    return _edited(dcris_b(), "dcris_b_umd", data=_UMD)


def dcris_b_google() -> RunConfig:
    """DCRIS-B on G-Ref, google (table 1): two A100, batch 32, 50 epochs. Paper, val: IoU 65.9. Here: unmeasured."""
    return _edited(dcris_b(), "dcris_b_google", data=_GOOGLE)


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


def dcris_l_plus() -> RunConfig:
    """DCRIS-L on RefCOCO+ (table 1): four A100, batch 64, 50 epochs. Paper: IoU 71.9 / 75.9 / 65.7. Here: unmeasured."""
    return _edited(dcris_l(), "dcris_l_plus", data=_PLUS)


def dcris_l_umd() -> RunConfig:
    """DCRIS-L on G-Ref, umd (table 1): four A100, batch 64, 50 epochs. Paper, val, test: IoU 70.1 / 70.9. Here: unmeasured."""
    return _edited(dcris_l(), "dcris_l_umd", data=_UMD)


def dcris_l_google() -> RunConfig:
    """DCRIS-L on G-Ref, google (table 1): four A100, batch 64, 50 epochs. Paper, val: IoU 68.5. Here: unmeasured."""
    return _edited(dcris_l(), "dcris_l_google", data=_GOOGLE)


def dcris_l_mixed() -> RunConfig:
    """DCRIS-L on RefCOCO, RefCOCO+ and G-Ref mixed (table 1): four A100, batch 64, 50 epochs. Here: unmeasured.

    Paper: IoU on RefCOCO testA, testB 82.9 / 77.9, RefCOCO+ 73.3 / 78.3 / 65.8, G-Ref umd val and test 74.1 / 75.5.
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
        train=TrainConfig(**SCHEDULES["detris"]),
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
            visual_adapter=DenseCrossConfig(width=32, attention_width=32, heads=4, dropout=0.0, init="zero"),
            text_adapter=TextAdapterConfig(width=24, init="zero"),
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


def _tuned(base: RunConfig, recipe: str, method: dict[str, Any] | None, **train: Any) -> RunConfig:
    """A recipe of DCRIS with another method, given as plain data, in place of its adapters.

    For the tiny towers the widths are such that a method has as great a share of DCRIS's weights as in the paper's table.
    """
    model = ModelConfig(
        vision=base.model.vision,
        text=base.model.text,
        visual_adapter=None,
        text_adapter=None,
        method=method,
        head=base.model.head,
    )
    return _edited(base, recipe, model=model, train=base.train.model_copy(update=train))


def fixed_b() -> RunConfig:
    """Fixed backbone (table 2): only the head is trained. Paper: IoU 74.9 / 77.1 / 72.0. Here: unmeasured."""
    return _tuned(dcris_b(), "fixed_b", None)


def fixed_tiny() -> RunConfig:
    """The tiny model without adapters ("fix backbone", table 2): only the head is trained."""
    return _tuned(dcris_tiny(), "fixed_tiny", None)


def full_b() -> RunConfig:
    """Full tuning (table 2), all that is read of both towers. Paper: IoU 65.1 / 68.1 / 61.4. Here: unmeasured.

    The paper does not say at what rate; a tenth for the towers is what CRIS's configurations say.
    """
    return _tuned(dcris_b(), "full_b", {"name": "full"}, tower_lr=0.1)


def full_tiny() -> RunConfig:
    """Full tuning of the tiny towers, at a tenth of the head's rate."""
    return _tuned(dcris_tiny(), "full_tiny", {"name": "full"}, tower_lr=0.1)


def houlsby_b() -> RunConfig:
    """Houlsby adapters (table 2). Paper: 1.98M, IoU 71.2 / 73.3 / 68.3. Here: unmeasured."""
    return _tuned(dcris_b(), "houlsby_b", {"name": "houlsby"})


def houlsby_tiny() -> RunConfig:
    """Houlsby adapters in the tiny towers, started as the identity."""
    return _tuned(dcris_tiny(), "houlsby_tiny", {"name": "houlsby", "width": 9, "zero_init": True})


def adaptformer_b() -> RunConfig:
    """AdaptFormer, 64 wide, in both towers. Not in the paper. Here: unmeasured."""
    return _tuned(dcris_b(), "adaptformer_b", {"name": "adaptformer"})


def adaptformer_tiny() -> RunConfig:
    """AdaptFormer in the tiny towers."""
    return _tuned(dcris_tiny(), "adaptformer_tiny", {"name": "adaptformer", "width": 24, "dropout": 0.0})


def compacter_b() -> RunConfig:
    """Compacter (table 2). Paper: 1.62M, IoU 73.9 / 75.8 / 70.8. Here: unmeasured."""
    return _tuned(dcris_b(), "compacter_b", {"name": "compacter"})


def compacter_tiny() -> RunConfig:
    """Compacter in the tiny towers, started as the identity."""
    return _tuned(dcris_tiny(), "compacter_tiny", {"name": "compacter", "width": 52, "rank": 5, "zero_init": True})


def lora_b() -> RunConfig:
    """LoRA on queries and values (table 2). Paper: 1.57M, IoU 73.4 / 75.7 / 70.2. Here: unmeasured."""
    return _tuned(dcris_b(), "lora_b", {"name": "lora"})


def lora_tiny() -> RunConfig:
    """LoRA in the tiny towers."""
    return _tuned(dcris_tiny(), "lora_tiny", {"name": "lora", "vision_rank": 9, "text_rank": 6})


def bitfit_b() -> RunConfig:
    """BitFit: the biases of both towers. Not in the paper. Here: unmeasured."""
    return _tuned(dcris_b(), "bitfit_b", {"name": "bitfit"})


def bitfit_tiny() -> RunConfig:
    """BitFit on the tiny towers."""
    return _tuned(dcris_tiny(), "bitfit_tiny", {"name": "bitfit"})


def prompts_b() -> RunConfig:
    """Prompt tokens, 50 visual, 16 of text; `--model.method.deep true` for every block. Not in the paper. Unmeasured."""
    return _tuned(dcris_b(), "prompts_b", {"name": "prompts"})


def prompts_tiny() -> RunConfig:
    """Prompt tokens in every block of the tiny towers."""
    return _tuned(dcris_tiny(), "prompts_tiny", {"name": "prompts", "vision_tokens": 8, "text_tokens": 4, "deep": True})


def etris_b() -> RunConfig:
    """ETRIS's bridger on DCRIS-B's towers and head (table 2), wide enough for the paper's 1.38 M trained weights.

    RefCOCO, batch 32, 50 epochs. Paper: IoU 74.5 / 76.5 / 72.9. Here: unmeasured.
    """
    return _tuned(dcris_b(), "etris_b", {"name": "etris", "width": 128})


def etris_vit_b() -> RunConfig:
    """ETRIS as published: its bridger on both halves of CLIP ViT-B/16 at 416 pixels, with its own neck, on RefCOCO.

    Batch 32, 50 epochs. It trains both position tables, too. Table 1's ETRIS: IoU 70.5 / 73.5 / 66.6. Here: unmeasured.
    """
    grid, tower = 26, VISION_TOWERS["clip-vit-base-patch16"]
    vision = tower.model_copy(update={"grid": grid, "published_grid": tower.grid})
    config = RunConfig(
        model=ModelConfig(vision=vision, head=HeadConfig(taps=(3, 7), neck_residual=False)),
        data=DataConfig(image_size=grid * vision.patch),
    )
    return _tuned(config, "etris_vit_b", {"name": "etris", "positions": True})


def barleria_b() -> RunConfig:
    """BarLeRIa on DCRIS-B's towers and head, RefCOCO, batch 32, 50 epochs. Here: unmeasured.

    Published on CLIP's own vision tower alone (table 1: IoU 72.4 / 75.9 / 68.3).
    """
    return _tuned(dcris_b(), "barleria_b", {"name": "barleria"})


def etris_tiny() -> RunConfig:
    """ETRIS's bridger on the tiny towers and generated scenes. Here: unmeasured."""
    return _tuned(dcris_tiny(), "etris_tiny", {"name": "etris", "width": 32, "heads": 4})


def barleria_tiny() -> RunConfig:
    """BarLeRIa on the tiny towers and generated scenes, with a smaller side network. Here: unmeasured."""
    sizes = {
        "name": "barleria",
        "text_width": 16,
        "side_width": 48,
        "side_depth": 4,
        "queries": 16,
        "fused": (0, 3, 6),
        "grid": 8,
    }
    return _tuned(dcris_tiny(), "barleria_tiny", sizes)


RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        dcris_b,
        dcris_b_plus,
        dcris_b_umd,
        dcris_b_google,
        dcris_l,
        dcris_l_plus,
        dcris_l_umd,
        dcris_l_google,
        dcris_l_mixed,
        detris_b,
        detris_l,
        detris_l_mixed,
        fixed_b,
        full_b,
        houlsby_b,
        adaptformer_b,
        compacter_b,
        lora_b,
        bitfit_b,
        prompts_b,
        etris_b,
        etris_vit_b,
        barleria_b,
        dcris_tiny,
        fixed_tiny,
        full_tiny,
        houlsby_tiny,
        adaptformer_tiny,
        compacter_tiny,
        lora_tiny,
        bitfit_tiny,
        prompts_tiny,
        etris_tiny,
        barleria_tiny,
    )
}


def get_recipe(name: str) -> RunConfig:
    """The configuration of that recipe. Raises DcrisError listing the recipes there are."""
    if not isinstance(name, str) or name not in RECIPES:
        raise DcrisError(
            f"there is no recipe {name!r}; choose one of {', '.join(RECIPES)} (`dcris recipes` describes them)"
        )
    return RECIPES[name]()
