import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.autoloss.features import paper
from tests.autoloss.observations import follow, observation, script

GAN = ("inception_score", "discriminator_error")


def by_hand(seen, decay, orders):
    """The formulas, one step at a time."""
    last, emas, rows = None, np.zeros(1 + orders), []
    seen = jax.tree.map(np.array, seen)
    v, refreshed = seen.metric, seen.metric_refreshed
    for t in range(len(v)):
        if refreshed[t]:
            new = np.zeros(1 + orders)
            new[0] = v[t]
            if last is None:
                emas = new.copy()
            else:
                for k in range(orders):
                    new[k + 1] = new[k] - last[k]
                emas = decay * emas + (1 - decay) * new
            last = new
        row = [int(seen.step[t]) / int(seen.num_steps[t]), *seen.gradient_rms[t]]
        row += [*seen.losses[t], 0 if last is None else last[0], *emas]
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize(("every", "decay", "orders"), [(1, 0.9, 2), (4, 0.5, 3)])
def test_papers_features_are_its_formulas(every, decay, orders):
    features = paper(2, decay=decay, orders=orders)
    seen = script(20, every=every)
    state, x = features.init()
    assert not x.any()
    _, xs = follow(features.update, state, seen)
    np.testing.assert_allclose(xs, by_hand(seen, decay, orders), rtol=1e-12)


def test_trends_stand_still_where_the_metric_was_not_refreshed():
    features = paper(2)
    first = observation(metric=jnp.array(4.0))
    stale = observation(metric=jnp.array(9.0), metric_refreshed=jnp.array(False))
    update = jax.jit(features.update)
    state, before = update(features.init()[0], first)
    state, after = update(state, stale)
    assert after.tolist() == before.tolist()
    assert before[5:].tolist() == [4.0, 4.0, 0.0, 0.0]


def test_the_given_validation_loss_stands_before_the_metric():
    features = paper(2)
    seen = observation(extras={"valid_loss": jnp.array(2.0)}, metric=jnp.array(9.0))
    assert jax.jit(features.update)(features.init()[0], seen)[1][5] == 2.0


def test_papers_features_of_a_gan_are_its_formulas():
    features = paper(2, kind="gan")
    seen = script(6, extras=GAN)
    state, x = features.init()
    assert not x.any()
    _, xs = follow(features.update, state, seen)
    (rms_d, rms_g), (d, g) = np.array(seen.gradient_rms).T, np.array(seen.losses).T
    columns = [np.array(seen.step) / 12, rms_g, rms_d, np.log(rms_g / rms_d)]
    columns += [g, d, g / d, *(np.array(seen.extras[name]) for name in GAN)]
    np.testing.assert_allclose(xs, np.stack(columns, -1), rtol=1e-12)


def test_ratios_of_a_gan_are_zero_until_both_parts_are_there():
    features = paper(2, kind="gan")
    seen = observation(
        losses=jnp.array([0.0, 2.0]),
        gradient_rms=jnp.array([0.0, 2.0]),
        extras={name: jnp.array(1.0) for name in GAN},
    )
    x = jax.jit(features.update)(features.init()[0], seen)[1]
    assert x.tolist() == [0.1, 2.0, 0.0, 0.0, 2.0, 0.0, 0.0, 1.0, 1.0]


def test_a_missing_name_is_refused_with_the_function_that_should_give_it():
    features = paper(2, kind="gan")
    with pytest.raises(ValueError, match="'inception_score' in the problem's `observe"):
        jax.eval_shape(features.update, features.init()[0], observation())


def test_papers_features_are_described_by_their_arguments():
    assert [paper(m).spec.size for m in (1, 2, 3)] == [7, 9, 11]
    spec = paper(3, decay=0.8, orders=1).spec
    assert (spec.name, spec.refresh, spec.observe_every) == ("paper", "chosen", None)
    assert paper(**spec.arguments).spec == spec


def test_a_new_run_forgets_the_old_one():
    features = paper(2)
    state, _ = features.update(features.init()[0], observation())
    for fresh, first in zip(features.reset(state), features.init(), strict=True):
        jax.tree.map(np.testing.assert_array_equal, fresh, first)


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"num_losses": 0}, "num_losses"),
        ({"num_losses": 3, "kind": "gan"}, "num_losses"),
        ({"num_losses": 2, "kind": "other"}, "kind"),
        ({"num_losses": 2, "decay": 1.0}, "decay"),
        ({"num_losses": 2, "orders": -1}, "orders"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, argument):
    with pytest.raises(ValueError, match=rf"`paper\({argument}="):
        paper(**arguments)
