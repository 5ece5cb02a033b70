"""What --data recognises. Every layout of the same images gives the samples of class folders."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from scipy.io import savemat

from data.sources.imagenet import ImageNet
from data_fixtures import write_tree

SIDE = 16
FISH, SHARK, BIRD = "n01440764", "n01484850", "n01532829"
# The numbers of the development kit do not follow the sorted names.
KIT = {1: SHARK, 2: BIRD, 3: FISH}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Class folders with ImageNet's names, from which the tests make the other layouts."""
    root = tmp_path_factory.mktemp("prepared")
    write_tree(root / "train", {FISH: 3, SHARK: 2, BIRD: 4}, seed=1)
    write_tree(root / "val", {FISH: 2, SHARK: 2, BIRD: 1}, seed=2)
    for folder in root.glob("train/*"):
        for image in folder.iterdir():
            image.rename(folder / f"{folder.name}_{image.stem}.JPEG")
    # The numbers of the validation images alternate between the classes.
    for number, image in enumerate(sorted(root.glob("val/*/*"), key=lambda p: p.name), start=1):
        image.rename(image.parent / f"ILSVRC2012_val_{number:08d}.JPEG")
    return root


def source(path: Path | str, **flags) -> ImageNet:
    made = ImageNet(data=str(path), image_size=SIDE, **flags)
    made.check()
    return made


def val_classes(root: Path) -> dict[str, str]:
    """Return the class of each validation image, in the order of the images' names."""
    images = sorted(root.glob("val/*/*"), key=lambda path: path.name)
    return {path.name: path.parent.name for path in images}


def flat_val(prepared: Path, base: Path) -> dict[str, str]:
    """Copy the training folders and put all validation images into one folder."""
    shutil.copytree(prepared / "train", base / "train")
    (base / "val").mkdir()
    for image in prepared.glob("val/*/*"):
        shutil.copy(image, base / "val")
    return val_classes(prepared)


def kaggle(prepared: Path, root: Path) -> Path:
    classes = flat_val(prepared, root / "ILSVRC/Data/CLS-LOC")
    (root / "ILSVRC/Data/CLS-LOC/test").mkdir()
    rows = [f"{Path(n).stem},{wnid} 1 2 3 4 {wnid} 5 6 7 8" for n, wnid in classes.items()]
    lines = ["ImageId,PredictionString", *reversed(rows)]
    (root / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    return root


def kaggle_in_ilsvrc(prepared: Path, root: Path) -> Path:
    return kaggle(prepared, root) / "ILSVRC"


def kaggle_in_cls_loc(prepared: Path, root: Path) -> Path:
    return kaggle(prepared, root) / "ILSVRC/Data/CLS-LOC"


def numbers(classes: dict[str, str]) -> str:
    number = {wnid: i for i, wnid in KIT.items()}
    return "".join(f"{number[wnid]}\n" for wnid in classes.values())


def meta() -> bytes:
    import numpy as np

    rows = np.array(
        [(i, wnid) for i, wnid in KIT.items()], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")]
    )
    file = io.BytesIO()
    savemat(file, {"synsets": rows})
    return file.getvalue()


def ground_truth(prepared: Path, root: Path) -> Path:
    classes = flat_val(prepared, root)
    data = root / "ILSVRC2012_devkit_t12/data"
    data.mkdir(parents=True)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text(numbers(classes))
    (data / "meta.mat").write_bytes(meta())
    return root


def devkit(prepared: Path, root: Path) -> Path:
    """The root of torchvision's ImageNet, with the development kit that it needs."""
    shutil.copytree(prepared, root, dirs_exist_ok=True)
    for split in ("train", "val"):  # torchvision keeps the archives
        (root / f"ILSVRC2012_img_{split}.tar").write_bytes(b"")
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    for image in prepared.glob("val/*/*"):
        shutil.copy(image, root / "val")
    truth = numbers(val_classes(prepared)).encode()
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        for name, data in (("ILSVRC2012_validation_ground_truth.txt", truth), ("meta.mat", meta())):
            member = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return root


def torchvision_root(prepared: Path, root: Path) -> Path:
    shutil.copytree(prepared, root, dirs_exist_ok=True)
    torch.save(({FISH: ("tench",)}, list(val_classes(prepared).values())), root / "meta.bin")
    return root


def meta_bin(prepared: Path, root: Path) -> Path:
    classes = flat_val(prepared, root)
    torch.save(({FISH: ("tench",)}, list(classes.values())), root / "meta.bin")
    return root


def synset_labels(prepared: Path, root: Path) -> Path:
    classes = flat_val(prepared, root)
    name = "imagenet_2012_validation_synset_labels.txt"
    (root / name).write_text("".join(f"{wnid}\n" for wnid in classes.values()))
    return root


def names_and_classes(prepared: Path, root: Path) -> Path:
    classes = flat_val(prepared, root)
    lines = [f"val/{image}\t{wnid}\n" for image, wnid in classes.items()]
    (root / "val_labels.txt").write_text("".join(lines))
    return root


def names_and_numbers(prepared: Path, root: Path, first: int = 0) -> Path:
    """Caffe's val.txt."""
    classes = flat_val(prepared, root)
    label = {wnid: first + i for i, wnid in enumerate(sorted(KIT.values()))}
    lines = [f"{image} {label[wnid]}\n" for image, wnid in classes.items()]
    (root / "val.txt").write_text("".join(lines))
    return root


def numbers_from_one(prepared: Path, root: Path) -> Path:
    return names_and_numbers(prepared, root, first=1)


def suffixes(prepared: Path, root: Path) -> Path:
    """The unpacked tars of Hugging Face."""
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        for image in prepared.glob(f"{split}/*/*"):
            shutil.copy(image, root / split / f"{image.stem}_{image.parent.name}.JPEG")
    return root


def other_names(prepared: Path, root: Path) -> Path:
    shutil.copytree(prepared / "train", root / "ILSVRC2012_img_train")
    shutil.copytree(prepared / "val", root / "validation")
    return root


def lists(prepared: Path, root: Path) -> Path:
    """Lists with numbers, beside the folders ``images/train`` and ``images/val``."""
    for split in ("train", "val"):
        shutil.copytree(prepared / split, root / "images" / split)
        lines = [
            f"images/{split}/{image.parent.name}/{image.name} {sorted(KIT.values()).index(image.parent.name)}\n"
            for image in prepared.glob(f"{split}/*/*")
        ]
        (root / f"{split}_list.txt").write_text("".join(lines))
    return root


def path_of_a_list(prepared: Path, root: Path) -> Path:
    """Lists with names of classes and tabs, relative to the split's folder, named by the user."""
    shutil.copytree(prepared, root)
    for split in ("train", "validation"):
        images = prepared.glob(f"{split[:5] if split == 'train' else 'val'}/*/*")
        lines = [f"{i.parent.name}/{i.name}\t{i.parent.name}\n" for i in images]
        (root / f"my_{split}.txt").write_text("".join(lines))
    return root / "my_train.txt"


SAME = {
    "lists": lists,
    "path of a list": path_of_a_list,
    "class folders": lambda prepared, root: prepared,
    "other names": other_names,
    "Kaggle": kaggle,
    "Kaggle's ILSVRC": kaggle_in_ilsvrc,
    "Kaggle's CLS-LOC": kaggle_in_cls_loc,
    "ground truth": ground_truth,
    "devkit": devkit,
    "torchvision": torchvision_root,
    "meta.bin": meta_bin,
    "synset labels": synset_labels,
    "names and classes": names_and_classes,
    "names and numbers": names_and_numbers,
    "numbers from one": numbers_from_one,
    "suffixes": suffixes,
}


@pytest.mark.parametrize("name", SAME)
def test_every_layout_gives_the_samples_of_class_folders(name, prepared, tmp_path):
    made = source(SAME[name](prepared, tmp_path / "made"))
    expected = ImageNet(str(prepared / "train"), str(prepared / "val"), image_size=SIDE)
    expected.check()
    assert made.fingerprint == expected.fingerprint
    assert made.class_names == [FISH, SHARK, BIRD]
    for ours, theirs in zip(made.samples, expected.samples, strict=True):
        assert [ours.name(i) for i in range(len(ours))] == [
            theirs.name(i) for i in range(len(theirs))
        ]
        assert all(ours.encoded(i) == theirs.encoded(i) for i in range(len(theirs)))
    assert made.warnings == expected.warnings == []
    counts = "9 images for training, 5 for validation, 3 classes"
    assert counts in made.description
