import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from metax import inner_loop, unroll
from metax.tasks import load, optimizees
from metax.tasks.optimizees import OPTIMIZEES

KEY = jax.random.key(0)
MAKERS = {
    **OPTIMIZEES,
    "Deeper strided": lambda: optimizees.deeper("strided"),
    "ResNet-52 of 100": lambda: optimizees.resnet52(100),
}
# set, parameters in all, of which running statistics
TABLE = {
    "Train": ("mnist", 18_122, 0),
    "MLP": ("mnist", 15_910, 0),
    "Wider": ("mnist", 61_834, 0),
    "Deeper": ("mnist", 75_242, 0),
    "Deeper strided": ("mnist", 72_042, 0),
    "FMNIST": ("fashion_mnist", 18_122, 0),
    "SVHN": ("svhn_cropped", 21_290, 0),
    "CIFAR": ("cifar10", 68_170, 0),
    "ResNet": ("cifar10", 372_330, 1_824),
    "SmallBatch": ("mnist", 18_122, 0),
    "MNIST-DP": ("mnist", 18_122, 0),
    "ResNet-52": ("cifar10", 763_882, 3_616),
    "ResNet-52 of 100": ("cifar100", 769_732, 3_616),
    "Digits": ("digits", 2_410, 0),
}


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def blank(optimizee, num):
    image = np.random.default_rng(0).integers(0, 256, (num, *optimizee.input_shape))
    label = np.arange(num, dtype=np.int32) % optimizee.num_classes
    return {"image": image.astype(np.uint8), "label": label}


def test_the_table_is_complete():
    assert set(TABLE) == set(MAKERS)


@pytest.mark.parametrize("name", TABLE)
def test_number_of_parameters_is_that_of_the_paper(name):
    dataset, size, num_statistics = TABLE[name]
    optimizee = MAKERS[name]()
    params = jax.eval_shape(optimizee.task.init, KEY)
    assert optimizee.dataset == dataset
    assert count(params) == size
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    if num_statistics:
        assert set(params) == {"params", "batch_stats"}
        assert count(params["batch_stats"]) == num_statistics
    assert (optimizee.task.carry is not None) == bool(num_statistics)


@pytest.mark.parametrize("name", [name for name in TABLE if "52" not in name])
def test_all_four_functions_fit_together(name):
    optimizee = MAKERS[name]()
    task, data = optimizee.task, blank(optimizee, 150)

    def run(key, data):
        params = task.init(key)
        batch = task.sample(data, key)
        loss, grad = jax.value_and_grad(task.loss)(params, batch, key)
        return batch, loss, grad, params, task.evaluate(params, data)

    # shapes only: the numbers are held by the tests of the parts
    batch, loss, grad, params, metrics = jax.eval_shape(run, KEY, data)
    assert batch[0].shape == (optimizee.batch_size, *optimizee.input_shape)
    assert batch[1].shape == (optimizee.batch_size,)
    assert optimizee.batch_size == (32 if name == "SmallBatch" else 128)
    assert loss.shape == ()
    assert jax.tree.structure(grad) == jax.tree.structure(params)
    assert set(metrics) == {"loss", "accuracy"}


def test_kernels_begin_glorot_uniform_and_biases_zero():
    params = jax.jit(optimizees.mlp().task.init)(KEY)
    bound = np.sqrt(6 / (784 + 20))
    largest = jnp.abs(params["Dense_0"]["kernel"]).max()
    # 15680 uniform draws come within 1 % of their bound
    assert 0.99 * bound < largest <= bound
    assert all((layer["bias"] == 0).all() for layer in params.values())


def test_private_gradient_is_clipped_jointly_and_noised_and_its_value_plain():
    task = optimizees.train().task
    noisy, clipped = (optimizees.mnist_dp(*a).task.loss for a in ((), (1.0, 0.0)))
    shapes = jax.eval_shape(task.init, KEY)
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    params = jax.tree.map(lambda leaf: draw(*leaf.shape), shapes)
    example = (draw(1, 28, 28, 1), np.zeros(1, np.int32))

    @jax.jit
    def compute(params, example, key):
        value, grad = jax.value_and_grad(noisy)(params, example, key)
        bare = jax.grad(clipped)(params, example, key)
        plain_value = task.loss(params, example, key)
        return value, plain_value, optax.tree.norm(bare), optax.tree.sub(grad, bare)

    value, plain_value, norm, noise = compute(params, example, KEY)
    assert value == pytest.approx(float(plain_value), rel=1e-6)
    assert plain_value > 1
    # weights of order 1 make it much steeper than 1; 18122 squares summed in float32
    assert norm == pytest.approx(1.0, abs=1e-6)
    sample = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(noise)])
    # 18122 draws tell it to 0.5 %
    assert sample.std() == pytest.approx(1.1, rel=0.03)


def test_digits_are_divided_by_the_published_permutation():
    training, test = optimizees.digits_data()
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(1797)
    assert training["image"].shape == (1437, 8, 8, 1)
    assert test["image"].dtype == np.float32
    np.testing.assert_array_equal(
        training["image"][5, ..., 0], bunch.images[order[5]] / 16
    )
    np.testing.assert_array_equal(test["label"], bunch.target[order[1437:]])
    assert training["label"].dtype == test["label"].dtype == np.int32


def test_digits_are_learned():
    training, test = optimizees.digits_data()
    task = optimizees.digits().task
    loop = inner_loop(task, optax.adam(0.02))

    @jax.jit
    def run(key, training, test):
        keys = jax.random.split(key, 275)
        params = unroll(loop, loop.init(key), keys, training)[0].params
        return task.evaluate(params, test), task.evaluate(params, training)

    held_out, fitted = run(KEY, training, test)
    # the published run of 25 epochs: ln train -3.9, best ln test -3.2, five seeds
    assert np.log(fitted["loss"]) < -3.3
    assert np.log(held_out["loss"]) < -2.6
    assert held_out["accuracy"] > 0.95


def test_a_split_becomes_data():
    split = load("digits").train
    data = optimizees.optimizee_data(split)
    assert data["image"] is split.image
    assert data["label"].dtype == np.int32
    scaled = optimizees.optimizee_data(split, full_intensity=16)["image"]
    assert scaled.dtype == np.float32
    np.testing.assert_array_equal(scaled, split.image / 16)


@pytest.mark.slow
def test_mnist_is_read_and_trained_on(tfds_dir, tmp_path):
    mnist = load("mnist", data_dir=tfds_dir, cache_dir=tmp_path)
    data = optimizees.optimizee_data(mnist.test)
    task = optimizees.mlp().task
    loop = inner_loop(task, optax.adam(0.01))

    @jax.jit
    def run(key, data):
        keys = jax.random.split(key, 100)
        return task.evaluate(unroll(loop, loop.init(key), keys, data)[0].params, data)

    assert run(KEY, data)["accuracy"] > 0.8


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"deeper\(variant=...\).*got 'wide'"):
        optimizees.deeper("wide")
    with pytest.raises(ValueError, match=r"resnet52\(num_classes=...\).*got 7"):
        optimizees.resnet52(7)
    with pytest.raises(ValueError, match=r"conv=...\).*got 'fft'"):
        optimizees.resnet(conv="fft")
    with pytest.raises(
        ValueError, match=r"optimizee_data\(full_intensity=...\).*got 0"
    ):
        optimizees.optimizee_data(load("digits").train, full_intensity=0)
    with pytest.raises(ValueError, match=r"clip_norm=...\).*got 0"):
        optimizees.mnist_dp(clip_norm=0)
