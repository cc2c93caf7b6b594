"""Benchmarks: speed as a ratio against a named rival in the same run, after a correctness gate, beside the physical
limit.
"""
