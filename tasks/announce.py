"""Tell Prefect's UI what a run makes: artifacts of stages and runs, progress, the report, tags."""

import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext, TaskRunContext

from fpo_core.progress import Progress, watched
from tasks.run import Outcome, PipelineRun, human_bytes

log = logging.getLogger("fpo.stage")

PROGRESS_SECONDS = 5.0  # from one update of a progress artifact to the next


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
        key=_key(outcome.stage),
        markdown=f"| {outcome.stage} | |\n|---|---|\n{table}\n",
        description=f"{outcome.artifact} {outcome.state}",
    )
    return outcome


def announce_run(outcomes: Mapping[str, Outcome]) -> None:
    """Attach a table of all its stages to the current flow run."""
    if FlowRunContext.get() is None:
        return
    table = [
        {
            "stage": one.stage, "state": one.state, "artifact": one.reference, "rows": one.rows,
            "size": human_bytes(one.bytes), "seconds": round(one.seconds, 1),
            "tokens/s": round(one.tokens_per_second) or None,
        }
        for one in outcomes.values()
    ]  # fmt: skip
    states = ", ".join(f"{one.stage} {one.state}" for one in outcomes.values())
    create_table_artifact(table, key="fpo-run", description=states)


def announce_report(run: PipelineRun, page: Path) -> None:
    """Store the report with the run's record, and link it from the current flow run.

    The link leads to ``fpo browse`` (``FPO_BROWSE_URL``): from a page of Prefect's UI, a browser
    opens neither a ``file:`` nor an ``s3:`` address.
    """
    if FlowRunContext.get() is None:
        return
    with tempfile.TemporaryDirectory() as folder:  # the stored file is moved
        kept = Path(run.keep_file(Path(shutil.copy(page, folder))))
    url = run.store.url.rstrip("/")
    store = url if "://" in url else str(Path(url).expanduser().absolute())
    create_link_artifact(
        f"{_browse_url()}/report/{kept.parent.name}",
        link_text=page.name,
        key="fpo-report",
        description=f"The report of {run.recipe.name}, {run.recipe.train.method}. "
        f"`fpo browse {store}` serves this link. The file is `{store}/{kept}`.",
    )


def _browse_url() -> str:
    """Return where people reach ``fpo browse``, without a slash at the end."""
    url = os.environ.get("FPO_BROWSE_URL") or "http://127.0.0.1:4242"  # its default port
    return (url if "://" in url else f"http://{url}").rstrip("/")


def tag_run(run: PipelineRun) -> None:
    """Tag the current flow run with its recipe, method and model."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    about = (f"recipe:{run.recipe.name}", f"method:{run.recipe.train.method}",
             f"model:{run.recipe.model.source}")  # fmt: skip
    with get_client(sync_client=True) as client:
        tags = {*context.flow_run.tags, "fpo", *about}
        client.update_flow_run(context.flow_run.id, tags=sorted(tags))


@contextmanager
def progress_shown() -> Iterator[None]:
    """Show long work within as progress artifacts of its task runs."""
    shown: dict[int, UUID] = {}
    last = 0.0

    def show(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if not progress.total or TaskRunContext.get() is None or now - last < PROGRESS_SECONDS:
            return
        last = now
        share = min(100.0, 100 * progress.done / progress.total)
        try:
            if id(progress) not in shown:
                key = f"{_key(progress.label)}-progress"
                found = create_progress_artifact(share, key=key, description=progress.label)
                assert isinstance(found, UUID)
                shown[id(progress)] = found
            else:
                update_progress_artifact(shown[id(progress)], progress=share)
        except Exception:  # a server that is away for a moment is no reason to stop
            log.debug("progress of %s not shown", progress.label, exc_info=True)

    with watched(show):
        yield


def _key(name: str) -> str:
    """An artifact's key, of what Prefect allows."""
    return f"fpo-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}"
