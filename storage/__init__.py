"""Artifacts: versions, manifests, shards and where they are kept. Knows no torch."""
