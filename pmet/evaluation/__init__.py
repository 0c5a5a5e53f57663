"""Evaluation: what a model answers, how likely it finds texts, and the metrics of both."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
