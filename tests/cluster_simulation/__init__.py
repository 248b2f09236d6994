"""A whole cluster in one process, in virtual time: each daemon's own `run`, on a simulated network, clock and disk.

    python -m tests.cluster_simulation --seeds 0-99
    python -m tests.cluster_simulation --mutations

What runs is the code that ships: the nodes with their journals and tables, the front-ends with their NBD servers,
control with the embedded metastore or several controls with their client of etcd, snapshotd with a directory as its
object store. What is not: gRPC's transport (rpc.py and server.py carry the same serialized messages between the same
handlers, over network.py), sockets and threads (loop.py), the journal's thread (journal.py) and its disk (disk.py),
etcd itself (etcd.py), and the machine's clocks (machine.py). All chance comes from one seed, so a failure is replayed
by its number.

    faults.py   what goes wrong, several things at once      users.py    what people do meanwhile: snapshots, moves...
    client.py   guests that read and write                   model.py    what their blocks may show
    guests.py   volumes and snapshots with their models      checks.py   what holds when all faults are over
    run.py      one simulation                               mutations.py    rules to break, which must be found out

A process that is killed leaves its files as they are, or without what it had not synced; nothing that it does
afterwards reaches anybody (processes.py).
"""
