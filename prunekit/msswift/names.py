"""Names that ms-swift or a plugin registers: models, templates, rewards, optimizers, ... None of them is imported."""

import ast
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from prunekit.errors import PruneKitError

from .extend import MODELS
from .source import constants_in, package, statements


def show(text: str) -> str:
    """A word of the command line in a message of one line."""
    return text[:80] if text[:80].isprintable() else repr(text[:80])


def assigned(tree: ast.AST, registry: str) -> tuple[set[str], int]:
    """Names that `registry = {...}` and `registry["name"] = ...` put into a registry, and the number of such lines."""
    names: set[Any] = set()
    lines = 0
    for node in statements(tree):
        match node:
            case ast.Assign([ast.Name(name)], ast.Dict(keys)) if name == registry and all(
                isinstance(key, ast.Constant) for key in keys
            ):
                names |= {key.value for key in keys if isinstance(key, ast.Constant)}
            case ast.Assign([ast.Subscript(ast.Name(name), ast.Constant(key))]) if name == registry:
                names.add(key)
            case _:
                continue
        lines += 1
    return names, lines


def _plugin(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except OSError:
        raise PruneKitError(f"plugin {path} is not there: name a .py file (--external_plugins)") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise PruneKitError(f"plugin {path} is not Python: {error}") from None


def registered(path: Path, registry: str) -> tuple[set[str], set[str]]:
    """The names that a Python file puts into a registry of ms-swift, to list and to allow; it is read and not run.

    `registry = {...}` and `registry["name"] = ...` are exact. A file that does anything else with it (a loop,
    `registry.update(...)`) is likely to register its functions, and may register under any string in it.
    """
    tree = _plugin(path)
    names, understood = assigned(tree, registry)
    if sum(isinstance(node, ast.Name) and node.id == registry for node in ast.walk(tree)) == understood:
        return names, names
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    strings: set[Any] = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return names | functions, names | functions | classes | strings


def check_registered(
    what: str,
    names: Iterable[str | None],
    registry: str,
    source: str,
    plugins: Iterable[Path] = (),
    more: Iterable[str] = (),
) -> None:
    """Check that ms-swift (in `source`), one of the plugins, or `more` knows every name; none of them is imported."""
    if not (names := [name for name in names if name is not None]):
        return
    found = [registered(path, registry) for path in (package("swift") / source, *plugins)]
    for name in names:
        if name not in more and not any(name in allowed for _, allowed in found):
            known = sorted({*more}.union(*(listed for listed, _ in found)))
            raise PruneKitError(f"unknown {what} {show(name)}: {_choices(name, known)}, or register it in a plugin")


def check_rewards(names: Iterable[str], plugins: Iterable[Path]) -> None:
    """Check that ms-swift or one of the plugins registers every reward; neither is imported."""
    plugins = list(plugins)
    for plugin in plugins:
        registered(plugin, "orms")  # can be read
    check_registered("reward", names, "orms", "rewards/orm.py", plugins)


def _choices(value: str, known: list[str]) -> str:
    if len(known) > 60:
        return f"choose one of ms-swift's, like {', '.join(get_close_matches(value, known, 8, 0.3) or known[:8])}"
    like = get_close_matches(value, known, 1)
    return f"choose from {', '.join(known)}" + (f" (did you mean {like[0]}?)" if like else "")


def check_choice(what: str, value: str | None, known: Iterable[str]) -> None:
    if value is not None and value not in (known := list(known)):
        raise PruneKitError(f"{what} {show(value)} is unknown: {_choices(value, known)}")


def _named(source: str, plugins: Iterable[Path], register: str) -> list[str]:
    """Names in ms-swift's classes of constants (LLMModelType, ...), and any string of a plugin that registers more."""
    names = constants_in(package("swift") / source)
    for plugin in plugins:
        tree = _plugin(plugin)
        if any(isinstance(node, ast.Name) and node.id == register for node in ast.walk(tree)):
            names += [
                node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
            ]
    return names


def model_types(plugins: Iterable[Path]) -> list[str]:
    return [*MODELS, *_named("model/constant.py", plugins, "register_model")]


def check_names(model_type: str | None, template: str | None, plugins: Iterable[Path] = ()) -> None:
    """PruneKitError for a --model_type or --template that neither ms-swift nor Prune-Kit nor a plugin has."""
    check_choice("--model_type", model_type, model_types(plugins))
    check_choice("--template", template, _named("template/constant.py", plugins, "register_template"))
