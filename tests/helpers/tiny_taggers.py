"""Tiny token classifiers with a tokenizer that splits words into letters, and sentences to train them on."""

import json
import random
from pathlib import Path

import torch
import transformers as hf
from helpers.tiny_models import ENCODER
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

FAMILIES = ["bert", "roberta", "camembert", "distilbert"]
LABELS = {0: "O", 1: "B-LOC", 2: "I-LOC", 3: "B-PER", 4: "I-PER"}
# Flags of ner_run.py
QUICK = ("--report_to", "none", "--disable_tqdm", "true", "--per_device_train_batch_size", 8)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
KINDS = {
    "PER": ["ana", "bo", "cem", "dia"],
    "LOC": ["oslo", "rome", "york", "nice"],
    "": ["is", "in", "at", "and"],
}


def save_tokenizer(folder: Path) -> None:
    """A WordPiece tokenizer of single letters: a word of n letters has n sub-words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special))
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def save_tagger(family: str, folder: Path, layers: int = 3, seed: int = 0) -> Path:
    """A tiny *ForTokenClassification of this family, with its tokenizer, as a checkpoint folder."""
    torch.manual_seed(seed)
    sizes = ENCODER | {"num_hidden_layers": layers, "hidden_dropout_prob": 0.0}
    if family == "distilbert":
        sizes = {"vocab_size": 128, "dim": 32, "hidden_dim": 48, "n_layers": layers, "n_heads": 4, "dropout": 0.0,
                 "max_position_embeddings": 64}  # fmt: skip
    ids = {name: number for number, name in LABELS.items()}
    config = hf.AutoConfig.for_model(family, **sizes, pad_token_id=0, id2label=LABELS, label2id=ids,
                                     initializer_range=0.3)  # fmt: skip
    hf.AutoModelForTokenClassification.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def write_rows(path: Path, count: int = 48, seed: int = 0) -> Path:
    """Sentences in which a word's tag is that of its kind, as JSONL."""
    draw, lines = random.Random(seed), []
    for _ in range(count):
        kinds = draw.choices(list(KINDS), k=draw.randint(3, 8))
        lines.append(
            {
                "tokens": [draw.choice(KINDS[kind]) for kind in kinds],
                "ner_tags": [f"B-{kind}" if kind else "O" for kind in kinds],
            }
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
