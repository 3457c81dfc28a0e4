"""Prefect flows: what runs, in which order."""

from fpo_core.quiet import set_quiet_defaults

set_quiet_defaults()  # before prefect is imported: a worker starts here, not at the `fpo` command
