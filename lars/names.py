"""Every name that a user can choose: optimizers, their published forms, schedules, backends.

The module imports only the standard library, so that ``--help`` and flag errors appear at once. The command line,
the library and the engine read these tables. To add an optimizer, write its file and add one row here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class OptimizerName:
    """What the trainer needs to know about an optimizer before it loads it.

    Attributes:
        path: Where the class is: ``module:Class``.
        takes: The common options (momentum, eps) that its constructor accepts.
        torch_fused: Whether torch has a fused kernel for it, which ``fused=True`` selects.
        lr_power: Default power of the polynomial learning-rate decay.
        flags: Fields of `Config` that this optimizer uses. Those that only other optimizers use have no effect.
        defaults: Fields of `Config` that have a different default with this optimizer.
    """

    path: str
    takes: tuple[str, ...] = ()
    torch_fused: bool = False
    lr_power: float = 1.0
    flags: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)


OPTIMIZERS: dict[str, OptimizerName] = {
    "sgd": OptimizerName(
        "torch.optim:SGD", ("momentum",), torch_fused=True, flags=("momentum", "nesterov")
    ),
    "lars": OptimizerName(
        "lars.optim.lars:LARS",
        ("momentum", "eps"),
        lr_power=2.0,
        flags=("momentum", "nesterov", "epsilon", "lars_form", "trust_coefficient"),
    ),
    "lamb": OptimizerName("lars.optim.lamb:LAMB", ("eps",), flags=("lamb_form", "betas")),
    "tvlars": OptimizerName(
        "lars.optim.tvlars:TVLARS",
        ("momentum",),
        flags=("momentum", "trust_coefficient", "lmbda", "alpha", "delay", "floor"),
        # The optimizer's own factor replaces both warm-up and decay.
        defaults={"warmup_epochs": 0.0, "lr_schedule": "constant"},
    ),
    "adam": OptimizerName("torch.optim:Adam", ("eps",), torch_fused=True, flags=("betas",)),
    "adamw": OptimizerName("torch.optim:AdamW", ("eps",), torch_fused=True, flags=("betas",)),
    "adagrad": OptimizerName("torch.optim:Adagrad", ("eps",), torch_fused=True),
    "rmsprop": OptimizerName("torch.optim:RMSprop", ("eps",)),
}

# Any other optimizer, which --base-op names by its import path ``package.module:Class``.
IMPORTED = OptimizerName("", flags=("momentum", "optimizer_options"))

# The options of each published form of LARS. `lars.optim.lars.LARS` lists the sources.
LARS_FORMS: dict[str, dict[str, Any]] = {
    "nus": {"max_ratio": 50.0, "max_element": 10.0},
    "mlperf": {"inside": "both"},
    "optax": {"inside": "both", "denominator": "joint"},
    "torchlars": {"inside": "ratio", "eps": 1e-8},
    "barlowtwins": {"inside": "ratio", "denominator": "joint"},
    "larc": {
        "inside": "ratio",
        "trust_coefficient": 0.02,
        "eps": 1e-8,
        "trust_clip": True,
        "zero_norm": "raw",
    },
    "cmpark": {"denominator": "momentum", "trust_coefficient": 1.0, "zero_norm": "formula"},
    "cmpark-inside": {
        "inside": "both",
        "denominator": "momentum",
        "trust_coefficient": 1.0,
        "zero_norm": "formula",
    },
}

# The options of each published form of LAMB. `lars.optim.lamb.LAMB` lists the sources.
LAMB_FORMS: dict[str, dict[str, Any]] = {
    "nus": {"bias_correction": False, "max_grad_norm": 1.0, "always_adapt": False},
    "paper": {},
    "tvlars": {"bias_correction": False, "max_weight_norm": 10.0},
    "apex": {"max_grad_norm": 1.0, "always_adapt": False},
    "lambc": {"max_ratio": 1.0},
}

# How `lars.models.initial_weights` fills the weights of convolutions and linear layers: functions of torch.nn.init.
WEIGHT_INITS = ("default", "kaiming_uniform", "kaiming_normal", "xavier_uniform", "xavier_normal")


@dataclass(frozen=True)
class ScheduleName:
    """What the trainer needs to know about a learning-rate schedule.

    Attributes:
        flags: Fields of `Config` that this schedule uses. Those that only other schedules use have no effect.
        defaults: Fields of `Config` that have a different default with this schedule.
    """

    flags: tuple[str, ...]
    defaults: dict[str, Any] = field(default_factory=dict)


_WARMUP = ("lr_scaling", "warmup_epochs", "warmup_multiplier")

# Learning-rate schedules of the trainer; `lars.learner.build.schedule` builds them.
SCHEDULES: dict[str, ScheduleName] = {
    "polynomial": ScheduleName((*_WARMUP, "lr_power", "end_lr")),
    "cosine": ScheduleName((*_WARMUP, "end_lr")),
    "step": ScheduleName((*_WARMUP, "lr_decay")),
    "constant": ScheduleName(_WARMUP),
    "none": ScheduleName(("lr_scaling",), {"warmup_epochs": 0.0}),
    "lars-warm": ScheduleName(("warmup_epochs",), {"warmup_epochs": 20.0}),
    "epochwise-polynomial": ScheduleName((*_WARMUP, "lr_power", "end_lr")),
    "ramp": ScheduleName(("end_lr",), {"warmup_epochs": 0.0}),
}

# The module of each communication backend; see `lars.comm.world`.
BACKENDS = {"horovod": "lars.comm.horovod", "torch": "lars.comm.torch_dist"}
