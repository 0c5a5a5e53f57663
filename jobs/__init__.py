"""What people touch: the command line, job files, fact dumps, schedules and the demo."""
