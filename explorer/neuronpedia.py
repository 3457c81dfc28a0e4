"""Neuronpedia's name of an SAE, by sae-lens' directory of released ones."""

import functools
import importlib.util
from pathlib import Path
from typing import Any

import yaml

SITE = "https://www.neuronpedia.org"


def page_of(source: str | None, feature: int) -> str | None:
    """A feature's page; None where the SAE is none that Neuronpedia has.

    Args:
        source: the recipe's, ``release:sae_id`` where it is a released one.
        feature: its index.
    """
    name = _name_of(source) if source and ":" in source else None
    return f"{SITE}/{name}/{feature}" if name else None


@functools.cache
def _name_of(source: str) -> str | None:
    release, _, sae_id = source.partition(":")
    releases = _directory()
    found = releases.get(release)
    if found is None:
        return None
    one = next((sae for sae in found["saes"] if sae["id"] == sae_id), None)
    if one is None:
        return None
    if one.get("neuronpedia"):
        return one["neuronpedia"]
    # The canonical SAEs have the names; one of them may be this one by another id.
    for other in releases.values():
        for sae in other["saes"] if other["repo_id"] == found["repo_id"] else ():
            if sae.get("neuronpedia") and sae.get("path") == one.get("path", sae_id):
                return sae["neuronpedia"]
    return None


@functools.cache
def _directory() -> dict[str, Any]:
    """Read without importing sae-lens, which takes seconds."""
    package = importlib.util.find_spec("sae_lens")
    if package is None or package.origin is None:
        return {}
    file = Path(package.origin).parent / "pretrained_saes.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(file.read_text(encoding="utf-8"), loader)  # noqa: S506  a safe loader
