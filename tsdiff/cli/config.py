"""`--config FILE.toml`: every option of a command from a file, the command line winning.

    model = "gaussian"
    steps = 20
    seed = "0-3"
    verifier = ["gaussian-target"]
    baseline = false

    [policy]            # or just: policy = "beam"
    name = "beam"
    width = 4           # like -P width=4
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from tsdiff.treesearch.errors import UsageError, unknown_name

_TABLE = "tsdiff.cli.policy_table"
_NOT_KEYS = ("config", "help", "policy_options")  # policy_options are the [policy] table


def load_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> Path | None:
    """Callback of `--config`: make the file's values the defaults of the command.

    Raises:
      UsageError: naming the file and the key, for a key that is unknown or a value that does not fit.
    """
    if path is None:
        return None
    values = _read_toml(path)
    table = values.get("policy")
    if isinstance(table, dict):
        values["policy"] = table.pop("name", None)
        for key, value in table.items():
            if not _plain(value):
                raise UsageError(f"{path}: [policy] {key} is a {type(value).__name__}; it must be a string, number, boolean or list of those")
        ctx.meta[_TABLE] = (values["policy"], table)
        if values["policy"] is None:
            del values["policy"]
    keys = _known_keys(ctx.command)
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("_", "-")
        if name not in keys:
            raise unknown_name(f"key of {path}:", key, keys, f"They are named like the options, see `{ctx.command_path} --help`.")
        parameter, negated = keys[name]
        if parameter.name in defaults:
            raise UsageError(f"{path}: {key} says again what another key has said; keep one of them")
        defaults[str(parameter.name)] = _convert(ctx, path, key, parameter, value, negated)
    ctx.default_map = defaults
    return path


def policy_options(ctx: click.Context, typed: Mapping[str, str]) -> tuple[dict[str, Any], str | None]:
    """The policy's options: those of the file's `[policy]` table, then those typed after -P, which win.

    Returns:
      The options, and a line to tell the user or None. The table belongs to the policy that the file names: for
      another one, chosen on the command line, it is left out.
    """
    named, table = ctx.meta.get(_TABLE, (None, {}))
    chosen = ctx.params["policy"]
    if table and named is not None and named != chosen:
        return dict(typed), f"{ctx.params['config']}: its [policy] options are those of {named} and not used for {chosen}"
    return {**table, **typed}, None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UsageError(f"config file {path} cannot be read ({error.strerror}); check its name and its rights") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"config file {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"config file {path} is not TOML: {error}") from error


def _known_keys(command: click.Command) -> dict[str, tuple[click.Parameter, bool]]:
    """Key -> (the parameter it sets, whether it sets it to the opposite: "no-baseline")."""
    keys: dict[str, tuple[click.Parameter, bool]] = {}
    for parameter in command.params:
        if parameter.name in _NOT_KEYS:
            continue
        if isinstance(parameter, click.Argument):
            keys[str(parameter.name)] = (parameter, False)
        for names, negated in ((parameter.opts, False), (parameter.secondary_opts, True)):
            keys |= {name[2:]: (parameter, negated) for name in names if name.startswith("--")}
    return keys


def _plain(value: Any) -> bool:
    return all(isinstance(item, (str, int, float, bool)) for item in (value if isinstance(value, list) else [value]))


def _convert(ctx: click.Context, path: Path, key: str, parameter: click.Parameter, value: Any, negated: bool) -> Any:
    """A TOML value as the parameter's own type; written as text first, so that 4.5 is no whole number."""
    if isinstance(parameter, click.Option) and parameter.is_flag:
        if not isinstance(value, bool):
            raise UsageError(f"{path}: {key} is {value!r} but must be true or false")
        return value != negated
    items = value if isinstance(value, list) else [value]
    if not items or not _plain(value) or any(isinstance(item, bool) for item in items):
        raise UsageError(f"{path}: {key} is {value!r} but must be a string or a number{' or a list of them' if parameter.multiple else ''}")
    texts = [str(item) for item in items]
    several = parameter.multiple or parameter.nargs == -1
    try:
        return parameter.type_cast_value(ctx, tuple(texts) if several else ",".join(texts))
    except click.UsageError as error:
        raise UsageError(f"{path}: {key}: {error.message}") from error
