"""Callbacks of knockouts: ms-swift trains a model from which it has cut layers in memory, and scores groups of rows."""

import gc
import json
import os
from typing import Any

from swift.callbacks.base import TrainerCallback
from swift.dataset import LazyLLMDataset
from swift.pipelines.train import sft
from transformers import Trainer

from prunekit.checkpoint import open_checkpoint
from prunekit.data.encode import as_trained
from prunekit.data.groups import group_of
from prunekit.data.rows import is_text, iterate
from prunekit.errors import PruneKitError
from prunekit.surgery.in_memory import cut

from .removal import parse_removals, plan_without


class KnockoutLayers(TrainerCallback):
    """Cuts the layers that PRUNEKIT_REMOVE names. PruneKitError for a model wrapped by another tuner than LoRA."""

    def on_init_end(self, args, state, control, **kwargs):
        # When a callback is made the Trainer has no model yet; here it has one, and no optimizer for it.
        model = self.trainer.model
        if hasattr(model, "get_base_model"):  # LoRA and other adapters of PEFT
            model = model.get_base_model()
        checkpoint = open_checkpoint(self.trainer.model_info.model_dir)
        plan = plan_without(checkpoint, parse_removals(os.environ.get("PRUNEKIT_REMOVE", "")))
        try:
            cut(model, plan)
        except ValueError as error:  # another tuner has wrapped it
            raise PruneKitError(f"{error}: knock layers out with --tuner_type full or lora") from None
        gc.collect()


def data_set(rows: list[dict[str, Any]], template: Any) -> Any:
    """Rows of a file as ms-swift's trainer evaluates them: texts by what plugins/texts.py has put into its place."""
    if not is_text(rows[0]):
        return LazyLLMDataset([*map(as_trained, rows)], template.encode)
    said = [[{"role": "assistant", "content": row["text"]}] for row in rows]
    encoder = sft.EncodePreprocessor(template=template)
    found = encoder.batched_preprocess({"messages": said}, strict=True, ignore_max_length_error=True)
    return [dict(zip(found, values)) for values in zip(*found.values())]


class GroupScores(TrainerCallback):
    """Logs token_acc and loss of each group of validation rows when a training ends, by ms-swift's own evaluation.

    PRUNEKIT_BY: JSON, the column and the rows' files. W&B has them as eval/GROUP_token_acc and eval/GROUP_loss.
    """

    def on_train_end(self, args, state, control, **kwargs):
        column, *files = json.loads(os.environ["PRUNEKIT_BY"])
        trainer = self.trainer
        groups: dict[str, list[dict[str, Any]]] = {}
        for file in files:
            for _, row in iterate(file):
                groups.setdefault(group_of(row, column), []).append(row)
        args.dataloader_persistent_workers = False  # or the loader that there is serves again, whatever it is to load
        for name, rows in groups.items():
            loader = trainer.get_eval_dataloader(data_set(rows, trainer.template))
            loss = trainer.evaluation_loop(loader, "Evaluation", prediction_loss_only=True).metrics["eval_loss"]
            found = trainer.compute_custom_metrics(trainer.custom_metrics["eval"])
            # ms-swift's own would add the metrics that were just reset
            Trainer.log(trainer, {f"eval_{name}_loss": loss, f"eval_{name}_token_acc": found["token_acc"]})
