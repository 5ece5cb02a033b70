"""Any torch optimizer by its import path: ``--base-op package.module:Class``."""

from __future__ import annotations

import inspect
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lars.config.config import Config
from lars.config.optimizer_flags import literal_options
from lars.errors import UsageError
from lars.importing import cause, import_named, is_import_path
from lars.optim.groups import KINDS, parameter_groups

# The trial saves the optimizer after this many steps and continues for as many. Some optimizers, such as SOAP, change
# part of their state only every ten steps.
TRIAL_STEPS = 12

# Arguments of a constructor that have flags of their own.
FLAG_OF = {"lr": "--base-lr", "weight_decay": "--wd", "momentum": "--momentum"}


def check_optimizer(config: Config) -> None:
    """Import and try the optimizer before time is spent, if --base-op is an import path.

    The trial trains a tiny network with a convolution, BatchNorm and a linear layer. It takes steps without a closure,
    and continues from a saved state. The result must have the same bits as that without an interruption.

    Raises:
        UsageError: The optimizer cannot be imported, built, stepped or resumed.
    """
    if not is_import_path(config.base_op):
        return
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            exact = _resumes_exactly(config, _tiny_network(config))
    except UsageError:
        raise
    except Exception as error:  # code of other projects raises anything
        hint = ", or try --no-channels-last" if config.channels_last else ""
        raise UsageError(
            f"--base-op {config.base_op} failed on a small convolutional network ({cause(error)}); change "
            f"--optimizer-options, use another optimizer{hint}"
        ) from error
    if not exact:
        raise UsageError(
            f"--base-op {config.base_op} does not continue exactly from its saved state, so a run could not be "
            "resumed; use another optimizer"
        )


def import_optimizer(path: str) -> type[Optimizer]:
    """Import the optimizer class ``module:Class``.

    Raises:
        UsageError: There is no such module or class, it is not an optimizer, or its step needs a closure.
    """
    kind: type[Optimizer] = import_named("--base-op", path, _is_optimizer)
    if not _is_optimizer(kind):
        raise UsageError(f"--base-op {path} is not a class derived from torch.optim.Optimizer")
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UsageError(
            f"--base-op {path} evaluates the network itself in each step (a closure), which the trainer does not "
            "support; use another optimizer"
        )
    return kind


def make_imported(config: Config, model: nn.Module, lr: float) -> Optimizer:
    """Build the optimizer of an import path.

    Its constructor gets the parameter groups, --base-lr, --wd and --momentum as far as it takes them, and
    --optimizer-options. Each group has the entry ``use_muon``, which is true if all its parameters have two or more
    dimensions. Several implementations of Muon need it. A group for which the optimizer sets its own learning rate
    keeps the ratio to `lr` during the whole run, as ``lr_scale``.

    Raises:
        UsageError: The class cannot be imported or built.
    """
    kind = import_optimizer(config.base_op)
    groups = parameter_groups(model, config.wd, exclude=excluded(config))
    for group in groups:
        group["use_muon"] = all(parameter.ndim >= 2 for parameter in group["params"])
    arguments = _arguments(config, kind, lr)
    try:
        optimizer = kind(groups, **arguments)
    except Exception as error:  # code of other projects raises anything
        raise UsageError(
            f"--base-op {config.base_op} cannot be built for this network ({cause(error)}); change "
            "--optimizer-options, or use another optimizer"
        ) from error
    for group in optimizer.param_groups:
        if "lr" not in group:
            raise UsageError(
                f"--base-op {config.base_op} has no 'lr' in its parameter groups, so --base-lr would have no effect; "
                "use another optimizer"
            )
        if lr > 0 and group["lr"] != lr:
            group["lr_scale"] = group["lr"] / lr
    return optimizer


def excluded(config: Config) -> tuple[str, ...]:
    """The parameters that the trainer excludes from decay and trust ratio, in the words of `parameter_groups`.

    They follow the rule of timm. For every network that the trainer knows by name, they are the norms and biases of the
    published runs.
    """
    return KINDS if config.bn_bias_separately else ()


def _arguments(config: Config, kind: type[Optimizer], lr: float) -> Mapping[str, Any]:
    """The keyword arguments of the constructor."""
    parameters = inspect.signature(kind).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    options = literal_options(config.optimizer_options)
    for name in options:
        if name in FLAG_OF:
            raise UsageError(f"--optimizer-options {name}: use {FLAG_OF[name]} instead")
        if name not in parameters and not takes_any:
            known = ", ".join(list(parameters)[1:])
            raise UsageError(
                f"--optimizer-options {name}: {config.base_op} does not have this option; it has: {known}"
            )
    common = {"lr": lr, "weight_decay": config.wd, "momentum": config.momentum}
    return {name: value for name, value in common.items() if name in parameters} | options


def _resumes_exactly(config: Config, network: nn.Module) -> bool:
    """Whether a run that is interrupted after `TRIAL_STEPS` steps ends with the same bits."""
    start = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = make_imported(config, network, _trial_lr(config))
    _take_steps(network, optimizer, 0)
    weights, state = _saved_and_loaded(config, [network.state_dict(), optimizer.state_dict()])
    _take_steps(network, optimizer, TRIAL_STEPS)
    straight = [parameter.detach().clone() for parameter in network.parameters()]

    network.load_state_dict(start)
    resumed = make_imported(config, network, _trial_lr(config))
    network.load_state_dict(weights)
    resumed.load_state_dict(state)
    _take_steps(network, resumed, TRIAL_STEPS)
    pairs = zip(straight, network.parameters(), strict=True)
    return all(_same_bits(ours, other) for ours, other in pairs)


def _saved_and_loaded(config: Config, state: list[Any]) -> list[Any]:
    """A copy of the state as a checkpoint holds it."""
    file = io.BytesIO()
    try:
        torch.save(state, file)
        file.seek(0)
        loaded: list[Any] = torch.load(file, weights_only=True)
    except Exception as error:  # pickling and unpickling raise many types
        raise UsageError(
            f"--base-op {config.base_op} keeps objects in its state that are neither tensors nor plain values, so a "
            "checkpoint could not be read; use another optimizer"
        ) from error
    return loaded


def _take_steps(network: nn.Module, optimizer: Optimizer, first: int) -> None:
    set_training(optimizer, True)
    for step in range(first, first + TRIAL_STEPS):
        torch.manual_seed(step)
        images = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        network(images).square().mean().backward()
        optimizer.step()


def set_training(optimizer: Optimizer, training: bool) -> None:
    """Switch an optimizer that has two modes, such as those of schedulefree, into one of them."""
    switch = getattr(optimizer, "train" if training else "eval", None)
    if callable(switch):
        switch()


def _trial_lr(config: Config) -> float:
    return config.base_lr or 1e-3


def _tiny_network(config: Config) -> nn.Module:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )  # fmt: skip
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return network.to(memory_format=layout)  # type: ignore[call-overload]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.detach().view(torch.int32))


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Optimizer)
