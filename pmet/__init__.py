"""PMET: precise, batched knowledge editing of transformer language models.

The method alone, in one process: requests and hyper-parameters in, weight changes out (Li et al.
2023, *PMET: Precise Model Editing in a Transformer*, arXiv 2308.08742). The pipeline package runs
the same parts on a cluster.

    requests = [EditRequest("The capital of {} is", "France", "Lyon")]
    hparams = PMETHyperParams.preset("gpt-j-6b")
    edit = compute_edit(model, tokenizer, requests, hparams, second_moments=moments)
    edit.apply(model)
"""

import lazy_loader

# Modules that need torch are imported on first use: a command that only reads files or reports an
# error does not wait for it.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
