"""Parts of `benchmark.py`: the processes that are timed, what they run, and the comparison of results."""
