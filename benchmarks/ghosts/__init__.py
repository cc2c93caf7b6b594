"""The experiment that decides whether dropped tokens are worth keeping at 2 bits: ``python -m benchmarks.ghosts``."""
