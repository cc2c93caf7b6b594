"""The text corpus: the running Python's standard library and its language documentation.

Every Python installation carries this text, so the training run needs no download.  Files are divided by a hash of
their name into training and held-out text, the same way on every machine.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from pathlib import Path

from kvfold.quality.tasks import real_text

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


def is_heldout_file(name: str) -> bool:
    """Whether a standard library file is kept for measuring perplexity (about one in forty)."""
    return hashlib.sha256(name.encode()).digest()[0] < 6


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


def docstrings(source: str) -> str:
    """The longer docstrings of a source file, one after the other."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(text for text in texts if len(text) > 120)


def training_texts() -> list[str]:
    """Texts to train on: documentation, docstrings (prose) and sources (code)."""
    texts = [real_text()]
    for name, source in library_files():
        if not is_heldout_file(name):
            texts.append(docstrings(source))
            texts.append(source)
    return [text for text in texts if text]


def heldout_texts() -> list[str]:
    """Sources no training text was taken from, for perplexity."""
    return [source for name, source in library_files() if is_heldout_file(name)]
