import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax.tasks import translation
from metax.tasks.data import controller_data
from metax.tasks.seq2seq import END, PAD

SIZES = {"source": 9, "mt": 9, "ner": 7, "pos": 8}
TINY = {"embedding": 3, "hidden": 4, "depth": 1, "bidirectional": False}
PAIRS = {
    "source": jnp.array([[5, 6, 7], [8, 5, PAD], [6, PAD, PAD]], jnp.int32),
    "target": jnp.array([[5, 6, END], [6, END, PAD], [END, PAD, PAD]], jnp.int32),
}
PART = {"mt": PAIRS, "ner": PAIRS, "pos": PAIRS}
DATA = {"train": PART, "valid": PART}


def tiny(**settings):
    defaults = {**TINY, "batch_size": 4, "dropout": 0.0}
    return translation.problem(SIZES, **{**defaults, **settings})


def drawn(problem, scale=0.5):
    """Normal parameters from numpy: to compile jax's draws takes longer than a test."""
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(0, scale, leaf.shape), leaf.dtype)
    return jax.tree.map(draw, jax.eval_shape(problem.init, jax.random.key(0)))


def test_zero_parameters_know_nothing_and_the_perplexity_is_the_vocabulary():
    problem = tiny()
    params = drawn(problem, scale=0)

    @jax.jit
    def run(data):
        return problem.evaluate(params, data), problem.observe(params, None, data)

    report, seen = run({**DATA, "test": {**DATA["valid"], "mt_2018": PAIRS}})
    np.testing.assert_allclose(report["valid_perplexity"], 9, rtol=1e-6)
    np.testing.assert_allclose(report["valid_loss"], np.log(9), rtol=1e-6)
    np.testing.assert_allclose(report["test_2018_perplexity"], 9, rtol=1e-6)
    np.testing.assert_allclose(seen["valid_loss"], np.log([9, 7, 8]), rtol=1e-6)
    tags = {
        f"{part}_{t}_accuracy" for part in ("valid", "test") for t in ("ner", "pos")
    }
    means = {f"{p}_{m}" for p in ("valid", "test") for m in ("loss", "perplexity")}
    later = {"test_2018_loss", "test_2018_perplexity"}
    assert report.keys() == tags | means | later


def test_accuracy_counts_symbols_and_not_the_end():
    problem = tiny()
    params = drawn(problem, scale=0)
    accuracy = jax.jit(lambda p: problem.observe(p, None, DATA)["valid_accuracy"])
    bias = params["mt"]["output"]["bias"].at[6].set(1.0)  # says 6, always
    params["mt"]["output"]["bias"] = bias
    np.testing.assert_allclose(accuracy(params), [2 / 3, 0, 0], rtol=1e-6)
    params["mt"]["output"]["bias"] = bias.at[END].set(2.0)
    assert accuracy(params)[0] == 0


def test_padding_and_blocks_do_not_change_the_metric():
    whole, blocks = tiny(batch_size=3), tiny(batch_size=2)
    wide = jax.tree.map(
        lambda rows: jnp.pad(rows, ((0, 0), (0, 2)), constant_values=PAD), DATA
    )

    @jax.jit
    def run(params, key, data, wide):
        return [
            whole.metric(params, data),
            blocks.metric(params, data),
            whole.metric(params, wide),
            whole.losses[0](params, data["valid"], key)[0],
        ]

    metrics = run(drawn(whole), jax.random.key(0), DATA, wide)
    np.testing.assert_allclose(metrics, metrics[0], rtol=1e-6)  # float32


def test_each_action_moves_the_encoder_and_its_own_decoder():
    problem = tiny()
    assert [action.loss for action in problem.actions] == [0, 1, 2]
    assert [action.params for action in problem.actions] == [
        ("encoder", "mt"),
        ("encoder", "ner"),
        ("encoder", "pos"),
    ]
    assert problem.names == ("MT", "NER", "POS")

    @jax.jit
    def norms(params, key):
        gradients = [
            jax.grad(lambda p, loss=loss: loss(p, DATA["train"], key)[0])(params)
            for loss in problem.losses
        ]
        return [{n: optax.tree.norm(g[n]) for n in g} for g in gradients]

    found = norms(drawn(problem), jax.random.key(0))
    for action, norm in zip(problem.actions, found, strict=True):
        moved = {name for name, value in norm.items() if value > 0}
        assert moved == set(action.params)


def test_dropout_is_in_the_loss_and_not_in_the_metric():
    problem = tiny(dropout=0.5)

    @jax.jit
    def run(params, key, other):
        losses = [problem.losses[0](params, DATA["train"], k)[0] for k in (key, other)]
        return losses, [problem.metric(params, DATA) for _ in range(2)]

    losses, metrics = run(drawn(problem), jax.random.key(0), jax.random.key(1))
    assert losses[0] != losses[1]
    assert metrics[0] == metrics[1]


def test_the_norm_is_clipped_in_each_group_by_itself():
    problem = tiny(clip_norm=1.0, learning_rate=1.0)
    gradient = {"w": jnp.array([30.0, 40.0])}

    @jax.jit
    def moment():
        _, state = problem.optimizers.update(
            gradient, problem.optimizers.init(gradient)
        )
        return optax.tree.get(state, "mu")["w"]

    np.testing.assert_allclose(moment(), [0.06, 0.08], rtol=1e-6)  # (1 - β₁) g / ‖g‖


def test_the_reward_is_100_over_the_perplexity_of_the_best_check():
    problem = tiny()
    history = jnp.log(jnp.array([8.0, 4.0, 5.0, 1.0]))
    live = jnp.array([True, True, True, False])
    np.testing.assert_allclose(problem.reward(history, live), 25)
    assert jnp.isnan(problem.reward(history, jnp.zeros(4, bool)))
    assert not problem.maximize


def test_thirty_steps_on_the_synthetic_set_teach_something():
    sizes = (200, 50, 40, 20, 20)
    splits = translation.synthetic(0, vocab_size=12, lengths=(2, 4), sizes=sizes)
    problem = translation.problem(
        translation.vocab_sizes(splits),
        embedding=8,
        hidden=16,
        depth=1,
        bidirectional=False,
        batch_size=32,
        learning_rate=0.02,
    )
    rule, loss = problem.optimizers, problem.losses[0]

    @jax.jit
    def run(params, key, data):
        def step(carry, key):
            moved, state = carry
            batch = problem.sample(data, key)
            gradient = jax.grad(lambda p: loss(p, batch, key)[0])(moved)
            updates, state = rule.update(gradient, state)
            return (optax.apply_updates(moved, updates), state), None

        keys = jax.random.split(key, 30)
        (trained, _), _ = jax.lax.scan(step, (params, rule.init(params)), keys)
        both = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, trained)
        return jax.vmap(problem.metric, (0, None))(both, data)

    groups = drawn(problem, scale=0.3)
    params = {name: groups[name] for name in problem.actions[0].params}
    before, after = run(params, jax.random.key(0), controller_data(splits))
    assert after < before - 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": 5, "bidirectional": True}, r"hidden=...\)` must be even .* got 5"),
        ({"dropout": 1.0}, r"dropout=...\)` must lie in \[0, 1\); got 1.0"),
        ({"depth": 0}, r"depth=...\)` must be at least 1; got 0"),
        ({"batch_size": 0}, r"batch_size=...\)` must be at least 1; got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def test_vocabularies_that_are_missing_are_named():
    with pytest.raises(ValueError, match=r"must name 'source'.*got \['mt'\]"):
        translation.problem({"mt": 5})
