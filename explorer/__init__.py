"""Browsing stored feature caches: in a terminal, in a notebook and on a page."""

from explorer.store import ExploredStore, open_store

__all__ = ["ExploredStore", "open_store"]
