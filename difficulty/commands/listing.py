"""The commands that list what is built in: ``difficulty datasets`` and ``processes``."""

__all__ = ["datasets", "processes"]

from collections.abc import Callable, Mapping
from typing import Any

from difficulty.commands.arguments import json_text


def datasets(json: bool = False) -> None:
    """List the built-in data sets and their options.

    Example: difficulty datasets

    Args:
        json: print them as JSON.
    """
    from difficulty.datasets import DATASETS

    _print_registry(DATASETS, json)


def processes(json: bool = False) -> None:
    """List the forward processes and their options.

    Example: difficulty processes

    Your own process needs no name: give FILE.npz or the FOLDER of a diffusers scheduler in its place.

    Args:
        json: print them as JSON.
    """
    from difficulty.process import PROCESSES

    _print_registry(PROCESSES, json)


def _print_registry(factories: Mapping[str, Callable[..., Any]], as_json: bool) -> None:
    import inspect

    entries: dict[str, dict[str, Any]] = {}
    for name, factory in factories.items():
        options = {key: parameter.default for key, parameter in inspect.signature(factory).parameters.items()}
        entries[name] = {"description": inspect.cleandoc(factory.__doc__ or "").splitlines()[0], "options": options}
    if as_json:
        print(json_text(entries))
        return
    for name, entry in entries.items():
        settings = ",".join(f"{key}={value}" for key, value in entry["options"].items())
        print(f"{name + (':' + settings if settings else ''):<58} {entry['description']}")
