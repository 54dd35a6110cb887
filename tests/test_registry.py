"""The facts about known data sets."""

from typing import Any

from dcris.config import RunConfig, replace
from dcris.data.registry import DATASETS, PARTITIONS, agrees, official_splits, word_length_settings
from dcris.recipes import get_recipe


def _choose(config: RunConfig, **data: Any) -> RunConfig:
    """Apply settings of the data section as `dcris train` does."""
    settings = {f"data.{key}": value for key, value in data.items()}
    return replace(config, settings | word_length_settings(settings, config.data.dataset))


def test_a_data_set_brings_its_word_length() -> None:
    """Expressions of RefCOCOg are longer: `--dataset refcocog` with a recipe of 17 tokens would cut
    them silently.
    """
    base = get_recipe("dcris_b")
    google = _choose(base, dataset="refcocog")
    assert google.data.word_length == 22
    assert _choose(base, dataset="refcocog", word_length=20).data.word_length == 20
    assert _choose(google, dataset="refcoco").data.word_length == 17
    assert _choose(google, dataset="mine").data.word_length == 22  # no usual length is known for others
    kept = _choose(google, word_length=17)
    assert _choose(kept, dataset="refcocog").data.word_length == 17  # a checkpoint's own data set


def test_official_sizes_add_up_to_the_published_totals() -> None:
    """A wrong number in the table would report correct files as wrong."""
    classic = {key: each for key, each in PARTITIONS.items() if each.cris_folder}
    expressions = {key: sum(count for _, count in each.splits.values()) for key, each in classic.items()}
    assert expressions[("refcoco", "unc")] == 142_210
    assert expressions[("refcoco+", "unc")] == 141_564
    assert expressions[("refcocog", "umd")] == 95_010
    assert expressions[("refcocog", "google")] == 95_010
    references = {key: sum(count for count, _ in each.splits.values()) for key, each in classic.items()}
    assert list(references.values()) == [50_000, 49_856, 49_822, 49_822]
    assert sum(count for count, _ in PARTITIONS["refcoco", "google"].splits.values()) == 50_000
    totals = {
        name: sum(count for _, count in PARTITIONS[name, "official"].splits.values())
        for name in ("refsegrs", "phrasecut")
    }
    assert totals == {"refsegrs": 4_420, "phrasecut": 345_486}
    assert sum(count for count, _ in PARTITIONS["rrsisd", "unc"].splits.values()) == 17_402
    assert sum(count for count, _ in PARTITIONS["reasonseg", "official"].splits.values()) == 1_218


def test_the_tables_agree() -> None:
    """Every data set has its usual partition, and every partition its data set."""
    assert {name for name, _ in PARTITIONS} == set(DATASETS)
    for name, dataset in DATASETS.items():
        assert official_splits(name, dataset.split_by)
    assert official_splits("refcoco", "umd") == {}
    folders = [each.cris_folder for each in PARTITIONS.values() if each.cris_folder]
    assert len(folders) == len(set(folders)) == 4


def test_a_size_that_nobody_states_is_no_difference() -> None:
    """Correct files of Ref-ZOM must not be reported as wrong."""
    assert agrees((3, 4), (None, None)) is None
    assert [agrees((3, 4), (None, 4)), agrees((3, 4), (3, 4)), agrees((3, 5), (None, 4))] == [True, True, False]
