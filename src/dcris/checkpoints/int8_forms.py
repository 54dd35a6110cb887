"""The forms that int8 layers took, in the cache folder, so that they are chosen once a model."""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from dcris.checkpoints.backbones import fingerprint
from dcris.checkpoints.checkpoint import Towers
from dcris.config import DataConfig
from dcris.errors import DcrisError
from dcris.models.adapters.attach import trained_state
from dcris.models.int8 import Forms, forms_of, rules
from dcris.models.segmentation import ReferringSegmenter
from dcris.utils.cache import cache_folder, read_own
from dcris.utils.files import make_directory, write_file
from dcris.version import __version__

_MOST_BYTES = 1 << 24


def with_known_forms(
    model: ReferringSegmenter,
    towers: Towers,
    data: DataConfig,
    prepare: Callable[[Forms | None], ReferringSegmenter],
) -> ReferringSegmenter:
    """Return what `prepare` makes of the forms that are known for a model; None: of no known ones.

    Args:
        model: whose forms they are.
        towers: identifies its frozen weights.
        data: settings of its input.
        prepare: returns the copy for prediction.
    """
    parts = [fingerprint(trained_state(model)), *(towers[name]["sha256"] for name in sorted(towers))]
    parts += [data.model_dump_json(), torch.__version__, __version__, rules()]
    name = hashlib.sha256(" ".join(parts).encode()).hexdigest()
    try:
        path = make_directory(cache_folder() / "int8") / f"{name}.safetensors"
    except DcrisError:  # nothing can be kept there
        return prepare(None)
    if (forms := _read(path)) is not None:
        with suppress(ValueError):  # a damaged file
            return prepare(forms)
    ready = prepare(None)
    with suppress(DcrisError):
        write_file(path, save(forms_of(ready)), mode=0o644)
    return ready


def _read(path: Path) -> Forms | None:
    with suppress(DcrisError, OSError, SafetensorError):
        return load(read_own(path, _MOST_BYTES))
    return None
