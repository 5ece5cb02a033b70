"""Groups and states of other implementations: their names here, and what has no counterpart."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

# Names of options in other projects: NUS (eeta, epsilon, lars) and timm (trust_coeff).
SAME = {
    "eeta": "trust_coefficient",
    "epsilon": "eps",
    "lars": "adapt",
    "trust_coeff": "trust_coefficient",
}
# Names of options with the opposite meaning: mmpretrain (lars_exclude) and apex of ROCm (is_skipped).
OPPOSITE = {"is_skipped": "adapt", "lars_exclude": "adapt"}
# Options of other optimizers that are not available here, with the values that make no difference.
NEUTRAL: dict[str, Any] = {
    "amsgrad": False,
    "caution": False,
    "dampening": 0,
    "grad_averaging": True,
    "maximize": False,
    "nesterov": False,
}


def own_names(group: dict[str, Any], options: Collection[str]) -> dict[str, Any]:
    """Rename the options of a group that another implementation calls differently.

    Args:
        group: The group, which does not change.
        options: The options of this optimizer. Names of other options stay as they are.

    Returns:
        A renamed copy, or the group itself if it has no foreign names.

    Raises:
        ValueError: The group has an option under both names, with different values.
    """
    names = {foreign: own for foreign, own in (SAME | OPPOSITE).items() if own in options}
    if names.keys().isdisjoint(group):
        return group
    renamed = dict(group)
    for foreign, own in names.items():
        if foreign in renamed:
            value = renamed.pop(foreign)
            if own == "adapt":
                value = bool(value) != (foreign in OPPOSITE)
            if renamed.setdefault(own, value) != value:
                raise ValueError(
                    f"a parameter group has {foreign}={group[foreign]!r} and {own}={group[own]!r}, "
                    f"which contradict each other; keep {own}"
                )
    return renamed


def own_state(
    state_dict: dict[str, Any], *, owner: str, buffers: Collection[str], options: Collection[str]
) -> dict[str, Any]:
    """Translate the state of another implementation; our own states stay as they are.

    Args:
        state_dict: The argument of ``load_state_dict``, which does not change.
        owner: The class that loads it, for messages.
        buffers: The names of the tensors in the state of a parameter.
        options: The options of the groups.

    Raises:
        ValueError: The state cannot be continued, because it has tensors or options without a
            counterpart, or lacks the number of steps.
    """
    groups = [dict(own_names(group, options)) for group in state_dict["param_groups"]]
    states = {key: dict(state) for key, state in state_dict["state"].items()}
    for group in groups:
        _check_options(group, owner, options)
    for state in states.values():
        if "momentum_buffer" in buffers and "momentum_buffer" not in state and "mu" in state:
            state["momentum_buffer"] = state.pop("mu")  # Barlow Twins, VISSL, MAE, MoCo v3
        _check_tensors(state, owner, buffers)
    if "step" in buffers:
        for group in groups:
            _move_step(group, states, owner, buffers)
    return state_dict | {"state": states, "param_groups": groups}


def _check_options(group: Mapping[str, Any], owner: str, options: Collection[str]) -> None:
    """Raise ValueError if a group uses an option that this optimizer does not have."""
    for name, neutral in NEUTRAL.items():
        if name not in options and group.get(name, neutral) not in (neutral, None):
            raise ValueError(
                f"{owner} cannot continue this state: it was saved with {name}={group[name]!r}, "
                f"and {owner} has no such option"
            )


def _check_tensors(state: Mapping[str, Any], owner: str, buffers: Collection[str]) -> None:
    """Raise ValueError if a state has tensors that would be ignored, e.g. those of Adam in LARS."""
    unknown = [
        name
        for name, value in state.items()
        if name not in buffers and isinstance(value, Tensor) and value.ndim > 0
    ]
    if unknown:
        raise ValueError(
            f"{owner} cannot continue this state: it has {', '.join(unknown)}, and {owner} keeps "
            f"{', '.join(buffers)}. Start with a new state, or use the optimizer that saved it"
        )


def _move_step(
    group: dict[str, Any], states: dict[Any, dict[str, Any]], owner: str, buffers: Collection[str]
) -> None:
    """Give the states of a group the step count that timm, apex and others keep in the group."""
    step = group.pop("step", None)
    for key in group["params"]:
        state = states.get(key, {})
        if all(value is None for value in state.values()):
            continue
        if step is not None:
            state.setdefault("step", torch.as_tensor(step, dtype=torch.float32).clone())
        missing = [name for name in buffers if name not in state]
        if missing:
            raise ValueError(
                f"{owner} cannot continue this state: it lacks {', '.join(missing)} of parameter "
                f"{key}. Add what is missing, or start with a new state"
            )
