"""LoRA for encoders (arXiv:2106.09685), by peft: small matrices beside the layers' own are trained, then merged.

The head is trained whole, with what lies between the layers and it (a pooler).
"""

from pathlib import Path
from typing import Any

from prunekit.checkpoint import Checkpoint


def linear_layers(model, checkpoint: Checkpoint) -> list[str]:
    """Names of all projections of the model's layers, of attention and MLP."""
    import torch

    within = checkpoint.family.text.within
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and within(f"{name}.weight")
    ]


def head_modules(model) -> list[str]:
    """Names of the modules of a classifier behind its layers that have parameters."""
    names = [f"{prefix}.pooler" for prefix, module in model.named_children() if module is model.base_model]
    names += [name for name, module in model.named_children() if module is not model.base_model]
    modules = dict(model.named_modules())
    return [name for name in names if name in modules and any(True for _ in modules[name].parameters())]


def add_lora(model, checkpoint: Checkpoint, rank: int, alpha: float, dropout: float = 0.05) -> Any:
    """The model with a LoRA beside all its layers' projections, alone trained, with the head; computes the same yet."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=linear_layers(model, checkpoint),
        modules_to_save=head_modules(model),
    )
    return get_peft_model(model, config)


def merge_lora(model, trained: Path, out: Path) -> Path:
    """Write to OUT, as a plain folder, `add_lora`'s model with the adapter that its trainer saved in `trained`."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(model, load_peft_weights(str(trained), device="cpu"))
    model.merge_and_unload().save_pretrained(out)
    return out
