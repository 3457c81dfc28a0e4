"""``fpo browse``: artifacts, features, pairs and what training moved, as pages.

Everything of a view is in its URL. Text from data is escaped by the templates and made visible by
``explorer.text``; the pages load nothing but this server's own style, script and charts.
"""

import re
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs, urlsplit

from fastapi import FastAPI, Query, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates
from jinja2 import Environment, FileSystemLoader
from starlette.concurrency import run_in_threadpool

from explorer.cache import FeatureCache
from explorer.errors import NotReadable, NotThere
from explorer.features import (
    SORTS,
    FeatureQuery,
    Histogram,
    feature_table,
    feature_view,
)
from explorer.group import group_yaml
from explorer.metadata import parse_conditions
from explorer.moved import moved_features
from explorer.pairs import pair_list, pair_view
from explorer.store import ExploredStore
from explorer.text import visible
from explorer.web.charts import histogram_svg
from explorer.web.opened import Indexing, Opened
from fpo_core.errors import FPOError, UsageError
from storage.catalog import find_artifact
from storage.errors import ArtifactMissing, StoreError
from storage.lineage import ancestors, descendants

HERE = Path(__file__).parent
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
# A report is one file with its style and pictures in it.
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
REPORT_POLICY += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
COOKIE = "fpo-browse"
ROWS, PAIRS, EXAMPLES = 50, 25, 10
GLANCE = 0.2  # seconds that a feature's page waits for the index that only its chart needs,
LONG = 20.0  # which is asked for by itself then
FOLDERS = re.compile(r"(?<![\w.:/])/(?:[^\s/'\":,;]+/)+")
MOVED = 60

Handler = Callable[[Request], Awaitable[Response]]


def make_app(store: ExploredStore, hosts: frozenset[str], token: str | None = None) -> FastAPI:
    """The pages over a store.

    Args:
        store: read-only but for labels.
        hosts: names that the server may be called by; others are answered with an error, so that
            no page elsewhere can read this one through a name of its own.
        token: asked for once in the URL, then kept in a cookie; None: nobody is asked.
    """
    app = FastAPI(title="fpo browse", docs_url=None, redoc_url=None, openapi_url=None)
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
    # By default only names that end in .html are escaped.
    loader = FileSystemLoader(HERE / "templates")
    templates = Jinja2Templates(env=Environment(loader=loader, autoescape=True))
    templates.env.filters |= {"number": _number, "visible": visible, "metadata": _metadata}
    templates.env.globals["sorts"] = SORTS
    templates.env.globals["store_name"] = _store_name(store)
    opened = Opened(store)

    def page(request: Request, name: str, status: int = 200, **values: Any) -> HTMLResponse:
        return templates.TemplateResponse(request, f"{name}.html.j2", values, status_code=status)

    def told(error: Exception) -> str:
        """An error's words; no page tells where on this machine something is."""
        if isinstance(error, OSError):
            return error.strerror or type(error).__name__
        text = str(error).replace(store.store.url, _store_name(store))
        return FOLDERS.sub("", text)

    def histogram_of(cache: FeatureCache, number: int, wait: float) -> tuple[Histogram | None, str]:
        try:
            return opened.histogram(cache, number, wait), ""
        except (FPOError, StoreError) as error:
            return None, told(error)

    @app.middleware("http")
    async def guard(request: Request, call_next: Handler) -> Response:
        host = request.headers.get("host", "").rsplit(":", 1)[0].strip("[]")
        if host not in hosts:
            return Response("this server is not called so", 421)
        if token is not None and not _is_known(request, token):
            return page(request, "error", 403, title="Not allowed", text="Open the address that "
                        "`fpo browse` printed: it has the token.")  # fmt: skip
        response = await call_next(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        if token is not None and COOKIE not in request.cookies:
            response.set_cookie(COOKIE, token, httponly=True, samesite="strict")
        return response

    @app.exception_handler(FPOError)
    @app.exception_handler(StoreError)
    @app.exception_handler(OSError)
    async def failed(request: Request, error: Exception) -> Response:
        status, title = _status(error)
        text = told(error)
        shown = page(request, "error", status, title=title, text=text)
        if isinstance(error, Indexing):
            shown.headers["Refresh"] = "3"
        return shown

    @app.get("/")
    def start(request: Request) -> Response:
        infos = sorted(store.artifacts(), key=lambda one: one.created or "", reverse=True)
        caches = [one for one in infos if one.stage == "features" and one.state == "complete"]
        return page(request, "start", infos=infos, caches=caches)

    @app.get("/artifact/{stage}/{version}")
    def artifact(request: Request, stage: str, version: str) -> Response:
        infos = store.artifacts()
        try:
            info = find_artifact(store.store, f"{stage}/{version}", infos)
        except ArtifactMissing as error:
            raise NotThere(str(error)) from error
        found = None
        if info.state == "complete":
            found = store.store.artifact(info.stage, info.version).manifest
        return page(
            request, "artifact", info=info, manifest=found,
            above=ancestors(info.name, infos), below=descendants(info.name, infos),
        )  # fmt: skip

    @app.get("/cache/{name}")
    def features(
        request: Request, name: str, sort: str = "difference", ascending: bool = False,
        min_density: float = 0.0, max_density: float = 1.0, search: str = "",
        offset: Annotated[int, Query(ge=0)] = 0,
    ) -> Response:  # fmt: skip
        cache = opened.cache(name)
        query = FeatureQuery(sort, not ascending, min_density, max_density, search, offset, ROWS)
        table = feature_table(cache, query, opened.labels(cache))
        return page(request, "features", cache=cache, query=query, table=table, rows=ROWS)

    @app.get("/cache/{name}/feature/{number}")
    def feature(request: Request, name: str, number: int) -> Response:
        cache = opened.cache(name)
        view = feature_view(cache, opened.pairs(cache), number, EXAMPLES, opened.labels(cache))
        histogram, why_not = histogram_of(cache, number, GLANCE)
        return page(request, "feature", cache=cache, view=view, histogram=histogram,
                    why_not=why_not, neuronpedia=cache.sae.neuronpedia_url(number))  # fmt: skip

    @app.get("/cache/{name}/feature/{number}/distribution")
    def distribution(request: Request, name: str, number: int) -> Response:
        cache = opened.cache(name)
        cache.check_feature(number)
        histogram, why_not = histogram_of(cache, number, LONG)
        shown = page(request, "distribution", cache=cache, number=number, histogram=histogram,
                     why_not=why_not)  # fmt: skip
        if histogram is None and not why_not:
            shown.headers["Refresh"] = "3"
        return shown

    @app.get("/cache/{name}/feature/{number}/histogram.svg")
    def histogram(name: str, number: int) -> Response:
        cache = opened.cache(name)
        found = opened.histogram(cache, number, LONG)
        if found is None:
            raise Indexing(f"the index of {cache.name}'s features is being made, once")
        return Response(
            histogram_svg(found),
            media_type="image/svg+xml",
            headers={"Cache-Control": "max-age=3600"},
        )

    @app.get("/cache/{name}/feature/{number}/logits")
    def logits(request: Request, name: str, number: int) -> Response:
        cache = opened.cache(name)
        cache.check_feature(number)
        effect, why_not = None, ""
        try:
            effect = opened.logits(cache, number)
        except NotThere as error:
            why_not = told(error)
        return page(request, "logits", cache=cache, number=number, effect=effect, why_not=why_not)

    @app.post("/cache/{name}/feature/{number}/label")
    async def label(request: Request, name: str, number: int) -> Response:
        origin = request.headers.get("origin")
        if origin is None or urlsplit(origin).netloc != request.headers.get("host"):
            raise UsageError("labels are given on this page only")
        body = (await request.body())[:4096].decode("utf-8", "replace")
        text = parse_qs(body, keep_blank_values=True).get("text", [""])[0]

        def change() -> None:
            cache = opened.cache(name)
            cache.check_feature(number)
            opened.labels(cache).set(number, text)

        await run_in_threadpool(change)
        return RedirectResponse(f"/cache/{name}/feature/{number}", 303)

    @app.get("/cache/{name}/pairs")
    def pairs(
        request: Request,
        name: str,
        offset: Annotated[int, Query(ge=0)] = 0,
        where: Annotated[list[str] | None, Query()] = None,
    ) -> Response:
        cache = opened.cache(name)
        asked = [one for one in where or () if one.strip()]
        numbers = opened.matching(cache, parse_conditions(asked, cache.metadata))
        rows = pair_list(cache, opened.pairs(cache), offset, PAIRS, numbers)
        shown = {"pairs": rows, "offset": offset, "rows": PAIRS, "total": len(numbers)}
        return page(request, "pairs", cache=cache, where=asked, **shown)

    @app.get("/cache/{name}/pair/{pair_id}")
    def pair(
        request: Request, name: str, pair_id: str, feature: int | None = None
    ) -> Response:  # fmt: skip
        cache = opened.cache(name)
        view = pair_view(cache, opened.pairs(cache), pair_id, feature, opened.labels(cache))
        pieces = (*view.chosen, *view.rejected)
        top = max((piece.value for piece in pieces), default=0.0)
        return page(request, "pair", cache=cache, view=view, feature=feature, top=top)

    @app.get("/cache/{name}/group")
    def group(
        request: Request, name: str, features: str = "", called: str = "group", weight: float = 1.0
    ) -> Response:  # fmt: skip
        cache = opened.cache(name)
        chosen = _numbers(features)
        for one in chosen:
            cache.check_feature(one)
        text = group_yaml(chosen, called, weight) if chosen else ""
        labels = opened.labels(cache)
        named = [(one, labels.text(one)) for one in chosen]
        return page(request, "group", cache=cache, chosen=named, called=called, weight=weight,
                    text=text)  # fmt: skip

    @app.get("/training/{version}")
    def training(request: Request, version: str) -> Response:
        moved = moved_features(store, version)
        return page(request, "training", moved=moved, rows=moved.rows.head(MOVED).to_dicts())

    @app.get("/report/{run}")
    def report(run: str) -> Response:
        policy = {"Content-Security-Policy": REPORT_POLICY}
        return HTMLResponse(store.report(run), headers=policy)

    return app


def _is_known(request: Request, token: str) -> bool:
    given = request.query_params.get("token") or request.cookies.get(COOKIE) or ""
    return secrets.compare_digest(given.encode(), token.encode())


def _status(error: Exception) -> tuple[int, str]:
    if isinstance(error, NotThere):
        return 404, "Not here"
    if isinstance(error, NotReadable):
        return 409, "Cannot be shown"
    if isinstance(error, UsageError):
        return 400, "Not understood"
    if isinstance(error, Indexing):
        return 503, "One moment"
    return 503, "The store does not answer"


def _numbers(text: str) -> list[int]:
    found = []
    for part in filter(None, text.replace(",", " ").split()):
        if not part.isdigit():
            raise UsageError(f"{part[:40]!r} is no feature's number")
        found.append(int(part))
    return found


def _store_name(store: ExploredStore) -> str:
    """The store without the machine's folders."""
    url = store.store.url
    return url if "://" in url else Path(url).name


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _metadata(value: Any, longest: int) -> str:
    """Return a pair's metadata as text; a dash where it has none."""
    if value is None:
        return "–"
    return str(value).lower() if isinstance(value, bool) else visible(str(value), longest)
