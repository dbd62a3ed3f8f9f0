"""An artifact in the cache belongs to the code of its network as well as to its weights."""

import pytest

import edgegen
from edgegen.build import lowering


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("students/networks/unet.py", True),
        ("students/reduce.py", True),
        ("rewrite/pass.py", True),
        ("students/load.py", False),
    ],
)
def test_a_changed_network_is_lowered_again(file, counts, tmp_path, monkeypatch):
    for name in ("students/networks/unet.py", "students/reduce.py", "rewrite/pass.py", "students/load.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    monkeypatch.setattr(edgegen, "__file__", str(tmp_path / "__init__.py"))
    fingerprint = lowering.compiler_fingerprint.__wrapped__
    before = fingerprint()
    assert fingerprint() == before
    (tmp_path / file).write_text("after")
    assert (fingerprint() != before) == counts


def test_another_diffusers_is_another_network(monkeypatch):
    fingerprint = lowering.compiler_fingerprint.__wrapped__
    before = fingerprint()
    monkeypatch.setattr(lowering, "version", lambda name: "0.0.0")
    assert fingerprint() != before
