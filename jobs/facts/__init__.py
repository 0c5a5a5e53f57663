"""Fact dumps: tables of subject, relation and object, and what becomes of them.

A dump is read in batches (``dump``), its rows are judged (``rows``), rows of one fact are brought
together by hash (``partitions``) and settled (``settle``); on that stand ``check``, ``diff`` and
``convert``.
"""
