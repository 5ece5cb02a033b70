"""The options of a parameter group: where their values come from, and which values are allowed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

# Options that all optimizers of this library share.
CHOICES = {
    "nonfinite": ("propagate", "skip"),
    "path": ("auto", "loop", "fused", "foreach"),
}


def defaults_from(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the ``locals()`` of a constructor into defaults: every argument becomes a group option."""
    return {
        name: value
        for name, value in arguments.items()
        if name not in ("self", "params", "__class__")
    }


def with_form(
    options: dict[str, Any], forms: Mapping[str, dict[str, Any]], form_defaults: dict[str, Any]
) -> dict[str, Any]:
    """Replace the options that the caller left to the form with the values of the form.

    None leaves an option to the form. For a bound, where None means no bound, "form" does so.

    Args:
        options: The arguments of a constructor; ``form`` is the name of the form.
        forms: What each form sets.
        form_defaults: All options that a form can set, with their values where it does not.

    Raises:
        ValueError: The form is unknown.
    """
    chosen = form_options(options["form"], forms, form_defaults)
    bounds = bounds_of(form_defaults)
    left = [name for name in chosen if options[name] == ("form" if name in bounds else None)]
    return options | {name: chosen[name] for name in left}


def bounds_of(form_defaults: dict[str, Any]) -> list[str]:
    """The options for which None is a value: no bound."""
    return [name for name, value in form_defaults.items() if value is None]


def form_options(
    form: str, forms: Mapping[str, dict[str, Any]], form_defaults: dict[str, Any]
) -> dict[str, Any]:
    """Every option of a named form; see `with_form` for the arguments."""
    check_choice("form", form, forms)
    return form_defaults | forms[form]


def group_with_form(
    group: dict[str, Any], forms: Mapping[str, dict[str, Any]], form_defaults: dict[str, Any]
) -> dict[str, Any]:
    """Complete a group that names its own form with the options of that form that it does not set."""
    if "form" not in group:
        return group
    return form_options(group["form"], forms, form_defaults) | group


def params_and_defaults(params: Any, defaults: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of torch's Optimizer: the parameters, and the defaults for later groups.

    Horovod's wrapper rebuilds an optimizer from its groups alone. Such groups set every option. The
    defaults of the first optimizer are lost, so the options of its first group replace them.
    """
    if isinstance(params, Tensor):
        return params, defaults
    if isinstance(params, Optimizer):
        raise TypeError(
            f"expected parameters, not the optimizer {type(params).__name__}: LARSWrapper(optimizer) "
            "puts a trust ratio around an optimizer"
        )
    params = list(params)
    first = params[0] if params and isinstance(params[0], dict) else {}
    if defaults.keys() <= first.keys():
        defaults = {name: first[name] for name in defaults}
    return params, defaults


def keep_options(groups: list[dict[str, Any]], before: list[dict[str, Any]]) -> None:
    """Give loaded groups the options that they lack, as those of plain SGD do."""
    for group, own in zip(groups, before, strict=True):
        for name, value in own.items():
            group.setdefault(name, value)


def check_parameters(owner: str, group: dict[str, Any]) -> None:
    """Raise unless the parameters of a group are real, and layers if they get a trust ratio."""
    for param in group["params"]:
        if param.is_complex():
            raise TypeError(
                f"{owner} does not take complex parameters: store the real and the imaginary part "
                "in one real parameter, and use torch.view_as_complex in the model"
            )
        # FullyShardedDataParallel marks the parameters that it cuts, with or without use_orig_params.
        if group.get("adapt", True) and getattr(param, "_fsdp_flattened", False):
            raise ValueError(
                f"{owner} needs the norm of each layer, but FullyShardedDataParallel cuts layers "
                "into flat shards: use torch.distributed.fsdp.fully_shard instead"
            )


def check_choices(group: dict[str, Any], choices: Mapping[str, Collection[str]]) -> None:
    """Raise ValueError unless each of these options of the group has one of its choices."""
    for name, known in choices.items():
        check_choice(name, group[name], known)


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; choose one of: {', '.join(choices)}")


def check_not_negative(group: dict[str, Any], *names: str) -> None:
    """Raise unless these options of the group are finite numbers of 0 or more."""
    for name in names:
        check_number(name, group[name])
        if not 0 <= group[name] < math.inf:
            raise ValueError(f"{name}={group[name]} must be finite and 0 or more")


def check_bound(group: dict[str, Any], *names: str) -> None:
    """Raise unless these options of the group are positive numbers or None."""
    for name in names:
        bound = group[name]
        if bound is not None:
            check_number(name, bound)
            if not bound > 0:
                raise ValueError(f"{name}={bound} must be more than 0, or None for no bound")


def check_number(name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a real number or a 0-dim tensor."""
    if isinstance(value, Tensor) and value.ndim:
        raise TypeError(
            f"{name} must be a number or a 0-dim tensor, not of shape {tuple(value.shape)}"
        )
    if not isinstance(value, Real | Tensor):
        raise TypeError(f"{name}={value!r} must be a number")
