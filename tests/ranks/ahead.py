"""Run on 2 ranks. The host waits for every step, or it works ahead. Rank 1 has nan losses and is asked to stop.

The images of one step cannot be read, and one of another.

Each rank prints whether both ways end with the same bytes.
"""

import torch
from torch import nn

from lars.comm import start
from lars.comm.gradients import make_gradients
from lars.comm.world import World
from lars.learner.classification import Classification
from lars.learner.learner import Learner
from lars.optim import create_optimizer


def run(world: World, ahead: bool, last: int) -> tuple[list[bool], torch.Tensor]:
    """Take steps until a stop is delivered, or until `last` steps are taken."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = create_optimizer("lars", model, lr=0.1, path="foreach")
    gradients = make_gradients(model.parameters(), world)
    learner = Learner(
        model, optimizer, gradients, Classification(), lr_at=lambda step: 0.1, ahead=ahead
    )
    taken: list[bool] = []
    for step in range(last):
        torch.manual_seed(10 * step + world.rank)
        images = torch.randn(2, 4)
        if step in (2, 3) and world.rank == 1:
            images[0, 0] = float("nan")
        read = 0 if step == 4 else 1 if step == 5 and world.rank == 0 else 2
        batches = [(images[:read], torch.tensor([0, 1])[:read])]
        stop = world.rank == 1 and step == 6
        results = learner.launch(
            batches, step, count=1, samples=4, stop=stop, settle=step + 1 == last
        )
        taken += [result.taken for result in results]
        if any(result.stop for result in results) and ahead:
            break
    values = [p.detach().flatten() for p in model.parameters()]
    values += [s["momentum_buffer"].flatten() for s in optimizer.state.values()]
    return taken, torch.cat(values)


world = start.join()
taken, waited = run(world, ahead=False, last=8)
taken_ahead, ahead = run(world, ahead=True, last=20)
same = taken == taken_ahead and torch.equal(ahead, waited)
outcome = "equal" if same else "different"
print(f"{outcome}, {taken_ahead.count(False)} skipped, stopped after {len(taken_ahead)}")
