"""The Ray cluster that shards are computed on: one that runs, or one of this machine.

Without an address a cluster is started and ended here. It listens on the loopback interface alone
and takes who knows its token, a random one; nothing is reported to Ray's makers.
"""

import importlib.util
import logging
import math
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from fpo_core.errors import FPOError
from fpo_core.recipe.schema import InferenceSettings

RETRIES = 2  # of a shard whose worker process died
ANSWER_SECONDS = 5
OBJECT_STORE_BYTES = 100 * 2**20  # receipts are all that comes back
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_ray(settings: InferenceSettings) -> None:
    """Refuse Ray where it is not installed, or no cluster answers where the recipe has one.

    Raises:
        FPOError: with what to do.
    """
    if settings.runner != "ray":
        return
    if importlib.util.find_spec("prefect_ray") is None:
        raise FPOError(
            "resources.inference.runner=ray needs the package prefect-ray, which is not installed: "
            "run `pip install 'fpo-pipeline[ray]'` in this environment, or leave the setting out"
        )
    if settings.address is not None:
        _check_answers(settings.address)


@contextmanager
def ray_cluster(settings: InferenceSettings) -> Iterator[Any]:
    """The started task runner, connected to the cluster; one of our own is gone afterwards."""
    check_ray(settings)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if settings.address is None:
        options |= _own_cluster(settings)
    # Ray first: prefect-ray's lazy import of it would load its exceptions a second time.
    ray_error = importlib.import_module("ray.exceptions").RayError
    from prefect_ray import RayTaskRunner

    runner = RayTaskRunner(settings.address, options)
    try:
        with _signals_later():
            runner.__enter__()
    except (ray_error, ConnectionError, RuntimeError, ValueError) as error:
        where = f"at {settings.address}" if settings.address else "of this machine"
        reason = str(error).strip().partition("\n")[0]
        raise FPOError(
            f"the Ray cluster {where} cannot be used ({type(error).__name__}: {reason}). It needs "
            f"the same releases of Ray and Python as here, and its token in RAY_AUTH_TOKEN"
        ) from error
    try:
        yield runner
    finally:
        runner.__exit__(None, None, None)


def _own_cluster(settings: InferenceSettings) -> dict[str, Any]:
    """Options of a cluster of this machine, closed to all others."""
    if "ray" not in sys.modules:  # it reads its environment once
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Ray's name for "listen on the loopback interface", which is its way on other systems.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    options: dict[str, Any] = {
        "address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES,
    }  # fmt: skip
    if settings.workers:
        options["num_cpus"] = math.ceil(settings.workers * settings.cpus)
    return options


def _check_answers(address: str) -> None:
    """Ask first: Ray itself tries for minutes."""
    place = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        socket.create_connection((place.hostname, place.port), ANSWER_SECONDS).close()
    except (OSError, ValueError) as error:  # a port beyond 65535 is no value
        raise FPOError(
            f"resources.inference.address={address}: no Ray cluster answers there ({error}). Start "
            f"one there with `ray start --head`, or leave the address out: then one is started on "
            f"this machine"
        ) from error


@contextmanager
def _signals_later() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back for the context: half a cluster does not end by itself.

    Ray, too, sets a handler of SIGTERM, which goes with the context.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _frame: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # else it was set outside of Python
                signal.signal(number, handler)
    for number in came[:1]:
        signal.raise_signal(number)


class Room(NamedTuple):
    """What a shard takes of the cluster, and how many are under way."""

    at_a_time: int
    options: dict[str, Any]  # Ray's, for each shard
    api: str  # where the workers report their task runs

    @classmethod
    def of(cls, settings: InferenceSettings) -> "Room":
        """Room for shards in the cluster that we are connected to.

        Raises:
            FPOError: no node of it has what a shard takes, or its nodes cannot report.
        """
        import ray
        from prefect.client.orchestration import get_client

        nodes = [node for node in ray.nodes() if node["Alive"]]
        sizes = [
            (node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)) for node in nodes
        ]
        gpus = settings.gpus
        if gpus is None:
            gpus = float(any(size[1] for size in sizes))
        fit = sum(
            int(min(size[0] / settings.cpus, size[1] / gpus if gpus else math.inf))
            for size in sizes
        )
        if not fit:
            largest = max(sizes, key=lambda size: (size[1], size[0]), default=(0, 0))
            raise FPOError(
                f"a shard takes {settings.cpus:g} CPUs and {gpus:g} GPUs "
                f"(resources.inference.cpus and .gpus), and no node of the Ray cluster has them: "
                f"its largest has {largest[0]:g} CPUs and {largest[1]:g} GPUs"
            )
        api = str(get_client(sync_client=True).api_url)
        others = {node["NodeManagerAddress"] for node in nodes}
        others -= {*LOOPBACK, ray.util.get_node_ip_address()}
        if others and urlsplit(api).hostname in LOOPBACK:
            raise FPOError(
                f"the Ray cluster has nodes on other machines ({', '.join(sorted(others))}), and "
                f"they cannot report to Prefect's server on this one, {api}: start one that they "
                f"reach (`prefect server start --host 0.0.0.0`), and set PREFECT_API_URL to it"
            )
        options: dict[str, Any] = {
            "num_cpus": settings.cpus, "num_gpus": gpus, "max_retries": RETRIES,
        }  # fmt: skip
        if not gpus and any(size[1] for size in sizes):  # then they are others'
            options["runtime_env"] = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
        return cls(settings.workers or fit, options, api)
