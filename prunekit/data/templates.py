"""Which of ms-swift's chat templates is a checkpoint's own.

ms-swift knows the template of a folder that is named as on the hub (Qwen3-8B), or whose architecture has only one. A
pruned checkpoint of Qwen3, Qwen2 or Llama lies in a folder of any name, and ms-swift gives up on it. Then the template
is chosen that writes a chat as the checkpoint's own chat template does.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from prunekit.checkpoint import Checkpoint
from prunekit.errors import PruneKitError
from prunekit.families import FAMILIES

CHATML = "chatml"  # ms-swift's: what many checkpoints were taught in, whatever their architecture
ALIKE = 0.9  # from there on another template takes the place of an architecture's only one
CHAT = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "It is 5."}]


def _trained_with(folder: Path) -> str | None:
    """The template in the args.json that ms-swift leaves in what it trained."""
    try:
        found = json.loads((folder / "args.json").read_bytes())
    except (OSError, ValueError):
        return None
    return found.get("template") if isinstance(found, dict) else None


def find_template(
    checkpoint: Checkpoint, model_type: str | None = None, adapter: Path | None = None, chat: bool = True
) -> str | None:
    """ms-swift's name of a checkpoint's chat template; None where ms-swift finds it by itself.

    Raises PruneKitError if it can't be told: the checkpoint has no chat template and its architecture several. With
    `chat` False, where texts are trained on and nothing of a chat is written, any will do then.
    """
    model_type = model_type or checkpoint.config["model_type"]
    if model_type in FAMILIES and FAMILIES[model_type].one_template:
        return None
    for folder in filter(None, (adapter, checkpoint.path)):
        if found := _trained_with(folder):
            return found
    os.environ.setdefault("LOG_LEVEL", "ERROR")  # ms-swift's own
    from rapidfuzz.distance import Levenshtein
    from swift import get_template
    from swift.model import MODEL_MAPPING, get_matched_model_meta

    found_by_name = get_matched_model_meta(str(checkpoint.path))
    meta = MODEL_MAPPING.get(model_type)
    if meta is None or found_by_name and found_by_name.model_type == model_type and found_by_name.template:
        return None
    # ms-swift has a template of Llama 2's alone for Mistral, and Hermes and Dolphin write as ChatML
    only = meta.template or (meta.candidate_templates[0] if len(meta.candidate_templates) == 1 else None)
    names = list(dict.fromkeys([*([only] if only else meta.candidate_templates), CHATML]))
    choose = f"choose one of {', '.join(names)} or default (TEMPLATE=, --template)"
    processor = load_processor(checkpoint, model_type)
    tokenizer = getattr(processor, "tokenizer", processor)
    if not (processor.chat_template or tokenizer.chat_template):
        if only or not chat:
            return None if only else "default"
        raise PruneKitError(f"{checkpoint.path}: has no chat template, and ms-swift several for {model_type}: {choose}")
    # One turn of training, and one to be answered: templates may differ in either (<think>).
    turns = [(CHAT, "train"), (CHAT[:1], "transformers")]
    try:
        wanted = [
            processor.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=mode != "train", enable_thinking=False
            )
            for chat, mode in turns
        ]
    except Exception as error:  # it is a program, and may raise anything
        raise PruneKitError(f"{checkpoint.path}: its chat template fails ({error}): mend it, or {choose}") from None

    def likeness(name: str) -> float:
        found = 0.0
        try:
            template = get_template(processor, max_length=100_000, template_type=name)
            for (chat, mode), text in zip(turns, wanted, strict=True):
                template.set_mode(mode)
                written = tokenizer.decode(template.encode({"messages": chat})["input_ids"])
                found += Levenshtein.normalized_similarity(written.strip(), text.strip())
        except Exception:  # of a token that this tokenizer doesn't have, say: whatever it is, it isn't this one
            return 0.0
        return found

    likely = {name: likeness(name) / len(turns) for name in names}
    name = max(names, key=likely.__getitem__)  # the first of equals, in ms-swift's order
    name = only if only and likely[name] < ALIKE else name
    unlike = chat and likely[name] < ALIKE
    print(
        f"{'warning: ' * unlike}{checkpoint.path}: chat template {name}, {likely[name]:.0%} like its own"
        f"{', so that rows are not written as it was taught them' * unlike}; TEMPLATE= (--template) chooses another",
        file=sys.stderr,
    )
    return name


@contextlib.contextmanager
def tokenizer_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Within the block, what a missing or damaged tokenizer raises becomes a PruneKitError."""
    mend = "copy the tokenizer's files of the original model here"
    try:
        yield
    except PruneKitError:
        raise
    except AssertionError:  # ms-swift's only one there
        raise PruneKitError(
            f"{checkpoint.path}: its tokenizer has neither a padding token nor one that ends a text: name one in "
            "tokenizer_config.json"
        ) from None
    except Exception as error:  # tokenizers and transformers raise what they like
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise PruneKitError(f"{checkpoint.path}: its tokenizer can't be loaded ({reason}): {mend}") from None


def check_tokenizer_files(checkpoint: Checkpoint, tokenizer) -> None:
    """PruneKitError if none of a tokenizer's files is there: transformers makes one up that knows no words."""
    names = sorted({*type(tokenizer).vocab_files_names.values(), "tokenizer.json"})
    if not any((checkpoint.path / name).is_file() for name in names):
        raise PruneKitError(
            f"{checkpoint.path}: has no tokenizer ({', '.join(names)}): copy the tokenizer's files of the original "
            "model here"
        )


def load_processor(checkpoint: Checkpoint, model_type: str | None = None):
    """ms-swift's processor or tokenizer. PruneKitError if it isn't there, or damaged."""
    from swift import get_processor

    model_type = model_type or checkpoint.config["model_type"]
    with tokenizer_errors(checkpoint):
        processor = get_processor(str(checkpoint.path), model_type=model_type)
        check_tokenizer_files(checkpoint, getattr(processor, "tokenizer", processor))
    return processor


def load_template(
    checkpoint: Checkpoint, max_length: int | None, model_type: str | None = None, template: str | None = None
):
    """ms-swift's template of a checkpoint; `model_type` and `template` are ms-swift's names.

    Raises as `find_template` and `load_processor`.
    """
    from swift import get_template

    processor = load_processor(checkpoint, model_type)
    name = template or find_template(checkpoint, model_type)
    try:
        return get_template(processor, max_length=max_length, template_type=name)
    except ValueError as error:  # a plugin's, that was there when it was trained; ms-swift reads args.json, too
        if "template_type" not in str(error):
            raise
        raise PruneKitError(
            f"{checkpoint.path}: the template in its args.json is none that ms-swift has here: choose one by --template"
        ) from None
