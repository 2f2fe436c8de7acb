"""Meta steps and off-policy imitation by turns: the training of "stronger baselines".

No script, and not to be run. Training.imitation_probability of `experiments.amalgamate`
is the chance that a truncation is spent on following Adam along Adam's own trajectory.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from metax import Loop
from metax.amalgamation import AmalgamationState
from metax.harness.processes import all_on_host


def by_turns(loop: Loop, imitation: Loop, probability: float) -> Callable[..., Any]:
    """A `host_unroll` of a loop that leaves some of its steps to another loop.

    Weights and the state of the meta-optimizer go from one to the other; each keeps its
    own optimizees, the imitation those of one stretch, unrolled as long as the loop's.
    The first step of a stretch is the loop's own: a period wants a training loss.

    Args:
      loop: of `amalgamate`.
      imitation: of `imitate`, with the same student, tasks and meta-optimizer.
      probability: that a step is the imitation's, in [0, 1].

    Returns:
      `run(loop, state, keys, data) -> (state, infos)`, which ignores its first
      argument; the infos are those of the loop's own steps.
    """
    own, other = jax.jit(loop.step), jax.jit(imitation.step)
    init = jax.jit(imitation.init)

    def run(_: Any, state: Any, keys: jax.Array, data: Any) -> tuple[Any, Any]:
        key_turns, key_init = jax.random.split(jax.random.fold_in(keys[0], len(keys)))
        turns = np.array(jax.random.bernoulli(key_turns, probability, keys.shape))
        turns[0] = False
        copying = init(key_init)._replace(unroll_length=state.unroll_length)
        infos = []
        for key, turn in zip(keys, turns, strict=True):
            if turn:
                copying, _ = other(_hand_over(state, copying), key, data)
                state = _hand_over(copying, state)
            else:
                state, info = own(state, key, data)
                infos.append(info)
        join = lambda *leaves: np.stack(leaves)
        return state, jax.tree.map(join, *all_on_host(infos))

    return run


def _hand_over(giver: AmalgamationState, taker: AmalgamationState) -> AmalgamationState:
    return taker._replace(theta=giver.theta, meta_state=giver.meta_state)
