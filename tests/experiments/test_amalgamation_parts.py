"""What the scripts of learned optimizers are made of does what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from experiments.amalgamation_imitation import by_turns
from experiments.amalgamation_problems import SMALL, shrink
from experiments.amalgamation_tables import meta_interval
from metax import Task
from metax.amalgamation import amalgamate, imitate, rnnprop
from metax.harness import host_unroll

COUNTS = {
    "Small-Train": 1418, "Small-MLP": 1510, "Small-Wider": 5130, "Small-Deeper": 5450,
    "Small-FMNIST": 1930, "Small-SmallBatch": 2410, "Small-MNIST-DP": 2410,
}  # fmt: skip
KEYS = jax.random.split(jax.random.key(3), 4)


@pytest.fixture(scope="module")
def loops():
    """A meta-training and an imitation of one small student."""
    bowl = Task(
        init=lambda key: jax.random.normal(key, (3,)),
        loss=lambda params, batch, key: jnp.sum(params**2) + 1.0,
        sample=lambda data, key: (),
        evaluate=lambda params, data: {},
    )
    student, meta = rnnprop(2, 1), optax.sgd(0.1, momentum=0.5)
    lengths = {"truncation_length": 2, "unroll_length": 4, "meta_optimizer": meta}
    loop = amalgamate(bowl, student, {}, warmup_steps=0, remat="none", **lengths)
    return loop, imitate(bowl, student, optax.adam(0.01), **lengths)


def test_imitation_by_turns_hands_weights_and_meta_state_over_and_nothing_else(loops):
    loop, imitation = loops
    start = loop.init(jax.random.key(0))
    after, infos = by_turns(loop, imitation, 1.0)(loop, start, KEYS, ())
    first, _ = host_unroll(loop)(loop, start, KEYS[:1], ())
    # the first step is the loop's own, and all others are not
    assert infos.meta_loss.shape == (1,)
    assert int(after.count) == 1
    np.testing.assert_array_equal(after.params, first.params)
    key_init = jax.random.split(jax.random.fold_in(KEYS[0], len(KEYS)))[1]
    copy = imitation.init(key_init)
    copy = copy._replace(theta=first.theta, meta_state=first.meta_state)
    copy, _ = host_unroll(imitation)(imitation, copy, KEYS[1:], ())
    for whole, part in ((after.theta, copy.theta), (after.meta_state, copy.meta_state)):
        jax.tree.map(np.testing.assert_array_equal, whole, part)
    moved = optax.tree.norm(optax.tree.sub(after.theta, first.theta))
    assert float(moved) > 0


def test_without_imitation_turns_are_the_loop_alone(loops):
    loop, imitation = loops
    start = loop.init(jax.random.key(0))
    own = by_turns(loop, imitation, 0.0)(loop, start, KEYS, ())
    jax.tree.map(
        np.testing.assert_array_equal, own, host_unroll(loop)(loop, start, KEYS, ())
    )


def test_small_problems_are_small_and_keep_what_names_them():
    assert set(SMALL) == set(COUNTS)
    for name, make in SMALL.items():
        optimizee = make()
        shapes = jax.eval_shape(optimizee.task.init, jax.random.key(0))
        assert sum(x.size for x in jax.tree.leaves(shapes)) == COUNTS[name], name
        image = jnp.zeros((130, *optimizee.input_shape))
        data = {"image": image, "label": jnp.zeros(130, jnp.int32)}
        batch = jax.eval_shape(optimizee.task.sample, data, jax.random.key(0))
        assert len(batch[0]) == optimizee.batch_size
    assert SMALL["Small-SmallBatch"]().batch_size == 32
    assert SMALL["Small-FMNIST"]().dataset == "fashion_mnist"


def test_images_are_averaged_over_blocks_only_where_they_are_too_large():
    optimizee = SMALL["Small-FMNIST"]()
    image = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 1), np.uint8)
    small = shrink({"image": image, "label": np.zeros(2)}, optimizee)
    assert small["image"].shape == (2, 7, 7, 1)
    block = image[1, 8:12, 20:24, 0].mean() / 255
    np.testing.assert_allclose(small["image"][1, 2, 5, 0], block, rtol=1e-6)
    assert shrink(small, optimizee) is small


def test_the_interval_of_meta_stability_has_its_closed_form_and_covers():
    random = np.random.default_rng(0)
    replicates, runs, scatter = 4, 5, 0.3
    values = random.normal(0, scatter, (500, replicates, 1))
    values = values + random.normal(0, 0.1, (500, replicates, runs))
    one = values[0]
    between = runs * one.mean(1).var(ddof=1)
    within = one.var(1, ddof=1).mean()
    expected = [
        (replicates - 1) * (between - stats.f(3, 16).ppf(q) * within)
        / (runs * stats.chi2(3).ppf(q))
        for q in (0.975, 0.025)
    ]  # fmt: skip
    np.testing.assert_allclose(np.square(meta_interval(one)), expected, rtol=1e-9)
    ends = np.array([meta_interval(x) for x in values])
    covered = np.mean((ends[:, 0] <= scatter) & (scatter <= ends[:, 1]))
    assert 0.92 < covered < 0.98  # .95, and 500 draws scatter by .01
