"""Pushes: a published model or an exported edit, with its card, to a hub or to any storage."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
