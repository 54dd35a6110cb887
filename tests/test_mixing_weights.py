"""Sampling weights of the data sets of a mixture (`data.weights`)."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcris.data.dataset import TrainingBatches
from dcris.data.mixing import mix, samples_of_sets
from dcris.data.readers.load import load_references
from dcris.data.table import ReferenceTable
from dcris.errors import DcrisError
from dcris.training.stopping import Interrupted
from runs import EVERY_STEP, assert_same_run, quick_config, run_training
from test_train import stop_at

MIXTURE = ("data.dataset", "mixed-unfiltered:scenes,few")


@pytest.fixture(scope="module")
def mixture(scenes_root: Path) -> ReferenceTable:
    """All scenes, and the references of the first three again as another data set."""
    table = load_references(scenes_root, "scenes")
    few = replace(table, dataset="few", references=(*table.split("train")[:3], *table.split("val")[:1]))
    return mix(MIXTURE[1], [table, few], filtered=False)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 500))
def test_samples_are_in_proportion_to_the_weights(weights: list[float], samples: int) -> None:
    """Up to one sample of rounding, and all of them are given away."""
    counts = samples_of_sets(weights, samples)
    assert sum(counts) == samples
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - samples * weight / sum(weights)) < 1


@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=4),
    st.lists(st.integers(1, 5), min_size=4, max_size=4),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_each_set_has_its_share_and_passes_of_its_own(
    lengths: list[int], weights: list[int], batch: int, together: int, seed: int
) -> None:
    """An epoch has the number of samples of each set that its weight says; a set repeats a
    reference only after all its others. A resumed run, and the ranks together, have the same
    samples."""
    sources = [number for number, length in enumerate(lengths) for _ in range(length)]
    length, weights = len(sources), weights[: len(lengths)]
    images = [number // 2 for number in range(length)]
    options = (images, together, sources, weights)
    whole = [*TrainingBatches(length, batch, seed, 0, 40, None, *options)]
    batch = min(batch, length)
    per_epoch = max(1, length // batch)
    counts = samples_of_sets(weights, per_epoch * batch)
    for start in range(0, 40 - per_epoch, per_epoch):
        found = Counter(sources[index % length] for indices in whole[start : start + per_epoch] for index in indices)
        assert [found[number] for number in range(len(lengths))] == counts
    epochs = [whole[start : start + per_epoch] for start in range(0, 40 // per_epoch * per_epoch, per_epoch)]
    seen: list[list[int]] = [[] for _ in lengths]
    for epoch in epochs:
        indices = sorted(index for indices in epoch for index in indices)
        for index in indices:
            seen[sources[index % length]].append(index)
    for number, own in enumerate(seen):
        assert len(set(own)) == len(own), "a reference of a pass is drawn once"
        passes = Counter(index // length for index in own)
        assert all(passes[each] == lengths[number] for each in range(len(passes) - 1)), "all but the last are whole"
    assert [*TrainingBatches(length, batch, seed, 7, 40, None, *options)] == whole[7:]
    ranks = [[*TrainingBatches(length, batch, seed, 0, 40, range(rank, batch, 2), *options)] for rank in range(2)]
    for indices, *parts in zip(whole, *ranks, strict=True):
        assert sorted(parts[0] + parts[1]) == sorted(indices)


def test_without_weights_nothing_changes() -> None:
    """Each reference is drawn once an epoch, in the order of earlier versions."""
    batches = [*TrainingBatches(7, 2, 3, 0, 6)]
    assert batches == [*TrainingBatches(7, 2, 3, 0, 6, None, range(7), 1, [0, 0, 0, 1, 1, 1, 1], None)]
    for epoch in range(2):
        order = np.random.default_rng([3, epoch]).permutation(7)[:6] + 7 * epoch
        assert [index for indices in batches[3 * epoch : 3 * epoch + 3] for index in indices] == order.tolist()


@pytest.mark.slow
def test_a_weighted_run_resumes_exactly(mixture: ReferenceTable, tmp_path: Path) -> None:
    """Over several passes of the small set, with shared images and flips, which differ by pass."""
    settings = MIXTURE, EVERY_STEP, ("data.phrases_per_image", "3"), ("data.augmentations", '{"flip": 0.5}')
    config = quick_config(4, *settings, ("data.weights", "[1, 3]"))
    run_training(config, mixture, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run_training(config, mixture, tmp_path / "halves", log=stop_at(2))
    run_training(config, mixture, tmp_path / "halves", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    with pytest.raises(DcrisError, match=r"started with data\.weights"):
        run_training(quick_config(4, *settings), mixture, tmp_path / "halves", resume=True)


def test_a_set_is_as_frequent_as_its_weight_says(
    mixture: ReferenceTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer passes the origin of each reference on: of three in four samples, the small set
    has three references."""
    drawn: list[int] = []
    whole = TrainingBatches.__iter__

    def record(self: TrainingBatches):  # type: ignore[no-untyped-def]
        for indices in whole(self):
            drawn.extend(index % self.length for index in indices)
            yield indices

    monkeypatch.setattr(TrainingBatches, "__iter__", record)
    run_training(quick_config(6, MIXTURE, ("data.weights", "[1, 3]")), mixture, tmp_path)
    references = mixture.split("train")
    shares = Counter(references[number].source for number in drawn)
    assert shares[1] > 2 * shares[0] > 0
    assert len({number for number in drawn if references[number].source == 1}) == 3


@pytest.mark.parametrize(
    ("dataset", "weights", "message"),
    [
        (
            "mixed-unfiltered:scenes,few",
            "[1, 2, 3]",
            "has 3 weights, but .* has 2 data sets; .* scenes.*, few, in this",
        ),
        ("mixed-unfiltered:scenes,few", "[1, 0.0001]", "gives few none of the .* samples of an epoch"),
        ("scenes", "[1, 2]", "is for mixtures of data sets .*, not for scenes"),
        ("mixed-unfiltered:scenes,few,none", "[1, 1, 1]", "none has no training reference"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    mixture: ReferenceTable, tmp_path: Path, dataset: str, weights: str, message: str
) -> None:
    """Before the model is built, and nothing is written."""
    with pytest.raises(DcrisError, match=message):
        run_training(
            quick_config(1, ("data.dataset", dataset), ("data.weights", weights)),
            replace(mixture, dataset=dataset),
            tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("[1, -2]", "data.weights.1: input should be greater than 0"),
        ("[0, 1]", "data.weights.0: input should be greater than 0"),
        ("[1]", "data.weights: tuple should have at least 2 items"),
        ("2", "data.weights: input should be a valid tuple"),
    ],
)
def test_wrong_values_are_refused(weights: str, message: str) -> None:
    with pytest.raises(DcrisError, match=re.escape(message)):
        quick_config(1, ("data.weights", weights))
