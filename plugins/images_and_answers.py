"""What ms-swift takes for the tokens of images, and for an answer. Every launcher loads this.

ms-swift hard-codes the ids of Qwen's tokenizer (151655, 151656). A model with another vocabulary, such as the
tiny one of examples/tiny_ocr, would find no image in its prompt; for Qwen's own tokenizer nothing changes. And no
engine answers with such a token: a model that learns from its own answers would look for the image.

An answer is all that the model said, the token that ended it included, and nothing that was said for it: ms-swift puts
Qwen3's empty <think> block before it, and drops the end of one where that is the padding token, too.
"""

from prunekit.msswift.extend import understand_images_and_answers

understand_images_and_answers()
