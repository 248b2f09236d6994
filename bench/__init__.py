"""Measurements, never tests: nothing here passes or fails by time.

python -m bench                     # Cairn and its peers side by side, over NBD
python -m pytest bench/micro        # single parts, by pytest-benchmark
"""
