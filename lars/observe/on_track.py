"""Compares every validation with published runs of a similar batch size."""

from __future__ import annotations

from lars.expected import FAR_BELOW, Curve, Range
from lars.observe.console import say
from lars.observe.observer import Observer, Training
from lars.observe.plan_lines import expected_curve

# Drops between two validations are common if this share of the published runs had one.
_COMMON_PERCENT = 15


class OnTrack(Observer):
    """Prints after every validation how the run compares with published runs. It never stops the run."""

    def __init__(self, training: Training) -> None:
        """Choose the published runs. Without comparable ones, nothing is printed."""
        super().__init__(training)
        self.curve = expected_curve(training.config, training.run.plan, training.source)

    def validated(self) -> None:
        """Print one line, or a warning if the accuracy is far below all published runs."""
        rows = [row for row in self.training.progress.history if row["split"] == "val"]
        if self.curve is None or "top1" not in rows[-1]:
            return
        row = rows[-1]
        published = self.curve.at(row["epoch"], row["step"], self.training.config.epochs)
        if published is not None:
            drop = rows[-2]["top1"] - row["top1"] if len(rows) > 1 else 0.0
            say(comparison(row["epoch"], row["top1"], published, self.curve, drop=drop))


def comparison(
    epoch: int, top1: float, published: Range, curve: Curve, *, drop: float = 0.0
) -> str:
    """Compare an accuracy with published ones in one line.

    Args:
        epoch: Finished epochs.
        top1: Validation accuracy in percent.
        published: The published accuracies at this point.
        curve: The runs that they come from.
        drop: How far the accuracy fell since the last validation, in points.

    Returns:
        The line. It begins with "warning" only if the accuracy is below half of the lowest published one, because a
        low accuracy in the first epochs does not predict a low one at the end.
    """
    facts = f"epoch {epoch}: val top-1 {top1:.2f} %; published runs had {published}"
    if top1 < FAR_BELOW * published.low:
        return (
            f"warning: {facts}: far below all of them. Check the labels and the learning rate; lower --base-lr, raise "
            "--warmup-epochs, or use --clip-grad-norm"
        )
    verdict = "on track"
    if top1 < published.low:
        verdict = "a little lower, which is no reason for concern on its own"
    elif top1 > published.high:
        verdict = "on track, and higher than all of them"
    if drop > 1 and curve.falls["percent_of_runs"] >= _COMMON_PERCENT:
        verdict += (
            f"; the drop of {drop:.1f} points is normal: {curve.falls['percent_of_runs']:.0f} % of the published runs "
            f"with this batch size had drops of up to {curve.falls['largest_points']:.0f} points"
        )
    return f"{facts}: {verdict}"
