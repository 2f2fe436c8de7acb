"""The sections of RESULTS.md on learned schedules, from `results/autoloss_*.json`.

SECTIONS    what `experiments.report` shows: name of the file -> (title, function)
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from experiments import (
    sections_classification,
    sections_gan_translation,
    sections_throughput,
)
from metax.harness import mean_interval

__all__ = ["SECTIONS", "regression", "sweep", "transfer"]

# By the authors, each of ten trials: chosen on validation, and relative to a noise of
# 3.94 that is that of no split, so that they stand here without a verdict.
PUBLISHED = {
    "without L1": 0.790,
    "S1": 0.086,
    "S2": 0.096,
    "S3": 0.095,
    "joint": 0.086,
    "AutoLoss": 0.070,
    "AutoLoss without magnitudes": 0.086,
    "AutoLoss without losses": 0.101,
    "AutoLoss without validation": 0.085,
}
CLOSE = 0.03  # of test excess, to the tuned random schedule
# Earlier measurements at λ = .4 over data sets 1 to 8: test ± .04, validation ± .03.
BANDS = {"joint": (0.33, 0.425), "1:1": (0.335, 0.425), "random(0.5)": (0.32, 0.397)}


def regression(record: dict) -> list[str]:
    """Scores, differences, costs, and what they say about learned schedules."""
    config, rows, pairs = record["config"], record["rows"], record["pairs"]
    lam, seeds = config["lam"], record["data_seeds"]
    table = []
    for name, row in rows.items():
        against = pairs.get(f"{name} − joint")
        # without L1 the validation split is trained on: there is no score on it
        valid = "–" if name == "without L1" else f"{np.mean(row['valid']):+.3f}"
        table.append(
            (
                name,
                _interval(row["test"]),
                f"{np.mean(row['last_test']):+.3f}",
                valid,
                _pair(against),
                _wins(against),
                f"{np.mean(row['share']):.2f}",
                f"{row['steps'] / 1e6:.2f}",
                f"{row['seconds']:.0f}" if row["seconds"] else "–",
                _decimal(PUBLISHED.get(name)),
            )
        )
    heads = ("schedule", "test excess", "last iterate", "validation", "less joint",
             "wins", "L1 share", "million steps", "s", "authors")  # fmt: skip
    return [
        f"{len(seeds)} data sets. Excess of the squared error over the noise of the",
        "split, at the best check on validation; mean over initialisations, then over",
        'data sets. λ, p and thresholds are tuned on validation; rows "at λ", the',
        f"controllers and S1 to S3 have λ = {lam:g} without a choice.",
        f"Runs: {config['num_runs']} of each setting; of {config['num_controllers']} "
        f"controllers {config['num_guided']} each,",
        "the first of which begin with the same parameters. Steps of the task model",
        "and seconds are of a data set, with the search and all controllers; rows of",
        "one search share them.",
        '"last": the controller after the last update, where the others were kept by',
        'the runs that they led on their own data. "chosen": the controller whose runs',
        "did best on validation, as λ and p were chosen; the rows without it are means",
        "over all controllers. Authors: Tables 1 and 2, chosen on",
        "validation and relative to another noise; not to be compared digit by digit.",
        "Without L1: trained on both splits of the task, so its last iterate counts.",
        "",
        *_table(heads, table),
        "",
        *_regression_claims(record),
        "",
        "Test excess by data set:",
        "",
        *_by_seed(record),
    ]


def _regression_claims(record: dict) -> list[str]:
    rows, pairs = record["rows"], record["pairs"]
    if "AutoLoss" not in rows:
        return []
    claims = [
        f"* {a} − {b}: {_pair(pairs.get(f'{a} − {b}'))}, wins "
        f"{_wins(pairs.get(f'{a} − {b}'))}."
        for a, b in (
            ("random", "joint"),
            ("AutoLoss", "joint at λ"),
            ("AutoLoss", "joint"),
            ("AutoLoss", "random"),
            ("AutoLoss", "context-free"),
            ("context-free", "joint"),
            ("context-free", "random"),
            ("AutoLoss, chosen", "joint"),
            ("AutoLoss, chosen", "random"),
            ("AutoLoss, chosen", "context-free, chosen"),
            ("context-free, chosen", "joint"),
        )
        if f"{a} − {b}" in pairs
    ]
    to_joint = pairs["AutoLoss − joint"]["mean"]
    to_random = pairs["AutoLoss − random"]["mean"]
    idle = [n for n in ("S1", "S2", "S3") if n in rows and max(rows[n]["share"]) < 0.01]
    if idle:
        claims.append(f"* {', '.join(idle)}: no threshold of the grid was exceeded.")
    claims += [
        f"* Goal, not worse in the mean than the tuned joint loss: {to_joint:+.3f}, "
        f"{_verdict(to_joint <= 0)}.",
        *_chosen_claim(rows, pairs.get("AutoLoss, chosen − joint")),
        f"* Goal, within ±{CLOSE:g} of the tuned random schedule: {to_random:+.3f}, "
        f"{_verdict(abs(to_random) <= CLOSE)}.",
        f"* {_about_state(pairs['AutoLoss − context-free'])}",
    ]
    spread = [np.std(x, ddof=1) for x in rows["AutoLoss"]["controllers"] if len(x) > 1]
    if spread:
        claims.append(
            "* Standard deviation between controllers of one data set, mean: "
            f"{np.mean(spread):.3f}; between data sets: "
            f"{np.std(rows['AutoLoss']['test'], ddof=1):.3f}."
            if len(rows["AutoLoss"]["test"]) > 1
            else f"* Standard deviation between controllers: {np.mean(spread):.3f}."
        )
    if record["data_seeds"][0] == 1:
        claims += _first_seed(rows)
    return claims


def _chosen_claim(rows: dict, pair: dict | None) -> list[str]:
    """The same goal where validation chooses for all, and what choosing can do."""
    claims = []
    if pair is not None:
        claims.append(
            "* The same goal by the controller that was chosen on validation, as the "
            f"joint loss's λ was: {pair['mean']:+.3f}, {_verdict(pair['mean'] <= 0)}."
        )
    each = rows["AutoLoss"]["controllers"]
    if min(map(len, each)) > 1:
        away = [
            np.mean([f(own) - plain for own, plain in zip(each, rows["joint"]["test"],
                                                          strict=True)])
            for f in (min, max)
        ]  # fmt: skip
        claims.append(
            "* A choice among the controllers of each data set cannot leave "
            f"{away[0]:+.3f} to {away[1]:+.3f}, the means of the best and of the worst "
            "on the test split, which nobody can choose by."
        )
    return claims


def _first_seed(rows: dict) -> list[str]:
    """What is known of data set 1 from the authors' graph and earlier measurements."""
    found = rows["AutoLoss"]["test"][0]
    plain = rows["joint at λ"]["test"][0]
    below = 1 - found / plain
    return [
        f"* Data set 1, AutoLoss at most .14: {found:.3f}, {_verdict(found <= 0.14)}; "
        f"at least 65 % below the joint loss at the same λ ({plain:.3f}): "
        f"{below:.0%}, {_verdict(below >= 0.65)}."
    ]


def _about_state(pair: dict) -> str:
    low, high = pair.get("low"), pair.get("high")
    if low is None or high is None:
        return "One data set tells nothing about a dependence on the state of a run."
    if high < 0:
        return "AutoLoss is below its context-free form: the state of the run is used."
    if low > 0:
        return "AutoLoss is above its context-free form: the features did harm."
    return (
        "AutoLoss and its context-free form do not differ: nothing shows that what was "
        "learned depends on the state of a run."
    )


def _by_seed(record: dict) -> list[str]:
    names = [n for n in record["rows"] if not n.endswith((", last", ", chosen"))]
    cells = [record["rows"][n]["test"] for n in names]
    rows = [
        (seed, *(f"{x:+.3f}" for x in values))
        for seed, *values in zip(record["data_seeds"], *cells, strict=True)
    ]
    return _table(("data set", *names), rows)


def sweep(record: dict) -> list[str]:
    """Test scores by λ, spreads, and paired differences from the joint loss."""
    config, rows = record["config"], record["rows"]
    is_regression = config["task"] == "regression"
    quantity = "Test excess" if is_regression else "Test error"
    heads = ("schedule", *(f"λ = {lam:.3g}" for lam in config["lams"]), "spread",
             "share at the least λ", "at the largest", "million steps")  # fmt: skip
    lines = [
        (
            name,
            *(f"{x:.3f}" for x in row["test"]),
            f"{np.mean(row['spread']):.3f}",
            *(f"{row['share'][i]:.2f}" for i in (0, -1)),
            f"{row['steps'] / 1e6:.2f}",
        )
        for name, row in rows.items()
    ]
    text = [
        f"{quantity} at the best check on validation, mean over "
        f"{len(record['data_seeds'])} data sets and all runs.",
        "Spread: largest less smallest over λ, mean over data sets. Share: of L1",
        "steps.",
        f"Controllers of each λ and data set: {config['num_controllers']}.",
        "",
        *_table(heads, lines),
        "",
        *_sweep_claims(record),
    ]
    if len(record["data_seeds"]) > 1:
        pairs = [
            (name, *(f"{_pair(pair[k])}, {_wins(pair[k])}" for k in ("test", "valid")))
            for name, pair in record["pairs"].items()
        ]
        heads = ("paired over data sets", "test, wins", "validation, wins")
        text += ["", *_table(heads, pairs)]
    return text


def _sweep_claims(record: dict) -> list[str]:
    rows = record["rows"]
    if record["config"]["task"] != "regression":
        return []
    if "AutoLoss" not in rows:
        return _held_to_bands(record)
    plain, learned = (np.mean(rows[n]["spread"]) for n in ("joint", "AutoLoss"))
    met = learned <= 0.15 and plain >= 1.0
    spreads = (rows[n]["spread"] for n in ("AutoLoss", "joint", "context-free"))
    each = zip(record["data_seeds"], *spreads, strict=True)
    return [
        "* Goal, AutoLoss spreads by at most .15 where the joint loss spreads by at "
        f"least 1.0: {learned:.3f} and {plain:.3f}, {_verdict(met)}.",
        "* Spread of AutoLoss, the joint loss and context-free on each data set: "
        + "; ".join(f"{s}: {a:.3f}, {j:.3f}, {c:.3f}" for s, a, j, c in each)
        + ".",
        "* A context-free controller, which sees nothing of the run, spreads by "
        f"{np.mean(rows['context-free']['spread']):.3f}.",
        *_out_of_reach(record),
        f"* λ p/(1 − p) of AutoLoss, p being its L1 share: {_strengths(record)}.",
    ]


def _out_of_reach(record: dict) -> list[str]:
    """Shares that a context-free controller cannot come to in its updates."""
    config, share = record["config"], record["rows"]["AutoLoss"]["share"]
    moved = config["meta_rate"] * config["num_updates"]
    most = 1 / (1 + np.exp(-2 * moved / config["temperature"]))
    beyond = [f"{lam:g}" for lam, p in zip(config["lams"], share, strict=True)
              if p > most]  # fmt: skip
    if not beyond:
        return []
    return [
        f"* It has two biases, which Adam moves by about {config['meta_rate']:g} an "
        f"update: in {config['num_updates']} updates its L1 share comes to {most:.2f} "
        f"at most. AutoLoss, whose network moves its logits faster, takes more at λ = "
        f"{', '.join(beyond)}: there the two differ by how fast they learn, which says "
        "nothing about a use of the run's state."
    ]


def _held_to_bands(record: dict) -> list[str]:
    """At λ = .4 on data sets 1 to 8, where earlier measurements are known."""
    lams, rows = record["config"]["lams"], record["rows"]
    if 0.4 not in lams or record["data_seeds"] != list(range(1, 9)):
        return []
    at, claims = lams.index(0.4), []
    for name, (test, valid) in BANDS.items():
        found = rows[name]["test"][at], rows[name]["valid"][at]
        met = abs(found[0] - test) <= 0.04 and abs(found[1] - valid) <= 0.03
        verdict = "inside" if met else "**outside**"
        claims.append(
            f"* {name} at λ = .4: test {found[0]:.3f}, band {test:g} ± .04, validation "
            f"{found[1]:.3f}, band {valid:g} ± .03: {verdict}."
        )
    return claims


def _strengths(record: dict) -> str:
    """What counts where two losses share one Adam: nearly the same at every λ."""
    pairs = zip(record["config"]["lams"], record["rows"]["AutoLoss"]["share"],
                strict=True)  # fmt: skip
    return ", ".join(f"{lam * p / (1 - p):.2f}" for lam, p in pairs)


def transfer(record: dict) -> list[str]:
    """Matrices of scores and differences, and their means off the diagonal."""
    seeds, matrices = record["data_seeds"], record["matrices"]
    text = [
        f"λ = {record['config']['lam']:g}. Rows: the data set that a controller was "
        "trained on, or p tuned on;",
        "columns: the data set of the runs. Joint: λ tuned on the column's validation.",
        "Where a row says `less`, test excess less that of the joint loss tuned on the",
        "column, or of the random schedule with the p of the row.",
        "",
    ]
    heads = ("", "trained on", *(f"runs on {seed}" for seed in seeds))
    lines: list[Sequence[Any]] = [
        ("joint", "the column", *(f"{x:+.3f}" for x in record["joint"]))
    ]
    for name, matrix in matrices.items():
        shown = name.replace(" − ", " less ")
        for i, row in zip(seeds, matrix, strict=True):
            lines.append((shown, i, *(f"{x:+.3f}" for x in row)))
    text += [*_table(heads, lines), ""]
    pairs = zip(seeds, record["chances"], strict=True)
    chosen = ", ".join(f"{i}: {p:g}" for i, p in pairs)
    text.append(f"* p by the validation split of each controller: {chosen}.")
    for kind, shares in record["shares"].items():
        means = zip(seeds, np.mean(shares, axis=1), strict=True)
        own = ", ".join(f"{i}: {x:.2f}" for i, x in means)
        text.append(f"* L1 share of the runs that {kind} led, by row: {own}.")
    text += [
        f"* {name}: {_pair(pair)}, below in {_wins(pair)} columns."
        for name, pair in record["pairs"].items()
    ]
    return text


SECTIONS = {
    "autoloss_regression": ("AutoLoss: regression", regression),
    "autoloss_schedules": ("AutoLoss: schedules made by hand, regression", sweep),
    "autoloss_sweep": ("AutoLoss: λ, regression", sweep),
    "autoloss_sweep_faster": (
        "AutoLoss: λ, regression, controllers that learn faster",
        sweep,
    ),
    "autoloss_transfer": ("AutoLoss: controllers on other data, regression", transfer),
    **sections_classification.SECTIONS,
    **sections_gan_translation.SECTIONS,
    **sections_throughput.SECTIONS,
}


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def _interval(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:+.3f}"
    mean, low, high = mean_interval(values)
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _pair(pair: dict | None) -> str:
    if pair is None:
        return "–"
    if "low" not in pair:
        return f"{pair['mean']:+.3f}"
    return f"{pair['mean']:+.3f} [{pair['low']:+.3f}, {pair['high']:+.3f}]"


def _wins(pair: dict | None) -> str:
    return "–" if pair is None else f"{pair['wins']} of {pair['n']}"


def _decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _verdict(is_met: Any) -> str:
    return "reached" if is_met else "**not reached**"
