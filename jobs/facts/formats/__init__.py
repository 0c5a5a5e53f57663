"""Public data sets of edits, read record by record: one module per format."""
