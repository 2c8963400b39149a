"""What all sources of scenes share; only one of their modules may need torch."""

import hashlib
import subprocess
import sys

import numpy as np
from helpers import ROOT

from air.data.arrays import sha256


def test_the_hash_is_of_shapes_and_bytes_and_none_is_no_array() -> None:
    rows = np.arange(6, dtype=np.uint8)
    expected = hashlib.sha256(b"(6,)" + bytes(range(6)) + b"(2, 3)" + bytes(range(6))).hexdigest()
    assert sha256([rows, None, rows.reshape(2, 3)]) == expected
    assert len({sha256([rows]), sha256([rows[:5]]), sha256([rows.reshape(2, 3)])}) == 3


def test_only_streaming_needs_torch() -> None:
    code = """import sys, pkgutil, importlib, air.data
sys.modules["torch"] = sys.modules["pyro"] = None
names = {module.name for module in pkgutil.iter_modules(air.data.__path__)}
for name in names - {"streaming"}:
    importlib.import_module(f"air.data.{name}")
print(len(names))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 7
