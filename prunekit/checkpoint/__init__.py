"""Checkpoint folders: read lazily, write atomically, tell their story.

A checkpoint is a Hugging Face folder with config.json and safetensors. Surgery makes a new `Checkpoint` whose tensors
still point at the bytes of the old files (renamed, dropped, or computed), and `write_checkpoint` has the kernel move
them.
"""

from .agreement import Heads, attending, heads, is_tied, layer_numbers
from .atomic import check_out, check_room, finite, new_folder, scratch_folder, write_json
from .card import HISTORY
from .folder import INDEX, fingerprint, open_checkpoint, read_config
from .format import (
    DTYPE_BYTES,
    MAX_HEADER,
    TORCH_DTYPES,
    Checkpoint,
    Outline,
    Tensor,
    float_bytes,
    read_header,
    read_json,
)
from .quantised import quantisation, weights_of
from .records import CHAT_TEMPLATES, append_history, copy_files, history, history_entry, side_files, write_records
from .sizes import BUFFERS, statistics
from .write import write_checkpoint, write_weights

__all__ = [
    "BUFFERS",
    "CHAT_TEMPLATES",
    "DTYPE_BYTES",
    "HISTORY",
    "INDEX",
    "MAX_HEADER",
    "TORCH_DTYPES",
    "Checkpoint",
    "Heads",
    "Outline",
    "Tensor",
    "append_history",
    "attending",
    "check_out",
    "check_room",
    "copy_files",
    "fingerprint",
    "finite",
    "float_bytes",
    "heads",
    "history",
    "history_entry",
    "is_tied",
    "layer_numbers",
    "new_folder",
    "open_checkpoint",
    "quantisation",
    "read_config",
    "read_header",
    "read_json",
    "scratch_folder",
    "side_files",
    "statistics",
    "weights_of",
    "write_checkpoint",
    "write_json",
    "write_records",
    "write_weights",
]
