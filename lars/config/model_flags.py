"""The flags that describe the network and its batches."""

from __future__ import annotations

from dataclasses import dataclass

from lars.config.flags import flag
from lars.names import WEIGHT_INITS


@dataclass(frozen=True)
class ModelFlags:
    """The network."""

    model: str = flag(
        "resnet50",
        "name of a torchvision classification network, or alexnet_bn, or small_cnn or small_cnn_bn for small images, "
        "or package.module:function for your own network: a function or class that takes num_classes",
        group="model",
    )
    init: str | None = flag(
        None,
        "start with the weights in this file, or with these weights of torchvision, such as IMAGENET1K_V2. It takes "
        "the files that --evaluate takes. A head with another number of classes is replaced. A resumed run does not "
        "read it again",
        group="model",
        same_run=False,
    )
    freeze_backbone: bool = flag(
        False,
        "train only the head, which is the last layer; the other layers compute as in evaluation",
        group="model",
    )
    zero_init_last_gamma: bool = flag(
        False,
        "initialise the last BatchNorm weight of each residual block to zero (ResNets only)",
        group="model",
    )
    small_stem: bool = flag(
        False,
        "for images of about 32 to 64 pixels: make the first convolution 3x3 with stride 1, and remove the max-pooling "
        "after it (ResNets and EfficientNets only)",
        group="model",
    )
    weight_init: str = flag(
        "default",
        "initial weights of convolutions and linear layers: default (those of the network), or a function of "
        "torch.nn.init",
        group="model",
        choices=WEIGHT_INITS,
    )
    sync_bn: bool = flag(
        False,
        "compute BatchNorm statistics over the micro-batches of all ranks together, which is slower",
        group="model",
    )


@dataclass(frozen=True)
class BatchFlags:
    """How many samples a micro-batch and a step have."""

    batch_size: int = flag(
        32,
        "samples per micro-batch, that is, per forward pass of one rank; BatchNorm statistics come from these samples",
        group="batch",
        at_least=1,
    )
    batches_per_allreduce: int = flag(
        1,
        "micro-batches that each rank accumulates per optimizer step; the effective batch size is --batch-size x ranks "
        "x this number",
        group="batch",
        at_least=1,
        aliases=("--accumulation-steps",),
        same_run=False,
    )
    effective_batch_size: int | None = flag(
        None,
        "samples per optimizer step over all ranks; sets the accumulation for the given number of ranks",
        group="batch",
        at_least=1,
    )
    drop_last: bool = flag(
        False,
        "leave out the short last step of an epoch; by default it is taken, and its samples have the usual weight",
        group="batch",
    )
    val_batch_size: int = flag(
        32, "samples per validation batch of one rank", group="batch", at_least=1, same_run=False
    )
