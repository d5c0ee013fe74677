"""Python code that a checkpoint folder brings: refused unless it is allowed."""

import json
import os
from pathlib import Path

from prunekit.errors import PruneKitError


def check_no_remote_code(folder: Path) -> None:
    """Refuse a checkpoint that brings Python code (`auto_map`): ms-swift 4.6 would run it, trusting every folder.

    TRUST_REMOTE_CODE=1 in the environment allows it.
    """
    if os.environ.get("TRUST_REMOTE_CODE") == "1":
        return
    for file in sorted(folder.glob("*config.json")):
        keys: set[str] = set()

        def collect(pairs, keys=keys):
            keys.update(key for key, _ in pairs)

        try:  # parsed, since a key may be written with escapes
            json.loads(file.read_bytes(), object_pairs_hook=collect)
        except (OSError, ValueError, RecursionError) as error:
            raise PruneKitError(f"{file}: cannot be read ({error}); download it again") from None
        if "auto_map" in keys:
            raise PruneKitError(f"{file} names Python code to run (auto_map): read it, then set TRUST_REMOTE_CODE=1")
