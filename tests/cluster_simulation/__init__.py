"""A whole cluster in one process, in virtual time: each daemon's own `run`, on a simulated network, clock and disk.

    python -m tests.cluster_simulation --seeds 0-99

What runs is the code that ships: the nodes with their journals and tables, the front-ends with their NBD servers,
control with its metastore, snapshotd with a directory as its object store. What is not: gRPC's transport (rpc.py
carries the same serialized messages between the same handlers), sockets and threads (loop.py), the journal's thread
(journal.py), and the machine's clocks (machine.py). All chance comes from one seed, so a failure is replayed by its
number.

A process that is killed leaves its files as they are; nothing that it does afterwards reaches anybody (processes.py).
"""
