"""The flags that describe where and how a run is executed."""

from __future__ import annotations

from dataclasses import dataclass

from lars.config.flags import flag
from lars.names import BACKENDS

DEFAULT_CHECKPOINT_FORMAT = "checkpoint-{epoch}.pth.tar"


@dataclass(frozen=True)
class RunFlags:
    """The run folder, checkpoints, and the end of a run."""

    log_dir: str = flag(
        "./logs/imagenet",
        "parent of the run folders",
        group="run",
        aliases=("--output",),
        same_run=False,
    )
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
        at_least=1,
        same_run=False,
    )
    checkpoint_minutes: float | None = flag(
        None,
        "save a checkpoint when this many minutes have passed since the last one, in addition to every epoch",
        group="run",
        at_least=0,
        same_run=False,
    )
    max_skipped_steps: int = flag(
        10,
        "end the job after this many consecutive steps with a non-finite loss or gradient; such steps are skipped",
        group="run",
        at_least=1,
        same_run=False,
    )
    keep_checkpoints: int = flag(
        3,
        "number of newest checkpoints to keep; the best one is always kept",
        group="run",
        at_least=1,
        same_run=False,
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
        at_least=0,
        same_run=False,
    )
    max_steps: int | None = flag(
        None,
        "stop after this many optimizer steps, counted over the whole run; the schedule does not change",
        group="run",
        at_least=1,
        same_run=False,
    )
    target_top1: float | None = flag(
        None,
        "validation top-1 in percent; the summary of the run states when it was reached; training continues",
        group="run",
        above=1,
        below=100,
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
        "validate the weights in this file instead of training; writes no files. The file is a checkpoint, a "
        "safetensors file or a state_dict. The other flags, such as --model, must be those of its training",
        group="run",
        aliases=("-e",),
        same_run=False,
    )
    log_every: int = flag(
        20,
        "optimizer steps between two readings of the training metrics",
        group="run",
        at_least=1,
        same_run=False,
    )
    layers_every: int = flag(
        50,
        "optimizer steps between two readings of every layer's weight norm, gradient norm, trust ratio and relative "
        "update; 0: never",
        group="run",
        at_least=0,
        same_run=False,
    )
    val_every: int = flag(
        1,
        "epochs between two validations; the last epoch is always validated",
        group="run",
        at_least=1,
    )
    seed: int = flag(
        42, "seed of initialisation, sample order, augmentation and dropout", group="run"
    )


@dataclass(frozen=True)
class MachineFlags:
    """The use of the machine."""

    backend: str = flag(
        "auto",
        "how the ranks communicate: horovod (over MPI) or torch (torch.distributed with NCCL or Gloo); auto takes "
        "horovod if mpirun or srun --mpi=pmix started the job and Horovod is installed, and torch otherwise",
        group="machine",
        choices=("auto", *BACKENDS),
        same_run=False,
    )
    workers: int | None = flag(
        None,
        "decoding processes per rank (default: one less than the CPUs allotted to the rank)",
        group="machine",
        at_least=0,
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
    fp16_allreduce: bool = flag(
        False, "exchange gradients as 16-bit floats, scaled to their range", group="machine"
    )
    bf16_allreduce: bool = flag(
        False,
        "exchange gradients as bfloat16; it needs torch.distributed (see --backend)",
        group="machine",
    )
