import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.autoloss.features import paper, released
from metax.autoloss.normalizing import frozen, running_norm
from metax.autoloss.vectors import custom
from tests.autoloss.observations import follow, observation, script


def losses_alone():
    return custom(lambda seen: seen.losses, name="losses", version=1, size=2)


def statistics(state):
    """Mean and variance of each entry."""
    return np.stack([state.mean, state.variance])


def test_statistics_are_mean_and_variance_of_what_was_seen():
    features, seen = running_norm(losses_alone()), script(30)
    state, xs = follow(features.update, features.init()[0], seen)
    raw = np.array(seen.losses)
    np.testing.assert_allclose(statistics(state), [raw.mean(0), raw.var(0)], rtol=1e-10)
    for t in (5, 29):
        so_far = raw[: t + 1]
        expected = (raw[t] - so_far.mean(0)) / so_far.std(0)
        np.testing.assert_allclose(xs[t], expected, rtol=1e-10)


def test_entries_are_clipped_and_constants_pass_as_zero():
    features = running_norm(losses_alone(), clip=1.5)
    losses = np.zeros((50, 2))
    losses[-1, 0], losses[:, 1] = 9.0, 3.0
    seen = script(50)._replace(losses=jnp.array(losses))
    _, xs = follow(features.update, features.init()[0], seen)
    assert xs[-1].tolist() == [1.5, 0.0]


def test_merged_statistics_are_those_of_one_run_that_saw_it_all():
    features, runs = running_norm(paper(2)), [script(20, seed=s) for s in range(4)]
    before, _ = follow(features.update, features.init()[0], runs[0])
    rest = jax.tree.map(lambda *leaves: np.stack(leaves), *runs[1:])

    @jax.jit
    def both(before, rest):
        run = lambda state, seen: jax.lax.scan(
            features.update, features.reset(state)[0], seen
        )[0]
        apart = jax.vmap(lambda seen: run(before, seen))(rest)
        in_turn, _ = jax.lax.scan(lambda s, o: (run(s, o), None), before, rest)
        return features.merge(before, apart), in_turn

    merged, in_turn = both(before, rest)
    assert int(merged.count) == 80
    np.testing.assert_allclose(
        statistics(merged), statistics(in_turn), rtol=1e-9, atol=1e-12
    )
    # the part of a run is that of `before`: the runs are over
    jax.tree.map(np.testing.assert_array_equal, merged.inner, before.inner)


def test_a_long_training_in_single_precision_keeps_its_statistics():
    single = lambda tree: jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x, tree
    )
    plain = custom(
        lambda seen: seen.losses.astype(jnp.float32), name="single", version=1, size=2
    )
    features = running_norm(plain)
    before = single(features.init()[0])._replace(
        count=jnp.int32(2**30), mean=jnp.full(2, 2.0, jnp.float32)
    )
    before = before._replace(variance=jnp.ones(2, jnp.float32))

    @jax.jit
    def run(before, seen):
        step = lambda state, o: (single(features.update(state, o)[0]), None)
        after, _ = jax.lax.scan(step, before, seen)
        return features.merge(before, jax.tree.map(lambda x: x[None], after))

    merged = run(before, single(script(200)))
    assert int(merged.count) == 2**30 + 200
    # 200 further ones move nothing that single precision, 1e-7, can tell
    np.testing.assert_allclose(statistics(merged), [[2, 2], [1, 1]], rtol=1e-6)


def test_merging_runs_that_saw_nothing_changes_nothing():
    features = running_norm(losses_alone())
    fresh = features.init()[0]
    seen = follow(features.update, fresh, script(5))[0]
    merge = jax.jit(features.merge)
    for before in (fresh, seen):
        twice = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), before)
        merged = merge(before, twice)
        jax.tree.map(np.testing.assert_array_equal, merged, before)


def test_features_without_statistics_merge_to_what_they_were():
    features = paper(2)
    before = features.init()[0]
    states = jax.vmap(lambda _: before)(jnp.arange(3))
    merged = features.merge(before, states)
    jax.tree.map(np.testing.assert_array_equal, merged, before)


def test_a_new_run_keeps_statistics_and_forgets_the_run():
    features = running_norm(released("regression"))
    state, _ = follow(features.update, features.init()[0], script(20))
    fresh, x = jax.jit(features.reset)(state)
    np.testing.assert_array_equal(statistics(fresh), statistics(state))
    assert int(fresh.count) == 20
    assert not bool(fresh.inner.seen)
    # the first vector is normalised and not counted
    raw = np.array(released("regression").init()[1])
    expected = (raw - state.mean) / np.sqrt(state.variance)
    np.testing.assert_allclose(x, np.clip(expected, -5, 5), rtol=1e-10)


def test_frozen_statistics_do_not_move():
    features = running_norm(losses_alone())
    state, _ = follow(features.update, features.init()[0], script(20))
    still = frozen(features)
    seen = observation(losses=jnp.array([2.0, 3.0]))
    after, x = jax.jit(still.update)(state, seen)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    expected = (np.array([2.0, 3.0]) - state.mean) / np.sqrt(state.variance)
    np.testing.assert_allclose(x, expected, rtol=1e-10)
    assert still.spec == features.spec
    assert frozen(still) is still


def test_frozen_features_go_on_seeing_the_run():
    features = running_norm(released("regression"))
    still = frozen(features)
    seen = observation(metric=jnp.array(4.0))
    state, _ = jax.jit(still.update)(features.init()[0], seen)
    assert float(state.inner.value) == 4.0


def test_features_without_statistics_are_frozen_as_they_are():
    features = paper(2)
    assert frozen(features) is features


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, 1e300])
def test_a_run_that_diverges_does_not_spoil_the_statistics(value):
    features = running_norm(losses_alone())
    state, _ = follow(features.update, features.init()[0], script(20))
    seen = observation(losses=jnp.array([value, 2.0]))
    after, x = jax.jit(features.update)(state, seen)
    np.testing.assert_array_equal(statistics(after), statistics(state))
    assert bool(jnp.all(jnp.isfinite(x)))


def test_the_description_records_the_normaliser():
    spec = running_norm(released("regression"), clip=3.0).spec
    assert spec.arguments["running_norm"] == {"clip": 3.0, "epsilon": 1e-6}
    assert spec.arguments["task"] == "regression"
    assert (spec.name, spec.size) == ("released", 5)


def test_what_cannot_be_normalised_is_refused():
    once = running_norm(paper(2))
    for features in (once, frozen(once)):
        with pytest.raises(ValueError, match=r"`running_norm\(features="):
            running_norm(features)
    for options in ({"clip": 0.0}, {"epsilon": -1.0}):
        with pytest.raises(ValueError, match=r"`running_norm\("):
            running_norm(paper(2), **options)
