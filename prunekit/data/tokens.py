"""Which token has which number, as a folder's tokenizer.json says."""

from pathlib import Path

from prunekit.checkpoint import read_json
from prunekit.errors import PruneKitError

FILE = "tokenizer.json"


def same_tokenizer(one: Path, other: Path) -> bool:
    """Whether both folders have the same file, to the byte."""
    files = [folder / FILE for folder in (one, other)]
    return all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()


def tokens_of(folder: Path) -> dict[int, str] | None:
    """Tokens by id, of a folder's tokenizer.json; None if there is none."""
    if not (folder / FILE).is_file():
        return None
    try:
        found = read_json(folder / FILE)
        vocabulary = found["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [token, score] in the order of ids
            tokens = {number: token for number, (token, _) in enumerate(vocabulary)}
        else:
            tokens = {number: token for token, number in vocabulary.items()}
        return tokens | {token["id"]: token["content"] for token in found.get("added_tokens") or ()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise PruneKitError(f"{folder / 'tokenizer.json'}: no tokenizer that can be read; copy it again") from None
