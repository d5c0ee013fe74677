"""A tokenizer's files: what its tokens are made of, which it can't do without, and the same files with fewer tokens."""

import copy
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from prunekit.checkpoint import CHAT_TEMPLATES, Checkpoint, read_json, side_files
from prunekit.errors import PruneKitError
from prunekit.families import TOKEN_IDS

KINDS = ("BPE", "WordPiece", "Unigram")
ROLES = ("system", "user", "assistant", "tool")  # which rows bring, and a chat template writes
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # what SentencePiece writes a byte as that no token has
# Vocabularies of other programs, with the old numbers: tokenizer.json says all that they say
OTHERS = re.compile(r".*\.(?:model(?:\.v\d\w*)?|tiktoken)$|tekken\.json$|encoder\.json$|vocab\.bpe$|dict\.txt$")

Merge = tuple[str, str]


@dataclass(frozen=True)
class Tokenizer:
    """A folder's tokenizer.json."""

    folder: Path
    content: dict[str, Any]
    kind: str  # one of KINDS

    @property
    def model(self) -> dict[str, Any]:
        return self.content["model"]

    @cached_property
    def ids(self) -> dict[str, int]:
        """Of the model's tokens, without added ones that it lacks, in their order."""
        if self.kind == "Unigram":  # [token, score] in the order of ids
            return {token: number for number, (token, _) in enumerate(self.model["vocab"])}
        return dict(sorted(self.model["vocab"].items(), key=lambda item: item[1]))

    @cached_property
    def falls_back(self) -> bool:
        """Whether a character that it has no token for is written as bytes, as SentencePiece's can be."""
        held = sum(1 for token in self.ids if BYTE.fullmatch(token))
        return bool(self.model.get("byte_fallback")) and held == 256

    @property
    def added(self) -> list[dict[str, Any]]:
        return self.content.get("added_tokens") or []

    @cached_property
    def tokens(self) -> dict[int, str]:
        """All of them, by id."""
        return {number: token for token, number in self.ids.items()} | {
            each["id"]: each["content"] for each in self.added
        }

    @cached_property
    def merges(self) -> list[tuple[Merge, str]]:
        """(the two tokens, the one that they make), in the order of their ranks; none but of BPE."""
        prefix = len(self.model.get("continuing_subword_prefix") or "")
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in self.model.get("merges") or ())
        return [((one, other), one + other[prefix:]) for one, other in pairs]

    @cached_property
    def parts(self) -> dict[int, tuple[int, int]]:
        """By id, of every token that a merge makes: the two tokens that BPE makes it of, where it stands alone.

        Within a longer word it is made of the same: no merge crosses its ends there, or it would be another token.
        """
        made: dict[str, list[Merge]] = {}
        for pair, token in self.merges:
            made.setdefault(token, []).append(pair)
        ranks = {pair: rank for rank, (pair, _) in enumerate(self.merges)}
        plain = not self.model.get("continuing_subword_prefix") and not self.model.get("end_of_word_suffix")
        parts = {}
        for token, pairs in made.items():
            pair = (_last_merge(token, ranks) if plain and len(pairs) > 1 else None) or pairs[0]
            parts[self.ids[token]] = (self.ids[pair[0]], self.ids[pair[1]])
        return parts

    def encoder(self):
        """It, as the tokenizers library runs it: whole texts, with nothing put before or behind them."""
        return _encoder(self.content)

    def ids_of(self, texts: Iterable[str]) -> set[int]:
        """The tokens that these texts are encoded as."""
        found = self.encoder().encode_batch(list(texts), add_special_tokens=False)
        return {number for each in found for number in each.ids}


def _encoder(content: dict[str, Any]):
    import tokenizers

    encoder = tokenizers.Tokenizer.from_str(json.dumps(content))
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def _last_merge(token: str, ranks: Mapping[Merge, int]) -> Merge | None:
    """The merge that ends BPE on this token alone; None where it isn't made so."""
    symbols = list(token)
    pair: Merge | None = None
    while len(symbols) > 1:
        pairs = set(zip(symbols, symbols[1:]))
        pair = min(pairs, key=lambda each: ranks.get(each, len(ranks)))
        if pair not in ranks:
            return None
        merged, place = [], 0
        while place < len(symbols):
            both = tuple(symbols[place : place + 2]) == pair
            merged.append("".join(pair) if both else symbols[place])
            place += 1 + both
        symbols = merged
    return pair


def read_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The folder's. PruneKitError if there is none, if it can't be read, or is of a kind that isn't cut."""
    file = checkpoint.path / "tokenizer.json"
    if not file.is_file():
        load = f"from transformers import AutoTokenizer as T; T.from_pretrained('{checkpoint.path}').save_pretrained"
        raise PruneKitError(
            f"{checkpoint.path}: has no tokenizer.json: copy the original model's, or make it of its other files: "
            f"{load}('{checkpoint.path}')"
        )
    content = read_json(file)
    try:
        kind = type(_encoder(content).model).__name__
    except Exception as error:  # of a library in Rust
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise PruneKitError(f"{file}: no tokenizer that can be read ({reason}); copy it again") from None
    if kind not in KINDS:
        raise PruneKitError(f"{file}: a tokenizer of the kind {kind}, which isn't cut; known are {', '.join(KINDS)}")
    return Tokenizer(checkpoint.path, content, kind)


# --- what must stay ---------------------------------------------------------------------------------------------------


def replaceable(tokenizer: Tokenizer, token: str) -> bool:
    """Whether a text with this token's characters can still be written without it, by shorter tokens or by bytes."""
    if tokenizer.falls_back:
        return not BYTE.fullmatch(token)
    prefix, suffix = (tokenizer.model.get(key) or "" for key in ("continuing_subword_prefix", "end_of_word_suffix"))
    inner = len(token) > len(prefix) and token.startswith(prefix)
    rest = (token.removeprefix(prefix) if inner else token).removesuffix(suffix)
    if len(rest) <= 1:
        return False
    if tokenizer.kind == "BPE":  # its parts stay
        return True
    # WordPiece takes the longest that fits: it needs every character in both forms, or a word ends in [UNK] behind it.
    return all(form in tokenizer.ids for each in rest for form in (each, prefix + each))


def written(tokenizer: Tokenizer) -> set[int]:
    """Ids that texts get besides their own: around them, and by the chat template, with the names of roles."""
    texts = [*ROLES, *_template_texts(tokenizer.folder)]
    return _processor_ids(tokenizer.content) | tokenizer.ids_of(texts)


def staying(tokenizer: Tokenizer, named: Collection[int]) -> set[int]:
    """Ids of all that no cut may take: bytes or characters, special and added tokens, and what is named.

    named: ids that configs name, and those that are `written`.
    """
    stays = {number for token, number in tokenizer.ids.items() if not replaceable(tokenizer, token)}
    stays |= {each["id"] for each in tokenizer.added} | set(named)
    unknown = tokenizer.model.get("unk_token")
    stays |= {tokenizer.ids[unknown]} if unknown in tokenizer.ids else set()
    stays |= {tokenizer.model["unk_id"]} if tokenizer.model.get("unk_id") is not None else set()
    for number in list(stays):
        stays |= closure(tokenizer, number, stays)
    return stays


def closure(tokenizer: Tokenizer, number: int, known: Collection[int]) -> set[int]:
    """A token and what it is made of, in all depths, but for what is known."""
    found: set[int] = set()
    waiting = [number]
    while waiting:
        each = waiting.pop()
        if each not in found and (each not in known or each == number):
            found.add(each)
            waiting += tokenizer.parts.get(each, ())
    return found


def templates(folder: Path) -> list[str]:
    """The folder's chat templates, wherever releases of transformers keep them."""
    found = []
    for file in [*sorted(folder.glob("*.jinja")), *sorted(folder.glob(CHAT_TEMPLATES))]:
        found.append(file.read_text(encoding="utf-8", errors="replace"))
    for name in ("chat_template.json", "tokenizer_config.json", "processor_config.json"):
        said = read_json(folder / name) if (folder / name).is_file() else None
        said = said.get("chat_template") if isinstance(said, dict) else None
        named = [each.get("template") for each in said if isinstance(each, dict)] if isinstance(said, list) else [said]
        found += [each for each in named if isinstance(each, str)]
    return found


def _template_texts(folder: Path) -> Iterator[str]:
    """What the chat templates write themselves, in any of their branches: what is between tags, and their strings."""
    import jinja2

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers has it
    for template in templates(folder):
        try:  # read word by word, not parsed: tags of releases to come are no mistakes
            for _, what, text in environment.lex(template):
                if what == "data":
                    yield text
                elif what == "string":
                    yield text[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")  # as jinja2 does
        except (jinja2.TemplateError, ValueError) as error:
            reason = str(error).splitlines()[0][:200]
            raise PruneKitError(f"{folder}: its chat template can't be read ({reason}); mend it") from None


# --- ids in configs ---------------------------------------------------------------------------------------------------


def with_ids(value: Any, change: Callable[[int], int]) -> Any:
    """A JSON value with every id of a token changed that stands under a key which says that it is one."""
    if isinstance(value, dict):
        return {
            key: _deep(each, change) if TOKEN_IDS.fullmatch(str(key)) else with_ids(each, change)
            for key, each in value.items()
        }
    return [with_ids(each, change) for each in value] if isinstance(value, list) else value


def _deep(value: Any, change: Callable[[int], int]) -> Any:
    if isinstance(value, list):
        return [_deep(each, change) for each in value]
    return change(value) if type(value) is int else value


def ids_in(value: Any) -> set[int]:
    """Those that `with_ids` would change."""
    found: set[int] = set()
    with_ids(value, lambda number: found.add(number) or number)  # type: ignore[func-returns-value]
    return found


def side_configs(folder: Path) -> dict[str, Any]:
    """The JSON files beside the weights that may name tokens by number, by name: of generation, chat and processors."""
    names = [file.name for file in folder.glob("*config.json")] + ["special_tokens_map.json"]
    mine = side_files(folder)
    return {name: read_json(mine[name]) for name in names if name in mine}


# --- fewer tokens -----------------------------------------------------------------------------------------------------


def _with_processor_ids(content: dict[str, Any], change: Callable[[int], int]) -> dict[str, Any]:
    """tokenizer.json with the ids of what it puts around texts changed."""
    content = copy.copy(content)
    if content.get("post_processor"):
        content["post_processor"] = _processor(content["post_processor"], change)
    if content.get("padding"):
        content["padding"] = content["padding"] | {"pad_id": change(content["padding"]["pad_id"])}
    return content


def _processor(value: dict[str, Any], change: Callable[[int], int]) -> dict[str, Any]:
    value = dict(value)
    for name in ("sep", "cls"):
        if name in value:
            value[name] = [value[name][0], change(value[name][1])]
    if isinstance(value.get("special_tokens"), dict):
        value["special_tokens"] = {
            name: each | {"ids": [change(number) for number in each["ids"]]}
            for name, each in value["special_tokens"].items()
        }
    if "processors" in value:
        value["processors"] = [_processor(each, change) for each in value["processors"]]
    return value


def _processor_ids(content: dict[str, Any]) -> set[int]:
    found: set[int] = set()
    _with_processor_ids(content, lambda number: found.add(number) or number)  # type: ignore[func-returns-value]
    return found


def fewer(tokenizer: Tokenizer, new: Mapping[int, int]) -> Tokenizer:
    """It with the tokens alone that are in `new`, from old ids to new ones, which are in the same order."""
    content = _with_processor_ids(tokenizer.content, lambda number: new[number])
    content["added_tokens"] = [each | {"id": new[each["id"]]} for each in tokenizer.added]
    model = content["model"] = dict(tokenizer.model)
    if tokenizer.kind == "Unigram":
        model["vocab"] = [each for number, each in enumerate(model["vocab"]) if number in new]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = {token: new[number] for token, number in tokenizer.ids.items() if number in new}
    if tokenizer.kind == "BPE":
        merges = zip(model["merges"], tokenizer.merges, strict=True)
        model["merges"] = [
            merge for merge, (pair, made) in merges if all(each in model["vocab"] for each in (*pair, made))
        ]
    return Tokenizer(tokenizer.folder, content, tokenizer.kind)


def changed_files(tokenizer: Tokenizer, after: Tokenizer, new: Mapping[int, int]) -> dict[str, bytes | None]:
    """By name the content of every side file that numbers tokens, renumbered; None: it is left out.

    PruneKitError if a file numbers the tokens otherwise than tokenizer.json does.
    """
    folder, written = tokenizer.folder, {}
    files: dict[str, bytes | None] = {"tokenizer.json": _json(after.content)}
    for name, content in side_configs(folder).items():
        changed = with_ids(content, lambda number: new.get(number, number))
        if isinstance(decoder := changed.get("added_tokens_decoder") if isinstance(changed, dict) else None, dict):
            pairs = [(new.get(int(number)), each) for number, each in decoder.items() if number.isdigit()]
            changed["added_tokens_decoder"] = {str(number): each for number, each in pairs if number is not None}
        if changed != content:
            files[name] = _json(changed)
    for file in side_files(folder).values():
        if OTHERS.fullmatch(file.name):
            files[file.name] = None
        elif file.name in ("vocab.json", "added_tokens.json"):
            numbers = read_json(file)
            _check_numbers(tokenizer, file, numbers)
            files[file.name] = _json({token: new[number] for token, number in numbers.items() if number in new})
        elif file.name == "vocab.txt" and tokenizer.kind == "WordPiece":
            lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # a token may have other line ends
            _check_numbers(tokenizer, file, {token: number for number, token in enumerate(lines)})
            written[file.name] = [token for number, token in enumerate(lines) if number in new]
        elif file.name == "merges.txt" and tokenizer.kind == "BPE":
            kept = {" ".join(pair) for pair, _ in after.merges}
            lines = file.read_text(encoding="utf-8").split("\n")
            written[file.name] = [line for line in lines if line.startswith("#version") or line.rstrip() in kept]
    return files | {name: ("\n".join(lines) + "\n").encode() for name, lines in written.items()}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _check_numbers(tokenizer: Tokenizer, file: Path, numbers: Any) -> None:
    if not isinstance(numbers, dict):
        raise PruneKitError(f"{file}: isn't an object of tokens and their numbers; copy it again")
    for token, number in numbers.items():
        if tokenizer.tokens.get(number) != token:
            raise PruneKitError(
                f"{file}: has {token!r} as {number}, tokenizer.json hasn't; copy both of the same model"
            )
