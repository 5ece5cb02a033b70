"""Noise as JPEG folders: the same bytes however they are made, complete or not at all."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from PIL import Image

from data import synthetic
from data.sources.folder import ImageFolders

FLAGS = ["--num-classes", "3", "--train-size", "10", "--val-size", "4", "--height", "30",
         "--width", "40"]  # fmt: skip


def write(folder, *flags, workers=0) -> int:
    return synthetic.main([str(folder), *FLAGS, "--workers", str(workers), *flags])


def contents(folder) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise") / "set"
    assert write(folder) == 0
    return folder


def test_the_layout_is_imagenets(made):
    source = ImageFolders(str(made / "train"), str(made / "val"), image_size=24)
    source.check()
    assert (source.num_classes, source.train_size, source.val_size) == (3, 10, 4)
    classes = Counter(path.parent.name for path in (made / "train").rglob("*.jpg"))
    assert classes == {"n00000000": 4, "n00000001": 3, "n00000002": 3}
    for path in made.rglob("*.jpg"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (40, 30))


def test_images_differ_from_each_other_and_between_seeds(made, tmp_path):
    assert write(tmp_path / "other", "--seed", "1") == 0
    images = [data for folder in (made, tmp_path / "other")
              for name, data in contents(folder).items() if name.endswith(".jpg")]  # fmt: skip
    assert len(set(images)) == len(images) == 28


def test_grain_and_quality_change_the_size_in_bytes(made, tmp_path):
    def size(folder):
        return sum(len(data) for name, data in contents(folder).items() if name.endswith(".jpg"))

    assert write(tmp_path / "smooth", "--grain", "0") == 0
    assert write(tmp_path / "coarse", "--quality", "40") == 0
    assert size(tmp_path / "smooth") < 0.8 * size(made)
    assert size(tmp_path / "coarse") < 0.8 * size(made)


def test_processes_write_the_same_bytes(made, tmp_path):
    assert write(tmp_path / "set", workers=2) == 0
    assert contents(tmp_path / "set") == contents(made)


def test_a_killed_run_continues_and_ends_with_the_same_bytes(made, tmp_path, monkeypatch):
    drawn = []
    draw = synthetic.Jpegs.draw

    def stop(self, seed):
        if len(drawn) == 5:  # in the second class
            raise KeyboardInterrupt
        drawn.append(seed)
        return draw(self, seed)

    folder = tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setattr(synthetic.Jpegs, "draw", stop)
        assert write(folder) == 130
    assert os.listdir(folder / "train") == ["n00000000"]
    before = (folder / "train" / "n00000000").stat().st_mtime_ns
    assert write(folder) == 0
    assert (folder / "train" / "n00000000").stat().st_mtime_ns == before
    assert contents(folder) == contents(made)


def test_a_run_killed_at_the_very_beginning_continues(tmp_path):
    (tmp_path / "synthetic.json.unfinished.1").touch()
    assert write(tmp_path) == 0


@pytest.mark.parametrize("other", [["--seed", "1"], ["--train-size", "11"], ["--width", "41"]])
def test_other_noise_is_refused_and_kept(made, capsys, other):
    before = contents(made)
    assert write(made, *other) == 3
    assert f"{made} holds something else" in capsys.readouterr().err
    assert contents(made) == before


def test_a_folder_of_other_things_is_refused(tmp_path, capsys):
    (tmp_path / "mine").touch()
    assert write(tmp_path) == 3
    assert "holds something else" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["mine"]


@pytest.mark.parametrize(
    "flags",
    [["--num-classes", "0"], ["--val-size", "2"], ["--train-size", "2"], ["--quality", "0"],
     ["--quality", "101"], ["--grain", "-1"], ["--grain", "nan"], ["--grain", "inf"],
     ["--width", "65501"], ["--height", "70000"], ["--seed", "-1"], ["--height", "0"]],
)  # fmt: skip
def test_wrong_flags_are_refused(tmp_path, flags):
    with pytest.raises(SystemExit) as caught:
        write(tmp_path / "set", *flags)
    assert caught.value.code == 2
    assert not (tmp_path / "set").exists()
