"""Plain texts as blocks of tokens, the way language models are pre-trained."""

from itertools import chain
from typing import Any

from swift.dataset import EncodePreprocessor

IGNORED = -100  # a label that no loss counts


def into_blocks(texts: list[list[int]], length: int) -> list[list[int]]:
    """Token ids of texts one behind the other, in blocks of `length`: the last may be shorter; none of one token."""
    ids = list(chain.from_iterable(texts))
    blocks = [ids[start : start + length] for start in range(0, len(ids), length)]
    return [block for block in blocks if len(block) > 1]


class Blocks(EncodePreprocessor):
    """Makes blocks of --max_length tokens of each thousand texts, which the template ends with an end-of-text token."""

    def preprocess(self, row: dict[str, Any]) -> Any:
        return super().preprocess({"messages": row["messages"][-1:]})  # a column "prompt" was taken for a question

    def batched_preprocess(self, batched_row: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        found = super().batched_preprocess(batched_row, **kwargs)
        if "input_ids" not in found:
            return found
        blocks = into_blocks(found["input_ids"], self.template.max_length)
        return {
            "input_ids": blocks,
            "labels": [[IGNORED, *block[1:]] for block in blocks],  # a first token has nothing to be told by
            "length": [len(block) for block in blocks],
            "lengths": [[len(block)] for block in blocks],
        }
