"""Run by test_rl_rewards.py in a process of its own: lines of `swift rlhf`, one after the other.

    python tests/helpers/swift_rlhf.py LINES.json ERRORS.json

Lines: {name: [rlhf, words, ...]}. Errors: {name: what ended it, or null}.
"""

import json
import os
import sys
import traceback
from pathlib import Path

from swift import rlhf_main

errors = {}
for name, (_, *words) in json.loads(Path(sys.argv[1]).read_text()).items():
    os.environ.pop("TENSORBOARD_LOGGING_DIR", None)
    try:
        rlhf_main(words)
        errors[name] = None
    except Exception:  # whatever it is, the other lines shall be tried
        errors[name] = traceback.format_exc()
Path(sys.argv[2]).write_text(json.dumps(errors))
