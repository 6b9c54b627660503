"""The options of steps whose length is searched: `--optimizer lbfgs`, or sgd with --line-search."""

from __future__ import annotations

from typing import Any

from fbopt.train.config.options import Options, OptionsError, flag

OF_LBFGS = {"history": 10, "iterations": 20}  # and their defaults, torch's are 100 and 20
# Where the gradient is not that of what is searched, or what is searched changes from step to step.
NO_FUNCTION = (
    "chunk_max_norm", "agc", "clip_history", "additive_noise", "multiplicative_noise", "norm_bias",
    "mean", "batchnorm", "switch_at",
)  # fmt: skip
OWN_LENGTH = ("warmup", "cosine", "floor", "gamma", "milestones")


def resolve_search(given: Options, values: dict[str, Any]) -> dict[str, Any]:
    """Return the options of line searches, and those that they replace; None without one."""
    is_lbfgs, search = given.optimizer == "lbfgs", given.line_search
    for name in OF_LBFGS:
        if getattr(given, name) is not None and not is_lbfgs:
            raise OptionsError(f"{flag(name)} is for --optimizer lbfgs; leave it out")
    if given.optimizer not in ("sgd", "lbfgs") and search not in (None, "none"):
        raise OptionsError(
            f"--line-search is for --optimizer sgd and lbfgs, not for {given.optimizer}; leave it "
            "out"
        )
    if not is_lbfgs and search in (None, "none"):
        return {"line_search": None}
    _check(given, values, f"--line-search {search}" if search else "--optimizer lbfgs")
    found: dict[str, Any] = {"line_search": search or "strong_wolfe"}
    if is_lbfgs:
        _check_length(given)
        found |= {name: getattr(given, name) or value for name, value in OF_LBFGS.items()}
        found |= {"schedule": "constant", "warmup": 0, "cosine": None, "max_norm": given.max_norm}
    return found


def _check(given: Options, values: dict[str, Any], whose: str) -> None:
    if given.stochastic:
        raise OptionsError(
            f"{whose} is for full-batch recipes: mini-batches are other functions at every step; "
            "choose --recipe fb-clip"
        )
    for name in NO_FUNCTION:
        if getattr(given, name) not in (None, 0, "samples", "mean"):
            raise OptionsError(
                f"{flag(name)}: {whose} compares values of one function, and with it the gradient "
                "is that of no function; leave one of them out"
            )
    if values["rho"] is not None:
        raise OptionsError(
            f"{whose} compares values of the function whose gradient it gets, and that of "
            f"{values['perturbation']} is of none; choose --perturbation penalty"
        )


def _check_length(given: Options) -> None:
    for name in OWN_LENGTH:
        if getattr(given, name) not in (None, 0, 0.0):
            raise OptionsError(
                f"{flag(name)} is not for --optimizer lbfgs, whose line search finds the length of "
                "every step; leave it out"
            )
    if given.schedule not in ("cosine", "constant"):
        raise OptionsError(
            f"--schedule {given.schedule} is not for --optimizer lbfgs; leave it out"
        )
    if given.decay == "weights":
        raise OptionsError(
            "--decay weights is not for --optimizer lbfgs, without decay; leave it out"
        )
    if given.weight_decay:
        raise OptionsError(
            "--weight-decay is not for --optimizer lbfgs, which minimizes the loss alone; leave it "
            "out"
        )
    if given.norm_type != Options.norm_type:
        raise OptionsError("--norm-type is not for --optimizer lbfgs; leave it out")


def searches(options: Options) -> bool:
    """Whether the steps of resolved options evaluate the loss several times."""
    return options.line_search is not None
