"""``fpo prefect``: make a Prefect server ready for the pipeline's deployments."""

from typing import Annotated

import typer

from cli.store import AsJson

app = typer.Typer(
    help="Make a Prefect server ready for the deployments of prefect.yaml.",
    no_args_is_help=True, rich_markup_mode=None,
)  # fmt: skip


@app.callback()
def _commands() -> None:
    """With a single command, typer would leave its name out."""


@app.command("setup")
def setup(
    kubernetes: Annotated[
        bool,
        typer.Option("--kubernetes", help="Pools whose runs are Kubernetes jobs, see deploy/."),
    ] = False,
    gpu_runs: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Most runs at a time on fpo-h100: its GPU hosts."),
    ] = None,
    wait: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="For a server that is starting."),
    ] = 60,
    as_json: AsJson = False,
) -> None:
    """Make the work pools fpo-cpu and fpo-h100 and the automations that find dead runs.

    Those that exist are left as they are. PREFECT_API_URL names the server. Automations of an older
    version are replaced.

    \b
    Example:
      prefect server start &
      export PREFECT_API_URL=http://127.0.0.1:4200/api
      fpo prefect setup
      prefect --no-prompt deploy --all
      FPO_CHECKOUT=$PWD prefect worker start --pool fpo-cpu
      FPO_CHECKOUT=$PWD prefect worker start --pool fpo-h100 --limit 1   on each GPU host
    """
    from cli.show import print_json
    from flows.setup import set_up

    done = []
    for one in set_up(kubernetes=kubernetes, gpu_runs=gpu_runs, wait=wait):
        done.append(one)
        if not as_json:
            print(f"{one.state:<8} {one.what}  ({one.about})")
    if as_json:
        print_json(done)
        return
    kind = "kubernetes" if kubernetes else "process"
    print(
        f"\nblocks: none; the store and its credentials come from the workers' environment.\n"
        f"Next: `prefect --no-prompt deploy --all`, and a worker a host and pool:\n"
        f"  FPO_CHECKOUT=$PWD prefect worker start --type {kind} --pool fpo-cpu\n"
        f"  FPO_CHECKOUT=$PWD prefect worker start --type {kind} --pool fpo-h100 --limit 1"
    )
