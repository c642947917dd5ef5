#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["bottle>=0.12.23", "waitress>=3.0.1"]
# ///
"""webhookd: webhooks for the applications of a small server.

Applications publish events with one HTTP call; people register webhooks over a REST
API compatible with Confluence's or in a browser; every event is on disk before it is
acknowledged, and is delivered signed, retried and observed. One process and one
SQLite file.

The way of an event. The writer decides, the dispatcher obeys: who changes something only
writes, and the dispatcher hears of it from the commit.

    POST /rest/api/events ─ Api ─ Store.publish ─┐  event + one delivery per webhook that wants
                                  (answer waits) │  it, in ONE transaction shared with all that
                                                 ▼  waits (group commit), fsynced
                                              writer ──── commit ────► 202
                                                 │
                                                 │  ONE message per commit: what is newly due,
                                                 ▼  what was recorded, rescheduled or changed
                                             dispatcher     queues by webhook, in memory, bounded;
                                                 │          the database holds the rest and is
                                                 ▼          the only truth
                              sign ─ connect to a checked address ─ send ─ read the answer
                                                 │
                                                 ▼  facts only: this delivery, this attempt
                                              writer        judges with the committed health and
                                                            the delivery's state in the database,
                                                            records, commits, tells

    pending ──2xx──► succeeded          in flight is memory only: after a crash every delivery that
       ▲  └─ gave up / 410 ──► failed   was not recorded is pending again, and that is the whole of
       └────────── redeliver ─────┘     crash recovery

Threads: the main one has the clients' sockets and answers small publications itself, waitress's
answer all other requests; the store's writer; the delivery loop (asyncio); maintenance; and one
for each name that is being looked up. Code calls only what stands above it. What must reach
upward is handed down: `Store.on_commit` takes the listeners that the writer tells of each commit,
and `Store.on_finish` those that it wakes once the writes of a commit are finished.

The sections, in the order in which the file builds on itself (`grep '^# ==='` finds them):

    constants and logging   settings   errors   model   reading input   signatures
    policy   outbound HTTP   store   templates   dispatcher   maintenance   users   metrics
    REST API   words and forms   pages   HTTP server   systemd   sink   command line
"""

import argparse
import asyncio
import base64
import bisect
import codecs
import collections
import collections.abc
import concurrent.futures
import contextlib
import contextvars
import ctypes
import dataclasses
import datetime
import email.utils
import errno
import fcntl
import functools
import gc
import getpass
import hashlib
import hmac
import html
import http
import http.server
import importlib.util
import ipaddress
import itertools
import json
import logging
import marshal
import math
import os
import pathlib
import random
import re
import resource
import secrets
import select
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import stat
import sys
import tempfile
import threading
import time
import types
import typing
import urllib.parse

import bottle
import waitress.channel
import waitress.parser
import waitress.server
import waitress.task
import waitress.utilities

# ======================================================================================
# Constants and logging
# ======================================================================================

VERSION = "0.2.0"
USER_AGENT = f"webhookd/{VERSION}"

MAX_REQUEST_BYTES = 32 << 20  # many events; one is bounded by MAX_EVENT_SIZE
LARGE_REQUEST_BYTES = 1 << 20
MAX_WEBHOOK_BYTES = 1 << 20  # the JSON of one webhook
MAX_EVENTS_PER_REQUEST = 1000
MAX_JSON_DEPTH = 100  # objects and lists within each other
MAX_FAULTS = 100  # that one error lists
MAX_TEMPLATE_BYTES = 16 << 10
SERVER_THREADS = 16  # so many publications can share one commit
MAX_RESPONSE_BYTES = 64 << 10  # read from a receiver, headers and body together
MAX_KEPT_BODY_BYTES = 16 << 10  # of a response, kept with the attempt
MAX_SHARED_BYTES = 4 << 10  # of a response that is remembered, see whole_response
MAX_KNOWN_ANSWERS = 8  # of a webhook's receiver
MAX_KEPT_HEADER_BYTES = 8 << 10  # of a response, whole lines
MAX_PAGE = 1000
DEFAULT_PAGE = 250
MIN_TOKEN_LENGTH = 16  # of a path or a query: shorter ones are no secrets
MASK = "********"  # stands for a secret value; sent back, it keeps the value
DAY_SECONDS = 86_400
DAY_MS = DAY_SECONDS * 1000
STATISTICS_DAYS = 30

log = logging.getLogger("webhookd")


def printable(text: str) -> str:
    """The text with escapes for what could disturb a terminal or forge a line of the log."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _pairs(values):
    for key, value in values.items():
        text = str(value)
        if not text or not text.isprintable() or set(text) & set(' "='):
            text = json.dumps(text, ensure_ascii=not text.isprintable())
        yield f"{key}={text}"


def log_fact(words: str, *, level: int = logging.INFO, **values: object) -> None:
    """Log one fact on one line: a few words, then key=value."""
    log.log(level, "%s", " ".join([words, *_pairs(values)]))


class LimitedDict(dict):
    """A dict with a limit: a new key beyond it takes the place of the oldest one."""

    def __init__(self, limit: int):
        super().__init__()
        self._limit = limit

    def __setitem__(self, key, value):
        if key not in self and len(self) >= self._limit:
            del self[next(iter(self))]
        super().__setitem__(key, value)


# ======================================================================================
# Settings: one field is one variable, one flag, one line of --help, one row of README
# ======================================================================================

DURATION_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class SettingError(Exception):
    """A setting has a value that cannot be used; the text names the setting."""


def duration(text: str) -> float:
    """Seconds of a positive duration such as 500ms, 5s, 5m, 2h or 30d."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(ms|[smhd])", text, re.ASCII)
    if not match or not float(match[1]):
        raise ValueError(f"{text!r} is not a duration such as 500ms, 5s, 5m, 2h or 30d")
    return float(match[1]) * DURATION_UNITS[match[2]]


def durations(text: str) -> tuple[float, ...]:
    """Seconds of each of a comma-separated list of durations."""
    return tuple(duration(part.strip()) for part in text.split(","))


def size(text: str) -> int:
    """Bytes of a size such as 64K, 1M or 2G."""
    match = re.fullmatch(r"(\d{1,9})([KMG]?)", text, re.ASCII)
    if not match or not int(match[1]):
        raise ValueError(f"{text!r} is not a size such as 64K, 1M or 2G")
    return int(match[1]) * SIZE_UNITS[match[2]]


def positive(text: str) -> int:
    """A whole number from 1 up."""
    if not re.fullmatch(r"\d{1,6}", text, re.ASCII) or not int(text):
        raise ValueError(f"{text!r} is not a whole number from 1 to 999999")
    return int(text)


def listen_address(text: str) -> tuple[str, int]:
    """Host and port of HOST:PORT or [IPV6]:PORT."""
    match = re.fullmatch(r"(?:\[(.*:.*)\]|([^][:]+)):([0-9]{1,5})", text)
    if not match:
        raise ValueError(f"{text!r} is not an address and port such as 127.0.0.1:8090")
    if int(match[3]) > 65535:
        raise ValueError(f"{text!r} has a port above 65535")
    if match[2] and "*" in match[2]:
        raise ValueError(f"{text!r} is no address; 0.0.0.0 is all of IPv4, [::] all of IPv6")
    return match[1] or match[2], int(match[3])


def networks(text: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    """The networks of a comma-separated list of CIDRs."""
    parts = filter(None, map(str.strip, text.split(",")))
    return tuple(ipaddress.ip_network(part, strict=False) for part in parts)


def password(text: str) -> str:
    """A text that UTF-8 can carry."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the password is not UTF-8") from None
    return text


def ip_address(text: str) -> str:
    """An IP address in its usual spelling, or nothing."""
    return str(ipaddress.ip_address(text)) if text else ""


def setting(default: str, parse: collections.abc.Callable, metavar: str, text: str):
    """A field of Settings: its default as it would be typed, its reader and help."""
    metadata = {"parse": parse, "metavar": metavar, "text": text, "default": default}
    return dataclasses.field(default=parse(default), metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that can be set; durations in seconds, sizes in bytes."""

    listen: tuple[str, int] = setting(
        "127.0.0.1:8090", listen_address, "HOST:PORT", "address to serve on, port 0 picks one"
    )
    database: str = setting("webhookd.db", str, "FILE", "the SQLite file")
    admin_password: str = setting(
        "", password, "PASSWORD", "password of the user admin, set at every start"
    )
    allow_networks: tuple = setting(
        "", networks, "CIDR,…", "networks that deliveries may reach although not public"
    )
    retry_schedule: tuple[float, ...] = setting(
        "5s,5m,30m,2h,5h,10h,14h,20h,24h", durations, "TIME,…", "waits between attempts"
    )
    delivery_timeout: float = setting(
        "20s", duration, "TIME", "for a whole attempt: resolve, connect, send, receive"
    )
    max_in_flight: int = setting("256", positive, "N", "most attempts in flight in all")
    webhook_concurrency: int = setting("8", positive, "N", "most attempts in flight to one webhook")
    pause_initial: float = setting(
        "10s", duration, "TIME", "first pause of a webhook after 5 failures in a row"
    )
    pause_max: float = setting("2h", duration, "TIME", "longest pause of a webhook")
    disable_after: float = setting(
        "5d",
        duration,
        "TIME",
        "a webhook without a success for so long is disabled when it gives a delivery up",
    )
    max_event_size: int = setting("1M", size, "SIZE", "a larger event gets 413")
    retention: float = setting(
        "30d", duration, "TIME", "how long events and finished deliveries are kept"
    )
    max_database_size: int = setting(
        "2G", size, "SIZE", "past it the oldest finished deliveries go early"
    )
    trusted_proxy: str = setting(
        "", ip_address, "IP", "reverse proxy whose X-Forwarded-For/-Proto/-Host are believed"
    )


def variable(field: dataclasses.Field) -> str:
    """The environment variable of a field of Settings."""
    return f"WEBHOOKD_{field.name.upper()}"


def flag(field: dataclasses.Field) -> str:
    """The command line's flag of a field of Settings."""
    return "--" + field.name.replace("_", "-")


def _credential(environ, name):
    """A systemd credential (LoadCredential= and its like), or None; raises ValueError."""
    path = pathlib.Path(environ.get("CREDENTIALS_DIRECTORY", "/nonexistent"), name)
    try:
        return path.read_text("utf-8", "surrogateescape").strip("\r\n")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def _given(field, flags, environ):
    """The text that is given for a setting, or None; raises ValueError."""
    text = flags.get(field.name)
    if text is None:
        text = environ.get(variable(field)) or None  # a blank variable counts as not set
    if text is None and field.name == "admin_password":
        text = _credential(environ, "admin-password")
    return text


def read_settings(flags: dict, environ: collections.abc.Mapping) -> Settings:
    """Settings from flags, else variables, else defaults; raises SettingError."""
    values = {}
    for field in dataclasses.fields(Settings):
        try:
            text = _given(field, flags, environ)
            if text is not None:
                values[field.name] = field.metadata["parse"](text)
        except ValueError as error:
            raise SettingError(f"{flag(field)} ({variable(field)}): {error}") from None
    return Settings(**values)


def unknown_variables(environ: collections.abc.Mapping) -> list[str]:
    """The variables that look like settings and are none, perhaps because they are misspelt."""
    known = {variable(field) for field in dataclasses.fields(Settings)}
    return sorted(name for name in environ if name.startswith("WEBHOOKD_") and name not in known)


# ======================================================================================
# Errors: each knows the HTTP status that it means
# ======================================================================================


class Fault(typing.NamedTuple):
    """What is wrong, and with which field (None: with the request as a whole)."""

    context: str | None
    message: str

    def __str__(self):
        return f"{self.context}: {self.message}" if self.context else self.message

    def within(self, outer: str | None) -> "Fault":
        """The fault as seen from outside: `url` within `[3]` is `[3].url`."""
        if outer is None or self.context is None:
            return Fault(self.context if outer is None else outer, self.message)
        dot = "" if self.context.startswith("[") else "."
        return Fault(f"{outer}{dot}{self.context}", self.message)


class WebhookdError(Exception):
    """An error that the client sees: a status, one or more faults, and perhaps headers."""

    status = 500

    def __init__(self, *faults: Fault | str, headers: dict | None = None):
        listed = faults[:MAX_FAULTS]
        self.faults = [f if isinstance(f, Fault) else Fault(None, f) for f in listed]
        self.headers = headers or {}
        super().__init__("; ".join(map(str, self.faults)))


class Invalid(WebhookdError):
    status = 400


class Unauthorized(WebhookdError):
    status = 401


ASK_FOR_LOGIN = {"WWW-Authenticate": 'Basic realm="webhookd"'}  # a header of every 401


class Forbidden(WebhookdError):
    status = 403


class NotFound(WebhookdError):
    status = 404


class Conflict(WebhookdError):
    status = 409


class TooLarge(WebhookdError):
    status = 413


class WrongMediaType(WebhookdError):
    status = 415


class KeyReused(WebhookdError):
    status = 422


class TooManyRequests(WebhookdError):
    status = 429


class Unavailable(WebhookdError):
    status = 503


class StorageFull(WebhookdError):
    status = 507


def error_document(status: int, faults: list[Fault]) -> dict:
    """The one shape of every error."""
    reason, message = http.HTTPStatus(status).phrase, "; ".join(map(str, faults))
    errors = [
        {"context": fault.context, "message": fault.message, "exceptionName": None}
        for fault in faults
    ]
    document = {"statusCode": status, "reason": reason}
    return document | {"message": message, "errors": errors}


# ======================================================================================
# Model: what there is, and what of it the API shows; secrets are masked here only
# ======================================================================================

OUTCOMES = SUCCESS, FAILURE, ERROR = "SUCCESS", "FAILURE", "ERROR"  # of an attempt
DELIVERY_STATES = PENDING, SUCCEEDED, FAILED = "pending", "succeeded", "failed"
GONE = "gone"  # in a verdict: the delivery was deleted during the attempt
HEALTH_STATES = ("healthy", "failing", "paused", "disabled", "inactive")

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def utf8(json_text: str) -> bytes:
    """The UTF-8 of a JSON text.

    UTF-8 has no half surrogate pairs. They come as escapes, and become the same again: what
    Python writes in their place, as `\\ud83d`, is JSON's escape, too."""
    return json_text.encode("utf-8", "backslashreplace")


def json_bytes(value: object) -> bytes:
    """Compact JSON in UTF-8."""
    return utf8(_encode(value))


def masked_url(url: str) -> str:
    """The URL with its user information masked: either half of it may be a key."""
    userinfo, at, _ = urllib.parse.urlsplit(url).netloc.rpartition("@")
    return url.replace(f"{userinfo}@", f"{MASK}@", 1) if at else url


def site_of(url: str) -> str:
    """Scheme, host and, where it is given, port of a URL."""
    parts = urllib.parse.urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def short_url(url: str) -> str:
    """The URL as viewers and the log see it: its path and query may be a secret."""
    return f"{site_of(url)}/…"


def header_lines(headers: dict[str, str]) -> str:
    """Headers as they go on the wire, each line with its end."""
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items())


def header_fields(lines: str) -> dict[str, tuple[str, str]]:
    """Name and value of each header by its lower-case name, repeated ones joined."""
    fields = {}
    for line in filter(None, lines.split("\r\n")):
        name, _, value = line.partition(":")
        _, values = fields.setdefault(name.lower(), (name, []))
        values.append(value.strip(" \t"))
    return {key: (name, ", ".join(values)) for key, (name, values) in fields.items()}


def base64_of(text: str) -> str:
    """Base64 of the text's UTF-8."""
    return base64.b64encode(text.encode()).decode()


def spellings(text: str) -> list[str]:
    """A text as receivers may spell it when they send it back."""
    escaped = [json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]]
    encoded = [urllib.parse.quote(text, safe=""), urllib.parse.quote_plus(text)]
    encoded += [html.escape(text), base64_of(text)]
    return [text, *escaped, *[e.replace("/", "\\/") for e in escaped], *encoded]


@functools.lru_cache(1024)
def _path_texts(url):
    """What a receiver could repeat of a URL's path and query, longest first."""
    parts = urllib.parse.urlsplit(url)
    texts = {f"{parts.path}?{parts.query}", parts.path, parts.query, *parts.path.split("/")}
    texts |= {value for _, value in urllib.parse.parse_qsl(parts.query)}
    spelled = {s for text in texts if len(text) >= MIN_TOKEN_LENGTH for s in spellings(text)}
    return sorted(spelled, key=len, reverse=True)


def without_path(text: str, url: str) -> str:
    """The text without what may be a secret of the path and query of a URL."""
    for repeated in _path_texts(url):
        text = text.replace(repeated, "…")
    return text


def _behind_scheme(value):
    """The credentials of a header such as `Bearer …`, as sent and as meant."""
    scheme, _, credentials = value.partition(" ")
    yield credentials.strip()
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            yield base64.b64decode(credentials).decode().partition(":")[2]


@dataclasses.dataclass(frozen=True)
class Webhook:
    """A registration: where to, for which events."""

    id: int = 0
    name: str = ""
    url: str = ""
    events: tuple[str, ...] = ()
    active: bool = True
    configuration: dict = dataclasses.field(default_factory=dict)  # without the secret
    secret: str | None = None
    credentials: dict | None = None  # username and password
    headers: dict = dataclasses.field(default_factory=dict)
    filters: dict = dataclasses.field(default_factory=dict)
    verify_tls: bool = True
    ordered: bool = False  # one delivery at a time, in publish order
    rate_limit: float | None = None  # deliveries per second
    paused: bool = False  # by a person: deliveries are made and wait
    halted_by: str = ""  # the user who paused or deactivated it
    template: object = None  # the JSON value that is rendered as the body; None: the event
    previous_secret: str | None = None  # signs too, until then
    previous_secret_until: int = 0  # milliseconds, as created and updated
    created: int = 0
    updated: int = 0

    def subscribed(self, event: str) -> bool:
        """Whether one of its names or wildcards takes the event's name."""
        return any(
            event.startswith(name[:-1]) if name.endswith("*") else event == name
            for name in self.events
        )

    # ---- what every attempt needs, worked out once ----

    @functools.cached_property
    def masked_url(self) -> str:
        """The URL as admins see it, and as it is kept with an attempt."""
        return masked_url(self.url)

    @functools.cached_property
    def short_url(self) -> str:
        """The URL as viewers and the log see it."""
        return short_url(self.url)

    @functools.cached_property
    def login(self) -> tuple[str, str] | None:
        """User name and password for the receiver: credentials, else the URL's."""
        if self.credentials:
            return self.credentials["username"], self.credentials["password"]
        parts = urllib.parse.urlsplit(self.url)
        if parts.username is None:
            return None
        password = urllib.parse.unquote(parts.password or "")
        return urllib.parse.unquote(parts.username), password

    def _fixed_headers(self):
        kind = "text/plain" if isinstance(self.template, str) else "application/json"
        headers = {"Content-Type": f"{kind}; charset=utf-8"}
        headers |= {"User-Agent": USER_AGENT, "Accept": "*/*"}
        if self.login:
            headers["Authorization"] = f"Basic {base64_of(':'.join(self.login))}"
        own = {name.lower() for name in self.headers}
        return {k: v for k, v in headers.items() if k.lower() not in own} | self.headers

    @functools.cached_property
    def fixed_headers(self) -> str:
        """Lines of the headers that are the same in every attempt; the webhook's own win."""
        return header_lines(self._fixed_headers())

    @functools.cached_property
    def masked_headers(self) -> str:
        """The fixed headers as they may be kept and shown."""
        headers = self._fixed_headers()
        secret = self.headers.keys() | headers.keys() & {"Authorization"}
        return header_lines(headers | dict.fromkeys(secret, MASK))

    @functools.cached_property
    def _secret_texts(self):
        """Every text that no answer of a receiver may bring back, longest first."""
        own = [self.secret or "", self.previous_secret or ""]
        texts = own + [secret.removeprefix("whsec_") for secret in own]
        for value in self.headers.values():
            texts += [value, *_behind_scheme(value)]
        userinfo = urllib.parse.urlsplit(self.url).netloc.rpartition("@")[0]
        texts += map(urllib.parse.unquote, userinfo.partition(":"))
        if self.login:
            texts += [self.login[1], base64_of(":".join(self.login))]
        # shorter ones are no secrets, and masking them would spoil the answer
        spelled = {s for text in texts if len(text) >= 4 for s in spellings(text)}
        return sorted(spelled, key=len, reverse=True)

    @functools.cached_property
    def known_answers(self) -> dict:
        """What attempts keep of responses that come again and again, by Response."""
        return LimitedDict(MAX_KNOWN_ANSWERS)

    def without_secrets(self, text: str) -> str:
        """The text with every secret of the webhook masked."""
        for secret in self._secret_texts:
            text = text.replace(secret, MASK)
        return text

    # ---- what the API shows ----

    def as_json(self, whole_url: bool) -> dict:
        """The webhook as the API shows it; only admins see the whole URL."""
        login = self.credentials and {"username": self.credentials["username"]}
        return {
            "id": self.id,
            "name": self.name,
            "createdDate": self.created,
            "updatedDate": self.updated,
            "events": list(self.events),
            "configuration": self.configuration,
            "url": self.masked_url if whole_url else self.short_url,
            "active": self.active,
            "scopeType": "global",
            "sslVerificationRequired": self.verify_tls,
            "secretSet": self.secret is not None,
            "credentials": login,
            "headers": dict.fromkeys(self.headers, MASK),
            "filters": self.filters,
            "ordered": self.ordered,
            "rateLimit": self.rate_limit,
            "paused": self.paused,
            "template": self.template,
        }


class Health(typing.NamedTuple):
    """How the attempts to a webhook went lately."""

    failures: int = 0  # attempts without success, in a row
    failing_since: int | None = None  # milliseconds, as the other moments
    paused_until: int | None = None  # the breaker's; it stays until a probe succeeds
    resting_until: int | None = None  # what the receiver asked for by Retry-After
    reason: str | None = None  # of the last failure, or of being disabled
    disabled: bool = False
    announced: bool = False  # an event has told that it is down
    since: int | None = None  # when the state began

    @property
    def is_well(self) -> bool:
        """Whether nothing holds its deliveries up."""
        return not (self.failures or self.paused_until or self.resting_until or self.disabled)

    def state(self, webhook: Webhook) -> str:
        """The health in one word."""
        if not webhook.active:
            return "disabled" if self.disabled else "inactive"
        if webhook.paused or self.paused_until:
            return "paused"
        return "failing" if self.failures else "healthy"

    def _reason(self, webhook):
        """Why the state is what it is: who made it so, or what."""
        if not webhook.active and not self.disabled:
            return f"deactivated by {webhook.halted_by}"
        if webhook.active and webhook.paused:
            return f"paused by {webhook.halted_by}"
        return self.reason

    def waits_until(self) -> int:
        """The moment before which nothing is attempted; 0 if it need not wait."""
        return max(self.paused_until or 0, self.resting_until or 0)

    def next_attempt(self, webhook: Webhook, planned: int | None) -> int | None:
        """When what is planned can be attempted; None: not before somebody acts."""
        if planned is None or not webhook.active or webhook.paused:
            return None
        return max(planned, self.waits_until())

    def as_json(self, webhook: Webhook, pending: int, last_attempt: int | None) -> dict:
        """The health of a webhook as the API shows it."""
        state = self.state(webhook)
        is_breakers = state == "paused" and not webhook.paused
        return {
            "state": state,
            "consecutiveFailures": self.failures,
            "pausedUntil": self.waits_until() if is_breakers else None,
            "reason": self._reason(webhook),
            "since": self.since,
            "pending": pending,
            "lastAttempt": last_attempt,
        }


HEALTHY = Health()


class HealthById(dict):
    """The health of webhooks by id; a webhook that is not in it is healthy."""

    def __missing__(self, id):
        return HEALTHY


class User(typing.NamedTuple):
    """Somebody who may log in; record: what is stored of the password or secret."""

    name: str
    role: str
    record: str


class NewEvent(typing.NamedTuple):
    """An event as it was published: its body is what every delivery sends."""

    name: str
    timestamp: int  # milliseconds
    body: bytes
    is_foreign: bool = False  # named from outside; its body is another program's


WEBHOOK_DISABLED, WEBHOOK_PAUSED = "webhook_disabled", "webhook_paused"
WEBHOOK_RECOVERED, DELIVERY_FAILED = "webhook_recovered", "delivery_failed"
OWN_EVENTS = (WEBHOOK_DISABLED, WEBHOOK_PAUSED, WEBHOOK_RECOVERED, DELIVERY_FAILED)
EVENT_KEYS = ("id", "event", "timestamp", "deliveries")


class Event(typing.NamedTuple):
    """A stored event."""

    id: int
    name: str
    timestamp: int
    delivery_count: int

    def as_json(self) -> dict:
        """The event as publishing answers it and as lists show it."""
        return dict(zip(EVENT_KEYS, self))


def payload_of(body: bytes, name: str, timestamp: int) -> bytes:
    """The JSON object of an event without its time and name, if these stand first."""
    named = b'"event":"%s"' % re.escape(name).encode()
    timed = b'"timestamp":([-+.0-9eE]+)'
    start = re.match(b"{(?:%s(?:,%s)?|%s)(?=[,}])" % (timed, named, named), body)
    # a different time is a field of another program, and stays
    is_ours = start and (start[1] is None or abs(float(start[1]) - timestamp) < 1)
    return b"{" + body[start.end() :].removeprefix(b",") if is_ours else body


def with_payload(document: dict, payload: bytes) -> bytes:
    """The JSON of a document and of a payload, put in as text: its digits stay."""
    return json_bytes(document).removesuffix(b"}") + b',"payload":' + payload + b"}"


DELIVERY_KEYS = [
    "id",
    "webhookId",
    "eventId",
    "event",
    "state",
    "attemptCount",
    "nextAttempt",
    "createdDate",
    "outcome",
    "description",
    "duration",
]


class Delivery(typing.NamedTuple):
    """One event for one webhook, as the API shows it."""

    id: str  # UUID
    webhook_id: int
    event_id: int
    event: str
    state: str
    attempt_count: int
    next_attempt: int | None  # milliseconds, as created; None also if nobody knows when
    created: int
    outcome: str | None  # this and the rest: of the latest attempt
    description: str | None
    duration: int | None  # milliseconds

    def as_json(self) -> dict:
        """The delivery as the API shows it."""
        return dict(zip(DELIVERY_KEYS, self))


class DueDelivery(typing.NamedTuple):
    """A delivery in the dispatcher's hands."""

    row_id: int  # the database's own, in publish order
    uuid: str  # X-Request-Id
    webhook_id: int
    event_id: int
    event: str
    body: bytes
    attempt_count: int
    schedule_index: int  # how far it is in its retry schedule; a redelivery sets it to 0
    next_attempt: int  # milliseconds


class Attempt(typing.NamedTuple):
    """One HTTP request of a delivery and what came of it, secrets masked."""

    start: int  # milliseconds
    duration: int  # milliseconds
    url: str
    request_headers: str  # lines, as they went over the wire
    outcome: str
    description: str
    status: int | None = None
    response_headers: str = ""
    response_body: str | None = None
    request_body: str | None = None  # where a template made it; else it is the event's
    # these two are not stored
    retry_after: str | None = None  # the receiver's Retry-After, as it came
    handshake_seconds: float = 0.0  # of the loop's time, for TLS

    @property
    def finish(self) -> int:
        """When it ended, milliseconds."""
        return self.start + self.duration

    def request(self, body: str) -> dict:
        """What was sent, as the API shows it; body: the event's."""
        headers = dict(header_fields(self.request_headers).values())
        sent = body if self.request_body is None else self.request_body
        url = masked_url(self.url)
        return {"method": "POST", "url": url, "headers": headers, "body": sent}

    def response(self) -> dict:
        """Headers and body of what came back, as the API shows them."""
        headers = dict(header_fields(self.response_headers).values())
        return {"headers": headers, "body": self.response_body}

    def for_viewers(self) -> "Attempt":
        """The attempt without the path and query of its URL."""
        headers, body = self.response_headers, self.response_body
        return self._replace(
            url=short_url(self.url),
            response_headers=without_path(headers, self.url),
            response_body=body and without_path(body, self.url),
        )

    def as_json(self, delivery_id: str, event: str, body: str | None) -> dict:
        """The invocation as the API shows it; body None: without headers and bodies."""
        sent = {"id": delivery_id, "event": event, "duration": self.duration}
        sent |= {"start": self.start, "finish": self.finish}
        request = {"method": "POST", "url": masked_url(self.url)}
        result = {"description": self.description, "outcome": self.outcome}
        result |= {"statusCode": self.status}
        if body is not None:
            request, result = self.request(body), result | self.response()
        return sent | {"request": request, "result": result}

    def json_around_body(self, delivery_id: str, event: str) -> tuple[bytes, bytes]:
        """The invocation as JSON, before and after the body that was sent."""
        mark = secrets.token_hex(16)  # which nobody can have sent
        marked = self._replace(request_body=mark).as_json(delivery_id, event, "")
        before, after = json_bytes(marked).split(b'"%s"' % mark.encode())
        return before, after


class Page(typing.NamedTuple):
    """Which part of a list is wanted."""

    start: int = 0
    limit: int = DEFAULT_PAGE

    def neighbours(self, total: int, size: int | None = None) -> dict[str, int]:
        """Where this part, the next one and the previous one start, if there are such.

        size: of this part, if that is not the limit."""
        starts, after = {"self": self.start}, self.start + (self.limit if size is None else size)
        if after < total:
            starts["next"] = after
        if self.start > 0:
            starts["prev"] = max(0, self.start - self.limit)
        return starts


class Filter(typing.NamedTuple):
    """Which rows of a list are wanted; an empty field asks for nothing."""

    events: tuple[str, ...] = ()
    outcomes: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    since: int | None = None  # milliseconds, both ends included
    until: int | None = None
    where: tuple[tuple[str, str], ...] = ()  # dotted paths, and the text there


# ======================================================================================
# Reading input: from what a client sent to the model, or every fault in it at once
# ======================================================================================

NUMBER_MARK = f"#{secrets.token_hex(16)}#"  # nobody can send what nobody knows


class JsonNumber(str):
    """A JSON number as it was written, so that it is delivered to the digit.

    1.10 is read as the string `#…#1.10`, encoded as one, and without_marks() takes mark and
    quotes off again: the standard library's encoder has no other way to write 1.10."""

    @property
    def value(self) -> float:
        return float(self.removeprefix(NUMBER_MARK))


def _json_number(digits):
    return JsonNumber(NUMBER_MARK + digits)


def _json_integer(digits):
    # -0 would lose its sign, and int() refuses thousands of digits
    is_plain = digits != "-0" and len(digits) < 1000
    return int(digits) if is_plain else _json_number(digits)


def _finite(digits):
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{digits} is out of range")
    return number


def _refuse_constant(name):
    raise ValueError(f"{name} is not JSON")


_event_decoder = json.JSONDecoder(
    parse_float=_json_number, parse_int=_json_integer, parse_constant=_refuse_constant
)
_decode = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse_constant).decode
_marked_number = re.compile(f'"{NUMBER_MARK}([^"]*)"')


def require(condition: object, message: str) -> None:
    """Raise Invalid unless the condition holds."""
    if not condition:
        raise Invalid(message)


def decoded(body: bytes) -> str:
    """The text that is UTF-8; raises Invalid."""
    try:
        return body.removeprefix(codecs.BOM_UTF8).decode()  # utf-8-sig is written in Python
    except UnicodeDecodeError as error:
        raise Invalid(f"the body is not UTF-8: {error.reason}") from None


TOO_DEEP = f"the JSON is nested deeper than {MAX_JSON_DEPTH}"


def _check_depth(value, text, start=0, end=None):
    """Raise Invalid if a value, which the text has there, is nested too deeply."""
    if text.count("{", start, end) + text.count("[", start, end) <= MAX_JSON_DEPTH:
        return
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        objects = [item.values() for item in level if isinstance(item, dict)]
        lists = [item for item in level if isinstance(item, list)]
        level = list(itertools.chain(*objects, *lists))
    require(not any(isinstance(item, (dict, list)) for item in level), TOO_DEEP)


def _parsed_json(text, decode, *arguments):
    """What decode, which raises ValueError, makes of a JSON text; raises Invalid."""
    try:
        return decode(text, *arguments)
    except RecursionError:
        raise Invalid(TOO_DEEP) from None
    except ValueError as error:
        raise Invalid(f"the body is not valid JSON: {error}") from None


def json_value(text: str, decode: collections.abc.Callable = _decode):
    """The value of a JSON text; raises Invalid."""
    value = _parsed_json(text, decode)
    _check_depth(value, text)
    return value


def without_marks(text: str) -> str:
    """The JSON of what has JsonNumbers, with the numbers as they were written."""
    # one character is found in no time, the whole mark is not
    return _marked_number.sub(r"\1", text) if "#" in text else text


def json_text(value: object) -> str:
    """Compact JSON of a value of an event, its numbers as they were written."""
    return without_marks(_encode(value))


def json_object(body: bytes) -> dict:
    """The object of a JSON text, all of whose strings can be stored; raises Invalid."""
    value = json_value(decoded(body))
    require(isinstance(value, dict), "the body must be a JSON object")
    try:
        _encode(value).encode()
    except UnicodeEncodeError:
        raise Invalid("the body holds half a surrogate pair") from None
    return value


class Reader:
    """Reads the parts of a whole and collects their faults; the end of `with` raises them."""

    def __init__(self, fields: dict | None = None):
        self._fields, self._faults = fields or {}, []

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self._faults and kind is None:
            raise Invalid(*self._faults)

    def check(self, context: str | None, condition: object, message: str) -> None:
        """Collect a fault unless the condition holds."""
        if not condition:
            self._faults.append(Fault(context, message))

    def read(self, context: str | None, parse: collections.abc.Callable, *arguments):
        """What parse makes of the arguments; None and a fault if it raises Invalid."""
        try:
            return parse(*arguments)
        except Invalid as error:
            self._faults += [fault.within(context) for fault in error.faults]
        except TooLarge as error:
            raise TooLarge(*[fault.within(context) for fault in error.faults]) from None

    def field(self, name: str, default, parse: collections.abc.Callable, *arguments):
        """What parse makes of a field; the default if it is left out or null."""
        if self._fields.get(name) is None:
            return default
        return self.read(name, parse, self._fields[name], *arguments)

    def only(self, *names: str) -> None:
        """Collect a fault for each other field: an operation must not pass one over."""
        for name in [name for name in self._fields if name not in names]:
            self.check(name, False, "is unknown here, so nothing was done")
            del self._fields[name]


# ---- fields: their readers raise Invalid, with no name or one inside the field ----


def at_most(limit: int, value: collections.abc.Sized, what: str = "") -> None:
    """Raise Invalid if there are more."""
    count = len(value)
    require(count <= limit, f"at most {limit}{what} are allowed, these are {count}")


def webhook_name(value: object) -> str:
    """A string that is not blank."""
    is_text = isinstance(value, str) and value.strip()
    require(is_text, "must be a string that is not blank")
    at_most(255, value, " characters")
    return value


def boolean(value: object) -> bool:
    """A boolean, also spelled as a string."""
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower())
    require(isinstance(value, bool), "must be true or false")
    return value


def members(value: object) -> dict:
    """An object with at most 20 members; null is an empty one."""
    require(value is None or isinstance(value, dict), "must be an object")
    at_most(20, value or {})
    return value or {}


def rate(value: object) -> float | None:
    """Deliveries per second, or null for as many as there are."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(value is None or is_number and value > 0, "must be a number above 0")
    return value


EVENT_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
EVENT_NAME_RULE = "must be 1 to 64 characters out of A-Z a-z 0-9 _ . : -"


def event_name(value: object) -> str:
    """The name of an event."""
    if isinstance(value, str) and EVENT_NAME.fullmatch(value):
        return value
    raise Invalid(EVENT_NAME_RULE)


def _check_subscription(name):
    """Raise Invalid unless it is the name of an event, or `*`, or a prefix and `*`."""
    prefix = name.removesuffix("*") if isinstance(name, str) else ""
    is_name = name == "*" or EVENT_NAME.fullmatch(prefix) and len(name) <= 64
    require(is_name, f"{json.dumps(name)[:80]} {EVENT_NAME_RULE}, or end in *")


def subscriptions(value: object) -> tuple[str, ...]:
    """The set of names and wildcards that a webhook is subscribed to."""
    require(isinstance(value, list), "must be a list of event names")
    require(value, "at least one is needed")
    with Reader() as reader:
        for name in value:
            reader.read(None, _check_subscription, name)
    at_most(100, set(value))
    return tuple(dict.fromkeys(value))


TWO_SPELLINGS = re.compile("[ßẞς\u200c\u200d]")  # IDNA 2003 and 2008 make two names of it
NUMBER = re.compile(r"\d+|0[xX][0-9A-Fa-f]*", re.ASCII)
MIN_KEY_BYTES = 16  # of a Standard Webhooks secret


def _punycode(label):
    return label if label.isascii() else "xn--" + label.encode("punycode").decode()


def ascii_host(host: str) -> str:
    """The host as it goes on the wire; raises Invalid or UnicodeError."""
    if host.isascii():
        return host
    if TWO_SPELLINGS.search(host):
        advice = ".".join(map(_punycode, host.split(".")))
        raise Invalid(f"has a host that programs spell differently; write it as {advice}")
    return host.encode("idna").decode()


def _check_number(host):
    """Raise Invalid if resolvers read the host as an address that it does not show."""
    if ":" not in host and NUMBER.fullmatch(host.removesuffix(".").rpartition(".")[2]):
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            raise Invalid("has a host that is no IPv4 address of four decimal parts") from None


def _check_url(url):
    at_most(2000, url, " characters")
    bad = re.search(r"[\x00-\x20\x7f\\]", url)
    require(not bad, "must not contain spaces, control characters or backslashes")
    parts = urllib.parse.urlsplit(url)
    is_http = parts.scheme in ("http", "https")
    require(is_http, "must begin with http:// or https://")
    require(parts.hostname, "must have a host")
    require(parts.port != 0, "must have a port from 1 to 65535")
    require("#" not in url, "must not have a fragment")
    is_plain = "%" not in parts.hostname
    require(is_plain, "must not have a zone id or escapes in its host")
    is_masked = f"{MASK}@" in parts.netloc
    require(not is_masked, "has a masked password that stands for none")
    require(not url.endswith("/…"), "is shortened where its path may be a secret")
    _check_number(ascii_host(parts.hostname))


def _unmasked_url(url, previous):
    """The URL with what a mask stands for: the user information that was there."""
    userinfo = urllib.parse.urlsplit(previous).netloc.rpartition("@")[0]
    if userinfo and urllib.parse.urlsplit(url).netloc.startswith(f"{MASK}@"):
        return url.replace(MASK, userinfo, 1)
    return url


def read_url(value: object, previous: str, check: collections.abc.Callable) -> str:
    """A webhook's URL; masked user information stands for the previous one's.

    check(url) raises Invalid if deliveries may not go there; the previous may stay."""
    require(value and isinstance(value, str), "must be a string")
    try:
        url = _unmasked_url(value, previous)
        _check_url(url)
        if url != previous:
            check(url)
    except UnicodeError:
        raise Invalid("has a host that is not a valid name") from None
    except ValueError:  # urllib's, whose text may hold a part of a password
        raise Invalid("has a host or a port that is not valid") from None
    return url


def _is_key(text):
    """Whether every Standard Webhooks library takes it: padded, and no bit left over."""
    try:
        key = base64.b64decode(text, validate=True)
    except ValueError:
        return False
    return len(key) >= MIN_KEY_BYTES and base64.b64encode(key).decode() == text


def _check_secret(text):
    require(len(text) <= 255, "at most 255 characters are allowed")
    is_good = not text.startswith("whsec_") or _is_key(text.removeprefix("whsec_"))
    require(is_good, f"whsec_ must go on with at least {MIN_KEY_BYTES} bytes in base64")


def read_configuration(value: object, previous: dict) -> dict:
    """The configuration, merged into the previous one; null removes a key."""
    require(isinstance(value, dict), "must be an object of strings")
    with Reader() as reader:
        for key, text in value.items():
            is_text = text is None or isinstance(text, str)
            reader.check(key, is_text, "must be a string or null")
            if key == "secret" and isinstance(text, str):
                reader.read(key, _check_secret, text)
    given = {k: v for k, v in value.items() if (k, v) != ("secret", MASK)}
    merged = previous | given
    return {key: text for key, text in merged.items() if text is not None}


def read_credentials(value: object, previous: dict | None) -> dict | None:
    """Credentials; a password left out or masked keeps the previous one."""
    if value is None:
        return None
    require(isinstance(value, dict), "must be an object with username and password")
    username, password = value.get("username"), value.get("password")
    if password in (None, MASK):
        password = previous and previous["password"]
    is_name = isinstance(username, str) and username and ":" not in username
    with Reader() as reader:
        reader.check("username", is_name, "must be a string without a colon")
        reader.check("password", isinstance(password, str), "must be a string")
    return {"username": username, "password": password}


HEADERS_NOT_TO_SET = frozenset(
    [
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "webhook-id",
        "webhook-signature",
        "webhook-timestamp",
        "x-attempt",
        "x-event-key",
        "x-hub-signature",
        "x-hub-signature-256",
        "x-request-id",
    ]
)


HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")
HEADER_VALUE = re.compile(r"[\x20-\x7e\xa0-\xff\t]*")


def read_headers(value: object, previous: dict) -> dict:
    """Extra request headers; a masked value keeps the previous one."""
    kept = {name.lower(): text for name, text in previous.items()}
    headers = {
        name: kept.get(name.lower(), MASK) if text == MASK else text
        for name, text in members(value).items()
    }
    first = {name.lower(): name for name in reversed(headers)}
    with Reader() as reader:
        for name, text in headers.items():
            key = name.lower()
            reader.check(name, HEADER_NAME.fullmatch(name), "is not a header name")
            rule = "is set by webhookd or belongs to the connection"
            reader.check(name, key not in HEADERS_NOT_TO_SET, rule)
            reader.check(name, first[key] == name, "is there twice")
            is_text = isinstance(text, str) and HEADER_VALUE.fullmatch(text)
            rule = "must be a string of Latin-1 without control characters"
            reader.check(name, is_text, rule)
            reader.check(name, text != MASK, "has a masked value that stands for none")
    return headers


def read_filters(value: object) -> dict:
    """Dotted paths and the value, or list of values, that the event must have there."""
    filters = members(value)
    with Reader() as reader:
        for path, accepted in filters.items():
            is_path = 0 < len(path) <= 255
            reader.check(path, is_path, "must be a path of 1 to 255 characters")
            several = accepted if isinstance(accepted, list) else [accepted]
            is_plain = not any(isinstance(item, (list, dict)) for item in several)
            rule = "must be a plain value or a list of plain values"
            reader.check(path, several and is_plain, rule)
    return filters


TIME_RULE = "must be epoch milliseconds, an ISO 8601 time, or a duration ago such as 2h"
MARCH_1973_MS = 100_000_000_000  # as seconds, what is smaller is before the year 5138


def _epoch_ms(digits):
    number = float(digits)
    rule = "is before March 1973, so it seems to be in seconds: milliseconds are needed"
    require(number == 0 or number >= MARCH_1973_MS, rule)
    return int(number)


def _iso_ms(text):
    try:
        # in a query string the + of a time zone arrives as a space if it was not encoded
        iso = text.upper().replace(" ", "+") if "T" in text.upper() else text
        moment = datetime.datetime.fromisoformat(iso)
    except ValueError:
        raise Invalid(TIME_RULE) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return round(moment.timestamp() * 1000)


def moment_ms(value: object, now_ms: int) -> int:
    """A moment in epoch milliseconds; raises Invalid. It is given in these, as an ISO 8601 time
    (UTC unless it says otherwise), or as a duration, such as 2h, that is meant as ago."""
    text = str(value) if isinstance(value, (int, float, str)) else ""  # "True" is refused below
    if re.fullmatch(r"-?\d{1,15}(?:\.\d+)?", text, re.ASCII):
        return _epoch_ms(text)
    with contextlib.suppress(ValueError):
        return now_ms - round(duration(text) * 1000)
    return _iso_ms(text)


def whole_number(value: object, lowest: int, highest: int = 1 << 53) -> int:
    """A whole number, or its text, from lowest up; above the highest, the highest."""
    text = str(value)
    is_number = re.fullmatch(r"\d{1,15}", text, re.ASCII) and int(text) >= lowest
    require(is_number, f"must be a whole number from {lowest} up")
    return min(int(text), highest)


def strings(value: object, allowed: tuple[str, ...] = ()) -> tuple[str, ...]:
    """One string or a list of them, all among the allowed if any are named."""
    several = value if isinstance(value, list) else [value]
    are_strings = all(isinstance(item, str) for item in several)
    require(are_strings, "must be a string or a list of strings")
    at_most(100, several)
    are_allowed = not allowed or set(several) <= set(allowed)
    require(are_allowed, f"must be one of {', '.join(allowed)}")
    return tuple(several)


# ---- values within an event ----

ABSENT = object()


def value_at(fields: object, path: str) -> object:
    """The value at a dotted path, whose numbers are indexes of lists; or ABSENT."""
    for key in path.split("."):
        if isinstance(fields, dict) and key in fields:
            fields = fields[key]
        elif isinstance(fields, list) and re.fullmatch(r"\d{1,9}", key, re.ASCII):
            fields = fields[int(key)] if int(key) < len(fields) else ABSENT
        else:
            return ABSENT
    return fields


def text_of(value: object) -> str:
    """A string as it is, a number as it was written, anything else as JSON."""
    return value.removeprefix(NUMBER_MARK) if isinstance(value, str) else json_text(value)


def has(fields: dict, path: str, text: str) -> bool:
    """Whether an event has a plain value of that text at a dotted path."""
    value = value_at(fields, path)
    return value is not ABSENT and not isinstance(value, (dict, list)) and text_of(value) == text


def condition(text: str) -> tuple[str, str]:
    """The dotted path and the text that `where` asks for."""
    path, colon, wanted = text.partition(":")
    require(path and colon, "must be a dotted path, a colon and a value, such as user.id:42")
    at_most(255, path, " characters of a path")
    return path, wanted


def conditions(value: object) -> tuple[tuple[str, str], ...]:
    """All that several `where` ask for."""
    several = strings(value)
    at_most(20, several)
    return tuple(map(condition, several))


# ---- templates ----

PLACEHOLDER = re.compile(r"\{\{([^{}]*)\}\}")


def _check_placeholders(value):
    if isinstance(value, str):
        parts = PLACEHOLDER.split(value)  # texts, with paths between them
        are_whole = not any("{{" in text for text in parts[::2])
        require(are_whole, "has a {{ without }}, or braces within a placeholder")
        require(all(map(str.strip, parts[1::2])), "has an empty placeholder")
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            _check_placeholders(item)


def read_template(value: object) -> object:
    """Any JSON value whose strings may have placeholders; null is none."""
    at_most(MAX_TEMPLATE_BYTES, json_bytes(value), " bytes")
    _check_placeholders(value)
    return value


# ---- queries ----


def query_fields(text: str) -> dict[str, str | list[str]]:
    """The values of a query string: a list where a name may be repeated, else the last."""
    query = urllib.parse.parse_qs(text)  # which leaves out what is blank
    repeatable = ("event", "outcome", "state", "where")
    return {name: v if name in repeatable else v[-1] for name, v in query.items()}


def read_page(reader: Reader, limit: int = DEFAULT_PAGE) -> Page:
    """The page that start and limit ask for."""
    start = reader.field("start", 0, whole_number, 0)
    return Page(start, reader.field("limit", limit, whole_number, 1, MAX_PAGE))


def _refuse_filter(_):
    raise Invalid("does not apply here")


def read_filter(
    reader: Reader, now_ms: int, *names: str, states: tuple[str, ...] = DELIVERY_STATES
) -> Filter:
    """What the named filters ask for; a filter that does not apply here is a fault."""
    given = {}
    for attribute, name, parse, *arguments in (
        ("events", "event", strings),
        ("outcomes", "outcome", strings, OUTCOMES),
        ("states", "state", strings, states),
        ("since", "since", moment_ms, now_ms),
        ("until", "until", moment_ms, now_ms),
        ("where", "where", conditions),
    ):
        if name not in names:
            parse, arguments = _refuse_filter, ()
        given[attribute] = reader.field(name, getattr(Filter(), attribute), parse, *arguments)
    return Filter(**given)


# ---- webhooks ----


NULLABLE = ("credentials", "headers", "filters", "rateLimit", "template")


def _read_fields(reader, fields, old, check_url):
    secret = {"secret": old.secret} if old.secret else {}
    configuration = old.configuration | secret
    for attribute, name, parse, *arguments in (
        ("configuration", "configuration", read_configuration, configuration),
        ("name", "name", webhook_name),
        ("url", "url", read_url, old.url, check_url),
        ("events", "events", subscriptions),
        ("active", "active", boolean),
        ("verify_tls", "sslVerificationRequired", boolean),
        ("credentials", "credentials", read_credentials, old.credentials),
        ("headers", "headers", read_headers, old.headers),
        ("filters", "filters", read_filters),
        ("ordered", "ordered", boolean),
        ("paused", "paused", boolean),
        ("rate_limit", "rateLimit", rate),
        ("template", "template", read_template),
    ):
        if fields.get(name) is not None or name in fields and name in NULLABLE:
            yield attribute, reader.read(name, parse, fields[name], *arguments)


def read_webhook(
    fields: dict, old: Webhook, check_url: collections.abc.Callable = lambda url: None
) -> Webhook:
    """The webhook that the fields ask for, those left out as in the old one.

    check_url raises Invalid. Raises Invalid with every field at fault."""
    with Reader() as reader:
        for name in ("url", "events"):
            is_there = getattr(old, name) or fields.get(name) is not None
            reader.check(name, is_there, "is needed")
        given = dict(_read_fields(reader, fields, old, check_url))
    if "configuration" in given:
        given["secret"] = given["configuration"].pop("secret", None) or None
    if not old.name and "name" not in given:
        given["name"] = site_of(given.get("url", old.url))[:255]
    return dataclasses.replace(old, **given)


def _accepts(accepted, value):
    accepted = accepted if isinstance(accepted, list) else [accepted]
    is_bool = isinstance(value, bool)
    return any(i == value and isinstance(i, bool) == is_bool for i in accepted)


def _field_at(fields, path):
    """The value at a path of a webhook's filter, which reaches into objects only."""
    for key in path.split("."):
        if not isinstance(fields, dict) or key not in fields:
            return ABSENT
        fields = fields[key]
    return fields.value if isinstance(fields, JsonNumber) else fields


def event_fields(body: bytes) -> dict:
    """The fields of an event's body; Invalid if it is from before their depth was bounded."""
    return json_value(body.decode(), _event_decoder.decode)


def readable_fields(body: bytes) -> dict:
    """The fields of an event's body, or none if it is too deep."""
    try:
        return event_fields(body)
    except Invalid:
        return {}


def has_all(body: bytes, conditions: tuple[tuple[str, str], ...]) -> bool:
    """Whether an event has all of these texts at their paths."""
    fields = readable_fields(body)
    return all(has(fields, path, text) for path, text in conditions)


def wants(webhook: Webhook, fields: dict) -> bool:
    """Whether an event of these fields passes the webhook's filters."""
    return all(
        _accepts(accepted, _field_at(fields, path)) for path, accepted in webhook.filters.items()
    )


# ---- events ----


def published_name(value: object) -> str:
    """The name of an event that somebody else publishes."""
    require(value not in OWN_EVENTS, "is a name of webhookd's own events")
    return event_name(value)


class Naming(typing.NamedTuple):
    """The names that a request gives to events of other programs."""

    query: str | None = None  # that of every event
    header: str | None = None  # as it came; that of events without one

    def name_of(self, fields: dict) -> str | None:
        """The name from outside, or None if the event has its own."""
        if self.query or isinstance(fields.get("event"), str):
            return self.query
        return self.header


def read_query_name(value: object) -> str:
    """The one name that a query gives."""
    [name, *more] = strings(value)
    require(not more, "must be one name")
    return published_name(name)


def _header_name(value):
    try:
        return published_name(value)
    except Invalid as error:
        subject = "the name in X-Event-Key or X-GitHub-Event (?event=NAME gives another)"
        raise Invalid(f"{subject} {error}") from None


def _name_of(fields):
    if fields.get("event") is None:
        way = "(in the body, or by ?event=NAME, X-Event-Key or X-GitHub-Event)"
        raise Invalid("must be a string" if "event" in fields else f"is needed {way}")
    return published_name(fields["event"])


def _event_time(value):
    moment = value.value if isinstance(value, JsonNumber) else value
    if isinstance(moment, bool) or not isinstance(moment, (int, float)):
        raise Invalid("must be a number")
    if not abs(moment) < 1e15:
        raise Invalid("is out of range")
    return int(moment)


def _check_size(size_bytes, max_bytes, context=None):
    if size_bytes > max_bytes:
        rule = f"an event may have at most {max_bytes} bytes (--max-event-size)"
        raise TooLarge(Fault(context, rule))


def _read_foreign(value, now_ms, max_bytes, naming):
    """An event of another program, all of whose fields stay as they are."""
    with Reader() as reader:
        name = naming.query or reader.read("event", _header_name, naming.header)
    lead = {"timestamp": now_ms, "event": name}
    added = {key: lead[key] for key in lead if key not in value}
    body = utf8(json_text(added | value))
    _check_size(len(body) - (len(_encode(added)) - 1 if added else 0), max_bytes)
    return NewEvent(name, now_ms, body, is_foreign=True)


def _read_event(value, now_ms, max_bytes, naming):
    if not isinstance(value, dict):
        raise Invalid("an event must be a JSON object")
    if naming.name_of(value):
        return _read_foreign(value, now_ms, max_bytes, naming)
    timestamp = value.get("timestamp", now_ms)
    with Reader() as reader:
        name = reader.read("event", _name_of, value)
        moment = reader.read("timestamp", _event_time, timestamp)
    body = utf8(json_text({"timestamp": timestamp, "event": name} | value))
    added = 0 if "timestamp" in value else len(f'"timestamp":{now_ms},')
    _check_size(len(body) - added, max_bytes)
    return NewEvent(name, moment, body)


def _read_one(body, now_ms, max_bytes, naming):
    _check_size(len(body), max_bytes)
    value = json_value(decoded(body), _event_decoder.decode)
    return _read_event(value, now_ms, max_bytes, naming)


_blank = re.compile(r"[ \t\r\n]*").match


def _is_cut_off(error, text):
    """Whether an error of the decoder comes from where a text was cut.

    A string is then unterminated. Of a longer token, such as `fals` or `"\\ud83d\\ude0`, the
    decoder names the start, which is less than 16 characters before the cut."""
    return "Unterminated" in error.msg or error.pos > len(text) - 16


def _item(text, start, max_bytes, context):
    """The JSON value at a position of a text, and where it ends; raises ValueError."""
    is_large = len(text) > max_bytes  # then a part is read that one event cannot exceed
    part, at = (text[start : start + max_bytes + 1], 0) if is_large else (text, start)
    try:
        item, end = _event_decoder.raw_decode(part, at)
    except json.JSONDecodeError as error:
        if is_large and _is_cut_off(error, part):
            _check_size(len(part), max_bytes, context)
        raise ValueError(f"{error.msg}: char {start - at + error.pos}") from None
    _check_depth(item, part, at, end)
    return item, start - at + end


def _items(text, max_bytes):
    """The items of a JSON array, one by one: all at once could fill the memory."""
    at = _blank(text, 0).end()
    for index in itertools.count():
        at = _blank(text, at + 1).end()  # after the bracket or the comma
        if not index and text.startswith("]", at):
            break
        item, at = _parsed_json(text, _item, at, max_bytes, f"[{index}]")
        yield item
        at = _blank(text, at).end()
        if not text.startswith(",", at):
            break
    is_end = text[at:].strip(" \t\r\n") == "]"
    require(is_end, f"the body is not valid JSON: Expecting ',' or ']': char {at}")


def read_events(
    body: bytes, lines: bool, now_ms: int, max_bytes: int, naming: Naming = Naming()
) -> NewEvent | list[NewEvent]:
    """The event of a JSON object; the list of those of an array, or of NDJSON lines.

    Raises Invalid with the faults of all of them, TooLarge for one over max_bytes."""
    if lines:
        matches = re.finditer(rb"[^\n]+", body)
        parts = ((_read_one, line[0].rstrip()) for line in matches if line[0].strip())
    elif body.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        parts = ((_read_event, item) for item in _items(decoded(body), max_bytes))
    else:
        return _read_one(body, now_ms, max_bytes, naming)
    parts = itertools.islice(parts, MAX_EVENTS_PER_REQUEST + 1)
    with Reader() as reader:
        events = [
            reader.read(f"[{index}]", *part, now_ms, max_bytes, naming)
            for index, part in enumerate(parts)
        ]
    require(events, "at least one event is needed")
    is_few = len(events) <= MAX_EVENTS_PER_REQUEST
    require(is_few, f"at most {MAX_EVENTS_PER_REQUEST} events are allowed")
    return events


# ======================================================================================
# Signatures: what one attempt sends
# ======================================================================================


def uuid7(now_ms: int) -> str:
    """A UUID that sorts by time (RFC 9562, version 7): its index stays compact."""
    chance = random.getrandbits(74)
    digits = f"{now_ms & 0xFFFFFFFFFFFF:012x}7{chance & 0xFFF:03x}{chance >> 12 | 2 << 62:016x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


@functools.lru_cache(1024)
def _keyed_hashes(key):
    """The inner and the outer hash of an HMAC, which have read the padded key so far."""
    block = (hashlib.sha256(key).digest() if len(key) > 64 else key).ljust(64, b"\0")
    return [hashlib.sha256(bytes(byte ^ pad for byte in block)) for pad in (0x36, 0x5C)]


def hmac_sha256(key: bytes, *parts: bytes) -> bytes:
    """The HMAC of what the parts make together (RFC 2104, SHA-256).

    Copies of two hashes: a third faster than copies of one of hmac's objects."""
    keyed_inner, keyed_outer = _keyed_hashes(key)
    inner, outer = keyed_inner.copy(), keyed_outer.copy()
    for part in parts:
        inner.update(part)
    outer.update(inner.digest())
    return outer.digest()


def hub_signature(secret: str, body: bytes) -> str:
    """The X-Hub-Signature of a body."""
    return "sha256=" + hmac_sha256(secret.encode(), body).hex()


@functools.lru_cache(1024)
def standard_key(secret: str) -> bytes:
    """The Standard Webhooks key of a secret: what `whsec_` encodes, else its UTF-8."""
    if secret.startswith("whsec_"):
        with contextlib.suppress(ValueError):
            key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
            return key or secret.encode()  # no key at all would sign nothing
    return secret.encode()


def standard_signature(secret: str, id: str, seconds: int, body: bytes) -> str:
    """The webhook-signature of a body (standardwebhooks.com, symmetric v1)."""
    head = f"{id}.{seconds}.".encode()
    digest = hmac_sha256(standard_key(secret), head, body)
    return "v1," + base64.b64encode(digest).decode()


def signing_secrets(webhook: Webhook, now_ms: int) -> list[str]:
    """The secret, and for a day after it changed the one before it."""
    if webhook.previous_secret and now_ms < webhook.previous_secret_until:
        return [webhook.secret, webhook.previous_secret]
    return [webhook.secret]


def has_old_secret(webhook: Webhook, now_ms: int) -> bool:
    """Whether the webhook holds a secret that no longer signs."""
    return bool(webhook.previous_secret) and now_ms >= webhook.previous_secret_until


def with_rotated_secret(old: Webhook, new: Webhook, now_ms: int) -> Webhook:
    """The new webhook; if its secret was replaced, the old one's signs for a day too."""
    if old.secret == new.secret:
        return new
    if not old.secret or not new.secret:
        return dataclasses.replace(new, previous_secret=None, previous_secret_until=0)
    previous = {"previous_secret": old.secret, "previous_secret_until": now_ms + DAY_MS}
    return dataclasses.replace(new, **previous)


def attempt_headers(
    webhook: Webhook, event: str, id: str, number: int, body: bytes, now_ms: int
) -> str:
    """Lines of the headers that differ from attempt to attempt."""
    seconds = now_ms // 1000
    lines = (
        f"X-Event-Key: {event}\r\nX-Request-Id: {id}\r\nX-Attempt: {number}\r\n"
        f"webhook-id: {id}\r\nwebhook-timestamp: {seconds}\r\n"
    )
    if webhook.secret:
        hub = hub_signature(webhook.secret, body)
        secrets = signing_secrets(webhook, now_ms)
        signed = " ".join([standard_signature(s, id, seconds, body) for s in secrets])
        lines += (
            f"X-Hub-Signature: {hub}\r\nX-Hub-Signature-256: {hub}\r\n"
            f"webhook-signature: {signed}\r\n"
        )
    return lines


# ======================================================================================
# Policy: is it a success, when is the next attempt, when does a webhook rest
# ======================================================================================

MAX_RETRY_AFTER_SECONDS = DAY_SECONDS
JITTER = 0.1  # every wait varies by this share, so that retries do not come in step
FAILURES_TO_PAUSE = 5
PAUSE_GROWTH = 1.2


class Result(typing.NamedTuple):
    """The facts of one attempt, as the delivery loop hands them in."""

    due: DueDelivery
    attempt: Attempt
    ended_ms: int  # the clock may have been set since the attempt's start
    is_plain: bool = False  # the success of a healthy webhook, which changes nothing else


class Verdict(typing.NamedTuple):
    """What an attempt makes of its delivery and of its webhook."""

    state: str
    next_attempt: int | None  # milliseconds; None unless pending
    schedule_index: int
    health: Health


def random_jitter() -> float:
    """A factor around 1 for a wait."""
    return random.uniform(1 - JITTER, 1 + JITTER)


def outcome_of(status: int) -> str:
    """SUCCESS for any 2xx, FAILURE for any other answer."""
    return SUCCESS if 200 <= status < 300 else FAILURE


def retry_after_seconds(text: str | None, now_ms: int) -> float | None:
    """Seconds that a Retry-After header (seconds or a date) asks for; None if it asks nothing."""
    if text is None:
        return None
    if re.fullmatch(r"\d{1,99}", text.strip(), re.ASCII):
        return int(text)
    try:
        moment = email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None
    return max(0, moment - now_ms / 1000)


def rest_seconds(attempt: Attempt, now_ms: int, jitter: float) -> float | None:
    """How long a 429 or 503 asks that the whole webhook rests; None if it does not ask.

    It is never shorter than what was asked, and a day at most."""
    asked = attempt.retry_after if attempt.status in (429, 503) else None
    seconds = retry_after_seconds(asked, now_ms)
    return seconds and min(seconds * (1 + abs(1 - jitter)), MAX_RETRY_AFTER_SECONDS)


def next_wait_seconds(attempts: int, schedule: tuple[float, ...], jitter: float) -> float | None:
    """Seconds until the next attempt, or None when the schedule is used up.

    jitter is a factor around 1."""
    return schedule[attempts - 1] * jitter if attempts <= len(schedule) else None


def pause_seconds(failures: int, initial: float, maximum: float) -> float | None:
    """How long a webhook pauses after so many failures in a row; None: not yet."""
    if failures < FAILURES_TO_PAUSE:
        return None
    growth = PAUSE_GROWTH ** min(failures - FAILURES_TO_PAUSE, 1000)
    return min(maximum, initial * growth)


def longest_wait_seconds(settings: Settings) -> float:
    """How far ahead a plan can lie; one further ahead was made while a clock was wrong."""
    waits = (*settings.retry_schedule, settings.pause_max, MAX_RETRY_AFTER_SECONDS)
    return max(waits) * (1 + JITTER)


def reason_to_disable(attempt: Attempt, failing_seconds: float, disable_after: float) -> str | None:
    """Why a webhook is disabled when an attempt gives its delivery up, or None."""
    if attempt.status == http.HTTPStatus.GONE:
        return "the receiver answered 410 Gone"
    if failing_seconds >= disable_after:
        days = disable_after / DAY_SECONDS
        how_long = f"{days:g} days" if days >= 1 else f"{disable_after:g} s"
        return f"no success for {how_long}: {attempt.description}"
    return None


def health_after_success(health: Health, now_ms: int) -> Health:
    """The health of a webhook after a success: what was asked by Retry-After still holds."""
    # a success that was in flight when the webhook was disabled does not enable it
    if health.disabled or health.is_well:
        return health
    after = Health(announced=health.announced, since=health.since)
    if (health.resting_until or 0) > now_ms:
        after = after._replace(resting_until=health.resting_until, reason=health.reason)
    return after


def health_after_failure(
    health: Health, result: Result, gives_up: bool, settings: Settings, jitter: float
) -> Health:
    """The health of a webhook after an attempt that failed, and gives its delivery up or not.

    A receiver that says when to come back is not down: such an answer is no failure, and only
    makes the webhook rest."""
    attempt, now_ms = result.attempt, result.ended_ms
    if health.disabled:
        return health
    rest = rest_seconds(attempt, now_ms, jitter)
    if rest is not None:
        until = max(health.resting_until or 0, now_ms + round(rest * 1000))
        return health._replace(resting_until=until, reason=attempt.description)
    failures, since = health.failures + 1, health.failing_since or now_ms - attempt.duration
    health = health._replace(failures=failures, failing_since=since, reason=attempt.description)
    failing_seconds = (now_ms - since) / 1000
    gone = gives_up and reason_to_disable(attempt, failing_seconds, settings.disable_after)
    if gone:
        return health._replace(paused_until=None, reason=gone, disabled=True)
    pause = pause_seconds(failures, settings.pause_initial, settings.pause_max)
    return health._replace(paused_until=pause and now_ms + round(pause * jitter * 1000))


def judge(result: Result, health: Health, settings: Settings, jitter: float) -> Verdict:
    """What becomes of a delivery and of its webhook, whose health is the committed one."""
    due, attempt, now_ms = result.due, result.attempt, result.ended_ms
    index = due.schedule_index
    if attempt.outcome == SUCCESS:
        return Verdict(SUCCEEDED, None, index, health_after_success(health, now_ms))
    if attempt.start < due.next_attempt:  # a probe, before its time: its plan stays
        wait_seconds = (due.next_attempt - now_ms) / 1000
    else:
        index += 1
        wait_seconds = next_wait_seconds(index, settings.retry_schedule, jitter)
    gives_up = wait_seconds is None or attempt.status == http.HTTPStatus.GONE
    after = health_after_failure(health, result, gives_up, settings, jitter)
    if gives_up:
        return Verdict(FAILED, None, index, after)
    wait_seconds = max(wait_seconds, 0, rest_seconds(attempt, now_ms, jitter) or 0)
    return Verdict(PENDING, now_ms + round(wait_seconds * 1000), index, after)


# ======================================================================================
# Outbound HTTP: allowed addresses, requests and responses, one attempt
# ======================================================================================

# ---- addresses ----

REFUSED_NETWORKS = networks(  # a part stands before the whole, to be the one named
    "0.0.0.0/8,10.0.0.0/8,100.64.0.0/10,127.0.0.0/8,168.63.129.16/32,169.254.0.0/16,"
    "172.16.0.0/12,192.0.0.0/24,192.0.2.0/24,192.88.99.0/24,192.168.0.0/16,"
    "198.18.0.0/15,198.51.100.0/24,203.0.113.0/24,224.0.0.0/4,240.0.0.0/4,"
    "::1/128,64:ff9b:1::/48,::/8,100::/64,2001::/23,2001:db8::/32,3fff::/20,5f00::/16,"
    "fc00::/7,fe80::/10,fec0::/10,ff00::/8"
)
NAT64 = ipaddress.ip_network("64:ff9b::/96")
COMPATIBLE = ipaddress.ip_network("::/96")
LOOPBACK = {4: ipaddress.ip_address("127.0.0.1"), 6: ipaddress.ip_address("::1")}
MAX_LOOKUPS = 512  # names being looked up at one moment, a thread each
LOOKUP_SECONDS_AT_REGISTRATION = 5


class AddressRefused(Invalid):
    """A delivery may not go there; the text says where, and what allows it."""


def judged_addresses(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> tuple:
    """The IPv4 addresses inside an IPv6 one that leads to them, else the address."""
    if address.version == 4:
        return (address,)
    if address in NAT64 or address in COMPATIBLE and int(address) > 1:
        return (ipaddress.IPv4Address(int(address) & 0xFFFFFFFF),)
    if address.teredo:
        return address.teredo  # server and client
    return (address.ipv4_mapped or address.sixtofour or address,)


class Endpoint(typing.NamedTuple):
    """The parts of a URL that sending needs."""

    tls: bool
    host: str  # as it is looked up
    port: int
    host_header: str
    target: str  # path and query


@functools.lru_cache(4096)
def endpoint_of(url: str) -> Endpoint:
    """The parts of a webhook's URL."""
    parts = urllib.parse.urlsplit(url)
    tls, host = parts.scheme == "https", ascii_host(parts.hostname)
    default = 443 if tls else 80
    port = parts.port or default
    name = f"[{host}]" if ":" in host else host
    host_header = name if port == default else f"{name}:{port}"
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    quoted = urllib.parse.quote(target, safe="!#$%&'()*+,/:;=?@[]~")
    return Endpoint(tls, host, port, host_header, quoted)


def _is_ip(host):
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


class UnknownHost(OSError):
    """A name whose address is not known; the text says why."""


def _is_local(address):
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((str(address), 0))  # works for this machine's addresses only
        except OSError:
            return False
    return True


class AddressPolicy:
    """Judges where deliveries may go, and looks names up in threads of its own."""

    def __init__(self, allowed: tuple, own: tuple[str, int] | None = None):
        """own: the address and port that webhookd itself listens on."""
        self._allowed = allowed
        self._own = own and (ipaddress.ip_address(own[0]), own[1])
        self._lock = threading.Lock()  # guards _lookups
        self._lookups: dict[str, concurrent.futures.Future] = {}

    def check(self, text: str, port: int) -> None:
        """Raise AddressRefused unless deliveries may go to this IP address and port."""
        address = ipaddress.ip_address(text.partition("%")[0])
        if "%" in text:
            raise AddressRefused(f"{text} has a zone id")
        for judged in judged_addresses(address):
            if self._is_own(judged, port):
                raise AddressRefused(f"{text} port {port} is webhookd itself")
            if any(judged in net for net in self._allowed):
                continue
            refused = next((net for net in REFUSED_NETWORKS if judged in net), None)
            if refused:
                raise AddressRefused(
                    f"{text} is not a public address; to deliver there start with"
                    f" --allow-networks {refused} (WEBHOOKD_ALLOW_NETWORKS)"
                )

    def _is_own(self, address, port):
        if not self._own or port != self._own[1]:
            return False
        if address.is_unspecified:  # connects to this machine
            address = LOOPBACK[address.version]
        own = self._own[0]
        return address == own or own.is_unspecified and _is_local(address)

    def check_url(self, url: str) -> None:
        """Raise AddressRefused if the URL's host is known to be where nothing may go."""
        endpoint = endpoint_of(url)
        with contextlib.suppress(OSError):  # TimeoutError is one
            addresses = self.lookup(endpoint.host).result(LOOKUP_SECONDS_AT_REGISTRATION)
            for address in addresses:
                self.check(address, endpoint.port)

    def lookup(self, host: str) -> concurrent.futures.Future:
        """A future of the host's addresses, or of OSError; raises OSError when busy."""
        future = concurrent.futures.Future()
        future.set_running_or_notify_cancel()  # it is shared: no waiter may cancel it
        if _is_ip(host):
            future.set_result([host])
            return future
        with self._lock:
            if host in self._lookups:
                return self._lookups[host]
            if len(self._lookups) >= MAX_LOOKUPS:
                raise UnknownHost("too many names are being looked up")
            # a daemon: a resolver that hangs must not keep the process from stopping
            thread = threading.Thread(
                target=self._look_up, args=(host, future), name="lookup", daemon=True
            )
            thread.start()  # it waits for the lock before it ends
            self._lookups[host] = future
        return future

    def _look_up(self, host, future):
        addresses, failure = None, None
        try:
            rows = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            addresses = list(dict.fromkeys(address[0] for *_, address in rows))
        except Exception as error:  # any kind: a host that stayed in _lookups would be stuck
            is_silent = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
            words = "the name server did not answer for" if is_silent else "unknown host"
            failure = UnknownHost(f"{words} {host}")
        with self._lock:
            del self._lookups[host]
        if failure:
            future.set_exception(failure)
        else:
            future.set_result(addresses)


# ---- requests and responses ----


class ProtocolError(Exception):
    """A receiver answered, but not with one HTTP/1.1 response."""


def request_bytes(endpoint: Endpoint, headers: str, body: bytes) -> bytes:
    """A whole POST request, to be sent at once; headers: their lines."""
    head = (
        f"POST {endpoint.target} HTTP/1.1\r\nHost: {endpoint.host_header}\r\n"
        f"{headers}Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode("latin-1") + body


STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9]\d\d)(?: [^\r\n\0]*)?", re.ASCII)
LOOSE_STATUS_LINE = re.compile(r"HTTP/1\.(\d)[ \t]+([1-9]\d\d)(?:[ \t].*)?", re.ASCII | re.DOTALL)
HEADER_LINE = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*")
FOLD = re.compile(r"\n[ \t]+")  # RFC 9112, 5.2
HEAD_START = b"HTTP/1."
HEAD_END = re.compile(rb"\r?\n\r?\n")  # RFC 9112, 2.2: a line may end in LF alone
BLANK_LINES = re.compile(rb"(?:\r?\n)*")  # before a status line: RFC 9112, 2.2
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n\0]*)?")
CHUNK_LINE_START = re.compile(rb"[0-9A-Fa-f]{1,15}(?:[ \t;\r]|$)")
LENGTH = re.compile(r"(\d{1,18})(?:[ \t]*,[ \t]*\1)*", re.ASCII)

# what ends a body; UNCLEAR: the end of the connection, or of our patience
BY_LENGTH, BY_CHUNKS, BY_CLOSE, UNCLEAR = "length", "chunks", "close", "unclear"

# what can be wrong with an answer whose status is known
MALFORMED_HEAD = "its head is malformed"
UNCLEAR_LENGTH = "the length of its body is not clear"
BODY_OF_204 = "a body was announced"
BADLY_FRAMED = "its body is badly framed"
BROKE_OFF = "its body broke off"
TOO_SLOW = "its body took too long"


class Head(typing.NamedTuple):
    """What comes before the body of a response, and what it says of the body."""

    status: int
    lines: str  # the headers, as they came
    fields: dict[str, tuple[str, str]]  # see header_fields
    framing: str
    length: int  # of the body, when that is its framing
    keeps_alive: bool
    faults: tuple[str, ...]

    def header(self, name: str) -> str | None:
        """The value of a header by its lower-case name; None if it was not sent."""
        return self.fields.get(name, (name, None))[1]


def _framing(status, coding, length):
    """The framing of a body, its length, and what is wrong with them (RFC 9112, 6.3)."""
    if status in (204, 304):
        is_announced = status == 204 and (coding or length or "0") != "0"
        return BY_LENGTH, 0, BODY_OF_204 if is_announced else None
    if coding is not None:
        coding = coding.lower()
        framing = BY_CHUNKS if coding.rpartition(",")[2].strip() == "chunked" else UNCLEAR
        is_clear = coding == "chunked" and length is None
        return framing, 0, None if is_clear else UNCLEAR_LENGTH
    if length is None:
        return BY_CLOSE, 0, None
    match = LENGTH.fullmatch(length)
    return (BY_LENGTH, int(match[1]), None) if match else (UNCLEAR, 0, UNCLEAR_LENGTH)


def _read_status_line(line):
    """Minor version and status; raises ProtocolError."""
    match = LOOSE_STATUS_LINE.fullmatch(line)
    if not match:
        raise ProtocolError("the answer is not HTTP/1.1")
    if match[2] == "101":
        raise ProtocolError("the receiver wants to switch protocols")
    return match[1], int(match[2])


@functools.lru_cache(64)  # a receiver's heads are alike, but for the second in Date
def parse_head(head: bytes) -> Head:
    """The head of a response, leniently read; raises ProtocolError if it has no status.

    Folded headers are joined, malformed ones are skipped."""
    first, _, rest = head.decode("latin-1").replace("\r\n", "\n").partition("\n")
    minor, status = _read_status_line(first)
    unfolded = FOLD.sub(" ", rest)
    came = unfolded.split("\n") if rest else []
    good = [line for line in came if HEADER_LINE.fullmatch(line)]
    fields = header_fields("\r\n".join(good))
    coding, length, connection = (
        fields.get(name, (name, None))[1]
        for name in ("transfer-encoding", "content-length", "connection")
    )
    framing, length, fault = _framing(status, coding, length)
    is_regular = len(good) == len(came) and STATUS_LINE.fullmatch(first)
    faults = tuple(filter(None, (None if is_regular else MALFORMED_HEAD, fault)))
    closes = minor != "1" or "close" in (connection or "").lower() or framing == BY_CLOSE
    keeps_alive = not closes and not faults and unfolded == rest
    return Head(status, "\r\n".join(good), fields, framing, length, keeps_alive, faults)


class Response:
    """Reads one HTTP/1.1 response (RFC 9112) from bytes as they come; does no I/O.

    The head decides. What is wrong before its end raises ProtocolError. What is wrong after it
    is a fault, which ends the use of the connection. At most MAX_RESPONSE_BYTES are read, and
    no byte is searched twice."""

    def __init__(self):
        self.head: Head | None = None
        self.body = bytearray()
        self.complete = False
        self.reusable = False  # the connection, for another request
        self.faults: tuple[str, ...] = ()  # in words
        self._unread = bytearray()
        self._searched = 0  # unread bytes that hold no end of a line
        self._received = 0
        self._wanted = 0  # bytes that are missing of the body or of the chunk
        self._read_next = self._read_head
        self.is_shared = False  # by all attempts that get the same bytes: see whole_response

    @property
    def is_unclear(self) -> bool:
        """Whether nobody can tell how long its body is."""
        return self.head is not None and self.head.framing == UNCLEAR

    def feed(self, chunk: bytes) -> bool:
        """Read a chunk; whether the response is complete. Raises ProtocolError."""
        chunk = chunk[: MAX_RESPONSE_BYTES - self._received]
        self._received += len(chunk)
        self._unread += chunk
        while not self.complete and self._read_next():
            pass
        if not self.complete and self._received >= MAX_RESPONSE_BYTES:
            if not self.head:
                raise ProtocolError("the answer's headers are too long")
            self._stop()
        if self.complete and self._unread:
            self.reusable = False
        return self.complete

    def end(self) -> None:
        """The receiver closed the connection; raises ProtocolError if there is no head."""
        if not self.head:
            when = "in the middle of its" if self._received else "without an"
            raise ProtocolError(f"the receiver closed the connection {when} answer")
        self.break_off(BROKE_OFF if self._read_next != self._read_until_close else None)

    def break_off(self, fault: str | None) -> None:
        """Nothing more of the body will come."""
        self._stop(None if self.is_unclear else fault)

    def _blame(self, fault):
        if fault not in self.faults:
            self.faults += (fault,)
        self.reusable = False

    def _stop(self, fault=None):
        if fault:
            self._blame(fault)
        self.complete, self.reusable = True, False

    def _take(self, end, next_start):
        """Take the unread bytes up to an end; the next ones start at next_start."""
        taken = bytes(self._unread[:end])
        del self._unread[:next_start]
        self._searched = 0
        return taken

    def _read_line(self):
        """The next line, or None if it is not there yet."""
        end = self._unread.find(b"\n", self._searched)
        if end < 0:
            self._searched = len(self._unread)
            return None
        line = self._take(end, end + 1)
        if line[-1:] == b"\r":
            return line[:-1]
        self._blame(BADLY_FRAMED)
        return line

    def _read_head(self):
        if self._unread.startswith((b"\r", b"\n")):
            del self._unread[: BLANK_LINES.match(self._unread).end()]
        end = HEAD_END.search(self._unread, self._searched)
        if not end:
            self._searched = max(0, len(self._unread) - 3)
            begins = bytes(self._unread[: len(HEAD_START)])
            if not HEAD_START.startswith(begins) and begins != b"\r":
                raise ProtocolError("the answer is not HTTP/1.1")
            return False
        head = parse_head(self._take(end.start(), end.end()))
        if head.status >= 200:  # the others announce a final answer
            self._begin_body(head)
        return True

    def _begin_body(self, head):
        self.head, self.reusable, self.faults = head, head.keeps_alive, head.faults
        self._wanted = head.length
        if head.framing == BY_LENGTH:
            self._read_next = self._read_length
        elif head.framing == BY_CHUNKS:
            self._read_next = self._read_chunk_size
        else:
            self._read_next = self._read_until_close

    def _take_body(self):
        taken = self._unread[: self._wanted]
        del self._unread[: len(taken)]
        self.body += taken
        self._wanted -= len(taken)

    def _read_length(self):
        self._take_body()
        self.complete = not self._wanted
        return False

    def _read_until_close(self):
        self.body += self._unread
        self._unread.clear()
        return False

    def _read_chunk_size(self):
        line = self._read_line()
        if line is None:
            if self._unread and not CHUNK_LINE_START.match(self._unread):
                self._stop(BADLY_FRAMED)
            return False
        match = CHUNK_LINE.fullmatch(line)
        if not match:
            return self._stop(BADLY_FRAMED)
        self._wanted = int(match[1], 16)
        self._read_next = self._read_chunk if self._wanted else self._read_trailer
        return True

    def _read_chunk(self):
        self._take_body()
        if self._wanted:
            return False
        self._read_next = self._read_chunk_end
        return True

    def _read_chunk_end(self):
        if self._unread and self._unread[0] not in b"\r\n":
            return self._stop(BADLY_FRAMED)
        line = self._read_line()
        if line:
            return self._stop(BADLY_FRAMED)
        self._read_next = self._read_chunk_end if line is None else self._read_chunk_size
        return line is not None

    def _read_trailer(self):
        line = self._read_line()
        self.complete = line == b""
        return line is not None


NOT_BEGUN = Response()  # while no byte of a response came


@functools.lru_cache(256)  # a receiver's answers are alike, but for the second in Date
def whole_response(answer: bytes) -> Response | None:
    """The response of exactly these bytes, if nothing is wrong with it; not to be changed."""
    response = Response()
    try:
        response.feed(answer)
    except ProtocolError:
        return None
    response.is_shared = response.complete and response.reusable
    return response if response.is_shared else None


LATIN_CHARSET = re.compile(r"(?i)charset=\"?(iso-8859-1|latin-?1|us-ascii|windows-1252)\b")
BINARY = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]")


def kept_text(body: bytes, content_type: str | None, masked=str) -> str:
    """What is kept of a response's body: 16 KiB of text, else `<binary data>`.

    masked(text) is applied before the text is cut."""
    charset = LATIN_CHARSET.search(content_type or "")
    is_whole = len(body) < MAX_KEPT_BODY_BYTES  # else its last character may be cut
    try:
        if charset:
            text = body.decode(charset[1])
        else:
            text, _ = codecs.utf_8_decode(body, "strict", is_whole)
    except UnicodeError:
        return "<binary data>"
    if BINARY.search(text):
        return "<binary data>"
    kept = masked(text).encode()[:MAX_KEPT_BODY_BYTES]
    return kept.decode(errors="ignore")


def kept_headers(lines: str) -> str:
    """What is kept of a response's headers: 8 KiB of whole lines."""
    if len(lines) <= MAX_KEPT_HEADER_BYTES:
        return lines
    end = lines.rfind("\r\n", 0, MAX_KEPT_HEADER_BYTES + 2)
    return lines[: max(end, 0)]


# ---- connecting ----

CONNECT_DELAY_SECONDS = 0.25  # between the addresses of a name: RFC 8305, 8
MAX_ADDRESSES_TRIED = 16  # of a name; all are checked
NOT_FROM_HERE = (errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def _progress(error):
    """How far a connection got before the error: from 0, not out of this machine, to 3."""
    if isinstance(error, (ConnectionError, UnknownHost)):
        return 3
    if isinstance(error, TimeoutError):
        return 2
    return 0 if getattr(error, "errno", None) in NOT_FROM_HERE else 1


def furthest(failures: list[Exception]) -> Exception:
    """The failure that says most about why there is no connection."""
    return max(failures, key=_progress)


def alternating(addresses: list[str]) -> list[str]:
    """The addresses with both families in alternation, the first one's first (RFC 8305, 4)."""
    first = [a for a in addresses if (":" in a) == (":" in addresses[0])]
    others = [a for a in addresses if (":" in a) != (":" in addresses[0])]
    return [a for pair in itertools.zip_longest(first, others) for a in pair if a]


async def open_socket(address: str, port: int) -> socket.socket:
    """A socket connected to an IP address; raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        await asyncio.get_running_loop().sock_connect(opened, (address, port))
    except BaseException:
        opened.close()
        raise
    return opened


def _close_unused(task):
    if not task.cancelled() and not task.exception():
        task.result().close()


async def open_first(addresses: list[str], port: int, failures: list) -> socket.socket:
    """A socket connected to whichever address answers first; raises the furthest failure.

    The next address is tried after a quarter of a second, or when one fails. Their failures are
    added to the list."""
    waiting, running = collections.deque(alternating(addresses)[:MAX_ADDRESSES_TRIED]), set()
    try:
        while waiting or running:
            if waiting:
                running.add(asyncio.create_task(open_socket(waiting.popleft(), port)))
            delay = CONNECT_DELAY_SECONDS if waiting else None
            done, _ = await asyncio.wait(running, timeout=delay, return_when="FIRST_COMPLETED")
            for task in done:
                running.remove(task)
                if not task.exception():
                    return task.result()
                failures.append(task.exception())
        raise furthest(failures)
    finally:
        for task in running:
            task.cancel()
            task.add_done_callback(_close_unused)


handshake_for: contextvars.ContextVar["Exchange"] = contextvars.ContextVar("handshake_for")


class TimedTls(ssl.SSLObject):
    """Adds the loop's time for a handshake up in its exchange."""

    def do_handshake(self) -> None:
        begun = time.thread_time()
        try:
            super().do_handshake()
        finally:
            handshake_for.get().handshake_seconds += time.thread_time() - begun


@functools.cache
def tls_context(verify: bool) -> ssl.SSLContext:
    """The one context of all connections that verify, or that do not."""
    context = ssl.create_default_context()  # honours SSL_CERT_FILE
    # many a private authority breaks the rules that Python 3.13 began to insist on
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    # a hostile receiver's finite-field Diffie-Hellman costs the loop a tenth of a second
    ciphers = [c["name"] for c in context.get_ciphers() if "kx-dhe" not in c["kea"]]
    context.set_ciphers(":".join(ciphers))
    context.sslobject_class = TimedTls
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


# ---- connections ----

IDLE_SECONDS = 30  # an unused connection is closed after this time
CONNECTION_SECONDS = 60  # it serves no longer, so that a moved name is noticed
MAX_IDLE_CONNECTIONS = 256
UNCLEAR_SECONDS = 1  # for a body whose length nobody can tell


class Connection(asyncio.Protocol):
    """One connection to a receiver, used by one exchange at a time."""

    def __init__(self, exchange, opened: socket.socket):
        self.exchange = exchange  # the one that it serves now; None: it is idle
        self.transport = None
        self._socket = opened
        self._incoming = select.poll()  # bytes, an end or an error
        self._incoming.register(opened, select.POLLIN)
        self.idle_since = 0.0  # time.monotonic()
        self._good_until = time.monotonic() + CONNECTION_SECONDS

    def connection_made(self, transport):
        self.transport = transport
        self.exchange.send_on(self)

    def data_received(self, data):
        if self.exchange:
            self.exchange.received(data)
        else:  # to no request: it must not become the answer to the next one
            self.transport.abort()

    def is_usable(self) -> bool:
        """Whether it can take another request: it is young, and nothing came since its
        last answer, not even what the loop has not read yet."""
        is_over = self.transport.is_closing() or time.monotonic() >= self._good_until
        return not is_over and not self._incoming.poll(0)

    def acknowledge(self) -> None:
        """Acknowledge at once what came, and not after tcp(7)'s 40 ms: a receiver that
        writes its answer in pieces may wait for that (Nagle's algorithm)."""
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def eof_received(self):
        self.connection_lost(None)

    def connection_lost(self, error):
        if self.exchange:
            self.exchange.lost(error)


class Exchange:
    """One request and its answer, bounded in time; calls back once, with a Response or
    with the exception that says why there is none.

    That is AddressRefused, ProtocolError, OSError (TimeoutError among them) or a bug.
    Callbacks and no coroutine: a task for each is a sixth of the CPU of an attempt."""

    def __init__(self, client, endpoint, verify_tls, request, done):
        self._client, self._done = client, done
        self.endpoint, self.verify_tls, self._request = endpoint, verify_tls, request
        self.handshake_seconds = 0.0  # see TimedTls
        self.failures: list[Exception] = []  # of addresses, while another may still answer
        self._connection: Connection | None = None
        self._connecting: asyncio.Task | None = None
        self._patience: asyncio.TimerHandle | None = None
        self._is_reused = False  # the connection
        self._response = NOT_BEGUN

    def start(self) -> None:
        """Send on an idle connection, or else on a new one."""
        connection = self._client.take_idle(self.endpoint, self.verify_tls)
        self._is_reused = connection is not None
        if connection:
            self.send_on(connection)
        else:
            self._connect()

    def send_on(self, connection: Connection) -> None:
        """Send the request; what comes on the connection now is for this exchange."""
        if self._done is None:  # its time was up just when the connection was made
            connection.transport.abort()
            return
        self._connection, connection.exchange = connection, self
        connection.transport.write(self._request)

    def received(self, data: bytes) -> None:
        """The connection has brought something."""
        try:
            if self._response is NOT_BEGUN:
                whole = whole_response(data) if len(data) <= MAX_SHARED_BYTES else None
                self._response = whole or Response()
            is_complete = self._response.is_shared or self._response.feed(data)
        except ProtocolError as error:
            self._end_without_answer(error)
        else:
            self._continue(is_complete)

    def _continue(self, is_complete):
        head = self._response.head
        if self._is_reused and head and head.status == 408:  # sent because it was idle
            self._send_again()
        elif is_complete:
            self._end(self._response)
        else:
            self._connection.acknowledge()
            self._limit_patience()

    def lost(self, error: Exception | None) -> None:
        """The connection is closed, by the receiver or by an error."""
        try:
            if error and self._response.head:
                self._response.break_off(BROKE_OFF)
            else:
                self._response.end()
            self._end(self._response)
        except ProtocolError as failure:
            self._end_without_answer(error or failure)

    def expire(self) -> None:
        """Its time is up."""
        if self._response.head:
            self._response.break_off(TOO_SLOW)
            self._end(self._response)
        else:
            self._end(furthest([*self.failures, TimeoutError()]))

    def abandon(self) -> None:
        """Close everything; nobody is called back."""
        self._done = lambda answer: None  # else expire() would tell who waits
        self.expire()

    def _limit_patience(self):
        if self._response.is_unclear and not self._patience:
            loop = asyncio.get_running_loop()
            self._patience = loop.call_later(UNCLEAR_SECONDS, self.expire)

    def _end_without_answer(self, error):
        if self._is_reused:
            self._send_again()
        else:
            self._end(error)

    def _send_again(self):
        """Send once more, on a new connection: the idle one was stale, and brought no answer."""
        self._is_reused, self._response = False, NOT_BEGUN
        self._drop_connection()
        self._connect()

    def _connect(self):
        connecting = self._client.connect(self)
        self._connecting = asyncio.get_running_loop().create_task(connecting)
        self._connecting.add_done_callback(self._connected)

    def _connected(self, task):
        self._connecting = None
        if not task.cancelled() and task.exception():
            self._end(task.exception())

    def _drop_connection(self):
        self._connection.exchange = None
        self._connection.transport.abort()
        self._connection = None

    def _end(self, answer):
        done, self._done = self._done, None
        if done is None:  # it has ended already
            return
        if self._connecting:
            self._connecting.cancel()
        if self._patience:
            self._patience.cancel()
        if self._connection and answer is self._response and self._is_reusable():
            self._connection.exchange = None
            self._client.keep_idle(self._connection, self.endpoint, self.verify_tls)
        elif self._connection:
            self._drop_connection()
        self._client.ended(self)
        try:
            done(answer)
        except Exception:  # the others and their timer must not suffer from it
            log.exception("what follows an attempt failed")

    def _is_reusable(self):
        transport = self._connection.transport
        unsent_bytes = transport.get_write_buffer_size()  # the answer may come before the end
        return self._response.reusable and not unsent_bytes and not transport.is_closing()


class Client:
    """Sends requests over kept-alive connections. Belongs to one event loop."""

    def __init__(self, address_policy: AddressPolicy, timeout_seconds: float):
        self._address_policy = address_policy
        self.timeout_seconds = timeout_seconds
        self._exchanges: dict[Exchange, float] = {}  # when the time of each is up
        self._timer: asyncio.TimerHandle | None = None
        self._idle = collections.defaultdict(list)  # by endpoint's key: Connections
        self._idle_count = 0

    def send(
        self, webhook: Webhook, headers: str, body: bytes, done: collections.abc.Callable
    ) -> Exchange:
        """POST to a webhook, and later call done with what the Exchange ends in."""
        endpoint = endpoint_of(webhook.url)
        request = request_bytes(endpoint, webhook.fixed_headers + headers, body)
        exchange = Exchange(self, endpoint, webhook.verify_tls, request, done)
        now = asyncio.get_running_loop().time()
        self._exchanges[exchange] = now + self.timeout_seconds
        if not self._timer:
            self._expire_old()
        exchange.start()
        return exchange

    def _expire_old(self):
        """One timer for all: they have the same time, and stand in order."""
        loop = asyncio.get_running_loop()
        while self._exchanges:
            exchange, deadline = next(iter(self._exchanges.items()))
            if deadline > loop.time():
                self._timer = loop.call_at(deadline, self._expire_old)
                return
            exchange.expire()
        self._timer = None

    def close(self) -> None:
        """Give up all exchanges, call nobody back, and close all connections."""
        for exchange in list(self._exchanges):
            exchange.abandon()
        if self._timer:
            self._timer.cancel()
            self._timer = None
        self.close_idle()

    # ---- for exchanges ----

    def ended(self, exchange: Exchange) -> None:
        """An exchange is over."""
        del self._exchanges[exchange]

    def take_idle(self, endpoint: Endpoint, verify_tls: bool) -> Connection | None:
        """A kept-alive connection to the endpoint, if there is one."""
        connections = self._idle.get((endpoint.tls, endpoint.host, endpoint.port, verify_tls))
        while connections:
            self._idle_count -= 1
            connection = connections.pop()
            if connection.is_usable():
                return connection
            connection.transport.abort()
        return None

    def keep_idle(self, connection: Connection, endpoint: Endpoint, verify_tls: bool):
        """Keep a connection for another exchange, or close it if there are too many."""
        if self._idle_count >= MAX_IDLE_CONNECTIONS:
            connection.transport.abort()
            return
        connection.idle_since = time.monotonic()
        self._idle[endpoint.tls, endpoint.host, endpoint.port, verify_tls].append(connection)
        self._idle_count += 1

    async def connect(self, exchange: Exchange) -> None:
        """Connect an exchange to a checked address; raises AddressRefused or OSError."""
        endpoint = exchange.endpoint
        handshake_for.set(exchange)
        addresses = await self._addresses(exchange)
        for address in addresses:  # all of them, before one is used
            self._address_policy.check(address, endpoint.port)
        if len(addresses) == 1:
            opened = await open_socket(addresses[0], endpoint.port)
        else:
            opened = await open_first(addresses, endpoint.port, exchange.failures)
        exchange.failures.clear()
        tls = {}
        if endpoint.tls:  # RFC 6066, 3: neither the name sent nor the one verified ends in a dot
            name = endpoint.host.removesuffix(".")
            tls = {"ssl": tls_context(exchange.verify_tls), "server_hostname": name}
        await asyncio.get_running_loop().create_connection(
            lambda: Connection(exchange, opened), sock=opened, **tls
        )

    async def _addresses(self, exchange):
        host = exchange.endpoint.host
        # what the exchange says if its time is up before the name server answers
        silent = UnknownHost(f"timed out, the name server did not answer for {host}")
        exchange.failures.append(silent)
        addresses = await asyncio.wrap_future(self._address_policy.lookup(host))
        exchange.failures.clear()
        return addresses

    def close_idle(self, older_than_seconds: float = 0) -> None:
        """Close the connections that have been idle for so long."""
        newest = time.monotonic() - older_than_seconds
        for key, connections in list(self._idle.items()):
            for connection in [c for c in connections if c.idle_since <= newest]:
                connections.remove(connection)
                connection.transport.abort()
                self._idle_count -= 1
            if not connections:
                del self._idle[key]


# ---- one attempt ----


def _facts_of(response, webhook):
    """The fields of an Attempt from `outcome` to `retry_after`."""
    masked = webhook.without_secrets
    head, description = response.head, str(response.head.status)
    target = head.header("location")
    if 300 <= head.status < 400 and target:
        target = without_path(masked(target), webhook.url)[:200]
        description += f", a redirect to {target}, which is not followed"
    description = ", ".join([description, *response.faults])
    body = kept_text(response.body, head.header("content-type"), masked)
    return (
        outcome_of(head.status),
        description,
        head.status,
        kept_headers(masked(head.lines)),
        body,
        None,  # the request's body
        head.header("retry-after"),
    )


def _known_facts_of(response, webhook):
    """As _facts_of, but those of a shared response are worked out only once."""
    if not response.is_shared:
        return _facts_of(response, webhook)
    known = webhook.known_answers
    if response not in known:
        known[response] = _facts_of(response, webhook)
    return known[response]


def described(error: Exception) -> str:
    """Why there was no answer, in words."""
    if not isinstance(error, (Invalid, ProtocolError, OSError)):
        log.error("an attempt failed unexpectedly", exc_info=error)
        return "internal error"
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {(error.reason or str(error)).replace('_', ' ').lower()}"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, ConnectionError):
        return "connection reset"
    if isinstance(error, UnknownHost) or not isinstance(error, OSError):
        return str(error)
    return (os.strerror(error.errno) if error.errno else str(error)).lower()


def start_attempt(
    client: Client,
    webhook: Webhook,
    headers: str,
    body: bytes,
    start_ms: int,
    done: collections.abc.Callable[[Attempt], None],
) -> None:
    """POST to a webhook, and call done with what came of it, every secret masked.

    headers: the attempt's own, see attempt_headers."""
    begun, exchange = time.monotonic(), None

    def finish(answer):
        if isinstance(answer, Response):
            facts = _known_facts_of(answer, webhook)
        else:
            facts = ERROR, described(answer)
        duration_ms = round((time.monotonic() - begun) * 1000)
        sent = webhook.masked_headers + headers
        attempt = Attempt(start_ms, duration_ms, webhook.masked_url, sent, *facts)
        if exchange and exchange.handshake_seconds:
            attempt = attempt._replace(handshake_seconds=exchange.handshake_seconds)
        done(attempt)

    try:
        exchange = client.send(webhook, headers, body, finish)
    except Exception as error:  # a bug costs this attempt, and not the loop
        asyncio.get_running_loop().call_soon(finish, error)


# ======================================================================================
# Store: one SQLite file, one writer thread, a commit for all who wait
# ======================================================================================

SCHEMA = """
    CREATE TABLE users (
        name TEXT PRIMARY KEY, role TEXT NOT NULL, password TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE webhooks (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        definition TEXT NOT NULL,  -- JSON of the fields of Webhook; the rest is its Health
        failures INTEGER NOT NULL DEFAULT 0,
        failing_since INTEGER,     -- milliseconds, as every time here
        paused_until INTEGER,
        resting_until INTEGER,
        reason TEXT,
        disabled INTEGER NOT NULL DEFAULT 0,
        announced INTEGER NOT NULL DEFAULT 0,
        since INTEGER
    );
    CREATE TABLE events (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        event TEXT NOT NULL,
        timestamp INTEGER NOT NULL,   -- the publisher's
        created INTEGER NOT NULL,
        deliveries INTEGER NOT NULL   -- how many were made when it was published
    );
    CREATE INDEX events_by_name ON events (event, id);
    CREATE TABLE payloads (  -- apart from events, so that lists need not read them
        event_id INTEGER PRIMARY KEY, body BLOB NOT NULL
    );
    CREATE TABLE deliveries (
        id INTEGER PRIMARY KEY AUTOINCREMENT,  -- in publish order
        uuid TEXT NOT NULL UNIQUE,
        webhook_id INTEGER NOT NULL,
        event_id INTEGER NOT NULL,
        event TEXT NOT NULL,
        created INTEGER NOT NULL,
        state TEXT NOT NULL,
        attempt_count INTEGER NOT NULL,
        next_attempt INTEGER,          -- NULL unless pending
        schedule_index INTEGER NOT NULL,
        outcome TEXT, description TEXT, duration INTEGER  -- of the latest attempt
    );
    CREATE INDEX deliveries_due ON deliveries (webhook_id, next_attempt, id)
        WHERE state = 'pending';
    -- lists: see delivery_list; what is in few rows costs the others nothing
    CREATE INDEX deliveries_by_webhook ON deliveries (webhook_id, id, created);
    CREATE INDEX deliveries_by_name ON deliveries (webhook_id, event, id);
    CREATE INDEX deliveries_failed ON deliveries (webhook_id, id) WHERE state = 'failed';
    CREATE INDEX deliveries_unsuccessful ON deliveries (webhook_id, outcome, id)
        WHERE outcome <> 'SUCCESS';
    -- of two that serve alike the planner takes the later one: this behind by_webhook
    CREATE INDEX deliveries_in_order ON deliveries (webhook_id, id) WHERE state = 'pending';
    CREATE INDEX deliveries_by_event ON deliveries (event_id);
    CREATE TABLE attempts (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        delivery_id INTEGER NOT NULL,
        start INTEGER NOT NULL,
        duration INTEGER NOT NULL,
        url TEXT NOT NULL,
        request_headers TEXT NOT NULL,  -- lines, as they were on the wire
        outcome TEXT NOT NULL,
        description TEXT NOT NULL,
        status INTEGER,
        response_headers TEXT NOT NULL,
        response_body TEXT,
        request_body TEXT               -- NULL: the event's
    );
    CREATE INDEX attempts_by_delivery ON attempts (delivery_id, id);
    CREATE TABLE statistics (  -- attempts a day, and the last of them
        webhook_id INTEGER, event TEXT, outcome TEXT, day INTEGER,
        attempts INTEGER NOT NULL, last_attempt INTEGER NOT NULL,
        PRIMARY KEY (webhook_id, event, outcome, day)
    ) WITHOUT ROWID;
    CREATE TABLE answers (  -- which events an Idempotency-Key has published
        user TEXT, key TEXT, fingerprint BLOB NOT NULL,
        first_event INTEGER NOT NULL, event_count INTEGER,  -- NULL: one, and no list
        created INTEGER NOT NULL,
        PRIMARY KEY (user, key)
    ) WITHOUT ROWID;
    CREATE INDEX answers_by_age ON answers (created);
"""
MIGRATIONS = (SCHEMA,)  # their count is the version of the database; only ever append
BUSY_SECONDS = 10  # wait so long for another process that writes, as `user add`
RECORD_SECONDS = 0.01  # results wait so long for a publication to share their commit
RETRY_SECONDS = 1  # after a commit failed
FULL_DISK_BYTES = 64 << 10
KEY_DAYS = 3  # an Idempotency-Key is remembered so long
MAX_COUNTED_NAMES = 1000  # of events, by webhook; attempts for others are counted together
OTHER_EVENTS = "*"  # the name they are counted by
USUAL_LOG_BYTES = 5 << 20  # SQLite's log is used again from 1000 pages on, 4 MB
MAX_IDLE_LOG_BYTES = 4 << 20  # SQLite's log is cut to this size before it is used again
FULL = "the database is full (--max-database-size)"
NO_FILE = "the database's files were moved or deleted: stop, and put them back"
NO_ROOM = "the disk is full but for a reserve"
LONG_LOG = "SQLite's log is too long: something reads for long, perhaps a backup that hangs"
RESERVE_SHARE, MAX_RESERVE_BYTES = 20, 32 << 20  # of the volume, for what is no publication
MEASURED_BYTES = 1 << 20  # after so much was published, the size is measured
COUNTED_ROWS = 100_000  # of a list, beyond the page
ROW_BYTES = 500  # of an event without its body, or of a delivery, with their indexes
ROWS_PER_INSERT = 64
ROWS_PER_STATEMENT = 500  # of results that are looked up at once
ROWS_IN_MEMORY = 5000  # new deliveries that wait for the end of their transaction
ROWS_PER_STEP = 500  # of work in steps, so that no other write waits long
PAGES_PER_STEP = 100
ATTEMPTS_PER_STEP = 2
BYTES_PER_STEP = 1 << 20  # of payloads that are deleted: each page goes to the log first
STANDSTILL_SECONDS = 15  # without progress in a commit, or a tick of the loop: it hangs
WINDOW = 1000  # due deliveries of one webhook that are held in memory
WINDOW_BYTES = 32 << 20  # of their bodies, for all webhooks together
SEARCHED_EVENTS = 50_000  # that one request for those with a payload looks at
SEARCHED_BYTES = 16 << 20  # of their payloads
SEARCH_STEP = 2000  # events
NEEDLE_BYTES = 100  # that instr() looks for: its time grows with their number
SHOWN_PAYLOAD_BYTES = 8 << 20  # in one answer

# ---- the file ----


class DatabaseError(Exception):
    """The database cannot be used; the text says why."""


def is_damage(error: Exception) -> bool:
    """Whether an error tells of a damaged database."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary one of an extended code
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def without_row(error: sqlite3.Error) -> sqlite3.Error:
    """An error that quotes nothing of a row, which may be a secret's."""
    if not str(error).startswith("Could not decode"):  # Python's own; it quotes the text
        return error
    damage = sqlite3.DatabaseError("a text in it is not UTF-8")
    damage.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return damage


class Database(sqlite3.Connection):
    """A connection that returns in one call what a statement finds or changes.

    on_error gets each error, so that damage is noticed wherever it shows."""

    on_error: collections.abc.Callable[[sqlite3.Error], None] = staticmethod(lambda error: None)

    def execute(self, sql: str, values: collections.abc.Sequence = ()) -> sqlite3.Cursor:
        """As sqlite3's."""
        try:
            return super().execute(sql, values)
        except sqlite3.Error as error:
            raise self._reported(error) from None

    def _reported(self, error):
        error = without_row(error)
        self.on_error(error)
        return error

    def each(self, sql: str, *values: object) -> collections.abc.Iterator[tuple]:
        """The rows that it finds, one by one; to be closed."""
        with contextlib.closing(self.execute(sql, values)) as cursor:
            try:
                yield from cursor
            except sqlite3.Error as error:
                raise self._reported(error) from None

    def rows(self, sql: str, *values: object) -> list[tuple]:
        """All rows that it finds."""
        cursor = self.execute(sql, values)
        try:
            return cursor.fetchall()
        except sqlite3.Error as error:
            raise self._reported(error) from None

    def row(self, sql: str, *values: object) -> tuple | None:
        """The first row, or None."""
        return next(iter(self.rows(sql, *values)), None)

    def column(self, sql: str, *values: object) -> list:
        """The values of its only column."""
        return [value for (value,) in self.rows(sql, *values)]

    def change(self, sql: str, *values: object) -> int:
        """How many rows it has changed."""
        return self.execute(sql, values).rowcount


def connect(path: str) -> Database:
    """A connection in autocommit mode, for any thread."""
    path = os.path.abspath(path)  # SQLite would take some names for more than a name
    connection = sqlite3.connect(
        path,
        timeout=BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
        factory=Database,
    )
    connection.execute("PRAGMA temp_store = MEMORY")  # /tmp may be full, or read-only
    return connection


def open_database(path: str) -> Database:
    """A connection for writing; the file is made if it is not there."""
    connection = connect(path)
    if not connection.row("PRAGMA page_count")[0]:  # of an old file it would change nothing
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA journal_size_limit = {MAX_IDLE_LOG_BYTES}")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten
    return connection


@contextlib.contextmanager
def transaction(connection, begin="BEGIN IMMEDIATE", end="COMMIT", undo="ROLLBACK"):
    """All or nothing, whatever is raised inside."""
    connection.execute(begin)
    try:
        yield connection
        connection.execute(end)
    except BaseException:
        if connection.in_transaction:  # SQLite rolls back by itself after some errors
            with contextlib.suppress(MemoryError):  # the writer rolls back what is open
                connection.execute(undo)
        raise


def schema_version(connection: Database) -> int:
    """How many of the migrations the database has been through."""
    return connection.row("PRAGMA user_version")[0]


def refuse_newer(version: int, name: str = "the database") -> None:
    """Raise DatabaseError if a database has been through migrations not known here."""
    if version > len(MIGRATIONS):
        raise DatabaseError(
            f"{name} has version {version}, written by a newer webhookd;"
            f" this one knows {len(MIGRATIONS)}"
        )


class Space(typing.NamedTuple):
    """How much room the files take, and how much their volume has; bytes."""

    used: int = 0  # of the database, without what is free in it
    log: int = 0  # of SQLite's log, the file -wal
    left: float = math.inf  # for publications: the volume's, without its reserve
    is_scarce: bool = False  # the volume is nearly full, and of the database for the most part
    fault: str | None = None  # why there is none at all


def measure(connection: Database, path: str) -> Space:
    """How much room there is; raises sqlite3.Error, OSError."""
    names = ("page_count", "freelist_count", "page_size")
    pages, unused, page_bytes = (connection.row(f"PRAGMA {name}")[0] for name in names)
    used = (pages - unused) * page_bytes
    try:
        file, log_bytes = os.stat(path), os.stat(f"{path}-wal").st_size
    except FileNotFoundError:
        return Space(used, fault=NO_FILE)
    volume = os.statvfs(path)
    if volume.f_flag & os.ST_RDONLY:
        return Space(used, log_bytes, fault="the disk is read-only")
    if not volume.f_blocks:  # a file system that does not tell
        return Space(used, log_bytes)
    reserve = min(volume.f_blocks * volume.f_frsize // RESERVE_SHARE, MAX_RESERVE_BYTES)
    free = volume.f_bavail * volume.f_frsize - max(0, USUAL_LOG_BYTES - log_bytes)
    # free pages of the file are room; pages that are only in the log yet need room in the file
    left = free - reserve + file.st_size - used
    held = (volume.f_blocks - volume.f_bfree) * volume.f_frsize
    is_own = 2 * (file.st_size + log_bytes) >= held
    return Space(used, log_bytes, left, is_own and left < 2 * max(reserve, MEASURED_BYTES))


def migrate(connection: Database) -> None:
    """Bring the database to this version, all or nothing; raises DatabaseError."""
    version = schema_version(connection)
    refuse_newer(version)
    if not version and connection.row("SELECT 1 FROM sqlite_schema LIMIT 1"):
        raise DatabaseError("the database is another program's")
    if version < len(MIGRATIONS):
        with transaction(connection):
            for script in MIGRATIONS[schema_version(connection) :]:
                for statement in script.split(";\n"):
                    connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        words = "database migrated" if version else "database made"
        log_fact(words, old=version, new=len(MIGRATIONS))


def _open_or_make(path):
    """A handle of the file. One that root makes belongs to the owner of its folder, as whom
    the subcommands act, too."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    if not os.geteuid():
        folder = os.stat(os.path.dirname(os.path.abspath(path)))
        os.fchown(handle, folder.st_uid, folder.st_gid)
    return handle


@contextlib.contextmanager
def process_lock(path: str):
    """Hold the database for this process; raises DatabaseError if another one does."""
    try:
        handle = _open_or_make(path)
    except OSError as error:
        reason = f"--database (WEBHOOKD_DATABASE): {path}: {error.strerror}"
        raise SettingError(reason) from None
    # flock() does not meet SQLite's own locks, which are fcntl()'s; the file is closed
    # after SQLite's connections, for closing any handle drops a process's fcntl locks
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DatabaseError(f"{path} is in use by another webhookd") from None
        yield


# ---- statements ----

LISTED = "(SELECT value FROM json_each(?))"  # for an IN: the ids of a JSON array


def chunks(rows: list) -> collections.abc.Iterator[list]:
    """The rows in lists whose sizes are powers of two: few statements are ever compiled."""
    start, size = 0, ROWS_PER_INSERT
    while start < len(rows):
        while start + size > len(rows):
            size //= 2
        yield rows[start : start + size]
        start += size


def placeholders(values: collections.abc.Sized) -> str:
    """Placeholders for the values of an IN."""
    return f"({','.join('?' * len(values))})"


def values_clause(rows: list[tuple]) -> tuple[str, list]:
    """`VALUES (?,?),(?,?)` and its values: one statement gives up the GIL once."""
    clause = "VALUES " + ",".join([placeholders(rows[0])] * len(rows))
    return clause, list(itertools.chain.from_iterable(rows))


def insert(connection: Database, table: str, rows: list, conflict: str = "") -> None:
    """INSERT whole rows in few statements."""
    for chunk in chunks(rows):
        clause, values = values_clause(chunk)
        # FAIL: what an error leaves is rolled back with the rest. The default, ABORT, would
        # have SQLite copy each page that it changes, in order to undo this statement alone
        connection.execute(f"INSERT OR FAIL INTO {table} {clause} {conflict}", values)


Condition = tuple  # SQL and the values of its placeholders, as ("a = ?", 1); () asks nothing


def one_of(column: str, values: tuple) -> Condition:
    """The condition that a column has one of the values; without values it asks nothing."""
    return (f"{column} IN {placeholders(values)}", *values) if values else ()


def if_given(sql: str, value: object) -> Condition:
    """The condition with its one value; if that is None it asks nothing."""
    return () if value is None else (sql, value)


def where(conditions: list[Condition]) -> tuple[str, list]:
    """The WHERE clause of rows that meet all conditions, and its values."""
    given = [condition for condition in conditions if condition]
    clause = " AND ".join(sql for sql, *_ in given) or "1"
    return f" WHERE {clause}", [value for _, *values in given for value in values]


def delivery_list(wanted: Filter) -> tuple[str, Condition]:
    """The deliveries by the index that finds those wanted without reading the others, and
    the condition of that index.

    Chosen by hand: the planner knows neither how rare a state is, nor what a ? stands for."""
    if wanted.states == (FAILED,):
        return "deliveries INDEXED BY deliveries_failed", ("state = 'failed'",)
    if wanted.outcomes and SUCCESS not in wanted.outcomes:
        return "deliveries INDEXED BY deliveries_unsuccessful", ("outcome <> 'SUCCESS'",)
    if wanted.events:
        return "deliveries INDEXED BY deliveries_by_name", ()
    if wanted.states == (PENDING,):
        return "deliveries INDEXED BY deliveries_in_order", ("state = 'pending'",)
    return "deliveries INDEXED BY deliveries_by_webhook", ()


def or_404(row, what: str):
    """The row; raises NotFound if there is none."""
    if not row:
        raise NotFound(f"there is no {what}")
    return row


# ---- webhooks and their health ----


def definition_of(webhook: Webhook) -> str:
    """What is stored of a webhook."""
    return json.dumps(dataclasses.asdict(webhook), ensure_ascii=False)


class Webhooks:
    """All webhooks at one moment, in the order of their ids. A change makes a new one."""

    def __init__(self, by_id: dict[int, Webhook]):
        self.by_id = by_id
        active = [webhook for webhook in by_id.values() if webhook.active]
        self._wildcard = [w for w in active if any(n.endswith("*") for n in w.events)]
        self._exact = collections.defaultdict(list)  # by the event's name
        for webhook in active:
            for name in webhook.events:
                self._exact[name].append(webhook)

    def get(self, id: int) -> Webhook:
        """The webhook; raises NotFound."""
        return or_404(self.by_id.get(id), f"webhook {id}")

    def put(self, webhook: Webhook) -> "Webhooks":
        """The same with this webhook, be it new or changed."""
        return Webhooks(self.by_id | {webhook.id: webhook})

    def without(self, id: int) -> "Webhooks":
        """The same without a webhook."""
        return Webhooks({key: w for key, w in self.by_id.items() if key != id})

    def wanting(self, event: NewEvent) -> list[int]:
        """The ids of the active webhooks that want the event."""
        named = self._exact.get(event.name, [])
        named = named + [w for w in self._wildcard if w.subscribed(event.name)]
        fields = event_fields(event.body) if any(w.filters for w in named) else {}
        return sorted({w.id for w in named if wants(w, fields)})


def load_users(connection: Database) -> list[User]:
    """All users, by name."""
    rows = connection.rows("SELECT name, role, password FROM users ORDER BY name")
    return list(itertools.starmap(User, rows))


def load_webhooks(connection: Database) -> Webhooks:
    """The webhooks that the database holds."""
    by_id = {}
    rows = connection.rows("SELECT id, definition FROM webhooks ORDER BY id")
    for id, definition in rows:
        fields = json.loads(definition)
        fields |= {"id": id, "events": tuple(fields["events"])}
        by_id[id] = Webhook(**fields)
    return Webhooks(by_id)


HEALTH_COLUMNS = ", ".join(Health._fields)


def load_health(connection: Database) -> HealthById:
    """The health of every webhook."""
    rows = connection.rows(f"SELECT id, {HEALTH_COLUMNS} FROM webhooks")
    by_id = HealthById()
    for id, *fields in rows:
        health = Health(*fields)
        flags = {"disabled": bool(health.disabled), "announced": bool(health.announced)}
        by_id[id] = health._replace(**flags)
    return by_id


# ---- one transaction ----

FINISHED = "state <> 'pending'"  # of deliveries
_deliveries_of_event = "SELECT * FROM deliveries WHERE event_id = events.id"
WITHOUT_DELIVERIES = f"NOT EXISTS ({_deliveries_of_event})"  # of events
MISSED = f"NOT EXISTS ({_deliveries_of_event} AND webhook_id = ?)"  # of events, by a webhook
NAMES_NO_ATTEMPT = "last_attempt NOT IN (SELECT id FROM attempts)"  # of statistics


class IdempotencyKey(typing.NamedTuple):
    """A client's name for a publication: repeating it publishes nothing."""

    user: str
    key: str
    fingerprint: bytes  # of the body


class Recorded(typing.NamedTuple):
    """An attempt that is on disk, and what the writer made of it."""

    result: Result
    before: Health  # of the webhook
    verdict: Verdict


class Commit(typing.NamedTuple):
    """What the writer tells after a commit: all that the delivery loop has to know."""

    recorded: list[Recorded]
    changed: set[int]  # webhooks that were changed, or whose pending deliveries were
    due: list[DueDelivery]  # just published, in publish order


class Batch:
    """What one transaction does. The writer makes it, calls `record` first and `finish`
    last; events that are published in between wait for a few large statements.

    A method that raises has changed nothing but the database, where that is undone."""

    def __init__(
        self,
        connection: Database,
        webhooks: Webhooks,
        health: HealthById,
        ids: dict[str, collections.abc.Iterator[int]],
        counted_names: dict[int, set[str]],
        note_progress: collections.abc.Callable[[], None] = lambda: None,
    ):
        self.connection, self.webhooks = connection, webhooks
        self._webhooks_before, self._health = webhooks, health  # as committed
        self._ids, self._counted_names = ids, counted_names  # see Store
        self._note_progress = note_progress
        self.changed_health: dict[int, Health] = {}
        self._changed_at: dict[int, int] = {}  # webhooks, and when, milliseconds
        self.deleted: set[int] = set()  # webhooks
        self.pending_change = collections.Counter()  # by webhook
        self.commit = Commit([], set(), [])
        self._due_count = collections.Counter()  # of new deliveries by webhook
        self.published_count = self.published_bytes = 0
        self._new = {"events": [], "payloads": [], "deliveries": []}
        self.users = load_users(connection)  # as they are now: others may change them

    def flush(self) -> None:
        """Insert what was published and replayed, so that the next statements see it."""
        for table, rows in self._new.items():
            insert(self.connection, table, rows)
            rows.clear()
        self._note_progress()

    def finish(self) -> None:
        """Write all that is not written yet."""
        self.flush()
        for webhook_id, now_ms in self._changed_at.items():
            if webhook_id in self.webhooks.by_id:
                self._date_state(webhook_id, now_ms)
        sql = (
            f"UPDATE webhooks SET ({HEALTH_COLUMNS}) = {placeholders(Health._fields)} WHERE id = ?"
        )
        for webhook_id, health in self.changed_health.items():
            self.connection.change(sql, *health, webhook_id)

    def _date_state(self, webhook_id, now_ms):
        """Note when a webhook's state began, if it differs from the committed one."""
        webhook, health = self.webhooks.by_id[webhook_id], self._health_of(webhook_id)
        before = self._webhooks_before.by_id.get(webhook_id)
        state_before = before and (self._health[webhook_id].state(before), before.paused)
        if (health.state(webhook), webhook.paused) != state_before:
            self.changed_health[webhook_id] = health._replace(since=now_ms)

    def _health_of(self, webhook_id):
        return self.changed_health.get(webhook_id) or self._health[webhook_id]

    def _set_health(self, webhook_id, health, now_ms):
        self.changed_health[webhook_id] = health
        self._changed_at[webhook_id] = now_ms

    # ---- attempts ----

    def record(
        self,
        results: list[Result],
        settings: Settings,
        jitter: collections.abc.Callable[[], float],
    ) -> None:
        """Record attempts, and judge what becomes of their deliveries and webhooks."""
        for start in range(0, len(results), ROWS_PER_STATEMENT):
            chunk = results[start : start + ROWS_PER_STATEMENT]
            sql = f"SELECT id FROM deliveries WHERE id IN {LISTED}"
            row_ids = json.dumps([result.due.row_id for result in chunk])
            existing = set(self.connection.column(sql, row_ids))
            # an attempt during which the delivery was deleted leaves nothing behind
            self._insert_attempts([r for r in chunk if r.due.row_id in existing])
            for result in chunk:
                before = self._health_of(result.due.webhook_id)
                verdict = judge(result, before, settings, jitter())
                if result.due.row_id in existing:
                    verdict = self._apply_to_delivery(result.due, verdict)
                else:
                    verdict = verdict._replace(state=GONE, next_attempt=None)
                self._apply_to_webhook(result, before, verdict)
                self.commit.recorded.append(Recorded(result, before, verdict))

    def _insert_attempts(self, results):
        rows, counts = [], {}
        for due, attempt, *_ in results:
            id = next(self._ids["attempts"])
            rows.append((id, due.row_id, *attempt[:-2]))
            name = self._counted_name(due.webhook_id, due.event)
            key = due.webhook_id, name, attempt.outcome, attempt.start // DAY_MS
            counts[key] = counts.get(key, (0,))[0] + 1, id
        if not rows:
            return
        insert(self.connection, "attempts", rows)
        self.connection.change(
            "UPDATE deliveries SET attempt_count = attempt_count + 1,"
            " outcome = new.outcome, description = new.description, duration = new.duration,"
            " state = iif(new.outcome = 'SUCCESS', 'succeeded', state),"
            " next_attempt = iif(new.outcome = 'SUCCESS', NULL, next_attempt)"
            " FROM attempts AS new"
            " WHERE new.id BETWEEN ? AND ? AND deliveries.id = new.delivery_id",
            rows[0][0],
            rows[-1][0],
        )
        rows = [key + count_and_last for key, count_and_last in counts.items()]
        added = "attempts = attempts + excluded.attempts"
        update = f"UPDATE SET {added}, last_attempt = excluded.last_attempt"
        insert(self.connection, "statistics", rows, f"ON CONFLICT DO {update}")

    def _counted_name(self, webhook_id, event):
        """The name that an attempt is counted by: `*` if too many other names are counted."""
        names = self._counted_names.get(webhook_id)
        if names is None:
            sql = "SELECT DISTINCT event FROM statistics WHERE webhook_id = ?"
            names = self._counted_names[webhook_id] = set(self.connection.column(sql, webhook_id))
        if event not in names:
            if len(names - {OTHER_EVENTS}) >= MAX_COUNTED_NAMES:
                return OTHER_EVENTS
            names.add(event)
        return event

    def _apply_to_delivery(self, due, verdict):
        """Write what becomes of a delivery that did not succeed; returns the verdict that holds.

        A delivery that was redelivered or released during the attempt stays due."""
        if verdict.state != SUCCEEDED:
            sql = "SELECT next_attempt, schedule_index FROM deliveries WHERE id = ?"
            plan = self.connection.row(sql, due.row_id)
            if plan != (due.next_attempt, due.schedule_index):
                return Verdict(PENDING, *plan, verdict.health)
            sql = "UPDATE deliveries SET state = ?, next_attempt = ?, schedule_index = ?"
            self.connection.change(f"{sql} WHERE id = ?", *verdict[:3], due.row_id)
        if verdict.state != PENDING:
            self.pending_change[due.webhook_id] -= 1
        return verdict

    def _apply_to_webhook(self, result, before, verdict):
        webhook = self.webhooks.by_id.get(result.due.webhook_id)
        if webhook is None:  # deleted, and not yet all swept
            return
        after, now_ms = verdict.health, result.ended_ms
        if after is before and verdict.state == SUCCEEDED and not after.announced:
            return  # the usual case
        if after != before:
            self._set_health(webhook.id, after, now_ms)
        if after.disabled and not before.disabled:
            self._replace(dataclasses.replace(webhook, active=False), now_ms)
        if before.paused_until and after.is_well:
            self._release(webhook.id, now_ms)
        if result.due.event not in OWN_EVENTS:
            self._announce(webhook, result, before, verdict)

    def _announce(self, webhook, result, before, verdict):
        """Publish our own events about what an attempt has changed."""
        after, attempt, due = verdict.health, result.attempt, result.due
        if after.disabled and not before.disabled:
            self._announce_health(webhook, WEBHOOK_DISABLED, after.reason, result.ended_ms)
        elif after.paused_until and not before.paused_until:
            self._announce_health(webhook, WEBHOOK_PAUSED, after.reason, result.ended_ms)
        elif attempt.outcome == SUCCESS and after.announced and not after.disabled:
            self._announce_health(webhook, WEBHOOK_RECOVERED, attempt.description, result.ended_ms)
        if verdict.state == FAILED:
            delivery = {"id": due.uuid, "event": due.event, "eventId": due.event_id}
            delivery["description"] = attempt.description
            attempts = "1 attempt" if not due.attempt_count else f"{due.attempt_count + 1} attempts"
            reason = f"given up after {attempts}: {attempt.description}"
            self._publish_own(DELIVERY_FAILED, webhook, reason, result.ended_ms, delivery=delivery)

    def _announce_health(self, webhook, event, reason, now_ms):
        self._publish_own(event, webhook, reason, now_ms)
        health = self._health_of(webhook.id)._replace(announced=event != WEBHOOK_RECOVERED)
        self._set_health(webhook.id, health, now_ms)

    def _publish_own(self, name, webhook, reason, now_ms, **more):
        about = {"id": webhook.id, "name": webhook.name, "url": webhook.short_url}
        document = {"timestamp": now_ms, "event": name, "webhook": about, "reason": reason} | more
        self._add(NewEvent(name, now_ms, json_bytes(document)), now_ms, except_for=webhook.id)

    def _release(self, webhook_id, now_ms):
        """Let all that waits be due, oldest first, without using its schedule up."""
        self.connection.change(
            "UPDATE deliveries SET next_attempt = min(created, ?),"
            " schedule_index = schedule_index - 1"
            " WHERE state = 'pending' AND webhook_id = ? AND next_attempt > created"
            " AND schedule_index > 0",  # else it was redelivered, and is due
            now_ms,
            webhook_id,
        )
        self.commit.changed.add(webhook_id)

    # ---- events ----

    def publish(
        self,
        events: list[NewEvent],
        now_ms: int,
        idempotency: IdempotencyKey | None,
        publisher: User | None,
    ) -> tuple[list[Event], bool]:
        """See Store.publish."""
        if publisher and publisher not in self.users:
            raise Unauthorized("the user was changed just now", headers=ASK_FOR_LOGIN)
        earlier = idempotency and self._published_by(idempotency, now_ms)
        if earlier:
            return earlier, True
        published = [self._add(event, now_ms) for event in events]
        if idempotency:
            sql = "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?)"
            first = published[0].id
            self.connection.change(sql, *idempotency, first, len(published), now_ms)
        return published, False

    def _published_by(self, idempotency, now_ms):
        """The events that were published with the same key lately; raises KeyReused."""
        row = self.connection.row(
            "SELECT fingerprint, first_event, event_count FROM answers"
            " WHERE user = ? AND key = ? AND created > ?",
            idempotency.user,
            idempotency.key,
            now_ms - KEY_DAYS * DAY_MS,
        )
        if row is None:
            return None
        fingerprint, first, count = row
        if fingerprint != idempotency.fingerprint:
            raise KeyReused(Fault("Idempotency-Key", "was used with another body or name"))
        self.flush()  # they may have been published in this batch
        sql = "SELECT id, event, timestamp, deliveries FROM events WHERE id BETWEEN ? AND ?"
        rows = self.connection.rows(sql, first, first + count - 1)
        stored = {id: Event(id, *columns) for id, *columns in rows}
        # of one that was deleted since, only its id is known
        return [stored.get(id) or Event(id, None, None, 0) for id in range(first, first + count)]

    def _add(self, event, now_ms, except_for=None):
        """Add an event, and a delivery for each webhook that wants it, except for one."""
        webhook_ids = [id for id in self.webhooks.wanting(event) if id != except_for]
        event_id = next(self._ids["events"])
        self.published_count += 1
        self.published_bytes += len(event.body) + ROW_BYTES * (1 + len(webhook_ids))
        row = (event_id, event.name, event.timestamp, now_ms, len(webhook_ids))
        self._new["events"].append(row)
        self._new["payloads"].append((event_id, event.body))
        for webhook_id in webhook_ids:
            row_id, uuid = self._add_delivery(webhook_id, event_id, event.name, now_ms)
            self._due_count[webhook_id] += 1
            # one more than a queue has room for, so that it knows that there are more
            if self._due_count[webhook_id] <= WINDOW + 1:
                self.commit.due.append(
                    DueDelivery(
                        row_id, uuid, webhook_id, event_id, event.name, event.body, 0, 0, now_ms
                    )
                )
        if len(self._new["deliveries"]) >= ROWS_IN_MEMORY:
            self.flush()
        return Event(event_id, event.name, event.timestamp, len(webhook_ids))

    def _add_delivery(self, webhook_id, event_id, event, now_ms):
        row_id, uuid = next(self._ids["deliveries"]), uuid7(now_ms)
        schedule = PENDING, 0, now_ms, 0  # state, attempt_count, next_attempt, schedule_index
        no_attempt = None, None, None
        self._new["deliveries"].append(
            (row_id, uuid, webhook_id, event_id, event, now_ms, *schedule, *no_attempt)
        )
        self.pending_change[webhook_id] += 1
        return row_id, uuid

    def replay(self, webhook_id: int, event_ids: list[int], now_ms: int) -> int:
        """Make deliveries of stored events that a webhook has no delivery of; how many.

        Raises NotFound."""
        self.webhooks.get(webhook_id)  # raises NotFound
        sql = f"SELECT id, event FROM events WHERE id IN {LISTED} AND {MISSED} ORDER BY id"
        events = self.connection.rows(sql, json.dumps(event_ids), webhook_id)
        for event_id, name in events:
            self._add_delivery(webhook_id, event_id, name, now_ms)
        self.flush()
        self.commit.changed.add(webhook_id)
        return len(events)

    # ---- webhooks ----

    def add_webhook(self, webhook: Webhook) -> Webhook:
        """Store a webhook; returns it with its id."""
        sql = "INSERT INTO webhooks (definition) VALUES (?) RETURNING id"
        [id] = self.connection.column(sql, definition_of(webhook))
        webhook = dataclasses.replace(webhook, id=id)
        self.webhooks = self.webhooks.put(webhook)
        self._changed_at[id] = webhook.created
        self.commit.changed.add(id)
        return webhook

    def change_webhook(
        self,
        id: int,
        change: collections.abc.Callable[[Webhook], Webhook],
        starts_clean: bool = False,
    ) -> tuple[Webhook, Webhook]:
        """Replace a webhook by change(webhook); returns the old one and the new one.

        If it starts clean or has a new URL, its failures are forgotten and what waits is due.
        Raises NotFound, and whatever change raises."""
        old = self.webhooks.get(id)
        new = change(old)
        self._replace(new, new.updated)
        if starts_clean or new.url != old.url:
            self._start_clean(old, new.updated)
        return old, new

    def _replace(self, webhook, now_ms):
        sql = "UPDATE webhooks SET definition = ? WHERE id = ?"
        self.connection.change(sql, definition_of(webhook), webhook.id)
        self.webhooks = self.webhooks.put(webhook)
        self._changed_at[webhook.id] = now_ms
        self.commit.changed.add(webhook.id)

    def forget_old_secrets(self, now_ms: int) -> None:
        """Drop the secrets that were replaced more than a day ago."""
        for webhook in list(self.webhooks.by_id.values()):
            if has_old_secret(webhook, now_ms):
                without = {"previous_secret": None, "previous_secret_until": 0}
                self._replace(dataclasses.replace(webhook, **without), now_ms)

    def _start_clean(self, old, now_ms):
        """Forget a webhook's failures; what they or a pause made wait is due."""
        health = self._health_of(old.id)
        if not health.is_well or old.paused:
            clean = Health(announced=health.announced, since=health.since)
            if health.disabled and not self.webhooks.get(old.id).active:
                # another URL, say, does not enable it: somebody has to activate it
                clean = clean._replace(disabled=True, reason=health.reason)
            self._set_health(old.id, clean, now_ms)
            self._release(old.id, now_ms)

    # ---- schedules ----

    def redeliver(self, webhook_id: int, row_ids: list[int], now_ms: int) -> int:
        """Have deliveries attempted at once, on a fresh schedule; how many there are.

        If the breaker has paused their webhook, its probe is due. A rest that a Retry-After
        asked for is over. Raises NotFound."""
        self.webhooks.get(webhook_id)  # raises NotFound
        chosen = f"WHERE webhook_id = ? AND id IN {LISTED}"
        listed = json.dumps(row_ids)
        sql = f"SELECT count(*) FROM deliveries {chosen} AND state = 'pending'"
        [waiting] = self.connection.row(sql, webhook_id, listed)
        sql = "UPDATE deliveries SET state = 'pending', schedule_index = 0, next_attempt = ? "
        count = self.connection.change(sql + chosen, now_ms, webhook_id, listed)
        self.pending_change[webhook_id] += count - waiting
        health = self._health_of(webhook_id)
        if count and health.waits_until():
            until = now_ms if health.paused_until else None
            health = health._replace(paused_until=until, resting_until=None)
            self._set_health(webhook_id, health, now_ms)
        self.commit.changed.add(webhook_id)
        return count

    def redeliver_first(self, uuid: str, now_ms: int) -> int:
        """Have a delivery attempted before all others; the id of its webhook.

        Raises NotFound."""
        sql = "SELECT id, webhook_id FROM deliveries WHERE uuid = ?"
        row_id, webhook_id = or_404(self.connection.row(sql, uuid), f"delivery {uuid}")
        waiting = "state = 'pending' AND webhook_id = ?"
        sql = f"SELECT min(next_attempt) FROM deliveries WHERE {waiting}"
        [first] = self.connection.row(sql, webhook_id)
        before_all = now_ms if first is None else min(now_ms, first - 1)
        self.redeliver(webhook_id, [row_id], before_all)
        return webhook_id

    def shift_schedule(self, after_ms: int, by_ms: int) -> None:
        """Move all that is planned after a moment, because the clock has jumped."""
        planned = "state = 'pending' AND next_attempt > ?"
        sql = f"UPDATE deliveries SET next_attempt = next_attempt + ? WHERE {planned}"
        self.connection.change(sql, by_ms, after_ms)
        names = "failing_since", "paused_until", "resting_until"
        for webhook_id in self.webhooks.by_id:
            health = self._health_of(webhook_id)
            moments = {name: getattr(health, name) for name in names}
            shifted = {name: moment and moment + by_ms for name, moment in moments.items()}
            self.changed_health[webhook_id] = health._replace(**shifted)
        self.commit.changed.update(self.webhooks.by_id)

    def bound_schedule(self, webhook_ids: list[int], latest_ms: int) -> None:
        """Let no wait for these webhooks end later than that: a wrong clock has planned it."""
        self.connection.change(
            "UPDATE deliveries SET next_attempt = ?"
            f" WHERE state = 'pending' AND webhook_id IN {LISTED} AND next_attempt > ?",
            latest_ms,
            json.dumps(webhook_ids),
            latest_ms,
        )
        for webhook_id in webhook_ids:
            health = self._health_of(webhook_id)
            self.changed_health[webhook_id] = health._replace(
                paused_until=health.paused_until and min(health.paused_until, latest_ms),
                resting_until=health.resting_until and min(health.resting_until, latest_ms),
            )
        self.commit.changed.update(webhook_ids)

    def excuse_failures(self, by_ms: int) -> None:
        """Take a time off how long webhooks fail: nobody knows whether it has passed."""
        for webhook_id in self.webhooks.by_id:
            health = self._health_of(webhook_id)
            if health.failing_since:
                since = health.failing_since + by_ms
                self.changed_health[webhook_id] = health._replace(failing_since=since)

    # ---- deleting ----

    def delete_event(self, id: int) -> None:
        """Delete an event and all that is known of it; raises NotFound."""
        sql = "SELECT id, webhook_id, state FROM deliveries WHERE event_id = ?"
        rows = self.connection.rows(sql, id)
        self._replace_last_attempts(self.delete_deliveries([row_id for row_id, *_ in rows]))
        or_404(self.delete_events([id]), f"event {id}")
        rows = [row for row in rows if row[1] in self.webhooks.by_id]
        waiting = [webhook_id for _, webhook_id, state in rows if state == PENDING]
        self.pending_change.subtract(waiting)
        self.commit.changed.update(webhook_id for _, webhook_id, _ in rows)

    def delete_webhook(self, id: int) -> None:
        """Delete a webhook; raises NotFound. One step of its deliveries is deleted at once,
        and `delete_leftovers` deletes the others, which nobody sees until then."""
        or_404(self._delete("webhooks", "id", [id]), f"webhook {id}")
        self.flush()  # what was published beside it
        self.connection.change("DELETE FROM statistics WHERE webhook_id = ?", id)
        self.webhooks = self.webhooks.without(id)
        self.deleted.add(id)
        self.changed_health.pop(id, None)
        self._counted_names.pop(id, None)
        self.commit.changed.add(id)
        self.delete_deliveries_of(id)

    def _delete(self, table, column, ids, condition="1"):
        """Delete the rows of these ids that meet a condition; the rows' own ids."""
        chosen = f"{column} IN {LISTED} AND {condition}"
        sql = f"DELETE FROM {table} WHERE {chosen} RETURNING rowid"
        return self.connection.column(sql, json.dumps(ids))

    def delete_events(self, ids: list[int], condition: str = "1") -> list[int]:
        """Delete those events that meet a condition; their ids."""
        gone = self._delete("events", "id", ids, condition)
        self._delete("payloads", "event_id", gone)
        return gone

    def delete_deliveries(self, ids: list[int], condition: str = "1") -> list[int]:
        """Delete those deliveries that meet a condition; the ids of their attempts."""
        gone = self._delete("deliveries", "id", ids, condition)
        return self._delete("attempts", "delivery_id", gone)

    def delete_history(self, ids: list[int], condition: str) -> None:
        """Delete those deliveries that meet a condition, and events left without any."""
        sql = f"SELECT DISTINCT event_id FROM deliveries WHERE id IN {LISTED}"
        events = self.connection.column(sql, json.dumps(ids))
        self.delete_deliveries(ids, condition)
        self.delete_events(events, WITHOUT_DELIVERIES)

    def delete_deliveries_of(self, webhook_id: int) -> int:
        """Delete a step of a deleted webhook's deliveries; how many."""
        if webhook_id in self.webhooks.by_id:  # whatever the caller believes: it is not deleted
            return 0
        sql = f"SELECT id FROM deliveries WHERE webhook_id = ? LIMIT {ROWS_PER_STEP}"
        ids = self.connection.column(sql, webhook_id)
        self.delete_deliveries(ids)
        return len(ids)

    def _replace_last_attempts(self, deleted):
        """Where the statistics name a deleted attempt as the last, name the one before it."""
        last = (
            "SELECT attempts.id FROM deliveries JOIN attempts ON delivery_id = deliveries.id"
            " WHERE webhook_id = statistics.webhook_id AND deliveries.event = statistics.event"
            " AND attempts.outcome = statistics.outcome"
            " ORDER BY deliveries.id DESC, attempts.id DESC LIMIT 1"
        )
        self.connection.change(
            f"UPDATE statistics SET last_attempt = coalesce(({last}), 0)"
            f" WHERE last_attempt IN {LISTED}",
            json.dumps(deleted),
        )

    def forget_answers(self, before_ms: int) -> None:
        """Forget a step of the Idempotency-Keys that were used before a moment."""
        oldest = "SELECT user, key FROM answers WHERE created < ? ORDER BY created"
        sql = f"DELETE FROM answers WHERE (user, key) IN ({oldest} LIMIT {ROWS_PER_STEP})"
        self.connection.change(sql, before_ms)

    def forget_statistics(self, day: int) -> None:
        """Forget the counts of a day, except those whose last attempt is still stored."""
        self.connection.change(f"DELETE FROM statistics WHERE day = ? AND {NAMES_NO_ATTEMPT}", day)
        self._counted_names.clear()


# ---- writes ----


def is_of_the_machine(error: Exception) -> bool:
    """Whether the disk, the file or the memory is at fault, and not our own statement."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    return isinstance(error, MemoryError) or code != sqlite3.SQLITE_ERROR


def unreadable(error: Exception) -> Unavailable:
    """The error of a request for which the database cannot be read."""
    return Unavailable(f"the database cannot be read: {str(error) or 'out of memory'}")


def stored_error(error: Exception, path: str) -> Exception:
    """The error of a write, from the one that the database raised."""
    if isinstance(error, MemoryError):  # what sqlite3 makes of SQLITE_NOMEM
        return Unavailable("the database cannot be written: out of memory")
    if not isinstance(error, sqlite3.Error):
        return error
    full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    with contextlib.suppress(OSError):  # a full disk may show as an I/O error, too
        folder = os.path.dirname(os.path.abspath(path))
        full = full or shutil.disk_usage(folder).free < FULL_DISK_BYTES
    if full:
        return StorageFull("the disk is full; nothing was taken")
    return Unavailable(f"the database cannot be written: {error}")


class Write:
    """Something for the writer to do in a batch, and what came of it.

    A concurrent.futures.Future has conditions and callbacks, which cost a twentieth of all the
    work for a publication."""

    def __init__(self, run: collections.abc.Callable[[Batch], object]):
        self._run, self._result = run, None
        self.error: Exception | None = None  # why there was nothing written
        self.is_finished = False  # on disk, or failed
        self._under_way = threading.Lock()  # held until then
        self._under_way.acquire()

    def result(self) -> object:
        """What the work in the batch gave, once that is on disk; raises its error."""
        with self._under_way:
            pass
        if self.error:
            raise self.error
        return self._result

    def run(self, batch: Batch) -> None:
        """Called by the writer; most errors fail this write alone."""
        try:
            self._result = self._run(batch)
        except (sqlite3.Error, MemoryError):
            raise  # the other writes would fail, too
        except Exception as error:
            self.error = error

    def finish(self, error: Exception | None = None) -> None:
        """Called by the writer after the commit; error: why there was none."""
        self.error, self.is_finished = self.error or error, True
        self._under_way.release()


# ---- the store ----

DELIVERY_COLUMNS = (
    "uuid, webhook_id, event_id, event, state, attempt_count, next_attempt, created,"
    " outcome, description, duration"
)
ATTEMPT_COLUMNS = ", ".join(f"attempts.{field}" for field in Attempt._fields[:-2])
EVENT_COLUMNS = "id, event, timestamp, (SELECT count(*) FROM deliveries WHERE event_id = events.id)"
OF_WEBHOOKS = "webhook_id IN (SELECT id FROM webhooks)"  # not of one whose deletion goes on

# work in steps: who asks for the next one has it done, and rests in between
Steps = collections.abc.Iterator[None]
IdsInSteps = collections.abc.Iterator[list[int]]


def event_conditions(wanted: Filter, time: str) -> list[Condition]:
    """What the events that are wanted meet; time: the column of their times."""
    return [
        one_of("event", wanted.events),
        if_given(f"{time} >= ?", wanted.since),
        if_given(f"{time} <= ?", wanted.until),
    ]


def delivery_conditions(webhook_id: int, wanted: Filter) -> list[Condition]:
    """What the deliveries of a webhook that are wanted meet."""
    return [
        ("webhook_id = ?", webhook_id),
        one_of("state", wanted.states),
        one_of("outcome", wanted.outcomes),
        *event_conditions(wanted, "created"),
    ]


def payload_condition(path: str, text: str) -> Condition:
    """What all payloads meet that have the text at the path, and few others.

    `user.id` and `42` need the bytes `"id":42` or `"id":"42` somewhere."""
    key, value = path.rpartition(".")[2], json_bytes(text)[1:-1]
    if key.isdigit():  # perhaps the index of a list, which stands nowhere in the payload
        return "instr(body, ?)", value[:NEEDLE_BYTES]
    name = json_bytes(key) + b":"
    needles = [(name + quote + value)[:NEEDLE_BYTES] for quote in (b"", b'"')]
    return "(instr(body, ?) OR instr(body, ?))", *needles


class EventsPage(typing.NamedTuple):
    """A page of the events that are wanted."""

    events: list[Event]
    total: int | None  # None: a search has not looked at all of them
    more: dict[str, int] | None = None  # then: `before` and `start` of the next page


def _delivered_webhooks(connection):
    """The ids of all webhooks that have deliveries: one look into the index for each id, where
    DISTINCT would read all of it."""
    sql, id = "SELECT min(webhook_id) FROM deliveries WHERE webhook_id > ?", 0
    while (id := connection.row(sql, id)[0]) is not None:
        yield id


class Store:
    """The database. `with` opens and migrates it, runs the writer and closes it.

    Every write is done by one thread, which takes all that waits, runs it in one
    transaction and commits once. It judges attempts, too, so that nobody knows more than
    the database. Any thread may call the methods."""

    def __init__(
        self,
        path: str,
        settings: Settings,
        jitter: collections.abc.Callable[[], float] = random_jitter,
    ):
        self._path, self._settings, self._jitter = path, settings, jitter
        self._wakeup = threading.Condition()  # guards the next four
        self._writes: list[Write] = []
        self._results: list[Result] = []
        self._has_urgent_result = False
        self._closing = False
        self._cleanup = contextlib.ExitStack()  # closes the connections; see reader
        self._local = threading.local()  # each thread's own reader
        self._spare_readers: list[Database] = []  # for threads that have none yet
        self._listeners: list[collections.abc.Callable] = []  # see on_commit
        self._finish_listeners: list[collections.abc.Callable] = []  # see on_finish
        # changed by the writer only, as committed: the file is ahead for a moment
        self._ids = {}  # the next ones of each table
        self._counted_names = {}  # event names that statistics have, by webhook
        self.webhooks = Webhooks({})
        self.users: list[User] = []  # another process may have changed them since
        self.health = HealthById()
        self.pending = collections.Counter()  # deliveries that wait, by webhook
        self.last_attempts: dict[int, int] = {}  # by webhook: when it started, milliseconds
        self._deleted: list[int] = []  # webhooks that may have left deliveries
        self.space = Space()
        self.unmeasured_bytes = 0  # published since the space was measured
        self.published_count = 0  # of events, since the start
        self.problem: str | None = None  # why the last commit failed
        self._progressed: float | None = None  # time.monotonic(); None: nothing to do
        self.damage: str | None = None  # the first that was noticed; it stays
        self.full: str | None = None  # why nothing can be published; set by maintenance
        self.log_holds_deleted = False  # see empty_log

    def __enter__(self):
        with contextlib.ExitStack() as cleanup:
            cleanup.enter_context(process_lock(self._path))
            try:
                self._connection = open_database(self._path)
                cleanup.callback(self._connection.close)
                self._connection.on_error = self._note_error
                migrate(self._connection)
                self._load(self._connection)
            except sqlite3.Error as error:
                full = isinstance(stored_error(error, self._path), StorageFull)
                kind = DatabaseError if full else SettingError
                name = "--database (WEBHOOKD_DATABASE)"
                raise kind(f"{name}: {self._path}: {error}") from error
            self._writer = threading.Thread(target=self._run_writer, name="writer")
            self._writer.start()
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(self, *exc_info):
        with self._wakeup:
            self._closing = True
            self._wakeup.notify()
        self._writer.join()
        self._cleanup.close()

    def _load(self, connection):
        used = dict(connection.rows("SELECT name, seq FROM sqlite_sequence"))
        for table in ("events", "deliveries", "attempts"):
            self._ids[table] = itertools.count(used.get(table, 0) + 1)
        self.space = measure(connection, self._path)
        self.webhooks = load_webhooks(connection)
        self.users = load_users(connection)
        self.health = load_health(connection)
        counts = "webhook_id, count(*) FROM deliveries WHERE state = 'pending'"
        rows = connection.rows(f"SELECT {counts} GROUP BY webhook_id")
        self.pending.update(dict(rows))
        last = "SELECT webhook_id, max(start) FROM statistics JOIN attempts ON id = last_attempt"
        self.last_attempts = dict(connection.rows(f"{last} GROUP BY webhook_id"))
        self._deleted = [
            id for id in _delivered_webhooks(connection) if id not in self.webhooks.by_id
        ]

    # ---- the writer's thread ----

    def _run_writer(self):
        while True:
            writes, results = self._next_work()
            if self._closing and not writes and not results:
                return
            self._note_progress()
            try:
                batch = self._commit(writes, results)
            except Exception as error:
                self._retry_later(results, error)
                self._overwrite_commit(error)
                for write in writes:
                    write.finish(stored_error(error, self._path))
            else:
                self._adopt(batch)
                for listener in self._listeners:
                    listener(batch.commit)
                for write in writes:
                    write.finish()
            for listener in self._finish_listeners if writes else ():
                listener()
            self._progressed = None

    def _note_progress(self):
        self._progressed = time.monotonic()

    def _next_work(self):
        with self._wakeup:
            if not self.problem:
                self._wakeup.wait_for(lambda: self._results or self._is_urgent())
            delay = RETRY_SECONDS if self.problem else RECORD_SECONDS
            self._wakeup.wait_for(self._is_urgent, delay)
            work = self._writes, self._results
            self._writes, self._results = [], []
            self._has_urgent_result = False
            return work

    def _is_urgent(self):
        return self._writes or self._closing or self._has_urgent_result and not self.problem

    def _commit(self, writes, results):
        if self._connection.in_transaction:  # a rollback failed
            self._connection.execute("ROLLBACK")
        with transaction(self._connection) as connection:
            batch = Batch(
                connection,
                self.webhooks,
                self.health,
                self._ids,
                self._counted_names,
                self._note_progress,
            )
            if self.problem:  # see whether anything can be written at all
                connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
            batch.record(results, self._settings, self._jitter)
            for write in writes:
                write.run(batch)
            batch.finish()
        return batch

    def _overwrite_commit(self, error):
        """Overwrite a commit that is in the log but perhaps not on the disk: else a crash might
        make it valid, after its clients were told that it failed."""
        if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_IOERR:
            with contextlib.suppress(sqlite3.Error, MemoryError), transaction(self._connection):
                self._connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")

    def _adopt(self, batch):
        """Take over in memory what a batch has committed."""
        self.webhooks, self.users = batch.webhooks, batch.users
        self.health.update(batch.changed_health)
        self.pending.update(batch.pending_change)
        for result, *_ in batch.commit.recorded:
            self.last_attempts[result.due.webhook_id] = result.attempt.start
        for id in batch.deleted:
            self.health.pop(id, None)
            self.pending.pop(id, None)
            self.last_attempts.pop(id, None)
            self._deleted.append(id)
        self.published_count += batch.published_count
        self.unmeasured_bytes += batch.published_bytes
        if self.problem:
            log_fact("the database can be written again")
        self.problem = None

    def _retry_later(self, results, error):
        """Keep the results of a commit that failed for the next one, and log why it did."""
        problem = str(stored_error(error, self._path))
        if problem != self.problem:
            log_fact("the database cannot be written", level=logging.ERROR, reason=problem)
            if not isinstance(error, (sqlite3.Error, MemoryError)):
                log.error("the writer failed", exc_info=error)
        self.problem = problem
        with self._wakeup:
            if not self._closing:  # else they are attempted again after the next start
                self._results[:0] = results

    def _note_error(self, error):
        """Called by every connection; also in the midst of a transaction."""
        if is_damage(error) and not self.damage:
            self.damage = f"the database is damaged: {error}"
            advice = "stop, and put the last good backup in its place"
            log_fact("the database is damaged", level=logging.ERROR, reason=error, advice=advice)

    def on_commit(self, listener: collections.abc.Callable[[Commit], None]) -> None:
        """Have the writer call a listener after each commit."""
        self._listeners.append(listener)

    def on_finish(self, listener: collections.abc.Callable[[], None]) -> None:
        """Have the writer call a listener whenever writes are on disk, or have failed."""
        self._finish_listeners.append(listener)

    def faults(self) -> collections.abc.Iterator[str]:
        """Why the database cannot be read, or not all of it."""
        if self.damage:
            yield self.damage
        try:
            self.reader().row("SELECT 1 FROM webhooks LIMIT 1")
        except (sqlite3.Error, MemoryError) as error:
            yield str(unreadable(error))

    def stands_still(self) -> bool:
        """Whether the writer is not getting on with its work."""
        since = self._progressed
        stuck = since is not None and time.monotonic() - since > STANDSTILL_SECONDS
        return stuck or not self._writer.is_alive()

    # ---- writing: called by any thread ----

    def _submit(self, run):
        write = Write(run)
        with self._wakeup:
            if self._closing:
                raise Unavailable("webhookd is stopping")
            self._writes.append(write)
            self._wakeup.notify()
        return write

    def publish(
        self,
        events: list[NewEvent],
        now_ms: int,
        idempotency: IdempotencyKey | None = None,
        publisher: User | None = None,
    ) -> Write:
        """Store events and their deliveries; does not wait.

        The result is the events as stored, and whether an earlier publication with the key
        had stored them. publisher: a user who must still be the same when they are
        stored. The result, or the call, raises Unauthorized, KeyReused, StorageFull or
        Unavailable; then nothing was stored."""
        if self.full:
            raise StorageFull(self.full)
        size_bytes = self.unmeasured_bytes + sum(len(event.body) for event in events)
        if 2 * size_bytes > self.space.left:  # in the log, and in the file
            raise StorageFull(NO_ROOM)
        return self._submit(lambda batch: batch.publish(events, now_ms, idempotency, publisher))

    def record(self, *results: Result) -> None:
        """Take the results of attempts for one of the next commits; does not wait.

        Plain ones wait a little, so that others share their commit."""
        is_urgent = not all(result.is_plain for result in results)
        with self._wakeup:
            if not self._results or is_urgent:
                self._wakeup.notify()
            self._results += results
            self._has_urgent_result = self._has_urgent_result or is_urgent

    def write(self, work: collections.abc.Callable, *args: object):
        """The result of work(batch, *args), once that is on disk. If it raises, nothing was
        done."""

        def run(batch):
            connection = batch.connection
            with transaction(connection, "SAVEPOINT one", "RELEASE one", "ROLLBACK TO one"):
                return work(batch, *args)

        return self._submit(run).result()

    def flush(self) -> None:
        """Return when everything handed in so far is on disk."""
        self.write(lambda batch: None)

    def empty_log(self) -> None:
        """Move what SQLite's log holds into the database and cut the log off, so that no
        trace of what was deleted stays in the files. It tries that once, and waits for no
        reader; log_holds_deleted tells whether it worked."""
        self.log_holds_deleted = True
        with (
            contextlib.suppress(sqlite3.Error),  # tried again by maintenance
            contextlib.closing(connect(self._path)) as connection,
        ):
            connection.on_error = self._note_error
            connection.execute("PRAGMA busy_timeout = 50")  # milliseconds; the writer waits, too
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")  # most of it beside the writer
            busy, *_ = connection.row("PRAGMA wal_checkpoint(TRUNCATE)")
            self.log_holds_deleted = bool(busy)

    def measure(self) -> None:
        """Measure how much room there is; called by maintenance."""
        self.unmeasured_bytes = 0
        self.space = measure(self.reader(), self._path)

    # ---- maintenance, in steps, so that nobody waits long for the writer ----

    def delete_leftovers(self) -> Steps:
        """Delete the deliveries that deleted webhooks have left."""
        while self._deleted:
            while self.write(Batch.delete_deliveries_of, self._deleted[0]):
                yield
            del self._deleted[0]

    def prune(self, before_ms: int) -> Steps:
        """Delete the finished deliveries, and the events without deliveries, that were
        made before a moment; the oldest first, and an event with its last delivery."""
        yield from self._prune("deliveries", FINISHED, before_ms, Batch.delete_history)
        yield from self._prune("events", WITHOUT_DELIVERIES, before_ms, Batch.delete_events)

    def _prune(self, table, condition, before_ms, delete):
        """Delete the old rows that meet a condition, oldest first, until a step has none."""
        # young rows are read, too: a step that has only these is the last. Without them the last
        # step would read through all young rows in search of an old one
        chosen = f"id > ? AND (created >= ? OR {condition})"
        event_id = "id" if table == "events" else "event_id"
        size = f"(SELECT length(body) FROM payloads WHERE event_id = {table}.{event_id})"
        sql = f"SELECT id, created < ?, {size} FROM {table} WHERE {chosen}"
        sql += f" ORDER BY id LIMIT {ROWS_PER_STEP}"
        last, ids = 0, [0]
        while ids:
            ids, left_bytes = [], BYTES_PER_STEP
            for id, is_old, size_bytes in self.reader().rows(sql, before_ms, last, before_ms):
                if is_old and left_bytes > 0:
                    ids.append(id)
                    last, left_bytes = id, left_bytes - (size_bytes or 0)
            if ids:  # the condition again: one may have been redelivered since it was read
                self.write(delete, ids, condition)
            yield

    def prune_answers(self, before_ms: int) -> Steps:
        """Forget Idempotency-Keys that were used before a moment, oldest first."""
        sql = "SELECT 1 FROM answers WHERE created < ? LIMIT 1"
        while self.reader().row(sql, before_ms):
            self.write(Batch.forget_answers, before_ms)
            yield

    def prune_statistics(self, before_day: int) -> Steps:
        """Forget counts of the days before a day, oldest first, but none that names a last
        attempt that is still stored."""
        sql = f"SELECT min(day) FROM statistics WHERE day < ? AND {NAMES_NO_ATTEMPT}"
        while (day := self.reader().row(sql, before_day)[0]) is not None:
            self.write(Batch.forget_statistics, day)
            yield

    def forget_old_secrets(self, now_ms: int) -> None:
        """Drop the secrets that were replaced more than a day ago, from the log too."""
        if any(has_old_secret(webhook, now_ms) for webhook in self.webhooks.by_id.values()):
            self.write(Batch.forget_old_secrets, now_ms)
            self.empty_log()

    def give_back(self) -> Steps:
        """Return free pages to the file system, and with them the log's."""

        def work(batch):
            for _ in range(PAGES_PER_STEP):  # sqlite3 makes one step of it, one page
                batch.connection.execute("PRAGMA incremental_vacuum")

        given_back = False
        while self.reader().row("PRAGMA freelist_count")[0] >= PAGES_PER_STEP:
            yield self.write(work)
            given_back = True
        if given_back:
            self.empty_log()  # only then is the file shorter

    # ---- reading: called by any thread ----

    def open_readers(self, count: int) -> None:
        """Open connections for threads to come, while there are file descriptors."""
        for _ in range(count):
            reader = self._open_reader()
            reader.row("SELECT 1 FROM sqlite_schema")  # only this opens the file
            self._spare_readers.append(reader)

    def reader(self) -> Database:
        """This thread's own connection for reading."""
        if not hasattr(self._local, "connection"):
            try:
                self._local.connection = self._spare_readers.pop()
            except IndexError:
                self._local.connection = self._open_reader()
        return self._local.connection

    def _open_reader(self):
        # not open_database(): its pragmas take the write lock
        connection = connect(self._path)
        connection.execute("PRAGMA query_only = ON")
        connection.on_error = self._note_error
        with self._wakeup:
            self._cleanup.callback(connection.close)
        return connection

    def _page(self, columns, table, conditions, page):
        """A page of the rows that meet the conditions, newest first, and their number.

        Beyond the page it counts no further than to COUNTED_ROWS."""
        clause, values = where(conditions)
        chosen, reader = f"FROM {table}{clause}", self.reader()
        limit = page.start + page.limit + COUNTED_ROWS
        sql = f"SELECT count(*) FROM (SELECT 1 {chosen} LIMIT ?)"
        [count] = reader.row(sql, *values, limit)
        sql = f"SELECT {columns} {chosen} ORDER BY id DESC LIMIT ? OFFSET ?"
        return reader.rows(sql, *values, page.limit, page.start), count

    def _steps(self, columns, table, conditions):
        """Rows that begin with their id, in steps, oldest first."""
        last = 0
        while True:
            clause, values = where([*conditions, ("id > ?", last)])
            sql = f"SELECT {columns} FROM {table}{clause} ORDER BY id LIMIT {ROWS_PER_STEP}"
            rows = self.reader().rows(sql, *values)
            if not rows:
                return
            yield rows
            last = rows[-1][0]

    # ---- reading events and deliveries ----

    def events(self, wanted: Filter, page: Page) -> tuple[list[Event], int]:
        """A page of events, newest first, and how many there are in all."""
        conditions = event_conditions(wanted, "timestamp")
        rows, count = self._page(EVENT_COLUMNS, "events", conditions, page)
        return [Event(*row) for row in rows], count

    def search(self, wanted: Filter, page: Page, before: int | None = None) -> EventsPage:
        """A page of the events whose payload has what is wanted, newest first.

        It looks at a bounded number of events before an id. Who follows `more` sees all."""
        ids, low = self._matching(wanted, before or 1 << 53)
        part = ids[page.start : page.start + page.limit]
        events, more = self._events_of(part), None
        if low is None and before is None:
            return EventsPage(events, len(ids))
        if page.start + page.limit < len(ids):
            more = {"before": part[-1], "start": 0}
        elif low is not None:
            more = {"before": low, "start": max(0, page.start - len(ids))}
        return EventsPage(events, None, more)

    def _matching(self, wanted, before):
        """The ids that match, newest first, and the id before which nobody looked, or None."""
        ids, looked, looked_bytes = [], 0, 0
        while looked < SEARCHED_EVENTS and looked_bytes < SEARCHED_BYTES:
            low, count, size_bytes = self._search_step(before)
            if low is None:
                return ids, None
            ids += self._having(wanted, low, before)
            before, looked, looked_bytes = low, looked + count, looked_bytes + size_bytes
        return ids, before

    def _search_step(self, before):
        """The lowest of the next ids, their number, and the bytes of their payloads.

        Each step ends where a quarter of all bytes that may be searched is reached."""
        step = "SELECT event_id, length(body) AS size FROM payloads WHERE event_id < ?"
        step += f" ORDER BY event_id DESC LIMIT {SEARCH_STEP}"
        above = "sum(size) OVER (ORDER BY event_id DESC) - size AS above"  # bytes before this one
        return self.reader().row(
            "SELECT min(event_id), count(*), sum(size)"
            f" FROM (SELECT event_id, size, {above} FROM ({step})) WHERE above < ?",
            before,
            SEARCHED_BYTES // 4,
        )

    def _having(self, wanted, low, high):
        """The ids from low to below high of the events that are wanted, newest first."""
        conditions = event_conditions(wanted, "timestamp")
        conditions += [("id >= ?", low), ("id < ?", high)]
        conditions += [payload_condition(path, text) for path, text in wanted.where]
        clause, values = where(conditions)
        sql = f"SELECT id, body FROM events CROSS JOIN payloads ON event_id = id{clause}"
        rows = self.reader().each(f"{sql} ORDER BY id DESC", *values)
        with contextlib.closing(rows):  # one by one, because they may be large
            return [id for id, body in rows if has_all(body, wanted.where)]

    def _events_of(self, ids):
        if not ids:
            return []
        sql = f"SELECT {EVENT_COLUMNS} FROM events WHERE id IN {placeholders(ids)}"
        return [Event(*row) for row in self.reader().rows(f"{sql} ORDER BY id DESC", *ids)]

    def bodies(self, ids: list[int]) -> dict[int, bytes]:
        """The bodies of as many of the newest of these events as one answer may show."""
        taken, left_bytes = {}, SHOWN_PAYLOAD_BYTES
        sql = f"SELECT event_id, body FROM payloads WHERE event_id IN {placeholders(ids)}"
        rows = self.reader().each(f"{sql} ORDER BY event_id DESC", *ids)
        with contextlib.closing(rows):
            for id, body in rows:
                left_bytes -= len(body)
                if left_bytes < 0 and taken:
                    break
                taken[id] = body
        return taken

    def _delivery(self, row):
        """The delivery of a row, whose next attempt waits for what its webhook waits for."""
        delivery = Delivery(*row)
        webhook = self.webhooks.by_id.get(delivery.webhook_id)
        if webhook is None:  # deleted just now
            return delivery
        moment = self.health[webhook.id].next_attempt(webhook, delivery.next_attempt)
        return delivery._replace(next_attempt=moment)

    def event(self, id: int) -> tuple[Event, bytes, list[Delivery]]:
        """An event, its body and its deliveries; raises NotFound."""
        sql = "SELECT event, timestamp, body FROM events JOIN payloads ON event_id = id"
        row = self.reader().row(f"{sql} WHERE id = ?", id)
        name, timestamp, body = or_404(row, f"event {id}")
        sql = f"SELECT {DELIVERY_COLUMNS} FROM deliveries WHERE {OF_WEBHOOKS} AND event_id = ?"
        deliveries = [self._delivery(row) for row in self.reader().rows(f"{sql} ORDER BY id", id)]
        return Event(id, name, timestamp, len(deliveries)), body, deliveries

    def deliveries(self, webhook_id: int, wanted: Filter, page: Page) -> tuple[list[Delivery], int]:
        """A page of a webhook's deliveries, newest first, and how many there are."""
        table, condition = delivery_list(wanted)
        conditions = [*delivery_conditions(webhook_id, wanted), condition]
        rows, count = self._page(DELIVERY_COLUMNS, table, conditions, page)
        return list(map(self._delivery, rows)), count

    def delivery(self, uuid: str) -> tuple[Delivery, bytes, collections.abc.Iterator[Attempt]]:
        """A delivery, its event's body and its attempts, oldest first, which are read when
        they are asked for; raises NotFound."""
        row = self.reader().row(
            f"SELECT id, body, {DELIVERY_COLUMNS} FROM deliveries"
            f" JOIN payloads USING (event_id) WHERE {OF_WEBHOOKS} AND uuid = ?",
            uuid,
        )
        row_id, body, *columns = or_404(row, f"delivery {uuid}")
        sql = "SELECT max(id) FROM attempts WHERE delivery_id = ?"
        [last] = self.reader().row(sql, row_id)
        return self._delivery(columns), body, self._attempts_until(row_id, last or 0)

    def _attempts_until(self, row_id, last):
        """The attempts of a delivery, read a few at a time: one may have a megabyte."""
        chosen = f"delivery_id = ? AND id > ? AND id <= ? ORDER BY id LIMIT {ATTEMPTS_PER_STEP}"
        sql, reached = f"SELECT id, {ATTEMPT_COLUMNS} FROM attempts WHERE {chosen}", 0
        while reached < last:
            rows = self.reader().rows(sql, row_id, reached, last)
            yield from (Attempt(*attempt) for _, *attempt in rows)
            if not rows:  # to end here would look as if these were all
                raise Unavailable("the delivery was deleted while it was read")
            reached = rows[-1][0]

    def attempt_starts(self, uuids: list[str]) -> dict[str, int]:
        """When the last attempt of each of these deliveries began, if there is one."""
        of_each = f"deliveries.id = delivery_id WHERE uuid IN {placeholders(uuids)}"
        sql = f"SELECT uuid, max(start) FROM deliveries JOIN attempts ON {of_each}"
        return dict(self.reader().rows(f"{sql} GROUP BY uuid", *uuids))

    def delivery_states(self, event_ids: list[int]) -> dict[int, collections.Counter]:
        """How many deliveries of each of these events are in which state."""
        chosen = f"{OF_WEBHOOKS} AND event_id IN {placeholders(event_ids)}"
        sql = f"SELECT event_id, state, count(*) FROM deliveries WHERE {chosen} GROUP BY 1, 2"
        states = collections.defaultdict(collections.Counter)
        for event_id, state, count in self.reader().rows(sql, *event_ids):
            states[event_id][state] = count
        return states

    def redeliverable(self, webhook_id: int, wanted: Filter) -> IdsInSteps:
        """The row ids of the deliveries that match, in steps, oldest first."""
        table, condition = delivery_list(wanted)
        conditions = [*delivery_conditions(webhook_id, wanted), condition]
        for rows in self._steps("id", table, conditions):
            yield [row_id for (row_id,) in rows]

    def missed_events(self, webhook: Webhook, wanted: Filter) -> IdsInSteps:
        """The ids of the events that a webhook wants and never got, in steps."""
        conditions = [*event_conditions(wanted, "timestamp"), (MISSED, webhook.id)]
        for rows in self._steps("id, event", "events", conditions):
            named = [(id, name) for id, name in rows if webhook.subscribed(name)]
            yield [id for id, name in named if self._is_for(webhook, id, name)]

    def _is_for(self, webhook, event_id, name):
        """Whether an event passes the filters, and is no own event about this webhook."""
        if not webhook.filters and name not in OWN_EVENTS:
            return True
        # one by one, because they may be large
        row = self.reader().row("SELECT body FROM payloads WHERE event_id = ?", event_id)
        if row is None:  # deleted just now
            return False
        fields = readable_fields(row[0])
        is_about_it = name in OWN_EVENTS and value_at(fields, "webhook.id") == webhook.id
        return not is_about_it and wants(webhook, fields)

    # ---- reading statistics ----

    def succeeded_webhooks(self) -> set[int]:
        """The webhooks that had a success, and no failure since."""
        sql = "SELECT DISTINCT webhook_id FROM statistics WHERE outcome = ?"
        ids = self.reader().column(sql, SUCCESS)
        return {id for id in ids if not self.health[id].failures}

    def latest(
        self, webhook_id: int, wanted: Filter, whole_url: bool = True, bodies: bool = True
    ) -> dict | None:
        """The last invocation that matches, as the API shows it, or None."""
        conditions = [("webhook_id = ?", webhook_id), one_of("event", wanted.events)]
        clause, values = where([*conditions, one_of("statistics.outcome", wanted.outcomes)])
        row = self.reader().row(
            f"SELECT uuid, event, body, {ATTEMPT_COLUMNS} FROM attempts"
            " JOIN deliveries ON deliveries.id = delivery_id"
            " JOIN payloads USING (event_id)"
            " WHERE attempts.id = (SELECT max(attempts.id) FROM statistics"
            f" JOIN attempts ON attempts.id = last_attempt{clause})",
            *values,
        )
        if row is None:
            return None
        uuid, event, body, *columns = row
        attempt = Attempt(*columns)
        attempt = attempt if whole_url else attempt.for_viewers()
        return attempt.as_json(uuid, event, body.decode() if bodies else None)

    def statistics(
        self, webhook_id: int, events: tuple[str, ...], now_ms: int, whole_url: bool = True
    ) -> dict:
        """Counts of attempts and the last of each outcome, as the API shows them."""
        document = {}
        for outcome in OUTCOMES:
            wanted = Filter(events=events, outcomes=(outcome,))
            invocation = self.latest(webhook_id, wanted, whole_url, bodies=False)
            if invocation:
                document[f"last{outcome.capitalize()}"] = invocation
        document["counts"] = self._counts(webhook_id, events, now_ms)
        return document

    def _counts(self, webhook_id, events, now_ms):
        counts = self.attempts_by("webhook_id", (webhook_id,), now_ms, events)[webhook_id]
        window_ms = STATISTICS_DAYS * DAY_MS
        return {
            "successes": counts[SUCCESS],
            "failures": counts[FAILURE],
            "errors": counts[ERROR],
            "window": {"start": now_ms - window_ms, "duration": window_ms},
        }

    def attempts_by(
        self, column: str, webhook_ids: tuple, now_ms: int, events: tuple = ()
    ) -> dict[int, collections.Counter]:
        """For each webhook_id or day the attempts of the last 30 days by outcome."""
        first_day = now_ms // DAY_MS - STATISTICS_DAYS
        conditions = [one_of("webhook_id", webhook_ids), one_of("event", events)]
        clause, values = where([*conditions, ("day >= ?", first_day)])
        sql = f"SELECT {column}, outcome, sum(attempts) FROM statistics{clause}"
        counts = collections.defaultdict(collections.Counter)
        for key, outcome, attempts in self.reader().rows(f"{sql} GROUP BY 1, 2", *values):
            counts[key][outcome] = attempts
        return counts

    def attempted_events(self, webhook_id: int) -> list[str]:
        """The names of the events that a webhook has statistics for."""
        sql = "SELECT DISTINCT event FROM statistics WHERE webhook_id = ?"
        return self.reader().column(f"{sql} ORDER BY event", webhook_id)

    # ---- reading the schedule ----

    def due(
        self,
        webhook: Webhook,
        until_ms: int,
        held: set[int],
        limit: int,
        limit_bytes: int = 1 << 20,
    ) -> tuple[list[DueDelivery], bool]:
        """The webhook's oldest due deliveries that are not held, and whether there are more.

        Those of an ordered webhook come in publish order, due or not."""
        conditions, order = [("webhook_id = ?", webhook.id), ("state = 'pending'",)], "id"
        if not webhook.ordered:
            conditions.append(("next_attempt <= ?", until_ms))
            order = "next_attempt, id"
        clause, values = where(conditions)
        rows = self.reader().each(
            "SELECT id, uuid, webhook_id, event_id, event, body, attempt_count, schedule_index,"
            f" next_attempt FROM deliveries JOIN payloads USING (event_id){clause}"
            f" ORDER BY {order}",
            *values,
        )
        taken, taken_bytes = [], 0
        with contextlib.closing(rows):
            for due in itertools.starmap(DueDelivery, rows):
                if due.row_id in held:
                    continue
                taken.append(due)
                taken_bytes += len(due.body)
                if len(taken) == limit or taken_bytes >= limit_bytes:
                    return taken, True
        return taken, False

    def next_due(self, webhook_id: int, now_ms: int) -> int | None:
        """When, after now, the webhook's next delivery becomes due; milliseconds."""
        sql = "SELECT min(next_attempt) FROM deliveries WHERE state = 'pending'"
        later = "webhook_id = ? AND next_attempt > ?"
        return self.reader().row(f"{sql} AND {later}", webhook_id, now_ms)[0]

    def planned_after(self, moment_ms: int) -> list[int]:
        """The webhooks that have deliveries planned after a moment, or wait until after it."""
        sql = "SELECT id, (SELECT max(next_attempt) FROM deliveries WHERE state = 'pending'"
        rows = self.reader().rows(f"{sql} AND webhook_id = webhooks.id) FROM webhooks")
        latest = {id: max(ms or 0, self.health[id].waits_until()) for id, ms in rows}
        return [id for id, ms in latest.items() if ms > moment_ms]

    def latest_moment(self) -> int | None:
        """When the last event or attempt happened, milliseconds; None if there is none."""
        sql = "SELECT (SELECT created FROM events ORDER BY id DESC LIMIT 1)"
        sql += ", (SELECT start + duration FROM attempts ORDER BY id DESC LIMIT 1)"
        return max(filter(None, self.reader().row(sql)), default=None)

    def oldest_pending(self) -> dict[int, int]:
        """When each webhook's oldest pending delivery was made; milliseconds."""
        [created] = self.reader().row(  # one row, because each gives up the GIL
            "SELECT json_group_object(id, (SELECT created FROM deliveries"
            " WHERE state = 'pending' AND webhook_id = webhooks.id"
            " ORDER BY deliveries.id LIMIT 1)) FROM webhooks"
        )
        return {int(id): ms for id, ms in json.loads(created).items() if ms is not None}


# ======================================================================================
# Templates: the body that a receiver wants instead of the event
# ======================================================================================

RENDERED_BYTES = 1 << 20  # that a template may make of an event, beside four times its size
_json_string = re.compile(r'"(?:[^"\\]|\\.)*+"(:?)')  # if it is a key, with its colon


class Rendering:
    """One event, rendered by a template."""

    def __init__(self, body: bytes):
        self._fields, self._left_bytes = event_fields(body), RENDERED_BYTES + 4 * len(body)

    def _bounded(self, text):
        """A text that is put in; raises Invalid if all of them are too much."""
        self._left_bytes -= len(text)
        require(self._left_bytes >= 0, "the template makes too large a body of the event")
        return text

    def _text_for(self, placeholder):
        value = value_at(self._fields, placeholder[1].strip())
        return self._bounded("" if value in (None, ABSENT) else text_of(value))

    def text(self, template: str) -> str:
        """The template with the values' texts for its placeholders."""
        return PLACEHOLDER.sub(self._text_for, template)

    def _json_for(self, string):
        is_key = string[1]
        if is_key or "{{" not in string[0]:
            return string[0]
        text = json.loads(string[0])
        if not (placeholder := PLACEHOLDER.fullmatch(text)):
            return _encode(self.text(text))
        value = value_at(self._fields, placeholder[1].strip())
        return self._bounded("null" if value is ABSENT else json_text(value))

    def json(self, template: object) -> str:
        """The template's JSON; a string that is nothing but a placeholder becomes the value."""
        return _json_string.sub(self._json_for, _encode(template))


def render(webhook: Webhook, body: bytes) -> bytes:
    """The body that an attempt sends: the event's, or what the webhook's template makes of it.

    Raises Invalid if that is too large, or the event too deep."""
    template = webhook.template
    if template is None:
        return body
    rendering = Rendering(body)
    text = rendering.text(template) if isinstance(template, str) else rendering.json(template)
    return utf8(text)


# ======================================================================================
# Dispatcher: the delivery loop
# ======================================================================================

END_OF_TIME_MS = 1 << 62
RESERVED_SHARE = 8  # one slot in so many is kept for webhooks proven to work
REVERSED_TURNS = 8  # one turn in so many is for those that otherwise come last
SLOT_BYTES = 128 << 10  # an attempt takes one more slot for each of these in its body
TICK_SECONDS = 1
FAIR_HANDSHAKE_SECONDS = 0.02  # of the loop's time for TLS; large finite fields take more
HANDSHAKE_REST = 10  # who took more waits so many times as long before the next attempt
LOG_SECONDS = 60  # a line about a receiver is logged once in so long
STOP_SECONDS = 10  # that the attempts in flight have at the end
DURATION_BUCKETS_MS = (5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000)


WORKS_AGAIN = "webhook works again"


class ReceiverLog:
    """What is logged of one webhook's receiver: at most a line a minute, which tells what else
    happened since the last line, and how often."""

    def __init__(self):
        self._not_before = -math.inf  # seconds
        self._counts = collections.Counter()  # of what was not logged, by its words
        self._latest: tuple[str, dict] | None = None
        self._level = 0  # the highest of what was not logged
        self.is_of_trouble = False  # the last line, or the one that is kept back

    def add(self, now: float, words: str, level: int, **values: object) -> None:
        """Log a fact now, or when the minute is over; now: seconds."""
        self._counts[words] += 1
        self._latest, self._level = (words, values), max(level, self._level)
        self.is_of_trouble = words != WORKS_AGAIN
        self.flush(now)

    def flush(self, now: float) -> None:
        """Log what was kept back, if the minute is over."""
        if not self._latest or now < self._not_before:
            return
        words, values = self._latest
        self._counts[words] -= 1  # this line
        counted = +self._counts  # without those that are 0
        others = [what if n == 1 else f"{n} times {what}" for what, n in counted.items()]
        if others:
            values = values | {"meanwhile": ", ".join(others)}
        log_fact(words, level=self._level, **values)
        self._counts.clear()
        self._latest, self._level, self._not_before = None, 0, now + LOG_SECONDS


class WebhookQueue:
    """The deliveries to one webhook: a window of those due; the database has all."""

    def __init__(self, webhook_id: int, proven: bool = False):
        self.webhook_id = webhook_id
        self.ready: collections.deque[DueDelivery] = collections.deque()
        # row ids of what is ready, in flight, or not known to be on disk yet
        self.held: set[int] = set()
        self.newest = 0  # highest row id ever held: what is offered below it is known
        self.backlog = True  # the database may hold more that is due
        self.uncertain = 0  # results that may change its health and are not on disk yet
        self.proven = proven  # it had a success, and few failures since
        self.width = 1  # attempts at once: one more with each success, a failure: 1
        self.in_flight = 0  # attempts
        self.is_waiting = False  # for its turn
        self.not_before = 0.0  # milliseconds, by its rateLimit
        self.alarm = math.inf  # milliseconds, when it is looked at again
        self.timer: asyncio.TimerHandle | None = None  # of the alarm
        self.log = ReceiverLog()
        # since the start, by outcome
        self.attempts = dict.fromkeys(OUTCOMES, 0)
        self.finished = dict.fromkeys(OUTCOMES, 0)  # deliveries

    def hold(self, due: DueDelivery) -> None:
        """Have a delivery ready."""
        self.ready.append(due)
        self.held.add(due.row_id)
        self.newest = max(self.newest, due.row_id)

    def offer(self, due: DueDelivery, limit_bytes: int) -> None:
        """Have a delivery ready that was just published, or know that the database has it."""
        if due.row_id <= self.newest:  # it was read from the database already
            return
        limit = min(WINDOW, 1 + limit_bytes // (len(due.body) + 1))
        if self.backlog or len(self.ready) >= limit:
            self.backlog = True
        else:
            self.hold(due)

    def requeue(self) -> None:
        """Leave what is ready to the database, which may have other plans for it."""
        self.held -= {due.row_id for due in self.ready}
        self.ready.clear()
        self.backlog = True

    def note(self, recorded: Recorded, most: int) -> None:
        """Learn from an attempt that is on disk; most: attempts at once."""
        result, verdict = recorded.result, recorded.verdict
        outcome = result.attempt.outcome
        self.held.discard(result.due.row_id)
        self.uncertain -= not result.is_plain
        self.attempts[outcome] += 1
        if verdict.state in (SUCCEEDED, FAILED):
            self.finished[outcome] += 1
        failures, succeeded = verdict.health.failures, outcome == SUCCESS
        self.proven = succeeded or self.proven and failures < FAILURES_TO_PAUSE
        self.width = min(self.width + 1, most) if succeeded else 1


class Scheduler:
    """Whose attempt is next, and how many there may be at once.

    Queues of webhooks that are proven to work come before the others, which never take all
    slots. First attempts come before retries. One turn in eight goes the other way round."""

    def __init__(self, most: int):
        self.in_flight = 0  # attempts
        self._taken = self._unproven = 0  # slots; of these, by webhooks not proven
        self._turn = 0
        self._most = most
        self._most_unproven = max(1, most - max(1, most // RESERVED_SHARE))
        # queues that wait: proven with a first attempt, proven with a retry, then the unproven
        self._lines = [collections.deque() for _ in range(4)]
        self._busy: set[WebhookQueue] = set()  # waiting or with attempts in flight

    def wait(self, queue: WebhookQueue) -> None:
        """Let a queue wait for its turn."""
        queue.is_waiting = True
        is_retry = bool(queue.ready and queue.ready[0].attempt_count)
        self._lines[2 * (not queue.proven) + is_retry].append(queue)
        self._busy.add(queue)

    def next(self) -> WebhookQueue | None:
        """The queue whose turn it is, which waits no longer; None: no slot is free."""
        if not self.has_slot(proven=True):
            return None
        unproven_may = self.has_slot(proven=False)
        lines = self._lines if unproven_may else self._lines[:2]  # only the proven
        self._turn += 1
        if self._turn % REVERSED_TURNS == 0:  # so that every queue gets a turn some day
            lines = reversed(lines)
        for line in lines:
            if line:
                queue = line.popleft()
                queue.is_waiting = False
                return queue
        return None

    def has_slot(self, proven: bool) -> bool:
        """Whether a slot is free for an attempt to a webhook that is proven to work, or not."""
        may = proven or self._unproven < self._most_unproven
        return may and self._taken < self._most

    def begin(self, queue: WebhookQueue, body_bytes: int) -> tuple[int, int]:
        """Count an attempt in; returns the arguments of `end`."""
        slots = 1 + body_bytes // SLOT_BYTES
        unproven = 0 if queue.proven else slots
        self._count(queue, 1, slots, unproven)
        return slots, unproven

    def end(self, queue: WebhookQueue, slots: int, unproven: int) -> None:
        """Count an attempt out."""
        self._count(queue, -1, -slots, -unproven)

    def _count(self, queue, attempts, slots, unproven):
        queue.in_flight += attempts
        self.in_flight += attempts
        self._taken += slots
        self._unproven += unproven

    def leave(self, queue: WebhookQueue) -> None:
        """Leave a queue's share to the others, unless it is busy."""
        if not queue.is_waiting and not queue.in_flight:
            self._busy.discard(queue)

    def share(self) -> int:
        """How many attempts each busy queue may have at once."""
        # a quarter stays free: those that work today may all hang tomorrow
        return max(1, self._most * 3 // 4 // max(1, len(self._busy)))


class Dispatcher:
    """Attempts what is due. `with` runs its loop in a thread of its own.

    It obeys: the writer decides what becomes of a delivery and of a webhook, and tells after
    its commit. Only the methods that are marked so are called by other threads. Webhooks take
    turns, and each has a share of the attempts in flight, so that none waits for another."""

    def __init__(
        self,
        store: Store,
        client: Client,
        settings: Settings,
        clock: collections.abc.Callable[[], float] = time.time,
        heartbeat: collections.abc.Callable[[], None] = lambda: None,
    ):
        self._store, self._client, self._settings = store, client, settings
        self._clock, self._heartbeat = clock, heartbeat
        self._succeeded = store.succeeded_webhooks()
        self._queues: dict[int, WebhookQueue] = {}
        self._scheduler = Scheduler(settings.max_in_flight)
        self._unreadable: dict[int, str] = {}  # by webhook, why its deliveries cannot be read
        self._commits: collections.deque[Commit] = collections.deque()  # not followed yet
        self._half_followed: Commit | None = None  # see _follow_commits
        self._results: list[Result] = []  # not handed in yet
        self._noticed: dict[WebhookQueue, None] = {}  # in order: the next step looks at them
        self._is_step_near = False  # in the loop's next pass, or right now
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ticked = time.monotonic()
        self.duration_counts = [0] * (len(DURATION_BUCKETS_MS) + 1)  # of attempts
        self.duration_sum_ms = 0
        self.follow(Commit([], set(store.webhooks.by_id), []))
        store.on_commit(self.follow)

    def __enter__(self):
        started = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._run(started)), name="delivery loop"
        )
        self._thread.start()
        started.wait()
        return self

    def stop(self) -> None:
        """Start nothing more; what is in flight has STOP_SECONDS to end."""
        with contextlib.suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe(self._stop.set)

    def __exit__(self, *exc_info):
        self.stop()
        self._thread.join()

    # ---- called by other threads ----

    def follow(self, commit: Commit) -> None:
        """Have the loop follow a commit."""
        if any(commit):
            self._commits.append(commit)
            with contextlib.suppress(RuntimeError):  # the loop has ended; the next start will
                if self._loop:
                    self._loop.call_soon_threadsafe(self.step)

    def problem(self) -> str | None:
        """Why nothing, or not everything, is being delivered; None if all is well."""
        if time.monotonic() - self._ticked > STANDSTILL_SECONDS:
            return "the delivery loop stands still"
        return next(iter(list(self._unreadable.values())), None)

    def counts(self, webhook_id: int) -> tuple[dict[str, int], dict[str, int]]:
        """A webhook's attempts and finished deliveries by outcome, since the start."""
        queue = self._queues.get(webhook_id) or WebhookQueue(webhook_id)
        return queue.attempts, queue.finished

    def in_flight(self) -> int:
        """How many attempts are being made."""
        return self._scheduler.in_flight

    # ---- the loop ----

    def _enter_loop(self):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._is_step_near = False
        self._stepped = asyncio.Event()  # set by each step

    async def _run(self, started):
        self._enter_loop()
        started.set()
        while not self._stop.is_set():
            self._tick()
            self._ticked = time.monotonic()
            self._heartbeat()
            self._client.close_idle(IDLE_SECONDS)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), TICK_SECONDS)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all_ended(), STOP_SECONDS)
        self._client.close()  # an attempt that has not ended is made again at the next start
        for queue in self._queues.values():
            queue.log.flush(math.inf)

    async def _all_ended(self):
        while self._scheduler.in_flight or self._results:
            self._stepped.clear()
            await self._stepped.wait()

    def run_until_idle(self) -> None:
        """Without a thread: make every attempt that is due now, and record it."""
        asyncio.run(self._until_idle())

    async def _until_idle(self):
        self._enter_loop()
        self._tick()
        while self._scheduler.in_flight or self._commits:
            await self._all_ended()
            self._store.flush()
            self.step()
        self._stop.set()
        self._client.close()
        self._loop = None

    def _tick(self):
        """Let the alarms ring that the clock has passed, and make a step."""
        now = self._clock()  # timers stand still while the machine sleeps
        for queue in list(self._queues.values()):
            queue.log.flush(now)
            if queue.alarm <= now * 1000:
                self._look_again(queue)
        self.step()

    def step(self) -> None:
        """Hand in what attempts brought, follow what was committed, start what may start now."""
        self._is_step_near = True
        try:
            self._hand_in()
            self._follow_commits()
            self._start_attempts()
        except Exception:
            log.exception("a step of the delivery loop failed")
        self._is_step_near = False
        self._stepped.set()

    def _notice(self, queue):
        """Have one step look at all queues to which something happens in this pass of the
        event loop: to look after each attempt would cost more than the attempt."""
        self._noticed[queue] = None
        if self._loop and not self._is_step_near:
            self._is_step_near = True
            self._loop.call_soon(self.step)

    def _hand_in(self):
        if self._results:
            self._store.record(*self._results)
            self._results.clear()

    def _follow_commits(self):
        """Obey each commit; one that an error left half followed is caught up with first."""
        if self._half_followed:
            self._catch_up(self._half_followed)
            self._half_followed = None
        while self._commits:
            self._half_followed = self._commits.popleft()
            self._obey(self._half_followed)
            self._half_followed = None

    def _now_ms(self):
        return int(self._clock() * 1000)

    # ---- what was committed ----

    def _queue_of(self, webhook_id):
        if webhook_id not in self._queues:
            proven = webhook_id in self._succeeded
            self._queues[webhook_id] = WebhookQueue(webhook_id, proven)
        return self._queues[webhook_id]

    def _obey(self, commit):
        for recorded in commit.recorded:
            self._note(recorded)
        for webhook_id in commit.changed:
            self._reread(webhook_id)
        limit_bytes = self._window_bytes()
        for due in commit.due:
            queue = self._queue_of(due.webhook_id)
            queue.offer(due, limit_bytes)
            self._notice(queue)

    def _catch_up(self, commit):
        """Follow a commit of which a part is followed already."""
        for recorded in commit.recorded:
            due = recorded.result.due
            queue = self._queues.get(due.webhook_id)
            if queue and due.row_id in queue.held:
                queue.note(recorded, self._settings.webhook_concurrency)
        attempted = {recorded.result.due.webhook_id for recorded in commit.recorded}
        published = {due.webhook_id for due in commit.due}
        for webhook_id in commit.changed | attempted | published:
            self._reread(webhook_id)

    def _note(self, recorded):
        """Count an attempt that is on disk, and plan what follows from its verdict."""
        due, attempt = recorded.result.due, recorded.result.attempt
        bucket = bisect.bisect_left(DURATION_BUCKETS_MS, attempt.duration)
        self.duration_counts[bucket] += 1
        self.duration_sum_ms += attempt.duration
        queue = self._queues.get(due.webhook_id)
        webhook = self._store.webhooks.by_id.get(due.webhook_id)
        if queue is None or webhook is None:  # the webhook was deleted
            return
        queue.note(recorded, self._settings.webhook_concurrency)
        self._log(queue.log, webhook, recorded)
        if recorded.verdict.state == PENDING:
            if webhook.ordered:  # it stays the first
                queue.requeue()
            self._set_alarm(queue, recorded.verdict.next_attempt)
        self._notice(queue)

    def _log(self, receiver_log, webhook, recorded):
        """Log what an attempt has changed."""
        due, attempt = recorded.result.due, recorded.result.attempt
        before, after = recorded.before, recorded.verdict.health
        is_told = before.announced and due.event not in OWN_EVENTS
        was_down = before.failures or is_told or receiver_log.is_of_trouble
        if attempt.outcome == SUCCESS and before == after and not was_down:
            return
        add = functools.partial(receiver_log.add, self._clock())
        names = {"webhook": webhook.id, "name": webhook.name, "url": webhook.short_url}
        if attempt.outcome == SUCCESS and was_down and not after.disabled:
            # none if somebody has set the count back to 0
            failures = {"failures": before.failures} if before.failures else {}
            add(WORKS_AGAIN, logging.INFO, **names, **failures)
        if after.disabled and not before.disabled:
            add("webhook disabled", logging.WARNING, **names, reason=after.reason)
        elif after.failures and not before.failures:
            add("webhook fails", logging.INFO, **names, reason=after.reason)
        if after.paused_until and not before.paused_until:
            add("webhook paused", logging.WARNING, **names, reason=after.reason)
        if recorded.verdict.state == FAILED:
            reason = attempt.description
            add("delivery given up", logging.WARNING, **names, id=due.uuid, reason=reason)

    def _reread(self, webhook_id):
        """Forget what is known of a webhook and what waits for it, and read it again."""
        webhook = self._store.webhooks.by_id.get(webhook_id)
        if webhook is None:
            self._queues.pop(webhook_id, None)
            self._unreadable.pop(webhook_id, None)
            return
        queue = self._queue_of(webhook_id)
        queue.requeue()
        # the limit may have changed, and the clock may have been set back
        interval_ms = 1000 / webhook.rate_limit if webhook.rate_limit else 0
        queue.not_before = min(queue.not_before, self._clock() * 1000 + interval_ms)
        self._notice(queue)

    def _set_alarm(self, queue, when_ms):
        """Look at a queue again at a moment, unless that is planned for earlier already."""
        if when_ms < queue.alarm:
            if queue.timer:
                queue.timer.cancel()
            wait_ms = max(0, when_ms - self._clock() * 1000) + 1  # never too early
            queue.alarm = when_ms
            queue.timer = self._loop.call_later(wait_ms / 1000, self._look_again, queue)

    def _look_again(self, queue):
        queue.alarm = math.inf
        queue.backlog = True
        self._notice(queue)

    # ---- whose turn it is ----

    def _line_up(self, queue):
        """Let a queue wait for its turn, or for the moment from which it may have one."""
        webhook = self._store.webhooks.by_id.get(queue.webhook_id)
        has_work = webhook and not queue.is_waiting and (queue.ready or queue.backlog)
        if has_work and self._room(queue, webhook):
            moment = self._may_start_at(queue, webhook)
            if moment <= self._clock() * 1000:
                self._scheduler.wait(queue)
            else:
                self._set_alarm(queue, moment)
        self._scheduler.leave(queue)

    def _room(self, queue, webhook):
        """How many more attempts there may be in flight. If none, a commit or the end of an
        attempt has the queue noticed again."""
        if not webhook.active or webhook.paused or queue.uncertain:
            return 0
        goes_alone = webhook.ordered or self._store.health[webhook.id].paused_until
        most = 1 if goes_alone else min(queue.width, self._scheduler.share())
        return max(0, most - queue.in_flight)

    def _may_start_at(self, queue, webhook):
        """When the next attempt may start, milliseconds."""
        health = self._store.health[webhook.id]
        # a probe is due at the end of the pause, whatever is planned for it
        is_planned = webhook.ordered and queue.ready and not health.paused_until
        planned = queue.ready[0].next_attempt if is_planned else 0  # else what is ready is due
        return max(queue.not_before, health.waits_until(), planned)

    def _start_attempts(self):
        while not self._stop.is_set() and not self._store.problem:
            self._line_up_noticed()
            queue = self._scheduler.next()
            if queue is None:
                return
            self._noticed[queue] = None  # after its turn it may line up again
            webhook = self._store.webhooks.by_id.get(queue.webhook_id)
            if webhook:
                self._take_turn(queue, webhook)

    def _line_up_noticed(self):
        for queue in list(self._noticed):
            self._line_up(queue)
            del self._noticed[queue]

    def _take_turn(self, queue, webhook):
        """Start as many attempts as the webhook's share allows."""
        if not queue.ready and queue.backlog:
            self._refill(queue, webhook)
        now = self._clock()
        if self._may_start_at(queue, webhook) > now * 1000:
            return
        room = self._room(queue, webhook)
        try:
            while room and queue.ready and self._scheduler.has_slot(proven=queue.proven):
                due = queue.ready[0]
                self._start(queue, due, webhook, int(now * 1000))
                queue.ready.popleft()
                room -= 1
                if webhook.rate_limit:
                    queue.not_before = now * 1000 + 1000 / webhook.rate_limit
                    break
                if len(due.body) >= SLOT_BYTES:  # it took several slots: now the others
                    break
        except Exception:  # memory is short, say: the delivery stays the first
            log.exception("an attempt could not be started")
            queue.not_before = (now + RETRY_SECONDS) * 1000

    # ---- what is due ----

    def _window_bytes(self):
        return min(1 << 20, WINDOW_BYTES // max(1, len(self._queues)))

    def _refill(self, queue, webhook):
        """Read what is due, and when the next delivery becomes due if these are all."""
        now_ms, health = self._now_ms(), self._store.health[webhook.id]
        try:
            due, queue.backlog = self._store.due(
                webhook, now_ms, queue.held, WINDOW, self._window_bytes()
            )
            if not due and health.paused_until:  # the probe is the next delivery, due or not
                due, queue.backlog = self._store.due(webhook, END_OF_TIME_MS, queue.held, 1)
            next_due = None if queue.backlog else self._store.next_due(webhook.id, now_ms)
        except (sqlite3.Error, MemoryError) as error:
            self._note_unreadable(webhook.id, error)
            queue.backlog, queue.not_before = True, now_ms + RETRY_SECONDS * 1000
            return
        self._unreadable.pop(webhook.id, None)
        for delivery in due:
            queue.hold(delivery)
        if next_due is not None:
            self._set_alarm(queue, next_due)

    def _note_unreadable(self, webhook_id, error):
        reason = str(unreadable(error))
        if webhook_id not in self._unreadable:
            log_fact("the database cannot be read", level=logging.ERROR, reason=reason)
        self._unreadable[webhook_id] = reason

    # ---- one delivery ----

    def _start(self, queue, due, webhook, now_ms):
        number = due.attempt_count + 1
        try:
            body = render(webhook, due.body)
        except Invalid as error:
            return self._fail_to_render(queue, due, webhook, now_ms, error)
        sent = None if webhook.template is None else body.decode()
        headers = attempt_headers(webhook, due.event, due.uuid, number, body, now_ms)
        begun = self._scheduler.begin(queue, len(body))
        done = functools.partial(self._finish, queue, due, begun, sent)
        try:
            start_attempt(self._client, webhook, headers, body, now_ms, done)
        except BaseException:
            self._scheduler.end(queue, *begun)
            raise

    def _fail_to_render(self, queue, due, webhook, now_ms, error):
        url, headers, reason = webhook.masked_url, webhook.masked_headers, str(error)
        attempt = Attempt(now_ms, 0, url, headers, ERROR, f"nothing was sent: {reason}")
        begun = self._scheduler.begin(queue, 0)
        self._loop.call_soon(self._finish, queue, due, begun, "", attempt)

    def _finish(self, queue, due, begun, sent, attempt):
        """Hand the facts in; a commit tells what follows from them.

        sent: the body that a template made; None if it is the event's."""
        self._scheduler.end(queue, *begun)
        if sent is not None:
            attempt = attempt._replace(request_body=sent)
        try:
            self._keep_result(queue, due, attempt)
        except Exception:  # memory is short, say: it is attempted again
            log.exception("the result of an attempt could not be kept")
            queue.held.discard(due.row_id)
            queue.backlog = True
        self._notice(queue)

    def _keep_result(self, queue, due, attempt):
        if attempt.handshake_seconds > FAIR_HANDSHAKE_SECONDS:
            rest_ms = HANDSHAKE_REST * attempt.handshake_seconds * 1000
            queue.not_before = max(queue.not_before, self._clock() * 1000) + rest_ms
        health = self._store.health[due.webhook_id]
        is_plain = attempt.outcome == SUCCESS and health.is_well and not health.announced
        self._results.append(Result(due, attempt, self._now_ms(), is_plain))
        queue.uncertain += not is_plain


# ======================================================================================
# Maintenance: pruning, space, the clock
# ======================================================================================

MAINTENANCE_SECONDS = 1
PRUNING_SECONDS = 60
REST_SHARE = 9  # maintenance rests so many times as long as each of its steps took
CLOCK_JUMP_SECONDS = 2
MAX_TRUSTED_JUMP_SECONDS = 3600  # after a longer jump nobody knows what has become old


class Clock:
    """The time of the whole program, in seconds since 1970.

    It runs with the machine's steady clock, which nobody sets, and follows the small steps of
    the wall clock. A jump of the wall clock moves the schedule with it, see Maintenance, so
    that no wait becomes longer or shorter."""

    def __init__(
        self,
        wall: collections.abc.Callable[[], float] = time.time,
        steady: collections.abc.Callable[[], float] = lambda: time.clock_gettime(
            time.CLOCK_BOOTTIME  # goes on while the machine sleeps
        ),
    ):
        self._wall, self.steady = wall, steady
        self._offset = wall() - steady()

    def __call__(self) -> float:
        return self.steady() + self._offset

    def behind(self) -> float:
        """How many seconds the wall clock is ahead of this one; negative if it was set back."""
        return self._wall() - self()

    def advance(self, seconds: float) -> None:
        """Move the clock; a negative number moves it back."""
        self._offset += seconds


class Maintenance:
    """Deletes what is old or too much, gives space back, and follows the wall clock, in small
    steps with rests between them. `with` runs it in a thread of its own."""

    def __init__(self, store: Store, settings: Settings, clock: Clock):
        self._store, self._settings, self._clock = store, settings, clock
        self._stop = threading.Event()
        self._wakeup = threading.Event()  # set by any thread
        self._next_pruning = -math.inf  # by the steady clock
        self._too_large = False  # the database, by its limit or for its volume
        self._nothing_can_go = False
        self._problems: set[str] = set()  # that were logged and are not over
        store.on_commit(self._watch_size)

    def __enter__(self):
        self.check_clock()
        self._thread = threading.Thread(target=self._run, name="maintenance")
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._stop.set()
        self._wakeup.set()
        self._thread.join()

    def _watch_size(self, commit):
        if self._store.unmeasured_bytes > MEASURED_BYTES:
            self._wakeup.set()

    def _run(self):
        while not self._stop.is_set():
            self._wakeup.wait(MAINTENANCE_SECONDS)
            self._wakeup.clear()
            self.run_once()

    def run_once(self) -> None:
        """Do each part that is due now; one that fails is logged once, and stops no other."""
        self._look_around()
        for part in (self._sweep, self._cut_down, self._prune, self._give_back, self._watch_log):
            if not self._stop.is_set():
                self._unless_it_fails(self._do, part)

    def _do(self, part):
        """Do all steps of a part, and look around and rest after each of them."""
        begun = time.monotonic()
        for _ in part():  # which does a step
            self._look_around()
            # to bring the size down it must delete faster than events come in
            share = 1 if self._too_large else REST_SHARE
            if self._stop.wait(share * (time.monotonic() - begun)):
                return
            begun = time.monotonic()

    def _look_around(self):
        self._unless_it_fails(self._follow_clock)
        self._unless_it_fails(self._measure)

    def _unless_it_fails(self, work, *args):
        """Do some work; a failure is logged when it begins, and not each time."""
        name = (args[0] if args else work).__name__.strip("_")
        try:
            work(*args)
            self._problems.discard(name)
        except Exception as error:
            if name not in self._problems:
                self._problems.add(name)
                reason = str(error) or type(error).__name__
                log_fact("maintenance failed", level=logging.ERROR, part=name, reason=reason)
                if not isinstance(error, (WebhookdError, sqlite3.Error, OSError, MemoryError)):
                    log.error("that is a bug", exc_info=error)

    # ---- room ----

    def _measure(self):
        self._store.measure()
        space, limit = self._store.space, self._settings.max_database_size
        self._too_large = space.used > limit or space.is_scarce
        self._nothing_can_go &= self._too_large
        self._refuse_publications(self._why_full(space))

    def _why_full(self, space):
        if space.fault or space.left < MEASURED_BYTES:
            return space.fault or NO_ROOM
        if space.log > self._longest_log():
            return LONG_LOG
        is_full = self._nothing_can_go and space.used > self._settings.max_database_size
        return FULL if is_full else None

    def _longest_log(self):
        """How long SQLite's log may be, bytes: it takes room, and no pruning makes it shorter."""
        return max(2 * MAX_IDLE_LOG_BYTES, self._settings.max_database_size // 4)

    def _refuse_publications(self, why):
        if why and why != self._store.full:
            log_fact("database full", level=logging.WARNING, reason=why)
        elif self._store.full and not why:
            log_fact("database has room again", level=logging.WARNING)
        self._store.full = why

    def _watch_log(self):
        """Cut SQLite's log off where that is due, and log it if somebody reads it for long."""
        store, is_long = self._store, self._store.space.log > self._longest_log() // 2
        if store.log_holds_deleted or is_long:
            store.empty_log()
            yield
        if not store.log_holds_deleted:
            self._problems.discard("log")
        elif "log" not in self._problems:
            self._problems.add("log")
            size_bytes = store.space.log
            log_fact("SQLite's log is not empty yet", level=logging.WARNING, bytes=size_bytes)

    # ---- the clock ----

    def check_clock(self) -> None:
        """Bound what a wrong clock may have planned before this start, and let no webhook be
        disabled, nor history be pruned, because of a time that nobody knows to have passed."""
        now_ms = int(self._clock() * 1000)
        with contextlib.suppress(WebhookdError):  # the log has said why nothing is written
            latest_ms = now_ms + int(longest_wait_seconds(self._settings) * 1000)
            if webhook_ids := self._store.planned_after(latest_ms):
                self._store.write(Batch.bound_schedule, webhook_ids, latest_ms)
            unknown_ms = now_ms - (self._store.latest_moment() or now_ms)
            # the machine was off, or its clock is wrong: no webhook has failed for so long
            if not 0 <= unknown_ms <= MAX_TRUSTED_JUMP_SECONDS * 1000:
                self._put_pruning_off()
                self._store.write(Batch.excuse_failures, unknown_ms)

    def _put_pruning_off(self):
        """Give people a day to see that the clock is wrong before history is deleted."""
        self._next_pruning = self._clock.steady() + DAY_SECONDS

    def _follow_clock(self):
        """Take the wall clock's small steps, and its jumps together with the schedule."""
        behind = self._clock.behind()
        if abs(behind) > CLOCK_JUMP_SECONDS:
            self._jump(behind)
        else:
            self._clock.advance(behind)

    def _jump(self, behind):
        log_fact("clock jumped", level=logging.WARNING, seconds=round(behind, 3))
        if behind > MAX_TRUSTED_JUMP_SECONDS:
            self._put_pruning_off()
        now = self._clock()
        after_ms = int(min(now, now + behind) * 1000)  # what was due stays due
        # clock and schedule cannot move at once: between the two the clock is the earlier one,
        # so that nothing is attempted too early
        self._clock.advance(min(behind, 0))
        try:
            self._store.write(Batch.shift_schedule, after_ms, int(behind * 1000))
        except WebhookdError:
            self._clock.advance(-min(behind, 0))
            raise
        self._clock.advance(max(behind, 0))

    # ---- pruning ----

    def _sweep(self):
        return self._store.delete_leftovers()

    def _give_back(self):
        return self._store.give_back()

    def _prune(self):
        """Delete what is too old."""
        if self._clock.steady() < self._next_pruning:
            return
        every = min(PRUNING_SECONDS, self._settings.retention / 10)
        self._next_pruning = max(self._next_pruning, self._clock.steady() + every)
        now_ms = int(self._clock() * 1000)
        yield from self._store.prune(now_ms - int(self._settings.retention * 1000))
        yield from self._store.prune_answers(now_ms - KEY_DAYS * DAY_MS)
        yield from self._store.prune_statistics(now_ms // DAY_MS - STATISTICS_DAYS)
        self._store.forget_old_secrets(now_ms)

    def _cut_down(self):
        """Delete the oldest until the size is right; if nothing more can go, it is full."""
        if self._too_large:
            for _ in self._all_that_can_go():  # which deletes a step of it
                yield
                if not self._too_large:
                    return
        self._nothing_can_go = self._too_large
        self._measure()

    def _all_that_can_go(self):
        """Delete step by step all that may be deleted. Keys of yesterday go first, since who
        repeats a publication does so at once. What people look at stays as long as it can."""
        store, now_ms = self._store, int(self._clock() * 1000)
        yield from store.prune_answers(now_ms - DAY_MS)
        yield from store.prune_statistics(now_ms // DAY_MS - STATISTICS_DAYS)
        yield from store.prune(END_OF_TIME_MS)
        yield from store.prune_answers(END_OF_TIME_MS)
        yield from store.prune_statistics(END_OF_TIME_MS)


# ======================================================================================
# Users: passwords, secrets, roles, logins
# ======================================================================================

ADMIN, PUBLISHER, VIEWER = "admin", "publisher", "viewer"
ROLES = (ADMIN, PUBLISHER, VIEWER)
SCRYPT = {"n": 1 << 14, "r": 8, "p": 1, "maxmem": 64 << 20}  # 16 MB and about 50 ms
MAX_HASHING = 2  # passwords at one moment: each takes a core and 16 MB
MAX_VERIFIED = 1000
WRONG_PASSWORDS = 10
WRONG_PASSWORDS_SECONDS = 60


def password_record(password: str, salt: str | None = None) -> str:
    """What is stored of a password: scrypt (RFC 7914) with a salt."""
    salt = salt or secrets.token_hex(16)
    digest = hashlib.scrypt(password.encode(), salt=salt.encode(), **SCRYPT)
    return f"scrypt${salt}${digest.hex()}"


def secret_record(secret: str) -> str:
    """What is stored of a generated secret, whose 256 random bits need no slow hash."""
    return f"secret${hashlib.sha256(secret.encode()).hexdigest()}"


def matches(password: str, record: str) -> bool:
    """Whether it is the password or secret of the record, in constant time."""
    kind, salt, *_ = record.split("$")
    is_secret = kind == "secret"
    given = secret_record(password) if is_secret else password_record(password, salt)
    return hmac.compare_digest(given, record)


def user_name(text: str) -> str:
    """A name that Basic authentication can carry; raises ValueError."""
    is_text = 1 <= len(text) <= 100 and text.isprintable() and text.strip()
    if not is_text or ":" in text:
        raise ValueError(f"{text!r} is not a name of 1 to 100 characters without a colon")
    return text


def save_user(connection: Database, user: User) -> None:
    """Add a user or change the one of that name."""
    sql = "INSERT OR REPLACE INTO users (name, role, password) VALUES (?, ?, ?)"
    connection.change(sql, user.name, user.role, user.record)


def ensure_admin(store: Store, password: str, tell: collections.abc.Callable[[str], None]) -> None:
    """Set the admin's password; if there is neither that nor any user, make a secret and tell it.

    A secret that cannot be told is not stored: nobody could log in, and no later start would
    make another one."""
    users = {user.name: user for user in load_users(store.reader())}
    if not password and users:
        return
    admin = users.get("admin")
    if admin and admin.role == ADMIN and matches(password, admin.record):
        return  # a new record would make the tokens of open forms invalid
    if password:
        record = password_record(password)
    else:
        secret = secrets.token_urlsafe(32)
        record = secret_record(secret)
        tell(secret)
    admin = User("admin", ADMIN, record)
    store.write(lambda batch: save_user(batch.connection, admin))


class Login(typing.NamedTuple):
    """What an Authorization header claims; a Bearer's secret has no name."""

    name: str | None
    password: str


def read_logins(header: str) -> list[Login]:
    """What an Authorization header may mean: clients send UTF-8 or Latin-1."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() != "basic":
        return [Login(None, value.strip() if scheme.lower() == "bearer" else "")]
    try:
        sent = base64.b64decode(value)
    except ValueError:
        return [Login(None, "")]
    texts = [sent.decode("latin-1")]
    if not sent.isascii():
        with contextlib.suppress(UnicodeDecodeError):
            texts.insert(0, sent.decode())
    parts = [text.partition(":") for text in texts]
    return [Login(name, password) for name, _, password in parts]


def client_of(address: str) -> str:
    """What counts as one client: an IPv4 address, an IPv6 /64, all of loopback."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.is_loopback:
        return "loopback"
    if ip.version == 4:
        return str(ip)
    return f"{ipaddress.IPv6Address(int(ip) >> 64 << 64)}/64"


@dataclasses.dataclass
class WrongPasswords:
    """The wrong passwords for one user from one client within a minute."""

    since: float  # seconds, of the first
    count: int = 0
    is_logged: bool = False  # that there were too many


class Logins:
    """Knows who sends a request. It remembers verified passwords and counts wrong ones.

    Any thread may call the methods."""

    def __init__(self, store: Store, clock: collections.abc.Callable[[], float]):
        """clock: one that nobody sets; seconds."""
        self._store, self._clock = store, clock
        self._key = secrets.token_bytes(32)
        self._hashing = threading.Semaphore(MAX_HASHING)
        self._lock = threading.Lock()  # guards changes of the next three
        # Users by digest of the header; apart, since who has a secret can spell it in many ways
        self._by_header = LimitedDict(MAX_VERIFIED)
        self._by_header_with_secret = LimitedDict(MAX_VERIFIED)
        # by user (None: no user) and client, the oldest first
        self._wrong: dict[tuple[str | None, str], WrongPasswords] = {}

    def known(self, header: str, users: list[User], address: str) -> User | None:
        """Whose Authorization header it is, if that is known without a slow hash; raises
        TooManyRequests."""
        digest = self._digest(header)
        user = self._remembered(self._by_header_with_secret, digest, users)
        if user is not None:
            return user
        user = self._remembered(self._by_header, digest, users)
        if user is not None and not self._wrong:
            return user
        logins = read_logins(header)
        by_secret = self._by_secret(logins, users)
        if by_secret is not None:
            with self._lock:
                self._by_header_with_secret[digest] = by_secret
            return by_secret
        if self._wrong:
            with self._lock:
                self._forget_expired()
            self._check_throttle(self._culprit(logins, users, address))
        return user

    def verify(self, header: str, address: str) -> User:
        """Whose header it is; slow. Raises Unauthorized, TooManyRequests."""
        users, logins = load_users(self._store.reader()), read_logins(header)
        culprit = self._culprit(logins, users, address)
        with self._hashing:
            digest = self._digest(header)
            user = self._remembered(self._by_header, digest, users)  # another thread was first
            if user is not None:
                return user
            wrong = self._count_wrong(culprit)  # it counts as wrong until it turns out right
            for login in logins:
                user = self._by_password(login, users)
                if user is not None:
                    self._remember(digest, user, culprit)
                    return user
        self._log_wrong(wrong, address=address, user=culprit[0] or "unknown")
        raise Unauthorized("wrong user name or password")

    @staticmethod
    def _by_secret(logins, users):
        """The user of a generated secret, which needs no slow hash and so no throttle."""
        bearers = [user for user in users if user.record.startswith("secret$")]
        for name, password in logins if bearers else ():
            given = secret_record(password)
            for user in bearers:
                if name in (None, user.name) and hmac.compare_digest(given, user.record):
                    return user
        return None

    @staticmethod
    def _by_password(login, users):
        if login.name is None:
            return None
        user = next((user for user in users if user.name == login.name), None)
        if user is None or user.record.startswith("secret$"):
            password_record(login.password)  # so that the time does not tell who exists
            return None
        return user if matches(login.password, user.record) else None

    # ---- what is remembered ----

    def _digest(self, header):
        return hashlib.blake2b(header.encode(), key=self._key).digest()

    @staticmethod
    def _remembered(by_header, digest, users):
        user = by_header.get(digest)
        return user if user in users else None

    def _remember(self, digest, user, culprit):
        with self._lock:
            # verify() has counted it as wrong; if that is gone, its minute is over
            wrong = self._wrong.get(culprit, WrongPasswords(0, 1))
            wrong.count -= 1
            if not wrong.count:
                self._wrong.pop(culprit, None)
            self._by_header[digest] = user

    # ---- wrong passwords ----

    @staticmethod
    def _culprit(logins, users, address):
        """The user and the client that a wrong password counts for."""
        names = {user.name for user in users}
        name = next((login.name for login in logins if login.name in names), None)
        return name, client_of(address)

    def _check_throttle(self, culprit):
        wrong = self._wrong.get(culprit)
        if wrong is None or wrong.count < WRONG_PASSWORDS:
            return
        left = wrong.since + WRONG_PASSWORDS_SECONDS - self._clock()
        if left > 0:
            raise TooManyRequests(
                "too many wrong passwords for this user from this address",
                headers={"Retry-After": str(int(left) + 1)},
            )

    def _count_wrong(self, culprit):
        with self._lock:
            self._check_throttle(culprit)  # again: other requests may have been wrong
            self._forget_expired()
            wrong = self._wrong.setdefault(culprit, WrongPasswords(self._clock()))
            wrong.count += 1
            return wrong

    def _forget_expired(self):
        now = self._clock()
        for key in list(self._wrong):
            if self._wrong[key].since + WRONG_PASSWORDS_SECONDS > now:
                break
            del self._wrong[key]

    def _log_wrong(self, wrong, **values):
        log_fact("wrong password", level=logging.WARNING, **values)
        with self._lock:
            is_news = wrong.count >= WRONG_PASSWORDS and not wrong.is_logged
            wrong.is_logged |= is_news
        if is_news:
            words = "too many wrong passwords, refused for the rest of the minute"
            log_fact(words, level=logging.WARNING, **values)


# ======================================================================================
# Metrics: what Prometheus is told; counters start at 0 with the process
# ======================================================================================

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LABEL_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def family(
    name: str, text: str, samples: dict[str, float], kind: str = ""
) -> collections.abc.Iterator[str]:
    """The lines of one metric. The keys of its samples follow its name: suffix and labels.

    Without a kind it is a counter if its name says so, else a gauge."""
    kind = kind or ("counter" if name.endswith("_total") else "gauge")
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
    for suffix, value in samples.items():
        yield f"{name}{suffix} {value}"


def histogram(bounds_ms: tuple[int, ...], counts: list[int], sum_ms: int) -> dict:
    """The samples of a histogram in seconds; the last count is of what is longer."""
    bounds = [str(bound / 1000) for bound in bounds_ms] + ["+Inf"]
    totals = list(itertools.accumulate(counts))
    buckets = {f'_bucket{{le="{bound}"}}': total for bound, total in zip(bounds, totals)}
    return buckets | {"_sum": sum_ms / 1000, "_count": totals[-1]}


def resident_memory_bytes() -> int:
    """How much memory this process takes."""
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _of_process(store, dispatcher, settings):
    counts, sum_ms = list(dispatcher.duration_counts), dispatcher.duration_sum_ms
    durations = histogram(DURATION_BUCKETS_MS, counts, sum_ms)
    name, text = "webhookd_attempt_duration_seconds", "How long attempts took."
    yield family(name, text, durations, "histogram")
    limit, memory = settings.max_database_size, resident_memory_bytes()
    for name, text, value in (
        ("webhookd_events_total", "Events published.", store.published_count),
        ("webhookd_attempts_in_flight", "Being made.", dispatcher.in_flight()),
        ("webhookd_database_size_bytes", "Size in use.", store.space.used),
        ("webhookd_database_log_bytes", "Size of SQLite's log, the file -wal.", store.space.log),
        ("webhookd_database_size_limit_bytes", "The most it may have.", limit),
        ("process_resident_memory_bytes", "Resident memory.", memory),
        ("process_cpu_seconds_total", "CPU time.", time.process_time()),
    ):
        yield family(name, text, {"": value})


def _gauges_of_webhooks(store, webhooks, now_ms):
    ids, oldest = [webhook.id for webhook in webhooks], store.oldest_pending()
    states = {webhook.id: store.health[webhook.id].state(webhook) for webhook in webhooks}
    ages = {id: max(0, now_ms - oldest.get(id, now_ms)) / 1000 for id in ids}
    age_text = "How long ago the oldest of them was made; 0 if none waits."
    for name, text, values in (
        ("pending_deliveries", "Deliveries that wait.", {id: store.pending[id] for id in ids}),
        ("oldest_pending_age_seconds", age_text, ages),
        (
            "webhook_paused",
            "1: paused after failures.",
            {id: int(states[id] == "paused") for id in ids},
        ),
        (
            "webhook_disabled",
            "1: disabled after failures.",
            {id: int(states[id] == "disabled") for id in ids},
        ),
        (
            "webhook_consecutive_failures",
            "Failures in a row.",
            {id: store.health[id].failures for id in ids},
        ),
    ):
        samples = {f'{{webhook="{id}"}}': value for id, value in values.items()}
        yield family(f"webhookd_{name}", text, samples)


def _counters_of_webhooks(dispatcher, webhooks):
    counts = {webhook.id: dispatcher.counts(webhook.id) for webhook in webhooks}
    for index, (name, text) in enumerate(
        (
            ("webhookd_attempts_total", "Attempts by outcome."),
            ("webhookd_deliveries_total", "Done or given up, by the last outcome."),
        )
    ):
        samples = {
            f'{{webhook="{id}",outcome="{outcome.lower()}"}}': count
            for id, attempts_and_deliveries in counts.items()
            for outcome, count in attempts_and_deliveries[index].items()
        }
        yield family(name, text, samples)


def _names_of_webhooks(webhooks):
    names = {webhook.id: webhook.name.translate(LABEL_ESCAPES) for webhook in webhooks}
    samples = {f'{{webhook="{id}",name="{name}"}}': 1 for id, name in names.items()}
    yield family("webhookd_webhook_info", "Always 1; the name.", samples)


def metrics_text(store: Store, dispatcher: Dispatcher, settings: Settings, now_ms: int) -> bytes:
    """What GET /metrics answers. Nothing is counted here, but where it happens."""
    webhooks = store.webhooks.by_id.values()
    families = itertools.chain(
        _of_process(store, dispatcher, settings),
        _gauges_of_webhooks(store, webhooks, now_ms),
        _counters_of_webhooks(dispatcher, webhooks),
        _names_of_webhooks(webhooks),
    )
    lines = itertools.chain.from_iterable(families)
    return ("\n".join(lines) + "\n").encode()


# ======================================================================================
# REST API
# ======================================================================================

READERS = (ADMIN, VIEWER)
PUBLISHERS = (ADMIN, PUBLISHER)
ADMINS = (ADMIN,)
ANYBODY = ()  # without a login
JSON_TYPE = "application/json"
NDJSON_TYPE = "application/x-ndjson"
PING_NAME, PING = "diagnostics:ping", b'{"test": true}'
SEND_BYTES = 1 << 16
MAX_BUFFERED_BYTES = 1 << 20  # a longer answer is made while it is sent
LOGIN_NEEDED = "log in as a user of webhookd"
LOGGED_NAMES = {  # of a webhook's fields, where the API has another or none
    "verify_tls": "sslVerificationRequired",
    "rate_limit": "rateLimit",
    "secret": "configuration.secret",
    **dict.fromkeys(("previous_secret", "previous_secret_until", "updated", "halted_by")),
}


def _site(origin):
    """Scheme and authority of an origin, without a port that is the scheme's own."""
    scheme, _, authority = origin.lower().partition("://")
    default = {"http": ":80", "https": ":443"}.get(scheme, "")
    return scheme, authority.removesuffix(default)


def delivery_json(
    delivery: Delivery, body: bytes, attempts: collections.abc.Iterable[Attempt]
) -> collections.abc.Iterator[bytes]:
    """A delivery with its attempts as JSON, in parts; the body is encoded once for all."""
    of_event, separator = memoryview(json_bytes(body.decode())), b""
    yield json_bytes(delivery.as_json()).removesuffix(b"}") + b',"attempts":['
    for attempt in attempts:
        before, after = attempt.json_around_body(delivery.id, delivery.event)
        own = attempt.request_body
        sent = of_event if own is None else memoryview(json_bytes(own))
        yield separator + before
        for start in range(0, len(sent), SEND_BYTES):
            yield bytes(sent[start : start + SEND_BYTES])
        yield after
        separator = b","
    yield b"]}"


def changed_fields(old: Webhook, new: Webhook) -> str:
    """The names of the fields that differ, as the API has them; no values."""
    names = [field.name for field in dataclasses.fields(Webhook)]
    differ = [name for name in names if getattr(old, name) != getattr(new, name)]
    logged = [LOGGED_NAMES.get(name, name) for name in differ]
    return ",".join(filter(None, logged))


def change_in_words(old: Webhook, new: Webhook, starts_clean: bool) -> str:
    """What a change does to a webhook, in the words of the log."""
    if old.active != new.active:
        return "webhook activated" if new.active else "webhook deactivated"
    if old.paused != new.paused:
        return "webhook paused by hand" if new.paused else "webhook resumed"
    resumes = starts_clean and new.active and not changed_fields(old, new)
    return "webhook resumed" if resumes else "webhook changed"


def lost_secret(old: Webhook, new: Webhook) -> bool:
    """Whether a change takes away something that was secret."""
    if old.url != new.url or old.credentials != new.credentials or old.headers != new.headers:
        return True
    kept = (new.secret, new.previous_secret)
    return any(secret not in kept for secret in (old.secret, old.previous_secret) if secret)


class Work(typing.NamedTuple):
    """A kind of work that holds one of the server's threads for long."""

    limit: int  # at one moment
    patience_seconds: float = 1  # if there are more


ORDINARY = Work(SERVER_THREADS // 2)  # lists, look-ups, passwords: all that is not quick
TESTS = Work(4, 0)
LARGE = Work(1, 5)  # a large request is some hundred megabytes while it is read
STREAMS = Work(4, 10)  # each waits for its client
MAX_WAITING = SERVER_THREADS // 4  # threads that wait for such work


class SlowWork:
    """Admits at most half of the server's threads to slow work, and fewer to some kinds.

    A few more wait, and all others get Unavailable, so that a quick request always finds a
    thread. Any thread may call the methods."""

    def __init__(self):
        kinds = ORDINARY, TESTS, LARGE, STREAMS
        self._free = {work: threading.Semaphore(work.limit) for work in kinds}
        self._waiting = threading.Semaphore(MAX_WAITING)
        self._local = threading.local()  # is_admitted: this thread, to ordinary work

    @contextlib.contextmanager
    def admit(self, work: Work = ORDINARY) -> collections.abc.Iterator[None]:
        """Let this thread do a kind of work, which is ordinary slow work, too; raises
        Unavailable."""
        with contextlib.ExitStack() as admissions:
            if work is not ORDINARY:
                admissions.enter_context(self._counted(work))
            if not getattr(self._local, "is_admitted", False):
                admissions.enter_context(self._counted(ORDINARY))
                admissions.callback(setattr, self._local, "is_admitted", False)
                self._local.is_admitted = True
            yield

    @contextlib.contextmanager
    def _counted(self, work):
        free = self._free[work]
        if not free.acquire(blocking=False):
            self._wait(free, work.patience_seconds)
        try:
            yield
        finally:
            free.release()

    def _wait(self, free, seconds):
        is_admitted = False
        if self._waiting.acquire(blocking=False):
            try:
                is_admitted = free.acquire(timeout=seconds)
            finally:
                self._waiting.release()
        if not is_admitted:
            raise Unavailable("too much of this at once", headers={"Retry-After": "1"})


@functools.cache
def environ_key(header: str) -> str:
    """Where a WSGI environment has a header (PEP 3333)."""
    return "HTTP_" + header.upper().replace("-", "_")


USER, FORM, PASSAGE = "webhookd.user", "webhookd.form", "webhookd.passage"  # in WSGI's environ


def current_user() -> User | None:
    """Who sends the request in hand; None if its route needs no login."""
    return bottle.request.environ.get(USER)


class Passage:
    """The way of a request through the application in the server's own thread.

    There nothing may wait. A handler that waits for a commit leaves its answer for later, and
    one that is slow starts again in another thread."""

    is_slow = False
    write: Write | None = None
    late_answer: collections.abc.Callable[[], tuple] | None = None

    def leave(self, write: Write, late_answer: collections.abc.Callable[[], tuple]) -> None:
        """Leave a function for later, which makes the answer (status line, headers, body) once
        the write is finished."""
        self.write, self.late_answer = write, late_answer


QUICK, SLOW = True, False  # how long a handler holds a thread; see SlowWork


class Api:
    """The REST API: `__init__` lists its routes, and the handlers follow in that order."""

    def __init__(
        self,
        store: Store,
        dispatcher: Dispatcher,
        address_policy: AddressPolicy,
        settings: Settings,
        clock: collections.abc.Callable[[], float] = time.time,
        steady_clock: collections.abc.Callable[[], float] = time.monotonic,
    ):
        self._store, self._dispatcher, self._settings = store, dispatcher, settings
        self._address_policy, self._clock = address_policy, clock
        self._logins = Logins(store, steady_clock)
        self._slow_work = SlowWork()
        self.render_error = self.error_as_json  # Pages replaces it by its own
        self.app = bottle.Bottle()
        self.app.default_error_handler = self._render_bottle_error
        self.app.router.add_filter("id", lambda _: ("[0-9]{1,15}", int, str))
        self.app.add_hook("before_request", self._read_path)
        self.app.install(self._guarded)
        hooks, hook = "/rest/api/webhooks", "/rest/api/webhooks/<id:id>"
        events, deliveries = "/rest/api/events", "/rest/api/deliveries"
        # quick ones hold a thread for a commit or a few rows, or ask for their own admission
        for method, path, handler, roles, is_quick in (
            ("GET", hooks, self.list_webhooks, READERS, SLOW),
            ("POST", hooks, self.create_webhook, ADMINS, SLOW),
            ("GET", hook, self.get_webhook, READERS, QUICK),
            ("PUT", hook, self.update_webhook, ADMINS, SLOW),
            ("DELETE", hook, self.delete_webhook, ADMINS, QUICK),
            ("GET", hook + "/latest", self.latest, READERS, QUICK),
            ("GET", hook + "/statistics", self.statistics, READERS, SLOW),
            ("GET", hook + "/statistics/summary", self.statistics_summary, READERS, SLOW),
            ("POST", hooks + "/test", self.test_webhook, ADMINS, SLOW),
            ("POST", events, self.publish_events, PUBLISHERS, QUICK),
            ("GET", events, self.list_events, READERS, SLOW),
            ("GET", events + "/<id:id>", self.get_event, READERS, SLOW),
            ("GET", hook + "/deliveries", self.list_deliveries, READERS, SLOW),
            ("GET", deliveries + "/<uuid>", self.get_delivery, READERS, QUICK),
            ("POST", deliveries + "/<uuid>/redeliver", self.redeliver, ADMINS, QUICK),
            ("POST", hook + "/redeliver", self.redeliver_many, ADMINS, SLOW),
            ("POST", hook + "/replay", self.replay, ADMINS, SLOW),
            ("DELETE", events + "/<id:id>", self.delete_event, ADMINS, QUICK),
            ("GET", "/health", self.health, ANYBODY, QUICK),
            ("GET", "/metrics", self.metrics, READERS, SLOW),
        ):
            self.app.route(path, method, handler, roles=roles, is_quick=is_quick)
        self._publication, _ = self.app.match({"REQUEST_METHOD": "POST", "PATH_INFO": events})

    def __call__(self, environ: dict, start_response: collections.abc.Callable) -> list[bytes]:
        """The WSGI application (PEP 3333). A publication in the server's own thread goes past
        the router, to the same handler behind the same checks. Nothing is started if that has
        left its answer for later."""
        passage = environ.get(PASSAGE)
        if passage is None:
            return self.app(environ, start_response)
        environ["bottle.route"] = self._publication
        self._bind(environ)
        body = self._publication.call()
        if passage.write is None:
            start_response(bottle.response.status_line, bottle.response.headerlist)
        return [body]

    @staticmethod
    def _bind(environ):
        """Let bottle.request and bottle.response stand for this request."""
        bottle.request.bind(environ)
        bottle.response.bind()

    def remember_admin(self, password: str) -> None:
        """Know the admin's password from the start, when many may log in at once."""
        with contextlib.suppress(WebhookdError):  # it was changed just now
            basic = base64.b64encode(f"admin:{password}".encode()).decode()
            self._logins.verify(f"Basic {basic}", "")

    # ---- what every request passes ----

    def _guarded(self, handler):
        """A plugin: puts all checks before the handler, and renders errors."""

        def guarded(*args, **kwargs):
            return self._rendered(self._checked, handler, *args, **kwargs)

        return guarded

    def _checked(self, handler, *args, **kwargs):
        self._refuse_other_sites()
        config = bottle.request.route.config
        self.log_in(config["roles"])
        if config.get("is_quick"):
            return handler(*args, **kwargs)
        with self._admit():
            return handler(*args, **kwargs)

    def _rendered(self, answer, *args, **kwargs):
        """What answer() returns, or the document of the error that it raises."""
        try:
            return answer(*args, **kwargs)
        except WebhookdError as error:
            bottle.response.headers.update(error.headers)
            return self.render_error(error.status, error.faults)
        except Exception as error:
            if is_of_the_machine(error):
                return self.render_error(503, unreadable(error).faults)
            request = bottle.request
            log.exception("%s %s failed", request.method, request.path)
            fault = Fault(None, "an internal error, which is in the log")
            return self.render_error(500, [fault])

    def _admit(self, work=ORDINARY):
        """Admit this thread to slow work, see SlowWork; the server's own thread never is."""
        passage = bottle.request.environ.get(PASSAGE)
        if passage:
            passage.is_slow = True
            raise Unavailable("this goes on in another thread")  # nobody sees this answer
        return self._slow_work.admit(work)

    def _answer_after(self, write, answer):
        """The document and status that are answer(*result), once a write is finished. The
        server's own thread does not wait, but leaves that for later."""
        environ = bottle.request.environ
        passage = environ.get(PASSAGE)
        if passage is None:
            return self._json(*answer(*write.result()))
        passage.leave(write, lambda: self._late_answer(environ, write, answer))
        return b""

    def _late_answer(self, environ, write, answer):
        """Status line, headers and body of an answer that was left for later."""
        if not write.error:  # past bottle.response, each of whose attributes is slow
            document, status = answer(*write.result())
            line = f"{status} {http.HTTPStatus(status).phrase}"
            return line, [("Content-Type", JSON_TYPE)], json_bytes(document)
        self._bind(environ)
        body = self._rendered(write.result)
        return bottle.response.status_line, bottle.response.headerlist, body

    def _refuse_other_sites(self):
        if bottle.request.method in ("GET", "HEAD"):
            return
        site, origin = self._header("Sec-Fetch-Site") or "none", self._header("Origin")
        is_own = not origin or _site(origin) == _site(self._own_origin())
        if site not in ("none", "same-origin") or not is_own:
            hint = "behind a reverse proxy it needs --trusted-proxy"
            raise Forbidden(f"requests from other sites are refused; {hint}")

    def log_in(self, roles: tuple[str, ...]) -> None:
        """Let only users with these roles pass; raises Unauthorized, Forbidden."""
        if roles == ANYBODY:
            return
        try:
            user = self._verified_user(self._header("Authorization"), self._client_address())
        except Unauthorized as error:
            error.headers.update(ASK_FOR_LOGIN)
            raise
        if user.role not in roles:
            raise Forbidden(f"the role {user.role} may not do this")
        bottle.request.environ[USER] = user

    def _verified_user(self, header, address):
        if not header:
            raise Unauthorized(LOGIN_NEEDED)
        user = self._logins.known(header, self._users(), address)
        if user is None:
            with self._admit():
                user = self._logins.verify(header, address)
        return user

    def _users(self):
        """All users as they are now. The server's own thread takes those of the last commit:
        the next commit checks again who publishes."""
        if PASSAGE in bottle.request.environ:
            return self._store.users
        return load_users(self._store.reader())

    def _client_address(self):
        """Where the request comes from; the proxy, if it tells no address."""
        address = bottle.request.environ.get("REMOTE_ADDR")
        if not self._settings.trusted_proxy:
            return address
        with contextlib.suppress(ValueError):
            return str(ipaddress.ip_address(address))
        return self._settings.trusted_proxy

    def _render_bottle_error(self, error):
        is_missing = error.status_code == 404
        message = "there is no such resource" if is_missing else str(error.body)
        allowed = error.headers.get("Allow", "")
        if "GET" in allowed:
            bottle.response.headers["Allow"] = allowed.replace("GET", "GET,HEAD")
        return self.render_error(error.status_code, [Fault(None, message)])

    def error_as_json(self, status, faults):
        return self._json(error_document(status, faults), status)

    @staticmethod
    def _read_path():
        """Refuse a path that is not UTF-8 (bottle drops such bytes); ignore a trailing slash."""
        environ = bottle.request.environ
        try:
            path = environ["bottle.raw_path"].encode("latin-1").decode()
        except UnicodeError:
            raise bottle.HTTPError(400, "the path is not UTF-8") from None
        environ["PATH_INFO"] = path.rstrip("/") or "/"

    # ---- what the handlers share ----

    @staticmethod
    def _json(document, status=200):
        bottle.response.status = status
        bottle.response.content_type = JSON_TYPE
        return document if isinstance(document, bytes) else json_bytes(document)

    @staticmethod
    def _header(name):
        # not bottle's get_header(), which fails on what is not UTF-8
        return bottle.request.environ.get(environ_key(name))

    @staticmethod
    def _host():
        environ = bottle.request.environ
        own = f"{environ['SERVER_NAME']}:{environ['SERVER_PORT']}"
        return environ.get("HTTP_HOST") or own

    def _own_origin(self):
        return f"{bottle.request.environ['wsgi.url_scheme']}://{self._host()}"

    def link(self, path: str, query=()) -> str:
        """The address of a path of this service, as the client sees it."""
        encoded = urllib.parse.urlencode(query, doseq=True)
        return self._own_origin() + path + (f"?{encoded}" if encoded else "")

    def now_ms(self) -> int:
        """Epoch milliseconds."""
        return int(self._clock() * 1000)

    @staticmethod
    def _content_type():
        sent = bottle.request.environ.get("CONTENT_TYPE", "")
        return sent.partition(";")[0].strip().lower()

    def _check_type(self, types):
        """Raise WrongMediaType unless the body is JSON or of these types, and not encoded."""
        sent = self._content_type()
        if sent not in types and not re.fullmatch(r"application/(json|[\w.-]+\+json)", sent):
            kind = f"as {sent[:100]}" if sent else "without a Content-Type"
            came = f"the body came {kind}, send it as {' or '.join(types)}"
            hint = "curl: add -H Content-Type:application/json, or use --json"
            raise WrongMediaType(f"{came} ({hint})" if JSON_TYPE in types else came)
        encoding = self._header("Content-Encoding") or "identity"
        if encoding.strip().lower() != "identity":
            came = f"the body came with Content-Encoding {encoding[:100]}"
            raise WrongMediaType(f"{came}, send it without")

    def body(self, *types: str, limit: int = MAX_WEBHOOK_BYTES) -> bytes:
        """The request's body; raises WrongMediaType, TooLarge."""
        self._check_type(types)
        length = max(0, bottle.request.content_length)
        if length > limit:
            raise TooLarge(f"the body may have at most {limit} bytes")
        return bottle.request.environ["wsgi.input"].read(length)

    def _object(self):
        return json_object(self.body(JSON_TYPE))

    @staticmethod
    def query() -> dict[str, str | list[str]]:
        """The request's query, see query_fields."""
        text = bottle.request.environ.get("QUERY_STRING")
        return query_fields(text) if text else {}

    def _filter(self, *names):
        with Reader(self.query()) as query:
            return read_filter(query, self.now_ms(), *names)

    def _page_of(self, page, total, results, more=None):
        """A page of results, documents or their JSON, with links to itself and its neighbours.

        more: what the next page asks for, where the total is not known."""
        path, query = bottle.request.path, self.query() | {"limit": page.limit}
        starts = page.neighbours(total or 0, len(results))
        links = {name: self.link(path, query | {"start": start}) for name, start in starts.items()}
        if more:
            links["next"] = self.link(path, query | more)
        part = {"start": page.start, "limit": page.limit, "size": len(results)}
        rest = json_bytes(part | {"totalCount": total, "_links": links})
        items = (item if isinstance(item, bytes) else json_bytes(item) for item in results)
        return self._json(b'{"results":[' + b",".join(items) + b"]," + rest[1:])

    def _options(self, *names):
        """A reader of an operation's fields, in the query or the body; others are faults.

        In the query, too, because a dryRun that is passed over there would do harm."""
        fields = self._object() if bottle.request.content_length > 0 else {}
        reader = Reader(self.query() | fields)
        reader.only(*names)
        return reader

    @staticmethod
    def _sees_urls():
        """Whether the user sees whole URLs, whose path or query may be a secret."""
        return current_user().role == ADMIN

    def _visible(self, attempt):
        """The attempt as the user may see it."""
        return attempt if self._sees_urls() else attempt.for_viewers()

    def _log_change(self, words, **values):
        log_fact(words, **values, by=current_user().name, address=self._client_address())

    # ---- webhooks ----

    def list_webhooks(self):
        with Reader(self.query()) as query:
            page, wanted = read_page(query), self._webhook_filter(query)
            statistics = query.field("statistics", False, boolean)
        webhooks = [
            webhook
            for webhook in self._store.webhooks.by_id.values()
            if not wanted.events or any(map(webhook.subscribed, wanted.events))
            if not wanted.states or self._state_of(webhook) in wanted.states
        ]
        part = webhooks[page.start : page.start + page.limit]
        return self._page_of(page, len(webhooks), self.webhooks_as_json(part, statistics))

    def _state_of(self, webhook):
        return self._store.health[webhook.id].state(webhook)

    def _webhook_filter(self, query):
        return read_filter(query, self.now_ms(), "event", "state", states=HEALTH_STATES)

    def create_webhook(self):
        webhook = self.register(self._object())
        path = f"/rest/api/webhooks/{webhook.id}"
        bottle.response.set_header("Location", self.link(path))
        return self._json(self.webhooks_as_json([webhook])[0], 201)

    def register(self, fields: dict) -> Webhook:
        """Add the webhook that the fields ask for; raises Invalid."""
        now_ms = self.now_ms()
        new = Webhook(created=now_ms, updated=now_ms, halted_by=current_user().name)
        webhook = read_webhook(fields, new, self._address_policy.check_url)
        webhook = self._store.write(Batch.add_webhook, webhook)
        self._log_change("webhook created", id=webhook.id, url=webhook.short_url)
        return webhook

    def get_webhook(self, id):
        with Reader(self.query()) as query:
            statistics = query.field("statistics", False, boolean)
        return self._json(self.webhooks_as_json([self._store.webhooks.get(id)], statistics)[0])

    def update_webhook(self, id):
        self._store.webhooks.get(id)  # 404 comes before a fault in the body
        return self._json(self.webhooks_as_json([self.change(id, self._object())])[0])

    def change(self, id: int, fields: dict, unless_changed_since: int | None = None) -> Webhook:
        """Change the fields of a webhook that are given; raises NotFound, Invalid.

        Raises Conflict if it was changed after a moment that is given, in milliseconds."""
        # this looks the host up, which takes time; the writer reads the fields again without
        read = read_webhook(fields, self._store.webhooks.get(id), self._address_policy.check_url)
        now_ms, user_name = self.now_ms(), current_user().name
        activates = fields.get("active") is not None and read.active
        resumes = fields.get("paused") is not None and not read.paused
        starts_clean = activates or resumes

        def change(old):
            if unless_changed_since not in (None, old.updated):
                raise Conflict("somebody else has just changed this webhook")
            new = dataclasses.replace(read_webhook(fields, old), updated=now_ms)
            if (new.active, new.paused) != (old.active, old.paused):
                new = dataclasses.replace(new, halted_by=user_name)
            return with_rotated_secret(old, new, now_ms)

        old, webhook = self._store.write(Batch.change_webhook, id, change, starts_clean)
        if lost_secret(old, webhook):
            self._store.empty_log()
        words, names = change_in_words(old, webhook, starts_clean), changed_fields(old, webhook)
        fields = {"fields": names} if names else {}
        self._log_change(words, id=id, **fields, url=webhook.short_url)
        return webhook

    def delete_webhook(self, id):
        self.delete(id)
        bottle.response.status = 204

    def delete(self, id: int) -> None:
        """Delete a webhook and its deliveries; raises NotFound."""
        self._store.write(Batch.delete_webhook, id)
        self._store.empty_log()  # which holds its secrets
        self._log_change("webhook deleted", id=id)

    def webhooks_as_json(self, webhooks: list[Webhook], statistics: bool = False) -> list[dict]:
        """The webhooks as the API shows them, with their health."""
        return [self._webhook_as_json(webhook, statistics) for webhook in webhooks]

    def _webhook_as_json(self, webhook, statistics):
        store, id, sees_urls = self._store, webhook.id, self._sees_urls()
        health = store.health[id].as_json(webhook, store.pending[id], store.last_attempts.get(id))
        document = webhook.as_json(sees_urls) | {"health": health}
        if statistics:
            document["statistics"] = store.statistics(id, (), self.now_ms(), sees_urls)
        return document

    def latest(self, id):
        wanted, webhook = self._filter("event", "outcome"), self._store.webhooks.get(id)
        invocation = self._store.latest(webhook.id, wanted, self._sees_urls())
        if invocation is None:
            bottle.response.status = 204
            return None
        return self._json(invocation)

    def statistics(self, id):
        wanted, now = self._filter("event"), self.now_ms()
        webhook = self._store.webhooks.get(id)
        return self._json(self._store.statistics(webhook.id, wanted.events, now, self._sees_urls()))

    def statistics_summary(self, id):
        webhook, now = self._store.webhooks.get(id), self.now_ms()
        events = self._store.attempted_events(webhook.id)
        sees_urls = self._sees_urls()
        document = {
            event: self._store.statistics(webhook.id, (event,), now, sees_urls) for event in events
        }
        return self._json(document)

    def test_webhook(self):
        answer, _ = self.test(self._webhook_to_test())
        return self._json(answer)

    def test(self, webhook: Webhook) -> tuple[dict, int]:
        """Send a ping now; what was sent and what came back, and after how many ms.

        Raises Unavailable."""
        with self._slow_work.admit(TESTS):
            body, attempt = asyncio.run(self._ping(webhook))
        id, result = webhook.id or "none", attempt.description
        url = short_url(attempt.url)
        self._log_change("webhook tested", id=id, url=url, result=result)
        answer = {"request": attempt.request(body.decode()), "response": None}
        if attempt.status is None:
            return answer | {"error": attempt.description}, attempt.duration
        answer["response"] = {"status": attempt.status} | attempt.response()
        return answer, attempt.duration

    def _webhook_to_test(self):
        with self._options("webhookId", "url") as options:
            id = options.field("webhookId", None, whole_number, 1)
        if id is not None:
            return self._store.webhooks.get(id)
        with options:
            url = options.field("url", "", read_url, "", self._address_policy.check_url)
            options.check("url", url != "", "url or webhookId is needed")
        return Webhook(url=url)

    async def _ping(self, webhook):
        client = Client(self._address_policy, self._settings.delivery_timeout)
        now, made = self.now_ms(), asyncio.get_running_loop().create_future()
        event = {"timestamp": now, "event": PING_NAME, "test": True}
        body = PING if webhook.template is None else render(webhook, json_bytes(event))
        headers = attempt_headers(webhook, PING_NAME, uuid7(now), 1, body, now)
        start_attempt(client, webhook, headers, body, now, made.set_result)
        try:
            return body, await made
        finally:
            client.close()

    # ---- events and deliveries ----

    def publish_events(self):
        is_large = bottle.request.content_length > LARGE_REQUEST_BYTES
        with self._admit(LARGE) if is_large else contextlib.nullcontext():
            return self._publish_events()

    def _publish_events(self):
        limit = max(MAX_REQUEST_BYTES, self._settings.max_event_size)
        body, now = self.body(JSON_TYPE, NDJSON_TYPE, limit=limit), self.now_ms()
        are_lines = self._content_type() == NDJSON_TYPE
        largest = self._settings.max_event_size
        events = read_events(body, are_lines, now, largest, self._naming())
        several = isinstance(events, list)
        events = events if several else [events]
        key = self._idempotency(body, events)

        def answer(published, is_repeated):
            documents = [event.as_json() for event in published]
            document = {"results": documents} if several else documents[0]
            return document, 200 if is_repeated else 202

        published = self._store.publish(events, now, key, current_user())
        return self._answer_after(published, answer)

    def _naming(self):
        with Reader(self.query()) as query:
            name = query.field("event", None, read_query_name)
        return Naming(name, self._header("X-Event-Key") or self._header("X-GitHub-Event"))

    def _idempotency(self, body, events):
        key = self._header("Idempotency-Key")
        if key is None:
            return None
        if not 1 <= len(key) <= 255:
            raise Invalid(Fault("Idempotency-Key", "must have 1 to 255 characters"))
        fingerprint = hashlib.sha256(body)
        for event in events:
            if event.is_foreign:  # its name is not in the body
                fingerprint.update(b"\n" + event.name.encode())
        return IdempotencyKey(current_user().name, key, fingerprint.digest())

    def list_events(self):
        filters = "event", "since", "until", "where"
        with Reader(self.query()) as query:
            page, wanted = read_page(query), read_filter(query, self.now_ms(), *filters)
            before = query.field("before", None, whole_number, 1)
            payload = query.field("payload", False, boolean)
        result = self.find_events(wanted, page, before)
        if payload:
            return self._events_with_payload(page, result)
        documents = [event.as_json() for event in result.events]
        return self._page_of(page, result.total, documents, result.more)

    def find_events(self, wanted: Filter, page: Page, before: int | None = None) -> EventsPage:
        """A page of events; where a payload is wanted, of those before an id."""
        if wanted.where:
            return self._store.search(wanted, page, before)
        return EventsPage(*self._store.events(wanted, page))

    def _events_with_payload(self, page, result):
        """The page with as many payloads as fit into one answer; the next page begins there."""
        bodies = self._store.bodies([event.id for event in result.events])
        events, more = [event for event in result.events if event.id in bodies], result.more
        if result.total is None and 0 < len(events) < len(result.events):
            more = {"before": events[-1].id, "start": 0}
        documents = [
            with_payload(event.as_json(), payload_of(bodies[event.id], event.name, event.timestamp))
            for event in events
        ]
        return self._page_of(page, result.total, documents, more)

    def get_event(self, id):
        event, body, deliveries = self._store.event(id)
        documents, webhooks = [], self._store.webhooks.by_id
        for delivery in deliveries:
            if delivery.webhook_id in webhooks:
                name = webhooks[delivery.webhook_id].name
                documents.append(delivery.as_json() | {"webhookName": name})
        payload = payload_of(body, event.name, event.timestamp)
        return self._json(with_payload(event.as_json() | {"deliveries": documents}, payload))

    def list_deliveries(self, id):
        filters = "event", "state", "outcome", "since", "until"
        with Reader(self.query()) as query:
            page, wanted = read_page(query), read_filter(query, self.now_ms(), *filters)
        webhook = self._store.webhooks.get(id)
        deliveries, total = self._store.deliveries(webhook.id, wanted, page)
        return self._page_of(page, total, [delivery.as_json() for delivery in deliveries])

    def get_delivery(self, uuid):
        with contextlib.ExitStack() as admission:
            admission.enter_context(self._slow_work.admit(STREAMS))
            delivery, body, attempts = self._store.delivery(uuid.lower())
            parts = delivery_json(delivery, body, map(self._visible, attempts))
            begun, begun_bytes = [], 0
            for part in parts:
                begun.append(part)
                begun_bytes += len(part)
                if begun_bytes > MAX_BUFFERED_BYTES:
                    self._json(b"")
                    return self._streamed(itertools.chain(begun, parts), admission.pop_all())
        return self._json(b"".join(begun))

    @staticmethod
    def _streamed(parts, admission):
        """The parts; the admission ends when the last of them is sent or the client is gone."""
        with admission:
            yield from parts

    # ---- operations ----

    def redeliver(self, uuid):
        with self._options():
            pass  # it has none, so that each field is a fault
        return self._json(self.redeliver_one(uuid.lower()).as_json(), 202)

    def redeliver_one(self, uuid: str) -> Delivery:
        """Have a delivery attempted at once, paused or not; raises NotFound."""
        webhook_id = self._store.write(Batch.redeliver_first, uuid, self.now_ms())
        self._log_change("delivery redelivered", id=uuid, webhook=webhook_id)
        return self._store.delivery(uuid)[0]

    def redeliver_many(self, id):
        self._store.webhooks.get(id)  # 404 comes before a fault in the body
        wanted, dry_run = self._selection("event", "outcome", "since", "until")
        counts = self.redeliver_all(id, wanted, dry_run)
        return self._json(dict(zip(("matched", "redelivered"), counts)), 202)

    def redeliver_all(self, id: int, wanted: Filter, dry_run: bool = False) -> tuple[int, int]:
        """Have the deliveries wanted attempted at once; without an outcome, those that failed.

        Returns how many matched and how many are redelivered; raises NotFound."""
        self._store.webhooks.get(id)
        if not wanted.outcomes:
            wanted = wanted._replace(states=(FAILED,))
        words, row_ids = "deliveries redelivered", self._store.redeliverable(id, wanted)
        return self._write_in_steps(words, Batch.redeliver, id, row_ids, dry_run)

    def _write_in_steps(self, words, work, webhook_id, ids_in_steps, dry_run):
        """Do some work for ids; returns how many ids there are and how many the work was for."""
        matched = done = 0
        now_ms = self.now_ms()
        try:
            for ids in ids_in_steps:
                matched += len(ids)
                if ids and not dry_run:
                    done += self._store.write(work, webhook_id, ids, now_ms)
        finally:  # if a step fails, those before it are done
            if done:
                self._log_change(words, webhook=webhook_id, count=done)
        return matched, done

    def replay(self, id):
        self._store.webhooks.get(id)  # 404 comes before a fault in the body
        counts = self.replay_all(id, *self._selection("event", "since", "until"))
        return self._json(dict(zip(("matched", "replayed"), counts)), 202)

    def replay_all(self, id: int, wanted: Filter, dry_run: bool = False) -> tuple[int, int]:
        """Deliver those of the events wanted that a webhook is subscribed to and never got.

        Returns how many matched and how many are replayed; raises NotFound."""
        event_ids = self._store.missed_events(self._store.webhooks.get(id), wanted)
        return self._write_in_steps("events replayed", Batch.replay, id, event_ids, dry_run)

    def _selection(self, *filters):
        """Which deliveries or events an operation is for, and whether it only counts them."""
        with self._options("dryRun", *filters) as options:
            dry_run = options.field("dryRun", False, boolean)
            return read_filter(options, self.now_ms(), *filters), dry_run

    def delete_event(self, id):
        self.remove_event(id)
        bottle.response.status = 204

    def remove_event(self, id: int) -> None:
        """Delete an event and all that was stored of it; raises NotFound."""
        self._store.write(Batch.delete_event, id)
        self._store.empty_log()
        self._log_change("event deleted", id=id)

    # ---- how it is ----

    def health(self):
        store, dispatcher = self._store, self._dispatcher
        stuck = "the store's writer stands still" if store.stands_still() else None
        problems = [store.problem, store.full, dispatcher.problem(), stuck, *store.faults()]
        problems = list(filter(None, problems))
        if problems:
            return self._json({"status": "failing", "problems": problems}, 503)
        return self._json({"status": "ok"})

    def metrics(self):
        bottle.response.content_type = METRICS_TYPE
        return metrics_text(self._store, self._dispatcher, self._settings, self.now_ms())


# ======================================================================================
# Words and forms: what the pages say of things, and what their forms ask for
# ======================================================================================

MAX_SHOWN_CHARACTERS = 16 << 10  # of a body beside many others
MAX_PAYLOAD_CHARACTERS = 128 << 10  # of a body that stands alone
STATES = ("disabled", "failing", "paused", "inactive", "healthy")  # of webhooks, as listed
TONES = {  # the style's class for a state or an outcome
    **dict.fromkeys(("healthy", SUCCEEDED, SUCCESS), "good"),
    **dict.fromkeys(("failing", "paused", FAILURE), "warn"),
    **dict.fromkeys(("disabled", FAILED, ERROR), "bad"),
    PENDING: "wait",
    "inactive": "idle",
}

# ---- in words ----


def utc(ms: int, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    """A moment for people, to the second."""
    return datetime.datetime.fromtimestamp(ms // 1000, datetime.UTC).strftime(form)


def time_span(ms: int) -> str:
    """A length of time in its largest unit."""
    units = ((DAY_SECONDS, "d"), (3600, "h"), (60, "min"), (1, "s"))
    return next((f"{ms // 1000 // s} {unit}" for s, unit in units if ms >= s * 1000), "0 s")


def relative(ms: int, now_ms: int) -> str:
    """How long ago a moment is, or how far ahead."""
    if abs(now_ms - ms) < 1000:
        return "now"
    return f"in {time_span(ms - now_ms)}" if ms > now_ms else f"{time_span(now_ms - ms)} ago"


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number and what it counts."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def success_rate(counts: dict[str, int]) -> str:
    """The share of successes, never rounded up to all; counts by outcome."""
    total = sum(counts.values())
    return f"{1000 * counts.get(SUCCESS, 0) // total / 10:g} %" if total else "–"


def part_words(page: Page, total: int | None, noun: str, plural: str = "") -> str:
    """Which part of a list it is; total None: of a search that has not looked at all rows."""
    if total is None:
        return "So far as was looked; Next looks further back."
    last, all_of_it = page.start + page.limit, counted(total, noun, plural)
    is_all = page.start == 0 and last >= total
    return all_of_it if is_all else f"{page.start + 1:,} to {min(last, total):,} of {all_of_it}"


def is_in_trouble(health: dict) -> bool:
    """Whether somebody should look at a webhook; its health as the API shows it."""
    is_held = health["state"] == "paused" and not health["pausedUntil"]
    return health["state"] in STATES[:3] and not is_held


def list_order(health: dict) -> tuple:
    """Sorts webhooks: those in trouble come first, then those with the latest attempt."""
    return not is_in_trouble(health), STATES.index(health["state"]), -(health["lastAttempt"] or 0)


def trouble_words(healths: list[dict]) -> tuple[str, str]:
    """How many webhooks are in trouble, for the title and in a sentence."""
    trouble = collections.Counter(h["state"] for h in healths if is_in_trouble(h))
    title = ", ".join(f"{number} {state}" for state, number in trouble.items())
    if not trouble:
        return "Webhooks", "None needs attention."
    need = "needs" if trouble.total() == 1 else "need"
    return title, f"{trouble.total()} of {len(healths)} {need} attention."


def state_words(health: dict, now_ms: int) -> tuple[str, str]:
    """What the state of a webhook is, and what that means; its health as the API shows it."""
    since, until, reason = health["since"], health["pausedUntil"], health["reason"]
    lasting = f" for {time_span(now_ms - since)} ({utc(since)} UTC)" if since else ""
    waiting = counted(health["pending"], "delivery waits", "deliveries wait")
    failures = f"{counted(health['consecutiveFailures'], 'failure')} in a row, the last: {reason}."
    why = f"{reason[0].upper()}{reason[1:]}. " if reason else ""
    missed = "Events published meanwhile are not delivered; after activating you can replay them."
    probe = f"{relative(max(until or 0, now_ms), now_ms)} ({utc(until or 0)} UTC)"
    if health["state"] == "healthy":
        return "", ""
    name, text = {
        "failing": ("Failing", f"{failures} It is tried again on schedule; {waiting}."),
        "paused": ("Paused", f"{why}{waiting} until somebody resumes it. Nothing is lost."),
        "inactive": ("Inactive", f"{why}{missed}"),
        "disabled": ("Disabled", f"{why}{missed}"),
    }[health["state"]]
    if until and name == "Paused":
        name = "Paused by the circuit breaker"
        text = f"{failures} One delivery is tried {probe}; until then {waiting}. Nothing is lost."
    return name + lasting, text


def due_words(number: int | None) -> str:
    """What the page says after so many deliveries were made due; None: none were."""
    return "" if number is None else counted(number, "delivery is due.", "deliveries are due.")


def delivery_words(delivery: Delivery, state: str, now_ms: int) -> tuple[str, str]:
    """What comes next for a delivery, whose webhook is in that state."""
    after, due = f"after {counted(delivery.attempt_count, 'attempt')}", delivery.next_attempt
    if delivery.state == FAILED:
        return f"Given up {after}", "It is kept, and can be redelivered."
    if delivery.state == SUCCEEDED:
        return "", ""
    if due is None:
        return f"Waits while the webhook is {state}", f"It waits {after}. Nothing is lost."
    return f"Next attempt {relative(max(due, now_ms), now_ms)}", f"{utc(due)} UTC, {after}."


def tag(word: str, text: str = "") -> str:
    """The markup of a state."""
    return f'<span class="tag {TONES[word]}">{html.escape(text or word)}</span>'


def moment(now_ms: int, ms: int | None, otherwise: str = "", beside: bool = False) -> str:
    """The markup of a moment, or the other text if there is none; beside: with the UTC."""
    if not ms:
        return otherwise
    time = f'<time datetime="{utc(ms).replace(" ", "T")}Z" title="{utc(ms)} UTC">'
    return f"{time}{relative(ms, now_ms)}</time>" + beside * f" <small>{utc(ms)} UTC</small>"


def indented(text: str) -> str:
    """A JSON text in indented lines, its numbers to the digit; any other text as it is."""
    try:
        value = json_value(text, _event_decoder.decode)
        lines = without_marks(json.dumps(value, indent=2, ensure_ascii=False))
    except (Invalid, RecursionError):
        return text
    # what is nested so deeply that it would be mostly blanks stays as it is, too
    is_wide = len(lines) > 4 * len(text) + 1000
    return text if is_wide else utf8(lines).decode()


def form_json(value: object) -> str:
    """A JSON value as a form has it; an empty text for none."""
    return "" if value in (None, {}) else indented(json_bytes(value).decode())


def body_text(body: str, limit: int) -> str:
    """A body as pages show it: JSON indented, or the start of one that is too long."""
    if len(body) <= limit:
        return indented(body)
    return f"{body[:limit]}\n… {len(body):,} characters in all, the API has them"


def message_text(start: str, message: dict) -> tuple[str, str]:
    """The head and the body of a request or a response, as the API shows it."""
    head = f"{start}\n{header_lines(message['headers'])}".rstrip()
    return head, body_text(message["body"] or "", MAX_SHOWN_CHARACTERS)


def curl_command(attempt: Attempt, body: str) -> str:
    """A shell command that sends a request again, except for what is masked."""
    # the body by standard input, because an argument may have 128 KiB only
    request = attempt.request(body)
    parts = [f"printf %s {shlex.quote(request['body'])} |"]
    if len(request["body"]) > MAX_PAYLOAD_CHARACTERS:
        parts = ["# body.json: the body, too long to stand here; the API has it\ncat body.json |"]
    parts += [f"curl --globoff {shlex.quote(attempt.url)} --data-binary @-"]
    headers = request["headers"].items()
    parts += [f"-H {shlex.quote(f'{name}: {value}')}" for name, value in headers]
    return " \\\n  ".join(parts)


CURL_PAGE = """\
webhookd {version}. A browser finds the administration pages here; with curl:

# register a webhook, list all, test one
curl -u admin {url}/rest/api/webhooks -H 'Content-Type: application/json' \\
     -d '{{"url": "https://example.com/hook", "events": ["page_created"]}}'
curl -u admin {url}/rest/api/webhooks
curl -u admin -X POST {url}/rest/api/webhooks/test'?webhookId=1'

# publish an event, see what became of it, attempt again what failed
curl -u admin {url}/rest/api/events -H 'Content-Type: application/json' \\
     -d '{{"event": "page_created", "page": {{"id": 1015809}}}}'
curl -u admin {url}/rest/api/webhooks/1/deliveries
curl -u admin {url}/rest/api/webhooks/1/statistics
curl -u admin -X POST {url}/rest/api/webhooks/1/redeliver

# is the service well? (no login); on the server: let an application publish
curl {url}/health
webhookd user add NAME --role publisher --database /var/lib/webhookd/webhookd.db
"""

# ---- values for the templates; webhooks are as the API shows them ----


def list_row(webhook: dict, counts: dict[str, int], now_ms: int) -> dict:
    """A webhook in the list, with its attempts by outcome."""
    events, health = webhook["events"], webhook["health"]
    reasons = [health["reason"]] if health["state"] != "healthy" else []
    if until := health["pausedUntil"]:
        reasons.append(f"tried again {relative(max(until, now_ms), now_ms)}")
    host = urllib.parse.urlsplit(webhook["url"]).netloc.rpartition("@")[2]
    return (
        webhook
        | health
        | {
            "host": host,
            "some": ", ".join(events[:3]) + (f" +{len(events) - 3}" if len(events) > 3 else ""),
            "tone": TONES[health["state"]] if is_in_trouble(health) else "",
            "reasons": list(filter(None, reasons)),
            "rate": success_rate(counts),
        }
    )


def delivery_row(delivery: Delivery, webhook: dict, last: int | None) -> dict:
    """A delivery in a list, its webhook, and when its last attempt began."""
    waits = delivery.state == PENDING and delivery.next_attempt is None
    return delivery._asdict() | {
        "webhook": webhook["name"],
        "last": last,
        "waits": f"waits while {webhook['health']['state']}" if waits else "",
        "next": delivery.next_attempt,
    }


def attempt_row(number: int, attempt: Attempt, body: str) -> tuple:
    """An attempt: its number, itself, its status, why it failed, its request, its response."""
    code = "" if attempt.status is None else str(attempt.status)
    request = message_text(f"POST {attempt.url}", attempt.request(body))
    response = message_text(code, attempt.response()) if code else ("none",)
    why = attempt.description.removeprefix(code).lstrip(" ,")
    return number, attempt, code or "no answer", why, request, response


def verdict_words(test: dict, duration_ms: int) -> dict:
    """What the page says of a test: the verdict, and what was sent and answered. test: as the
    API shows it."""
    request, response = test["request"], test["response"]
    status = str(response["status"]) if response else test["error"]
    works = status.startswith("2") and response is not None
    did = "took the test" if works else "did not take the test" if response else "did not answer"
    return {
        "tone": "good" if works else "bad",
        "verdict": f"{'It works' if works else 'It failed'}: {status}",
        "text": f"The receiver {did} after {duration_ms} ms. A test is not counted or stored.",
        "request": message_text(f"POST {request['url']}", request),
        "response": message_text(status, response) if response else ("none",),
    }


def tiles(webhook: dict) -> dict[str, str]:
    """The figures of a webhook with its statistics, by label."""
    counts = list(webhook["statistics"]["counts"].values())[:3]
    figures = (sum(counts), *counts[1:], webhook["health"]["pending"])
    labels = ("Attempts", "Failures", "Errors", "Waiting")
    rate = {"Success, 30 days": success_rate(dict(zip(OUTCOMES, counts)))}
    return rate | {label: f"{figure:,}" for label, figure in zip(labels, figures)}


def chart(attempts_by_day: dict[int, collections.Counter], today: int) -> dict:
    """The chart of attempts by day, counted since 1970, and outcome.

    A bar has a tone, x, y, height and a title."""
    days = {day: attempts_by_day[day] for day in range(today - STATISTICS_DAYS, today + 1)}
    bars, most = [], max(1, *(counts.total() for counts in days.values()))
    names = [utc(day * DAY_MS, "%-d %b") for day in days]
    for x, counts in enumerate(days.values()):
        y = most
        for outcome in filter(counts.get, OUTCOMES):
            y -= counts[outcome]
            title = f"{names[x]}: {counts[outcome]:,} {outcome}"
            bars.append((TONES[outcome], x, y, counts[outcome], title))
    total = sum(days.values(), collections.Counter())
    words = ("succeeded", "failed", "without an answer")
    legend = [(TONES[o], f"{total[o]:,} {word}") for o, word in zip(OUTCOMES, words)]
    return {"bars": bars, "most": most, "names": names, "legend": legend}


def settings_in_words(webhook: dict) -> dict[str, str]:
    """The settings of a webhook except its URL; the rarer ones only if they are set."""
    limit, login = webhook["rateLimit"], webhook["credentials"]
    settings = {
        "Events": ", ".join(webhook["events"]),
        "Signed": "yes, with its secret" if webhook["secretSet"] else "no, it has no secret",
        "Login": login and f"{login['username']} (password hidden)",
        "Headers": ", ".join(webhook["headers"]),
        "Filters": form_json(webhook["filters"]),
        "Template": form_json(webhook["template"]),
        "Ordered": webhook["ordered"] and "one delivery at a time, in publish order",
        "Rate limit": limit and f"{limit:g} a second",
        "TLS": "" if webhook["sslVerificationRequired"] else "certificates are not verified",
        "Configuration": form_json(webhook["configuration"]),
    }
    return {label: text for label, text in settings.items() if text}


def buttons(webhook: dict) -> list[str]:
    """The labels of what can be done with a webhook; first what its state calls for."""
    health, is_active = webhook["health"], webhook["active"]
    calls = {"paused": "Resume", "inactive": "Activate", "disabled": "Activate"}
    held = ["Resume"] if webhook["paused"] or health["pausedUntil"] else []
    labels = [calls.get(health["state"], "Test"), "Test", "Edit", *held]
    labels += [] if webhook["paused"] else ["Pause"]
    labels += ["Deactivate" if is_active else "Activate", "Redeliver failed", "Replay"]
    return list(dict.fromkeys(labels))


FILTERS = {  # a field's label, what it can be, and an example
    "state": ("State", (PENDING, SUCCEEDED, FAILED), ""),
    "outcome": ("Outcome", OUTCOMES, ""),
    "event": ("Event", (), "page_created"),
    "since": ("Since", (), "2h, 3d or a date"),
    "until": ("Until", (), "2026-11-26 14:00"),
    "where": ("Where", (), "user.id:42"),
}

DELIVERY_FILTERS = ("state", "outcome", "event", "since", "until")
EVENT_FILTERS = ("event", "since", "until", "where")

# ---- the form of a webhook: its fields have the API's names ----

FIELDS = {  # label, lines (0: a password), hint
    "name": ("Name", 1, "What people call it. Empty: the scheme and host of its URL."),
    "url": ("URL", 1, "Where deliveries are posted to."),
    "events": ("Events", 4, "One per line or comma-separated. * is every event, page_* a prefix."),
    "secret": ("Secret", 1, "Signs every delivery. Copy a new one now: it is not shown again."),
    "username": ("User name", 1, "For Basic authentication at the receiver."),
    "password": ("Password", 0, "Empty: the one that is set stays."),
    "headers": ("Headers", 3, f"One per line, as X-Token: abc. {MASK} stands for what is set."),
    "filters": ("Filters", 3, 'Only such events, as JSON: {"space.key": "DEV", "page.id": [1, 2]}'),
    "template": ("Template", 3, 'The body to send, as JSON: {"text": "{{host}} is down"}'),
    "rateLimit": ("Rate limit", 1, "Deliveries per second. Empty: no limit."),
}
FOLDED = ("username", "password", "headers", "filters", "template", "rateLimit")
CONFLUENCE_EVENTS = (
    "attachment_created, attachment_removed, attachment_restored, attachment_trashed, "
    "attachment_updated, blog_created, blog_removed, blog_restored, blog_trashed, blog_updated, "
    "blueprint_page_created, comment_created, comment_removed, comment_updated, content_created, "
    "content_permissions_updated, content_restored, content_trashed, content_updated, "
    "group_created, group_removed, label_added, label_created, label_deleted, label_removed, "
    "page_children_reordered, page_created, page_moved, page_removed, page_restored, page_trashed, "
    "page_updated, space_created, space_logo_updated, space_permissions_updated, space_removed, "
    "space_updated, theme_enabled, user_created, user_deactivated, user_followed, "
    "user_reactivated, user_removed"
)
BOXES = {"active": "Active", "ordered": "Ordered", "sslVerificationRequired": "Verify TLS"}


def form_of(webhook: Webhook) -> dict[str, str]:
    """The fields of a webhook's form; that of a new one has a secret, which is seen once."""
    form = webhook.as_json(whole_url=True) | {"events": "\n".join(webhook.events)}
    if not webhook.id:
        form["secret"] = f"whsec_{base64.b64encode(secrets.token_bytes(24)).decode()}"
    form |= form["credentials"] or {}
    form["headers"] = header_lines(form["headers"]).replace("\r", "")
    return form | {name: form_json(form[name]) for name in ("filters", "template", "rateLimit")}


def header_values(text: str) -> dict[str, str]:
    """The headers of lines like `Name: value`; raises Invalid."""
    headers = {}
    for line in filter(str.strip, text.splitlines()):
        name, colon, value = line.partition(":")
        require(colon, f"{line.strip()[:80]} is not of the form Name: value")
        require(name.strip() not in headers, f"{name.strip()} is there twice")
        headers[name.strip()] = value.strip()
    return headers


def json_field(text: str) -> object:
    """The JSON value of a field; raises Invalid."""
    try:
        return json_object(json_bytes({"value": json_value(text)}))["value"]
    except Invalid as error:
        raise Invalid(str(error).replace("the body", "what stands here")) from None


def form_fields(form: dict[str, str], old: Webhook) -> tuple[dict, list[Fault]]:
    """The fields of the API that a form changes, and the faults of those that cannot be read."""
    fields, faults = {box: box in form for box in BOXES}, []
    fields |= {name: form.get(name, "").strip() for name in ("name", "url")}
    names = map(str.strip, re.split(r"[\n,]", form.get("events", "")))
    fields["events"] = list(filter(None, names))
    login = {name: form[name] for name in ("username", "password") if form.get(name)}
    unset = {"username": "", "password": ""} if not old.credentials else {"username": ""}
    fields["credentials"] = unset | login if login else None
    if form.get("secret") or "removeSecret" in form:
        fields["configuration"] = {"secret": form.get("secret") or None}
    for name, parse, nothing in (
        ("headers", header_values, {}),
        ("filters", json_field, {}),
        ("template", json_field, None),
        ("rateLimit", json_field, None),
    ):
        try:
            fields[name] = parse(form[name]) if form.get(name, "").strip() else nothing
        except Invalid as error:
            faults += [fault.within(name) for fault in error.faults]
    before = old.as_json(whole_url=True)
    return {k: v for k, v in fields.items() if k not in before or v != before[k]}, faults


def form_view(form: dict[str, str], faults: dict[str, list[str]]) -> dict:
    """What the page of a form needs: its fields and their faults."""
    wrong = [name for name in FIELDS if faults.get(name)]
    to_mend = f": {counted(len(wrong), 'field')} to mend" if wrong else ""
    is_unusual = form.get("ordered") or not form.get("sslVerificationRequired")
    rows = {name: (*FIELDS[name], form.get(name) or "") for name in FIELDS}
    return {
        "rows": {name: (*row, "; ".join(faults.get(name, ()))) for name, row in rows.items()},
        "heading": f"Nothing was saved{to_mend}." if faults else "",
        "fault": "; ".join(faults.get("", ())),
        "first": wrong[0] if wrong else None,
        "unfolded": is_unusual or any(form.get(n) or n in wrong for n in FOLDED),
    }


def stale_words(fields: dict) -> str:
    """What the page says of a form that was opened before somebody else's change."""
    words = "somebody has changed this webhook since the form was opened; what differs from it now"
    return f"{words}: {', '.join(fields) or 'nothing'}. Save once more to have it so"


def all_faults(
    faults: list[Fault], fields: dict, old: Webhook, check_url: collections.abc.Callable
) -> list[Fault]:
    """The faults of a form's fields: those that cannot be read, and those that Api refuses."""
    try:
        read_webhook(fields, old, check_url)
    except Invalid as error:
        return faults + error.faults
    return faults


def faults_by_field(faults: list[Fault]) -> dict[str, list[str]]:
    """The messages for each field of the form; those for "" are about none of them."""
    by_field = collections.defaultdict(list)
    for fault in faults:
        name, _, inner = (fault.context or "").partition(".")
        if name in ("configuration", "credentials"):
            name, inner = inner or "username", ""
        by_field[name].append(f"{inner}: {fault.message}" if inner else fault.message)
    return by_field


# ======================================================================================
# Pages: the administration in a browser, and the start page for curl
# ======================================================================================

FORM_TYPE = "application/x-www-form-urlencoded"
ROWS_PER_PAGE = 50  # of deliveries and of events
MAX_SENT_FORMS = 1000  # that are remembered
MAX_SHOWN_ATTEMPTS = 20  # of a delivery, the last ones

# ---- templates ----

STYLE = """
:root { color-scheme: light dark; accent-color: var(--link); --page: light-dark(#f5f6f8, #0f1317);
  --card: light-dark(#ffffff, #171c22); --line: light-dark(#dce0e6, #2b333c); --edge:
  light-dark(#7f8994, #717c88); --ink: light-dark(#1a1f25, #e4e8ec); --soft: light-dark(#535d68,
  #a0abb6); --link: light-dark(#1d52bf, #8db4ff); --on-link: light-dark(#ffffff, #0b1526); }
.good { --text: light-dark(#11602d, #78d793); --fill: light-dark(#2c9a57, #3fae68); }
.warn { --text: light-dark(#774700, #f2c06a); --fill: light-dark(#c98100, #d99c2f); }
.bad { --text: light-dark(#a31b13, #ff9f96); --fill: light-dark(#d0473d, #e0675d); }
.wait { --text: light-dark(#274a9f, #a8c3ff); --fill: light-dark(#5b82dd, #7ea3f0); }
.idle { --text: light-dark(#4a535d, #b3bdc7); --fill: light-dark(#7f8994, #8b96a1); }
* { box-sizing: border-box; margin: 0; }
body { background: var(--page); color: var(--ink); overflow-wrap: anywhere; font: 0.9375rem/1.5
  system-ui, sans-serif; font-variant-numeric: tabular-nums; }
a, code, small, span, strong { unicode-bidi: isolate; }
header, main { padding: 0 max(1rem, 50% - 36rem); } main { padding-block: 2rem 4rem; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { margin: 2rem 0 0.75rem; font-size: 1.0625rem; }
.card > h2, .pair h2, main > .row:first-child { margin-top: 0; }
small, th, h3, label.soft, .tag, .chart { font-size: 0.8125rem; }
small, th, h3, dt, .soft { color: var(--soft); font-weight: 400; }
code, pre, .code { font: 0.8125rem/1.55 ui-monospace, Menlo, Consolas, monospace; }
a { color: var(--link); } td > a:not(:hover) { text-decoration: none; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.skip:not(:focus) { position: absolute; left: -100rem; }
.row, .filter, header, nav { display: flex; flex-wrap: wrap; align-items: center; gap: 0.5rem
  0.75rem; }
.row, .filter, .note, .pair, .field, details { margin: 1rem 0; } .end { margin-left: auto; }
.note > .row { margin: 0.75rem 0 0.25rem; }
header { background: var(--card); border-bottom: 1px solid var(--line); }
header, header nav { column-gap: 1.5rem; } header img { vertical-align: -0.25rem; }
header a { padding: 0.875rem 0 0.6875rem; border-bottom: 3px solid transparent; color: inherit;
  text-decoration: none; }
header [aria-current] { border-color: var(--link); font-weight: 600; }
button, input, select, textarea, .chip { padding: 0.375rem 0.75rem; max-width: 100%; font: inherit;
  color: var(--ink); background: var(--card); border: 1px solid var(--edge); border-radius: 6px; }
button { font-weight: 500; cursor: pointer; } button:hover { border-color: var(--ink); }
.main { background: var(--link); border-color: var(--link); color: var(--on-link); }
.chip { padding-block: 0.125rem; border-radius: 1rem; text-decoration: none; }
.chip:not(:hover, [aria-current]) { border-color: var(--line); }
.chip[aria-current] { border-color: var(--link); font-weight: 600; }
.tag { padding: 0.125rem 0.625rem 0.1875rem; border-radius: 1rem; white-space: nowrap; }
.note { padding: 0.75rem 1rem; border-left: 4px solid var(--fill); border-radius: 6px; }
.tag, .note { background: color-mix(in srgb, var(--fill) 15%, var(--card)); }
.tag, .fault, .note > :first-child, button.bad { color: var(--text); }
.tag, .fault, .note > :first-child, .field > label, .tiles dd { font-weight: 600; }
.tag::before, .dot { content: ""; display: inline-block; width: 0.5rem; height: 0.5rem;
  margin-right: 0.375rem; border-radius: 50%; background: var(--fill); }
table, .card { width: 100%; background: var(--card); border: 1px solid var(--line); border-radius:
  8px; border-spacing: 0; }
th, td { padding: 0.4375rem 1rem 0.4375rem 0; text-align: left; vertical-align: top; }
th:first-child, td:first-child { padding-left: 1rem; min-width: 9rem; }
td { border-top: 1px solid var(--line); } tbody tr:hover, pre { background: var(--page); }
th, time, .number { white-space: nowrap; } .number { text-align: right; padding-right: 1.5rem; }
tr[class] > :first-child { box-shadow: inset 3px 0 var(--fill); }
.card, pre { padding: 0.875rem 1rem; }
pre { white-space: pre-wrap; border: 1px solid var(--line); border-radius: 6px; }
* + pre, pre + :not(h2) { margin-top: 0.5rem; }
.tiles { display: flex; flex-wrap: wrap; gap: 1px; padding: 0; overflow: hidden; }
.tiles > div { flex: 1 1 9rem; padding: 0.625rem 1rem; outline: 1px solid var(--line); }
.tiles dd { font-size: 1.25rem; line-height: 1.3; } .tiles small { display: block; }
.facts, .pair, .chart { display: grid; gap: 0.25rem 1rem; }
.facts { grid-template-columns: max-content 1fr; }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); row-gap: 1rem; }
.pair > * { min-width: 0; } .chart { grid-template-columns: auto 1fr auto; column-gap: 0.5rem; }
.chart svg { grid-column: 2 / 4; width: 100%; height: 7rem; border-bottom: 1px solid var(--edge); }
figcaption { grid-column: 1 / 4; display: flex; flex-wrap: wrap; gap: 0 1rem; }
rect { fill: var(--fill); stroke: var(--fill); vector-effect: non-scaling-stroke; }
summary { cursor: pointer; } [open] > summary { margin-bottom: 0.75rem; }
.filter { align-items: end; } .filter :is(input, select) { height: 2.25rem; }
.sheet { max-width: 44rem; } .field :is(input, textarea) { width: 100%; }
.field > :is(input, textarea, small), label.soft, .under, .thin { display: block; }
.field.bad { padding-left: 0.75rem; border-left: 4px solid var(--fill); }
[aria-invalid] { border-color: var(--fill); } @media (min-width: 45rem) { .thin { display: none; } }
@media (max-width: 45rem) { .wide { display: none; } header { padding-top: 0.625rem; } header a {
  padding-top: 0.375rem; } header nav { order: 1; flex-basis: 100%; } button { padding-block:
  0.5rem; } .filter > *, .filter :is(input, select) { flex: 1 1 8rem; width: 100%; } .facts {
  grid-template-columns: 1fr; } .facts dd { margin-bottom: 0.375rem; } }
"""
ICON = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7"
fill="#1d52bf"/><path fill="none" stroke="#fff" stroke-width="3" stroke-linecap="round"
d="M16 9v8a5 5 0 1 1-7.500-4.300M16 20h7"/><g fill="#fff"><circle cx="16" cy="7" r="3"/>
<circle cx="24" cy="20" r="3"/></g></svg>
"""
_style_digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
PAGE_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": "default-src 'none'; img-src 'self';"
    f" style-src 'sha256-{_style_digest}'; form-action 'self';"
    " frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    # with no-referrer Chromium would send the forms as from nowhere: Origin: null
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}


HELPERS = {  # all that a template sees beside the values of its page
    "style": STYLE,
    "version": VERSION,
    "tones": TONES,
    "tag": tag,
    "relative": relative,
    "counted": counted,
    "boxes": BOXES,
    "folded": FOLDED,
    "filters": FILTERS,
    "event_filters": EVENT_FILTERS,
    "delivery_filters": DELIVERY_FILTERS,
    "confluence_events": CONFLUENCE_EVENTS,
}

_PARTS = """\
% def top(title, section="Webhooks"):
<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}} – webhookd</title><link rel="icon" type="image/svg+xml" href="/favicon.ico">
<style>{{!style}}</style></head>
<body><a class="skip" href="#main">Skip to content</a>
<header><strong><img src="/favicon.ico" width="20" height="20" alt=""> webhookd <small>{{version}}</small></strong>
<nav aria-label="Main">
<a href="/" {{!'aria-current="page"' if section == "Webhooks" else ""}}>Webhooks</a>
<a href="/events" {{!'aria-current="page"' if section == "Events" else ""}}>Events</a>
</nav><p class="end">{{user.name if user else ""}} <small>{{f"({user.role})" if user else ""}}</small></p></header>
<main id="main" tabindex="-1">
% end
% def button(label, path, kind="", asks=False, **sent):
<form action="{{path}}" {{!"" if asks else 'method="post"'}}>
% for name, value in {} if asks else ({"token": token} | sent).items():
<input type="hidden" name="{{name}}" value="{{value}}">
% end
<button class="{{kind}}">{{label}}</button></form>
% end
% def note(tone, heading, text="", role="status"):
% if heading:
<div class="note {{tone}}" role="{{role}}"><p>{{heading}}</p><p>{{text}}</p></div>
% end
% end
% def replay(number, words, path, since, kind=""):
<div class="note wait" role="status"><p>{{counted(number, "event was", "events were")}} published {{words}} and not delivered.</p>
<div class="row">
% button(f"Replay {counted(number, 'event')}", f"{path}/replay", kind, since=since, until=now)
</div></div>
% end
% def kept_by(path, *names):
<form class="filter" action="{{path}}">
% for name in names:
% label, options, example = filters[name]
<div><label class="soft" for="by-{{name}}">{{label}}</label>
% if options:
<select id="by-{{name}}" name="{{name}}"><option value="">any</option>
% for option in options:
<option value="{{option}}" {{"selected" if option == asked.get(name) else ""}}>{{option.lower()}}</option>
% end
</select></div>
% else:
<input id="by-{{name}}" name="{{name}}" size="14" value="{{asked.get(name, "")}}" placeholder="{{example}}"></div>
% end
% end
<div><button>Show</button></div></form>
% end
% def table(*heads):
<table><thead><tr>
% for head, kind in heads:
<th scope="col" class="{{kind}}">{{head}}</th>
% end
</tr></thead><tbody>
% end
% def deliveries(rows, first):
% table((first, ""), ("Published", "wide"), ("State", ""), ("Attempts", "number wide"), ("Last attempt", "wide"), ("Next attempt", "wide"))
% for row in rows:
<tr><td><a href="/deliveries/{{row["id"]}}">{{row[first.lower()]}}</a> <small class="thin">{{relative(row["created"], now)}}</small></td><td class="wide">
{{!moment(row["created"])}}</td><td>{{!tag(row["state"])}}
<small>{{row["description"] or ""}}</small> <small class="thin">{{row["waits"] or row["next"] and f"next {relative(row['next'], now)}" or ""}}</small></td>
<td class="number wide">{{row["attempt_count"]}}</td><td class="wide">{{!moment(row["last"])}}
<small>{{f"{row['duration']}\xa0ms" if row["last"] else ""}}</small></td><td class="wide">{{row["waits"]}}
{{!moment(row["next"])}}</td></tr>
% end
</tbody></table>
% end
% def neighbours():
<p class="row {{"" if rows else "card"}}"><span class="soft">{{part}}</span>
% for label, link in links.items():
<a href="{{link}}#list">{{label}}</a>
% end
</p>
% end
% def exchange(level, *sides):
<div class="pair">
% for name, texts in sides:
<div><{{level}}>{{name}}</{{level}}>
% for text in filter(None, texts):
<pre>{{text}}</pre>
% end
</div>
% end
</div>
% end
"""  # noqa: E501


def page_template(main: str) -> bottle.SimpleTemplate:
    """The template of a page, which begins with a call of top()."""
    return bottle.SimpleTemplate(_PARTS + main + "</main></body></html>\n")


ERROR_PAGE = page_template("""\
% top(title, "")
<div class="row"><h1>{{title}}</h1></div>
% note("bad", text, role="alert")
""")

LIST_PAGE = page_template("""\
% top(title)
<div class="row"><h1>Webhooks</h1><div class="end">
% button("New webhook", "/webhooks/new", "main", asks=True) if may_change else None
</div></div>
% if not states:
<div class="card"><p><strong>No webhooks yet.</strong>
A webhook says where events go: it has a name, a URL and the events that it is for. With curl:</p>
<pre>curl -u admin {{url}}/rest/api/webhooks --json '{"url": "https://example.com/hook", "events": ["page_created"]}'</pre>
<p>Then publish the first event:</p>
<pre>curl -u admin {{url}}/rest/api/events --json '{"event": "page_created", "page": {"id": 1015809}}'</pre></div>
% else:
<p>{{attention}}</p>
<nav class="row" aria-label="By state" id="list">
<a class="chip" href="/" {{!"" if kept else 'aria-current="page"'}}>All {{sum(states.values())}}</a>
% for state, number in states.items():
<a class="chip" href="/?state={{state}}" {{!'aria-current="page"' if state in kept else ""}}><span class="dot {{tones[state]}}"></span>{{number}} {{state}}</a>
% end
</nav>
% table(("Webhook", ""), ("State", ""), ("Last attempt", "wide"), ("Success, 30 d", "number wide"), ("Waiting", "number wide"))
% for row in rows:
<tr {{!f'class="{row["tone"]}"' if row["tone"] else ""}}><td><a href="/webhooks/{{row["id"]}}"><strong>{{row["name"]}}</strong></a>
<small class="under">{{row["host"]}} · <span title="{{", ".join(row["events"])}}">{{row["some"]}}</span></small>
<small class="thin">{{row["rate"]}} · {{f"{row['pending']:,}"}} waiting</small></td><td>{{!tag(row["state"])}}
% for reason in row["reasons"]:
<small class="under">{{reason}}</small>
% end
<small class="thin">{{relative(row["lastAttempt"], now) if row["lastAttempt"] else "never"}}</small></td><td class="wide">
{{!moment(row["lastAttempt"], "never")}}</td><td class="number wide">{{row["rate"]}}</td><td class="number wide">{{f"{row['pending']:,}"}}</td></tr>
% end
</tbody></table>
% neighbours()
% end
""")  # noqa: E501

FORM_PAGE = page_template("""\
% title = f"Edit {old.name}" if old.id else "New webhook"
% top(title)
% def field(name):
% label, lines, hint, value, wrong = rows[name]
% shared = f'id="{name}" name="{name}" aria-describedby="{name}-hint {name}-fault" spellcheck="false"'
% shared += ' class="code"' if name in ("url", "events", "secret", *folded[2:5]) else ""
% shared += ' aria-invalid="true"' if wrong else ""
% shared += " autofocus" if name == first else ""
<div class="field {{"bad" if wrong else ""}}"><label for="{{name}}">{{label}}</label>
<small id="{{name}}-hint">{{hint}}</small> <span class="fault" id="{{name}}-fault">{{wrong}}</span>
% if lines > 1:
<textarea rows="{{max(lines, value.count(chr(10)) + 2)}}" {{!shared}}>
{{value}}</textarea></div>
% else:
<input type="{{"text" if lines else "password"}}" value="{{value}}" autocomplete="{{"off" if lines else "new-password"}}" {{!shared}}></div>
% end
% end
% def box(name, label, hint=""):
<p><input type="checkbox" id="{{name}}" name="{{name}}" {{"checked" if form.get(name) else ""}}>
<label for="{{name}}">{{label}}</label> <small>{{hint}}</small></p>
% end
<div class="row"><h1>{{title}}</h1></div><div class="sheet">
% note("bad", heading, fault, "alert")
<form method="post"><input type="hidden" name="token" value="{{token}}"><input type="hidden" name="once" value="{{once}}">
<input type="hidden" name="updatedDate" value="{{old.updated}}">
% field("name")
% field("url")
% field("events")
<details><summary>Confluence's event names</summary>
<small>{{confluence_events}}</small></details>
% field("secret")
% box("removeSecret", "Remove the secret", "If the field is left empty, it stays.") if old.secret else None
% box("active", boxes["active"], "An inactive webhook gets no new deliveries.")
<details class="card" {{"open" if unfolded else ""}}><summary><strong>More</strong>
<span class="soft">credentials, headers, filters, template, order, rate, TLS</span></summary>
% for name in folded:
% field(name)
% end
% box("ordered", boxes["ordered"], "One delivery at a time, in publish order.")
% box("sslVerificationRequired", boxes["sslVerificationRequired"])
</details>
<p class="row"><button class="main">{{"Save" if old.id else "Create"}}</button>
<a href="{{f"/webhooks/{old.id}" if old.id else "/"}}">Cancel</a></p></form></div>
""")  # noqa: E501

WEBHOOK_PAGE = page_template("""\
% state, path, name = webhook["health"]["state"], f"/webhooks/{webhook['id']}", webhook["name"]
% top(f"{name} ({state})")
<div class="row"><h1>{{name}}</h1> {{!tag(state)}}</div>
% note("good", told)
% note(tones[state], *words, role="note")
% replay(missed, "meanwhile", path, missed_since) if missed else None
% if may_change:
<div class="row">
% for number, label in enumerate(buttons):
% act = label.split()[0].lower()
% button(label, f"{path}/{act}", "" if number else "main", asks=act in ("edit", "replay"))
% end
<div class="end">
% button("Delete", f"{path}/delete", "bad", asks=True)
</div></div>
% end
<dl class="tiles card">
% for label, figure in tiles.items():
<div><dt>{{label}}</dt><dd>{{figure}}</dd></div>
% end
<div><dt>Last attempt</dt><dd>{{!moment(webhook["health"]["lastAttempt"], "never", beside=True)}}</dd></div></dl>
<div class="pair"><section class="card"><h2>Attempts a day</h2>
<figure class="chart soft"><span>{{f"{chart['most']:,}"}}</span>
<svg viewBox="0 0 {{len(chart["names"])}} {{chart["most"]}}" preserveAspectRatio="none" role="img"
aria-label="At most {{chart["most"]}} attempts a day. {{"; ".join(bar[-1] for bar in chart["bars"])}}">
% for tone, x, y, height, title in chart["bars"]:
<rect class="{{tone}}" x="{{x}}.1" y="{{y}}" width="0.8" height="{{height}}"><title>{{title}}</title></rect>
% end
</svg><span></span><span>{{chart["names"][0]}}</span><span>{{chart["names"][-1]}}</span>
<figcaption><span>At most {{f"{chart['most']:,}"}} a day</span>
% for tone, text in chart["legend"]:
<span><span class="dot {{tone}}"></span>{{text}}</span>
% end
</figcaption></figure>
</section><section class="card"><h2>Settings</h2>
<dl class="facts"><dt>URL</dt><dd><code>{{webhook["url"]}}</code></dd>
% for label, text in settings.items():
<dt>{{label}}</dt><dd><span>{{text}}</span></dd>
% end
<dt>Created</dt><dd>{{!moment(webhook["createdDate"], beside=True)}}</dd><dt>Changed</dt><dd>
{{!moment(webhook["updatedDate"], beside=True)}}</dd></dl></section></div>
<h2 id="list">Deliveries</h2>
% kept_by(f"{path}#list", *delivery_filters)
% deliveries(rows, "Event") if rows else None
% neighbours()
""")  # noqa: E501

DELIVERY_PAGE = page_template("""\
% top(f"Delivery of {delivery.event} ({delivery.state})", "Events")
<div class="row"><h1>Delivery of {{delivery.event}}</h1> {{!tag(delivery.state)}}</div>
% note(tones[delivery.state], *words, role="note")
<div class="row">
% act = "Attempt now" if delivery.state == "pending" else "Redeliver"
% button(act, f"/deliveries/{delivery.id}/redeliver", "main") if may_change else None
</div>
<dl class="facts card"><dt>Webhook</dt><dd><a href="/webhooks/{{webhook["id"]}}">{{webhook["name"]}}</a>
{{!tag(webhook["health"]["state"])}}
</dd><dt>Event</dt><dd><a href="/events/{{delivery.event_id}}">{{delivery.event}} #{{delivery.event_id}}</a></dd>
<dt>Delivery</dt><dd><code>{{delivery.id}}</code></dd><dt>Made</dt><dd>{{!moment(delivery.created, beside=True)}}
</dd></dl>
<h2>{{counted(delivery.attempt_count, "attempt")}}{{f", the last {len(attempts)} are here" if len(attempts) < delivery.attempt_count else ""}}</h2>
% for number, attempt, code, why, request, response in attempts:
<details class="card" {{"open" if number == delivery.attempt_count else ""}}><summary><strong>Attempt {{number}}</strong>
{{!tag(attempt.outcome, code)}} {{why}} <span class="soft">{{attempt.duration}} ms ·</span>
{{!moment(attempt.start, beside=True)}}</summary>
% exchange("h3", ("Request", request), ("Response", response))
</details>
% end
% if curl:
<h2>Repeat it with curl</h2>
<pre>{{curl}}</pre>
% end
""")  # noqa: E501

TEST_PAGE = page_template("""\
% top(f"Test of {webhook.name}")
<div class="row"><h1>Test of <a href="/webhooks/{{webhook.id}}">{{webhook.name}}</a></h1></div>
% note(tone, verdict, text)
<div class="row">
% button("Test again", f"/webhooks/{webhook.id}/test", "main")
</div>
% exchange("h2", ("Sent", request), ("Answered", response))
""")

REPLAY_PAGE = page_template("""\
% top(f"Replay to {webhook.name}")
<div class="row"><h1>Replay to <a href="{{path}}">{{webhook.name}}</a></h1></div>
<p>Sends the events that it is for and never got: those published before it was made, or while it was off.</p>
<form class="filter"><div><label class="soft" for="since">Since</label>
<input id="since" name="since" size="24" value="{{since}}" aria-describedby="fault" {{!'aria-invalid="true"' if fault else ""}}></div>
<div><button class="{{"" if matched else "main"}}">Count</button></div></form>
<p class="fault bad" id="fault">{{fault}}</p>
% replay(matched, "since", path, since_ms, "main") if matched else None
% note("idle", "It has got every event since that it is for." if matched == 0 else "")
""")  # noqa: E501

DELETE_PAGE = page_template("""\
% top(f"Delete {what}?", "Events" if path.startswith("/events") else "Webhooks")
<div class="row"><h1>Delete {{what}}?</h1></div>
<p>{{text}} This cannot be undone.</p>
<div class="row">
% button("Delete", f"{path}/delete", "bad")
<a href="{{path}}">Keep it</a></div>
""")

EVENTS_PAGE = page_template("""\
% top("Events", "Events")
<div class="row"><h1>Events</h1></div>
% kept_by("/events", *event_filters)
% if rows:
% table(("Event", ""), ("Published", "wide"), ("Deliveries", ""))
% for event, states in rows:
<tr><td><a href="/events/{{event.id}}">{{event.name}} <small>#{{event.id}}</small></a>
<small class="thin">{{relative(event.timestamp, now)}}</small></td><td class="wide">{{!moment(event.timestamp)}}
</td><td>
% for state, number in states.items():
{{!tag(state, f"{number:,} {'waiting' if state == 'pending' else state}")}}
% end
<span class="soft">{{"" if states else "no webhook wanted it"}}</span></td></tr>
% end
</tbody></table>
% end
% neighbours()
""")  # noqa: E501

EVENT_PAGE = page_template("""\
% top(f"{event.name} #{event.id}", "Events")
<div class="row"><h1>{{event.name}} <span class="soft">#{{event.id}}</span></h1><p class="soft">published
{{!moment(event.timestamp, beside=True)}}</p></div>
% if may_change:
<div class="row">
% button("Redeliver", f"/events/{event.id}/redeliver", "main") if rows else None
<div class="end">
% button("Delete", f"/events/{event.id}/delete", "bad", asks=True)
</div></div>
% end
<h2>Payload</h2>
<pre>{{payload}}</pre>
<h2>{{counted(len(rows), "delivery", "deliveries")}}</h2>
% deliveries(rows, "Webhook") if rows else None
<p class="{{"soft" if rows else "card"}}">{{"" if rows else "No webhook wanted it."}}</p>
""")  # noqa: E501

# ---- the pages ----


def form_token(user: User) -> str:
    """A secret in all forms of a user, which no other site can know."""
    return hmac.digest(user.record.encode(), b"form", "sha256").hex()


class Pages:
    """The pages: routes beside those of an Api, whose methods do all the work."""

    def __init__(self, api: Api, store: Store, address_policy: AddressPolicy):
        self._api, self._store, self._address_policy = api, store, address_policy
        self._saving = threading.Lock()  # guards the next, and saves one form at a time
        self._sent_forms = LimitedDict(MAX_SENT_FORMS)  # digest and Webhook by `once`
        self._render_json, api.render_error = api.render_error, self._render_error
        hook, delivery, event = "/webhooks/<id:id>", "/deliveries/<uuid>", "/events/<id:id>"
        states = "/<act:re:pause|resume|activate|deactivate>"
        for method, path, handler, roles in (
            ("GET", "/", self.show_start, ANYBODY),
            ("GET", "/favicon.ico", self.show_icon, ANYBODY),
            ("GET", hook, self.show_webhook, READERS),
            ("GET", delivery, self.show_delivery, READERS),
            ("GET", "/events", self.show_events, READERS),
            ("GET", event, self.show_event, READERS),
            ("GET", "/webhooks/new", self.show_form, ADMINS),
            ("POST", "/webhooks/new", self.submit_form, ADMINS),
            ("GET", hook + "/edit", self.show_form, ADMINS),
            ("POST", hook + "/edit", self.submit_form, ADMINS),
            ("GET", hook + "/delete", self.show_delete, ADMINS),
            ("POST", hook + "/delete", self.submit_delete, ADMINS),
            ("POST", hook + "/test", self.submit_test, ADMINS),
            ("POST", hook + states, self.submit_state, ADMINS),
            ("POST", hook + "/redeliver", self.submit_redeliver_failed, ADMINS),
            ("GET", hook + "/replay", self.show_replay, ADMINS),
            ("POST", hook + "/replay", self.submit_replay, ADMINS),
            ("POST", delivery + "/redeliver", self.submit_redeliver, ADMINS),
            ("POST", event + "/redeliver", self.submit_redeliver_event, ADMINS),
            ("GET", event + "/delete", self.show_delete_event, ADMINS),
            ("POST", event + "/delete", self.submit_delete_event, ADMINS),
        ):
            checks = [self._with_form] if method == "POST" else []
            api.app.route(path, method, handler, apply=checks, roles=roles)

    # ---- what they share ----

    @staticmethod
    def _may_change():
        user = current_user()
        return user is not None and user.role in ADMINS

    def _page(self, template, status=200, **values):
        bottle.response.status = status
        bottle.response.headers.update(PAGE_HEADERS)
        user, now = current_user(), self._api.now_ms()
        shared = {"user": user, "token": user and form_token(user), "now": now}
        shared |= {"may_change": self._may_change(), "moment": functools.partial(moment, now)}
        return template.render(HELPERS, shared, values)

    def _render_error(self, status, faults):
        path = bottle.request.path
        is_page = path.startswith(("/webhooks", "/deliveries", "/events")) or self._wants_html()
        if path.startswith("/rest/") or not is_page:
            return self._render_json(status, faults)
        title, text = http.HTTPStatus(status).phrase, "; ".join(map(str, faults))
        return self._page(ERROR_PAGE, status, title=title, text=text)

    @staticmethod
    def _wants_html():
        return "text/html" in bottle.request.environ.get("HTTP_ACCEPT", "").lower()

    @staticmethod
    def _see(path, **query):
        bottle.response.status = 303
        encoded = urllib.parse.urlencode({k: v for k, v in query.items() if v is not None})
        bottle.response.headers["Location"] = path + (f"?{encoded}" if encoded else "")

    def _with_form(self, handler):
        """A plugin: calls the handler if the form comes from one of our pages."""

        def checked(**arguments):
            form = bottle.request.environ[FORM] = self._form()
            sent, token = form.get("token", ""), form_token(current_user())
            if not hmac.compare_digest(sent.encode(), token.encode()):
                raise Forbidden("the form is out of date: go back and reload its page")
            return handler(**arguments)

        return checked

    def _form(self):
        """The fields that were sent, without those that are empty."""
        if bottle.request.content_length <= 0:
            return {}
        if bottle.request.content_type.partition(";")[0].strip().lower() != FORM_TYPE:
            raise WrongMediaType(f"a form must be sent as {FORM_TYPE}")
        try:
            text = self._api.body(FORM_TYPE).decode()
            return dict(urllib.parse.parse_qsl(text, errors="strict", max_num_fields=100))
        except ValueError:
            raise Invalid("the form is malformed") from None

    def _list(self, page, total, noun, plural="", more=None):
        """What a page needs to show a part of a list; more: as EventsPage has it."""
        query, starts = self._api.query(), page.neighbours(total or 0)
        links = {
            label: "?" + urllib.parse.urlencode(query | {"start": starts[name]}, True)
            for name, label in (("prev", "Previous"), ("next", "Next"))
            if name in starts
        }
        links |= {"Next": "?" + urllib.parse.urlencode(query | more, True)} if more else {}
        asked = {n: v[0] if isinstance(v, list) else v for n, v in query.items()}
        of_all = "is like that" if asked.keys() & FILTERS.keys() else "yet"
        part = f"No {noun} {of_all}." if total == 0 else part_words(page, total, noun, plural)
        return {"links": links, "part": part, "asked": asked}

    def _webhook(self, id, **options):
        return self._api.webhooks_as_json([self._store.webhooks.get(id)], **options)[0]

    # ---- reading ----

    def show_start(self):
        bottle.response.headers["Vary"] = "Accept"
        if self._wants_html():
            self._api.log_in(READERS)
            return self.show_webhooks()
        bottle.response.headers.update(PAGE_HEADERS)
        bottle.response.content_type = "text/plain; charset=utf-8"
        return CURL_PAGE.format(version=VERSION, url=shlex.quote(self._api.link("")))

    def show_icon(self):
        bottle.response.content_type = "image/svg+xml"
        bottle.response.headers["Cache-Control"] = f"max-age={DAY_SECONDS}"
        return ICON

    def show_webhooks(self):
        with Reader(self._api.query()) as query:
            page, kept = read_page(query), query.field("state", (), strings, STATES)
        webhooks, now = list(self._store.webhooks.by_id.values()), self._api.now_ms()
        webhooks = self._api.webhooks_as_json(webhooks)
        webhooks.sort(key=lambda webhook: list_order(webhook["health"]))
        states = collections.Counter(webhook["health"]["state"] for webhook in webhooks)
        title, attention = trouble_words([webhook["health"] for webhook in webhooks])
        wanted = [w for w in webhooks if not kept or w["health"]["state"] in kept]
        part = wanted[page.start : page.start + page.limit]
        counts = self._store.attempts_by("webhook_id", tuple(w["id"] for w in part), now)
        return self._page(
            LIST_PAGE,
            title=title,
            attention=attention,
            states={state: states[state] for state in STATES if state in states},
            kept=kept,
            rows=[list_row(webhook, counts[webhook["id"]], now) for webhook in part],
            url=shlex.quote(self._api.link("")),
            **self._list(page, len(wanted), "webhook"),
        )

    def show_webhook(self, id):
        with Reader(self._api.query()) as query:
            page = read_page(query, ROWS_PER_PAGE)
            wanted = read_filter(query, self._api.now_ms(), *DELIVERY_FILTERS)
            attempted = query.field("attempted", None, whole_number, 0)
            missed_since = query.field("missed_since", None, whole_number, 0)
        webhook, now = self._webhook(id, statistics=True), self._api.now_ms()
        deliveries, total = self._store.deliveries(id, wanted, page)
        missed = 0
        if missed_since is not None and self._may_change():
            missed, _ = self._api.replay_all(id, Filter(since=missed_since), dry_run=True)
        return self._page(
            WEBHOOK_PAGE,
            webhook=webhook,
            words=state_words(webhook["health"], now),
            told=due_words(attempted),
            missed=missed,
            missed_since=missed_since,
            buttons=buttons(webhook),
            tiles=tiles(webhook),
            chart=chart(self._store.attempts_by("day", (id,), now), now // DAY_MS),
            settings=settings_in_words(webhook),
            rows=self._delivery_rows(deliveries),
            **self._list(page, total, "delivery", "deliveries"),
        )

    def _delivery_rows(self, deliveries):
        last, rows = self._store.attempt_starts([d.id for d in deliveries]), []
        for delivery in deliveries:
            webhook = self._webhook(delivery.webhook_id)
            rows.append(delivery_row(delivery, webhook, last.get(delivery.id)))
        return rows

    def show_delivery(self, uuid):
        delivery, body, attempts = self._store.delivery(uuid.lower())
        webhook, body = self._webhook(delivery.webhook_id), body.decode()
        attempts = list(collections.deque(attempts, MAX_SHOWN_ATTEMPTS))
        if not self._may_change():
            attempts = [attempt.for_viewers() for attempt in attempts]
        numbered = enumerate(attempts, delivery.attempt_count - len(attempts) + 1)
        return self._page(
            DELIVERY_PAGE,
            delivery=delivery,
            webhook=webhook,
            words=delivery_words(delivery, webhook["health"]["state"], self._api.now_ms()),
            attempts=[attempt_row(*item, body) for item in numbered][::-1],
            curl=attempts and curl_command(attempts[-1], body),
        )

    def show_events(self):
        with Reader(self._api.query()) as query:
            page = read_page(query, ROWS_PER_PAGE)
            before = query.field("before", None, whole_number, 1)
            wanted = read_filter(query, self._api.now_ms(), *EVENT_FILTERS)
        result = self._api.find_events(wanted, page, before)
        states = self._store.delivery_states([event.id for event in result.events])
        return self._page(
            EVENTS_PAGE,
            rows=[(event, states[event.id]) for event in result.events],
            **self._list(page, result.total, "event", more=result.more),
        )

    def show_event(self, id):
        event, body, deliveries = self._store.event(id)
        payload = body_text(body.decode(), MAX_PAYLOAD_CHARACTERS)
        rows = self._delivery_rows(deliveries)
        return self._page(EVENT_PAGE, event=event, payload=payload, rows=rows)

    # ---- the form ----

    def _edited(self, id):
        return Webhook() if id is None else self._store.webhooks.get(id)

    def _form_page(self, id, form, once, faults, status=200):
        values = {"old": self._edited(id), "form": form, "once": once}
        return self._page(FORM_PAGE, status, **values, **form_view(form, faults))

    def show_form(self, id=None):
        return self._form_page(id, form_of(self._edited(id)), secrets.token_urlsafe(16), {})

    def submit_form(self, id=None):
        form = bottle.request.environ[FORM]
        inactive_since = self._inactive_since(id)
        try:
            with self._saving:
                webhook = self._save_once(id, form)
        except (Invalid, Conflict) as error:
            once = form.get("once") if error.status == 400 else secrets.token_urlsafe(16)
            return self._form_page(id, form, once, faults_by_field(error.faults), error.status)
        return self._see_webhook(webhook, inactive_since)

    def _save_once(self, id, form):
        """The webhook that a form makes or changes, or did when it was sent before."""
        once, digest = form.get("once", ""), hashlib.sha256(json_bytes(form)).digest()
        sent, webhook = self._sent_forms.get(once, (digest, None))
        if sent != digest:
            words = f"this form was sent before, and saved the webhook {webhook.name}"
            raise Conflict(f"{words}; send it once more to save what it says now")
        webhook = webhook or self._save(self._edited(id), form)
        if once:
            self._sent_forms[once] = digest, webhook
        return webhook

    def _save(self, old, form):
        fields, faults = form_fields(form, old)
        if faults:
            raise Invalid(*all_faults(faults, fields, old, self._address_policy.check_url))
        if not old.id:
            return self._api.register(fields)
        if form.get("updatedDate") != str(old.updated):
            raise Conflict(stale_words(fields))
        return self._api.change(old.id, fields, unless_changed_since=old.updated)

    # ---- changing ----

    def _inactive_since(self, id):
        """When the state of a webhook that is not active began, else None."""
        webhook = id and self._webhook(id)
        if not webhook or webhook["active"]:
            return None
        return webhook["health"]["since"] or webhook["updatedDate"]

    def _see_webhook(self, webhook, inactive_since):
        """Show a webhook, and offer what it missed if it has just become active."""
        since = inactive_since if webhook.active else None
        self._see(f"/webhooks/{webhook.id}", missed_since=since)

    def submit_state(self, id, act):
        fields = {"paused": act == "pause"} if act in ("pause", "resume") else {}
        since = self._inactive_since(id)
        self._see_webhook(self._api.change(id, fields or {"active": act == "activate"}), since)

    def show_delete(self, id):
        webhook, pending = self._store.webhooks.get(id), self._store.pending[id]
        _, total = self._store.deliveries(id, Filter(), Page(limit=1))
        text = counted(total, "delivery goes with it", "deliveries go with it")
        text += f", {pending:,} of them still waiting." if pending else "."
        return self._page(DELETE_PAGE, path=f"/webhooks/{id}", what=webhook.name, text=text)

    def submit_delete(self, id):
        self._api.delete(id)
        self._see("/")

    def submit_test(self, id):
        webhook = self._store.webhooks.get(id)
        test, duration = self._api.test(webhook)
        return self._page(TEST_PAGE, webhook=webhook, **verdict_words(test, duration))

    def submit_redeliver_failed(self, id):
        self._see(f"/webhooks/{id}", attempted=self._api.redeliver_all(id, Filter())[1])

    def show_replay(self, id):
        webhook, since = self._store.webhooks.get(id), self._api.query().get("since")
        since_ms = matched = fault = None
        try:
            with Reader(self._api.query()) as query:
                since_ms = read_filter(query, self._api.now_ms(), "since").since
            if since:
                wanted = Filter(since=since_ms, until=self._api.now_ms())
                matched, _ = self._api.replay_all(id, wanted, dry_run=True)
        except Invalid as error:
            fault = "; ".join(fault.message for fault in error.faults)
        values = {"webhook": webhook, "since": since or "30d", "since_ms": since_ms}
        values |= {"matched": matched, "fault": fault or "", "path": f"/webhooks/{id}"}
        return self._page(REPLAY_PAGE, 400 if fault else 200, **values)

    def submit_replay(self, id):
        with Reader(bottle.request.environ[FORM]) as form:
            wanted = read_filter(form, self._api.now_ms(), "since", "until")
        self._see(f"/webhooks/{id}", attempted=self._api.replay_all(id, wanted)[1])

    def submit_redeliver(self, uuid):
        self._api.redeliver_one(uuid.lower())
        self._see(f"/deliveries/{uuid}")

    def submit_redeliver_event(self, id):
        for delivery in self._store.event(id)[2]:
            self._api.redeliver_one(delivery.id)
        self._see(f"/events/{id}")

    def show_delete_event(self, id):
        event, _, deliveries = self._store.event(id)
        go = counted(len(deliveries), "delivery goes", "deliveries go")
        what, text = f"{event.name} #{id}", f"Its payload and {go} with it."
        return self._page(DELETE_PAGE, path=f"/events/{id}", what=what, text=text)

    def submit_delete_event(self, id):
        self._api.remove_event(id)
        self._see("/events")


# ======================================================================================
# HTTP server: waitress, with bounds on what a stranger can make it spend
# ======================================================================================

MAX_CONNECTIONS = 1000
HEAD_SECONDS = 10  # from the connection, or the first byte of a request, to its empty line
REQUEST_SECONDS = 60  # for a whole request, for a client that reads nothing, for an idle one
UNFETCHED_SECONDS = 10  # a client whose request was refused may go on sending for so long
MAX_HEAD_BYTES = 64 << 10
MAX_FRAMING_BYTES = 8 << 10  # of a chunk-size line, and of a trailer
FRAMING_SHARE = 8  # bytes of a body to one of framing: small chunks cost more than their bytes
MAX_BODIES_BYTES = 128 << 20  # of the requests that are there or on their way, together
SHARED_BODIES_BYTES = MAX_BODIES_BYTES // 4 * 3  # of all connections
OWN_BODY_BYTES = (MAX_BODIES_BYTES - SHARED_BODIES_BYTES) // MAX_CONNECTIONS  # of each one
MAX_UNSENT_BYTES = 1 << 20  # of an answer that is made while it is sent
PUBLICATION = ("POST", "/rest/api/events")
MAX_PASSING_BYTES = 64 << 10  # of a publication that is read in the server's own thread
MAX_OPEN_FILES = 1 << 16
OTHER_FILES = 128  # the database's, those of look-ups, and some to spare
ACCEPT_REST_SECONDS = 1  # after a connection could not be accepted


class RequestRefused(waitress.utilities.Error):
    """The answer to a request that the server refuses before the application sees it."""

    def __init__(self, status: int, message: str, headers: dict[str, str]):
        super().__init__(message)
        self.code, self.reason = status, http.HTTPStatus(status).phrase
        self.headers = headers


def render_server_error(error: waitress.utilities.Error, ident: str | None = None) -> tuple:
    """How waitress answers a request that does not reach the application."""
    faults = [Fault(None, str(error.body))]
    body = json_bytes(error_document(error.code, faults) | {"reason": error.reason})
    headers = {"Content-Type": JSON_TYPE} | getattr(error, "headers", {})
    return f"{error.code} {error.reason}", list(headers.items()), body


class BodyMemory:
    """How much memory the bodies of all requests hold; any thread may call the methods."""

    def __init__(self):
        self._lock = threading.Lock()  # guards the next
        self._shared_bytes = 0  # of all bodies, without what each may have for its own

    def has_room(self, size: int) -> bool:
        """Whether a body of a size would fit beside the others."""
        is_own = size <= OWN_BODY_BYTES  # which each connection may have, whatever others hold
        return is_own or self._shared_bytes + size <= SHARED_BODIES_BYTES + OWN_BODY_BYTES

    def resize(self, old: int, new: int) -> bool:
        """Count a body of an old size with its new one; whether that fits."""
        with self._lock:
            self._shared_bytes += max(0, new - OWN_BODY_BYTES) - max(0, old - OWN_BODY_BYTES)
        return new <= OWN_BODY_BYTES or self._shared_bytes <= SHARED_BODIES_BYTES


class RequestParser(waitress.parser.HTTPRequestParser):
    """Waitress's parser with bounds on bodies; a refused request ends its connection.

    Waitress reads a whole body before it asks the application. It lets some malformed requests
    pass, reads the same chunk-size line again and again, and lets a second request wait for the
    first (Pylons/waitress has no issue of these yet)."""

    _body_bytes = 0  # as counted in adj.bodies
    _unfinished_bytes = 0  # of a chunk-size line or trailer
    _framing_bytes = 0

    def received(self, data: bytes) -> int:
        was_in_body = self.body_rcv is not None
        consumed = super().received(data)
        is_too_large = isinstance(self.error, waitress.utilities.RequestEntityTooLarge)
        if self.body_rcv is not None and not self.error:
            self._judge_body() if was_in_body else self._judge_head()
        elif is_too_large and "AUTHORIZATION" not in self.headers:
            self._refuse(401, LOGIN_NEEDED, ASK_FOR_LOGIN)  # that comes before its size
        rest = b"" if self.empty or not self.completed else data[consumed:]
        if rest.strip(b"\r\n") and not self.error:
            self._refuse(400, "a request must wait for the answer to the one before it")
        if self.error:
            self.expect_continue = False  # else waitress invites the body all the same
        return len(data) if self.error or rest else consumed

    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError:
            raise waitress.parser.ParsingError("the request is malformed") from None
        is_chunked = self.chunked or "TRANSFER_ENCODING" in self.headers  # 1.0 leaves it
        if is_chunked and "CONTENT_LENGTH" in self.headers:
            message = "Content-Length and Transfer-Encoding exclude each other"
            raise waitress.parser.ParsingError(message)

    def close(self) -> None:
        super().close()
        self.adj.bodies.resize(self._body_bytes, 0)
        self._body_bytes = 0

    def _judge_head(self):
        if "AUTHORIZATION" not in self.headers:
            self._refuse(401, LOGIN_NEEDED, ASK_FOR_LOGIN)
        elif not self.adj.bodies.has_room(self.content_length):
            self._refuse_for_now()

    def _judge_body(self):
        old, self._body_bytes = self._body_bytes, self.body_bytes_received
        has_room = self.adj.bodies.resize(old, self._body_bytes)
        if self.chunked:
            self._judge_framing()
        if not has_room and not self.error:
            self._refuse_for_now()

    def _judge_framing(self):
        receiver, before = self.body_rcv, self._framing_bytes
        body_bytes = len(receiver)
        self._framing_bytes = self.body_bytes_received - body_bytes
        line_bytes = self._unfinished_bytes + self._framing_bytes - before
        self._unfinished_bytes = len(receiver.control_line) + len(receiver.trailer)
        most = FRAMING_SHARE * MAX_FRAMING_BYTES + body_bytes // FRAMING_SHARE
        if line_bytes > MAX_FRAMING_BYTES or self._framing_bytes > most:
            self._refuse(400, "a chunk-size line or trailer is too long, or chunks too small")

    def _refuse_for_now(self):
        self._refuse(503, "too much is being received at once", {"Retry-After": "1"})

    def _refuse(self, status, message, headers=None):
        self.error, self.completed = RequestRefused(status, message, headers or {}), True


@functools.lru_cache(2)
def http_date(seconds: int) -> str:
    """An epoch time as HTTP has it (RFC 9110, 5.6.7)."""
    return email.utils.formatdate(seconds, usegmt=True)


class Task(waitress.task.WSGITask):
    """Waitress's answer to a request, which may be ready made."""

    def execute(self) -> None:
        ready_made, self.channel.ready_made = self.channel.ready_made, None
        if ready_made is None:
            return super().execute()
        self.status, self.response_headers, body = ready_made
        self.content_length, self.complete = len(body), True
        answer = self._head() + body
        self.wrote_header = True  # only now: else waitress would not say that it closes
        self.channel.write_soon(answer)

    def _head(self):
        if self.version != "1.1" or "CONNECTION" in self.request.headers:
            return self.build_response_header()  # many steps, which decide what closes
        own = ("Content-Length", self.content_length), ("Server", self.channel.server.adj.ident)
        dated = ("Date", http_date(int(self.start_time)))
        lines = [f"{name}: {value}\r\n" for name, value in (*self.response_headers, *own, dated)]
        return f"HTTP/1.1 {self.status}\r\n{''.join(lines)}\r\n".encode("latin-1")


class Channel(waitress.channel.HTTPChannel):
    """Waitress's connection, and how long the client may take.

    Waitress counts from the last byte that came or went, by a clock that may be set, and
    not at all while a request is in hand: a client that does not read its answer holds the
    thread that makes it (since Pylons/waitress#242). It closes a connection on which more
    is coming, so that the network may drop the answer."""

    parser_class = RequestParser
    task_class = Task
    ready_made: tuple | None = None  # status line, headers and body of the next answer

    def __init__(self, *arguments, **options):
        self._since = time.monotonic()  # from here on the client's time counts
        self._had_request = False
        self._lingers = False  # the client may be sending what is not read any more
        self._discards = False
        super().__init__(*arguments, **options)

    # ---- of the server's thread ----

    def received(self, data: bytes) -> bool:
        if self.request is None:
            self._since = time.monotonic()
        return super().received(data)

    def _discard(self):
        try:
            self.recv(SEND_BYTES)  # closes the connection at its end
        except OSError:
            self.handle_close()

    def handle_close(self) -> None:
        if self._lingers and not self._discards and self.connected:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)
                self._start_discarding()
                return
        if self.request is not None:
            self.request.close()
        super().handle_close()

    def _start_discarding(self):
        self._discards, self._since = True, time.monotonic()
        self.will_close = False
        # no methods: waitress asks all connections in each round of its loop, so these cost
        self.readable, self.writable = (lambda: True), (lambda: False)
        self.handle_read = self._discard

    def is_overdue(self, now: float) -> bool:
        """Whether the client has taken too long for what it has to do; monotonic seconds."""
        return now - self._since > self._allowed_seconds()

    def cut_off(self) -> None:
        """Close the connection; a thread that writes an answer to it gets ClientDisconnected."""
        self._lingers = False
        self.handle_close()

    def _allowed_seconds(self):
        if self._discards:
            return UNFETCHED_SECONDS
        if self.total_outbufs_len:
            return REQUEST_SECONDS
        if self.requests:  # it is the application's turn
            return math.inf
        if self.request is None:
            has_time = self._had_request
        else:
            has_time = self.request.headers_finished
        return REQUEST_SECONDS if has_time else HEAD_SECONDS

    def pass_through(self) -> None:
        """Call the application with a request in this thread. If it waits for a commit, the
        answer follows after that; if it is slow, it goes to another thread."""
        passage, started = Passage(), []
        environ = Task(self, self.requests[0]).get_environment()
        environ[PASSAGE] = passage
        answer = self.server.application(environ, lambda *start: started.extend(start))
        body = b"".join(answer)  # a generator may tell its status only now
        if passage.is_slow:
            self.server.task_dispatcher.add_task(self)
        elif passage.write is None:
            self.answer(started[0], started[1], body)
        else:
            self.server.answer_after(passage.write, self, passage.late_answer)

    def answer_late(self, late_answer: collections.abc.Callable[[], tuple]) -> None:
        """Send the answer that a publication has left for later."""
        self.answer(*late_answer())

    def answer(self, status: str, headers: list, body: bytes) -> None:
        """Send what the application has answered to the request in hand."""
        self.ready_made = status, headers, body
        self.service()
        if self.connected:
            self.handle_write()

    # ---- of any thread ----

    def service(self) -> None:
        self._had_request, self._lingers = True, self.requests[0].error is not None
        super().service()

    def write_soon(self, data) -> int:
        if not self.total_outbufs_len:
            self._since = time.monotonic()
        return super().write_soon(data)

    def _flush_some(self, do_close=True):
        has_sent = super()._flush_some(do_close=do_close)
        if has_sent:
            self._since = time.monotonic()
        return has_sent


class Server(waitress.server.TcpWSGIServer):
    """Waitress's server, which would spin when files run out."""

    channel_class = Channel

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.adj.bodies = BodyMemory()  # all that a parser knows of its server is adj
        self._thread = threading.get_ident()
        self._publications = collections.deque()  # channels; appended to by any thread
        # writes that publications wait for, channels and late answers, in the writer's order
        self._unanswered = collections.deque()
        self._accepts_from = self._looks_from = self._complains_from = 0.0  # monotonic

    def readable(self) -> bool:
        has_room = len(self.active_channels) < self.adj.connection_limit
        return self.accepting and has_room and time.monotonic() >= self._accepts_from

    def handle_accept(self) -> None:
        try:
            accepted = self.accept()
            if accepted is not None:
                connection, address = accepted
                self.set_socket_options(connection)
                self.channel_class(self, connection, address, self.adj, map=self._map)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._rest(error)

    def _rest(self, error):
        now = time.monotonic()
        self._accepts_from = now + ACCEPT_REST_SECONDS
        if now >= self._complains_from:
            self._complains_from = now + 60
            log_fact("no connection can be accepted", level=logging.WARNING, reason=error)

    def run_once(self, timeout_seconds: float) -> None:
        """Wait for something to come, and do what follows from it."""
        # select() would know file numbers below 1024 only
        self.asyncore.loop(timeout_seconds, map=self._map, use_poll=True, count=1)
        self.pass_publications()
        self.cut_off_overdue(time.monotonic())

    # ---- publications: no thread waits for their commit ----

    def add_task(self, channel: Channel) -> None:
        request = channel.requests[0]
        is_small = not request.error and request.body_bytes_received <= MAX_PASSING_BYTES
        if is_small and (request.command, request.path.rstrip("/")) == PUBLICATION:
            self._publications.append(channel)
        else:
            super().add_task(channel)

    def pull_trigger(self) -> None:
        if threading.get_ident() != self._thread:  # which is awake
            super().pull_trigger()

    def wake(self) -> None:
        """Have the server's thread look which publications are on disk; called by the writer."""
        if self._unanswered:
            self.pull_trigger()

    def answer_after(
        self, write: Write, channel: Channel, late_answer: collections.abc.Callable[[], tuple]
    ) -> None:
        """Answer a request once a write is finished."""
        self._unanswered.append((write, channel, late_answer))

    def pass_publications(self) -> None:
        """Take the publications that came, and answer those that are on disk."""
        while self._publications:
            channel = self._publications.popleft()
            self._close_if_it_fails(channel, Channel.pass_through)
        while self._unanswered and self._unanswered[0][0].is_finished:
            _, channel, late_answer = self._unanswered.popleft()
            self._close_if_it_fails(channel, Channel.answer_late, late_answer)

    @staticmethod
    def _close_if_it_fails(channel, method, *arguments):
        try:
            method(channel, *arguments)
        except Exception:  # the other connections must not suffer from it
            log.exception("a publication could not be answered")
            channel.handle_close()

    def cut_off_overdue(self, now: float) -> None:
        """Once a second, close the connections whose clients take too long; now: monotonic."""
        if now >= self._looks_from:
            self._looks_from = now + 1
            for channel in list(self.active_channels.values()):
                if channel.is_overdue(now):
                    channel.cut_off()


def printable_address(host: str, port: int) -> str:
    """HOST:PORT, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(address: tuple[str, int]) -> socket.socket:
    """A listening socket; raises SettingError."""
    try:
        family, *_, resolved = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
        return socket.create_server(resolved[:2], family=family)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "not a host"
        raise SettingError(
            f"--listen (WEBHOOKD_LISTEN): {printable_address(*address)}: {why}"
        ) from None


def raise_file_limit() -> None:
    """Let this process open as many files as it may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def connection_limit(max_in_flight: int) -> int:
    """How many clients may be connected, so that enough files are left for all else."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    left = soft - OTHER_FILES - MAX_IDLE_CONNECTIONS - max_in_flight
    return MAX_CONNECTIONS if soft < 0 else max(SERVER_THREADS, min(left, MAX_CONNECTIONS))


def make_server(app, listener: socket.socket, settings: Settings) -> Server:
    """The HTTP server of the application."""
    # waitress answers by this method what does not reach the application
    waitress.utilities.Error.to_response = render_server_error
    proxy = {"clear_untrusted_proxy_headers": True}
    if settings.trusted_proxy:
        proxy["trusted_proxy"] = settings.trusted_proxy
        proxy["trusted_proxy_headers"] = {f"x-forwarded-{x}" for x in ("for", "proto", "host")}
    return Server(
        app,
        {},
        _sock=listener,
        sockinfo=(listener.family, listener.type, listener.proto, listener.getsockname()),
        bind_socket=False,
        threads=SERVER_THREADS,
        ident="webhookd",
        server_name=settings.listen[0],
        connection_limit=connection_limit(settings.max_in_flight),
        max_request_header_size=MAX_HEAD_BYTES,
        max_request_body_size=max(MAX_REQUEST_BYTES, settings.max_event_size),
        # in memory, which is bounded, and not in files
        inbuf_overflow=sys.maxsize,
        outbuf_overflow=sys.maxsize,
        outbuf_high_watermark=MAX_UNSENT_BYTES,
        # so that the thread that has the sockets sends a whole answer at once
        send_bytes=SEND_BYTES,
        **proxy,
    )


def take_requests(server: Server, stopping: threading.Event) -> None:
    """Run the server until it is stopping, see `stop_server`."""
    while not stopping.is_set():  # server.run() would drop what is queued
        server.run_once(server.adj.asyncore_loop_timeout)


def stop_server(server: Server, stopping: threading.Event) -> None:
    """Have `take_requests` return; called by any thread, or by a handler of signals."""
    stopping.set()
    server.pull_trigger()


def finish_requests(server: Server) -> None:
    """Answer the requests in hand after the server's loop has ended; refuse new ones."""
    server.socket.close()
    deadline = time.monotonic() + STOP_SECONDS
    while server.active_channels and time.monotonic() < deadline:
        server.pass_publications()
        for channel in list(server.active_channels.values()):
            channel.handle_write()
            if not channel.requests and not channel.total_outbufs_len:
                channel.handle_close()
        time.sleep(0.01)


# ======================================================================================
# systemd
# ======================================================================================

PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}


def notify(state: str) -> None:
    """Tell systemd, if it asks (sd_notify(3)): READY=1, WATCHDOG=1, STOPPING=1."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notification,
    ):
        notification.sendto(state.encode(), address)


class LineFormatter(logging.Formatter):
    """One line for each record: with a time, or with a priority for the journal."""

    def __init__(self, journal: bool):
        super().__init__("%(message)s" if journal else "%(asctime)s %(message)s")
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        text = printable(super().format(record))
        return f"<{PRIORITIES.get(record.levelno, 3)}>{text}" if self._journal else text


def writes_to_journal(environ: collections.abc.Mapping) -> bool:
    """Whether stderr is the journal (systemd.exec(5), JOURNAL_STREAM)."""
    status = os.fstat(sys.stderr.fileno())
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def start_logging() -> None:
    """Send the log to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(journal=writes_to_journal(os.environ)))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # warns of plain load
    logging.getLogger("asyncio").setLevel(logging.ERROR)


# ======================================================================================
# Sink: a receiver for trying things out
# ======================================================================================

SINK_LISTEN = "127.0.0.1:9000"
UNSHOWN_HEADERS = {"host", "content-length", "connection"}
SIGNATURE_TOLERANCE_SECONDS = 300  # what Standard Webhooks asks of receivers


def _is_among(expected, given):
    # a list: the time it takes must not tell which of them is right
    return any([hmac.compare_digest(expected.encode(), g.encode()) for g in given])  # noqa: C419


def hub_fault(secret: str, signatures: list[str], body: bytes) -> str | None:
    """Why X-Hub-Signature headers do not verify, or None if all of them do."""
    expected = hub_signature(secret, body)
    if all([_is_among(expected, [signature]) for signature in signatures]):  # noqa: C419
        return None
    return "another secret, or another body"


def standard_fault(
    secret: str, id: str, timestamp: str, signatures: str, body: bytes, now: float
) -> str | None:
    """Why a webhook-signature does not verify, or None; any of several may match."""
    if not re.fullmatch(r"\d{1,15}", timestamp, re.ASCII):
        return "webhook-timestamp is no number"
    if abs(now - int(timestamp)) > SIGNATURE_TOLERANCE_SECONDS:
        return "webhook-timestamp is more than 5 minutes off"
    expected = standard_signature(secret, id, int(timestamp), body)
    if _is_among(expected, signatures.split()):
        return None
    return "another secret, or another body"


def _signature_words(signature, secret, find_fault, *arguments):
    if not signature:
        return "not signed"
    if secret is None:
        return "signed; say --secret to have it verified"
    why = find_fault(secret, *arguments)
    return f"does NOT verify: {why}" if why else "signature ok"


def signature_lines(headers, body: bytes, secret: str | None, now: float) -> list[str]:
    """A line for each of the two signature schemes; headers as http.server has them."""
    names = ("X-Hub-Signature", "X-Hub-Signature-256")
    hub = [value for name in names for value in headers.get_all(name, ())]
    names = ("webhook-id", "webhook-timestamp", "webhook-signature")
    standard = [headers.get(name, "") for name in names]
    of_hub = _signature_words(hub, secret, hub_fault, hub, body)
    of_standard = _signature_words(standard[-1], secret, standard_fault, *standard, body, now)
    return [f"X-Hub-Signature: {of_hub}", f"Standard Webhooks: {of_standard}"]


class SinkHandler(http.server.BaseHTTPRequestHandler):
    """Prints deliveries, and a line for each request that is none."""

    protocol_version = "HTTP/1.1"  # keeps connections alive
    disable_nagle_algorithm = True
    error_content_type = "text/plain"
    error_message_format = "%(code)d %(message)s\n"

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,15}", length, re.ASCII):
            self.send_error(http.HTTPStatus.LENGTH_REQUIRED)
        elif int(length) > MAX_REQUEST_BYTES:
            self.send_error(http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        else:
            body = self.rfile.read(int(length))
            if len(body) < int(length):
                raise ConnectionError("the body was cut off")
            self.server.show(*self._delivery(body))
            self._answer()

    def _delivery(self, body):
        yield self.requestline
        for name, value in self.headers.items():
            if name.lower() not in UNSHOWN_HEADERS:
                yield f"  {name}: {value}"
        yield ""
        yield "  " + body.decode(errors="backslashreplace")
        yield ""
        for line in signature_lines(self.headers, body, self.server.secret, time.time()):
            yield f"  {line}"
        yield ""

    def _answer(self):
        status = self.server.answer
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("Location", "/elsewhere")
        if status not in (http.HTTPStatus.NO_CONTENT, http.HTTPStatus.NOT_MODIFIED):
            self.send_header("Content-Length", "0")
        self.end_headers()

    def version_string(self):
        return USER_AGENT

    def log_request(self, code="-", size="-"):
        pass  # what came is printed in full

    def log_message(self, format, *args):
        self.server.show(f"refused: {format % args}")


class Sink(http.server.ThreadingHTTPServer):
    """Receives deliveries, prints them and gives them all the same answer.

    Each connection has a thread; what one of them prints comes out whole."""

    server_bind = socketserver.TCPServer.server_bind  # http.server's asks the resolver

    def __init__(self, address: tuple[str, int], secret: str | None, answer: int):
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.secret, self.answer = secret, answer
        self._printing = threading.Lock()
        super().__init__(address, SinkHandler)

    def show(self, *lines: str) -> None:
        """Print lines, so that they harm no terminal."""
        text = "\n".join(map(printable, lines))
        with self._printing:
            print(text, flush=True)

    def handle_error(self, request, client_address):
        """A connection ended before its time."""
        self.show(f"connection lost: {sys.exc_info()[1]}")


# ======================================================================================
# Command line
# ======================================================================================

READERS_AT_START = SERVER_THREADS + 4  # one for each thread that reads
M_ARENA_MAX, M_MMAP_THRESHOLD = -8, -3  # of malloc.h
PAGES_PER_COPY_STEP = 256  # 1 MB: a publication waits for one step at most


def spare_memory() -> None:
    """Have glibc give memory back, and use one heap for all threads (mallopt(3)).

    A heap for each thread would be of no use on one core. The 16 MB of a password's hash are
    mapped by themselves, so that they are given back at once."""
    with contextlib.suppress(AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)
        libc.malloc_trim(0)


def hold_to_one_core() -> None:
    """Keep this thread, and all that it will start, on the core that it runs on.

    Only the thread that has the GIL runs anyway, and to hand the GIL to another core costs more
    than the request for which it is handed over."""
    with contextlib.suppress(OSError, AttributeError):  # where that may not be: slower
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        os.sched_setaffinity(0, {int(fields[36])})  # proc(5): "processor", 39th of all


def on_stop(handler: collections.abc.Callable) -> None:
    """Have a handler called for SIGTERM, SIGINT and SIGHUP."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, handler)


def stop_once() -> None:
    """Let further signals change nothing; a handler calls this first.

    With SIG_IGN, Python would complain about one that came at the same moment."""
    on_stop(lambda *_: None)


def _stop(server, stopping):
    stop_once()  # also because Event.set() must not interrupt itself
    stop_server(server, stopping)


VITAL_THREADS = ("writer", "delivery loop", "maintenance")


def end_without(died) -> None:
    """A threading.excepthook: ends the process at once if it cannot do without the thread.

    Others may wait for that thread. systemd starts the process again, and nothing is lost."""
    name = died.thread and died.thread.name
    try:
        log.critical("the thread %s died", name, exc_info=died.exc_value)
    finally:
        if name in VITAL_THREADS:
            os._exit(1)


def _beat(store):
    if not store.stands_still():
        notify("WATCHDOG=1")


class CommandError(Exception):
    """A subcommand cannot do what it was asked; the text says why."""


def say(text: str) -> None:
    """Print what must reach somebody; raises CommandError if it cannot."""
    if sys.stdout is None:
        raise CommandError("standard output is closed")
    try:
        # not print(): what that cannot write it tries again at exit, and complains
        with open(sys.stdout.fileno(), "wb", closefd=False) as output:
            output.write(f"{text}\n".encode())
    except OSError as error:
        raise CommandError(f"standard output: {error.strerror}") from None


def tell_admin(secret: str) -> None:
    """Print the secret of the first user."""
    say(f"user admin was created, its secret is: {secret}")


def serve(settings: Settings) -> None:
    """The life of the process: returns after a signal to stop, with every result recorded."""
    threading.excepthook = end_without
    # until it is ready a signal ends it at once, which loses nothing
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise_file_limit()
    spare_memory()
    hold_to_one_core()
    with contextlib.ExitStack() as parts:
        listener = parts.enter_context(listen(settings.listen))
        store = parts.enter_context(Store(settings.database, settings))
        log_fact("starting", version=VERSION, database=settings.database)
        store.flush()  # raises if nothing can be written
        ensure_admin(store, settings.admin_password, tell_admin)
        store.open_readers(READERS_AT_START)
        address = listener.getsockname()[:2]
        address_policy = AddressPolicy(settings.allow_networks, address)
        client = Client(address_policy, settings.delivery_timeout)
        clock = Clock()
        parts.enter_context(Maintenance(store, settings, clock))
        dispatcher = Dispatcher(store, client, settings, clock, lambda: _beat(store))
        parts.enter_context(dispatcher)
        api = Api(store, dispatcher, address_policy, settings, clock)
        Pages(api, store, address_policy)
        if settings.admin_password:
            api.remember_admin(settings.admin_password)
        server = make_server(api, listener, settings)
        store.on_finish(server.wake)
        stopping = threading.Event()
        on_stop(lambda *_: _stop(server, stopping))
        gc.freeze()  # what is there now stays, and is not looked through again
        notify("READY=1")
        log_fact("ready", listen=printable_address(*address))
        take_requests(server, stopping)
        notify("STOPPING=1")
        log_fact("stopping")
        dispatcher.stop()
        finish_requests(server)


# ---- subcommands: functions of what the command line gave, `database` among it ----


def is_there(path: str) -> bool:
    """Whether there is such a file; raises DatabaseError if that cannot be known."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise DatabaseError(f"{path}: {error.strerror}") from None
    return True


def require_database(path: str) -> None:
    """Raise DatabaseError if there is none: only the service makes one."""
    if not is_there(path):
        raise DatabaseError(
            f"{os.path.abspath(path)} does not exist: start the service first, which makes"
            " it, or name another one by --database"
        )


def resolved(path: str) -> str:
    """The path without links; raises CommandError if root would follow another user's link."""
    if not os.geteuid() and os.path.islink(path) and os.lstat(path).st_uid:
        raise CommandError(f"{path} is a link that is not root's: name where it leads")
    return os.path.realpath(path)


def _opened(folder, undo):
    handle = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    undo.callback(os.close, handle)
    return handle


@contextlib.contextmanager
def acting_as_owner(path: str):
    """As root: act with the rights of the owner of the file's folder, and see nothing but that
    folder, so that no link in it leads elsewhere. Yields the path to use.

    A folder of systemd's DynamicUser= lies in one that only root may enter, hence the change of
    root. Files that were opened inside stay usable outside."""
    folder, name = os.path.split(path)
    if os.geteuid() or not os.stat(folder).st_uid:
        yield path
        return
    with contextlib.ExitStack() as undo:
        here, root, there = (_opened(path, undo) for path in (".", "/", folder))
        owner = os.fstat(there)
        os.fchdir(there)
        undo.callback(os.fchdir, here)
        os.chroot(".")
        undo.callback(os.chroot, ".")
        undo.callback(os.fchdir, root)
        undo.callback(os.setgroups, os.getgroups())
        os.setgroups([])
        undo.callback(os.setegid, os.getegid())
        os.setegid(owner.st_gid)
        undo.callback(os.seteuid, os.geteuid())
        os.seteuid(owner.st_uid)
        yield f"/{name}"


TABLES = {"users", "webhooks", "events", "deliveries"}


def known_version(connection: Database, path: str) -> int:
    """The version of a database of webhookd; raises DatabaseError."""
    version = schema_version(connection)
    tables = connection.column("SELECT name FROM sqlite_schema WHERE type = 'table'")
    if version < 1 or TABLES - set(tables):
        raise DatabaseError(f"{path} is not a database of webhookd")
    refuse_newer(version, path)
    return version


@contextlib.contextmanager
def database_beside_service(path: str):
    """A connection in a transaction, beside a service; raises DatabaseError."""
    require_database(path)
    try:
        with (
            acting_as_owner(resolved(path)) as inside,
            contextlib.closing(open_database(inside)) as connection,
        ):
            version = known_version(connection, path)
            if version < len(MIGRATIONS):
                raise DatabaseError(
                    f"{path} has version {version}, not {len(MIGRATIONS)} as this"
                    " webhookd: let the service start with it first"
                )
            with transaction(connection):
                yield connection
    except sqlite3.Error as error:
        raise DatabaseError(f"{path}: {error}") from error
    except OSError as error:
        raise DatabaseError(f"{path}: {error.strerror}") from error


def operator() -> str:
    """Who runs this command, as far as the environment tells."""
    return os.environ.get("SUDO_USER") or getpass.getuser()


def read_password() -> str:
    """A password from the terminal, or the first line of standard input."""
    text = ""
    if sys.stdin.isatty():
        with contextlib.suppress(EOFError):
            text = getpass.getpass()
    else:
        line = sys.stdin.buffer.readline().decode(errors="surrogateescape")
        text = line.rstrip("\r\n")
    if not text:
        raise CommandError("the password is empty")
    try:
        return password(text)
    except ValueError as error:
        raise CommandError(str(error)) from None


def _role_for(given, users):
    """The role that the user gets; raises CommandError."""
    old = next((user for user in users if user.name == given.name), None)
    if old and not given.replace:
        raise CommandError(f"there is a user {given.name} already; --replace gives it a new secret")
    if given.replace and not old:
        raise CommandError(f"there is no user {given.name} to replace")
    return given.role or old.role


def add_user(given: argparse.Namespace) -> None:
    """Add a user with a password from the terminal or stdin, or with a new secret; or give one
    to a user that exists."""
    require_database(given.database)  # before it asks for a password
    secret = read_password() if given.password else secrets.token_urlsafe(32)
    record = password_record(secret) if given.password else secret_record(secret)
    with database_beside_service(given.database) as connection:
        role = _role_for(given, load_users(connection))
        save_user(connection, User(given.name, role, record))
        if not given.password:
            say(secret)  # before it counts: if nobody sees it, nothing changes
    words = "user replaced" if given.replace else "user added"
    log_fact(words, name=given.name, role=role, by=operator())


def list_users(given: argparse.Namespace) -> None:
    """Print names and roles."""
    with database_beside_service(given.database) as connection:
        users = load_users(connection)
    if users:
        say("\n".join(f"{user.name} {user.role}" for user in users))


def remove_user(given: argparse.Namespace) -> None:
    """Remove a user; raises CommandError."""
    with database_beside_service(given.database) as connection:
        sql = "DELETE FROM users WHERE name = ?"
        if not connection.change(sql, given.name):
            raise CommandError(f"there is no user {given.name}")
    log_fact("user removed", name=given.name, by=operator())


# ---- backup and restore ----

BESIDE = ("-wal", "-shm", "-journal")  # what SQLite keeps beside a database


def _check_unused(copy):
    for beside in (f"{copy}-wal", f"{copy}-journal"):
        if os.path.exists(beside):  # SQLite would take it for a part of the copy
            raise CommandError(f"{beside} exists: {copy} is a database in use")


def _check_backup(path, target):
    require_database(path)
    if os.path.exists(target) and not os.path.isfile(target):
        raise CommandError(f"{target} is not a file")
    own = [os.path.realpath(path) + end for end in ("", *BESIDE)]
    is_it = os.path.exists(target) and os.path.samefile(path, target)
    if is_it or target in own:
        raise CommandError(f"{target} is the database itself")
    _check_unused(target)


def sync_folder(folder: str) -> None:
    """Have the names in a folder on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def new_file(target: str):
    """A file under another name beside the target. At the end it becomes the target, complete
    and on disk; after an error it is removed. Yields its handle and its name."""
    folder, name = os.path.split(target)
    handle, partial = tempfile.mkstemp(prefix=f".{name}.", dir=folder)  # mode 600
    try:
        yield handle, partial
        os.fsync(handle)
        os.replace(partial, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise
    finally:
        os.close(handle)
    with contextlib.suppress(OSError):  # some file systems cannot
        sync_folder(folder)  # else a power cut may undo the renaming


def _pace(handle):
    """A function for each step of a copy: has it on disk, and rests as long as it took."""
    begun = time.monotonic()

    def rest(*counts):
        nonlocal begun
        os.fdatasync(handle)
        time.sleep(time.monotonic() - begun)
        begun = time.monotonic()

    return rest


def mark_as_without_log(handle: int) -> None:
    """Have SQLite look for no log beside a database (its file format, 1.3.3)."""
    os.pwrite(handle, b"\1\1", 18)


def copy_database(source: Database, partial: str, handle: int) -> None:
    """Copy what the source's transaction sees into an empty file.

    A service beside it hardly notices: a rest follows each step and takes as long."""
    with contextlib.closing(connect(partial)) as copy:
        copy.execute("PRAGMA journal_mode = OFF")
        copy.execute("PRAGMA synchronous = OFF")
        source.backup(copy, pages=PAGES_PER_COPY_STEP, progress=_pace(handle))
    mark_as_without_log(handle)


def check_whole(connection: Database, path: str) -> None:
    """Raises DatabaseError if the database is damaged."""
    verdict = connection.row("PRAGMA integrity_check(1)")[0]
    if verdict != "ok":
        raise DatabaseError(f"{path} is damaged: {' '.join(verdict.split())}")


def _interrupt(number, frame):
    stop_once()
    raise CommandError("interrupted")


@contextlib.contextmanager
def snapshot(path: str):
    """A connection that sees the database as it is now, however long it is used."""
    with acting_as_owner(path) as inside:
        source = connect(inside)
    try:
        with acting_as_owner(path):  # reading opens what is beside it, closing removes it
            source.execute("BEGIN")
            if schema_version(source) < 1:
                raise DatabaseError(f"{path} is not a database of webhookd")
        yield source
    finally:
        with acting_as_owner(path):
            source.close()


def backup(given: argparse.Namespace) -> None:
    """Write a consistent copy; a file of that name stays until the copy is complete."""
    path, target = given.database, resolved(given.file)
    on_stop(_interrupt)
    os.nice(10)
    try:
        _check_backup(path, target)
        with (
            snapshot(resolved(path)) as source,
            acting_as_owner(target) as inside,
            new_file(inside) as (handle, partial),
        ):
            copy_database(source, partial, handle)
            with contextlib.closing(connect(partial)) as copy:
                check_whole(copy, path)
    except sqlite3.Error as error:
        raise CommandError(f"{path} to {target}: {error}") from error
    except OSError as error:
        raise CommandError(f"{target}: {error.strerror}") from error
    log_fact("backup written", file=target, bytes=os.path.getsize(target), by=operator())


@contextlib.contextmanager
def without_service(inside: str, path: str):
    """Keep services from using the database; yields its status."""
    with contextlib.ExitStack() as undo:
        handle = os.open(inside, os.O_RDONLY)
        undo.callback(os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CommandError(f"{path} is in use: stop the service first") from None
        yield os.fstat(handle)


def _remove_log(path):
    """Remove SQLite's files beside a database, which would spoil its new content. Before that
    move the log into it, so that a crash leaves a whole database, the old one or the new."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(connect(path)) as old:
        old.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for end in BESIDE:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + end)


def _check_copy(partial, handle, file):
    mark_as_without_log(handle)  # as a backup is; the file may be another copy
    with contextlib.closing(connect(partial)) as copy:
        known_version(copy, file)
        check_whole(copy, file)


def _open_no_link(path, flags):
    return os.open(path, flags | os.O_NOFOLLOW)


def _replace_database(source, path, file):
    with (
        acting_as_owner(resolved(path)) as inside,
        without_service(inside, path) as old,
        new_file(inside) as (handle, partial),
    ):
        with open(handle, "wb", closefd=False) as copy:
            shutil.copyfileobj(source, copy)
        _check_copy(partial, handle, file)
        os.fchmod(handle, stat.S_IMODE(old.st_mode))
        with contextlib.suppress(PermissionError):  # else it is the folder's owner's
            os.fchown(handle, old.st_uid, old.st_gid)
        _remove_log(inside)


def restore(given: argparse.Namespace) -> None:
    """Replace the database of a stopped service by a backup, or change nothing."""
    path, file = given.database, resolved(given.file)
    require_database(path)
    on_stop(_interrupt)
    try:
        if not os.path.isfile(file):
            raise CommandError(f"{file} is not a file")
        if os.path.samefile(file, path):
            raise CommandError(f"{file} is the database itself")
        _check_unused(file)
        with open(file, "rb", opener=_open_no_link) as source:  # still with root's rights
            _replace_database(source, path, file)
    except sqlite3.Error as error:
        raise CommandError(f"{file} to {path}: {error}") from error
    except OSError as error:
        raise CommandError(f"{file} to {path}: {error.strerror}") from error
    log_fact("database restored", file=file, database=path, by=operator())


# ---- sink ----


def _exit(number, frame):
    stop_once()
    raise SystemExit(0)


def run_sink(given: argparse.Namespace) -> None:
    """Receive deliveries until a signal to stop."""
    on_stop(_exit)
    sys.stdout.reconfigure(errors="backslashreplace")
    where = given.listen or SINK_LISTEN
    try:
        sink = Sink(listen_address(where), given.secret, given.answer)
    except ValueError as error:
        raise SettingError(f"--listen: {error}") from None
    except OSError as error:
        raise SettingError(f"--listen: {where}: {error.strerror}") from None
    with sink:
        where = printable_address(*sink.server_address[:2])
        sink.show(f"listening on http://{where}/ and answering {given.answer}", "")
        sink.serve_forever()


# ---- the command line itself ----


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def _status(text):
    if not re.fullmatch("[2-5][0-9][0-9]", text):
        raise ValueError(f"{text!r} is not a status from 200 to 599")
    return int(text)


def _argument(parse):
    """A type for argparse, which repeats the text of a ValueError."""

    def parsed(text):
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def _add_database_commands(commands):
    user = commands.add_parser("user", help="who may log in: add, list, remove")
    users = user.add_subparsers(required=True, metavar="add|list|remove")
    help = "add a user, and print the secret made for it"
    add = users.add_parser("add", help=help)
    add.add_argument("name", type=_argument(user_name))
    add.add_argument("--role", choices=ROLES)
    add.add_argument("--password", action="store_true", help="read a password instead")
    help = "give a user that exists a new secret or password"
    add.add_argument("--replace", action="store_true", help=help)
    show = users.add_parser("list", help="print names and roles")
    remove = users.add_parser("remove", help="remove a user")
    remove.add_argument("name")
    help = "write a consistent copy, also while the service runs"
    copy = commands.add_parser("backup", help=help)
    copy.add_argument("file", metavar="FILE", help="replaced once the copy is complete")
    help = "put a backup in the place of the database of a stopped service"
    back = commands.add_parser("restore", help=help)
    back.add_argument("file", metavar="FILE", help="a backup, which stays as it is")
    runs = {add: add_user, show: list_users, remove: remove_user, copy: backup, back: restore}
    for command, run in runs.items():
        command.set_defaults(run=run)
        command.add_argument("--database", default=argparse.SUPPRESS, metavar="FILE")


def _add_sink_command(commands):
    help = "receive deliveries, print them and verify their signatures"
    sink = commands.add_parser("sink", help=help)
    help = f"default {SINK_LISTEN}, port 0 picks one"
    absent = argparse.SUPPRESS  # so that the flag before the subcommand counts too
    sink.add_argument("--listen", default=absent, metavar="HOST:PORT", help=help)
    help = "of the webhook, to verify signatures"
    sink.add_argument("--secret", type=_argument(password), help=help)
    help = "default 200"
    sink.add_argument("--answer", type=_argument(_status), default=200, metavar="STATUS", help=help)
    sink.set_defaults(run=run_sink)


def argument_parser() -> argparse.ArgumentParser:
    """The command line: every setting is a flag, and without a subcommand it serves."""
    parser = OneLineParser(
        prog="webhookd",
        allow_abbrev=False,
        description="Webhooks for the applications of a small server. Without a subcommand: serve.",
        epilog="Each setting may be given as the variable in brackets; the flag wins.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=160),
    )
    parser.add_argument("--version", action="version", version=f"webhookd {VERSION}")
    settings = parser.add_argument_group("settings")
    for field in dataclasses.fields(Settings):
        default = field.metadata["default"] or "none"
        help = f"{field.metadata['text']} [{variable(field)}, default {default}]"
        settings.add_argument(flag(field), metavar=field.metadata["metavar"], help=help)
    commands = parser.add_subparsers(title="subcommands", metavar="SUBCOMMAND")
    _add_database_commands(commands)
    _add_sink_command(commands)
    return parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """What the command line says; ends the process if it makes no sense."""
    parser = argument_parser()
    given = parser.parse_args(arguments)
    if getattr(given, "run", None) is add_user and not (given.role or given.replace):
        parser.error("a new user needs a --role")
    return given


def start(given: argparse.Namespace) -> None:
    """Serve, and log the names of variables that are no settings."""
    settings = read_settings(vars(given), os.environ)
    for name in unknown_variables(os.environ):
        log_fact("no setting has this name", level=logging.WARNING, variable=name)
    serve(settings)


# errors that end the program with one line; the last two come when the machine lacks something
FAILURES = SettingError, DatabaseError, CommandError, WebhookdError, sqlite3.Error, OSError


COMPILED = "/proc/self/fd/"  # where the script is that has shed its syntax tree


def shed_syntax_tree(code: types.CodeType) -> None:
    """Go on as the same process with this file's compiled code, as of a .pyc.

    Python keeps the syntax tree of a script while the script runs: 19 of 52 MB."""
    with contextlib.suppress(OSError, AttributeError):  # where that may not be: larger
        handle = os.memfd_create("webhookd", 0)
        with open(handle, "wb", closefd=False) as file:
            file.write(importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code))
        os.stat(f"{COMPILED}{handle}")  # raises where there is no /proc
        # the name is for ps(1) only
        python = [sys.executable, "-P", "-X", "webhookd", f"{COMPILED}{handle}"]
        os.execv(sys.executable, python + sys.argv[1:])


def main(arguments: list[str] | None = None, code: types.CodeType | None = None) -> int:
    """Run the command line; the exit status. code: this file's, if it runs as a script."""
    os.umask(0o077)  # the database holds secrets
    given = parse(arguments)
    start_logging()
    try:
        if hasattr(given, "run"):
            # a subcommand needs the database only: other settings may be at fault
            from_environ = os.environ.get("WEBHOOKD_DATABASE")
            given.database = given.database or from_environ or Settings.database
            given.run(given)
        else:
            if code and not sys.argv[0].startswith(COMPILED):
                shed_syntax_tree(code)
            start(given)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except FAILURES as error:
        priority = "<3>" if writes_to_journal(os.environ) else ""
        print(f"{priority}webhookd: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(code=sys._getframe().f_code))
