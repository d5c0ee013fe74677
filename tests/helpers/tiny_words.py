"""Tiny models with tokenizers that were really trained: one of each kind, with a few hundred tokens."""

import json
import random
from pathlib import Path

import transformers as hf
from helpers.tiny_models import VISION, build
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

KINDS = ["bytes", "fallback", "wordpiece", "unigram"]
SPECIAL = {
    "bytes": ["<|end|>", "<|im_start|>", "<|im_end|>", "<|image|>", "<|video|>", "<|see|>", "<|seen|>"],
    "fallback": ["<unk>", "<s>", "</s>"],
    "wordpiece": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    "unigram": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
}
KIND_OF = {"bert": "wordpiece", "distilbert": "wordpiece", "camembert": "unigram", "mistral": "fallback"}
CHAT = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if tools %}{{ 'Call the zq function:' }}{% endif %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def texts(seed: int = 0, rows: int = 60, letters: str = "abdeilnorstu") -> list[str]:
    """Sentences of made-up words, the first far more often than the last."""
    words = random.Random(7)
    known = ["".join(words.choices(letters, k=words.randint(2, 8))) for _ in range(300)]
    known += ["Zürich", "naïve", "東京", "мир"]
    draw = random.Random(seed)
    weights = [1 / (number + 3) for number in range(len(known))]
    return [" ".join(draw.choices(known, weights, k=40)) + "." for _ in range(rows)]


def train(kind: str, size: int = 420) -> Tokenizer:
    """A tokenizer of that kind with about `size` tokens, of `texts`."""
    special = SPECIAL[kind]
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
    elif kind == "fallback":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=[*special, *(f"<0x{n:02X}>" for n in range(256))], show_progress=False
        )
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    tokenizer.train_from_iterator(texts(), trainer)
    if kind == "fallback":  # they are tokens like others: what is added is not split up and never decoded as bytes
        content = json.loads(tokenizer.to_str())
        content["added_tokens"] = [each for each in content["added_tokens"] if not each["content"].startswith("<0x")]
        tokenizer = Tokenizer.from_str(json.dumps(content))
    if kind == "bytes":
        tokenizer.add_special_tokens([AddedToken(each, special=True) for each in special])
        tokenizer.add_tokens([AddedToken("zebra word", normalized=False)])
    if kind == "wordpiece":
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    if kind == "unigram":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    return tokenizer


def save_speaking_and_rows(family: str, folder: Path) -> tuple[Path, Path]:
    """FOLDER/model as `save_speaking` makes it, and FOLDER/rows.jsonl, rows like what it is for."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(1)))
    return save_speaking(family, folder / "model"), file


def save_speaking(family: str, folder: Path, kind: str | None = None, padding: int = 5, **kwargs) -> Path:
    """The tiny model of this family with a trained tokenizer, and `padding` rows more than that has tokens."""
    kind = kind or KIND_OF.get(family, "bytes")
    tokenizer = train(kind)
    number = tokenizer.token_to_id
    model = build(family)
    model.resize_token_embeddings(tokenizer.get_vocab_size() + padding, mean_resizing=False)
    if kind == "bytes":
        model.config.get_text_config().eos_token_id = number("<|im_end|>")
        model.config.get_text_config().bos_token_id = number("<|end|>")
        named = zip(("image_token", "video_token", "vision_start_token", "vision_end_token"), SPECIAL["bytes"][3:])
        for name, token in named if family in VISION else ():
            setattr(model.config, f"{name}_id", number(token))
        if model.can_generate():
            model.generation_config.eos_token_id = [number("<|im_end|>"), number("<|end|>")]
            model.generation_config.bos_token_id = number("<|end|>")
            model.generation_config.pad_token_id = number("<|end|>")
    model.save_pretrained(folder, **kwargs)
    names = {
        "bytes": {"eos_token": "<|im_end|>", "pad_token": "<|end|>", "chat_template": CHAT},
        "fallback": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        "wordpiece": dict(
            zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL["wordpiece"])
        ),
        "unigram": dict(zip(("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"), SPECIAL["unigram"])),
    }[kind]
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder
