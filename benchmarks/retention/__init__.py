"""Retention: scores by the share of tokens kept, our recipes beside kvpress's own implementation of the same method.

Run as ``python -m benchmarks.retention``; see README.md beside this file.
"""
