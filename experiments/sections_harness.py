"""The section of RESULTS.md on `results/harness_benchmark.json`."""

from experiments.sections_amalgamation import table

__all__ = ["SECTIONS", "overheads"]

GOALS = {"train": 1.03, "record": 1.05}  # of the CPU time of a bare scan


def overheads(record: dict) -> list[str]:
    """What `train` and `record_run` cost beside a bare scan, and what a save costs."""
    size, save = record["config"], record["save"]
    rows = [
        (
            row["way"],
            *(_spread(row[name]) for name in ("ms", "cpu")),
            *(_spread(row[name], 3) for name in ("ratio", "wall")),
            _verdict(row["ratio"][0], GOALS.get(row["way"])),
        )
        for row in record["rows"]
    ]
    return [
        f"A chunk of {size['chunk']} steps, medians over {size['rounds']} rounds with",
        "the first and last decile, each way's time over bare's in the same round.",
        f"Load {record['load'][0]:.0f} before and {record['load'][1]:.0f} after: CPU "
        "time decides, wall time is that of a shared machine.",
        "",
        *table(("way", "ms", "CPU ms", "CPU ratio", "wall ratio", "goal"), rows),
        "",
        f"A checkpoint of {record['megabytes']:.1f} MB alone: {_spread(save['ms'])} "
        f"ms, {_spread(save['cpu'])} ms of CPU time, of which the run waits for",
        f"{_spread(save['copy'])} ms, a copy. It is 5 % of a chunk that takes "
        f"{20 * save['cpu'][0] / 1e3:.1f} s of CPU time.",
    ]


def _spread(values: list[float], digits: int = 1) -> str:
    middle, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} [{low}, {high}]"


def _verdict(ratio: float, goal: float | None) -> str:
    if goal is None:
        return ""
    return f"{goal:g}: {'reached' if ratio <= goal else '**not reached**'}"


SECTIONS = {"harness_benchmark": ("The harness: overheads", overheads)}
