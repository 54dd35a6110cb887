"""Samples, batches and evaluation tasks: complete, without repetition, and reproducible."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import TinyRefer
from dcris.config import DataConfig
from dcris.data.dataset import (
    ImageTasks,
    TrainingBatches,
    TrainingSamples,
    all_queries,
    cut_phrases,
    normalise,
    steps_per_epoch,
    task_loader,
    to_square,
    training_loader,
)
from dcris.data.masks import union_mask
from dcris.data.readers.load import load_references
from dcris.data.table import ReferenceTable
from dcris.data.tokenizer import PADDING, TinyTokenizer, get_tokenizer
from dcris.data.transforms import Letterbox
from dcris.errors import DcrisError
from dcris.evaluation.evaluator import exchange_expressions
from dcris.types import Batch, Expression, Reference

CONFIG = DataConfig(dataset="scenes", image_size=56, word_length=9)
TOKENIZER = TinyTokenizer.embedded()


@pytest.fixture(scope="module")
def table(scenes_root: Path) -> ReferenceTable:
    return load_references(scenes_root, "scenes")


@pytest.fixture
def toy(tiny_refer: TinyRefer) -> tuple[Reference, ...]:
    """Three references with one or two expressions each, on two images."""
    return load_references(tiny_refer.write(), tiny_refer.dataset).references


def batches_of(references: tuple[Reference, ...], first: int, last: int, workers: int, size: int = 4) -> list[Batch]:
    samples = TrainingSamples(references, CONFIG, TOKENIZER, seed=3)
    return list(training_loader(samples, TrainingBatches(len(samples), size, 3, first, last), workers, pin=False))


def assert_same_batches(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        for field in ("images", "tokens", "masks"):
            assert torch.equal(getattr(our, field), getattr(their, field)), field


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 100), st.integers(1, 4))
def test_each_reference_once_an_epoch(length: int, batch_size: int, seed: int, epochs: int) -> None:
    """No reference counts twice.

    The remainder that fills no batch is left out, a different one in each epoch.
    """
    per_epoch = steps_per_epoch(length, min(batch_size, length))
    batches = list(TrainingBatches(length, batch_size, seed, 0, epochs * per_epoch))
    assert len(batches) == epochs * per_epoch
    assert {len(batch) for batch in batches} == {min(batch_size, length)}
    for epoch in range(epochs):
        indices = [index for batch in batches[epoch * per_epoch : (epoch + 1) * per_epoch] for index in batch]
        assert {index // length for index in indices} == {epoch}
        assert len(set(indices)) == len(indices) == per_epoch * min(batch_size, length)
    assert epochs * per_epoch == len(TrainingBatches(length, batch_size, seed, 0, epochs * per_epoch))


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    """Runs with the same seed are equal, and epochs have different orders."""

    def epoch(number: int, seed: int) -> list[int]:
        batches = TrainingBatches(40, 8, seed, 5 * number, 5 * number + 5)
        return [index % 40 for batch in batches for index in batch]

    torch.manual_seed(0)
    np.random.seed(0)
    first = epoch(2, 7)
    torch.manual_seed(1)
    np.random.seed(1)
    assert first == epoch(2, 7)
    assert sorted(first) == list(range(40))
    assert len({tuple(epoch(number, seed)) for number in range(5) for seed in range(5)}) == 25


@given(st.integers(1, 50), st.integers(1, 9), st.integers(0, 40), st.integers(0, 40))
def test_batches_from_a_step_on_are_those_of_the_unbroken_run(length: int, size: int, first: int, more: int) -> None:
    """A resumed run sees the same batches as an uninterrupted one."""
    whole = list(TrainingBatches(length, size, 1, 0, first + more))
    assert list(TrainingBatches(length, size, 1, first, first + more)) == whole[first:]


def test_one_sentence_of_each_reference_an_epoch_and_all_in_the_end(table: ReferenceTable) -> None:
    """A sampler that is seeded once per worker would draw the same expressions in every epoch."""
    references = table.split("train")
    samples = TrainingSamples(references, CONFIG, TOKENIZER, seed=3)
    drawn: dict[int, Counter[int]] = defaultdict(Counter)
    for index in range(120 * len(samples)):
        number = index % len(samples)
        expression = samples.draw(index)
        assert expression in references[number].expressions
        assert expression == samples.draw(index)
        drawn[number][expression.sent_id] += 1
    for number, reference in enumerate(references):
        counts = [drawn[number][expression.sent_id] for expression in reference.expressions]
        assert min(counts) > 120 / len(counts) / 3, f"{counts} of reference {reference.ref_id}"
    # Neighbouring references draw independently: an epoch does not consist of first expressions
    # only.
    several = [i for i, reference in enumerate(references) if len(reference.expressions) > 1]
    places = {references[i].expressions.index(samples.draw(5 * len(samples) + i)) for i in several}
    assert len(places) > 1
    # Another seed draws other expressions.
    other = TrainingSamples(references, CONFIG, TOKENIZER, seed=4)
    assert any(other.draw(i) != samples.draw(i) for i in several)


def test_a_sample_is_the_image_its_phrase_and_its_mask(table: ReferenceTable) -> None:
    """Image, expression and mask belong together, unmirrored and in RGB order."""
    references = table.split("train")
    samples = TrainingSamples(references, CONFIG.model_copy(update={"image_size": 112}), TOKENIZER, seed=3)
    for index in (0, 5, len(samples) + 7):
        reference, sample = references[index % len(samples)], samples[index]
        pixels = np.array(Image.open(reference.image_path).convert("RGB"))
        assert pixels.shape == (112, 112, 3)  # the size of the square, so the letterbox is the identity
        assert sample.image.dtype == torch.uint8
        np.testing.assert_array_equal(sample.image.permute(1, 2, 0).numpy(), pixels)
        np.testing.assert_array_equal(sample.mask.numpy(), union_mask(reference.segmentations, (112, 112)))
        assert torch.equal(sample.tokens, TOKENIZER([samples.draw(index).text], CONFIG.word_length)[0])


def test_padding_of_the_letterbox_is_normalised_to_zero(table: ReferenceTable) -> None:
    """Otherwise the padding of a wide image would be bright bars that every model must learn to
    ignore.
    """
    square, box = to_square(np.full((20, 60, 3), 255, np.uint8), CONFIG, Letterbox)
    normalised = normalise(square[None], CONFIG)[0]
    assert box.size == (20, 60)
    assert normalised[:, :10].abs().max() < 0.01 / min(CONFIG.std)
    expected = (1 - torch.tensor(CONFIG.mean)) / torch.tensor(CONFIG.std)
    torch.testing.assert_close(normalised[:, 28, 28], expected)


def test_workers_do_not_change_what_is_read(table: ReferenceTable) -> None:
    """A run can be repeated on a machine with another number of cores."""
    references = table.split("train")
    alone = batches_of(references, 0, 12, workers=0)
    assert_same_batches(alone, batches_of(references, 0, 12, workers=2))
    assert_same_batches(alone[5:], batches_of(references, 5, 12, workers=1))
    assert alone[0].images.shape == (4, 3, 56, 56)
    assert alone[0].tokens.shape == (4, 9)
    assert alone[0].masks.shape == (4, 1, 56, 56)


def test_a_set_smaller_than_the_batch_is_one_batch(toy: tuple[Reference, ...]) -> None:
    """A data set of ten images can be trained on."""
    batches = batches_of(toy, 0, 3, workers=0, size=32)
    assert [len(batch.images) for batch in batches] == [3, 3, 3]
    assert steps_per_epoch(3, 3) == 1


def test_each_image_comes_once_with_all_its_queries(table: ReferenceTable) -> None:
    """Each image is encoded once, and no expression is lost or counted twice."""
    queries = all_queries(table.split("test"))
    shuffled = [queries[i] for i in np.random.default_rng(0).permutation(len(queries))]
    tasks = ImageTasks(shuffled, CONFIG, TOKENIZER)
    assert len(tasks) == len({reference.image_path for reference, _ in queries}) == 4
    groups = [task for group in task_loader(tasks, images=3, workers=0) for task in group]
    asked = [pair for task in groups for pair in task.queries]
    assert Counter(expression.sent_id for _, expression in asked) == Counter(e.sent_id for _, e in queries)
    for task in groups:
        assert len({reference.image_path for reference, _ in task.queries}) == 1
        assert torch.equal(task.tokens, TOKENIZER([e.text for _, e in task.queries], CONFIG.word_length))
        for reference, _ in task.queries:
            truth = union_mask(reference.segmentations, reference.image_size)
            np.testing.assert_array_equal(task.truths[reference.ref_id, True].mask, truth.astype(bool))
    parallel = [task for group in task_loader(tasks, images=3, workers=2) for task in group]
    assert [task.queries for task in parallel] == [task.queries for task in groups]


def test_queries_for_the_first_expressions_or_all(table: ReferenceTable) -> None:
    """CRIS and its successors validate on the first expression during training, and test on all."""
    references = table.split("val")
    assert [e for _, e in all_queries(references, first_only=True)] == [r.expressions[0] for r in references]
    assert [e for _, e in all_queries(references)] == [e for r in references for e in r.expressions]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["missing", "resized", "cut short"])
def test_a_broken_image_gives_one_sentence(toy: tuple[Reference, ...], damage: str, workers: int) -> None:
    """Also from a worker process, where torch would add a long traceback."""
    path = toy[2].image_path
    if damage == "missing":
        path.unlink()
    elif damage == "resized":
        Image.new("RGB", (12, 16)).save(path)
    else:
        path.write_bytes(path.read_bytes()[:200])
    words = {
        "missing": "there is no image file",
        "resized": "is 12x16 pixels, but .* 24x32",
        "cut short": "cannot read",
    }
    with pytest.raises(DcrisError, match=words[damage]) as training:
        batches_of(toy, 0, 2, workers, size=3)
    with pytest.raises(DcrisError, match=words[damage]) as evaluation:
        list(task_loader(ImageTasks(all_queries(toy), CONFIG, TOKENIZER), images=2, workers=workers))
    for caught in (training, evaluation):
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_exchanged_expressions_belong_to_another_object_of_the_image(table: ReferenceTable) -> None:
    """The control experiment for the use of the expression needs expressions of another object."""
    references = table.split("test")
    mixed = exchange_expressions(references)
    owner = {e.sent_id: reference for reference in references for e in reference.expressions}
    for reference, expression in mixed:
        assert owner[expression.sent_id].ref_id != reference.ref_id
        assert owner[expression.sent_id].image_id == reference.image_id
    counts = Counter(expression.sent_id for _, expression in mixed)
    assert counts == Counter(e.sent_id for _, e in all_queries(references))  # each expression occurs once, as before
    assert {reference.ref_id for reference, _ in mixed} == {reference.ref_id for reference in references}


def test_an_object_alone_in_its_image_is_left_out_of_the_exchange(toy: tuple[Reference, ...]) -> None:
    """It would get its own expression back and raise the score of the control."""
    mixed = exchange_expressions(toy)
    assert {reference.ref_id for reference, _ in mixed} == {10, 11}
    assert [(r.ref_id, e.text) for r, e in mixed] == [(10, "tall thing"), (10, "right"), (11, "left one")]
    assert exchange_expressions(toy[2:]) == []


PHRASES = st.lists(
    st.one_of(
        st.lists(st.sampled_from(["left", "cup", "the", "antidisestablishmentarianism", "!!", "10:45pm", "it's"])).map(
            " ".join
        ),
        st.text(max_size=20),
        st.text(st.characters(max_codepoint=127), max_size=20),
        st.sampled_from(["&amp;amp; cup", "<|endoftext|> cup left of it", "a\tb\nc", "“left” cup…", " ", "!", "! !"]),
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("name", ["tiny", "clip"])
@given(texts=PHRASES, length=st.integers(3, 9))
@settings(max_examples=25)
def test_long_expressions_are_counted_as_the_tokenizer_does(name: str, texts: list[str], length: int) -> None:
    """Words are counted one by one, which is cheap for 120,000 expressions, and the number is
    exact.
    """
    if name == "clip":
        pytest.importorskip("instant_clip_tokenizer")
    tokenizer = get_tokenizer(name)
    reference = Reference(1, (1,), 1, Path("1.png"), (2, 2), "cup", "val", ([[0, 0, 1, 0, 1, 1]],), ())
    queries = [(reference, Expression(number, text)) for number, text in enumerate(texts)]
    expected = int((tokenizer(texts, length + 1)[:, length] != PADDING).sum())
    warning = cut_phrases(queries, CONFIG.model_copy(update={"word_length": length}), tokenizer, "refcocog")
    if expected:
        assert warning is not None
        assert warning.startswith(f"{expected} of {len(texts)} expressions are longer than {length} tokens")
        assert warning.endswith("are cut; refcocog is usually read with 22")
    else:
        assert warning is None
