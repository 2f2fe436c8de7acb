"""The section of RESULTS.md on `results/autoloss_benchmark.json`."""

from experiments.sections_amalgamation import table

__all__ = ["SECTIONS", "throughput"]

DISPATCH_GOAL, TRAINING_GOAL = 1.5, 60.0


def throughput(record: dict) -> list[str]:
    """Steps a second beside the limit and the authors', dispatch, and training."""
    rates = [
        (
            row["task"],
            row["runs"],
            f"{row['steps_per_s']:,.0f}",
            f"{row['limit']:,.0f}",
            f"{row['steps_per_s'] / row['peer']:.0f}",
            _verdict(row["steps_per_s"], row["goal"]),
        )
        for row in record["throughput"]
    ]
    ways = [
        (
            row["runs"],
            *(f"{row[way]:.0f}" for way in ("mix", "vmapped switch", "switch")),
            f"{row['vmapped switch'] / row['mix']:.2f}",
        )
        for row in record["dispatch"]
    ]
    trainings = [
        (
            row["updates"],
            row["runs"],
            f"{row['steps']:,}",
            f"{row['compile_s']:.1f}",
            f"{row['seconds']:.1f}",
            f"{row['first']:.3f} → {row['last']:.3f}",
        )
        for row in record["training"]
    ]
    slowest = max(row["seconds"] for row in record["training"])
    ratio = min(row["vmapped switch"] / row["mix"] for row in record["dispatch"])
    return [
        "Steps of whole runs led by a controller, S runs at once, best of the rounds.",
        "Limit: the products alone, at the rate of a large product in the same run.",
        "Times the authors': over their program's 1,056 and 736 steps/s on another",
        "machine of two cores, at about five passes a step where these make three.",
        "",
        *table(("task", "S", "steps/s", "limit", "times theirs", "goal"), rates),
        "",
        "Microseconds a step and run, three heads on a trunk of 64-256-256; vmapped",
        f"switch over mix, goal {DISPATCH_GOAL:g} or more: "
        f"{_met(ratio >= DISPATCH_GOAL)}.",
        "",
        *table(("S", "mix", "vmapped switch", "switch", "ratio"), ways),
        "",
        f"Training a controller on regression, goal {TRAINING_GOAL:g} s each: "
        f"{_met(slowest <= TRAINING_GOAL)}.",
        "",
        *table(
            ("updates", "runs", "steps", "s to compile", "s", "best validation"),
            trainings,
        ),
    ]


def _verdict(rate: float, goal: float | None) -> str:
    return "" if goal is None else f"{goal:,.0f}: {_met(rate >= goal)}"


def _met(is_met: bool) -> str:
    return "reached" if is_met else "**not reached**"


SECTIONS = {"autoloss_benchmark": ("AutoLoss: time", throughput)}
