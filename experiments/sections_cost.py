"""The section of RESULTS.md on `results/stn_benchmark.json`."""

__all__ = ["cost"]

COLUMNS = {
    "model": "model",
    "step": "step",
    "ms": "ms",
    "p10": "p10",
    "p90": "p90",
    "cpu": "CPU ms",
    "ratio": "to plain",
    "GFLOP": "GFLOP",
    "to plain": "GFLOP to plain",
    "limit": "limit",
    "MB": "MB",
    "beyond": "MB beyond plain",
    "authors": "authors, ms",
}
GOALS = {"ratio": 3.0, "to plain": 2.75, "beyond": 12.0}


def cost(record: dict) -> list[str]:
    """Every step of both models, the goals, and what forming weights would cost."""
    lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS)]
    lines += [[row[name] for name in COLUMNS] for row in record["rows"]]
    return [
        "Medians; `to plain`: of CPU times, round by round; `limit`: the products that",
        "must be done, 8F - 3F₁ for a Delta-STN step; MB: temporaries, not donated.",
        "The authors' PyTorch code was timed on another machine, whose plain step took",
        "as printed: compare ratios, not milliseconds. XLA counts the body of the loop",
        "over groups once.",
        "",
        *("| " + " | ".join(line) + " |" for line in lines),
        "",
        *_goals(record["rows"]),
        "",
        "A response gradient per example, by injection and by forming the weights of",
        "each example:",
        "",
        *_naive(record["naive"]),
    ]


def _goals(rows: list[dict]) -> list[str]:
    found = []
    for row in rows:
        if row["step"] != "delta example":
            continue
        for name, goal in GOALS.items():
            if name == "beyond" and row["model"] != "mlp":
                continue
            is_met = float(row[name]) <= goal
            verdict = "reached" if is_met else "**not reached**"
            found.append(
                f"* {row['model']}, {COLUMNS[name]} of a Delta-STN step: {row[name]}, "
                f"goal at most {goal:g}: {verdict}."
            )
    return found


def _naive(rows: list[dict]) -> list[str]:
    shown = []
    for row in rows:
        widths = "-".join(map(str, row["widths"]))
        timed = "not run, for its memory"
        if "time ratio" in row:
            timed = f"{row['time ratio']:.0f} times the time"
        shown.append(
            f"* 784-{widths}-10, batch {row['batch']}: {row['MB naive']:.0f} MB "
            f"against {row['MB inject']:.1f} MB ({row['memory ratio']:.0f} times); "
            f"{timed}."
        )
    return shown
