"""Run on 2 ranks: seed-for-seed the toy runs of the published trainer, through this project's engine.

Prints {case: {parameter or BatchNorm statistic: [values after each step]}} and the validation means, as the root sees
them. Argument: the file of inputs.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lars import schedules
from lars.comm import start
from lars.comm.gradients import make_gradients
from lars.engine import evaluate
from lars.job.interrupt import Interrupt
from lars.job.job import Job
from lars.learner.classification import Classification
from lars.learner.learner import Learner
from lars.learner.metrics import means
from lars.optim import create_optimizer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = (
            nn.Conv2d(3, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.Linear(4, 5),
        )

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


class Batches(list):
    bad_images = ()


def tensors(data, target):
    return torch.tensor(data, dtype=torch.float64).view(-1, 3, 5, 5), torch.tensor(target)


def cut(step_data, step_target, size):
    images, labels = tensors(step_data, step_target)
    return list(zip(images.split(size), labels.split(size), strict=True))


def main() -> None:
    golden = json.loads(Path(sys.argv[1]).read_text())
    world = start.join()
    job = Job(Interrupt([]), stall_seconds=0)
    job.world = world
    results = {}
    for case, recorded in golden["cases"].items():
        said = recorded["args"]
        model = Net().double()
        state = {
            n: torch.tensor(v, dtype=torch.float64).view(golden["shapes"][n])
            for n, v in golden["init"].items()
        }
        model.load_state_dict(state, strict=False)
        # The published script leaves --bn-bias-separately unheeded for sgd.
        separately = said["bn_bias_separately"] and said["base_op"] == "lars"
        optimizer = create_optimizer(
            said["base_op"], model, lr=said["base_lr"], momentum=said["momentum"], weight_decay=said["wd"],
            eps=said["epsilon"] if said["base_op"] == "lars" else None, bn_bias_separately=separately,
        )  # fmt: skip
        lr_at = partial(
            schedules.polynomial, peak=said["base_lr"], total_steps=6, warmup_steps=1.5,
            power=2.0 if said["base_op"] == "lars" else 1.0,
        )  # fmt: skip
        smoothing = (
            said["label_smoothing"] * 5 / 4
        )  # the published loss spreads it over the other classes only
        gradients = make_gradients(model.parameters(), world, fp16=said["fp16_allreduce"])
        task = Classification(label_smoothing=smoothing)
        learner = Learner(model, optimizer, gradients, task, lr_at=lr_at)
        step, after = 0, []
        for _ in range(2):
            for k, size in enumerate(golden["sizes"]):
                batches = cut(golden["data"][world.rank][k], golden["target"][world.rank][k], 4)
                learner.step(batches, step, count=2, samples=2 * size)
                step += 1
                after.append({n: t.flatten().tolist() for n, t in model.state_dict().items()})
        parts = golden["val_data"][world.rank], golden["val_target"][world.rank]
        val = Batches([tensors(d, t) for d, t in zip(*parts, strict=True)])
        # As recorded: each rank validates with its own BatchNorm statistics.
        totals, _ = evaluate(learner, model, val, 18, job)
        results[case] = {"after": after, "val": means(task.scales, totals)}
    if world.is_root:
        print("RESULT " + json.dumps(results))


main()
