"""The update rules on CPU tensors: compiled kernels where they apply, and a plain loop elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lars.optim.cpu import kernels
from lars.optim.steps.adam import AdamRule, adam_loop
from lars.optim.steps.sgd import SGDRule, sgd_loop
from lars.optim.steps.tensors import Tensors, norms, pick


def sgd_fused(params: Tensors, grads: Tensors, buffers: Tensors, rule: SGDRule) -> None:
    """`sgd_loop` with the compiled kernels."""
    rule = replace(rule, lr=float(rule.lr), trust_coefficient=float(rule.trust_coefficient))
    lists = (params, grads, buffers)
    for_kernel, for_loop = _split(*lists) if buffers else _split(params, grads)
    if for_kernel:
        p, g, b = (pick(tensors, for_kernel) for tensors in lists)
        if not kernels.lars(p, g, b, rule):
            for_loop = range(len(params))
    if for_loop:
        p, g, b = (pick(tensors, for_loop) for tensors in lists)
        sgd_loop(p, g, b, rule)


def adam_fused(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    rule: AdamRule,
) -> None:
    """`adam_loop` with the compiled kernels."""
    lists = (params, grads, exp_avgs, exp_avg_sqs, steps)
    for_kernel, for_loop = _split(*lists[:4])
    clip = 1.0 if rule.clip is None else float(rule.clip)
    if for_kernel and rule.skip:
        finite = (norms(pick(grads, for_kernel)) * clip).isfinite().tolist()
        for_kernel = [i for i, is_finite in zip(for_kernel, finite, strict=True) if is_finite]
    if for_kernel:
        p, g, m, v, s = (pick(tensors, for_kernel) for tensors in lists)
        counts = (torch.stack(s) + 1).tolist()
        scales = {t: bias_scales(t, rule) for t in set(counts)}
        numbers = replace(rule, lr=float(rule.lr), clip=clip)
        if kernels.lamb(p, g, m, v, [scales[t] for t in counts], numbers):
            torch._foreach_add_(s, 1)
        else:
            for_loop = range(len(params))
    if for_loop:
        p, g, m, v, s = (pick(tensors, for_loop) for tensors in lists)
        adam_loop(p, g, m, v, s, rule)


def bias_scales(step: float, rule: AdamRule) -> tuple[float, float]:
    """m̂ / m and √v̂ / √v in the step with this number; both are 1 without bias correction."""
    if not rule.bias_correction:
        return 1.0, 1.0
    return 1 / (1 - rule.beta1**step), (1 - rule.beta2**step) ** -0.5


def _split(*lists: Tensors) -> tuple[Sequence[int], Sequence[int]]:
    """The positions of the tensors that a kernel takes, and of those that are left to the loop."""
    answers = kernels.takes_all(*lists)
    if all(answers):
        return range(len(answers)), []
    for_kernel = [i for i, taken in enumerate(answers) if taken]
    return for_kernel, [i for i, taken in enumerate(answers) if not taken]
