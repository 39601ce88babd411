"""Ours, the peers and the physical floor on the same problem, interleaved, with the error beside the time.

``python -m benchmarks [CASE...] [--quick] [--out DIRECTORY]``; see README.md in this folder.
"""
