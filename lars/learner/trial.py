"""A trial forward pass: can this network learn from batches of this shape, and does it return class scores?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lars.config.config import Config
from lars.config.plan import Plan
from lars.errors import UsageError
from lars.importing import cause, is_import_path
from lars.learner.task import Batch


def batch_norm_samples(config: Config, plan: Plan) -> int:
    """Samples that contribute to one BatchNorm statistic in a full step. Convergence depends on this number."""
    return plan.batch_size * (plan.size if config.sync_bn else 1)


def fewest_batch_norm_samples(config: Config, plan: Plan, source: Any) -> int:
    """Fewest samples that contribute to one BatchNorm statistic in an epoch."""
    if getattr(source, "on_bad_image", "error") == "skip":
        return 1  # any number of images may be skipped
    sizes = plan.micro_batch_sizes(plan.steps_per_epoch - 1)
    if config.sync_bn:
        sizes = [sum(sizes[i : i + plan.size]) for i in range(0, len(sizes), plan.size)]
    return min(*sizes, batch_norm_samples(config, plan))


def train_sizes(source: Any) -> Sequence[tuple[int, int]]:
    """Pairs of (first epoch from 1, side of the training images in pixels). A source may have one size only."""
    return getattr(source, "train_sizes", ((1, source.image_size),))


def refuse_impossible_batches(model: nn.Module, config: Config, plan: Plan, source: Any) -> None:
    """Try the network on two images of each size, and on a single image if an epoch has such a batch.

    BatchNorm cannot compute statistics over a single image if its feature map is a single pixel.

    Raises:
        UsageError: The network cannot process such a batch.
    """
    device = _trial_device(config)
    trained = [side for _, side in train_sizes(source)]
    for side in dict.fromkeys([source.image_size, *trained]):
        error = _error_on(model, 2, side, device)
        if error is not None:
            flag = "--image-size" if side == source.image_size else "--image-size-schedule"
            raise UsageError(
                f"{flag} {side}: {config.model} cannot process images of {side} x {side} pixels ({error}); "
                "use another size, or another --model"
            )
    if fewest_batch_norm_samples(config, plan, source) > 1:
        return
    side = min(trained)
    error = _error_on(model, 1, side, device)
    if error is None:
        return
    cause = f"{config.model} has no BatchNorm statistics over a single image of {side} px ({error})"
    if batch_norm_samples(config, plan) == 1:
        raise UsageError(f"--batch-size 1: {cause}; use a larger --batch-size, or larger images")
    if getattr(source, "on_bad_image", "error") == "skip":
        raise UsageError(
            f"--on-bad-image skip can leave a single image in a batch, but {cause}; "
            "use --on-bad-image replace, or larger images"
        )
    raise UsageError(
        f"--batch-size {plan.batch_size}: an epoch of {plan.train_size} samples leaves one for its last micro-batch, "
        f"but {cause}; use a different --batch-size, --drop-last, or larger images"
    )


def refuse_other_outputs(model: nn.Module, config: Config, source: Any) -> None:
    """Try a network of the user: does it return the class scores of two images?

    Raises:
        UsageError: It cannot process images of this size, or it returns something else, such as probabilities.
    """
    if not is_import_path(config.model):
        return
    side, classes = source.image_size, source.num_classes
    for training in (True, False):
        model.train(training)
        try:
            output = _output_on(model, 2, side, "cpu")
        except Exception as error:  # code of the user raises anything
            raise UsageError(
                f"--model {config.model} fails on two images of {side} x {side} pixels ({cause(error)}); correct the "
                "network, or use another --image-size"
            ) from error
        mode = "training" if training else "evaluation"
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if shape != (2, classes):
            raise UsageError(
                f"--model {config.model} returns {shape} for two images in {mode}, but the class scores must have the "
                f"shape (2, {classes}); the function must pass num_classes on to its last layer and return no other "
                "outputs"
            )
        if _are_probabilities(output):
            raise UsageError(
                f"--model {config.model} returns probabilities in {mode}: they are at least 0, and those of an image "
                "add up to 1. The loss computes the softmax itself; remove the one at the end of the network"
            )
    model.train()


def _are_probabilities(scores: Tensor) -> bool:
    """Whether a softmax has computed the scores. Those of a random linear layer have no such sums."""
    sums = scores.double().sum(1)
    return bool((scores >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)


def _trial_device(config: Config) -> str:
    """Meta tensors cost no time, but a network of the user may need values."""
    return "cpu" if is_import_path(config.model) else "meta"


def _error_on(model: nn.Module, samples: int, side: int, device: str) -> str | None:
    """The error that the network raises for a batch of this shape, or None."""
    try:
        _output_on(model, samples, side, device)
    except NotImplementedError:  # an operation that cannot be tried without values
        return None
    except (ValueError, RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return None


@torch.no_grad()
def _output_on(model: nn.Module, samples: int, side: int, device: str) -> Any:
    """The output of the network for black images. Its buffers and the random state do not change."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    copies = {name: tensor.detach().to(device, copy=True) for name, tensor in tensors.items()}
    images = torch.zeros(samples, 3, side, side, device=device)
    with torch.random.fork_rng(devices=[]):
        return torch.func.functional_call(model, copies, (images,))


def noise(samples: int, side: int, classes: int) -> Batch:
    """A random batch in the format of a loader: uint8 images (samples, 3, side, side) and labels."""
    generator = torch.Generator().manual_seed(0)
    shape = (samples, 3, side, side)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return images, torch.randint(classes, (samples,), generator=generator)
