"""The documentation: links, flags, paths, the README's size and example, and its figure."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch

from conftest import ROOT, environment

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "launch/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
]

# Programs whose --help names the flags that the pages may use.
PROGRAMS = (
    *("train_imagenet.py", "train_imagenet_dali.py", "experiments/train_small.py"),
    "experiments/barlow_twins.py",
    *(
        f"experiments/train_small.py --dataset {name}"
        for name in ("cifar10", "tiny-imagenet", "mnist", "noise")
    ),
    *(
        f"-m data.{tool}"
        for tool in ("check", "digits", "make_tfrecords", "prepare", "statistics", "synthetic")
    ),
    *(f"launch/{name}.sh" for name in ("mpirun", "quickstart", "setup", "submit")),
    *(f"experiments/{n}.py" for n in ("large_batch_ladder", "tvlars_grid", "lars_forms")),
    *(
        f"-m {name}"
        for name in (
            "launch.acceptance",
            "launch.doctor",
            "lars.history",
            "lars.identify",
            "lars.plot",
            "lars.report",
        )
    ),
    *(
        f"-m benchmarks.{name}"
        for name in (
            "buckets",
            "listing",
            "loader",
            "optimizer",
            "parameter_groups",
            "plot_augmentation",
            "plot_quickstart",
            "scaling",
            "short_side",
            "training",
        )
    ),
    "-m benchmarks",
    "tests/chaos.py",
    "tests/fuzz_data.py",
)

# Flags of other programs that the pages name.
OTHER_PROGRAMS = {
    "apptainer": {"--bind", "--build-arg", "--nv"},
    "docker": {"--build-arg", "--gpus", "--ipc", "--rm"},
    "horovodrun": {"--binding-args"},
    "mlperf_logging.compliance_checker": {"--ruleset", "--usage"},
    "mpirun": {"--allow-run-as-root", "--bind-to"},
    "py-spy": {"--pid"},
    "scancel": {"--batch", "--signal"},
    "sbatch": {"--signal"},
    "srun": {"--cpus-per-task", "--mpi", "--ntasks-per-node"},
    "tensorboard": {"--logdir"},
    "torchrun": {
        *("--local-addr", "--max-restarts", "--nnodes", "--no-python", "--nproc-per-node"),
        "--shutdown-timeout",
        *("--rdzv-backend", "--rdzv-conf", "--rdzv-endpoint", "--rdzv-id", "--standalone"),
    },
}

# Flags and files of the other program in docs/coming-from.md: a command after "# there", and the first cell of a row.
# tests/test_coming_from.py checks them.
THERE = re.compile(r"^# there\n.*?^(?=# here)|^\|[^|\n]+(?=\|)", re.DOTALL | re.MULTILINE)

FOLDERS = ("benchmarks/", "data/", "docs/", "experiments/", "lars/", "launch/", "tests/")

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
CODE = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE_CODE = re.compile(r"`([^`\n]+)`")
MODULE = re.compile(r"-m ((?:benchmarks|data|launch|lars)[\w.]*)")
SOURCE_NAME = re.compile(r"[\w.-]+\.(?:args|c|cff|md|py|sbatch|sh)")


def text_of(page: str) -> str:
    text = (ROOT / page).read_text()
    return THERE.sub("", text) if page == "docs/coming-from.md" else text


def prose_of(page: str) -> str:
    """The text of a page without its code blocks."""
    return CODE.sub("", text_of(page))


@cache
def anchors_of(path: Path) -> set[str]:
    """The anchors that GitHub makes from the headings of a page."""
    found: Counter[str] = Counter()
    anchors = set()
    for heading in re.findall(r"^#+ +(.+)$", CODE.sub("", path.read_text()), re.MULTILINE):
        words = LINK.sub(lambda link: link[0].split("]")[0].strip("!["), heading)
        slug = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
        anchors.add(f"{slug}-{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return anchors


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    broken = []
    for target in LINK.findall(prose_of(page)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors_of(path.resolve())):
            broken.append(target)
    assert not broken, f"{page} links to {broken}"


def test_the_readme_is_short() -> None:
    readme = text_of("README.md")
    assert len(readme.splitlines()) <= 140
    assert len(readme.split()) <= 1200


@pytest.fixture(scope="session")
def known_flags() -> set[str]:
    """All flags that the --help texts of this repository's programs show."""

    def help_of(program: str) -> str:
        words = [ROOT / program] if program.endswith(".sh") else [sys.executable, *program.split()]
        command = [*words, "--help"]
        shown = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
        )
        assert shown.returncode == 0, f"{program} --help: {shown.stderr}"
        return shown.stdout

    with ThreadPoolExecutor(max_workers=2) as pool:
        return {flag for shown in pool.map(help_of, PROGRAMS) for flag in FLAG.findall(shown)}


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page: str, known_flags: set[str]) -> None:
    named = set(FLAG.findall(text_of(page)))
    unknown = named - known_flags - set().union(*OTHER_PROGRAMS.values())
    assert not unknown, f"{page} names flags that no program has: {sorted(unknown)}"


def code_of(page: str) -> Iterator[str]:
    """All code blocks and inline code of a page."""
    yield from CODE.findall(text_of(page))
    yield from INLINE_CODE.findall(prose_of(page))


@cache
def source_names() -> set[str]:
    """The names of the repository's files."""
    hidden = {".git", ".venv", "logs", "build", "dist"}
    files = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return {path.name for path in files if not hidden & set(path.parts)}


def exists(word: str) -> bool:
    """Whether a word of code is an existing file or folder, or does not look like one of this repository."""
    if word.startswith(FOLDERS):
        return any(ROOT.glob(word.rstrip("/")))
    return not SOURCE_NAME.fullmatch(word) or word in source_names()


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    words = {
        word.strip("@,;:()[]\"'").removeprefix("./").removesuffix("...")
        for code in code_of(page)
        for word in re.split(r"[\s=]|<br/>", code)
    }
    missing = sorted(word for word in words if not exists(word))
    assert not missing, f"{page} names files that do not exist: {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_modules_exist(page: str) -> None:
    modules = set(MODULE.findall(text_of(page)))
    missing = sorted(name for name in modules if importlib.util.find_spec(name) is None)
    assert not missing, f"{page} names modules that do not exist: {missing}"


def test_the_example_of_the_readme_trains() -> None:
    (example,) = re.findall(
        r"^```python\n(.*?)^```", text_of("README.md"), re.DOTALL | re.MULTILINE
    )
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    names = {
        "model": model,
        "loss_of": lambda net, images, labels: torch.nn.functional.cross_entropy(
            net(images), labels
        ),
        "loader": [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))] * 3,
        "steps_per_epoch": 3,
    }
    exec(example, names)
    assert not torch.equal(model.weight, before)


def test_the_table_of_the_readme_agrees_with_the_recipes() -> None:
    rows = re.findall(
        r"^\|(.+)\| `(imagenet_lars_\w+\.args)` \|$", text_of("README.md"), re.MULTILINE
    )
    files = {path.name for path in (ROOT / "launch/recipes").glob("imagenet_lars_*.args")}
    assert {name for _, name in rows} == files
    for row, name in rows:
        recipe = text_of(f"launch/recipes/{name}")
        flags = dict(re.findall(r"^(--\S+) (\S+)", recipe, re.MULTILINE))
        effective, micro_batch, lr, warmup, epsilon, top1 = (
            cell.strip() for cell in row.split("|")
        )
        assert flags["--effective-batch-size"] == effective
        assert flags["--batch-size"] == micro_batch
        assert float(flags["--base-lr"]) == pytest.approx(eval(lr.replace("^", "**")))
        assert float(flags["--warmup-epochs"]) == eval(warmup.replace("^", "**"))
        assert float(flags["--epsilon"]) == float(epsilon)
        assert f"{top1} %" in recipe


def test_the_citation_has_the_version_of_the_library() -> None:
    import lars

    (version,) = re.findall(r"^version: (.+)$", text_of("CITATION.cff"), re.MULTILINE)
    assert version == lars.__version__


def test_the_figure_of_the_readme_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for run, top1 in (("digits_lars_1024", (20.0, 90.0)), ("digits_sgd_1024", (10.0, 11.0))):
        (tmp_path / run).mkdir()
        rows = [
            {"split": split, "step": 2 * epoch, "top1": value, "loss": 10 / epoch}
            for epoch, value in enumerate(top1, start=1)
            for split in ("train", "val")
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / run / "metrics.jsonl").write_text(lines)
    picture = tmp_path / "curves.png"
    arguments = ["--logs", tmp_path, "--out", picture]
    command = [sys.executable, "-m", "benchmarks.plot_quickstart", *arguments]
    subprocess.run(command, cwd=ROOT, env=environment(MPLBACKEND="Agg"), check=True, timeout=120)
    assert colours(picture) >= {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)}


def colours(picture: Path) -> set[tuple[int, ...]]:
    from PIL import Image

    with Image.open(picture) as image:
        pixels = image.convert("RGB")
        return {colour for _, colour in pixels.getcolors(maxcolors=1 << 24)}
