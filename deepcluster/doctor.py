"""What this machine offers and what is missing: for ``deepcluster doctor`` and RUN/env.json.

Nothing heavy is imported before it is asked about, so that a broken installation can still be described.
"""

import importlib
import os
import platform
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "faiss", "numpy", "scipy", "sklearn", "pyarrow", "PIL", "safetensors")
EXTRAS = {  # as in setup.py; a test compares them
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "timm": ("timm",),
    "notebooks": ("nbformat", "nbclient", "nbconvert", "ipykernel", "matplotlib"),
    "bench": ("clustpy", "umap-learn", "kornia", "lightly"),
}


def cache_dir() -> Path:
    """Where decoded images are kept: $DEEPCLUSTER_CACHE, else deepcluster/ in $XDG_CACHE_HOME or in ~/.cache."""
    if own := os.environ.get("DEEPCLUSTER_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "deepcluster"


def cpu_bf16() -> bool:
    """Whether this processor multiplies bfloat16 natively (avx512_bf16, amx_bf16, Arm's bf16) and so trains faster."""
    import torch

    if getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() or getattr(torch.cpu, "_is_amx_tile_supported", bool)():
        return True
    info = _text("/proc/cpuinfo").split()
    return any(flag in info for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def free_memory() -> int | None:
    """Bytes of memory this process may still take: the system's or its container's, the smaller; None if unknown."""
    fields = dict(line.split(":", 1) for line in _text("/proc/meminfo").splitlines() if ":" in line)
    limits = [int(fields["MemAvailable"].split()[0]) * 1024] if "MemAvailable" in fields else []
    ceiling, used = _text("/sys/fs/cgroup/memory.max").strip(), _text("/sys/fs/cgroup/memory.current").strip()
    if ceiling.isdigit() and used.isdigit():
        limits.append(max(int(ceiling) - int(used), 0))
    return min(limits, default=None)


def peak_memory() -> int | None:
    """Bytes this process had in memory at most, so far; None if unknown (outside Linux)."""
    fields = dict(line.split(":", 1) for line in _text("/proc/self/status").splitlines() if ":" in line)
    return int(fields["VmHWM"].split()[0]) * 1024 if "VmHWM" in fields else None


def cpu_count() -> int:
    """Processors this process may run on, at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def packages() -> dict[str, str]:
    """The version of every package needed, or why it cannot be imported and what to do about it."""
    return {name: _version(name) for name in PACKAGES}


def devices() -> list[dict[str, object]]:
    """One entry a device, best first: kind, name, and on CUDA free and total memory in bytes."""
    try:
        import torch
    except Exception:  # said by packages()
        return []
    found: list[dict[str, object]] = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        found.append({"kind": f"cuda:{i}", "name": torch.cuda.get_device_name(i), "free": free, "total": total})
    if torch.backends.mps.is_available():
        found.append({"kind": "mps", "name": platform.processor() or "Apple GPU"})
    return [*found, {"kind": "cpu", "name": _cpu_name(), "bf16": cpu_bf16(), "threads": torch.get_num_threads()}]


def revision() -> str | None:
    """Git commit of this checkout, with "-dirty" if files differ from it; None if installed without git."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # site-packages inside somebody's own repository is not our checkout
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def environment() -> dict[str, Any]:
    """What a run was made with, fit for JSON: RUN/env.json."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {"deepcluster": _own_version(), **packages()},
        "devices": devices(),
        "cpus": cpu_count(),
        "command": list(sys.argv),
        "git": revision(),
    }


def report() -> dict[str, object]:
    """``environment()`` and what else decides whether a run will go well here.

    free_memory, free_disk and cache_bytes are in bytes; missing maps an extra to its packages that are not installed.
    """
    cache = cache_dir()
    missing = {extra: [name for name in names if not _installed(name)] for extra, names in EXTRAS.items()}
    return {
        **environment(),
        "free_memory": free_memory(),
        "free_disk": shutil.disk_usage(Path.cwd()).free,
        "cache": str(cache),
        "cache_bytes": sum(f.stat().st_size for f in cache.rglob("*") if f.is_file()) if cache.is_dir() else 0,
        "missing": {extra: names for extra, names in missing.items() if names},
    }


def lines() -> list[str]:
    """The report for a reader, one fact a line."""
    facts: dict[str, Any] = report()
    out = [f"python       {facts['python']} on {facts['platform']}"]
    out += [f"{name:12} {number}" for name, number in facts["packages"].items()]
    for device in facts["devices"]:
        memory = f", {_size(device['free'])} of {_size(device['total'])} free" if "total" in device else ""
        bf16 = f", bf16 {'yes' if device['bf16'] else 'no'}, {device['threads']} thread(s)" if "bf16" in device else ""
        out.append(f"{device['kind']:12} {device['name']}{memory}{bf16}")
    out += [
        f"cpus         {facts['cpus']}",
        f"memory       {_size(facts['free_memory'])} free",
        f"disk         {_size(facts['free_disk'])} free here",
        f"cache        {facts['cache']} ({_size(facts['cache_bytes'])})",
        f"git          {facts['git'] or 'no revision'}",
    ]
    optional = [f"optional     {extra}: pip install {' '.join(names)}" for extra, names in facts["missing"].items()]
    return out + (optional or ["optional     nothing is missing"])


def _version(name: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # faiss's wrapper warns on newer Pythons
            module = importlib.import_module(name)
    except Exception as error:  # a broken binary raises anything: OSError, RuntimeError, ...
        fix = f"pip install {_distribution(name)}"
        if name == "torchvision" and _installed(name):
            fix = "torch and torchvision do not match: pip install --upgrade --force-reinstall torch torchvision"
        return f"cannot be imported ({str(error).splitlines()[0] if str(error) else type(error).__name__}); {fix}"
    number = str(getattr(module, "__version__", None) or version(_distribution(name)))
    return f"{number} ({'gpu' if hasattr(module, 'StandardGpuResources') else 'cpu'})" if name == "faiss" else number


def _distribution(name: str) -> str:
    return {"faiss": "faiss-cpu", "sklearn": "scikit-learn", "PIL": "pillow"}.get(name, name)


def _installed(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False


def _own_version() -> str:
    from deepcluster import __version__

    return __version__


def _cpu_name() -> str:
    models = [
        line.split(":", 1)[1].strip() for line in _text("/proc/cpuinfo").splitlines() if line.startswith("model name")
    ]
    return models[0] if models else platform.processor() or platform.machine()


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _size(n: int | None) -> str:
    if n is None:
        return "unknown"
    power = next((p for p in (40, 30, 20, 10) if n >= 2**p), 0)
    return f"{n / 2**power:.1f} {dict(zip((0, 10, 20, 30, 40), ('B', 'KiB', 'MiB', 'GiB', 'TiB'), strict=True))[power]}"
