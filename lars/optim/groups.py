"""Which parameters get weight decay and a trust ratio, and which do not."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

# _NormBase is the common base of BatchNorm, InstanceNorm and SyncBatchNorm, Horovod's own SyncBatchNorm included.
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def parameter_groups(
    model: nn.Module, weight_decay: float = 0.0, *, bn_bias_separately: bool = True
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into matrices on one side, biases and norms on the other.

    Excluded are all parameters of norm layers of every kind, and all biases: parameters whose own name is ``bias``,
    begins with ``bias_`` (`torch.nn.LSTM`) or ends in ``_bias`` (`torch.nn.MultiheadAttention`). The name of the *layer*
    says nothing: ``rebias.weight`` is a weight. A bare parameter that is not called a bias is adapted, whatever its shape.
    Frozen parameters are left out.

    Args:
        model: The model; its parameters keep their order.
        weight_decay: The weight decay of the adapted group.
        bn_bias_separately: False puts everything into one adapted group.

    Returns:
        Groups for any torch optimizer: the adapted one, then the excluded one with ``weight_decay`` 0 and ``adapt`` False,
        which this library's optimizers read as "no trust ratio" and torch's own ignore. An empty group is left out.

    Raises:
        ValueError: No parameter of the model is trainable.
    """
    in_norms = {
        id(param)
        for module in model.modules()
        if isinstance(module, NORMS)
        for param in module.parameters(recurse=False)
    }
    adapted, excluded = [], []
    for name, param in model.named_parameters():
        if param.requires_grad:
            is_excluded = bn_bias_separately and (id(param) in in_norms or _is_bias(name))
            (excluded if is_excluded else adapted).append(param)
    groups = [
        {"params": adapted, "weight_decay": weight_decay, "adapt": True},
        {"params": excluded, "weight_decay": 0.0, "adapt": False},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(
            "model has no trainable parameter (requires_grad=True): nothing to optimize"
        )
    return groups


def _is_bias(name: str) -> bool:
    own_name = name.rpartition(".")[2]
    return own_name == "bias" or own_name.startswith("bias_") or own_name.endswith("_bias")
