"""What counts in a folder of class folders, what is left out by name, and what is refused."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import replace

import pytest
from PIL import Image

from data import DataError, FlagError
from data.check.__main__ import main as check
from data.make_tfrecords.__main__ import main as make_tfrecords
from data.samples.listing import list_images
from data.samples.tree import scan
from data.sources.folder import ImageFolders
from data.sources.imagenet import ImageNet, ImageNetDali
from data_fixtures import photograph, write_tree


@pytest.fixture
def source(tmp_path):
    write_tree(tmp_path / "train", {"ant": 3, "bee": 2}, seed=1)
    write_tree(tmp_path / "val", {"ant": 1, "bee": 1}, seed=2)
    return ImageNet(str(tmp_path / "train"), str(tmp_path / "val"), image_size=16)


def folders(source: ImageFolders) -> list[str]:
    return ["--train-dir", source.train_dir, "--val-dir", source.val_dir, "--workers", "0"]


def refusal(source: ImageFolders) -> str:
    with pytest.raises(DataError) as caught:
        source.check()
    return str(caught.value)


def refused_everywhere(source: ImageFolders, tmp_path, capsys) -> list[str]:
    """Return the messages of the trainer, the DALI source and the tools."""
    messages = [refusal(source)]
    pytest.importorskip("nvidia.dali")
    dali = ImageNetDali(source.train_dir, source.val_dir, image_size=16, reader="folder")
    messages.append(refusal(dali))
    assert make_tfrecords([*folders(source), "--data-dir", str(tmp_path / "out")]) == 3
    messages.append(capsys.readouterr().err)
    assert check(folders(source)) == 3
    messages.append(capsys.readouterr().out)
    return messages


def add_everywhere(source: ImageFolders, name: str) -> None:
    """Copy an image to this place in both splits."""
    for root in (source.train_dir, source.val_dir):
        target = os.path.join(root, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copy(f"{root}/ant/000.jpg", target)


@pytest.mark.parametrize(
    "name",
    [".ipynb_checkpoints/000-checkpoint.jpg", "__MACOSX/000.jpg", "@eaDir/x/000.jpg",
     "ant/.ipynb_checkpoints/000-checkpoint.jpg", "bee/__MACOSX/._000.jpg", "bee/._000.jpg",
     "lost+found/x.jpg", "bee.unfinished.a1b2/x.jpg", "ant/000.jpg.unfinished.77"],
)  # fmt: skip
def test_hidden_files_and_folders_of_tools_are_left_out_and_named(source, tmp_path, capsys, name):
    expected = replace(source).fingerprint
    add_everywhere(source, name)
    source.check()
    assert source.fingerprint == expected
    assert source.class_names == ["ant", "bee"]
    parts = name.split("/")
    left_out = name if parts[0] in ("ant", "bee") and len(parts) == 2 else "/".join(parts[:-1])
    left_out = "@eaDir" if name.startswith("@eaDir") else left_out
    assert [warning.split(": ")[-1] for warning in source.warnings] == [left_out, left_out]
    assert check(folders(source)) == 0
    assert (
        capsys.readouterr().out.count(f"left out hidden files and folders of tools: {left_out}")
        == 2
    )


def test_content_decides_where_the_ending_is_unknown(source, tmp_path, capsys):
    ant = tmp_path / "train" / "ant"
    for number, ending in ((0, ".jfif"), (1, ".JPE"), (2, "")):
        (ant / f"{number:03d}.jpg").rename(ant / f"{number:03d}{ending}")
    image = Image.fromarray(photograph(20, 30, seed=1))
    for kind in ("GIF", "WEBP", "TIFF", "JPEG2000"):
        image.save(ant / f"picture.{kind}x", kind)
    (ant / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (ant / "boxes.txt").write_text("0 0 1 1")
    source.check()
    assert source.train_size == 9
    tree = source.samples[0]
    assert all(tree.read(index)[1] in (0, 1) for index in range(9))
    used, other = source.warnings
    assert "7 files with unusual endings are images, and are used: " in used
    assert ".jfif (1)" in used
    assert "no ending (1)" in used
    assert other.endswith("left out 2 files that are not images: .db (1), .txt (1)")
    assert check(folders(source)) == 0
    printed = capsys.readouterr().out
    assert "7 files with unusual endings" in printed
    assert "left out 2 files that are not images" in printed


def test_images_beside_the_class_folders_are_named(source, tmp_path):
    shutil.copy(tmp_path / "train" / "ant" / "000.jpg", tmp_path / "train" / "loose.jpg")
    assert source.warnings == [f"{source.train_dir}: left out 1 images outside the class folders"]


def test_good_folders_give_no_warning(source):
    assert source.warnings == []


def test_folders_that_are_one_level_too_deep_are_refused_with_the_likely_path(
    source, tmp_path, capsys
):
    for split in ("train", "val"):
        (tmp_path / split).rename(tmp_path / "moved")
        (tmp_path / split).mkdir()
        (tmp_path / "moved").rename(tmp_path / split / "images")
    for message in refused_everywhere(source, tmp_path, capsys):
        assert (
            f"{source.train_dir} holds a single class folder, images; its folders look" in message
        )
        assert f"give {source.train_dir}/images" in message


def test_the_folder_above_both_splits_is_refused(source, tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / "all" / split).parent.mkdir(exist_ok=True)
        (tmp_path / split).rename(tmp_path / "all" / split)
    above = str(tmp_path / "all")
    for message in refused_everywhere(
        replace(source, train_dir=above, val_dir=above), tmp_path, capsys
    ):
        assert f"the class folders of {above} (train, val) hold only folders" in message
        assert f"such as {above}/train" in message


def test_a_single_class_is_refused(source, tmp_path, capsys):
    for split in ("train", "val"):
        shutil.rmtree(tmp_path / split / "bee")
    for message in refused_everywhere(source, tmp_path, capsys):
        assert "holds a single class folder, ant; a network needs at least two classes" in message


def test_one_folder_in_each_class_folder_is_fine(source, tmp_path):
    """Tiny-ImageNet's training images lie in <class>/images."""
    for folder in tmp_path.glob("*/*"):
        folder.rename(tmp_path / "moved")
        folder.mkdir()
        (tmp_path / "moved").rename(folder / "images")
    source.check()
    assert (source.train_size, source.val_size) == (5, 2)


@pytest.mark.parametrize("link", ["cow", "ant/more"])
def test_links_to_missing_folders_are_refused(source, tmp_path, capsys, link):
    for split in ("train", "val"):
        (tmp_path / split / link).symlink_to("/gone")
    for message in refused_everywhere(source, tmp_path, capsys):
        assert f"{link} is a link to /gone, which does not exist" in message


def test_validation_on_the_training_images_is_reported(source, tmp_path, capsys):
    (tmp_path / "link").symlink_to(source.train_dir)
    shutil.copytree(source.train_dir, tmp_path / "copy")
    for val_dir in (
        source.train_dir,
        f"{source.train_dir}/../train/",
        tmp_path / "link",
        tmp_path / "copy",
    ):
        same = replace(source, val_dir=str(val_dir))
        same.check()
        (warning,) = same.warnings
        assert warning == (
            f"--train-dir {source.train_dir} and --val-dir {val_dir} hold the same images, so "
            "validation says nothing about new images"
        )
        assert check(folders(same)) == 0
        assert "note: train and val hold the same images" in capsys.readouterr().out


def test_the_same_names_with_other_images_are_not_reported(source, tmp_path):
    write_tree(tmp_path / "other", {"ant": 3, "bee": 2}, seed=9)
    assert replace(source, val_dir=str(tmp_path / "other")).warnings == []


def test_workers_get_no_list_of_what_was_found(source, tmp_path):
    for number in range(300):
        (tmp_path / "train" / "ant" / f".hidden{number}").touch()
    tree = scan(source.train_dir, "--train-dir")
    assert len(tree.oddities.notes) == 1
    assert len(tree.oddities.notes[0]) < 300


@pytest.mark.parametrize(
    "change",
    [{"image_size": 0}, {"val_resize": 8}, {"crop_area": (1.0, 0.08)}, {"crop_aspect": (2.0, 1.0)},
     {"crop_aspect": (1.0, float("inf"))}, {"crop_area": (float("nan"), 1.0)},
     {"max_bad_images": -1}, {"shuffle_window": 0}, {"shuffle_window": 2}, {"label_base": 0}],
)  # fmt: skip
def test_wrong_values_of_flags_have_the_exit_code_of_wrong_flags(source, change):
    with pytest.raises(FlagError) as caught:
        replace(source, **change).check()
    assert caught.value.exit_code == 2
    (name,) = change
    assert str(caught.value).startswith(f"--{name.replace('_', '-')}")


def test_a_bad_image_stops_the_run_with_advice(source, tmp_path):
    from data_fixtures import Share

    broken = tmp_path / "val" / "bee" / "000.jpg"
    broken.write_bytes(b"\xff\xd8\xff")
    with pytest.raises(DataError) as caught:
        list(source.val_loader(Share(), workers=0))
    assert str(caught.value).startswith(f"{broken} cannot be decoded")
    assert "--on-bad-image skip" in str(caught.value)
    assert "python -m data.check" in str(caught.value)


def test_names_are_in_the_order_of_torchvision(tmp_path, monkeypatch):
    """It sorts the folders by their paths, and then the names in each. A file system returns them in any order."""
    for folder in ("", "b", "b-1", "b/c", "a"):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name in ("2.png", "10.png", "B.png", "a.png"):
            (tmp_path / folder / name).touch()
    expected = [
        os.path.relpath(os.path.join(folder, name), tmp_path)
        for folder, _, names in sorted(os.walk(tmp_path))
        for name in sorted(names)
    ]
    scandir = os.scandir

    def backwards(path):
        with scandir(path) as entries:
            found = sorted(entries, key=lambda entry: entry.name, reverse=True)
        return contextlib.nullcontext(found)

    monkeypatch.setattr("data.samples.listing.os.scandir", backwards)
    assert list_images(str(tmp_path)).images == expected
