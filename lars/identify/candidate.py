"""The optimizer that the user names: how to import it, create it, and read its hyper-parameters."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lars.errors import UsageError
from lars.identify.trial import WEIGHT_DECAY
from lars.importing import import_named

# The names of a hyper-parameter in published code. The first is the name here.
ALIASES: dict[str, tuple[str, ...]] = {
    "trust_coefficient": ("trust_coefficient", "trust_coef", "trust_coeff", "eeta", "eta"),
    "eps": ("eps", "epsilon", "lars_eps"),
    "weight_decay": ("weight_decay", "wd", "weight_decay_rate"),
    "momentum": ("momentum", "mu"),
    "dampening": ("dampening",),
    "nesterov": ("nesterov",),
    "trust_clip": ("trust_clip", "clip"),
    "betas": ("betas",),
    "lmbda": ("lmbda", "lamda", "lambda_"),
}
WRAPPER_ARGUMENTS = ("optimizer", "optim", "opt", "base_optimizer", "base")
MOMENTUM = 0.9


@dataclass
class Built:
    """An optimizer, and the groups whose learning rate a schedule sets.

    Attributes:
        optimizer: The optimizer that the user named.
        inner: The optimizer inside it, or itself.
    """

    optimizer: Any
    inner: Any

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer that updates the weights."""
        groups: list[dict[str, Any]] = self.inner.param_groups
        return groups

    def step(self) -> None:
        """Take one step."""
        self.optimizer.step()


@dataclass(frozen=True)
class Candidate:
    """A class that the user named, and the arguments of its constructor.

    Attributes:
        path: ``package.module:Class``.
        cls: The class.
        wraps: The class of the optimizer that it takes as its first argument, if any.
        options: The ``--option`` arguments.
    """

    path: str
    cls: type
    wraps: type | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def create(
        self, groups: list[dict[str, Any]], lr: float = 0.5, momentum: float = MOMENTUM
    ) -> Built:
        """Create the optimizer. An ``--option`` overrides each argument, but not a momentum of 0.

        Args:
            groups: Parameter groups with ``weight_decay``.
            lr: Learning rate.
            momentum: Momentum, where the class has one.

        Raises:
            UsageError: The constructor refuses its arguments, or needs further ones.
        """
        values = {"lr": lr, "momentum": momentum, "weight_decay": WEIGHT_DECAY, **self.options}
        if not momentum:
            values |= {"momentum": 0.0}
            values.pop("nesterov", None)
        cls, inner = self.cls, None
        decay_name = accepted_name(self.wraps or cls, "weight_decay")
        if decay_name and decay_name != "weight_decay":
            groups = [{**group, decay_name: group["weight_decay"]} for group in groups]
        try:
            if self.wraps is not None:
                inner = self.wraps(groups, **arguments(self.wraps, values, self.path))
                optimizer = cls(inner, **arguments(cls, values, self.path))
            else:
                optimizer = cls(groups, **arguments(cls, values, self.path))
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(
                f"{self.path} cannot be created: {type(error).__name__}: {error}. "
                "Set its arguments with --option NAME=VALUE"
            ) from error
        return Built(optimizer, optimizer if inner is None else inner)


def load(path: str, options: Sequence[str] = (), wraps: str | None = None) -> Candidate:
    """The candidate with this import path.

    Args:
        path: ``package.module:Class``. Modules in the current folder are found.
        options: Arguments of the constructor as ``NAME=VALUE``.
        wraps: The import path of the optimizer that it wraps. None: torch.optim:SGD if the first argument of the
            constructor is an optimizer.

    Raises:
        UsageError: The class cannot be imported, is no optimizer, or lacks an option.
    """
    cls = imported(path)
    inner = imported(wraps, "--wraps") if wraps else None
    first = next(iter(parameters_of(cls)), "")
    if inner is None and first in WRAPPER_ARGUMENTS:
        inner = torch.optim.SGD
    if inner is not None and first not in WRAPPER_ARGUMENTS and "param" in first:
        raise UsageError(
            f"--wraps: {path} takes parameters and not an optimizer; leave --wraps out"
        )
    given = {}
    for word in options:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise UsageError(f"--option {word}: write NAME=VALUE, for example --option eps=1e-8")
        takers = [accepted_name(taker, name) for taker in (cls, inner) if taker is not None]
        if not any(takers):
            known = sorted({x for taker in (cls, inner) if taker for x in parameters_of(taker)})
            raise UsageError(
                f"--option {word}: {path} has no option {name}; it has {', '.join(known)}"
            )
        given[own_name(name)] = value_of(text)
    return Candidate(path, cls, inner, given)


def imported(path: str, flag: str = "") -> type:
    """The class with an import path.

    Raises:
        UsageError: It cannot be imported, or is no optimizer.
    """
    cls: type = import_named(flag, path, _is_optimizer)
    if not _is_optimizer(cls):
        raise UsageError(
            f"{f'{flag} {path}'.strip()} is not an optimizer: it is not a class with a step() method"
        )
    return cls


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, type) and callable(getattr(value, "step", None))


def parameters_of(cls: type) -> dict[str, inspect.Parameter]:
    """The parameters of a constructor, without self, *args and **kwargs."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(cls).parameters
    return {name: value for name, value in found.items() if value.kind not in variable}


def own_name(name: str) -> str:
    """The name of an option here, for its name in published code."""
    for own, names in ALIASES.items():
        if name in names:
            return own
    return name


def accepted_name(cls: type, name: str) -> str | None:
    """The name under which a constructor takes an option; None if it does not."""
    known = parameters_of(cls)
    for alias in (name, *ALIASES.get(own_name(name), ())):
        if alias in known:
            return alias
    return None


def arguments(cls: type, values: dict[str, Any], path: str) -> dict[str, Any]:
    """The values that a constructor takes, under its own names.

    Raises:
        UsageError: A required argument has no value.
    """
    names = {name: accepted_name(cls, name) for name in values}
    chosen = {own: values[name] for name, own in names.items() if own is not None}
    required = list(parameters_of(cls).items())[1:]
    for name, parameter in required:
        if parameter.default is inspect.Parameter.empty and name not in chosen:
            raise UsageError(
                f"{path}: {cls.__name__} needs the argument {name}; add --option {name}=VALUE"
            )
    return chosen


def value_of(text: str) -> Any:
    """The value of an option: a Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def hyper_parameters(built: Built) -> dict[str, Any]:
    """The hyper-parameters of an optimizer by the names of this library, as far as it has them.

    They are read from its attributes, its defaults and its first group, in the order of precedence. A wrapper comes
    before the optimizer inside.
    """
    sources: list[dict[str, Any]] = []
    for optimizer in (built.optimizer, built.inner):
        groups = getattr(optimizer, "param_groups", None) or [{}]
        sources += [vars(optimizer), groups[0], getattr(optimizer, "defaults", {})]
    found: dict[str, Any] = {}
    for own, names in ALIASES.items():
        for source in sources:
            values = [source[name] for name in names if name in source]
            if values and isinstance(values[0], bool | int | float | tuple | list):
                found[own] = values[0]
                break
    return found


def known_flags(built: Built, flags: Sequence[str]) -> list[str]:
    """The exclusion flags that an optimizer declares among its options."""
    return [flag for flag in flags if flag in getattr(built.inner, "defaults", {})]
