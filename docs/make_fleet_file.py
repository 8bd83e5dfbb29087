"""Write docs/fleet-file.md from the pydantic models, so that the page and the program cannot disagree: `python docs/make_fleet_file.py`."""

import inspect
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, PositiveInt
from pydantic_core import PydanticUndefined

from pipeline import config

HEAD = """# The fleet file

Made by `docs/make_fleet_file.py` from `pipeline/config.py`; do not edit.

A YAML file. `base_model` and `customers` are needed, everything else has a default. Paths are relative to the fleet file. An unknown key
is an error that names the file, the line and the nearest known key.

```yaml
base_model: {path: base}
launch: {accelerate_config: cpu}
defaults:
  prefix: {length: 10}
  training: {max_steps: 400}
customers:
  - {id: acme, data: data/acme.jsonl, training: {lr: 0.05}}
  - {id: bistro, data: {train: b/train.csv, dev: b/dev.csv, test: b/test.csv}}
  - {id: bistro, task: menu, data: data/menu.jsonl}
```

The sections `prompt`, `prefix`, `training`, `evaluation` and `retrain` stand under `defaults` for everybody, and under a customer for that customer
alone, key by key.
`launch` stands at the top and under a customer, key by key too.
(`id`, `task`) is the key of a customer; ids have 1 to 63 of the characters a-z, 0-9, `-` and `_`.

## Schedules

`schedule` at the top says when everybody is looked at. A customer with a `schedule` of its own is taken by a run for everybody only once an hour
that its schedule names has passed since it was last looked at (so an hour that was missed is caught up), and always when it is asked for by name.

## Many customers: `customers`

A list, as above, or one of:

- `customers: {folder: DIR}`: every data file in the folder is a customer, named by the file without its suffix; so is every sub-folder with a file
  `train` (and `dev` and `test`, if there are any). What begins with a dot, and files of other kinds, are left alone.
- `customers: {table: FILE}`: every row of a .csv, .tsv, .jsonl or .parquet file is a customer. Columns: `id`, `task`, `schedule`, `data` (or `train`,
  `dev`, `test`), and any setting by its dotted name, such as `prefix.length`; an empty cell says nothing. Paths are relative to the table.

```
id,data,schedule,prefix.length
acme,acme.jsonl,,
bistro,bistro.csv,30 2 * * 1,20
```
"""

SECTIONS: list[tuple[str, type[BaseModel]]] = [
    ("`base_model`", config.BaseSettings),
    ("`launch`", config.LaunchSettings),
    ("`schedule`, at the top and of a customer", config.ScheduleSettings),
    ("`work_pools`, by name", config.WorkPoolSettings),
    ("`deploy`", config.DeploySettings),
    ("`retention`", config.RetentionSettings),
    ("`data` of a customer", config.DataSettings),
    ("`data.columns`", config.ColumnSettings),
    ("`prompt`", config.PromptSettings),
    ("`prefix`", config.PrefixSettings),
    ("`training`", config.TrainingSettings),
    ("`evaluation`", config.EvaluationSettings),
    ("`evaluation.gate`", config.GateSettings),
    ("`retrain`", config.RetrainSettings),
]


def page() -> str:
    """The page as Markdown."""
    parts = [HEAD]
    for title, model in SECTIONS:
        parts.append(f"## {title}\n\n{inspect.getdoc(model)}\n\n| key | default | values | meaning |\n|---|---|---|---|")
        for name, field in model.model_fields.items():
            default = "(needed)" if field.default is PydanticUndefined else _default(field.default)
            parts.append(f"| `{name}` | {default} | {_values(field)} | {field.description or ''} |")
        parts.append("")
    return "\n".join(parts)


def _default(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "see below"
    return f"`{list(value) if isinstance(value, tuple) else value!r}`".replace("None", "null").replace("True", "true")


def _values(field: Any) -> str:
    limits = [
        f"{name} {getattr(m, attribute)}" for m in field.metadata for attribute, name in _LIMITS.items() if hasattr(m, attribute)
    ]
    return " ".join([_type(field.annotation), *limits])


def _type(annotation: Any) -> str:
    """A type as a reader of YAML would say it."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return "int ≥ 1" if annotation == PositiveInt else _type(parts[0])
    if origin is Literal:
        return ", ".join(repr(part) for part in parts)
    if origin is tuple:
        return f"list of {_type(parts[0])}"
    if origin is dict:
        return "names with values"
    if origin in (Union, UnionType):
        return " or ".join(_type(part) for part in parts)
    if annotation is NoneType:
        return "null"
    return "section" if issubclass(annotation, BaseModel) else annotation.__name__


_LIMITS = {"ge": "≥", "gt": ">", "le": "≤"}

if __name__ == "__main__":
    Path(__file__).with_name("fleet-file.md").write_text(page(), encoding="utf-8")
