"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# How long an example takes says something about the machine, and nothing about kvfold.
settings.register_profile("kvfold", deadline=None)
settings.load_profile("kvfold")
