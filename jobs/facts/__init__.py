"""Fact dumps: reading, checking, comparing and converting tables of subject, relation and object.

A dump is read in batches (``dump``), its rows are judged (``rows``), and the rows of each fact are
grouped by hash (``partitions``) and settled (``settle``). ``check``, ``diff`` and ``convert`` build
on that.
"""
