"""Weights partitioned by DeepSpeed ZeRO-3: slices, loading, collectives, and a rank's update."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
