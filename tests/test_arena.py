"""The memory that pages lie in, and how OpenMP's threads are told to wait."""

from __future__ import annotations

import torch

from kvfold.codecs.pages import ArenaMemory
from kvfold.telemetry import calm_openmp


def test_an_arena_is_blank_and_writable() -> None:
    arena = ArenaMemory(5 << 20, torch.device("cpu")).bytes
    assert arena.shape == (5 << 20,)
    assert arena.dtype == torch.uint8
    assert not arena.any()
    arena[-3:] = 7
    assert arena[-4:].tolist() == [0, 7, 7, 7]
    assert ArenaMemory(0, torch.device("cpu")).bytes.numel() == 0


def test_openmp_is_calmed_unless_a_person_has_said_otherwise() -> None:
    blank: dict[str, str] = {}
    calm_openmp(blank)
    assert int(blank["GOMP_SPINCOUNT"]) > 0
    for set_by_hand in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}):
        environ = dict(set_by_hand)
        calm_openmp(environ)
        assert environ == set_by_hand
