"""A CPU that behaves like a GPU, for whoever has this folder first on PYTHONPATH (see docs/gpu.md).

vLLM's CPU build packs linear weights, so that none can be loaded again: here they stay as they are, as on GPUs.
New weights go from trainer to rollout server over the TCP store in NCCL's place, and CUDA's synchronize does nothing.
CUDA_VISIBLE_DEVICES says how many devices `swift rollout` finds. DeepSpeed talks by gloo and compiles nothing.
"""

import contextlib
import os
import sys


class StoreCommunicator:
    """vLLM's PyNcclCommunicator, by objects in the TCP store of its process group."""

    def __init__(self, group, device=None):
        import torch

        self.group, self.rank, self.world_size = group, group.rank, group.world_size
        self.device = torch.device("cpu")

    def broadcast(self, tensor, src, stream=None):
        sent = self.group.broadcast_obj(tensor if self.rank == src else None, src)
        if self.rank != src:
            tensor.copy_(sent)


def _unpacked(layers):
    import torch

    def plain(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    layers.dispatch_cpu_unquantized_gemm = plain


def _communicator(pynccl):
    pynccl.PyNcclCommunicator = StoreCommunicator


def _devices(arguments):
    arguments.get_device_count = lambda: len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))


def _no_synchronize(cuda):
    cuda.synchronize = lambda device=None: None


def _any_device(cpu):
    cpu.device = lambda device: contextlib.nullcontext()


def _not_compiled(communication):
    communication.build_shm_op = lambda: None


def _by_gloo(deepspeed):
    if "LOCAL_RANK" in os.environ:  # accelerate does it on GPUs, before ZeRO-3 counts the processes
        deepspeed.init_distributed(dist_backend="gloo")


AFTER_IMPORT = {
    "vllm.model_executor.layers.utils": _unpacked,
    "vllm.distributed.device_communicators.pynccl": _communicator,
    "swift.arguments.deploy_args": _devices,
    "torch.cuda": _no_synchronize,
    "torch.cpu": _any_device,
    "deepspeed.comm.torch": _not_compiled,
    "deepspeed": _by_gloo,
}


class _Patch:
    """Finds nothing itself, but has what others find patched once it is executed."""

    def find_spec(self, name, path=None, target=None):
        if name not in AFTER_IMPORT:
            return None
        change = AFTER_IMPORT[name]
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, specs), None)
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Patch())
