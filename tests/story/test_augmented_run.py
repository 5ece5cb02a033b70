"""A run with every augmentation and growing images resumes exactly, and its flags belong to its identity."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from data.sources.folder import ImageFolders
from data_fixtures import write_tree
from lars.config import Config
from lars.engine import train
from lars.run.identity import defaults, same_run

AUGMENTATION = {
    "auto_augment": "ra", "color_jitter": 0.2, "random_erasing": 0.3, "repeated_aug": 2,
    "image_size_schedule": "1:28,2:36,9:48",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """``run(name, **flags)`` trains for three epochs of three steps, and returns the weights."""
    root = tmp_path_factory.mktemp("augmented")
    for seed, split in enumerate(("train", "val")):
        write_tree(root / split, {"ant": 9, "bee": 8}, seed=seed)

    def source(**flags) -> ImageFolders:
        return ImageFolders(str(root / "train"), str(root / "val"), image_size=32, **flags)

    def trained(name: str, max_steps: int | None = None, **more) -> dict[str, torch.Tensor]:
        config = Config(
            model="small_cnn", base_lr=0.05, lr_schedule="none", batch_size=4, batches_per_allreduce=2, epochs=3,
            log_dir=str(root), run_name=name, no_cuda=True, workers=0, max_steps=max_steps,
        )  # fmt: skip
        train(config, source(**AUGMENTATION | more))
        return load_file(root / name / "model.safetensors")

    trained.source = source
    return trained


def test_a_run_resumes_exactly_in_the_middle_of_an_epoch(run, capsys):
    straight = run("straight")
    shown = capsys.readouterr()
    assert "32 px\n" in shown.out
    assert "  augmentation     RandAugment (operations 2, magnitude 9), colour" in shown.out
    assert "28 px from epoch 1 on, 36 px from epoch 2 on, 48 px from epoch 9 on" in shown.out
    assert "--image-size-schedule: 9:48 has no effect with --epochs 3" in shown.out + shown.err
    run("halves", max_steps=4)  # the second epoch has begun
    resumed = run("halves")
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    other = run("other", repeated_aug=1)
    assert not all(torch.equal(other[name], straight[name]) for name in straight)


def test_the_flags_belong_to_the_identity_of_a_run(run):
    source = run.source(**AUGMENTATION)
    identity, usual = same_run(Config(), source), defaults(Config(), source)
    assert {name: identity[name] for name in AUGMENTATION} == AUGMENTATION
    plain = run.source()
    for name in (*AUGMENTATION, "ra_ops", "ra_magnitude"):  # an older checkpoint has the defaults
        assert same_run(Config(), plain)[name] == usual[name]
