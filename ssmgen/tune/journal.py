"""Journal: what has been measured, one line of JSON a cell, so that a tuner that was stopped goes
on where it was."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from ..errors import ConfigError

__all__ = ["Journal"]

SCHEMA = 2
# Seconds between two times that what was written is forced to the disk, which takes milliseconds.
SYNC = 1.0


class Journal:
    """The cells measured under `identity` (GPU, driver, versions), kept in the file `path`.

    A last line that was cut off is dropped. Raises `ConfigError` for a journal of another identity
    or a file that is none.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.cells: dict[str, dict[str, Any]] = {}
        head = {"journal": SCHEMA, "identity": identity}
        keep = self._read(head) if path.exists() else 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("r+b" if path.exists() else "wb")
        self._synced = -math.inf
        self._file.truncate(keep)
        self._file.seek(keep)
        if not keep:
            self._write(head)

    def _read(self, head: dict[str, Any]) -> int:
        """Take in the whole lines; the bytes they have."""
        keep = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file):
                try:
                    record = json.loads(line)
                except ValueError:
                    record = None
                if not line.endswith(b"\n") or not isinstance(record, dict):
                    if number and not file.read(1):
                        break  # written when the power went
                    raise ConfigError(f"{self.path}: line {number + 1} is no line of a journal; "
                                      "remove the file to begin anew")  # fmt: skip
                if number == 0:
                    self._same(record, head)
                else:
                    self.cells[record["cell"]] = record
                keep += len(line)
        return keep

    def _same(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        if found.get("journal") != wanted["journal"]:
            raise ConfigError(
                f"{self.path}: not a journal of this version; remove it to begin anew"
            )
        theirs, ours = found.get("identity") or {}, wanted["identity"]
        for name in dict.fromkeys((*theirs, *ours)):
            if theirs.get(name) != ours.get(name):
                raise ConfigError(
                    f"{self.path}: {name}: measured with {theirs.get(name)!r}, here is "
                    f"{ours.get(name)!r}; remove it to begin anew, or write to another folder"
                )

    def add(self, record: dict[str, Any]) -> None:
        """Keep the record of the cell it names: in the file before this returns, so it outlives the
        process; forced to the disk by the first one a second after the last time, and by `close`.
        """
        self.cells[record["cell"]] = record
        self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        if time.monotonic() - self._synced >= SYNC:
            self._sync()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        try:
            self._sync()
        finally:
            self._file.close()
