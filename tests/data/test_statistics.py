"""data.statistics measures means and standard deviations of whole data sets."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from data.make_tfrecords.__main__ import main as make_tfrecords
from data.sources.digits import Digits
from data.statistics import main as statistics
from data_fixtures import photograph, small_jpeg, write_tar_of_samples, write_tree


@pytest.fixture
def trees(tmp_path):
    write_tree(tmp_path / "train", {"ant": 9, "bee": 14}, seed=1)
    write_tree(tmp_path / "val", {"ant": 6, "bee": 5}, seed=2)
    return tmp_path


def measured(capsys, *flags: str) -> dict:
    assert statistics([*flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_image_of_a_folder_has_the_same_weight(tmp_path, capsys):
    images = [photograph(40, 60, seed=1), photograph(20, 30, seed=2), photograph(64, 64, seed=3)]
    for number, image in enumerate(images):
        folder = tmp_path / f"class{number % 2}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    found = measured(capsys, "--train-dir", str(tmp_path), "--workers", "0")
    mean = np.mean([image.mean(axis=(0, 1)) for image in images], axis=0)
    squares = np.mean([np.square(i.astype(float)).mean(axis=(0, 1)) for i in images], axis=0)
    assert found["images"] == 3
    assert found["mean"] == pytest.approx(mean.tolist(), rel=1e-12)
    assert found["std"] == pytest.approx(np.sqrt(squares - mean**2).tolist(), rel=1e-12)
    assert found["std_of_1"] == pytest.approx((np.array(found["std"]) / 255).tolist(), rel=1e-12)


def test_folders_records_and_processes_give_the_same_values(trees, capsys):
    folders = ["--train-dir", str(trees / "train")]
    flags = [*folders, "--val-dir", str(trees / "val"), "--data-dir", str(trees / "records")]
    assert make_tfrecords([*flags, "--workers", "0"]) == 0
    capsys.readouterr()
    alone = measured(capsys, *folders, "--workers", "0")
    assert alone["images"] == 23
    assert measured(capsys, *folders, "--workers", "2") == alone
    records = measured(capsys, "--data-dir", str(trees / "records"), "--workers", "0")
    assert records["mean"] == pytest.approx(alone["mean"], rel=1e-12)
    assert records["std"] == pytest.approx(alone["std"], rel=1e-12)


def test_labels_and_index_of_large_files(tmp_path, capsys):
    images = [small_jpeg(number) for number in range(3)]
    write_tar_of_samples(tmp_path / "set" / "train.tar", images, [1, 2, 3])
    command = ["--data", str(tmp_path / "set"), "--workers", "0"]
    command += ["--index-dir", str(tmp_path / "index")]
    assert statistics(command) == 3
    assert "give --label-base 1" in capsys.readouterr().err
    assert measured(capsys, *command, "--label-base", "1")["images"] == 3
    assert len(list((tmp_path / "index").iterdir())) == 1


def test_a_small_set_is_measured_as_its_pixels(capsys):
    samples = Digits().samples[0]
    pixels = np.stack([samples.read(i)[0] for i in range(len(samples))]).reshape(-1, 3)
    found = measured(capsys, "--digits")
    assert found["mean"] == pytest.approx(pixels.mean(0).tolist(), rel=1e-9)
    assert found["std"] == pytest.approx(pixels.std(0).tolist(), rel=1e-9)


def test_unreadable_images_are_left_out_and_named(trees, capsys):
    (trees / "train" / "bee" / "000.jpg").write_bytes(b"no image")
    assert statistics(["--train-dir", str(trees / "train"), "--workers", "0"]) == 0
    shown = capsys.readouterr()
    assert "22 images" in shown.out
    assert "blue" in shown.out
    assert "1 images could not be read" in shown.err
    assert "bee/000.jpg" in shown.err


def test_data_without_a_readable_image_end_with_code_3(tmp_path, capsys):
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "0.jpg").write_bytes(b"no image")
    assert statistics(["--train-dir", str(tmp_path), "--workers", "0"]) == 3
    assert "no image could be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "is required"),
        (["--digits", "--mnist", "x"], "not allowed with"),
        (["--digits", "--exclude", "x"], "--exclude has no effect with --digits"),
        (["--train-dir", "x", "--label-base", "1"], "--label-base has no effect without --data"),
        (["--data-dir", "x", "--index-dir", "y"], "--index-dir has no effect without --data"),
    ],
)
def test_wrong_flags_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        statistics(flags)
    assert words in capsys.readouterr().err
