"""Does CUDA work in this environment? One line for each GPU, or the reason why not and exit code 1.

    .venv/bin/python lib/check_cuda.py

DeepSpeed's CPU optimizer (zero2_offload, zero3_offload) is compiled here, once: a training that was killed while it
compiled would leave a lock, on which every later one waits for ever. And the kernel of flash attention is fetched from
the hub, if it can be reached.
"""

import importlib.util
import sys

import torch

from prunekit.training.stale_locks import remove_stale_locks


def build_offload() -> None:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(1))])


def fetch_flash_attention() -> None:
    """Have transformers put its kernel for this torch and GPU into the hub's cache."""
    from transformers.integrations.hub_kernels import load_and_register_attn_kernel
    from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK

    load_and_register_attn_kernel(FLASH_ATTN_KERNEL_FALLBACK["flash_attention_2"])


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU that it can use")
    for number in range(torch.cuda.device_count()):
        ones = torch.ones(256, 256, dtype=torch.bfloat16, device=f"cuda:{number}")
        if not torch.equal(ones @ ones, 256 * ones):
            sys.exit(f"GPU {number} multiplies wrongly")
        properties = torch.cuda.get_device_properties(number)
        print(f"setup: GPU {number} {properties.name}, {properties.total_memory / 2**30:.0f} GiB, multiplies")
    remove_stale_locks()
    try:
        build_offload()
    except Exception as error:
        print(f"setup: no zero2_offload and zero3_offload, which need g++, Python.h and CUDA's toolkit: {error!r:.300}")
    if importlib.util.find_spec("flash_attn") is None:
        try:
            fetch_flash_attention()
        except Exception as error:
            print(f"setup: trainings do without flash attention: no flash-attn, no kernel from the hub: {error!r:.300}")


if __name__ == "__main__":
    main()
