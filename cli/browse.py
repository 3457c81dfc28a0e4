"""``fpo browse``: the store on a page."""

import ipaddress
import logging
import secrets
from typing import Annotated

import typer

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


def browse(
    store: Annotated[
        str | None,
        typer.Argument(
            help="A folder or s3://bucket/prefix [FPO_STORE, or fpo-store].", show_default=False
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 4242,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Show it in a browser.")] = False,
) -> None:
    """Browse feature caches on a page: features, where they fire, pairs, what training moved.

    It reads the store directly and writes nothing but labels. It listens on this machine alone; at
    another address it asks for the token that is in the address it prints.

    \b
    Examples:
      fpo browse
      fpo browse s3://bucket/prefix --port 8000
    """
    import socket

    import uvicorn

    from explorer import open_store
    from explorer.web.app import make_app
    from fpo_core.errors import FPOError

    log = logging.getLogger("fpo")
    explored = open_store(store)
    explored.artifacts()  # a store that cannot be read is told before there is a page
    local = host in LOOPBACK
    token = None if local else secrets.token_urlsafe(16)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise FPOError(
            f"cannot listen at {host}, port {port} ({error.strerror}); take another --port"
        ) from error
    shown, port = f"[{host}]" if ":" in host else host, listener.getsockname()[1]
    url = f"http://{shown}:{port}/" + (f"?token={token}" if token else "")
    if not local:
        log.warning("others can reach this address: the token in it lets them in, unencrypted")
    log.info("browse     %s   (Ctrl-C ends it)", url)
    if open_:
        typer.launch(url)
    names = LOOPBACK if local else LOOPBACK | {host, *_own_names(host)}
    app = make_app(explored, frozenset(names), token)
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    uvicorn.Server(config).run(sockets=[listener])


def _own_names(host: str) -> set[str]:
    """What this machine is called, where it listens at all of its addresses."""
    import socket

    try:
        unspecified = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return set()
    if not unspecified:
        return set()
    name = socket.gethostname()
    addresses = {str(one[4][0]) for one in socket.getaddrinfo(name, None)}
    return {name, socket.getfqdn(), *addresses}
