"""The run folder: its record, its lease, and which files in it belong to the run."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
