"""What can go wrong with a store, each in words that say what to do."""


class StoreError(Exception):
    """Base of all of them."""


class ArtifactMissing(StoreError):
    """An artifact that is not there, or not finished."""


class ArtifactCorrupt(StoreError):
    """A file whose size or checksum is not what the manifest says.

    Args:
        message: what is wrong.
        artifact: name of the artifact, such as ``features``.
    """

    def __init__(self, message: str, artifact: str) -> None:
        super().__init__(message)
        self.artifact = artifact


class StoreUnwritable(StoreError):
    """The store's folder cannot be written."""


class RefConflict(StoreError):
    """Somebody else moved a ref at the same time, again and again."""
