"""What the tests of rivals share: the bundled model in float32, some tokens, and which packages are there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks.rivals.catalog import check_installed
from transformers import PreTrainedModel

from kvfold.engine.loading import load
from kvfold.errors import UnsupportedError

PROMPT = 320
TOKENS = 420


def float_model() -> PreTrainedModel:
    """The bundled model, in float32."""
    return load("bundled", dtype=torch.float32)[0]


def source_tokens() -> list[int]:
    """The beginning of one of torch's sources."""
    text = Path(torch.__file__).with_name("functional.py").read_text(encoding="utf-8")
    return load("bundled")[1].encode(text[:8000], add_special_tokens=False)[:TOKENS]


def bytes_per_token(model: PreTrainedModel) -> int:
    """Of a full cache."""
    config = model.config
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize


def needs(name: str) -> None:
    """Skips a test whose rival's packages are missing."""
    try:
        check_installed([name])
    except UnsupportedError as error:
        pytest.skip(f"{error.why}; see benchmarks/rivals/setup.sh")
