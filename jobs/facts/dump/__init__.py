"""A fact dump read in batches: its rows judged, grouped by fact out of core, and settled.

Files are read in batches (``files``), rows are judged (``rows``, with the codes of ``problems``),
and the rows of each fact are grouped by hash (``partitions``, on sorted ``runs``) and settled
(``settle``). ``survey`` does all of this.
"""
