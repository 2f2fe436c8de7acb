"""Rows of `metax.autoloss`."""

import jax
import jax.numpy as jnp

from metax import Action
from metax import autoloss as al
from metax.autoloss import features
from tests.autoloss.pairs import two_losses
from tests.inputs.cases import ABSENT, KEY, NAN, RAW, case, counts, numbers

PROBLEM = two_losses(reward=lambda history, live: -history[0])
SEEN = features.paper(2)
NET = al.controller(2, (4,))
CRITIC = al.controller(2, (4,), critic_hidden=(4,))
PHI = NET.init(KEY, SEEN.spec.size)
POLICY = al.cycle((1, 1))
DATA = jnp.ones(3)
LOOP = al.autoloss(PROBLEM, NET, features=SEEN, num_steps=2, num_rollouts=1)
GUIDE = al.guide(PROBLEM, POLICY, num_steps=2)
RUN = al.Trajectory(
    inputs=jnp.ones((2, SEEN.spec.size)),
    actions=jnp.zeros(2, int),
    log_probs=jnp.zeros(2),
    rewards=jnp.zeros(2),
    live=jnp.ones(2, bool),
)
BATCH = jax.tree.map(lambda x: x[None], RUN)
PROBLEMS = (
    ("problem", PROBLEM._replace(actions=()), "problem.actions="),
    ("problem", PROBLEM._replace(actions=(Action(2),)), "problem.actions[0].loss="),
    (
        "problem",
        PROBLEM._replace(actions=(Action(0, "u"),)),
        "problem.actions[0].params=",
    ),
    ("problem", PROBLEM._replace(actions=(Action(0, repeats=0),)), "repeats="),
    ("problem", PROBLEM._replace(init=lambda key: jnp.ones(3)), "problem.init="),
    ("problem", PROBLEM._replace(optimizers=3), "problem.optimizers="),
    (
        "problem",
        PROBLEM._replace(optimizer_sharing="none"),
        "problem.optimizer_sharing=",
    ),
    ("problem", PROBLEM._replace(validate_every=0), "problem.validate_every="),
    ("problem", PROBLEM._replace(patience=-1), "problem.patience="),
    ("problem", PROBLEM._replace(metric_decay=NAN), "problem.metric_decay="),
    ("problem", None, "problem="),
)
INDEX = (("action", -1), ("action", 0.5), *counts("num_losses"))

TABLE = {
    "autoloss.action_names": case(
        al.action_names, {"problem": PROBLEM}, ("problem", None)
    ),
    "autoloss.always": case(al.always, {"action": 0}, ("action", -1), ("action", 0.5)),
    "autoloss.any_of": case(
        lambda restarts: al.any_of(*restarts),
        {"restarts": (al.identical_actions(),)},
        ("restarts", ()),
        ("restarts", (3,)),
    ),
    "autoloss.autoloss": case(
        al.autoloss,
        {"problem": PROBLEM, "controller": NET, "features": SEEN, "num_steps": 2},
        *PROBLEMS,
        *counts("num_steps", "num_rollouts", "chunk"),
        *numbers("baseline_decay"),
        ("baseline_decay", 1.0),
        *numbers("entropy_coefficient", "advantage_clip"),
        ("reward_scale", NAN),
        *(
            (word, "none")
            for word in (
                "estimator",
                "advantage",
                "reduction",
                "baseline_order",
                "dispatch",
            )
        ),
        ("controller", al.controller(3)),
        ("controller", None),
        ("features", None),
        ("meta_optimizer", 0.1),
        ("step_reward", 3),
        ("restart", 3),
        ("ppo", 3),
    ),
    "autoloss.autoloss:init": case(LOOP.init, {"key": KEY}, ("key", RAW)),
    "autoloss.autoloss:step": case(
        LOOP.step, {"state": None, "key": KEY, "data": DATA}, ("key", RAW), runs=False
    ),
    "autoloss.autoloss:PPO": case(
        lambda **ppo: al.autoloss(
            PROBLEM,
            CRITIC,
            features=SEEN,
            num_steps=4,
            estimator="ppo",
            ppo=al.PPO(**ppo),
        ),
        {"segment_length": 2},
        *counts(
            "segment_length", "buffer_size", "batch_size", "num_updates", "sync_every"
        ),
        *numbers("discount", "clip", "value_coefficient", "epsilon"),
    ),
    "autoloss.bernoulli": case(
        al.bernoulli,
        {"p": 0.5},
        *numbers("p"),
        ("p", 1.5),
        ("p", jnp.array([0.5, 0.6])),
        ("p", jnp.ones((2, 2))),
    ),
    "autoloss.bind": case(
        al.bind,
        {"controller": NET, "phi": PHI, "features": SEEN},
        ("phi", {}),
        ("phi", NET.init(KEY, 3)),
        ("controller", None),
        ("features", None),
    ),
    "autoloss.context_free": case(
        al.context_free,
        {"num_actions": 2},
        *counts("num_actions"),
        *numbers("temperature", bad=(NAN, 0.0)),
    ),
    "autoloss.controller": case(
        al.controller,
        {"num_actions": 2},
        *counts("num_actions"),
        *numbers("temperature", bad=(NAN, 0.0)),
        ("hidden", (0,)),
        ("hidden", 3),
        ("critic_hidden", (0,)),
        ("activation", "none"),
    ),
    "autoloss.controller:init": case(
        NET.init, {"key": KEY, "num_features": 3}, ("key", RAW)
    ),
    "autoloss.cycle": case(
        al.cycle,
        {"counts": (1, 1)},
        ("counts", ()),
        ("counts", (0, 0)),
        ("counts", (-1, 1)),
        ("counts", 3),
    ),
    "autoloss.divergence": case(
        al.divergence,
        {"loss": 0, "above": 1.0},
        ("loss", -1),
        ("above", NAN),
        ("at_step", 0),
        ("penalty", NAN),
    ),
    "autoloss.dynamic_weight_average": case(
        al.dynamic_weight_average, {"num_losses": 2}, *INDEX, *numbers("temperature")
    ),
    "autoloss.grad_norm": case(
        al.grad_norm, {"num_losses": 2}, *INDEX, *numbers("alpha", "learning_rate")
    ),
    "autoloss.random_weights": case(al.random_weights, {"num_losses": 2}, *INDEX),
    "autoloss.uncertainty_weighting": case(
        al.uncertainty_weighting, {"num_losses": 2}, *INDEX, *numbers("learning_rate")
    ),
    "autoloss.guide": case(
        al.guide,
        {"problem": PROBLEM, "policy": POLICY, "num_steps": 2},
        *PROBLEMS,
        *counts("num_steps", "validate_every"),
        ("dispatch", "none"),
        ("policy", NET),
    ),
    "autoloss.guide:init": case(GUIDE.init, {"key": KEY}, ("key", RAW)),
    "autoloss.guide:step": case(
        GUIDE.step, {"state": None, "key": KEY, "data": DATA}, ("key", RAW), runs=False
    ),
    "autoloss.identical_actions": case(
        al.identical_actions, {}, ("limit", -1), ("penalty", NAN)
    ),
    "autoloss.improvement": case(
        al.improvement,
        {},
        ("scale", NAN),
        *numbers("clip"),
        *numbers("decay"),
        ("decay", 1.0),
        ("first", NAN),
    ),
    "autoloss.joint": case(
        lambda lam: al.joint(lam)(PROBLEM),
        {"lam": 1.0},
        ("lam", NAN),
        ("lam", jnp.ones((2, 2))),
        ("lam", jnp.ones(3)),
    ),
    "autoloss.projected": case(al.projected, {"problem": PROBLEM}, ("problem", None)),
    "autoloss.load_controller": case(
        al.load_controller,
        {"path": ABSENT},
        ("path", ABSENT, "trained.json"),
        runs=False,
    ),
    "autoloss.save_controller": case(
        al.save_controller,
        {
            "path": ABSENT,
            "controller": NET,
            "phi": PHI,
            "features": SEEN,
            "feature_state": None,
            "problem": PROBLEM,
        },
        ("controller", al.controller(3)),
        ("phi", {}, "trained.safetensors", "leaf"),
        ("problem", None),
        ("metadata", {"x": NAN}, "trained.json", "finite JSON"),
        runs=False,
    ),
    "autoloss.phases": case(
        al.phases,
        {"policies": (POLICY, POLICY), "lengths": (1,)},
        ("lengths", (0,)),
        ("lengths", (1, 1, 1)),
        ("policies", (), "phases(lengths=...)"),
        ("policies", (3, 3)),
    ),
    "autoloss.ppo_loss": case(
        al.ppo_loss,
        {
            "phi": CRITIC.init(KEY, SEEN.spec.size),
            "controller": CRITIC,
            "trajectory": RUN,
            "advantage": jnp.ones(2),
            "targets": jnp.ones(2),
        },
        ("controller", NET),
        *numbers("clip", "entropy_coefficient", "value_coefficient"),
        ("advantage", jnp.ones(5)),
        ("targets", jnp.ones(5)),
        ("old_log_probs", jnp.ones(5)),
        ("trajectory", {}),
        ("phi", {}),
    ),
    "autoloss.reinforce_loss": case(
        al.reinforce_loss,
        {"phi": PHI, "controller": NET, "trajectory": BATCH, "advantage": jnp.ones(1)},
        ("reduction", "none"),
        *numbers("entropy_coefficient"),
        ("advantage", jnp.ones(5)),
        ("trajectory", {}),
        ("phi", {}),
    ),
    "autoloss.rollout": case(
        al.rollout,
        {
            "problem": PROBLEM,
            "policy": POLICY,
            "key": KEY,
            "data": DATA,
            "num_steps": 2,
        },
        *PROBLEMS,
        *counts("num_steps", "validate_every", "chunk"),
        ("dispatch", "none"),
        ("key", RAW),
        ("task_key", RAW),
        ("policy", NET),
        ("step_reward", 3),
        ("restart", 3),
    ),
    "autoloss.segment": case(
        al.segment,
        {},
        ("form", "none"),
        *counts("history"),
        ("scale", NAN),
        *numbers("epsilon", "clip"),
        ("offset", NAN),
    ),
    "autoloss.threshold": case(
        al.threshold,
        {"kind": "S1", "th": 0.1},
        ("kind", "none"),
        ("th", NAN),
        ("main", -1),
        ("auxiliary", -1),
    ),
    "autoloss.features.custom": case(
        features.custom,
        {"function": lambda seen: seen.losses, "name": "mine", "version": 1, "size": 2},
        ("name", "paper"),
        ("version", -1),
        *counts("size", "observe_every"),
        ("refresh", "none"),
        ("function", 3),
        ("name", 3),
    ),
    "autoloss.frozen": case(
        features.frozen, {"features": SEEN}, ("features", None), ("features", NET)
    ),
    "autoloss.features.paper": case(
        features.paper,
        {"num_losses": 2},
        *counts("num_losses"),
        ("orders", -1),
        ("kind", "none"),
        *numbers("decay"),
        ("decay", 1.0),
    ),
    "autoloss.features.released": case(
        features.released,
        {"task": "regression"},
        ("task", "none"),
        *numbers("decay"),
        ("score_offset", NAN),
        *counts("observe_every"),
    ),
    "autoloss.running_norm": case(
        features.running_norm,
        {"features": features.released("regression")},
        *numbers("clip", "epsilon"),
        ("features", None),
        ("features", features.running_norm(SEEN)),
    ),
}
