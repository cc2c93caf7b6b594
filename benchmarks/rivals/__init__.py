"""Rivals: other ways to hold a smaller cache, on exactly the work that ``kvfold eval`` gives our recipes.

Run as ``python -m benchmarks.rivals``; see README.md beside this file.
"""
