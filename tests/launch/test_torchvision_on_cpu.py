"""torchvision's CUDA build can be imported next to a CPU build of torch."""

import shutil
import sys
import textwrap

import pytest
from launch_fixtures import program

from conftest import run
from launch.install import environment
from launch.install.environment import Clone


def test_a_spawned_worker_can_import_torchvision_and_does_not_start_with_torch(tmp_path):
    code = """
        import multiprocessing, sys
        def names(_):
            started = "torch" in sys.modules
            import torchvision.models
            return started, torchvision.models.resnet18.__name__
        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.map(names, [0]))
    """
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(code))
    result = run(sys.executable, script)
    assert result.stdout == "[(False, 'resnet18')]\n", result.stderr


FAKE_TORCHVISION = {
    "__init__": "from . import extension\nfrom . import _meta_registrations\n",
    "_meta_registrations": (
        "import torch\nfor name in ('nms', 'qnms'):\n"
        "    torch.library.register_fake(f'torchvision::{name}')(lambda *a: None)\n"
    ),
}
LOADED = (
    "import torch\nlibrary = torch.library.Library('torchvision', 'DEF')\n"
    "for name in ('nms', 'qnms'):\n"
    "    library.define(name + '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
)


@pytest.mark.parametrize(
    ("extension", "fix", "works"),
    [("", False, False), ("", True, True), (LOADED, True, True)],
)
def test_the_operators_are_declared_only_if_they_are_missing(tmp_path, extension, fix, works):
    package = tmp_path / "torchvision"
    package.mkdir()
    for name, text in (FAKE_TORCHVISION | {"extension": extension}).items():
        (package / f"{name}.py").write_text(text)
    shutil.copy(environment.TORCHVISION_FIX, tmp_path / "the_fix.py")
    code = (
        f"import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'torchvision' not in str(f)]\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n{'import the_fix' if fix else ''}\n"
        "assert 'torch' not in sys.modules\nimport torchvision\n"
    )
    result = run(sys.executable, "-c", code)
    assert (result.returncode == 0) == works, result.stderr
    if not works:
        assert "torchvision::nms does not exist" in result.stderr


@pytest.mark.parametrize("needed", [True, False])
def test_the_fix_is_installed_only_if_it_is_needed(tmp_path, monkeypatch, needed):
    clone = Clone(tmp_path / "a clone")
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.setattr(Clone, "site_packages", lambda clone: site)
    words = "RuntimeError: operator torchvision::nms does not exist" if needed else ""
    program(clone.venv / "bin/python", f"echo '{words}' >&2\n")
    for name in ("torchvision_on_cpu.py", "torchvision_on_cpu.pth"):
        (site / name).write_text("from an earlier torch")
    environment.fix_torchvision(clone)
    found = sorted(path.name for path in site.iterdir())
    assert found == (["torchvision_on_cpu.pth", "torchvision_on_cpu.py"] if needed else [])
    if needed:
        assert (site / "torchvision_on_cpu.pth").read_text() == "import torchvision_on_cpu\n"
