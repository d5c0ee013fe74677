"""What is installed here that makes training on GPUs faster: prints names, each of which the launchers have a use for.

    python -m prunekit.training.speedups checkpoints/pruned

flash_attention_2 is the `flash-attn` package, or the kernel that the `kernels` package (in the range that transformers
takes) has in its cache, where lib/setup.sh puts it: a training that had to fetch it would fail without a network. liger
is `liger-kernel`. padding_free: the rows of this model's batches can be put one behind the other, by flash attention;
layers of linear attention would mix them without `fla` (flash-linear-attention), and ms-swift refuses that in the first
step. Nothing is imported: that would take seconds.
"""

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

from prunekit.checkpoint import read_json
from prunekit.errors import PruneKitError
from prunekit.families import family_of

FLASH_KERNEL = "kernels-community--flash-attn2"  # a folder of the hub's cache, behind its kind


def _version(package: str) -> tuple[int, ...]:
    """Major and minor version of an installed package; (0, 0) if it isn't."""
    try:
        return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return (0, 0)


def _kernel_is_here() -> bool:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cache = os.environ.get("KERNELS_CACHE") or os.environ.get("HF_HUB_CACHE") or home / "hub"
    return any(Path(cache).glob(f"*--{FLASH_KERNEL}/snapshots/*"))


def _attends_linearly(model: str) -> bool:
    """Whether a checkpoint's family has layers of linear attention; False for what is none: others say so."""
    try:
        return bool(family_of(read_json(Path(model) / "config.json")).text.linear)
    except (PruneKitError, AttributeError):
        return False


def installed(model: str = ".") -> list[str]:
    """Names of what is there for training it: flash_attention_2, liger, padding_free."""
    found = []
    # transformers 5.16 to 5.19 take kernels 0.17 only (its import_utils.py)
    if importlib.util.find_spec("flash_attn") or (_version("kernels") == (0, 17) and _kernel_is_here()):
        found.append("flash_attention_2")
    if importlib.util.find_spec("liger_kernel"):
        found.append("liger")
    if importlib.util.find_spec("fla") or not _attends_linearly(model):
        found.append("padding_free")
    return found


if __name__ == "__main__":
    print(*installed(*sys.argv[1:]))
