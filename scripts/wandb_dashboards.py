"""Makes a Weights & Biases workspace and report of a project's runs.

    python scripts/wandb_dashboards.py --dry
    python scripts/wandb_dashboards.py --entity TEAM --project cola

--dry builds both, checks that their JSON reads back as the same panels, and lists these with the
names of what they show; it needs no key and no network. Without it every call saves new ones.
"""

import argparse
import sys
from typing import Any

try:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
except ImportError:
    sys.exit("wandb-workspaces is missing: pip install 'cola[dashboards]'")

from wandb_panels import BASE_PEAK, panel_names, sections

from cola.wandb_tracker import STEP, has_key

NAME = "ColA"
GROUPS = ("task", "model", "method")
"""Runs that agree in these labels are seeds of one another: panels show mean and deviation."""

COLUMNS = (
    "run:displayName",
    "run:state",
    *(f"config:labels.value.{label}" for label in GROUPS),
    "summary:result.metric",
    "summary:result.value",
    "summary:trainable_parameters",
    f"summary:{BASE_PEAK}.max",
    "summary:iteration_seconds",
    "summary:wall_seconds",
)
"""Of the table of runs."""


def build_workspace(entity: str, project: str) -> ws.Workspace:
    """Sections of panels beside the table of runs, grouped by seeds."""
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            ws.Section(name=section.name, panels=section.panels, is_open=True)
            for section in sections()
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=50),
        runset_settings=ws.RunsetSettings(
            groupby=[ws.Metric("Group"), *(ws.Config(f"labels.{label}") for label in GROUPS)],
            pinned_columns=list(COLUMNS),
        ),
    )


def build_report(entity: str, project: str) -> wr.Report:
    """The same as a page to read and to share, with a table of all runs at its end.

    Run sets name no project, which means the report's: naming one is looked up over the network.
    """
    blocks: list[Any] = [wr.TableOfContents()]
    for section in sections():
        for index, panel in enumerate(section.panels):
            panel.layout = wr.Layout(x=12 * (index % 2), y=8 * (index // 2), w=12, h=8)
        grouped = wr.Runset(
            name="by task, model and method",
            groupby=[f"config.labels.{label}" for label in GROUPS],
        )
        blocks += [
            wr.H1(section.name),
            wr.P(section.about),
            wr.PanelGrid(runsets=[grouped], panels=section.panels, hide_run_sets=True),
        ]
    table = wr.Runset(
        name="runs",
        visible_columns=list(COLUMNS),
        column_order=list(COLUMNS),
        lock_columns=True,
    )
    blocks += [wr.H1("Runs"), wr.PanelGrid(runsets=[table])]
    return wr.Report(
        entity=entity,
        project=project,
        title=NAME,
        description="Scores, learning curves, time and memory of collaborative adaptation.",
        blocks=blocks,
        width="fluid",
    )


def shown(view: ws.Workspace | wr.Report) -> list[str]:
    """Names of all that the panels of a view show, in order."""
    if isinstance(view, ws.Workspace):
        holders = view.sections
    else:
        holders = [block for block in view.blocks if isinstance(block, wr.PanelGrid)]
    return [name for holder in holders for panel in holder.panels for name in panel_names(panel)]


def check(view: ws.Workspace | wr.Report) -> int:
    """Bytes of a view's JSON, which reads back as a view that shows the same.

    Raises:
        ValueError: it does not.
    """
    # The library has no public way to see what it would send.
    model = view._to_model()
    text = model.model_dump_json(by_alias=True, exclude_none=True)
    again = type(view)._from_model(type(model).model_validate_json(text))
    if shown(again) != shown(view):
        raise ValueError(f"{type(view).__name__}: its JSON does not read back as the same panels")
    return len(text)


def main() -> int:
    """Saves both, or lists them. Exit code 2 without a key."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entity", help="user or team; the key's default")
    parser.add_argument("--project", default="cola", help="tracking.project of the runs")
    parser.add_argument("--dry", action="store_true", help="build, check and list, save nothing")
    arguments = parser.parse_args()
    if not arguments.dry and not has_key():
        parser.error(
            "no Weights & Biases key: run `wandb login` or set WANDB_API_KEY; --dry shows what "
            "would be saved"
        )
    entity = arguments.entity or ("ENTITY" if arguments.dry else _default_entity())
    workspace = build_workspace(entity, arguments.project)
    report = build_report(entity, arguments.project)
    num_bytes = [check(view) for view in (workspace, report)]
    if arguments.dry:
        print(listing())
        print("workspace: {:,} bytes of JSON, report: {:,}; both read back".format(*num_bytes))
    else:
        report.save()  # first, for it makes a project that is not there yet
        workspace.save()
        print(report.url, workspace.url, sep="\n")
    return 0


def listing() -> str:
    """Sections, their panels, and the names of what those show."""
    lines = []
    for section in sections():
        lines.append(f"{section.name}: {section.about}")
        for panel in section.panels:
            title = getattr(panel, "title", "predictions")
            lines.append(f"    {title}: {', '.join(panel_names(panel))}")
    return "\n".join(lines)


def _default_entity() -> str:
    import wandb

    entity: str = wandb.Api().default_entity
    return entity


if __name__ == "__main__":
    sys.exit(main())
