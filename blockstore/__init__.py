"""Cairn's block store: nouns, replication, storage, node, volume, control, and the cairn command.

Every process of Cairn comes through here before it imports gRPC, which reads its settings from the
environment once. Since 1.80 gRPC for Python hands each message through a pool of threads of its own
("event engine"); without them a message costs a node and a front-end half the CPU: 4 KiB writes at
depth 1 went from 536 to 750 IOPS, at depth 32 from 5,300 to 7,500. Who sets GRPC_EXPERIMENTS is
obeyed. Source: gRPC, doc/environment_variables.md.
"""

import os

os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
