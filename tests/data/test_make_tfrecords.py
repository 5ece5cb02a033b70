"""Records from folders: the same bytes however they are made, complete or not at all."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tfrecord.reader import tfrecord_loader

import conftest
from data.make_tfrecords import manifest as manifests
from data.make_tfrecords.__main__ import main as make_tfrecords
from data.pixels.decode import image_kind
from data.samples import tfrecord
from data.sources.imagenet import ImageNet
from data_fixtures import Share, photograph, write_tree


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    root = tmp_path_factory.mktemp("trees")
    write_tree(root / "train", {"ant": 9, "bee": 14}, seed=1)
    write_tree(root / "val", {"ant": 6, "bee": 5}, seed=2)
    return root


def run(trees, out, *flags, workers=0) -> int:
    return make_tfrecords(
        ["--train-dir", str(trees / "train"), "--val-dir", str(trees / "val"),
         "--data-dir", str(out), "--images-per-shard", "5", "--workers", str(workers), *flags]
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(trees, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "records"
    assert run(trees, out) == 0
    return out


def contents(folder) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def examples(path) -> list[dict]:
    return [tfrecord.decode_example(p) for _, p in tfrecord.read_records(str(path))]


def test_every_image_appears_once_with_its_label_from_one(trees, made):
    for split, root in (("train", "train"), ("validation", "val")):
        found = [e for path in sorted((made / split).iterdir()) for e in examples(path)]
        names = [os.fsdecode(e["image/filename"][0]) for e in found]
        expected = sorted(str(p.relative_to(trees / root)) for p in (trees / root).rglob("*.jpg"))
        assert sorted(names) == expected
        for example, name in zip(found, names, strict=True):
            assert example["image/encoded"] == [(trees / root / name).read_bytes()]
            synset = example["image/class/synset"][0].decode()
            assert synset == name.split("/")[0]
            assert example["image/class/label"] == [{"ant": 1, "bee": 2}[synset]]
        # Training images are shuffled, validation images are not.
        assert (names == expected) == (split == "validation")


def test_an_independent_reader_reads_the_shards_with_their_index_files(trees, made):
    kinds = {"image/encoded": "byte", "image/class/label": "int", "image/filename": "byte"}
    for split, root in (("train", "train"), ("validation", "val")):
        found = {}
        for path in (made / split).iterdir():
            index = str(made / "idx_files" / split / path.name) + ".idx"
            for part in range(2):  # two workers, each of which seeks with the index
                for example in tfrecord_loader(str(path), index, kinds, shard=(part, 2)):
                    name = os.fsdecode(bytes(example["image/filename"]))
                    found[name] = (
                        bytes(example["image/encoded"]),
                        example["image/class/label"].item(),
                    )
        assert found == {
            str(path.relative_to(trees / root)): (path.read_bytes(), 1 + (path.parent.name > "ant"))
            for path in (trees / root).rglob("*.jpg")
        }


def test_names_and_manifest(made):
    assert [p.name for p in sorted((made / "train").iterdir())] == [
        f"train-{i:05d}-of-00005" for i in range(5)
    ]
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["num_classes"] == 2
    assert manifest["classes"] == ["ant", "bee"]
    train = manifest["splits"]["train"]
    assert (train["images"], train["images_per_class"]) == (23, [9, 14])
    assert [shard["images"] for shard in train["shards"]] == [4, 5, 4, 5, 5]
    assert sorted(os.listdir(made)) == ["idx_files", "manifest.json", "train", "validation"]


def test_processes_write_the_same_bytes(trees, made, tmp_path):
    assert run(trees, tmp_path / "out", workers=2) == 0
    assert contents(tmp_path / "out") == contents(made)


@pytest.mark.mpi
def test_ranks_write_the_same_bytes(trees, made, tmp_path):
    command = ["mpirun", "--oversubscribe", "-np", "3", sys.executable, "-m",
               "data.make_tfrecords", "--train-dir", str(trees / "train"), "--val-dir",
               str(trees / "val"), "--images-per-shard", "5", "--data-dir"]  # fmt: skip
    subprocess.run([*command, str(tmp_path / "out")], check=True, timeout=120)
    assert contents(tmp_path / "out") == contents(made)
    # An error on rank 0 ends all ranks.
    (tmp_path / "other" / "train").mkdir(parents=True)
    command[command.index("3")] = "2"
    refused = subprocess.run([*command, str(tmp_path / "other")], timeout=120, check=False)
    assert refused.returncode != 0


def test_a_killed_run_continues_and_ends_with_the_same_bytes(trees, made, tmp_path, monkeypatch):
    written = []

    def stop_in_the_third(example):
        if len(written) == 11:  # in the middle of the third shard
            raise KeyboardInterrupt
        written.append(example)
        return encode(example)

    encode = tfrecord.encode_example
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(tfrecord, "encode_example", stop_in_the_third)
        assert run(trees, out) == 130
    assert sorted(os.listdir(out / "train")) == ["train-00000-of-00005", "train-00001-of-00005"]
    assert not (out / "manifest.json").exists()
    first = out / "train" / "train-00000-of-00005"
    before = first.stat().st_mtime_ns
    assert run(trees, out) == 0
    assert first.stat().st_mtime_ns == before
    assert contents(out) == contents(made)


SUICIDE = """
import os, signal, sys
from data.make_tfrecords.__main__ import main
from data.samples import tfrecord

calls, encode = [], tfrecord.encode_example

def die_in_the_third_shard(example):
    calls.append(example)
    if len(calls) == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(example)

tfrecord.encode_example = die_in_the_third_shard
main(sys.argv[1:])
"""


def test_leftovers_of_a_kill_are_not_record_files(trees, made, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--train-dir", trees / "train", "--val-dir", trees / "val", "--data-dir", out]
    done = conftest.run(sys.executable, "-c", SUICIDE, *flags, "--images-per-shard", 5,
                        "--workers", 0)  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(os.listdir(out / "train")) == 3
    # Indexing an incomplete set is refused and removes nothing.
    copy = shutil.copytree(out, tmp_path / "copy")
    shutil.copytree(made / "validation", copy / "validation", dirs_exist_ok=True)
    assert make_tfrecords(["--from-tfrecords", "--data-dir", str(copy), "--workers", "0"]) == 3
    assert "was left by a run that was killed" in capsys.readouterr().err
    assert sorted(os.listdir(copy / "train")) == sorted(os.listdir(out / "train"))
    assert run(trees, out) == 0
    assert contents(out) == contents(made)


def test_a_second_run_does_nothing_and_other_flags_are_refused(trees, made, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(made, out)
    assert run(trees, out) == 0
    assert "already there" in capsys.readouterr().out
    for flag, there in (("--seed", "0"), ("--short-side", "0"), ("--images-per-shard", "5")):
        assert run(trees, out, flag, "7") == 3
        message = capsys.readouterr().err
        assert f"made with {flag} {there}, not 7; remove it" in message
    assert contents(out) == contents(made)


@pytest.mark.parametrize("split", ["train", "val"])
def test_records_of_images_that_have_changed_are_refused(trees, made, tmp_path, capsys, split):
    out = shutil.copytree(made, tmp_path / "out")
    for name in ("train", "val"):
        shutil.copytree(trees / name, tmp_path / name)
    assert run(tmp_path, out) == 0
    Image.new("RGB", (9, 9)).save(tmp_path / split / "ant" / "003.jpg")
    capsys.readouterr()
    assert run(tmp_path, out) == 3
    assert f"other images than those in --{split}-dir now" in capsys.readouterr().err
    (tmp_path / "list").write_text(f"{split}/bee/001.jpg")
    assert run(trees, out, "--exclude", str(tmp_path / "list")) == 3
    assert f"other images than those in --{split}-dir now" in capsys.readouterr().err
    assert contents(out) == contents(made)


SHARD = "train-00003-of-00005"


def damage_shard(out) -> None:
    (out / "train" / SHARD).write_bytes((out / "train" / SHARD).read_bytes()[:-5])


@pytest.mark.parametrize(
    "lose",
    [lambda out: (out / "train" / SHARD).unlink(), damage_shard,
     lambda out: (out / "idx_files" / "train" / f"{SHARD}.idx").unlink(),
     lambda out: (out / "idx_files" / "train" / f"{SHARD}.idx").write_text("0 7")],
)  # fmt: skip
@pytest.mark.parametrize("finished", [True, False])
def test_lost_files_are_made_again(trees, made, tmp_path, capsys, monkeypatch, lose, finished):
    if finished:
        out = shutil.copytree(made, tmp_path / "out")
    else:  # killed when all shards were written
        out = tmp_path / "out"
        with monkeypatch.context() as patch:
            patch.setattr(manifests, "write_manifest", lambda *_: None)
            assert run(trees, out) == 0
    lose(out)
    other = out / "train" / "train-00001-of-00005"
    before = other.stat().st_mtime_ns
    capsys.readouterr()
    assert run(trees, out) == 0
    assert "continuing with 1 of 8 files" in capsys.readouterr().out
    assert contents(out) == contents(made)
    assert other.stat().st_mtime_ns == before


def lose_a_split(manifest) -> None:
    del manifest["splits"]["validation"]


def lose_a_size(manifest) -> None:
    del manifest["splits"]["train"]["shards"][1]["bytes"]


@pytest.mark.parametrize("damage", [lose_a_split, lose_a_size, None])
def test_a_damaged_or_lost_manifest_can_be_written_again(trees, made, tmp_path, capsys, damage):
    out = shutil.copytree(made, tmp_path / "out")
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").unlink()
    if damage:
        damage(manifest)
        (out / "manifest.json").write_text(json.dumps(manifest))
    assert run(trees, out) == 3
    errors = capsys.readouterr().err
    assert f"write it with --from-tfrecords --data-dir {out}" in errors
    assert index(out) == 0
    assert json.loads((out / "manifest.json").read_text())["num_classes"] == 2


def test_a_shard_that_is_missing_in_the_manifest_is_made_again(trees, made, tmp_path):
    out = shutil.copytree(made, tmp_path / "out")
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["splits"]["train"]["shards"][1]
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert run(trees, out) == 0
    assert contents(out) == contents(made)


def index(out) -> int:
    return make_tfrecords(["--from-tfrecords", "--data-dir", str(out), "--workers", "0"])


def test_indexing_refuses_a_part_and_odd_index_files_and_leaves_hidden_files(
    made, tmp_path, capsys
):
    out = shutil.copytree(made, tmp_path / "out")
    (out / "train" / ".DS_Store").write_bytes(b"x")
    assert index(out) == 0
    assert ".DS_Store" not in (out / "manifest.json").read_text()
    odd = out / "idx_files" / "train" / SHARD
    shutil.copy(f"{odd}.idx", odd)
    assert index(out) == 3
    assert f"{odd} is not the index file of a record file" in capsys.readouterr().err
    odd.unlink()
    (out / "train" / SHARD).unlink()
    assert index(out) == 3
    assert (
        f"lacks 1 files according to the names of the others, for example {SHARD}"
        in capsys.readouterr().err
    )


def test_indexing_after_a_kill_before_the_manifest_knows_the_classes(trees, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(manifests, "write_manifest", lambda *_: None)
        assert run(trees, tmp_path) == 0
    assert index(tmp_path) == 0
    assert json.loads((tmp_path / "manifest.json").read_text())["classes"] == ["ant", "bee"]


def test_indexing_finds_what_was_written(made, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(made, out)
    shutil.rmtree(out / "idx_files")
    (out / "manifest.json").unlink()
    assert make_tfrecords(["--from-tfrecords", "--data-dir", str(out), "--workers", "0"]) == 0
    ours, theirs = contents(out), contents(made)
    manifests = [json.loads(files.pop("manifest.json")) for files in (ours, theirs)]
    assert ours == theirs
    for manifest in manifests:
        del manifest["settings"]
    assert manifests[0] == manifests[1]


def test_damaged_records_are_named_and_nothing_unfinished_is_left(made, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(made, out)
    shutil.rmtree(out / "idx_files")
    (out / "manifest.json").unlink()
    broken = out / "train" / "train-00003-of-00005"
    index = (made / "idx_files" / "train" / "train-00003-of-00005.idx").read_text().split()
    broken.write_bytes(broken.read_bytes()[:-7])
    assert make_tfrecords(["--from-tfrecords", "--data-dir", str(out), "--workers", "0"]) == 3
    assert f"{broken}, record at byte {index[-2]}: the file ends" in capsys.readouterr().err
    assert not (out / "idx_files" / "train" / "train-00003-of-00005.idx").exists()
    assert not (out / "manifest.json").exists()
    # Once the file is repaired, the same command continues with the finished shards.
    shutil.copy(made / "train" / "train-00003-of-00005", broken)
    assert make_tfrecords(["--from-tfrecords", "--data-dir", str(out), "--workers", "0"]) == 0


@pytest.mark.parametrize("label", [0, -1, b"one", None])
def test_records_without_a_label_from_one_are_refused(made, tmp_path, capsys, label):
    out = tmp_path / "out"
    shutil.copytree(made, out)
    features = {"image/encoded": b"x", "image/class/label": label}
    example = {k: v for k, v in features.items() if v is not None}
    (out / "train" / "train-00001-of-00005").write_bytes(
        tfrecord.record(tfrecord.encode_example(example))
    )
    assert make_tfrecords(["--from-tfrecords", "--data-dir", str(out), "--workers", "0"]) == 3
    assert "train-00001-of-00005, record at byte 0" in capsys.readouterr().err


def odd_images(root) -> None:
    """Write a PNG called .jpg, a CMYK JPEG and one with corrupt EXIF next to plain JPEGs."""
    write_tree(root, {"ant": 2, "bee": 1})
    image = Image.fromarray(photograph(40, 60, seed=3))
    image.save(root / "ant" / "png.jpg", "PNG")
    image.convert("CMYK").save(root / "ant" / "cmyk.jpg")
    image.save(root / "ant" / "exif.jpg", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff")


def encoded_by_name(out, split="train") -> dict[str, bytes]:
    return {
        e["image/filename"][0].decode(): e["image/encoded"][0]
        for path in (out / split).iterdir()
        for e in examples(path)
    }


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_unusual_images_are_reencoded_only_if_the_user_asks_for_it(tmp_path):
    for root in ("train", "val"):
        odd_images(tmp_path / root)
    assert run(tmp_path, tmp_path / "as_is") == 0
    assert run(tmp_path, tmp_path / "plain", "--reencode", "--quality", "95") == 0
    as_is, plain = encoded_by_name(tmp_path / "as_is"), encoded_by_name(tmp_path / "plain")
    for name, data in as_is.items():
        assert data == (tmp_path / "train" / name).read_bytes()
        odd = name.split("/")[1] in ("png.jpg", "cmyk.jpg", "exif.jpg")
        assert (plain[name] != data) == odd
        image = Image.open(io.BytesIO(plain[name]))
        assert (image.format, image.mode) == ("JPEG", "RGB")
        assert image_kind(plain[name]) is None
        original = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        # The halved colour resolution costs three grey levels on these noisy images.
        assert np.abs(np.asarray(image).astype(int) - original).mean() < 6


def test_short_side_shrinks_large_images_only(trees, tmp_path):
    assert run(trees, tmp_path / "out", "--short-side", "40", "--quality", "95") == 0
    shrunk = kept = 0
    for name, data in encoded_by_name(tmp_path / "out").items():
        before = Image.open(trees / "train" / name)
        after = Image.open(io.BytesIO(data))
        if min(before.size) > 40:
            shrunk += 1
            assert min(after.size) == 40
            assert abs(after.width / after.height - before.width / before.height) < 0.05
            expected = before.resize(after.size, Image.Resampling.LANCZOS)
            difference = np.asarray(after).astype(int) - np.asarray(expected).astype(int)
            assert np.abs(difference).mean() < 6  # as in the test above
        else:
            kept += 1
            assert data == (trees / "train" / name).read_bytes()
    assert shrunk
    assert kept


def test_an_image_too_large_for_a_jpeg_is_named(trees, tmp_path, capsys):
    for split in ("train", "val"):
        shutil.copytree(trees / split, tmp_path / split)
    long = tmp_path / "val" / "bee" / "long.png"
    Image.new("RGB", (70_000, 4)).save(long)
    assert run(tmp_path, tmp_path / "out", "--reencode") == 3
    errors = capsys.readouterr().err
    assert f"{long} cannot be written as a JPEG of 70000x4 pixels" in errors


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    trees, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as caught:
        run(trees, tmp_path / "file" / "out")
    assert caught.value.code == 2
    assert f"error: --data-dir: {tmp_path / 'file'} is not a folder" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(SystemExit):
        run(trees, tmp_path / "new" / "out")
    assert f"error: --data-dir: {tmp_path} cannot be written to" in capsys.readouterr().err


def test_broken_images_are_named_and_can_be_left_out(trees, tmp_path, capsys):
    for split in ("train", "val"):
        shutil.copytree(trees / split, tmp_path / split)
    broken = tmp_path / "train" / "bee" / "003.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    out = tmp_path / "out"
    assert run(tmp_path, out, "--short-side", "16") == 3
    assert f"{broken} cannot be decoded" in capsys.readouterr().err
    shutil.rmtree(out)
    (tmp_path / "bad.txt").write_text("# found by check\ntrain/bee/003.jpg\ntrain/gone.jpg\n")
    assert run(tmp_path, out, "--short-side", "16", "--exclude", str(tmp_path / "bad.txt")) == 0
    assert "train: 1 images left out, of 2 that --exclude lists" in capsys.readouterr().out
    assert len(encoded_by_name(out)) == 22
    assert "bee/003.jpg" not in encoded_by_name(out)


@pytest.mark.parametrize("line", ["bee/003.jpg", "/data/train/bee/003.jpg", "\x00\x89"])
def test_a_list_with_a_malformed_line_is_refused(trees, tmp_path, capsys, line):
    (tmp_path / "list").write_text(f"train/ant/001.jpg\n{line}\n")
    assert run(trees, tmp_path / "out", "--exclude", str(tmp_path / "list")) == 3
    assert f"--exclude: {tmp_path / 'list'}, line 2: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", "is empty"), ("\n", "is empty"),
     ("# of records\nvalidation/validation-00000-of-00003#1\n", "only lines of validation/")],
)  # fmt: skip
def test_a_list_without_a_line_for_folders_is_refused(trees, tmp_path, capsys, text, expected):
    (tmp_path / "list").write_text(text)
    assert run(trees, tmp_path / "out", "--exclude", str(tmp_path / "list")) == 3
    errors = capsys.readouterr().err
    assert f"--exclude: {tmp_path / 'list'}" in errors
    assert expected in errors


def test_names_that_are_not_utf8(trees, tmp_path):
    name = os.fsdecode(b"b\xe9e")
    for split in ("train", "val"):
        shutil.copytree(trees / split / "ant", tmp_path / split / name)
        shutil.copytree(trees / split / "bee", tmp_path / split / "wasp")
    out = tmp_path / "out"
    assert run(tmp_path, out) == 0
    manifests = [json.loads((out / "manifest.json").read_text())]
    assert index(out) == 0
    manifests.append(json.loads((out / "manifest.json").read_text()))
    assert [manifest["classes"] for manifest in manifests] == [[name, "wasp"], [name, "wasp"]]
    example = examples(out / "validation" / "validation-00000-of-00003")[0]
    assert example["image/class/synset"] == [b"b\xe9e"]
    assert example["image/filename"][0].startswith(b"b\xe9e/")


def test_a_dangling_link_is_named(trees, tmp_path, capsys):
    for split in ("train", "val"):
        shutil.copytree(trees / split, tmp_path / split)
    (tmp_path / "train" / "ant" / "x.jpg").symlink_to("gone.jpg")
    assert run(tmp_path, tmp_path / "out") == 3
    assert "ant/x.jpg is a link to gone.jpg, which does not exist" in capsys.readouterr().err


def test_classes_that_differ_are_refused(trees, tmp_path, capsys):
    shutil.copytree(trees / "train", tmp_path / "train")
    shutil.copytree(trees / "val", tmp_path / "val")
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "wasp")
    assert run(tmp_path, tmp_path / "out") == 3
    assert "same class folders" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags",
    [[], ["--train-dir", "t"], ["--train-dir", "t", "--val-dir", "v", "--from-tfrecords"],
     ["--from-tfrecords", "--images-per-shard", "0"], ["--from-tfrecords", "--quality", "101"],
     ["--from-tfrecords", "--short-side", "9"], ["--from-tfrecords", "--exclude", "list"],
     ["--train-dir", "t", "--val-dir", "v", "--quality", "80"],
     ["--train-dir", "t", "--val-dir", "v", "--short-side", "-1"]],
)  # fmt: skip
def test_wrong_flags_are_refused(flags, tmp_path):
    with pytest.raises(SystemExit) as caught:
        make_tfrecords(["--data-dir", str(tmp_path), *flags])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("flag", "out"),
    [("train", "train"), ("val", "val/ant/../records"), ("train", "link/x"), ("train", ".")],
)
def test_records_among_the_images_are_refused(trees, tmp_path, capsys, flag, out):
    for split in ("train", "val"):
        shutil.copytree(trees / split, tmp_path / split)
    (tmp_path / "link").symlink_to("train")
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, tmp_path / out)
    assert caught.value.code == 2
    errors = capsys.readouterr().err
    assert "error: --data-dir: " in errors
    assert f"--{flag}-dir" in errors
    assert contents(tmp_path) == before


def test_records_give_the_pixels_of_the_folders(trees, made):
    folders = ImageNet(str(trees / "train"), str(trees / "val"), image_size=32)
    records = ImageNet(records=str(made), image_size=32)
    for source in (folders, records):
        source.check()
    assert records.num_classes == 2
    ours = list(records.val_loader(Share(rank=1, size=2), workers=0))
    theirs = list(folders.val_loader(Share(rank=1, size=2), workers=0))
    for (images, labels), (other_images, other_labels) in zip(ours, theirs, strict=True):
        assert images.equal(other_images)
        assert labels.equal(other_labels)
