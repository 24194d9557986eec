"""The progress bar: after a second on a terminal, never elsewhere, and it loses no item."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from shrank.util import progress


@pytest.fixture
def terminal(monkeypatch) -> io.StringIO:
    """Standard error as a terminal that records what is written to it."""
    written = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=written, force_terminal=True, width=80))
    return written


def test_silent_where_there_is_no_terminal(capsys) -> None:
    assert list(progress.track(range(3), "counting")) == [0, 1, 2]
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_shown_when_it_takes_long(terminal: io.StringIO, monkeypatch) -> None:
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    assert list(progress.track([1, 2, 3], "counting")) == [1, 2, 3]
    assert "counting" in terminal.getvalue()


def test_hidden_while_it_is_quick(terminal: io.StringIO) -> None:
    assert list(progress.track([1, 2, 3], "counting")) == [1, 2, 3]
    assert "counting" not in terminal.getvalue()
