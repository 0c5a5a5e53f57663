"""Facts from Wikidata: entities of its JSON dumps, and the pages of its incremental dumps.

``pages`` reads incremental dumps, ``entities`` decodes entities, ``statements`` and ``values``
decide what an entity states today, ``labels`` names the objects, and ``staging`` writes it all as a
fact dump.
"""
