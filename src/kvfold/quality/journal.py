"""What an evaluation has measured so far, in a file, so that an interrupted run can go on.

One JSON object a line: first the settings, then one for each finished unit of work, each on the disk before the next
begins.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from kvfold.errors import RequestError

__all__ = ["Journal", "journal_of"]

_HEADER: Final = "kvfold_eval_journal"


def journal_of(file: Path) -> Path:
    """Where the journal of a run lies whose result goes to ``file``."""
    return file.with_name(file.name + ".journal.jsonl")


class Journal:
    """Finished units by name. Without a ``file`` they are kept in memory only.

    ``fingerprint``: whatever decides the figures, as plain data. A file that is there is gone on with if it was made
    under an equal one, and refused otherwise (RequestError; the file stays as it was). ``resume=False`` begins anew.
    """

    def __init__(self, file: Path | None, fingerprint: Mapping[str, Any], *, resume: bool = True) -> None:
        self.file = file
        self._units: dict[str, Any] = {}
        self._handle: int | None = None
        header = {_HEADER: json.loads(json.dumps(fingerprint))}
        if file is None:
            return
        kept = 0
        if resume and file.exists():
            kept = self._read(file, header[_HEADER])
        try:
            self._handle = os.open(file, os.O_WRONLY | os.O_CREAT, 0o644)
            os.ftruncate(self._handle, kept)  # half a line, where a run was killed while it wrote
            os.lseek(self._handle, kept, os.SEEK_SET)
            if not kept:
                self._append(header)
        except OSError as error:
            raise RequestError(f"cannot write {file}", why=error.strerror or str(error)) from error

    def __len__(self) -> int:
        return len(self._units)

    def __contains__(self, unit: str) -> bool:
        return unit in self._units

    def __getitem__(self, unit: str) -> Any:
        return self._units[unit]

    def get(self, unit: str) -> Any:
        """The result of a unit; None if it is not finished."""
        return self._units.get(unit)

    def add(self, unit: str, result: Any) -> None:
        """A unit is finished; ``result`` is plain data."""
        self._units[unit] = result
        self._append({"unit": unit, "result": result})

    def close(self) -> None:
        """Keeps the file, to go on with later."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def remove(self) -> None:
        """The run is over and its result safe: the file goes."""
        self.close()
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._handle is not None:
            data = memoryview((json.dumps(line, allow_nan=False) + "\n").encode())
            while data:
                data = data[os.write(self._handle, data) :]
            os.fsync(self._handle)

    def _read(self, file: Path, fingerprint: Mapping[str, Any]) -> int:
        """Takes in what is there; the length of its whole lines in bytes."""
        try:
            whole, _, _ = file.read_bytes().rpartition(b"\n")
            lines = [json.loads(line) for line in whole.splitlines()]
            found = lines[0][_HEADER] if lines else fingerprint
            units = {line["unit"]: line["result"] for line in lines[1:]}
        except OSError as error:
            raise RequestError(f"cannot read {file}", why=error.strerror or str(error)) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            hint = "give --no-resume to begin anew, or another --json"
            raise RequestError(f"{file}", why="it is not the journal of an evaluation", hint=hint) from error
        if differences := _differences(found, fingerprint):
            raise RequestError(
                f"{file} is of a run with other settings",
                why="; ".join(differences),
                hint="go on with the settings of then, or give --no-resume to begin anew, or another --json",
            )
        self._units = units
        return len(whole) + 1 if lines else 0


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs, one clause each, with the names of what lies deeper."""
    clauses: list[str] = []
    for name in dict.fromkeys([*found, *wanted]):
        then, now = found.get(name), wanted.get(name)
        if isinstance(then, Mapping) and isinstance(now, Mapping):
            clauses += _differences(then, now, f"{prefix}{name}.")
        elif then != now:
            clauses.append(f"{prefix}{name} was {_short(then)} and is {_short(now)}")
    return clauses


def _short(value: Any, limit: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
