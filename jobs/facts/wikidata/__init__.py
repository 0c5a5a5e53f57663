"""Facts from Wikidata: entities of its JSON dumps, and the pages of its incremental dumps.

``lines`` and ``pages`` read the files, ``entities`` decodes them, ``statements`` and ``values``
decide what an entity states today, ``labels`` names the objects, and ``staging`` writes it all as a
fact dump.
"""
