"""What the user says: every field is a flag, every flag is a field.

Importing this module costs nothing, so that ``--help`` and a refused flag answer at once.
"""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import json
import math
import re
import shlex
import signal
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from lars import launched

T = TypeVar("T")

# The names lars.optim and lars.schedules know, repeated here because importing them would load torch (a test compares).
OPTIMIZERS = ("sgd", "lars", "lamb", "tvlars", "adam", "adamw", "adagrad", "rmsprop")
SCHEDULES = ("polynomial", "cosine", "step")
LARS_FORMS = (
    "nus", "mlperf", "optax", "torchlars", "barlowtwins", "larc", "cmpark", "cmpark-inside",
)  # fmt: skip

DEFAULT_CHECKPOINT_FORMAT = "checkpoint-{epoch}.pth.tar"


class UsageError(ValueError):
    """A flag, or a combination of flags, that cannot be used; the message names the flag and the fix."""

    exit_code = 2


def flag(
    default: Any, help: str, *, group: str, choices: Sequence[str] = (), same_run: bool = True
) -> Any:
    """Make a dataclass field that is a command-line flag.

    Args:
        default: Value when the flag is not given. A bool that is True can be switched off with ``--no-…``.
        help: One or two sentences for ``--help``.
        group: Heading under which ``--help`` lists it.
        choices: Accepted values, if they are few.
        same_run: Whether a run that is resumed with another value would be another run.
    """
    return dataclasses.field(
        default=default,
        metadata={"help": help, "group": group, "choices": tuple(choices), "same_run": same_run},
    )


@dataclass(frozen=True)
class Config:
    """Everything about a training run that does not depend on where the images come from."""

    model: str = flag(
        "resnet50", "a torchvision classification net, by torchvision's name", group="model"
    )
    zero_init_last_gamma: bool = flag(
        False,
        "start every residual branch at zero (last BatchNorm weight of each block; ResNets)",
        group="model",
    )

    sync_bn: bool = flag(
        False,
        "BatchNorm statistics over the micro-batches of all ranks instead of each rank's own; slower",
        group="model",
    )

    batch_size: int = flag(
        32,
        "samples per micro-batch: one forward pass of one rank, and one BatchNorm statistic",
        group="batch",
    )
    batches_per_allreduce: int = flag(
        1,
        "micro-batches each rank accumulates per optimizer step; the effective batch is batch size x ranks x this",
        group="batch",
        same_run=False,
    )
    effective_batch_size: int | None = flag(
        None,
        "samples per optimizer step; the accumulation follows from it, whatever the number of ranks",
        group="batch",
    )
    drop_last: bool = flag(
        False,
        "leave out the last, short step of an epoch instead of weighting its samples exactly",
        group="batch",
    )
    val_batch_size: int = flag(
        32, "samples per validation batch of one rank", group="batch", same_run=False
    )

    epochs: int = flag(90, "passes over the training set", group="schedule")
    base_lr: float = flag(
        0.0125, "learning rate before scaling; the peak that warm-up reaches", group="schedule"
    )
    lr_scaling: str = flag(
        "keep",
        "how the peak follows from --base-lr, with k = ranks x accumulation: keep, linear (x k) or sqrt (x sqrt k)",
        group="schedule",
        choices=("keep", "linear", "sqrt"),
    )
    warmup_epochs: float = flag(
        5.0, "epochs of linear warm-up from 0; fractions count", group="schedule"
    )
    lr_schedule: str = flag(
        "polynomial",
        "after warm-up: polynomial or cosine decay to --end-lr, or a factor of 0.1 at each epoch of --lr-decay",
        group="schedule",
        choices=SCHEDULES,
    )
    lr_power: float | None = flag(
        None,
        "power of the polynomial decay (default: 2 for lars and tvlars, 1 otherwise)",
        group="schedule",
    )
    end_lr: float = flag(
        0.0, "learning rate at the end of polynomial or cosine decay", group="schedule"
    )
    lr_decay: tuple[int, ...] = flag(
        (30, 60, 80), "epochs at which --lr-schedule step divides by 10", group="schedule"
    )

    base_op: str = flag("sgd", "the optimizer", group="optimizer", choices=OPTIMIZERS)
    momentum: float = flag(0.9, "momentum of sgd, lars and tvlars", group="optimizer")
    wd: float = flag(5e-5, "weight decay", group="optimizer")
    epsilon: float | None = flag(
        None,
        "eps in the denominator of the LARS trust ratio (default: 1e-5 for nus, another form's own)",
        group="optimizer",
    )
    lars_form: str = flag(
        "nus",
        "which of the published rules called LARS; the recipe of one is not the recipe of another (see lars.LARS)",
        group="optimizer",
        choices=LARS_FORMS,
    )
    trust_coefficient: float | None = flag(
        None,
        "factor of the LARS trust ratio (default: the form's own, mostly 0.001)",
        group="optimizer",
    )
    bn_bias_separately: bool = flag(
        True,
        "leave normalisation layers and biases out of the trust ratio and of weight decay",
        group="optimizer",
    )
    clip_grad_norm: float | None = flag(
        None, "scale the step's gradient down to this norm if it is larger", group="optimizer"
    )
    ema_decay: float | None = flag(
        None,
        "keep an exponential moving average of the weights with this decay per step, and validate it",
        group="optimizer",
    )
    label_smoothing: float = flag(
        0.1, "as torch.nn.CrossEntropyLoss has it; also in the validation loss", group="optimizer"
    )

    log_dir: str = flag("./logs/imagenet", "parent of the run folders", group="run", same_run=False)
    run_name: str | None = flag(
        None,
        "name of the run folder (default: made of what is run, so that the same command finds it again)",
        group="run",
        same_run=False,
    )
    resume: str = flag(
        "auto",
        "auto: go on from the newest valid checkpoint of the run folder; never: refuse a used run folder; or the PATH "
        "of a checkpoint to begin from, as long as the run folder has none of its own",
        group="run",
        same_run=False,
    )
    checkpoint_format: str = flag(
        DEFAULT_CHECKPOINT_FORMAT,
        "file name of a checkpoint; {epoch} counts finished epochs",
        group="run",
        same_run=False,
    )
    checkpoint_steps: int | None = flag(
        None,
        "also save every N optimizer steps, beside every epoch",
        group="run",
        same_run=False,
    )
    checkpoint_minutes: float | None = flag(
        None, "also save when this long has passed since the last time", group="run", same_run=False
    )
    max_skipped_steps: int = flag(
        10,
        "end the job after this many steps in a row whose loss or gradients are not finite; each is skipped",
        group="run",
        same_run=False,
    )
    keep_checkpoints: int = flag(
        3, "newest checkpoints to keep, beside the best one", group="run", same_run=False
    )
    stop_signals: tuple[str, ...] = flag(
        ("SIGTERM", "SIGUSR1", "SIGUSR2"),
        "signals, to any rank, after which the job saves at the next step and ends with exit code 75",
        group="run",
        same_run=False,
    )
    stall_seconds: float = flag(
        600.0,
        "end the job, with stacks in its log, when a rank shows no sign of life for so long; 0: never",
        group="run",
        same_run=False,
    )
    max_steps: int | None = flag(
        None,
        "stop after this many optimizer steps of the whole run (the schedule stays as it is)",
        group="run",
        same_run=False,
    )
    benchmark: str | None = flag(
        None,
        "measure images/s instead of training, over --max-steps steps (default 50), and write nothing: on noise, "
        "which needs no files, or with the data as they are read in training",
        group="run",
        choices=("noise", "data"),
        same_run=False,
    )
    log_every: int = flag(
        20,
        "optimizer steps between two readings of the training metrics",
        group="run",
        same_run=False,
    )
    seed: int = flag(42, "of initialisation, sample order and augmentation", group="run")

    workers: int | None = flag(
        None,
        "decoding processes per rank (default: one less than the CPUs allotted to the rank)",
        group="machine",
        same_run=False,
    )
    single_threaded: bool = flag(
        False, "decode in the training process: --workers 0", group="machine", same_run=False
    )
    no_cuda: bool = flag(
        False, "train on the CPU even where there is a GPU", group="machine", same_run=False
    )
    amp: str = flag(
        "off",
        "compute in bf16 or fp16 where that is safe (torch.autocast); fp16 with a loss scale",
        group="machine",
        choices=("off", "bf16", "fp16"),
    )
    channels_last: bool = flag(
        True, "lay images and filters out as NHWC, which convolutions like best", group="machine"
    )
    compile: bool = flag(False, "torch.compile the network", group="machine")
    fp16_allreduce: bool = flag(False, "exchange gradients as 16-bit floats", group="machine")

    def __post_init__(self) -> None:
        """Refuse values that no world could make sense of."""
        at_least = {
            "batch_size": 1, "batches_per_allreduce": 1, "effective_batch_size": 1, "val_batch_size": 1, "epochs": 1,
            "base_lr": 0, "warmup_epochs": 0, "end_lr": 0, "lr_power": 0, "momentum": 0, "wd": 0, "epsilon": 0,
            "label_smoothing": 0, "keep_checkpoints": 1, "max_steps": 1, "log_every": 1, "workers": 0,
            "checkpoint_steps": 1, "checkpoint_minutes": 0, "max_skipped_steps": 1, "clip_grad_norm": 0,
            "ema_decay": 0, "trust_coefficient": 0, "stall_seconds": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise UsageError(f"{flag_name(name)} must be at least {least}, not {value}")
        for name in ("momentum", "label_smoothing", "ema_decay"):
            if (getattr(self, name) or 0) >= 1:
                raise UsageError(f"{flag_name(name)} must be below 1, not {getattr(self, name)}")
        for name in self.stop_signals:
            if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
                raise UsageError(
                    f"--stop-signals: {name} cannot be caught; take such as SIGTERM or SIGUSR1"
                )
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed must be between 0 and 2^63 - 1, not {self.seed}")
        name = self.checkpoint_format
        if name.count("{epoch}") != 1 or "/" in name or name.startswith("."):
            raise UsageError(
                f"--checkpoint-format must be a file name with one {{epoch}} in it and no dot before, not {name!r}"
            )
        if self.run_name is not None and not re.fullmatch(r"\w[\w.+=,@%-]*", self.run_name):
            raise UsageError(f"--run-name must be a plain folder name, not {self.run_name!r}")


def flag_name(field_name: str) -> str:
    """``base_lr`` -> ``--base-lr``."""
    return "--" + field_name.replace("_", "-")


def parse(
    argv: Sequence[str] | None, *kinds: type, description: str, epilog: str = ""
) -> tuple[Any, ...]:
    """Read a command line into one object of each dataclass in `kinds`.

    ``@FILE`` stands for the flags in FILE, with ``#`` comments; what follows it on the line wins.
    Exits with code 2 and a message that names the flag when something is wrong.

    Args:
        argv: Words of the command line, without the program's name; None for sys.argv.
        kinds: Dataclasses whose fields are the flags; a field name may occur once only.
        description: First words of ``--help``.
        epilog: Last words of ``--help``: examples.
    """
    parser = _RecipeParser(
        description=description,
        epilog=epilog,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for kind in kinds:
        types_of = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            group = field.metadata.get("group", "data")
            if group not in groups:
                groups[group] = parser.add_argument_group(group)
            groups[group].add_argument(
                flag_name(field.name), **_argument(field, types_of[field.name])
            )
    said = vars(parser.parse_args(argv))
    try:
        return tuple(
            kind(**{f.name: said[f.name] for f in dataclasses.fields(kind)}) for kind in kinds
        )
    except ValueError as error:
        parser.error(str(error))


def identity(*said: Any) -> dict[str, Any]:
    """What makes a run this run and no other: the fields that a resumed run must share, as plain values."""
    return {
        field.name: _plain(getattr(part, field.name))
        for part in said
        for field in dataclasses.fields(part)
        if field.metadata.get("same_run", True)
    }


def of_all_ranks(*said: Any) -> dict[str, Any]:
    """Fields in which all ranks must agree: all but paths and names, and how many CPUs a host has."""
    return {
        field.name: _plain(getattr(part, field.name))
        for part in said
        for field in dataclasses.fields(part)
        if field.name not in ("workers", "single_threaded")
        and (
            field.metadata.get("same_run", True)
            or field.metadata.get("choices")
            or field.type not in ("str", "str | None")
        )
    }


def as_dict(*said: Any) -> dict[str, Any]:
    """All fields of the given dataclass objects as plain values (what JSON and checkpoints hold)."""
    return {
        f.name: _plain(getattr(part, f.name)) for part in said for f in dataclasses.fields(part)
    }


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _argument(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    """Keyword arguments of add_argument for one field."""
    options: dict[str, Any] = {"default": field.default, "help": field.metadata["help"]}
    if hint is bool:
        options["action"] = argparse.BooleanOptionalAction if field.default else "store_true"
        return options
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(a for a in get_args(hint) if a is not type(None))
    if get_origin(hint) is tuple:
        members = get_args(hint)
        hint = members[0]
        options |= {
            "nargs": "+" if members[-1] is Ellipsis else len(members),
            "action": _StoreTuple,
        }
    if field.metadata.get("choices"):
        options["choices"] = field.metadata["choices"]
    else:
        options["metavar"] = {int: "N", float: "X"}.get(hint, "TEXT")
        if field.name.endswith("_dir"):
            options["metavar"] = "DIR"
    return options | {"type": hint}


class _StoreTuple(argparse.Action):
    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, tuple(values))


class _RecipeParser(argparse.ArgumentParser):
    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_args(self._expand(sys.argv[1:] if args is None else args), namespace)

    def _expand(self, words: Sequence[str], within: tuple[str, ...] = ()) -> list[str]:
        """Replace ``@FILE`` by the words in FILE; argparse's own way has tracebacks for files that are damaged."""
        expanded: list[str] = []
        for word in words:
            if not word.startswith("@"):
                expanded.append(word)
            elif word in within:
                self.error(f"{word} includes itself")
            else:
                expanded += self._expand(self._read(word), (*within, word))
        return expanded

    def _read(self, recipe: str) -> list[str]:
        words: list[str] = []
        try:
            lines = Path(recipe[1:]).read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
        except (OSError, ValueError) as error:
            self.error(f"{recipe} cannot be read: {getattr(error, 'strerror', error)}")
        for number, line in enumerate(lines, start=1):
            try:
                words += shlex.split(line.decode(), comments=True)
            except ValueError as error:  # of shlex, or not UTF-8
                self.error(f"{recipe}, line {number}: {error}")
        return words

    def print_help(self, file: Any = None) -> None:
        if launched.rank() == 0:
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        launched.take_turn(UsageError.exit_code, met=False)
        super().error(message)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the line breaks of the examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if action.default in (None, False, argparse.SUPPRESS) or "default" in text:
            return text
        shown = (
            " ".join(map(str, action.default))
            if isinstance(action.default, tuple)
            else action.default
        )
        return f"{text} (default: {shown})".replace("%", "%%")
