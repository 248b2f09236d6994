"""Every benchmark's figure carries what its calibration took beside it (calibration.py)."""

from collections.abc import Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.micro.baseline import CALIBRATION
from bench.micro.calibration import CALIBRATED_S, Calibration


@pytest.fixture(autouse=True)
def calibration(benchmark: BenchmarkFixture) -> Iterator[Calibration]:
    made = Calibration(0 if benchmark.disabled else CALIBRATED_S)
    made.before_and_after()
    yield made
    made.before_and_after()
    benchmark.extra_info[CALIBRATION] = made.seconds
