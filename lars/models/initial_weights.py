"""Initial weights of convolutions and linear layers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

# The rules by name, with the default arguments of torch.nn.init. "kaiming" is He et al. 2015 (arXiv 1502.01852).
# "xavier" is Glorot and Bengio 2010 (PMLR 9).
RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "kaiming_uniform": nn.init.kaiming_uniform_,
    "kaiming_normal": nn.init.kaiming_normal_,
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
}


def fill_weights(model: nn.Module, rule: str) -> None:
    """Fill the weight of every `nn.Conv2d` and `nn.Linear`. Biases and norms keep their values.

    Args:
        model: The network. Its weights change in place, in the order of `nn.Module.modules`.
        rule: A key of `RULES`, or "default" to change nothing.

    Example:
        fill_weights(model, "kaiming_uniform")  # He initialisation, as in cmpark0126/pytorch-LARS
    """
    if rule == "default":
        return
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            RULES[rule](module.weight)
