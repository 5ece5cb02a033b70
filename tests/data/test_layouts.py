"""What --data recognises. Every layout of the same images gives the samples of class folders."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from data import DataError, FlagError
from data.check.__main__ import main as check
from data.make_tfrecords.__main__ import main as make_tfrecords
from data.sources.imagenet import ImageNet, ImageNetDali
from data.statistics import main as statistics
from data_fixtures import Share, write_as, write_tiny_imagenet, write_tree

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


def lists_with_a_flat_val(prepared: Path, root: Path) -> Path:
    """Caffe's numbers, in a folder that has another name than the images."""
    classes = flat_val(prepared, root / "images")
    number = {wnid: i for i, wnid in enumerate(sorted(KIT.values()), start=1)}
    train = [f"{i.parent.name}/{i.name}" for i in prepared.glob("train/*/*")]
    lines = [f"images/train/{image} {number[image.split('/')[0]]}\n" for image in train]
    (root / "train_list.txt").write_text("".join(lines))
    lines = [f"images/val/{image} {number[wnid]}\n" for image, wnid in classes.items()]
    (root / "val_list.txt").write_text("".join(lines))
    return root


def lists_in_meta(prepared: Path, root: Path) -> Path:
    """MMPreTrain's folders."""
    names_and_numbers(prepared, root)
    (root / "meta").mkdir()
    (root / "val.txt").rename(root / "meta" / "val.txt")
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
    "lists with a flat val": lists_with_a_flat_val,
    "lists in meta": lists_in_meta,
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
    counts = "9 images for training, 5 images for validation, 3 classes"
    assert counts in made.description


def refusal(path: Path, **flags) -> str:
    with pytest.raises(DataError) as caught:
        source(path, **flags)
    return str(caught.value)


@pytest.mark.parametrize("name", ["Kaggle", "suffixes", "lists"])
def test_validation_alone_and_exclusion(name, prepared, tmp_path):
    root = SAME[name](prepared, tmp_path / "made")
    excluded = tmp_path / "bad.txt"
    val_name = source(root).samples[1].name(1)
    excluded.write_text(f"train/{FISH}/{FISH}_000.JPEG\nval/{val_name}\nval/{FISH}/absent.JPEG\n")
    made = source(root, exclude=str(excluded))
    assert (made.train_size, made.val_size) == (8, 4)
    assert [samples.unmatched for samples in made.samples] == [[], [f"{FISH}/absent.JPEG"]]
    for train in (*root.glob("**/train"), *root.glob("train_list.txt")):
        shutil.rmtree(train) if train.is_dir() else train.unlink()
    alone = ImageNet(data=str(root), image_size=SIDE).for_validation()
    alone.check()
    assert alone.val_size == 5
    assert "5 images for validation" in alone.description
    assert "training" not in alone.description
    assert "no images for train" in refusal(root)


def test_tiny_imagenet(tmp_path):
    with zipfile.ZipFile(
        write_tiny_imagenet(tmp_path / "tiny.zip", {FISH: 3, BIRD: 2}, [BIRD, FISH])
    ) as file:
        file.extractall(tmp_path)
    root = tmp_path / "tiny-imagenet-200"
    made = source(root)
    assert (made.train_size, made.val_size, made.class_names) == (5, 2, [FISH, BIRD])
    assert [made.samples[1].path(i) for i in range(2)] == [
        str(root / f"val/images/val_{i}.JPEG") for i in (1, 0)]  # fmt: skip
    assert "unpack it" in refusal(tmp_path / "tiny.zip")


def test_records_and_their_flags(prepared, tmp_path):
    out = tmp_path / "records"
    assert make_tfrecords(["--data", str(prepared), "--data-dir", str(out), "--workers", "0"]) == 0
    made = source(out, shuffle_window=2, label_base=1)
    assert made.fingerprint == ImageNet(records=str(out)).fingerprint
    assert made.block == 2
    assert "TFRecords in train and validation: 9 images" in made.description
    assert "--shuffle-window 2 has no effect" in refusal(prepared, shuffle_window=2)
    assert "--label-base 0 has no effect" in refusal(prepared, label_base=0)


@pytest.mark.parametrize(
    "flags",
    [{"train_dir": "x"}, {"val_dir": "x"}, {"records": "x"}],
    ids=lambda flags: next(iter(flags)),
)
def test_data_excludes_the_flags_of_folders(flags, prepared):
    message = refusal(prepared, **flags)
    assert next(iter(flags)).replace("_", "-") in message
    assert "with --data: leave one of them out" in message


def test_dali_reads_every_layout_of_files(prepared, tmp_path):
    pytest.importorskip("nvidia.dali", reason="DALI is an extra")
    root = kaggle(prepared, tmp_path)
    made = ImageNetDali(data=str(root), image_size=SIDE)
    made.check()
    assert made.fingerprint == source(root).fingerprint
    (images, labels), *_ = made.val_loader(Share(), 1)
    assert images.shape[1:] == (3, SIDE, SIDE)
    assert labels.tolist() == [0, 0, 1, 1]
    for flags in ({"data_dir": "x"}, {"reader": "folder"}, {"train_dir": "x"}):
        with pytest.raises(FlagError, match="with --data: leave one of them out"):
            ImageNetDali(data=str(root), **flags).check()


def copied(prepared: Path, root: Path) -> Path:
    shutil.copytree(prepared, root, dirs_exist_ok=True)
    return root


def no_labels(prepared: Path, root: Path) -> Path:
    kaggle(prepared, root)
    (root / "LOC_val_solution.csv").unlink()
    return root


def unknown_image(prepared: Path, root: Path) -> Path:
    kaggle(prepared, root)
    base = root / "ILSVRC/Data/CLS-LOC/val"
    shutil.copy(next(base.iterdir()), base / "other.JPEG")
    return root


def two_validation_folders(prepared: Path, root: Path) -> Path:
    shutil.copytree(prepared / "val", copied(prepared, root) / "valid")
    return root


def kit_without_meta(prepared: Path, root: Path) -> Path:
    next(ground_truth(prepared, root).glob("*/data/meta.mat")).unlink()
    return root


def numbers_out_of_range(prepared: Path, root: Path) -> Path:
    return names_and_numbers(prepared, root, first=2)


def damaged_kit(prepared: Path, root: Path) -> Path:
    (devkit(prepared, root) / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"x")
    return root


def damaged_table(prepared: Path, root: Path) -> Path:
    (kaggle(prepared, root) / "LOC_val_solution.csv").write_text("nothing\n1\n")
    return root


def one_name_without_class(prepared: Path, root: Path) -> Path:
    images = sorted((suffixes(prepared, root) / "train").iterdir())
    images[0].rename(images[0].parent / "other.JPEG")
    return root


def too_deep(prepared: Path, root: Path) -> Path:
    for split in ("train", "val"):
        shutil.copytree(prepared / split, root / split / "images")
    return root


def other_classes(prepared: Path, root: Path) -> Path:
    shutil.rmtree(copied(prepared, root) / "val" / BIRD)
    return root


def one_level_above(prepared: Path, root: Path) -> Path:
    copied(prepared, root / "imagenet")
    return root


def one_split(prepared: Path, root: Path) -> Path:
    return copied(prepared, root) / "train"


def published_archives(prepared: Path, root: Path) -> Path:
    root.mkdir()
    (root / "ILSVRC2012_img_val.tar").touch()
    return root


def folders_and_records(prepared: Path, root: Path) -> Path:
    (copied(prepared, root) / "idx_files").mkdir()
    return root


def list_with_a_wrong_line(prepared: Path, root: Path) -> Path:
    lists(prepared, root)
    with open(root / "val_list.txt", "a") as file:
        file.write("image.JPEG\n")
    return root


def list_of_missing_images(prepared: Path, root: Path) -> Path:
    shutil.rmtree(lists(prepared, root) / "images")
    return root


def lists_with_other_labels(prepared: Path, root: Path) -> Path:
    text = (lists_with_a_flat_val(prepared, root) / "val_list.txt").read_text()
    (root / "val_list.txt").write_text(text.replace(" 1\n", " 9\n"))
    return root


def lists_with_two_labels(prepared: Path, root: Path) -> Path:
    lists_with_a_flat_val(prepared, root)
    with open(root / "val_list.txt", "a") as file:
        file.write("".join(f"images/val/ILSVRC2012_val_00000001.JPEG {n}\n" for n in (1, 2)))
    return root


REFUSED = {
    lists_with_two_labels: "val_list.txt gives these images two classes",
    lists_with_other_labels: "train_list.txt does not have: 9",
    no_labels: "nothing says which class",
    unknown_image: "does not give the class of 1 images",
    two_validation_folders: "holds both val and valid",
    kit_without_meta: "put the meta.mat of",
    numbers_out_of_range: "label 4 is out of range",
    damaged_table: "cannot be read",
    damaged_kit: "t12.tar.gz is damaged or not the published",
    one_name_without_class: "does not end in _<wnid>",
    too_deep: "holds a single class folder, images",
    other_classes: f"Only in train: {BIRD}",
    one_level_above: "/imagenet, which holds images",
    one_split: "give a folder that holds both splits",
    published_archives: "python -m data.prepare --val-tar",
    folders_and_records: "fits several layouts",
    list_with_a_wrong_line: "line 6: 'image.JPEG' must be <image> <class>",
    list_of_missing_images: "put the list into the folder",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_what_is_refused(make, prepared, tmp_path):
    message = refusal(make(prepared, tmp_path / "made"))
    assert REFUSED[make] in message
    assert message.startswith("--data")


def test_unknown_paths(tmp_path):
    assert "does not exist" in refusal(tmp_path / "absent")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/notes.txt").touch()
    message = refusal(tmp_path / "photos")
    assert "holds 0 folders (none) and 1 files (notes.txt); accepted are:" in message
    assert "train/<class>/<image>" in message


def test_which_path_is_advised(tmp_path):
    hub = tmp_path / "hub"
    snapshot = hub / "datasets--imagenet" / "snapshots" / "0a1b"
    data = write_as("parquet", snapshot / "data", train=4, val=3)
    assert f"give {snapshot}, which holds images" in refusal(hub)
    assert f"give the folder that holds it: {data}" in refusal(next(Path(data).iterdir()))
    (tmp_path / "saved" / "train").mkdir(parents=True)
    (tmp_path / "saved" / "dataset_dict.json").touch()
    assert "to_parquet" in refusal(tmp_path / "saved")


def test_warnings(prepared, tmp_path):
    root = kaggle(prepared, tmp_path)
    base = root / "ILSVRC/Data/CLS-LOC"
    (base / "val/.hidden").mkdir()
    (base / "val/notes.md").touch()
    with open(root / "LOC_val_solution.csv", "a") as file:
        file.write(f"ILSVRC2012_val_00000009,{FISH} 1 2 3 4\n")
    text = "\n".join(source(root).warnings)
    assert "1 images that LOC_val_solution.csv names are missing: ILSVRC2012_val_00000009" in text
    assert "left out hidden files and folders of tools: .hidden" in text
    assert "left out 1 files that are not images: .md (1)" in text
    os.symlink(prepared / "train", tmp_path / "train")
    os.symlink(prepared / "train", tmp_path / "val")
    assert "hold the same images" in source(tmp_path).warnings[0]


def test_tools(prepared, tmp_path, capsys):
    root = kaggle(prepared, tmp_path)
    next((root / "ILSVRC/Data/CLS-LOC/val").iterdir()).write_bytes(b"")
    bad = tmp_path / "bad.txt"
    assert check(["--data", str(root), "--list", str(bad), "--workers", "0"]) == 3
    out = capsys.readouterr().out
    assert "note: class folders in ILSVRC/Data/CLS-LOC/train, images labelled by" in out
    assert "1 empty" in out
    assert source(root, exclude=str(bad)).val_size == 4
    assert check(["--data", str(prepared), "--workers", "0"]) == 0
    assert "class folders in train and val: 9 images" in capsys.readouterr().out
    assert check(["--data", str(tmp_path / "absent"), "--workers", "0"]) == 2
    values = []
    for flags in (["--data", str(root)], ["--train-dir", str(prepared / "train")]):
        assert statistics([*flags, "--json", "--workers", "0"]) == 0
        values.append(capsys.readouterr().out)
    assert values[0] == values[1]
    command = [
        "--data",
        str(root),
        "--data-dir",
        str(root / "ILSVRC/Data/CLS-LOC/train/out"),
        "--workers",
        "0",
    ]
    assert make_tfrecords(command) == 2
    assert "is within --data" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        check(["--data", str(root), "--train-dir", "x", "--val-dir", "y"])
