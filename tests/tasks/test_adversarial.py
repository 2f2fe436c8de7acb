import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax.tasks.adversarial import (
    Batch,
    Networks,
    adam_common_counter,
    adversarial_actions,
    adversarial_losses,
    discriminator_error,
)

LOG_2 = np.log(2.0)
# G shifts and D scales: every value is known
NETWORKS = Networks(
    generate=lambda params, latent: latent + params,
    discriminate=lambda params, x: params * x[:, 0],
)
BATCH = Batch(real=jnp.array([[1.0], [3.0]]), latent=jnp.array([[0.0], [-2.0]]))


def groups(discriminator, generator):
    return {
        "discriminator": jnp.asarray(discriminator, float),
        "generator": jnp.asarray(generator, float),
    }


def value(loss, params):
    return loss(params, BATCH, jax.random.key(0))


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_with_logits_of_zero_each_cost_is_log_2(scale):
    loss_d, loss_g = adversarial_losses(NETWORKS, scale, "non_saturating")
    for loss, expected in ((loss_d, 2 * scale * LOG_2), (loss_g, LOG_2)):
        got, aux = value(loss, groups(0, 0))
        np.testing.assert_allclose(got, expected)
        assert aux.keys() == {"d_real", "d_fake"}
        np.testing.assert_allclose([aux["d_real"], aux["d_fake"]], LOG_2)


def test_the_minimax_loss_of_the_generator_is_the_discriminators_cost_negated():
    loss_d, loss_g = adversarial_losses(NETWORKS, 1.0, "minimax")
    _, aux = value(loss_d, groups(0.7, 0.3))
    np.testing.assert_allclose(value(loss_g, groups(0.7, 0.3))[0], -aux["d_fake"])
    np.testing.assert_allclose(value(loss_g, groups(0, 0))[0], -LOG_2)


def test_losses_equal_cross_entropies_written_out():
    loss_d, loss_g = adversarial_losses(NETWORKS, 0.5, "non_saturating")
    real, fake = 0.7 * np.array([1.0, 3.0]), 0.7 * np.array([0.3, -1.7])
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    of_real, of_fake = -np.log(sigmoid(real)).mean(), -np.log(1 - sigmoid(fake)).mean()
    got, aux = value(loss_d, groups(0.7, 0.3))
    np.testing.assert_allclose(got, (of_real + of_fake) / 2)
    np.testing.assert_allclose([aux["d_real"], aux["d_fake"]], [of_real, of_fake])
    got, _ = value(loss_g, groups(0.7, 0.3))
    np.testing.assert_allclose(got, -np.log(sigmoid(fake)).mean())


def test_the_discriminators_loss_does_not_reach_the_generator():
    loss_d, loss_g = adversarial_losses(NETWORKS, 0.5, "non_saturating")
    of = lambda loss: jax.grad(lambda p: value(loss, p)[0])(groups(0.7, 0.3))
    assert of(loss_d)["generator"] == 0
    assert of(loss_d)["discriminator"] != 0
    assert of(loss_g)["generator"] != 0


def test_repeats_belong_to_the_generator():
    discriminator, generator = adversarial_actions(4)
    assert discriminator == (0, "discriminator", 1)
    assert generator == (1, "generator", 4)


def test_errors_are_counted_on_an_equal_mix():
    # real at 1 and 3 are seen; of the fakes at 1 and -1 one is taken for real
    assert discriminator_error(NETWORKS, groups(1, 1), BATCH) == 0.25
    # everything is called generated: all real ones are missed
    assert discriminator_error(NETWORKS, groups(0, 1), BATCH) == 0.5


def test_the_common_counter_equals_adam_written_by_hand():
    rng = np.random.default_rng(0)
    gradients, steps = rng.normal(size=(4, 3)), (0, 1, 5, 9)
    rule = adam_common_counter(0.1)

    @jax.jit
    def run(gradients, steps):
        state, updates = rule.init(jnp.zeros(3)), []
        for gradient, step in zip(gradients, steps, strict=True):
            update, state = rule.update(gradient, state, step=step)
            updates.append(update)
        return jnp.stack(updates)

    m, v, expected = np.zeros(3), np.zeros(3), []
    for gradient, step in zip(gradients, steps, strict=True):
        m = 0.5 * m + 0.5 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        t = step + 1
        m_hat, v_hat = m / (1 - 0.5**t), v / (1 - 0.999**t)
        expected.append(-0.1 * m_hat / (np.sqrt(v_hat) + 1e-8))
    # 1 - 0.999ᵗ is taken in float32
    got = run(jnp.asarray(gradients), jnp.asarray(steps, jnp.int32))
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_a_counter_without_gaps_is_plain_adam():
    gradients = np.random.default_rng(1).normal(size=(5, 2))
    common, plain = adam_common_counter(0.1), optax.adam(0.1, b1=0.5, b2=0.999)

    @jax.jit
    def run(gradients):
        state, other = common.init(jnp.zeros(2)), plain.init(jnp.zeros(2))
        pairs = []
        for step, gradient in enumerate(gradients):
            update, state = common.update(gradient, state, step=jnp.int32(step))
            reference, other = plain.update(gradient, other)
            pairs.append((update, reference))
        return pairs

    for update, reference in run(jnp.asarray(gradients)):
        np.testing.assert_allclose(update, reference, rtol=1e-4)  # as above


def test_the_common_counter_wants_a_step():
    rule = adam_common_counter(0.1)
    with pytest.raises(ValueError, match=r"update\(step=...\)` must be the number"):
        rule.update(jnp.zeros(2), rule.init(jnp.zeros(2)))
