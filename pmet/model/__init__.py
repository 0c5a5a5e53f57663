"""Access to a model: its parts, its tokens, forward passes that stop, resume or are changed."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
