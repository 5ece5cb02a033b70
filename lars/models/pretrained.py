"""Published weights of torchvision, and the network to which a file of weights belongs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import Tensor

from lars.errors import UsageError
from lars.models import build, torchvision_names

# Values of a state_dict that are no parameters.
_BUFFER = re.compile(r"(running_mean|running_var|num_batches_tracked|relative_position_index)$")
# How many networks of about the right number of parameters are compared with a file.
_COMPARED = 4


def pretrained_file(model: str, name: str) -> Path:
    """The file of published weights in the cache of torch.hub. It is downloaded if it is missing.

    Args:
        model: The network's name in torchvision.
        name: The name of the weights, such as "IMAGENET1K_V2" or "DEFAULT".

    Raises:
        UsageError: torchvision has no such weights, or they cannot be downloaded.

    Example:
        pretrained_file("resnet50", "IMAGENET1K_V2")  # ~/.cache/torch/hub/checkpoints/resnet50-11ad3fa6.pth
    """
    import torchvision

    members = {}
    if model in torchvision_names():
        members = torchvision.models.get_model_weights(model).__members__
    if name not in members:
        known = f"torchvision has: {', '.join(members)}" if members else "torchvision has none"
        raise UsageError(
            f"--init {name} is neither a file nor the name of weights for --model {model}; {known}"
        )
    url = members[name].url
    path = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(url).path).name)
    if path.is_file():
        return path
    print(f"downloading {url} to {path} ...", flush=True)
    digest = torch.hub.HASH_REGEX.search(path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digest and digest[1], progress=False)
    except (OSError, RuntimeError) as error:  # no network, a full disk, or a damaged file
        raise UsageError(
            f"--init {name}: {url} could not be downloaded ({error}); download it on a machine with a network, and "
            f"add --init with the path of the file, or copy it to {path}"
        ) from error
    return path


def network_of(state: Mapping[str, Tensor]) -> str:
    """The network of torchvision whose weights have these names and shapes. Empty if there is none.

    The number of outputs of a layer does not count, so that the head may have any number of classes. The search builds
    the networks with the most similar numbers of parameters, on the meta device if possible.
    """
    import torchvision

    size = sum(tensor.numel() for name, tensor in state.items() if not _BUFFER.search(name))
    sizes = {
        name: next(iter(torchvision.models.get_model_weights(name))).meta["num_params"]
        for name in torchvision_names()
    }
    for name in sorted(sizes, key=lambda name: abs(sizes[name] - size))[:_COMPARED]:
        try:
            with torch.device("meta"):
                model = build(name, 1000)
        except NotImplementedError:  # the constructor computes with tensors
            model = build(name, 1000)
        own = {key: tensor.shape[1:] for key, tensor in model.state_dict().items()}
        theirs = {key: tensor.shape[1:] for key, tensor in state.items()}
        # Old files lack counters, and files of googlenet and inception_v3 have auxiliary heads.
        counters = {key for key in own if key.endswith("num_batches_tracked")}
        if all(theirs.get(key) == own[key] for key in own.keys() - counters):
            return name
    return ""
