"""`python -m bench.shipping`: a round of it, small, and its table."""

from pathlib import Path

import pytest

from bench.shipping import Round, main, rows_of
from tests.programs import require_programs

pytestmark = pytest.mark.timeout(240)


def test_ratios_are_those_of_each_round() -> None:
    rounds = [Round(2.0, 1.0, 4.0, 8.0), Round(1.0, 2.0, 4.0, 4.0), Round(1.0, 1.5, 2.0, 6.0)]
    assert rows_of(rounds)[0] == ["1", "2.00 s", "1.00 s, 0.50", "4.0 ms", "8.0 ms, 2.00"]
    assert rows_of(rounds)[-1] == ["median of ratios", "", "1.50", "", "2.00"]


def test_one_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require_programs("restic", "fio", "nbdcopy")
    assert main(["--size", "16M", "--rounds", "1", "--directory", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("| image of 16 MiB | restic | cairn |")
    assert not list(tmp_path.iterdir())
