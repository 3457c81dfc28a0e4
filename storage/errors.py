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
        version: its version.
    """

    def __init__(self, message: str, artifact: str, version: str) -> None:
        super().__init__(message, artifact, version)  # all: it is pickled by its arguments
        self.artifact, self.version = artifact, version

    def __str__(self) -> str:
        return self.args[0]


class OtherFormat(StoreError):
    """A manifest that another version of this program wrote; nothing is wrong with it."""


class FileDamaged(StoreError):
    """One stored object that is not what was written; the message is the reason alone."""


class StoreUnwritable(StoreError):
    """The store's folder or bucket cannot be written."""


class RefConflict(StoreError):
    """Somebody else moved a ref at the same time, again and again."""


class HoldLost(StoreError):
    """This run was cut off from the store for so long that another may have taken over."""
