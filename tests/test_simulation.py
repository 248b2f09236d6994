"""The replication core in its simulation: whole, replayed, and broken on purpose.

`python -m tests.simulation --seeds A:B` runs more seeds; a failure prints the command that replays it.
"""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.simulation.mutations import MUTATIONS, mutated
from tests.simulation.run import Outcome, run_seed

#: Nothing here waits for anything: it takes what it takes of a processor that others use as well.
pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parent.parent
#: More of them by the command: python -m tests.simulation --seeds 0:100000
SEEDS = 5_000
FEW_SEEDS = 300
#: No mutation may survive more seeds than this.
MUTATION_SEEDS = 1_500
#: Where to look first for what only one seed in hundreds or thousands meets: short of one that met it. Where the core
#: has changed since, another one does, some time later.
FIRST_SEED = {
    "believe_that_an_old_copy_acked_what_is_known": 400,
    "forget_what_waited_for_a_failed_checkpoint": 170,
    "forget_while_filling_that_the_source_ended": 220,
    "keep_a_source_that_ended_at_the_peer": 140,
    "leave_fills_out_of_a_delta": 140,
    "merge_while_filling": 7_780,
    "merge_zeroes_over_a_source": 370,
    "read_from_a_replica_that_is_not_whole": 420,
    "read_from_who_is_leaving": 450,
    "read_tables_without_a_lease": 1_860,
    "settle_when_control_feels_like_it": 480,
    "settle_without_a_record_on_both": 2_000,
}

#: What a few hundred seeds must have met, or the simulation does not test what it says.
MUST_HAPPEN = {
    *("FetchLog", "FetchDelta", "ResetLog", "Checkpoint", "Commit"),
    *("RecordEntry", "SealEntry", "TruncateEntry", "FillingEntry", "WholeEntry"),
    *("Serving", "Completed", "Sealed", "ReadDone", "ReadDropped", "Relieved", "Reconnect", "Over"),
    *("Fenced", "QuorumUnavailable", "NoSpace", "Corrupt"),
    *("merged", "hydrated", "no room", "held for room", "settled", "lost for good", "tables read"),
}


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return [run_seed(seed) for seed in range(FEW_SEEDS)]


def violations(outcomes: Iterable[Outcome]) -> list[str]:
    return [f"seed {outcome.seed}: {outcome.violation}" for outcome in outcomes if outcome.violation]


def test_the_unbroken_core_keeps_its_promises(outcomes: list[Outcome]) -> None:
    assert violations(outcomes) == []


def test_the_simulation_meets_what_it_is_there_for(outcomes: list[Outcome]) -> None:
    seen = sum((Counter(outcome.seen) for outcome in outcomes), Counter[str]())
    assert {name for name in MUST_HAPPEN if not seen[name]} == set()
    assert sum(outcome.completed for outcome in outcomes) > 30 * FEW_SEEDS


def test_a_seed_replays_exactly_whatever_the_hash_seed_is() -> None:
    script = "from tests.simulation.run import run_seed\nfor seed in (3, 17, 40): print(run_seed(seed, tracing=True))"
    traces = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=ROOT,
            check=True,
            capture_output=True,
            timeout=280,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert len(traces[0]) > 10_000
    assert traces[0] == traces[1]


@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_a_broken_core_is_caught(name: str) -> None:
    with mutated(name):
        first = FIRST_SEED.get(name, 0)
        caught = next((seed for seed in range(first, first + MUTATION_SEEDS) if run_seed(seed).violation), None)
    assert caught is not None, f"{name} survived {MUTATION_SEEDS} seeds"


@pytest.mark.timeout(900)
def test_thousands_of_seeds() -> None:
    command = [sys.executable, "-m", "tests.simulation", "--seeds", f"{FEW_SEEDS}:{FEW_SEEDS + SEEDS}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=880, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
