"""Faults that a test brings about, and the witnesses that say whether anything acknowledged was lost.

`python -m tests.faults --help` runs them for as long as you like; docs/reliability.md says what was found.
"""
