"""Tell Prefect's UI what a stage made: a markdown artifact on the task run."""

import re

from prefect.artifacts import create_markdown_artifact
from prefect.context import TaskRunContext

from tasks.run import Outcome, human_bytes


def announce(outcome: Outcome) -> Outcome:
    """Attach the outcome to the current task run, when there is one; returns it."""
    if TaskRunContext.get() is None:
        return outcome
    rows = [
        ("artifact", f"`{outcome.reference}`"),
        ("state", outcome.state),
        ("rows", f"{outcome.rows:,}" if outcome.rows else "-"),
        ("size", human_bytes(outcome.bytes)),
        ("seconds", f"{outcome.seconds:.1f}"),
        ("tokens/s", f"{outcome.tokens_per_second:,.0f}" if outcome.tokens_per_second else "-"),
        *((f"input `{name}`", f"`{version}`") for name, version in outcome.inputs.items()),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    create_markdown_artifact(
        key=f"fpo-{re.sub('[^a-z0-9]', '-', outcome.stage.lower())}",  # what Prefect allows
        markdown=f"| {outcome.stage} | |\n|---|---|\n{table}\n",
        description=f"{outcome.artifact} {outcome.state}",
    )
    return outcome
