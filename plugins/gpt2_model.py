"""Let ms-swift load GPT-2, which it has no entry for. Every launcher loads this through `--external_plugins`.

Its chat template is ms-swift's `default` (### Human, ### Assistant), since GPT-2 has none; TEMPLATE= says otherwise.
"""

from prunekit.msswift.extend import register_gpt2

register_gpt2()
