"""What TensorBoard shows besides curves: the layout of its custom scalars, and the table of hyper-parameters."""

from __future__ import annotations

from typing import Any

from torch.utils.tensorboard import summary as protos

from lars.observe.observer import Observer, Training
from lars.run.identity import as_dict, same_run


class Board(Observer):
    """Describes the run to TensorBoard.

    Every job of a run writes the same description, so a resumed run appears once.
    """

    def __init__(self, training: Training) -> None:
        """Observe `training`. Nothing is written yet."""
        super().__init__(training)
        results = dict.fromkeys(results_of(training))
        self.experiment, self.began, self.ended = protos.hparams(
            hyper_parameters(training), results
        )

    def start(self) -> None:
        """Write the layout and the hyper-parameters."""
        for each in (protos.custom_scalars(layout(self.training)), self.experiment, self.began):
            self.training.curves.summary(each.value, 0)

    def end(self) -> None:
        """Mark the run as successful."""
        self.training.curves.summary(self.ended.value, self.training.progress.step)


def results_of(training: Training) -> list[str]:
    """Names of the curves whose last point is a result of the run: ``val/top1`` and so on. The main metric is first."""
    learner = training.learner
    names = dict.fromkeys((learner.task.best, *learner.task.scales))
    return [f"{split}/{name}" for split in learner.networks() for name in names]


def hyper_parameters(training: Training) -> dict[str, float | str]:
    """The flags that may not change during a run, the images, and the effective batch size, for TensorBoard's table.

    TensorBoard knows only numbers and text.
    """
    config, source, plan = training.config, training.source, training.run.plan
    flags = as_dict(config, source)
    names = [name for name in same_run(config, source) if name in flags]
    found = {name: flags[name] for name in names}
    found |= {"effective_batch_size": plan.effective_batch_size, "train_size": plan.train_size}
    return {name: _cell(value) for name, value in found.items()}


def _cell(value: Any) -> float | str:
    """A value of the table."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number else str(value)


def layout(training: Training) -> dict[str, dict[str, list[Any]]]:
    """The charts of the tab Custom Scalars, in the order of the questions that they answer.

    Each chart is a list of a kind and of regular expressions for the names of its curves.
    """
    task, splits = training.learner.task, ["train", *training.learner.networks()]

    def lines(*names: str) -> list[Any]:
        return ["Multiline", [f"^{name}$" for name in names]]

    def statistics(quantity: str) -> list[Any]:
        return lines(*(f"layers/{quantity}/{each}" for each in ("min", "median", "max")))

    metrics = dict.fromkeys(("loss", task.best))
    learns = {name: lines(*(f"{split}/{name}" for split in splits)) for name in metrics}
    over_images = {
        f"{name} over training images": lines(*(f"over_images/{split}_{name}" for split in splits))
        for name in metrics
    }
    stable = {"gradient norm (largest since the last point)": lines("train/grad_norm")}
    if training.config.layers_every:
        stable["trust ratio over the layers"] = statistics("trust_ratio")
        stable["relative update over the layers"] = statistics("update_ratio")
    fast = {
        "images/s": lines("train/images_per_second"),
        "share of time waiting for data": lines("train/data_share"),
    }
    if training.learner.device.type == "cuda":
        fast["GPU memory, peak in GiB"] = lines("train/gpu_memory_gib")
    return {
        "1 Does it learn?": {**learns, **over_images, "learning rate": lines("train/lr")},
        "2 Is it stable?": stable,
        "3 Is it fast?": fast,
    }
