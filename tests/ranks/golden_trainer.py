"""Run on 2 ranks. Repeats the toy runs of the published trainer with this project's engine and the same inputs.

The root prints the parameters and BatchNorm statistics after each step, and the validation means. Argument: the file of
inputs.
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
        flags = recorded["args"]
        model = Net().double()
        state = {
            n: torch.tensor(v, dtype=torch.float64).view(golden["shapes"][n])
            for n, v in golden["init"].items()
        }
        model.load_state_dict(state, strict=False)
        # The published script ignores --bn-bias-separately for sgd.
        separately = flags["bn_bias_separately"] and flags["base_op"] == "lars"
        optimizer = create_optimizer(
            flags["base_op"], model, lr=flags["base_lr"], momentum=flags["momentum"], weight_decay=flags["wd"],
            eps=flags["epsilon"] if flags["base_op"] == "lars" else None, bn_bias_separately=separately,
        )  # fmt: skip
        lr_at = partial(
            schedules.polynomial, peak=flags["base_lr"], total_steps=6, warmup_steps=1.5,
            power=2.0 if flags["base_op"] == "lars" else 1.0,
        )  # fmt: skip
        # The published loss spreads the smoothing over only the other classes.
        smoothing = flags["label_smoothing"] * 5 / 4
        half = torch.float16 if flags["fp16_allreduce"] else None
        gradients = make_gradients(model.parameters(), world, reduce_dtype=half)
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
        # As in the recorded run, each rank validates with its own BatchNorm statistics.
        totals, _ = evaluate(learner, model, val, 18, job)
        results[case] = {"after": after, "val": means(task.scales, totals)}
    if world.is_root:
        print("RESULT " + json.dumps(results))


main()
