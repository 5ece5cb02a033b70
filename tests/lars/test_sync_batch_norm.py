"""BatchNorm over all ranks. On a single rank it must equal torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lars.models.sync_batch_norm import SyncBatchNorm, synchronised


def alone(tensor, name):
    return tensor


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (3, 4, 5, 2)])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
def test_on_one_rank_it_equals_torchs_batch_norm(shape, momentum, affine):
    torch.manual_seed(0)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    theirs = nn.Sequential(kind(4, momentum=momentum, affine=affine)).double()
    ours = synchronised(copy.deepcopy(theirs), alone)
    assert isinstance(ours[0], SyncBatchNorm)
    for _ in range(3):
        x = (50 + 3 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
        mine = x.detach().clone().requires_grad_()
        weights = torch.randn(shape, dtype=torch.float64)
        (theirs(x) * weights).sum().backward()
        (ours(mine) * weights).sum().backward()
        assert torch.allclose(mine.grad, x.grad, rtol=1e-9, atol=1e-11)
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-9), name
    for (name, a), b in zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12), name
    x = torch.randn(shape, dtype=torch.float64)
    assert torch.allclose(theirs.eval()(x), ours.eval()(x), rtol=1e-10)


def test_half_precision_and_channels_last_are_kept():
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.BatchNorm2d(8))
    ours = synchronised(copy.deepcopy(theirs), alone)
    x = torch.randn(4, 8, 5, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    x, mine = x.clone().requires_grad_(), x.clone().requires_grad_()
    theirs(x).float().square().sum().backward()
    y = ours(mine)
    y.float().square().sum().backward()
    assert y.dtype == mine.grad.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(ours[0].weight.grad, theirs[0].weight.grad, rtol=2e-2)


def test_parameters_stay_the_same_objects_and_copies_need_no_world():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4)))
    before = list(model.parameters())
    after = list(synchronised(model, alone).parameters())
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert copy.deepcopy(model)[1][0].all_reduce is alone
    assert model[1][0].name == "BatchNorm 1.0"
