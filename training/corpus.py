"""The text corpus: the running Python's standard library and its language documentation.

Every Python installation carries this text, so the training run needs no download.  Files are divided by a hash of
their name into training and held-out text, the same way on every machine.
"""

from __future__ import annotations

import ast

from kvfold.quality.tasks.text import is_heldout_file, library_files, real_text


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
