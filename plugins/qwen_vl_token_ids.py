"""Let ms-swift's Qwen-VL templates take the ids of image and video tokens from the model's own tokenizer.

ms-swift hard-codes the ids of Qwen's tokenizer (151655, 151656). A model with another vocabulary, such as the
tiny one of examples/tiny_ocr, would find no image in its prompt. Every launcher loads this through
`--external_plugins`; for Qwen's own tokenizer nothing changes.
"""

from prunekit.msswift.extend import take_image_tokens_from_tokenizers

take_image_tokens_from_tokenizers()
