"""data.check finds and names each defect, lists it for --exclude, and returns exit code 3."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from PIL import Image

from data.check import inspection, report, tasks, work
from data.check.__main__ import main as check
from data.make_tfrecords.__main__ import main as make_tfrecords
from data.samples import tfrecord
from data.sources.imagenet import ImageNet
from data_fixtures import Share, photograph, write_tree


@pytest.fixture
def trees(tmp_path):
    write_tree(tmp_path / "train", {"ant": 9, "bee": 14}, seed=1)
    write_tree(tmp_path / "val", {"ant": 6, "bee": 5}, seed=2)
    return tmp_path


def arguments(root, *flags, workers=0) -> list[str]:
    folders = flags or ("--train-dir", str(root / "train"), "--val-dir", str(root / "val"))
    return [*folders, "--report", str(root / "report.json"), "--list", str(root / "bad.txt"),
            "--workers", str(workers)]  # fmt: skip


def run(root, *flags, workers=0) -> tuple[int, dict, list[str]]:
    """Return exit code, report and list."""
    code = check(arguments(root, *flags, workers=workers))
    report = json.loads((root / "report.json").read_text())
    lines = (root / "bad.txt").read_text().splitlines()
    assert lines
    return code, report, [line for line in lines if line != "# none"]


def spoil(tree) -> None:
    """Give one image each kind of defect."""
    image = Image.fromarray(photograph(40, 60, seed=3))
    (tree / "bee" / "000.jpg").write_bytes(b"")
    half = (tree / "bee" / "001.jpg").read_bytes()
    (tree / "bee" / "001.jpg").write_bytes(half[: len(half) // 2])
    (tree / "bee" / "002.jpg").write_text("<html>404</html>")
    image.save(tree / "bee" / "003.jpg", "PNG")
    image.convert("CMYK").save(tree / "bee" / "004.jpg")
    image.save(tree / "bee" / "005.jpg", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff")


EXPECTED = {"000.jpg": "empty", "001.jpg": "unreadable", "002.jpg": "unreadable",
            "003.jpg": "not a JPEG", "004.jpg": "CMYK", "005.jpg": "EXIF"}  # fmt: skip


def test_good_trees_pass(trees, capsys):
    code, report, bad = run(trees)
    assert (code, bad) == (0, [])
    assert report["general"] == []
    train = report["splits"]["train"]
    assert (train["images"], train["images_per_class"], train["problems"]) == (23, [9, 14], [])
    assert "none" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 2])
def test_each_defect_is_found(trees, capsys, workers):
    spoil(trees / "train")
    code, report, bad = run(trees, workers=workers)
    assert code == 3
    found = {name: problem for name, problem, _ in report["splits"]["train"]["problems"]}
    assert found == {f"bee/{name}": problem for name, problem in EXPECTED.items()}
    assert bad == [f"train/bee/00{i}.jpg" for i in range(3)]
    printed = capsys.readouterr().out
    assert "1 CMYK, 1 EXIF, 1 empty, 1 not a JPEG, 2 unreadable" in printed
    assert "train/bee/002.jpg: unreadable: cannot be decoded" in printed
    # The list works for --exclude; training can use the remaining images.
    source = ImageNet(str(trees / "train"), str(trees / "val"), image_size=16,
                      exclude=str(trees / "bad.txt"))  # fmt: skip
    source.check()
    assert source.train_size == 20
    loader = source.train_loader(Share(effective_batch_size=4), workers=0)
    assert sum(len(labels) for _, labels in loader.epoch(0)) == 20


def test_unusual_but_readable_images_pass(trees):
    Image.open(trees / "val" / "ant" / "000.jpg").save(trees / "val" / "ant" / "000.jpg", "PNG")
    code, report, bad = run(trees)
    assert (code, bad) == (0, [])
    assert len(report["splits"]["val"]["problems"]) == 1


def test_an_interrupted_check_continues(trees, monkeypatch):
    monkeypatch.setattr(tasks, "_CHUNK", 5)
    spoil(trees / "train")
    expected = run(trees)
    seen = []
    inspect = inspection.inspect

    def stop(task):
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(task)
        return inspect(task)

    with monkeypatch.context() as patch:
        patch.setattr(inspection, "inspect", stop)
        assert check(arguments(trees)) == 130
    monkeypatch.setattr(inspection, "inspect", lambda task: seen.append(task) or inspect(task))
    assert run(trees) == expected
    assert len(seen) == len(set(seen)) == 8
    assert not (trees / "report.json.unfinished").exists()


def test_a_file_that_changed_is_checked_again(trees, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(work.shutil, "rmtree", lambda *a, **k: None)  # keep the notes
        assert run(trees)[0] == 0
    assert (trees / "report.json.unfinished").exists()
    (trees / "val" / "bee" / "001.jpg").write_bytes(b"")
    assert run(trees)[2] == ["val/bee/001.jpg"]


def test_classes_that_differ_and_missing_folders(trees, capsys):
    shutil.copytree(trees / "val" / "ant", trees / "val" / "wasp")
    code, report, _ = run(trees)
    assert code == 3
    assert report["general"] == [
        "train and val hold different classes, so their labels do not agree; only in train: none; "
        "only in val: wasp"
    ]
    folders = ["--train-dir", str(trees / "nowhere"), "--val-dir", str(trees / "val")]
    assert check(folders) == 3
    assert "--train-dir" in capsys.readouterr().err


def test_empty_class_folders_and_dangling_links_are_findings(trees):
    for split in ("train", "val"):
        (trees / split / "cow").mkdir()
    (trees / "train" / "bee" / "007.jpg").unlink()
    (trees / "train" / "bee" / "007.jpg").symlink_to("gone.jpg")
    (trees / "val" / "dog").symlink_to("/gone")
    code, report, bad = run(trees)
    assert (code, bad) == (3, ["train/bee/007.jpg"])
    assert report["general"] == [
        "val: dog is a link to /gone, which does not exist",
        "train: 1 of 3 classes have no image: cow",
        "val: 1 of 3 classes have no image: cow",
    ]
    assert report["splits"]["train"]["problems"] == [
        ["bee/007.jpg", "unreadable", "is a link to gone.jpg, which does not exist"]
    ]
    assert report["splits"]["train"]["images_per_class"] == [9, 14, 0]


def test_names_that_are_not_utf8_survive_report_and_list(trees, capsys):
    name = os.fsdecode(b"ant/caf\xe9.jpg")
    (trees / "train" / name).write_bytes(b"")
    code = check(arguments(trees))
    assert code == 3
    assert r"train/ant/caf\udce9.jpg: empty" in capsys.readouterr().out
    report = json.loads((trees / "report.json").read_text())
    assert report["splits"]["train"]["problems"] == [[name, "empty", "no bytes"]]
    assert (trees / "bad.txt").read_bytes() == b"train/ant/caf\xe9.jpg\n"
    source = ImageNet(str(trees / "train"), str(trees / "val"), exclude=str(trees / "bad.txt"))
    assert source.train_size == 23


def test_counts_are_compared_with_imagenets():
    finding = {"split": "train", "images": 5, "labels": {"3": 5}, "problems": []}
    result = report.summary([finding], [], {"train": [f"c{i}" for i in range(1000)]})
    assert result["general"] == [
        "train: 5 images; ImageNet has 1,281,167",
        "train: 999 of 1000 classes have no image: c0, c1, c2, c4, c5 and 994 more",
    ]


@pytest.fixture
def records(trees):
    spoil(trees / "train")
    flags = ["--train-dir", str(trees / "train"), "--val-dir", str(trees / "val")]
    out = trees / "records"
    flags += ["--data-dir", str(out), "--images-per-shard", "5", "--workers", "0"]
    assert make_tfrecords(flags) == 0
    return out


def test_records_are_checked(trees, records):
    code, report, bad = run(trees, "--data-dir", str(records))
    assert code == 3
    kinds = sorted(problem for _, problem, _ in report["splits"]["train"]["problems"])
    assert kinds == sorted(EXPECTED.values())
    assert len(bad) == 3
    assert all(name.startswith("train/train-0000") and "#" in name for name in bad)
    source = ImageNet(records=str(records), image_size=16, exclude=str(trees / "bad.txt"))
    loader = source.train_loader(Share(effective_batch_size=4), workers=0)
    assert sum(len(labels) for _, labels in loader.epoch(0)) == 20


def problems(report) -> dict[str, str]:
    return {name: kind for name, kind, _ in report["splits"]["validation"]["problems"]}


def test_damaged_records_index_files_and_labels_are_found(trees, records):
    path = records / "validation" / "validation-00001-of-00003"
    data = path.read_bytes()
    index = records / "idx_files" / "validation" / (path.name + ".idx")
    path.write_bytes(data[:200] + b"?" + data[201:])
    assert problems(run(trees, "--data-dir", str(records))[1]) == {path.name: "damaged file"}
    path.write_bytes(data)
    text = index.read_text()
    index.write_text("7" + text)
    assert problems(run(trees, "--data-dir", str(records))[1]) == {path.name: "index"}
    features = {"image/encoded": b"x", "image/class/label": 3}
    record = tfrecord.record(tfrecord.encode_example(features))
    path.write_bytes(record)
    index.write_text(tfrecord.index_text([(0, len(record))]))
    code, report, bad = run(trees, "--data-dir", str(records))
    assert problems(report) == {path.name: "changed file", path.name + "#0": "wrong label"}
    # A wrong label is a fault of the set, which a list for --exclude would hide.
    assert bad == [name for name in bad if name.startswith("train/")]
    index.unlink()
    report = run(trees, "--data-dir", str(records))[1]
    assert "do not match" in report["general"][0]
    assert code == 3


def test_an_index_file_with_wrong_boundaries_is_found(trees, records):
    name = "validation-00000-of-00003"
    path = records / "idx_files" / "validation" / f"{name}.idx"
    rows = tfrecord.read_index(str(path), (records / "validation" / name).stat().st_size)
    rows[0, 1] += 7
    rows[1] += (7, -7)
    path.write_text(tfrecord.index_text(rows.tolist()))
    code, report, _ = run(trees, "--data-dir", str(records))
    assert (code, problems(report)) == (3, {name: "index"})


def general(trees, records) -> list[str]:
    code, report, _ = run(trees, "--data-dir", str(records))
    assert code == 3
    return report["general"]


@pytest.mark.parametrize("by", ["manifest.json", "the files' names"])
def test_missing_record_files_are_found(trees, records, by):
    assert general(trees, records) == []
    if by != "manifest.json":
        (records / "manifest.json").unlink()
    name = "train-00002-of-00005"
    (records / "train" / name).unlink()
    (records / "idx_files" / "train" / f"{name}.idx").unlink()
    found = general(trees, records)
    assert found[0] == (
        f"train: {name} missing, according to {by}; copy or make the missing files again"
    )


def test_duplicated_and_unexpected_record_files_are_found(trees, records):
    name, other = "train-00002-of-00005", "train-00002-of-00005.1"
    for path, end in ((records / "train", ""), (records / "idx_files" / "train", ".idx")):
        shutil.copy(path / (name + end), path / (other + end))
    assert [line.split(";")[0] for line in general(trees, records)] == [
        f"train: {other} not in manifest.json",
        f"train/{name} and train/{other} are the same file",
    ]
    (records / "manifest.json").unlink()
    assert f"train/{name} and train/{other} are the same" in "".join(general(trees, records))


def test_a_file_of_another_set_is_found(trees, records):
    for path, end in ((records / "train", ""), (records / "idx_files" / "train", ".idx")):
        shutil.copy(path / f"train-00001-of-00005{end}", path / f"train-00003-of-00005{end}")
    code, report, _ = run(trees, "--data-dir", str(records))
    problems = [(n, p) for n, p, _ in report["splits"]["train"]["problems"] if "file" in p]
    assert (code, problems) == (3, [("train-00003-of-00005", "changed file")])


def relabelled(records, split, name, labels) -> None:
    """Write a record file again with these (label, class name)."""
    records_bytes = [
        tfrecord.record(tfrecord.encode_example(
            {"image/encoded": b"", "image/class/label": label, "image/class/synset": synset}))
        for label, synset in labels
    ]  # fmt: skip
    (records / split / name).write_bytes(b"".join(records_bytes))


def test_labels_that_stand_for_other_classes_are_found(trees, records):
    name = "validation-00000-of-00003"
    relabelled(records, "validation", name, [(2, b"ant")])
    assert general(trees, records) == ["label 2 is used for several classes: ant, bee"]
    manifest = json.loads((records / "manifest.json").read_text())
    manifest["classes"] = ["bee", "ant"]
    (records / "manifest.json").write_text(json.dumps(manifest))
    relabelled(records, "validation", name, [(1, b"ant")])
    assert general(trees, records) == ["label 1 is ant in the records, but bee in manifest.json"]


def test_classes_out_of_imagenets_order_are_found():
    def finding(*names):
        return {"names": {str(i): [name] for i, name in enumerate(names)}}

    assert (
        report.class_name_conflicts([finding("n00000001", "n00000002"), finding("n00000001")], None)
        == []
    )
    (found,) = report.class_name_conflicts([finding("n00000002", "n00000001")], None)
    assert "labels do not follow the sorted order of the class names" in found
    assert (
        report.class_name_conflicts([finding("zebra", "ant")], None) == []
    )  # the user's own classes


def test_a_damaged_manifest_is_named(trees, records, capsys):
    (records / "manifest.json").write_text('{"num_classes": 2, "splits": 3}')
    assert check(["--data-dir", str(records), "--workers", "0"]) == 3
    assert "manifest.json is damaged" in capsys.readouterr().err


def test_hidden_files_and_missing_index_files_do_not_hide_other_problems(trees, records):
    (records / "train" / ".DS_Store").write_bytes(b"x")
    assert general(trees, records) == []
    (records / "idx_files" / "train" / "train-00001-of-00005.idx").unlink()
    code, report, _ = run(trees, "--data-dir", str(records))
    problems = [(n, p) for n, p, _ in report["splits"]["train"]["problems"] if p == "index"]
    assert (code, problems) == (3, [("train-00001-of-00005", "index")])
    (records / "train" / "train-00002-of-00005").unlink()
    (records / "train" / "train-00002-of-00005").symlink_to("gone")
    (records / "train" / "train-00003-of-00005").unlink()
    (records / "train" / "train-00003-of-00005").mkdir()
    report = run(trees, "--data-dir", str(records))[1]
    details = {n: d for n, p, d in report["splits"]["train"]["problems"] if p == "damaged file"}
    assert details == {
        "train-00002-of-00005": "is a link to gone, which does not exist",
        "train-00003-of-00005": "cannot be read: Is a directory",
    }
    shutil.rmtree(records / "train")
    assert "train: No such file" in general(trees, records)[0]


@pytest.mark.parametrize("flags", [[], ["--train-dir", "t"], ["--data-dir", "d", "--val-dir", "v"]])
def test_wrong_flags_are_refused(flags):
    with pytest.raises(SystemExit) as caught:
        check(flags)
    assert caught.value.code == 2


def test_report_and_list_in_one_file_are_refused(trees, capsys, monkeypatch):
    monkeypatch.chdir(trees / "train")
    folders = ["--train-dir", "../train", "--val-dir", "../val"]
    with pytest.raises(SystemExit) as caught:
        check([*folders, "--report", "a", "--list", "../train/a"])
    assert caught.value.code == 2
    assert "--report and --list name the same file" in capsys.readouterr().err
    assert not (trees / "train" / "a").exists()


def test_names_with_line_breaks_are_reported_and_not_listed(trees):
    for name in ("a\nb.jpg", "a\rb.jpg", "c.jpg"):
        (trees / "val" / "ant" / name).write_bytes(b"")
    code, report, bad = run(trees)
    assert (code, bad) == (3, ["val/ant/c.jpg"])
    (problem,) = report["general"]
    assert r"rename or remove these files: 'val/ant/a\nb.jpg', 'val/ant/a\rb.jpg'" in problem


def test_the_list_of_a_good_tree_excludes_nothing(trees):
    run(trees)
    source = ImageNet(str(trees / "train"), str(trees / "val"), exclude=str(trees / "bad.txt"))
    assert (source.train_size, source.val_size) == (23, 11)
