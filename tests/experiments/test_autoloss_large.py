"""Schedules of GANs and translation: what led runs leave, and what pages say of them.

With controllers the scripts compile for a minute: those runs are marked slow, and the
grid of Gaussians stands for them otherwise.
"""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
    autoloss_gan,
    autoloss_translation,
    led_runs,
    led_tables,
    sections_gan_translation,
)
from metax.autoloss import (
    always,
    any_of,
    cycle,
    divergence,
    identical_actions,
    rollout,
)
from metax.tasks import gan

LEARNING = {
    "num_seeds": 2, "meta_updates": 2, "num_rollouts": 2, "episode_steps": 8,
    "segment_length": 4, "hidden": 4,
}  # fmt: skip
GRID = {
    "num_updates": 12, "validate_every": 4, "schedules": "1:3", "chances": 0.5,
    "restart_limit": 1,
}  # fmt: skip
DIGITS = {
    **GRID, "dataset": "digits", "transfer": "digits", "filters": 2, "dim_z": 3,
    "batch_size": 4, "score_samples": 20, "final_samples": 20, "num_images": 20,
    "classifier_steps": 2, "generator_repeats": 2,
}  # fmt: skip
WORDS = {
    "num_steps": 8, "validate_every": 4, "num_sentences": 20, "embedding": 3,
    "hidden_units": 4, "batch_size": 4, "max_length": 3, "chances": 0.5,
}  # fmt: skip
LEFT_BEHIND = {"config.json", "summary.json", "figure.png", "cells"}


def run_script(script, folder, *settings, extra=()):
    """The summary that a script leaves, and where."""
    pairs = {k: v for some in settings for k, v in some.items()}.items()
    flags = [x for k, v in pairs for x in (f"--{k.replace('_', '-')}", str(v))]
    script.main([*flags, *extra, "--out", str(folder)])
    assert {path.name for path in folder.iterdir()} >= LEFT_BEHIND
    return json.loads((folder / "summary.json").read_text())


def page_of(name, record):
    _, write = sections_gan_translation.SECTIONS[name]
    text = "\n".join(write(record))
    assert "nan" not in text
    return text


def test_a_schedule_is_chosen_by_an_index_that_may_be_traced():
    policies = [cycle((1, 2)), always(1), cycle((2, 1))]

    @jax.jit
    def taken(index):
        policy = led_runs.one_of(policies, index)

        def act(state, key):
            state, decision = policy.act(state, key)
            return state, decision.action

        keys = jax.random.split(jax.random.key(0), 6)
        return jax.lax.scan(act, policy.init(), keys)[1]

    assert taken(0).tolist() == [0, 1, 1, 0, 1, 1]
    assert taken(1).tolist() == [1] * 6
    assert taken(2).tolist() == [0, 0, 1, 0, 0, 1]


def test_optimizer_steps_are_used_up_by_actions_that_take_several():
    actions = [SimpleNamespace(repeats=1), SimpleNamespace(repeats=4)]
    rule = led_runs.used_up(SimpleNamespace(actions=actions), 6)
    taken, fired = rule.init(), []
    for action in (0, 1, 0, 1):
        seen = SimpleNamespace(action=jnp.array(action))
        taken, over = rule.update(taken, seen)
        fired.append(bool(over))
    assert (int(taken), fired) == (10, [False, False, True, True])
    assert not rule.reinitialize


def test_a_cell_counts_optimizer_steps_at_its_checks():
    actions = [SimpleNamespace(repeats=1), SimpleNamespace(repeats=4)]
    problem = SimpleNamespace(actions=actions, validate_every=2)
    led = led_runs.Led(
        scores={}, last={}, metrics=np.array([0.1, 0.2, np.nan]), metric=0.2,
        actions=np.array([0, 1, 1, 0, 1, 0, 0], np.int8), num_steps=5, is_finite=True,
    )  # fmt: skip
    cell = led_runs.cell(problem, led, 1.0)
    assert cell["updates"].tolist() == [5, 10]
    assert cell["curve"].tolist() == [0.1, 0.2]
    assert cell["steps"].tolist() == [2, 12]
    assert [x.tolist() for x in cell["shares"]] == [[1, 0], [0, 1], [0, 1], [1, 0],
                                                    [0, 1]]  # fmt: skip


def cell_of(score, shares=((0.5, 0.5),) * 5):
    return {
        "scores": {"score": score}, "last": {"score": score}, "steps": [1, 1],
        "shares": shares, "seconds": 1.0, "is_finite": score is not None,
    }  # fmt: skip


def test_pairs_count_wins_in_the_direction_of_the_score():
    found = {
        "1:1": [cell_of(1.0), cell_of(2.0), cell_of(3.0)],
        "AutoLoss": [cell_of(2.0), cell_of(2.5), cell_of(2.0)],
        "1:3": [cell_of(None), cell_of(1.0), cell_of(1.0)],
    }
    for maximize, wins in ((True, 2), (False, 1)):
        outcome = led_tables.summarise(found, "score", maximize)
        # a run that failed is in no pair, and no mean hides it
        assert set(outcome["pairs"]) == {"AutoLoss − 1:1"}
        assert outcome["pairs"]["AutoLoss − 1:1"]["wins"] == wins
        assert outcome["rows"]["1:3"]["finite"] == [2, 3]
        assert outcome["rows"]["1:3"]["intervals"]["score"] is None
        assert outcome["rows"]["1:1"]["intervals"]["score"][0] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("score", "verdict"),
    [(0.96, "-0.040; goal, at least −0.05: reached"), (0.9, "**not reached**")],
)
def test_the_page_of_gans_sets_autoloss_beside_the_best_fixed_schedule(score, verdict):
    found = {
        "1:1": [cell_of(0.5)] * 2,
        "1:3": [cell_of(1.0)] * 2,
        "random(0.5)": [cell_of(2.0)] * 2,
        "AutoLoss": [cell_of(score)] * 2,
    }
    scene = json.loads(
        json.dumps(
            led_tables.summarise(found, "score", True), default=np.ndarray.tolist
        )
    )
    lines = sections_gan_translation._score_claims(scene)
    assert verdict in lines[0]
    assert "goal" not in sections_gan_translation._score_claims(scene, False)[0]
    assert "nothing shows" in lines[1]


@pytest.mark.parametrize(("loss", "is_met"), [(2.03, True), (2.06, False)])
def test_the_page_of_translation_holds_autoloss_to_two_percent(loss, is_met):
    row = lambda value, first, last: {
        "scores": {"test_perplexity": [value]}, "shares": [[first], [last]],
    }  # fmt: skip
    rows = {"FixedRatio": row(2.0, 0.5, 0.5), "AutoLoss": row(loss, 0.4, 0.6)}
    lines = sections_gan_translation._perplexity_claims(rows, {})
    assert ("not reached" not in lines[0]) == is_met
    assert "0.600 and 0.400, reached" in lines[1]


def test_the_page_tells_thirds_of_a_training_that_has_them():
    of_mt = lambda *each: {"AutoLoss": {"shares": [[[x, 1 - x] for x in each]]}}
    tell = sections_gan_translation._way_of_learning
    (line,) = tell(of_mt(0.5, 0.1, 0.2), "released")
    assert "of each controller: 0.50 to 0.20." in line
    assert tell(of_mt(0.5, 0.1), "released") == []


def test_both_restart_rules_end_runs_on_the_grid_of_gaussians():
    problem = gan.gaussian_grid(side=2)
    schedules = [cycle((5, 1)), cycle((6, 1)), always(0)]

    @jax.jit
    def run(key, index, above):
        rules = (identical_actions(4), divergence(loss=0, above=above, at_step=3))
        policy = led_runs.one_of(schedules, index)._replace(refresh="chosen")
        ended, _ = rollout(
            problem, policy, key, None, 12, dispatch="switch", restart=any_of(*rules)
        )
        return ended.num_steps, ended.restarted

    def read(index, above):
        steps, fired = run(jax.random.key(0), index, above)
        return int(steps), bool(fired)

    # five in a row are four repeats, six are one too many
    assert read(0, above=100.0) == (12, False)
    assert read(1, above=100.0) == (6, True)
    # the loss of the discriminator begins near ln 2
    assert read(2, above=100.0) == (6, True)
    assert read(2, above=0.1) == (3, True)


def test_the_grid_runs_from_one_command_and_does_nothing_twice(tmp_path, monkeypatch):
    """With one kind of controller: each more is twenty seconds of compiling."""
    monkeypatch.setattr(led_runs, "KINDS", ("AutoLoss",))
    run = tmp_path / "run"
    record = run_script(autoloss_gan, run, LEARNING, GRID)
    rows = record["scenes"]["gaussian_grid"]["rows"]
    assert set(rows) == {"1:3", "random(0.5)", "AutoLoss"}
    assert rows["1:3"]["steps"] == [3, 9]
    assert all(sum(row["steps"]) == 12 for row in rows.values())
    # three equal actions in eight are sure to come
    assert record["controllers"]["AutoLoss"]["restarts"] > 0
    assert "CPU scale" in page_of("autoloss_gan", record)

    files = [*(run / "cells").iterdir(), *(run / "controllers").iterdir()]
    written = {path: path.stat().st_mtime_ns for path in files}
    assert len(files) == 6 + 4
    again = run_script(autoloss_gan, run, LEARNING, GRID)
    assert {path: path.stat().st_mtime_ns for path in files} == written
    assert again["scenes"] == record["scenes"]


def test_schedules_of_translation_run_from_one_command(tmp_path):
    record = run_script(
        autoloss_translation, tmp_path / "run", LEARNING, WORDS, {"meta_updates": 0}
    )
    rows = record["rows"]
    assert rows["MT only"]["shares"] == [[1, 0, 0]] * 5
    assert rows["FineTuned"]["shares"][-1] == [1, 0, 0]
    assert np.isfinite(rows["1:1:1"]["scores"]["test_perplexity"]).all()
    page = page_of("autoloss_translation", record)
    assert "| FixedRatio |" in page


@pytest.mark.slow
def test_controllers_of_translation_learn_and_lead(tmp_path):
    record = run_script(autoloss_translation, tmp_path / "run", LEARNING, WORDS)
    for kind in led_runs.KINDS:
        assert record["controllers"][kind]["steps"] == 8
        assert sum(record["rows"][kind]["steps"]) == pytest.approx(8)
    assert "Goal, at most 1.02" in page_of("autoloss_translation", record)


@pytest.mark.slow
def test_images_are_scored_by_a_classifier_and_controllers_carried_over(tmp_path):
    record = run_script(
        autoloss_gan, tmp_path / "run", LEARNING, DIGITS, extra=["--small-classifier"]
    )
    home, away = record["scenes"].values()
    assert set(record["scenes"]) == {"digits", "to digits"}
    for scene in (home, away):
        assert all(row["finite"] == [2, 2] for row in scene["rows"].values())
        # a decision for the generator is two of its steps
        assert all(sum(r["steps"]) in (12, 12.5, 13) for r in scene["rows"].values())
    assert (tmp_path / "run" / "classifiers" / "digits.json").is_file()
    page_of("autoloss_gan", record)


def test_a_grid_of_gaussians_has_no_other_architectures(tmp_path):
    with pytest.raises(ValueError, match="--architectures"):
        run_script(autoloss_gan, tmp_path / "run", LEARNING, {"architectures": 1})
