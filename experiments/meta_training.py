"""How the experiments train a learned optimizer: its loop and its curriculum.

No script, and not to be run. `Training` holds the fields that the functions here read.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import optax

from experiments.amalgamation_imitation import by_turns
from experiments.optimizer_runs import STUDENTS
from metax import Loop
from metax.amalgamation import (
    CurriculumResult,
    LearnedOptimizer,
    Stage,
    amalgamate,
    clip_by_weight_norm,
    curriculum,
    imitate,
    long_horizon_gate,
    perturb,
    release_settings,
    validation_loss,
)
from metax.amalgamation.artifacts import POLICIES
from metax.harness import host_unroll, shard
from metax.harness.parallel import check_share
from metax.tasks.optimizees import Optimizee

# the one teacher of the stronger baselines
IMITATED = optax.adam(0.01)
# depths of a choice policy's curriculum, a period each
CHOICE_DEPTHS = (1, 2, 5, 5, 5)


@dataclasses.dataclass(frozen=True)
class Training:
    optimizee: str = "Digits"
    student: Literal["rnnprop", "rnnprop_constant", "rnnprop_lv", "l2l", "scale"] = (
        "rnnprop"
    )
    pool: Literal["small", "large"] = "small"
    setting: Literal["paper", "release"] = "paper"
    reduce: Literal["none", "mean", "minmax", "softmax", "choice"] = "minmax"
    imitation_probability: float = 0.0  # of a step that only copies Adam at .01
    perturbation: Literal["none", "gaussian", "adversarial"] = "none"
    perturbation_size: float = 5e-4
    input_noise: float = 0.0
    estimator: Literal["bptt", "pes", "es"] = "bptt"
    random_scale: float = 3.0
    second_order: bool = True
    meta_learning_rate: float = 1e-3
    num_tasks: int = 1
    truncation_length: int = 100
    warmup_steps: int = 100
    remat: Literal["none", "step", "block"] = "step"
    depths: tuple[int, ...] = (1, 2)
    validation_depths: tuple[int, ...] = (2, 5)
    weights: tuple[float, ...] = (0.2, 0.1)
    trajectories: tuple[int, ...] = (5, 3)
    periods: tuple[int, ...] = (4, 2)  # 0: by patience, as in the paper
    validation_trajectories: int = 2
    repeat_threshold: float = 0.5
    max_repeats: int = 1
    gate_steps: int = 2000
    seed: int = 0
    data_dir: str | None = None


class Trainer(NamedTuple):
    """The compiled parts of a training, for any number of replicates.

    Attributes:
      loop: of the student.
      run: `host_unroll` of it, or `by_turns` with imitation.
      validate: as in `validation_loss`.
      gate: as in `long_horizon_gate`.
    """

    loop: Loop
    run: Callable[..., Any]
    validate: Callable[..., Any]
    gate: Callable[..., Any]


class Trained(NamedTuple):
    """What a training ends with.

    Attributes:
      result: of the curriculum.
      truncations: all of them, repeats included.
      gate: of each candidate, whether it passed.
      spent: CPU seconds of the process for "training", "validation" and "selection",
        compilation included.
    """

    result: CurriculumResult
    truncations: int
    gate: list[bool]
    spent: dict[str, float]


class Clock:
    """CPU seconds of the process, summed by what they were spent on."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def timed(self, name: str, function: Any) -> Any:
        """The function, with its time counted; what it returns has been computed."""

        def run(*args: Any) -> Any:
            begin = time.process_time()
            out = jax.block_until_ready(function(*args))
            seconds = time.process_time() - begin
            self.spent[name] = self.spent.get(name, 0.0) + seconds
            return out

        return run


def warmup(config: Training) -> dict[str, Any]:
    """Steps and rate of the warm-up, the same in training, judging and on the card."""
    released = release_settings()["warmup_learning_rate"]
    rate = released if config.setting == "release" else 0.01
    return {"warmup_steps": config.warmup_steps, "warmup_learning_rate": rate}


def policy_of(config: Training) -> tuple[str, dict[str, Any]]:
    """The student's policy and its options; the release corrects by a constant."""
    policy, options = STUDENTS[config.student]
    if config.setting == "release" and policy == "rnnprop":
        options = {**options, "bias_correction": "constant"}
    return policy, options


def student_of(config: Training) -> LearnedOptimizer:
    policy, options = policy_of(config)
    return POLICIES[policy](**options)


def choice_options(config: Training) -> dict[str, Any]:
    """Of the choice policy, as `save_artifact` takes them."""
    setting = "release-choice" if config.setting == "release" else "paper"
    return {"pool": config.pool, "setting": setting}


def choice_student(config: Training) -> LearnedOptimizer:
    return POLICIES["choice"](**choice_options(config))


def stages(config: Training) -> tuple[Stage, ...]:
    length = config.truncation_length
    rows = zip(
        config.depths, config.validation_depths, config.weights,
        config.trajectories, config.periods, strict=True,
    )  # fmt: skip
    return tuple(
        Stage(a * length, b * length, w, t, p or None) for a, b, w, t, p in rows
    )


def choice_stages(config: Training) -> tuple[Stage, ...]:
    """A period at each depth, all validated at the same."""
    length, trajectories = config.truncation_length, config.trajectories[0]
    deep = min(max(CHOICE_DEPTHS) * 2, max(config.validation_depths)) * length
    depths = [depth for depth in CHOICE_DEPTHS if depth <= max(config.depths)]
    return tuple(Stage(d * length, deep, 0.0, trajectories, 1) for d in depths)


def meta_optimizer(config: Training) -> optax.GradientTransformation:
    return optax.chain(clip_by_weight_norm(), optax.adam(config.meta_learning_rate))


def build(
    config: Training,
    optimizee: Optimizee,
    student: LearnedOptimizer,
    teachers: dict,
    mesh: Any = None,
) -> Loop:
    """The loop of one student, its tasks over the devices.

    Two teachers or more are reduced by the config.
    """
    moves = {
        "none": perturb.none,
        "gaussian": lambda: perturb.gaussian(config.perturbation_size),
        "adversarial": lambda: perturb.adversarial(config.perturbation_size),
    }
    several = config.reduce in ("minmax", "softmax") and len(teachers) > 1
    released = release_settings() if config.setting == "release" else {}
    loop = amalgamate(
        optimizee.task,
        student,
        teachers,
        reduce=config.reduce if several else "mean",  # type: ignore[arg-type]
        truncation_length=config.truncation_length,
        unroll_length=config.truncation_length,
        num_tasks=config.num_tasks,
        random_scale=config.random_scale,
        perturbation=moves[config.perturbation](),
        input_noise=config.input_noise,
        second_order=config.second_order,
        meta_optimizer=meta_optimizer(config),
        estimator=config.estimator,
        remat=config.remat,
        **{**released, **warmup(config)},
    )
    return over_devices(loop, config, mesh)


def over_devices(loop: Loop, config: Training, mesh: Any) -> Loop:
    """Each device unrolls its share of the tasks, from the same weights."""
    check_share("--num-tasks", config.num_tasks, mesh)
    return loop if mesh is None else shard(loop, mesh, config.num_tasks)


def trainer(
    config: Training,
    optimizee: Optimizee,
    student: LearnedOptimizer,
    teachers: dict,
    mesh: Any = None,
) -> Trainer:
    """Makes the parts of a training; each is compiled when it is first called."""
    loop = build(config, optimizee, student, teachers, mesh)
    validate = validation_loss(
        optimizee.task,
        student,
        num_trajectories=config.validation_trajectories,
        truncation_length=config.truncation_length,
        random_scale=config.random_scale,
        **warmup(config),
    )
    gate = long_horizon_gate(
        optimizee.task,
        student,
        steps=config.gate_steps,
        window=min(100, config.gate_steps),
        **warmup(config),
    )
    run = host_unroll(loop)
    if config.imitation_probability:
        copy = imitate(
            optimizee.task,
            student,
            IMITATED,
            truncation_length=config.truncation_length,
            unroll_length=config.truncation_length,
            num_tasks=config.num_tasks,
            random_scale=config.random_scale,
            meta_optimizer=meta_optimizer(config),
        )
        copy = over_devices(copy, config, mesh)
        run = by_turns(loop, copy, config.imitation_probability)
    return Trainer(loop, run, jax.jit(validate), jax.jit(gate))


def train_student(
    config: Training,
    parts: Trainer,
    plan: Sequence[Stage],
    data: Any,
    key: jax.Array,
    *,
    gated: bool = True,
    **rules: Any,
) -> Trained:
    """One student through its curriculum; `rules` are arguments of `curriculum`."""
    clock, passed = Clock(), []
    select = clock.timed("selection", parts.gate)

    def gate(*args: Any) -> Any:
        outcome = select(*args)
        passed.append(bool(outcome.passed))
        return outcome

    key_init, key_run = jax.random.split(key)
    result = curriculum(
        parts.loop,
        clock.timed("validation", parts.validate),
        parts.loop.init(key_init),
        key_run,
        data,
        truncation_length=config.truncation_length,
        stages=plan,
        max_repeats=config.max_repeats,
        gate=gate if gated else None,
        run=clock.timed("training", parts.run),
        on_period=lambda record, _: print(record, flush=True),
        **rules,
    )
    unrolled = [
        (plan[record.stage].trajectories or 0) * plan[record.stage].unroll_length
        for record in result.records
    ]
    num = sum(unrolled) // config.truncation_length
    return Trained(result, num, passed, clock.spent)


def train_choice(
    config: Training, optimizee: Optimizee, data: Any, key: jax.Array, mesh: Any = None
) -> Trained:
    """A choice policy over the pool, alone; the recipe of the paper's release."""
    plain: dict[str, Any] = {"perturbation": "none", "input_noise": 0.0}
    alone = dataclasses.replace(config, imitation_probability=0.0, **plain)
    parts = trainer(alone, optimizee, choice_student(config), {}, mesh)
    how: dict[str, Any] = {"repeat_threshold": 0.9, "stage_reference": "validation"}
    return train_student(
        alone, parts, choice_stages(config), data, key, gated=False, **how
    )
