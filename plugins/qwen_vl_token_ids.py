"""Let ms-swift's Qwen-VL templates take the ids of image and video tokens from the model's own tokenizer.

ms-swift hard-codes the ids of Qwen's tokenizer (151655, 151656). A model with another vocabulary, such as the
tiny one of examples/tiny_ocr, would find no image in its prompt. Every launcher loads this through
`--external_plugins`; for Qwen's own tokenizer nothing changes.
"""

from swift.template.templates.qwen import Qwen2VLTemplate

Qwen2VLTemplate.image_token_id = property(lambda template: template.processor.image_token_id)
Qwen2VLTemplate.video_token_id = property(lambda template: template.processor.video_token_id)
