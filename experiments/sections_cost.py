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
FLOORS = {"mlp": 3.0, "cnn": 2.0}
GOALS = {"ratio": 3.0, "to plain": 2.75, "beyond": 12.0}
PEER = """\
**Against the authors' code on the same machine: 2.6 times on the MLP (goal 4, floor 3:
not reached), 2.4 on the CNN (goal 4, floor 2: the floor is reached).** A
measurement made once, not by a command of this repository, since their code is not
part of it: PyTorch 2.13 with MKL, their step unchanged (its MLP lacks the output
layer and has three rates to our four), batch 128, two threads, two processes that
took turns, four steps each, on a machine busy with other work; medians of the
quotients of CPU times over 8 turns. A Delta-STN step took theirs 287 and ours 111
CPU-ms on the MLP, 494 and 200 on the CNN; a plain step 47 and 38, 71 and 76; a
noisy validation step, called by itself, 85 and 50, 134 and 99.

Why not 3 on the MLP: a step of theirs is 16.73 GFLOP, of ours 7.27, a quotient of
2.3 at equal rates. Products of these sizes run at 80 to 100 GFLOP/s of a core here,
in XLA (YNNPACK and Eigen) as in MKL, near what the core can do; 7.13 GFLOP are then
about 85 of our 111 ms, and 96 would be needed. The rest is the optimizers' passes
over 77 MB each for w0 and Φ (6 ms), random masks (3 ms) and passes over
activations. Where 4 to 5 was measured before, XLA's plain step was 1.7 times as
fast as PyTorch's; here it is 1.2 times.

Tried: one product for W_g and W_r (slower but for small convolutions); pooling
before ReLU (3 % of plain); keys of another generator (slower); fewer passes in the
optimizers (under 5 %); Eigen in place of YNNPACK (1 % of the MLP's step, and the
CNN's 10 % slower), though it multiplies x W a quarter faster by itself; donation
and larger thresholds of the allocator (nothing). Estimated, not built: W x and W ẋ
as one product of twice the rows, 2 % of the MLP's step.

What helped the CNN: XLA's CPU backend has no fast code for the gradients of a
convolution inside `lax.scan`, where training runs: a step took 1939 CPU-ms there
against 267 by itself (plain 968 and 100). `metax.tasks` now writes these gradients
as convolutions of the one form that is fast everywhere: 190 and 75, less than by
itself, since a loop does not ask for its 70 MB of memory anew at each step (50 ms
of page faults). Gray images are unfolded tap by tap, which took 13 ms a pass and
takes 7. These, too, were measured once (one core, medians of 24 steps).
""".splitlines()


def cost(record: dict) -> list[str]:
    """Every step of both models, the goals, and what forming weights would cost."""
    lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS)]
    lines += [[row[name] for name in COLUMNS] for row in record["rows"]]
    return [
        "Medians of steps in a loop of four, as training runs them; `to plain`: of CPU",
        "times, round by round; `limit`: the products that must be done, 8F - 3F₁ for",
        "a Delta-STN step; MB: temporaries of a step by itself, not donated.",
        "The authors' PyTorch code was timed on another machine, whose plain step took",
        "as printed: compare ratios, not milliseconds. XLA counts the body of the loop",
        "over groups once.",
        "",
        *("| " + " | ".join(line) + " |" for line in lines),
        "",
        *_goals(record["rows"]),
        *_floors(record["rows"]),
        "",
        "A response gradient per example, by injection and by forming the weights of",
        "each example:",
        "",
        *_naive(record["naive"]),
        "",
        *PEER,
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


def _floors(rows: list[dict]) -> list[str]:
    """The authors' step against ours, and what the products leave room for."""
    found = []
    for model, floor in FLOORS.items():
        step = {row["step"]: row for row in rows if row["model"] == model}
        plain, delta = step["plain"], step["delta example"]
        if not delta["authors"]:
            continue
        low, high = map(float, delta["authors"].split("-"))
        ours, least = float(delta["ms"]), float(plain["ms"]) * float(delta["limit"])
        found.append(
            f"* {model}, the authors' {delta['authors']} ms against our {ours:.0f}: "
            f"{low / ours:.1f} to {high / ours:.1f} times (floor {floor:g}); their "
            f"plain step {plain['authors']}, ours {plain['ms']}. {floor:g} times would "
            f"be {low / floor:.0f} to {high / floor:.0f} ms, and {least:.0f} are the "
            f"products at the rate of plain."
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
