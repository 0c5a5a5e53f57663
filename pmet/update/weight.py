"""λ, the weight of the second moment: a number, or a share of the scale of the keys.

Shape letters: E requests, K key width; X experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from pmet.hparams import PMETHyperParams


class KeyPower(NamedTuple):
    """The size of collected keys.

    Attributes:
        total: sum of their squared norms.
        keys: their number.
    """

    total: float
    keys: int


def update_weight(hparams: PMETHyperParams, power: KeyPower, moment: torch.Tensor) -> float:
    """λ of a layer.

    With ``mom2_update_share`` s it is

        λ = s · ‖k‖² / (tr C / K)        (‖k‖²: the mean over the requests' keys)

    so that the mean eigenvalue of λC is s times a key's squared norm. If C were a multiple of the
    identity, the update of a single request would take up 1 / (1 + s) of its residual. The scale is
    that of one key: the number of requests, the width of the layer and the size of its activations
    change it in proportion or not at all, so the same share suits all of them.

    Args:
        hparams: the hyper-parameters.
        power: of the keys of all requests.
        moment: C, (K, K); with experts (X, K, K), which count as one matrix of X·K dimensions.
    """
    if hparams.mom2_update_share is None:
        return hparams.mom2_update_weight
    traces = moment.diagonal(dim1=-2, dim2=-1).double()
    mean_eigenvalue = traces.mean().item()
    if not (mean_eigenvalue > 0 and power.keys):
        return hparams.mom2_update_share
    return hparams.mom2_update_share * power.total / power.keys / mean_eigenvalue
