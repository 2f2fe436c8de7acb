from metax.autoloss.names import action_names, loss_names
from metax.base import Action
from tests.autoloss.pairs import two_losses


def test_actions_are_named_by_loss_groups_and_repeats():
    actions = (Action(0), Action(1, "w"), Action(0, ("w", "v"), 4))
    expected = ("fit@all", "penalty@w", "fit@w+v*4")
    assert action_names(two_losses(actions=actions)) == expected


def test_losses_without_names_are_numbered():
    problem = two_losses(names=())
    assert loss_names(problem) == ("loss_0", "loss_1")
    assert action_names(problem) == ("loss_0@all", "loss_1@all")
