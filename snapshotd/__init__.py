"""Snapshots in object storage: their stored format, shipping, hydration, pruning.

The format (docs/format.md) is pure code: `crypto`, `frame`, `pack`, `index`, `manifest`, `root` and
`quarantine` take bytes and give values; randomness and time are passed in.
"""
