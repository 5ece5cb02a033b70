"""What the optimizers of this library share: the step, the loading of states, the choice of a path."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lars.optim.cpu import kernels
from lars.optim.foreign import own_names, own_state
from lars.optim.options import check_parameters, keep_options
from lars.optim.steps.adam import AdamRule
from lars.optim.steps.sgd import SGDRule
from lars.optim.steps.tensors import Tensors, by_kind, pick

Paths = Mapping[str, Callable[..., None]]
Rule = TypeVar("Rule", SGDRule, AdamRule)


class LayerwiseOptimizer(Optimizer):
    """An optimizer that updates its groups one after the other; subclasses define the update.

    Attributes:
        buffers: The names of the values that the state of a parameter holds.
        found_inf: None, or a 0-dim float32 tensor on the device of the parameters, as in torch's fused optimizers. A
            step in which it is 1 changes no bit of the parameters and of the state, whatever the gradients are. On an
            accelerator the host does not read it.
    """

    buffers: ClassVar[tuple[str, ...]] = ()
    found_inf: Tensor | None = None

    @property
    def takes_found_inf(self) -> bool:
        """Whether `found_inf` has an effect."""
        return True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. A group that is refused is not added.

        A group that names its own ``form`` gets the options of that form. A group may use the names
        of options in other projects, such as ``lars=False`` and ``eeta``.

        Raises:
            TypeError: A parameter is complex, or a value is not a number.
            ValueError: A value is out of range, or FullyShardedDataParallel has cut a parameter.
        """
        super().add_param_group(self._completed(param_group))
        try:
            self._check(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check(self, group: dict[str, Any]) -> None:
        """Raise unless the parameters and options of a group are valid."""
        check_parameters(type(self).__name__, group)

    def _completed(self, group: dict[str, Any]) -> dict[str, Any]:
        """A new group as the caller means it; `torch.optim.Optimizer` adds the defaults."""
        return own_names(group, self.defaults)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer, or a similar state of another implementation.

        Options that its groups lack, as those of plain SGD do, keep their values.

        Raises:
            ValueError: The state has tensors or options that this optimizer does not have, or it
                lacks the number of steps.
        """
        before = self.param_groups
        super().load_state_dict(self._translated(state_dict))
        keep_options(self.param_groups, before)

    def _translated(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state with the names of this optimizer."""
        owner = type(self).__name__
        return own_state(state_dict, owner=owner, buffers=self.buffers, options=self.defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Evaluates the model and returns the loss; it runs with gradients enabled.

        Returns:
            The result of ``closure``, or None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_groups()
        return loss

    def _step_groups(self) -> None:
        """Update every group; all gradients are known."""
        for group in self.param_groups:
            self._step_group(group, *self._with_grads(group))

    def _step_group(self, group: dict[str, Any], params: Tensors, grads: Tensors) -> None:
        """Update the parameters of one group that have a gradient."""
        raise NotImplementedError

    @torch.no_grad()
    def last_ratios(self, group: dict[str, Any], params: Tensors, weights: Tensors) -> Tensor:
        """Compute the trust ratios of the last step again, for an observer of the training.

        Call it before anything changes the gradients, the options or the state. Nothing is changed
        or read back to the host.

        Args:
            group: The group of the parameters.
            params: Parameters with a gradient that share a device and dtype.
            weights: Their values before the step.

        Returns:
            The ratio that multiplied the update of each parameter, a vector; 1 where the rule has
            none. It agrees with the ratio of the step to rounding.

        Example:
            before = [p.clone() for p in group["params"]]
            optimizer.step()
            ratios = optimizer.last_ratios(group, group["params"], before)
        """
        raise NotImplementedError

    def _with_grads(self, group: dict[str, Any]) -> tuple[Tensors, Tensors]:
        """The parameters of a group that have a gradient, and these gradients.

        Raises:
            RuntimeError: A gradient is sparse; a trust ratio needs the gradient of the whole layer.
        """
        params, grads = [], []
        for p in group["params"]:
            grad = p.grad
            if grad is not None:
                params.append(p)
                grads.append(grad)
        if any(grad.layout != torch.strided for grad in grads):
            raise RuntimeError(
                f"{type(self).__name__} does not take sparse gradients: build the embedding with "
                "sparse=False, or give its weight to torch.optim.SparseAdam"
            )
        return params, grads


def choose_path(device: torch.device) -> str:
    """The fastest path: compiled kernels on a CPU, foreach on other devices and in torch.compile."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return "foreach"
    return "fused" if kernels.available() else "loop"


def apply_rule(paths: Paths, path: str, lists: Sequence[Tensors], rule: Rule) -> None:
    """Update parameters and their state in place.

    Args:
        paths: The implementations by name: "loop", "fused", "foreach".
        path: The name of one of them, or "auto" for the one that suits the device.
        lists: The parameters, their gradients, and lists of state tensors, in the order in which
            the implementations take them. A list of state tensors that the rule does not use is
            empty.
        rule: The hyper-parameters, which are the last argument of an implementation.
    """
    for (device, *_), which in by_kind(lists[0]).items():
        name = choose_path(device) if path == "auto" else path
        if name != "foreach" and rule.found_inf is not None and rule.found_inf.item():
            continue  # the other implementations are for CPUs, where the flag can be read
        paths[name](*(pick(tensors, which) for tensors in lists), rule.on(device))


def rule_of(kind: type[Rule], group: dict[str, Any], **computed: Any) -> Rule:
    """Build the rule of a group from its options of the same names and from computed values."""
    options = {name: group[name] for name in kind.__slots__ if name in group}
    return kind(**options | computed)


def takes_found_inf(optimizer: Optimizer) -> bool:
    """Whether an optimizer makes no step if its attribute ``found_inf`` is a tensor with the value 1.

    The optimizers of this library and the fused ones of torch do.
    """
    if isinstance(optimizer, LayerwiseOptimizer):
        return optimizer.takes_found_inf
    is_torch = type(optimizer).__module__.startswith("torch.optim.")
    return is_torch and all(group.get("fused") for group in optimizer.param_groups)


def step_unless(found_inf: Tensor, optimizer: Optimizer) -> None:
    """Take a step of an optimizer that `takes_found_inf`, unless the flag on the device is set."""
    conditional: Any = optimizer
    conditional.found_inf = found_inf
    try:
        optimizer.step()
    finally:
        del conditional.found_inf


def class_name(kind: type) -> str:
    """The name ``module:Class``, from which `class_named` finds the class again."""
    return f"{kind.__module__}:{kind.__qualname__}"


def class_named(name: str) -> Any:
    """Import the class with the name ``module:Class``."""
    module, _, own_name = name.partition(":")
    return getattr(importlib.import_module(module), own_name)
