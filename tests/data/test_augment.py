"""Augmentation equals torchvision's for the same random stream, and depends on that stream alone."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from data import FlagError
from data.loader import workers
from data.loader.reader import Reader
from data.loader.sampler import MicroBatch
from data.pixels.augment import Augmented, PaddedCrop, global_stream
from data.pixels.boxes import crop
from data.pixels.transforms import TrainTransform
from data.samples.arrays import ArraySamples
from data.sources.augmented import parse_sizes
from data.sources.digits import Digits
from data.sources.folder import ImageFolders
from data.sources.imagenet import ImageNet, ImageNetDali
from data.sources.mnist import Mnist
from data_fixtures import Share, photograph, write_tree
from lars.config.flags import parse

BILINEAR = {"interpolation": v2.InterpolationMode.BILINEAR}
POLICIES = {
    "ra": v2.RandAugment(1, 12, **BILINEAR),
    "ta": v2.TrivialAugmentWide(**BILINEAR),
    "aa": v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, **BILINEAR),
}
PHOTO = photograph(60, 80, seed=1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ours(transform, pixels: np.ndarray, seed: int) -> torch.Tensor:
    stream = generator(seed)
    box = transform.box(*pixels.shape[:2], stream)
    return transform(crop(pixels, box), stream)


def theirs(transform, pixels: np.ndarray, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return transform(torch.from_numpy(pixels).permute(2, 0, 1))


def in_pil(*steps) -> list:
    return [v2.ToPILImage(), *steps, v2.PILToTensor()]


CROP = [v2.RandomResizedCrop(32, antialias=True), v2.RandomHorizontalFlip()]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_operation_of_a_policy_is_torchvisions(policy, monkeypatch):
    applied, kind = set(), type(POLICIES[policy])
    method = kind._apply_image_or_video_transform

    def spy(self, image, name, magnitude, **options):
        applied.add((name, magnitude < 0))
        return method(self, image, name, magnitude, **options)

    reference = v2.Compose([*CROP, *in_pil(POLICIES[policy])])
    transform = Augmented(TrainTransform(32), policy, ra_ops=1, ra_magnitude=12)
    differing = 0
    for seed in range(120):
        expected = theirs(reference, PHOTO, seed)
        with monkeypatch.context() as patch:
            patch.setattr(kind, "_apply_image_or_video_transform", spy)
            assert torch.equal(ours(transform, PHOTO, seed), expected)
        differing += not torch.equal(expected, ours(TrainTransform(32), PHOTO, seed))
    assert differing > 80
    names = kind._AUGMENTATION_SPACE
    if policy == "aa":  # ImageNet's policy has no translation, no vertical shear, no brightness
        names = set(names) - {"TranslateX", "TranslateY", "ShearY", "Brightness"}
    assert {name for name, _ in applied} == set(names)
    assert {("Rotate", True), ("Rotate", False)} <= applied


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"color_jitter": 0.4}, in_pil(v2.ColorJitter(0.4, 0.4, 0.4))),
        ({"color_jitter": 1.5}, in_pil(v2.ColorJitter(1.5, 1.5, 1.5))),
        ({"random_erasing": 0.5, "mean": (7, 8, 9)}, [v2.RandomErasing(0.5, value=(7, 8, 9))]),
        (
            {"auto_augment": "ra", "ra_ops": 3, "ra_magnitude": 20, "color_jitter": 0.2,
             "random_erasing": 0.9},
            [*in_pil(v2.RandAugment(3, 20, **BILINEAR), v2.ColorJitter(0.2, 0.2, 0.2)),
             v2.RandomErasing(0.9, value=(0, 0, 0))],
        ),
    ],
    ids=["jitter", "strong jitter", "erasing", "everything"],
)  # fmt: skip
@pytest.mark.parametrize("first", ["crop", "PIL", "padded crop"])
def test_other_augmentation_is_torchvisions(first, options, steps):
    transform, reference, pixels = {
        "crop": (TrainTransform(32), CROP, PHOTO),
        "PIL": (TrainTransform(32, exact_pil=True), [v2.ToPILImage(), *CROP, v2.PILToTensor()], PHOTO),
        "padded crop": (
            PaddedCrop(32, 4, True, 0),
            [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()],
            PHOTO[:32, :32],
        ),
    }[first]  # fmt: skip
    for seed in range(12):
        expected = theirs(v2.Compose([*reference, *steps]), pixels, seed)
        assert torch.equal(ours(Augmented(transform, **options), pixels, seed), expected)


def test_an_erased_rectangle_has_the_mean_colour_up_to_rounding():
    """Erasing with 0 after normalisation, as torchvision's training script does it, is the same."""
    source = ImageFolders(image_size=32, random_erasing=0.5)
    mean, std = (torch.tensor(values)[:, None, None] for values in (source.mean, source.std))
    plain, transform = TrainTransform(32), source.train_transform()
    erased = 0
    for seed in range(60):
        torch.manual_seed(seed)
        floats = v2.Compose(CROP)(torch.from_numpy(PHOTO).permute(2, 0, 1))
        expected = v2.RandomErasing(0.5)((floats - mean) / std)
        actual = (ours(transform, PHOTO, seed) - mean) / std
        blank = expected == 0
        erased += bool(blank.any())
        assert torch.equal(actual[~blank], expected[~blank])
        assert torch.all((actual.abs() <= 0.5 / std)[blank])
        assert torch.equal(ours(plain, PHOTO, seed), floats)
    assert 20 <= erased <= 40  # 30 expected, standard deviation 4


def test_the_result_depends_on_the_generator_alone_and_leaves_everything_else_as_it_was():
    transform = Augmented(PaddedCrop(32, 0, False, 0), "ra", random_erasing=1.0)
    pixels = PHOTO[:32, :32].copy()
    kept = pixels.copy()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = ours(transform, pixels, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(ours(transform, pixels, 5), first)
    assert not torch.equal(ours(transform, pixels, 6), first)
    assert np.array_equal(pixels, kept)  # a data set in memory hands over its own pixels
    stream = generator(1)
    before = torch.get_rng_state()
    with pytest.raises(TypeError), global_stream(stream):
        torch.rand(torch.rand(2))
    assert torch.equal(torch.rand(3, generator=stream), torch.rand(5, generator=generator(1))[2:])
    assert torch.equal(torch.get_rng_state(), before)


def test_without_flags_the_transforms_are_the_same_objects_as_before():
    assert ImageFolders(image_size=32).train_transform() == TrainTransform(32)
    assert Mnist().train_transform() == PaddedCrop(28, 4, False, 0)
    transform = Digits(auto_augment="ta").train_transform()
    assert transform == Augmented(PaddedCrop(32, 4, False, 0), "ta", mean=(79, 79, 79))


def test_validation_is_not_augmented():
    source = ImageFolders(auto_augment="ra", random_erasing=1, color_jitter=1, repeated_aug=3)
    assert source.val_transform() == ImageFolders().val_transform()
    assert ImageFolders(image_size_schedule="1:9").val_transform().size == 224


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("augment")
    write_tree(root / "train", {"ant": 9, "bee": 14}, seed=1)
    write_tree(root / "val", {"ant": 6, "bee": 5}, seed=2)
    return root


def sources(tree, **flags) -> list:
    folders = {"train_dir": str(tree / "train"), "val_dir": str(tree / "val"), "image_size": 24}
    made = [ImageNet(**folders, **flags)]
    try:
        import nvidia.dali.fn  # noqa: F401
    except ImportError:
        print("DALI is not installed, so its loader was not tested")
    else:
        made.append(ImageNetDali(**folders, reader="folder", **flags))
    return made


def batches(source, epoch, rank=0, size=1, first_step=0, batch_size=3):
    share = Share(rank, size, batch_size=batch_size, effective_batch_size=12, seed=5)
    loader = source.train_loader(share, 0)
    found = list(loader.epoch(epoch, first_step))
    loader.close()
    return found


def same(some, others) -> bool:
    return all(
        torch.equal(a, b)
        for one, other in zip(some, others, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def test_copies_of_a_sample_differ_and_do_not_depend_on_ranks(tree):
    """An epoch of 23 places sees 8 images: 7 of them three times and one twice."""
    for source in sources(tree, repeated_aug=3):
        single = batches(source, 1)
        assert [len(labels) for _, labels in single] == [3, 3, 3, 3, 2, 3, 3, 3]
        for size in (2, 4):
            ranks = [batches(source, 1, rank, size) for rank in range(size)]
            dealt = [ranks[i % size][i // size] for i in range(len(single))]
            assert same(dealt, single)
        assert same(batches(source, 1, first_step=1), single[4:])
        # The first copies of an epoch's first step are the samples of an epoch without copies.
        plain = batches(dataclasses.replace(source, repeated_aug=1), 1)
        first = torch.cat([images for images, _ in plain])[:4]
        step = torch.cat([images for images, _ in single[:4]])
        labels = torch.cat([labels for _, labels in single[:4]])
        assert torch.equal(step[:4], first)
        assert labels.tolist() == labels[:4].tolist() * 3
        for one, other in itertools.combinations(range(12), 2):
            assert not torch.equal(step[one], step[other])


def test_images_have_the_size_of_their_epoch(tree):
    schedule = "1:16,2:40,4:8"
    for source in sources(tree, image_size_schedule=schedule):
        assert source.train_sizes == ((1, 16), (2, 40), (4, 8))
        share = Share(batch_size=12, effective_batch_size=12, seed=5)
        loader = source.train_loader(share, 0)
        shapes = [images.shape[2:] for images, _ in itertools.islice(loader.batches_from(3), 8)]
        loader.close()
        sides = [40, 40, 40, 8, 8, 8, 8, 8]  # from the second half of epoch 2 on
        assert [tuple(shape) for shape in shapes] == [(side, side) for side in sides]
        (images, _), *_ = source.val_loader(Share(), 0)
        assert images.shape[2:] == (24, 24)
        # The pixels are those of a source with this size.
        constant = dataclasses.replace(source, image_size_schedule="1:40")
        assert same(batches(source, 2), batches(constant, 2))


def test_workers_make_the_same_batches(tree):
    source = sources(tree, repeated_aug=2, image_size_schedule="1:16,2:24")[0]
    share = Share(batch_size=3, effective_batch_size=12, seed=5)
    loader = source.train_loader(share, 1)
    got = list(itertools.islice(loader.batches_from(1), 12))
    loader.close()
    assert same(got, [*batches(source, 0, first_step=1), *batches(source, 1)])


def test_shared_memory_is_checked_for_the_largest_size(tree, monkeypatch):
    needed = []
    monkeypatch.setattr(
        "data.loader.torch_loader.check_shared_memory", lambda size, *_: needed.append(size)
    )
    source = sources(tree, image_size_schedule="1:16,2:40,3:24")[0]
    source.train_loader(Share(batch_size=2), 1).close()
    assert needed == [3 * 2 * 3 * 40 * 40]


def test_the_fork_server_loads_torchvision_for_augmentation_only(tree, monkeypatch):
    """Loading it takes longer than torch. Workers that are forked afterwards get it for nothing."""
    loaded = []
    context = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(context, "set_forkserver_preload", loaded.append)
    monkeypatch.setattr("data.loader.workers.forkserver.ensure_running", lambda: None)
    for flags in ({}, {"repeated_aug": 2}, {"color_jitter": 0.1}, {"random_erasing": 0.1},
                  {"auto_augment": "ta"}):  # fmt: skip
        sources(tree, **flags)[0].start_workers(1)
    assert loaded == [workers._PRELOAD] * 2 + [[*workers._PRELOAD, "torchvision.transforms.v2"]] * 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"ra_ops": 3}, "--ra-ops 3 has no effect without --auto-augment ra"),
        ({"auto_augment": "ta", "ra_magnitude": 5}, "--ra-magnitude 5 has no effect without"),
        ({"auto_augment": "ra", "ra_ops": 0}, "--ra-ops 0 must be at least 1"),
        ({"auto_augment": "ra", "ra_magnitude": 31}, "--ra-magnitude 31 must lie between 0 and 30"),
        ({"color_jitter": -0.1}, "--color-jitter -0.1 must be a finite number of at least 0"),
        (
            {"color_jitter": float("nan")},
            "--color-jitter nan must be a finite number of at least 0",
        ),
        ({"random_erasing": 1.5}, "--random-erasing 1.5 must lie between 0 and 1"),
        ({"color_jitter": float("inf")}, "--color-jitter inf must be a finite number"),
        ({"repeated_aug": 0}, "--repeated-aug 0 must be at least 1"),
        ({"image_size_schedule": "128"}, "--image-size-schedule 128: give EPOCH:SIZE"),
        ({"image_size_schedule": "1:2:3"}, "--image-size-schedule 1:2:3: give EPOCH:SIZE"),
        ({"image_size_schedule": "1:64,"}, "--image-size-schedule 1:64,: give EPOCH:SIZE"),
        ({"image_size_schedule": "0:64"}, "must be for epoch 1, for example 1:64"),
        ({"image_size_schedule": "1:64,9:80,9:96"}, "the epochs must increase"),
        ({"image_size_schedule": "1:64,2:0"}, "a size must be at least 1 pixel"),
    ],
)
def test_impossible_flags_are_refused_before_the_files_are_read(flags, message):
    with pytest.raises(FlagError, match=message):
        ImageFolders(train_dir="absent", val_dir="absent", **flags).check()


def test_the_augmentation_is_described():
    assert ImageFolders().augmentation == ""
    flags = {"color_jitter": 0.2, "random_erasing": 0.25, "repeated_aug": 3}
    assert ImageFolders(auto_augment="ra", **flags).augmentation == (
        "RandAugment (operations 2, magnitude 9), colour jitter 0.2, random erasing with probability 0.25, "
        "3 copies of each image"
    )
    assert Digits(auto_augment="ta").augmentation == "TrivialAugment"


def test_flags_without_effect_are_refused():
    with pytest.raises(FlagError, match=r"--random-erasing 0.5 has no effect with --views 2"):
        Mnist(views=2, random_erasing=0.5).check()
    pytest.importorskip("nvidia.dali", reason="DALI is an extra")
    with pytest.raises(FlagError, match="--auto-augment ra has no effect with DALI; leave it out"):
        ImageNetDali(auto_augment="ra").check()


def test_the_command_line_gives_these_flags():
    words = (
        "--auto-augment ra --ra-ops 3 --ra-magnitude 7 --color-jitter 0.4 --random-erasing 0.1 "
        "--repeated-aug 3 --image-size-schedule 1:128,10:160"
    )
    (source,) = parse(words.split(), ImageNet, description="")
    assert source == ImageNet(
        auto_augment="ra", ra_ops=3, ra_magnitude=7, color_jitter=0.4, random_erasing=0.1,
        repeated_aug=3, image_size_schedule="1:128,10:160",
    )  # fmt: skip
    assert parse_sizes(source.image_size_schedule) == ((1, 128), (10, 160))


def test_bad_images_are_replaced_among_copies(tree):
    """A replacement draws what the bad image would have, for each copy."""
    pixels = np.stack([photograph(40, 40, seed=i) for i in range(4)])

    class OneBad(ArraySamples):
        def read(self, index, crop_fn):
            from data import DataError

            if index == 1:
                raise DataError("bad")
            return super().read(index, crop_fn)

    samples = OneBad(pixels, np.arange(4), 4)
    reader = Reader(samples, TrainTransform(16), on_bad_image="replace", max_bad_images=9)
    part = MicroBatch(1, np.array([1, 1]), np.array([0, 1]))
    (images, labels), _ = reader.read(part)
    assert labels.tolist() == [2, 2]
    assert not torch.equal(images[0], images[1])
    assert images[0].equal(reader.read(MicroBatch(1, np.array([1]), np.array([0])))[0][0][0])
