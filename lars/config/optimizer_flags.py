"""The flags that describe the optimizer and the loss."""

from __future__ import annotations

from dataclasses import dataclass

from lars.config.flags import flag
from lars.names import LAMB_FORMS, LARS_FORMS, OPTIMIZERS


@dataclass(frozen=True)
class OptimizerFlags:
    """The optimizer with its options, and the loss."""

    base_op: str = flag(
        "sgd", "the optimizer", group="optimizer", choices=OPTIMIZERS, aliases=("--optimizer",)
    )
    momentum: float = flag(
        0.9, "momentum of sgd, lars and tvlars", group="optimizer", at_least=0, below=1
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
        "published variant of LARS; each variant needs its own recipe (see lars.LARS). In nus, one outlier gradient "
        "moves the weights almost as far as in plain SGD, so combine it with --clip-grad-norm, or use mlperf, optax, "
        "torchlars or barlowtwins",
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
        "tvlars: step around which the factor falls (default: 0)",
        group="optimizer",
        at_least=0,
    )
    floor: float | None = flag(
        None, "tvlars: lower limit of the factor (default: 0)", group="optimizer", at_least=0
    )
    bn_bias_separately: bool = flag(
        True,
        "exclude normalisation layers and biases from the trust ratio and from weight decay",
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
    label_smoothing: float = flag(
        0.1,
        "label smoothing of torch.nn.CrossEntropyLoss; the validation loss includes it",
        group="optimizer",
        at_least=0,
        below=1,
    )
