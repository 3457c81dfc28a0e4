"""The programs that open shards without this project, each asked the same questions."""

from pathlib import Path
from typing import NamedTuple

import duckdb
import duckdb_extension_httpfs
import fsspec
import polars as pl
import pyarrow.dataset as ds
from datasets import IterableDataset, load_dataset
from fsspec.implementations.arrow import ArrowFSWrapper
from pyarrow.fs import S3FileSystem

VERSION = "0123456789abcdef"
COLUMNS = ["pair_id", "mass"]
PAIR = f"{3:016x}"  # of row 3, in the first shard


class Login(NamedTuple):
    """What a reader has to know of the object store."""

    endpoint: str
    key: str
    secret: str

    @property
    def address(self) -> str:
        """Host and port."""
        return self.endpoint.removeprefix("http://")

    def arrow(self) -> S3FileSystem:
        """The object store for pyarrow."""
        return S3FileSystem(
            access_key=self.key, secret_key=self.secret, endpoint_override=self.address,
            scheme="http", region="us-east-1",
        )  # fmt: skip


class Stored(NamedTuple):
    """A store that others read.

    Attributes:
        root: a folder, or ``s3://bucket/prefix``.
        login: None on disk.
    """

    root: str
    login: Login | None

    def folder(self, table: str) -> str:
        """Where a table's shards lie."""
        artifact, _, name = table.partition("/")
        return f"{self.root}/artifacts/{artifact}/{VERSION}/data/{name}".rstrip("/")

    def glob(self, table: str) -> str:
        """A pattern for a table's shards, of all versions."""
        return self.folder(table).replace(VERSION, "*") + "/*.parquet"


class Polars:
    """``scan_parquet``."""

    damage = pl.exceptions.ComputeError

    def scan(self, stored: Stored, table: str) -> pl.LazyFrame:
        login = stored.login
        options = login and {
            "aws_endpoint_url": login.endpoint,
            "aws_access_key_id": login.key,
            "aws_secret_access_key": login.secret,
            "aws_region": "us-east-1",
            "aws_allow_http": "true",
        }
        return pl.scan_parquet(stored.glob(table), storage_options=options)

    def types(self, stored: Stored, table: str) -> dict[str, str]:
        return {name: str(kind) for name, kind in self.scan(stored, table).collect_schema().items()}

    def everything(self, stored: Stored, table: str) -> list[dict]:
        return self.scan(stored, table).collect().to_dicts()

    def query(self, stored: Stored) -> pl.LazyFrame:
        return self.scan(stored, "features/pooled").filter(pair_id=PAIR).select(COLUMNS)

    def pair(self, stored: Stored) -> list[dict]:
        return self.query(stored).collect().to_dicts()


class DuckDB:
    """SQL; on S3 with the extension ``httpfs``, from a wheel instead of DuckDB's own site."""

    damage = duckdb.Error
    query = "select pair_id, mass from read_parquet(?) where pair_id = ?"

    def connect(self, stored: Stored) -> duckdb.DuckDBPyConnection:
        connection = duckdb.connect(config={"autoinstall_known_extensions": "false"})
        if login := stored.login:
            wheel = Path(duckdb_extension_httpfs.__file__).parent
            connection.load_extension(
                str(wheel / "extensions" / f"v{duckdb.__version__}" / "httpfs.duckdb_extension")
            )
            connection.execute(
                f"create secret (type s3, key_id '{login.key}', secret '{login.secret}', "
                f"endpoint '{login.address}', region 'us-east-1', url_style 'path', use_ssl false)"
            )
        return connection

    def sql(self, stored: Stored, query: str, *values: str) -> list[dict]:
        found = self.connect(stored).sql(query, params=values)
        return found.to_arrow_table().to_pylist()

    def types(self, stored: Stored, table: str) -> dict[str, str]:
        found = self.sql(stored, f"describe from '{stored.glob(table)}'")
        return {row["column_name"]: row["column_type"] for row in found}

    def everything(self, stored: Stored, table: str) -> list[dict]:
        return self.sql(stored, f"from '{stored.glob(table)}'")

    def pair(self, stored: Stored) -> list[dict]:
        return self.sql(stored, self.query, stored.glob("features/pooled"), PAIR)


class PyArrow:
    """``pyarrow.dataset``."""

    damage = OSError
    condition = ds.field("pair_id") == PAIR

    def dataset(self, stored: Stored, table: str) -> ds.Dataset:
        path = stored.folder(table).removeprefix("s3://")
        return ds.dataset(path, filesystem=stored.login and stored.login.arrow())

    def types(self, stored: Stored, table: str) -> dict[str, str]:
        fields = self.dataset(stored, table).schema
        return {field.name: str(field.type).replace(" not null", "") for field in fields}

    def everything(self, stored: Stored, table: str) -> list[dict]:
        return self.dataset(stored, table).to_table().to_pylist()

    def scanner(self, stored: Stored) -> ds.Scanner:
        dataset = self.dataset(stored, "features/pooled")
        return dataset.scanner(columns=COLUMNS, filter=self.condition)

    def pair(self, stored: Stored) -> list[dict]:
        return self.scanner(stored).to_table().to_pylist()


class HuggingFace:
    """``datasets``, streaming."""

    damage = OSError

    def stream(self, stored: Stored, table: str, **settings: object) -> IterableDataset:
        if stored.login:
            fsspec.register_implementation("s3", ArrowFSWrapper, clobber=True)
            settings["storage_options"] = {"fs": stored.login.arrow()}
        return load_dataset(
            "parquet", data_files=stored.glob(table), split="train", streaming=True, **settings
        )

    def types(self, stored: Stored, table: str) -> dict[str, str]:
        features = self.stream(stored, table).features
        return {name: str(kind) for name, kind in (features or {}).items()}

    def everything(self, stored: Stored, table: str) -> list[dict]:
        return list(self.stream(stored, table))

    def query(self, stored: Stored) -> IterableDataset:
        condition = [("pair_id", "==", PAIR)]
        return self.stream(stored, "features/pooled", columns=COLUMNS, filters=condition)

    def pair(self, stored: Stored) -> list[dict]:
        return list(self.query(stored))


Reader = Polars | DuckDB | PyArrow | HuggingFace
READERS = [Polars(), DuckDB(), PyArrow(), HuggingFace()]  # in the order of SEEN_AS
