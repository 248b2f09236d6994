"""Cairn's block store: nouns, replication, storage, node, volume, control, and the cairn command."""
