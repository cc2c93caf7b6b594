"""Where the local tasks find their documents: beside this file, without the hub and without its cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset


def _read(name: str) -> dict[str, Dataset]:
    lines = (Path(__file__).parent / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def lookup(**_: Any) -> dict[str, Dataset]:
    """Questions with their answers."""
    return _read("lookup")


def choice(**_: Any) -> dict[str, Dataset]:
    """Questions with four answers, one of them right."""
    return _read("choice")
