import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.autoloss.published import released
from tests.autoloss.observations import follow, observation, script

EXTRAS = {
    "classification": ("valid_loss", "train_accuracy", "valid_accuracy"),
    "gan": ("inception_score",),
}
SIZES = {"regression": 5, "classification": 6, "gan": 4, "translation": 18}


def trend(v, decay):
    """d after each step."""
    d, out = None, []
    for t in range(len(v)):
        i = 0.1 if t == 0 else v[t - 1] - v[t]
        d = i if d is None else decay * d + (1 - decay) * i
        out.append(d)
    return np.array(out)


def translation_script(num_steps, every=1):
    seen = script(num_steps, 3, every=every, aux=("accuracy",))
    rng = np.random.default_rng(1)
    draw = lambda: jnp.array(rng.uniform(0.1, 4, (num_steps, 3)))
    extras = {"valid_loss": draw(), "valid_accuracy": draw()}
    return seen._replace(extras=extras)


@pytest.mark.parametrize("task", SIZES)
def test_sizes_and_periods_are_those_of_the_released_code(task):
    features = released(task)
    every = {"gan": 500, "translation": 50}.get(task, 1)
    assert features.spec.size == SIZES[task] == features.init()[1].size
    assert features.spec.observe_every == every
    assert released(task, observe_every=7).spec.observe_every == 7
    assert released(**features.spec.arguments).spec == features.spec


def test_the_first_vector_of_regression():
    x = released("regression").init()[1]
    np.testing.assert_allclose(x, [0, 1, -0.5, -1, 0], atol=1e-6)
    assert float(x[1]) == pytest.approx(1 + math.log(1 + 1e-5) / 12, rel=1e-12)


def test_regression_is_its_formulas():
    features, seen = released("regression"), script(12)
    _, xs = follow(features.update, features.init()[0], seen)
    v, (mse, l1) = np.array(seen.metric), np.array(seen.losses).T
    rms = np.array(seen.gradient_rms).T
    d = np.abs(trend(v, 0.8))
    rows = [(v - mse) / mse, 1 + np.log(d + 1e-5) / 12, np.minimum(1, mse / 20) - 0.5]
    rows += [l1 - 1, rms[0] - rms[1]]
    np.testing.assert_allclose(xs, np.stack(rows, -1), rtol=1e-10)


def test_regression_bounds_the_training_loss():
    features = released("regression")
    large = observation(losses=jnp.array([1e3, 1.0]))
    tiny = observation(losses=jnp.array([1e-7, 1.0]))
    update = jax.jit(features.update)
    assert update(features.init()[0], large)[1][2] == 0.5
    assert update(features.init()[0], tiny)[1][0] == 0.0


def test_the_trend_waits_for_the_metric():
    features = released("regression")
    stale = observation(metric=jnp.array(0.0), metric_refreshed=jnp.array(False))
    update = jax.jit(features.update)
    state, x = update(features.init()[0], stale)
    np.testing.assert_allclose(x[:2], [0, 1], atol=1e-6)
    for value in (5.0, 4.0):
        seen = observation(metric=jnp.array(value))
        state, _ = update(state, seen)
        state, _ = update(state, stale)
    assert float(state.trend) == pytest.approx(0.8 * 0.1 + 0.2 * 1.0)
    assert float(state.value) == 4.0


def test_classification_is_its_formulas():
    features = released("classification")
    state, x = features.init()
    np.testing.assert_allclose(x, [0, 1 + math.log(1.0001) / 10, 0, 0, 0, 0])
    seen = script(12, extras=EXTRAS["classification"])
    _, xs = follow(features.update, state, seen)
    v, train, valid = (np.array(seen.extras[n]) for n in EXTRAS["classification"])
    (ce, l1), rms = np.array(seen.losses).T, np.array(seen.gradient_rms).T
    d = np.abs(trend(v, 0.9))
    rows = [(v - ce) / ce, 1 + np.log(d + 1e-4) / 10, ce, l1]
    rows += [(train - valid) / valid, (rms[0] - rms[1]) / rms[1]]
    np.testing.assert_allclose(xs, np.stack(rows, -1), rtol=1e-10)


def test_ratios_of_classification_are_zero_over_zero():
    features = released("classification")
    extras = {name: jnp.array(0.0) for name in EXTRAS["classification"]}
    seen = observation(gradient_rms=jnp.array([1.0, 0.0]), extras=extras)
    x = jax.jit(features.update)(features.init()[0], seen)[1]
    assert x[4:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("offset", [8.0, 6.0])
def test_gan_is_its_formulas(offset):
    features = released("gan", score_offset=offset)
    state, x = features.init()
    assert not x.any()
    seen = script(12, aux=("d_real", "d_fake"), extras=EXTRAS["gan"])
    _, xs = follow(features.update, state, seen)
    costs = [seen.losses[:, 1], seen.aux["d_real"][:, 0], seen.aux["d_fake"][:, 0]]
    costs, emas = np.stack(costs, -1), []
    for t in range(12):
        emas.append(costs[0] if t == 0 else 0.9 * emas[-1] + 0.1 * costs[t])
    cost, real, fake = np.array(emas).T
    rms_d, rms_g = np.array(seen.gradient_rms).T
    score = np.array(seen.extras["inception_score"])
    rows = [np.log(rms_d / rms_g), cost - 1, (real + fake) / 2, score - offset]
    np.testing.assert_allclose(xs, np.stack(rows, -1), rtol=1e-10)


def test_translation_averages_the_last_ten_batches_of_each_task():
    features, seen = released("translation"), translation_script(40)
    _, xs = follow(features.update, features.init()[0], seen)
    chosen = np.array(seen.refreshed)
    train = np.stack([seen.losses, seen.aux["accuracy"]])
    for t in range(40):
        for m in range(3):
            mine = np.flatnonzero(chosen[: t + 1, m])[-10:]
            valid = [seen.extras[n][t, m] for n in ("valid_loss", "valid_accuracy")]
            loss, share = train[:, mine, m].mean(-1) if mine.size else valid
            row = [(loss - 2) / 3, (valid[0] - 2) / 3, loss - valid[0]]
            row += [share, valid[1], 10 * (share - valid[1])]
            np.testing.assert_allclose(xs[t, 6 * m : 6 * m + 6], row, atol=1e-12)


def test_before_the_first_check_of_translation_training_stands_for_it():
    features = released("translation")
    seen = translation_script(1)
    seen = jax.tree.map(lambda leaf: leaf[0], seen)
    seen = seen._replace(
        refreshed=jnp.array([True, False, False]), metric_refreshed=jnp.array(False)
    )
    x = jax.jit(features.update)(features.init()[0], seen)[1].reshape(3, 6)
    loss, share = float(seen.losses[0]), float(seen.aux["accuracy"][0])
    expected = [(loss - 2) / 3, (loss - 2) / 3, 0, share, share, 0]
    np.testing.assert_allclose(x[0], expected, atol=1e-12)
    assert not x[1:].any()


@pytest.mark.parametrize(
    ("task", "missing", "where"),
    [
        ("classification", "valid_loss", "`observe`"),
        ("gan", "d_real", "has_aux"),
        ("translation", "accuracy", "has_aux"),
    ],
)
def test_a_missing_name_is_refused_with_who_should_give_it(task, missing, where):
    features = released(task)
    with pytest.raises(ValueError, match=f"{task}.*'{missing}'.*{where}"):
        jax.eval_shape(features.update, features.init()[0], observation())


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"task": "other"}, "task"),
        ({"task": "regression", "decay": 1.0}, "decay"),
        ({"task": "gan", "score_offset": None}, "score_offset"),
        ({"task": "gan", "observe_every": 0}, "observe_every"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, argument):
    with pytest.raises(ValueError, match=rf"`released\({argument}="):
        released(**arguments)
