"""The doctor: true about this machine, and still able to speak where something is broken."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deepcluster
from deepcluster import doctor

ROOT = Path(__file__).resolve().parents[1]


def test_environment_survives_json_and_names_what_ran():
    found = json.loads(json.dumps(doctor.environment()))
    assert found["packages"]["torch"] == torch.__version__
    assert found["packages"]["deepcluster"] == deepcluster.__version__
    assert found["packages"]["faiss"].endswith(("(cpu)", "(gpu)"))
    assert found["command"] == sys.argv
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["devices"][-1]["kind"] == "cpu"
    assert found["devices"][-1]["threads"] == torch.get_num_threads()


def test_report_measures_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path))
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.npy").write_bytes(b"x" * 3000)
    found = doctor.report()
    assert found["cache"] == str(tmp_path)
    assert found["cache_bytes"] == 3000
    assert f"cache        {tmp_path} (2.9 KiB)" in doctor.lines()


def test_cache_dir_obeys_the_environment(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("DEEPCLUSTER_CACHE", "/own")
    assert doctor.cache_dir() == Path("/own")
    monkeypatch.delenv("DEEPCLUSTER_CACHE")
    assert doctor.cache_dir() == Path("/x/deepcluster")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert doctor.cache_dir() == Path.home() / ".cache/deepcluster"


def test_a_torchvision_of_another_torch_is_explained(monkeypatch):
    real = doctor.importlib.import_module

    def broken(name):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist\nmore")
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    said = doctor.packages()["torchvision"]
    assert "operator torchvision::nms does not exist" in said
    assert "torch and torchvision do not match: pip install --upgrade --force-reinstall torch torchvision" in said
    assert "more" not in said


def test_without_torch_the_report_is_still_written(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert doctor.devices() == []
    assert any(
        line.startswith("torch        cannot be imported") and "pip install torch" in line for line in doctor.lines()
    )


def test_missing_extras_come_with_the_command(monkeypatch):
    monkeypatch.setattr(doctor, "_installed", lambda name: name != "timm")
    assert doctor.report()["missing"] == {"timm": ["timm"]}
    assert "optional     timm: pip install timm" in doctor.lines()
    monkeypatch.setattr(doctor, "_installed", lambda name: True)
    assert "optional     nothing is missing" in doctor.lines()


def test_extras_are_those_of_setup_py():
    tree = ast.parse((ROOT / "setup.py").read_text())
    extras = next(n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "EXTRAS")
    listed = {k: tuple(r.split(">")[0] for r in v) for k, v in ast.literal_eval(extras).items() if k != "dev"}
    assert listed == doctor.EXTRAS


def test_memory_is_what_the_system_or_the_container_leaves(monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    8 kB\n", "/sys/fs/cgroup/memory.max": "max\n"}
    monkeypatch.setattr(doctor, "_text", lambda path: files.get(path, ""))
    assert doctor.free_memory() == 8192
    files |= {"/sys/fs/cgroup/memory.max": "5000\n", "/sys/fs/cgroup/memory.current": "1000\n"}
    assert doctor.free_memory() == 4000
    files.clear()
    assert doctor.free_memory() is None
    assert "memory       unknown free" in doctor.lines()


def test_bf16_is_read_from_the_processor(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    for flags, expected in (("fma avx512_bf16", True), ("amx_bf16", True), ("asimd bf16", True), ("avx512f", False)):
        monkeypatch.setattr(doctor, "_text", lambda path, flags=flags: f"flags : {flags}\n")
        assert doctor.cpu_bf16() is expected


@pytest.mark.parametrize("installed", ["checkout", "dirty", "site-packages of another repository"])
def test_revision_is_this_checkouts_or_none(monkeypatch, tmp_path, installed):
    def git(*words):
        env = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", *identity, "-C", tmp_path, *words], env=env, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    package = tmp_path / ("lib/deepcluster" if "site" in installed else "deepcluster")
    package.mkdir(parents=True)
    (package / "doctor.py").write_text("")
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    git("tag", "-a", "v1", "-m", "x")
    if installed == "dirty":
        (package / "doctor.py").write_text("x")
    monkeypatch.setattr(doctor, "__file__", str(package / "doctor.py"))
    head = git("rev-parse", "HEAD")
    assert doctor.revision() == {"checkout": head, "dirty": f"{head}-dirty"}.get(installed)
