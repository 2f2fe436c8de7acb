"""Hyperparameters tuned while the network trains: STN, Delta-STN, what lies between."""

from metax.stn.hparams import HyperparameterSpace, constrain, entropy, unconstrain
from metax.stn.loop import DeltaSTN, centered_stn, delta_stn, stn
from metax.stn.nodes import (
    DenseResponse,
    LowRankResponse,
    NoResponse,
    RowResponse,
    TiedRowResponse,
)
from metax.stn.response import Response, best_response, check_response
from metax.stn.states import (
    DeltaSTNInfo,
    DeltaSTNState,
    natural_hparams,
    replace_hparams,
    response_jacobian,
    silent_hparams,
)

__all__ = [
    "DeltaSTN",
    "DeltaSTNInfo",
    "DeltaSTNState",
    "DenseResponse",
    "HyperparameterSpace",
    "LowRankResponse",
    "NoResponse",
    "Response",
    "RowResponse",
    "TiedRowResponse",
    "best_response",
    "centered_stn",
    "check_response",
    "constrain",
    "delta_stn",
    "entropy",
    "natural_hparams",
    "replace_hparams",
    "response_jacobian",
    "silent_hparams",
    "stn",
    "unconstrain",
]
