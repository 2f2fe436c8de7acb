"""One learned optimizer out of a pool, and it is an optax rule."""

from metax.amalgamation import distill, perturb, teachers
from metax.amalgamation.artifacts import (
    load,
    load_artifact,
    pretrained,
    save_artifact,
)
from metax.amalgamation.choosing import ChoiceState, choice, choice_weights
from metax.amalgamation.clipping import clip_by_weight_norm
from metax.amalgamation.decisions import (
    PAPER_STAGES,
    PeriodRecord,
    Settings,
    Stage,
    decide,
)
from metax.amalgamation.hierarchical import scale
from metax.amalgamation.imitation import imitate
from metax.amalgamation.loop import amalgamate, release_settings
from metax.amalgamation.periods import CurriculumResult, curriculum
from metax.amalgamation.policies import (
    LearnedOptimizer,
    RecurrentState,
    l2l,
    rnnprop,
)
from metax.amalgamation.states import AmalgamationInfo, AmalgamationState
from metax.amalgamation.teachers import pool
from metax.amalgamation.validation import Gate, long_horizon_gate, validation_loss
from metax.amalgamation.warmup import WarmupState, with_warmup

__all__ = [
    "PAPER_STAGES",
    "AmalgamationInfo",
    "AmalgamationState",
    "ChoiceState",
    "CurriculumResult",
    "Gate",
    "LearnedOptimizer",
    "PeriodRecord",
    "RecurrentState",
    "Settings",
    "Stage",
    "WarmupState",
    "amalgamate",
    "choice",
    "choice_weights",
    "clip_by_weight_norm",
    "curriculum",
    "decide",
    "distill",
    "imitate",
    "l2l",
    "load",
    "load_artifact",
    "long_horizon_gate",
    "perturb",
    "pool",
    "pretrained",
    "release_settings",
    "rnnprop",
    "save_artifact",
    "scale",
    "teachers",
    "validation_loss",
    "with_warmup",
]
