"""Costs of single parts, by pytest-benchmark.

python -m bench.micro               # the table; --compare: beside the baseline; --save: makes that anew
python -m pytest bench/micro        # pytest-benchmark's own tables, with all of its options

Each function is one figure; the group says what one call of it does. What makes figures of two machines comparable
stands in calibration.py, what a baseline is in baseline.py.
"""
