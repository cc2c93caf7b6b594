"""Real text that every Python installation carries: its documentation, and the sources of its standard library."""

from __future__ import annotations

import hashlib
import re
import sysconfig
from pathlib import Path

from kvfold.errors import RequestError

__all__ = ["heldout_text", "is_heldout_file", "library_files", "passages_of", "read_text", "real_text"]

# Tables and generated code teach nothing about text; third-party packages have other licences.
_SKIP = (
    "site-packages",
    "test/",
    "tests/",
    "encodings/",
    "idlelib/",
    "lib2to3/",
    "pydoc_data/",
    "lib-dynload/",
    "turtledemo/",
)


def real_text() -> str:
    """The running Python's own language documentation."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name].strip() for name in sorted(topics.topics))


def read_text(file: Path | None) -> str:
    """The text of a UTF-8 file; without one, sources of Python's standard library."""
    if file is None:
        return heldout_text()
    try:
        return file.read_text(encoding="utf-8")
    except IsADirectoryError:
        why = "it is a folder"
    except FileNotFoundError:
        why = "no such file"
    except UnicodeDecodeError:
        why = "it is not UTF-8"
    except OSError as error:
        why = error.strerror or str(error)
    raise RequestError(f"text {file}", why=why, hint="give a plain text file in UTF-8")


def heldout_text() -> str:
    """Standard library sources that the bundled model was not trained on."""
    return "\n\n".join(source for name, source in library_files() if is_heldout_file(name))


def library_files() -> list[tuple[str, str]]:
    """The standard library's sources as ``(relative name, text)``, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[tuple[str, str]] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(part in name for part in _SKIP):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if len(text) > 400:
            found.append((name, text))
    return found


def is_heldout_file(name: str) -> bool:
    """Whether a standard library file is kept out of training (about one in forty)."""
    return hashlib.sha256(name.encode()).digest()[0] < 6


def passages_of(text: str, minimum: int = 600) -> list[str]:
    """Cut a text at empty lines into passages of at least ``minimum`` characters."""
    passages: list[str] = []
    current: list[str] = []
    size = 0
    for paragraph in re.split(r"\n\s*\n", text):
        current.append(paragraph)
        size += len(paragraph)
        if size >= minimum:
            passages.append("\n\n".join(current))
            current, size = [], 0
    if current:
        passages.append("\n\n".join(current))
    return passages
