"""Encoding and decoding of records, checksums included."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.micro.records import record, write
from blockstore.record import Operation, decode_record

SHAPES = {
    "1 block": [write(7)],
    "32 scattered blocks": [write(number * 9) for number in range(32)],
    "1 MiB": [write(0, 256)],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.benchmark(group="encode a record")
def test_encode(benchmark: BenchmarkFixture, shape: str) -> None:
    operations: list[Operation] = SHAPES[shape]
    assert benchmark(record, 1, operations).sequence == 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.benchmark(group="decode and verify a record")
def test_decode(benchmark: BenchmarkFixture, shape: str) -> None:
    encoded = record(1, SHAPES[shape]).encoded
    assert benchmark(decode_record, encoded).encoded == encoded
