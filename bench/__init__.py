"""Measurements, never tests: nothing here passes or fails by time.

python -m bench                     # Cairn and its peers side by side: a page with charts, and JSON
python -m bench.snapshots           # backups alone
python -m bench.shipping            # a full backup beside restic's, and what a guest feels of it, by turns
python -m bench.repair              # what guests feel of a rebuild, how fast it is, how soon a node is back
python -m bench.scale               # a large volume, many snapshots, many volumes beside a small cluster
python -m bench.micro               # single parts, by pytest-benchmark, beside a stored baseline
"""
