"""What this machine and installation are: for `couplings doctor` and for the foot of every report."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re

import torch

import couplings_experiments
from couplings.ordering import isotonic_compiled
from couplings_experiments.errors import UserError

_PACKAGES = (
    "torch",
    "numpy",
    "scikit-learn",
    "scikit-image",
    "num2words",
    "sacrebleu",
    "safetensors",
    "matplotlib",
)

_LIBRARIES = {
    "BLAS_INFO=mkl": "MKL",
    "BLAS_INFO=accelerate": "Accelerate",
    "BLAS_INFO=open": "OpenBLAS",
    "USE_MKLDNN=(ON|1)": "oneDNN",
}


def describe() -> dict[str, str]:
    """Versions, processor, devices and kernels, as text."""
    return {
        "couplings": version("couplings") or "not installed",
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        **{name: found for name in _PACKAGES if (found := version(name))},
        "System": f"{platform.system()} {platform.release()} {platform.machine()}",
        "Processor": f"{_processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "Linear algebra": linear_algebra(),
        "Threads": f"{torch.get_num_threads()} within an operation, {torch.get_num_interop_threads()} between",
        "Devices": ", ".join(devices()),
        "Kernels": kernels(),
        "Pooling": isotonic_compiled.status(),
    }


def linear_algebra() -> str:
    """What torch multiplies matrices with on the CPU."""
    built = torch.__config__.show()
    found = [name for pattern, name in _LIBRARIES.items() if re.search(pattern, built)]
    named = re.search(r"BLAS_INFO=(\w+)", built)
    if named and named[1] not in ("mkl", "accelerate", "open"):  # as the build calls them
        found.append(named[1])
    return ", ".join(found) or "not named by this build of torch"


def memory() -> int | None:
    """Bytes of memory that can still be had, or None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            found = re.search(r"MemAvailable:\s*(\d+) kB", file.read())
        return found and int(found[1]) * 1024
    except OSError:
        return None


def devices() -> list[str]:
    """Every device that --device accepts here."""
    cards = range(torch.cuda.device_count())
    found = ["cpu", *(f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in cards)]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def check_device(name: str) -> None:
    """Raise a `UserError` unless tensors can be made on ``name``."""
    try:
        torch.zeros(1, device=torch.device(name))
    except (RuntimeError, AssertionError, ValueError):  # torch raises any of these, by device
        raise UserError(f"--device {name} is not available. Here there is: {', '.join(devices())}.") from None


def kernels() -> str:
    """Which implementation the operators use."""
    try:
        shipped = importlib.util.find_spec("couplings.kernels.triton") is not None
    except ModuleNotFoundError:
        shipped = False
    if not shipped:
        return "plain torch on every device (this version ships no GPU kernels)"
    if not torch.cuda.is_available():
        return "plain torch on the CPU; Triton kernels are there but no CUDA device is"
    if importlib.util.find_spec("triton") is None:
        return "plain torch: Triton kernels and a CUDA device are there, the triton package is not (pip install triton)"
    return "Triton on CUDA tensors, plain torch elsewhere"


def version(distribution: str) -> str | None:
    """The installed version of ``distribution``, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing_extras() -> dict[str, list[str]]:
    """For every extra of couplings, the packages that are not installed."""
    missing: dict[str, list[str]] = {}
    try:
        required = importlib.metadata.requires("couplings") or []
    except importlib.metadata.PackageNotFoundError:
        return missing
    for line in required:
        extra = re.search(r"""extra\s*==\s*["']([\w-]+)["']""", line)
        bound = re.search(r"""python_version\s*>=\s*["']3\.(\d+)["']""", line)
        applies = bound is None or int(platform.python_version_tuple()[1]) >= int(bound.group(1))
        name = re.match(r"[\w.-]+", line)
        if extra and name and applies:
            packages = missing.setdefault(extra.group(1), [])
            if version(name.group()) is None:
                packages.append(name.group())
    return missing


def place() -> str:
    """Where the package lies."""
    return os.path.dirname(couplings_experiments.__file__)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            found = re.search(r"model name\s*:\s*(.+)", file.read())
            if found:
                return found.group(1).strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
