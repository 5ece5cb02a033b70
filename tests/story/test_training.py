"""train_imagenet.py as a user runs it: real ranks, real JPEG folders, kills, and wrong input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from run_folders import rows, same_end, scalars, summary_of, without_times

import train_imagenet
from conftest import (
    CLASSES,
    GOLDENS,
    HEARING_SIGNALS,
    ROOT,
    VAL,
    Ranks,
    environment,
    flags,
    long_flags,
    ranks_of,
    run,
    until,
)
from lars.report.page import page
from lars.run import checkpoint
from lars.run.records import read_runs

SCRIPT, DALI_SCRIPT = ROOT / "train_imagenet.py", ROOT / "train_imagenet_dali.py"


@pytest.fixture(scope="session")
def unbroken(folders, tmp_path_factory, mpirun):
    """A run of three epochs on 2 ranks."""
    logs = tmp_path_factory.mktemp("unbroken")
    done = mpirun(2, SCRIPT, *flags(folders, logs))
    assert done.returncode == 0, done.stderr
    return logs / "run", done.stdout


@pytest.mark.mpi
def test_a_run_prints_its_plan_and_its_result(unbroken):
    _, output = unbroken
    for words in (
        "2 ranks x 2 micro-batches x 4 samples", "9 = 3 epochs x 3, the last of 1 samples",
        "1.5 steps of warm-up to 0.1", "tensorboard --logdir", "finished: val top1",
    ):  # fmt: skip
        assert words in output
    assert "\r" not in output, "no progress bar without a terminal"


def test_a_benchmark_needs_no_files_and_writes_none(tmp_path):
    logs = tmp_path / "logs"
    small = [
        "--model",
        "shufflenet_v2_x0_5",
        "--image-size",
        "40",
        "--batch-size",
        "4",
        "--no-cuda",
    ]
    done = run(
        sys.executable,
        SCRIPT,
        "--benchmark",
        "noise",
        *small,
        "--max-steps",
        "4",
        "--log-dir",
        logs,
    )
    assert done.returncode == 0, done.stderr
    speed, half_width = re.search(
        r"images/s +([\d.]+) ± ([\d.]+) \(95 % of 4 steps", done.stdout
    ).groups()
    assert float(half_width) > 0
    assert 1 < float(speed) < 1e5
    shares = re.findall(r"(data|compute|exchange|optimizer) ([\d.]+)%", done.stdout)
    assert sum(float(share) for _, share in shares) == pytest.approx(100, abs=0.3)
    assert not logs.exists()


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s+(\w+)", status)[1], 16) >> (number - 1) & 1)


def test_a_signal_ends_a_benchmark_at_once():
    command = [sys.executable, SCRIPT, "--benchmark", "noise", "--model", "shufflenet_v2_x0_5"]
    job = subprocess.Popen(
        [*map(str, command), "--image-size", "40", "--no-cuda", "--max-steps", "1000000"],
        cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until(lambda: catches(job.pid, signal.SIGUSR1), 60)
        until(lambda: not catches(job.pid, signal.SIGUSR1), 60)
        job.terminate()
        assert job.wait(timeout=10) == -signal.SIGTERM
    finally:
        job.kill()


@pytest.mark.mpi
def test_a_benchmark_reads_the_data_as_training_does(folders, tmp_path, mpirun):
    done = mpirun(2, SCRIPT, *flags(folders, tmp_path), "--benchmark", "data", "--max-steps", "4")
    assert done.returncode == 0, done.stderr
    assert "16 = 2 ranks x 2 micro-batches x 4 samples" in done.stdout
    assert done.stdout.count("images/s") == 1, "only the root prints"
    assert not list(tmp_path.iterdir())


@pytest.mark.mpi
def test_metrics_have_a_line_for_each_split_and_epoch(unbroken):
    recorded = rows(unbroken[0])
    assert [(r["split"], r["epoch"], r["step"]) for r in recorded] == [
        (split, epoch, 3 * epoch) for epoch in (1, 2, 3) for split in ("train", "val")
    ]
    keys = ["split", "epoch", "step", "loss", "top1", "top5", "lr", "images_per_second", "seconds"]
    times = {"train": ["data_seconds", "exchange_seconds"], "val": []}
    assert all(list(r) == keys + times[r["split"]] for r in recorded)
    for row in recorded[::2]:
        assert 0 < row["data_seconds"] + row["exchange_seconds"] < row["seconds"]
    assert all(0 <= r["top1"] <= r["top5"] == 100 for r in recorded), "three classes"
    hits = recorded[-1]["top1"] / 100 * CLASSES * VAL
    assert hits == pytest.approx(round(hits), abs=1e-9), "percent of exactly 15 images"


@pytest.mark.mpi
def test_tensorboard_shows_the_learning_rate_of_each_step(unbroken):
    drawn = scalars(unbroken[0])
    metrics = [(split, x) for split in ("train", "val") for x in ("loss", "top1", "top5")]
    assert {name for name in drawn if not name.startswith("layers/")} == {
        *(f"{split}/{x}" for split, x in metrics),
        *(f"over_images/{split}_{x}" for split, x in metrics),
        *("train/lr", "train/grad_norm"),
    }
    size = json.loads((unbroken[0] / "config.json").read_text())["plan"]["train_size"]
    assert [images for images, _ in drawn["over_images/val_top1"]] == [size, 2 * size, 3 * size]
    assert [step for step, _ in drawn["train/lr"]] == [2, 3, 4, 6, 8, 9]
    assert [step for step, _ in drawn["val/top1"]] == [3, 6, 9]
    # Step 2 (number 1 counted from 0) is in the warm-up of 1.5 steps. Its decay is (1 - (k - 2) / (9 - 1.5)) ** 2.
    expected = {2: 0.1 / 1.5, 3: 0.1, 9: 0.1 * (1 - 6 / 7.5) ** 2}
    for step, lr in drawn["train/lr"]:
        if step in expected:
            assert lr == pytest.approx(expected[step], rel=1e-6)


@pytest.mark.mpi
def test_the_run_folder_is_complete(unbroken):
    folder = unbroken[0]
    config = json.loads((folder / "config.json").read_text())
    assert config["flags"]["base_lr"] == 0.1
    assert config["plan"]["accumulation"] == 2
    assert {path.name for path in folder.glob("*.tar")} == {
        f"checkpoint-{e}.pth.tar" for e in (1, 2, 3)
    }
    saved = checkpoint.load(folder / "checkpoint-3.pth.tar")
    assert saved["progress"]["step"] == 9
    assert not list(folder.glob(".tmp*"))
    net = torchvision.models.get_model("shufflenet_v2_x0_5", num_classes=CLASSES)
    net.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    for name, value in net.state_dict().items():
        assert torch.equal(value, saved["learner"]["model"][name])


@pytest.mark.mpi
def test_the_summary_and_the_report_of_a_run(unbroken):
    folder, output = unbroken
    summary = summary_of(folder)
    assert (summary["state"], summary["step"], summary["total_steps"]) == ("finished", 9, 9)
    assert summary["best"]["top1"] == max(r["top1"] for r in rows(folder) if r["split"] == "val")
    assert summary["last"]["epoch"] == 3
    assert sum(summary["time_share"].values()) == pytest.approx(1)
    assert summary["time_share"]["exchange"] > 0
    assert summary["environment"]["ranks"] == 2
    assert "time of a step" in output
    html = page(read_runs([folder]))
    assert f"{summary['best']['top1']:.2f} % top-1" in html
    assert "Trust ratio of each layer" in html


@pytest.mark.mpi
def test_a_killed_and_restarted_run_ends_with_the_same_bytes(folders, unbroken, tmp_path, ranks):
    """The undisturbed run was one of Horovod. A sum of two numbers does not depend on the engine."""
    job = start_job(folders, tmp_path, ranks=ranks)
    wait_for(tmp_path / "run" / "checkpoint-1.pth.tar", job)
    job.kill()
    # The ranks outlive their launcher.
    subprocess.run(["pkill", "-KILL", "-f", str(tmp_path)], check=False)
    job.wait()

    again = ranks(2, SCRIPT, *flags(folders, tmp_path))
    assert again.returncode == 0, again.stderr
    assert "resuming after" in again.stdout
    same_end(tmp_path / "run", unbroken[0])


@pytest.mark.mpi
def test_a_run_stopped_within_an_epoch_resumes_with_the_next_step(
    folders, unbroken, tmp_path, mpirun
):
    stopped = mpirun(2, SCRIPT, *flags(folders, tmp_path), "--max-steps", "4")
    assert stopped.returncode == 0, stopped.stderr
    assert "stopped after step 4" in stopped.stdout
    half = summary_of(tmp_path / "run")
    assert (half["state"], half["step"], half["epoch"]) == ("stopped", 4, 1)
    saved = checkpoint.load(tmp_path / "run" / "checkpoint-1+1.pth.tar")
    of_both = saved["ranks"].mean(0)[4:]  # the first four values are the metric sums
    exported = safetensors.torch.load_file(tmp_path / "run" / "model.safetensors")
    assert torch.equal(exported["conv1.1.running_mean"], of_both[:24].float())
    assert not torch.equal(exported["conv1.1.running_mean"], saved["ranks"][0, 4:28].float())
    again = mpirun(2, SCRIPT, *flags(folders, tmp_path), "--backend", "torch")
    assert again.returncode == 0, again.stderr
    assert "torch.distributed" in again.stdout, "the rest of the run has the other engine"
    same_end(tmp_path / "run", unbroken[0])
    whole = summary_of(tmp_path / "run")
    assert (whole["state"], whole["step"]) == ("finished", 9)
    trained = sum(row["seconds"] for row in rows(tmp_path / "run") if row["split"] == "train")
    assert whole["hours"]["training"] == pytest.approx(trained / 3600)
    assert whole["hours"]["training"] > half["hours"]["training"]


@pytest.mark.mpi
def test_a_checkpoint_of_an_earlier_version_is_resumed(folders, tmp_path, mpirun):
    """Version 0.1.0 made the checkpoint within the second epoch, and recorded the rows of the whole run."""
    (tmp_path / "run").mkdir()
    shutil.copy(GOLDENS / "old_run" / "checkpoint-1+1.pth.tar", tmp_path / "run")
    done = mpirun(2, SCRIPT, *flags(folders, tmp_path))
    assert done.returncode == 0, done.stderr
    assert "epoch 2, step 1 (4 of 9 steps)" in done.stdout
    whole = [json.loads(line) for line in (GOLDENS / "old_run" / "whole.jsonl").open()]
    ours = rows(tmp_path / "run")
    assert [(r["split"], r["step"], r["lr"]) for r in ours] == [
        (r["split"], r["step"], r["lr"]) for r in whole
    ]
    # The rest of the second epoch depends on weights, momentum, statistics and sums. Rounding differs between CPUs.
    assert ours[2]["loss"] == pytest.approx(whole[2]["loss"], rel=1e-4)
    assert ours[2]["top1"] == pytest.approx(whole[2]["top1"])


@pytest.mark.mpi
def test_restarting_a_finished_run_changes_nothing(folders, unbroken, mpirun):
    folder = unbroken[0]
    before = (folder / "checkpoint-3.pth.tar").read_bytes()
    again = mpirun(2, SCRIPT, *flags(folders, folder.parent))
    assert again.returncode == 0
    assert "finished: val top1" in again.stdout
    assert (folder / "checkpoint-3.pth.tar").read_bytes() == before
    assert len(rows(folder)) == 6


@pytest.mark.mpi
def test_one_rank_without_mpirun_sees_the_same_samples(folders, unbroken, tmp_path):
    """Every split gives the same update, up to float32 rounding that small BatchNorm statistics amplify."""
    done = run(sys.executable, SCRIPT, *flags(folders, tmp_path))
    assert done.returncode == 0, done.stderr
    assert "1 rank x 4 micro-batches x 4 samples" in done.stdout
    alone, together = rows(tmp_path / "run")[0], rows(unbroken[0])[0]
    assert alone["loss"] == pytest.approx(together["loss"], rel=1e-4)
    assert alone["top1"] == pytest.approx(together["top1"])


@pytest.mark.mpi
def test_a_run_works_with_more_ranks_than_samples_in_the_last_step(folders, tmp_path, mpirun):
    """The single sample of the last step goes to one rank, and the last validation images to some ranks."""
    done = mpirun(
        3,
        SCRIPT,
        *flags(folders, tmp_path),
        "--effective-batch-size",
        "12",
        "--epochs",
        "1",
    )
    assert done.returncode == 0, done.stderr
    assert [r["split"] for r in rows(tmp_path / "run")] == ["train", "val"]


ASKED_TO_STOP = ROOT / "tests" / "ranks" / "asked_to_stop.py"


@pytest.mark.mpi
def test_a_run_that_is_asked_to_stop_saves_and_can_be_resumed(folders, unbroken, tmp_path, ranks):
    """The signal is sent to the last rank and not to the root."""
    job = start_job(folders, tmp_path, ASKED_TO_STOP, ranks=ranks)
    output = job.communicate(timeout=100)[0].decode()
    assert ranks.code(job.returncode, output) == 75, output
    assert output.count("stopped on request") == 1
    assert "saved after step 5 of 9; run the same command to resume" in output, output
    assert "error" not in ranks.by_the_ranks(output)
    assert "MPI_ABORT" not in output
    assert summary_of(tmp_path / "run")["state"] == "stopped"

    again = ranks(2, SCRIPT, *flags(folders, tmp_path))
    assert again.returncode == 0, again.stderr
    same_end(tmp_path / "run", unbroken[0])


SLOW_VALIDATION = ROOT / "tests" / "ranks" / "slow_validation.py"


@pytest.mark.mpi
@pytest.mark.parametrize(("engine", "rank"), [("horovod", 0), ("horovod", 1), ("torch", 1)])
def test_a_run_stopped_in_the_validation_ends_at_once_and_validates_when_resumed(
    folders, unbroken, tmp_path, engine, rank
):
    """The validation of the first epoch takes a minute. The signal arrives in its first seconds."""
    ranks = ranks_of(engine)
    job = start_job(folders, tmp_path, SLOW_VALIDATION, tmp_path / "begun", ranks=ranks)
    wait_for(tmp_path / "begun", job)
    began = time.monotonic()
    os.kill(int((tmp_path / "begun").read_text().split()[rank]), signal.SIGUSR1)
    output = job.communicate(timeout=60)[0].decode()
    assert ranks.code(job.returncode, output) == 75, output
    assert time.monotonic() - began < 15
    assert output.count("stopped on request") == 1
    assert "step 3 is saved" in output
    assert rows(tmp_path / "run")[-1]["split"] == "train", (
        "an incomplete validation must not add a row"
    )

    again = ranks(2, SCRIPT, *flags(folders, tmp_path))
    assert again.returncode == 0, again.stderr
    same_end(tmp_path / "run", unbroken[0])


def test_ctrl_c_saves_and_stops_a_run_with_workers(folders, tmp_path):
    """In a terminal it reaches the whole process group: the workers must not die of it."""
    # Without a validation after the first epoch, no worker is just being started when the signal arrives. Python's
    # server of workers would print a traceback of its own about that worker.
    more = ("--workers", "2", "--val-every", "5")
    command = [sys.executable, SCRIPT, *long_flags(folders, tmp_path, *more)]
    job = subprocess.Popen(
        [*HEARING_SIGNALS, *map(str, command)], cwd=ROOT, env=environment(), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_for(tmp_path / "run" / "checkpoint-1.pth.tar", job)
    os.killpg(job.pid, signal.SIGINT)
    output = job.communicate(timeout=60)[0].decode()
    assert job.returncode == 75, output
    assert "stopped on request (SIGINT): " in output
    assert "Traceback" not in output
    again = run(sys.executable, SCRIPT, *long_flags(folders, tmp_path, "--val-every", "5"))
    assert again.returncode == 0, again.stderr
    assert "resuming after" in again.stdout


@pytest.mark.mpi
def test_an_error_in_the_validation_costs_no_training(folders, unbroken, tmp_path, mpirun):
    images = tmp_path / "images"
    shutil.copytree(folders, images)
    file = images / "val" / "n00000001" / "2.JPEG"
    intact = file.read_bytes()
    file.write_bytes(intact[:200])
    failed = mpirun(2, SCRIPT, *flags(images, tmp_path))
    assert failed.returncode == 3, failed.stdout + failed.stderr
    assert {path.name for path in (tmp_path / "run").glob("*.tar")} == {"checkpoint-1.pth.tar"}
    file.write_bytes(intact)
    again = mpirun(2, SCRIPT, *flags(images, tmp_path))
    assert again.returncode == 0, again.stderr
    same_end(tmp_path / "run", unbroken[0])


@pytest.mark.mpi
def test_a_complete_validation_is_not_repeated(folders, unbroken, tmp_path, mpirun):
    """The job is killed after its row is written, but before the next checkpoint and the point of the curves."""
    shutil.copytree(unbroken[0], tmp_path / "run")
    folder = tmp_path / "run"
    for path in (
        folder / "checkpoint-3.pth.tar",
        *folder.glob("events*"),
        folder / "best.safetensors",
    ):
        path.unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    marked = lines[3].replace('"seconds": ', '"seconds": 1000')
    assert '"epoch": 2' in marked
    (folder / "metrics.jsonl").write_text("".join([*lines[:3], marked, lines[4][:50]]))
    again = mpirun(2, SCRIPT, *flags(folders, tmp_path))
    assert again.returncode == 0, again.stderr
    assert rows(folder)[3]["seconds"] >= 1000
    assert len(rows(folder)) == 6
    drawn, whole = scalars(folder), scalars(unbroken[0])
    for tag, points in whole.items():
        assert drawn[tag] == [point for point in points if point[0] >= 6], tag


@pytest.mark.mpi
def test_results_without_checkpoints_are_not_overwritten(folders, unbroken, tmp_path, refused):
    shutil.copytree(unbroken[0], tmp_path / "run")
    for path in (tmp_path / "run").glob("*.tar"):
        path.unlink()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    message = refused(tmp_path, code=2)
    assert "--run-name" in message
    assert "holds the results of 3 epochs but no checkpoint" in message
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.mpi
def test_a_finished_run_is_trained_longer_in_a_branch(folders, unbroken, tmp_path, mpirun):
    newest = unbroken[0] / "checkpoint-3.pth.tar"
    more = ["--epochs", "5", "--run-name", "longer", "--base-lr", "0.05"]
    done = mpirun(2, SCRIPT, *flags(folders, tmp_path), *more, "--branch", newest)
    assert done.returncode == 0, done.stderr
    assert "after step 9: " in done.stdout
    assert "epochs 3 -> 5" in done.stdout
    assert "base_lr 0.1 -> 0.05" in done.stdout
    recorded = rows(tmp_path / "longer")
    assert without_times(recorded[:6]) == without_times(rows(unbroken[0]))
    assert [row["epoch"] for row in recorded[6:]] == [4, 4, 5, 5]
    config = json.loads((tmp_path / "longer" / "config.json").read_text())
    assert config["branch"]["changed"]["epochs"] == [3, 5]
    again = mpirun(2, SCRIPT, *flags(folders, tmp_path), *more, "--branch", newest)
    assert again.returncode == 0, again.stderr
    assert "finished: val" in again.stdout
    assert rows(tmp_path / "longer") == recorded


@pytest.mark.mpi
def test_network_and_moving_average_are_validated_and_the_better_is_exported(folders, tmp_path):
    more = ["--ema-decay", "0.9999", "--val-every", "2"]
    done = run(sys.executable, SCRIPT, *flags(folders, tmp_path), *more)
    assert done.returncode == 0, done.stderr
    recorded = [(row["split"], row["epoch"]) for row in rows(tmp_path / "run")]
    assert recorded == [
        ("train", 1), ("train", 2), ("val", 2), ("val_ema", 2), ("train", 3), ("val", 3), ("val_ema", 3),
    ]  # fmt: skip
    last = {row["split"]: row for row in rows(tmp_path / "run")[-2:]}
    better = max(last.values(), key=lambda row: row["top1"])
    with safetensors.safe_open(tmp_path / "run" / "model.safetensors", "pt") as file:
        description = json.loads(file.metadata()["description"])
    described = description["validation"]
    assert description["classes"] == [f"n{i:08}" for i in range(CLASSES)]
    assert (described["split"], described["top1"]) == (better["split"], better["top1"])
    best = safetensors.torch.load_file(tmp_path / "run" / "best.safetensors")
    assert best.keys() == safetensors.torch.load_file(tmp_path / "run" / "model.safetensors").keys()


@pytest.mark.mpi
def test_checkpoints_within_epochs_change_nothing(folders, unbroken, tmp_path, mpirun):
    more = ["--checkpoint-steps", "2", "--checkpoint-minutes", "0"]
    done = mpirun(2, SCRIPT, *flags(folders, tmp_path), *more)
    assert done.returncode == 0, done.stderr
    places = {path.name for path in (tmp_path / "run").glob("*.tar")}
    assert places >= {f"checkpoint-{place}.pth.tar" for place in ("2+1", "2+2", "3")}
    same_end(tmp_path / "run", unbroken[0])


@pytest.mark.mpi
def test_a_run_with_every_option_resumes_exactly(folders, tmp_path, mpirun):
    """Mixed precision, half-precision exchange, clipping, a moving average, a LARS variant, a decoding process."""
    more = [
        "--amp", "bf16", "--fp16-allreduce", "--clip-grad-norm", "1", "--ema-decay", "0.9", "--lars-form", "mlperf",
        "--trust-coefficient", "0.01", "--lr-schedule", "cosine", "--workers", "1",
    ]  # fmt: skip
    whole = mpirun(2, SCRIPT, *flags(folders, tmp_path / "whole"), *more)
    assert whole.returncode == 0, whole.stderr
    first = mpirun(2, SCRIPT, *flags(folders, tmp_path / "parts"), *more, "--max-steps", "5")
    assert first.returncode == 0, first.stderr
    second = mpirun(2, SCRIPT, *flags(folders, tmp_path / "parts"), *more)
    assert second.returncode == 0, second.stderr
    same_end(tmp_path / "parts" / "run", tmp_path / "whole" / "run")
    saved = checkpoint.load(tmp_path / "whole" / "run" / "checkpoint-3.pth.tar")["learner"]
    assert saved["average"]["n_averaged"] == 9
    *scales, notices = saved["gradients"]["scales"]
    assert all(scales)
    assert notices is None


@pytest.mark.mpi
def test_a_run_resumed_on_fewer_ranks_sees_the_rest_of_the_epoch(folders, tmp_path, mpirun):
    """4 ranks start without accumulation, and 2 ranks resume with it. The losses equal those of 2 ranks throughout.

    The network has dropout but no BatchNorm, which would amplify rounding errors on few samples.
    """
    net = ["--model", "squeezenet1_1"]
    command = [
        *without(without(flags(folders, tmp_path), "--effective-batch-size"), "--run-name"),
        *net,
    ]
    begun = mpirun(4, SCRIPT, *command, "--max-steps", "4")
    assert begun.returncode == 0, begun.stderr
    assert "16 = 4 ranks x 1 micro-batch x" in begun.stdout
    went_on = mpirun(2, SCRIPT, *command)
    assert went_on.returncode == 0, went_on.stderr
    assert "16 = 2 ranks x 2 micro-batches" in went_on.stdout
    assert "from 4 ranks to 2; the effective batch stays the same" in went_on.stdout
    whole = mpirun(2, SCRIPT, *flags(folders, tmp_path / "whole"), *net)
    assert whole.returncode == 0, whole.stderr
    ours = tmp_path / "squeezenet1_1_lars_bs4x1_lr0.1_wd5e-05_ep3_seed42"
    for one, two in zip(rows(ours), rows(tmp_path / "whole" / "run"), strict=True):
        assert one["step"] == two["step"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


def without(flags: list[str], name: str) -> list[str]:
    place = flags.index(name)
    return flags[:place] + flags[place + 2 :]


@pytest.fixture(scope="session")
def records(folders, tmp_path_factory):
    """The same images as TFRecords."""
    made = tmp_path_factory.mktemp("records") / "tfrecords"
    tool = [
        sys.executable,
        "-m",
        "data.make_tfrecords",
        "--data-dir",
        made,
        "--images-per-shard",
        "7",
        "--workers",
        "1",
    ]
    done = run(*tool, "--train-dir", folders / "train", "--val-dir", folders / "val")
    assert done.returncode == 0, done.stderr
    return made


@pytest.mark.mpi
@pytest.mark.parametrize("source", ["records", "dali-tfrecord", "dali-folder"])
def test_other_readers_train_and_resume_in_the_same_way(
    folders, records, unbroken, tmp_path, mpirun, source
):
    """They take the same steps with the same plan. A run stopped within an epoch resumes to the same bytes."""
    if source != "records":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed: ./launch/setup.sh --dali")
    script, more = {
        "records": (SCRIPT, ["--records", records]),
        "dali-tfrecord": (DALI_SCRIPT, ["--data-dir", records]),
        "dali-folder": (DALI_SCRIPT, ["--reader", "folder"]),
    }[source]
    # Records do not use the first four words: --train-dir and --val-dir with their values.
    whole, parts = (
        flags(folders, tmp_path / name)[0 if source == "dali-folder" else 4 :]
        for name in ("whole", "parts")
    )
    done = mpirun(2, script, *whole, *more)
    assert done.returncode == 0, done.stderr
    ours, theirs = rows(tmp_path / "whole" / "run"), rows(unbroken[0])
    assert [(r["split"], r["step"], r["lr"]) for r in ours] == [
        (r["split"], r["step"], r["lr"]) for r in theirs
    ]
    if source != "dali-tfrecord":  # the others resume as image folders do
        return
    done = mpirun(2, script, *parts, *more, "--max-steps", "5")
    assert done.returncode == 0, done.stderr
    done = mpirun(2, script, *parts, *more)
    assert done.returncode == 0, done.stderr
    same_end(tmp_path / "parts" / "run", tmp_path / "whole" / "run")


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("policy", "counted", "script"),
    [
        ("error", None, SCRIPT),
        ("skip", 14, SCRIPT),
        ("replace", 14, SCRIPT),
        ("skip", 14, DALI_SCRIPT),
    ],
)
def test_an_image_that_cannot_be_read(folders, tmp_path, mpirun, policy, counted, script):
    more = ["--on-bad-image", policy, "--max-bad-images", "5"]
    if script == DALI_SCRIPT:
        pytest.importorskip("nvidia.dali", reason="DALI is an extra")
        more += ["--reader", "folder"]
    shutil.copytree(folders, tmp_path / "images")
    for split in ("train", "val"):
        file = tmp_path / "images" / split / "n00000001" / "2.JPEG"
        file.write_bytes(file.read_bytes()[:200])
    done = mpirun(2, script, *flags(tmp_path / "images", tmp_path), *more)
    if policy == "error":
        assert done.returncode == 3, done.stdout + done.stderr
        assert done.stderr.count("n00000001/2.JPEG") == 1
        return
    assert done.returncode == 0, done.stderr
    listed = json.loads((tmp_path / "run" / "bad_images.json").read_text())
    assert len(listed) == 2
    assert all("n00000001/2.JPEG" in message for message in listed)
    hits = rows(tmp_path / "run")[-1]["top1"] / 100 * counted
    assert hits == pytest.approx(round(hits), abs=1e-9)


def test_images_may_move_but_not_change_on_resume(folders, tmp_path, refused):
    """The same images in a different folder belong to the same run. Renaming an image changes the run."""
    images = tmp_path / "images"
    shutil.copytree(folders, images)
    at = ["--train-dir", str(images / "train"), "--val-dir", str(images / "val")]
    begun = run(sys.executable, SCRIPT, *flags(folders, tmp_path), "--max-steps", "1")
    assert begun.returncode == 0, begun.stderr
    went_on = run(sys.executable, SCRIPT, *flags(folders, tmp_path), *at, "--max-steps", "2")
    assert went_on.returncode == 0, went_on.stderr
    assert "epoch 1, step 1 (1 of 9 steps)" in went_on.stdout
    file = images / "train" / "n00000001" / "2.JPEG"
    file.rename(file.with_name("20.JPEG"))
    assert "fingerprint of the images' names" in refused(tmp_path, *at, code=2)


@pytest.mark.mpi
def test_a_run_that_diverges_has_its_own_exit_code(folders, tmp_path, mpirun):
    more = [
        "--base-op",
        "sgd",
        "--base-lr",
        "1e38",
        "--warmup-epochs",
        "0",
        "--max-skipped-steps",
        "2",
    ]
    done = mpirun(2, SCRIPT, *flags(folders, tmp_path), *more)
    assert done.returncode == 5, done.stdout + done.stderr
    assert done.stderr.count("2 steps in a row were not finite") == 1
    assert "--base-lr" in done.stderr
    assert not list((tmp_path / "run").glob("*.tar"))
    summary = summary_of(tmp_path / "run")
    assert (summary["state"], summary["skipped"]) == ("diverged", 2)


def test_training_tolerates_a_full_disk_for_a_while(folders, tmp_path):
    """Files are limited to a megabyte. Checkpoints are larger, and the metrics are smaller."""
    limited = ["bash", "-c", 'trap "" XFSZ; ulimit -f 1024; exec "$@"', "bash"]
    done = run(
        *limited, sys.executable, SCRIPT, *flags(folders, tmp_path), "--checkpoint-steps", "1"
    )
    assert done.returncode == 4, done.stdout + done.stderr
    assert done.stdout.count("could not be written") == 2
    assert "(3 in a row)" in done.stderr
    assert not list((tmp_path / "run").glob("*tar*"))
    stopped = run(*limited, sys.executable, SCRIPT, *flags(folders, tmp_path), "--max-steps", "1")
    assert stopped.returncode == 4, "a job whose last checkpoint cannot be written has failed"
    assert "(1 in a row)" in stopped.stderr


def test_after_a_full_disk_at_the_end_the_same_command_writes_the_weights(folders, tmp_path):
    train = [sys.executable, SCRIPT, *flags(folders, tmp_path, "--epochs", "1")]
    assert run(*train).returncode == 0
    exported = tmp_path / "run/model.safetensors"
    weights = exported.read_bytes()
    exported.unlink()
    done = run("bash", "-c", 'trap "" XFSZ; ulimit -f 1024; exec "$@"', "bash", *train)
    assert done.returncode == 4, done.stdout + done.stderr
    assert "model.safetensors could not be written: " in done.stderr
    assert "free some space, and run the same command again" in done.stderr
    assert [path.name for path in exported.parent.glob("model*")] == []
    assert run(*train).returncode == 0
    assert exported.read_bytes() == weights


def test_a_training_that_ends_in_an_error_leaves_no_worker(folders, tmp_path):
    """A worker would keep the output open, so `run` would not return."""
    shutil.copytree(folders, tmp_path / "images")
    file = tmp_path / "images/train/n00000001/2.JPEG"
    file.write_bytes(file.read_bytes()[:200])
    train = [sys.executable, SCRIPT, *flags(tmp_path / "images", tmp_path, "--workers", "2")]
    done = run(*train, timeout=60)
    assert done.returncode == 3, done.stderr
    assert run("pgrep", "-f", f"^{sys.executable} .*{tmp_path}").returncode == 1


@pytest.mark.mpi
def test_ranks_that_were_started_differently_are_refused(folders, tmp_path):
    program = [
        "mpirun",
        "--bind-to",
        "none",
        "--oversubscribe",
    ]
    one = [sys.executable, SCRIPT, *flags(folders, tmp_path)]
    done = run(*program, "-np", "1", *one, ":", "-np", "1", *one, "--wd", "0.5")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "rank 1 has wd = 0.5, but rank 0 has 5e-05" in done.stderr


def start_job(folders: Path, logs: Path, *script: Path, ranks: Ranks) -> subprocess.Popen:
    """Start the run of `flags` on 2 ranks in the background. `script`: a different script and its first arguments."""
    return subprocess.Popen(
        ranks.command(2, *script or [SCRIPT], *flags(folders, logs)),
        env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for(path: Path, job: subprocess.Popen) -> None:
    """Wait until a running job has written `path`."""
    deadline = time.monotonic() + 100
    while not path.exists():
        assert job.poll() is None, job.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def refused(folders, monkeypatch, capsys):
    """``refused(logs, *flags, code=...)`` runs the script in this process and returns its error message."""

    def end(code: int) -> None:
        raise SystemExit(code)

    def call(logs: Path, *more: str, code: int, **variables: str) -> str:
        monkeypatch.setattr(os, "_exit", end)
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags(folders, logs), *more])
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as stop:
            train_imagenet.main()
        output = capsys.readouterr()
        assert stop.value.code == code, output.out + output.err
        assert "Traceback" not in output.err
        return output.err

    return call


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--effective-batch-size", "18"], 2, ["--effective-batch-size 18", "16 or 20"]),
        (["--model", "resnet35"], 2, ["--model resnet35", "resnet34"]),
        (["--base-op", "larz"], 2, ["--base-op", "lars"]),
        (["--train-dir", "/nowhere"], 3, ["--train-dir", "/nowhere"]),
        (["--single-threaded", "--workers", "2"], 2, ["--single-threaded", "--workers"]),
        (["--resume", "/nowhere.pth"], 4, ["--resume /nowhere.pth"]),
        (["--image-size", "0"], 2, ["--image-size"]),
        (["--image-size", "32"], 2, ["--batch-size 4", "leaves one", "--drop-last"]),
    ],
)
def test_wrong_flags_are_refused_before_training(refused, tmp_path, more, code, words):
    message = refused(tmp_path, *more, code=code)
    assert all(word in message for word in words), message
    assert {path.name for path in tmp_path.rglob("*")} <= {"run", ".lock"}


def test_broken_folders_are_refused_with_the_fix(folders, refused, tmp_path):
    flat, fewer, empty = tmp_path / "flat", tmp_path / "fewer", tmp_path / "empty"
    flat.mkdir()
    shutil.copy(folders / "val" / "n00000000" / "0.JPEG", flat / "ILSVRC2012_val_00000001.JPEG")
    shutil.copytree(folders / "val", fewer)
    shutil.rmtree(fewer / "n00000001")
    empty.mkdir()
    for folder in (flat, fewer, empty):
        assert "--val-dir" in refused(tmp_path, "--val-dir", str(folder), code=3)


@pytest.mark.mpi
def test_a_folder_of_a_different_run_is_refused(refused, unbroken):
    message = refused(unbroken[0].parent, "--wd", "0.1", code=2)
    assert "wd was 5e-05 and is 0.1" in message
    message = refused(unbroken[0].parent, "--resume", "never", code=2)
    assert "--resume never" in message


@pytest.mark.mpi
def test_a_damaged_newest_checkpoint_is_skipped(folders, unbroken, tmp_path, mpirun, refused):
    shutil.copytree(unbroken[0], tmp_path / "run")
    newest = tmp_path / "run" / "checkpoint-3.pth.tar"
    newest.write_bytes(newest.read_bytes()[:-100])
    done = mpirun(2, SCRIPT, *flags(folders, tmp_path))
    assert done.returncode == 0, done.stderr
    assert "warning" in done.stdout
    assert "checkpoint-3.pth.tar" in done.stdout
    same_end(tmp_path / "run", unbroken[0])
    for path in (tmp_path / "run").glob("checkpoint-*"):
        path.write_bytes(b"torn")
    assert "none of the 3 checkpoints" in refused(tmp_path, code=4)


def test_several_tasks_that_do_not_see_each_other_are_refused(folders, tmp_path):
    command = [sys.executable, SCRIPT, *flags(folders, tmp_path), "--backend", "horovod"]
    done = run(*command, SLURM_STEP_NUM_TASKS="4")
    assert done.returncode == 2
    assert "srun started 4 tasks" in done.stderr
    assert "--mpi=pmix" in done.stderr


def test_without_horovod_one_rank_trains_and_several_are_refused(folders, tmp_path):
    shadow = tmp_path / "shadow" / "horovod"
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").write_text("raise ImportError('not built')")
    path = f"{shadow.parent}:{ROOT}"
    command = [sys.executable, SCRIPT, *flags(folders, tmp_path)]
    done = run(*command, "--max-steps", "1", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    done = run(*command, PYTHONPATH=path, OMPI_COMM_WORLD_SIZE="2")
    assert done.returncode == 2
    for words in ("mpirun started 2 tasks", "not built", "launch/setup.sh"):
        assert words in done.stderr


def test_a_signal_while_torch_is_loading_stops_the_job(folders, tmp_path):
    job = subprocess.Popen(
        [sys.executable, "-v", str(SCRIPT), *flags(folders, tmp_path)], cwd=ROOT, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert job.stderr is not None
    for line in job.stderr:  # -v prints the imports
        if line.startswith("import 'torch._C'") or line.startswith("import 'torch.version'"):
            job.send_signal(signal.SIGUSR1)
            break
    output = "\n".join(job.communicate(timeout=120))
    assert job.returncode == 75, output[-2000:]
    assert "stopped on request (SIGUSR1): no step was taken" in output
    assert not (tmp_path / "run").exists(), "the job stops before it creates the run folder"
