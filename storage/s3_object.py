"""An object of a bucket as a file, of which only what is read is fetched."""

import io
import os

from botocore.exceptions import ClientError

from storage.errors import FileDamaged, StoreError
from storage.s3_bucket import Bucket, again, blocks
from storage.s3_errors import BrokenAnswerError, is_missing


class ObjectReader(io.RawIOBase):
    """Reads by ranges; each read is one request.

    Args:
        bucket: where it is.
        name: of the object.
        size: its bytes.
    """

    def __init__(self, bucket: Bucket, name: str, size: int) -> None:
        super().__init__()
        self._bucket, self._name, self._size, self._place = bucket, name, size, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place, as files do."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def tell(self) -> int:
        """The place."""
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Fill a buffer from here on.

        Raises:
            FileDamaged: the object is gone, or of another size.
            StoreError: it cannot be read.
        """
        end = min(self._place + len(buffer), self._size)
        if end <= self._place:
            return 0
        with self._bucket.in_words():
            try:
                data = again(lambda: self._fetch(self._place, end))
            except ClientError as error:
                if is_missing(error):
                    raise FileDamaged("it is missing") from None
                if error.response.get("Error", {}).get("Code") in ("InvalidRange", "416"):
                    raise FileDamaged(f"it is cut off, written were {self._size} bytes") from None
                raise
        buffer[: len(data)] = data
        self._place = end
        return len(data)

    def _fetch(self, begin: int, end: int) -> bytes:
        answer = self._bucket.client.get_object(
            Bucket=self._bucket.name, Key=self._name, Range=f"bytes={begin}-{end - 1}"
        )
        if "ContentRange" not in answer:
            raise StoreError("the service, or a proxy before it, does not answer ranges of objects")
        whole = int(answer["ContentRange"].rpartition("/")[2])
        if whole != self._size:
            raise FileDamaged(f"it has {whole} bytes, written were {self._size}")
        data = b"".join(blocks(answer))
        if len(data) != end - begin:
            raise BrokenAnswerError("a range came short")
        return data
