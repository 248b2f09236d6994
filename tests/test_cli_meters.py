"""Progress in words: amounts, rates, time left, and how often it is told."""

import io
import sys

import pytest

from blockstore.cli.meters import LINE_S, Amount, Rate, _Lines, describe, format_duration, meters

MIB = 1 << 20


@pytest.mark.parametrize(
    ("amount", "words"),
    [
        (Amount(0), "waiting"),
        (Amount(5 * MIB), "5 MiB"),
        (Amount(MIB, 4 * MIB), "1 MiB of 4 MiB (25%)"),
        (Amount(MIB, 4 * MIB, rate=MIB), "1 MiB of 4 MiB (25%), 1 MiB/s, 3 s left"),
        (Amount(4 * MIB, 4 * MIB, rate=MIB), "4 MiB of 4 MiB (100%), 1 MiB/s"),
        (Amount(1500, 3000, "objects", rate=100), "1,500 objects of 3,000 objects (50%), 100 objects/s, 15 s left"),
        (Amount(0, 4 * MIB, note="no node answers"), "0 B of 4 MiB (0%), no node answers"),
    ],
)
def test_words(amount: Amount, words: str) -> None:
    assert describe(amount) == words


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (59.4, "59 s"), (200, "3 min 20 s"), (3599.9, "1 h 0 min"), (7500, "2 h 5 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_a_rate_is_that_of_the_last_seconds() -> None:
    now = 0.0
    rate = Rate(lambda: now)
    assert rate.after(0) is None
    now = 1.0
    assert rate.after(10) == 10
    for second in range(2, 20):
        now = float(second)
        assert rate.after(10 + 100 * (second - 1)) is not None
    assert rate.after(10 + 100 * 18) == pytest.approx(100)
    assert rate.after(0) is None  # another phase


def test_lines_come_now_and_then_and_at_the_end() -> None:
    now, told = 0.0, list[str]()
    lines = _Lines(lambda: now, told.append)
    for percent in range(101):
        now = percent * LINE_S / 20
        lines.update("x", Amount(percent * MIB, 100 * MIB))
    assert len(told) == 6
    assert told[-1] == "x: 100 MiB of 100 MiB (100%)"
    lines.update("y", Amount(0, 1))
    lines.update("y", Amount(0, 1, note="paused"))
    assert told[-2:] == ["y: 0 B of 1 B (0%)", "y: 0 B of 1 B (0%), paused"]


def test_bars_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with meters() as show:
        show.update("snap-1", Amount(MIB, 4 * MIB, rate=MIB))
        show.update("snap-1", Amount(2 * MIB, 4 * MIB, rate=MIB, note="[red]"))
    assert "2 MiB of 4 MiB (50%), 1 MiB/s, 2 s left, [red]" in terminal.getvalue()
