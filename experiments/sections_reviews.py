"""The section of RESULTS.md that answers what reviewers of Delta-STN asked for.

The requests are those of the paper's public NeurIPS 2020 reviews, in our words.
"""

__all__ = ["REQUESTS"]

RIDGE, BENCH = "*Delta-STN: ridge regression*", "*Delta-STN: time and memory*"
MNIST, CIFAR = "*Delta-STN: digits, 40 % of the labels wrong*", "*Delta-STN: CIFAR-10*"
BATCH = "*Delta-STN: CIFAR-10, batch norm*"
STARTS = "*Delta-STN: dropout from several starts*"
SEARCHES = "*Delta-STN beside searches over whole runs*"
REQUESTS = (
    (
        "batch norm, and its hyperparameters",
        f"ε and decay of scale and bias tuned in {BATCH}, at CPU scale so far. The "
        "tangent through the batch statistics is kept. Running statistics are those of "
        "the general pass (`tests/stn`). Their momentum is not tunable: the best "
        "weights do not depend on it.",
    ),
    ("a contemporary network", f"`ResNet18` in {CIFAR}, at CPU scale so far"),
    (
        "centring, objective and linearisation apart",
        f"the six settings of `delta_stn` in {RIDGE}; `stn_mnist --methods` takes all",
    ),
    (
        "spread of λ, the spike, a smaller outer rate",
        f"spread over seeds, excursions and outer rates × 1, .3, .1 in {RIDGE}",
    ),
    (
        "reliance on a good start",
        f"starts -6 and 2 in {RIDGE}; dropout from .01 to .7 in {STARTS}",
    ),
    (
        "linearisation: speed or stability",
        f"with and without it in {RIDGE} (where none can show, the model being linear) "
        f"and in {MNIST}; {BENCH}: the centred variant costs as much",
    ),
    ("sensitivity to τ, the same τ for both", f"τ in {RIDGE}; one τ in all tables"),
    ("update intervals", f"1:1 to 20:1 in {RIDGE}"),
    ("accuracy beside loss", "both, wherever there is an accuracy"),
    ("cost, wall-clock axis", f"{BENCH}; seconds and plain steps beside each method"),
    ("condition number, with the share of G_w", f"κ(factor) · κ(G_w) in {RIDGE}"),
    (
        "the learning rate cannot be tuned",
        "said in docs/expectations.md; `stn_cifar --inner-rule sgd_hd` learns it "
        "beside the rest",
    ),
    (
        "random search and Bayesian optimisation, the learning rate included",
        f"{SEARCHES}: random search and TPE; `random_rate` and `tpe_rate` search the "
        "learning rate as well",
    ),
    (
        "implicit differentiation and unrolling",
        f"`metax.implicit`; rows in {RIDGE}; when each applies: notebooks/stn.ipynb",
    ),
    (
        "what warm-up means",
        "λ and σ constant, noise on, Φ trained (docs/expectations.md, `delta_stn`). "
        "STN differs even then, since its weights see noise and uncentred inputs",
    ),
    (
        "other bilevel problems",
        "any parameter tree; a loss that depends on λ directly: `tests/stn`; "
        "ImageNet and architecture search were not run",
    ),
    ("the words general and response", "names in the API, glossary in `stn/loop.py`"),
)
