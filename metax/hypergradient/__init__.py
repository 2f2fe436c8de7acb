"""Learning rates that learn themselves while the model trains.

`hypergradient_descent` puts the rule of Baydin et al. (ICLR 2018) around any optax
transformation; `sgd_hd`, `adam_hd` and `adamw_hd` are ready-made. `hdm_hb` learns a
step for each parameter on full batches. `check_hypergradient` tests your own chain.
"""

from metax.hypergradient.check import check_hypergradient
from metax.hypergradient.descent import (
    HypergradientDescentState,
    adam_hd,
    adamw_hd,
    hypergradient_descent,
    sgd_hd,
)
from metax.hypergradient.hdm import HDMHBState, hdm_hb

__all__ = [
    "HDMHBState",
    "HypergradientDescentState",
    "adam_hd",
    "adamw_hd",
    "check_hypergradient",
    "hdm_hb",
    "hypergradient_descent",
    "sgd_hd",
]
