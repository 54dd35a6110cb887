"""A run's provenance.json: with what, on what and for how long it was trained."""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dcris.errors import DcrisError
from dcris.utils.files import read_json, write_json
from dcris.utils.provenance import describe

PROVENANCE = "provenance.json"
"""File in a run's directory."""


class RunRecord:
    """Writes provenance.json: the checksum of the references, the hours in all, and the sessions.

    A session is one start of the program, the first or one with --resume: its start (UTC), hours,
    number of processes, and the content of `dcris.utils.provenance.describe`. The file is written
    with each checkpoint, so that a killed session has the hours up to its last one.

    Raises:
        DcrisError: the file of earlier sessions cannot be read.
    """

    def __init__(self, out: Path, device: torch.device, count: int, data_sha256: str, resuming: bool) -> None:
        self.path, self.begin = out / PROVENANCE, time.monotonic()
        self.earlier = self._read_sessions() if resuming else []
        self.session: dict[str, Any] = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "hours": 0.0,
            "processes": count,
            **describe(device),
        }
        self.data_sha256 = data_sha256

    def write(self) -> None:
        """Write the file with the hours up to now."""
        self.session["hours"] = round((time.monotonic() - self.begin) / 3600, 4)
        sessions = [*self.earlier, self.session]
        hours = round(sum(session["hours"] for session in sessions), 4)
        write_json(self.path, {"data_sha256": self.data_sha256, "hours": hours, "sessions": sessions})

    def _read_sessions(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        content = read_json(self.path, "the record of the run")
        sessions = content.get("sessions") if type(content) is dict else None
        if type(sessions) is not list or not all(
            type(each) is dict and _is_hours(each.get("hours")) for each in sessions
        ):
            raise DcrisError(f"{self.path} is not a record of a run's sessions; delete it to start a new one")
        return sessions


def _is_hours(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e9
