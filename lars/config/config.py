"""The flags of a training run: every field is a flag, and every flag is a field.

The module imports little, so that ``--help`` and flag errors appear at once.
"""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from lars.config.flags import flag, flag_name
from lars.errors import UsageError
from lars.names import LARS_FORMS, OPTIMIZERS, SCHEDULES

DEFAULT_CHECKPOINT_FORMAT = "checkpoint-{epoch}.pth.tar"


@dataclass(frozen=True)
class Config:
    """All settings of a training run that do not depend on the source of the images."""

    model: str = flag("resnet50", "name of a torchvision classification network", group="model")
    zero_init_last_gamma: bool = flag(
        False,
        "initialise the last BatchNorm weight of each residual block to zero (ResNets only)",
        group="model",
    )
    sync_bn: bool = flag(
        False,
        "compute BatchNorm statistics over the micro-batches of all ranks together, which is slower",
        group="model",
    )
    batch_size: int = flag(
        32,
        "samples per micro-batch, that is, per forward pass of one rank; BatchNorm statistics come from these samples",
        group="batch",
    )
    batches_per_allreduce: int = flag(
        1,
        "micro-batches that each rank accumulates per optimizer step; the effective batch size is --batch-size x ranks "
        "x this number",
        group="batch",
        aliases=("--accumulation-steps",),
        same_run=False,
    )
    effective_batch_size: int | None = flag(
        None,
        "samples per optimizer step over all ranks; sets the accumulation for the given number of ranks",
        group="batch",
    )
    drop_last: bool = flag(
        False,
        "leave out the short last step of an epoch; by default it is taken, and its samples have the usual weight",
        group="batch",
    )
    val_batch_size: int = flag(
        32, "samples per validation batch of one rank", group="batch", same_run=False
    )

    epochs: int = flag(90, "passes over the training set", group="schedule")
    base_lr: float = flag(
        0.0125,
        "learning rate before scaling; the peak that warm-up reaches",
        group="schedule",
        aliases=("--lr",),
    )
    lr_scaling: str = flag(
        "keep",
        "how --base-lr is scaled to the peak rate, with k = ranks x accumulation: keep (unchanged), linear (x k) or "
        "sqrt (x sqrt k)",
        group="schedule",
        choices=("keep", "linear", "sqrt"),
    )
    warmup_epochs: float = flag(
        5.0,
        "epochs of linear warm-up from 0; may be fractional (default: 5; 0 for tvlars)",
        group="schedule",
    )
    lr_schedule: str = flag(
        "polynomial",
        "schedule after the warm-up: polynomial or cosine decay to --end-lr, step (division by 10 at each epoch of "
        "--lr-decay), or constant (default: polynomial; constant for tvlars)",
        group="schedule",
        choices=SCHEDULES,
    )
    lr_power: float | None = flag(
        None,
        "power of the polynomial decay (default: 2 for lars, 1 otherwise)",
        group="schedule",
    )
    end_lr: float = flag(
        0.0, "learning rate at the end of polynomial or cosine decay", group="schedule"
    )
    lr_decay: tuple[int, ...] = flag(
        (30, 60, 80), "epochs at which --lr-schedule step divides the rate by 10", group="schedule"
    )

    base_op: str = flag(
        "sgd", "the optimizer", group="optimizer", choices=OPTIMIZERS, aliases=("--optimizer",)
    )
    momentum: float = flag(0.9, "momentum of sgd, lars and tvlars", group="optimizer")
    wd: float = flag(5e-5, "weight decay", group="optimizer", aliases=("--weight-decay",))
    epsilon: float | None = flag(
        None,
        "eps in the denominator of the LARS trust ratio (default: 1e-5 for form nus, 0 or 1e-8 for the other forms)",
        group="optimizer",
    )
    lars_form: str = flag(
        "nus",
        "published variant of LARS; each variant needs its own recipe (see lars.LARS). In nus, one outlier gradient "
        "moves the weights almost as far as in plain SGD, so combine it with --clip-grad-norm, or use mlperf, optax, "
        "torchlars or barlowtwins",
        group="optimizer",
        choices=LARS_FORMS,
    )
    trust_coefficient: float | None = flag(
        None,
        "factor of the trust ratio of lars and tvlars (default: set by --lars-form, 0.001 for most forms)",
        group="optimizer",
    )
    lmbda: float | None = flag(
        None, "tvlars: decay rate of its factor per step (default: 0.001)", group="optimizer"
    )
    alpha: float | None = flag(
        None, "tvlars: the factor starts near 1 / alpha (default: 0.1)", group="optimizer"
    )
    delay: float | None = flag(
        None, "tvlars: step around which the factor falls (default: 0)", group="optimizer"
    )
    floor: float | None = flag(
        None, "tvlars: lower limit of the factor (default: 0)", group="optimizer"
    )
    bn_bias_separately: bool = flag(
        True,
        "exclude normalisation layers and biases from the trust ratio and from weight decay",
        group="optimizer",
    )
    clip_grad_norm: float | None = flag(
        None, "clip the gradient of a step to this norm", group="optimizer"
    )
    ema_decay: float | None = flag(
        None,
        "keep an exponential moving average of the weights with this decay per step, and validate it as well",
        group="optimizer",
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
    )

    log_dir: str = flag("./logs/imagenet", "parent of the run folders", group="run", same_run=False)
    run_name: str | None = flag(
        None,
        "name of the run folder (default: derived from the main flags, so that the same command finds it again)",
        group="run",
        same_run=False,
    )
    resume: str = flag(
        "auto",
        "auto: resume from the newest valid checkpoint in the run folder; never: refuse a run folder that has been "
        "used; PATH: resume from this checkpoint, made with the same flags, unless the run folder has one of its own",
        group="run",
        same_run=False,
    )
    branch: str | None = flag(
        None,
        "path of another run's checkpoint from which to start a new run; flags such as --epochs, --base-lr and the "
        "augmentation may change, the model and the optimizer may not",
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
        "save a checkpoint every N optimizer steps, in addition to every epoch",
        group="run",
        same_run=False,
    )
    checkpoint_minutes: float | None = flag(
        None,
        "save a checkpoint when this many minutes have passed since the last one, in addition to every epoch",
        group="run",
        same_run=False,
    )
    max_skipped_steps: int = flag(
        10,
        "end the job after this many consecutive steps with a non-finite loss or gradient; such steps are skipped",
        group="run",
        same_run=False,
    )
    keep_checkpoints: int = flag(
        3, "newest checkpoints to keep; the best one is kept too", group="run", same_run=False
    )
    stop_signals: tuple[str, ...] = flag(
        ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"),
        "when any rank receives one of these signals, the job saves after the current step and exits with code 75; "
        "a second Ctrl-C (SIGINT) ends it at once",
        group="run",
        same_run=False,
    )
    stall_seconds: float = flag(
        600.0,
        "end the job with stack traces in its log if a rank makes no progress for this many seconds; 0: never",
        group="run",
        same_run=False,
    )
    max_steps: int | None = flag(
        None,
        "stop after this many optimizer steps, counted over the whole run; the schedule does not change",
        group="run",
        same_run=False,
    )
    benchmark: str | None = flag(
        None,
        "measure images/s over --max-steps steps (default 50) instead of training; writes no files. noise: random "
        "images; data: read the images as training does",
        group="run",
        choices=("noise", "data"),
        same_run=False,
    )
    evaluate: str | None = flag(
        None,
        "validate the weights in this file instead of training; writes no files. It is a checkpoint, a safetensors "
        "file or a state_dict. The other flags, such as --model, must be those of its training",
        group="run",
        aliases=("-e",),
        same_run=False,
    )
    log_every: int = flag(
        20,
        "optimizer steps between two readings of the training metrics",
        group="run",
        same_run=False,
    )
    val_every: int = flag(
        1, "epochs between two validations; the last epoch is always validated", group="run"
    )
    seed: int = flag(
        42, "seed of initialisation, sample order, augmentation and dropout", group="run"
    )

    workers: int | None = flag(
        None,
        "decoding processes per rank (default: one less than the CPUs allotted to the rank)",
        group="machine",
        same_run=False,
    )
    single_threaded: bool = flag(
        False,
        "decode images in the training process; the same as --workers 0",
        group="machine",
        same_run=False,
    )
    no_cuda: bool = flag(
        False, "train on the CPU even if there is a GPU", group="machine", same_run=False
    )
    amp: str = flag(
        "off",
        "mixed precision with torch.autocast in bf16 or fp16; fp16 uses dynamic loss scaling",
        group="machine",
        choices=("off", "bf16", "fp16"),
    )
    channels_last: bool = flag(
        True, "store images and filters channels-last (NHWC), the fastest layout", group="machine"
    )
    compile: bool = flag(False, "compile the network with torch.compile", group="machine")
    fp16_allreduce: bool = flag(False, "exchange gradients as 16-bit floats", group="machine")

    @classmethod
    def resolved(
        cls, values: dict[str, Any], given: Collection[str], typed: Collection[str]
    ) -> dict[str, Any]:
        """Replace defaults by those of the chosen optimizer.

        Args:
            values: Value of each field.
            given: Fields whose flags were given in a recipe or on the command line.
            typed: Fields whose flags were given on the command line itself. Only these are checked, because a recipe
                may have flags for an optimizer that the command line replaces.

        Raises:
            UsageError: A flag on the command line has no effect with this optimizer.
        """
        name = values["base_op"]
        row = OPTIMIZERS[name]
        owned = {flag for each in OPTIMIZERS.values() for flag in each.flags}
        for unused in sorted(set(typed) & owned - set(row.flags)):
            owners = ", ".join(key for key, each in OPTIMIZERS.items() if unused in each.flags)
            raise UsageError(
                f"{flag_name(unused)} has no effect with --base-op {name}; it belongs to {owners}. Leave it out"
            )
        return values | {key: value for key, value in row.defaults.items() if key not in given}

    def __post_init__(self) -> None:
        """Check the values that do not depend on the number of ranks.

        Raises:
            UsageError: A value is out of range, or two flags contradict each other.
        """
        at_least = {
            "batch_size": 1, "batches_per_allreduce": 1, "effective_batch_size": 1, "val_batch_size": 1, "epochs": 1,
            "base_lr": 0, "warmup_epochs": 0, "end_lr": 0, "lr_power": 0, "momentum": 0, "wd": 0, "epsilon": 0,
            "label_smoothing": 0, "keep_checkpoints": 1, "max_steps": 1, "log_every": 1, "val_every": 1, "workers": 0,
            "checkpoint_steps": 1, "checkpoint_minutes": 0, "max_skipped_steps": 1, "clip_grad_norm": 0, "ema_decay": 0,
            "trust_coefficient": 0, "stall_seconds": 0, "lmbda": 0, "delay": 0, "floor": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise UsageError(f"{flag_name(name)} must be at least {least}, not {value}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise UsageError(f"--alpha must be more than 0, not {self.alpha}")
        for name in ("momentum", "label_smoothing", "ema_decay"):
            if (getattr(self, name) or 0) >= 1:
                raise UsageError(f"{flag_name(name)} must be below 1, not {getattr(self, name)}")
        if self.branch is not None and self.resume != "auto":
            raise UsageError(
                f"--branch and --resume {self.resume} exclude each other; use only one of them"
            )
        for name in self.stop_signals:
            if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
                raise UsageError(
                    f"--stop-signals: {name} is not a signal that can be caught; use, for example, SIGTERM or SIGUSR1"
                )
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed must be between 0 and 2^63 - 1, not {self.seed}")
        name = self.checkpoint_format
        if name.count("{epoch}") != 1 or "/" in name or name.startswith("."):
            raise UsageError(
                f"--checkpoint-format must be a file name that contains {{epoch}} once and does not begin with a dot, "
                f"not {name!r}"
            )
        if self.run_name is not None and not re.fullmatch(r"\w[\w.+=,@%-]*", self.run_name):
            raise UsageError(f"--run-name must be a plain folder name, not {self.run_name!r}")
