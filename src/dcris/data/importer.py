"""Convert what annotation tools export to your own data (JSON Lines).

The formats are in dcris.data.tools. Here is what they share: the images, the phrases, and phrases
that fit several objects of an image.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from dcris.data.cleaning import clean_text
from dcris.data.image_finder import ImageFinder
from dcris.data.masks import mask_area, mask_box, union_mask
from dcris.data.phrase_file import key_of, read_phrases, write_list
from dcris.data.phrases import Instance, draw, statements
from dcris.data.readers.jsonl import is_jsonl
from dcris.data.table import bad, check_text, located, plain_path, shown
from dcris.data.tools import FORMATS, recognise
from dcris.data.tools.annotation import Annotation, Found, Size, Texts
from dcris.errors import DcrisError
from dcris.utils.files import write_file
from dcris.utils.streams import counted

AMBIGUOUS = ("drop", "keep", "merge", "place")
"""What may become of a phrase that fits several objects of an image: leave it out; keep it for each
of them; make it one reference to all of them; replace it by generated phrases that tell them
apart."""

Choose = Callable[[int, str], str]
"""Returns one of AMBIGUOUS for a number of objects with such a phrase, and an example in words."""

_MAX_SHOWN = 10

_PLACE_KINDS = ("place", "ordinal")
"""Kinds of generated phrases that boxes alone decide: colours and relations need more care."""

_PLACE_PHRASES = 4
"""Most generated phrases of an object."""

_MOST_INSTANCES = 500
"""Most objects of an image for which phrases are generated; the time grows with the square."""


@dataclass(slots=True)
class ImportResult:
    """Counts of what was written, and of the annotations that were left out, by reason."""

    format: str = ""
    """Its name in FORMATS."""
    splits: dict[str, int] = field(default_factory=dict)
    """References of each split."""
    images: int = 0
    expressions: int = 0
    listed: int = 0
    """Objects in the list of those that need a phrase."""
    crowds: int = 0
    without_phrase: int = 0
    ambiguous: int = 0
    """All their phrases fit another object of the image, too."""
    without_mask: int = 0
    """They have only a box, a point or a line."""
    empty: int = 0
    """Their mask covers no pixel."""
    unusable: int = 0
    """They, or what they refer to, are malformed."""
    problems: list[str] = field(default_factory=list)
    """The first ten different problems of the last three kinds, in words."""

    def __str__(self) -> str:
        written = ", ".join(f"{count:,} {split}" for split, count in self.splits.items())
        return (
            f"{counted(sum(self.splits.values()), 'reference')} ({written}) with {counted(self.expressions, 'expression')} "
            f"on {counted(self.images, 'image')}, from {FORMATS[self.format].title}{self.left_out}"
        )

    @property
    def left_out(self) -> str:
        """The annotations left out, as the end of a sentence; empty if there are none."""
        reasons = (
            (self.ambiguous, "whose phrase fits several objects of an image (--ambiguous)"),
            (self.crowds, "crowds (--crowds keep)"),
            (self.without_phrase, "without a phrase (--write-phrases)"),
            (self.without_mask, "without a mask"),
            (self.empty, "whose mask covers no pixel"),
            (self.unusable, "that cannot be used"),
        )
        found = [f"{count:,} {reason}" for count, reason in reasons if count]
        return f"; left out: {', '.join(found)}" if found else ""

    def add_problem(self, problem: str) -> None:
        """Keep a problem if it is among the first ten different ones.

        One image may affect many annotations.
        """
        if len(self.problems) < _MAX_SHOWN and problem not in self.problems:
            self.problems.append(problem)


def import_annotations(
    source: Path,
    out: Path,
    *,
    images: Path | None = None,
    format: str | None = None,
    phrases: Path | None = None,
    split: str | None = None,
    val: float = 0.1,
    seed: int = 0,
    ambiguous: str | Choose = "drop",
    keep_crowds: bool = False,
    strict: bool = False,
) -> ImportResult:
    """Convert each annotation with a mask and a phrase to a reference in a JSON Lines file.

    The phrases of an annotation are, in this order of precedence: those that `phrases` gives for
    it; its own, from its attributes or text; those of its category, from `phrases` or, if that file
    names no category, the category's name. What cannot be used is counted and left out.

    Args:
        source: what the tool exported, a file or a folder; see dcris.data.tools.
        out: file to write; must not exist.
        images: folder of the images, beside or below `out`; default: the export's folder. Images
            are found by their path, then by their name anywhere below the folder.
        format: a key of FORMATS; None recognises it.
        phrases: a .json or .csv file; see read_phrases.
        split: name of the split for all references; default: the splits of the export if it has
            several and one of them is train, else images are divided into train and val.
        val: share of the images for val. The choice depends only on `seed` and the
            paths of the images, relative to the folder of `out`.
        seed: seed of the choice.
        ambiguous: one of AMBIGUOUS, or a function that chooses one if there are such phrases.
        keep_crowds: keep annotations of crowds. They always count for ambiguity.
        strict: raise DcrisError for the first annotation without a mask or that cannot be used.

    Returns:
        Counts of what was written and left out.

    Raises:
        DcrisError: a file cannot be read, the format is unknown, the phrases name an unknown
            annotation or category, or nothing is left. Nothing is written then.
    """
    if not is_jsonl(out):
        raise DcrisError(f"--out must end in .jsonl; change it to {out.with_suffix('.jsonl')}")
    if out.exists():
        raise DcrisError(f"{out} exists already; delete it or choose another --out")
    if split is not None and not split.strip():
        raise DcrisError("--split is blank; give a name, such as --split train")
    export = _Export(source, images, format, phrases, strict, home=out.parent)
    if not isinstance(ambiguous, str):
        ambiguous = ambiguous(len(export.ambiguous), export.ambiguous[0].words) if export.ambiguous else "drop"
    result, lines = export.result, list(export.lines(ambiguous, keep_crowds))
    if not lines:
        first = f"; the first problem: {result.problems[0]}" if result.problems else ""
        raise DcrisError(f"no annotation in {source} has both a mask and a phrase{result.left_out}{first}")
    _split(lines, split, val, seed)
    result.splits = dict(sorted(Counter(line["split"] for line in lines).items()))
    result.images = len({line["image"] for line in lines})
    result.expressions = sum(len(line["expressions"]) for line in lines)

    def fill(path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)

    write_file(out, fill)
    return result


def list_without_phrase(
    source: Path,
    out: Path,
    *,
    images: Path | None = None,
    format: str | None = None,
    phrases: Path | None = None,
    keep_crowds: bool = False,
    strict: bool = False,
) -> ImportResult:
    """Write a CSV file with the objects that have no phrase, or none that fits them alone.

    `import_annotations` takes the file back as `phrases`. The arguments and errors are those of
    `import_annotations`; `out` is the CSV file.
    """
    export = _Export(source, images, format, phrases, strict)
    rows = list(export.rows(keep_crowds))
    export.result.listed = len(rows)
    write_list(out, rows)
    return export.result


@dataclass(frozen=True, slots=True)
class _Object:
    """An annotation with its phrases."""

    annotation: Annotation
    image: object
    """The same for all annotations of an image: its path, or its name if it is missing."""
    phrases: Texts
    shared: Texts
    """Those of the phrases that another annotation of the image has, too."""

    @property
    def words(self) -> str:
        """An example of an ambiguous phrase, in words."""
        return f"{shown(self.shared[0])} in {shown(self.annotation.image)}"


class _LeftOutError(DcrisError):
    """An annotation that is counted for another reason than `unusable`."""


class _Export:
    """The annotations of an export with their phrases, and its images.

    Args:
        home: folder that all images have to be in; None: any.
        The others are those of `import_annotations`.
    """

    def __init__(
        self,
        source: Path,
        images: Path | None,
        format: str | None,
        phrases: Path | None,
        strict: bool,
        home: Path | None = None,
    ) -> None:
        name, found = recognise(source, format)
        self.finder = ImageFinder(source, images)
        # abspath, not resolve(): links to images that are stored elsewhere are allowed.
        self.home = None if home is None else Path(os.path.abspath(home))  # noqa: PTH100
        if self.home is not None and not Path(os.path.abspath(self.finder.root)).is_relative_to(self.home):  # noqa: PTH100
            raise DcrisError(
                f"the images in {self.finder.root} are not below {self.home}, the folder of --out; choose an --out beside or "
                "above them, or create a link to them there"
            )
        self.strict, self.result = strict, ImportResult(format=name)
        categories = set[str]()
        annotations = list(_join_groups(self._usable(found, categories)))
        self.copies = Counter(key_of(annotation.source) for annotation in annotations)
        categories |= {annotation.category for annotation in annotations if annotation.category is not None}
        self.known = None if phrases is None else read_phrases(phrases, self.copies.keys(), categories)
        self.fitting: dict[tuple[object, str], list[Annotation]] = {}
        """Annotations of an image that a phrase fits, by the image and the comparable phrase."""
        self.objects = self._with_phrases(annotations)
        self.of_image: dict[object, list[int]] = {}
        for place, one in enumerate(self.objects):
            self.of_image.setdefault(one.image, []).append(place)
        self.ambiguous = [one for one in self.objects if one.shared and len(one.shared) == len(one.phrases)]

    def _usable(self, found: Found, categories: set[str]) -> Iterator[Annotation]:
        """Yield the annotations, and collect the names of categories."""
        for each in found:
            if isinstance(each, Annotation):
                try:
                    for key, value in (("split", each.split), ("id", each.source)):
                        if isinstance(value, str):  # it is written as it is
                            check_text(value, each.path, each.where, key)
                except DcrisError as error:
                    self._leave_out(error)
                else:
                    yield each
            elif isinstance(each, str):
                categories.add(each)
            else:
                self._leave_out(each)

    def _leave_out(self, error: DcrisError) -> None:
        """Count an annotation that cannot be used. Raises the error if `strict`."""
        if self.strict:
            raise error
        self.result.unusable += not isinstance(error, _LeftOutError)
        self.result.add_problem(str(error))

    # ---- phrases

    def _with_phrases(self, annotations: Iterable[Annotation]) -> list[_Object]:
        """Give each annotation its phrases, and note which of them fit several of its image."""
        given = [(each, self._image_key(each), self._own(each), self._of_category(each)) for each in annotations]
        own = Counter[tuple[object, str]]()
        for annotation, image, phrases, of_category in given:
            mine = {(image, _comparable(text)) for text in phrases}
            own.update(mine)
            for key in mine | {(image, _comparable(text)) for text in of_category}:
                self.fitting.setdefault(key, []).append(annotation)
        every = {key: len(same) for key, same in self.fitting.items()}
        objects = []
        for annotation, image, phrases, of_category in given:
            # An own phrase was written for one object, even if others are of that category.
            texts, counts = (phrases, own) if phrases else (of_category, every)
            shared = tuple(text for text in texts if counts[image, _comparable(text)] > 1)
            objects.append(_Object(annotation, image, texts, shared))
        return objects

    def _own(self, annotation: Annotation) -> Texts:
        """Return the phrases for this annotation alone, from the phrase file or the tool."""
        given = self._given(annotation)
        return annotation.phrases if given is None else given

    def _given(self, annotation: Annotation) -> Texts | None:
        """Return what the phrase file gives this annotation, if anything."""
        return None if self.known is None else self.known.by_annotation.get(key_of(annotation.source))

    def _of_category(self, annotation: Annotation) -> Texts:
        """Return the phrases of the category: its name, if the phrase file names no category."""
        if annotation.category is None:
            return ()
        if self.known is None or not self.known.by_category:
            return (annotation.category,)
        return self.known.by_category.get(annotation.category, ())

    def _generated(self, image: object) -> dict[int, Texts]:
        """Return phrases that distinguish the objects of an image, by their place in `objects`."""
        places = self.of_image[image]
        if len(places) > _MOST_INSTANCES:
            return {}
        instances = [self._instance(self.objects[place].annotation) for place in places]
        # As the annotators name them: another word may be one of their other categories.
        names = {each.category: (each.category,) for each in instances}
        found = {}
        for place, instance in zip(places, instances, strict=True):
            said = [each for each in statements(instances, instance, names) if each.kind in _PLACE_KINDS]
            found[place] = tuple(text for _, text in draw(said, instance.ann_id, _PLACE_PHRASES))
        return found

    def _instance(self, annotation: Annotation) -> Instance:
        """Return what the rules for phrases see of an object; it is vague if it has no mask."""
        number = int(hashlib.sha256(key_of(annotation.source).encode(errors="replace")).hexdigest()[:12], 16)
        name = annotation.category or ""
        try:
            size = self._size(annotation)
            mask = union_mask([make(size) for make in annotation.masks or ()], size)
            box = mask_box(mask)
        except DcrisError:
            box = None
        if box is None or not name:
            return Instance(number, name, (0.0, 0.0, 0.0, 0.0), 0.0, vague=True)
        (left, top, width, height), (rows, columns) = box, size
        corners = (left / columns, top / rows, (left + width) / columns, (top + height) / rows)
        return Instance(number, name, corners, float(mask.mean()), vague=annotation.crowd)

    # ---- images

    def _image_key(self, annotation: Annotation) -> object:
        try:
            return self.finder.find(annotation)
        except DcrisError:
            return annotation.image

    def _size(self, annotation: Annotation) -> Size:
        """Return the size of the image. Raises DcrisError if the file and the export disagree."""
        image = self.finder.find(annotation)
        found = self.finder.size(image)
        if annotation.size is not None and annotation.size != found:
            height, width = annotation.size
            raise DcrisError(
                f"{image} is {found[0]} x {found[1]} pixels (height x width, after its EXIF orientation), but "
                f"{annotation.path} has {height} x {width}, so its masks do not fit; use the images that were annotated"
            )
        return found

    # ---- references

    def lines(self, ambiguous: str, keep_crowds: bool) -> Iterator[dict[str, Any]]:
        """Yield the lines of the file, with the splits of the export.

        What is left out is counted in `result`.
        """
        merged, generated = set[tuple[object, str]](), dict[object, dict[int, Texts]]()
        for place, one in enumerate(self.objects):
            if one.annotation.crowd and not keep_crowds:
                self.result.crowds += 1
                continue
            texts = (
                one.phrases if ambiguous == "keep" else tuple(text for text in one.phrases if text not in one.shared)
            )
            if ambiguous == "place" and one.phrases and not texts:
                if one.image not in generated:
                    generated[one.image] = self._generated(one.image)
                texts = generated[one.image].get(place, ())
            path, source = one.annotation.path, one.annotation.source
            try:
                if one.annotation.masks is None:
                    self.result.without_mask += 1
                    raise _LeftOutError(f"{path}: {one.annotation.where} has no mask")
                if self.copies[key_of(source)] > 1 and self._given(one.annotation) is not None:
                    raise bad(path, f"two annotations have the id {source}, and the phrase file gives it a phrase")
                if not one.phrases:
                    self.result.without_phrase += 1
                elif texts:
                    yield self._line([one.annotation], texts)
                elif ambiguous != "merge":
                    self.result.ambiguous += 1
                if ambiguous == "merge":
                    yield from self._merged(one, merged, keep_crowds)
            except DcrisError as error:
                self._leave_out(error)

    def _merged(self, one: _Object, done: set[tuple[object, str]], keep_crowds: bool) -> Iterator[dict[str, Any]]:
        """Yield, once for each phrase that this object shares, a reference to all that it fits."""
        for text in one.shared:
            if (key := (one.image, _comparable(text))) in done:
                continue
            done.add(key)
            same = self.fitting[key]
            # Without one of them, the phrase would describe more than the mask has.
            if any(each.masks is None or (each.crowd and not keep_crowds) for each in same):
                self.result.ambiguous += 1
            else:
                yield self._line(same, (text,))

    def _line(self, annotations: Sequence[Annotation], texts: Texts) -> dict[str, Any]:
        """Return one reference. Raises DcrisError if it cannot be used."""
        first = annotations[0]
        size = self._size(first)
        masks = [mask for annotation in annotations for mask in self._masks(annotation, size)]
        line: dict[str, Any] = {"image": self._name(first)}
        if len(masks) > 1:
            line["masks"] = masks
        else:
            line["mask"] = masks[0] if masks else None
        line["expressions"] = list(dict.fromkeys(texts))
        if categories := dict.fromkeys(each.category for each in annotations if each.category is not None):
            line["category"] = ", ".join(categories)
        # Not read again; for people who look up the source.
        sources = [each.source for each in annotations]
        line["annotation"] = sources if len(sources) > 1 else sources[0]
        line["split"] = first.split
        return line

    def _masks(self, annotation: Annotation, size: Size) -> list[Any]:
        """Return the masks of an annotation. One of several may cover no pixel, such as a thin
        polygon."""
        masks = list[Any]()
        for make in annotation.masks or ():
            with located(annotation.path, f"{annotation.where} cannot be decoded"):
                segmentation = make(size)
                if mask_area(segmentation, size):
                    masks.append(segmentation)
        if annotation.masks and not masks:
            self.result.empty += 1
            raise _LeftOutError(f"{annotation.path}: {annotation.where} has a mask without a pixel")
        return masks

    def _name(self, annotation: Annotation) -> str:
        """Return the path of the image relative to the written file."""
        path = Path(os.path.abspath(self.finder.find(annotation)))  # noqa: PTH100
        if self.home is None or not path.is_relative_to(self.home):
            raise DcrisError(
                f"the image {path} is not below {self.home}, the folder of --out; choose an --out above it"
            )
        return plain_path(path.relative_to(self.home).as_posix(), annotation.path, annotation.where, "image")

    def rows(self, keep_crowds: bool) -> Iterator[tuple[str, str, str, str]]:
        """Yield the objects that need a phrase, as `write_list` takes them."""
        for one in self.objects:
            annotation = one.annotation
            if annotation.masks and (keep_crowds or not annotation.crowd) and len(one.shared) == len(one.phrases):
                try:
                    size = self._size(annotation)
                    box = mask_box(union_mask([make(size) for make in annotation.masks], size))
                except DcrisError as error:
                    self._leave_out(error)
                    continue
                yield (
                    key_of(annotation.source),
                    annotation.image,
                    annotation.category or "",
                    " ".join(map(str, box or ())),
                )


def _join_groups(annotations: Iterable[Annotation]) -> Iterator[Annotation]:
    """Join the annotations of an image that have a common group, at the place of the first."""
    groups: dict[tuple[Path, str, int | str | None], list[Annotation]] = {}
    order: list[Annotation | tuple[Path, str, int | str | None]] = []
    for annotation in annotations:
        key = (annotation.path, annotation.image, annotation.group)
        if annotation.group is None:
            order.append(annotation)
        elif key in groups:
            groups[key].append(annotation)
        else:
            groups[key] = [annotation]
            order.append(key)
    for one in order:
        if isinstance(one, Annotation):
            yield one
            continue
        members = groups[one]
        masks = tuple(mask for member in members for mask in member.masks or ())
        yield replace(
            members[0],
            masks=None if any(member.masks is None for member in members) else masks,
            phrases=tuple(dict.fromkeys(text for member in members for text in member.phrases)),
        )


_comparable = cache(clean_text)
"""Phrases that are equal after cleaning are the same to a model. Cached, since ftfy is slow and
phrases repeat."""


def _split(lines: Sequence[dict[str, Any]], split: str | None, val: float, seed: int) -> None:
    """Give each line its split; see `import_annotations`."""
    recorded = {line["split"] for line in lines}
    if split is None and "train" in recorded and len(recorded) > 1:
        for line in lines:
            line["split"] = line["split"] or "train"
        return
    chosen = _choose({line["image"] for line in lines}, val, seed) if split is None else set()
    for line in lines:
        line["split"] = split or ("val" if line["image"] in chosen else "train")


def _choose(names: set[str], share: float, seed: int) -> set[str]:
    """Choose images for val: the given share, at least one if the share is not 0, and never all."""
    count = min(max(round(share * len(names)), share > 0), len(names) - 1)

    def order(name: str) -> str:
        # By name, not by position: if images are added later, nearly all images of val stay there.
        return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()

    return set(sorted(names, key=order)[:count])
