import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax.base import Hyperparameter
from metax.stn import best_response
from metax.tasks.language import (
    LanguageData,
    language_tuning,
    stock_language_hparams,
)
from metax.tasks.text import batchify, segments, synthetic_text

VOCAB, WIDTH, BATCH, TIME = 6, 4, 3, 5
KEY = jax.random.key(7)
ATOL = 1e-6


def make(**arguments):
    defaults = {"vocab": VOCAB, "width": WIDTH, "batch_size": BATCH, "segment": TIME}
    return language_tuning(stock_language_hparams(), **{**defaults, **arguments})


@pytest.fixture(scope="module")
def problem():
    """Compiled once with a key and once without."""
    problem = make().problem
    return problem._replace(
        predict=jax.jit(problem.predict), train_loss=jax.jit(problem.train_loss)
    )


@pytest.fixture(scope="module")
def params(problem):
    return jax.jit(problem.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def batch():
    tokens = jax.random.randint(jax.random.key(1), (BATCH, TIME + 1), 0, VOCAB)
    return {"input": tokens[:, :-1], "target": tokens[:, 1:]}


def natural(problem, **values):
    """Values as a tuner hands them over: 0 but for those given."""
    zero = dict.fromkeys(problem.hparams, 0.0)
    return {
        name: jnp.broadcast_to(
            jnp.asarray(value, jnp.float32),
            () if problem.hparams[name].shared else (BATCH,),
        )
        for name, value in {**zero, **values}.items()
    }


def cross_entropy(outputs, batch):
    logits = np.float64(outputs["logits"])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = np.asarray(batch["target"])[..., None]
    return -np.take_along_axis(log_p, target, -1)[..., 0].mean(1)


def test_stock_hyperparameters_are_those_of_the_published_run_and_weight_decay():
    specs = stock_language_hparams()
    assert len(specs) == 8
    assert {name for name, spec in specs.items() if spec.shared} == {
        "word_dropout",
        "dropconnect",
    }
    for name in [name for name in specs if "drop" in name]:
        assert specs[name][:4] == (0.05, 0.0, 1.0, "logit")
    for name in ("activation_reg", "temporal_reg"):
        assert specs[name][:4] == (0.05, 0.0, float("inf"), "softplus")
    assert specs["weight_decay"][:4] == (1e-4, 1e-7, 10.0, "log")


def test_training_loss_is_cross_entropy_and_penalties_by_the_example(
    problem, params, batch
):
    alpha, beta, decay = np.array([[0.0, 1.0, 2.0], [3.0, 0.0, 1.0], [0.1, 0.2, 0.0]])
    hparams = natural(
        problem, activation_reg=alpha, temporal_reg=beta, weight_decay=decay,
        output_dropout=0.5,
    )  # fmt: skip
    outputs = problem.predict(params, batch, hparams, KEY)
    loss = problem.train_loss(outputs, batch, hparams, params)
    raw, dropped = np.float64(outputs["raw"]), np.float64(outputs["dropped"])
    square = sum(np.sum(np.float64(x) ** 2) for x in jax.tree.leaves(params["params"]))
    wanted = cross_entropy(outputs, batch)
    wanted += alpha * (dropped**2).mean((1, 2))
    wanted += beta * (np.diff(raw, axis=1) ** 2).mean((1, 2)) + decay * square / 2
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    assert loss.shape == (BATCH,)


def test_validation_loss_has_no_penalty(problem, params, batch):
    outputs = problem.predict(params, batch, natural(problem), None)
    wanted = cross_entropy(outputs, batch).mean()
    np.testing.assert_allclose(problem.valid_loss(outputs, batch), wanted, rtol=1e-6)


def test_carried_state_is_no_weight_and_is_not_decayed(problem, params, batch):
    hparams = natural(problem, weight_decay=1.0)
    outputs = problem.predict(params, batch, hparams, KEY)
    carried = problem.carry(params, outputs)
    assert not jnp.all(carried["state"]["train"][0].hidden == 0)
    np.testing.assert_array_equal(
        problem.train_loss(outputs, batch, hparams, params),
        problem.train_loss(outputs, batch, hparams, carried),
    )


def test_one_output_mask_serves_all_times_and_each_row_has_its_rate(
    problem, params, batch
):
    rate = jnp.array([0.0, 0.5, 1.0])
    hparams = natural(problem, output_dropout=rate)
    outputs = problem.predict(params, batch, hparams, KEY)
    factor = outputs["dropped"] / outputs["raw"]
    np.testing.assert_allclose(
        factor, jnp.broadcast_to(factor[:, :1], factor.shape), rtol=1e-6
    )
    np.testing.assert_array_equal(factor[0], 1)
    assert set(np.unique(np.round(factor[1], 5))) <= {0.0, 2.0}
    np.testing.assert_array_equal(factor[2], 0)


def hide_words(params):
    """Parameters whose layers see no word; the decoder is as before in `raw`."""
    weights = params["params"]
    kernel = weights["layer_0"]["input"]["kernel"]
    layer = {**weights["layer_0"]}
    layer["input"] = {**layer["input"], "kernel": jnp.zeros_like(kernel)}
    return {**params, "params": {**weights, "layer_0": layer}}


def test_input_dropout_of_one_blinds_that_row_alone(problem, params, batch):
    hparams = natural(problem, input_dropout=jnp.array([0.0, 1.0, 0.0]))
    raw = problem.predict(params, batch, hparams, KEY)["raw"]
    seeing = problem.predict(params, batch, hparams, None)["raw"]
    blind = problem.predict(hide_words(params), batch, hparams, None)["raw"]
    np.testing.assert_allclose(raw[0], seeing[0], atol=ATOL)
    np.testing.assert_allclose(raw[1], blind[1], atol=ATOL)
    np.testing.assert_allclose(raw[2], seeing[2], atol=ATOL)


def test_hidden_dropout_of_one_cuts_the_layers_of_that_row_alone(
    problem, params, batch
):
    hparams = natural(problem, hidden_dropout=jnp.array([0.0, 1.0, 0.0]))
    raw = problem.predict(params, batch, hparams, KEY)["raw"]
    seeing = problem.predict(params, batch, hparams, None)["raw"]
    # what no word reaches is the same for all words
    other = {**batch, "input": (batch["input"] + 1) % VOCAB}
    unmoved = problem.predict(params, other, hparams, KEY)["raw"]
    np.testing.assert_allclose(raw[0], seeing[0], atol=ATOL)
    np.testing.assert_allclose(raw[1], unmoved[1], atol=ATOL)
    assert not np.allclose(raw[2], unmoved[2], atol=1e-4)
    assert not np.allclose(raw[1], seeing[1], atol=1e-4)


def test_word_dropout_drops_whole_words(problem, params, batch):
    words = batch["input"].at[:, 0].set(jnp.arange(BATCH))
    batch = {**batch, "input": words}
    hparams = natural(problem, word_dropout=0.5)
    run = lambda params, key: problem.predict(params, batch, hparams, key)["raw"][:, 0]
    blind = run(hide_words(params), None)
    raws = jnp.stack([run(params, key) for key in jax.random.split(KEY, 20)])
    is_blind = np.isclose(raws, blind, atol=ATOL)
    whole = is_blind.all(-1)
    assert (whole == is_blind.any(-1)).all()
    assert 0.2 < whole.mean() < 0.8  # 60 draws of a half


def test_dropconnect_of_one_cuts_all_recurrent_weights_and_no_other(
    problem, params, batch
):
    hparams = natural(problem, dropconnect=1.0)
    got = problem.predict(params, batch, hparams, KEY)["raw"]
    cut = jax.tree_util.tree_map_with_path(
        lambda path, x: (
            jnp.zeros_like(x) if "['hidden']['kernel']" in str_of(path) else x
        ),
        params,
    )
    wanted = problem.predict(cut, batch, hparams, None)["raw"]
    np.testing.assert_allclose(got, wanted, atol=ATOL)
    assert not np.allclose(got, problem.predict(params, batch, hparams, None)["raw"])


def str_of(path):
    return jax.tree_util.keystr(path)


def test_without_a_key_nothing_is_dropped_and_with_one_draws_are_its_own(
    problem, params, batch
):
    rates = {name: 0.5 for name in problem.hparams if "drop" in name}
    hparams = natural(problem, **rates)
    run = lambda hparams, key: problem.predict(params, batch, hparams, key)["logits"]
    plain = run(natural(problem), None)
    np.testing.assert_array_equal(run(hparams, None), plain)
    np.testing.assert_array_equal(run(hparams, KEY), run(hparams, KEY))
    assert not np.allclose(run(hparams, KEY), run(hparams, jax.random.key(8)))
    np.testing.assert_allclose(run(natural(problem), KEY), plain, atol=ATOL)


def test_names_that_are_not_tuned_are_off(batch):
    specs = {"output_dropout": Hyperparameter(0.5, 0.0, 1.0, "logit")}
    problem, _ = language_tuning(
        specs, vocab=VOCAB, width=WIDTH, layers=1, batch_size=BATCH
    )
    params = jax.jit(problem.init)(jax.random.key(0))
    hparams = {"output_dropout": jnp.full(BATCH, 0.5, jnp.float32)}
    outputs = problem.predict(params, batch, hparams, KEY)
    plain = problem.predict(params, batch, hparams, None)
    np.testing.assert_allclose(outputs["raw"], plain["raw"], atol=ATOL)
    loss = problem.train_loss(outputs, batch, hparams, params)
    np.testing.assert_allclose(loss, cross_entropy(outputs, batch), rtol=1e-6)


def test_state_is_carried_in_the_slot_of_its_pass(problem, params, batch):
    hparams = natural(problem)
    for key, slot, other in ((KEY, "train", "valid"), (None, "valid", "train")):
        outputs = problem.predict(params, batch, hparams, key)
        state = problem.carry(params, outputs)["state"]
        np.testing.assert_allclose(
            state[slot][1].hidden, outputs["raw"][:, -1], atol=ATOL
        )
        assert jax.tree.all(jax.tree.map(lambda x: jnp.all(x == 0), state[other]))


def test_two_segments_in_order_are_one_long_one(problem, params, batch):
    hparams = natural(problem)
    long = {name: jnp.tile(x, (1, 2)) for name, x in batch.items()}
    first = problem.predict(params, batch, hparams, None)
    second = problem.predict(problem.carry(params, first), batch, hparams, None)
    whole = problem.predict(params, long, hparams, None)
    both = jnp.concatenate([first["logits"], second["logits"]], axis=1)
    np.testing.assert_allclose(both, whole["logits"], atol=ATOL)


def test_a_row_that_starts_reads_no_carried_state(problem, params, batch):
    hparams = natural(problem)
    fresh = problem.predict(params, batch, hparams, None)
    carried = problem.carry(params, fresh)
    mixed = {**batch, "starts": jnp.array([True, False, True])}
    got = problem.predict(carried, mixed, hparams, None)["logits"]
    late = problem.predict(carried, batch, hparams, None)["logits"]
    np.testing.assert_allclose(got[::2], fresh["logits"][::2], atol=ATOL)
    np.testing.assert_allclose(got[1], late[1], atol=ATOL)
    assert not np.allclose(got[0], late[0], atol=1e-4)


def test_no_gradient_reaches_the_state_or_comes_from_it(problem, params, batch):
    hparams = natural(problem)
    params = problem.carry(params, problem.predict(params, batch, hparams, KEY))

    def losses(params):
        outputs = problem.predict(params, batch, hparams, KEY)
        ends = sum(jnp.sum(x) for x in jax.tree.leaves(outputs["state"]))
        return problem.train_loss(outputs, batch, hparams, params).mean(), ends

    of_loss, of_ends = jax.jit(jax.jacrev(losses))(params)
    zero = lambda tree: all(jnp.all(x == 0) for x in jax.tree.leaves(tree))
    assert zero(of_loss["state"])
    assert zero(of_ends)
    assert not any(jnp.all(x == 0) for x in jax.tree.leaves(of_loss["params"]))


def test_no_gradient_of_the_pass_reaches_the_rates(problem, params, batch):
    rates = {name: 0.3 for name in problem.hparams if "drop" in name}

    def total(hparams):
        return problem.predict(params, batch, hparams, KEY)["logits"].sum()

    gradient = jax.jit(jax.grad(total))(natural(problem, **rates))
    assert all(jnp.all(x == 0) for x in gradient.values())


@pytest.mark.slow
def test_per_example_responses_go_through_every_layer_and_mask(batch):
    problem = make(layers=1).problem
    params = jax.jit(problem.init)(jax.random.key(0))
    rates = {name: 0.4 for name in problem.hparams if "drop" in name}
    hparams = natural(problem, **rates)
    phi = best_response(8).init(jax.random.key(2), params)
    phi = jax.tree.map(lambda x: x + 0.1, phi)
    eps = jax.random.normal(jax.random.key(3), (BATCH, 8), jnp.float32)

    def change(route):
        response = best_response(8, route=route)
        model = lambda *args: problem.predict(*args, batch, hparams, KEY)["logits"]
        linearize = jax.jit(lambda *args: response.linearize(model, *args)[1])
        return linearize(params, phi, eps)

    np.testing.assert_allclose(
        change("inject"), change("columns"), atol=1e-5
    )  # float32


def test_a_uniform_model_is_as_perplexed_as_there_are_words(params):
    uniform = jax.tree.map(jnp.zeros_like, params)
    tokens = jax.random.randint(KEY, (23,), 0, VOCAB)
    metrics = make().evaluate(uniform, tokens)
    np.testing.assert_allclose(metrics["perplexity"], VOCAB, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], np.log(VOCAB), rtol=1e-6)


@pytest.mark.parametrize("segment", [4, 70])
def test_evaluation_reads_every_token_whatever_the_segment(params, segment):
    """22 predictions are 5 segments of 4 and a rest, or a part of one of 70."""
    tokens = jax.random.randint(KEY, (2, 23), 0, VOCAB)
    problem, evaluate = make(batch_size=2, segment=segment)
    batch = {"input": tokens[:, :-1], "target": tokens[:, 1:]}
    state = jax.tree.map(lambda x: x[:2], params["state"])
    outputs = problem.predict({**params, "state": state}, batch, {}, None)
    wanted = cross_entropy(outputs, batch).mean()
    got = jax.jit(evaluate)(params, tokens)
    np.testing.assert_allclose(got["loss"], wanted, rtol=1e-6)
    np.testing.assert_allclose(got["perplexity"], np.exp(wanted), rtol=1e-6)


def test_evaluation_takes_a_stream_as_one_row(params):
    tokens = jax.random.randint(KEY, (9,), 0, VOCAB)
    evaluate = make().evaluate
    one, row = evaluate(params, tokens), evaluate(params, tokens[None])
    np.testing.assert_allclose(one["loss"], row["loss"], rtol=1e-6)


def test_a_segment_is_drawn_at_any_place_and_starts_anew(problem):
    rows = jnp.arange(BATCH * 8).reshape(BATCH, 8)
    data = LanguageData(train=rows, valid=rows + 100)
    draw = jax.vmap(lambda key: problem.sample_train(data, key))
    batches = draw(jax.random.split(KEY, 60))
    firsts = batches["input"][:, 0, 0]
    assert set(firsts.tolist()) == {0, 1, 2}  # 8 tokens hold 5 and the one after
    np.testing.assert_array_equal(
        batches["input"][:, 1], firsts[:, None] + 8 + jnp.arange(TIME)
    )
    np.testing.assert_array_equal(batches["target"], batches["input"] + 1)
    assert batches["starts"].shape == (60, BATCH)
    assert jnp.all(batches["starts"])
    assert jnp.all(problem.sample_valid(data, KEY)["input"] >= 100)


def test_a_batch_passes_sampling_unchanged(problem, batch):
    assert problem.sample_train(batch, KEY) is batch
    assert problem.sample_valid(batch, KEY) is batch


def test_training_on_ordered_segments_learns_the_chain():
    text = synthetic_text(jax.random.key(0), 3000, VOCAB)
    problem, evaluate = make(width=12, layers=1, batch_size=8, segment=10)
    params, evaluate = jax.jit(problem.init)(jax.random.key(1)), jax.jit(evaluate)
    hparams = {
        name: jnp.asarray(spec.init, jnp.float32)
        for name, spec in problem.hparams.items()
    }
    rule = optax.adam(0.02)

    def loss(params, batch, key):
        outputs = problem.predict(params, batch, hparams, key)
        losses = problem.train_loss(outputs, batch, hparams, params)
        return losses.mean(), outputs

    def step(carry, turn):
        params, opt_state = carry
        gradient, outputs = jax.grad(loss, has_aux=True)(params, *turn)
        updates, opt_state = rule.update(gradient, opt_state)
        params = problem.carry(optax.apply_updates(params, updates), outputs)
        return (params, opt_state), None

    @jax.jit
    def epoch(params, opt_state, pieces, key):
        keys = jax.random.split(key, len(pieces["input"]))
        return jax.lax.scan(step, (params, opt_state), (pieces, keys))[0]

    pieces = segments(batchify(text.train, 8), 10)
    before = evaluate(params, text.valid)["perplexity"]
    carry = params, rule.init(params)
    for key in jax.random.split(KEY, 6):
        carry = epoch(*carry, pieces, key)
    after = evaluate(carry[0], text.valid)["perplexity"]
    np.testing.assert_allclose(before, VOCAB, rtol=0.1)
    assert after < 0.8 * VOCAB


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"vocab": 0}, r"`language_tuning\(vocab=.*got 0"),
        ({"width": 0}, r"width="),
        ({"layers": 0}, r"layers="),
        ({"batch_size": 0}, r"\(batch_size="),
        ({"valid_batch_size": 0}, r"valid_batch_size="),
        ({"segment": 0}, r"segment="),
    ],
)
def test_counts_below_one_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        make(**arguments)


def test_bad_input_is_named(problem, params, batch):
    sizes = {"vocab": 5, "width": 2}
    with pytest.raises(ValueError, match=r"activation_reg.*got 'dropout'"):
        language_tuning({"dropout": Hyperparameter(0.1)}, **sizes)
    with pytest.raises(ValueError, match=r"\['dropconnect'\].*shared=True"):
        language_tuning({"dropconnect": Hyperparameter(0.1)}, **sizes)
    with pytest.raises(ValueError, match=r"init\(key="):
        problem.init(jax.random.PRNGKey(0))
    half = jax.tree.map(lambda x: x[:2], batch)
    with pytest.raises(ValueError, match=r"batch_size=3, input of shape \(2, 5\)"):
        problem.predict(params, half, natural(problem), KEY)
    with pytest.raises(ValueError, match=r"valid_batch_size=3"):
        problem.predict(params, half, natural(problem), None)
    short = LanguageData(train=batch["input"], valid=batch["input"])
    with pytest.raises(ValueError, match=r"`LanguageData.train`.*rows of 5"):
        problem.sample_train(short, KEY)
    with pytest.raises(ValueError, match=r"evaluate\(tokens=.*\(1, 1\)"):
        make().evaluate(params, jnp.zeros(1, jnp.int32))


def test_training_and_validation_may_differ_in_their_rows(batch):
    problem, _ = make(layers=1, valid_batch_size=2)
    params = jax.jit(problem.init)(jax.random.key(0))
    half = jax.tree.map(lambda x: x[:2], batch)
    outputs = problem.predict(params, half, natural(problem), None)
    assert problem.carry(params, outputs)["state"]["valid"][0].cell.shape == (2, WIDTH)
    outputs = problem.predict(params, batch, natural(problem), KEY)
    assert problem.carry(params, outputs)["state"]["train"][0].cell.shape == (3, WIDTH)
