"""What a look at a store can come to instead of an answer; each says what to do."""

from fpo_core.errors import FPOError


class NotThere(FPOError):
    """An artifact, feature or pair that the store does not have."""


class NotReadable(FPOError):
    """An artifact that is there and cannot be shown: another kind, or a newer schema."""
