"""Input data: tables of requests, corpora, and how they are split into shards."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
