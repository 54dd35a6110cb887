"""A configuration with an unknown key or an unsuitable value is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dcris.config import METHODS, ModelConfig, RunConfig, load_config, parse_config, parse_value, replace
from dcris.errors import DcrisError
from dcris.models.adapters.dcris import DcrisConfig
from dcris.recipes import RECIPES, get_recipe
from dcris.utils.files import write_json


def tree(**sections: Any) -> dict[str, Any]:
    """Return a whole configuration as plain data, with fields of its sections replaced."""
    plain = get_recipe("dcris_b").model_dump(mode="json")
    for section, fields in sections.items():
        plain[section].update(fields)
    return plain


def method(**adapters: dict[str, Any]) -> dict[str, Any]:
    """Return the same with fields of DCRIS's adapters replaced."""
    plain = tree()
    for adapter, fields in adapters.items():
        plain["model"]["method"][adapter].update(fields)
    return plain


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_the_way_through_its_file(name: str, tmp_path: Path) -> None:
    """A recipe equals itself after writing and reading config.json."""
    config = get_recipe(name)
    write_json(tmp_path / "config.json", config.model_dump(mode="json"))
    assert load_config(tmp_path / "config.json") == config
    assert config.recipe == name


def test_an_unknown_recipe_is_named_with_a_similar_one() -> None:
    """Among the names of all recipes, a typing mistake is hard to see."""
    with pytest.raises(DcrisError, match=r"'dcris_xl' \(did you mean dcris_l\?\); `dcris recipes` lists all"):
        get_recipe("dcris_xl")


@pytest.mark.parametrize(
    ("plain", "key"),
    [
        (tree(train={"learning_rate": 1e-3}), "train.learning_rate"),
        (tree(model={"adapter": {}}), "model.adapter"),
        ({**tree(), "trian": {}}, "trian"),
    ],
)
def test_an_unknown_key_is_named(plain: dict[str, Any], key: str) -> None:
    """A misspelt key is an error, not a silent default."""
    with pytest.raises(DcrisError, match=rf"^here: unknown setting {key}$"):
        parse_config(plain, "here")


@pytest.mark.parametrize(
    ("plain", "key"),
    [
        (tree(train={"epochs": "many"}), "train.epochs"),
        (tree(train={"epochs": 2.5}), "train.epochs"),
        (tree(train={"lr": 1e300}), "train.lr"),  # float32 would overflow
        (tree(train={"warmup_steps": 10**400}), "train.warmup_steps"),
        (method(visual={"scale": 1e308}), "model.method.visual.scale"),
        (tree(data={"std": [1e-300, 1, 1]}), "data.std.0"),
        (tree(train={"batch_size": 0}), "train.batch_size"),
        (tree(train={"lr": -1.0}), "train.lr"),
        (tree(train={"lr": float("nan")}), "train.lr"),
        (tree(train={"lr": float("inf")}), "train.lr"),
        (tree(train={"weight_decay": None}), "train.weight_decay"),
        (tree(train={"schedule": "linear"}), "train.schedule"),
        (tree(train={"precision": "half"}), "train.precision"),
        (tree(train={"gamma": 1.5}), "train.gamma"),
        (tree(data={"mean": [0.5, 0.5]}), "data.mean"),
        (tree(data={"mean": [0.5, float("nan"), 0.5]}), "data.mean"),
        (tree(data={"dataset": 3}), "data.dataset"),
        (tree(data={"word_length": 2}), "data.word_length"),
        (method(visual={"width": 100}), "model.method.visual.width"),
        (method(visual={"layers": [-1]}), "model.method.visual.layers"),
        (tree(model={"vision": None}), "model.vision"),
        ({**tree(), "data": []}, "data"),
    ],
)
def test_a_value_that_does_not_fit_names_its_key_in_one_line(plain: dict[str, Any], key: str) -> None:
    """NaN, text for a number and values out of range are errors that name the key."""
    with pytest.raises(DcrisError, match=rf"^here: {key}[.:]") as caught:
        parse_config(plain, "here")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("plain", "words"),
    [
        (method(visual={"layers": [1, 12]}), "method.visual.layers"),
        (method(visual={"layers": [3, 3]}), "method.visual.layers"),
        (method(text={"layers": [40]}), "method.text.layers"),
        (tree(model={"head": {"feature_layers": [4, 12]}}), "head.feature_layers"),
        (tree(model={"head": {"feature_layers": [8, 4]}}), "head.feature_layers.*ascending"),
        (tree(model={"head": {"width": 500}}), "head.width 500"),
        (tree(model={"vision": {"heads": 7}}), "vision.width 768"),
        (tree(model={"text": {"heads": 5}}), "text.width 512"),
        (method(visual={"attention_width": 130}), "attention_width 130"),
        (tree(model={"method": {"name": "dcris", "visual": None, "text": None}}), "set model.method to null"),
        (tree(model={"vision": {"family": "siglip"}}), "vision.family: unknown family 'siglip'; known: clip, dinov2"),
        (tree(model={"text": {"family": "t5"}}), "text.family: unknown family 't5'; known: bert, clip"),
        (tree(data={"image_size": 450}), "image_size 450.*14"),
        (tree(data={"word_length": 78}), "word_length 78.*77"),
    ],
)
def test_sections_that_contradict_each_other_are_refused(plain: dict[str, Any], words: str) -> None:
    """Settings that do not fit each other are errors of the configuration, not of a shape in the
    network.
    """
    with pytest.raises(DcrisError, match=words):
        parse_config(plain, "here")


@pytest.mark.parametrize("text", ["", "[]", "3", '{"train": ', '{"train": {"lr": 1e-3, "epochs": "x"}}'])
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: str) -> None:
    """The error message names the file."""
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(DcrisError, match=r"config\.json"):
        load_config(path)
    with pytest.raises(DcrisError, match=r"there is no file .*absent\.json"):
        load_config(tmp_path / "absent.json")


def test_a_configuration_is_frozen() -> None:
    """A configuration cannot be changed during a run."""
    config = get_recipe("dcris_tiny")
    with pytest.raises(ValidationError):
        config.train.lr = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config.train = config.train  # type: ignore[misc]
    assert isinstance(config.model.head.feature_layers, tuple)


def test_settings_of_the_command_line_change_only_what_they_name() -> None:
    """`replace` changes only the named settings."""
    before = get_recipe("dcris_tiny")
    after = replace(
        before,
        {
            "train.lr": 3e-4,
            "data.val_split": "val",
            "data.split_by": None,
            "model.method.visual.layers": [1, 3],
            "model.method.text": None,
            "model.head.bias": -1.5,
            "train.epochs": 3,
            "train.max_steps": before.train.max_steps,
        },
    )
    assert (after.train.lr, after.train.epochs) == (3e-4, 3)
    assert (after.data.val_split, after.data.split_by) == ("val", None)
    assert isinstance(after.model.method, DcrisConfig)
    assert after.model.method.visual is not None
    assert after.model.method.visual.layers == (1, 3)
    assert after.model.method.text is None
    assert after.model.head.bias == -1.5

    plain, changed = before.model_dump(), after.model_dump()
    changed["train"].update(lr=plain["train"]["lr"], epochs=plain["train"]["epochs"])
    changed["data"].update(val_split=plain["data"]["val_split"])
    changed["model"]["method"] = plain["model"]["method"]
    changed["model"]["head"]["bias"] = plain["model"]["head"]["bias"]
    assert changed == plain
    assert before == get_recipe("dcris_tiny")


@pytest.mark.parametrize("key", ["lr", "train", "train.", ".lr", "train.lr.x", "trian.lr", "train.Lr", "", "."])
def test_a_setting_that_is_not_there_is_named(key: str) -> None:
    """An unknown setting is an error."""
    with pytest.raises(DcrisError, match="setting"):
        replace(get_recipe("dcris_tiny"), {key: 1e-3})


def test_a_setting_inside_an_adapter_that_was_left_out() -> None:
    """A setting of an adapter that is null is an error."""
    with pytest.raises(DcrisError, match=r"unknown setting model\.method\.text\.width"):
        replace(get_recipe("dcris_tiny"), {"model.method.text": None, "model.method.text.width": 8})


@pytest.mark.parametrize("order", [1, -1])
def test_a_section_and_a_field_of_it(order: int) -> None:
    """Fields count beside their section, in any order, also if only the section brings them."""
    changes = {
        "model.method": {"name": "prompts"},
        "model.method.deep": True,
        "train.masking": {},
        "train.masking.image": 0.5,
    }
    config = replace(get_recipe("dcris_tiny"), dict(list(changes.items())[::order]))
    assert config.model.method.model_dump()["deep"] is True
    assert config.train.masking is not None
    assert config.train.masking.image == 0.5
    assert changes["train.masking"] == {}
    with pytest.raises(DcrisError, match=r"unknown setting model\.method\.depp"):
        replace(get_recipe("dcris_tiny"), {"model.method": {"name": "prompts"}, "model.method.depp": True})


@given(st.floats(1e-9, 1e3), st.integers(0, 2**32 - 1), st.text(max_size=20))
def test_any_number_or_name_arrives_as_it_was_typed(lr: float, seed: int, name: str) -> None:
    """Numbers are not rounded, and text that resembles JSON can be given as JSON."""
    typed = {"train.lr": repr(lr), "train.seed": str(seed), "data.dataset": json.dumps(name)}
    config = replace(get_recipe("dcris_tiny"), {key: parse_value(text) for key, text in typed.items()})
    assert (config.train.lr, config.train.seed, config.data.dataset) == (lr, seed, name)


@given(st.text(max_size=30))
def test_a_value_of_any_text_is_taken_or_refused_in_one_sentence(text: str) -> None:
    """Any text is either accepted or an error that names the key."""
    for key in ("train.lr", "train.milestones", "model.vision", "data.val_split"):
        try:
            config = replace(get_recipe("dcris_tiny"), {key: parse_value(text)})
        except DcrisError as error:
            assert key.split(".")[1] in str(error)
        else:
            assert isinstance(config, RunConfig)


def test_what_a_setting_holds_is_validated_by_default_too() -> None:
    """Default values satisfy their own rules."""
    assert ModelConfig.model_validate(ModelConfig().model_dump()) == ModelConfig()
    for settings in METHODS.values():
        assert settings.model_validate(settings().model_dump()) == settings()  # type: ignore[call-arg]
