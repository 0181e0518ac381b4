"""Compiled code is kept where nobody else can put any, and what is damaged or another's is compiled anew, not run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minibert.kernels import cache
from minibert.kernels.cache import own_folder, read_sealed, sealed

pytestmark = pytest.mark.skipif(os.name != "posix", reason="owners and modes of files are POSIX's")

USE = """
import sys
from pathlib import Path
import numpy as np
Path("kernel.py").write_text('''
from minibert.kernels.cpu.jit import jit, on_compile
@jit
def double(x, start, stop):
    for i in range(start, stop):
        x[i] *= 2
''')
sys.path.insert(0, ".")
import kernel
compiled = []
with kernel.on_compile(compiled.append):
    x = np.arange(3.0)
    kernel.double(x, 0, 3)
assert x.tolist() == [0, 2, 4]
print(len(compiled))
"""


def use_a_kernel(folder: Path, code: str = USE, **options: Any) -> tuple[int, str]:
    """In a process of its own: how many kernels it compiled, and what it said."""
    environment = {**os.environ, "MINIBERT_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout), done.stderr


def test_what_is_damaged_is_compiled_anew_with_a_warning(tmp_path: Path) -> None:
    assert use_a_kernel(tmp_path)[0] == 1
    assert use_a_kernel(tmp_path) == (0, "")
    for ending, change in (
        ("nbi", lambda whole: b""),
        ("nbc", lambda whole: whole[: len(whole) // 2]),
        ("nbc", lambda whole: bytes([*whole[:-1], whole[-1] ^ 1])),
    ):
        (path,) = (path for path in (tmp_path / "cache").rglob(f"*double*.{ending}"))
        path.write_bytes(change(path.read_bytes()))
        compiled, said = use_a_kernel(tmp_path)
        assert compiled == 1
        assert f"{path} is damaged" in said
        assert "Traceback" not in said
    assert use_a_kernel(tmp_path) == (0, "")


def test_folders_are_for_the_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIBERT_CACHE_DIR", str(tmp_path / "cache"))
    before = os.umask(0)
    try:
        folder = own_folder(tmp_path / "cache" / "kernels")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent)] == [0o700, 0o700]
    folder.chmod(0o755)  # as earlier versions made it
    assert own_folder(folder).stat().st_mode & 0o777 == 0o700
    for shared in (folder, folder.parent):
        shared.chmod(0o777)
        with pytest.raises(PermissionError, match=f"others may write into {shared}"):
            own_folder(folder)
        shared.chmod(0o700)


def test_what_is_another_users_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIBERT_CACHE_DIR", str(tmp_path))
    (tmp_path / "file").write_bytes(sealed(b"code"))
    assert read_sealed(tmp_path / "file") == b"code"
    monkeypatch.setattr(cache.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(PermissionError, match="belongs to another user"):
        own_folder(tmp_path / "kernels")
    with pytest.raises(ValueError, match="belongs to another user"):
        read_sealed(tmp_path / "file")


def test_a_shared_folder_is_not_used_and_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    compiled, said = use_a_kernel(tmp_path)
    assert compiled == 1
    assert "others may write" in said
    assert "MINIBERT_CACHE_DIR" in said
    assert not list((tmp_path / "cache").iterdir())


def test_a_full_quota_runs_uncached_with_a_warning(tmp_path: Path) -> None:
    """A limit on the size of files stands for it: a write fails as on a full disk, with another number."""
    full = "import signal, resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + USE.replace(
        "import kernel\n", "import kernel\nresource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))\n", 1
    )
    compiled, said = use_a_kernel(tmp_path, full)
    assert compiled == 1
    assert "is not kept" in said
