"""The stages of a run; each reuses what the run folder already has, and does only the rest.

    templates ─▶ second moments ─▶ targets ─▶ measure before ─▶ update ─▶ publish ─▶ measure after

Targets and measurements have modules of their own (`pipeline.stages.targets`,
`pipeline.stages.measurement`). Either measurement is followed by that of general abilities, if the
job names tasks (`pipeline.stages.harness`). If a job asks for it, the facts that the base model
already knows are found before the targets (`pipeline.stages.known`), and checked again at the end.
The plan alone decides what is computed together, never the workers.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
