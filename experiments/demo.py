"""What metax learns in your place, on real data, in about two minutes on 2 cores.

One function a method: what it learns, beside what it replaces. The data are
scikit-learn's handwritten digits, which need no download, and for the schedules those
that the paper defines. What is tuned by hand is tuned on a fifth of the training images
and trained anew on all of them, or on a validation split; no choice depends on test
data.

    python -m experiments.demo [--out DIR]

Prints one table, and writes `summary.json` and `figure.png`. Expect "ok" in each row.
"""

import argparse
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metax import BilevelProblem, Loop, Task, harness, inner_loop
from metax.amalgamation import amalgamate, pool, rnnprop, with_warmup
from metax.amalgamation import load as load_optimizer
from metax.autoloss import (
    always,
    autoloss,
    bernoulli,
    bind,
    controller,
    features,
    frozen,
    joint,
    leaky_relu,
    rollout,
)
from metax.hypergradient import adam_hd, sgd_hd
from metax.stn import delta_stn
from metax.tasks import (
    MLP,
    Dataset,
    TunableMLP,
    controller_data,
    corrupt_labels,
    epochs,
    hold_out,
    image_classification,
    image_tuning,
    load,
    normalization,
    optimizees,
    regression,
    stock_hparams,
    task_data,
)


class Row(NamedTuple):
    method: str  # a name that no other row has
    setting: str  # what was given by hand
    metric: str  # what is measured; less is better
    values: np.ndarray  # [seeds], the metric
    baseline: str | None  # the method of an earlier row, compared with seed by seed
    expected: float  # the mean of the values that this very command gave
    tolerance: float  # how far it may be from that on another machine or version
    curves: Mapping[str, np.ndarray]  # panel of the figure to [seeds, epochs]


def hypergradient(num_epochs: int = 30, num_seeds: int = 5) -> list[Row]:
    """A learning rate that begins far too small: kept, tuned by a grid, or learned."""
    data, rows = load("digits"), []
    is_held = np.arange(len(data.train.label)) % 5 == 0
    part = lambda mask: jax.tree.map(lambda leaf: leaf[mask], data.train)
    halves = Dataset(train=part(~is_held), test=part(is_held))
    how: dict[str, Any] = {"num_epochs": num_epochs, "num_seeds": num_seeds}
    learn: dict[str, Any] = {"rule": "multiplicative", "bounds": (0, None)}
    for name, plain, hd, tried, expected in [
        ("sgd", optax.sgd, sgd_hd, np.logspace(-4, 1, 11), (2.297, 0.050, 0.124)),
        ("adam", optax.adam, adam_hd, np.logspace(-5, 0, 11), (2.176, 0.054, 0.062)),
    ]:
        losses, _ = train_digits(f"{name} grid", plain, tried, halves, **how)
        bad, best = tried[0], tried[np.nanargmin(losses[:, -1].mean(0))]
        learned = functools.partial(hd, hyper_learning_rate=0.05, **learn)
        untuned, tuned = f"{name} untuned", f"{name} tuned"
        for method, setting, rule, rate, baseline, mean in [
            (untuned, f"{bad:g}", plain, bad, None, expected[0]),
            (tuned, f"{best:.2g}, best of 11", plain, best, untuned, expected[1]),
            (f"{name}_hd", f"from {bad:g}, β = .05", learned, bad, tuned, expected[2]),
        ]:
            loss, alpha = train_digits(method, rule, rate[None], data, **how)
            curves = {"test loss": loss[..., 0], "learning rate": alpha[..., 0]}
            curves = {f"{name}: {panel}": curve for panel, curve in curves.items()}
            end = loss[:, -1, 0]
            rows.append(
                Row(method, setting, "test loss", end, baseline, mean, 0.015, curves)
            )
    return rows


def train_digits(
    label: str,
    rule: Callable[..., optax.GradientTransformation],
    rates: np.ndarray,
    data: Dataset,
    num_epochs: int,
    num_seeds: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Test loss and learning rate after each epoch, each [seeds, epochs, rates]."""
    mean, std = normalization("digits")
    task = image_classification(MLP(10, (64,)), data.train.image, mean=mean, std=std)
    test = lambda state, split: task.evaluate(state.params, split)

    def build(rate: jax.Array) -> Any:
        observe = lambda state: optax.tree.get(state, "learning_rate", rate)
        return epochs(inner_loop(task, rule(rate), observe=observe), 64, evaluate=test)

    loop, key = harness.grid(build, np.float32(rates)), jax.random.key(0)
    _, infos = harness.evaluate(
        loop, data, key, num_epochs, num_seeds=num_seeds, progress=label
    )
    return infos.metrics["loss"], infos.steps.observed[..., -1]


def regularisation(num_steps: int = 300, num_seeds: int = 5) -> list[Row]:
    """Three dropout rates, where 40 % of the training labels are wrong.

    Kept at .05, fixed at the best of eight for all three, or tuned in the one run that
    trains the network, by the same clean fifth of the training images.
    """
    data, (mean, std) = hold_out(load("digits"), 0.2), normalization("digits")
    train = corrupt_labels(data.train, 0.4, jax.random.key(0), num_classes=10)
    data = data._replace(train=train)
    rates = stock_hparams(["input_dropout", "dropout_1", "dropout_2"])
    model = TunableMLP(10, (64, 64))
    problem, judge = image_tuning(model, train.image, rates, mean=mean, std=std)
    rule = lambda: optax.sgd(0.03, momentum=0.9)
    how: dict[str, Any] = {"num_seeds": num_seeds, "key": jax.random.key(0)}

    tried = np.array([0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], np.float32)
    fixed = harness.grid(lambda rate: held(problem, rate, rule()), tried)
    states, _ = harness.evaluate(
        fixed, data, num_steps=5 * num_steps, progress="fixed dropout", **how
    )
    losses = lambda params, split: jax.vmap(judge, (0, None))(params, split)["loss"]
    valid, test = (
        np.asarray(jax.vmap(losses, (0, None))(states.params, split))
        for split in (data.valid, data.test)
    )
    best = int(valid.mean(0).argmin())

    loop = delta_stn(
        problem,
        inner_optimizer=rule(),
        response_optimizer=rule(),
        outer_optimizer=optax.adam(0.03),
        scale_optimizer=optax.adam(0.03),
        warmup_steps=50,
    )
    states, infos = harness.evaluate(
        loop, data, num_steps=num_steps, progress="delta_stn", **how
    )
    learned = np.asarray(losses(jax.vmap(loop.params)(states), data.test))
    curves = {f"delta_stn: {name}": infos.hparams[name] for name in rates}
    return [
        Row(method, setting, "test loss", values, baseline, mean, 0.05, shown)
        for method, setting, values, baseline, mean, shown in [
            ("dropout .05", "kept", test[:, 1], None, 0.689, {}),
            (
                "dropout best",
                f"{tried[best]:.2g}, best of 8",
                test[:, best],
                "dropout .05",
                0.579,
                {},
            ),
            ("delta_stn", "from .05", learned, "dropout best", 0.621, curves),
        ]
    ]


def held(
    problem: BilevelProblem, rate: jax.Array, rule: optax.GradientTransformation
) -> Loop:
    """Plain training of a bilevel problem, with one value for all hyperparameters."""

    def loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        hparams = {n: jnp.full(len(batch.label), rate) for n in problem.hparams}
        outputs = problem.predict(params, batch, hparams, key)
        return problem.train_loss(outputs, batch, hparams, params).mean()

    task = Task(problem.init, loss, problem.sample_train, lambda params, data: {})
    return inner_loop(task, rule)


def update_rule(num_steps: int = 300, num_seeds: int = 5) -> list[Row]:
    """A learned optimizer that comes with metax, and one learned here in half a minute.

    The first stands beside Adam and RMSProp, each at the best of five rates; the second
    beside the weights that it began with, and over the first 100 steps alone, since
    that is what it was trained for.
    """
    (train, test), digits = optimizees.digits_data(), optimizees.digits()
    is_held = np.arange(len(train["label"])) % 5 == 0
    part = lambda mask: {name: x[mask] for name, x in train.items()}
    halves, whole = (part(~is_held), part(is_held)), (train, test)

    def losses(label: str, build: Callable, tried: Any, sets: Any, num: int) -> Any:
        """Losses on the second set after `num` steps, [seeds, tried]."""
        loop = harness.grid(lambda x: inner_loop(digits.task, build(x)), tried)
        how: dict[str, Any] = {"num_seeds": num_seeds, "progress": label}
        states, _ = harness.evaluate(loop, sets[0], jax.random.key(0), num, **how)
        judge = jax.vmap(digits.task.evaluate, (0, None))
        return np.asarray(jax.vmap(judge, (0, None))(states.params, sets[1])["loss"])

    found, tried = [], np.array([0.002, 0.005, 0.01, 0.02, 0.05], np.float32)
    for name, rule in (("adam", optax.adam), ("rmsprop", optax.rmsprop)):
        rate = tried[
            losses(f"{name} grid", rule, tried, halves, num_steps).mean(0).argmin()
        ]
        values = losses(name, rule, rate[None], whole, num_steps)[:, 0]
        found.append((f"{name} best", f"{rate:.2g}, best of 5", values, None))
    once = losses(
        "pretrained",
        lambda _: load_optimizer("amalgamated-small"),
        np.zeros(1),
        whole,
        num_steps,
    )
    found.append(("amalgamated", "nothing", once[:, 0], "adam best"))

    student, key = rnnprop(), jax.random.key(0)
    loop = amalgamate(
        digits.task, student, pool("small"), reduce="minmax", truncation_length=50,
        unroll_length=100, warmup_steps=20, remat="step",
    )  # fmt: skip
    state, _ = harness.train(loop, train, key, 60, progress="amalgamate")
    first = loop.init(jax.random.split(key)[0]).theta  # where that began
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, state.theta)
    build = lambda theta: with_warmup(student.rule(theta), 20)
    values = losses("learned", build, both, whole, 100)
    found.append(("lstm random", "random weights", values[:, 0], None))
    found.append(("lstm trained", "60 truncations", values[:, 1], "lstm random"))
    expected = ((0.055, 0.02), (0.067, 0.02), (0.048, 0.02), (0.593, 0.1), (0.136, 0.1))
    return [
        Row(method, setting, "test loss", values, baseline, mean, tolerance, {})
        for (method, setting, values, baseline), (mean, tolerance) in zip(
            found, expected, strict=True
        )
    ]


def schedule(num_updates: int = 30, num_seeds: int = 5) -> list[Row]:
    """When to step on the error and when on λ Σ|θ|, with λ half of its best value.

    Both at every step, at random with the best of five chances, or by a controller that
    learns on rows of its own what it then does on those of the others. The error is
    that above the noise of the targets.
    """
    splits, lam = regression.generate(1), 0.2
    problem, data = regression.problem(lam), task_data(splits)
    key_learn, key_run = jax.random.split(jax.random.key(0))

    def excess(build: Callable[[Any], Any], settings: Any) -> dict[str, np.ndarray]:
        """Of runs led by the policy of each setting, [settings, seeds]."""

        def one(setting: Any, key: jax.Array, data: Any) -> dict[str, jax.Array]:
            own, policy = build(setting)
            result, _ = rollout(own, policy, key, data, 8000, early_stopping=False)
            return own.evaluate(result.best_params, data)

        runs = jax.jit(jax.vmap(jax.vmap(one, (None, 0, None)), (0, None, None)))
        found = runs(settings, jax.random.split(key_run, num_seeds), data)
        return {name: np.asarray(values) for name, values in found.items()}

    both = excess(lambda scale: (joint(scale)(problem), always(0)), np.ones(1))
    chances = np.array([0.4, 0.5, 0.6, 0.7, 0.8], np.float32)
    random = excess(lambda p: (problem, bernoulli(p)), chances)
    best = int(random["valid_excess"].mean(1).argmin())
    net = controller(2, (16,), 2.0, activation=leaky_relu)
    seen = features.released("regression")
    loop = autoloss(
        problem, net, features=seen, num_steps=5000, advantage="normalized",
        meta_optimizer=optax.adam(0.02),
    )  # fmt: skip
    state, infos = harness.train(
        loop, controller_data(splits), key_learn, num_updates, progress="autoloss"
    )
    stack = lambda x: jnp.asarray(x)[None]
    learned = excess(
        lambda c: (problem, bind(net, c[0], frozen(seen), c[1])),
        jax.tree.map(stack, (state.phi, state.feature_state)),
    )
    curves = {
        "autoloss: share of steps on the penalty": infos.action_fraction[..., 1].T
    }
    found = [
        ("joint", f"λ = {lam:g}", both, 0, None, 0.507, {}),
        ("random order", f"{chances[best]:.1g}, best of 5", random, best, "joint",
         0.103, {}),
        ("autoloss", f"{num_updates} updates of 8", learned, 0, "random order", 0.098,
         curves),
    ]  # fmt: skip
    return [
        Row(method, setting, "excess", values["test_excess"][index], baseline, mean,
            0.08, shown)
        for method, setting, values, index, baseline, mean, shown in found
    ]  # fmt: skip


METHODS = (hypergradient, regularisation, update_rule, schedule)


def report(rows: Sequence[Row]) -> None:
    """Prints the table, and below it each row against its baseline."""
    line = "{:12}  {:21}  {:30}  {:18}  {:13}  {}".format
    print(line("method", "setting", "measured", "baseline", "expected", ""))
    values, verdicts = {row.method: row.values for row in rows}, []
    for row in rows:
        mean, low, high = harness.mean_interval(row.values)
        measured, against = f"{row.metric} {mean:.3f} [{low:.3f}, {high:.3f}]", "-"
        expected = f"{row.expected:.3f} ± {row.tolerance:g}"
        is_ok = "ok" if abs(mean - row.expected) <= row.tolerance else "differs"
        if row.baseline is not None:
            base = values[row.baseline]
            against = f"{row.baseline} {base.mean():.3f}"
            mean, low, high = harness.paired_difference(row.values, base)
            word = "better" if high < 0 else "worse" if low > 0 else "not told apart"
            change = f"{row.metric} {mean:+.3f} [{low:+.3f}, {high:+.3f}]"
            verdicts.append(f"{row.method} against {row.baseline}: {change}, {word}")
        print(line(row.method, row.setting, measured, against, expected, is_ok))
    print("\nMeans over seeds [95 % interval]; against the baseline, seed by seed:")
    print(*verdicts, sep="\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    run = harness.create_run(parser.parse_args(argv).out, {})
    begin, panels = time.perf_counter(), {}
    rows = [row for method in METHODS for row in method()]
    report(rows)
    for row in rows:
        for panel, curve in row.curves.items():
            panels.setdefault(panel, {})[row.method] = curve
    harness.plot_panels(
        run / "figure.png",
        panels,
        xlabel="epoch; delta_stn: step of 5 batches; autoloss: update",
        ylabel="as in the title",
        logy=True,
        num_columns=2,
    )
    seconds = time.perf_counter() - begin
    harness.write_summary(run, {"rows": rows}, wall_time=seconds)
    print(f"\n{seconds:.0f} s; figure.png and summary.json are in {run}")


if __name__ == "__main__":
    main()
