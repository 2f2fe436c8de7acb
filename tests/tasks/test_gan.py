import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax.tasks import gan
from metax.tasks.adversarial import Batch

SMALL = gan.Architecture(filters_g=4, filters_d=4, dim_z=3)


def digits_problem(**settings):
    defaults = {"architecture": SMALL, "batch_size": 8, "score_samples": 20}
    return gan.problem("digits", **{**defaults, "final_samples": 40, **settings})


def drawn(init, scale):
    """Normal parameters from numpy: to compile jax's draws takes longer than a test."""
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(0, scale, leaf.shape), leaf.dtype)
    return jax.tree.map(draw, jax.eval_shape(init, jax.random.key(0)))


def digits_data():
    images = np.random.default_rng(1).integers(0, 17, (24, 8, 8, 1), np.uint8)
    classifier = drawn(gan.classifier_task("digits", small=True).init, 1 / 8)
    sizes = {"dim_z": SMALL.dim_z, "score_samples": 20}
    key = jax.random.key(0)
    return gan.image_data(images[:16], images[16:], classifier, key, **sizes)


@pytest.mark.parametrize(
    ("pixel_range", "expected"), [((-1, 1), (-1, 0, 1)), ((0, 1), (0, 0.5, 1))]
)
def test_real_images_fill_the_pixel_range(pixel_range, expected):
    problem = digits_problem(pixel_range=pixel_range)
    images = jnp.stack([jnp.full((8, 8, 1), v, jnp.uint8) for v in (0, 8, 16)])
    batch = problem.sample({"train": images}, jax.random.key(0))
    assert batch.real.dtype == batch.latent.dtype == jnp.float32
    assert set(np.unique(batch.real)) == set(expected)


@pytest.mark.parametrize(
    ("pixel_range", "expected"),
    [((-1, 1), 0.5 + 0.5 * np.tanh(2)), ((0, 1), np.tanh(2))],
)
def test_the_classifier_sees_pixels_from_0_to_1(monkeypatch, pixel_range, expected):
    pixels = lambda classifier, image: image.reshape(len(image), -1)
    monkeypatch.setattr(gan, "class_probabilities", pixels)
    monkeypatch.setattr(gan, "inception_score", lambda x, splits: (x.mean(), x.std()))
    problem = digits_problem(pixel_range=pixel_range)

    params = drawn(problem.init, 0)
    (layer,) = params["generator"]["layers"]
    layer["bias"] = jnp.full((1,), 2.0, jnp.float32)
    got = jax.jit(problem.metric)(params, digits_data())
    np.testing.assert_allclose(got, expected, rtol=1e-5)  # float32


def test_actions_names_and_rules_say_what_was_asked_for():
    problem = digits_problem(generator_repeats=4)
    assert [action.repeats for action in problem.actions] == [1, 4]
    assert problem.names == ("D", "G")
    assert problem.maximize
    assert problem.has_aux
    assert (problem.metric_decay, problem.patience) == (0.8, 50)
    state = optax.with_extra_args_support(
        digits_problem(common_counter=True).optimizers
    )
    assert state.init(jnp.zeros(2))._fields == ("mu", "nu")


def test_scales_and_kinds_of_losses_reach_them():
    settings = ({}, {"discriminator_scale": 1.0, "generator_loss": "minimax"})
    problems = [digits_problem(**setting) for setting in settings]

    @jax.jit
    def values(params, key):
        batch = Batch(real=jnp.zeros((2, 8, 8, 1)), latent=jnp.zeros((2, 3)))
        return [[loss(params, batch, key)[0] for loss in p.losses] for p in problems]

    log_2 = np.log(2)
    (d, g), (d_published, g_minimax) = values(
        drawn(problems[0].init, 0), jax.random.key(0)
    )
    # float32
    np.testing.assert_allclose([d, g], [log_2, log_2], rtol=1e-6)
    np.testing.assert_allclose([d_published, g_minimax], [2 * log_2, -log_2], rtol=1e-6)


@pytest.mark.slow
def test_a_few_steps_of_the_discriminator_lower_its_loss():
    problem = digits_problem(learning_rate=0.01)
    rule = optax.with_extra_args_support(problem.optimizers)

    @jax.jit
    def losses(params, key, data):
        batch = problem.sample(data, key)

        def loss(leaves):
            whole = {**params, "discriminator": leaves}
            return problem.losses[0](whole, batch, key)[0]

        def step(carry, i):
            leaves, state = carry
            value, gradient = jax.value_and_grad(loss)(leaves)
            update, state = rule.update(gradient, state, leaves, step=i)
            return (optax.apply_updates(leaves, update), state), value

        start = params["discriminator"]
        return jax.lax.scan(step, (start, rule.init(start)), jnp.arange(10))[1]

    values = losses(drawn(problem.init, 0.02), jax.random.key(1), digits_data())
    assert values[-1] < 0.8 * values[0]


def test_the_generators_gradient_reaches_its_first_layer():
    problem = digits_problem()

    @jax.jit
    def norm(params, key, data):
        batch = problem.sample(data, key)
        gradient = jax.grad(lambda p: problem.losses[1](p, batch, key)[0])(params)
        return optax.tree.norm(gradient["generator"]["dense"])

    assert norm(drawn(problem.init, 0.1), jax.random.key(1), digits_data()) > 0


def test_checks_repeat_and_the_final_score_takes_other_latents():
    problem = digits_problem()

    @jax.jit
    def run(params, data):
        final = problem.final_metric(params, data)
        return problem.metric(params, data), problem.observe(params, None, data), final

    params, data = drawn(problem.init, 0.6), digits_data()
    metric, seen, final = run(params, data)
    assert metric == seen["inception_score"]
    assert seen.keys() == {"inception_score", "discriminator_error"}
    assert 0 <= seen["discriminator_error"] <= 1
    assert metric != final
    assert final >= 1
    assert metric >= 1
    report = jax.eval_shape(problem.evaluate, params, data)
    assert report.keys() == {*seen, "inception_score_std"}


def test_the_reward_is_ten_times_the_square_of_the_last_or_the_best_score():
    history = jnp.array([2.0, 4.0, 3.0, 9.0])
    live = jnp.array([True, True, True, False])
    assert digits_problem().reward(history, live) == 90
    best = digits_problem(final_samples=None)
    assert best.final_metric is None
    assert best.reward(history, live) == 160
    assert jnp.isnan(best.reward(history, jnp.zeros(4, bool)))


def test_too_few_latents_are_refused_where_they_are_used():
    problem = digits_problem(score_samples=25)
    data = digits_data()
    params = jax.eval_shape(problem.init, jax.random.key(0))
    with pytest.raises(ValueError, match=r"score_samples=...\).*got 25, 20 latents"):
        jax.eval_shape(problem.metric, params, data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generator_repeats": 0}, r"generator_repeats=...\)` must be ≥ 1; got 0"),
        ({"pixel_range": (1, 0)}, r"pixel_range=...\)` must increase"),
        ({"generator_loss": "hinge"}, r"generator_loss=...\).*got 'hinge'"),
        ({"score_samples": 12}, r"score_samples=...\).*multiple of 5.*got 12"),
        ({"final_samples": 0}, r"final_samples=...\).*multiple of 5.*got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        digits_problem(**settings)
