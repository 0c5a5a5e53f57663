"""The worker that holds a model, and the executors that run workers on Ray or in this process."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
