"""The reference of the job file as Markdown, generated from the types, defaults and docstrings of its fields.

`python -m pipeline.config.files.reference > docs/job-file.md` writes the page; a test compares the two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config import (
    CustomModelConfig,
    JobConfig,
    TorchvisionModelConfig,
    UserFunctionDataConfig,
    UserTableDataConfig,
)
from pipeline.config.files.loading import SHORT_FORMS
from pipeline.config.recipes import IMAGE_RECIPE, TABLE_RECIPE

COMMAND = "python -m pipeline.config.files.reference > docs/job-file.md"

Schema = Mapping[str, Any]
"""A node of the JSON schema of `JobConfig`."""

TAGS = ("source", "kind", "by")
"""Keys whose value selects the class of a mapping."""

TITLES: dict[str, str] = {
    UserFunctionDataConfig.__name__: "source: {call: module:function}",
    UserTableDataConfig.__name__: "source: {call: module:function}, with a label",
    TorchvisionModelConfig.__name__: "kind: torchvision:NAME",
    CustomModelConfig.__name__: "kind: module:Class",
}
"""Titles of the classes that are not selected by a fixed value of a key in `TAGS`."""


def _yaml(value: Any) -> str:
    """Return a plain value as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, str):
        return value if re.fullmatch(r"[\w~./:-]+", value) else json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _recipe_table() -> str:
    """Return the recipes as a table of Markdown."""
    recipes = (TABLE_RECIPE, IMAGE_RECIPE)
    rows = [
        ("data.normalize", [str(recipe.normalize or "auto") for recipe in recipes]),
        ("model", [_yaml(dict(recipe.model)) for recipe in recipes]),
        ("train.optimizer", [_yaml(dict(recipe.optimizer)) for recipe in recipes]),
        ("train.phases", [_yaml([dict(phase) for phase in recipe.phases]) for recipe in recipes]),
        ("train.batch_size", [str(recipe.batch_size) for recipe in recipes]),
        ("best", [_yaml({"metric": "val/loss", "patience": recipe.patience}) for recipe in recipes]),
    ]
    lines = [f"| section | {' | '.join(recipe.kind for recipe in recipes)} |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {' | '.join(f'`{cell}`' for cell in cells)} |" for name, cells in rows)])


INTRODUCTION = f"""\
<!-- Generated from the fields of `pipeline/config/` by `{COMMAND}`. Edit the fields, not this page. -->

# The job file

A job file is YAML and describes one training job. Every key but `name` has a default, so that a job file holds only
what differs from it. `trainyard init NAME` writes a job file with comments, and `trainyard check FILE` prints the whole
job with all defaults.

```yaml
name: mnist
data: {{source: mnist, splits: {{val: 0.1}}}}
model: {{hidden: [128]}}
train: {{batch_size: 256, phases: [{{epochs: 10, lr: 0.2}}]}}
```

**Strict.** An unknown key is an error that names the nearest known key. So is a value of another type or out of range:
`"5"` is text and not a number. All errors of a file are reported at once, before any data is read. YAML is that of
version 1.2: `true` and `false` are the only booleans (`yes`, `no`, `on` and `off` are text), `1e-3` is a number, and
a key may occur once.

**Keys of one variant.** The keys of `data` depend on `source`, those of `model` on `kind`, those of `data.splits` on
`by`. In `data`, a key of another source is an error unless it has its default.

**`base: FILE`** starts from another job file, which may have a base too. Mappings are merged key by key. A list
replaces the whole list of the base, and so does a mapping with another `kind` or `by`.

**`${{NAME}}`** in a value is replaced by the environment variable NAME when the file is read. If it is the whole value,
the variable is parsed as YAML, so that it can be a number. A variable that is not set is an error.

**`env:NAME`** names a secret. It is stored as `env:NAME` and resolved only where it is used: in `storage`,
`data.url`, `model.init_from`, and the `args` of your own code. A literal secret, or one from `${{NAME}}`, is refused
before anything is written.

**`--set KEY=VALUE`** on the command line overrides one key: `--set train.batch_size=256`,
`--set train.phases.0.lr=0.1`, `--set model.hidden=[64,32]`. KEY is a path of keys, and of positions in lists from 0;
VALUE is YAML. A mapping is merged as for `base`.

**Recipes.** What a job file leaves out of five sections depends on its data: `data.normalize`; `model`;
`train.optimizer` together with `train.phases`; `train.batch_size`; `best`. A section that is left out is that of the
recipe for the data, below. One that is given has the defaults of the tables on this page for the rest. `--set` changes
keys of a recipe; if it gives a whole section (`--set model={{kind: mlp}}`) or another `kind`, the recipe's section does
not count. Stored jobs have every section. `trainyard check FILE` names the sections that are the recipe's. Other data
(`disc`, functions that return arrays, tables with a `shape`) has no recipe.

{_recipe_table()}

`patience` needs a validation split that is evaluated after each epoch, else there is none.

**Relative paths** in a job file (`base`, `code`, `data.url`, `data.root`, `data.cache.folder`, `model.weights`, and
`model.init_from` with a slash in it) are relative to the folder of the file that holds them, also in a base. Those in
`--set`, and those given from Python, are relative to the working directory, and so is `storage` always.

**Runs.** The whole job is stored with each run as `job.yaml`. A job with other values is a new run, except for the keys
that change only where and how fast it runs: `scale`, `storage`, `checkpoint`, `follow`, and of `data` the keys
`root`, `url`, `loader` and `cache`. The content of the data and of your own code counts, not where it is.

In the tables below, a key without a default is marked *required*, and the default `null` means that the key is not set.
A share is a fraction of 1.
"""


def reference() -> str:
    """Return the page as Markdown."""
    schema = JobConfig.model_json_schema()
    return "\n\n".join([INTRODUCTION.rstrip(), *_Page(schema["$defs"]).sections(schema)]) + "\n"


class _Page:
    """The sections of the page.

    Parameters
    ----------
    definitions: the classes of the schema, by name.
    """

    def __init__(self, definitions: Mapping[str, Schema]) -> None:
        self._definitions = definitions

    def sections(self, job: Schema) -> Iterator[str]:
        """Yield one section for the whole job, then one for each key that holds a mapping, in the order of the file."""
        yield "## The whole job"
        yield self._table("", job["properties"], job)
        for key, field in job["properties"].items():
            yield from self._sections_of(key, field, 2)

    def _sections_of(self, path: str, field: Schema, level: int) -> Iterator[str]:
        """Yield the sections of the mappings that a field holds, if any."""
        names = list(dict.fromkeys(_references(field)))
        if not names:
            return
        heading = f"{'#' * level} `{path}`"
        if "discriminator" in field or "oneOf" in field:
            yield f"{heading}\n\n{_text(field)}"
            yield from self._variants(path, names, level + 1)
            return
        for name in names:
            kind = self._definitions[name]
            suffix = " Each entry of the list is such a mapping." if _is_list(field) else ""
            yield f"{heading}\n\n{_text(kind)}{suffix}"
            yield self._table(path, kind["properties"], kind)
            for key, inner in kind["properties"].items():
                yield from self._sections_of(f"{path}.{key}", inner, min(level + 1, 4))

    def _variants(self, path: str, names: list[str], level: int) -> Iterator[str]:
        """Yield a section for each class of a union; their common keys come last, once."""
        kinds = {name: self._definitions[name] for name in names}
        first, *others = kinds.values()
        common = {
            key: field
            for key, field in first["properties"].items()
            if key not in TAGS and all(kind["properties"].get(key) == field for kind in others)
        }
        for name, kind in kinds.items():
            specific = {key: field for key, field in kind["properties"].items() if key not in common}
            yield f"{'#' * level} `{path}` with `{_title(name, kind)}`\n\n{_text(kind)}"
            yield self._table(path, specific, kind)
            for key, field in specific.items():
                yield from self._sections_of(f"{path}.{key}", field, min(level + 1, 4))
        if common:
            tag = next(key for key in first["properties"] if key in TAGS)
            yield f"{'#' * level} `{path}` with any `{tag}`"
            yield self._table(path, common, first)
            for key, field in common.items():
                yield from self._sections_of(f"{path}.{key}", field, min(level + 1, 4))

    def _table(self, path: str, fields: Mapping[str, Schema], kind: Schema) -> str:
        rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key, field in fields.items():
            default = self._default(field) if key not in kind.get("required", ()) else "*required*"
            where = f"{path}.{key}" if path else key
            cells = (f"`{key}`", self._type(field, where), default, _text(field))
            rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        return "\n".join(rows)

    def _type(self, field: Schema, path: str) -> str:
        """Return the description of the values that a field takes."""
        types = list(dict.fromkeys(self._alternatives(field, path)))
        return f"{', '.join(types[:-1])} or {types[-1]}" if len(types) > 1 else types[0]

    def _alternatives(self, field: Schema, path: str) -> Iterator[str]:
        names = _references(field)
        if path in SHORT_FORMS:
            yield from self._alternatives(self._definitions[names[0]]["properties"][SHORT_FORMS[path]], f"{path}.")
        plain = [part for part in field.get("anyOf", ()) if not _references(part)]
        for part in sorted(plain, key=lambda part: part.get("type") == "null"):
            yield from self._alternatives(part, path)
        if names:
            link = f"[`{path}`](#{re.sub(r'[^a-z0-9_-]', '', path)})"
            yield f"{'list of mappings' if _is_list(field) else 'mapping'}, see {link}"
        elif "enum" in field or "const" in field:
            yield from (f"`{_yaml(value)}`" for value in field.get("enum", [field.get("const")]))
        elif "anyOf" not in field:
            yield from self._plain_type(field, path)

    def _plain_type(self, field: Schema, path: str) -> Iterator[str]:
        match field.get("type"):
            case "integer":
                yield f"whole number{_limits(field)}"
            case "number":
                yield f"number{_limits(field)}"
            case "boolean":
                yield from ("`true`", "`false`")
            case "null":
                yield "`null`"
            case "array" if "prefixItems" in field:
                entries = [self._type(part, path) for part in field["prefixItems"]]  # all of one type
                yield f"list of {len(entries)} {_plural(entries[0])}"
            case "array":
                kind = "non-empty list" if field.get("minItems") else "list"
                yield f"{kind} of {_plural(self._type(field['items'], path))}"
            case "object":
                values = field.get("additionalProperties")
                yield f"mapping to {self._type(values, path)}" if isinstance(values, Mapping) else "mapping"
            case _:
                yield "text"

    def _default(self, field: Schema) -> str:
        """Return the default as YAML, without keys that have their own default in it."""
        short = self._short(field["default"], _references(field))
        return "its defaults" if short == {} and _references(field) else f"`{_yaml(short)}`"

    def _short(self, value: Any, names: list[str]) -> Any:
        if isinstance(value, list):
            return [self._short(entry, names) for entry in value]
        if not isinstance(value, dict) or not names:
            return value
        properties = self._definitions[names[0]]["properties"]  # a default is of the first class of its union
        changed = {key: inner for key, inner in value.items() if inner != properties[key].get("default")}
        return {**{key: value[key] for key in TAGS if key in value and len(names) > 1}, **changed}


def _references(field: Schema) -> list[str]:
    """Return the names of the classes of the mappings that a field holds, itself or in a list."""
    if "$ref" in field:
        return [str(field["$ref"]).rpartition("/")[2]]
    parts = [*field.get("anyOf", ()), *field.get("oneOf", ()), *([field["items"]] if "items" in field else [])]
    return [name for part in parts for name in _references(part)]


def _is_list(field: Schema) -> bool:
    return field.get("type") == "array"


def _title(name: str, kind: Schema) -> str:
    tag = next(key for key in kind["properties"] if key in TAGS)
    field = kind["properties"][tag]
    values = field.get("enum", [field["const"]] if "const" in field else [])
    return TITLES[name] if not values else f"{tag}: {', '.join(values)}"


def _limits(field: Schema) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[key]:g}" for key, sign in signs.items() if key in field]
    return f" {' and '.join(limits)}" if limits else ""


def _plural(words: str) -> str:
    return f"({words})" if " or " in words else re.sub(r"^((?:whole )?number)\b", r"\1s", words)


def _text(node: Schema) -> str:
    """Return the documentation of a field or class on one line."""
    return " ".join(str(node.get("description", "")).split())


if __name__ == "__main__":
    print(reference(), end="")
