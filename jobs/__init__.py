"""What people touch: the command line, job files, fact dumps and the demo."""
