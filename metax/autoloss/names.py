"""What the losses and actions of a problem are called, in files and reports."""

from metax.arguments import check_has
from metax.base import AlternatingProblem

__all__ = ["action_names", "loss_names"]


def loss_names(problem: AlternatingProblem) -> tuple[str, ...]:
    """A name for each loss: `problem.names`, or "loss_0", "loss_1", ...

    Args:
      problem: any.

    Returns:
      The names, in the order of the losses.
    """
    return problem.names or tuple(f"loss_{m}" for m in range(len(problem.losses)))


def action_names(problem: AlternatingProblem) -> tuple[str, ...]:
    """A name for each action: which loss, on what, and how often.

    Args:
      problem: any.

    Returns:
      `"loss@group+group"`, in the order of the actions; `"loss@all"` for every group,
      and `"loss@group*4"` for 4 repeats.
    """
    what = "an `AlternatingProblem`"
    check_has("action_names", "problem", problem, what, "losses", "actions")
    losses, names = loss_names(problem), []
    for action in problem.actions:
        groups = (action.params,) if isinstance(action.params, str) else action.params
        moved = "all" if groups is None else "+".join(groups)
        times = f"*{action.repeats}" if action.repeats > 1 else ""
        names.append(f"{losses[action.loss]}@{moved}{times}")
    return tuple(names)
