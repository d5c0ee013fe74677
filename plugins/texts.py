"""Train on plain texts, rows {"text": ...}, as in pre-training: every launcher loads this where its data are texts.

    swift sft --external_plugins plugins/texts.py --use_chat_template false --loss_scale all \\
        --truncation_strategy split --lazy_tokenize false --max_length 2048 ...

By `--truncation_strategy split` ms-swift 4.6 cuts long texts into pieces of --max_length tokens; it puts short ones
together only by `--packing true`, which needs flash attention. Here texts follow one another, each with its end-of-text
token, and are cut into blocks of exactly --max_length tokens: nothing is padded, on a CPU either. (So a token may see
the end of another text, as in the pre-training of most models.) Evaluations say perplexity, too.
"""

from swift.pipelines.train import sft
from swift.trainers.trainer_factory import TrainerFactory

from prunekit.training.texts import Blocks

sft.EncodePreprocessor = Blocks
TrainerFactory.TRAINER_MAPPING["causal_lm"] = "prunekit.training.texts_trainer.TextsTrainer"
