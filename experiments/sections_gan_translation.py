"""The sections of RESULTS.md on learned schedules of GANs and of translation.

SECTIONS    what `experiments.report` shows: name of the file -> (title, function)
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["SECTIONS", "adversarial", "translated"]

SMOKE = (
    "**CPU scale:** {what}. It shows that every part runs; what it says of schedules "
    "does not carry over to the published setting."
)
# by the authors: MNIST, means of three runs; perplexities of talks
PUBLISHED_SCORES = {"1:1": 8.631, "1:5": 9.003, "1:7": 9.023, "1:9": 9.015,
                    "AutoLoss": 9.055}  # fmt: skip
PUBLISHED_PERPLEXITIES = {"MT only": 3.77, "FixedRatio": 3.68, "FineTuned": 3.64,
                          "AutoLoss": 3.54}  # fmt: skip
PAID = (
    "* A segment is paid by its improvement over that of the segment before: gains of "
    ".1 and .5 earn 5 where two of .3 earn 1. So to put MT off can pay, which a "
    "controller that sees how far the run is can learn, and a context-free one cannot."
)
CLOSE_SCORE, CLOSE_PERPLEXITY = 0.05, 1.02


def adversarial(record: dict) -> list[str]:
    """Scores after equally many optimizer steps, shares, and what may be said."""
    config, lines = record["config"], []
    if config["num_updates"] < 50_000 or config["dataset"] in (
        "gaussian_grid",
        "digits",
    ):
        what = (
            f"{config['dataset']}, {config['num_updates']} optimizer steps a run, "
            f"{config['meta_updates']} updates of a controller"
        )
        lines += [SMOKE.format(what=what), ""]
    lines += [
        f"{config['num_seeds']} seeds, from the same initialisations, "
        f"{config['num_updates']} optimizer steps of both networks together.",
        "1:K: K steps of the generator after each of the discriminator. Score: at the",
        "best check, to be maximised; mean and 95 % interval over seeds. A decision of",
        "a controller for the generator takes "
        f"{config['generator_repeats']} of its steps. Seconds: compiling included.",
        "",
    ]
    for name, scene in record["scenes"].items():
        published = name == "mnist"
        heads = ["schedule", "score", "at the end", "AutoLoss less it", "higher in",
                 "steps of D", "of G", "s a run"]  # fmt: skip
        rows = []
        for method, row in scene["rows"].items():
            pair = scene["pairs"].get(f"AutoLoss − {method}")
            cells = [
                method,
                _score(row, "score"),
                f"{_mean(row['last']['score']):.3f}",
                _pair(pair),
                _wins(pair),
                *(f"{x:.0f}" for x in row["steps"]),
                f"{row['seconds']:.0f}",
            ]
            authors = PUBLISHED_SCORES.get(method)
            rows.append([*cells, f"{authors or '–'}"] if published else cells)
        heads += ["authors, other classifier"] if published else []
        lines += [f"{name}:", "", *_table(heads, rows), ""]
        lines += _score_claims(scene, name != "gaussian_grid")
        lines += _drift(scene["rows"], ("D", "G"), "G")
        lines.append("")
    wins = _transfer_wins(record["scenes"])
    return [*lines, *wins, *_learning(record["controllers"])]


def translated(record: dict) -> list[str]:
    """Perplexities and accuracies on the test split, shares, and what may be said."""
    config, rows = record["config"], record["rows"]
    lines = []
    if config["corpus"] == "synthetic" or config["num_steps"] < 10_000:
        what = (
            f"{config['corpus']}, {config['hidden_units']} units, "
            f"{config['num_steps']} steps a run, {config['meta_updates']} updates of a "
            "controller"
        )
        lines += [SMOKE.format(what=what), ""]
    heads = ("schedule", "test PPL", "at the end", "AutoLoss less it", "lower in",
             "NER accuracy", "POS accuracy", "MT share, first fifth", "last",
             "s a run", "authors, other data")  # fmt: skip
    table = []
    for method, row in rows.items():
        pair = record["pairs"].get(f"AutoLoss − {method}")
        table.append(
            (
                method,
                _score(row, "test_perplexity"),
                f"{_mean(row['last']['test_perplexity']):.3f}",
                _pair(pair),
                _wins(pair),
                *(f"{_mean(row['scores'][f'test_{t}_accuracy']):.3f}"
                  for t in ("ner", "pos")),
                *(f"{row['shares'][i][0]:.2f}" for i in (0, -1)),
                f"{row['seconds']:.0f}",
                PUBLISHED_PERPLEXITIES.get(method, "–"),
            )
        )  # fmt: skip
    lines += [
        f"{config['num_seeds']} seeds, from the same initialisations, "
        f"{config['num_steps']} steps each. All at the best check of the translation's",
        "loss on validation; mean and 95 % interval over seeds. MT only does not train",
        "the taggers. Seconds: compiling included.",
        "",
        *_table(heads, table),
        "",
        *_perplexity_claims(rows, record["pairs"]),
        *_learning(record["controllers"]),
        *_way_of_learning(record["controllers"], config["segment_reward"]),
    ]
    return lines


def _score_claims(scene: Mapping[str, Any], is_goal: bool = True) -> list[str]:
    """The goal is in units of inception scores, which those of the grid are not."""
    rows, pairs = scene["rows"], scene["pairs"]
    if "AutoLoss" not in rows:
        return []
    others = [name for name in rows if name not in ("AutoLoss", "context-free")]
    fixed = [name for name in others if not name.startswith("random")]
    mean = lambda name: _mean(rows[name]["scores"]["score"])
    best = max(fixed, key=mean)
    away = mean("AutoLoss") - mean(best)
    against = f"* AutoLoss less the best fixed schedule ({best}): {away:+.3f}"
    if is_goal:
        verdict = _verdict(away >= -CLOSE_SCORE)
        against += f"; goal, at least −{CLOSE_SCORE:g}: {verdict}"
    return [
        f"{against}. Which is the best is known only after all have been run.",
        f"* {_about_state(pairs.get('AutoLoss − context-free'))}",
    ]


def _perplexity_claims(rows: Mapping[str, Any], pairs: Mapping) -> list[str]:
    if "AutoLoss" not in rows:
        return []
    mean = lambda name: _mean(rows[name]["scores"]["test_perplexity"])
    ratio = mean("AutoLoss") / mean("FixedRatio")
    first, last = (rows["AutoLoss"]["shares"][i][0] for i in (0, -1))
    return [
        f"* Goal, at most 1.02 of FixedRatio's perplexity: {ratio:.3f}, "
        f"{_verdict(ratio <= CLOSE_PERPLEXITY)}.",
        "* Goal, its MT share in the last fifth at least that in the first: "
        f"{last:.3f} and {first:.3f}, {_verdict(last >= first)}.",
        f"* {_about_state(pairs.get('AutoLoss − context-free'))}",
    ]


def _transfer_wins(scenes: Mapping[str, Any]) -> list[str]:
    """How often a controller beats 1:1 on other architectures."""
    won = [
        _mean(scene["rows"]["AutoLoss"]["scores"]["score"])
        > _mean(scene["rows"]["1:1"]["scores"]["score"])
        for name, scene in scenes.items()
        if name.startswith("architecture") and {"AutoLoss", "1:1"} <= set(scene["rows"])
    ]
    if not won:
        return []
    return [
        f"* On other architectures AutoLoss is above 1:1 in {sum(won)} of {len(won)} "
        "(authors: 16 of 20; chance is half).",
        "",
    ]


def _way_of_learning(controllers: Mapping[str, Any], reward: str) -> list[str]:
    """Whether controllers have learned to step on translation, and what paid them."""
    lines = []
    for kind, row in controllers.items():
        if min(map(len, row["shares"])) < 3:
            continue  # there are no thirds
        shares = [np.array_split(np.asarray(own)[:, 0], 3) for own in row["shares"]]
        each = ", ".join(f"{a.mean():.2f} to {c.mean():.2f}" for a, _, c in shares)
        lines.append(
            f"* MT share while {kind} learned, first to last third of the segments of "
            f"each controller: {each}."
        )
    if reward != "released":
        lines.append(PAID)
    return lines


def _learning(controllers: Mapping[str, Any]) -> list[str]:
    return [
        f"* {kind}: controllers learned from {row['steps']:.0f} decisions each, "
        f"{row['seconds']:.0f} s for all; {row['restarts']} runs given up."
        for kind, row in controllers.items()
    ]


def _drift(rows: Mapping[str, Any], names: Sequence[str], shown: str) -> list[str]:
    """How the share of an action changes in the runs that controllers led."""
    index = names.index(shown)
    parts = [
        f"{kind} {rows[kind]['shares'][0][index]:.2f} to "
        f"{rows[kind]['shares'][-1][index]:.2f}"
        for kind in ("AutoLoss", "context-free")
        if kind in rows
    ]
    text = f"* Share of decisions for {shown}, first to last fifth: {', '.join(parts)}."
    return [text] if parts else []


def _about_state(pair: Mapping[str, Any] | None) -> str:
    if not pair or pair.get("low") is None or pair["low"] <= 0 <= pair["high"]:
        return (
            "AutoLoss and its context-free form do not differ by more than chance: "
            "nothing shows that what was learned depends on the state of a run."
        )
    return (
        f"AutoLoss differs from its context-free form by {_pair(pair)}: what it sees "
        "of a run matters."
    )


def _score(row: Mapping[str, Any], name: str) -> str:
    interval = row["intervals"][name]
    if interval is None:
        return f"{_mean(row['scores'][name]):.3f}"
    return "{:.3f} [{:.3f}, {:.3f}]".format(*interval)


def _mean(values: Sequence[float | None]) -> float:
    return float(np.mean(np.array(values, float)))


def _pair(pair: Mapping[str, Any] | None) -> str:
    if pair is None:
        return "–"
    if pair.get("low") is None:
        return f"{pair['mean']:+.3f}"
    return f"{pair['mean']:+.3f} [{pair['low']:+.3f}, {pair['high']:+.3f}]"


def _wins(pair: Mapping[str, Any] | None) -> str:
    return "–" if pair is None else f"{pair['wins']} of {pair['n']}"


def _verdict(is_met: Any) -> str:
    return "reached" if is_met else "**not reached**"


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


SECTIONS = {
    "autoloss_gan": ("AutoLoss: schedules of GANs", adversarial),
    "autoloss_translation": ("AutoLoss: translation with taggings", translated),
    "autoloss_translation_released": (
        "AutoLoss: translation, a segment paid by its own improvement",
        translated,
    ),
}
