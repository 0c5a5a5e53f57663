"""What people touch: the command line, job files and the demo."""
