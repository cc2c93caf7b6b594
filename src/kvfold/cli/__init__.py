"""The ``kvfold`` command, a module for each verb. Data on stdout, progress and errors on stderr."""

from __future__ import annotations

from kvfold.cli.application import app, main

__all__ = ["app", "main"]
