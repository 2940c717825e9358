"""What is installed, and how fast this machine computes."""

import os
from pathlib import Path
from typing import Any

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
CORE = ["torch", "numpy", "scipy", "safetensors", "pyarrow", "jinja2", "pillow", "typer", "rich"]
OPTIONAL = {
    "scikit-learn": ("sklearn", "the digits of the demo, scikit-learn models"),
    "transformers": ("transformers", "language models"),
    "matplotlib": ("matplotlib", "figures of studies"),
    "diffusers": ("diffusers", "diffusion models"),
    "sentence-transformers": ("sentence_transformers", "text embeddings"),
    "faiss-cpu": ("faiss", "search in large stores"),
    "qdrant-client": ("qdrant_client", "search beyond one machine"),
    "ray": ("ray", "work on several machines"),
    "fastapi": ("fastapi", "the web service"),
}


def installed(package: str) -> str | None:
    """The version of a package, None where it is missing."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def examine() -> dict[str, Any]:
    """What `doctor` reports."""
    import platform
    from importlib.util import find_spec

    versions = {"forebear": installed("forebear"), "python": platform.python_version()}
    versions |= {package: installed(package) for package in CORE}
    optional = []
    for package, (module, purpose) in OPTIONAL.items():
        found = (installed(package) or "present") if find_spec(module) is not None else None
        remedy = f"pip install {package} ({purpose})"
        optional.append({"name": package, "found": found, "for": purpose, "remedy": remedy})
    images = str(FASHION_MNIST) if FASHION_MNIST.is_dir() else None
    optional.append(
        {
            "name": "Fashion-MNIST",
            "found": images,
            "for": "larger images for the demo: --data fashion-mnist",
            "remedy": "apt install dataset-fashion-mnist (larger images for the demo)",
        }
    )
    return {"versions": versions, "machine": _machine(), "optional": optional}


def _machine() -> dict[str, Any]:
    import torch

    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    bf16 = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "BLAS": "MKL" if torch.backends.mkl.is_available() else "OpenBLAS or other",
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16 products": ", ".join(bf16) or "emulated: slower than float32",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
