"""Facts in tables that are not Parquet: CSV and JSON Lines (``text``), ``datasets`` folders
(``arrow``), Delta and Iceberg tables (``lakes``). They are staged as Parquet.
"""
