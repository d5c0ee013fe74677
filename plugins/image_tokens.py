"""Image tokens that ms-swift's templates and engines take for any model's. Every launcher loads this.

ms-swift hard-codes the ids of Qwen's tokenizer (151655, 151656). A model with another vocabulary, such as the
tiny one of examples/tiny_ocr, would find no image in its prompt; for Qwen's own tokenizer nothing changes. And no
engine answers with such a token: a model that learns from its own answers would look for the image.
"""

from prunekit.msswift.extend import keep_image_tokens_out_of_answers, take_image_tokens_from_tokenizers

take_image_tokens_from_tokenizers()
keep_image_tokens_out_of_answers()
