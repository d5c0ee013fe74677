"""What is installed here that makes training on GPUs faster: prints names, each of which the launchers have a use for.

    python -m prunekit.speedups

flash_attention_2 is the `flash-attn` package, or the `kernels` package in the range that transformers takes, which
fetches it from the hub at first use (with HF_HUB_OFFLINE=1 it counts only if it is in the cache). liger is
`liger-kernel`. Nothing is imported: that would take seconds.
"""

import importlib.metadata
import importlib.util
import os
from pathlib import Path

FLASH_KERNEL = "models--kernels-community--flash-attn2"  # in the hub's cache


def _version(package: str) -> tuple[int, ...]:
    """Major and minor version of an installed package; (0, 0) if it isn't."""
    try:
        return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return (0, 0)


def _kernel_can_be_had() -> bool:
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("", "0", "false", "no", "off"):
        return True
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return (Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / FLASH_KERNEL).is_dir()


def installed() -> list[str]:
    """Names of what is there: flash_attention_2, liger."""
    found = []
    # transformers 5.16 to 5.19 take kernels 0.17 only (its import_utils.py)
    if importlib.util.find_spec("flash_attn") or (_version("kernels") == (0, 17) and _kernel_can_be_had()):
        found.append("flash_attention_2")
    if importlib.util.find_spec("liger_kernel"):
        found.append("liger")
    return found


if __name__ == "__main__":
    print(*installed())
