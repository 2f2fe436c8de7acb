"""The section of RESULTS.md on `results/autoloss_benchmark.json`."""

from experiments.sections_amalgamation import table

__all__ = ["SECTIONS", "throughput"]

DISPATCH_GOAL, TRAINING_GOAL = 1.5, 60.0
RATES = """\
Steps of whole runs led by a controller, S runs at once, best of the rounds.
Limit: the products alone, at the rate of a large product in the same run.
By hand: a scan that takes the same steps on all losses and measures the metric as
often, by actions drawn beforehand, without controller, features, frozen groups, caches
and records. µs: of the processor, a step and run, which tell more than the rate where
other programs run beside. Times the authors': over their program's 1,056 and 736
steps/s on another machine of two cores, at about five passes a step where these make
three.

"""
WHY = """\
Where a goal is not reached, this is what there is to gain. What leads, watches and
records a run is the difference of the two times; the rest is the task.

"""
WAYS = """\
Microseconds a step and run, three heads on a trunk of 64-256-256, which the losses name
as shared; apart: mix, where each loss has the trunk written into it. Compilers see that
three forward passes are the same, and not that the sum of three backward passes is one.
"""


def throughput(record: dict) -> list[str]:
    """Steps a second beside the limit and the authors', dispatch, and training."""
    rates = [
        (
            row["task"],
            row["runs"],
            f"{row['steps_per_s']:,.0f}",
            f"{row['by_hand_per_s']:,.0f}",
            f"{row['limit']:,.0f}",
            f"{row['processor_us']:.1f}",
            f"{row['by_hand_processor_us']:.1f}",
            f"{row['steps_per_s'] / row['peer']:.0f}",
            _verdict(row["steps_per_s"], row["goal"]),
        )
        for row in record["throughput"]
    ]
    names = ("mix", "apart", "vmapped switch", "switch")
    ways = [
        (row["runs"], kind, *(f"{times[name]:.0f}" for name in names),
         f"{times['vmapped switch'] / times['mix']:.2f}",
         f"{times['apart'] / times['mix']:.2f}")
        for row in record["dispatch"]
        for kind, times in (("wall", row), ("processor", row["processor"]))
    ]  # fmt: skip
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
    ratio = min(
        times["vmapped switch"] / times["mix"]
        for row in record["dispatch"]
        for times in (row, row["processor"])
    )
    return [
        *RATES.splitlines(),
        *table(
            (
                *["task", "S", "steps/s", "by hand", "limit", "µs", "µs by hand"],
                "times theirs",
                "goal",
            ),
            rates,
        ),
        "",
        *_why(record["throughput"]),
        "",
        *WAYS.splitlines(),
        f"Vmapped switch over mix, goal {DISPATCH_GOAL:g} or more, wall and processor: "
        f"{_met(ratio >= DISPATCH_GOAL)}.",
        "",
        *table(("S", "time", *names, "vmapped switch / mix", "apart / mix"), ways),
        "",
        f"Training a controller on regression, goal {TRAINING_GOAL:g} s each: "
        f"{_met(slowest <= TRAINING_GOAL)}.",
        "",
        *table(
            ("updates", "runs", "steps", "s to compile", "s", "best validation"),
            trainings,
        ),
    ]


def _why(rows: list[dict]) -> list[str]:
    """What of a step is not the steps themselves, and what two cores could give."""
    lines = []
    for row in rows:
        if row["goal"] is None:
            continue
        led, plain = row["processor_us"], row["by_hand_processor_us"]
        lines.append(
            f"* {row['task']}, S = {row['runs']}: {led:.1f} µs of the processor, "
            f"{plain:.1f} of them for the steps by hand ({plain / led:.0%}). Two cores "
            f"in full use would give {2e6 / led:,.0f} steps/s, and by hand "
            f"{2e6 / plain:,.0f}."
        )
    return [
        *WHY.splitlines(),
        *lines,
    ]


def _verdict(rate: float, goal: float | None) -> str:
    return "" if goal is None else f"{goal:,.0f}: {_met(rate >= goal)}"


def _met(is_met: bool) -> str:
    return "reached" if is_met else "**not reached**"


SECTIONS = {"autoloss_benchmark": ("AutoLoss: time", throughput)}
