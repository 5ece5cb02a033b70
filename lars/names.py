"""Every word that a user can type for a choice: optimizers, their published forms, schedules, backends.

The module imports nothing, so ``--help`` and a refused flag answer at once. The command line, the library and
the engine read these tables; to add an optimizer, write its file and add one row here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class OptimizerName:
    """What the trainer has to know of an optimizer before it loads it.

    Attributes:
        path: ``module:Class``.
        takes: Which of the common options (momentum, eps) its constructor takes.
        torch_fused: Whether torch has a fused kernel for it, which ``fused=True`` selects.
        lr_power: Default power of the polynomial learning-rate decay.
        flags: The trainer's flags that belong to this optimizer; flags of other optimizers have no effect.
        defaults: Defaults of the trainer's flags that this optimizer needs to differ.
    """

    path: str
    takes: tuple[str, ...] = ()
    torch_fused: bool = False
    lr_power: float = 1.0
    flags: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)


OPTIMIZERS: dict[str, OptimizerName] = {
    "sgd": OptimizerName("torch.optim:SGD", ("momentum",), torch_fused=True, flags=("momentum",)),
    "lars": OptimizerName(
        "lars.optim.lars:LARS",
        ("momentum", "eps"),
        lr_power=2.0,
        flags=("momentum", "epsilon", "lars_form", "trust_coefficient"),
    ),
    "lamb": OptimizerName("lars.optim.lamb:LAMB", ("eps",)),
    "tvlars": OptimizerName(
        "lars.optim.tvlars:TVLARS",
        ("momentum",),
        flags=("momentum", "trust_coefficient", "lmbda", "alpha", "delay", "floor"),
        # Its factor takes the place of both warm-up and decay.
        defaults={"warmup_epochs": 0.0, "lr_schedule": "constant"},
    ),
    "adam": OptimizerName("torch.optim:Adam", ("eps",), torch_fused=True),
    "adamw": OptimizerName("torch.optim:AdamW", ("eps",), torch_fused=True),
    "adagrad": OptimizerName("torch.optim:Adagrad", ("eps",), torch_fused=True),
    "rmsprop": OptimizerName("torch.optim:RMSprop", ("eps",)),
}

# What each published form of LARS sets; the sources are in `lars.optim.lars.LARS`.
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

# What each published form of LAMB sets; the sources are in `lars.optim.lamb.LAMB`.
LAMB_FORMS: dict[str, dict[str, Any]] = {
    "nus": {"bias_correction": False, "max_grad_norm": 1.0, "always_adapt": False},
    "paper": {},
    "tvlars": {"bias_correction": False, "max_weight_norm": 10.0},
    "apex": {"max_grad_norm": 1.0, "always_adapt": False},
    "lambc": {"max_ratio": 1.0},
}

# Learning-rate schedules of the trainer, after the warm-up.
SCHEDULES = ("polynomial", "cosine", "step", "constant")

# How ranks communicate: the module of each backend; see `lars.comm.world`.
BACKENDS = {"horovod": "lars.comm.horovod"}
