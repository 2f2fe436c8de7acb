"""Learned schedules: which loss to step on, and what it moves, decided step by step."""

from metax.autoloss import features
from metax.autoloss.combining import joint, projected
from metax.autoloss.controllers import (
    BoundState,
    Controller,
    ControllerSpec,
    bind,
    context_free,
    controller,
    leaky_relu,
)
from metax.autoloss.decisions import Decision, Observation, Policy
from metax.autoloss.features import Features, FeatureSpec, frozen, running_norm
from metax.autoloss.files import SavedController, load_controller, save_controller
from metax.autoloss.loop import autoloss, guide
from metax.autoloss.names import action_names
from metax.autoloss.policy_gradient import ppo_loss, reinforce_loss
from metax.autoloss.restarts import Restart, any_of, divergence, identical_actions
from metax.autoloss.rewards import SegmentReward, StepReward, improvement, segment
from metax.autoloss.rollouts import EpisodeResult, Trajectory, rollout
from metax.autoloss.schedules import always, bernoulli, cycle, phases, threshold
from metax.autoloss.segments import PPO
from metax.autoloss.states import (
    AutoLossInfo,
    AutoLossState,
    GuideInfo,
    GuideState,
    OnlineState,
)
from metax.autoloss.weighting import (
    dynamic_weight_average,
    grad_norm,
    random_weights,
    uncertainty_weighting,
)

__all__ = [
    "PPO",
    "AutoLossInfo",
    "AutoLossState",
    "BoundState",
    "Controller",
    "ControllerSpec",
    "Decision",
    "EpisodeResult",
    "FeatureSpec",
    "Features",
    "GuideInfo",
    "GuideState",
    "Observation",
    "OnlineState",
    "Policy",
    "Restart",
    "SavedController",
    "SegmentReward",
    "StepReward",
    "Trajectory",
    "action_names",
    "always",
    "any_of",
    "autoloss",
    "bernoulli",
    "bind",
    "context_free",
    "controller",
    "cycle",
    "divergence",
    "dynamic_weight_average",
    "features",
    "frozen",
    "grad_norm",
    "guide",
    "identical_actions",
    "improvement",
    "joint",
    "leaky_relu",
    "load_controller",
    "phases",
    "ppo_loss",
    "projected",
    "random_weights",
    "reinforce_loss",
    "rollout",
    "running_norm",
    "save_controller",
    "segment",
    "threshold",
    "uncertainty_weighting",
]
