"""The section of RESULTS.md on `results/stn_ridge.json`."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

__all__ = ["ridge"]


def ridge(record: dict) -> list[str]:
    """Every table of `experiments.stn_ridge`, each under a sentence that reads it."""
    seeds = record["config"]["num_seeds"]
    return [
        f"The closed form has λ* = {record['optimum']:.4f}. `λ`: mean of the last 200",
        f"outer steps, ± standard deviation over {seeds} seeds. A linear model is its",
        "own linearisation: the rows with and without it agree, and its worth does not",
        "show here. `outer steps`: until first within .2 of the own end, median;",
        "`wrong way`: how far λ went from the start away from the end, median and most",
        "of the seeds, and within 100 outer steps; .2 of it may be the first step of",
        "RMSprop, of ten learning rates. `largest loss`: in training, of all seeds; it",
        "starts at .5.",
        "",
        *_ablation(record["ablation"]),
        "",
        *_verdicts(record),
        "",
        "Relative error of the response at λ = -2: `bias`, of its closed form at σ to",
        "dw*/dλ; of what was learned, to that closed form and to dw*/dλ:",
        "",
        *_jacobians(record["jacobians"]),
        "",
        "σ with λ held at λ* and the response exact, beside √(τ / c):",
        "",
        *_rest_points(record["rest_points"]),
        "",
        "λ and σ tuned together, the same τ for both:",
        "",
        *_by_start(record["entropy_weights"], ("entropy_weight",), ("τ",), _with_sigma),
        "",
        "Condition number of the factor of the hyperparameters, and times that of A:",
        "",
        *_conditions(record["condition_numbers"]),
        "",
        "Largest stable inner rate at a fixed λ: the bound of a quadratic,",
        "2 / ((λ_max(A) + e^λ) · λ_max of the factor), and the rates between which",
        "runs of 1500 training steps begin to diverge in any seed:",
        "",
        *_rates(record["largest_rates"]),
        "",
        "Training steps a validation step, at equal training steps:",
        "",
        *_by_start(record["intervals"], ("train_steps",), ("T_train : 1",), _with_way),
        "",
        "Smaller outer rates; `corrected`: RMSprop with its bias corrected. Far below",
        "λ* the hypergradient falls like e^λ and RMSprop divides its size away. This,",
        "and a response not yet learned, we take for the cause of the long way of the",
        "centred variants from -6, without having tested it:",
        "",
        *_by_start(
            record["outer_rates"],
            ("corrected", "outer"),
            ("corrected", "α3"),
            _with_way,
        ),
        "",
        "Hypergradients at the optimal weights, of all 442 examples: relative error to",
        "the closed form and milliseconds a call. That of Delta-STN is one validation",
        "step, with the response as learned at that σ; its training is paid for apart.",
        "",
        *_hypergradients(record["hypergradients"]),
    ]


def _ablation(rows: list[dict]) -> list[str]:
    lines = []
    for rate, start, variant in _distinct(rows, "rate", "start", "variant"):
        mine = _where(rows, rate=rate, start=start, variant=variant)
        kept = [row for row in mine if not row["diverged"]]
        steps = f"{np.median([r['steps'] for r in kept]):.0f}" if kept else "–"
        ways = [_most(kept, name) for name in ("wrong_way", "wrong_way_first")]
        largest = [r["largest_loss"] for r in mine]
        loss = "not finite" if None in largest else f"{max(largest):.3g}"
        lines.append(
            (f"{rate:g}", f"{start:g}", variant, _ends(mine), steps, *ways, loss)
        )
    heads = ("inner rate", "from", "variant", "λ", "outer steps", "wrong way",
             "in 100 steps", "largest loss")  # fmt: skip
    return _table(heads, lines)


def _verdicts(record: dict) -> list[str]:
    """The two targets of stability, reached or not."""
    lines = []
    for rate, start in _distinct(record["ablation"], "rate", "start"):
        spreads = {}
        for name in ("Delta-STN", "STN"):
            rows = _where(record["ablation"], rate=rate, start=start, variant=name)
            ends = [row["final"] for row in rows if not row["diverged"]]
            spreads[name] = np.std(ends, ddof=1) if len(ends) == len(rows) > 1 else None
        delta, plain = spreads["Delta-STN"], spreads["STN"]
        if delta is not None:
            other = "it diverges" if plain is None else f"{plain:.5f}"
            met = "reached" if plain is None or delta <= plain else "not reached"
            lines.append(
                f"* Spread of λ over seeds at most that of STN, from {start:g} at "
                f"{rate:g}: {delta:.5f}, STN {other}: {met}."
            )
    rows = _where(record["outer_rates"], variant="Delta-STN", corrected=True)
    rows = _where(rows, outer=max(row["outer"] for row in rows))
    for (start,) in _distinct(rows, "start"):
        ways = [row["wrong_way_first"] for row in _where(rows, start=start)]
        lost = any(way is None for way in ways)
        far = float("inf") if lost else max(ways)
        lines.append(
            "* At most .5 the wrong way within 100 outer steps, with bias-corrected "
            f"RMSprop, Delta-STN from {start:g} at .004: {far:.2f}: "
            f"{'reached' if far <= 0.5 else 'not reached'}."
        )
    return lines


def _jacobians(rows: list[dict]) -> list[str]:
    heads = ("variant", "σ", "bias", "learned, to its closed form", "to dw*/dλ")
    lines = [
        (row["variant"], f"{row['sigma']:g}", f"{row['bias']:.2g}",
         *(f"{np.mean(row[name]):.2g}" for name in ("to_own", "to_true")))
        for row in rows
    ]  # fmt: skip
    return _table(heads, lines)


def _rest_points(rows: list[dict]) -> list[str]:
    lines = [
        (f"{row['tau']:g}", f"{row['root']:.4f}", _spread(row["sigma"])) for row in rows
    ]
    return _table(("τ", "√(τ / c)", "σ"), lines)


def _conditions(rows: list[dict]) -> list[str]:
    names = ("uncentred", "centred", "uncentred_total", "centred_total")
    heads = ("λ", "coordinates", "σ", "uncentred", "centred", "uncentred · κ(A)",
             "centred · κ(A)")  # fmt: skip
    lines = [
        (f"{row['lambda']:.2f}", row["coordinates"], f"{row['sigma']:g}",
         *(f"{row[name]:,.0f}" for name in names))
        for row in rows
    ]  # fmt: skip
    return _table(heads, lines)


def _rates(rows: list[dict]) -> list[str]:
    def between(row: dict) -> str:
        low, high = (
            "–" if row[name] is None else f"{row[name]:.3g}"
            for name in ("stable", "unstable")
        )
        return f"{low} to {high}"

    lines = [
        (row["variant"], f"{row['lambda']:g}", f"{row['bound']:.3g}", between(row))
        for row in rows
    ]
    return _table(("variant", "λ", "bound", "runs"), lines)


def _hypergradients(rows: list[dict]) -> list[str]:
    heads = ("method", "λ", "dL_V/dλ", "relative error", "ms")
    lines = [
        (row["method"], f"{row['lambda']:g}", f"{row['value']:.6f}",
         f"{row['error']:.2g}", f"{row['milliseconds']:.3f}")
        for row in rows
    ]  # fmt: skip
    return _table(heads, lines)


def _by_start(
    rows: list[dict],
    names: Sequence[str],
    heads: Sequence[str],
    show: Callable[[list[dict]], str],
) -> list[str]:
    """One line a variant and setting, one column a start."""
    starts = [start for (start,) in _distinct(rows, "start")]
    lines = [
        (variant, *(_plain(value) for value in cell),
         *(show(_where(rows, variant=variant, start=start,
                       **dict(zip(names, cell, strict=True)))) for start in starts))
        for variant, *cell in _distinct(rows, "variant", *names)
    ]  # fmt: skip
    return _table(("variant", *heads, *(f"λ from {s:g}" for s in starts)), lines)


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def _with_sigma(rows: list[dict]) -> str:
    kept = [row["sigma"] for row in rows if not row["diverged"]]
    return _ends(rows) + (f"; σ {_spread(kept)}" if kept else "")


def _with_way(rows: list[dict]) -> str:
    kept = [row for row in rows if not row["diverged"]]
    way = f"; wrong way {_most(kept, 'wrong_way')}" if kept else ""
    return _ends(rows) + way


def _ends(rows: list[dict]) -> str:
    ends = [row["final"] for row in rows if not row["diverged"]]
    lost = [row for row in rows if row["diverged"]]
    # λ so low that e^λ is 0 in float32, the loss as small as ever
    zero = sum((row["largest_loss"] or np.inf) < 1e3 for row in lost)
    counts = {"ends at a decay of 0": zero, "diverged": len(lost) - zero}
    parts = [_spread(ends)] if ends else []
    parts += [f"{n} of {len(rows)} {what}" for what, n in counts.items() if n]
    return ", ".join(parts)


def _spread(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.4f}"
    return f"{mean} ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else mean


def _most(rows: list[dict], name: str) -> str:
    values = [row[name] for row in rows]
    return f"{np.median(values):.2f}, {max(values):.2f}" if rows else "–"


def _where(rows: list[dict], **wanted: Any) -> list[dict]:
    return [row for row in rows if all(row[k] == v for k, v in wanted.items())]


def _distinct(rows: list[dict], *names: str) -> list[tuple]:
    """What the columns hold together, in the order of the first of each."""
    return list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]
