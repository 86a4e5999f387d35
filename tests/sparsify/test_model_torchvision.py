"""The torchvision obstacle, in processes of their own: the order of imports is what is tested."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_timm_and_clap_import_after_the_shim() -> None:
    done = run(
        "from sparsify._torchvision import ensure_torchvision\n"
        "first, again = ensure_torchvision(), ensure_torchvision()\n"
        "import torchvision\n"
        "from timm.models.swin_transformer_v2 import SwinTransformerV2\n"
        "from transformers import ClapAudioModelWithProjection\n"
        "assert first == again\n"
        "assert first != torchvision.extension._has_ops(), 'declared exactly when the compiled library is missing'\n"
        "print('fine')"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine"


def test_a_torchvision_that_works_is_left_alone(tmp_path) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "_C.so").write_text("")
    done = run(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import torch\n"
        "torch.ops.load_library = lambda path: None\n"
        "from sparsify._torchvision import ensure_torchvision\n"
        "assert ensure_torchvision() is False\n"
        "assert not hasattr(torch.ops.torchvision, 'nms')"
    )
    assert done.returncode == 0, done.stderr


def test_without_torchvision_nothing_is_declared(tmp_path) -> None:
    done = run(
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torchvision' else find(name, *a)\n"
        "from sparsify._torchvision import ensure_torchvision\n"
        "assert ensure_torchvision() is False"
    )
    assert done.returncode == 0, done.stderr
