"""Prefect tasks, one module a stage: read artifacts, call fpo_core, commit an artifact."""
