"""Running the command line within the test's process."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from kvfold.cli import main


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *verb: str) -> Callable[..., Done]:
    """What runs ``kvfold``, or one ``verb`` of it, with arguments and a text for stdin."""

    def run(*arguments: object, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "argv", ["kvfold", *verb, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as done:
            main()
        out = capsys.readouterr()
        return Done(int(done.value.code or 0), out.out, out.err)

    return run
