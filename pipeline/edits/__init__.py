"""Saved edits put on a checkpoint and taken off again, with a record of what a model carries."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
