"""The user-facing layer: command line, job files, fact dumps, schedules and the demo."""
