"""W&B's settings where nobody made them; without a key of it, runs are kept offline.

    python -m prunekit.training.tracking

The launchers ask by this, with WANDB_DIR in the environment: prints why runs are kept offline, or nothing.
"""

import os
import re
from pathlib import Path


def why_offline() -> str:
    """Why runs are kept offline; empty where WANDB_MODE says what to do, or the environment or .netrc has a key."""
    host = re.sub(r"^\w+://|[:/].*", "", os.environ.get("WANDB_BASE_URL") or "api.wandb.ai")
    try:
        known = host in Path(os.environ.get("NETRC") or Path.home() / ".netrc").read_text(errors="replace")
    except OSError:
        known = False
    if known or os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY"):
        return ""
    return (
        f"W&B: no key found, so runs are kept offline in {os.environ['WANDB_DIR']}/wandb "
        "('wandb login', then 'wandb sync' sends them)"
    )


def setup_wandb(out: Path) -> None:
    """The launchers' settings for a process of its own: project prune-kit, files beside OUT, offline without a key."""
    os.environ.setdefault("WANDB_PROJECT", "prune-kit")
    os.environ.setdefault("WANDB_DIR", str(out.parent))
    if why := why_offline():
        os.environ["WANDB_MODE"] = "offline"
        print(why)


if __name__ == "__main__":
    print(why_offline())
