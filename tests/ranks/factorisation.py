"""Train a toy net with BatchNorm for two epochs in float64, with mixed images and binary cross-entropy.

Arguments: the file to which the root saves the result; "sync" for one micro-batch per step and rank, with BatchNorm
statistics over all ranks, and without mixing.

The last step of an epoch has only five samples, so some ranks get none.
"""

import sys
from functools import partial

import torch
from torch import nn

from data.loader.order import Order
from lars.comm import start
from lars.comm.gradients import make_gradients
from lars.config import Config
from lars.config.plan import make_plan
from lars.learner.build import augmented, reseed
from lars.learner.classification import Classification
from lars.learner.learner import Learner
from lars.learner.losses import binary_cross_entropy
from lars.learner.mixing import Mixing
from lars.models.sync_batch_norm import synchronised
from lars.optim import create_optimizer

TRAIN_SIZE, BATCH, EFFECTIVE = 69, 4, 16


def main() -> None:
    world = start.join()
    sync = sys.argv[2:] == ["sync"]
    batch = EFFECTIVE // world.size if sync else BATCH
    config = Config(
        batch_size=batch, effective_batch_size=EFFECTIVE, base_op="lars", base_lr=2.0, epochs=2
    )
    plan = make_plan(config, size=world.size, train_size=TRAIN_SIZE)
    torch.manual_seed(0)
    images, labels = (
        torch.randn(TRAIN_SIZE, 3, 6, 6, dtype=torch.float64),
        torch.randint(5, (TRAIN_SIZE,)),
    )
    # The layout, dropout and mixing are tested too: gradients keep channels_last, and every split draws the same masks
    # and mixes the same images.
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.0 if sync else 0.3), nn.Linear(8, 5),
    ).double().to(memory_format=torch.channels_last)  # fmt: skip
    if sync:
        model = synchronised(model, world.all_reduce)
    optimizer = create_optimizer("lars", model, lr=2.0, momentum=0.9, weight_decay=1e-3)
    mixing = None if sync else Mixing(5, mixup=0.4, cutmix=1.0)
    task = Classification(loss=partial(binary_cross_entropy, sum_classes=True))
    learner = Learner(
        model, optimizer, make_gradients(model.parameters(), world), task,
        lr_at=lambda step: 2.0 / (1 + step), forward_is_collective=sync,
        reseed=partial(reseed, 7, rank=world.rank, size=world.size),
        augment=partial(augmented, mixing, 7, rank=world.rank, size=world.size),
    )  # fmt: skip
    step = 0
    for epoch in range(2):
        order = Order(TRAIN_SIZE, batch, EFFECTIVE, drop_last=False, seed=3)
        mine = (b for b, _ in order.epoch(epoch, 0, world.rank, world.size))
        batches = iter([(images[b], labels[b]) for b in map(torch.from_numpy, mine)])
        for k in range(plan.steps_per_epoch):
            count, samples = plan.micro_batches_in(k), plan.samples_in(k)
            learner.step(batches, step, count=count, samples=samples)
            step += 1
        assert next(batches, None) is None
    totals = world.all_reduce(learner.metrics.totals, "totals")
    if world.is_root:
        state = {"parameters": dict(model.named_parameters()), "totals": totals}
        torch.save(state | {"buffers": dict(model.named_buffers())}, sys.argv[1])


main()
