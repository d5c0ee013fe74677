"""What every knockout run on a CPU imports: loaded once in the fork server, so that a run doesn't pay for it."""

import torch  # noqa: F401

from prunekit.model.light import light_transformers

light_transformers()  # before anything imports a class of theirs

import transformers.models.auto.modeling_auto  # noqa: E402, F401
import wandb  # noqa: E402, F401
from swift import sft_main  # noqa: E402, F401
from swift.trainers import Seq2SeqTrainer  # noqa: E402, F401
