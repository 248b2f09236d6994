"""Records read from the journal for a peer: in pieces, while files are reused, and never what rotted."""

import random
import threading
from pathlib import Path

from blockstore.storage.journal_format import PAGE
from blockstore.units import MIB
from tests.journal_cases import FILE_BYTES, ReplicaLog, read_all, reopen, replica, sequence

A, B, C = replica(1), replica(2), replica(3)


def test_records_are_read_for_a_peer_in_pieces(tmp_path: Path) -> None:
    journal, _ = reopen(tmp_path, {A: 0, B: 0}, max_bytes=4 * FILE_BYTES)
    log, other = ReplicaLog(A), ReplicaLog(B)
    for _ in range(12):
        last = journal.append([log.write(blocks=1), other.write(), log.write()])
    held = log.records[:]
    assert read_all(journal, A, 0, 24) == held
    assert read_all(journal, A, 5, 20) == held[5:20]
    assert read_all(journal, A, 5, 99) == held[5:]
    assert journal.read_records(A, sequence(24), sequence(30), MIB) is None
    assert journal.read_records(A, sequence(7), sequence(7), MIB) == []
    assert journal.read_records(C, sequence(0), sequence(1), MIB) is None
    limited = journal.read_records(A, sequence(0), sequence(24), 5000)
    assert limited == held[:2]
    # Released files serve until they are reused.
    journal.release(A, last)
    journal.release(B, last)
    assert read_all(journal, A, 0, 24) == held
    while journal.read_records(A, sequence(0), sequence(1), MIB) is not None:
        last = journal.append([log.write(blocks=1)])
        journal.release(A, last)
    newest = log.records[-1].sequence
    assert read_all(journal, A, newest - 3, newest) == log.records[-3:]
    journal.close()
    # A start took the released file for its own and moved the newest group there.
    journal, _ = reopen(tmp_path, {A: last, B: last})
    assert read_all(journal, A, newest - 1, newest) == log.records[-1:]


def test_records_that_rot_took_are_not_given_out(tmp_path: Path) -> None:
    journal, _ = reopen(tmp_path, {A: 0})
    log = ReplicaLog(A)
    for _ in range(6):
        journal.append([log.write(blocks=1)])
    path = next(tmp_path.iterdir())
    content = bytearray(path.read_bytes())
    content[2 * PAGE + 3 * 2 * PAGE + 1000] ^= 1
    path.write_bytes(content)
    assert read_all(journal, A, 0, 6) == log.records[:3]
    assert journal.read_records(A, sequence(3), sequence(6), MIB) is None
    assert read_all(journal, A, 4, 6) == log.records[4:]


def test_a_peer_reads_while_files_are_reused(tmp_path: Path) -> None:
    journal, _ = reopen(tmp_path, {A: 0}, max_bytes=3 * FILE_BYTES)
    log = ReplicaLog(A)
    wrong: list[str] = []
    stop = threading.Event()

    def read() -> None:
        chance = random.Random(1)
        while not stop.is_set():
            after = chance.randrange(max(1, len(log.records) - 3))
            found = journal.read_records(A, sequence(after), sequence(after + 9), MIB)
            if found is not None and found != log.records[after : after + len(found)]:
                wrong.append(f"after {after}: {[record.sequence for record in found]}")

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(400):
            last = journal.append([log.write(blocks=1)])
            journal.release(A, last)
    finally:
        stop.set()
        reader.join()
    assert wrong == []
    journal.close()
