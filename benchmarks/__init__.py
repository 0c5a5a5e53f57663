"""Timings of the expensive parts, for example ``python -m benchmarks.targets``.

Most compare with the plain form of the method in the same run, and print a table.
"""
