"""Costs of single parts, by pytest-benchmark: python -m pytest bench/micro

Each function is one figure; the group says what one call of it does. `--benchmark-json FILE` keeps
the figures, `--benchmark-disable` runs each once to see that it works.
"""
