"""Train a model without some of its layers: they are cut from it in memory, and no checkpoint is written for that.

    PRUNEKIT_REMOVE='text:3,7-9 vision:2' swift sft --external_plugins plugins/knockout_layers.py \\
        --callbacks knockout_layers ...

Numbers are those of the checkpoint that --model names, and DeepStack taps move as manual_select.py moves them. The cut
falls between ms-swift's preparing of the model and the Trainer's: flags that name layers (--freeze_parameters, ...)
mean those of the whole model; the optimizer, gradient checkpointing, DDP and DeepSpeed only see what is left.
A LoRA on the layers removed goes with them.
"""

from swift.callbacks import callbacks_map

from prunekit.knockout.callback import KnockoutLayers

callbacks_map["knockout_layers"] = KnockoutLayers
