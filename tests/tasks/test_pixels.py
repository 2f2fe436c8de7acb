import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax import inner_loop, unroll
from metax.tasks import BatchNorm
from metax.tasks.pixels import distinct_rows, pixel_classification

KEY = jax.random.key(0)


class Affine(nn.Module):
    """Softmax regression, with batch norm in front if asked for."""

    norm: bool = False

    @nn.compact
    def __call__(self, x, *, train):
        x = x.reshape(x.shape[0], -1)
        x = BatchNorm()(x, train=train) if self.norm else x
        return nn.Dense(3)(x)


def images(num=50, dtype=np.uint8):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, size=(num, 2, 3, 1)).astype(dtype)
    return {"image": image, "label": rng.integers(0, 3, num).astype(np.int32)}


def make(norm=False, batch_size=8):
    return pixel_classification(Affine(norm), (2, 3, 1), batch_size)


@pytest.mark.parametrize(("num", "size"), [(7, 7), (7, 3), (7, 1), (60_000, 128)])
def test_rows_are_distinct_and_in_range(num, size):
    draw = jax.jit(jax.vmap(lambda key: distinct_rows(key, num, size)))
    rows = np.sort(draw(jax.random.split(KEY, 200)), axis=1)
    assert rows.dtype == np.int32
    assert rows.min() >= 0
    assert rows.max() < num
    assert (np.diff(rows, axis=1) > 0).all()


def test_every_set_of_rows_is_as_likely():
    draw = jax.jit(jax.vmap(lambda key: distinct_rows(key, 6, 3)))
    rows = np.sort(draw(jax.random.split(KEY, 20_000)), axis=1)
    _, counts = np.unique(rows @ np.array([36, 6, 1]), return_counts=True)
    assert len(counts) == 20
    # chi-square of 19 degrees exceeds 43.8 once in a thousand keys
    assert np.sum((counts - 1000) ** 2 / 1000) < 43.8


def test_every_row_of_a_large_set_is_as_likely():
    draw = jax.jit(jax.vmap(lambda key: distinct_rows(key, 1000, 50)))
    rows = draw(jax.random.split(KEY, 4000))
    counts = np.bincount(np.ravel(rows), minlength=1000)
    # each is binomial, 4000 draws of chance .05: 200 ± 13.8; 999 degrees, five sigmas
    statistic = np.sum((counts - 200) ** 2 / (200 * 0.95))
    assert abs(statistic - 999) < 5 * np.sqrt(2 * 999)


def test_a_batch_pairs_images_in_0_to_1_with_their_labels():
    task, data = make(batch_size=50), images()
    image, label = jax.jit(task.sample)(data, KEY)
    assert image.dtype == jnp.float32
    assert label.dtype == jnp.int32
    rows = np.argsort(data["image"][:, 0, 0, 0] * 1000.0 + data["image"][:, 1, 2, 0])
    drawn = np.round(np.asarray(image) * 255)
    order = np.argsort(drawn[:, 0, 0, 0] * 1000.0 + drawn[:, 1, 2, 0])
    np.testing.assert_array_equal(drawn[order], data["image"][rows])
    np.testing.assert_array_equal(label[order], data["label"][rows])
    assert 0 <= image.min() < image.max() <= 1


def test_floating_images_are_taken_as_they_are():
    data = images(8, np.float32)
    image, _ = make(batch_size=8).sample(data, KEY)
    assert image.max() == data["image"].max() > 1


def test_loss_and_evaluation_are_the_mean_cross_entropy():
    # more images than one chunk of the evaluation holds
    task, data = make(), images(1203)
    params = jax.jit(task.init)(KEY)
    assert set(params) == {"Dense_0"}
    x = data["image"].reshape(1203, 6) / 255
    logits = x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, data["label"])
    metrics = jax.jit(task.evaluate)(params, data)
    # pixels are float32
    assert metrics["loss"] == pytest.approx(float(expected.mean()), rel=1e-6)
    right = np.argmax(logits, 1) == data["label"]
    assert metrics["accuracy"] == pytest.approx(float(right.mean()), rel=1e-6)
    batch = (jnp.asarray(data["image"] / 255, jnp.float32), data["label"])
    loss = jax.jit(task.loss)(params, batch, KEY)
    assert loss == pytest.approx(float(expected.mean()), rel=1e-6)


def test_running_statistics_are_carried_and_never_descended():
    task, data = make(norm=True, batch_size=50), images()
    loop = inner_loop(task, optax.sgd(0.1))

    @jax.jit
    def run(key):
        state = loop.init(key)
        batch = task.sample(data, key)
        grad = jax.grad(task.loss)(state.params, batch, key)
        return unroll(loop, state, jax.random.split(key, 30), data)[0].params, grad

    params, grad = run(KEY)
    assert set(params) == {"params", "batch_stats"}
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grad["batch_stats"]))
    x = data["image"].reshape(50, 6) / 255
    (statistics,) = params["batch_stats"].values()
    # a batch is the whole set; after 30 steps 0.9^30 = 4 % of the start is left
    mean = (1 - 0.9**30) * x.mean(0)
    np.testing.assert_allclose(statistics["mean"], mean, rtol=1e-5)
    var = (1 - 0.9**30) * x.var(0, ddof=1) + 0.9**30
    np.testing.assert_allclose(statistics["var"], var, rtol=1e-5)


def test_sampling_and_loss_go_through_a_checkpointed_scan_twice_differentiated():
    task, data = make(), images()

    @jax.jit
    @jax.grad
    def meta_gradient(rate, data):
        @jax.checkpoint
        def step(params, key):
            batch = task.sample(data, key)
            loss, grad = jax.value_and_grad(task.loss)(params, batch, key)
            return optax.tree.add_scale(params, -rate, grad), loss

        return jax.lax.scan(step, task.init(KEY), jax.random.split(KEY, 5))[1][-1]

    assert abs(meta_gradient(0.1, data)) > 1e-6


def test_bad_data_is_named():
    with pytest.raises(
        ValueError, match=r"sample\(data=...\).*\[2, 3, 1\]; got \[9, 3,"
    ):
        make().sample({"image": np.zeros((9, 3, 2, 1)), "label": np.zeros(9, int)}, KEY)
    with pytest.raises(ValueError, match=r"size=...\).*in 1..7.*got 8"):
        make().sample(images(7), KEY)
    with pytest.raises(ValueError, match=r"distinct_rows\(key=...\)"):
        distinct_rows(jax.random.PRNGKey(0), 3, 2)
