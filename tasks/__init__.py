"""Prefect tasks, one module a stage: read artifacts, call fpo_core, commit an artifact.

What imports torch is imported inside the function that computes: a run that reuses every stage,
`fpo plan` and `prefect deploy` do not wait for it.
"""
