"""Hypergradient descent: a learning rate that is itself descended, every step.

A step θ_t = θ_{t−1} − α d_t depends on α, so the next gradient already tells how the
loss would have changed with it: ∂f/∂α = −⟨g_{t+1}, d_t⟩, for the price of one inner
product and one kept direction. `hypergradient_descent` puts that rule around any optax
transformation that gives a direction; `sgd_hd`, `adam_hd` and `adamw_hd` are three such
rules by name.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metax.hypergradient.arguments import check_arguments, check_moments, check_tree
from metax.hypergradient.rates import (
    all_finite,
    blend,
    initial_rates,
    limit,
    move,
    rate_dtype,
    scale,
    select,
)
from metax.hypergradient.signals import hypergradient_and_signal

__all__ = [
    "HypergradientDescentState",
    "adam_hd",
    "adamw_hd",
    "hypergradient_descent",
    "sgd_hd",
]


class HypergradientDescentState(NamedTuple):
    """What step t + 1 needs of step t.

    Attributes:
      count: int32 [], updates done.
      learning_rate: α_t, at least float32: [] for scope "global", a tree of [] for
        "leaf", like the parameters for "element".
      hypergradient: h_t of the last step before any normalisation, like
        `learning_rate`; a non-finite value stays here as the report of it.
      direction: d_t, like the parameters, in `direction_dtype`.
      base_state: the state of `base`.
      hyper_state: the state of `hyper_optimizer`, else `optax.EmptyState()`.
      applied_learning_rate: γ_t, like `learning_rate`, where a `transition` makes it
        differ from α_t; None without one.
    """

    count: jax.Array
    learning_rate: Any
    hypergradient: Any
    direction: Any
    base_state: optax.OptState
    hyper_state: optax.OptState
    applied_learning_rate: Any = None


def hypergradient_descent(
    base: optax.GradientTransformation,
    learning_rate: Any,
    hyper_learning_rate: Any = None,
    *,
    hyper_optimizer: optax.GradientTransformation | None = None,
    rule: str = "additive",
    scope: str = "global",
    bounds: tuple[Any, Any] | None = None,
    max_relative_change: Any = None,
    transition: tuple[Any, Any] | None = None,
    axis_name: Any = None,
    direction_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Descends the learning rate of `base` along its hypergradient, at every step.

        h_t = −⟨g_t, d_{t−1}⟩                        the hypergradient; h_1 = 0
        s_t = h_t | (h_t/‖g_t‖)/‖d_{t−1}‖ | h_t/‖d_{t−1}‖²       by `rule`
        u_t = −β_t s_t                               or the update of `hyper_optimizer`
        α_t = α_{t−1} + u_t                          α_{t−1} (1 + u_t) if multiplicative
        d_t = base(g_t)
        θ_t = θ_{t−1} − α_t d_t

    Use it where α_0 is a guess: a bad one is mended within tens to hundreds of steps,
    and the early phase gets faster. It is no guarantee. The objective looks one step
    ahead, so α tends to decay too early (a lower bound, a `transition` or a
    `hyper_optimizer` help); the additive rule is stable only for β below about 10/(L·n)
    around Adam, with n parameters of curvature L; and the final loss can be worse than
    that of a well-tuned fixed rate. `bounds=(0, None)` is recommended: the paper's
    rule, the default, lets α become negative. Cost: one more copy of the parameters
    (d), one inner product a step, no further gradient. Clip, accumulate and add coupled
    L2 *before* this rule in a chain, put decoupled decay and schedules *inside* `base`,
    and nothing that rescales after it.

    Args:
      base: any optax transformation that gives an ascent direction without learning
        rate: `optax.identity()`, `optax.trace(0.9)`, `optax.scale_by_adam()`. A whole
        optimizer becomes one by `optax.chain(optax.adam(1.0), optax.scale(-1.0))`.
      learning_rate: α_0 ≥ 0, float or scalar array, traced or not (a sweep is a vmap).
      hyper_learning_rate: β ≥ 0, float, scalar array, or a schedule of the number of
        updates done before. Sane: 1e-3 for SGD, 1e-7 for Adam (additive); 0.02 to 0.05
        (multiplicative); a fraction of 1/L (normalized).
      hyper_optimizer: instead of β, an optax transformation that gets s_t as gradient
        and α_{t−1} as parameter. `optax.sgd(beta)` is the paper's rule; another
        `hypergradient_descent` learns β in its turn.
      rule: "additive" (the paper), "multiplicative" (invariant to the scale of the
        loss) or "normalized" (β in units of α; not with scope "element").
      scope: "global" (one α), "leaf" (one a leaf) or "element" (one a parameter; its
        multiplicative rule is a sign rule).
      bounds: None or (lo, hi), either None: α_t is clipped into them last.
      max_relative_change: None or c > 0: α_t stays within α_{t−1} ± c|α_{t−1}|.
      transition: None or (delta, final): the rate applied is
        γ_t = δ α_t + (1 − δ) final, δ = delta(count), count from 0, while α_t goes on.
      axis_name: mesh axes over which the *parameters* are sharded inside `shard_map`;
        not for replicated parameters, and not needed under plain jit.
      direction_dtype: the dtype d is stored in; None keeps that of the parameters.

    Returns:
      A rule whose state is a `HypergradientDescentState`.
      `optax.tree.get(state, "learning_rate")` reads α through chains; in a tower read
      `state.learning_rate` and `state.hyper_state.learning_rate`.

    Raises:
      ValueError: both or neither of `hyper_learning_rate` and `hyper_optimizer`; an
        unknown rule or scope; rates that are negative, not finite, outside `bounds`, or
        0 where the rule can never leave 0; later, updates of another tree than the
        parameters'.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from metax.hypergradient import hypergradient_descent
      >>> rule = hypergradient_descent(optax.scale_by_adam(), 1e-3, 1e-2)
      >>> params = jnp.array([1.0, -2.0])
      >>> state = rule.init(params)
      >>> for _ in range(5):
      ...     updates, state = rule.update(2 * params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{state.learning_rate:.3f}")
      0.217

    Reference: Baydin, Cornish, Martínez Rubio, Schmidt, Wood, Online Learning Rate
    Adaptation with Hypergradient Descent, ICLR 2018, arXiv 1703.04782; the
    multiplicative rule and the transition are theirs too, the normalized rule is scalar
    HDM of Chu, Gao, Ye, Udell, ICML 2025, arXiv 2502.11229.

    Note:
      All leaves step with the same α_t; the authors' Adam updates tensors one by one
      with partial sums, so that its result depends on their order. With a transition,
      h_t keeps d_{t−1} and not δ d_{t−1}, as in the paper. A non-finite signal leaves α
      as it was and stores a zero direction; the emitted update is not altered
      (`optax.apply_if_finite` around the rule protects the parameters).
      `optax.inject_hyperparams` casts β to the dtype of the parameters: give it
      `hyperparam_dtype=jnp.float32` with bfloat16 parameters.
    """
    check_arguments(
        base=base,
        direction_dtype=direction_dtype,
        learning_rate=learning_rate,
        hyper_learning_rate=hyper_learning_rate,
        hyper_optimizer=hyper_optimizer,
        rule=rule,
        scope=scope,
        bounds=bounds,
        max_relative_change=max_relative_change,
        transition=transition,
    )
    base = optax.with_extra_args_support(base)

    def init_fn(params: Any) -> HypergradientDescentState:
        alpha = initial_rates(learning_rate, params, scope)
        hyper_state = optax.EmptyState()
        if hyper_optimizer is not None:
            hyper_state = hyper_optimizer.init(alpha)
        return HypergradientDescentState(
            count=jnp.zeros([], jnp.int32),
            learning_rate=alpha,
            hypergradient=optax.tree.zeros_like(alpha),
            direction=optax.tree.zeros_like(params, dtype=direction_dtype),
            base_state=base.init(params),
            hyper_state=hyper_state,
            applied_learning_rate=(
                None if transition is None else jax.tree.map(jnp.copy, alpha)
            ),
        )

    def hyper_update(s: Any, state: HypergradientDescentState) -> tuple[Any, Any]:
        if hyper_optimizer is not None:
            return hyper_optimizer.update(s, state.hyper_state, state.learning_rate)
        beta = hyper_learning_rate
        beta = beta(state.count) if callable(beta) else beta
        return optax.tree.scale(-jnp.asarray(beta, rate_dtype()), s), state.hyper_state

    def update_fn(
        updates: Any, state: HypergradientDescentState, params: Any = None, **extra_args
    ) -> tuple[Any, HypergradientDescentState]:
        check_tree(updates, state.direction)
        h, s = hypergradient_and_signal(
            updates, state.direction, rule=rule, scope=scope, axis_name=axis_name
        )
        u, hyper_state = hyper_update(s, state)
        proposed = move(state.learning_rate, u, rule)
        ok = all_finite(h, s, proposed)
        limited = limit(proposed, state.learning_rate, max_relative_change, bounds)
        alpha = select(ok, limited, state.learning_rate)
        gamma = alpha if transition is None else blend(alpha, transition, state.count)
        # The base waits until the old direction was read for the last time: then XLA
        # can write the new one in its place, and does not keep g∘g, which the norm and
        # Adam have in common, as a temporary.
        updates, gamma = jax.lax.optimization_barrier((updates, gamma))
        d, base_state = base.update(updates, state.base_state, params, **extra_args)
        return scale(d, gamma, scope), HypergradientDescentState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            learning_rate=alpha,
            hypergradient=select(True, h, state.hypergradient),
            # Selected, never passed through: the gradient or the base's own state in
            # a second place could not be donated, and would cost a copy.
            direction=select(ok, d, optax.tree.zeros_like(state.direction)),
            base_state=base_state,
            hyper_state=select(ok, hyper_state, state.hyper_state),
            applied_learning_rate=None if transition is None else gamma,
        )

    # pyright reads optax's OptState as a closed union, which no NamedTuple is part of.
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyright: ignore


def sgd_hd(
    learning_rate: Any,
    hyper_learning_rate: Any = 1e-3,
    momentum: float | None = None,
    nesterov: bool = False,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """SGD, with or without momentum, whose learning rate descends its hypergradient.

    d_t = g_t;  v_t = μ v_{t−1} + g_t (heavy ball);  g_t + μ v_t (Nesterov). The
    velocity is free of α, as the derivative requires; `bounds=(0, None)` is
    recommended.

    Args:
      learning_rate: α_0, see `hypergradient_descent`.
      hyper_learning_rate: β; the default is the paper's, for the additive rule. Under
        `rule="multiplicative"` take 0.02 to 0.05.
      momentum: μ in [0, 1), or None for none.
      nesterov: whether the momentum is Nesterov's.
      **options: keyword arguments of `hypergradient_descent`; a `hyper_optimizer` among
        them replaces the default `hyper_learning_rate`.

    Returns:
      The rule.

    Raises:
      ValueError: as `hypergradient_descent`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from metax.hypergradient import sgd_hd
      >>> rule = sgd_hd(1e-3, 1e-2, momentum=0.9, nesterov=True)
      >>> params = jnp.array([1.0, -2.0])
      >>> state = rule.init(params)
      >>> for _ in range(5):
      ...     updates, state = rule.update(2 * params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{state.learning_rate:.3f}")
      0.474

    Reference: Baydin et al. 2018, arXiv 1703.04782, SGD-HD and SGDN-HD.
    """
    base = optax.identity()
    if momentum is not None:
        check_moments("sgd_hd", momentum=momentum)
        base = optax.trace(momentum, nesterov=nesterov)
    return _ready_made(base, learning_rate, hyper_learning_rate, 1e-3, options)


def adam_hd(
    learning_rate: Any,
    hyper_learning_rate: Any = 1e-7,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Adam whose learning rate descends its hypergradient.

    d_t = m̂_t / (√(v̂_t + ε_root) + ε). Recommended: `adam_hd(1e-3, 0.02,
    rule="multiplicative")`, with β between 0.02 and 0.05, which does not depend on the
    size of the model. The additive default is the paper's and needs β ≲ 10/(L·n) for n
    parameters of curvature L: 1e-7 suits two million, 1e-4 diverges there within ten
    steps. A β made for the additive rule does practically nothing under the
    multiplicative one.

    Args:
      learning_rate: α_0, see `hypergradient_descent`.
      hyper_learning_rate: β.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: ε > 0, outside the root.
      eps_root: ε_root ≥ 0, inside the root; above 0 where gradients flow through.
      **options: keyword arguments of `hypergradient_descent`; a `hyper_optimizer` among
        them replaces the default `hyper_learning_rate`.

    Returns:
      The rule.

    Raises:
      ValueError: as `hypergradient_descent`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from metax.hypergradient import adam_hd
      >>> rule = adam_hd(1e-3, 0.05, rule="multiplicative")
      >>> params = jnp.array([1.0, -2.0])
      >>> state = rule.init(params)
      >>> for _ in range(5):
      ...     updates, state = rule.update(2 * params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{state.learning_rate:.6f}")
      0.001204

    Reference: Baydin et al. 2018, arXiv 1703.04782, Adam-HD.

    Note:
      ε stands where the paper and optax put it; the authors' code divides it by the
      root of the bias correction.
    """
    check_moments("adam_hd", b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    base = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    return _ready_made(base, learning_rate, hyper_learning_rate, 1e-7, options)


def adamw_hd(
    learning_rate: Any,
    hyper_learning_rate: Any = 1e-7,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
    weight_decay: Any = 1e-4,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """AdamW whose learning rate descends its hypergradient.

    d_t = m̂_t / (√(v̂_t + ε_root) + ε) + λ θ_{t−1}: the decay is part of the direction
    and not of the gradient, so the derivative stays exact. What `adam_hd` says of β
    holds here too: prefer `rule="multiplicative"` with β between 0.02 and 0.05.

    Args:
      learning_rate: α_0, see `hypergradient_descent`.
      hyper_learning_rate: β.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: ε > 0, outside the root.
      eps_root: ε_root ≥ 0, inside the root.
      weight_decay: λ ≥ 0; α multiplies it.
      **options: keyword arguments of `hypergradient_descent`; a `hyper_optimizer` among
        them replaces the default `hyper_learning_rate`.

    Returns:
      The rule. Its update needs `params`.

    Raises:
      ValueError: as `hypergradient_descent`.

    Reference: Baydin et al. 2018, arXiv 1703.04782, Adam-HD; decoupled decay of
    Loshchilov, Hutter, Decoupled Weight Decay Regularization, 2019, arXiv 1711.05101.
    """
    moments = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
    check_moments("adamw_hd", **moments, weight_decay=weight_decay)
    base = optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps, eps_root=eps_root),
        optax.add_decayed_weights(weight_decay),
    )
    return _ready_made(base, learning_rate, hyper_learning_rate, 1e-7, options)


def _ready_made(
    base: optax.GradientTransformation,
    learning_rate: Any,
    beta: Any,
    default_beta: float,
    options: dict[str, Any],
) -> optax.GradientTransformationExtraArgs:
    # optax.inject_hyperparams hands **options on as one argument of that name.
    options = {**options.pop("options", {}), **options}
    replaced = options.get("hyper_optimizer") is not None
    if replaced and isinstance(beta, float) and beta == default_beta:
        beta = None
    return hypergradient_descent(base, learning_rate, beta, **options)
