"""Let the package index's CUDA build of torchvision import beside a CPU build of torch.

setup.sh copies this file into site-packages and activates it with a `.pth` line, so that every process
of the environment (ms-swift's subprocesses too) has it. torchvision registers fake kernels for two
operators which its CUDA library would have declared; with that library unloadable, the import fails with
`operator torchvision::nms does not exist`. Declaring the two schemas is all that the import needs.
Nothing happens until torchvision is imported, and nothing at all beside a CUDA build of torch.
"""

import sys

_SCHEMAS = ("nms", "qnms")
_library = None


class _DeclareBeforeTorchvision:  # no base class: importing importlib.abc would cost every start of Python 20 ms
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            global _library
            if torch.version.cuda is None:
                _library = torch.library.Library("torchvision", "DEF")
                for op in _SCHEMAS:
                    _library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _DeclareBeforeTorchvision())
