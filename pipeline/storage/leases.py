"""Leases (`pipeline.retraining.lease`) that are kept in the store, so that runs on machines without a common disk keep apart."""

from __future__ import annotations

from pipeline.retraining.lease_store import Entry
from pipeline.storage.objects import ObjectStore


class ObjectLeaseStore:
    """One record of a store, as `pipeline.retraining.lease_store.LeaseStore` has it. A record without content is one given back."""

    def __init__(self, store: ObjectStore, name: str) -> None:
        self._store, self._name = store, name

    def read(self) -> Entry:
        """The record as it is now."""
        content, version = self._store.read(self._name) or (b"", None)
        return Entry(content or None, version)

    def write(self, content: bytes | None, unchanged: str | None) -> str | None:
        """Create, replace or (with None) give back the record if its version is still `unchanged`; the new version."""
        if unchanged is None:
            return self._store.create(self._name, content or b"")
        return self._store.replace(self._name, content or b"", unchanged)
