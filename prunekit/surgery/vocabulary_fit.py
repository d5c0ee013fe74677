"""What a text needs of a vocabulary: how often each token is used, and how many tokens it takes before and after."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from prunekit.data.batches import HELD_OUT
from prunekit.data.rows import Rows, is_text

from .vocabulary import VocabularyCut, VocabularyPlan, cut_vocabulary
from .vocabulary_files import Tokenizer, templates

BATCH = 256  # rows that are encoded at once
MEDIA = re.compile(r"<(?:image|video|audio)>")  # ms-swift's, where a row's pictures stand


def texts_of(tokenizer: Tokenizer, rows: Rows) -> Iterator[str]:
    """What the model gets to read of each row: texts as they are, messages as its own chat template writes them."""
    found = templates(tokenizer.folder)
    for row in rows:
        yield row["text"] if is_text(row) else _chat(found[0] if found else None, row["messages"])


def _chat(template: str | None, messages: list[dict[str, Any]]) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template  # torch

    said = [message | {"content": MEDIA.sub("", _content(message))} for message in messages]
    if template is not None:
        try:
            return render_jinja_template([said], chat_template=template)[0][0]
        except Exception:  # it is a program, and may refuse what ms-swift takes: what it writes itself stays anyway
            pass
    return "\n".join(message["content"] for message in said)


def _content(message: dict[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content or ""


def count_uses(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[Counter[int], int]:
    """(how often which token is used, bytes of all texts in UTF-8)."""
    encoder, uses, size = tokenizer.encoder(), Counter[int](), 0
    waiting = iter(texts)
    while batch := list(islice(waiting, BATCH)):
        size += sum(len(text.encode()) for text in batch)
        for found in encoder.encode_batch(batch, add_special_tokens=False):
            uses.update(found.ids)
    return uses, size


def fit_vocabulary(plan: VocabularyPlan, data: list[Rows]) -> VocabularyCut:
    """The cut of the tokens that these rows need least; every fifth row only judges.

    Its metrics: tokens a byte of UTF-8 of the rows that judge, before and after.
    """
    texts = [text for rows in data for text in texts_of(plan.tokenizer, rows)]
    uses, _ = count_uses(plan.tokenizer, (text for number, text in enumerate(texts) if number % HELD_OUT))
    cut = cut_vocabulary(plan, uses)
    judged = texts[::HELD_OUT]
    counted = [count_uses(tokenizer, judged) for tokenizer in (plan.tokenizer, cut.tokenizer)]
    before, after = (found.total() / max(1, size) for found, size in counted)
    cut.metrics.update(tokens_per_byte_before=round(before, 5), tokens_per_byte=round(after, 5))
    cut.settings.update(calib=[rows.name for rows in data], calibration_data=[rows.record for rows in data])
    return cut
