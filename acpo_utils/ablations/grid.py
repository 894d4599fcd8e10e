"""The rows of an ablation: a product of flags, named variants, and which of the rows differ in one flag alone."""

import hashlib
import itertools
import re
import shlex
from collections.abc import Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """One row of the table: its name, the flags it adds to the command, and the same as {flag: value}.

    A flag without a value has the value "true".
    """

    name: str
    flags: tuple[str, ...]
    settings: dict[str, str]


def read_flags(tokens: Sequence[str]) -> dict[str, str]:
    """{flag: value} of `--flag value`, `--flag=value` and `--flag`; several values are joined by a space.

    Raises ValueError if the first token is no flag.
    """
    settings = {}
    for token in tokens:
        if token.startswith("--") and len(token) > 2:
            name, _, value = token[2:].partition("=")
            settings[name] = " ".join(filter(None, (settings.get(name), value)))
        elif settings:
            settings[name] = " ".join(filter(None, (settings[name], token)))
        else:
            raise ValueError(f"expected a flag such as --tmax before {token!r}")
    return {name: value or "true" for name, value in settings.items()}


def variant_row(name: str, flags: str) -> Row:
    """A row with a name of its own. `flags` as in a shell: "--anchor_weight 0 --last_steps 10", or "" for none.

    Raises ValueError, naming the variant, for an empty name or what is not a list of flags.
    """
    try:
        tokens = tuple(shlex.split(flags))
        settings = read_flags(tokens)
    except ValueError as error:
        raise ValueError(f"variant {name!r}: {error}") from error
    if not name.strip():
        raise ValueError(f"a variant needs a name: expected 'NAME: --flag value', found {flags!r}")
    return Row(name.strip(), tokens, settings)


def parse_variant(text: str) -> Row:
    """A row of "no anchor: --anchor_weight 0". Raises ValueError as `variant_row` does, and without a colon."""
    name, colon, flags = text.partition(":")
    if not colon or name.lstrip().startswith("-"):
        raise ValueError(f"--variant: expected 'NAME: --flag value', found {text!r}")
    return variant_row(name, flags)


def parse_grid(text: str) -> tuple[str, list[str]]:
    """Flag and values of "tmax=100,300". Raises ValueError for any other form, and for a value that comes twice."""
    name, equals, values = text.partition("=")
    name, values = name.strip().lstrip("-"), [value.strip() for value in values.split(",")]
    if not equals or not name or not all(values):
        raise ValueError(f"--grid: expected flag=value,value such as tmax=100,300, found {text!r}")
    if len(set(values)) < len(values):
        raise ValueError(f"--grid {text}: a value comes twice")
    return name, values


def product_rows(grids: Sequence[str]) -> list[Row]:
    """Every combination of "flag=value,value" texts, the first flag slowest; [] of none.

    The values true and false stand for a flag without a value, given or left out.
    Raises ValueError as `parse_grid` does, and for a flag that comes twice.
    """
    if not grids:
        return []
    parsed = [parse_grid(text) for text in grids]
    names = [name for name, _ in parsed]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--grid {repeated[0]} comes twice: give all its values at once, {repeated[0]}=A,B")
    rows = []
    for values in itertools.product(*(values for _, values in parsed)):
        settings = dict(zip(names, values))
        flags = [part for name, value in settings.items() for part in _flag(name, value)]
        rows.append(Row(",".join(f"{name}={value}" for name, value in settings.items()), tuple(flags), settings))
    return rows


def _flag(name: str, value: str) -> list[str]:
    if value in ("true", "false"):
        return [f"--{name}"] if value == "true" else []
    return [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]


def check_rows(rows: Sequence[Row]) -> None:
    """Raises ValueError if there is no row, or if two have the same name or would have the same folder."""
    if not rows:
        raise ValueError(
            "nothing to run: give --grid flag=value,value, --grid NAME, or --variant 'NAME: --flag value'"
        )
    seen = {}
    for row in rows:
        folder = folder_name(row.name, 0).lower()  # two names that differ in case alone are one on some systems
        if folder in seen:
            raise ValueError(f"the rows {seen[folder]!r} and {row.name!r} would share a folder: name one differently")
        seen[folder] = row.name


def folder_name(name: str, seed: int) -> str:
    """A readable name for a run's folder: "tmax=100,anchor_weight=0,seed=1"; a long one ends in a hash of it all."""
    slug = re.sub(r"[^\w.=+,-]+", "-", name).strip("-.") or "row"
    if len(slug) > 100:
        slug = f"{slug[:91]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return f"{slug},seed={seed}"


def sweeps(rows: Sequence[Row]) -> dict[str, dict[str, list[tuple[str, str]]]]:
    """{flag: {line: [(value, row's name), ...]}}: rows that differ in `flag` alone make a line of its plot.

    A line is named after what its rows have in common and other lines have not: "anchor_weight 0". Flags whose rows
    never differ in them alone are left out. Named variants and rows of a product are treated alike.
    """
    found = {}
    for flag in dict.fromkeys(name for row in rows for name in row.settings):
        lines = {}
        for row in rows:
            if flag in row.settings:
                others = tuple((name, value) for name, value in row.settings.items() if name != flag)
                lines.setdefault(tuple(sorted(others)), []).append((row.settings[flag], row.name))
        lines = {others: points for others, points in lines.items() if len({value for value, _ in points}) > 1}
        common = set.intersection(*map(set, lines)) if lines else set()
        if lines:
            found[flag] = {
                _line_name([pair for pair in others if pair not in common]): lines[others] for others in lines
            }
    return found


def _line_name(pairs: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{name} {value}" for name, value in pairs)
