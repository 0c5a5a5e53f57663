"""Tasks of lm-evaluation-harness (the package ``lm_eval``), which measure general abilities.

The process that runs a job reads the tasks, builds their requests and computes the metrics; the
workers only answer requests (`pipeline.harness.answering`). The library takes seconds to import,
so it is imported when a job asks for it, by `pipeline.harness.library` and the workers alone.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
