"""The section of RESULTS.md on `results/autoloss_benchmark.json`."""

from experiments.sections_amalgamation import table

__all__ = ["SECTIONS", "throughput"]

DISPATCH_GOAL, TRAINING_GOAL = 1.5, 60.0
RATES = """\
Steps of whole runs led by a controller, S runs at once, best of the rounds.
Limit: the products alone, at the rate of a large product in the same run.
Times the authors': over their program's 1,056 and 736 steps/s on another
machine of two cores, at about five passes a step where these make three.

"""
SPREAD = """\
On several devices: the same runs in turns with the row above, spread over devices of
the CPU, each of which has one core and takes its runs from beginning to end.

"""
WHY = """\
What of a step is the task's: microseconds of the processor, in turns with a loop by
hand, which takes the same steps on all losses by actions drawn beforehand and measures
the metric as often, without controller, features, frozen groups, caches and records. So
much is there to gain at most in what leads, watches and records a run; the rest is the
task's. Measured once, by `jax.profiler`, a step of 32 runs of classification on one
core, which is what each of two devices has of 64: 61 % products, at 90 GFLOP/s, 11 %
passes over hidden units between them, 8 % softplus and means over rows, 11 % Adam, the
penalty and norms, 8 % small operations.

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
            row.get("devices", 1),
            f"{row['steps_per_s']:,.0f}",
            f"{row['limit']:,.0f}",
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
    heads = ("task", "S", "devices", "steps/s", "limit", "times theirs", "goal")
    several = any(row.get("devices", 1) > 1 for row in record["throughput"])
    return [
        *RATES.splitlines(),
        *(SPREAD.splitlines() if several else ()),
        *table(heads, rates),
        "",
        *_why(record["overhead"]),
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
    """The task's part of a step, and what two cores could give."""
    full = lambda row, way: f"{1e6 * min(row['runs'], 2) / row[way]:,.0f}"
    lines = [
        (row["task"], row["runs"], f"{row['led']:.1f}", f"{row['by hand']:.1f}",
         f"{row['by hand'] / row['led']:.0%}", full(row, "led"), full(row, "by hand"))
        for row in rows
    ]  # fmt: skip
    heads = ("task", "S", "µs", "µs by hand", "task's part",
             "steps/s of two full cores (S = 1: of one)", "by hand")  # fmt: skip
    return [*WHY.splitlines(), *table(heads, lines)]


def _verdict(rate: float, goal: float | None) -> str:
    return "" if goal is None else f"{goal:,.0f}: {_met(rate >= goal)}"


def _met(is_met: bool) -> str:
    return "reached" if is_met else "**not reached**"


SECTIONS = {"autoloss_benchmark": ("AutoLoss: time", throughput)}
