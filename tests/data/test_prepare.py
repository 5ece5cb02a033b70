"""Small archives with ILSVRC2012's structure are unpacked; interruptions and damage are handled."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from data.prepare import __main__ as prepare
from data.prepare import imagenet
from data.sources.folder import ImageFolders
from data_fixtures import photograph

# ILSVRC's numbers do not follow the sorted order either.
WNIDS = ["n02119789", "n01440764", "n03188531"]
TRUTH = [3, 1, 2, 2, 1, 3, 3]


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(photograph(20, 24, seed)).save(buffer, "JPEG")
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in files.items():
            add(tar, name, data)
    return buffer.getvalue()


TRAIN = {w: {f"{w}_{i}.JPEG": jpeg(10 * k + i) for i in range(3 + k)} for k, w in enumerate(WNIDS)}
VAL = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(100 + i) for i in range(1, 8)}


@pytest.fixture
def archives(tmp_path):
    train = tar_of({f"{wnid}.tar": tar_of(images) for wnid, images in TRAIN.items()})
    (tmp_path / "train.tar").write_bytes(train)
    (tmp_path / "val.tar").write_bytes(tar_of(VAL))
    kind = [("ILSVRC2012_ID", float), ("WNID", object), ("words", object)]
    synsets = np.array([(i + 1, w, "a word") for i, w in enumerate(WNIDS)], dtype=kind)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets.reshape(-1, 1)})
    truth = "".join(f"{number}\n" for number in TRUTH).encode()
    kit = {"ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
           "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": truth}  # fmt: skip
    (tmp_path / "kit.tar.gz").write_bytes(tar_of(kit, "w:gz"))
    return tmp_path


def flags(root, **changes) -> list[str]:
    values = {"train-tar": root / "train.tar", "train-dir": root / "train",
              "val-tar": root / "val.tar", "val-dir": root / "val",
              "devkit": root / "kit.tar.gz", "workers": 0} | changes  # fmt: skip
    return [w for name, value in values.items() if value is not None
            for w in (f"--{name}", str(value))]  # fmt: skip


def tree(folder) -> dict[str, dict[str, bytes]]:
    return {d.name: {p.name: p.read_bytes() for p in d.iterdir()} for d in folder.iterdir()}


EXPECTED_VAL = {
    wnid: {name: VAL[name] for name, number in zip(VAL, TRUTH, strict=True) if number == i + 1}
    for i, wnid in enumerate(WNIDS)
}


@pytest.mark.parametrize("workers", [0, 2])
def test_archives_become_class_folders(archives, workers):
    assert prepare.main(flags(archives, workers=workers)) == 0
    assert tree(archives / "train") == TRAIN
    assert tree(archives / "val") == EXPECTED_VAL
    ImageFolders(str(archives / "train"), str(archives / "val")).check()


def test_a_list_can_replace_the_kit(archives):
    names = {name: WNIDS[number - 1] for name, number in zip(VAL, TRUTH, strict=True)}
    lines = "".join(f"{name} {wnid}\n" for name, wnid in names.items())
    (archives / "list.txt").write_text(lines)
    only_val = {"train-tar": None, "train-dir": None, "devkit": None}
    assert prepare.main(flags(archives, **only_val, **{"val-classes": archives / "list.txt"})) == 0
    assert tree(archives / "val") == EXPECTED_VAL


def test_an_interrupted_run_continues(archives, monkeypatch):
    copies = []
    copy = imagenet._copy

    def stop(source, size, path):
        if len(copies) == 5:  # in the second class
            raise KeyboardInterrupt
        copies.append(path)
        copy(source, size, path)

    with monkeypatch.context() as patch:
        patch.setattr(imagenet, "_copy", stop)
        assert prepare.main(flags(archives)) == 130
    (archives / "train" / f"{WNIDS[1]}.unfinished.k2x").mkdir()  # what a SIGKILL would have left
    finished = {name for name in os.listdir(archives / "train") if "." not in name}
    assert len(finished) == 1
    written = (archives / "train" / finished.pop()).stat().st_mtime_ns
    assert prepare.main(flags(archives)) == 0
    assert tree(archives / "train") == TRAIN
    assert tree(archives / "val") == EXPECTED_VAL
    assert written in {d.stat().st_mtime_ns for d in (archives / "train").iterdir()}


def refused(archives, capsys, **changes) -> str:
    assert prepare.main(flags(archives, **changes)) == 3
    return capsys.readouterr().err


@pytest.mark.parametrize("which", ["train", "val"])
def test_a_truncated_archive_is_refused(archives, capsys, which):
    path = archives / f"{which}.tar"
    path.write_bytes(path.read_bytes()[:5000])
    assert f"--{which}-tar" in refused(archives, capsys)
    path.write_bytes(b"no tar at all")
    assert f"--{which}-tar: {path} cannot be read" in refused(archives, capsys)
    path.unlink()
    assert "No such file" in refused(archives, capsys)


def test_the_wrong_archive_is_refused(archives, capsys):
    message = refused(archives, capsys, **{"train-tar": archives / "val.tar"})
    assert "instead of one tar per class" in message
    message = refused(archives, capsys, devkit=archives / "val.tar")
    assert "--devkit" in message


def test_images_and_list_must_match(archives, capsys):
    (archives / "list.txt").write_text("ILSVRC2012_val_00000001.JPEG n01440764\n")
    changes = {"devkit": None, "val-classes": archives / "list.txt"}
    assert "the class of ILSVRC2012_val_00000002.JPEG is unknown" in refused(
        archives, capsys, **changes
    )
    names = [*VAL, "ILSVRC2012_val_00000099.JPEG"]
    (archives / "list.txt").write_text("".join(f"{name} n01440764\n" for name in names))
    assert "holds 7 images, but the list of classes has 8" in refused(archives, capsys, **changes)
    (archives / "list.txt").write_text("ILSVRC2012_val_00000001.JPEG 490\n")
    assert "line 1" in refused(archives, capsys, **changes)


def test_an_inner_tar_may_lack_its_end_mark(archives):
    bare = {f"{w}.tar": tar_of(f)[: sum(512 + -(-len(d) // 512) * 512 for d in f.values())]
            for w, f in TRAIN.items()}  # fmt: skip
    (archives / "train.tar").write_bytes(tar_of(bare))
    assert prepare.main(flags(archives)) == 0
    assert tree(archives / "train") == TRAIN


def test_damage_inside_a_tar_is_not_taken_for_its_end(archives, capsys):
    path = archives / "train.tar"
    content = path.read_bytes()
    name = f"{WNIDS[1]}_2.JPEG".encode()
    path.write_bytes(content.replace(name, name.upper()))  # now the checksum of its header is wrong
    message = refused(archives, capsys)
    assert f"--train-tar: {path}: the tar of {WNIDS[1]} is damaged: the header at" in message
    assert WNIDS[1] not in os.listdir(archives / "train")
    name = f"{WNIDS[1]}.tar".encode()
    path.write_bytes(content.replace(name, name.upper()))
    assert f"--train-tar: {path} cannot be read: the header at" in refused(archives, capsys)


def test_an_empty_class_folder_counts_as_unfinished(archives):
    (archives / "train" / WNIDS[1]).mkdir(parents=True)
    (archives / "val" / WNIDS[0]).mkdir(parents=True)
    assert prepare.main(flags(archives)) == 0
    assert tree(archives / "train") == TRAIN
    assert tree(archives / "val") == EXPECTED_VAL


def test_damaged_kits_are_refused(archives, capsys):
    kit = archives / "kit.tar.gz"
    content = kit.read_bytes()
    text = tar_of({"data/ILSVRC2012_validation_ground_truth.txt": b"1\n",
                   "data/meta.mat": b"MATLAB 5.0 MAT-file"}, "w:gz")  # fmt: skip
    flipped = bytearray(content)
    flipped[-7] ^= 1  # a byte of the checksum
    for damaged in (content[:200], content[:-30], bytes(flipped), text, b"", b"x"):
        kit.write_bytes(damaged)
        message = refused(archives, capsys)
        assert (
            f"--devkit: {kit} is damaged or not the published ILSVRC2012_devkit_t12.tar.gz"
            in message
        )
        assert message.count("\n") == 1


def test_a_list_that_is_not_text_is_refused(archives, capsys):
    (archives / "list").write_bytes(b"\x89PNG\xff\x00")
    changes = {"devkit": None, "val-classes": archives / "list"}
    assert f"--val-classes: {archives / 'list'} is not a text file" in refused(
        archives, capsys, **changes
    )


def test_names_cannot_lead_out_of_the_folder(archives):
    evil = tar_of({"n01440764.tar": tar_of({"../../evil.JPEG": jpeg(1)})})
    (archives / "train.tar").write_bytes(evil)
    assert prepare.main(flags(archives)) == 0
    assert os.listdir(archives / "train" / "n01440764") == ["evil.JPEG"]
    assert not (archives / "evil.JPEG").exists()


def outer(files: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files:
            add(tar, name, data)
    return buffer.getvalue()


A_CLASS = f"{WNIDS[0]}.tar", tar_of(TRAIN[WNIDS[0]])


@pytest.mark.parametrize(
    ("members", "expected"),
    [([A_CLASS, ("again/" + A_CLASS[0], A_CLASS[1])], f"holds two tars of class {WNIDS[0]}"),
     ([("...tar", A_CLASS[1])], "a file named '...tar'"),
     ([(A_CLASS[0], outer([("1.JPEG", b"x"), ("a/1.JPEG", b"y")]))],
      f"the tar of {WNIDS[0]} holds two files named 1.JPEG")],
)  # fmt: skip
def test_names_that_would_overwrite_are_refused(archives, capsys, members, expected):
    (archives / "train.tar").write_bytes(outer(members))
    before = sorted(os.listdir(archives))
    assert expected in refused(archives, capsys)
    assert sorted(set(os.listdir(archives)) - {"train"}) == before
    assert not (archives / "train").exists() or not os.listdir(archives / "train")


def test_duplicated_validation_images_are_refused(archives, capsys):
    names = list(VAL)
    doubled = [(names[0], b"x"), *[(name, b"x") for name in names[:-1]]]
    (archives / "val.tar").write_bytes(outer(doubled))
    assert f"holds two files named {names[0]}" in refused(archives, capsys)


def test_validation_images_sorted_by_another_list_are_refused(archives, capsys):
    assert prepare.main(flags(archives)) == 0
    names = {name: WNIDS[number - 1] for name, number in zip(VAL, TRUTH, strict=True)}
    first = next(iter(names))
    for wnid in (WNIDS[0], "n09999999"):
        lines = "".join(f"{name} {other}\n" for name, other in (names | {first: wnid}).items())
        (archives / "list.txt").write_text(lines)
        changes = {"devkit": None, "val-classes": archives / "list.txt"}
        assert "was unpacked with another list" in refused(archives, capsys, **changes)
    assert tree(archives / "val") == EXPECTED_VAL


@pytest.mark.parametrize(
    "changes",
    [{"train-tar": None}, {"val-dir": None}, {"devkit": None},
     {"train-tar": None, "train-dir": None, "val-tar": None, "val-dir": None},
     {"val-tar": None, "val-dir": None}],
)  # fmt: skip
def test_wrong_flags_are_refused(archives, changes):
    with pytest.raises(SystemExit) as caught:
        prepare.main(flags(archives, **changes))
    assert caught.value.code == 2


def test_what_macos_adds_to_archives_is_left_out(archives):
    """Its tar writes a file ._NAME with the attributes of each file NAME."""
    extra = {f"._{name}": b"\0\5\x16\7" for name in VAL}
    val = {"./._.": b"x", "__MACOSX/x.JPEG": b"x", ".DS_Store": b"x"} | extra | VAL
    (archives / "val.tar").write_bytes(tar_of(val))
    train = {}
    for wnid, images in TRAIN.items():
        inner = {f"._{name}": b"x" for name in images} | {".DS_Store": b"x"} | images
        train |= {f"._{wnid}.tar": b"x", f"{wnid}.tar": tar_of(inner)}
    (archives / "train.tar").write_bytes(tar_of(train))
    assert prepare.main(flags(archives)) == 0
    assert tree(archives / "train") == TRAIN
    assert tree(archives / "val") == EXPECTED_VAL


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_archives_are_read(archives, pack, capsys):
    train = {f"{w}.tar.gz": gzip.compress(tar_of(images)) for w, images in TRAIN.items()}
    (archives / "train.tar").write_bytes(pack(tar_of(train)))
    (archives / "val.tar").write_bytes(pack(tar_of(VAL)))
    assert prepare.main(flags(archives)) == 0
    assert tree(archives / "train") == TRAIN
    assert tree(archives / "val") == EXPECTED_VAL
    assert not list(archives.glob("val-tar-*"))
    (archives / "train" / WNIDS[1] / f"{WNIDS[1]}_0.JPEG").unlink()
    (archives / "train" / WNIDS[0] / "mine.JPEG").touch()
    shutil.rmtree(archives / "train" / WNIDS[2])
    assert prepare.main(flags(archives)) == 0  # makes what is missing
    assert "3 classes, 1 of them written now (5 images)" in capsys.readouterr().out
    assert (archives / "train" / WNIDS[0] / "mine.JPEG").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_damaged_compressed_archives_are_refused(archives, capsys, split):
    path = archives / f"{split}.tar"
    packed = bytearray(gzip.compress(path.read_bytes()))
    packed[-7] ^= 1  # a byte of the checksum
    for damaged in (bytes(packed), bytes(packed[: len(packed) // 2]), b"(\xb5/\xfd zstd"):
        path.write_bytes(damaged)
        message = refused(archives, capsys)
        assert f"--{split}-tar: " in message
        assert str(path) in message
        assert message.count("\n") == 1


def test_tars_of_images_whose_names_hold_the_class_are_explained(archives, capsys):
    path = archives / "train.tar"
    path.write_bytes(gzip.compress(tar_of({"n01440764_1_n01440764.JPEG": jpeg(1)})))
    assert "unpack them (tar -xf TAR -C DIR/train) and train with --data" in refused(
        archives, capsys
    )
