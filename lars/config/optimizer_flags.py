"""The flags that describe the optimizer."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lars.config.flags import flag
from lars.errors import UsageError
from lars.importing import is_import_path
from lars.names import IMPORTED, LAMB_FORMS, LARS_FORMS, OPTIMIZERS, OptimizerName


@dataclass(frozen=True)
class OptimizerFlags:
    """The optimizer with its options."""

    base_op: str = flag(
        "sgd",
        f"the optimizer: {', '.join(OPTIMIZERS)}, or package.module:Class for any other torch optimizer",
        group="optimizer",
        aliases=("--optimizer",),
    )
    optimizer_options: tuple[str, ...] = flag(
        (),
        "options of the optimizer that --base-op package.module:Class imports, as name=value with a Python literal, "
        "for example: nesterov=True ns_steps=6",
        group="optimizer",
    )
    momentum: float = flag(
        0.9,
        "momentum of sgd, lars, tvlars and of an imported optimizer that takes it",
        group="optimizer",
        at_least=0,
        below=1,
    )
    nesterov: bool = flag(
        False, "sgd and lars: use Nesterov momentum, as torch.optim.SGD does", group="optimizer"
    )
    betas: tuple[float, float] | None = flag(
        None,
        "adam, adamw and lamb: decay rates of the averages of the gradient and of its square (default: 0.9 0.999)",
        group="optimizer",
        at_least=0,
        below=1,
    )
    wd: float = flag(
        5e-5, "weight decay", group="optimizer", at_least=0, aliases=("--weight-decay",)
    )
    epsilon: float | None = flag(
        None,
        "eps in the denominator of the LARS trust ratio (default: 1e-5 for form nus, 0 or 1e-8 for the other forms)",
        group="optimizer",
        at_least=0,
    )
    lars_form: str = flag(
        "nus",
        "published variant of LARS; each variant needs its own recipe (see lars.LARS). One outlier gradient moves "
        "norms and biases as far as in plain SGD, and in nus the other weights almost as far; --clip-grad-norm "
        "prevents this",
        group="optimizer",
        choices=LARS_FORMS,
    )
    lamb_form: str = flag(
        "nus",
        "published variant of LAMB (see lars.LAMB)",
        group="optimizer",
        choices=LAMB_FORMS,
    )
    trust_coefficient: float | None = flag(
        None,
        "factor of the trust ratio of lars and tvlars (default: set by --lars-form, 0.001 for most forms)",
        group="optimizer",
        at_least=0,
    )
    lmbda: float | None = flag(
        None,
        "tvlars: decay rate of its factor per step (default: 0.001)",
        group="optimizer",
        at_least=0,
    )
    alpha: float | None = flag(
        None, "tvlars: the factor starts near 1 / alpha (default: 0.1)", group="optimizer", above=0
    )
    delay: float | None = flag(
        None,
        "tvlars: step around which the factor decreases (default: 0)",
        group="optimizer",
        at_least=0,
    )
    floor: float | None = flag(
        None, "tvlars: lower limit of the factor (default: 0)", group="optimizer", at_least=0
    )
    bn_bias_separately: bool = flag(
        True,
        "exclude normalisation layers, biases, other 1-D parameters, and what the network's no_weight_decay() names, "
        "from the trust ratio and from weight decay",
        group="optimizer",
    )
    clip_grad_norm: float | None = flag(
        None, "clip the gradient of a step to this norm", group="optimizer", at_least=0
    )
    ema_decay: float | None = flag(
        None,
        "keep an exponential moving average of the weights with this decay per step, and validate it as well",
        group="optimizer",
        at_least=0,
        below=1,
    )
    ema_warmup: bool = flag(
        True,
        "start with a smaller decay of the average: at most (1 + n) / (10 + n) after n steps",
        group="optimizer",
    )


def optimizer_row(base_op: str) -> OptimizerName:
    """The row of `lars.names` for a value of --base-op.

    Raises:
        UsageError: The name is unknown.
    """
    if is_import_path(base_op):
        return IMPORTED
    if base_op not in OPTIMIZERS:
        near = difflib.get_close_matches(base_op, OPTIMIZERS, n=1)
        hint = f"did you mean {near[0]}? Choose" if near else "choose"
        raise UsageError(
            f"--base-op {base_op} is not known; {hint} from {', '.join(OPTIMIZERS)}, or give the import path of a "
            "class as package.module:Class"
        )
    return OPTIMIZERS[base_op]


def literal_options(words: Sequence[str]) -> dict[str, Any]:
    """The values of --optimizer-options.

    Args:
        words: ``name=value`` with a Python literal as value.

    Raises:
        UsageError: A word has another form, or a name occurs twice.

    Example:
        literal_options(["nesterov=True", "betas=(0.9, 0.99)"])  # {"nesterov": True, "betas": (0.9, 0.99)}
    """
    options: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (equals and name.isidentifier()):
            raise UsageError(
                f"--optimizer-options {word}: write name=value, for example ns_steps=6"
            )
        if name in options:
            raise UsageError(f"--optimizer-options {name} is given twice; leave one of them out")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise UsageError(
                f"--optimizer-options {word}: {value!r} is not a Python literal; write True, None, 0.5, (1, 2), or a "
                f"string in quotes within quotes: \"{name}='text'\""
            ) from error
    return options
