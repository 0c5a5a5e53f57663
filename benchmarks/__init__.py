"""Timings of the parts that cost, for example ``python -m benchmarks.targets``.

Each compares with the plain form of the method in the same run, and prints a table.
"""
