import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax import inner_loop, unroll
from metax.tasks.data import load
from metax.tasks.inception import (
    class_probabilities,
    classifier_task,
    inception_score,
)


def test_the_score_is_1_where_all_answers_are_alike():
    mean, std = inception_score(jnp.full((20, 10), 0.1), splits=5)
    np.testing.assert_allclose([mean, std], [1.0, 0.0], atol=1e-12)
    certain = jnp.zeros((20, 10)).at[:, 3].set(1.0)
    np.testing.assert_allclose(inception_score(certain)[0], 1.0, atol=1e-12)


def test_the_score_is_the_number_of_classes_where_each_is_certain_and_as_frequent():
    mean, std = inception_score(jnp.tile(jnp.eye(10), (5, 1)), splits=5)
    np.testing.assert_allclose([mean, std], [10.0, 0.0], atol=1e-12)


def test_parts_are_scored_by_themselves():
    parts = jnp.concatenate([jnp.eye(4), jnp.full((4, 4), 0.25)])
    mean, std = inception_score(parts, splits=2)
    np.testing.assert_allclose([mean, std], [2.5, 1.5])  # of 4 and 1


def test_parts_that_do_not_come_out_even_are_refused():
    with pytest.raises(ValueError, match=r"inception_score\(splits.*splits=3, 10 rows"):
        inception_score(jnp.full((10, 2), 0.5), splits=3)


def test_an_unknown_set_is_refused_by_name():
    with pytest.raises(ValueError, match=r"classifier_task\(dataset=.*got 'kmnist'"):
        classifier_task("kmnist")


def test_the_published_classifier_has_its_size():
    params = jax.eval_shape(classifier_task("mnist").init, jax.random.key(0))
    convs = (25 + 1) * 32 + (25 * 32 + 1) * 64
    dense = (7 * 7 * 64 + 1) * 1024 + (1024 + 1) * 10
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == convs + dense


@pytest.mark.parametrize("small", [True, False])
def test_a_classifier_of_either_size_answers_with_probabilities(small):
    image = jnp.zeros((3, 8, 8, 1), jnp.float32)
    shapes = jax.eval_shape(classifier_task("digits", small).init, jax.random.key(0))
    answers = jax.eval_shape(class_probabilities, shapes, image)
    assert answers.shape == (3, 10)


@pytest.mark.slow
def test_a_small_classifier_learns_the_digits_and_scores_them_high():
    digits = load("digits")
    loop = inner_loop(classifier_task("digits", small=True), optax.adam(1e-2))

    @jax.jit
    def run(key, data, images):
        key_init, key_run = jax.random.split(key)
        keys = jax.random.split(key_run, 60)
        state, _ = unroll(loop, loop.init(key_init), keys, data)
        answers = class_probabilities(state.params, images)
        return answers, inception_score(answers)[0]

    test = digits.test.image.astype(np.float32) / 16
    answers, score = run(jax.random.key(0), digits.train, test)
    np.testing.assert_allclose(answers.sum(-1), 1, rtol=1e-5)  # float32
    assert np.mean(answers.argmax(-1) == digits.test.label) > 0.9
    assert 5 < score < 10
