"""Putting the page together: find the run, read it, render the template, write the file if it has changed."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.artifacts import atomic_write
from lib.cli import UserError
from lib.reporting.artifacts import ModelRoot, find_model_roots, model_root_at
from lib.reporting.localization import searched_run_names
from lib.reporting.naming import canonical_order, label_of, task_label
from lib.reporting.page.behaviour import behaviour_section
from lib.reporting.page.behaviour_rules import rules_section
from lib.reporting.page.charts import neuron_map
from lib.reporting.page.controls import controls_section
from lib.reporting.page.grids import Grid
from lib.reporting.page.inputs import PageInputs, PageOptions
from lib.reporting.page.neuron_tables import neuron_section
from lib.reporting.page.neurons import Neurons
from lib.reporting.page.scopes_section import scopes_section
from lib.reporting.page.search import search_section
from lib.reporting.page.texts import count, decimal, percent, plural, visible

_TEMPLATES = Path(__file__).resolve().parent / "templates"
REPORT_DIR = "report"
_PARTS_OF_A_MODEL = ("feature_report", "rule_extraction_results", "neural_circuit_discovery_results*")


@dataclass(frozen=True)
class WrittenPage:
    """A page on disk, and what it had to do without."""

    path: Path
    run_name: str
    n_missing: int


def open_model(folder: Path) -> ModelRoot:
    """The model root at a folder, finished or not.

    Raises:
        UserError: nothing of a run is there, or it is a folder of several models.
    """
    if not folder.is_dir():
        raise UserError(f"no results at {folder}; give the folder of a task and model, data/<task>/<model>")
    if any(next(folder.glob(pattern), None) for pattern in _PARTS_OF_A_MODEL):
        return model_root_at(folder)
    # A bare folder of runs has neither behaviour nor search beside it.
    below = [root for root in find_model_roots(folder) if root.path is not None]
    if len(below) == 1:
        return below[0]
    if below:
        names = ", ".join(root.unit for root in below[:4]) + (" ..." if len(below) > 4 else "")
        raise UserError(f"{folder} holds {len(below)} models ({names}); give the folder of one, data/<task>/<model>")
    raise UserError(f"no run at {folder}; give the folder of a task and model, data/<task>/<model>")


def run_names_of(root: ModelRoot) -> list[str]:
    """Every run of the model, also those whose search has begun and whose flips were not measured yet."""
    return canonical_order([*root.run_names, *searched_run_names(root)])


def write_page(root: ModelRoot, run_name: str | None, output: Path | None, options: PageOptions) -> WrittenPage:
    """Write the page of one run (default: the first in canonical order); a page that is the same is left untouched.

    Raises:
        UserError: no run of that name, or the file cannot be written.
    """
    folder = root.path
    if folder is None:
        raise UserError(f"{root.stats_dir} is not in the folder of a task and model, data/<task>/<model>")
    names = run_names_of(root)
    if run_name is not None and run_name not in names:
        shown = ", ".join(names) or "none"
        raise UserError(f"no run {run_name!r} at {folder}; the runs there are: {shown}")
    chosen = run_name or next(iter(names), None)
    inputs = PageInputs(root, folder, root.run(chosen) if chosen else None, options)
    path = output or folder / REPORT_DIR / f"{chosen or 'no_run_yet'}.html"
    content = render_page(inputs, names).encode("utf-8")
    if not path.is_file() or path.read_bytes() != content:
        with atomic_write(path, "wb") as handle:
            handle.write(content)
    return WrittenPage(path, chosen or "", len(inputs.issues))


def render_page(inputs: PageInputs, run_names: list[str]) -> str:
    """The whole page as text."""
    neurons = Neurons(inputs)
    behaviour, rules = behaviour_section(inputs), rules_section(inputs)
    search = search_section(inputs)
    single = neuron_section(neurons)
    chart = neuron_map(neurons.facts, search.candidates, inputs.width)
    scopes = scopes_section(neurons)
    controls = controls_section(inputs, run_names)
    sections = {
        "behaviour": behaviour,
        "rules": rules,
        "search": search,
        "neurons": single,
        "map": chart,
        "scopes": scopes,
        "controls": controls,
    }
    data = {
        "grids": {grid.name: grid.to_json() for grid in _grids(sections)},
        "neurons": single.details,
        "trees": {view.name: view.tree.to_json() for view in search.circuits if view.tree is not None},
        "map": chart.points if chart else [],
        "scatter": scopes.scatter.points if scopes.scatter else [],
    }
    return _render({**_heading(inputs, sections), **sections}, data)


def _grids(sections: dict[str, Any]) -> Iterator[Grid]:
    """Every table of the page that has more rows than the page shows at once, or rows that open."""
    for section in sections.values():
        for value in vars(section).values() if section is not None else ():
            if isinstance(value, Grid) and (value.needs_tools or len(value.rows) > 1):
                yield value


def _heading(inputs: PageInputs, sections: dict[str, Any]) -> dict[str, Any]:
    root, run = inputs.root, inputs.run
    return {
        "task": visible(task_label(root.task), 60),
        "model": visible(root.llm, 120),
        "run_label": visible(label_of(run.run_name), 160) if run else "",
        "run_name": visible(run.run_name, 200) if run else "",
        "key_figures": list(_key_figures(sections)),
        "hq_threshold": f"{inputs.options.hq_threshold:g}",
        "max_prompts": inputs.options.max_prompts,
        "percent": percent,
        "decimal": decimal,
        "count": count,
        "plural": plural,
    }


def _key_figures(sections: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(number, what it is, a remark) of the tiles under the title."""
    behaviour, search, neurons = sections["behaviour"], sections["search"], sections["neurons"]
    yield count(behaviour.n_prompts), "prompts", f"{behaviour.rate} {behaviour.positive_name}"
    yield count(search.n_agonists), "agonist neurons", "found by the search, both regimes"
    total = search.total
    if total is not None and total.n_candidates:
        share = percent(total.percent_of_singles / 100)
        over = f"N = {total.n_candidates:,}" + (f", {total.n_circuits} searches" if total.n_circuits > 1 else "")
        yield count(total.n_groups), "group tests", f"{share} of brute force ({over})"
    elif total is not None:
        yield count(total.n_groups), "group tests", "number of candidates not recorded"
    held_out = neurons.n_high["test"]
    if held_out is not None:
        remark = f"of {plural(neurons.n_ruled, 'neuron')} with a rule, MCC on held-out prompts"
        yield count(held_out), "good anchored rules (TEST)", remark


# ---------------------------------------------------------------- template


def script_json(value: object) -> str:
    """JSON that may stand in a script element: no `<`, `>` or `&` is in it, so nothing can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Only inside strings can these occur, and there an escape means the same character.
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _render(context: dict[str, Any], data: dict[str, Any]) -> str:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = ((_TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    return environment.get_template("report.html").render(
        # Ours, and covered by the digests below; everything else is escaped.
        style=Markup(style),
        script=Markup(script),
        data=Markup(script_json(data)),
        style_digest=_digest(style),
        script_digest=_digest(script),
        **context,
    )


def _digest(text: str) -> str:
    """What a Content-Security-Policy names an inline element by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
