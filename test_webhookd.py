"""Tests of webhookd, section by section as the module; run by pytest.

Run as a program (`python3 test_webhookd.py`) it is the benchmark, its last section."""

import argparse
import ast
import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import errno
import functools
import hashlib
import hmac
import http.client
import http.server
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import re
import resource
import select
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.request

import bottle
import pytest
import webtest

import webhookd

HERE = pathlib.Path(__file__).parent
WEBHOOKS, EVENTS = "/rest/api/webhooks", "/rest/api/events"
PAGE_PATHS = ("/webhooks/", "/deliveries/", "/events", "/favicon.ico")
LOOPBACK = webhookd.networks("127.0.0.0/8,::1/128")

# ======================================================================================
# Fixtures: real parts, built for each test
# ======================================================================================


class Clock:
    """Time that passes when a test says so; seconds."""

    def __init__(self):
        self.now = 1_700_000_000.0

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds

    @property
    def ms(self):
        return int(self.now * 1000)


@dataclasses.dataclass
class Received:
    """A request as it reached the receiver."""

    path: str
    headers: dict
    body: bytes
    connection: tuple


class Receiver(http.server.ThreadingHTTPServer):
    """A real HTTP server that answers from a script and records what came."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), ReceiverHandler)
        self.url = f"http://127.0.0.1:{self.server_port}/hook"
        self.received = []
        self.script = []
        self.default = (200, {}, b"ok")
        self.raw = None
        self.hold = threading.Event()
        self.hold.set()

    def answers(self, status, headers=None, body=b"ok", times=None):
        answer = (status, headers or {}, body)
        if times is None:
            self.default = answer
        else:
            self.script += [answer] * times

    def bodies(self):
        return [json.loads(request.body) for request in self.received]

    def handle_error(self, request, client_address):
        pass  # a client that goes away is part of many tests


class ReceiverHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append(
            Received(self.path, dict(self.headers), body, self.client_address)
        )
        self.server.hold.wait(30)
        if self.server.raw is not None:
            self.wfile.write(self.server.raw)
            self.close_connection = True
            return
        script = self.server.script
        status, headers, body = script.pop(0) if script else self.server.default
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.hold.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def receiver():
    with running(Receiver()) as server:
        yield server


@pytest.fixture
def settings():
    return webhookd.Settings(
        allow_networks=LOOPBACK, delivery_timeout=5.0, retry_schedule=(10.0, 100.0)
    )


def open_store(path, settings=webhookd.Settings(), jitter=lambda: 1.0):
    return webhookd.Store(str(path), settings, jitter)


@pytest.fixture
def store(tmp_path, settings):
    with open_store(tmp_path / "test.db", settings) as store:
        yield store


@pytest.fixture
def address_policy():
    return webhookd.AddressPolicy(LOOPBACK, ("127.0.0.1", 2))


@pytest.fixture
def dispatcher(store, address_policy, settings, clock):
    client = webhookd.Client(address_policy, settings.delivery_timeout)
    return webhookd.Dispatcher(store, client, settings, clock)


SECRETS = {role: f"secret-of-{role}" for role in webhookd.ROLES}


class App(webtest.TestApp):
    """The API as one of its users sees it; answers of any status are returned."""

    def log_in(self, role):
        self.authorization = ("Bearer", SECRETS[role])
        return self

    def do_request(self, req, status=None, expect_errors=None):
        return super().do_request(req, status or "*", expect_errors)

    def create(self, url, *events, **fields):
        fields = {"url": url, "events": list(events) or ["e"]} | fields
        answer = self.post_json(WEBHOOKS, fields)
        assert answer.status_int == 201, answer.text
        return answer.json

    def publish(self, event="e", **fields):
        answer = self.post_json(EVENTS, {"event": event} | fields)
        assert answer.status_int == 202, answer.text
        return answer.json

    def get_webhook(self, webhook):
        return self.get(f"{WEBHOOKS}/{webhook['id']}").json

    def deliveries(self, webhook, query=""):
        answer = self.get(f"{WEBHOOKS}/{webhook['id']}/deliveries{query}")
        return answer.json["results"]


Parts = collections.namedtuple("Parts", "store dispatcher policy settings clock steady_clock")


@pytest.fixture
def parts(store, dispatcher, address_policy, settings, clock):
    """The parts of an Api, and a user of each role."""
    for role in webhookd.ROLES:
        user = webhookd.User(role, role, webhookd.secret_record(SECRETS[role]))
        store.write(lambda batch, user=user: webhookd.save_user(batch.connection, user))
    return Parts(store, dispatcher, address_policy, settings, clock, clock)


def api_with_pages(parts):
    """An Api of these parts, and the pages beside it."""
    api = webhookd.Api(*parts)
    webhookd.Pages(api, parts.store, parts.policy)
    return api


@pytest.fixture
def wsgi(parts):
    return api_with_pages(parts).app


@pytest.fixture
def api(wsgi):
    return App(wsgi).log_in("admin")


def contexts(answer):
    """The fields at fault, of an answer that refuses."""
    assert answer.json["statusCode"] == answer.status_int
    return [error["context"] for error in answer.json["errors"]]


class Daemon:
    """The program itself, in a process of its own, with a real file."""

    def __init__(self, folder):
        self.database = str(folder / "daemon.db")
        self.process = None
        self.log = []

    def start(self, *flags, **variables):
        command = [sys.executable, str(HERE / "webhookd.py"), "--listen", "127.0.0.1:0"]
        command += ["--database", self.database, "--allow-networks", "127.0.0.0/8", *flags]
        self.process = subprocess.Popen(
            command,
            env=os.environ | {"WEBHOOKD_ADMIN_PASSWORD": "pw"} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in self.process.stderr:
            self.log.append(line)
            if ready := re.search(r"ready listen=127\.0\.0\.1:(\d+)", line):
                self.port = int(ready[1])
                return self
        raise AssertionError("".join(self.log))

    def call(self, method, path, body=None, **headers):
        """Status and parsed answer of one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            headers = {"Authorization": BASIC, "Content-Type": "application/json"} | headers
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, headers)
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text else None

    def end(self, number):
        """Send a signal; the exit status and what else was logged."""
        self.process.send_signal(number)
        self.output, rest = self.process.communicate(timeout=30)
        self.log.append(rest)
        return self.process.returncode


BASIC = "Basic " + base64.b64encode(b"admin:pw").decode()


@pytest.fixture
def daemon(tmp_path):
    daemon = Daemon(tmp_path)
    yield daemon
    if daemon.process and daemon.process.poll() is None:
        daemon.end(signal.SIGKILL)


def make_certificate(folder):
    """Put cert.pem, self-signed for localhost, and key.pem into a folder; returns it."""
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    command += " -addext subjectAltName=DNS:localhost -keyout key.pem -out cert.pem"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return folder


def server_context(folder):
    """What a TLS server needs to show the certificate of a folder."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{folder}/cert.pem", f"{folder}/key.pem")
    return context


def wait_until(condition, seconds=20):
    """Poll for what another process or thread does in its own time."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.01)


def ends(call):
    """Whether a call ends, instead of waiting without end."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(20)
    return not thread.is_alive()


# ======================================================================================
# Module
# ======================================================================================


def top_level_definitions(tree):
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = [node.name]
        yield node, names


def test_the_file_uses_only_what_is_above():
    tree = ast.parse((HERE / "webhookd.py").read_text())
    all_names = {name for _, names in top_level_definitions(tree) for name in names}

    defined, too_early = set(), []
    for node, names in top_level_definitions(tree):
        defined |= set(names)
        found = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
        used = {n.id for n in found if isinstance(n.ctx, ast.Load)}
        local = {n.id for n in found if isinstance(n.ctx, ast.Store)}
        local |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
        too_early += [(names, name) for name in (used & all_names) - defined - local]

    assert too_early == []


def test_the_docstring_lists_the_sections_in_their_order():
    text = (HERE / "webhookd.py").read_text()
    banners = re.findall(r"# =+\n# ([^:\n]+).*\n# =+\n", text)
    listed = webhookd.__doc__.partition("finds them):")[2]

    assert re.split(r"\s{2,}", listed.strip()) == [
        name if name in ("REST API", "HTTP server") else name[0].lower() + name[1:]
        for name in banners
    ]


README = (HERE / "README.md").read_text()


def subcommands(parser, before=""):
    """The names of a parser's subcommands, each with those that it is under."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from list(subcommands(inner, f"{before}{name} ")) or [before + name]


def test_readme_names_every_route_setting_and_subcommand_and_no_other(wsgi):
    routes = {
        (route.method, re.sub(r"<(\w+)(:id)?>", r"{\1}", route.rule))
        for route in wsgi.routes
        if not route.rule.startswith(PAGE_PATHS)
    }
    variables = {webhookd.variable(f) for f in dataclasses.fields(webhookd.Settings)}
    flags = {webhookd.flag(f) for f in dataclasses.fields(webhookd.Settings)}
    command = r"(?:^|`|python3 )webhookd(?:\.py)? ((?:user )?[a-z]+)"

    named = set(re.findall(r"`(GET|POST|PUT|DELETE) ([^`?\s]+)[^`]*`", README))
    code = re.findall(r"```sh\n.*?```|`[^`\n]+`", README, re.DOTALL)
    commands = set(re.findall(command, "\n".join(code), re.MULTILINE))

    assert named == routes
    assert set(re.findall(r"`(WEBHOOKD_[A-Z_]+)`", README)) == variables
    assert flags <= set(re.findall(r"`(--[a-z-]+)`", README))
    assert commands == set(subcommands(webhookd.argument_parser()))


def test_readme_tells_the_defaults_of_the_settings():
    rows = re.findall(
        r"^\| `(WEBHOOKD_[A-Z_]+)` \| `\S+` \| `?([^`|]+?)`? \|", README, re.MULTILINE
    )

    assert dict(rows) == {
        webhookd.variable(field): field.metadata["default"] or "none"
        for field in dataclasses.fields(webhookd.Settings)
    }


def test_readme_explains_the_lines_of_the_log_that_are_to_act_on():
    source = (HERE / "webhookd.py").read_text()
    table = README.partition("| line | meaning |")[2].partition("\n\n")[0]
    spans = re.findall(r"`([^`\n]+)`", table)
    told = [span for span in spans if re.fullmatch(r"[A-Za-z',…]+( [A-Za-z',…]+)+", span)]
    call = r'(?:log_fact|add)\(\s*"([^"]+)",\s*(?:level=)?logging\.(?:WARNING|ERROR)'

    assert [words for words in told if f'"{words.replace("…", "%s")}"' not in source] == []
    assert set(re.findall(call, source)) <= set(told)


def test_readme_and_the_docstring_show_the_same_picture():
    drawn = re.search(r"## How it works\n\n```\n(.*?)```", README, re.DOTALL)[1]

    indented = "\n".join(line and f"    {line}" for line in drawn.splitlines())

    assert indented in webhookd.__doc__


def test_the_links_within_readme_lead_to_its_headings():
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    headings = re.findall(r"^##+ (.+)$", prose, re.MULTILINE)

    anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}

    assert set(re.findall(r"\]\(#([^)]+)\)", prose)) <= anchors


def test_the_lines_of_readme_fit_on_a_screen():
    lines = [line for line in README.splitlines() if not line.startswith("|")]

    assert [line for line in lines if len(line) > 120] == []


def test_every_webhook_of_the_recipes_can_be_registered():
    recipes = README.partition("## Recipes")[2].partition("\n## ")[0]
    posted = re.findall(r"/rest/api/webhooks (?:-d|--json) '(.*?)'\n", recipes, re.DOTALL)
    rows = re.findall(r"^\| \w+ \| `(http\S+)` \| `(.+?)` \| `?(.*?)`? ?\|$", recipes, re.MULTILINE)
    fields = [json.loads(text) for text in posted]
    fields += [
        {"url": url, "events": ["e"], "template": json.loads(template)}
        | ({"headers": json.loads(headers)} if headers else {})
        for url, template, headers in rows
    ]
    webhooks = [webhookd.read_webhook(given, webhookd.Webhook()) for given in fields]

    assert len(webhooks) == 8
    assert all(webhook.name for webhook in webhooks)


has_curl_and_jq = shutil.which("curl") and shutil.which("jq")


@pytest.mark.skipif(not has_curl_and_jq, reason="needs curl and jq")
def test_the_examples_of_the_api_table_run_from_top_to_bottom(daemon, receiver):
    daemon.start()
    examples = re.findall(r"^\| `[A-Z]+ /.*\| `([^`]+)` \|$", README, re.MULTILINE)
    flags = re.search(r"^A='(.+)' U=", README, re.MULTILINE)[1].replace("admin:try-it", "admin:pw")
    lines = ['curl() { command curl --fail-with-body "$@"; }', *examples]
    script = "\n".join(lines).replace("\\|", "|").replace("http://127.0.0.1:9000/", receiver.url)
    variables = {"A": flags, "U": f"http://127.0.0.1:{daemon.port}"}

    result = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script],
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )

    assert result.returncode == 0, result.stdout + result.stderr
    assert len(examples) == 21
    assert "null" not in re.findall(r"^\+ [WED]=(.*)$", result.stderr, re.MULTILINE)
    left = [daemon.call("GET", path)[1]["totalCount"] for path in (WEBHOOKS, EVENTS)]
    assert left == [0, 0]  # what the last rows delete is what the first ones made


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_the_unit_passes_systemd_analyze_verify(tmp_path):
    unit = tmp_path / "webhookd.service"
    text = (HERE / "webhookd.service").read_text()
    unit.write_text(text.replace("/usr/local/bin/webhookd", str(HERE / "webhookd.py")))

    result = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True
    )

    assert (result.returncode, result.stderr) == (0, "")


# ======================================================================================
# Constants and logging
# ======================================================================================


def test_a_fact_is_one_line_of_words_and_values(caplog):
    with caplog.at_level("INFO"):
        webhookd.log_fact("webhook created", id=3, name='a "b"\nc', url="http://x/")

    assert caplog.messages == [r'webhook created id=3 name="a \"b\"\nc" url=http://x/']


@pytest.mark.parametrize("text", ['a"b', "\x1b[2J", "\u202e", "a\u2028b", ""])
def test_a_value_that_could_be_taken_for_something_else_is_quoted(caplog, text):
    with caplog.at_level("INFO"):
        webhookd.log_fact("tested", id=text)

    [line] = caplog.messages
    assert line.isprintable()
    assert json.loads(line.removeprefix("tested id=")) == text


# ======================================================================================
# Settings
# ======================================================================================


@pytest.mark.parametrize(
    "text, seconds", [("500ms", 0.5), ("5s", 5), ("5m", 300), ("2h", 7200), ("30d", 2592000)]
)
def test_durations_have_units(text, seconds):
    assert webhookd.duration(text) == seconds


@pytest.mark.parametrize("text, size", [("64K", 65536), ("1M", 1 << 20), ("2G", 2 << 30)])
def test_sizes_have_units(text, size):
    assert webhookd.size(text) == size


@pytest.mark.parametrize(
    "text, address",
    [("127.0.0.1:8090", ("127.0.0.1", 8090)), ("[::1]:0", ("::1", 0)), ("a:1", ("a", 1))],
)
def test_listen_addresses(text, address):
    assert webhookd.listen_address(text) == address


def test_a_flag_wins_over_its_variable_and_a_variable_over_the_default():
    environ = {"WEBHOOKD_MAX_IN_FLIGHT": "3", "WEBHOOKD_WEBHOOK_CONCURRENCY": "2"}

    settings = webhookd.read_settings({"max_in_flight": "4"}, environ)

    assert (settings.max_in_flight, settings.webhook_concurrency) == (4, 2)
    assert settings.delivery_timeout == 20


def test_the_default_schedule_makes_ten_attempts_over_about_three_days():
    schedule = webhookd.Settings().retry_schedule

    assert len(schedule) == 9
    assert 3 < sum(schedule) / 86400 < 3.5


def test_blank_variable_counts_as_not_set():
    assert webhookd.read_settings({}, {"WEBHOOKD_LISTEN": ""}).listen[1] == 8090


def test_a_blank_flag_wins_too():
    environ = {"WEBHOOKD_ALLOW_NETWORKS": "127.0.0.0/8"}

    assert webhookd.read_settings({"allow_networks": ""}, environ).allow_networks == ()


def test_a_systemd_credential_is_the_admin_password(tmp_path):
    (tmp_path / "admin-password").write_text(" pass word \n")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path), "WEBHOOKD_ADMIN_PASSWORD": ""}

    settings = webhookd.read_settings({}, environ)

    assert settings.admin_password == " pass word "


@pytest.mark.parametrize(
    "name, text",
    [
        ("LISTEN", "8090"),
        ("LISTEN", "::1:8090"),
        ("LISTEN", "127.0.0.1:65536"),
        ("LISTEN", "127.0.0.1:\u0663"),
        ("LISTEN", "*:8090"),
        ("ADMIN_PASSWORD", "\udcff"),
        ("ALLOW_NETWORKS", "127.0.0.0/33"),
        ("RETRY_SCHEDULE", "5s,5"),
        ("RETRY_SCHEDULE", "0s"),
        ("DELIVERY_TIMEOUT", "-1s"),
        ("MAX_IN_FLIGHT", "0"),
        ("WEBHOOK_CONCURRENCY", "many"),
        ("MAX_EVENT_SIZE", "1T"),
        ("MAX_EVENT_SIZE", "0"),
        ("TRUSTED_PROXY", "proxy"),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_setting(name, text):
    with pytest.raises(webhookd.SettingError, match=f"WEBHOOKD_{name}"):
        webhookd.read_settings({}, {f"WEBHOOKD_{name}": text})


def test_a_credential_that_cannot_be_read_is_refused_by_the_name_of_its_setting(tmp_path):
    (tmp_path / "admin-password").mkdir()

    with pytest.raises(webhookd.SettingError, match=r"WEBHOOKD_ADMIN_PASSWORD.*Is a directory"):
        webhookd.read_settings({}, {"CREDENTIALS_DIRECTORY": str(tmp_path)})


def test_a_variable_that_is_no_setting_is_known_by_its_name():
    environ = {"WEBHOOKD_LISTEN": "x", "WEBHOOKD_RETENTON": "1d", "OTHER": "y", "WEBHOOKD_": "z"}

    assert webhookd.unknown_variables(environ) == ["WEBHOOKD_", "WEBHOOKD_RETENTON"]


# ======================================================================================
# Errors
# ======================================================================================


def test_an_error_lists_every_fault():
    error = webhookd.Invalid(webhookd.Fault("url", "is needed"), "something else")

    assert webhookd.error_document(error.status, error.faults) == {
        "statusCode": 400,
        "reason": "Bad Request",
        "message": "url: is needed; something else",
        "errors": [
            {"context": "url", "message": "is needed", "exceptionName": None},
            {"context": None, "message": "something else", "exceptionName": None},
        ],
    }


def test_an_error_lists_at_most_100_faults():
    error = webhookd.Invalid(*[webhookd.Fault(str(n), "is bad") for n in range(1000)])

    assert len(webhookd.error_document(400, error.faults)["errors"]) == 100
    assert str(error).endswith("99: is bad")


# ======================================================================================
# Model
# ======================================================================================


@pytest.mark.parametrize(
    "url, shown",
    [
        ("https://u:p@host/p@th", "https://********@host/p@th"),
        ("https://u:p:q@host/", "https://********@host/"),
        ("https://token@host/", "https://********@host/"),
        ("https://token:@host/", "https://********@host/"),
        ("https://host/?a:b@c", "https://host/?a:b@c"),
    ],
)
def test_both_halves_of_the_user_information_in_a_url_are_masked(url, shown):
    assert webhookd.masked_url(url) == shown


@pytest.mark.parametrize(
    "url, shown",
    [
        ("https://u:p@host:8443/hooks/8zx3?key=1", "https://host:8443/…"),
        ("http://[::1]/", "http://[::1]/…"),
        ("http://host?key", "http://host/…"),
    ],
)
def test_a_short_url_ends_with_the_host(url, shown):
    assert webhookd.short_url(url) == shown


TOKEN = "0123456789abcdef"


@pytest.mark.parametrize(
    "fields",
    [
        {"url": f"https://{TOKEN}@host/"},
        {"url": f"https://{TOKEN}:@host/"},
        {"url": f"https://{TOKEN}:password@host/"},
        {"url": f"https://user:{TOKEN}@host/"},
        {"url": "https://%30123456789abcdef@host/"},
        {"headers": {"Authorization": f"Bearer {TOKEN}"}},
        {"headers": {"Authorization": "Basic " + webhookd.base64_of(f"user:{TOKEN}")}},
        {"headers": {"X-Key": TOKEN}},
        {"credentials": {"username": "user", "password": TOKEN}},
        {"secret": TOKEN},
        {"secret": f"whsec_{TOKEN}"},
        {"previous_secret": TOKEN},
    ],
)
def test_every_secret_of_a_header_or_url_is_masked_in_answers(fields):
    webhook = webhookd.Webhook(**{"url": "https://host/"} | fields)

    assert webhook.without_secrets(f"got: {TOKEN}") == f"got: {webhookd.MASK}"


@pytest.mark.parametrize(
    "url, text, shown",
    [
        ("https://host/hooks/8zx3-8zx3-8zx3", "at /hooks/8zx3-8zx3-8zx3/", "at …/"),
        ("https://host/bot8zx38zx38zx38zx3/send", "bot8zx38zx38zx38zx3", "…"),
        ("https://host/?key=8zx38zx38zx38zx3", '{"key": "8zx38zx38zx38zx3"}', '{"key": "…"}'),
        ("https://host/hook", "at /hook", "at /hook"),
    ],
)
def test_tokens_of_a_path_are_cut_out_of_answers(url, text, shown):
    assert webhookd.without_path(text, url) == shown


@pytest.mark.parametrize(
    "names, event, expected",
    [
        (("page_created",), "page_created", True),
        (("page_created",), "page_created2", False),
        (("page_*",), "page_created", True),
        (("page_*",), "blog_created", False),
        (("*",), "anything", True),
    ],
)
def test_names_and_wildcards_take_events(names, event, expected):
    assert webhookd.Webhook(events=names).subscribed(event) is expected


def test_inactive_webhook_shows_no_end_of_a_pause():
    health = webhookd.Health(failures=5, paused_until=1000)

    def paused_until(**fields):
        return health.as_json(webhookd.Webhook(**fields), 0, None)["pausedUntil"]

    assert paused_until() == 1000
    assert paused_until(active=False) is None
    assert paused_until(paused=True) is None


@pytest.mark.parametrize(
    "body, payload",
    [
        (b'{"timestamp":7,"event":"e.f"}', b"{}"),
        (
            b'{"timestamp":7.5,"event":"e.f","event2":"\\"event\\":\\"e.f\\""}',
            b'{"event2":"\\"event\\":\\"e.f\\""}',
        ),
        (b'{"timestamp":7,"a":1,"event":{"id":2}}', b'{"a":1,"event":{"id":2}}'),
        (b'{"timestamp":7,"event":"eef"}', b'{"event":"eef"}'),
        (b'{"event":"e.f","timestamp":"today"}', b'{"timestamp":"today"}'),
        (b'{"timestamp":77,"event":"e.f"}', b'{"timestamp":77,"event":"e.f"}'),
        (b'{"timestamp":1e999,"a":1}', b'{"timestamp":1e999,"a":1}'),
        (b'{"a":{"timestamp":7}}', b'{"a":{"timestamp":7}}'),
    ],
)
def test_the_payload_is_the_body_without_its_time_and_name_where_they_lead_it(body, payload):
    assert webhookd.payload_of(body, "e.f", 7) == payload


# ======================================================================================
# Reading input
# ======================================================================================


def read_event(text, **options):
    options = {"lines": False, "now_ms": 7, "max_bytes": 1000} | options
    return webhookd.read_events(text.encode("utf-8", "surrogatepass"), **options)


@pytest.mark.parametrize(
    "sent, delivered",
    [
        ('{"event": "e"}', '{"timestamp":7,"event":"e"}'),
        ('\ufeff{"event": "e"}', '{"timestamp":7,"event":"e"}'),
        ('{"a":1,"event":"e","timestamp":3}', '{"timestamp":3,"event":"e","a":1}'),
        (
            '{"event":"e","n":[1.10, -0, -0.0, 1E5, 1e400, 123456789012345678901234567890]}',
            '{"timestamp":7,"event":"e","n":[1.10,-0,-0.0,1E5,1e400,123456789012345678901234567890]}',
        ),
        ('{"event":"e","n":%s}' % ("9" * 900), '{"timestamp":7,"event":"e","n":%s}' % ("9" * 900)),
        ('{"event":"e","s":"\\u00e4\\n\\ud800"}', '{"timestamp":7,"event":"e","s":"ä\\n\\ud800"}'),
        (
            '{"event":"e","o":{"b": null, "a": [true, {}]}}',
            '{"timestamp":7,"event":"e","o":{"b":null,"a":[true,{}]}}',
        ),
    ],
)
def test_an_event_is_delivered_as_it_was_sent(sent, delivered):
    assert read_event(sent).body.decode() == delivered


@pytest.mark.parametrize(
    "text, fault",
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ('{"event":"e","x":NaN}', "NaN is not JSON"),
        ('{"event":"e","x":-Infinity}', "-Infinity is not JSON"),
        ('{"event":"webhook_paused"}', "event: is a name of webhookd's own"),
        ('"text"', "must be a JSON object"),
        ("[]", "at least one event is needed"),
        ("[1,]", "not valid JSON"),
        ('[{"event":"e"} 7]', "not valid JSON"),
        ('[{"event":"e"}] 7', "not valid JSON"),
        ('[{"event":"e"}', "not valid JSON"),
        ("{}", "event: is needed"),
        ('{"event":null}', "event: must be a string"),
        ('{"event":"page_*"}', "event: must be 1 to 64"),
        ('{"event":"%s"}' % ("e" * 65), "event: must be 1 to 64"),
        ('{"event":"e\\n"}', "event: must be 1 to 64"),
        ('{"event":7}', "event: must be"),
        ('{"event":"e","timestamp":"7"}', "timestamp: must be a number"),
        ('{"event":"e","timestamp":true}', "timestamp: must be a number"),
        ('{"event":"e","timestamp":null}', "timestamp: must be a number"),
        ('{"event":"e","timestamp":1e400}', "timestamp: is out of range"),
        ('{"event":"e","timestamp":%s}' % ("9" * 5000), "timestamp: is out of range"),
        ('[{"event":"e"},{"event":""},7]', r"\[1\]\.event: must be.*\[2\]: an event must be"),
    ],
)
def test_body_that_is_no_event_is_refused(text, fault):
    with pytest.raises(webhookd.Invalid, match=fault):
        read_event(text, max_bytes=1 << 20)


def nested(depth):
    """An event with objects and lists in turn within each other."""
    half = (depth - 1) // 2
    return '{"event":"e","x":%s}' % (
        '[{"x":' * half + "[]" * (depth % 2 == 0) + '""' * (depth % 2) + "}]" * half
    )


@pytest.mark.parametrize(
    "shape, lines", [("%s", False), ('[{"event":"e"},%s]', False), ("%s\n", True)]
)
def test_an_event_is_nested_100_deep_and_no_deeper(shape, lines):
    read_event(shape % nested(99), lines=lines)
    read_event(shape % nested(100), lines=lines)
    for depth in (101, 500, 100_000):
        with pytest.raises(webhookd.Invalid, match="nested deeper than 100"):
            read_event(shape % nested(depth), lines=lines, max_bytes=1 << 20)


def test_brackets_in_strings_do_not_count_as_depth():
    read_event(json.dumps({"event": "e", "x": "[{" * 200, "y": [[]] * 100}))


def test_every_other_json_body_is_nested_100_deep_and_no_deeper():
    webhookd.json_object(b'{"a":%s}' % (b"[" * 99 + b"]" * 99))
    with pytest.raises(webhookd.Invalid, match="nested deeper than 100"):
        webhookd.json_object(b'{"a":%s}' % (b"[" * 100 + b"]" * 100))


QUERY, HEADER = webhookd.Naming(query="q"), webhookd.Naming(header="h")


@pytest.mark.parametrize(
    "naming, sent, name, delivered",
    [
        (QUERY, '{"a": 1.10}', "q", '{"timestamp":7,"event":"q","a":1.10}'),
        (QUERY, '{"a":1,"event":"own"}', "q", '{"timestamp":7,"a":1,"event":"own"}'),
        (QUERY, '{"a":1,"timestamp":"now"}', "q", '{"event":"q","a":1,"timestamp":"now"}'),
        (QUERY, '{"timestamp":null,"event":{}}', "q", '{"timestamp":null,"event":{}}'),
        (QUERY, "{}", "q", '{"timestamp":7,"event":"q"}'),
        (HEADER, '{"a":1}', "h", '{"timestamp":7,"event":"h","a":1}'),
        (HEADER, '{"a":1,"event":{"id":5}}', "h", '{"timestamp":7,"a":1,"event":{"id":5}}'),
        (HEADER, '{"event":null}', "h", '{"timestamp":7,"event":null}'),
        (HEADER, '{"a":1,"event":"own"}', "own", '{"timestamp":7,"event":"own","a":1}'),
        (webhookd.Naming("q", "h"), '{"a":1}', "q", '{"timestamp":7,"event":"q","a":1}'),
        (webhookd.Naming("q", "a b"), '{"a":1}', "q", '{"timestamp":7,"event":"q","a":1}'),
    ],
)
def test_event_of_another_program_keeps_its_body(naming, sent, name, delivered):
    event = read_event(sent, naming=naming)

    assert (event.name, event.timestamp, event.body.decode()) == (name, 7, delivered)


def test_name_from_outside_names_every_event_of_an_array_or_of_lines():
    events = read_event('[{"a":1},{"event":5}]', naming=HEADER)
    lines = read_event('{"a":1}\n{"event":"own"}', naming=QUERY, lines=True)

    assert [event.name for event in events] == ["h", "h"]
    assert [event.name for event in lines] == ["q", "q"]


@pytest.mark.parametrize("name", ["Push Hook", "x*", "e" * 65, "webhook_disabled"])
def test_bad_name_in_a_header_is_refused_where_it_is_needed(name):
    naming = webhookd.Naming(header=name)

    with pytest.raises(webhookd.Invalid, match=r"\[1\]\.event: the name in X-Event-Key"):
        read_event('[{"event":"own"},{"a":1}]', naming=naming)
    assert read_event('{"event":"own"}', naming=naming).name == "own"


@pytest.mark.parametrize("sent", ['{"x":"%s"}', '{"x":"%s","event":1}', '{"event":"e","x":"%s"}'])
def test_added_fields_do_not_count_in_the_size_of_an_event(sent):
    fits = sent % ("x" * (1000 - len(sent % "")))

    read_event(fits, naming=HEADER)
    with pytest.raises(webhookd.TooLarge):
        read_event(fits.replace("xx", "xxx", 1), naming=HEADER)


def test_bad_json_and_too_large_an_event_are_different_errors():
    large = '"%s"' % ("x" * 2000)
    with pytest.raises(webhookd.TooLarge, match=r"\[1\]: an event may have"):
        read_event('[{"event":"e"}, {"x": %s}]' % large)
    with pytest.raises(webhookd.Invalid, match="not valid JSON: Expecting"):
        read_event('[{"event":"e" 7}, %s]' % large)


def test_body_that_is_not_utf_8_is_refused():
    with pytest.raises(webhookd.Invalid, match="not UTF-8"):
        webhookd.read_events(b'{"event":"\xff"}', False, 7, 1000)


def test_lines_are_events_and_blank_ones_are_skipped():
    events = read_event('{"event":"a"}\n\n{"event":"b"}\r\n', lines=True)

    assert [event.name for event in events] == ["a", "b"]


def test_the_end_of_a_line_is_no_part_of_its_event():
    line = '{"event":"e"}'

    assert len(read_event(f"{line}\r\n{line}\r\n", lines=True, max_bytes=13)) == 2


def test_bad_line_is_named_by_its_index():
    with pytest.raises(webhookd.Invalid, match=r"\[1\]: the body is not valid JSON"):
        read_event('{"event":"a"}\n{', lines=True)


def test_at_most_1000_events_come_at_once():
    assert len(read_event("[%s]" % ",".join(['{"event":"e"}'] * 1000))) == 1000
    with pytest.raises(webhookd.Invalid, match="at most 1000 events"):
        read_event("[%s]" % ",".join(['{"event":"e"}'] * 1001))


@pytest.mark.parametrize("shape", ["%s", "[%s]"])
def test_an_event_of_exactly_the_largest_size_is_taken_and_one_more_byte_is_not(shape):
    event = '{"event":"e","x":"%s"}'
    fits = event % ("x" * (1000 - len(event % "")))

    read_event(shape % fits)
    with pytest.raises(webhookd.TooLarge, match="at most 1000 bytes"):
        read_event(shape % fits.replace("xx", "xxx", 1))


@pytest.mark.parametrize("lines", [False, True])
def test_an_event_is_as_large_as_it_was_sent(lines):
    with pytest.raises(webhookd.TooLarge):
        read_event('{"event":"e"%s}' % (" " * 1000), lines=lines)


def read_webhook(old=webhookd.Webhook(), **fields):
    fields = ({"url": "http://x/", "events": ["e"]} if not old.url else {}) | fields
    body = json.dumps(fields).encode()
    return webhookd.read_webhook(webhookd.json_object(body), old)


def test_fields_left_out_have_defaults():
    webhook = read_webhook()

    assert (webhook.name, webhook.active, webhook.verify_tls) == ("http://x", True, True)


@pytest.mark.parametrize("value", [True, "true", "True"])
def test_booleans_may_be_strings(value):
    assert read_webhook(active=value).active is True
    assert read_webhook(active=str(value is None).lower()).active is False


def test_events_are_counted_without_duplicates():
    assert read_webhook(events=["a"] * 101).events == ("a",)


@pytest.mark.parametrize(
    "url, name",
    [
        ("http://u:p@x:81/hooks/8zx3?key=8zx3", "http://x:81"),
        ("https://[2001:db8::1]/", "https://[2001:db8::1]"),
        ("http://" + "x." * 150 + "x/", ("http://" + "x." * 150)[:255]),
    ],
)
def test_name_left_out_becomes_scheme_and_host(url, name):
    assert read_webhook(url=url).name == name


def test_a_shortened_url_is_not_taken_for_the_whole():
    with pytest.raises(webhookd.Invalid, match="shortened"):
        read_webhook(FULL, url=FULL.short_url)


def test_events_are_a_set():
    assert read_webhook(events=["b", "a", "b", "page_*", "*"]).events == ("b", "a", "page_*", "*")


@pytest.mark.parametrize(
    "fields, context",
    [
        ({"url": None}, "url"),
        ({"url": 7}, "url"),
        ({"url": "ftp://x/"}, "url"),
        ({"url": "http:///path"}, "url"),
        ({"url": "http://x/#top"}, "url"),
        ({"url": "http://x/#"}, "url"),
        ({"url": "http://x:0/"}, "url"),
        ({"url": "http://x:65536/"}, "url"),
        ({"url": "http://x/a b"}, "url"),
        ({"url": "http://x/\n"}, "url"),
        ({"url": "http://a\\@b/"}, "url"),
        ({"url": "http://[::1/"}, "url"),
        ({"url": "http://[fe80::1%25eth0]/"}, "url"),
        ({"url": "http://x/" + "x" * 1992}, "url"),
        ({"url": "http://u:********@x/"}, "url"),
        ({"url": "http://%s.x/" % ("ä" * 64)}, "url"),
        ({"url": "http://127.1/"}, "url"),
        ({"url": "http://1.2.3/"}, "url"),
        ({"url": "http://1.2.3.4.5/"}, "url"),
        ({"url": "http://127.0.0.1./"}, "url"),
        ({"url": "http://0177.0.0.1/"}, "url"),
        ({"url": "http://0x7f.1/"}, "url"),
        ({"url": "http://2130706433/"}, "url"),
        ({"url": "http://0X7F000001./"}, "url"),
        ({"url": "http://x.0x/"}, "url"),
        ({"url": "http://１.２.３/"}, "url"),
        ({"url": "http://256.0.0.1/"}, "url"),
        ({"name": " "}, "name"),
        ({"name": "n" * 256}, "name"),
        ({"name": 7}, "name"),
        ({"events": []}, "events"),
        ({"events": "page_created"}, "events"),
        ({"events": [f"e{n}" for n in range(101)]}, "events"),
        ({"events": ["a b"]}, "events"),
        ({"events": ["e", "**"]}, "events"),
        ({"events": ["e" * 65]}, "events"),
        ({"events": ["e" * 64 + "*"]}, "events"),
        ({"active": "yes"}, "active"),
        ({"active": 1}, "active"),
        ({"sslVerificationRequired": "no"}, "sslVerificationRequired"),
        ({"configuration": []}, "configuration"),
        ({"configuration": {"a": 1}}, "configuration.a"),
        ({"configuration": {"secret": "s" * 256}}, "configuration.secret"),
        ({"configuration": {"secret": "whsec_"}}, "configuration.secret"),
        ({"configuration": {"secret": "whsec_not base64 at all!"}}, "configuration.secret"),
        ({"configuration": {"secret": "whsec_" + "a" * 20}}, "configuration.secret"),  # 15 bytes
        ({"configuration": {"secret": "whsec_" + "a" * 22}}, "configuration.secret"),  # unpadded
        ({"configuration": {"secret": "whsec_" + "a" * 22 + "=="}}, "configuration.secret"),  # bits
        ({"configuration": {"secret": "whsec_" + "-_-_" * 8}}, "configuration.secret"),
        ({"configuration": {"secret": "whsec_" + "abcd" * 8 + "\n"}}, "configuration.secret"),
        ({"credentials": "u:p"}, "credentials"),
        ({"credentials": {"username": "u"}}, "credentials.password"),
        ({"credentials": {"username": "u:v", "password": "p"}}, "credentials.username"),
        ({"headers": {"Host": "x"}}, "headers.Host"),
        ({"headers": {"content-length": "1"}}, "headers.content-length"),
        ({"headers": {"Transfer-Encoding": "chunked"}}, "headers.Transfer-Encoding"),
        ({"headers": {"X-Hub-Signature": "x"}}, "headers.X-Hub-Signature"),
        ({"headers": {"webhook-id": "x"}}, "headers.webhook-id"),
        ({"headers": {"a b": "x"}}, "headers.a b"),
        ({"headers": {"A": "x\r\nB: y"}}, "headers.A"),
        ({"headers": {"A": "€"}}, "headers.A"),
        ({"headers": {"A": "\x85"}}, "headers.A"),
        ({"headers": {"A": "1", "a": "2"}}, "headers.a"),
        ({"headers": {"A": "********"}}, "headers.A"),
        ({"headers": {f"h{n}": "x" for n in range(21)}}, "headers"),
        ({"filters": []}, "filters"),
        ({"filters": {"p" * 256: 1}}, f"filters.{'p' * 256}"),
        ({"filters": {"a": {}}}, "filters.a"),
        ({"filters": {"a": []}}, "filters.a"),
        ({"filters": {"a": [[1]]}}, "filters.a"),
        ({"template": "{{a"}, "template"),
        ({"template": "{{a {{b}}"}, "template"),
        ({"template": {"a": [{"b": "x {{}}"}]}}, "template"),
        ({"template": ["{{  }}"]}, "template"),
        ({"template": {"a": "x" * (16 << 10)}}, "template"),
        ({"template": "ä" * 8192}, "template"),
    ],
)
def test_a_field_at_fault_is_named(fields, context):
    with pytest.raises(webhookd.Invalid) as refused:
        read_webhook(**fields)

    assert [fault.context for fault in refused.value.faults] == [context]


@pytest.mark.parametrize(
    "host, advised",
    [
        ("straße.test", "xn--strae-oqa.test"),
        ("STRAẞE.test", "xn--strae-oqa.test"),
        ("bücher.νίκος.test", "xn--bcher-kva.xn--kxawhkp.test"),
        ("नी\u200cसी.test", "xn--"),
        ("न\u200dस.test", "xn--"),
    ],
)
def test_a_host_that_programs_spell_differently_is_refused_with_advice(host, advised):
    with pytest.raises(webhookd.Invalid) as refused:
        read_webhook(url=f"http://{host}/")

    [fault] = refused.value.faults
    assert (fault.context, advised in fault.message) == ("url", True)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "1.example", "x1", "x.test.", "0xg"]
    + ["bücher.test", "1.2.3.x"],
)
def test_hosts_that_all_programs_spell_alike_are_accepted(host):
    assert read_webhook(url=f"http://{host}/").url == f"http://{host}/"


@pytest.mark.parametrize(
    "secret",
    [
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "whsec_" + base64.b64encode(bytes(16)).decode(),
        "WHSEC_short",
        "whsec",
    ],
)
def test_secret_must_be_one_that_every_library_accepts(secret):
    assert read_webhook(configuration={"secret": secret}).secret == secret


def test_all_fields_at_fault_are_named_at_once():
    with pytest.raises(webhookd.Invalid) as refused:
        read_webhook(url="x", name="", events=["", "e", "a b"], headers={"Te": "x", "b": 1})

    assert [fault.context for fault in refused.value.faults] == [
        *("name", "url", "events", "events", "headers.Te", "headers.b")
    ]


def test_a_masked_password_stays_when_the_rest_of_the_url_changes():
    assert read_webhook(FULL, url="http://********@y/z").url == "http://u:p@y/z"


def test_a_fault_in_a_url_does_not_tell_a_part_of_its_password():
    with pytest.raises(webhookd.Invalid) as refused:
        read_webhook(url="http://user:pass/word@x/")

    assert "pass" not in str(refused.value)


def test_a_masked_header_keeps_its_value_whatever_its_case():
    old = read_webhook(headers={"X-Token": "t"})

    assert read_webhook(old, headers={"x-token": "********"}).headers == {"x-token": "t"}


def test_a_mask_elsewhere_in_a_url_stands_for_nothing():
    assert read_webhook(FULL, url="http://y/u:********@").url == "http://y/u:********@"


def test_text_that_looks_like_an_escape_stays_as_it_is():
    assert read_webhook(name="C:\\udo").name == "C:\\udo"


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(webhookd.Invalid, match="surrogate"):
        read_webhook(name="\ud800")


FULL = webhookd.Webhook(
    id=3,
    name="n",
    url="http://u:p@x/",
    events=("e",),
    active=False,
    configuration={"a": "1"},
    secret="s",
    credentials={"username": "u", "password": "p"},
    headers={"A": "1"},
    filters={"f": 1},
    verify_tls=False,
    template={"text": "{{a}}"},
)


def test_fields_left_out_or_null_keep_their_values():
    assert read_webhook(FULL) == FULL
    assert read_webhook(FULL, name=None, url=None, events=None, active=None) == FULL


def test_null_removes_credentials_headers_filters_and_template():
    webhook = read_webhook(FULL, credentials=None, headers=None, filters=None, template=None)

    assert (webhook.credentials, webhook.headers, webhook.filters) == (None, {}, {})
    assert webhook.template is None


@pytest.mark.parametrize(
    "template",
    [
        "",
        0,
        False,
        [],
        {},
        "}} is text",
        "{ {a} }",
        {"{{": "{{ a.b }}{{c}}"},
        "x" * ((16 << 10) - 2),
    ],
)
def test_a_template_is_any_json_value(template):
    webhook = read_webhook(FULL, template=template)

    assert webhook.template == webhook.as_json(whole_url=True)["template"] == template


def test_webhook_sent_back_as_it_was_shown_changes_nothing():
    assert read_webhook(FULL, **FULL.as_json(whole_url=True)) == FULL


@pytest.mark.parametrize("password", [{}, {"password": "********"}])
def test_a_password_left_out_or_masked_stays(password):
    webhook = read_webhook(FULL, credentials={"username": "v"} | password)

    assert webhook.credentials == {"username": "v", "password": "p"}


@pytest.mark.parametrize(
    "name",
    [
        "Connection",
        "Content-Length",
        "Expect",
        "Host",
        "Keep-Alive",
        "Proxy-Authenticate",
        "Proxy-Authorization",
        "Proxy-Connection",
        "TE",
        "Trailer",
        "Transfer-Encoding",
        "Upgrade",
        "webhook-id",
        "webhook-signature",
        "webhook-timestamp",
        "X-Attempt",
        "X-Event-Key",
        "X-Hub-Signature",
        "X-Hub-Signature-256",
        "X-Request-Id",
    ],
)
def test_headers_of_the_connection_or_of_webhookd_cannot_be_set(name):
    with pytest.raises(webhookd.Invalid) as refused:
        read_webhook(headers={name: "x"})

    assert [fault.context for fault in refused.value.faults] == [f"headers.{name}"]


def test_configuration_is_merged_and_null_removes_a_key():
    webhook = read_webhook(FULL, configuration={"a": None, "b": "2"})

    assert (webhook.configuration, webhook.secret) == ({"b": "2"}, "s")
    assert read_webhook(FULL, configuration={"secret": None}).secret is None
    assert read_webhook(FULL, configuration={"secret": "********"}).secret == "s"


def test_webhook_is_shown_without_secrets():
    webhook = dataclasses.replace(
        FULL,
        url="http://u:url-secret@x/",
        secret="the-secret",
        credentials={"username": "u", "password": "pass-secret"},
        headers={"A": "header-secret"},
    )

    assert "secret" not in json.dumps(webhook.as_json(whole_url=True)).replace("secretSet", "")


@pytest.mark.parametrize(
    "filters, expected",
    [
        ({"space.key": "DEV"}, True),
        ({"space.key": "OPS"}, False),
        ({"space.key": ["OPS", "DEV"]}, True),
        ({"space": "DEV"}, False),
        ({"space.key.x": "DEV"}, False),
        ({"none": None}, True),
        ({"missing": None}, False),
        ({"id": 1}, True),
        ({"id": 1.0}, True),
        ({"id": "1"}, False),
        ({"id": True}, False),
        ({"yes": True}, True),
        ({"yes": 1}, False),
        ({"half": 0.5, "event": "e"}, True),
        ({"half": 0.5, "event": "f"}, False),
    ],
)
def test_filters_compare_the_values_at_their_paths(filters, expected):
    event = read_event(
        '{"event":"e","space":{"key":"DEV"},"none":null,"id":1,"yes":true,"half":5e-1}'
    )

    fields = webhookd.event_fields(event.body)
    assert webhookd.wants(webhookd.Webhook(filters=filters), fields) is expected


@pytest.mark.parametrize(
    "value, ms",
    [
        ("1700000000000", 1700000000000),
        (1700000000000, 1700000000000),
        (0, 0),
        ("1700000000000.25", 1700000000000),  # time.time() * 1000 of Python
        (1700000000000.5, 1700000000000),
        ("100000000000", 100000000000),
        ("2023-11-14T22:13:20Z", 1700000000000),
        ("2023-11-14T22:13:20", 1700000000000),
        ("2023-11-15T00:13:20+02:00", 1700000000000),
        ("2023-11-15T00:13:20 02:00", 1700000000000),
        ("2023-11-14", 1699920000000),
        ("1970-01-01T00:00:01Z", 1000),
        ("2h", 1_700_000_000_000 - 7_200_000),
        ("500ms", 1_700_000_000_000 - 500),
        ("1.5d", 1_700_000_000_000 - 129_600_000),
    ],
)
def test_times_are_epoch_milliseconds_iso_8601_or_so_long_ago(value, ms):
    assert webhookd.moment_ms(value, 1_700_000_000_000) == ms


@pytest.mark.parametrize(
    "value",
    [1, "1700000000", 99_999_999_999, -5, "-1700000000000", "1700000000.25", 1700000000.5, -0.5],
)
def test_time_in_seconds_is_refused(value):
    with pytest.raises(webhookd.Invalid, match="seems to be in seconds"):
        webhookd.moment_ms(value, 1_700_000_000_000)


@pytest.mark.parametrize(
    "value", [True, "soon", "", "-2h", "2 h", "2w", [], "1.", "1e12", 1e300, "9" * 400]
)
def test_bad_time_is_refused(value):
    with pytest.raises(webhookd.Invalid, match="must be epoch milliseconds, an ISO 8601 time"):
        webhookd.moment_ms(value, 1_700_000_000_000)


def test_a_time_that_names_no_zone_is_utc_wherever_the_server_stands(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()

    try:
        assert webhookd.moment_ms("1970-01-01T00:00:01", 0) == 1000
    finally:
        monkeypatch.undo()
        time.tzset()


RICH = (
    '{"event":"e","s":"a:b\\"ä","i":42,"f":1.10,"t":true,"n":null,"o":{"0":"zero","a":{"b":[7,8]}},'
    '"l":["x",{"y":"z"}],"":{"":"blank"}}'
)


@pytest.mark.parametrize(
    "condition, expected",
    [
        ('s:a:b"ä', True),
        ("s:a", False),
        ("i:42", True),
        ("i:4", False),
        ("i:42.0", False),
        ("f:1.10", True),
        ("f:1.1", False),
        ("t:true", True),
        ("t:True", False),
        ("n:null", True),
        ("n:", False),
        ("missing:null", False),
        ("missing:", False),
        ("o.0:zero", True),
        ("o.a.b.1:8", True),
        ("o.a.b.2:8", False),
        ("o.a.b:[7,8]", False),
        ("l.0:x", True),
        ("l.1.y:z", True),
        ("l.-1:x", False),
        ("i.x:42", False),
        (".:blank", True),
        ("event:e", True),
    ],
)
def test_where_compares_the_text_at_a_path(condition, expected):
    body = read_event(RICH).body

    assert webhookd.has_all(body, webhookd.conditions(condition)) is expected


@pytest.mark.parametrize("text", ["user.id", ":42", "x" * 300])
def test_a_condition_has_a_path_and_a_colon(text):
    with pytest.raises(webhookd.Invalid, match="must be a dotted path"):
        webhookd.conditions(["a:1", text])


def test_conditions_are_few_and_their_paths_short():
    webhookd.conditions(["p" * 255 + ":1"] * 20)
    for several in ["p" * 256 + ":1"], ["p:1"] * 21:
        with pytest.raises(webhookd.Invalid, match="at most"):
            webhookd.conditions(several)


# ======================================================================================
# Signatures
# ======================================================================================


def test_the_hub_signature_is_that_of_the_test_vector():
    assert webhookd.hub_signature("secret", b'{"test": true}') == (
        "sha256=52a5fe6cfb59da86e9efe5d555c8567f8de17cd01922519e8a8d8e6fd270c954"
    )


@pytest.mark.parametrize("key_bytes", [1, 63, 64, 65, 200])
def test_an_hmac_is_that_of_the_standard_library(key_bytes):
    key = bytes(range(key_bytes))

    code = webhookd.hmac_sha256(key, b"one", b"two")

    assert code == hmac.digest(key, b"onetwo", "sha256")


def test_the_standard_signature_is_that_of_its_specification():
    assert webhookd.standard_signature(
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1614265330,
        b'{"test": 2432232314}',
    ) == ("v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=")


@pytest.mark.parametrize("secret", ["plain", "whsec_%%%", "whsec_", "ä"])
def test_any_other_secret_is_a_key_as_it_is(secret):
    assert webhookd.standard_key(secret) == secret.encode()


def test_ids_are_uuids_that_sort_by_time():
    ids = [webhookd.uuid7(ms) for ms in (1, 2, 1_700_000_000_000)]

    assert ids == sorted(ids)
    assert all(
        re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", i)
        for i in ids
    )


def headers_of(**fields):
    webhook = webhookd.Webhook(url="http://x/", **fields)
    lines = webhookd.attempt_headers(webhook, "e", "the-id", 2, b"{}", 1_700_000_000_999)
    return dict(webhookd.header_fields(webhook.fixed_headers + lines).values())


def test_without_a_secret_nothing_is_signed():
    assert headers_of() == {
        "Content-Type": "application/json; charset=utf-8",
        "User-Agent": f"webhookd/{webhookd.VERSION}",
        "Accept": "*/*",
        "X-Event-Key": "e",
        "X-Request-Id": "the-id",
        "X-Attempt": "2",
        "webhook-id": "the-id",
        "webhook-timestamp": "1700000000",
    }


def test_with_a_secret_both_schemes_sign():
    headers = headers_of(secret="s")

    assert headers["X-Hub-Signature"] == webhookd.hub_signature("s", b"{}")
    assert headers["X-Hub-Signature-256"] == headers["X-Hub-Signature"]
    assert headers["webhook-signature"] == webhookd.standard_signature(
        "s", "the-id", 1700000000, b"{}"
    )


def test_a_webhooks_own_headers_replace_those_of_webhookd():
    assert headers_of(headers={"user-agent": "mine", "X-More": "1"}).items() >= {
        ("user-agent", "mine"),
        ("X-More", "1"),
    }
    assert "User-Agent" not in headers_of(headers={"user-agent": "mine"})
    assert headers_of(headers={"Accept": "text/plain"})["Accept"] == "text/plain"


def test_credentials_are_basic_authentication():
    login = {"username": "u", "password": "p:ä"}

    pair = headers_of(credentials=login)["Authorization"].removeprefix("Basic ")

    assert base64.b64decode(pair).decode() == "u:p:ä"


# ======================================================================================
# Policy
# ======================================================================================


@pytest.mark.parametrize(
    "status, outcome",
    [(200, "SUCCESS"), (299, "SUCCESS"), (199, "FAILURE"), (300, "FAILURE"), (410, "FAILURE")],
)
def test_any_2xx_is_a_success_and_nothing_else(status, outcome):
    assert webhookd.outcome_of(status) == outcome


@pytest.mark.parametrize(
    "attempts, jitter, wait",
    [(1, 1.0, 5), (2, 1.1, 330), (2, 0.9, 270), (3, 1.0, None)],
)
def test_waits_follow_the_schedule(attempts, jitter, wait):
    found = webhookd.next_wait_seconds(attempts, (5, 300), jitter)

    assert found == (wait and pytest.approx(wait))


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("120", 120),
        ("99999999999", 99999999999),
        ("Tue, 14 Nov 2023 22:14:20 GMT", 60),
        ("soon", None),
        ("-5", None),
        (None, None),
        ("0", 0),
        ("Tue, 14 Nov 2023 22:12:20 GMT", 0),
        ("Tue, 99 Nov 2023 22:14:20 GMT", None),
        ("Tue, 14 Nov 99999999999999999999 22:14:20 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(text, seconds):
    assert webhookd.retry_after_seconds(text, 1_700_000_000_000) == seconds


@pytest.mark.parametrize(
    "failures, seconds",
    [(0, None), (4, None), (5, 10), (6, 12), (7, 14.4), (50, 7200), (10**6, 7200)],
)
def test_a_pause_grows_with_the_failures_up_to_its_maximum(failures, seconds):
    found = webhookd.pause_seconds(failures, 10, 7200)

    assert found == (seconds and pytest.approx(seconds))


def failed_attempt(**fields):
    fields = {"outcome": "FAILURE", "description": "500", "status": 500} | fields
    return webhookd.Attempt(1_000_000, 0, "http://x/", "", **fields)


def due_delivery(**fields):
    fields = {"attempt_count": 1, "schedule_index": 1, "next_attempt": 1_000_000} | fields
    return webhookd.DueDelivery(1, "id", 1, 1, "e", b"{}", **fields)


def verdict_of_failure(due, health, jitter=1.0, now_ms=1_000_000, **fields):
    result = webhookd.Result(due, failed_attempt(**fields), now_ms)
    return webhookd.judge(result, health, webhookd.Settings(), jitter)


def test_a_probe_ahead_of_its_time_does_not_use_the_schedule_up():
    early = verdict_of_failure(due_delivery(next_attempt=9_000_000), webhookd.Health(5))
    in_time = verdict_of_failure(due_delivery(), webhookd.Health(5))

    assert (early.schedule_index, early.next_attempt) == (1, 9_000_000)
    assert (in_time.schedule_index, in_time.next_attempt) == (2, 1_000_000 + 300_000)


def test_a_probe_ahead_of_its_time_waits_as_long_as_it_is_asked_to():
    ahead = due_delivery(next_attempt=9_000_000)
    asked = {"status": 503, "retry_after": "20000"}

    verdict = verdict_of_failure(ahead, webhookd.Health(5), **asked)
    longest = verdict_of_failure(ahead, webhookd.Health(5), **asked | {"retry_after": "1" * 9})

    assert verdict.next_attempt == 1_000_000 + 20_000_000
    assert longest.next_attempt == 1_000_000 + webhookd.DAY_MS


@pytest.mark.parametrize("jitter", [0.9, 1.0, 1.1])
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_makes_the_webhook_rest_and_is_no_failure(status, jitter):
    before = webhookd.Health(failures=4, failing_since=1)

    verdict = verdict_of_failure(due_delivery(), before, jitter, status=status, retry_after="3600")

    rest = 3_600_000 if jitter == 1.0 else 3_960_000  # longer than asked, never shorter
    assert verdict.health.resting_until == pytest.approx(1_000_000 + rest, abs=1)
    assert (verdict.health.failures, verdict.health.paused_until) == (4, None)
    assert verdict.next_attempt >= 1_000_000 + 3_600_000


def test_retry_after_with_another_status_is_a_failure():
    verdict = verdict_of_failure(due_delivery(), webhookd.Health(4), retry_after="3600")

    assert (verdict.health.failures, verdict.health.resting_until) == (5, None)


def test_unreadable_retry_after_counts_as_a_failure():
    verdict = verdict_of_failure(due_delivery(), webhookd.Health(4), status=429, retry_after="soon")

    assert verdict.health.failures == 5


def test_a_success_beside_a_retry_after_does_not_end_the_rest():
    success = failed_attempt(outcome="SUCCESS", status=200)
    resting = webhookd.Health(resting_until=2_000_000, reason="429")

    def rest_after(now_ms):
        result = webhookd.Result(due_delivery(), success, now_ms)
        return webhookd.judge(result, resting, webhookd.Settings(), 1.0).health.resting_until

    assert (rest_after(1_999_999), rest_after(2_000_000)) == (2_000_000, None)


def test_pause_varies_like_every_wait():
    until = [
        verdict_of_failure(due_delivery(), webhookd.Health(4), jitter).health.paused_until
        for jitter in (0.9, 1.1)
    ]

    assert until == [1_000_000 + 9_000, 1_000_000 + 11_000]


def test_every_wait_varies_by_a_tenth():
    jitters = [webhookd.random_jitter() for _ in range(1000)]

    assert 0.9 <= min(jitters) < 0.92
    assert 1.08 < max(jitters) <= 1.1


def test_attempt_in_flight_is_not_given_up_when_its_webhook_is_disabled():
    disabled = webhookd.Health(9, 1, reason="gone", disabled=True)

    assert verdict_of_failure(due_delivery(), disabled).state == "pending"


def test_a_webhook_that_fails_for_too_long_is_disabled_when_it_gives_a_delivery_up():
    since = 1_000_000 - int(webhookd.Settings().disable_after * 1000)

    def after(since, index):
        verdict = verdict_of_failure(due_delivery(schedule_index=index), webhookd.Health(9, since))
        return verdict.health.disabled, verdict.state

    last = len(webhookd.Settings().retry_schedule)
    assert after(since, 1) == (False, "pending")
    assert after(since + 1, last) == (False, "failed")
    assert after(since, last) == (True, "failed")


def test_success_in_flight_does_not_enable_a_disabled_webhook():
    disabled = webhookd.Health(9, 1, reason="gone", disabled=True)
    success = failed_attempt(outcome="SUCCESS", status=200)
    result = webhookd.Result(due_delivery(), success, 1_000_000)

    assert webhookd.judge(result, disabled, webhookd.Settings(), 1.0).health == disabled


def test_a_wait_is_counted_from_the_end_of_the_attempt_by_the_clock_of_then():
    result = webhookd.Result(due_delivery(), failed_attempt(), 5_000_000)

    verdict = webhookd.judge(result, webhookd.Health(4), webhookd.Settings(), 1.0)

    assert verdict.next_attempt == 5_000_000 + 300_000
    assert verdict.health.paused_until == 5_000_000 + 10_000


# ======================================================================================
# Outbound HTTP
# ======================================================================================


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "10.0.0.1",
        "100.64.0.1",
        "127.0.0.1",
        "127.255.255.255",
        "168.63.129.16",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.1",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.1.1",
        "198.18.0.1",
        "198.19.255.255",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::7f00:1",
        "::ffff:127.0.0.1",
        "::ffff:0:7f00:1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::1",
        "100::1",
        "2001::1",
        "2001:db8::1",
        "2002:7f00:1::1",
        "2002:c0a8:101::1",
        "3fff::1",
        "5f00::1",
        "fc00::1",
        "fd00::1",
        "fe80::1",
        "fec0::1",
        "ff02::1",
        "fe80::1%eth0",
        "2001:0:4136:e378:8000:63bf:80ff:fffe",
    ],
)
def test_addresses_that_are_not_public_are_refused(address):
    with pytest.raises(webhookd.AddressRefused, match=re.escape(address)):
        webhookd.AddressPolicy(()).check(address, 80)


@pytest.mark.parametrize(
    "address",
    [
        "1.1.1.1",
        "172.15.255.255",
        "172.32.0.1",
        "100.63.255.255",
        "198.20.0.1",
        "2606:4700::1111",
        "::ffff:1.1.1.1",
        "64:ff9b::101:101",
        "2002:101:101::1",
        "2001:0:4136:e378:8000:63bf:fefe:fefe",
    ],
)
def test_public_addresses_are_allowed(address):
    webhookd.AddressPolicy(()).check(address, 80)


def test_a_refusal_names_the_address_and_the_setting():
    with pytest.raises(webhookd.AddressRefused) as refused:
        webhookd.AddressPolicy(()).check("127.0.0.1", 80)

    assert str(refused.value) == (
        "127.0.0.1 is not a public address;"
        " to deliver there start with --allow-networks 127.0.0.0/8 (WEBHOOKD_ALLOW_NETWORKS)"
    )


@pytest.mark.parametrize(
    "address, network",
    [("::1", "::1/128"), ("::7f00:1", "127.0.0.0/8"), ("64:ff9b:1::1", "64:ff9b:1::/48")],
)
def test_a_refusal_advises_no_more_than_is_needed(address, network):
    with pytest.raises(webhookd.AddressRefused, match=f"--allow-networks {network} "):
        webhookd.AddressPolicy(()).check(address, 80)


@pytest.mark.parametrize(
    "address",
    [
        *("::ffff:169.254.169.254", "::a00:1", "64:ff9b::a00:1", "2002:a00:1::"),
        *("2001:0:a01:203::f7f7:fbfb", "2001:0:808:808::f5ff:fffe"),  # server, client
    ],
)
def test_allowing_an_ipv6_network_does_not_allow_ipv4_addresses_inside_it(address):
    wide = "::/8,64:ff9b::/96,2002::/16,2001::/32"
    wide = webhookd.AddressPolicy(webhookd.networks(wide))

    with pytest.raises(webhookd.AddressRefused):
        wide.check(address, 80)


@pytest.mark.parametrize("address", ["127.0.0.1", "::ffff:127.0.0.1", "64:ff9b::7f00:1"])
def test_allowed_networks_hold_for_the_ipv4_address_inside_too(address):
    webhookd.AddressPolicy(LOOPBACK).check(address, 80)


@pytest.mark.parametrize(
    "own, address",
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "::ffff:127.0.0.1"),
        ("127.0.0.1", "0.0.0.0"),
        ("0.0.0.0", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.9"),
        ("::1", "::"),
    ],
)
def test_webhookd_itself_is_refused_even_in_an_allowed_network(own, address):
    everything = webhookd.networks("0.0.0.0/0,::/0")
    address_policy = webhookd.AddressPolicy(everything, (own, 8090))

    address_policy.check(address, 8091)
    with pytest.raises(webhookd.AddressRefused, match="webhookd itself"):
        address_policy.check(address, 8090)


def test_listening_everywhere_is_no_reason_to_refuse_the_port_of_others():
    webhookd.AddressPolicy((), ("0.0.0.0", 8090)).check("8.8.8.8", 8090)


def test_a_zone_id_is_refused_even_in_an_allowed_network():
    address_policy = webhookd.AddressPolicy(webhookd.networks("fe80::/10"))

    address_policy.check("fe80::1", 80)
    with pytest.raises(webhookd.AddressRefused, match="has a zone id"):
        address_policy.check("fe80::1%eth0", 80)


@pytest.mark.parametrize("host", ["127.1", "0x7f000001", "2130706433", "localhost"])
def test_names_and_odd_spellings_are_judged_by_what_they_resolve_to(host):
    with pytest.raises(webhookd.AddressRefused, match="is not a public address"):
        webhookd.AddressPolicy(()).check_url(f"http://{host}/")


def test_a_name_that_does_not_resolve_passes_the_check_of_its_url():
    webhookd.AddressPolicy(()).check_url("http://name.invalid/")


def test_name_is_looked_up_for_each_connection():
    address_policy = webhookd.AddressPolicy(())
    first = address_policy.lookup("localhost")
    first.result()

    assert address_policy.lookup("localhost") is not first


def test_name_that_the_resolver_cannot_read_is_an_unknown_host():
    with pytest.raises(webhookd.UnknownHost):
        webhookd.AddressPolicy(()).lookup("x" * 64).result(20)


def test_a_name_server_that_does_not_answer_is_no_unknown_host(monkeypatch):
    def give_up(*arguments, **options):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", give_up)

    with pytest.raises(webhookd.UnknownHost, match=r"the name server did not answer for x\.test"):
        webhookd.AddressPolicy(()).lookup("x.test").result(20)


@pytest.fixture
def silent_resolver(monkeypatch):
    """A resolver that answers only when it is let go."""
    let_go = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: let_go.wait(20) and [])
    yield let_go
    let_go.set()


def test_a_lookup_that_hangs_keeps_nobody_from_registering(silent_resolver, monkeypatch):
    monkeypatch.setattr(webhookd, "LOOKUP_SECONDS_AT_REGISTRATION", 0.01)
    address_policy = webhookd.AddressPolicy(())
    lookup = address_policy.lookup("slow.example")

    address_policy.check_url("http://slow.example/")

    assert lookup.running()


def test_a_lookup_is_shared_and_nobody_who_waits_can_cancel_it(silent_resolver):
    address_policy = webhookd.AddressPolicy(())

    first, second = (address_policy.lookup("slow.example") for _ in range(2))

    assert first is second
    assert not first.cancel()


def test_no_more_lookups_hang_than_are_allowed_and_none_keeps_the_process(silent_resolver):
    address_policy = webhookd.AddressPolicy(())
    for number in range(webhookd.MAX_LOOKUPS):
        address_policy.lookup(f"{number}.example")

    with pytest.raises(webhookd.UnknownHost, match="too many"):
        address_policy.lookup("one.more.example")

    hanging = [t for t in threading.enumerate() if t.name == "lookup"]
    assert all(thread.daemon for thread in hanging)


def being_looked_up(address_policy, host, *addresses):
    """Let a name have these addresses, as if they had just been found."""
    address_policy._lookups[host] = concurrent.futures.Future()
    address_policy._lookups[host].set_result(list(addresses))


@pytest.mark.parametrize("addresses", [["127.0.0.1", "10.0.0.1"], ["10.0.0.1"]])
def test_a_name_is_refused_if_one_of_its_addresses_is(address_policy, addresses):
    being_looked_up(address_policy, "several.example", *addresses)

    with pytest.raises(webhookd.AddressRefused, match=r"10\.0\.0\.1 is not a public"):
        address_policy.check_url("http://several.example/")


@pytest.mark.parametrize(
    "url, expected",
    [
        ("http://x", (False, "x", 80, "x", "/")),
        ("https://x:8443/a?b=c", (True, "x", 8443, "x:8443", "/a?b=c")),
        ("https://X.example:443/?", (True, "x.example", 443, "x.example", "/")),
        ("http://u:p@[::1]:81/ä%20", (False, "::1", 81, "[::1]:81", "/%C3%A4%20")),
        (
            "http://bücher.example/",
            (False, "xn--bcher-kva.example", 80, "xn--bcher-kva.example", "/"),
        ),
        ("http://x.test.:81/", (False, "x.test.", 81, "x.test.:81", "/")),
    ],
)
def test_the_parts_of_a_url(url, expected):
    assert webhookd.endpoint_of(url) == expected


def parse(*pieces, closed=False):
    response = webhookd.Response()
    for piece in pieces:
        response.feed(piece)
    if closed:
        response.end()
    assert response.complete
    return response


OK = b"HTTP/1.1 200 OK\r\n"
GOOD_RESPONSES = [
    (OK + b"Content-Length: 2\r\n\r\nok", False, b"ok", True),
    (OK + b"content-length:\t2 \r\n\r\nok", False, b"ok", True),
    (OK + b"Content-Length: 2, 2\r\n\r\nok", False, b"ok", True),
    (OK + b"Content-Length: 2\r\nConnection: close\r\n\r\nok", False, b"ok", False),
    (OK + b"Content-Length: 0\r\nConnection: x, Close\r\n\r\n", False, b"", False),
    (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", False, b"ok", False),
    (b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", False, b"", True),
    (b"HTTP/1.1 204 No Content\r\n\r\n", False, b"", True),
    (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", False, b"", True),
    (OK + b"\r\nuntil the end", True, b"until the end", False),
    (b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok", False, b"ok", True),
    (OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", False, b"ok", True),
    (
        OK + b"Transfer-Encoding: Chunked\r\n\r\n1;x=y\r\no\r\n1 \r\nk\r\n000\r\nT: 1\r\n\r\n",
        False,
        b"ok",
        True,
    ),
    (
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK + b"Content-Length: 2\r\n\r\nok",
        False,
        b"ok",
        True,
    ),
    (OK + b"Content-Length: 2\r\n\r\nok and more", False, b"ok", False),
    (b"\r\n\n" + OK + b"Content-Length: 2\r\n\r\nok", False, b"ok", True),
    (OK + b"Content-Length: 2\r\nA: b\r\n  folded\r\n\r\nok", False, b"ok", False),
    (OK + b"Content-Length:\r\n\t2\r\n\r\nok", False, b"ok", False),
]


@pytest.mark.parametrize("raw, closed, body, reusable", GOOD_RESPONSES)
def test_a_response_is_read_whole_or_byte_by_byte(raw, closed, body, reusable):
    whole = parse(raw, closed=closed)

    assert (bytes(whole.body), whole.reusable) == (body, reusable)
    end = len(raw) - len(b" and more") if raw.endswith(b" and more") else len(raw)
    slow = parse(*(raw[i : i + 1] for i in range(end)), closed=closed)
    assert bytes(slow.body) == body


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 +20 OK\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"{}",
        b"H\r\n",
        b"220 mail.example ESMTP\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        OK + b"A: " + b"x" * 70_000,
    ],
)
def test_bytes_that_are_no_response_are_refused(raw):
    with pytest.raises(webhookd.ProtocolError):
        parse(raw)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\r",
        b"HTTP/1.1 200",
        OK + b"Content-Length: 0\r\n",
        b"HTTP/1.1 103 Early Hints\r\n\r\n",
    ],
)
def test_a_head_cut_short_is_refused(raw):
    with pytest.raises(webhookd.ProtocolError, match="closed the connection"):
        parse(raw, closed=True)


CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
UNCLEAR = "the length of its body is not clear"
BROKE_OFF = "its body broke off"
BADLY_FRAMED = "its body is badly framed"
MALFORMED = "its head is malformed"


@pytest.mark.parametrize(
    "raw, body, fault",
    [
        (OK + b"Content-Length: 3\r\n\r\nok", b"ok", BROKE_OFF),
        (OK + b"Content-Length: 3\r\n\r\n", b"", BROKE_OFF),
        (CHUNKED, b"", BROKE_OFF),
        (CHUNKED + b"2\r\nok\r\n", b"ok", BROKE_OFF),
        (CHUNKED + b"3\r\nok", b"ok", BROKE_OFF),
        (CHUNKED + b"2\r\nok\r\n0\r\n", b"ok", BROKE_OFF),
        (CHUNKED + b"2\nok\n0\n\n", b"ok", BADLY_FRAMED),
        (CHUNKED + b"2\r\nok\r\nxyz\r\n", b"ok", BADLY_FRAMED),
        (CHUNKED + b"-1\r\n", b"", BADLY_FRAMED),
        (CHUNKED + b"1\r\nxx\r\n", b"x", BADLY_FRAMED),
        (CHUNKED + b"1\r\nx\rx\r\n", b"x", BADLY_FRAMED),
        (CHUNKED + b"not in chunks", b"", BADLY_FRAMED),
        (OK + b"Content-Length: two\r\n\r\nok", b"ok", UNCLEAR),
        (OK + b"Content-Length: -1\r\n\r\nok", b"ok", UNCLEAR),
        (OK + b"Content-Length:\r\n\r\nok", b"ok", UNCLEAR),
        (OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nok", b"ok", UNCLEAR),
        (OK + b"Transfer-Encoding: gzip\r\n\r\nok", b"ok", UNCLEAR),
        (
            OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
            *(b"ok", UNCLEAR),
        ),
        (
            OK + b"Content-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
            *(b"ok", UNCLEAR),
        ),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\nok", b"", "a body was announced"),
        (OK + b"no colon\r\nContent-Length: 2\r\n\r\nok", b"ok", MALFORMED),
        (OK + b"A : b\r\nContent-Length: 2\r\n\r\nok", b"ok", MALFORMED),
        (OK + b"A: \0\r\nContent-Length: 2\r\n\r\nok", b"ok", MALFORMED),
        (OK + b" A: b\r\nContent-Length: 2\r\n\r\nok", b"ok", MALFORMED),
        (b"HTTP/1.1  200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok", MALFORMED),
        (b"HTTP/1.1 200 O\0K\r\nContent-Length: 2\r\n\r\nok", b"ok", MALFORMED),
        (
            OK + b"A : b\r\nContent-Length: 3\r\n\r\nok",
            *(b"ok", f"{MALFORMED}, {BROKE_OFF}"),
        ),
    ],
)
def test_fault_behind_the_status_ends_the_connection_only(raw, body, fault):
    whole, slow = webhookd.Response(), webhookd.Response()
    assert whole.feed(raw) or whole.end() is None
    assert any(slow.feed(raw[i : i + 1]) for i in range(len(raw))) or slow.end() is None

    for response in (whole, slow):
        assert (bytes(response.body), ", ".join(response.faults)) == (body, fault)
        assert (response.head.status // 100, response.reusable) == (2, False)


def test_folded_headers_are_joined_and_malformed_ones_skipped():
    head = parse(
        OK + b"A: b\r\n \t c\r\nno colon\r\n goes on\r\nB : x\r\nC: \0\r\nD: e\r\n"
        b"Content-Length: 0\r\n\r\n"
    ).head

    assert head.lines == "A: b c\r\nD: e\r\nContent-Length: 0"


class Searched(bytearray):
    """Bytes that count how many of them are searched."""

    count = 0
    head_end = webhookd.HEAD_END

    def find(self, what, start=0):
        self.count += len(self) - start
        return super().find(what, start)

    @classmethod
    def search(cls, text, start):
        text.count += len(text) - start
        return cls.head_end.search(text, start)


@pytest.mark.parametrize(
    "raw",
    [
        OK + b"A: " + b"x" * 9000,
        OK + b"A: b\r\n" * 1500,
        CHUNKED + b"1;" + b"x" * 9000,
        CHUNKED + b"1\r\nx\r\n" * 1500,
        CHUNKED + b"0\r\n" + b"A: b\r\n" * 1500,
    ],
)
def test_bytes_are_searched_once_however_they_are_cut(raw, monkeypatch):
    monkeypatch.setattr(webhookd, "HEAD_END", Searched)
    response = webhookd.Response()
    response._unread = searched = Searched()

    for index in range(len(raw)):
        response.feed(raw[index : index + 1])

    assert 0 < searched.count < 5 * len(raw)


def test_a_response_is_read_to_64_kib():
    response = parse(OK + b"Content-Length: 9999999\r\n\r\n", *[b"x" * 9000] * 8)

    assert (response.head.status, response.reusable) == (200, False)
    at_once = parse(OK + b"Content-Length: 9999999\r\n\r\n" + b"x" * 72_000)
    assert len(at_once.body) == len(response.body) < 64 << 10


@pytest.mark.parametrize(
    "body, content_type, kept",
    [
        (b"ok", None, "ok"),
        ("ä".encode(), "text/plain", "ä"),
        (b"\xe4", "text/html; charset=iso-8859-1", "ä"),
        (b"\xe4", "text/html", "<binary data>"),
        (b"a\0b", "text/plain", "<binary data>"),
        (b"\xe4", "text/plain; charset=utf-7", "<binary data>"),
        (b"x" * 20_000, None, "x" * 16_384),
        (b"x" * 16_383 + "ä".encode(), None, "x" * 16_383),
        (b"x" * 16_383 + b"\xc3", None, "x" * 16_383),
        (b"x\xc3", None, "<binary data>"),
        (b"\x1b[1mok", None, "\x1b[1mok"),
    ],
)
def test_body_is_kept_to_16_kib_of_text(body, content_type, kept):
    assert webhookd.kept_text(body, content_type) == kept


# ---- attempts over real sockets ----


@pytest.fixture
def attempt(address_policy, clock):
    """Makes one attempt to a URL, by a client of its own."""

    def make(url, timeout_seconds=5.0, **fields):
        webhook = webhookd.Webhook(url=url, **fields)
        client = webhookd.Client(address_policy, timeout_seconds)
        headers = webhookd.attempt_headers(webhook, "e", "the-id", 1, b"{}", clock.ms)

        async def run():
            made = asyncio.get_running_loop().create_future()
            webhookd.start_attempt(client, webhook, headers, b"{}", clock.ms, made.set_result)
            try:
                return await made
            finally:
                client.close()

        return asyncio.run(run())

    return make


def test_an_attempt_records_what_was_sent_and_what_came_back(attempt, receiver, clock):
    receiver.answers(201, {"Content-Type": "text/plain"}, b"made")

    made = attempt(receiver.url)

    assert (made.outcome, made.description, made.status) == ("SUCCESS", "201", 201)
    assert (made.start, made.url, made.response_body) == (clock.ms, receiver.url, "made")
    assert made.response()["headers"]["Content-Type"] == "text/plain"
    [request] = receiver.received
    assert request.body == b"{}"
    assert made.request("")["headers"].items() <= request.headers.items()


@pytest.mark.parametrize("name", ["Location", "LOCATION"])
def test_a_redirect_is_a_failure_that_names_its_target(attempt, receiver, name):
    receiver.answers(302, {name: receiver.url})

    made = attempt(receiver.url)

    assert made.outcome == "FAILURE"
    assert receiver.url in made.description
    assert len(receiver.received) == 1


def test_a_password_in_the_url_is_used_and_masked(attempt, receiver):
    made = attempt(receiver.url.replace("//", "//us%20er:pass%3Aword@"))

    sent = receiver.received[0].headers["Authorization"]
    assert base64.b64decode(sent.removeprefix("Basic ")) == b"us er:pass:word"
    assert "pass" not in str(made)
    assert made.request("")["headers"]["Authorization"] == webhookd.MASK


@pytest.mark.parametrize(
    "echo",
    [
        b'a/b"c d\xc3\xa4',
        b'a\\/b\\"c d\\u00e4',
        b"a%2Fb%22c%20d%C3%A4",
        b"a%2Fb%22c+d%C3%A4",
        b"a/b&quot;c d\xc3\xa4",
        base64.b64encode('a/b"c dä'.encode()),
        b"x" * 16_370 + b'a/b"c d\xc3\xa4',
    ],
)
def test_however_a_receiver_spells_a_secret_it_is_masked(attempt, receiver, echo):
    receiver.answers(200, {}, b"you sent " + echo)

    made = attempt(receiver.url, secret='a/b"c dä')

    assert "********"[:4] in made.response_body
    assert not re.search(r"a.{1,3}b|YS9i", made.response_body)


def test_secrets_that_a_receiver_sends_back_are_masked(attempt, receiver):
    receiver.answers(302, {"Location": "/?key=own-value"}, b"own-value pass-word the-secret")

    made = attempt(
        receiver.url,
        headers={"X-Own": "own-value"},
        secret="the-secret",
        credentials={"username": "u", "password": "pass-word"},
    )

    assert receiver.received[0].headers["X-Own"] == "own-value"
    assert not any(text in str(made) for text in ("own-value", "pass-word", "the-secret"))


def test_short_texts_are_not_masked_as_secrets(attempt, receiver):
    receiver.answers(200, {}, b"a short answer")

    made = attempt(receiver.url, secret="a", headers={"X-Own": "ans"})

    assert made.response_body == "a short answer"


@pytest.mark.parametrize(
    "login, fields, echo",
    [
        ("", {"secret": "new", "previous_secret": "old-secret"}, b"old-secret"),
        ("the-token@", {}, b"the-token"),
        ("", {"secret": "long-secret", "headers": {"X-A": "long"}}, b"long-secret"),
    ],
)
def test_every_kind_of_secret_is_masked_as_a_whole(attempt, receiver, login, fields, echo):
    receiver.answers(200, {}, echo)

    made = attempt(receiver.url.replace("//", f"//{login}"), **fields)

    assert made.response_body == webhookd.MASK


@pytest.mark.parametrize(
    "raw, description",
    [
        (b"", "the receiver closed the connection without an answer"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n",
            "the receiver closed the connection in the middle of its answer",
        ),
        (b"nonsense\r\n\r\n", "the answer is not HTTP/1.1"),
    ],
)
def test_a_broken_answer_is_an_error_in_words(attempt, receiver, raw, description):
    receiver.raw = raw

    made = attempt(receiver.url)

    assert (made.outcome, made.description, made.status) == ("ERROR", description, None)


RESET = struct.pack("ii", 1, 0)  # the SO_LINGER with which close() resets


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    connection.close()


def answer_by_scripts(server, scripts, stack):
    for script in scripts:
        connection = stack.enter_context(server.accept()[0])
        for answer in script:
            if isinstance(answer, bytes):
                while not connection.recv(65536).endswith(b"{}"):
                    pass
                connection.sendall(answer)
            else:
                answer(connection)


@contextlib.contextmanager
def raw_receiver(*scripts):
    """The URL of a receiver that answers in the given bytes: of each connection, in turn,
    those for each request; what is no bytes is called with the connection."""
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as stack:
        answering = threading.Thread(target=answer_by_scripts, args=(server, scripts, stack))
        answering.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"
        answering.join(20)
        assert not answering.is_alive(), "not all connections were made"


def by_length(status, body=b""):
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


@pytest.mark.parametrize(
    "answer, description, body",
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", "200, its body broke off", "short"),
        (
            b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 9\r\n\r\n",
            "302, a redirect to /x, which is not followed, its body broke off",
            "",
        ),
        (
            b"HTTP/1.1 503 X\r\nno colon\r\nContent-Length: 9\r\n\r\n{",
            "503, its head is malformed, its body broke off",
            "{",
        ),
    ],
)
@pytest.mark.parametrize("end", [socket.socket.close, reset])
def test_head_decides_even_if_the_body_is_broken(attempt, end, answer, description, body):
    with raw_receiver([answer, end]) as url:
        made = attempt(url)

    assert (made.status, made.description) == (int(description[:3]), description)
    assert (made.outcome == "SUCCESS", made.response_body) == (made.status == 200, body)


def test_retry_after_survives_a_broken_body(attempt, receiver):
    receiver.raw = b"HTTP/1.1 503 X\r\nA : b\r\nRetry-After:\r\n 60\r\nContent-Length: 9\r\n\r\n"

    made = attempt(receiver.url)

    assert (made.status, made.retry_after) == (503, "60")


def test_a_body_whose_length_is_not_clear_is_not_waited_for(attempt, monkeypatch):
    monkeypatch.setattr(webhookd, "UNCLEAR_SECONDS", 0.05)
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nwhat came"

    with raw_receiver([answer]) as url:  # and it stays open
        made = attempt(url, timeout_seconds=60.0)

    assert (made.outcome, made.response_body) == ("SUCCESS", "what came")
    assert made.description == "200, the length of its body is not clear"


def test_headers_are_kept_to_8_kib_in_whole_lines(attempt, receiver):
    receiver.raw = b"HTTP/1.1 200 OK\r\n" + b"A: %s\r\n" % (b"x" * 995) * 12 + b"\r\n"

    kept = attempt(receiver.url).response_headers

    assert kept.split("\r\n") == ["A: " + "x" * 995] * 8


def attempt_in_turn(address_policy, url, times=2, between=lambda: None):
    """Attempts of one client, each begun when the one before has ended."""
    client, made = webhookd.Client(address_policy, 5.0), []

    async def run():
        ended = asyncio.get_running_loop().create_future()

        def start():
            webhook = webhookd.Webhook(url=url)
            webhookd.start_attempt(client, webhook, "", b"{}", 0, note)

        def note(attempt):
            made.append(attempt)
            between()
            start() if len(made) < times else ended.set_result(None)

        start()
        await ended
        client.close()

    asyncio.run(run())
    return made


@pytest.mark.parametrize(
    "brought",
    [
        [b"garbage\r\n\r\n"],
        [b"5\r\nhello\r\n0\r\n\r\n"],
        [b"{}"],
        [by_length(408)],
        [b"HTTP/1.1 200 OK\r\nConte", socket.socket.close],
        [b"HTTP/1.1 100 Continue\r\n\r\n", socket.socket.close],
        [b"", socket.socket.close],
        [b"", reset],
        [b"HTTP/1.1 " + b"x" * 70_000],
    ],
)
def test_a_connection_that_brings_no_head_was_stale_and_the_request_is_sent_again(
    address_policy, brought
):
    with raw_receiver([by_length(200), *brought], [by_length(200, b"fresh")]) as url:
        first, second = attempt_in_turn(address_policy, url)

    assert (first.description, second.description) == ("200", "200")
    assert second.response_body == "fresh"


def test_a_request_is_sent_again_once_only(address_policy):
    scripts = [by_length(200), b"garbage\r\n\r\n"], [b"garbage\r\n\r\n"]

    with raw_receiver(*scripts) as url:
        _, second = attempt_in_turn(address_policy, url)

    assert (second.outcome, second.description) == ("ERROR", "the answer is not HTTP/1.1")


def test_a_408_on_a_new_connection_is_an_answer(attempt):
    with raw_receiver([by_length(408)]) as url:
        assert attempt(url).description == "408"


def test_blank_line_behind_an_answer_is_no_answer(address_policy):
    with raw_receiver([by_length(200), b"\r\n" + by_length(201)]) as url:
        _, second = attempt_in_turn(address_policy, url)

    assert second.description == "201"


@pytest.mark.parametrize("stray", [by_length(500), b"\r\n"])
def test_bytes_behind_an_answer_are_never_the_next_answer(address_policy, stray):
    is_answered, is_sent = threading.Event(), threading.Event()

    def speak_unasked(connection):
        is_answered.wait(20)
        connection.sendall(stray)
        is_sent.set()

    def keep_the_loop():
        is_answered.set()
        is_sent.wait(20)

    with raw_receiver([by_length(200), speak_unasked], [by_length(200)]) as url:
        made = attempt_in_turn(address_policy, url, between=keep_the_loop)

    assert [attempt.description for attempt in made] == ["200", "200"]


@pytest.mark.parametrize(
    "first",
    [
        by_length(200) + b"\r\n",
        b"HTTP/1.1 204 X\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\n\n",
        b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_after_an_irregularity_a_connection_is_not_used_again(address_policy, first):
    with raw_receiver([first], [by_length(201)]) as url:
        made = attempt_in_turn(address_policy, url)

    assert [attempt.status // 100 for attempt in made] == [2, 2]


def test_connections_with_tls_are_kept_alive_too(
    address_policy, tls_receiver, certificate, monkeypatch
):
    trusting(certificate, monkeypatch)

    attempt_in_turn(address_policy, tls_receiver.url, times=4)

    assert len({request.connection for request in tls_receiver.received}) == 1
    assert len(tls_receiver.received) == 4


def test_a_connection_serves_for_a_minute_at_most(address_policy, receiver, monkeypatch):
    attempt_in_turn(address_policy, receiver.url, times=3)
    monkeypatch.setattr(webhookd, "CONNECTION_SECONDS", 0)
    attempt_in_turn(address_policy, receiver.url, times=3)

    ways = [request.connection for request in receiver.received]
    assert (len(set(ways[:3])), len(set(ways[3:]))) == (1, 3)


def test_a_connection_on_which_a_request_was_not_sent_whole_is_not_used_again(address_policy):
    client, kept = webhookd.Client(address_policy, 5.0), []

    def answer_before_all_was_read(server):
        for _ in range(2):
            kept.append(server.accept()[0])
            kept[-1].recv(1000)
            kept[-1].sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async def send_two(webhook):
        for _ in range(2):
            made = asyncio.get_running_loop().create_future()
            client.send(webhook, "", bytes(20 << 20), made.set_result)
            assert isinstance(await made, webhookd.Response)
        client.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        answering = functools.partial(answer_before_all_was_read, server)
        threading.Thread(target=answering, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        asyncio.run(send_two(webhookd.Webhook(url=url)))

    for connection in kept:
        connection.close()
    assert len(kept) == 2


@pytest.fixture
def closed_url():
    """A URL where nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/"


def test_a_refused_connection_is_an_error_in_words(attempt, closed_url):
    assert attempt(closed_url).description == "connection refused"


def test_a_connection_that_is_known_to_be_closed_is_not_used_again(address_policy, receiver):
    client = webhookd.Client(address_policy, 2.0)
    webhook = webhookd.Webhook(url=receiver.url)
    receiver.raw = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"  # and it closes

    async def send_two():
        for _ in range(2):
            made = asyncio.get_running_loop().create_future()
            client.send(webhook, "", b"{}", made.set_result)
            assert isinstance(await made, webhookd.Response)
            for connection in [c for kept in client._idle.values() for c in kept]:
                while not connection.transport.is_closing():
                    await asyncio.sleep(0.01)
        client.close()

    asyncio.run(send_two())

    assert len({request.connection for request in receiver.received}) == 2


def test_a_bug_is_an_error_in_words_too(attempt, receiver):
    made = attempt(receiver.url, headers={"A": "€"})  # which nobody can register

    assert (made.outcome, made.description) == ("ERROR", "internal error")


def test_an_unknown_host_is_an_error_in_words(attempt):
    assert attempt("http://name.invalid/").description == "unknown host name.invalid"


def test_a_name_server_that_is_silent_until_the_end_is_an_error_in_words(attempt, silent_resolver):
    made = attempt("http://slow.example/", timeout_seconds=0.1)

    assert made.description == "timed out, the name server did not answer for slow.example"


def test_a_host_that_was_registered_before_it_was_refused_is_an_error_in_words(attempt):
    made = attempt("http://straße.test/")

    assert (made.outcome, "write it as xn--strae-oqa.test" in made.description) == ("ERROR", True)


def test_a_refused_address_is_an_error_in_words(attempt):
    made = attempt("http://10.0.0.1/")

    assert (made.outcome, made.duration < 1000) == ("ERROR", True)
    assert "--allow-networks 10.0.0.0/8" in made.description


def test_an_attempt_is_refused_if_one_address_of_its_name_is(attempt, receiver, address_policy):
    being_looked_up(address_policy, "several.example", "127.0.0.1", "10.0.0.1")

    made = attempt(receiver.url.replace("127.0.0.1", "several.example"))

    assert made.description.startswith("10.0.0.1 is not a public address")
    assert receiver.received == []


def test_where_one_address_of_a_name_refuses_the_next_is_tried(attempt, receiver, address_policy):
    being_looked_up(address_policy, "several.example", "127.0.0.2", "127.0.0.1")

    made = attempt(receiver.url.replace("127.0.0.1", "several.example"))

    assert made.outcome == "SUCCESS"


@pytest.fixture
def hanging():
    """An address and port that neither accepts nor refuses a connection."""
    server = socket.create_server(("127.0.0.2", 0), backlog=0)
    with server, socket.create_connection(server.getsockname()):  # its queue is full
        yield server.getsockname()[1]


def test_where_one_address_of_a_name_hangs_the_next_has_all_the_time(
    attempt, address_policy, hanging, monkeypatch
):
    monkeypatch.setattr(webhookd, "CONNECT_DELAY_SECONDS", 0.01)
    being_looked_up(address_policy, "two.example", "127.0.0.2", "127.0.0.1")
    with socket.create_server(("127.0.0.1", hanging)) as server:
        scripts = [[by_length(200)]], contextlib.ExitStack()
        threading.Thread(target=answer_by_scripts, args=(server, *scripts)).start()

        made = attempt(f"http://two.example:{hanging}/", timeout_seconds=30.0)

    assert (made.description, made.duration < 10_000) == ("200", True)


def test_the_next_address_is_not_waited_for_when_one_fails(
    attempt, receiver, address_policy, monkeypatch
):
    monkeypatch.setattr(webhookd, "CONNECT_DELAY_SECONDS", 60)
    being_looked_up(address_policy, "several.example", "127.0.0.2", "::1", "127.0.0.1")

    made = attempt(receiver.url.replace("127.0.0.1", "several.example"))

    assert made.outcome == "SUCCESS"


def test_only_the_first_address_that_connects_is_used(attempt, address_policy, receiver):
    being_looked_up(address_policy, "two.example", "127.0.0.1", "127.0.0.2")
    with socket.create_server(("127.0.0.2", receiver.server_port)) as other:
        attempt(receiver.url.replace("127.0.0.1", "two.example"))

        assert select.select([other], [], [], 0)[0] == []
    assert len(receiver.received) == 1


def test_both_families_are_tried_in_alternation():
    assert webhookd.alternating(["::1", "::2", "::3", "127.0.0.1"]) == [
        "::1",
        "127.0.0.1",
        "::2",
        "::3",
    ]


UNREACHABLE = OSError(errno.ENETUNREACH, "")


@pytest.mark.parametrize(
    "failures, furthest",
    [
        ([UNREACHABLE, ConnectionRefusedError()], "connection refused"),
        ([ConnectionResetError(), UNREACHABLE, TimeoutError()], "connection reset"),
        ([UNREACHABLE, TimeoutError()], "timed out"),
        ([UNREACHABLE, OSError(errno.EHOSTUNREACH, "")], "no route to host"),
        ([TimeoutError(), ConnectionRefusedError()], "connection refused"),
        ([UNREACHABLE], "network is unreachable"),
    ],
)
def test_the_description_is_that_of_the_address_that_got_furthest(failures, furthest):
    assert webhookd.described(webhookd.furthest(failures)) == furthest


def test_an_address_that_refused_says_more_than_one_that_hangs(attempt, address_policy, hanging):
    being_looked_up(address_policy, "two.example", "127.0.0.1", "127.0.0.2")

    made = attempt(f"http://two.example:{hanging}/", timeout_seconds=0.3)

    assert (made.outcome, made.description) == ("ERROR", "connection refused")


def test_after_the_connect_a_refusal_of_another_address_says_nothing(
    attempt, address_policy, receiver
):
    receiver.hold.clear()
    being_looked_up(address_policy, "two.example", "127.0.0.2", "127.0.0.1")

    made = attempt(receiver.url.replace("127.0.0.1", "two.example"), timeout_seconds=0.3)

    assert made.description == "timed out"


def test_a_receiver_that_never_answers_is_given_up_in_time(attempt, receiver):
    receiver.hold.clear()

    made = attempt(receiver.url, timeout_seconds=0.2)

    assert (made.outcome, made.description) == ("ERROR", "timed out")


def drip(server):
    """Answer a byte now and then, until the client has had enough."""
    connection, _ = server.accept()
    with connection, contextlib.suppress(OSError):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n")
        while True:
            connection.sendall(b"x")
            time.sleep(0.02)


def test_the_time_limit_holds_for_a_receiver_that_drips(attempt):
    with socket.create_server(("127.0.0.1", 0)) as server:
        dripping = threading.Thread(target=drip, args=(server,))
        dripping.start()

        made = attempt(f"http://127.0.0.1:{server.getsockname()[1]}/", timeout_seconds=0.3)

        assert (made.outcome, made.description) == ("SUCCESS", "200, its body took too long")
        dripping.join()


def test_proxy_variables_are_ignored(attempt, receiver, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")

    assert attempt(receiver.url).outcome == "SUCCESS"


# ---- TLS ----


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A folder with a certificate for localhost."""
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def tls_receiver(certificate):
    server = Receiver()
    context = server_context(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.url = f"https://localhost:{server.server_port}/hook"
    with running(server):
        yield server


def trusting(certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
    webhookd.tls_context.cache_clear()


@pytest.fixture(autouse=True)
def fresh_tls_contexts():
    yield
    webhookd.tls_context.cache_clear()


def test_certificate_of_an_unknown_authority_is_refused(attempt, tls_receiver):
    made = attempt(tls_receiver.url)

    assert (made.outcome, made.description) == ("ERROR", "TLS: self-signed certificate")


def test_any_certificate_is_accepted_without_verification(attempt, tls_receiver):
    assert attempt(tls_receiver.url, verify_tls=False).outcome == "SUCCESS"


def test_ssl_cert_file_names_the_authorities_to_trust(
    attempt, tls_receiver, certificate, monkeypatch
):
    trusting(certificate, monkeypatch)

    assert attempt(tls_receiver.url).outcome == "SUCCESS"


def test_certificate_of_another_name_is_refused(attempt, tls_receiver, certificate, monkeypatch):
    trusting(certificate, monkeypatch)

    made = attempt(tls_receiver.url.replace("localhost", "127.0.0.1"))

    assert made.description.startswith("TLS: IP address mismatch")


def make_private_authority(folder):
    """Put ca.pem, which lacks its key usage, and a cert.pem and key.pem by it into a folder."""
    make, name = "openssl req -x509 -newkey rsa:2048 -nodes -days 2", "subjectAltName=DNS:localhost"
    for command in (
        f"{make} -subj /CN=CA -keyout ca.key -out ca.pem",
        f"{make} -subj /CN=localhost -addext {name} -addext basicConstraints=CA:FALSE"
        " -CA ca.pem -CAkey ca.key -keyout key.pem -out cert.pem",
    ):
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)


def test_a_private_authority_is_good_in_every_version_of_python(attempt, tmp_path, monkeypatch):
    make_private_authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    as_in_3_13 = ssl.create_default_context()
    as_in_3_13.verify_flags |= ssl.VERIFY_X509_STRICT
    monkeypatch.setattr(ssl, "create_default_context", lambda: as_in_3_13)
    webhookd.tls_context.cache_clear()
    server = Receiver()
    server.socket = server_context(tmp_path).wrap_socket(server.socket, server_side=True)

    with running(server):
        made = attempt(f"https://localhost:{server.server_port}/")

    assert made.description == "200"


def test_a_name_is_sent_and_verified_without_its_last_dot(
    attempt, tls_receiver, certificate, monkeypatch, address_policy
):
    trusting(certificate, monkeypatch)
    being_looked_up(address_policy, "localhost.", "127.0.0.1")
    names = []
    tls_receiver.socket.context.sni_callback = lambda _, name, __: names.append(name)

    made = attempt(tls_receiver.url.replace("localhost", "localhost."))

    assert (made.description, names) == ("200", ["localhost"])
    assert tls_receiver.received[0].headers["Host"].startswith("localhost.:")


@pytest.mark.parametrize("verify", [True, False])
def test_no_finite_field_diffie_hellman_is_offered(verify):
    offered = {cipher["kea"] for cipher in webhookd.tls_context(verify).get_ciphers()}

    assert "kx-ecdhe" in offered
    assert not any(exchange.startswith("kx-dhe") for exchange in offered)


# ======================================================================================
# Store
# ======================================================================================


def test_readers_are_opened_before_the_files_run_out(store):
    store.open_readers(2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # its thread is there
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
            found = pool.submit(lambda: store.reader().row("SELECT count(*) FROM events"))
            assert found.result() == (0,)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def new_event(name="e", body=b'{"timestamp":1,"event":"e"}'):
    return webhookd.NewEvent(name, 1, body)


def publish(store, *events, now_ms=1000, **options):
    return store.publish(list(events) or [new_event()], now_ms, **options).result()[0]


def add_webhook(store, *events, **fields):
    fields = {"url": "http://127.0.0.1:1/", "events": events or ("e",)} | fields
    return store.write(webhookd.Batch.add_webhook, webhookd.Webhook(**fields))


def an_attempt(due, outcome="SUCCESS", now_ms=1000, **fields):
    status = {"SUCCESS": 200, "FAILURE": 500, "ERROR": None}[outcome]
    fields = {"description": str(status), "status": status, "response_body": "ok"} | fields
    attempt = webhookd.Attempt(now_ms, 5, "http://x/", "", outcome, **fields)
    return webhookd.Result(due, attempt, now_ms, is_plain=True)  # no dispatcher waits for it


def record(store, due, outcome="SUCCESS", now_ms=1000, **fields):
    store.record(an_attempt(due, outcome, now_ms, **fields))
    store.flush()


def set_health(store, webhook, **fields):
    health = webhookd.Health(**fields)
    store.write(lambda batch: batch.changed_health.update({webhook.id: health}))


def due_deliveries(store, webhook, now_ms=1000):
    return store.due(webhook, now_ms, set(), 1000)[0]


def test_an_event_makes_a_delivery_for_each_active_webhook_that_wants_it(store):
    wanted = [add_webhook(store, "e"), add_webhook(store, "x", "e*")]
    add_webhook(store, "x")
    add_webhook(store, "e", active=False)
    add_webhook(store, "e", filters={"a": 1})

    [event] = publish(store)

    assert event.delivery_count == 2
    assert [d.webhook_id for d in store.event(event.id)[2]] == [w.id for w in wanted]


def test_a_webhook_with_several_names_that_match_gets_one_delivery(store):
    webhook = add_webhook(store, "e", "*", "e*")

    publish(store)

    assert len(due_deliveries(store, webhook)) == 1


def test_many_events_and_deliveries_are_more_than_one_statement_takes(store):
    webhook = add_webhook(store)

    publish(store, *[new_event()] * (3 * webhookd.ROWS_PER_STATEMENT + 1))

    numbers = [due.row_id for due in store.due(webhook, 1000, set(), 10_000)[0]]
    assert numbers == list(range(1, 3 * webhookd.ROWS_PER_STATEMENT + 2))


def test_due_deliveries_are_read_up_to_a_count_and_a_size(store):
    webhook = add_webhook(store)
    publish(store, *[new_event(body=b"x" * 600_000)] * 3)

    assert [len(store.due(webhook, 1000, held, 10)[0]) for held in (set(), {1, 2})] == [2, 1]
    assert store.due(webhook, 1000, set(), 1)[1] is True
    assert store.due(webhook, 1000, {1, 2}, 10)[1] is False


def test_a_delivery_is_due_at_its_time(store):
    webhook = add_webhook(store)
    publish(store)
    [due] = due_deliveries(store, webhook)

    record(store, due, "FAILURE")

    assert due_deliveries(store, webhook, 10_999) == []
    assert store.next_due(webhook.id, 1000) == 11_000
    assert [d.attempt_count for d in due_deliveries(store, webhook, 11_000)] == [1]


@pytest.mark.parametrize("failures", [1, 2])
def test_recovery_releases_waits_without_using_the_schedule_up(store, failures):
    webhook = add_webhook(store)
    publish(store, new_event(), new_event())
    waiting, probe = due_deliveries(store, webhook)
    for _ in range(failures):
        record(store, waiting, "FAILURE", now_ms=waiting.next_attempt)
        [waiting] = [d for d in due_deliveries(store, webhook, 10**9) if d.row_id == 1]
    set_health(store, webhook, failures=5, paused_until=1000)

    record(store, probe)

    [due] = due_deliveries(store, webhook)
    assert (due.row_id, due.schedule_index) == (waiting.row_id, failures - 1)


def test_attempt_leaves_nothing_behind_if_its_webhook_was_deleted(store):
    webhook = add_webhook(store)
    publish(store)
    [due] = due_deliveries(store, webhook)

    store.write(webhookd.Batch.delete_webhook, webhook.id)
    record(store, due)

    tables = ("deliveries", "attempts", "statistics")
    assert [store.reader().row(f"SELECT count(*) FROM {table}")[0] for table in tables] == [0, 0, 0]


def test_one_write_that_fails_does_not_take_the_others_with_it(store):
    def fail(batch):
        batch.connection.execute("INSERT INTO users VALUES ('half', 'done', 'x')")
        raise ValueError("no")

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        failed = [pool.submit(store.write, fail) for _ in range(50)]
        published = [pool.submit(publish, store) for _ in range(50)]

    assert all(isinstance(future.exception(), ValueError) for future in failed)
    ids = [future.result()[0].id for future in published]
    assert sorted(ids) == sorted(set(ids))
    assert store.events(webhookd.Filter(), webhookd.Page())[1] == 50
    assert webhookd.load_users(store.reader()) == []


def test_an_error_of_the_database_is_the_fault_of_no_request(store):
    with pytest.raises(webhookd.Unavailable, match="no such table: nowhere"):
        store.write(lambda batch: batch.connection.execute("DELETE FROM nowhere"))

    assert "no such table" in store.problem


def test_reader_cannot_write(store):
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        store.reader().execute("DELETE FROM users")


def test_a_transaction_is_undone_whatever_ends_it(store):
    with contextlib.closing(webhookd.connect(store._path)) as connection:
        with pytest.raises(SystemExit), webhookd.transaction(connection):
            connection.execute("INSERT INTO users VALUES ('half', 'done', 'x')")
            raise SystemExit

        assert not connection.in_transaction
        assert webhookd.load_users(connection) == []


def test_nothing_is_published_by_a_commit_that_fails(store):
    store.write(lambda batch: batch.connection.execute("DROP TABLE payloads"))

    with pytest.raises(webhookd.Unavailable, match="no such table: payloads"):
        publish(store)

    assert store.events(webhookd.Filter(), webhookd.Page())[1] == 0
    assert "no such table" in store.problem


def test_a_result_that_cannot_be_written_waits_until_it_can(store, monkeypatch):
    monkeypatch.setattr(webhookd, "RETRY_SECONDS", 0.01)
    webhook = add_webhook(store)
    publish(store)
    [due] = due_deliveries(store, webhook)

    store.write(lambda batch: batch.connection.execute("ALTER TABLE attempts RENAME TO gone"))
    with pytest.raises(webhookd.Unavailable):
        record(store, due)
    with sqlite3.connect(store._path, isolation_level=None) as other:
        other.execute("ALTER TABLE gone RENAME TO attempts")

    wait_until(lambda: store.problem is None)
    assert store.delivery(due.uuid)[0].state == "succeeded"


@contextlib.contextmanager
def no_room():
    """A process that can make no file any larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_commit_of_nothing_does_not_show_that_there_is_room_again(store):
    with no_room():
        for write in (lambda: publish(store), store.flush):
            with pytest.raises(webhookd.WebhookdError):
                write()

        assert store.problem
    store.flush()
    assert store.problem is None


def test_a_store_that_cannot_write_closes_and_attempts_again_after_the_start(tmp_path):
    path = str(tmp_path / "test.db")
    store = open_store(path).__enter__()
    webhook = add_webhook(store)
    publish(store)
    [due] = due_deliveries(store, webhook)
    store.write(lambda batch: batch.connection.execute("PRAGMA query_only = ON"))
    with pytest.raises(webhookd.Unavailable):
        record(store, due)

    assert ends(lambda: store.__exit__())

    with open_store(path) as store:
        assert due_deliveries(store, webhook) == [due]


def test_a_store_that_is_closed_takes_nothing_and_stands_still(tmp_path):
    with open_store(str(tmp_path / "test.db")) as store:
        assert not store.stands_still()
    refused = []

    def publish_late():
        with pytest.raises(webhookd.Unavailable, match="stopping"):
            publish(store)
        refused.append(True)

    assert ends(publish_late) and refused
    assert store.stands_still()


def test_disk_error_says_that_the_disk_is_full(store, monkeypatch):
    error = sqlite3.OperationalError("disk I/O error")
    usage = shutil.disk_usage("/")
    told = []
    for free in (1 << 30, 1 << 10):
        usage = usage._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        told.append(type(webhookd.stored_error(error, store._path)))

    assert told == [webhookd.Unavailable, webhookd.StorageFull]


def test_full_disk_and_other_errors_are_different_errors(store):
    pages = "PRAGMA max_page_count = {}"
    store.write(lambda batch: batch.connection.execute(pages.format(1)))
    with pytest.raises(webhookd.StorageFull):
        for _ in range(100):
            publish(store, new_event(body=b"x" * 100_000))

    store.write(lambda batch: batch.connection.execute(pages.format(1 << 30)))
    assert publish(store)


def test_a_key_used_twice_at_the_same_moment_publishes_once(store):
    key = webhookd.IdempotencyKey("user", "key", b"fingerprint")

    def publish_with_key(_):
        return store.publish([new_event()], 1000, key).result()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(publish_with_key, range(16)))

    assert len({event.id for [event], _ in answers}) == 1
    assert [repeated for _, repeated in answers].count(False) == 1
    assert store.events(webhookd.Filter(), webhookd.Page())[1] == 1


def test_an_attempt_is_judged_by_the_health_in_the_database(store):
    """The delivery loop has not heard yet that somebody activated the webhook."""
    webhook = add_webhook(store)
    publish(store)
    [due] = due_deliveries(store, webhook)
    set_health(store, webhook, failures=4, failing_since=1)
    store.write(webhookd.Batch.change_webhook, webhook.id, lambda old: old, True)

    record(store, due, "FAILURE")

    assert store.health[webhook.id].failures == 1


def test_ids_are_never_used_again(tmp_path):
    path = str(tmp_path / "again.db")
    with open_store(path) as store:
        webhook = add_webhook(store)
        publish(store)
        store.write(webhookd.Batch.delete_webhook, webhook.id)

    with open_store(path) as store:
        second = add_webhook(store)
        [event] = publish(store)

        assert (second.id, event.id) == (2, 2)
        assert [due.row_id for due in due_deliveries(store, second)] == [2]


def test_a_second_store_on_the_same_file_is_refused(store):
    with pytest.raises(webhookd.DatabaseError, match="in use"), open_store(store._path):
        pass


def test_a_database_of_a_newer_version_is_refused_and_left_alone(tmp_path):
    path, newer = str(tmp_path / "newer.db"), len(webhookd.MIGRATIONS) + 1
    with open_store(path) as store:
        store.write(lambda batch: batch.connection.execute(f"PRAGMA user_version = {newer}"))
    before = pathlib.Path(path).read_bytes()

    with pytest.raises(webhookd.DatabaseError, match=f"version {newer}"), open_store(path):
        pass

    assert pathlib.Path(path).read_bytes() == before


def test_two_that_migrate_at_once_migrate_once(tmp_path):
    path = str(tmp_path / "new.db")
    first, second = webhookd.open_database(path), webhookd.open_database(path)
    waits = threading.Event()
    second.set_trace_callback(lambda sql: sql == "BEGIN IMMEDIATE" and waits.set())

    with concurrent.futures.ThreadPoolExecutor() as pool:
        with webhookd.transaction(first):
            migrating = pool.submit(webhookd.migrate, second)
            waits.wait(20)
            for script in webhookd.MIGRATIONS:
                for statement in script.split(";\n"):
                    first.execute(statement)
            first.execute(f"PRAGMA user_version = {len(webhookd.MIGRATIONS)}")

        assert migrating.result() is None
    first.close(), second.close()


def test_a_migration_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    path = str(tmp_path / "failed.db")
    broken = (*webhookd.MIGRATIONS, "CREATE TABLE more (a);\nCREATE TABLE users (a);\n")
    monkeypatch.setattr(webhookd, "MIGRATIONS", broken)

    with pytest.raises(webhookd.SettingError, match="already exists"), open_store(path):
        pass

    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (0,)
    assert connection.execute("SELECT name FROM sqlite_schema").fetchall() == []


def test_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "text.db").write_text("not a database, but long enough to look at " * 20)

    with pytest.raises(webhookd.SettingError), open_store(str(tmp_path / "text.db")):
        pass


def test_a_database_of_another_program_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE theirs (a)")

    with pytest.raises(webhookd.DatabaseError), open_store(str(path)):
        pass

    with contextlib.closing(sqlite3.connect(path)) as connection:
        tables = connection.execute("SELECT name FROM sqlite_schema").fetchall()
    assert tables == [("theirs",)]


def test_pruning_leaves_an_older_attempt_as_the_latest(store):
    webhook = add_webhook(store, "a", "b")
    publish(store, new_event("a"), now_ms=1000)
    publish(store, new_event("b"), now_ms=2000)
    first, second = store.due(webhook, 5000, set(), 10)[0]
    for due in (second, first):
        record(store, due)
        store.flush()

    store.write(webhookd.Batch.delete_deliveries, [first.row_id])

    assert store.latest(webhook.id, webhookd.Filter())["id"] == second.uuid


def test_temporary_tables_are_in_memory_since_tmp_may_be_full(store):
    writer = store.write(lambda batch: batch.connection.row("PRAGMA temp_store"))

    assert writer == store.reader().row("PRAGMA temp_store") == (2,)


def many_deliveries(store, number):
    """Two webhooks, and the first one's finished deliveries; one in a thousand is another."""
    add_webhook(store), add_webhook(store)
    every = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {number})"
    is_rare = "i % 1000 = 0"
    delivery = (
        f"i, i, 1, i, iif({is_rare}, 'rare', 'e'), i, iif({is_rare}, 'failed', 'succeeded'), 1,"
        f" NULL, 0, iif({is_rare}, 'ERROR', 'SUCCESS'), '', 1"
    )

    def work(batch):
        event = f"i, iif({is_rare}, 'rare', 'e'), i, i, 1"
        batch.connection.execute(f"INSERT INTO events {every} SELECT {event} FROM n")
        batch.connection.execute(f"INSERT INTO deliveries {every} SELECT {delivery} FROM n")

    store.write(work)


def steps_of(store, read):
    """How many hundreds of steps SQLite takes to read something, and what it reads."""
    steps, reader = itertools.count(), store.reader()
    reader.set_progress_handler(lambda: next(steps) and None, 100)
    found = read()
    reader.set_progress_handler(None, 0)
    return next(steps), found


@pytest.mark.parametrize(
    "wanted, number",
    [
        ({"states": ("failed",)}, 20),
        ({"states": ("failed",), "events": ("e",)}, 0),
        ({"states": ("pending",)}, 0),
        ({"outcomes": ("ERROR",)}, 20),
        ({"outcomes": ("FAILURE",)}, 0),
        ({"events": ("rare",)}, 20),
        ({"events": ("x",), "outcomes": ("SUCCESS",)}, 0),
        ({"outcomes": ("ERROR", "FAILURE"), "since": 1}, 20),
    ],
)
def test_a_list_reads_the_deliveries_that_it_shows_and_not_all(store, wanted, number):
    many_deliveries(store, 20_000)
    wanted = webhookd.Filter(**wanted)

    steps, found = steps_of(store, lambda: store.deliveries(1, wanted, webhookd.Page()))

    assert (len(found[0]), found[1]) == (number, number)
    assert steps < 20


def test_a_list_of_events_by_name_reads_those_of_that_name(store):
    many_deliveries(store, 20_000)
    wanted = webhookd.Filter(events=("rare",))

    steps, (_, total) = steps_of(store, lambda: store.events(wanted, webhookd.Page()))

    assert total == 20
    assert steps < 20


def test_a_long_list_is_counted_to_a_bound_beyond_the_page(store, monkeypatch):
    monkeypatch.setattr(webhookd, "COUNTED_ROWS", 100)
    many_deliveries(store, 1000)

    totals = [
        store.deliveries(1, webhookd.Filter(), webhookd.Page(start, 10))[1]
        for start in (0, 500, 990)
    ]

    assert totals == [110, 610, 1000]


def break_table(store, table):
    """Overwrite the first page of a table or an index in the file."""
    sql = "SELECT rootpage FROM sqlite_schema WHERE name = ?"
    [page] = store.write(lambda batch: batch.connection.row(sql, table))
    store.empty_log()
    with open(store._path, "r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xff" * 4096)


def test_damage_is_remembered_from_the_first_page_and_logged_once(store, caplog):
    break_table(store, "deliveries_by_webhook")

    for _ in range(2):
        with pytest.raises(sqlite3.DatabaseError):
            store.deliveries(1, webhookd.Filter(), webhookd.Page())

    assert list(store.faults()) == ["the database is damaged: database disk image is malformed"]
    assert caplog.text.count("the database is damaged") == 1


def test_an_error_quotes_nothing_of_a_damaged_row(store):
    add_webhook(store)
    sql = "UPDATE webhooks SET definition = CAST(x'534543524554ff' AS TEXT)"  # SECRET, no UTF-8
    store.write(lambda batch: batch.connection.change(sql))

    with pytest.raises(sqlite3.DatabaseError) as told:
        webhookd.load_webhooks(store.reader())

    assert "SECRET" not in str(told.value)
    assert "UTF-8" in store.damage


def test_a_commit_of_which_the_disk_made_an_error_is_overwritten(store):
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
    before = store.write(lambda batch: batch.connection.total_changes)
    statements = []
    store._connection.set_trace_callback(statements.append)

    def fail(batch):
        raise error

    with pytest.raises(webhookd.Unavailable):
        store.write(fail)

    assert before == 0
    assert statements[-1] == "COMMIT"


def test_each_commit_is_on_the_disk_before_it_is_acknowledged(store):
    full = store.write(lambda batch: batch.connection.row("PRAGMA synchronous"))

    assert full == (2,)


def test_the_file_is_for_its_owner_only(store):
    assert os.stat(store._path).st_mode & 0o077 == 0


# ---- maintenance ----


@pytest.fixture
def maintenance(store, dispatcher, settings, clock):
    steady = Clock()
    maintenance = webhookd.Maintenance(store, settings, webhookd.Clock(clock, steady))
    maintenance.steady = steady
    return maintenance


def count(store, table):
    return store.reader().row(f"SELECT count(*) FROM {table}")[0]


def record_successes(store, deliveries, clock):
    for due in deliveries:
        store.record(an_attempt(due, now_ms=clock.ms))
    store.flush()


def files_of(store):
    store.flush()
    paths = [store._path + suffix for suffix in ("", "-wal")]
    return b"".join(pathlib.Path(path).read_bytes() for path in paths)


def test_a_secret_that_no_longer_signs_is_gone_from_the_files(api, store, maintenance, clock):
    api.create("http://127.0.0.1:1/", configuration={"secret": "OLD-SECRET"})
    api.put_json(f"{WEBHOOKS}/1", {"configuration": {"secret": "NEW-SECRET"}})
    maintenance.run_once()
    assert b"OLD-SECRET" in files_of(store)

    for passing in (clock, maintenance.steady):
        passing.advance(86400)
    maintenance.run_once()

    assert b"OLD-SECRET" not in files_of(store)
    assert store.webhooks.get(1).secret == "NEW-SECRET"


def test_finished_deliveries_are_kept_as_long_as_is_set(store, dispatcher, settings, clock):
    ten_days = dataclasses.replace(settings, retention=10 * 86400.0)
    maintenance = webhookd.Maintenance(store, ten_days, webhookd.Clock(clock, clock))
    webhook = add_webhook(store)
    publish(store, *[new_event()] * 1200, now_ms=clock.ms)
    record_successes(store, due_deliveries(store, webhook, clock.ms)[:700], clock)

    maintenance.run_once()
    assert count(store, "deliveries") == 1200
    clock.advance(10 * 86400 + 1)
    maintenance.run_once()

    assert [count(store, t) for t in ("deliveries", "events", "payloads")] == [500] * 3
    assert count(store, "attempts") == 0
    counts = store.statistics(webhook.id, (), clock.ms)["counts"]
    assert counts["successes"] == 700


def test_the_statistics_of_a_deleted_webhook_are_gone(store):
    webhook = add_webhook(store)
    publish(store)
    record(store, due_deliveries(store, webhook)[0])
    assert count(store, "statistics") == 1

    store.write(webhookd.Batch.delete_webhook, webhook.id)

    assert count(store, "statistics") == 0


def test_an_attempt_is_counted_for_30_days_to_the_hour(store, clock):
    webhook = add_webhook(store)
    publish(store, now_ms=clock.ms)
    record_successes(store, due_deliveries(store, webhook, clock.ms), clock)

    clock.advance(30 * 86400 - 3600)

    counts = store.statistics(webhook.id, (), clock.ms)["counts"]
    assert counts["window"]["start"] == clock.ms - 30 * webhookd.DAY_MS
    assert counts["successes"] == 1
    clock.advance(86400)
    assert store.statistics(webhook.id, (), clock.ms)["counts"]["successes"] == 0


def test_a_webhook_has_succeeded_unless_it_has_failed_since(store):
    webhooks = [add_webhook(store) for _ in range(3)]
    publish(store)
    for webhook in webhooks[:2]:
        record(store, due_deliveries(store, webhook)[0])
    publish(store)
    record(store, due_deliveries(store, webhooks[1])[0], "FAILURE")

    assert store.succeeded_webhooks() == {webhooks[0].id}


def test_the_latest_attempt_is_known_as_long_as_it_is_kept(store, dispatcher, settings, clock):
    long = dataclasses.replace(settings, retention=90 * 86400.0)
    maintenance = webhookd.Maintenance(store, long, webhookd.Clock(clock, clock))
    webhook = add_webhook(store)
    publish(store, now_ms=clock.ms)
    record_successes(store, due_deliveries(store, webhook, clock.ms), clock)

    clock.advance(60 * 86400)
    maintenance.run_once()

    assert store.latest(webhook.id, webhookd.Filter())["result"]["outcome"] == "SUCCESS"


def pass_time(maintenance, clock, seconds):
    clock.advance(seconds)
    maintenance.steady.advance(seconds)
    maintenance.run_once()


def test_events_without_deliveries_and_old_keys_go_too(store, maintenance, clock):
    key = webhookd.IdempotencyKey("u", "k", b"f")
    store.publish([new_event()], clock.ms, key).result()

    pass_time(maintenance, clock, 3 * 86400)
    assert (count(store, "events"), count(store, "answers")) == (1, 1)
    pass_time(maintenance, clock, 61)
    assert (count(store, "events"), count(store, "answers")) == (1, 0)
    pass_time(maintenance, clock, 27 * 86400)

    assert [count(store, t) for t in ("events", "payloads", "answers")] == [0, 0, 0]


def test_database_over_its_size_deletes_the_oldest_and_then_refuses_publications(
    store, dispatcher, settings, clock
):
    small = dataclasses.replace(settings, max_database_size=1 << 20)
    maintenance = webhookd.Maintenance(store, small, webhookd.Clock(clock, clock))
    webhook = add_webhook(store)
    publish(store, *[new_event(body=b"x" * 10_000)] * 200, now_ms=clock.ms)
    record_successes(store, store.due(webhook, clock.ms, set(), 1000)[0][:60], clock)

    maintenance.run_once()
    assert count(store, "deliveries") == 140
    with pytest.raises(webhookd.StorageFull, match="--max-database-size"):
        publish(store)

    while found := store.due(webhook, clock.ms, set(), 1000)[0]:
        record_successes(store, found, clock)
    maintenance.run_once()
    assert store.space.used <= 1 << 20
    assert publish(store)


def small_maintenance(store, settings, clock, size_bytes):
    small = dataclasses.replace(settings, max_database_size=size_bytes)
    return webhookd.Maintenance(store, small, webhookd.Clock(clock, clock))


def test_database_over_its_size_deletes_old_keys_before_deliveries(
    store, dispatcher, settings, clock
):
    webhook = add_webhook(store)
    publish(store, now_ms=clock.ms)
    record_successes(store, due_deliveries(store, webhook, clock.ms), clock)
    key = functools.partial(webhookd.IdempotencyKey, fingerprint=b"f" * 4000)
    for n in range(200):
        store.publish([new_event("x")], clock.ms, key("u", str(n)))
    clock.advance(86400 + 1)
    publish(store, new_event("x"), now_ms=clock.ms, idempotency=key("u", "today"))

    small_maintenance(store, settings, clock, 500_000).run_once()

    assert (count(store, "answers"), count(store, "deliveries"), store.full) == (1, 1, None)


def test_only_pending_deliveries_make_the_database_full(store, dispatcher, settings, clock):
    webhook = add_webhook(store)
    publish(store, *[new_event()] * 10, now_ms=clock.ms)
    record_successes(store, due_deliveries(store, webhook, clock.ms)[:9], clock)
    store.publish([new_event("x")], clock.ms, webhookd.IdempotencyKey("u", "k", b"f"))

    small_maintenance(store, settings, clock, 1).run_once()

    tables = "answers", "statistics", "deliveries", "events"
    assert [count(store, table) for table in tables] == [0, 0, 1, 1]
    assert store.full == webhookd.FULL


def test_first_names_are_counted_and_all_others_together(store, monkeypatch):
    monkeypatch.setattr(webhookd, "MAX_COUNTED_NAMES", 2)
    webhook = add_webhook(store, "*")
    publish(store, *[new_event(name) for name in "abcd"], new_event("a"))

    for due in due_deliveries(store, webhook):
        record(store, due)

    counts = {
        name: store.statistics(webhook.id, (name,), 1000)["counts"]["successes"]
        for name in store.attempted_events(webhook.id)
    }
    assert counts == {"a": 2, "b": 1, "*": 2}


class Volume:
    """Replaces what the operating system says of the room on a volume."""

    def __init__(self, monkeypatch, total_bytes):
        self.total, self.others, self.flags = total_bytes, 0, 0
        monkeypatch.setattr(os, "statvfs", self.statvfs)

    def statvfs(self, path):
        files = sum(os.stat(path + end).st_size for end in ("", "-wal"))
        free = max(0, self.total - self.others - files)
        return os.statvfs_result((1, 1, self.total, free, free, 0, 0, 0, self.flags, 255))


def test_nearly_full_disk_refuses_publications_only(store, maintenance, clock, monkeypatch):
    volume = Volume(monkeypatch, 100 << 20)
    webhook = add_webhook(store)
    publish(store, new_event(body=b"x" * 1_000_000), now_ms=clock.ms)
    [due] = due_deliveries(store, webhook, clock.ms)
    volume.others = 90 << 20

    maintenance.run_once()
    with pytest.raises(webhookd.StorageFull, match="reserve"):
        publish(store)
    record_successes(store, [due], clock)

    assert store.delivery(due.uuid)[0].state == "succeeded"
    volume.others = 0
    maintenance.run_once()
    assert publish(store)


def test_a_publication_for_which_there_is_no_room_is_refused_at_once(
    store, maintenance, monkeypatch
):
    Volume(monkeypatch, 20 << 20)
    maintenance.run_once()

    with pytest.raises(webhookd.StorageFull, match="reserve"):
        for _ in range(10):  # nobody measures between them
            publish(store, new_event(body=b"x" * 1_000_000))

    assert publish(store)  # there is room for a small one


@pytest.mark.parametrize("others, kept", [(0, False), (90, True)])
def test_database_that_has_filled_its_disk_makes_room(
    store, maintenance, clock, monkeypatch, others, kept
):
    webhook = add_webhook(store)
    publish(store, *[new_event(body=b"x" * 100_000)] * 60, now_ms=clock.ms)
    record_successes(store, due_deliveries(store, webhook, clock.ms)[:50], clock)
    store.empty_log()
    Volume(monkeypatch, (2 * others + 25) << 19).others = others << 20

    maintenance.run_once()

    assert (count(store, "deliveries") == 60) is kept
    assert (store.full is not None) is kept


def test_read_only_disk_and_missing_file_refuse_publications(store, maintenance, monkeypatch):
    volume = Volume(monkeypatch, 1 << 30)
    volume.flags = os.ST_RDONLY
    maintenance.run_once()
    read_only, volume.flags = store.full, 0

    os.rename(store._path, store._path + ".moved")
    maintenance.run_once()

    assert (read_only, store.full) == ("the disk is read-only", webhookd.NO_FILE)


@contextlib.contextmanager
def hanging_reader(store):
    with contextlib.closing(webhookd.connect(store._path)) as reader:
        reader.execute("BEGIN")
        reader.row("SELECT count(*) FROM events")
        yield


def test_log_held_by_a_reader_grows_to_a_bound_and_is_logged(
    store, dispatcher, settings, clock, caplog
):
    maintenance = small_maintenance(store, settings, clock, 20 << 20)
    with hanging_reader(store):
        for _ in range(10):
            publish(store, new_event(body=b"x" * 1_000_000), now_ms=clock.ms)
        maintenance.run_once()
        maintenance.run_once()

        assert store.full == webhookd.LONG_LOG
        assert caplog.text.count("log is not empty yet") == 1
        assert count(store, "events") == 10
    for _ in range(2):
        maintenance.run_once()
    assert (store.full, store.space.log) == (None, 0)


def test_failing_part_of_maintenance_is_logged_once_and_stops_no_other(
    store, maintenance, caplog, monkeypatch
):
    monkeypatch.setattr(webhookd, "PRUNING_SECONDS", 0)
    publish(store, *[new_event(body=b"x" * 100_000)] * 20)
    break_table(store, "answers_by_age")

    for _ in range(2):
        store.write(lambda batch: batch.connection.change("DELETE FROM payloads"))
        maintenance.run_once()

    assert caplog.text.count("maintenance failed") == 1
    assert "Traceback" not in caplog.text
    assert store.reader().row("PRAGMA freelist_count")[0] < webhookd.PAGES_PER_STEP
    assert store.damage


def test_sweeping_leaves_the_deliveries_of_a_webhook_that_exists(store):
    webhook = add_webhook(store)
    publish(store)

    deleted = store.write(webhookd.Batch.delete_deliveries_of, webhook.id)

    assert (deleted, count(store, "deliveries")) == (0, 1)


def test_rows_made_by_a_wrong_clock_do_not_stop_pruning(store, maintenance, clock):
    publish(store, now_ms=clock.ms + 10**9)
    publish(store, *[new_event()] * 1000, now_ms=clock.ms)

    pass_time(maintenance, clock, 40 * 86400)

    assert count(store, "events") == 1


def test_database_over_its_size_deletes_no_more_than_it_must(store, dispatcher, settings, clock):
    webhook = add_webhook(store)
    for _ in range(2):
        publish(store, *[new_event(body=b"x" * 2000)] * 750, now_ms=clock.ms)
    while due := store.due(webhook, clock.ms, set(), 1000)[0]:
        record_successes(store, due, clock)
    store.measure()
    small = dataclasses.replace(settings, max_database_size=store.space.used - 1)

    webhookd.Maintenance(store, small, webhookd.Clock(clock, clock)).run_once()

    # one step: the oldest deliveries, and with them their events and payloads
    kept = 1500 - webhookd.ROWS_PER_STEP
    assert count(store, "deliveries") == count(store, "events") == kept
    assert count(store, "payloads") == kept


def test_free_space_is_given_back_to_the_file_system(store, maintenance, clock):
    publish(store, *[new_event(body=b"x" * 100_000)] * 100, now_ms=clock.ms)
    store.empty_log()
    before = os.stat(store._path).st_size

    pass_time(maintenance, clock, 31 * 86400)

    assert os.stat(store._path).st_size < before / 5
    assert os.stat(store._path + "-wal").st_size == 0


def test_pruning_leaves_deliveries_redelivered_or_replayed_during_it(store):
    webhook = add_webhook(store)
    [event] = publish(store)
    [due] = due_deliveries(store, webhook)

    batch = webhookd.Batch
    store.write(batch.delete_deliveries, [due.row_id], webhookd.FINISHED)
    store.write(batch.delete_events, [event.id], webhookd.WITHOUT_DELIVERIES)

    assert due_deliveries(store, webhook) == [due]


def test_pruning_stops_reading_at_the_first_young_row(store):
    publish(store, *[new_event()] * (3 * webhookd.ROWS_PER_STEP))

    steps = list(store.prune(1000))

    assert len(steps) == 2  # one of the deliveries, one of the events


def test_a_step_of_pruning_writes_about_a_mebibyte_since_room_may_be_scarce(store):
    publish(store, *[new_event(body=b"x" * 100_000)] * 30)

    steps = list(store.prune(webhookd.END_OF_TIME_MS))

    assert len(steps) == 1 + 3 + 1  # no deliveries, the events, and that there are no more
    assert count(store, "events") == 0


def test_a_deleted_webhook_with_many_deliveries_is_gone_at_once_and_swept_later(store, maintenance):
    maintenance.run_once()  # its next pruning is a minute away
    webhook = add_webhook(store)
    [*_, event] = publish(store, *[new_event()] * 1200)
    [due, *_] = reversed(due_deliveries(store, webhook))

    store.write(webhookd.Batch.delete_webhook, webhook.id)

    assert count(store, "deliveries") > 0
    assert store.event(event.id)[2] == []
    with pytest.raises(webhookd.NotFound):
        store.delivery(due.uuid)
    maintenance.run_once()
    assert count(store, "deliveries") == 0


def test_leftovers_of_a_deleted_webhook_are_swept_after_a_restart(tmp_path):
    path = str(tmp_path / "left.db")
    with open_store(path) as store:
        webhooks = [add_webhook(store) for _ in range(4)]
        publish(store, *[new_event()] * 600)
        for webhook in (webhooks[0], webhooks[2]):
            store.write(webhookd.Batch.delete_webhook, webhook.id)

    with open_store(path) as store:
        left = count(store, "deliveries")
        list(store.delete_leftovers())

        assert (left > 1200, count(store, "deliveries")) == (True, 1200)


def test_publications_that_fill_the_database_wake_maintenance(
    store, dispatcher, settings, monkeypatch
):
    monkeypatch.setattr(webhookd, "MAINTENANCE_SECONDS", 1000)
    small = dataclasses.replace(settings, max_database_size=1 << 20)
    add_webhook(store)

    with webhookd.Maintenance(store, small, webhookd.Clock()):
        publish(store, *[new_event(body=b"x" * 10_000)] * 200)
        wait_until(lambda: store.full)

    with pytest.raises(webhookd.StorageFull):
        publish(store)


@pytest.mark.parametrize("seconds", [3600, -3600])
def test_clock_jump_moves_the_schedule(store, maintenance, clock, seconds):
    webhook = add_webhook(store)
    publish(store, now_ms=clock.ms)
    planned = clock.ms + 60_000
    health = webhookd.Health(5, clock.ms, planned, planned, "500")
    store.write(
        lambda batch: batch.connection.change("UPDATE deliveries SET next_attempt = ?", planned)
    )
    set_health(store, webhook, **health._asdict())

    clock.advance(seconds)
    maintenance.run_once()

    assert store.next_due(webhook.id, 0) == planned + seconds * 1000
    health = store.health[webhook.id]
    assert health.paused_until == health.resting_until == planned + seconds * 1000


def test_running_clock_moves_no_schedule(store, maintenance, clock):
    webhook = add_webhook(store)
    publish(store, now_ms=clock.ms)

    pass_time(maintenance, clock, 3600)

    assert store.next_due(webhook.id, 0) == clock.ms - 3_600_000


def test_a_jump_forward_deletes_nothing_for_a_day(store, maintenance, clock):
    publish(store, now_ms=clock.ms)

    clock.advance(46 * 86400)
    maintenance.run_once()
    pass_time(maintenance, clock, 86399)
    assert count(store, "events") == 1

    pass_time(maintenance, clock, 2)
    assert count(store, "events") == 0


@pytest.mark.parametrize("hours", [-24 * 700, 24 * 700])
def test_a_wrong_clock_before_the_start_neither_delays_disables_nor_deletes(
    store, settings, clock, hours
):
    webhook = add_webhook(store)
    publish(store, now_ms=clock.ms)
    [due] = due_deliveries(store, webhook, clock.ms)
    record(store, due, "FAILURE", now_ms=clock.ms)
    set_health(store, webhook, failures=5, failing_since=clock.ms, paused_until=clock.ms + 10_000)
    clock.advance(hours * 3600)

    with webhookd.Maintenance(store, settings, webhookd.Clock(clock, lambda: 0.0)):
        pass

    longest_ms = webhookd.longest_wait_seconds(settings) * 1000
    assert store.next_due(webhook.id, 0) <= clock.ms + longest_ms
    health = store.health[webhook.id]
    assert health.paused_until <= clock.ms + longest_ms
    assert abs(clock.ms - health.failing_since) < 1000
    assert count(store, "deliveries") == 1


def test_a_clock_follows_small_steps_as_they_come(clock):
    steady = Clock()
    own = webhookd.Clock(clock, steady)
    clock.advance(1.5)
    steady.advance(1)

    assert own() == clock() - 0.5
    own.advance(own.behind())
    assert own() == clock()


def busy(store):
    """Keep the writer busy; what is submitted before the end shares the next commit."""
    begun, end = threading.Event(), threading.Event()

    def work(connection):
        begun.set()
        end.wait(20)

    thread = threading.Thread(target=store.write, args=(work,))
    thread.start()
    begun.wait()
    return end


def in_one_commit(store, *calls):
    """The results of calls that share a commit, in this order."""
    end = busy(store)
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        futures = []
        for call in calls:
            futures.append(pool.submit(call))
            wait_until(lambda: len(store._writes) == len(futures))
        end.set()
        return [future.result() for future in futures]


def test_two_replays_at_once_make_one_delivery(store):
    [event] = publish(store)
    webhook = add_webhook(store)
    replay = [lambda: store.write(webhookd.Batch.replay, webhook.id, [event.id], 1000)] * 2

    assert in_one_commit(store, *replay) == [1, 0]
    assert len(due_deliveries(store, webhook)) == 1


def test_a_key_used_twice_in_one_commit_publishes_once(store):
    key = webhookd.IdempotencyKey("user", "key", b"fingerprint")

    def publish_with_key():
        return store.publish([new_event()], 1000, key).result()

    answers = in_one_commit(store, publish_with_key, publish_with_key)

    event = webhookd.Event(1, "e", new_event().timestamp, 0)
    assert answers == [([event], False), ([event], True)]
    assert count(store, "events") == 1


def test_pruning_beside_a_redelivery_leaves_it(store):
    webhook = add_webhook(store)
    publish(store)
    [due] = due_deliveries(store, webhook)
    record(store, due)

    in_one_commit(
        store,
        lambda: store.write(webhookd.Batch.redeliver, webhook.id, [due.row_id], 1000),
        lambda: list(store.prune(5000)),
    )

    assert [d.row_id for d in due_deliveries(store, webhook)] == [due.row_id]


def test_receiver_of_own_events_may_be_deleted_in_the_same_commit(store):
    webhook, told = add_webhook(store), add_webhook(store, "webhook_disabled")
    publish(store)
    [due] = due_deliveries(store, webhook)

    in_one_commit(
        store,
        lambda: record(store, due, "FAILURE", status=410),
        lambda: store.write(webhookd.Batch.delete_webhook, told.id),
    )

    assert store.reader().rows("SELECT event_id FROM deliveries") == [(1,)]


@pytest.mark.parametrize("again", ["replay", "redeliver"])
def test_nothing_is_made_due_for_a_webhook_that_is_gone(store, again):
    webhook = add_webhook(store)
    [event] = publish(store)
    store.write(webhookd.Batch.delete_webhook, webhook.id)

    with pytest.raises(webhookd.NotFound):
        store.write(getattr(webhookd.Batch, again), webhook.id, [event.id], 1000)

    assert (store.pending[webhook.id], count(store, "deliveries")) == (0, 0)


def test_an_event_beside_the_deletion_of_its_webhook_leaves_no_delivery(store):
    webhook = add_webhook(store)

    in_one_commit(
        store,
        lambda: publish(store),
        lambda: store.write(webhookd.Batch.delete_webhook, webhook.id),
    )

    assert (store.pending[webhook.id], count(store, "deliveries")) == (0, 0)


def test_a_replay_and_the_deletion_of_its_event_leave_nothing(store):
    [event] = publish(store)
    webhook = add_webhook(store)

    in_one_commit(
        store,
        lambda: store.write(webhookd.Batch.replay, webhook.id, [event.id], 1000),
        lambda: store.write(webhookd.Batch.delete_event, event.id),
    )

    assert store.deliveries(webhook.id, webhookd.Filter(), webhookd.Page()) == ([], 0)
    assert store.pending[webhook.id] == 0


def test_due_deliveries_stay_due_when_the_clock_jumps_back(store, maintenance, clock):
    webhook = add_webhook(store)
    publish(store, now_ms=clock.ms)

    clock.advance(-600)
    maintenance.run_once()

    assert len(due_deliveries(store, webhook, clock.ms)) == 1


def test_clock_jump_disables_no_webhook(store, maintenance, clock):
    webhook = add_webhook(store)
    set_health(store, webhook, failures=1, failing_since=clock.ms, reason="500")

    clock.advance(6 * 86400)
    maintenance.run_once()

    assert store.health[webhook.id].failing_since == clock.ms


# ---- events by their payload ----


def publish_bodies(store, *bodies):
    events = [read_event(body, max_bytes=1 << 20) for body in bodies]
    return [event.id for event in store.publish(events, 1000).result()[0]]


def searched(store, *conditions, page=webhookd.Page(), before=None, **fields):
    wanted = webhookd.Filter(where=webhookd.conditions(list(conditions)), **fields)
    found = store.search(wanted, page, before)
    return [event.id for event in found.events], found.total, found.more


def test_events_are_found_by_their_payload_newest_first(store):
    events = [{"event": name, "n": n, "s": "x"} for n in (1, 2) for name in "abc"]
    publish_bodies(store, *map(json.dumps, events))

    assert searched(store, "n:1") == ([3, 2, 1], 3, None)
    assert searched(store, "n:1", "s:x", "event:b") == ([2], 1, None)
    assert searched(store, "n:1", events=("a", "c")) == ([3, 1], 2, None)
    assert searched(store, "s:x", page=webhookd.Page(1, 2)) == ([5, 4], 6, None)
    assert searched(store, "n:3") == ([], 0, None)


@pytest.mark.parametrize(
    "value", ['"4\\"2"', '"ä\\n"', '"\\u2028"', '"a/b"', '"\\ud800"', "1E5", "-0", '""']
)
@pytest.mark.parametrize(
    "path, field",
    [("k.l", '{"l":VALUE}'), ("k.0", '{"0":VALUE}'), ("k.0", "[VALUE]"), ("k", "VALUE")],
)
def test_however_a_value_is_written_it_is_found(store, value, path, field):
    event = '{"event":"e","k":FIELD}'.replace("FIELD", field)
    [id] = publish_bodies(store, event.replace("VALUE", value))
    text = json.loads(value) if value.startswith('"') else value

    assert searched(store, f"{path}:{text}")[0] == [id]


@pytest.mark.parametrize("path", ["k", "l.0", "m" * 200])
def test_a_long_value_is_found_to_its_last_character(store, path):
    value = "x" * 300
    event = {"event": "e", "k": value, "l": [value], "m" * 200: value}
    publish_bodies(store, json.dumps(event))

    assert searched(store, f"{path}:{value}")[0] == [1]
    assert searched(store, f"{path}:{value[:-1]}")[0] == []


def walk(store, *conditions, limit=1000):
    """The ids of all results of a search, and the number of its pages."""
    ids, pages, more = [], 0, {"start": 0}
    while more:
        page = webhookd.Page(more["start"], limit)
        part, total, more = searched(store, *conditions, page=page, before=more.get("before"))
        ids, pages = ids + part, pages + 1
        assert total is None
    return ids, pages


@pytest.mark.parametrize("limit, pages", [(1000, 6), (2, 7)])
def test_following_a_search_finds_all_events(store, monkeypatch, limit, pages):
    monkeypatch.setattr(webhookd, "SEARCHED_EVENTS", 4)
    monkeypatch.setattr(webhookd, "SEARCH_STEP", 2)
    publish_bodies(store, *(json.dumps({"event": "e", "n": id // 10}) for id in range(1, 21)))

    assert walk(store, "n:1", limit=limit) == (list(range(19, 9, -1)), pages)


def test_search_is_bounded_in_bytes(store, monkeypatch):
    monkeypatch.setattr(webhookd, "SEARCHED_BYTES", 4000)
    publish_bodies(store, *['{"event":"e","n":1,"x":"%s"}' % ("x" * 1000)] * 9)

    ids, pages = walk(store, "n:1")

    assert (ids, pages > 1) == ([9, 8, 7, 6, 5, 4, 3, 2, 1], True)


def test_the_start_of_a_search_may_lie_behind_what_it_looks_at(store, monkeypatch):
    monkeypatch.setattr(webhookd, "SEARCHED_EVENTS", 4)
    monkeypatch.setattr(webhookd, "SEARCH_STEP", 2)
    publish_bodies(store, *['{"event":"e","n":1}'] * 9)

    ids, _, more = searched(store, "n:1", page=webhookd.Page(6, 2))
    assert (ids, more) == ([], {"before": 6, "start": 2})
    page = webhookd.Page(more["start"], 2)
    assert searched(store, "n:1", page=page, before=6)[0] == [3, 2]


def test_stored_events_that_are_too_deep_stop_neither_search_nor_replay(store):
    webhook = add_webhook(store, filters={"n": 1})
    deep = b'{"timestamp":1,"event":"e","n":1,"x":%s}' % (b"[" * 900 + b"]" * 900)
    store.write(
        webhookd.Batch.change_webhook, webhook.id, lambda w: dataclasses.replace(w, active=False)
    )
    publish(store, new_event(body=deep), new_event(body=b'{"timestamp":1,"event":"e","n":1}'))

    assert searched(store, "n:1")[0] == [2]
    assert list(store.missed_events(webhook, webhookd.Filter())) == [[2]]


def test_answer_has_as_many_payloads_as_fit_and_at_least_one(store, monkeypatch):
    publish_bodies(store, *['{"event":"e","x":"%s"}' % ("x" * 1000)] * 3)

    def shown():
        return list(store.bodies([1, 2, 3]))

    assert shown() == [3, 2, 1]
    monkeypatch.setattr(webhookd, "SHOWN_PAYLOAD_BYTES", 2500)
    assert shown() == [3, 2]
    monkeypatch.setattr(webhookd, "SHOWN_PAYLOAD_BYTES", 10)
    assert shown() == [3]


# ======================================================================================
# Templates
# ======================================================================================


def render(template, event=RICH):
    return webhookd.render(webhookd.Webhook(template=template), event.encode()).decode()


@pytest.mark.parametrize(
    "template, rendered",
    [
        ({"text": "{{s}} is {{i}}"}, '{"text":"a:b\\"ä is 42"}'),
        ({"v": "{{s}}"}, '{"v":"a:b\\"ä"}'),
        ({"v": "{{i}}"}, '{"v":42}'),
        ({"v": "{{f}}"}, '{"v":1.10}'),
        ({"v": "at {{f}}"}, '{"v":"at 1.10"}'),
        ({"v": "{{t}}"}, '{"v":true}'),
        ({"v": "{{n}}"}, '{"v":null}'),
        ({"v": "{{none.at.all}}"}, '{"v":null}'),
        ({"v": "{{o.a}}"}, '{"v":{"b":[7,8]}}'),
        ({"v": "{{ l }}"}, '{"v":["x",{"y":"z"}]}'),
        ({"v": " {{t}}{{n}}{{none}}"}, '{"v":" true"}'),
        ({"v": "is {{o.a}}"}, '{"v":"is {\\"b\\":[7,8]}"}'),
        ({"v": "{{l.1.y}}{{ o.0\t}}{{l.9}}"}, '{"v":"zzero"}'),
        ({"{{s}}": ["{{i}}", {"a": "{{i}}"}], "n": 1.5}, '{"{{s}}":[42,{"a":42}],"n":1.5}'),
        ({"v": '"{{i}}" \\ {{{i}}}'}, '{"v":"\\"42\\" \\\\ {42}"}'),
        ({"v": "}} {a} {"}, '{"v":"}} {a} {"}'),
        (["{{i}}", None, False], "[42,null,false]"),
        (7, "7"),
        ("{{s}}!", 'a:b"ä!'),
        ("{{f}}", "1.10"),
        ("{{o.a}} {{n}}{{none}}{{t}}", '{"b":[7,8]} true'),
        ("", ""),
    ],
)
def test_a_template_is_sent_with_the_values_of_the_event(template, rendered):
    assert render(template) == rendered


def test_a_value_that_looks_like_a_placeholder_is_a_value():
    event = '{"a":"{{b}}","b":"{{a}}"}'

    assert render({"x": "{{a}}", "y": "is {{b}}"}, event) == '{"x":"{{b}}","y":"is {{a}}"}'
    assert render("{{a}}", event) == "{{b}}"


def test_half_a_surrogate_pair_of_an_event_stays_the_escape_that_it_was():
    assert render({"x": "{{a}}"}, r'{"a":"\ud800"}') == r'{"x":"\ud800"}'


def test_without_a_template_the_event_is_sent():
    assert render(None, '{"a": 1}') == '{"a": 1}'


@pytest.mark.parametrize("template", [["{{a}}"] * 2000, ["x{{a}}"] * 2000, "{{a}}" * 2000])
def test_a_template_cannot_make_a_huge_body(template):
    with pytest.raises(webhookd.Invalid, match="too large a body"):
        render(template, json.dumps({"a": "x" * 100_000}))


def test_a_large_event_may_be_put_into_a_text():
    event = json.dumps({"a": {"b": '"' * 600_000}})

    assert len(render({"text": "is {{a}}"}, event)) > 2_000_000


# ======================================================================================
# Dispatcher
# ======================================================================================


def test_a_delivery_is_attempted_and_recorded(api, receiver, dispatcher):
    webhook = api.create(receiver.url)
    api.publish(page={"id": 1})

    dispatcher.run_until_idle()

    [request] = receiver.received
    assert json.loads(request.body)["page"] == {"id": 1}
    [delivery] = api.deliveries(webhook)
    assert request.headers["X-Request-Id"] == delivery["id"]
    assert (delivery["state"], delivery["attemptCount"]) == ("succeeded", 1)


@pytest.fixture
def one_by_one(settings):
    """Allows one attempt at once, so that attempts arrive in the order of their start."""
    return dataclasses.replace(settings, webhook_concurrency=1)


def publish_numbers(api, *numbers):
    api.post_json(EVENTS, [{"event": "e", "n": n} for n in numbers])


def test_deliveries_to_one_webhook_start_in_publish_order(
    api, receiver, store, address_policy, one_by_one, clock
):
    client = webhookd.Client(address_policy, 5.0)
    dispatcher = webhookd.Dispatcher(store, client, one_by_one, clock)
    api.create(receiver.url)
    dispatcher.run_until_idle()
    publish_numbers(api, *range(250))

    dispatcher.run_until_idle()

    assert [body["n"] for body in receiver.bodies()] == list(range(250))


def test_a_delivery_is_retried_on_schedule_and_then_given_up(api, receiver, dispatcher, clock):
    receiver.answers(500)
    webhook = api.create(receiver.url)
    api.publish()

    def states_after(seconds):
        clock.advance(seconds)
        dispatcher.run_until_idle()
        [delivery] = api.deliveries(webhook)
        return delivery["state"], delivery["attemptCount"]

    assert states_after(0) == ("pending", 1)
    assert states_after(9.9) == ("pending", 1)
    assert states_after(0.2) == ("pending", 2)
    assert states_after(99) == ("pending", 2)
    assert states_after(2) == ("failed", 3)
    assert states_after(10**6) == ("failed", 3)
    assert [r.headers["X-Attempt"] for r in receiver.received] == ["1", "2", "3"]
    assert len({r.headers["X-Request-Id"] for r in receiver.received}) == 1


def test_every_attempt_is_signed_at_its_own_time(api, receiver, dispatcher, clock):
    receiver.answers(500, times=1)
    api.create(receiver.url, configuration={"secret": "s"})
    api.publish()
    dispatcher.run_until_idle()
    clock.advance(10.1)
    dispatcher.run_until_idle()

    for request in receiver.received:
        seconds = int(request.headers["webhook-timestamp"])
        assert request.headers["webhook-signature"] == webhookd.standard_signature(
            "s", request.headers["X-Request-Id"], seconds, request.body
        )
        assert request.headers["X-Hub-Signature"] == webhookd.hub_signature("s", request.body)
    first, second = (int(r.headers["webhook-timestamp"]) for r in receiver.received)
    assert second - first == 10


@pytest.mark.parametrize("status, seconds", [(429, 60), (503, 60), (500, 10)])
def test_retry_after_counts_on_429_and_503(api, receiver, dispatcher, clock, status, seconds):
    receiver.answers(status, {"Retry-After": "60"})
    webhook = api.create(receiver.url)
    api.publish()

    dispatcher.run_until_idle()

    wait = api.deliveries(webhook)[0]["nextAttempt"] - clock.ms
    assert seconds * 1000 <= wait < seconds * 1000 + 1000


def test_connections_are_kept_alive_and_few(api, receiver, dispatcher):
    api.create(receiver.url)
    api.post_json(EVENTS, [{"event": "e"}] * 200)

    dispatcher.run_until_idle()

    assert len(receiver.received) == 200
    assert len({request.connection for request in receiver.received}) <= 8


def test_no_more_connections_are_kept_than_are_allowed(
    api, receiver, store, address_policy, one_by_one, clock, monkeypatch
):
    monkeypatch.setattr(webhookd, "MAX_IDLE_CONNECTIONS", 0)
    client = webhookd.Client(address_policy, 5.0)
    api.create(receiver.url)
    publish_numbers(api, *range(3))

    webhookd.Dispatcher(store, client, one_by_one, clock).run_until_idle()

    assert len({request.connection for request in receiver.received}) == 3


def test_a_connection_that_is_used_again_or_closed_is_counted_once(
    api, receiver, dispatcher, monkeypatch
):
    monkeypatch.setattr(webhookd, "MAX_IDLE_CONNECTIONS", 1)
    api.create(receiver.url, ordered=True)

    for _ in range(2):  # at the end of each the dispatcher closes its connections
        publish_numbers(api, *range(5))
        dispatcher.run_until_idle()

    assert len(receiver.received) == 10
    assert len({request.connection for request in receiver.received}) == 2


def answer_and_close_silently(server, times):
    """Answer as if the connection stayed open, and close it."""
    for _ in range(times):
        connection, _ = server.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


def test_a_connection_that_the_receiver_closed_is_replaced(api, dispatcher):
    with socket.create_server(("127.0.0.1", 0)) as server:
        answering = threading.Thread(target=answer_and_close_silently, args=(server, 3))
        answering.start()
        webhook = api.create(f"http://127.0.0.1:{server.getsockname()[1]}/")
        api.post_json(EVENTS, [{"event": "e"}] * 3)

        dispatcher.run_until_idle()

        answering.join()
    assert {(d["state"], d["attemptCount"]) for d in api.deliveries(webhook)} == {("succeeded", 1)}


OK_AND_NO_BODY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


def test_a_connection_that_speaks_unasked_is_closed(api, dispatcher):
    with socket.create_server(("127.0.0.1", 0)) as server, dispatcher:
        webhook = api.create(f"http://127.0.0.1:{server.getsockname()[1]}/")
        api.publish()
        connection, _ = server.accept()
        with connection:
            connection.settimeout(10)
            connection.recv(65536)
            connection.sendall(OK_AND_NO_BODY)
            wait_until(lambda: api.deliveries(webhook)[0]["state"] == "succeeded")

            connection.sendall(OK_AND_NO_BODY)

            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""


def test_receiver_with_costly_handshakes_waits_longer(
    api, dispatcher, tls_receiver, clock, monkeypatch
):
    monkeypatch.setattr(webhookd, "FAIR_HANDSHAKE_SECONDS", 0)
    monkeypatch.setattr(webhookd, "HANDSHAKE_REST", 1_000_000)
    api.create(tls_receiver.url, sslVerificationRequired=False)
    publish_numbers(api, 0, 1)

    dispatcher.run_until_idle()
    assert len(tls_receiver.received) == 1

    clock.advance(10**6)
    dispatcher.run_until_idle()
    assert len(tls_receiver.received) == 2


def test_verified_and_unverified_connections_are_not_shared(api, dispatcher, tls_receiver):
    careless = api.create(tls_receiver.url, "first", sslVerificationRequired=False)
    careful = api.create(tls_receiver.url, "second")
    with dispatcher:
        api.publish("first")
        wait_until(lambda: api.deliveries(careless)[0]["outcome"])
        api.publish("second")
        wait_until(lambda: api.deliveries(careful)[0]["outcome"])

    assert api.deliveries(careless)[0]["outcome"] == "SUCCESS"
    assert api.deliveries(careful)[0]["outcome"] == "ERROR"


def test_inactive_webhook_gets_nothing_new_and_its_deliveries_wait(api, receiver, dispatcher):
    webhook = api.create(receiver.url)
    api.publish(n=1)
    path = f"{WEBHOOKS}/{webhook['id']}"
    api.put_json(path, {"active": False})
    api.publish(n=2)
    dispatcher.run_until_idle()
    assert receiver.received == []

    api.put_json(path, {"active": True})
    dispatcher.run_until_idle()

    assert [body["n"] for body in receiver.bodies()] == [1]


def test_attempt_uses_the_webhook_as_it_is_at_its_start(api, receiver, dispatcher, clock):
    receiver.answers(500, times=1)
    webhook = api.create(receiver.url)
    api.publish()
    dispatcher.run_until_idle()
    api.put_json(f"{WEBHOOKS}/{webhook['id']}", {"url": receiver.url + "/new"})
    clock.advance(11)

    dispatcher.run_until_idle()

    assert [request.path for request in receiver.received] == ["/hook", "/hook/new"]


def test_a_deleted_webhook_is_not_attempted(api, receiver, dispatcher):
    webhook = api.create(receiver.url)
    api.publish()
    api.delete(f"{WEBHOOKS}/{webhook['id']}")

    dispatcher.run_until_idle()

    assert receiver.received == []


def test_pending_deliveries_are_attempted_after_a_start(
    api, store, address_policy, settings, clock, receiver, monkeypatch
):
    monkeypatch.setattr(webhookd, "WINDOW", 100)
    api.create(receiver.url)
    api.post_json(EVENTS, [{"event": "e"}] * (webhookd.WINDOW * 2 + 5))
    client = webhookd.Client(address_policy, 5.0)

    webhookd.Dispatcher(store, client, settings, clock).run_until_idle()

    ids = [request.headers["X-Request-Id"] for request in receiver.received]
    assert len(ids) == len(set(ids)) == webhookd.WINDOW * 2 + 5


def test_memory_holds_a_window_of_what_is_due(api, dispatcher, receiver, monkeypatch):
    monkeypatch.setattr(webhookd, "WINDOW", 100)
    webhook = api.create(receiver.url)
    api.post_json(EVENTS, [{"event": "e"}] * (webhookd.WINDOW * 3))
    queue = dispatcher._queue_of(webhook["id"])
    dispatcher._refill(queue, dispatcher._store.webhooks.by_id[webhook["id"]])

    assert (len(queue.ready), queue.backlog) == (webhookd.WINDOW, True)


def test_a_webhook_that_fails_is_tried_one_at_a_time(api, receiver, dispatcher):
    """A failure brings the width to one; each success after it adds one."""
    webhook = api.create(receiver.url)
    queue = dispatcher._queue_of(webhook["id"])
    api.post_json(EVENTS, [{"event": "e"}] * 20)
    dispatcher.run_until_idle()
    assert queue.width == 8

    receiver.answers(500, times=1)
    api.publish()
    dispatcher.run_until_idle()

    assert queue.width == 1


def test_no_more_attempts_are_in_flight_than_are_allowed():
    scheduler = webhookd.Scheduler(2)
    queues = [webhookd.WebhookQueue(id, proven=True) for id in range(3)]
    for queue in queues:
        scheduler.wait(queue)

    first, begun = scheduler.next(), scheduler.begin(queues[0], 100)
    second, _ = scheduler.next(), scheduler.begin(queues[1], 100)
    assert [first, second, scheduler.next()] == [*queues[:2], None]
    scheduler.end(queues[0], *begun)
    assert scheduler.next() is queues[2]


def test_large_bodies_take_more_slots_in_flight_so_that_memory_is_bounded():
    scheduler = webhookd.Scheduler(256)
    queue = webhookd.WebhookQueue(1, proven=True)

    while scheduler.wait(queue) or scheduler.next():
        scheduler.begin(queue, 1 << 20)

    assert scheduler.in_flight == 29


def test_one_turn_of_a_webhook_takes_no_slots_that_are_not_there(
    api, store, receiver, address_policy, settings, clock
):
    few = dataclasses.replace(settings, max_in_flight=8, webhook_concurrency=4)
    dispatcher = webhookd.Dispatcher(store, webhookd.Client(address_policy, 5.0), few, clock)
    large, small = {"event": "large"}, {"event": "small"}
    api.create(receiver.url, "large")
    api.create(receiver.url, "small")
    api.post_json(EVENTS, [large, *[small] * 4])
    dispatcher.run_until_idle()  # they are known to work, so that there may be several at once
    in_flight = []

    api.post_json(EVENTS, [large | {"x": "x" * 6 * webhookd.SLOT_BYTES}, *[small] * 4])
    during_attempt(receiver, dispatcher, lambda: in_flight.append(dispatcher.in_flight()))

    assert in_flight == [2]  # the large one has seven slots of the eight


def test_large_bodies_to_some_webhooks_leave_slots_to_the_others(
    api, store, receiver, address_policy, settings, clock
):
    few = dataclasses.replace(settings, max_in_flight=16, webhook_concurrency=8)
    dispatcher = webhookd.Dispatcher(store, webhookd.Client(address_policy, 20.0), few, clock)
    for number in range(4):
        api.create(f"{receiver.url}/{number}")
    api.post_json(EVENTS, [{"event": "e"}] * 8)
    dispatcher.run_until_idle()
    receiver.received.clear()

    api.post_json(EVENTS, [{"event": "e", "x": "x" * 2 * webhookd.SLOT_BYTES}] * 3)
    reached = set()

    def wait_for_all():
        with contextlib.suppress(AssertionError):
            wait_until(lambda: len({request.path for request in receiver.received}) == 4, 5)
        reached.update(request.path for request in receiver.received)

    during_attempt(receiver, dispatcher, wait_for_all)
    assert len(reached) == 4


def test_receivers_that_hang_leave_room_for_those_that_work(
    api, store, receiver, address_policy, settings, clock
):
    small = dataclasses.replace(settings, max_in_flight=4, delivery_timeout=60.0)
    client = webhookd.Client(address_policy, 60.0)
    hanging = socket.create_server(("127.0.0.1", 0), backlog=100)
    api.create(receiver.url)

    with contextlib.closing(hanging), pytest.MonkeyPatch.context() as patch:
        patch.setattr(webhookd, "STOP_SECONDS", 0)
        with webhookd.Dispatcher(store, client, small, clock):
            api.publish()
            wait_until(lambda: len(receiver.received) == 1)
            for _ in range(9):
                api.create(f"http://127.0.0.1:{hanging.getsockname()[1]}/")
            for _ in range(3):
                api.post_json(EVENTS, [{"event": "e"}] * 10)
            wait_until(lambda: len(receiver.received) == 31)


def test_first_attempts_come_before_retries(api, receiver, store, address_policy, settings, clock):
    receiver.answers(500, times=1)
    api.create(receiver.url + "/late", "late")
    api.publish("late")
    one_at_a_time = dataclasses.replace(settings, max_in_flight=1)
    client = webhookd.Client(address_policy, 5.0)
    dispatcher = webhookd.Dispatcher(store, client, one_at_a_time, clock)
    dispatcher.run_until_idle()
    for number in range(3):
        api.create(f"{receiver.url}/{number}", "new")
    clock.advance(11)
    for queue in list(dispatcher._queues.values()):
        dispatcher._refill(queue, store.webhooks.by_id[queue.webhook_id])
    api.publish("new")

    dispatcher.run_until_idle()

    assert [r.path for r in receiver.received][-1] == "/hook/late"


def test_a_crash_in_flight_repeats_the_attempt_and_loses_nothing(
    api, receiver, store, address_policy, settings, clock
):
    """What is in flight is known to memory only, so a new dispatcher begins again."""
    webhook = api.create(receiver.url)
    api.publish()
    receiver.hold.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(webhookd, "STOP_SECONDS", 0)
        with webhookd.Dispatcher(store, webhookd.Client(address_policy, 5.0), settings, clock):
            wait_until(lambda: receiver.received)
    receiver.hold.set()
    assert api.deliveries(webhook)[0]["state"] == "pending"

    webhookd.Dispatcher(
        store, webhookd.Client(address_policy, 5.0), settings, clock
    ).run_until_idle()

    assert [r.headers["X-Attempt"] for r in receiver.received] == ["1", "1"]
    assert api.deliveries(webhook)[0]["state"] == "succeeded"


def test_attempts_in_flight_may_end_before_the_loop_does(
    api, receiver, store, address_policy, settings, clock
):
    webhook = api.create(receiver.url)
    api.publish()
    receiver.hold.clear()
    with webhookd.Dispatcher(store, webhookd.Client(address_policy, 5.0), settings, clock):
        wait_until(lambda: receiver.received)
        threading.Timer(0.2, receiver.hold.set).start()
    store.flush()

    assert api.deliveries(webhook)[0]["state"] == "succeeded"


# ---- the circuit breaker ----


@pytest.fixture
def wall(api, receiver, dispatcher, clock):
    """Runs the dispatcher after some time; the numbers that arrived since."""

    def after(seconds):
        clock.advance(seconds)
        seen = len(receiver.received)
        dispatcher.run_until_idle()
        return [body["n"] for body in receiver.bodies()[seen:]]

    return after


def test_five_failures_in_a_row_pause_a_webhook(api, receiver, wall, clock):
    receiver.answers(500)
    webhook = api.create(receiver.url)
    publish_numbers(api, *range(9))

    assert wall(0) == [0, 1, 2, 3, 4]
    health = api.get_webhook(webhook)["health"]
    until = health.pop("pausedUntil")
    assert health == {
        "state": "paused",
        "consecutiveFailures": 5,
        "reason": "500",
        "since": clock.ms,
        "pending": 9,
        "lastAttempt": clock.ms,
    }
    assert 10_000 <= until - clock.ms < 11_000
    assert wall(9) == []
    assert wall(2) == [5]
    assert wall(11) == []
    assert wall(2) == [6]


def test_a_probe_that_succeeds_makes_everything_due_at_once_oldest_first(
    api, receiver, store, address_policy, one_by_one, clock
):
    receiver.answers(500, times=7)
    client = webhookd.Client(address_policy, 5.0)
    dispatcher = webhookd.Dispatcher(store, client, one_by_one, clock, lambda: 1.0)
    webhook = api.create(receiver.url)
    publish_numbers(api, *range(200))
    for seconds in (0, 11, 13):
        clock.advance(seconds)
        dispatcher.run_until_idle()
    assert [body["n"] for body in receiver.bodies()] == list(range(7))
    clock.advance(16)

    dispatcher.run_until_idle()

    probe, *rest = [body["n"] for body in receiver.bodies()[7:]]
    assert probe == 7
    assert rest == [*range(7), *range(8, 200)]
    assert api.get_webhook(webhook)["health"]["state"] == "healthy"


def test_the_probe_goes_whatever_its_schedule_says(api, receiver, wall):
    receiver.answers(500, times=9)
    api.create(receiver.url)
    publish_numbers(api, *range(5))
    assert wall(0) == [0, 1, 2, 3, 4]
    # the second attempts are due after 10 s; the third ones would be 100 s later
    probes = [wall(seconds) for seconds in (11, 14, 16, 19)]
    assert [len(probe) for probe in probes] == [1, 1, 1, 1]
    assert len(wall(22)) == 5


def test_a_pause_outlives_a_restart(api, receiver, wall, store, address_policy, settings, clock):
    receiver.answers(500)
    webhook = api.create(receiver.url)
    publish_numbers(api, *range(9))
    wall(0)

    restarted = webhookd.Dispatcher(
        store, webhookd.Client(address_policy, 5.0), settings, clock, lambda: 1.0
    )
    restarted.run_until_idle()
    assert len(receiver.received) == 5
    clock.advance(11)
    restarted.run_until_idle()

    assert len(receiver.received) == 6
    assert webhookd.load_health(store.reader())[webhook["id"]].failures == 6


def test_pause_drops_no_delivery(api, receiver, wall):
    receiver.answers(500, times=30)
    api.create(receiver.url)
    publish_numbers(api, *range(20))

    for _ in range(40):
        wall(1000)

    assert {body["n"] for body in receiver.bodies()[30:]} == set(range(20))


def test_activating_a_paused_webhook_starts_clean(api, receiver, wall):
    receiver.answers(500, times=5)
    webhook = api.create(receiver.url)
    publish_numbers(api, *range(8))
    wall(0)

    answer = api.put_json(f"{WEBHOOKS}/1", {"active": True})

    assert answer.json["health"]["consecutiveFailures"] == 0
    # those that failed before need not wait for their retry
    assert sorted(wall(0)) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert api.get_webhook(webhook)["health"]["state"] == "healthy"


def test_change_of_other_fields_leaves_the_failures(api, receiver, wall):
    receiver.answers(500)
    webhook = api.create(receiver.url)
    publish_numbers(api, 1)
    wall(0)

    for fields in ({"url": receiver.url, "name": "new"}, {"active": False}):
        api.put_json(f"{WEBHOOKS}/1", fields)

    assert api.get_webhook(webhook)["health"]["consecutiveFailures"] == 1


def test_a_change_during_an_attempt_does_not_hide_that_it_is_gone(
    api, receiver, store, address_policy, settings, clock
):
    receiver.answers(410)
    receiver.hold.clear()
    webhook = api.create(receiver.url)
    api.publish()
    client = webhookd.Client(address_policy, 5.0)
    with webhookd.Dispatcher(store, client, settings, clock):
        wait_until(lambda: receiver.received)
        clock.advance(1)
        api.put_json(f"{WEBHOOKS}/1", {"name": "new"})
        receiver.hold.set()
    store.flush()

    assert api.get_webhook(webhook)["health"]["state"] == "disabled"


def test_an_ordered_webhook_activated_beside_a_publication_keeps_its_order(
    api, store, dispatcher, receiver, wall
):
    """The dispatcher hears of the publication before it hears of the change."""
    api.create(receiver.url, ordered=True)
    publish_numbers(api, 0, 1)
    api.put_json(f"{WEBHOOKS}/1", {"active": False})
    assert wall(0) == []

    store.write(webhookd.Batch.change_webhook, 1, lambda old: dataclasses.replace(old, active=True))
    publish_numbers(api, 2)

    assert wall(0) == [0, 1, 2]


def test_a_retry_in_flight_while_its_webhook_recovers_is_made_again(
    api, store, dispatcher, receiver, wall, clock
):
    """The recovery has released it, so that it is due whatever the attempt brings."""
    api.create(receiver.url)
    [webhook] = store.webhooks.by_id.values()
    publish_numbers(api, 0, 1)
    retry, probe = due_deliveries(store, webhook, clock.ms)
    record(store, retry, "FAILURE", clock.ms)
    clock.advance(11)
    [retry] = [d for d in due_deliveries(store, webhook, clock.ms) if d.row_id == retry.row_id]
    set_health(store, webhook, failures=5, paused_until=clock.ms)

    store.record(an_attempt(probe, now_ms=clock.ms))
    store.record(an_attempt(retry, "FAILURE", now_ms=clock.ms))
    store.flush()

    assert wall(0) == [0]


# ---- a pause by hand, and a rest that the receiver asks for ----


def test_a_pause_by_hand_loses_nothing_and_ends_oldest_first(api, receiver, wall, clock):
    webhook = api.create(receiver.url, paused=True)
    publish_numbers(api, 0, 1)
    assert wall(10_000) == []
    health = api.get_webhook(webhook)["health"]
    assert (health["state"], health["pausedUntil"], health["pending"]) == ("paused", None, 2)
    assert health["reason"] == "paused by admin"

    api.put_json(f"{WEBHOOKS}/1", {"paused": False})

    assert wall(0) == [0, 1]
    assert api.get_webhook(webhook)["health"]["state"] == "healthy"


def test_the_end_of_a_pause_by_hand_makes_retries_due_too(api, receiver, wall):
    receiver.answers(500, times=1)
    api.create(receiver.url)
    publish_numbers(api, 0)
    assert wall(0) == [0]

    api.put_json(f"{WEBHOOKS}/1", {"paused": True})
    assert wall(1000) == []
    receiver.answers(500, times=1)
    api.put_json(f"{WEBHOOKS}/1", {"paused": False})

    assert wall(0) == [0]
    assert wall(9) == []
    assert wall(1) == [0]


def test_a_redelivery_waits_for_the_end_of_a_pause_by_hand(api, receiver, wall):
    webhook = api.create(receiver.url)
    publish_numbers(api, 0)
    assert wall(0) == [0]
    api.put_json(f"{WEBHOOKS}/1", {"paused": True})

    [delivery] = api.deliveries(webhook)
    api.post(f"/rest/api/deliveries/{delivery['id']}/redeliver")

    assert wall(100) == []
    api.put_json(f"{WEBHOOKS}/1", {"paused": False})
    assert wall(0) == [0]


def test_resuming_ends_a_pause_of_the_breaker_too(api, receiver, wall):
    receiver.answers(500, times=5)
    api.create(receiver.url)
    publish_numbers(api, *range(6))
    wall(0)

    api.put_json(f"{WEBHOOKS}/1", {"paused": False})

    assert sorted(wall(0)) == [0, 1, 2, 3, 4, 5]


def test_retry_after_holds_for_every_delivery_of_the_webhook(api, receiver, wall):
    receiver.answers(429, {"Retry-After": "3600"}, times=1)
    webhook = api.create(receiver.url)
    publish_numbers(api, 0, 1)
    assert wall(0) == [0]
    publish_numbers(api, 2)

    assert wall(3599) == []
    health = api.get_webhook(webhook)["health"]
    assert (health["state"], health["consecutiveFailures"]) == ("healthy", 0)
    assert sorted(wall(1)) == [0, 1, 2]


def test_retry_after_holds_the_probe_up_and_outlives_a_restart(
    api, receiver, wall, store, address_policy, settings, clock
):
    receiver.answers(500, times=5)
    api.create(receiver.url)
    publish_numbers(api, *range(6))
    wall(0)
    receiver.answers(503, {"Retry-After": "600"}, times=1)
    assert len(wall(11)) == 1

    client = webhookd.Client(address_policy, 5.0)
    again = webhookd.Dispatcher(store, client, settings, clock)
    seen = len(receiver.received)
    clock.advance(599)
    again.run_until_idle()
    assert len(receiver.received) == seen
    clock.advance(2)
    again.run_until_idle()

    assert len(receiver.received) == seen + 6


@pytest.mark.parametrize(
    "fields", [{"paused": False}, {"active": True}, {"url": "elsewhere"}, "redeliver"]
)
def test_redelivery_by_a_person_overrides_retry_after(api, receiver, wall, fields):
    receiver.answers(429, {"Retry-After": "3600"}, times=1)
    webhook = api.create(receiver.url)
    publish_numbers(api, 0)
    assert wall(0) == [0]

    if fields == "redeliver":
        [delivery] = api.deliveries(webhook)
        api.post(f"/rest/api/deliveries/{delivery['id']}/redeliver")
    else:
        elsewhere = {"url": receiver.url + "/2"} if "url" in fields else fields
        api.put_json(f"{WEBHOOKS}/1", elsewhere)

    assert wall(0) == [0]


def next_attempts(api, webhook):
    """What every answer says of the next attempt of a webhook's latest delivery."""
    [delivery, *_] = api.deliveries(webhook)
    event = api.get(f"{EVENTS}/{delivery['eventId']}").json
    shown = api.get(f"/rest/api/deliveries/{delivery['id']}").json
    return {delivery["nextAttempt"], event["deliveries"][0]["nextAttempt"], shown["nextAttempt"]}


def test_next_attempt_of_a_paused_webhook_is_the_end_of_the_pause(api, receiver, wall):
    receiver.answers(500, times=5)
    webhook = api.create(receiver.url)
    publish_numbers(api, *range(6))
    wall(0)
    publish_numbers(api, 6)

    assert next_attempts(api, webhook) == {api.get_webhook(webhook)["health"]["pausedUntil"]}


def test_next_attempt_of_a_resting_webhook_is_the_end_of_the_rest(api, receiver, wall, clock):
    receiver.answers(429, {"Retry-After": "3600"}, times=1)
    webhook = api.create(receiver.url)
    publish_numbers(api, 0)
    wall(0)
    publish_numbers(api, 1)

    [moment] = next_attempts(api, webhook)
    assert 3600 <= (moment - clock.ms) / 1000 < 3601


def test_a_plan_that_lies_behind_the_pause_stays(api, receiver, wall):
    receiver.answers(500)
    webhook = api.create(receiver.url)
    publish_numbers(api, *range(5))
    wall(0)
    wall(11)
    probed = max(api.deliveries(webhook), key=lambda delivery: delivery["attemptCount"])

    until = api.get_webhook(webhook)["health"]["pausedUntil"]
    assert (probed["attemptCount"], probed["nextAttempt"] > until + 50_000) == (2, True)


@pytest.mark.parametrize("fields", [{"paused": True}, {"active": False}])
def test_webhook_paused_by_hand_has_no_next_attempt(api, receiver, clock, fields):
    webhook = api.create(receiver.url)
    publish_numbers(api, 0)
    assert next_attempts(api, webhook) == {clock.ms}

    api.put_json(f"{WEBHOOKS}/1", fields)
    [delivery] = api.deliveries(webhook)
    redelivered = api.post(f"/rest/api/deliveries/{delivery['id']}/redeliver").json

    assert next_attempts(api, webhook) == {None}
    assert (redelivered["state"], redelivered["nextAttempt"]) == ("pending", None)


def test_a_disabled_webhook_has_no_next_attempt(api, receiver, wall):
    webhook = api.create(receiver.url, ordered=True)
    publish_numbers(api, 0, 1)
    receiver.answers(410)
    wall(0)

    assert [d["state"] for d in api.deliveries(webhook)] == ["pending", "failed"]
    assert next_attempts(api, webhook) == {None}


# ---- templates ----


def test_a_template_is_rendered_signed_and_kept_with_each_attempt(api, receiver, dispatcher, clock):
    receiver.answers(500, times=1)
    webhook = api.create(receiver.url, template={"text": "{{n}}"}, configuration={"secret": "s"})
    api.publish(n=1)
    dispatcher.run_until_idle()
    api.put_json(f"{WEBHOOKS}/1", {"template": "now {{n}}"})
    clock.advance(11)

    dispatcher.run_until_idle()

    assert [r.body for r in receiver.received] == [b'{"text":1}', b"now 1"]
    for request in receiver.received:
        signature = webhookd.hub_signature("s", request.body)
        assert request.headers["X-Hub-Signature"] == signature
    assert receiver.received[1].headers["Content-Type"] == "text/plain; charset=utf-8"
    [delivery] = api.deliveries(webhook)
    attempts = api.get(f"/rest/api/deliveries/{delivery['id']}").json["attempts"]
    assert [a["request"]["body"] for a in attempts] == ['{"text":1}', "now 1"]
    assert api.get(f"{WEBHOOKS}/1/latest").json["request"]["body"] == "now 1"


def test_without_a_template_an_attempt_shares_the_body_of_its_event(
    api, receiver, dispatcher, store
):
    api.create(receiver.url)
    api.publish()

    dispatcher.run_until_idle()

    assert store.reader().rows("SELECT request_body FROM attempts") == [(None,)]


def test_an_event_that_a_template_makes_too_large_is_an_error_that_says_so(
    api, receiver, dispatcher
):
    webhook = api.create(receiver.url, template=["{{a}}"] * 1000)
    api.publish(a="x" * 100_000)

    dispatcher.run_until_idle()

    [delivery] = api.deliveries(webhook)
    assert (delivery["outcome"], receiver.received) == ("ERROR", [])
    assert "the template makes too large a body" in delivery["description"]


# ---- own events ----


def own_events(receiver):
    """What the webhook for our own events was sent: names and the webhook's id."""
    bodies = [json.loads(r.body) for r in receiver.received if r.path.endswith("/told")]
    return [(body["event"], body["webhook"]["id"]) for body in bodies]


def test_pause_and_recovery_are_own_events(api, receiver, dispatcher, clock):
    receiver.answers(500, times=5)
    api.create(receiver.url, "e")
    publish_numbers(api, *range(5))
    dispatcher.run_until_idle()
    api.create(receiver.url + "/told", "webhook_*")
    receiver.answers(500, times=1)
    for seconds in (11, 13):
        clock.advance(seconds)
        dispatcher.run_until_idle()

    assert own_events(receiver) == [("webhook_recovered", 1)]


def test_pause_is_announced_once(api, receiver, dispatcher, clock):
    api.create(receiver.url + "/told", "webhook_*", "delivery_failed")
    dead = api.create("http://127.0.0.1:1/", "e")
    publish_numbers(api, *range(5))
    for _ in range(3):
        dispatcher.run_until_idle()
        clock.advance(13)

    assert own_events(receiver) == [("webhook_paused", dead["id"])]


def test_delivery_given_up_is_an_own_event_that_names_its_event(api, receiver, dispatcher, clock):
    api.create(receiver.url + "/told", "delivery_failed")
    dead = api.create("http://127.0.0.1:1/secret?key=1", "e", name="dead")
    event = api.publish("e")
    for seconds in (0, 11, 111, 0):
        clock.advance(seconds)
        dispatcher.run_until_idle()

    [request] = receiver.received
    [delivery] = api.deliveries(dead)
    body = json.loads(request.body)
    assert body["webhook"] == {"id": dead["id"], "name": "dead", "url": "http://127.0.0.1:1/…"}
    assert body["reason"] == "given up after 3 attempts: connection refused"
    assert body["delivery"] == {
        "id": delivery["id"],
        "event": "e",
        "eventId": event["id"],
        "description": "connection refused",
    }


def test_delivery_given_up_at_once_names_one_attempt(api, receiver, dispatcher):
    api.create(receiver.url + "/told", "delivery_failed")
    receiver.answers(410, times=1)
    api.create(receiver.url, "e")
    api.publish("e")

    dispatcher.run_until_idle()

    assert receiver.bodies()[-1]["reason"] == "given up after 1 attempt: 410"


def test_own_events_cause_no_own_events_and_never_go_to_their_subject(
    api, receiver, dispatcher, clock
):
    api.create("http://127.0.0.1:1/", "*")
    api.create("http://127.0.0.1:3/", "*")
    api.publish("e")
    for _ in range(20):
        dispatcher.run_until_idle()
        clock.advance(1000)

    events = api.get(EVENTS).json["results"]
    assert sorted(event["event"] for event in events) == ["delivery_failed"] * 2 + ["e"]
    assert all(event["deliveries"] == 1 for event in events if event["event"] != "e")


def test_changes_by_a_person_are_no_own_events_but_a_recovery_is(api, receiver, dispatcher, clock):
    receiver.answers(410, times=1)
    webhook = api.create(receiver.url, "e")
    api.publish("e")
    dispatcher.run_until_idle()
    api.create(receiver.url + "/told", "webhook_*")
    for fields in ({"active": True}, {"paused": True}, {"paused": False}):
        api.put_json(f"{WEBHOOKS}/{webhook['id']}", fields)
    dispatcher.run_until_idle()
    assert own_events(receiver) == []

    api.publish("e")
    dispatcher.run_until_idle()
    dispatcher.run_until_idle()

    assert own_events(receiver) == [("webhook_recovered", webhook["id"])]


# ---- the log ----


def test_a_flapping_receiver_is_logged_once_a_minute_with_how_often(
    api, receiver, dispatcher, clock, caplog
):
    caplog.set_level("INFO")
    api.create(receiver.url, name="flapping")
    for _ in range(5):
        receiver.answers(500, times=1)
        api.publish()
        dispatcher.run_until_idle()
        clock.advance(10.5)
        dispatcher.run_until_idle()
    clock.advance(60)
    dispatcher.run_until_idle()

    lines = [m for m in caplog.messages if "name=flapping" in m]
    assert len(lines) == 2
    assert lines[0].startswith("webhook fails webhook=1 name=flapping url=http://127.0.0.1:")
    assert lines[1].startswith("webhook works again")
    assert 'meanwhile="' in lines[1] and "4 times webhook fails" in lines[1]


def test_a_failure_that_a_success_has_overtaken_is_not_the_last_word(
    api, receiver, dispatcher, clock, caplog
):
    """The failures were forgotten by hand before the success came."""
    caplog.set_level("INFO")
    receiver.answers(500, times=2)
    api.create(receiver.url, name="mended")
    api.publish()
    for _ in range(3):
        dispatcher.run_until_idle()
        api.put_json(f"{WEBHOOKS}/1", {"paused": False})
    clock.advance(61)
    dispatcher.run_until_idle()

    lines = [m.partition(" webhook=")[0] for m in caplog.messages if "name=mended" in m]
    assert lines == ["webhook fails", "webhook works again"]


def test_a_repair_that_is_hurried_by_hand_is_logged_as_one(
    api, receiver, dispatcher, clock, caplog
):
    caplog.set_level("INFO")
    receiver.answers(500, times=5)
    api.create(receiver.url, name="mended")
    publish_numbers(api, *range(5))
    dispatcher.run_until_idle()
    api.put_json(f"{WEBHOOKS}/1", {"paused": False})
    dispatcher.run_until_idle()
    clock.advance(61)
    dispatcher.run_until_idle()

    lines = [m for m in caplog.messages if "name=mended" in m]
    assert [line.partition(" webhook=")[0] for line in lines] == [
        "webhook fails",
        "webhook works again",
    ]
    assert 'meanwhile="webhook paused"' in lines[1] and "failures=" not in lines[1]
    levels = [r.levelname for r in caplog.records if "name=mended" in r.getMessage()]
    assert levels == ["INFO", "WARNING"]  # that it was paused shows among the warnings
    [resumed] = [m for m in caplog.messages if m.startswith("webhook resumed")]
    assert "fields" not in resumed


def test_a_disabled_webhook_is_not_logged_as_resumed(api, receiver, dispatcher, caplog):
    caplog.set_level("INFO")
    receiver.answers(410)
    webhook = api.create(receiver.url)
    api.publish()
    dispatcher.run_until_idle()

    api.put_json(f"{WEBHOOKS}/{webhook['id']}", {"paused": False})

    assert caplog.messages[-1].startswith(f"webhook changed id={webhook['id']} ")


def test_the_log_at_a_stop_holds_nothing_back(
    api, receiver, store, address_policy, settings, clock, caplog
):
    caplog.set_level("INFO")
    receiver.answers(500, times=1)
    webhook = api.create(receiver.url)
    client = webhookd.Client(address_policy, 5.0)
    with webhookd.Dispatcher(store, client, settings, clock):
        api.publish()
        wait_until(lambda: api.get_webhook(webhook)["health"]["consecutiveFailures"] == 1)
        api.publish()
        wait_until(lambda: api.get_webhook(webhook)["health"]["consecutiveFailures"] == 0)

    lines = [m for m in caplog.messages if f"webhook={webhook['id']}" in m]
    assert [line.partition(" webhook=")[0] for line in lines] == [
        "webhook fails",
        "webhook works again",
    ]


# ---- the scheduler ----


def test_queues_that_come_last_get_a_turn_now_and_then():
    scheduler = webhookd.Scheduler(8)
    queues = [webhookd.WebhookQueue(number, proven=number > 0) for number in range(10)]
    for queue in queues:
        scheduler.wait(queue)

    served = []
    for _ in range(100):
        served.append(scheduler.next())
        scheduler.wait(served[-1])

    assert queues[0] in served


def test_a_new_url_starts_clean(api, receiver, wall):
    receiver.answers(500, times=5)
    webhook = api.create(receiver.url)
    publish_numbers(api, *range(5))
    assert len(wall(0)) == 5

    api.put_json(f"{WEBHOOKS}/1", {"url": receiver.url + "/new"})

    assert api.get_webhook(webhook)["health"]["state"] == "healthy"
    assert sorted(wall(0)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("fields", [{"paused": False}, {"active": False}, {"url": "elsewhere"}])
def test_only_activating_a_disabled_webhook_enables_it(api, receiver, wall, fields):
    receiver.answers(410, times=1)
    webhook = api.create(receiver.url)
    publish_numbers(api, 0)
    wall(0)

    elsewhere = {"url": receiver.url + "/2"} if "url" in fields else fields
    shown = api.put_json(f"{WEBHOOKS}/{webhook['id']}", elsewhere).json
    enabled = api.put_json(f"{WEBHOOKS}/{webhook['id']}", {"active": True}).json

    assert (shown["active"], shown["health"]["state"]) == (False, "disabled")
    assert shown["health"]["reason"] == "the receiver answered 410 Gone"
    assert (enabled["health"]["state"], enabled["health"]["reason"]) == ("healthy", None)


def test_410_disables_a_webhook_and_publishes_an_own_event(
    api, receiver, dispatcher, clock, caplog
):
    receiver.answers(410, times=1)
    webhook = api.create(receiver.url.replace("//", "//u:p@"), name="gone")
    api.create(receiver.url + "/told", "webhook_disabled")
    publish_numbers(api, 1, 2)

    dispatcher.run_until_idle()
    clock.advance(1)
    dispatcher.run_until_idle()

    shown = api.get_webhook(webhook)
    assert shown["health"]["state"] == "disabled"
    assert shown["health"]["reason"] == "the receiver answered 410 Gone"
    assert [d["state"] for d in api.deliveries(webhook)] == ["pending", "failed"]
    told = json.loads(receiver.received[-1].body)
    assert receiver.received[-1].path == "/hook/told"
    assert told["webhook"] == {"id": 1, "name": "gone", "url": webhookd.short_url(receiver.url)}
    assert told["reason"] == "the receiver answered 410 Gone"
    assert list(told) == ["timestamp", "event", "webhook", "reason"]
    [line] = [r for r in caplog.records if "webhook disabled" in r.getMessage()]
    assert line.levelname == "WARNING"
    assert api.publish(n=3)["deliveries"] == 0

    api.put_json(f"{WEBHOOKS}/1", {"active": True})
    dispatcher.run_until_idle()

    assert api.get_webhook(webhook)["health"]["state"] == "healthy"
    assert [d["state"] for d in api.deliveries(webhook)] == ["succeeded", "failed"]


# ---- ordered, rateLimit, rotation ----


def test_an_ordered_webhook_waits_for_the_one_before(api, receiver, wall):
    receiver.answers(500, times=2)
    api.create(receiver.url, ordered=True)
    publish_numbers(api, 0, 1, 2)

    assert wall(0) == [0]
    publish_numbers(api, 3)
    assert wall(1) == []
    assert wall(10) == [0]
    assert wall(50) == []
    assert wall(51) == [0, 1, 2, 3]


def test_an_ordered_webhook_goes_on_when_the_one_before_is_given_up(api, receiver, wall):
    receiver.answers(500, times=3)
    api.create(receiver.url, ordered=True)
    publish_numbers(api, 0, 1)

    assert [wall(0), wall(11), wall(101), wall(1)] == [[0], [0], [0, 1], []]


def test_an_ordered_webhook_keeps_its_order_through_a_restart(
    api, receiver, wall, store, address_policy, settings, clock
):
    receiver.answers(500, times=1)
    api.create(receiver.url, ordered=True)
    publish_numbers(api, *range(150))
    wall(0)
    clock.advance(11)

    webhookd.Dispatcher(
        store, webhookd.Client(address_policy, 5.0), settings, clock
    ).run_until_idle()

    assert [body["n"] for body in receiver.bodies()] == [0, *range(150)]


def test_a_rate_limit_spreads_deliveries(api, receiver, wall):
    api.create(receiver.url, rateLimit=0.5)
    publish_numbers(api, 0, 1, 2)

    assert [wall(s) for s in (0, 1, 1.1, 1, 1.1)] == [[0], [], [1], [], [2]]


def test_a_turn_between_two_milliseconds_starts_what_may_start(
    api, wall, receiver, dispatcher, monkeypatch
):
    """Else the queue would line up again and again until the next millisecond."""
    api.create(receiver.url, rateLimit=2000)
    publish_numbers(api, 0, 1, 2)
    turns, take_turn = iter(range(100)), dispatcher._take_turn
    monkeypatch.setattr(dispatcher, "_take_turn", lambda *a: (next(turns), take_turn(*a)))

    assert [wall(0), wall(0.000_7)] == [[0], [1]]


def test_a_rate_limit_is_reached(api, receiver, store, address_policy, settings):
    """An alarm that rings too early costs a tick: 200 of them would not end in time."""
    api.create(receiver.url, rateLimit=200)
    publish_numbers(api, *range(200))

    with webhookd.Dispatcher(store, webhookd.Client(address_policy, 5.0), settings):
        wait_until(lambda: len(receiver.received) == 200)


def test_change_of_a_webhook_does_not_reset_its_rate_limit(api, receiver, wall):
    api.create(receiver.url, rateLimit=0.5)
    publish_numbers(api, 0, 1, 2)
    assert wall(0) == [0]

    api.put_json(f"{WEBHOOKS}/1", {"name": "new"})

    assert wall(1) == []


def test_a_rate_limit_does_not_wait_for_a_clock_that_was_set_back(api, receiver, wall, dispatcher):
    api.create(receiver.url, rateLimit=0.5)
    publish_numbers(api, 0, 1)
    assert wall(0) == [0]

    dispatcher._clock.advance(-3600)
    dispatcher._store.write(webhookd.Batch.shift_schedule, dispatcher._now_ms(), -3_600_000)

    assert [wall(0), wall(2.1)] == [[], [1]]


def test_a_rate_limit_that_is_lifted_holds_no_longer(api, receiver, wall):
    api.create(receiver.url, rateLimit=0.001)
    publish_numbers(api, 0, 1)
    assert wall(0) == [0]

    api.put_json(f"{WEBHOOKS}/1", {"rateLimit": None})

    assert wall(0) == [1]


@pytest.mark.parametrize("value", [0, -1, "5", True])
def test_a_rate_limit_is_a_number_above_0(api, value):
    answer = api.post_json(
        WEBHOOKS, {"url": "http://127.0.0.1:1/", "events": ["e"], "rateLimit": value}
    )

    assert contexts(answer) == ["rateLimit"]


def test_after_a_change_the_old_secret_signs_for_a_day_too(api, receiver, wall):
    webhook = api.create(receiver.url, configuration={"secret": "old"})
    api.put_json(f"{WEBHOOKS}/1", {"configuration": {"secret": "new"}})

    def signatures_after(seconds):
        publish_numbers(api, 0)
        wall(seconds)
        request = receiver.received[-1]
        id, time = (request.headers[f"webhook-{x}"] for x in ("id", "timestamp"))
        signed = {
            webhookd.standard_signature(secret, id, int(time), request.body): secret
            for secret in ("old", "new")
        }
        assert request.headers["X-Hub-Signature"] == webhookd.hub_signature("new", request.body)
        return [signed[s] for s in request.headers["webhook-signature"].split(" ")]

    assert signatures_after(0) == ["new", "old"]
    assert signatures_after(86399) == ["new", "old"]
    assert signatures_after(1) == ["new"]
    assert "old" not in api.get_webhook(webhook)["configuration"].values()


def test_change_of_other_fields_leaves_the_signatures(api, receiver, wall):
    api.create(receiver.url, configuration={"secret": "old"})

    def signers_after(**fields):
        api.put_json(f"{WEBHOOKS}/1", fields)
        publish_numbers(api, 0)
        wall(0)
        headers, body = receiver.received[-1].headers, receiver.received[-1].body
        id, time = headers["webhook-id"], int(headers["webhook-timestamp"])
        signatures = headers.get("webhook-signature", "").split()
        of = functools.partial(webhookd.standard_signature, id=id, seconds=time, body=body)
        return [{of("old"): "old", of("new"): "new"}[s] for s in signatures]

    assert signers_after(name="other") == ["old"]
    assert signers_after(configuration={"secret": "new"}) == ["new", "old"]
    assert signers_after(name="another") == ["new", "old"]
    assert signers_after(configuration={"secret": None}) == []
    assert signers_after(configuration={"secret": "new"}) == ["new"]


def test_nothing_is_started_while_the_database_cannot_be_written(api, receiver, dispatcher, store):
    api.create(receiver.url)
    api.publish()
    store.problem = "the disk is full"

    dispatcher.run_until_idle()
    assert receiver.received == []

    store.flush()
    dispatcher.run_until_idle()
    assert len(receiver.received) == 1


def fail_once(monkeypatch, thing, name):
    """Let a method fail at its first call, as if memory was short."""
    real, calls = getattr(thing, name), itertools.count()

    def method(*args):
        if not next(calls):
            raise MemoryError
        return real(*args)

    monkeypatch.setattr(thing, name, method)


@pytest.mark.parametrize(
    "name",
    ["_queue_of", "_line_up", "_note", "_hand_in", "_keep_result", "_start", "start_attempt"],
)
def test_memory_that_is_short_for_a_moment_leaves_no_delivery_unattempted(
    api, receiver, dispatcher, clock, monkeypatch, name
):
    webhook = api.create(receiver.url)
    api.publish()
    dispatcher.run_until_idle()  # so that nothing is read from the database any more
    receiver.answers(500, times=1)
    fail_once(monkeypatch, dispatcher if hasattr(dispatcher, name) else webhookd, name)

    api.publish()
    for _ in range(3):
        dispatcher.run_until_idle()
        clock.advance(11)

    assert len(receiver.received) == 3
    assert api.get_webhook(webhook)["health"]["pending"] == 0
    assert dispatcher.in_flight() == 0


def test_watchdog_hears_of_progress_only(store, address_policy, settings, clock):
    beats = []
    client = webhookd.Client(address_policy, 5.0)
    with webhookd.Dispatcher(store, client, settings, clock, heartbeat=lambda: beats.append(1)):
        wait_until(lambda: beats)

    assert not store.stands_still()
    store._progressed = time.monotonic() - webhookd.STANDSTILL_SECONDS - 1
    assert store.stands_still()


# ---- what happens at the same moment ----


def during_attempt(receiver, dispatcher, act):
    """Run the dispatcher; act() while its first attempt is in flight."""
    receiver.hold.clear()
    seen = len(receiver.received)

    def acting():
        wait_until(lambda: len(receiver.received) > seen)
        act()
        receiver.hold.set()

    thread = threading.Thread(target=acting)
    thread.start()
    dispatcher.run_until_idle()
    thread.join()


def test_410_disables_even_if_its_event_was_deleted_during_the_attempt(api, receiver, dispatcher):
    webhook = api.create(receiver.url)
    api.publish()
    receiver.answers(410)

    during_attempt(receiver, dispatcher, lambda: api.delete(f"{EVENTS}/1"))

    assert api.get_webhook(webhook)["health"]["state"] == "disabled"
    assert api.get_webhook(webhook)["active"] is False


def test_a_redelivery_during_the_last_attempt_gets_its_fresh_schedule(
    api, receiver, dispatcher, wall
):
    receiver.answers(500)
    webhook = api.create(receiver.url)
    publish_numbers(api, 0)
    wall(0), wall(11)
    [delivery] = api.deliveries(webhook)
    path = f"/rest/api/deliveries/{delivery['id']}/redeliver"

    dispatcher._clock.advance(101)
    during_attempt(receiver, dispatcher, lambda: api.post(path))

    assert len(receiver.received) == 4
    assert [len(wall(seconds)) for seconds in (11, 101, 10**6)] == [1, 1, 0]
    assert api.deliveries(webhook)[0]["state"] == "failed"
    assert api.get_webhook(webhook)["health"]["pending"] == 0


def test_activating_during_an_attempt_is_not_undone_by_it(api, receiver, dispatcher, wall, clock):
    receiver.answers(500, times=5)
    api.create(receiver.url)
    publish_numbers(api, *range(6))
    wall(0)
    receiver.answers(500, times=1)
    clock.advance(11)

    def activate():
        clock.advance(1)
        api.put_json(f"{WEBHOOKS}/1", {"active": True})

    during_attempt(receiver, dispatcher, activate)

    assert api.get(f"{WEBHOOKS}/1").json["health"]["consecutiveFailures"] == 0


def test_a_read_error_does_not_end_the_loop(api, receiver, store, address_policy, settings):
    api.create(receiver.url)
    api.publish()
    client = webhookd.Client(address_policy, 5.0)
    with webhookd.Dispatcher(store, client, settings) as dispatcher:
        wait_until(lambda: len(receiver.received) == 1)
        store.write(lambda batch: batch.connection.execute("ALTER TABLE payloads RENAME TO p"))
        store.write(webhookd.Batch.change_webhook, 1, lambda old: old)
        wait_until(lambda: "cannot be read" in (dispatcher.problem() or ""))
        store.write(lambda batch: batch.connection.execute("ALTER TABLE p RENAME TO payloads"))
        api.publish()
        wait_until(lambda: len(receiver.received) == 2)


# ======================================================================================
# Users
# ======================================================================================


def test_passwords_are_kept_as_salted_hashes():
    first, second = webhookd.password_record("pw"), webhookd.password_record("pw")

    assert first != second
    assert webhookd.matches("pw", first) and webhookd.matches("pw", second)
    assert not webhookd.matches("PW", first)
    assert "pw" not in first


def test_the_first_start_makes_an_admin_with_a_secret(store):
    told = []

    webhookd.ensure_admin(store, "", told.append)
    webhookd.ensure_admin(store, "", told.append)

    [secret] = told
    [admin] = webhookd.load_users(store.reader())
    assert (admin.name, admin.role) == ("admin", "admin")
    assert webhookd.matches(secret, admin.record)


def test_the_admins_password_is_set_at_every_start(store):
    webhookd.ensure_admin(store, "first", tell=None)
    webhookd.ensure_admin(store, "second", tell=None)

    [admin] = webhookd.load_users(store.reader())
    assert webhookd.matches("second", admin.record)
    webhookd.ensure_admin(store, "second", tell=None)
    assert webhookd.load_users(store.reader()) == [admin]


def test_the_admin_is_an_admin_whatever_it_was_before(store):
    viewer = webhookd.User("admin", "viewer", webhookd.password_record("pw"))
    store.write(lambda batch: webhookd.save_user(batch.connection, viewer))

    webhookd.ensure_admin(store, "pw", tell=None)

    assert [user.role for user in webhookd.load_users(store.reader())] == ["admin"]


@pytest.fixture
def logins(store, clock):
    """Logins of jörg, whose password is pässword, and of users whose passwords are their names."""
    passwords = {"jörg": "pässword", "ann": "ann", "bob": "bob"}
    for name, password in passwords.items():
        user = webhookd.User(name, "viewer", webhookd.password_record(password))
        store.write(lambda batch, user=user: webhookd.save_user(batch.connection, user))
    user = webhookd.User("app", "publisher", webhookd.secret_record("secret"))
    store.write(lambda batch: webhookd.save_user(batch.connection, user))
    return webhookd.Logins(store, clock)


def basic_header(name, password, charset="utf-8"):
    return "Basic " + base64.b64encode(f"{name}:{password}".encode(charset)).decode()


def log_in(logins, name, password, address="192.0.2.1", charset="utf-8"):
    """The name of the user, or the status of the answer."""
    header = basic_header(name, password, charset)
    users = webhookd.load_users(logins._store.reader())
    try:
        return (logins.known(header, users, address) or logins.verify(header, address)).name
    except webhookd.WebhookdError as error:
        return error.status


@pytest.mark.parametrize("charset", ["utf-8", "latin-1"])
def test_names_and_passwords_come_in_utf_8_and_in_latin_1(logins, charset):
    assert log_in(logins, "jörg", "pässword", charset=charset) == "jörg"
    assert log_in(logins, "jörg", "passwörd", charset=charset) == 401


def test_ten_wrong_passwords_stop_that_user_from_that_address_and_nobody_else(logins):
    assert log_in(logins, "ann", "ann") == "ann"

    wrong = [log_in(logins, "ann", f"wrong{n}") for n in range(11)]

    assert wrong == [401] * 10 + [429]
    assert log_in(logins, "ann", "ann") == 429  # else a right guess could be told
    assert log_in(logins, "bob", "bob") == "bob"
    assert log_in(logins, "nobody", "x") == 401
    assert log_in(logins, "ann", "ann", "192.0.2.2") == "ann"


def test_a_throttle_ends_with_its_minute(logins, clock):
    for n in range(10):
        log_in(logins, "ann", f"wrong{n}")
    clock.advance(59)
    assert log_in(logins, "ann", "ann") == 429

    clock.advance(1)

    assert log_in(logins, "ann", "ann") == "ann"


def test_a_right_secret_passes_whatever_else_came(logins):
    for n in range(11):
        log_in(logins, "app", f"wrong{n}")

    assert log_in(logins, "app", "wrong") == 429
    assert log_in(logins, "app", "secret") == "app"


def test_all_names_that_are_no_users_count_as_one(logins):
    statuses = [log_in(logins, f"nobody{n}", "x") for n in range(11)]

    assert statuses == [401] * 10 + [429]
    assert log_in(logins, "ann", "ann") == "ann"


def test_throttling_a_user_is_logged_once(logins, caplog):
    for n in range(13):
        log_in(logins, "ann", f"wrong{n}")

    warnings = [line for line in caplog.messages if "too many wrong passwords" in line]
    assert len(warnings) == 1
    assert warnings[0].endswith("address=192.0.2.1 user=ann")


@pytest.mark.parametrize(
    "one, other, are_one",
    [
        ("127.0.0.1", "127.8.9.10", True),
        ("127.0.0.1", "::1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("127.0.0.1", "::ffff:127.0.0.1", True),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("no address", "no address", True),
    ],
)
def test_two_addresses_may_be_one_client(one, other, are_one):
    assert (webhookd.client_of(one) == webhookd.client_of(other)) == are_one


def test_the_oldest_login_is_forgotten_first(logins):
    logins._by_header = webhookd.LimitedDict(2)
    for name in ("ann", "bob"):
        log_in(logins, name, name)

    log_in(logins, "jörg", "pässword")

    users = webhookd.load_users(logins._store.reader())
    known = [logins.known(basic_header(name, name), users, "") for name in ("ann", "bob")]
    assert [user and user.name for user in known] == [None, "bob"]


def test_many_spellings_of_one_secret_push_no_password_out(logins):
    logins._by_header = webhookd.LimitedDict(2)
    log_in(logins, "ann", "ann")
    users = webhookd.load_users(logins._store.reader())

    spellings = [logins.known(f"Bearer{' ' * n}secret", users, "").name for n in range(1, 5)]

    assert spellings == ["app"] * 4
    assert logins.known(basic_header("ann", "ann"), users, "").name == "ann"


@pytest.fixture
def held_hashes(monkeypatch):
    """scrypt waits for `release`, and tells how many are `inside`."""
    held = types.SimpleNamespace(release=threading.Event(), inside=0, most=0, count=0)
    scrypt, lock = hashlib.scrypt, threading.Lock()

    def hold(*arguments, **options):
        with lock:
            held.inside += 1
            held.count += 1
            held.most = max(held.most, held.inside)
        held.release.wait(20)
        try:
            return scrypt(*arguments, **options)
        finally:
            with lock:
                held.inside -= 1

    monkeypatch.setattr(hashlib, "scrypt", hold)
    yield held
    held.release.set()


def test_a_remembered_login_does_not_wait_for_those_that_are_verified(logins, held_hashes):
    held_hashes.release.set()
    log_in(logins, "ann", "ann")
    held_hashes.release.clear()
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        attempts = [pool.submit(log_in, logins, "bob", f"wrong{n}") for n in range(6)]
        wait_until(lambda: held_hashes.inside == 2)

        known = log_in(logins, "ann", "ann")

        held_hashes.release.set()
    assert known == "ann"
    assert [attempt.result() for attempt in attempts] == [401] * 6
    assert held_hashes.most == 2


def test_a_login_that_comes_many_times_at_once_is_hashed_by_few(logins, held_hashes):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        attempts = [pool.submit(log_in, logins, "ann", "ann") for _ in range(8)]
        wait_until(lambda: held_hashes.inside == 2)
        held_hashes.release.set()

    assert [attempt.result() for attempt in attempts] == ["ann"] * 8
    assert held_hashes.count == 2


def test_no_wrong_password_goes_uncounted(logins):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        passwords = [f"wrong{n}" for n in range(14)]
        statuses = list(pool.map(functools.partial(log_in, logins, "ann"), passwords))

    assert (statuses.count(401), statuses.count(429)) == (10, 4)


@pytest.mark.parametrize("name", ["", " ", "a:b", "a\nb", "n" * 101])
def test_names_that_cannot_log_in_are_refused(name):
    with pytest.raises(ValueError):
        webhookd.user_name(name)


# ======================================================================================
# Metrics
# ======================================================================================


def scrape(api):
    """What /metrics says: values by name and labels."""
    answer = api.get("/metrics")
    assert answer.headers["Content-Type"] == webhookd.METRICS_TYPE
    lines = [line for line in answer.text.splitlines() if line[0] != "#"]
    return {name: float(value) for name, _, value in (s.rpartition(" ") for s in lines)}


def of_webhook(samples, name, outcomes=("success", "failure", "error")):
    """The values of a counter of webhook 1, by outcome."""
    labels = [f'{{webhook="1",outcome="{outcome}"}}' for outcome in outcomes]
    return [samples[f"webhookd_{name}_total{label}"] for label in labels]


def test_metrics_count_events_attempts_and_deliveries(api, receiver, dispatcher, clock):
    api.create(receiver.url)
    receiver.answers(500, times=1)
    api.publish()
    api.post_json(EVENTS, [{"event": "e"}, {"event": "nobody_wants_it"}])
    dispatcher.run_until_idle()
    clock.advance(11)
    dispatcher.run_until_idle()
    receiver.answers(500)
    api.publish()
    for seconds in (0, 11, 111):
        clock.advance(seconds)
        dispatcher.run_until_idle()

    samples = scrape(api)

    assert samples["webhookd_events_total"] == 5  # our own delivery_failed among them
    assert of_webhook(samples, "attempts") == [2, 4, 0]
    assert of_webhook(samples, "deliveries") == [2, 1, 0]
    assert samples["webhookd_attempt_duration_seconds_count"] == 6
    assert samples['webhookd_attempt_duration_seconds_bucket{le="+Inf"}'] == 6


def test_a_repeated_publication_is_counted_once(api):
    for _ in range(2):
        api.post_json(EVENTS, {"event": "e"}, headers={"Idempotency-Key": "k"})

    assert scrape(api)["webhookd_events_total"] == 1


def test_counters_do_not_go_down_when_rows_go(api, receiver, dispatcher, store, clock):
    api.create(receiver.url)
    api.create(receiver.url)
    api.publish()
    api.publish()
    dispatcher.run_until_idle()
    before = scrape(api)

    list(store.prune(clock.ms + 1))
    api.delete(f"{EVENTS}/1")
    api.delete(f"{WEBHOOKS}/2")
    dispatcher.run_until_idle()
    after = scrape(api)

    totals = {name for name in before if "_total" in name and "process" not in name}
    assert {name for name in totals if name not in after} == {
        name for name in totals if 'webhook="2"' in name
    }
    assert all(after[name] == before[name] for name in totals & after.keys())


def test_metrics_show_what_waits_and_for_how_long(api, dispatcher, clock, closed_url):
    api.create(closed_url)
    api.create(closed_url, "other")
    api.publish()
    clock.advance(60)
    api.publish()
    dispatcher.run_until_idle()
    clock.advance(30)

    samples = scrape(api)

    assert samples['webhookd_pending_deliveries{webhook="1"}'] == 2
    assert samples['webhookd_pending_deliveries{webhook="2"}'] == 0
    assert samples['webhookd_oldest_pending_age_seconds{webhook="1"}'] == 90
    assert samples['webhookd_oldest_pending_age_seconds{webhook="2"}'] == 0
    assert samples['webhookd_webhook_consecutive_failures{webhook="1"}'] == 2


def test_metrics_show_paused_and_disabled_webhooks(api, receiver, dispatcher):
    receiver.answers(500)
    api.create(receiver.url)
    for _ in range(5):
        api.publish()
    dispatcher.run_until_idle()
    assert scrape(api)['webhookd_webhook_paused{webhook="1"}'] == 1

    receiver.answers(410)
    api.create(receiver.url, "gone")
    api.publish("gone")
    dispatcher.run_until_idle()
    samples = scrape(api)

    assert samples['webhookd_webhook_disabled{webhook="1"}'] == 0
    assert samples['webhookd_webhook_disabled{webhook="2"}'] == 1
    assert samples['webhookd_webhook_paused{webhook="2"}'] == 0


def test_metrics_show_what_the_process_needs(api, store):
    samples = scrape(api)

    assert samples["process_resident_memory_bytes"] > 1 << 20
    assert samples["webhookd_database_size_bytes"] == store.space.used
    assert samples["webhookd_database_log_bytes"] == store.space.log
    assert samples["webhookd_database_size_limit_bytes"] == 2 << 30


def test_buckets_of_a_histogram_add_up():
    samples = dict(webhookd.histogram((5, 10), [1, 2, 3], 1500))

    assert samples == {
        '_bucket{le="0.005"}': 1,
        '_bucket{le="0.01"}': 3,
        '_bucket{le="+Inf"}': 6,
        "_sum": 1.5,
        "_count": 6,
    }


def test_age_of_a_delivery_made_in_the_future_is_0(api, clock, closed_url):
    api.create(closed_url)
    api.publish()

    clock.advance(-60)

    assert scrape(api)['webhookd_oldest_pending_age_seconds{webhook="1"}'] == 0


def test_a_duration_of_exactly_a_buckets_bound_is_in_that_bucket(
    api, receiver, dispatcher, monkeypatch
):
    every_ms = tuple(range(6000))
    monkeypatch.setattr(webhookd, "DURATION_BUCKETS_MS", every_ms)
    dispatcher.duration_counts = [0] * (len(every_ms) + 1)
    webhook = api.create(receiver.url)
    api.publish()
    dispatcher.run_until_idle()
    [delivery] = api.deliveries(webhook)

    samples = scrape(api)

    name, took = "webhookd_attempt_duration_seconds_bucket", delivery["duration"]
    assert samples[f'{name}{{le="{took / 1000}"}}'] == 1
    assert samples[f'{name}{{le="{(took - 1) / 1000}"}}'] == 0


def test_names_of_webhooks_are_escaped_in_metrics(api):
    api.create("http://127.0.0.1:1/", name='\\ " \n é')

    assert r'{webhook="1",name="\\ \" \n é"} 1' in api.get("/metrics").text


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool")
def test_promtool_accepts_the_metrics(api, receiver, dispatcher):
    api.create(receiver.url, name='a "name"\n with \\')
    api.publish()
    dispatcher.run_until_idle()

    text = api.get("/metrics").body
    result = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)

    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


def test_readme_names_every_metric_and_no_other(api):
    api.create("http://127.0.0.1:1/")

    families = set(re.findall(r"^# TYPE (\w+)", api.get("/metrics").text, re.MULTILINE))

    named = re.findall(r"`((?:webhookd|process)_\w+)(?:\{[^}]*\})?`", README)
    assert set(named) == families


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool")
def test_promtool_accepts_the_alert_rules_of_readme(tmp_path, api):
    rules = re.search(r"```yaml\n(groups:.*?)```", README, re.DOTALL)[1]
    (tmp_path / "rules.yml").write_text(rules)

    result = subprocess.run(
        ["promtool", "check", "rules", tmp_path / "rules.yml"], capture_output=True
    )

    assert result.returncode == 0, result.stderr
    api.create("http://127.0.0.1:1/")
    families = set(re.findall(r"^# TYPE (\w+)", api.get("/metrics").text, re.MULTILINE))
    assert set(re.findall(r"(webhookd_\w+)[\[{ ]", rules)) <= families


def test_oldest_pending_delivery_is_read_by_an_index(store):
    plans = []
    store.reader().set_trace_callback(plans.append)
    store.oldest_pending()
    store.reader().set_trace_callback(None)

    plan = store.reader().execute(f"EXPLAIN QUERY PLAN {plans[0]}").fetchall()

    searches = [row[3] for row in plan if "deliveries" in row[3]]
    index = "INDEX deliveries_in_order (webhook_id=?)"
    assert searches == [f"SEARCH deliveries USING {index}"]


# ======================================================================================
# REST API
# ======================================================================================

# ---- common rules ----


def test_without_a_login_the_answer_says_how_to_log_in(api):
    api.authorization = None

    answer = api.get(WEBHOOKS)

    assert answer.status_int == 401
    assert answer.headers["WWW-Authenticate"] == 'Basic realm="webhookd"'
    assert contexts(answer) == [None]


@pytest.mark.parametrize(
    "header",
    ["Basic", "Basic !!!", "Basic YQ==", "Basic /////w==", "Bearer", "Bearer x", "Digest x", "ä"],
)
def test_malformed_login_is_a_wrong_one(api, header):
    api.authorization = None

    assert api.get(WEBHOOKS, headers={"Authorization": header}).status_int == 401


def test_a_secret_works_as_basic_password_and_as_bearer_token(api):
    for authorization in (("Basic", ("viewer", SECRETS["viewer"])), ("Bearer", SECRETS["viewer"])):
        api.authorization = authorization
        assert api.get(WEBHOOKS).status_int == 200


def test_a_password_is_no_bearer_token(api, store):
    user = webhookd.User("u", "admin", webhookd.password_record("pw"))
    store.write(lambda batch: webhookd.save_user(batch.connection, user))

    api.authorization = ("Basic", ("u", "pw"))
    assert [api.get(WEBHOOKS).status_int for _ in range(2)] == [200, 200]
    api.authorization = ("Bearer", "pw")
    assert api.get(WEBHOOKS).status_int == 401


def test_removed_or_changed_user_is_refused_at_once(api, store):
    api.log_in("viewer")
    assert api.get(WEBHOOKS).status_int == 200

    store.write(lambda batch: batch.connection.execute("DELETE FROM users WHERE name = 'viewer'"))

    assert api.get(WEBHOOKS).status_int == 401


ROUTES = [
    ("GET", WEBHOOKS, "admin viewer"),
    ("POST", WEBHOOKS, "admin"),
    ("GET", WEBHOOKS + "/1", "admin viewer"),
    ("PUT", WEBHOOKS + "/1", "admin"),
    ("DELETE", WEBHOOKS + "/1", "admin"),
    ("GET", WEBHOOKS + "/1/latest", "admin viewer"),
    ("GET", WEBHOOKS + "/1/statistics", "admin viewer"),
    ("GET", WEBHOOKS + "/1/statistics/summary", "admin viewer"),
    ("POST", WEBHOOKS + "/test", "admin"),
    ("GET", WEBHOOKS + "/1/deliveries", "admin viewer"),
    ("POST", EVENTS, "admin publisher"),
    ("GET", EVENTS, "admin viewer"),
    ("GET", EVENTS + "/1", "admin viewer"),
    ("GET", "/rest/api/deliveries/1", "admin viewer"),
    ("POST", "/rest/api/deliveries/1/redeliver", "admin"),
    ("POST", WEBHOOKS + "/1/redeliver", "admin"),
    ("POST", WEBHOOKS + "/1/replay", "admin"),
    ("DELETE", EVENTS + "/1", "admin"),
    ("GET", "/metrics", "admin viewer"),
]


@pytest.mark.parametrize("method, path, allowed", ROUTES)
def test_roles_may_do_what_they_are_for(api, method, path, allowed):
    for role in webhookd.ROLES:
        answer = api.log_in(role).request(path, method=method)
        assert (answer.status_int != 403) == (role in allowed.split()), role


def test_every_route_asks_for_a_login_but_health(wsgi):
    listed = {(method, path) for method, path, _ in ROUTES}
    api = App(wsgi)
    for method, path in listed:
        assert api.request(path, method=method).status_int == 401
    assert api.get("/health").status_int == 200
    assert api.get("/").status_int == 200
    pages = [r for r in wsgi.routes if r.rule.startswith(PAGE_PATHS)]
    assert len(wsgi.routes) == len(listed) + len(pages) + 2


def test_throttled_user_gets_retry_after(api, clock):
    api.authorization = ("Basic", ("admin", "wrong"))
    for _ in range(10):
        assert api.get(WEBHOOKS).status_int == 401
    clock.advance(20)

    answer = api.get(WEBHOOKS)

    assert (answer.status_int, answer.headers["Retry-After"]) == (429, "41")


@pytest.mark.parametrize(
    "told, address", [("192.0.2.9", "192.0.2.9"), ("<b>x</b>", "127.0.0.1"), ("", "127.0.0.1")]
)
def test_a_trusted_proxy_is_believed_an_address_only(parts, caplog, told, address):
    settings = dataclasses.replace(parts.settings, trusted_proxy="127.0.0.1")
    api = App(api_with_pages(parts._replace(settings=settings)).app)
    api.authorization = ("Basic", ("admin", "wrong"))

    api.get(WEBHOOKS, extra_environ={"REMOTE_ADDR": told})  # as waitress's proxy_headers sets it

    assert f"address={address} " in caplog.text


def test_a_failed_login_is_logged_with_the_user_if_it_is_one(api, caplog):
    """Somebody may type a password where the name belongs."""
    for login in (("Basic", ("viewer", "wrong")), ("Basic", ("pass-word", "x"))):
        api.authorization = login
        assert api.get(WEBHOOKS).status_int == 401

    users = [re.search(r"user=(\S+)", line)[1] for line in caplog.messages]
    assert users == ["viewer", "unknown"]


def test_every_wrong_password_takes_a_hash_whoever_it_is_for(api, store, monkeypatch):
    hashes, scrypt = [], hashlib.scrypt

    def counted(*arguments, **options):
        hashes.append(1)
        return scrypt(*arguments, **options)

    user = webhookd.User("u", "viewer", webhookd.password_record("pw"))
    store.write(lambda batch: webhookd.save_user(batch.connection, user))
    monkeypatch.setattr(hashlib, "scrypt", counted)
    for number, name in enumerate(("u", "admin", "nobody"), 1):
        api.authorization = ("Basic", (name, "wrong"))
        assert api.get(WEBHOOKS).status_int == 401
        assert len(hashes) == number, name


def test_requests_without_a_login_are_not_wrong_passwords(api):
    right, api.authorization = api.authorization, None
    for _ in range(11):
        api.get(WEBHOOKS)

    api.authorization = right
    assert api.get(WEBHOOKS).status_int == 200


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 202),
        ({"Origin": "http://localhost:80"}, 202),
        ({"Origin": "http://localhost"}, 202),
        ({"Sec-Fetch-Site": "same-origin"}, 202),
        ({"Sec-Fetch-Site": "none"}, 202),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://localhost:81"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
    ],
)
def test_requests_that_another_site_makes_are_refused(api, headers, status):
    assert api.post_json(EVENTS, {"event": "e"}, headers=headers).status_int == status


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_other_sites_may_read_what_a_login_allows(api, method):
    answer = api.request(WEBHOOKS, method=method, headers={"Sec-Fetch-Site": "cross-site"})

    assert answer.status_int == 200


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", "/nothing", 404),
        ("GET", WEBHOOKS + "/x", 404),
        ("GET", WEBHOOKS + "/99999999999999999999", 404),
        ("GET", WEBHOOKS + "/" + "9" * 5000, 404),
        ("DELETE", WEBHOOKS + "/99999999999999999999", 404),
        ("GET", EVENTS + "/99999999999999999999", 404),
        ("GET", EVENTS + "/-1", 404),
        ("GET", "/rest/api/deliveries/%00", 404),
        ("GET", WEBHOOKS + "/1/latest", 404),
        ("GET", WEBHOOKS + "/1/statistics", 404),
        ("GET", WEBHOOKS + "/1/statistics/summary", 404),
        ("GET", WEBHOOKS + "/1/deliveries", 404),
        ("PATCH", WEBHOOKS, 405),
        ("BREW", WEBHOOKS, 405),
    ],
)
def test_missing_resource_is_an_error_in_json(api, method, path, status):
    answer = api.request(path, method=method)

    assert (answer.status_int, answer.content_type) == (status, "application/json")
    assert contexts(answer) == [None]


def test_405_names_what_is_allowed(api):
    assert set(api.delete(WEBHOOKS).headers["Allow"].split(",")) == {"GET", "HEAD", "POST"}


def test_a_bug_is_an_error_in_json_too(api, store, caplog):
    store.write(lambda batch: batch.connection.execute("DROP TABLE events"))

    answer = api.get(EVENTS)

    assert (answer.status_int, contexts(answer)) == (500, [None])
    assert "events" not in answer.text
    assert "no such table: events" in caplog.text


@pytest.mark.parametrize("path, status", [("/1%FF", 400), ("/%D9%A1", 404)])
def test_a_path_is_taken_as_it_is(api, path, status):
    """An Arabic digit is no id, and what is not UTF-8 is not left out."""
    api.create("http://127.0.0.1:1/")

    answer = api.delete(WEBHOOKS + path)

    assert (answer.status_int, answer.content_type) == (status, "application/json")
    assert api.get(WEBHOOKS).json["totalCount"] == 1


def test_a_trailing_slash_and_head_are_the_same_resource(api):
    plain, slash, head = api.get(WEBHOOKS), api.get(WEBHOOKS + "/"), api.head(WEBHOOKS)

    assert plain.json["results"] == slash.json["results"] == []
    assert (head.status_int, head.body) == (200, b"")
    assert head.headers["Content-Length"] == plain.headers["Content-Length"]


@pytest.fixture
def busy_api(parts, monkeypatch):
    """An Api with as much slow work as it admits, in which no request waits for that."""
    monkeypatch.setattr(webhookd, "MAX_WAITING", 0)
    api = api_with_pages(parts)
    with contextlib.ExitStack() as admissions:
        for _ in range(webhookd.SERVER_THREADS // 2):
            admissions.enter_context(api._slow_work._counted(webhookd.ORDINARY))
        yield App(api.app).log_in("admin")


@pytest.mark.parametrize("path", [WEBHOOKS, EVENTS, WEBHOOKS + "/1/statistics", "/metrics"])
def test_slow_requests_beyond_half_of_the_threads_get_503(busy_api, path):
    answer = busy_api.get(path)

    assert (answer.status_int, answer.headers["Retry-After"]) == (503, "1")


def test_look_ups_large_requests_and_passwords_are_slow_too(busy_api, store):
    url, large = {"url": "http://a.example/", "events": ["e"]}, {"event": "e", "x": "x" * 1_000_000}
    record = webhookd.password_record("pw")
    user = webhookd.User("u", "publisher", record)
    store.write(lambda batch: webhookd.save_user(batch.connection, user))

    assert busy_api.post_json(WEBHOOKS, url).status_int == 503
    assert busy_api.post_json(EVENTS, [large, large]).status_int == 503
    busy_api.authorization = ("Basic", ("u", "pw"))
    assert busy_api.post_json(EVENTS, {"event": "e"}).status_int == 503


def test_publications_and_health_always_find_a_thread(busy_api):
    assert busy_api.post_json(EVENTS, {"event": "e"}).status_int == 202
    assert busy_api.get("/health").status_int == 200
    assert busy_api.delete(f"{EVENTS}/1").status_int == 204


def test_few_slow_requests_wait_to_be_admitted():
    work = webhookd.SlowWork()
    with concurrent.futures.ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as admissions:
        for _ in range(webhookd.ORDINARY.limit):
            admissions.enter_context(work._counted(webhookd.ORDINARY))

        def work_slowly():
            with work.admit():
                return "it came"

        waiting = pool.submit(work_slowly)
        wait_until(lambda: work._waiting._value < webhookd.MAX_WAITING or waiting.done())
        admissions.close()

    assert waiting.result() == "it came"


def test_thread_is_admitted_to_slow_work_once():
    work = webhookd.SlowWork()
    with contextlib.ExitStack() as admissions:
        for _ in range(webhookd.ORDINARY.limit + 1):
            admissions.enter_context(work.admit())

    assert work._free[webhookd.ORDINARY]._value == webhookd.ORDINARY.limit


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "x"])
@pytest.mark.parametrize("path", [WEBHOOKS, EVENTS])
def test_a_body_that_is_not_sent_as_json_is_refused(api, path, kind):
    answer = api.request(path, method="POST", body=b'{"event": "e"}', content_type=kind)

    assert answer.status_int == 415


@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "application/json; charset=utf-8",
        "application/vnd.x+json",
        "Application/JSON",
    ],
)
def test_json_has_several_names(api, kind):
    answer = api.request(EVENTS, method="POST", body=b'{"event": "e"}', content_type=kind)

    assert answer.status_int == 202


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b'{"url": NaN}', b'{"url": 1e999}', b"[" * 100_000, b"[]", b"7"]
)
def test_bad_json_is_refused(api, body):
    for method, path in (("POST", WEBHOOKS), ("PUT", f"{WEBHOOKS}/1")):
        api.create("http://127.0.0.1:1/")
        answer = api.request(path, method=method, body=body, content_type="application/json")
        assert (answer.status_int, contexts(answer)) == (400, [None])


def test_the_body_of_a_webhook_has_at_most_a_mebibyte(api):
    kind = {"Content-Type": "application/json"}
    fields = {"url": "http://127.0.0.1:1/", "events": ["e"]}
    body = json.dumps(fields).encode().ljust(1 << 20)

    assert api.post(WEBHOOKS, body, kind).status_int == 201
    assert api.post(WEBHOOKS, body + b" ", kind).status_int == 413


@pytest.mark.parametrize(
    "method, path", [("PUT", "/9"), ("POST", "/9/redeliver"), ("POST", "/9/replay")]
)
def test_missing_webhook_comes_before_a_fault_in_the_body(api, method, path):
    answer = api.request(WEBHOOKS + path, method=method, body=b"{", content_type="application/json")

    assert answer.status_int == 404


@pytest.mark.parametrize(
    "query, field",
    [
        ("start=-1", "start"),
        ("start=x", "start"),
        ("limit=0", "limit"),
        ("since=yesterday", "since"),
        ("until=1e3", "until"),
        ("&".join(["event=e"] * 101), "event"),
    ],
)
def test_a_query_at_fault_is_named(api, query, field):
    webhook = api.create("http://127.0.0.1:1/")
    answer = api.get(f"{WEBHOOKS}/{webhook['id']}/deliveries?{query}")

    assert (answer.status_int, contexts(answer)) == (400, [field])


def test_pages_link_to_their_neighbours(api):
    for _ in range(5):
        api.create("http://127.0.0.1:1/")
    api.create("http://127.0.0.1:1/", "another")

    first = api.get(f"{WEBHOOKS}?limit=2&event=e").json
    second = api.get(first["_links"]["next"]).json
    last = api.get(second["_links"]["next"]).json

    pages = first, second, last
    assert [w["id"] for page in pages for w in page["results"]] == [1, 2, 3, 4, 5]
    numbers = first["start"], first["limit"], first["size"], first["totalCount"]
    assert numbers == (0, 2, 2, 5)
    assert (last["start"], last["size"]) == (4, 1)
    assert [set(p["_links"]) for p in pages] == [
        {"self", "next"},
        {"self", "next", "prev"},
        {"self", "prev"},
    ]
    assert api.get(last["_links"]["prev"]).json["results"] == second["results"]
    assert api.get(f"{WEBHOOKS}?limit=5000").json["limit"] == 1000
    assert api.get(f"{WEBHOOKS}?start=999999999999999").json["results"] == []


def test_pages_do_not_reach_beyond_the_ends(api):
    for _ in range(4):
        api.create("http://127.0.0.1:1/")

    inside = api.get(f"{WEBHOOKS}?start=1&limit=2").json
    last = api.get(f"{WEBHOOKS}?start=2&limit=2").json

    assert "start=0" in inside["_links"]["prev"]
    assert "next" not in last["_links"]


# ---- webhooks ----


def test_confluences_own_example_registers_a_webhook(api, clock):
    answer = api.post_json(
        WEBHOOKS,
        {
            "name": "webhook-name",
            "events": ["page_created", "page_removed"],
            "configuration": {"secret": "your-secret"},
            "url": "http://127.0.0.1:9000/webhook-receiver",
            "active": "true",
        },
    )

    assert answer.status_int == 201
    assert answer.headers["Location"] == f"http://localhost:80{WEBHOOKS}/1"
    assert answer.json == {
        "id": 1,
        "name": "webhook-name",
        "createdDate": clock.ms,
        "updatedDate": clock.ms,
        "events": ["page_created", "page_removed"],
        "configuration": {},
        "url": "http://127.0.0.1:9000/webhook-receiver",
        "active": True,
        "scopeType": "global",
        "sslVerificationRequired": True,
        "secretSet": True,
        "credentials": None,
        "headers": {},
        "filters": {},
        "ordered": False,
        "rateLimit": None,
        "paused": False,
        "template": None,
        "health": {
            "state": "healthy",
            "consecutiveFailures": 0,
            "pausedUntil": None,
            "reason": None,
            "since": clock.ms,
            "pending": 0,
            "lastAttempt": None,
        },
    }
    assert api.get(f"{WEBHOOKS}/1").json == answer.json


def test_put_changes_the_fields_that_it_names(api, clock):
    webhook = api.create("http://127.0.0.1:1/", configuration={"secret": "s"})
    clock.advance(5)

    answer = api.put_json(f"{WEBHOOKS}/1", {"name": "new", "events": ["x"]})

    changed = {"name": "new", "events": ["x"], "updatedDate": clock.ms}
    assert answer.json == webhook | changed
    assert api.get(f"{WEBHOOKS}/1").json == answer.json
    assert api.put_json(f"{WEBHOOKS}/2", {}).status_int == 404


def test_two_puts_at_once_do_not_undo_each_other(api, store):
    webhook = api.create("http://127.0.0.1:1/")

    def change(n):
        def work(old):
            return webhookd.read_webhook({"configuration": {str(n): "x"}}, old)

        store.write(webhookd.Batch.change_webhook, webhook["id"], work)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(change, range(20)))

    assert len(api.get_webhook(webhook)["configuration"]) == 20


def test_a_deleted_webhook_is_gone_with_its_deliveries(api, receiver, dispatcher):
    webhook = api.create(receiver.url)
    api.publish()
    dispatcher.run_until_idle()
    [delivery] = api.deliveries(webhook)

    answer = api.delete(f"{WEBHOOKS}/1")

    assert (answer.status_int, answer.body) == (204, b"")
    assert api.get(f"{WEBHOOKS}/1").status_int == 404
    assert api.delete(f"{WEBHOOKS}/1").status_int == 404
    assert api.get(f"/rest/api/deliveries/{delivery['id']}").status_int == 404
    assert api.get(f"{EVENTS}/1").json["deliveries"] == []


def test_a_fault_changes_nothing(api):
    before = api.create("http://127.0.0.1:1/")

    answer = api.put_json(f"{WEBHOOKS}/1", {"name": "new", "url": "http://10.0.0.1/", "events": []})

    assert (answer.status_int, contexts(answer)) == (400, ["url", "events"])
    assert "--allow-networks 10.0.0.0/8" in answer.json["message"]
    assert api.get(f"{WEBHOOKS}/1").json == before


def test_a_url_no_longer_allowed_does_not_stop_other_changes(api, store):
    store.write(
        webhookd.Batch.add_webhook,
        webhookd.Webhook(url="http://10.0.0.1/", events=("e",), name="n"),
    )

    shown = api.get(f"{WEBHOOKS}/1").json
    answer = api.put_json(f"{WEBHOOKS}/1", shown | {"active": False})

    assert (answer.status_int, answer.json["active"]) == (200, False)


def test_webhooks_are_listed_by_the_events_they_take(api):
    for events in (["a"], ["b"], ["a*"], ["*"]):
        api.create("http://127.0.0.1:1/", *events)

    def listed(query):
        return [webhook["id"] for webhook in api.get(f"{WEBHOOKS}{query}").json["results"]]

    assert listed("") == listed("?event=") == [1, 2, 3, 4]
    assert listed("?event=a") == [1, 3, 4]
    assert listed("?event=a&event=b") == [1, 2, 3, 4]
    assert listed("?event=c") == [4]


def test_webhooks_are_listed_by_their_health(api, receiver, dispatcher, closed_url):
    api.create(receiver.url)
    api.create(closed_url)
    api.create(receiver.url, "b", active=False)
    api.publish()
    dispatcher.run_until_idle()

    def listed(query):
        answer = api.get(f"{WEBHOOKS}{query}").json
        return [webhook["id"] for webhook in answer["results"]], answer["totalCount"]

    assert listed("?state=healthy") == ([1], 1)
    assert listed("?state=failing") == ([2], 1)
    assert listed("?state=inactive&state=failing") == ([2, 3], 2)
    assert listed("?state=inactive&state=failing&event=b") == ([3], 1)
    assert listed("?state=disabled&state=paused") == ([], 0)


@pytest.mark.parametrize(
    "path, query, field",
    [
        (WEBHOOKS, "?state=pending", "state"),
        (WEBHOOKS, "?state=healthy&state=good", "state"),
        (WEBHOOKS, "?outcome=SUCCESS", "outcome"),
        (WEBHOOKS, "?where=a:1", "where"),
        (EVENTS, "?state=failed", "state"),
        (EVENTS, "?outcome=SUCCESS", "outcome"),
        (EVENTS, "?where=a", "where"),
        (EVENTS, "?where=a:1&before=x", "before"),
        (EVENTS, "?payload=maybe", "payload"),
        (EVENTS, "?since=1700000000", "since"),
        (f"{WEBHOOKS}/1/deliveries", "?state=healthy", "state"),
        (f"{WEBHOOKS}/1/deliveries", "?where=a:1", "where"),
        (f"{WEBHOOKS}/1/latest", "?since=2h", "since"),
        (f"{WEBHOOKS}/1/statistics", "?outcome=SUCCESS", "outcome"),
    ],
)
def test_list_refuses_a_filter_that_it_does_not_have(api, path, query, field):
    api.create("http://127.0.0.1:1/")

    answer = api.get(path + query)

    assert (answer.status_int, contexts(answer)) == (400, [field])


def test_list_ignores_unknown_fields(api):
    assert api.get(f"{EVENTS}?colour=red").status_int == 200


def test_viewers_see_no_path_of_a_url_wherever_it_is_shown(api, wsgi, receiver, dispatcher):
    url = f"{receiver.url}/8zx38zx38zx38zx3?key=8zx38zx38zx38zx3"
    echo = b"you sent me to /hook/8zx38zx38zx38zx3"
    receiver.answers(307, {"Location": url.replace("hook", "hook2")}, echo)
    webhook = api.create(url)
    api.publish()
    dispatcher.run_until_idle()
    [delivery] = api.deliveries(webhook)
    one = f"{WEBHOOKS}/{webhook['id']}"
    paths = [
        f"{WEBHOOKS}?statistics=true",
        f"{one}?statistics=true",
        f"{one}/latest",
        f"{one}/statistics",
        f"{one}/statistics/summary",
        f"{one}/deliveries",
        f"/rest/api/deliveries/{delivery['id']}",
        f"{EVENTS}/{delivery['eventId']}",
        "/metrics",
        f"/deliveries/{delivery['id']}",
        f"/webhooks/{webhook['id']}",
    ]

    viewer = App(wsgi).log_in("viewer")
    answers = {path: viewer.get(path) for path in paths}

    assert {answer.status_int for answer in answers.values()} == {200}
    assert [path for path, answer in answers.items() if "8zx3" in answer.text] == []
    short = receiver.url.removesuffix("hook") + "…"
    assert answers[one + "?statistics=true"].json["url"] == short
    assert answers[one + "/latest"].json["request"]["url"] == short
    assert api.get_webhook(webhook)["url"] == url
    assert api.get(f"{one}/latest").json["request"]["url"] == url


def test_no_path_of_a_url_is_logged(api, receiver, dispatcher, caplog):
    caplog.set_level("DEBUG")
    url = f"{receiver.url}/8zx38zx38zx38zx3"
    receiver.answers(301, {"Location": f"{url}/"})
    api.create(url)
    api.put_json(f"{WEBHOOKS}/1", {"active": "true"})
    api.post(f"{WEBHOOKS}/test?webhookId=1")

    api.publish()
    dispatcher.run_until_idle()

    assert "webhook fails" in caplog.text
    assert "8zx3" not in caplog.text


OLD = "OLD-SECRET"


def secret_of(value):
    return {"configuration": {"secret": value}}


@pytest.mark.parametrize(
    "held, changes",
    [
        (secret_of(OLD), [secret_of(None)]),
        (secret_of(OLD), [secret_of("the next"), secret_of(None)]),
        (secret_of(OLD), [secret_of("the next"), secret_of("the one after")]),
        ({"credentials": {"username": "u", "password": OLD}}, [{"credentials": None}]),
        ({"headers": {"X-Key": OLD}}, [{"headers": {}}]),
        ({"url": f"http://u:{OLD}@127.0.0.1:1/"}, [{"url": "http://127.0.0.1:1/"}]),
    ],
)
def test_a_secret_that_is_removed_is_gone_from_the_files(api, store, held, changes):
    api.post_json(WEBHOOKS, {"url": "http://127.0.0.1:1/", "events": ["e"]} | held)
    assert OLD.encode() in files_of(store)

    for change in changes:
        assert api.put_json(f"{WEBHOOKS}/1", change).status_int == 200

    assert OLD.encode() not in files_of(store)


def test_the_secret_of_a_deleted_webhook_is_gone_from_the_files(api, store):
    api.create("http://127.0.0.1:1/", **secret_of(OLD))

    api.delete(f"{WEBHOOKS}/1")

    assert OLD.encode() not in files_of(store)


def test_secrets_never_come_out(api, receiver, dispatcher, caplog):
    caplog.set_level("DEBUG")
    receiver.answers(500, {"X-Echo": "HEADER-SECRET"}, b"PASS-SECRET HMAC-SECRET")
    fields = {
        "configuration": {"secret": "HMAC-SECRET"},
        "credentials": {"username": "u", "password": "PASS-SECRET"},
        "headers": {"X-Token": "HEADER-SECRET"},
    }
    webhook = api.create(receiver.url.replace("//", "//u:URL-SECRET@"), **fields)
    api.publish()
    dispatcher.run_until_idle()

    [delivery] = api.deliveries(webhook)
    pages = [
        api.get(path).text
        for path in (
            f"{WEBHOOKS}?statistics=true",
            f"{WEBHOOKS}/1",
            f"{WEBHOOKS}/1/latest",
            f"{WEBHOOKS}/1/statistics",
            f"{EVENTS}/1",
            f"/rest/api/deliveries/{delivery['id']}",
        )
    ]
    pages += [api.put_json(f"{WEBHOOKS}/1", {}).text, api.post(f"{WEBHOOKS}/test?webhookId=1").text]

    assert receiver.received[0].headers["X-Token"] == "HEADER-SECRET"
    for text in [*pages, caplog.text]:
        assert "SECRET" not in text
        assert base64.b64encode(b"u:PASS-SECRET").decode() not in text
    assert api.get(f"{WEBHOOKS}/1").json["credentials"] == {"username": "u"}
    assert api.get(f"{WEBHOOKS}/1").json["headers"] == {"X-Token": "********"}


def test_latest_is_the_last_invocation_that_matches(api, receiver, dispatcher, clock):
    webhook = api.create(receiver.url, "a", "b")
    path = f"{WEBHOOKS}/{webhook['id']}/latest"
    assert (api.get(path).status_int, api.get(path).body) == (204, b"")

    for event, status in (("a", 200), ("a", 500), ("b", 200)):
        receiver.answers(status, {"Content-Type": "text/plain"}, times=1)
        api.publish(event)
        dispatcher.run_until_idle()
        clock.advance(1)

    latest = api.get(path).json
    assert (latest["event"], latest["result"]["outcome"]) == ("b", "SUCCESS")
    assert latest["id"] == receiver.received[-1].headers["X-Request-Id"]
    assert latest["finish"] - latest["start"] == latest["duration"]
    assert latest["request"]["body"] == receiver.received[-1].body.decode()
    assert latest["request"]["headers"]["X-Event-Key"] == "b"
    assert latest["request"] | {"headers": 0, "body": 0} == {
        "method": "POST",
        "url": receiver.url,
        "headers": 0,
        "body": 0,
    }
    assert latest["result"]["statusCode"] == 200
    assert latest["result"]["headers"]["Content-Type"] == "text/plain"
    assert latest["result"]["body"] == "ok"
    assert api.get(path + "?event=a").json["result"]["statusCode"] == 500
    assert api.get(path + "?event=a&outcome=SUCCESS").json["result"]["statusCode"] == 200
    assert api.get(path + "?outcome=FAILURE&outcome=ERROR").json["event"] == "a"
    assert api.get(path + "?event=b&outcome=FAILURE").status_int == 204
    assert contexts(api.get(path + "?outcome=GOOD")) == ["outcome"]


def test_statistics_count_attempts_of_30_days(api, receiver, dispatcher, clock):
    webhook = api.create(receiver.url, "a", "b")
    path = f"{WEBHOOKS}/{webhook['id']}/statistics"
    receiver.answers(500, times=1)
    api.publish("a")
    dispatcher.run_until_idle()
    clock.advance(11)
    dispatcher.run_until_idle()
    api.publish("b")
    dispatcher.run_until_idle()

    found = api.get(path).json
    window = {"start": clock.ms - 2592000000, "duration": 2592000000}
    assert found["counts"] == {"successes": 2, "failures": 1, "errors": 0, "window": window}
    assert (found["lastSuccess"]["event"], found["lastFailure"]["event"]) == ("b", "a")
    assert "lastError" not in found
    assert set(found["lastSuccess"]["request"]) == {"method", "url"}
    assert set(found["lastSuccess"]["result"]) == {"description", "outcome", "statusCode"}
    assert api.get(path + "?event=a").json["counts"]["successes"] == 1
    summary = api.get(path + "/summary").json
    assert {event: s["counts"]["failures"] for event, s in summary.items()} == {"a": 1, "b": 0}
    assert api.get(f"{WEBHOOKS}?statistics=true").json["results"][0]["statistics"] == found
    assert "statistics" not in api.get(f"{WEBHOOKS}/1?statistics=false").json

    clock.advance(32 * 86400)
    assert api.get(path).json["counts"]["successes"] == 0
    assert api.get(path).json["lastSuccess"]["event"] == "b"


def test_a_test_of_a_url_sends_an_unsigned_ping(api, receiver):
    answer = api.post(f"{WEBHOOKS}/test?url={receiver.url}")

    assert answer.status_int == 200
    [request] = receiver.received
    assert request.body == b'{"test": true}'
    assert request.headers["X-Event-Key"] == "diagnostics:ping"
    assert not [name for name in request.headers if "signature" in name.lower()]
    sent = answer.json["request"]
    assert (sent["method"], sent["url"], sent["body"]) == ("POST", receiver.url, '{"test": true}')
    assert sent["headers"]["X-Event-Key"] == "diagnostics:ping"
    assert (answer.json["response"]["status"], answer.json["response"]["body"]) == (200, "ok")
    assert "error" not in answer.json


def test_a_test_of_a_webhook_is_signed_and_leaves_no_trace(api, receiver):
    webhook = api.create(receiver.url, configuration={"secret": "secret"}, headers={"X-A": "abcd"})

    answer = api.post(f"{WEBHOOKS}/test?webhookId={webhook['id']}", content_type="application/json")

    [request] = receiver.received
    assert request.headers["X-Hub-Signature"].endswith("c954")
    assert request.headers["X-A"] == "abcd"
    assert answer.json["request"]["headers"]["X-A"] == "********"
    assert api.get(f"{WEBHOOKS}/1/latest").status_int == 204
    assert api.get_webhook(webhook) == webhook


def test_a_test_of_a_webhook_renders_its_template(api, receiver, clock):
    template = {"text": "{{event}} at {{timestamp}}", "test": "{{test}}"}
    api.create(receiver.url, template=template, configuration={"secret": "secret"})

    answer = api.post(f"{WEBHOOKS}/test?webhookId=1")

    [request] = receiver.received
    sent = b'{"text":"diagnostics:ping at %d","test":true}' % clock.ms
    assert (request.body, answer.json["request"]["body"]) == (sent, sent.decode())
    assert request.headers["X-Hub-Signature"] == webhookd.hub_signature("secret", sent)
    assert request.headers["Content-Type"] == "application/json; charset=utf-8"


def test_a_template_that_is_a_text_is_sent_as_one(api, receiver):
    api.create(receiver.url, template="ping {{test}}")
    api.create(receiver.url, template="ping", headers={"content-type": "text/markdown"})

    api.post(f"{WEBHOOKS}/test?webhookId=1")
    api.post(f"{WEBHOOKS}/test?webhookId=2")

    text, own = receiver.received
    assert (text.body, text.headers["Content-Type"]) == (b"ping true", "text/plain; charset=utf-8")
    assert own.headers["content-type"] == "text/markdown"
    assert "Content-Type" not in own.headers


def test_a_test_of_a_webhook_without_a_template_sends_the_ping_as_it_is(api, receiver):
    api.create(receiver.url)

    api.post_json(f"{WEBHOOKS}/test", {"webhookId": 1})

    assert receiver.received[0].body == b'{"test": true}'


def test_a_test_without_an_answer_says_why(api, closed_url):
    answer = api.post(f"{WEBHOOKS}/test?url={closed_url}")

    assert (answer.status_int, answer.json["response"]) == (200, None)
    assert answer.json["error"] == "connection refused"


def test_tests_leave_room_for_other_requests(api, receiver):
    receiver.hold.clear()
    path, limit = f"{WEBHOOKS}/test?url={receiver.url}", webhookd.TESTS.limit
    with concurrent.futures.ThreadPoolExecutor(limit) as pool:
        tests = [pool.submit(api.post, path) for _ in range(limit)]
        wait_until(lambda: len(receiver.received) == limit)
        refused = api.post(path)
        receiver.hold.set()

    assert (refused.status_int, "Retry-After" in refused.headers) == (503, True)
    assert [test.result().status_int for test in tests] == [200] * limit
    assert api.post(path).status_int == 200


@pytest.mark.parametrize(
    "query, status, field",
    [
        ("", 400, "url"),
        ("?url=ftp://x", 400, "url"),
        ("?url=http://10.0.0.1/", 400, "url"),
        ("?webhookId=x", 400, "webhookId"),
        ("?webhookId=9", 404, None),
    ],
)
def test_test_without_url_or_webhook_is_refused(api, query, status, field):
    answer = api.post(f"{WEBHOOKS}/test{query}")

    assert (answer.status_int, contexts(answer)) == (status, [field])


# ---- events and deliveries ----


def test_publishing_answers_what_was_published(api, clock):
    api.create("http://127.0.0.1:1/")
    api.create("http://127.0.0.1:1/", "*")

    answer = api.post_json(EVENTS, {"event": "e"})

    assert answer.status_int == 202
    assert answer.json == {"id": 1, "event": "e", "timestamp": clock.ms, "deliveries": 2}


@pytest.mark.parametrize(
    "body, kind",
    [
        (b'[{"event":"a","timestamp":5},{"event":"b"}]', "application/json"),
        (b'{"event":"a","timestamp":5}\n{"event":"b"}\n', "application/x-ndjson"),
    ],
)
def test_an_array_and_lines_publish_many(api, clock, body, kind):
    answer = api.request(EVENTS, method="POST", body=body, content_type=kind)

    assert answer.status_int == 202
    assert answer.json == {
        "results": [
            {"id": 1, "event": "a", "timestamp": 5, "deliveries": 0},
            {"id": 2, "event": "b", "timestamp": clock.ms, "deliveries": 0},
        ]
    }


def publish_as(api, query="", body=b'{"a":1.10}', kind="application/json", **headers):
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return api.request(EVENTS + query, method="POST", body=body, content_type=kind, headers=headers)


@pytest.mark.parametrize(
    "query, headers, name",
    [
        ("?event=page_created", {}, "page_created"),
        ("?event=a", {"X_Event_Key": "b"}, "a"),
        ("", {"X_Event_Key": "a:b", "X_GitHub_Event": "push"}, "a:b"),
        ("", {"X_GitHub_Event": "push"}, "push"),
        ("?event=", {"X_GitHub_Event": "push"}, "push"),
    ],
)
def test_a_program_that_cannot_choose_its_body_publishes(api, clock, query, headers, name):
    answer = publish_as(api, query, **headers)

    assert answer.status_int == 202
    assert answer.json == {"id": 1, "event": name, "timestamp": clock.ms, "deliveries": 0}
    assert b'"payload":{"a":1.10}' in api.get(f"{EVENTS}/1").body


def test_many_events_are_named_by_one_query(api):
    assert publish_as(api, "?event=a", b'[{"event":1},{}]').status_int == 202
    assert publish_as(api, "?event=a", b"{}\n{}\n", "application/x-ndjson").status_int == 202

    assert [event["event"] for event in api.get(EVENTS).json["results"]] == ["a"] * 4


@pytest.mark.parametrize(
    "query, headers, context",
    [
        ("?event=Push%20Hook", {}, "event"),
        ("?event=page_*", {}, "event"),
        ("?event=a&event=b", {}, "event"),
        ("", {}, "event"),
        ("", {"X_Event_Key": "Push Hook"}, "event"),
        ("", {"X_Event_Key": "caf\xe9"}, "event"),
        *((f"?event={name}", {}, "event") for name in webhookd.OWN_EVENTS),
        *(("", {"X_Event_Key": name}, "event") for name in webhookd.OWN_EVENTS),
    ],
)
def test_bad_name_from_outside_is_refused(api, query, headers, context):
    answer = publish_as(api, query, **headers)

    assert (answer.status_int, contexts(answer)) == (400, [context])
    assert api.get(EVENTS).json["totalCount"] == 0


@pytest.mark.parametrize("name", webhookd.OWN_EVENTS)
def test_nobody_publishes_the_names_of_webhookds_own_events(api, name):
    answer = api.post_json(EVENTS, [{"event": "e"}, {"event": name}])

    assert (answer.status_int, contexts(answer)) == (400, ["[1].event"])


def test_an_event_of_another_program_is_delivered_and_filtered_as_it_came(
    api, receiver, dispatcher, clock
):
    api.create(receiver.url, "alert", filters={"event.id": 5})

    publish_as(api, "?event=alert", b'{"status":"firing","event":{"id":5},"timestamp":"now"}')
    publish_as(api, "?event=alert", b'{"status":"firing","event":{"id":6}}')
    dispatcher.run_until_idle()

    [request] = receiver.received
    assert request.body == b'{"status":"firing","event":{"id":5},"timestamp":"now"}'
    assert request.headers["X-Event-Key"] == "alert"


def test_idempotency_key_compares_the_name_from_outside(api):
    def status(query="", body=b'{"a":1}', **headers):
        return publish_as(api, query, body, Idempotency_Key="k", **headers).status_int

    assert [status("?event=a"), status("?event=a"), status("?event=b")] == [202, 200, 422]
    assert [status(X_Event_Key="a"), status(X_GitHub_Event="b")] == [200, 422]


def test_idempotency_key_ignores_a_header_that_names_no_event(api):
    def status(**headers):
        return publish_as(api, "", b'{"event":"e"}', Idempotency_Key="k", **headers).status_int

    assert [status(), status(X_Event_Key="a")] == [202, 200]


@pytest.mark.parametrize(
    "kind, headers, message",
    [
        (
            "text/plain",
            {},
            "came as text/plain, send it as application/json or application/x-ndjson",
        ),
        ("", {}, "the body came without a Content-Type, send it as application/json"),
        ("text/plain", {}, "curl: add -H Content-Type:application/json, or use --json"),
        (
            "application/json",
            {"Content_Encoding": "gzip"},
            "Content-Encoding gzip, send it without",
        ),
    ],
)
def test_415_names_the_type_that_came_and_the_one_to_send(api, kind, headers, message):
    answer = publish_as(api, "", b'{"event":"e"}', kind, **headers)

    assert answer.status_int == 415
    assert message in answer.json["message"]


def test_a_body_that_says_that_it_is_not_encoded_is_taken(api):
    assert publish_as(api, "?event=e", Content_Encoding="identity").status_int == 202


def test_a_body_nested_too_deeply_is_refused_everywhere(api):
    deep = b'{"event":"e","x":%s}' % (b"[" * 100 + b"]" * 100)

    assert publish_as(api, "", deep).status_int == 400
    answer = api.request(WEBHOOKS, method="POST", body=deep, content_type="application/json")
    assert (answer.status_int, contexts(answer)) == (400, [None])


def test_one_bad_event_refuses_all_of_its_request(api):
    answer = api.post_json(EVENTS, [{"event": "a"}, {"event": "b"}, {}, {"event": "a b"}])

    assert (answer.status_int, contexts(answer)) == (400, ["[2].event", "[3].event"])
    assert api.get(EVENTS).json["totalCount"] == 0


def test_an_event_that_is_too_large_gets_413(api, settings):
    answer = api.post_json(EVENTS, {"event": "e", "x": "x" * settings.max_event_size})

    assert (answer.status_int, contexts(answer)) == (413, [None])
    answer = api.post_json(EVENTS, [{"event": "e"}, {"event": "e", "x": "x" * (1 << 20)}])
    assert (answer.status_int, contexts(answer)) == (413, ["[1]"])
    assert api.get(EVENTS).json["totalCount"] == 0


def test_one_event_may_be_larger_than_many_if_that_is_set(api, monkeypatch):
    monkeypatch.setattr(webhookd, "MAX_REQUEST_BYTES", 1000)

    api.publish(text="x" * 2000)

    assert api.get(f"{EVENTS}/1").json["payload"]["text"] == "x" * 2000


def test_a_key_repeats_the_first_answer(api, store):
    def publish(key, user="publisher", **event):
        headers = {"Idempotency-Key": key}
        return api.log_in(user).post_json(EVENTS, {"event": "e"} | event, headers=headers)

    first, again = publish("k"), publish("k")

    assert (first.status_int, again.status_int) == (202, 200)
    assert first.json == again.json
    assert publish("k", a=1).status_int == 422
    assert publish("other").json["id"] == 2
    assert publish("k", "admin").json["id"] == 3
    assert publish("k" * 255).status_int == 202
    assert publish("k" * 256).status_int == publish("").status_int == 400
    assert api.log_in("admin").get(EVENTS).json["totalCount"] == 4


def test_events_are_listed_newest_first(api, clock):
    for event in ("a", "b", "a"):
        api.publish(event)
        clock.advance(10)
    api.publish("c", timestamp=5)

    def listed(query=""):
        return [event["id"] for event in api.get(EVENTS + query).json["results"]]

    assert listed() == [4, 3, 2, 1]
    assert listed("?event=a") == [3, 1]
    assert listed("?event=a&event=b&limit=2") == [3, 2]
    assert listed(f"?since={clock.ms - 20_000}") == [3, 2]
    assert listed("?since=2023-11-14T22:13:30Z&until=2023-11-14T22:13:39Z") == [2]
    assert listed("?since=15s") == [3]
    assert listed("?until=1970-01-02") == [4]


def test_events_are_listed_by_their_payload(api):
    for user in (42, 7, 42):
        api.publish("a", user={"id": user}, tags=["x", str(user)])
    api.publish("b", user={"id": "42"})

    def listed(query):
        answer = api.get(EVENTS + query).json
        return [event["id"] for event in answer["results"]], answer["totalCount"]

    assert listed("?where=user.id:42") == ([4, 3, 1], 3)
    assert listed("?where=user.id:42&where=tags.0:x&event=a") == ([3, 1], 2)
    assert listed("?where=tags.1:7") == ([2], 1)
    assert listed("?where=user.id:42&start=1&limit=1") == ([3], 3)
    assert listed("?where=user.id:4") == ([], 0)


def followed(api, query):
    """The ids of all events on a page and those that its links lead to."""
    answer, ids = api.get(EVENTS + query).json, []
    while True:
        ids += [event["id"] for event in answer["results"]]
        assert answer["size"] == len(answer["results"])
        if "next" not in answer["_links"]:
            return ids
        answer = api.get(answer["_links"]["next"].partition(":80")[2]).json


@pytest.mark.parametrize("query", ["", "?limit=3", "?start=1&limit=2", "?payload=true&limit=4"])
def test_the_links_of_a_search_lead_to_all_that_it_finds(api, monkeypatch, query):
    monkeypatch.setattr(webhookd, "SEARCHED_EVENTS", 4)
    monkeypatch.setattr(webhookd, "SEARCH_STEP", 2)
    monkeypatch.setattr(webhookd, "SHOWN_PAYLOAD_BYTES", 1500)
    api.post_json(EVENTS, [{"event": "e", "n": n % 2, "x": "x" * 1000} for n in range(25)])

    found = followed(api, f"{query or '?'}&where=n:1")

    assert found == list(range(24, 1, -2))["start=1" in query :]


def test_events_are_listed_with_their_payloads(api):
    publish_as(api, "?event=a", b'{"price":1.10,"event":[2]}')
    api.publish("b", n=1)

    answer = api.get(f"{EVENTS}?payload=true")

    assert [event["payload"] for event in answer.json["results"]] == [
        {"n": 1},
        {"price": 1.1, "event": [2]},
    ]
    assert b'{"price":1.10,' in answer.body
    assert "payload" not in api.get(EVENTS).json["results"][0]
    assert api.get(f"{EVENTS}?payload=true&where=n:1").json["results"][0]["payload"] == {"n": 1}


def test_payloads_that_do_not_fit_into_one_answer_come_with_the_next(api, monkeypatch):
    monkeypatch.setattr(webhookd, "SHOWN_PAYLOAD_BYTES", 2500)
    api.post_json(EVENTS, [{"event": "e", "x": "x" * 1000}] * 5)

    first = api.get(f"{EVENTS}?payload=true").json

    assert (first["size"], first["totalCount"]) == (2, 5)
    assert followed(api, "?payload=true") == [5, 4, 3, 2, 1]


def test_an_event_is_shown_with_its_payload_and_its_deliveries(api, clock):
    api.create("http://127.0.0.1:1/")
    api.request(
        EVENTS,
        method="POST",
        body=b'{"event":"e","price":1.10,"s":"\\ud800"}',
        content_type="application/json",
    )

    answer = api.get(f"{EVENTS}/1")

    assert b'"payload":{"price":1.10,"s":"\\ud800"}' in answer.body
    [delivery] = answer.json["deliveries"]
    assert delivery == {
        "id": delivery["id"],
        "webhookId": 1,
        "eventId": 1,
        "event": "e",
        "state": "pending",
        "attemptCount": 0,
        "nextAttempt": clock.ms,
        "createdDate": clock.ms,
        "outcome": None,
        "description": None,
        "duration": None,
        "webhookName": "http://127.0.0.1:1",
    }


def test_deliveries_are_listed_by_state_and_outcome(api, receiver, dispatcher, clock):
    webhook = api.create(receiver.url, "a", "b")
    for event, status in (("a", 200), ("b", 404), ("a", 200)):
        receiver.answers(status, times=1)
        api.publish(event, n=status)
        dispatcher.run_until_idle()
        clock.advance(1)

    def listed(query):
        return [d["eventId"] for d in api.deliveries(webhook, query)]

    assert listed("") == [3, 2, 1]
    assert listed("?state=succeeded") == [3, 1]
    assert listed("?state=succeeded&state=pending&event=b") == [2]
    assert listed("?outcome=FAILURE") == [2]
    assert listed("?outcome=ERROR&state=failed") == []
    assert listed(f"?since={clock.ms - 2000}&limit=1") == [3]
    assert listed(f"?until={clock.ms - 2000}") == [2, 1]


def test_a_delivery_is_shown_with_its_attempts(api, receiver, dispatcher, clock):
    receiver.answers(503, {}, b"not now", times=1)
    webhook = api.create(receiver.url)
    api.publish()
    dispatcher.run_until_idle()
    clock.advance(11)
    dispatcher.run_until_idle()

    [listed] = api.deliveries(webhook)
    shown = api.get(f"/rest/api/deliveries/{listed['id']}").json

    attempts = shown.pop("attempts")
    assert shown == listed
    assert (shown["outcome"], shown["description"]) == ("SUCCESS", "200")
    assert [a["result"]["body"] for a in attempts] == ["not now", "ok"]
    assert [a["request"]["headers"]["X-Attempt"] for a in attempts] == ["1", "2"]
    assert attempts[1] == api.get(f"{WEBHOOKS}/1/latest").json


@pytest.fixture
def long_delivery(api, receiver, dispatcher, store):
    """The path of a delivery that had 30 attempts of 800 KB; a template made the last."""
    receiver.answers(503, {}, b'a "quoted" answer')
    webhook = api.create(receiver.url)
    api.publish(text='"ä' * 100_000)
    dispatcher.run_until_idle()
    table = store.reader().rows("PRAGMA table_info(attempts)")
    columns = ", ".join(name for _, name, *_ in table if name != "id")
    copies = f"INSERT INTO attempts ({columns}) SELECT {columns} FROM attempts WHERE id = 1"
    for _ in range(29):
        store.write(lambda batch: batch.connection.execute(copies))
    own = "UPDATE attempts SET request_body = 'its own' WHERE id = 30"
    store.write(lambda batch: batch.connection.execute(own))
    return f"/rest/api/deliveries/{api.deliveries(webhook)[0]['id']}"


def test_a_delivery_with_many_attempts_is_shown_as_any_other(api, long_delivery):
    shown = api.get(long_delivery).json

    assert len(shown["attempts"]) == 30
    assert shown["attempts"][0] == api.get(f"{WEBHOOKS}/1/latest").json
    assert shown["attempts"][-1]["request"]["body"] == "its own"
    assert api.head(long_delivery).status_int == 200


def test_a_delivery_with_many_attempts_is_made_while_it_is_sent(wsgi, long_delivery):
    environ = webtest.TestRequest.blank(long_delivery).environ
    environ["HTTP_AUTHORIZATION"] = f"Bearer {SECRETS['viewer']}"

    parts = wsgi(environ, lambda *_: None)

    with contextlib.closing(parts):
        assert max(len(part) for part in itertools.islice(parts, 100)) <= 1 << 16


def test_a_delivery_that_is_deleted_while_it_is_sent_does_not_look_complete(
    api, wsgi, long_delivery, monkeypatch
):
    environ = webtest.TestRequest.blank(long_delivery).environ
    environ["HTTP_AUTHORIZATION"] = f"Bearer {SECRETS['viewer']}"
    parts = wsgi(environ, lambda *_: None)
    next(iter(parts))

    api.delete(f"{EVENTS}/1")

    with contextlib.closing(parts), pytest.raises(webhookd.Unavailable):
        collections.deque(parts, 0)


def test_answer_that_nobody_fetches_ends_its_admission(wsgi, long_delivery):
    environ = webtest.TestRequest.blank(long_delivery).environ
    environ["HTTP_AUTHORIZATION"] = f"Bearer {SECRETS['viewer']}"

    for _ in range(webhookd.STREAMS.limit + 1):
        statuses = []
        parts = wsgi(dict(environ), lambda status, *_, told=statuses: told.append(status))
        next(iter(parts))
        parts.close()

        assert statuses == ["200 OK"]


def test_health_counts_failures_and_what_waits(api, receiver, dispatcher, clock):
    receiver.answers(500, times=2)
    webhook = api.create(receiver.url)
    api.publish()

    def health():
        found = api.get_webhook(webhook)["health"]
        return found["state"], found["consecutiveFailures"], found["pending"]

    assert health() == ("healthy", 0, 1)
    dispatcher.run_until_idle()
    assert health() == ("failing", 1, 1)
    clock.advance(11)
    dispatcher.run_until_idle()
    assert health() == ("failing", 2, 1)
    clock.advance(101)
    dispatcher.run_until_idle()
    assert health() == ("healthy", 0, 0)
    api.put_json(f"{WEBHOOKS}/1", {"active": "false"})
    assert health() == ("inactive", 0, 0)


def test_damaged_page_is_reported_by_the_answer_and_by_health(api, store):
    api.create("http://127.0.0.1:1/")
    break_table(store, "deliveries_by_webhook")

    answer = api.get(f"{WEBHOOKS}/1/deliveries")

    assert answer.status_int == 503
    assert answer.json["message"].startswith("the database cannot be read")
    assert api.get("/health").json["problems"] == [
        "the database is damaged: database disk image is malformed"
    ]


def test_lack_of_memory_is_a_503_that_says_so(api, store, monkeypatch):
    fail_once(monkeypatch, store, "events")

    answer = api.get(EVENTS)

    assert answer.status_int == 503
    assert answer.json["message"] == "the database cannot be read: out of memory"
    assert api.get(EVENTS).status_int == 200


def test_health_names_the_thread_that_stands_still(api, store, dispatcher, monkeypatch):
    assert api.get("/health").json == {"status": "ok"}

    store.problem, store.full = "the disk is full", webhookd.FULL
    dispatcher._ticked -= 1000
    store._progressed = time.monotonic() - 1000
    answer = api.get("/health")

    assert answer.status_int == 503
    assert answer.json["problems"] == [
        "the disk is full",
        "the database is full (--max-database-size)",
        "the delivery loop stands still",
        "the store's writer stands still",
    ]


CHANGES = [
    ("POST", WEBHOOKS, {"url": "http://u:pw@127.0.0.1:1/", "events": ["e"]}),
    ("PUT", f"{WEBHOOKS}/1", {"name": "x", "configuration": {"secret": "geheim"}}),
    ("PUT", f"{WEBHOOKS}/1", {"sslVerificationRequired": False, "rateLimit": 5}),
    ("PUT", f"{WEBHOOKS}/1", {"active": False}),
    ("PUT", f"{WEBHOOKS}/1", {"active": True, "headers": {"X-Key": "geheim"}}),
    ("PUT", f"{WEBHOOKS}/1", {"configuration": {"secret": "geheim"}}),
    ("PUT", f"{WEBHOOKS}/1", {"paused": False}),
    ("POST", f"{WEBHOOKS}/test?webhookId=1", None),
    ("DELETE", f"{EVENTS}/1", None),
    ("POST", f"{WEBHOOKS}/1/replay", None),
    ("POST", f"{WEBHOOKS}/1/redeliver", {"outcome": "ERROR"}),
    ("DELETE", f"{WEBHOOKS}/1", None),
]


def test_every_change_is_logged_with_who_what_and_which(api, dispatcher, caplog):
    api.publish()
    api.publish(text="geheim")
    caplog.set_level("INFO")

    for method, path, fields in CHANGES:
        call = getattr(api, f"{method.lower()}_json")
        assert call(path, *[fields] * (fields is not None)).status_int < 300
        dispatcher.run_until_idle()

    lines = [line for line in caplog.messages if " by=" in line]
    url = "url=http://127.0.0.1:1/…"
    assert [line.removesuffix(" by=admin address=None") for line in lines] == [
        f"webhook created id=1 {url}",
        f"webhook changed id=1 fields=name,configuration.secret {url}",
        f"webhook changed id=1 fields=sslVerificationRequired,rateLimit {url}",
        f"webhook deactivated id=1 fields=active {url}",
        f"webhook activated id=1 fields=active,headers {url}",
        f"webhook changed id=1 {url}",
        f"webhook resumed id=1 {url}",
        f'webhook tested id=1 {url} result="connection refused"',
        "event deleted id=1",
        "events replayed webhook=1 count=1",
        "deliveries redelivered webhook=1 count=1",
        "webhook deleted id=1",
    ]
    assert "geheim" not in caplog.text and ":pw@" not in caplog.text


def test_redelivering_one_is_logged_and_counting_and_publishing_are_not(
    api, receiver, dispatcher, caplog
):
    webhook = api.create(receiver.url)
    caplog.set_level("INFO")
    api.publish()
    dispatcher.run_until_idle()
    [delivery] = api.deliveries(webhook)
    api.post_json(f"{WEBHOOKS}/1/redeliver", {"outcome": "SUCCESS", "dryRun": True})
    assert caplog.messages == []

    api.post(f"/rest/api/deliveries/{delivery['id']}/redeliver")

    [line] = caplog.messages
    assert line.startswith(f"delivery redelivered id={delivery['id']} webhook=1 by=")


# ---- operations ----


def test_a_redelivery_starts_at_once_with_a_fresh_schedule(api, receiver, wall):
    receiver.answers(500, times=3)
    webhook = api.create(receiver.url)
    publish_numbers(api, 7)
    wall(0), wall(11), wall(101)
    [failed] = api.deliveries(webhook)
    assert failed["state"] == "failed"

    receiver.answers(500, times=1)
    answer = api.post(f"/rest/api/deliveries/{failed['id']}/redeliver")

    assert (answer.status_int, answer.json["state"], answer.json["id"]) == (
        202,
        "pending",
        failed["id"],
    )
    assert api.get_webhook(webhook)["health"]["pending"] == 1
    assert [wall(0), wall(9), wall(2)] == [[7], [], [7]]
    assert [r.headers["X-Attempt"] for r in receiver.received] == list("12345")
    assert len({r.headers["X-Request-Id"] for r in receiver.received}) == 1
    assert api.post("/rest/api/deliveries/no-such/redeliver").status_int == 404


def test_an_id_may_be_written_in_capitals(api):
    webhook = api.create("http://127.0.0.1:1/")
    api.publish()
    [delivery] = api.deliveries(webhook)
    capitals = f"/rest/api/deliveries/{delivery['id'].upper()}"

    assert api.get(capitals).json["id"] == delivery["id"]
    assert api.post(f"{capitals}/redeliver").json["id"] == delivery["id"]


def test_redelivering_one_ends_the_pause(api, receiver, wall):
    receiver.answers(500, times=5)
    webhook = api.create(receiver.url)
    publish_numbers(api, *range(6))
    wall(0)
    delivery = api.deliveries(webhook)[0]

    api.post(f"/rest/api/deliveries/{delivery['id']}/redeliver")

    first, *rest = wall(0)
    assert first == 5
    assert sorted(rest) == [0, 1, 2, 3, 4]


def test_redelivering_many_ends_the_pause(api, receiver, wall):
    receiver.answers(500, times=5)
    api.create(receiver.url)
    publish_numbers(api, *range(6))
    wall(0)

    api.post_json(f"{WEBHOOKS}/1/redeliver", {"outcome": "FAILURE"})

    assert sorted(wall(0)) == [0, 1, 2, 3, 4, 5]


def test_deliveries_made_before_a_replay_failed_are_attempted(
    api, store, receiver, wall, monkeypatch
):
    api.post_json(EVENTS, [{"event": "e", "n": n} for n in range(501)])
    api.create(receiver.url)
    replay, steps = webhookd.Batch.replay, iter([None, webhookd.StorageFull("the disk is full")])

    def fail_second(*args):
        if failure := next(steps):
            raise failure
        return replay(*args)

    monkeypatch.setattr(webhookd.Batch, "replay", fail_second)
    assert api.post(f"{WEBHOOKS}/1/replay").status_int == 507

    assert len(wall(0)) == 500


def test_redelivering_one_does_not_wait_for_those_before_it(api, receiver, wall):
    receiver.answers(500)
    webhook = api.create(receiver.url)
    publish_numbers(api, *range(8))
    wall(0)
    newest = api.deliveries(webhook)[0]

    api.post(f"/rest/api/deliveries/{newest['id']}/redeliver")

    assert wall(0) == [7]


def fail_three_and_succeed_once(api, receiver, wall):
    receiver.answers(500, times=9)
    webhook = api.create(receiver.url, "a", "b")
    for event in ("a", "a", "b"):
        api.publish(event, n=event)
    for _ in range(12):
        wall(1000)
    api.publish("b", n="ok")
    wall(0)
    assert [d["state"] for d in api.deliveries(webhook)] == ["succeeded"] + ["failed"] * 3
    return webhook


@pytest.mark.parametrize(
    "selection, matched",
    [
        (None, 3),
        ({}, 3),
        ({"event": "a"}, 2),
        ({"event": ["a", "b"]}, 3),
        ({"outcome": "FAILURE", "event": "b"}, 1),
        ({"outcome": "SUCCESS"}, 1),
        ({"outcome": ["SUCCESS", "FAILURE"]}, 4),
        ({"until": "1970-01-02"}, 0),
        ({"since": "1d"}, 3),
        ({"since": "2023-11-14T00:00:00Z", "until": 1_700_000_000_000}, 3),
    ],
)
def test_deliveries_are_redelivered_by_state_and_outcome(api, receiver, wall, selection, matched):
    webhook = fail_three_and_succeed_once(api, receiver, wall)
    path = f"{WEBHOOKS}/{webhook['id']}/redeliver"

    dry = api.post_json(path, (selection or {}) | {"dryRun": True})
    assert (dry.status_int, dry.json) == (202, {"matched": matched, "redelivered": 0})
    asked = api.post(path + "?dryRun=true&outcome=SUCCESS&outcome=FAILURE")
    assert asked.json == {"matched": 4, "redelivered": 0}
    assert wall(0) == []
    answer = api.post(path) if selection is None else api.post_json(path, selection)

    assert (answer.status_int, answer.json) == (202, {"matched": matched, "redelivered": matched})
    assert len(wall(0)) == matched


@pytest.mark.parametrize(
    "selection, field",
    [
        ({"since": "soon"}, "since"),
        ({"until": True}, "until"),
        ({"outcome": "GOOD"}, "outcome"),
        ({"event": 7}, "event"),
        ({"dryRun": "maybe"}, "dryRun"),
        ({"dryrun": True}, "dryrun"),
        ({"from": 0}, "from"),
        ({"state": "failed"}, "state"),
        ({"since": 1_700_000_000}, "since"),
        ([], None),
        ({"event": "\ud800"}, None),
    ],
)
@pytest.mark.parametrize("operation", ["redeliver", "replay"])
def test_a_selection_at_fault_is_named(api, operation, selection, field):
    api.create("http://127.0.0.1:1/")

    answer = api.post_json(f"{WEBHOOKS}/1/{operation}", selection)

    assert (answer.status_int, contexts(answer)) == (400, [field])


@pytest.mark.parametrize(
    "path", [f"{WEBHOOKS}/1/redeliver", f"{WEBHOOKS}/1/replay", f"{WEBHOOKS}/test"]
)
def test_operation_refuses_unknown_fields_in_its_query_too(api, receiver, path):
    api.create(receiver.url)

    answer = api.post(f"{path}?dry_run=true")

    assert (answer.status_int, "dry_run" in contexts(answer)) == (400, True)


def test_replay_refuses_the_filter_by_outcome(api):
    api.create("http://127.0.0.1:1/")

    answer = api.post_json(f"{WEBHOOKS}/1/replay", {"outcome": "FAILURE"})

    assert (answer.status_int, contexts(answer)) == (400, ["outcome"])


def test_redelivering_one_refuses_every_field(api, receiver, dispatcher):
    webhook = api.create(receiver.url)
    api.publish()
    dispatcher.run_until_idle()
    [delivery] = api.deliveries(webhook)
    path = f"/rest/api/deliveries/{delivery['id']}/redeliver"

    answers = [api.post_json(path, {"dryRun": True}), api.post(f"{path}?dryRun=true")]

    assert [(a.status_int, contexts(a)) for a in answers] == [(400, ["dryRun"])] * 2
    assert api.deliveries(webhook) == [delivery]
    assert api.post_json(path, {}).status_int == 202


def test_replay_delivers_events_that_the_webhook_never_got(api, receiver, wall, clock):
    for n in range(3):
        api.publish("a", n=n, kind="x")
    api.publish("b", n=3, kind="x")
    api.publish("a", n=4, kind="y")
    webhook = api.create(receiver.url, "a", filters={"kind": "x"})
    api.publish("a", n=5, kind="x")
    assert wall(0) == [5]
    path = f"{WEBHOOKS}/{webhook['id']}/replay"

    assert api.post_json(path, {"dryRun": "true"}).json == {"matched": 3, "replayed": 0}
    answer = api.post(path)

    assert (answer.status_int, answer.json) == (202, {"matched": 3, "replayed": 3})
    assert sorted(wall(0)) == [0, 1, 2]
    assert api.post_json(path, {}).json["matched"] == 0
    assert api.get_webhook(webhook)["health"]["pending"] == 0


@pytest.mark.parametrize("filters", [None, {"event": ["webhook_disabled", "delivery_failed"]}])
def test_replay_brings_no_webhook_own_events_about_itself(api, receiver, wall, filters):
    receiver.answers(410, times=1)
    webhook = api.create(receiver.url, "*")
    api.publish("e", n=1)
    wall(0)
    api.put_json(f"{WEBHOOKS}/{webhook['id']}", {"active": True, "filters": filters})
    other = api.create(receiver.url, "webhook_*", "delivery_failed", filters=filters)

    replayed = [api.post(f"{WEBHOOKS}/{w['id']}/replay").json["replayed"] for w in (webhook, other)]

    assert replayed == [0, 2]


def test_an_event_that_is_deleted_before_its_attempt_is_not_sent(api, receiver, dispatcher):
    api.create(receiver.url)
    api.publish()
    dispatcher.run_until_idle()
    event = api.publish()

    api.delete(f"{EVENTS}/{event['id']}")
    dispatcher.run_until_idle()

    assert len(receiver.received) == 1


def test_deleted_event_leaves_no_trace_in_the_files(api, receiver, wall, store):
    receiver.answers(500)
    receiver.answers(500, {}, b"I got PRIVATE-DATA, thank you", times=1)
    webhook = api.create(receiver.url)
    api.publish(n=1, secret="PRIVATE-DATA" * 50)
    api.publish(n=2)
    wall(0)
    assert b"PRIVATE-DATA" in files_of(store)

    answer = api.delete(f"{EVENTS}/1")

    assert (answer.status_int, answer.body) == (204, b"")
    assert b"PRIVATE-DATA" not in files_of(store)
    assert api.get(f"{EVENTS}/1").status_int == api.delete(f"{EVENTS}/1").status_int == 404
    assert [d["eventId"] for d in api.deliveries(webhook)] == [2]
    assert api.get_webhook(webhook)["health"]["pending"] == 1
    assert json.loads(api.get(f"{WEBHOOKS}/1/latest").json["request"]["body"])["n"] == 2
    assert wall(11) == [2]


def test_deleted_text_held_by_a_reader_goes_later(api, store, maintenance):
    api.publish(secret="PRIVATE-DATA" * 50)
    with contextlib.closing(sqlite3.connect(store._path)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM events").fetchall()
        api.publish()

        assert api.delete(f"{EVENTS}/1").status_int == 204

    assert b"PRIVATE-DATA" in files_of(store)
    maintenance.run_once()
    assert b"PRIVATE-DATA" not in files_of(store)


def test_deleting_an_event_leaves_an_older_attempt_as_the_latest(api, receiver, wall):
    api.create(receiver.url)
    for n in range(3):
        api.publish(n=n)
        wall(0)

    api.delete(f"{EVENTS}/3")

    assert json.loads(api.get(f"{WEBHOOKS}/1/latest").json["request"]["body"])["n"] == 1
    assert "lastSuccess" in api.get(f"{WEBHOOKS}/1/statistics").json


def test_event_deleted_beside_a_reader_leaves_no_trace_once_the_reader_ends(
    api, store, settings, clock
):
    api.publish(secret="PRIVATE-DATA")
    maintenance = webhookd.Maintenance(store, settings, webhookd.Clock(clock, clock))

    with hanging_reader(store):
        assert api.delete(f"{EVENTS}/1").status_int == 204
        maintenance.run_once()
        assert b"PRIVATE-DATA" in files_of(store)
    maintenance.run_once()

    assert b"PRIVATE-DATA" not in files_of(store)


# ======================================================================================
# Words and forms
# ======================================================================================

NOON = 1_700_000_000_000


def test_a_share_of_successes_is_never_rounded_up_to_all():
    assert webhookd.success_rate({"SUCCESS": 9999, "ERROR": 1}) == "99.9 %"
    assert webhookd.success_rate({"SUCCESS": 3}) == "100 %"
    assert webhookd.success_rate({}) == "–"


@pytest.mark.parametrize(
    "ms, words",
    [
        (NOON, "now"),
        (NOON - 7_999, "7 s ago"),
        (NOON - 60_000, "1 min ago"),
        (NOON - 3_599_000, "59 min ago"),
        (NOON - 86_399_000, "23 h ago"),
        (NOON - 3 * 86_400_000, "3 d ago"),
        (NOON + 26 * 60_000, "in 26 min"),
    ],
)
def test_moment_is_shown_as_how_long_ago_or_ahead(ms, words):
    assert webhookd.relative(ms, NOON) == words


def health(state, **values):
    """A health as the API shows it."""
    nothing = {"reason": None, "since": None, "pausedUntil": None, "lastAttempt": None}
    return {"state": state, "consecutiveFailures": 0, "pending": 0} | nothing | values


@pytest.mark.parametrize(
    "shown, name, text",
    [
        (health("healthy"), "", ""),
        (health("healthy", since=NOON - 840_000), "", ""),
        (
            health("failing", consecutiveFailures=1, reason="503", since=NOON - 840_000, pending=1),
            "Failing for 14 min (2023-11-14 21:59:20 UTC)",
            "1 failure in a row, the last: 503. It is tried again on schedule; 1 delivery waits.",
        ),
        (
            health("paused", consecutiveFailures=7, reason="503", pausedUntil=NOON + 840_000),
            "Paused by the circuit breaker",
            "7 failures in a row, the last: 503. One delivery is tried in 14 min"
            " (2023-11-14 22:27:20 UTC); until then 0 deliveries wait. Nothing is lost.",
        ),
        (
            health("paused", reason="paused by admin", since=NOON - 259_200_000, pending=1200),
            "Paused for 3 d (2023-11-11 22:13:20 UTC)",
            "Paused by admin. 1,200 deliveries wait until somebody resumes it. Nothing is lost.",
        ),
        (
            health("disabled", reason="the receiver answered 410 Gone"),
            "Disabled",
            "The receiver answered 410 Gone. Events published meanwhile are not delivered;"
            " after activating you can replay them.",
        ),
        (
            health("inactive"),
            "Inactive",
            "Events published meanwhile are not delivered; after activating you can replay them.",
        ),
    ],
)
def test_state_of_a_webhook_is_explained_in_words(shown, name, text):
    assert webhookd.state_words(shown, NOON) == (name, text)


def test_webhooks_in_trouble_stand_first_then_the_latest_attempted():
    healths = [
        health("healthy", lastAttempt=5),
        health("healthy", lastAttempt=7),
        health("inactive", lastAttempt=9),
        health("paused", lastAttempt=9),
        health("paused", lastAttempt=1, pausedUntil=NOON),
        health("failing"),
        health("disabled"),
    ]

    ordered = sorted(healths, key=webhookd.list_order)

    assert [(h["state"], h["lastAttempt"]) for h in ordered] == [
        ("disabled", None),
        ("failing", None),
        ("paused", 1),
        ("paused", 9),
        ("inactive", 9),
        ("healthy", 7),
        ("healthy", 5),
    ]
    assert webhookd.trouble_words(healths) == (
        "1 paused, 1 failing, 1 disabled",
        "3 of 7 need attention.",
    )
    assert webhookd.trouble_words(healths[:4]) == ("Webhooks", "None needs attention.")


@pytest.mark.parametrize(
    "text, shown",
    [
        ('{"a":1.0,"b":[1e2,{}]}', '{\n  "a": 1.0,\n  "b": [\n    1e2,\n    {}\n  ]\n}'),
        ('"\\ud800"', '"\\ud800"'),
        ("no JSON", "no JSON"),
        ("[" * 100_000, "[" * 100_000),
        ("[" * 90 + "1," * 999 + "1" + "]" * 90, "[" * 90 + "1," * 999 + "1" + "]" * 90),
    ],
)
def test_json_is_indented_to_the_digit_and_other_texts_stay(text, shown):
    assert webhookd.indented(text) == shown


def test_a_long_body_is_cut_where_many_are_shown():
    _, body = webhookd.message_text("200", {"headers": {}, "body": "x" * 20_000})

    assert body == "x" * 16_384 + "\n… 20,000 characters in all, the API has them"


def test_a_body_that_is_too_long_for_a_page_is_left_out_of_the_curl_command():
    attempt = webhookd.Attempt(0, 0, "http://h/", "A: b\r\n", "SUCCESS", "200")

    command = webhookd.curl_command(attempt, "x" * 200_000)

    assert len(command) < 200
    assert "cat body.json | \\\n  curl --globoff http://h/ --data-binary @- " in command


def test_the_settings_are_put_into_words_without_secrets():
    fields = {
        "url": "http://h/",
        "events": ["a", "b_*"],
        "configuration": {"secret": "s", "k": "v"},
        "credentials": {"username": "u", "password": "p"},
        "headers": {"X-A": "1", "X-B": "2"},
        "rateLimit": 2.5,
        "ordered": True,
        "sslVerificationRequired": False,
    }
    webhook = webhookd.read_webhook(fields, webhookd.Webhook()).as_json(whole_url=True)

    assert webhookd.settings_in_words(webhook) == {
        "Events": "a, b_*",
        "Signed": "yes, with its secret",
        "Login": "u (password hidden)",
        "Headers": "X-A, X-B",
        "Ordered": "one delivery at a time, in publish order",
        "Rate limit": "2.5 a second",
        "TLS": "certificates are not verified",
        "Configuration": '{\n  "k": "v"\n}',
    }


@pytest.mark.parametrize(
    "state, active, paused, breaks, first, others",
    [
        ("healthy", True, False, False, "Test", {"Pause", "Deactivate"}),
        ("failing", True, False, False, "Test", {"Pause", "Deactivate"}),
        ("paused", True, False, True, "Resume", {"Pause", "Deactivate"}),
        ("paused", True, True, False, "Resume", {"Deactivate"}),
        ("inactive", False, False, False, "Activate", {"Pause"}),
        ("disabled", False, False, False, "Activate", {"Pause"}),
        ("inactive", False, True, False, "Activate", {"Resume"}),
    ],
)
def test_the_first_button_is_what_the_state_calls_for(state, active, paused, breaks, first, others):
    shown = health(state, pausedUntil=NOON if breaks else None)

    labels = webhookd.buttons({"active": active, "paused": paused, "health": shown})

    always = {"Test", "Edit", "Redeliver failed", "Replay"}
    assert labels[0] == first
    assert set(labels) == always | {first} | others
    assert len(labels) == len(set(labels))


def read_form(old=webhookd.Webhook(), **fields):
    """The fields that a form changes, and the faults in it by field."""
    form = webhookd.form_of(old) | fields
    form = {name: value for name, value in form.items() if value}
    given, faults = webhookd.form_fields(form, old)
    return given, webhookd.faults_by_field(faults)


def test_a_form_that_nobody_touched_changes_nothing():
    fields = {
        "url": "http://u:p@h/",
        "events": ["a", "b_*"],
        "configuration": {"secret": "s", "k": "v"},
        "credentials": {"username": "u", "password": "p"},
        "headers": {"X-A": "1", "X-B": "2"},
        "filters": {"a.b": [1, "x"]},
        "template": {"text": "{{a}}"},
        "rateLimit": 2.5,
        "ordered": True,
        "sslVerificationRequired": False,
        "active": False,
    }
    webhook = dataclasses.replace(
        webhookd.read_webhook(fields, webhookd.Webhook()), id=1, template=fields["template"]
    )

    assert read_form(webhook) == ({}, {})


@pytest.mark.parametrize(
    "typed, field, value",
    [
        ({"events": " a ,b\r\n\r\nc_*"}, "events", ["a", "b", "c_*"]),
        ({"events": "page created, x"}, "events", ["page created", "x"]),
        ({"headers": "X-A: b: c\r\n\r\n x-d:e"}, "headers", {"X-A": "b: c", "x-d": "e"}),
        ({"filters": '{"a": [1, null]}'}, "filters", {"a": [1, None]}),
        ({"template": '"{{a}}"'}, "template", "{{a}}"),
        ({"rateLimit": " 2.5 "}, "rateLimit", 2.5),
        ({"username": "u"}, "credentials", {"username": "u", "password": ""}),
        ({"username": "u", "password": "p"}, "credentials", {"username": "u", "password": "p"}),
        ({"password": "p"}, "credentials", {"username": "", "password": "p"}),
        ({"secret": "s"}, "configuration", {"secret": "s"}),
        ({"ordered": "on"}, "ordered", True),
        ({"active": ""}, "active", False),
        ({"sslVerificationRequired": ""}, "sslVerificationRequired", False),
    ],
)
def test_fields_of_a_form_become_fields_of_the_api(typed, field, value):
    fields, faults = read_form(**typed)

    assert (fields[field], faults) == (value, {})


@pytest.mark.parametrize(
    "field, text, message",
    [
        ("headers", "X-A", "X-A is not of the form Name: value"),
        ("headers", "X-A: 1\nX-A: 2", "X-A is there twice"),
        ("filters", "{a}", "what stands here is not valid JSON"),
        ("template", "Backup of {{host}}", "what stands here is not valid JSON"),
        ("template", '"\\ud800"', "what stands here holds half a surrogate pair"),
        ("rateLimit", "many", "what stands here is not valid JSON"),
    ],
)
def test_unreadable_field_of_a_form_is_a_fault_of_that_field(field, text, message):
    _, faults = read_form(**{field: text})

    assert list(faults) == [field]
    assert message in faults[field][0]


def test_fault_inside_a_field_names_the_inner_field():
    faults = [
        webhookd.Fault("configuration.secret", "1"),
        webhookd.Fault("credentials.username", "2"),
        webhookd.Fault("headers.Host", "3"),
        webhookd.Fault("url", "4"),
        webhookd.Fault(None, "5"),
    ]

    assert webhookd.faults_by_field(faults) == {
        "secret": ["1"],
        "username": ["2"],
        "headers": ["Host: 3"],
        "url": ["4"],
        "": ["5"],
    }


# ======================================================================================
# Pages
# ======================================================================================

HTML = {"HTTP_ACCEPT": "text/html,application/xhtml+xml,*/*;q=0.8"}
HOSTILE = "</pre></title><script>alert(1)</script>\"'><img src=x> {{1}} & \u202e"


@pytest.fixture
def browser(wsgi):
    return App(wsgi, extra_environ=dict(HTML)).log_in("admin")


def press(page, button):
    """Where a button of a page leads."""
    [form] = [f for f in page.forms.values() if f">{button}</button>" in f.text]
    answer = form.submit()
    return answer.follow() if answer.status_int == 303 else answer


def fill_in(page, **fields):
    """Fill in the form of a page and send it."""
    for name, value in fields.items():
        page.form[name] = value
    answer = page.form.submit()
    return answer.follow() if answer.status_int == 303 else answer


def fill_in_only(page, **fields):
    """The form of a page, filled in."""
    for name, value in fields.items():
        page.form[name] = value
    return page.form


def words(page):
    """The text of a page, with single spaces."""
    return " ".join(page.html.body.get_text(" ").split())


def attempted(api, receiver, dispatcher, **fields):
    """A webhook with a delivery that was attempted; both, as the API shows them."""
    webhook = api.create(receiver.url, **fields)
    api.publish(text=HOSTILE)
    dispatcher.run_until_idle()
    return webhook, api.deliveries(webhook)[0]


# ---- reading ----


def test_the_list_shows_how_each_webhook_fares(browser, receiver, dispatcher):
    receiver.answers(500, times=1)
    attempted(browser, receiver, dispatcher, name="first")
    browser.create("http://127.0.0.1:1/", *"abcde", name="second", active=False)

    page = browser.get("/")

    rows = [" ".join(r.get_text(" ").split()) for r in page.html.tbody.find_all("tr")]
    host = receiver.url.split("/")[2]
    assert rows[0].startswith(f"first {host} · e 0 % · 1 waiting failing 500")
    assert rows[1].startswith("second 127.0.0.1:1 · a, b, c +2 – · 0 waiting inactive")
    assert "1 of 2 needs attention. All 2 1 failing 1 inactive" in words(page)
    assert page.html.title.get_text() == "1 failing – webhookd"
    assert press(page, "New webhook").html.h1.get_text() == "New webhook"


def test_list_shows_the_webhooks_of_one_state(browser, receiver, dispatcher):
    receiver.answers(500, times=1)
    attempted(browser, receiver, dispatcher, name="first")
    browser.create("http://127.0.0.1:1/", name="second")

    page = browser.get("/").click("1 healthy")

    assert [row.strong.get_text() for row in page.html.tbody.find_all("tr")] == ["second"]
    assert page.html.nav.find_next("nav").find(attrs={"aria-current": "page"}).get_text() == (
        "1 healthy"
    )
    assert browser.get("/?state=good").status_int == 400


def test_an_empty_list_says_how_to_begin(browser, api):
    page = browser.get("/")

    assert "No webhooks yet." in words(page)
    assert "curl -u admin http://localhost:80/rest/api/webhooks --json" in words(page)
    assert page.html.table is None


def test_an_empty_list_gives_a_viewer_no_button(browser):
    page = browser.log_in("viewer").get("/")

    assert "No webhooks yet." in words(page)
    assert page.html.button is None


def test_the_list_comes_in_parts_and_asks_the_database_once(browser, store):
    for n in range(5):
        browser.create("http://127.0.0.1:1/", name=f"number {n}")
    statements = []

    store.reader().set_trace_callback(statements.append)
    page = browser.get("/?start=2&limit=2")

    assert len([s for s in statements if "statistics" in s]) == 1
    assert re.findall(r"number \d", words(page)) == ["number 2", "number 3"]
    assert "number 4" in words(page.click("Next"))
    assert "number 0" in words(page.click("Previous"))


def test_a_webhook_is_shown_with_its_figures(browser, receiver, dispatcher, clock):
    receiver.answers(500, times=2)
    attempted(browser, receiver, dispatcher, headers={"X-A": "my-key"}, name="n")
    clock.advance(86_400)
    dispatcher.run_until_idle()
    clock.advance(86_400)
    dispatcher.run_until_idle()

    page = browser.get("/webhooks/1")

    text = words(page)
    assert "Success, 30 days 33.3 % Attempts 3 Failures 2 Errors 0 Waiting 0" in text
    assert "At most 1 a day 1 succeeded 2 failed 0 without an answer" in text
    assert "17 Oct 16 Nov" in text
    assert len(page.html.svg.find_all("rect")) == 3
    assert page.html.svg["aria-label"] == (
        "At most 1 attempts a day. 14 Nov: 1 FAILURE; 15 Nov: 1 FAILURE; 16 Nov: 1 SUCCESS"
    )
    assert "my-key" not in page.text
    assert "Created 2 d ago 2023-11-14 22:13:20 UTC" in text
    assert page.html.title.get_text() == "n (healthy) – webhookd"


def kept(page, **fields):
    """The page with its filters set to these, and the others empty."""
    form = page.forms[len(page.forms) - 1]
    for name in filter(None, form.fields):
        form[name] = fields.get(name, "")
    return form.submit()


def rows(page):
    """What the rows of a page's table say."""
    return [" ".join(tr.get_text(" ").split()) for tr in page.html.table.tbody.find_all("tr")]


def test_deliveries_of_a_webhook_are_filtered_and_come_in_parts(browser, receiver, wall, clock):
    receiver.answers(400, times=3)
    browser.create(receiver.url, "e", "f")
    publish_numbers(browser, *range(60))
    wall(0)
    browser.publish("f", n=0)
    clock.advance(3600)
    browser.publish("f", n=0)

    page = browser.get("/webhooks/1")

    assert (len(rows(page)), len(rows(page.click("Next")))) == (50, 12)
    assert "1 to 50 of 62 deliveries" in words(page)
    assert len(rows(kept(page, state="pending"))) == 5
    assert len(rows(kept(page, outcome="FAILURE"))) == 3
    assert len(rows(kept(page, event="f"))) == 2
    assert len(rows(kept(page, event="f", since="2023-11-14 23:00"))) == 1
    assert len(rows(kept(page, event="f", until="2023-11-14 23:00"))) == 1
    none = kept(page, state="failed", event="f")
    assert "No delivery is like that." in words(none)
    form = none.forms[len(none.forms) - 1]
    assert (form["state"].value, form["event"].value) == ("failed", "f")


def test_a_webhook_without_deliveries_says_so(browser):
    browser.create("http://127.0.0.1:1/")

    assert "No delivery yet." in words(browser.get("/webhooks/1"))


def test_a_delivery_that_waits_shows_its_next_attempt(browser, receiver, wall):
    receiver.answers(500, times=1)
    browser.create(receiver.url)
    publish_numbers(browser, 1)
    wall(0)

    page = browser.get("/webhooks/1")

    assert "pending 500" in rows(page)[0]
    assert "in 10 s" in rows(page)[0]


def test_events_are_listed_with_the_states_of_their_deliveries(browser, receiver, wall, clock):
    receiver.answers(410, times=1)
    for _ in range(2):  # either may get the 410
        browser.create(receiver.url, "a", "b")
    for event in ("a", "b", "c"):
        browser.publish(event, n=event)
        wall(0)
    clock.advance(150)

    page = browser.get("/events?event=a&event=b&event=c")

    assert [re.sub(r"#\d+ ", "", row) for row in rows(page)] == [
        "c 2 min ago 2 min ago no webhook wanted it",
        "b 2 min ago 2 min ago 1 succeeded",
        "a 2 min ago 2 min ago 1 failed 1 succeeded",
    ]
    assert [row[0] for row in rows(kept(page, event="b"))] == ["b"]
    assert "No event is like that." in words(kept(page, since="2023-11-15"))
    assert "3 events" in words(page)


def test_events_are_filtered_by_their_payload(browser):
    for n in range(3):
        browser.publish("e", user={"id": n})

    page = kept(browser.get("/events"), where="user.id:1")

    assert [row.split()[1] for row in rows(page)] == ["#2"]
    assert page.forms[0]["where"].value == "user.id:1"
    assert kept(page, where="nothing").status_int == 400


def test_a_search_that_has_not_looked_at_all_goes_on(browser, monkeypatch):
    monkeypatch.setattr(webhookd, "SEARCHED_EVENTS", 500)
    monkeypatch.setattr(webhookd, "SEARCH_STEP", 500)
    browser.post_json(EVENTS, [{"event": "e", "n": n % 600} for n in range(1000)])

    page = kept(browser.get("/events"), where="n:1")

    assert [row.split()[1] for row in rows(page)] == ["#602"]
    assert [row.split()[1] for row in rows(page.click("Next"))] == ["#2"]


def test_an_event_is_shown_with_its_payload_and_deliveries(browser, receiver, dispatcher):
    _, delivery = attempted(browser, receiver, dispatcher, name="target")

    page = browser.get("/events").click("#1")

    assert page.html.pre.get_text().startswith('{\n  "timestamp": 1700000000000,\n  "event": "e"')
    assert "1 delivery" in words(page)
    assert "target" in rows(page)[0] and "succeeded 200" in rows(page)[0]
    assert page.click("target").request.path == f"/deliveries/{delivery['id']}"


def test_an_event_that_nobody_wanted_says_so(browser):
    browser.publish("e")

    page = browser.get("/events/1")

    assert "No webhook wanted it." in words(page)
    assert "Redeliver" not in words(page)


def test_a_delivery_is_shown_with_every_request_and_response(browser, receiver, dispatcher, clock):
    receiver.answers(503, {"X-Why": "busy"}, b'{"not":1.0}', times=1)
    _, delivery = attempted(browser, receiver, dispatcher)
    clock.advance(11)
    dispatcher.run_until_idle()

    page = browser.get(f"/deliveries/{delivery['id'].upper()}")

    text = words(page)
    assert "Delivery of e succeeded" in text
    assert "2 attempts Attempt 2 200" in text and "Attempt 1 503" in text
    assert "X-Attempt: 1" in text and "X-Attempt: 2" in text
    assert "X-Why: busy" in text
    assert '{\n  "not": 1.0\n}' in [pre.get_text() for pre in page.html.find_all("pre")]
    assert f"POST {receiver.url}" in text
    assert "11 s ago 2023-11-14 22:13:20 UTC" in text
    opened = [details.has_attr("open") for details in page.html.find_all("details")]
    assert opened == [True, False]
    assert page.click("e #1").request.path == "/events/1"


def test_last_of_many_attempts_are_shown(browser, receiver, dispatcher):
    _, delivery = attempted(browser, receiver, dispatcher)
    path = f"/deliveries/{delivery['id']}"
    for _ in range(24):
        press(browser.get(path), "Redeliver")
        dispatcher.run_until_idle()

    page = browser.get(path)

    assert "25 attempts, the last 20 are here" in words(page)
    summaries = [tag.strong.get_text() for tag in page.html.find_all("summary")]
    assert summaries == [f"Attempt {number}" for number in range(25, 5, -1)]


def test_an_attempt_without_an_answer_says_why(browser, closed_url, dispatcher):
    webhook = browser.create(closed_url)
    browser.publish()
    dispatcher.run_until_idle()

    text = words(browser.get(f"/deliveries/{browser.deliveries(webhook)[0]['id']}"))

    assert "Attempt 1 no answer connection refused" in text
    assert "Next attempt in 10 s 2023-11-14 22:13:30 UTC, after 1 attempt." in text


def test_a_delivery_that_was_given_up_says_so(browser, receiver, dispatcher):
    receiver.answers(410)
    _, delivery = attempted(browser, receiver, dispatcher)

    page = browser.get(f"/deliveries/{delivery['id']}")

    assert "Given up after 1 attempt It is kept, and can be redelivered." in words(page)


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_curl_command_sends_the_same_request(browser, receiver, dispatcher):
    secrets = {"headers": {"X-Key": "hidden"}}
    secrets["configuration"] = {"secret": "s"}
    receiver.url += "?a=[1-2]&b='c'"
    _, delivery = attempted(browser, receiver, dispatcher, **secrets)

    page = browser.get(f"/deliveries/{delivery['id']}")
    command = page.html.find_all("pre")[-1].get_text()
    subprocess.run(["sh", "-c", command], check=True, capture_output=True)

    first, again = receiver.received
    assert (again.path, again.body) == (first.path, first.body)
    assert again.headers == first.headers | {"X-Key": "********"}


# ---- changing ----


def test_a_webhook_is_created_with_the_form(browser, receiver):
    page = browser.get("/webhooks/new")

    page = fill_in(
        page,
        name="n",
        url=f" {receiver.url}",
        events="a, b\r\nc_*\n",
        secret="s",
        ordered=True,
        rateLimit="2.5",
    )

    assert page.html.h1.get_text() == "n"
    shown = browser.get(f"{WEBHOOKS}/1").json
    assert (shown["url"], shown["events"]) == (receiver.url, ["a", "b", "c_*"])
    assert shown["secretSet"] and shown["active"] and shown["sslVerificationRequired"]
    assert (shown["ordered"], shown["rateLimit"]) == (True, 2.5)


def test_a_name_left_out_is_the_host_of_the_url(browser, receiver):
    fill_in(browser.get("/webhooks/new"), url=receiver.url, events="e")

    assert browser.get(f"{WEBHOOKS}/1").json["name"] == receiver.url.removesuffix("/hook")


def test_faults_stand_beside_their_fields_and_the_input_stays(browser):
    page = fill_in(
        browser.get("/webhooks/new"),
        name=HOSTILE,
        url="http://10.0.0.1/",
        events="good, b@d, b!d, page created",
        secret="my-secret",
        active=False,
        rateLimit="many",
    )

    def described(name):
        field = page.html.find(id=name)
        assert field["aria-invalid"] == "true"
        return page.html.find(id=field["aria-describedby"].split()[1]).get_text()

    assert page.status_int == 400
    assert "10.0.0.1 is not a public address" in described("url")
    assert described("events").startswith('"b@d" must be 1 to 64 characters')
    assert '; "b!d" must be' in described("events")
    assert '; "page created" must be' in described("events")
    assert described("rateLimit").startswith("what stands here is not valid JSON")
    assert "Nothing was saved: 3 fields to mend." in words(page)
    assert page.html.find(autofocus=True)["id"] == "url"
    form = page.form
    assert (form["name"].value, form["url"].value) == (HOSTILE, "http://10.0.0.1/")
    assert form["events"].value == "good, b@d, b!d, page created"
    assert (form["secret"].value, form["active"].checked) == ("my-secret", False)
    assert page.html.find("details", class_="card").has_attr("open")
    assert browser.get(WEBHOOKS).json["totalCount"] == 0


@pytest.mark.parametrize("field", ["url", "events"])
def test_form_asks_for_required_fields(browser, field):
    page = browser.get("/webhooks/new").form.submit()

    assert page.html.find(id=f"{field}-fault").get_text() == "is needed"


def test_form_changes_only_the_edited_fields(browser, receiver, dispatcher, store):
    receiver.answers(500)
    url = receiver.url.replace("http://", "http://u:pass@")
    browser.create(url, configuration={"secret": "s", "k": "v"}, rateLimit=5)
    browser.publish()
    dispatcher.run_until_idle()
    before = store.webhooks.get(1)

    fill_in(press(browser.get("/webhooks/1"), "Edit"), name="new")

    assert store.webhooks.get(1) == dataclasses.replace(before, name="new")
    assert store.health[1].failures == 1


def test_a_new_form_has_a_fresh_secret(browser, receiver, store):
    first, second = browser.get("/webhooks/new"), browser.get("/webhooks/new")

    page = fill_in(first, url=receiver.url, events="e")

    secret = store.webhooks.get(1).secret
    assert secret == first.form["secret"].value != second.form["secret"].value
    assert re.fullmatch(r"whsec_[A-Za-z0-9+/]{32}", secret)
    assert secret not in page and secret not in browser.get("/webhooks/1/edit")


def test_a_secret_is_changed_and_removed_but_never_shown(browser, store):
    browser.create("http://127.0.0.1:1/", configuration={"secret": "old-secret"})

    page = browser.get("/webhooks/1/edit")
    assert "old-secret" not in page.text
    fill_in(page, secret="new-secret")
    assert store.webhooks.get(1).secret == "new-secret"
    fill_in(browser.get("/webhooks/1/edit"), removeSecret=True)
    assert store.webhooks.get(1).secret is None
    assert "Remove the secret" not in browser.get("/webhooks/1/edit").text


def test_the_form_has_all_that_the_api_has(browser, receiver):
    fill_in(
        browser.get("/webhooks/new"),
        url=receiver.url,
        events="e",
        username="u",
        password="hidden-password",
        headers="X-A: hidden-value\nX-B: 2",
        filters='{"a.b": [1, "x"]}',
        template='{"text": "{{a}} is down"}',
        sslVerificationRequired=False,
    )

    shown = browser.get(f"{WEBHOOKS}/1").json
    assert shown["credentials"] == {"username": "u"}
    assert shown["headers"] == {"X-A": "********", "X-B": "********"}
    assert shown["filters"] == {"a.b": [1, "x"]}
    assert shown["template"] == {"text": "{{a}} is down"}
    assert shown["sslVerificationRequired"] is False
    page = browser.get("/webhooks/1/edit")
    assert page.form["headers"].value == "X-A: ********\nX-B: ********\n"
    assert "hidden-" not in page.text


def test_a_form_sent_twice_acts_once(browser, receiver):
    page = browser.get("/webhooks/new")

    first = fill_in(page, url=receiver.url, events="e", name="n")
    again = page.form.submit().follow()

    assert browser.get(WEBHOOKS).json["totalCount"] == 1
    assert first.request.path == again.request.path == "/webhooks/1"


def test_two_forms_sent_at_once_act_once(browser, receiver):
    form = fill_in_only(browser.get("/webhooks/new"), url=receiver.url, events="e")

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: form.submit().status_int, range(4)))

    assert answers == [303] * 4
    assert browser.get(WEBHOOKS).json["totalCount"] == 1


def test_a_form_sent_again_with_something_else_asks(browser, receiver):
    page = browser.get("/webhooks/new")
    fill_in(page, url=receiver.url, events="e", name="n")

    asked = fill_in(page, name="other")

    assert asked.status_int == 409
    assert "this form was sent before, and saved the webhook n" in words(asked)
    assert browser.get(WEBHOOKS).json["totalCount"] == 1
    fill_in(asked)
    assert browser.get(f"{WEBHOOKS}/2").json["name"] == "other"


def test_a_form_may_be_sent_again_after_a_fault(browser, receiver):
    faulty = fill_in(browser.get("/webhooks/new"), url=receiver.url)

    fill_in(faulty, events="e")

    assert browser.get(WEBHOOKS).json["totalCount"] == 1


def test_form_says_if_somebody_else_changed_the_webhook_first(browser, clock):
    webhook = browser.create("http://127.0.0.1:1/", name="n")
    page = browser.get("/webhooks/1/edit")
    clock.advance(1)
    browser.put_json(f"{WEBHOOKS}/1", {"name": "theirs"})

    stale = fill_in(page, events="mine")

    assert stale.status_int == 409
    assert "what differs from it now: name, events" in words(stale)
    assert browser.get_webhook(webhook)["name"] == "theirs"
    fill_in(stale)
    assert browser.get_webhook(webhook)["name"] == "n"
    assert browser.get_webhook(webhook)["events"] == ["mine"]


def test_a_change_in_the_same_moment_is_not_overwritten(wsgi, store, address_policy, clock):
    api = App(wsgi).log_in("admin")
    webhook = api.create("http://127.0.0.1:1/")
    before = store.webhooks.get(1).updated
    clock.advance(1)
    api.put_json(f"{WEBHOOKS}/1", {"name": "theirs"})

    stale = webhookd.Api(store, None, address_policy, None, clock)
    with pytest.raises(webhookd.Conflict):
        stale.change(1, {"name": "mine"}, unless_changed_since=before)

    assert api.get_webhook(webhook)["name"] == "theirs"


def test_a_webhook_is_paused_and_resumed(browser):
    webhook = browser.create("http://127.0.0.1:1/")

    page = press(browser.get("/webhooks/1"), "Pause")
    assert browser.get_webhook(webhook)["paused"] is True
    assert "Paused by admin. 0 deliveries wait until somebody resumes it." in words(page)
    page = press(page, "Resume")
    assert browser.get_webhook(webhook)["paused"] is False
    assert "Nothing is lost" not in words(page)


def test_a_webhook_is_deactivated_and_activated(browser):
    webhook = browser.create("http://127.0.0.1:1/")

    page = press(browser.get("/webhooks/1"), "Deactivate")
    assert browser.get_webhook(webhook)["health"]["state"] == "inactive"
    assert "Events published meanwhile are not delivered" in words(page)
    page = press(page, "Activate")
    assert browser.get_webhook(webhook)["health"]["state"] == "healthy"
    assert "published meanwhile" not in words(page)


@pytest.mark.parametrize("by", ["button", "form"])
def test_activating_an_inactive_webhook_offers_what_it_missed(browser, receiver, wall, clock, by):
    browser.create(receiver.url)
    publish_numbers(browser, 1)
    press(browser.get("/webhooks/1"), "Deactivate")
    clock.advance(60)
    publish_numbers(browser, 2, 3)
    clock.advance(60)

    page = browser.get("/webhooks/1")
    by_form = by == "form"
    page = fill_in(press(page, "Edit"), active=True) if by_form else press(page, "Activate")
    assert "2 events were published meanwhile and not delivered." in words(page)
    page = press(page, "Replay 2 events")

    assert "2 deliveries are due." in words(page)
    assert sorted(wall(0)) == [1, 2, 3]


def test_activating_a_disabled_webhook_offers_what_it_missed(browser, receiver, wall, clock):
    browser.create("http://127.0.0.1:1/", "other")
    browser.create(receiver.url, name="n")
    publish_numbers(browser, 0)
    receiver.answers(410, times=1)
    wall(0)
    clock.advance(60)
    publish_numbers(browser, 1)

    page = press(browser.get("/webhooks/2"), "Activate")
    assert "1 event was published meanwhile and not delivered." in words(page)
    press(page, "Replay 1 event")

    assert wall(0) == [1]


def test_a_replay_asks_since_when_and_counts_first(browser, receiver, wall, clock):
    publish_numbers(browser, 1)
    clock.advance(3600)
    publish_numbers(browser, 2, 3)
    browser.create(receiver.url)

    asked = press(browser.get("/webhooks/1"), "Replay")
    counted = fill_in(asked, since="2023-11-14 23:00")
    assert "2 events were published since and not delivered." in words(counted)
    assert wall(0) == []
    publish_numbers(browser, 4)
    assert wall(0) == [4]
    press(counted, "Replay 2 events")

    assert sorted(wall(0)) == [2, 3]


def test_a_replay_of_nothing_and_since_never_says_so(browser, receiver):
    browser.create(receiver.url)

    asked = press(browser.get("/webhooks/1"), "Replay")

    assert "It has got every event" in words(fill_in(asked, since="2023-11-14"))
    fault = fill_in(asked, since="yesterday")
    assert fault.status_int == 400
    assert "ISO 8601" in fault.html.find(id="fault").get_text()
    assert fault.form["since"].value == "yesterday"


def test_a_test_shows_what_was_sent_and_what_came_back(browser, receiver, closed_url):
    receiver.answers(418, {"X-Tea": "pot"}, HOSTILE.encode())
    browser.create(receiver.url)
    browser.create(closed_url)

    page = press(browser.get("/webhooks/1"), "Test")
    assert '{ "test": true }' in words(page)
    assert "It failed: 418 The receiver did not take the test after" in words(page)
    assert "X-Tea: pot" in words(page)
    page = press(browser.get("/webhooks/2"), "Test")
    assert "It failed: connection refused The receiver did not answer" in words(page)
    receiver.answers(204)
    page = press(browser.get("/webhooks/1"), "Test")
    assert "It works: 204 The receiver took the test after" in words(page)


def test_failed_deliveries_are_redelivered_all_or_one(browser, receiver, wall):
    fail_three_and_succeed_once(browser, receiver, wall)

    page = press(browser.get("/webhooks/1"), "Redeliver failed")
    assert "3 deliveries are due." in words(page)
    assert len(wall(0)) == 3
    delivery = browser.deliveries({"id": 1})[0]
    page = press(browser.get(f"/deliveries/{delivery['id']}"), "Redeliver")
    assert "Next attempt now" in words(page)
    press(page, "Attempt now")
    assert len(wall(0)) == 1


def test_an_event_is_redelivered_to_all(browser, receiver, wall):
    for _ in range(2):
        browser.create(receiver.url)
    publish_numbers(browser, 7)
    wall(0)

    press(browser.get("/events/1"), "Redeliver")

    assert wall(0) == [7, 7]


def test_deleting_an_event_asks_first(browser, receiver, dispatcher):
    attempted(browser, receiver, dispatcher)

    asked = press(browser.get("/events/1"), "Delete")
    assert "Its payload and 1 delivery goes with it." in words(asked)
    assert browser.get(f"{EVENTS}/1").status_int == 200
    page = press(asked, "Delete")

    assert page.request.path == "/events"
    assert browser.get(f"{EVENTS}/1").status_int == 404


def test_deleting_a_webhook_asks_first(browser):
    browser.create("http://127.0.0.1:1/", name="n")

    asked = press(browser.get("/webhooks/1"), "Delete")
    assert browser.get(WEBHOOKS).json["totalCount"] == 1
    assert asked.click("Keep it").html.h1.get_text() == "n"
    page = press(asked, "Delete")
    assert browser.get(WEBHOOKS).json["totalCount"] == 0
    assert "No webhooks yet." in words(page)


def test_deleting_a_webhook_says_what_goes_with_it(browser, receiver, wall):
    receiver.answers(500, times=1)
    browser.create(receiver.url)
    publish_numbers(browser, 1, 2)
    wall(0)

    asked = browser.get("/webhooks/1/delete")

    assert "2 deliveries go with it, 1 of them still waiting." in words(asked)


def test_webhook_paused_after_failures_is_resumed(browser, receiver, wall):
    receiver.answers(500, times=5)
    webhook = browser.create(receiver.url)
    publish_numbers(browser, *range(8))
    wall(0)
    waiting = browser.deliveries(webhook)[0]
    assert "Next attempt in 10 s" in words(browser.get(f"/deliveries/{waiting['id']}"))
    assert "in 10 s" in rows(browser.get("/webhooks/1"))[0]

    press(browser.get("/webhooks/1"), "Resume")

    assert sorted(wall(0)) == [0, 1, 2, 3, 4, 5, 6, 7]


def test_changes_by_pages_are_logged_as_those_by_the_api(browser, receiver, caplog):
    caplog.set_level("INFO")
    fill_in(browser.get("/webhooks/new"), url=receiver.url, events="e")
    press(browser.get("/webhooks/1"), "Pause")
    press(browser.get("/webhooks/1"), "Deactivate")
    press(browser.get("/webhooks/1"), "Test")
    press(browser.get("/webhooks/1/delete"), "Delete")

    lines = [line for line in caplog.messages if line.startswith("webhook ")]
    verbs = [line.split()[1] for line in lines]
    assert verbs == ["created", "paused", "deactivated", "tested", "deleted"]
    assert all("id=1" in line and "by=admin" in line for line in lines)


# ---- who may, and what is safe ----

PAGES = [
    ("GET", "/", "admin viewer"),
    ("GET", "/webhooks/1", "admin viewer"),
    ("GET", "/deliveries/1", "admin viewer"),
    ("GET", "/webhooks/new", "admin"),
    ("POST", "/webhooks/new", "admin"),
    ("GET", "/webhooks/1/edit", "admin"),
    ("POST", "/webhooks/1/edit", "admin"),
    ("GET", "/webhooks/1/delete", "admin"),
    ("POST", "/webhooks/1/delete", "admin"),
    ("POST", "/webhooks/1/test", "admin"),
    ("POST", "/webhooks/1/pause", "admin"),
    ("POST", "/webhooks/1/resume", "admin"),
    ("POST", "/webhooks/1/activate", "admin"),
    ("POST", "/webhooks/1/deactivate", "admin"),
    ("POST", "/webhooks/1/redeliver", "admin"),
    ("GET", "/webhooks/1/replay", "admin"),
    ("POST", "/webhooks/1/replay", "admin"),
    ("POST", "/deliveries/1/redeliver", "admin"),
    ("GET", "/events", "admin viewer"),
    ("GET", "/events/1", "admin viewer"),
    ("GET", "/events/1/delete", "admin"),
    ("POST", "/events/1/delete", "admin"),
    ("POST", "/events/1/redeliver", "admin"),
]


@pytest.mark.parametrize("method, path, allowed", PAGES)
def test_roles_may_use_the_pages_that_are_for_them(browser, method, path, allowed):
    for role in webhookd.ROLES:
        answer = browser.log_in(role).request(path, method=method)
        refused = answer.status_int == 403 and f"the role {role} may not" in answer
        assert refused == (role not in allowed.split()), role


def test_every_page_asks_for_a_login(wsgi):
    browser = App(wsgi, extra_environ=dict(HTML))
    for method, path, _ in PAGES:
        answer = browser.request(path, method=method)
        assert (answer.status_int, answer.content_type) == (401, "text/html")
        assert answer.headers["WWW-Authenticate"] == 'Basic realm="webhookd"'
    asked = {
        wsgi.match({"PATH_INFO": path, "REQUEST_METHOD": method})[0].rule + method
        for method, path, _ in PAGES[1:]
    }
    pages = {r.rule + r.method for r in wsgi.routes if r.rule.startswith(PAGE_PATHS)}
    assert pages - asked == {"/favicon.icoGET"}


@pytest.mark.parametrize("token", [None, "", "ä", "0" * 64])
def test_a_form_without_its_token_is_refused(browser, token):
    browser.create("http://127.0.0.1:1/")
    form = {} if token is None else {"token": token}

    answer = browser.post("/webhooks/1/delete", form)

    assert (answer.status_int, answer.content_type) == (403, "text/html")
    assert browser.get(WEBHOOKS).json["totalCount"] == 1


def test_a_token_is_its_users_own_and_outlives_a_restart(browser, store):
    browser.create("http://127.0.0.1:1/")
    page = browser.get("/webhooks/1")
    other = webhookd.User("other", "admin", webhookd.secret_record("x"))
    store.write(lambda batch: webhookd.save_user(batch.connection, other))

    again = browser.get("/webhooks/1")
    browser.authorization = ("Bearer", "x")

    assert page.forms[0]["token"].value == again.forms[0]["token"].value
    assert page.forms[0].submit().status_int == 403


def test_a_form_that_another_site_sends_is_refused(browser):
    browser.create("http://127.0.0.1:1/")
    form = browser.get("/webhooks/1/delete").form

    answer = form.submit(headers={"Origin": "http://evil.example"})

    assert (answer.status_int, answer.content_type) == (403, "text/html")


@pytest.mark.parametrize(
    "body, kind, status",
    [
        (b"{}", "application/json", 415),
        (b"a=b", "application/x+json", 415),
        (b"x", "text/plain", 415),
        (b"token=%ff", "application/x-www-form-urlencoded", 400),
        (b"a=&" * 101, "application/x-www-form-urlencoded", 400),
        (b"a" * (2 << 20), "application/x-www-form-urlencoded", 413),
    ],
)
def test_request_that_is_no_form_is_refused(browser, body, kind, status):
    answer = browser.request("/webhooks/new", method="POST", body=body, content_type=kind)

    assert (answer.status_int, answer.content_type) == (status, "text/html")


def test_a_viewer_sees_everything_and_can_press_nothing(browser, receiver, dispatcher):
    _, delivery = attempted(browser, receiver, dispatcher)
    browser.log_in("viewer")

    for path in ("/", "/webhooks/1", "/events", "/events/1", f"/deliveries/{delivery['id']}"):
        page = browser.get(path)
        assert page.status_int == 200
        assert {button.get_text() for button in page.html.find_all("button")} <= {"Show"}
        assert page.html.find("form", method="post") is None
        assert not page.html.find("a", href=re.compile("new|edit|delete"))
    assert browser.get("/webhooks/new").status_int == 403


def test_a_viewer_sees_no_path_of_a_url(browser, receiver, dispatcher):
    receiver.url += "/SECRET-PATH?key=SECRET-KEY"
    echo = {"Location": receiver.url, "X-Path": "/hook/SECRET-PATH"}
    receiver.answers(302, echo, receiver.url.replace("/", "\\/").encode())
    _, delivery = attempted(browser, receiver, dispatcher, name="n")
    paths = ("/", "/webhooks/1", "/events", "/events/1", f"/deliveries/{delivery['id']}")
    assert "SECRET-PATH" in browser.get(paths[-1])

    for path in paths:
        page = browser.log_in("viewer").get(path)
        assert page.status_int == 200
        assert "SECRET" not in page, path
    host = receiver.url.split("/")[2]
    assert f"POST http://{host}/…" in page
    assert f"curl --globoff 'http://{host}/…'" in words(page)


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", "/webhooks/9", 404),
        ("GET", "/webhooks/x", 404),
        ("GET", "/webhooks/9/edit", 404),
        ("GET", "/deliveries/x", 404),
        ("GET", "/no-such-page", 404),
        ("GET", "/webhooks/1/test", 405),
        ("GET", "/?start=x", 400),
        ("GET", "/webhooks/1?state=good", 400),
        ("POST", "/", 405),
    ],
)
def test_errors_of_pages_are_pages(browser, method, path, status):
    browser.create("http://127.0.0.1:1/")

    answer = browser.request(path, method=method)

    assert (answer.status_int, answer.content_type) == (status, "text/html")


def test_button_for_a_deleted_thing_leads_to_a_page_that_says_so(browser, receiver, dispatcher):
    webhook, delivery = attempted(browser, receiver, dispatcher)
    pages = [
        browser.get(path)
        for path in ("/webhooks/1", f"/deliveries/{delivery['id']}", "/webhooks/1/edit")
    ]
    browser.delete(f"{WEBHOOKS}/{webhook['id']}")

    for form in (form for page in pages for form in page.forms.values()):
        answer = form.submit()
        assert (answer.status_int, answer.content_type) == (404, "text/html")
        assert len(answer.html.find_all("a", href="/")) == 1


def test_a_browser_gets_the_errors_of_the_api_as_json(browser):
    for path in (f"{WEBHOOKS}/9", "/rest/api/nothing"):
        assert browser.get(path).json["statusCode"] == 404


def test_a_bug_in_a_page_is_a_page_too(browser, store):
    store.write(lambda batch: batch.connection.execute("DROP TABLE statistics"))

    answer = browser.get("/")

    assert (answer.status_int, answer.content_type) == (500, "text/html")
    assert "statistics" not in answer


def every_page(browser):
    """All pages that links lead to, and those of a test, a fault and an error."""
    found, paths = {}, ["/", "/webhooks/9", "/webhooks/new", "/events/1/delete"]
    paths += [f"/webhooks/1/{page}" for page in ("edit", "replay", "replay?since=2020-01-01")]
    while paths:
        path = paths.pop().partition("#")[0]
        if path not in found:
            found[path] = browser.get(path)
            links = found[path].html.find_all("a", href=re.compile("^/"))
            paths += [link["href"] for link in links]
    found["test"] = press(found["/webhooks/1"], "Test")
    found["ask"] = press(found["/webhooks/1"], "Delete")
    hostile = {"name": HOSTILE, "events": "</textarea>" + HOSTILE}
    found["fault"] = fill_in(found["/webhooks/new"], **hostile)
    return found


ATTRIBUTES = {  # that our own markup has
    *("action", "alt", "aria-current", "aria-describedby", "aria-invalid", "aria-label"),
    *("autocomplete", "autofocus", "charset", "checked", "class", "content", "datetime", "for"),
    *("height", "href", "id", "lang", "method", "name", "open", "placeholder"),
    *("preserveaspectratio", "rel", "role", "rows", "scope", "selected", "size", "spellcheck"),
    *("src", "tabindex", "title", "type", "value", "viewbox", "width", "x", "y"),
}


def test_texts_of_clients_are_no_markup(browser, receiver, dispatcher):
    headers = {"X-Hostile": HOSTILE[:-1], "Content-Type": "text/html"}
    receiver.answers(302, headers | {"Location": HOSTILE[:-1]}, HOSTILE.encode())
    hostile = {"name": HOSTILE, "configuration": {"<b>": HOSTILE}}
    hostile |= {"filters": {}, "headers": {"X-A": "<b>"}}
    receiver.url += "/<b>"
    attempted(browser, receiver, dispatcher, **hostile)

    pages = every_page(browser)

    assert len(pages) >= 9
    for path, page in pages.items():
        assert page.html.find_all(["script", "b"]) == [], path
        assert {image["src"] for image in page.html.find_all("img")} == {"/favicon.ico"}, path
        attributes = {name for tag in page.html.find_all(True) for name in tag.attrs}
        assert attributes <= ATTRIBUTES, path
    assert HOSTILE in pages["/"].html.a.find_next("table").a.get_text()


def test_the_name_of_a_user_is_no_markup(browser, store):
    user = webhookd.User("<b>", "viewer", webhookd.secret_record("x"))
    store.write(lambda batch: webhookd.save_user(batch.connection, user))
    browser.authorization = ("Bearer", "x")

    assert "<b> (viewer)" in browser.get("/").html.header.get_text()


def test_path_that_was_not_found_is_no_markup(browser):
    page = browser.get("/deliveries/%3Cb%3E")

    assert "there is no delivery <b>" in words(page)


def test_error_of_a_test_is_no_markup(browser):
    browser.create("http://<b>.invalid/")

    page = press(browser.get("/webhooks/1"), "Test")

    assert "It failed: unknown host <b>.invalid" in words(page)


def test_a_text_that_turns_its_direction_turns_nothing_beside_it(browser, receiver, dispatcher):
    attempted(browser, receiver, dispatcher, name=HOSTILE)
    [isolated] = re.findall(r"\n(.+) { unicode-bidi: isolate; }", webhookd.STYLE)

    pages = every_page(browser)

    for path, page in pages.items():
        turning = page.html.find_all(string=re.compile("\u202e"))
        elements = {text.parent.name for text in turning}
        blocks = {"div", "h1", "pre", "textarea", "title"}
        assert elements <= blocks | set(isolated.split(", ")), path


def test_every_page_is_locked_down_and_has_its_style(browser, receiver, dispatcher):
    attempted(browser, receiver, dispatcher)

    for page in every_page(browser).values():
        policy = dict(
            part.split(None, 1) for part in page.headers["Content-Security-Policy"].split("; ")
        )
        digest = hashlib.sha256(page.html.style.string.encode()).digest()
        assert policy == {
            "default-src": "'none'",
            "img-src": "'self'",
            "style-src": f"'sha256-{base64.b64encode(digest).decode()}'",
            "form-action": "'self'",
            "frame-ancestors": "'none'",
            "base-uri": "'none'",
        }
        assert page.headers["X-Content-Type-Options"] == "nosniff"
        assert page.headers["Referrer-Policy"] == "same-origin"
        assert page.headers["Cache-Control"] == "no-store"


def test_every_field_has_a_label_and_every_page_a_title(browser, receiver, dispatcher):
    attempted(browser, receiver, dispatcher, configuration={"secret": "s"})

    for page in every_page(browser).values():
        labels = {label["for"] for label in page.html.find_all("label")}
        fields = page.html.find_all(["input", "textarea", "select"])
        ids = [tag["id"] for tag in page.html.find_all(id=True)]
        assert len(ids) == len(set(ids))
        assert {f["id"] for f in fields if f.get("type") != "hidden"} == labels
        assert len(page.html.find_all("h1")) == 1
        assert page.html.title.get_text().endswith(" – webhookd")
        assert page.html.header.find_all("a", href=["/", "/events"])
        assert webhookd.VERSION in page.html.header.get_text()


def test_the_icon_needs_no_login(wsgi):
    answer = App(wsgi).get("/favicon.ico")

    assert (answer.status_int, answer.content_type) == (200, "image/svg+xml")
    assert "no-store" not in answer.headers["Cache-Control"]
    assert answer.text.startswith("<svg ")


# ---- with curl ----


def test_curl_gets_its_commands_without_a_login(api):
    api.authorization = None

    answer = api.get("/", extra_environ={"HTTP_ACCEPT": "*/*"})

    assert (answer.status_int, answer.content_type) == (200, "text/plain")
    assert "curl -u admin http://localhost:80/rest/api/webhooks\n" in answer.text
    assert answer.headers["Vary"] == "Accept"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    paths = set(re.findall(r"http://localhost:80(/[^\s'?]*)", answer.text))
    assert {"/health", EVENTS, WEBHOOKS, WEBHOOKS + "/test"} < paths
    for path in sorted(paths):
        assert api.get(path).status_int != 404, path


def test_curls_commands_have_the_address_that_was_asked(api):
    environ = {"HTTP_HOST": "hooks.example.com", "wsgi.url_scheme": "https"}

    answer = api.get("/", extra_environ=environ)
    assert "curl https://hooks.example.com/health\n" in answer.text
    answer = api.get("/", extra_environ={"HTTP_HOST": "x;reboot"})
    assert "curl 'http://x;reboot'/health\n" in answer.text


# ======================================================================================
# HTTP server
# ======================================================================================


def raw_request(port, request):
    """The status and the JSON of what comes back for some bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(request)
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert b"Content-Type: application/json" in head
    return int(head.split()[1]), json.loads(body)


@pytest.fixture(scope="module")
def shared_daemon(tmp_path_factory):
    daemon = Daemon(tmp_path_factory.mktemp("shared"))
    yield daemon.start("--trusted-proxy", "127.0.0.1")
    daemon.end(signal.SIGTERM)


def test_a_publisher_removed_just_now_publishes_nothing(shared_daemon):
    """The server's own thread knows users as they were at the last commit."""
    secret = run("user", "add", "app", "--role", "publisher", "--database", shared_daemon.database)
    authorization = f"Authorization: Bearer {secret.stdout.strip()}\r\n".encode()
    body = b'{"event": "e"}'
    head = b"POST /rest/api/events HTTP/1.1\r\nConnection: close\r\nContent-Length: 14\r\n"
    head += b"Content-Type: application/json\r\n" + authorization + b"\r\n"
    assert raw_request(shared_daemon.port, head + body)[0] == 202

    run("user", "remove", "app", "--database", shared_daemon.database)

    assert raw_request(shared_daemon.port, head + body)[0] == 401


@pytest.mark.parametrize(
    "request_bytes, status",
    [
        (b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
        (b"GET http://[::1/health HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nBad Header: x\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"POST /rest/api/events HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n", 401),
        (
            b"POST /rest/api/events HTTP/1.1\r\nContent-Length: 99999999\r\n"
            b"Authorization: Bearer x\r\n\r\n",
            413,
        ),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 70_000 + b"\r\n\r\n", 431),
    ],
    ids=lambda value: value if isinstance(value, int) else "sent",
)
def test_the_servers_own_errors_have_the_same_shape(shared_daemon, request_bytes, status):
    found, document = raw_request(shared_daemon.port, request_bytes)

    assert (found, document["statusCode"]) == (status, status)
    assert document["errors"][0].keys() == {"context", "message", "exceptionName"}


def test_a_chunked_body_is_read_as_any_other(shared_daemon):
    request = (
        f"POST {EVENTS} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: {BASIC}\r\n"
        "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        '5\r\n{"eve\r\na\r\nnt": "e"} \r\n0\r\n\r\n'
    )

    status, answer = raw_request(shared_daemon.port, request.encode())

    assert (status, answer["event"]) == (202, "e")


def test_a_publication_with_a_malformed_proxy_header_is_refused(shared_daemon):
    headers = {"X-Forwarded-Proto": "https,http"}

    status, answer = shared_daemon.call("POST", EVENTS, {"event": "e"}, **headers)

    assert (status, answer["statusCode"]) == (400, 400)


@pytest.mark.parametrize(
    "version, header, connection",
    [("1.1", "", None), ("1.1", "Connection: close\r\n", "close"), ("1.0", "", "close")],
)
def test_the_answer_to_a_publication_says_whether_the_connection_closes(
    shared_daemon, version, header, connection
):
    request = (
        f"POST {EVENTS} HTTP/{version}\r\nHost: x\r\nAuthorization: {BASIC}\r\n{header}"
        'Content-Type: application/json\r\nContent-Length: 14\r\n\r\n{"event": "e"}'
    )

    with socket.create_connection(("127.0.0.1", shared_daemon.port), timeout=30) as opened:
        opened.sendall(request.encode())
        answer = http.client.HTTPResponse(opened)
        answer.begin()

    assert (answer.status, answer.getheader("Connection")) == (202, connection)
    assert answer.getheader("Server") == "webhookd" and answer.getheader("Date")


def test_the_trusted_proxy_says_where_a_request_came_from(shared_daemon):
    headers = {"X-Forwarded-For": "192.0.2.1", "X-Forwarded-Proto": "https"}
    headers["X-Forwarded-Host"] = "hooks.example"

    _, page = shared_daemon.call("GET", WEBHOOKS, **headers)

    assert page["_links"]["self"].startswith(f"https://hooks.example{WEBHOOKS}")
    origin = {"Origin": "https://hooks.example"}
    assert shared_daemon.call("POST", EVENTS, {"event": "e"}, **headers, **origin)[0] == 202


def test_nobody_else_is_believed(daemon):
    daemon.start()

    _, page = daemon.call("GET", WEBHOOKS, **{"X-Forwarded-Host": "evil.example"})

    assert "evil.example" not in page["_links"]["self"]


POST = f"POST {EVENTS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
LOGGED_IN = POST + f"Authorization: {BASIC}\r\n".encode()
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
EXPECT = b"Expect: 100-continue\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
LONG = b"x" * (9 << 10)


@pytest.mark.parametrize(
    "request_bytes, status",
    [
        (POST + b"Content-Length: 5\r\n\r\n", 401),
        (POST + CHUNKED, 401),
        (POST + EXPECT + b"Content-Length: 5\r\n\r\n", 401),
        (POST + b"Content-Length: 3\r\n\r\n{}\n", 401),
        (LOGGED_IN + EXPECT + b"Content-Length: 99999999\r\n\r\n", 413),
        (LOGGED_IN + CHUNKED + b"1;" + LONG, 400),
        (LOGGED_IN + CHUNKED + b"1;x=" + LONG + b"\r\n{\r\n1\r\n}\r\n0\r\n\r\n", 400),
        (LOGGED_IN + CHUNKED + b"1\r\n1\r\n0\r\nX: " + LONG, 400),
        (LOGGED_IN + CHUNKED + b"1\r\n1\r\n0\r\nX: " + LONG + b"\r\n\r\n", 400),
        (LOGGED_IN + CHUNKED + b"1\r\n1\r\n" * 20_000, 400),
        (LOGGED_IN + b"Content-Length: 5\r\n" + CHUNKED + b"0\r\n\r\n", 400),
        (LOGGED_IN.replace(b"1.1", b"1.0") + b"Content-Length: 5\r\n" + CHUNKED, 400),
        (HEALTH + HEALTH, 400),
        (HEALTH + b"x", 400),
        (LOGGED_IN + b"Content-Length: 2\r\n\r\n{}" + HEALTH, 400),
    ],
    ids=lambda value: value if isinstance(value, int) else "sent",
)
def test_refused_request_of_a_stranger_ends_the_connection(shared_daemon, request_bytes, status):
    assert raw_request(shared_daemon.port, request_bytes)[0] == status


def test_empty_line_behind_a_request_is_no_second_request(shared_daemon):
    request = HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n\r\n")

    assert raw_request(shared_daemon.port, request)[0] == 200


def test_client_with_a_login_gets_100_continue(shared_daemon):
    with socket.create_connection(("127.0.0.1", shared_daemon.port), timeout=30) as connection:
        connection.sendall(LOGGED_IN + EXPECT + b"Content-Length: 14\r\n\r\n")
        invitation = connection.recv(100)
        connection.sendall(b'{"event": "e"}')
        answer = connection.recv(100)

    assert invitation == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert answer.startswith(b"HTTP/1.1 202 ")


def test_a_client_that_is_refused_sees_the_answer_when_it_has_sent_all(shared_daemon):
    """To close while more is coming would reset the connection, and lose the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", shared_daemon.port, timeout=30)
    with contextlib.closing(connection):
        connection.request("POST", EVENTS, b"x" * (20 << 20))
        answer = connection.getresponse()

        assert answer.status == 401
        assert answer.headers["WWW-Authenticate"] == 'Basic realm="webhookd"'


class SteppedServer:
    """The server of an application, whose loop goes on only when a test says so."""

    def __init__(self, app):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.server = webhookd.make_server(app, self._listener, webhookd.Settings())
        self._clients = []

    def connect(self, *sent):
        """A client that has sent something, and its channel."""
        before = set(self.server.active_channels.values())
        client = socket.create_connection(self._listener.getsockname(), timeout=20)
        self._clients.append(client)
        self.step_until(lambda: len(self.server.active_channels) > len(before))
        [channel] = set(self.server.active_channels.values()) - before
        for part in sent:
            client.sendall(part)
        return client, channel

    def step_until(self, condition):
        limit = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < limit, "it did not happen"
            self.server.run_once(0.01)

    def close(self):
        for client in self._clients:
            client.close()
        for channel in list(self.server.active_channels.values()):
            channel.cut_off()
        self.server.task_dispatcher.shutdown()
        self.server.close()


@pytest.fixture
def echo():
    """A server that sends every body back."""

    def app(environ, start_response):
        start_response("200 OK", [])
        return [environ["wsgi.input"].read()]

    with contextlib.closing(SteppedServer(app)) as stepped:
        yield stepped


def overdue_after(channel, seconds):
    """Whether the client has just that much time."""
    since = channel._since
    return not channel.is_overdue(since + seconds) and channel.is_overdue(since + seconds + 1)


def test_a_connection_without_a_request_has_the_time_of_a_head(echo):
    _, channel = echo.connect()

    assert overdue_after(channel, 10)


def test_a_head_has_ten_seconds_from_its_first_byte(echo):
    client, channel = echo.connect(b"GET / HTTP/1.1\r\n")
    echo.step_until(lambda: channel.request)
    since = channel._since
    client.sendall(b"X: x\r\n")
    echo.step_until(lambda: b"X: x" in channel.request.header_plus)

    assert channel._since == since
    assert overdue_after(channel, 10)


def test_a_whole_request_has_a_minute_from_its_first_byte(echo):
    client, channel = echo.connect(LOGGED_IN)
    echo.step_until(lambda: channel.request)
    since = channel._since
    client.sendall(b"Content-Length: 5\r\n\r\n12")
    echo.step_until(lambda: channel.request.body_bytes_received == 2)

    assert channel._since == since
    assert overdue_after(channel, 60)


def test_a_connection_may_be_idle_for_a_minute(echo):
    client, channel = echo.connect(HEALTH)
    echo.step_until(lambda: channel._had_request and not channel.requests)
    echo.step_until(lambda: not channel.total_outbufs_len)

    assert client.recv(100).startswith(b"HTTP/1.1 200")
    assert overdue_after(channel, 60)


def test_a_client_that_is_refused_has_ten_seconds_to_stop(echo):
    client, channel = echo.connect(POST + CHUNKED)
    echo.step_until(lambda: channel._discards)

    assert client.recv(100).startswith(b"HTTP/1.1 401")
    assert overdue_after(channel, 10)


def test_a_publication_is_answered_as_soon_as_it_is_on_disk(parts, store):
    """And not when the server looks around next."""
    inside, gate = threading.Event(), threading.Event()
    body = b'{"event": "e"}'
    head = f"POST {EVENTS} HTTP/1.1\r\nAuthorization: Bearer {SECRETS['publisher']}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with contextlib.closing(SteppedServer(api_with_pages(parts))) as stepped:
        store.on_finish(stepped.server.wake)
        holding = threading.Thread(
            target=store.write, args=(lambda batch: (inside.set(), gate.wait(20)),)
        )
        holding.start()
        inside.wait(20)
        client, _ = stepped.connect(head.encode() + body)
        stepped.step_until(lambda: stepped.server._unanswered)

        gate.set()

        while stepped.server._unanswered:
            assert ends(lambda: stepped.server.run_once(60))
        assert client.recv(100).startswith(b"HTTP/1.1 202")
        holding.join()


def test_a_request_in_hand_has_all_the_time_it_takes():
    release = threading.Event()

    def app(environ, start_response):
        release.wait(20)
        start_response("200 OK", [])
        return [b"done"]

    with contextlib.closing(SteppedServer(app)) as stepped:
        _, channel = stepped.connect(HEALTH)
        stepped.step_until(lambda: channel.requests)

        assert not channel.is_overdue(time.monotonic() + 1e6)

        release.set()
        stepped.step_until(lambda: not channel.requests)


def test_a_client_that_does_not_read_its_answer_for_a_minute_is_cut_off():
    ended = threading.Event()

    def endless():
        try:
            while True:
                yield b"x" * (1 << 16)
        finally:
            ended.set()

    def app(environ, start_response):
        start_response("200 OK", [])
        return endless()

    with contextlib.closing(SteppedServer(app)) as stepped:
        _, channel = stepped.connect(HEALTH)
        stepped.step_until(lambda: channel.total_outbufs_len > webhookd.MAX_UNSENT_BYTES)
        stepped.server.cut_off_overdue(time.monotonic() + 59)
        assert channel.connected and not ended.is_set()

        stepped.server.cut_off_overdue(time.monotonic() + 62)

        stepped.step_until(ended.is_set)
        assert not channel.connected


def test_neither_bodies_nor_answers_are_written_to_files(echo, monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", None)
    body, read = b"x" * (2 << 20), []
    client, _ = echo.connect(LOGGED_IN + b"Content-Length: %d\r\n\r\n" % len(body))

    def exchange():
        client.sendall(body)
        head, _, start = client.recv(1000).partition(b"\r\n\r\n")
        read.extend([head, start + client.makefile("rb").read(len(body) - len(start))])

    thread = threading.Thread(target=exchange)
    thread.start()
    echo.step_until(lambda: not thread.is_alive())

    assert read[0].startswith(b"HTTP/1.1 200") and read[1] == body


def test_bodies_that_are_received_at_once_hold_so_much_together(echo, monkeypatch):
    monkeypatch.setattr(webhookd, "SHARED_BODIES_BYTES", 100_000)
    length = b"Content-Length: %d\r\n\r\n"
    first, _ = echo.connect(LOGGED_IN + length % 130_000, b"x" * 120_000)
    echo.step_until(lambda: echo.server.adj.bodies._shared_bytes > 80_000)

    known, channel = echo.connect(LOGGED_IN + length % 90_000)
    echo.step_until(lambda: channel._discards)
    grown, channel = echo.connect(LOGGED_IN + CHUNKED + b"fffff\r\n", b"x" * 60_000)
    echo.step_until(lambda: channel._discards)
    small, channel = echo.connect(LOGGED_IN + length % 3, b"{}\n")
    echo.step_until(lambda: channel._had_request and not channel.requests)
    echo.step_until(lambda: not channel.total_outbufs_len)

    for client in (known, grown):
        answer = client.recv(1000)
        assert answer.startswith(b"HTTP/1.1 503") and b"Retry-After: 1" in answer
    assert small.recv(100).startswith(b"HTTP/1.1 200")
    first.close()
    echo.step_until(lambda: echo.server.adj.bodies._shared_bytes == 0)


def test_a_server_without_file_descriptors_rests_and_says_so_once(echo, caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    address = echo._listener.getsockname()
    waiting = [socket.create_connection(address) for _ in range(2)]
    try:
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        for _ in range(2):
            echo.server._accepts_from = 0
            echo.server.handle_accept()
            assert not echo.server.readable()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert [line for line in caplog.messages if "no connection can be accepted" in line] == [
        'no connection can be accepted reason="[Errno 24] Too many open files"'
    ]
    echo.server._accepts_from = 0
    echo.step_until(lambda: len(echo.server.active_channels) == 2)
    for client in waiting:
        client.close()


@pytest.mark.parametrize(
    "files, connections", [(65536, 1000), (-1, 1000), (1024, 384), (256, webhookd.SERVER_THREADS)]
)
def test_the_connections_are_as_many_as_there_are_files_for(monkeypatch, files, connections):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))

    assert webhookd.connection_limit(max_in_flight=256) == connections


def test_the_service_may_open_as_many_files_as_the_system_lets_it(shared_daemon):
    limits = pathlib.Path(f"/proc/{shared_daemon.process.pid}/limits").read_text()

    soft, hard = re.search(r"Max open files +(\d+) +(\d+)", limits).groups()
    assert int(soft) == min(int(hard), webhookd.MAX_OPEN_FILES)


# ======================================================================================
# systemd
# ======================================================================================


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_notified_where_it_asks(tmp_path, monkeypatch, abstract):
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name if abstract else name)
        listener.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if abstract else name)

        webhookd.notify("READY=1")

        assert listener.recv(100) == b"READY=1"


def test_systemd_that_cannot_be_reached_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody-listens"))

    webhookd.notify("READY=1")


def test_stderr_is_the_journal_only_if_systemd_says_so_of_it(tmp_path, monkeypatch):
    with open(tmp_path / "journal", "w") as journal:
        monkeypatch.setattr(sys, "stderr", journal)
        status = os.fstat(journal.fileno())
        this = f"{status.st_dev}:{status.st_ino}"
        streams = ({"JOURNAL_STREAM": this}, {"JOURNAL_STREAM": "1:1"}, {})

        found = [webhookd.writes_to_journal(environ) for environ in streams]

    assert found == [True, False, False]


@pytest.mark.parametrize(
    "journal, level, line",
    [(True, 30, r"<4>a\nb"), (True, 50, r"<3>a\nb"), (False, 30, r"\d{4}-.* a\\nb")],
)
def test_a_log_line_is_one_line_with_a_priority_or_a_time(journal, level, line):
    record = webhookd.logging.makeLogRecord({"levelno": level, "msg": "a\nb"})

    formatted = webhookd.LineFormatter(journal).format(record)

    assert formatted == line if journal else re.fullmatch(line, formatted)


def test_control_characters_of_a_client_do_not_reach_a_terminal():
    record = webhookd.logging.makeLogRecord({"levelno": 30, "msg": "ä /\x1b[31m\x85\u202e\r"})

    assert webhookd.LineFormatter(True).format(record) == r"<4>ä /\x1b[31m\x85\u202e\r"


# ======================================================================================
# Sink: the program itself
# ======================================================================================


NOW = 1_700_000_000
SIGNED = webhookd.standard_signature("s", "id", NOW, b"{}")


@pytest.mark.parametrize(
    "change, fault",
    [
        ({}, None),
        ({"signatures": f"v1,other {SIGNED} v2,other"}, None),
        ({"now": NOW + 300}, None),
        ({"now": NOW - 300}, None),
        ({"now": NOW + 301}, "webhook-timestamp is more than 5 minutes off"),
        ({"now": NOW - 301}, "webhook-timestamp is more than 5 minutes off"),
        ({"timestamp": "now"}, "webhook-timestamp is no number"),
        ({"timestamp": ""}, "webhook-timestamp is no number"),
        ({"id": "other"}, "another secret, or another body"),
        ({"body": b"{ }"}, "another secret, or another body"),
        ({"secret": "other"}, "another secret, or another body"),
        ({"signatures": "é"}, "another secret, or another body"),
        ({"signatures": ""}, "another secret, or another body"),
    ],
)
def test_a_standard_signature_verifies_or_it_is_said_why(change, fault):
    given = {"secret": "s", "id": "id", "timestamp": str(NOW), "signatures": SIGNED}
    given |= {"body": b"{}", "now": NOW}

    assert webhookd.standard_fault(**given | change) == fault


@pytest.mark.parametrize("secret, genuine", [("s", True), ("other", False)])
def test_every_hub_signature_must_verify(secret, genuine):
    right, wrong = webhookd.hub_signature("s", b"{}"), "sha256=é"

    assert (webhookd.hub_fault(secret, [right, right], b"{}") is None) == genuine
    assert webhookd.hub_fault(secret, [right, wrong], b"{}")


@pytest.fixture
def sink():
    """Starts a sink; its address, and what it has printed so far."""
    processes = []

    def start(*flags, **variables):
        command = [sys.executable, str(HERE / "webhookd.py"), "sink"]
        buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
        process = subprocess.Popen(
            [*command, "--listen", "127.0.0.1:0", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=buffered | variables,
        )
        processes.append(process)
        assert select.select([process.stdout], [], [], 20)[0], "it prints nothing"
        line = process.stdout.readline()
        process.url = re.search(r"listening on (http://127\.0\.0\.1:\d+/)", line)[1]
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def printed_by(sink, number=signal.SIGTERM):
    """What the sink has printed until a signal stopped it, with status 0."""
    sink.send_signal(number)
    printed, _ = sink.communicate(timeout=30)
    assert sink.returncode == 0 and "Traceback" not in printed
    return printed


def deliver(api, dispatcher, url, **fields):
    """Have one event delivered to a new webhook; what came back."""
    webhook = api.create(url, **fields)
    api.publish(text="Grüße")
    dispatcher.run_until_idle()
    return api.get(f"{WEBHOOKS}/{webhook['id']}/latest").json["result"]


@pytest.fixture
def now(clock):
    clock.now = time.time()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_sink_prints_a_delivery_and_that_it_is_genuine(api, dispatcher, sink, now, number):
    sink = sink("--secret", "s")

    result = deliver(api, dispatcher, sink.url, configuration={"secret": "s"})

    assert result["statusCode"] == 200
    printed = printed_by(sink, number)
    assert "\n  X-Event-Key: e\n" in printed and '"text":"Grüße"}\n' in printed
    assert "Host:" not in printed and "Content-Length:" not in printed
    assert "X-Hub-Signature: signature ok\n" in printed
    assert "Standard Webhooks: signature ok\n" in printed


def test_sink_says_if_a_signature_does_not_verify(api, dispatcher, sink, now):
    sink = sink("--secret", "other")

    deliver(api, dispatcher, sink.url, configuration={"secret": "s"})

    printed = printed_by(sink)
    assert "X-Hub-Signature: does NOT verify" in printed
    assert "Standard Webhooks: does NOT verify" in printed


def test_sink_says_if_a_delivery_is_not_signed(api, dispatcher, sink, now):
    sink = sink("--secret", "s")

    deliver(api, dispatcher, sink.url)

    printed = printed_by(sink)
    assert "X-Hub-Signature: not signed\n" in printed
    assert "Standard Webhooks: not signed\n" in printed


def test_a_sink_with_the_old_secret_takes_the_new_ones_standard_signature(
    api, dispatcher, sink, now
):
    sink = sink("--secret", "old")
    webhook = api.create(sink.url, configuration={"secret": "old"})
    api.put_json(f"{WEBHOOKS}/{webhook['id']}", {"configuration": {"secret": "new"}})
    api.publish()
    dispatcher.run_until_idle()

    printed = printed_by(sink)

    assert "X-Hub-Signature: does NOT verify" in printed
    assert "Standard Webhooks: signature ok\n" in printed


@pytest.mark.parametrize("status", [204, 302, 304, 410, 429, 503])
def test_sink_answers_the_status_that_is_set(api, dispatcher, sink, now, status):
    sink = sink("--answer", str(status))

    assert deliver(api, dispatcher, sink.url)["statusCode"] == status


@pytest.mark.parametrize("status, has_length", [(200, True), (204, False), (304, False)])
def test_a_sink_says_no_length_where_there_can_be_no_body(sink, status, has_length):
    sink = sink("--answer", str(status))
    port = int(sink.url.rstrip("/").rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"POST / HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}")
        answer = connection.makefile("rb").read()

    assert (b"\r\nContent-Length:" in answer) == has_length


def test_a_sink_takes_no_body_that_is_too_large(sink):
    sink = sink()
    port = int(sink.url.rstrip("/").rpartition(":")[2])
    too_large = webhookd.MAX_REQUEST_BYTES + 1
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % too_large)
        answer = connection.makefile("rb").read()

    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_sink_that_redirects_says_where_to(api, dispatcher, sink, now):
    sink = sink("--answer", "307")

    result = deliver(api, dispatcher, sink.url)

    assert result["headers"]["Location"] == "/elsewhere"


def test_a_sink_keeps_connections_and_survives_bad_requests(sink):
    sink = sink()
    port = int(sink.url.rstrip("/").rpartition(":")[2])
    good = b"POST /%d HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}"
    with socket.create_connection(("127.0.0.1", port), timeout=30) as kept:
        for number in range(2):
            kept.sendall(good % number)
            assert kept.recv(1000).startswith(b"HTTP/1.1 200 ")
        for bad in (
            b"\x1b[31m\xff\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"GET / HTTP/1.1\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nshort",
        ):
            with socket.create_connection(("127.0.0.1", port), timeout=30) as other:
                other.sendall(bad)
                other.shutdown(socket.SHUT_WR)
                assert b"HTTP/1.1 2" not in other.makefile("rb").read()
        kept.sendall(good % 2)
        assert kept.recv(1000).startswith(b"HTTP/1.1 200 ")

    printed = printed_by(sink)

    assert all(f"POST /{number} HTTP/1.1" in printed for number in range(3))
    assert printed.replace("\n", "").isprintable()


def test_nothing_that_arrives_reaches_the_terminal_as_a_command(sink):
    sink = sink()
    request = urllib.request.Request(
        sink.url, b'{"a": "\x1b[2J\x07\x9b\xe2\x80\xae\xff"}\r\nb', {"X-Colour": "\x1b[31m"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200

    printed = printed_by(sink)

    assert printed.replace("\n", "").isprintable()
    assert r'  {"a": "\x1b[2J\x07\x9b\u202e\xff"}\r\nb' in printed
    assert r"  X-Colour: \x1b[31m" in printed


def test_sink_prints_letters_that_its_terminal_does_not_have(api, dispatcher, sink, now):
    sink = sink(PYTHONIOENCODING="ascii")

    deliver(api, dispatcher, sink.url)

    assert r'"text":"Gr\xfc\xdfe"}' in printed_by(sink)


def test_sink_asks_no_resolver_for_its_name(monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getfqdn", asked.append)

    with webhookd.Sink(("127.0.0.1", 0), None, 200):
        assert asked == []


@pytest.mark.skipif(not os.path.exists("/proc/net/if_inet6"), reason="needs a machine with IPv6")
def test_a_sink_listens_on_ipv6_too():
    with webhookd.Sink(("::1", 0), None, 200) as sink:
        assert sink.server_address[0] == "::1"


@pytest.mark.parametrize(
    "flag, text",
    [
        ("--listen", "nowhere"),
        ("--listen", "127.0.0.1:{port}"),
        ("--answer", "99"),
        ("--answer", "199"),
        ("--secret", "\udcff"),
    ],
)
def test_a_sink_that_cannot_start_names_the_flag_in_one_line(receiver, flag, text):
    result = run("sink", flag, text.format(port=receiver.server_port))

    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert flag in result.stderr


# ======================================================================================
# Command line: the program itself, with real signals
# ======================================================================================


def run(*arguments, **options):
    command = [sys.executable, str(HERE / "webhookd.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def test_version_and_help():
    assert run("--version").stdout == f"webhookd {webhookd.VERSION}\n"
    lines = run("--help").stdout.splitlines()
    for field in dataclasses.fields(webhookd.Settings):
        [line] = [line for line in lines if f" {webhookd.flag(field)} " in line]
        assert webhookd.variable(field) in line


def test_a_bad_setting_stops_the_start_with_one_line_and_status_2():
    result = run("--retry-schedule", "soon")

    assert (result.returncode, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert "--retry-schedule" in line and "WEBHOOKD_RETRY_SCHEDULE" in line


def test_a_variable_that_is_no_setting_is_a_warning_without_its_value(daemon):
    daemon.start(WEBHOOKD_ADMIN_PASWORD="geheim")

    [line] = [line for line in daemon.log if "no setting" in line]
    assert line.endswith("no setting has this name variable=WEBHOOKD_ADMIN_PASWORD\n")
    assert "geheim" not in "".join(daemon.log)


def test_shortened_flag_is_refused():
    result = run("--retry", "5s", "user", "list")

    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)


def test_error_that_stops_the_start_has_its_priority_in_the_journal(tmp_path):
    with open(tmp_path / "journal", "w+") as journal:
        status = os.fstat(journal.fileno())
        environ = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        command = [sys.executable, str(HERE / "webhookd.py"), "--retention", "soon"]
        subprocess.run(command, env=os.environ | environ, stderr=journal, timeout=60)
        journal.seek(0)

        assert journal.read().startswith("<3>webhookd: --retention")


@pytest.mark.parametrize("path", ["/nonexistent/x.db", "/tmp"])
def test_a_database_that_cannot_be_opened_is_named_by_its_setting(path):
    result = run("--listen", "127.0.0.1:0", "--database", path)

    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "WEBHOOKD_DATABASE" in result.stderr


def test_unknown_subcommand_is_refused_with_the_known_ones():
    result = run("status")

    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert all(name in result.stderr for name in ("user", "backup", "restore", "sink"))


@pytest.mark.parametrize(
    "command",
    [
        ["user", "add", "a", "--role", "viewer"],
        ["user", "add", "a", "--replace", "--password"],
        ["user", "list"],
        ["user", "remove", "a"],
        ["backup", "copy.db"],
        ["restore", __file__],
    ],
)
def test_in_the_wrong_folder_a_subcommand_says_so_and_makes_nothing(tmp_path, command):
    result = run(*command, cwd=tmp_path, stdin=subprocess.DEVNULL)

    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert f"{tmp_path}/webhookd.db does not exist: start the service" in result.stderr
    assert list(tmp_path.iterdir()) == []


def make_database(path):
    with webhookd.Store(str(path), webhookd.Settings()):
        return str(path)


@pytest.fixture
def on_it(tmp_path):
    """What names a database of a stopped service."""
    return ["--database", make_database(tmp_path / "test.db")]


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
OWNER = (1234, 5678)


@pytest.fixture
def owned(tmp_path):
    """The database of a stopped service that is not root, where systemd would have it: in
    a folder that only root may enter."""
    private, folder = tmp_path / "private", tmp_path / "private" / "state"
    folder.mkdir(parents=True)
    path = make_database(folder / "test.db")
    private.chmod(0o700)
    for name in (folder, path):
        os.chown(name, *OWNER)
    return pathlib.Path(path)


def owners(folder):
    return {(status.st_uid, status.st_gid) for status in map(os.stat, folder.iterdir())}


@as_root
def test_root_adds_users_as_the_owner_of_the_databases_folder(owned):
    on_it = ["--database", str(owned)]

    added = run("user", "add", "a", "--role", "viewer", *on_it)

    assert (added.returncode, run("user", "list", *on_it).stdout) == (0, "a viewer\n")
    assert owners(owned.parent) == {OWNER}


@as_root
@pytest.mark.parametrize("command", [["user", "list"], ["backup", "copy.db"], ["restore", "f"]])
def test_root_follows_no_link_that_the_service_may_have_set(owned, tmp_path, command):
    elsewhere = make_database(tmp_path / "elsewhere.db")
    owned.unlink()
    owned.symlink_to(elsewhere)
    os.lchown(owned, *OWNER)
    (tmp_path / "f").write_bytes(pathlib.Path(elsewhere).read_bytes())

    result = run(*command, "--database", str(owned), cwd=tmp_path)

    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert "a link that is not root's" in result.stderr


@as_root
def test_users_come_beside_a_service_that_is_root_in_a_folder_of_somebody(daemon, tmp_path):
    os.chown(tmp_path, *OWNER)
    daemon.start()

    added = run("user", "add", "a", "--role", "viewer", "--database", daemon.database)
    backed_up = run("backup", str(tmp_path / "copy.db"), "--database", daemon.database)

    assert (added.returncode, backed_up.returncode) == (0, 0), added.stderr + backed_up.stderr
    assert owners(tmp_path) == {OWNER}
    assert daemon.call("POST", EVENTS, {"event": "e"})[0] == 202


@as_root
@pytest.mark.parametrize(
    "command", [["user", "list"], ["user", "remove", "a"], ["backup", "copy.db"]]
)
def test_root_does_not_read_what_the_owner_may_not(owned, tmp_path, command):
    os.chown(owned, 0, 0)

    result = run(*command, "--database", str(owned), cwd=tmp_path)

    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert "unable to open database file" in result.stderr
    assert not (tmp_path / "copy.db").exists()


@as_root
def test_root_backs_up_to_where_only_root_may_write(owned, tmp_path):
    target = tmp_path / "private" / "copy.db"

    result = run("backup", str(target), "--database", str(owned))

    assert result.returncode == 0, result.stderr
    assert target.stat().st_uid == 0
    assert webhookd.connect(str(target)).column("PRAGMA integrity_check") == ["ok"]


@as_root
def test_root_backs_up_into_the_services_folder_as_its_owner(owned):
    result = run("backup", str(owned.parent / "copy.db"), "--database", str(owned))

    assert result.returncode == 0, result.stderr
    assert owners(owned.parent) == {OWNER}


def test_an_error_does_not_quote_the_row_that_it_is_about(on_it):
    run("user", "add", "a", "--role", "viewer", *on_it)
    with contextlib.closing(webhookd.connect(on_it[1])) as connection:
        connection.execute("UPDATE users SET password = CAST(x'53454352455480' AS TEXT)")

    result = run("user", "list", *on_it)

    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert "a text in it is not UTF-8" in result.stderr
    assert "SECRET" not in result.stderr


def test_a_subcommand_leaves_a_database_of_a_newer_version_alone(tmp_path):
    version, path = len(webhookd.MIGRATIONS) + 1, make_database(tmp_path / "test.db")
    with contextlib.closing(webhookd.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {version}")

    result = run("user", "add", "a", "--role", "viewer", "--database", path)

    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert f"has version {version}" in result.stderr
    assert "newer webhookd" in result.stderr
    assert "let the service start" not in result.stderr
    with contextlib.closing(webhookd.connect(path)) as connection:
        assert webhookd.schema_version(connection) == version


def test_an_address_in_use_stops_the_start_with_one_line(receiver, tmp_path):
    result = run("--listen", f"127.0.0.1:{receiver.server_port}", cwd=tmp_path)

    assert result.returncode == 2
    assert "--listen" in result.stderr.splitlines()[-1]


def test_a_signal_during_the_start_ends_it_without_a_word(tmp_path):
    path = tmp_path / "test.db"
    path.touch()

    def is_open():
        handles = pathlib.Path(f"/proc/{process.pid}/fd").iterdir()
        with contextlib.suppress(FileNotFoundError):  # one is closed just now
            return path in [handle.resolve() for handle in handles]

    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")  # so that the start waits
        command = [sys.executable, str(HERE / "webhookd.py"), "--listen", "127.0.0.1:0"]
        process = subprocess.Popen(
            [*command, "--database", str(path)], stderr=subprocess.PIPE, text=True
        )
        wait_until(is_open)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)

    assert (process.returncode, error) == (-signal.SIGINT, "")


def test_the_main_job_end_to_end(daemon, receiver):
    daemon.start()
    status, _ = daemon.call("POST", WEBHOOKS, {"url": receiver.url, "events": ["e"]})
    assert status == 201
    status, event = daemon.call("POST", EVENTS, {"event": "e", "n": 1})
    assert (status, event["deliveries"]) == (202, 1)

    def delivered():
        [delivery] = daemon.call("GET", f"{WEBHOOKS}/1/deliveries")[1]["results"]
        return delivery["state"] == "succeeded"

    wait_until(delivered)
    assert [body["n"] for body in receiver.bodies()] == [1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_attempts_end_and_stops_with_status_0(daemon, receiver, number):
    daemon.start()
    daemon.call("POST", WEBHOOKS, {"url": receiver.url, "events": ["e"]})
    receiver.hold.clear()
    daemon.call("POST", EVENTS, {"event": "e"})
    wait_until(lambda: receiver.received)
    threading.Timer(0.3, receiver.hold.set).start()

    assert daemon.end(number) == 0

    with open_store(daemon.database) as store:
        [delivery] = store.deliveries(1, webhookd.Filter(), webhookd.Page())[0]
    assert (delivery.state, delivery.attempt_count) == ("succeeded", 1)
    assert "Traceback" not in "".join(daemon.log)


def test_a_second_signal_does_not_hurry_a_stop(daemon, receiver):
    daemon.start()
    daemon.call("POST", WEBHOOKS, {"url": receiver.url, "events": ["e"]})
    receiver.hold.clear()
    daemon.call("POST", EVENTS, {"event": "e"})
    wait_until(lambda: receiver.received)

    daemon.process.send_signal(signal.SIGTERM)
    assert any(" stopping" in line for line in daemon.process.stderr)
    threading.Timer(0.3, receiver.hold.set).start()

    assert daemon.end(signal.SIGTERM) == 0
    with open_store(daemon.database) as store:
        [delivery] = store.deliveries(1, webhookd.Filter(), webhookd.Page())[0]
    assert delivery.state == "succeeded"


def signal_at_once(process):
    """Several signals that are there at one moment, which no handler comes between."""
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCONT):
        process.send_signal(number)


def test_signals_at_one_moment_are_one(daemon):
    daemon.start()

    signal_at_once(daemon.process)
    _, rest = daemon.process.communicate(timeout=30)

    assert daemon.process.returncode == 0
    assert [line.split(" ", 2)[2] for line in rest.splitlines()] == ["stopping"]


def test_signals_at_one_moment_end_a_sink_without_a_word():
    command = [sys.executable, str(HERE / "webhookd.py"), "sink", "--listen", "127.0.0.1:0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, text=True)
    process.stdout.readline()

    signal_at_once(process)
    _, error = process.communicate(timeout=30)

    assert (process.returncode, error) == (0, "")


@pytest.mark.parametrize("name, status", [("writer", 1), ("delivery loop", 1), ("other", 0)])
def test_a_process_whose_writer_or_loop_has_died_ends(name, status):
    program = (
        "import threading, webhookd\n"
        "threading.excepthook = webhookd.end_without\n"
        f"thread = threading.Thread(target=lambda: {{}}[0], name={name!r})\n"
        "thread.start()\n"
        "thread.join()\n"
    )
    command = [sys.executable, "-c", program]

    result = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=60)

    assert result.returncode == status
    assert f"the thread {name} died" in result.stderr


def test_with_too_few_file_descriptors_a_start_ends_or_is_ready(tmp_path):
    make_database(tmp_path / "test.db")
    command = [sys.executable, str(HERE / "webhookd.py"), "--listen", "127.0.0.1:0"]
    command += ["--database", str(tmp_path / "test.db")]
    ended = 0
    for most in range(8, 160, 8):
        process = subprocess.Popen(
            ["prlimit", f"--nofile={most}", *command], stderr=subprocess.PIPE, text=True
        )
        guard = threading.Timer(20, process.kill)
        guard.start()
        is_ready = any(" ready " in line for line in process.stderr)
        if is_ready:
            process.terminate()
        process.communicate()
        guard.cancel()

        assert process.returncode != -signal.SIGKILL, f"{most}: it hung"
        if is_ready:
            break
        ended += 1

    assert is_ready and ended


@as_root
def test_a_log_that_the_service_may_not_write_ends_its_start(tmp_path):
    """As it is after root has worked on the database by other means."""
    program = (  # the interpreter may lie where the user cannot start it
        "import os, sys, encodings.idna, webhookd\n"
        f"os.setgroups([]); os.setresgid(*[{OWNER[1]}] * 3); os.setresuid(*[{OWNER[0]}] * 3)\n"
        "sys.exit(webhookd.main(['--listen', '127.0.0.1:0', '--database', sys.argv[1]]))\n"
    )
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is in one for root only
        path = with_user(pathlib.Path(folder, "test.db"), "admin")
        for name in (folder, path):
            os.chown(name, *OWNER)
        pathlib.Path(f"{path}-wal").touch(0o644)
        command = [sys.executable, "-c", program, path]

        result = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=60)

    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("webhookd: the database cannot be written: attempt to write a readonly")


def test_a_password_that_cannot_be_stored_ends_the_start_with_a_line(tmp_path):
    path = make_database(tmp_path / "test.db")
    room = 32 << 10  # SQLite's index of the log has it, and the log fills it

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    with contextlib.closing(webhookd.open_database(path)) as other:
        other.execute("CREATE TABLE fill (x)")
        other.execute("INSERT INTO fill VALUES (zeroblob(20000))")
        assert os.stat(f"{path}-wal").st_size > room - 8192
        environ = os.environ | {"WEBHOOKD_ADMIN_PASSWORD": "new"}
        flags = ["--listen", "127.0.0.1:0", "--database", path]
        result = run(*flags, env=environ, preexec_fn=limit)

    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("webhookd: the database cannot be written")


def test_requests_in_hand_are_answered_before_it_stops(daemon, receiver):
    daemon.start()
    receiver.hold.clear()
    path = f"{WEBHOOKS}/test?url={receiver.url}"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        tests = [pool.submit(daemon.call, "POST", path) for _ in range(2)]
        wait_until(lambda: len(receiver.received) == 2)
        threading.Timer(0.3, receiver.hold.set).start()

        assert daemon.end(signal.SIGTERM) == 0

    assert [test.result()[0] for test in tests] == [200, 200]


def test_while_attempts_end_no_requests_are_taken(daemon, receiver):
    daemon.start()
    receiver.hold.clear()
    daemon.call("POST", WEBHOOKS, {"url": receiver.url, "events": ["e"]})
    idle = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=30)
    idle.request("GET", "/health")
    idle.getresponse().read()
    daemon.call("POST", EVENTS, {"event": "e"})
    wait_until(lambda: receiver.received)

    daemon.process.send_signal(signal.SIGTERM)
    wait_until(lambda: not idle.sock.recv(1))
    with pytest.raises(ConnectionRefusedError):
        daemon.call("GET", "/health")
    assert daemon.process.poll() is None

    receiver.hold.set()
    assert daemon.process.wait(30) == 0


def test_events_stored_during_a_stop_are_acknowledged(daemon):
    daemon.start()
    acknowledged = []

    def publish():
        with contextlib.suppress(OSError, http.client.HTTPException):
            while True:
                answer = daemon.call("POST", EVENTS, {"event": "e"})
                acknowledged.append(answer[1]["id"])

    publishers = [threading.Thread(target=publish) for _ in range(6)]
    for publisher in publishers:
        publisher.start()
    wait_until(lambda: len(acknowledged) > 50)
    daemon.end(signal.SIGTERM)
    for publisher in publishers:
        publisher.join()

    with open_store(daemon.database) as store:
        _, stored = store.events(webhookd.Filter(), webhookd.Page())
    assert len(acknowledged) == stored


def test_a_second_process_on_the_same_database_is_refused(daemon):
    daemon.start()

    result = run("--listen", "127.0.0.1:0", "--database", daemon.database)

    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert "in use" in result.stderr


def test_the_first_start_prints_a_secret_once(daemon):
    daemon.start(WEBHOOKD_ADMIN_PASSWORD="")
    daemon.end(signal.SIGTERM)
    secret = re.search(r"secret is: (\S+)", daemon.output)[1]
    daemon.start(WEBHOOKD_ADMIN_PASSWORD="")

    assert daemon.call("GET", WEBHOOKS, Authorization=f"Bearer {secret}")[0] == 200
    daemon.end(signal.SIGTERM)
    assert daemon.output == ""
    assert secret not in "".join(daemon.log)


def test_users_come_and_go_beside_the_running_service(daemon):
    daemon.start()
    on_it = ["--database", daemon.database]

    secret = run("user", "add", "app", "--role", "publisher", *on_it).stdout.strip()
    viewer = run("user", "add", "eve", "--role", "viewer", "--password", *on_it, input="pa:ss\n")
    assert (viewer.returncode, viewer.stdout) == (0, "")
    assert run("user", "list", *on_it).stdout == "admin admin\napp publisher\neve viewer\n"

    bearer = {"Authorization": f"Bearer {secret}"}
    assert daemon.call("POST", EVENTS, {"event": "e"}, **bearer)[0] == 202
    basic = {"Authorization": "Basic " + base64.b64encode(b"eve:pa:ss").decode()}
    assert daemon.call("GET", WEBHOOKS, **basic)[0] == 200
    assert run("user", "add", "app", "--role", "viewer", *on_it).returncode == 1
    assert run("user", "remove", "app", *on_it).returncode == 0
    assert daemon.call("POST", EVENTS, {"event": "e"}, **bearer)[0] == 401
    assert run("user", "remove", "app", *on_it).returncode == 1


@pytest.mark.parametrize("old", [["--password"], []])
@pytest.mark.parametrize("new", [["--password"], ["--role", "viewer"]])
def test_a_user_that_is_replaced_logs_in_with_the_new_only(daemon, old, new):
    daemon.start()
    on_it = ["--database", daemon.database]

    def add(*flags, input):
        added = run("user", "add", "app", *flags, *on_it, input=f"{input}\n")
        assert added.returncode == 0, added.stderr
        return added.stdout.strip() or input

    def status(password):
        basic = {"Authorization": f"Basic {webhookd.base64_of(f'app:{password}')}"}
        return daemon.call("GET", WEBHOOKS, **basic)[0]

    before = add("--role", "admin", *old, input="before")
    assert status(before) == 200
    after = add("--replace", *new, input="after")

    assert (status(before), status(after)) == (401, 200)
    role = "viewer" if "viewer" in new else "admin"
    assert f"app {role}\n" in run("user", "list", *on_it).stdout


@pytest.mark.parametrize(
    "flags, status, words",
    [
        (["new"], 2, "needs a --role"),
        (["new", "--replace"], 1, "there is no user new"),
        (["old", "--role", "admin"], 1, "there is a user old already"),
        (["old", "--role", "king"], 2, "invalid choice: 'king'"),
        (["a:b", "--role", "admin"], 2, "is not a name"),
    ],
)
def test_user_that_cannot_be_added_or_replaced_is_one_line_of_error(on_it, flags, status, words):
    run("user", "add", "old", "--role", "viewer", *on_it)

    result = run("user", "add", *flags, *on_it)

    assert (result.returncode, len(result.stderr.splitlines())) == (status, 1)
    assert words in result.stderr
    assert run("user", "list", *on_it).stdout == "old viewer\n"


def full(*command):
    """Run a command whose standard output is full."""
    with open("/dev/full", "w") as output:
        command = [sys.executable, str(HERE / "webhookd.py"), *command]
        pipes = {"stdout": output, "stderr": subprocess.PIPE}
        return subprocess.run(command, **pipes, text=True, timeout=60)


def test_a_user_whose_secret_nobody_can_see_is_not_added(on_it):
    result = full("user", "add", "a", "--role", "viewer", *on_it)

    assert result.returncode == 1
    assert result.stderr == "webhookd: standard output: No space left on device\n"
    assert run("user", "list", *on_it).stdout == ""


def test_an_admin_whose_secret_nobody_can_see_is_made_by_the_next_start(tmp_path):
    on_it = ["--database", str(tmp_path / "test.db")]

    result = full("--listen", "127.0.0.1:0", *on_it)

    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last == "webhookd: standard output: No space left on device"
    assert run("user", "list", *on_it).stdout == ""


def test_users_that_come_and_go_are_logged(on_it):
    added = run("user", "add", "app", "--role", "publisher", *on_it)
    environ = os.environ | {"SUDO_USER": "eve"}
    removed = run("user", "remove", "app", *on_it, env=environ)

    assert re.search(r" user added name=app role=publisher by=\w+\n", added.stderr)
    assert re.search(r" user removed name=app by=eve\n", removed.stderr)
    assert added.stdout.strip() not in added.stderr


def test_subcommand_finds_the_database_as_the_service_does(tmp_path):
    path = make_database(tmp_path / "test.db")
    variable = os.environ | {"WEBHOOKD_DATABASE": path}

    added = run("user", "add", "a", "--role", "viewer", env=variable)
    listed = run("--database", path, "user", "list")

    assert (added.returncode, listed.stdout) == (0, "a viewer\n")


def test_an_empty_password_is_refused(on_it):
    result = run("user", "add", "app", "--role", "viewer", "--password", *on_it, input="\n")

    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert "the password is empty" in result.stderr


def test_subcommand_ignores_bad_settings_of_the_service(on_it):
    wrong = os.environ | {"WEBHOOKD_RETENTION": "for ever"}

    added = run("user", "add", "app", "--role", "viewer", *on_it, env=wrong)

    assert added.returncode == 0, added.stderr


def test_systemd_is_notified_of_start_progress_and_stop(daemon, tmp_path):
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name)
        listener.settimeout(20)
        daemon.start(NOTIFY_SOCKET=name)
        told = [listener.recv(100), listener.recv(100)]
        daemon.end(signal.SIGTERM)
        while told[-1] != b"STOPPING=1":
            told.append(listener.recv(100))

    assert set(told) == {b"READY=1", b"WATCHDOG=1", b"STOPPING=1"}


def test_the_watchdog_is_fed_only_while_the_writer_gets_on(store, tmp_path, monkeypatch):
    name = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name)
        listener.setblocking(False)
        webhookd._beat(store)
        assert listener.recv(100) == b"WATCHDOG=1"

        monkeypatch.setattr(webhookd, "STANDSTILL_SECONDS", 0)
        end = busy(store)
        webhookd._beat(store)
        end.set()

        with pytest.raises(BlockingIOError):
            listener.recv(100)


def test_start_migration_and_stop_are_logged_each_on_a_line(daemon):
    daemon.start()
    daemon.call("GET", "/health")
    daemon.end(signal.SIGTERM)

    facts = [line.split(" ", 2)[2] for line in "".join(daemon.log).splitlines()]
    assert facts == [
        f"database made old=0 new={len(webhookd.MIGRATIONS)}",
        f"starting version={webhookd.VERSION} database={daemon.database}",
        f"ready listen=127.0.0.1:{daemon.port}",
        "stopping",
    ]


# ---- backup ----


@pytest.fixture
def back_up(tmp_path):
    """Runs a backup of the daemon's database into a file of a folder."""
    folder = tmp_path / "backups"
    folder.mkdir()

    def back_up(database=tmp_path / "daemon.db", file="copy.db", **options):
        target = str(folder / file)
        return run("backup", target, "--database", str(database), **options)

    back_up.folder, back_up.file = folder, folder / "copy.db"
    return back_up


def fill(path, megabytes):
    """A database of webhookd with so many megabytes of events."""
    with contextlib.closing(webhookd.open_database(str(path))) as connection:
        webhookd.migrate(connection)
        with webhookd.transaction(connection):
            rows = [(number, bytes(1 << 20)) for number in range(megabytes)]
            webhookd.insert(connection, "payloads", rows)


def test_a_backup_is_a_whole_database_of_one_moment(daemon, back_up):
    fill(daemon.database, 20)
    daemon.start()
    ended = threading.Event()

    def publish():
        while not ended.is_set():
            daemon.call("POST", EVENTS, [{"event": "e"}] * 2)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        publishing = pool.submit(publish)
        wait_until(lambda: daemon.call("GET", EVENTS)[1]["totalCount"])
        result = back_up()
        ended.set()
    assert publishing.exception() is None

    assert (result.returncode, result.stdout) == (0, "")
    assert "backup written" in result.stderr
    assert back_up.file.stat().st_mode & 0o777 == 0o600
    with contextlib.closing(sqlite3.connect(back_up.file)) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        [(count,)] = copy.execute("SELECT count(*) FROM events")
        assert count and count % 2 == 0
    assert list(back_up.folder.iterdir()) == [back_up.file]
    with open_store(str(back_up.file)) as store:
        assert store.events(webhookd.Filter(), webhookd.Page())[1] == count


def test_a_backup_to_a_link_replaces_what_it_leads_to(daemon, back_up, tmp_path):
    fill(daemon.database, 1)
    back_up.file.symlink_to(tmp_path / "elsewhere.db")

    back_up()

    assert back_up.file.is_symlink()
    assert (tmp_path / "elsewhere.db").stat().st_size > 1 << 20


def test_a_copy_is_on_the_disk_before_it_has_its_name_and_then_its_name_is(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):

        def call(*arguments, name=name, original=getattr(os, name)):
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(os, name, call)

    with webhookd.new_file(str(tmp_path / "copy.db")):
        pass

    assert calls == ["fsync", "replace", "fsync"]


def test_a_backup_can_be_read_where_nothing_can_be_written(daemon, back_up):
    fill(daemon.database, 1)

    back_up()

    # SQLite's file format, 1.3.3: 1 is without a log, which would have to be made
    assert back_up.file.read_bytes()[18:20] == b"\1\1"


def test_a_folder_that_cannot_be_synced_is_no_fault(tmp_path, monkeypatch):
    def fsync(handle, original=os.fsync):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")  # as SMB has it
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)

    with webhookd.new_file(str(tmp_path / "copy.db")) as (handle, _):
        os.write(handle, b"whole")

    assert (tmp_path / "copy.db").read_bytes() == b"whole"


def spoil(path):
    """Damage a page of each table and index of a database."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        [(size,)] = connection.execute("PRAGMA page_size").fetchall()
        pages = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'events'")
        [(page,)] = pages.fetchall()
    with open(path, "r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\x55" * size)


def test_a_damaged_database_leaves_the_backup_before(daemon, back_up):
    fill(daemon.database, 1)
    back_up.file.write_text("the one before")
    spoil(daemon.database)

    result = back_up()

    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert re.search("is damaged|malformed", result.stderr)
    assert back_up.file.read_text() == "the one before"
    assert list(back_up.folder.iterdir()) == [back_up.file]


def test_a_backup_replaces_the_one_before(daemon, back_up):
    fill(daemon.database, 1)
    back_up.file.write_text("the one before")

    assert back_up().returncode == 0
    assert back_up.file.read_bytes().startswith(b"SQLite format 3\0")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_backup_that_is_ended_leaves_the_one_before(daemon, back_up, number):
    fill(daemon.database, 50)
    back_up.file.write_text("the one before")
    command = [sys.executable, str(HERE / "webhookd.py"), "backup", str(back_up.file)]
    process = subprocess.Popen(
        [*command, "--database", daemon.database], stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: [f for f in back_up.folder.glob(".copy*") if f.stat().st_size])
    process.send_signal(number)
    _, error = process.communicate(timeout=30)

    assert back_up.file.read_text() == "the one before"
    if number != signal.SIGKILL:
        assert (process.returncode, error) == (1, "webhookd: interrupted\n")
        assert list(back_up.folder.iterdir()) == [back_up.file]


def test_a_full_disk_leaves_the_backup_before(daemon, back_up):
    fill(daemon.database, 5)
    back_up.file.write_text("the one before")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    result = back_up(preexec_fn=limit)

    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert back_up.file.read_text() == "the one before"
    assert list(back_up.folder.iterdir()) == [back_up.file]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"database": "nowhere.db"}, "nowhere.db does not exist"),
        ({"database": HERE / "README.md"}, "file is not a database"),
        ({"database": "/dev/null"}, "not a database of webhookd"),
        ({"file": "nowhere/copy.db"}, "No such file or directory"),
        ({"file": "."}, "is not a file"),
        ({"file": "../daemon.db"}, "is the database itself"),
        ({"file": "../daemon.db-wal"}, "is the database itself"),
        ({"file": "used.db"}, "used.db-wal exists"),
        ({"file": "left.db"}, "left.db-journal exists"),
    ],
)
def test_failing_backup_is_one_line_of_error(daemon, back_up, options, words):
    fill(daemon.database, 1)
    beside = {"used.db-wal", "left.db-journal"}
    for name in beside:
        (back_up.folder / name).touch()

    result = back_up(**options)

    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert words in result.stderr
    assert {file.name for file in back_up.folder.iterdir()} == beside


# ---- restore ----


def restored(database, file):
    return run("restore", str(file), "--database", str(database))


def names(database):
    """The names of the users in a database."""
    with contextlib.closing(webhookd.connect(str(database))) as connection:
        return [user.name for user in webhookd.load_users(connection)]


def with_user(path, name):
    """A database of a stopped service that has one user."""
    on_it = ["--database", make_database(path)]
    run("user", "add", name, "--role", "viewer", *on_it)
    return path


def test_restore_brings_back_what_was_backed_up(daemon, back_up):
    daemon.start()
    daemon.call("POST", EVENTS, {"event": "before"})
    back_up()
    daemon.call("POST", EVENTS, {"event": "after"})
    daemon.end(signal.SIGKILL)
    assert os.path.getsize(f"{daemon.database}-wal")

    result = restored(daemon.database, back_up.file)

    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert re.search(r" database restored file=\S+ database=\S+ by=\w+\n", result.stderr)
    daemon.start()
    [event] = daemon.call("GET", EVENTS)[1]["results"]
    assert event["event"] == "before"


def test_a_database_in_use_is_not_replaced(daemon, back_up):
    daemon.start()
    back_up()

    result = restored(daemon.database, back_up.file)

    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert f"{daemon.database} is in use: stop the service first" in result.stderr


def test_a_restored_database_keeps_its_mode_and_the_backup_stays(tmp_path):
    database, backup = with_user(tmp_path / "a.db", "old"), with_user(tmp_path / "b.db", "new")
    database.chmod(0o640)
    before = backup.read_bytes()

    assert restored(database, backup).returncode == 0

    assert database.stat().st_mode & 0o777 == 0o640
    assert names(database) == ["new"]
    assert backup.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.db", "b.db"]


@as_root
def test_root_restores_from_where_only_root_may_read_as_the_owner(owned, tmp_path):
    backup = with_user(tmp_path / "private" / "backup.db", "new")

    result = restored(owned, backup)

    assert result.returncode == 0, result.stderr
    assert names(owned) == ["new"]
    assert owners(owned.parent) == {OWNER}


@as_root
def test_root_restores_nothing_by_a_link_that_the_service_may_have_set(owned, tmp_path):
    backup = owned.parent / "backup.db"
    backup.symlink_to(with_user(tmp_path / "private" / "backup.db", "new"))
    os.lchown(backup, *OWNER)

    result = restored(owned, backup)

    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert "a link that is not root's" in result.stderr
    assert names(owned) == []


def test_a_database_that_is_damaged_can_be_replaced(tmp_path):
    database, backup = with_user(tmp_path / "a.db", "old"), with_user(tmp_path / "b.db", "new")
    database.write_bytes(b"\x55" * 8192)

    assert restored(database, backup).returncode == 0

    assert names(database) == ["new"]


def another_programs(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE users (name); PRAGMA user_version = 1")


def newer(path):
    with contextlib.closing(webhookd.connect(make_database(path))) as connection:
        connection.execute(f"PRAGMA user_version = {len(webhookd.MIGRATIONS) + 1}")


def with_log(path):
    make_database(path)
    pathlib.Path(f"{path}-wal").touch()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: None, "is not a file"),
        (lambda path: path.mkdir(), "is not a file"),
        (lambda path: path.touch(), "file is not a database"),
        (lambda path: path.write_text("text" * 9999), "file is not a database"),
        (lambda path: path.symlink_to(path.with_name("a.db")), "is the database itself"),
        (lambda path: spoil(make_database(path)), "is damaged|malformed"),
        (another_programs, "is not a database of webhookd"),
        (newer, "written by a newer webhookd"),
        (with_log, "b.db-wal exists"),
    ],
)
def test_a_file_that_is_no_backup_changes_nothing(tmp_path, make, words):
    database = with_user(tmp_path / "a.db", "old")
    make(tmp_path / "b.db")
    before = {path.name for path in tmp_path.iterdir()}

    result = restored(database, tmp_path / "b.db")

    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert re.search(words, result.stderr)
    assert names(database) == ["old"]
    assert {path.name for path in tmp_path.iterdir()} == before


def test_all_threads_are_kept_on_one_core(shared_daemon):
    tasks = pathlib.Path(f"/proc/{shared_daemon.process.pid}/task").iterdir()

    cores = {frozenset(os.sched_getaffinity(int(task.name))) for task in tasks}

    assert [len(core) for core in cores] == [1]


def test_kill_9_at_any_moment_loses_nothing_that_was_acknowledged(daemon, receiver):
    """Publishers go on while the process is killed again and again."""
    acknowledged, ended = [], threading.Event()

    def publisher(name):
        for number in range(100_000):
            if ended.is_set():
                return
            with contextlib.suppress(OSError, http.client.HTTPException):
                key = f"{name}-{number}"
                if daemon.call("POST", EVENTS, {"event": "e", "key": key})[0] == 202:
                    acknowledged.append(key)

    daemon.start()
    daemon.call("POST", WEBHOOKS, {"url": receiver.url, "events": ["e"]})
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        publishers = [pool.submit(publisher, name) for name in range(4)]
        for _ in range(4):
            enough = len(acknowledged) + 40
            wait_until(lambda enough=enough: len(acknowledged) >= enough)
            daemon.end(signal.SIGKILL)
            daemon.start()
        ended.set()
    assert all(future.exception() is None for future in publishers)

    wait_until(lambda: daemon.call("GET", f"{WEBHOOKS}/1")[1]["health"]["pending"] == 0)
    arrived = {body["key"] for body in receiver.bodies()}
    assert set(acknowledged) <= arrived
    assert len(acknowledged) >= 160


# ======================================================================================
# Benchmark: `python3 test_webhookd.py` prints what README's table is made of
# ======================================================================================

EVENT_BYTES = 1024
EVENT_NAME = "page_created"
EVENTS_PATH, WEBHOOKS_PATH = "/rest/api/events", "/rest/api/webhooks"
STAMP = b"@" * 20  # replaced by the sending time, CLOCK_MONOTONIC in nanoseconds
PUBLISHING_CONNECTIONS = 32  # more than the server has threads: each finds work
PUBLISHING_THREADS = 8  # of the group commits alone: as many as the server has
WEBHOOK_SECRET = "whsec_" + base64.b64encode(b"k" * 32).decode()
PASSWORD = "benchmark"
LOGIN = "Basic " + base64.b64encode(f"admin:{PASSWORD}".encode()).decode()
POLL_SECONDS = 0.01
STALL_SECONDS = 30  # without an answer: something hangs
LIMIT_SECONDS = 900  # for everything


class BenchmarkError(Exception):
    """The measurement does not count: something was lost, repeated or refused."""


# ---- what is sent ----


def event_bytes():
    """One event of EVENT_BYTES, with a place for its sending time."""
    page = {"id": 1015809, "spaceKey": "DEV", "version": 7, "title": "Release notes"}
    event = {"event": EVENT_NAME, "userKey": "ff8080", "page": page}
    event |= {"sent": STAMP.decode(), "text": ""}
    event["text"] = "x" * (EVENT_BYTES - len(json.dumps(event)))
    return json.dumps(event).encode()


def publish_request(batch_size):
    """A whole request that publishes one event, or several as an array."""
    body = event_bytes()
    if batch_size > 1:
        body = b"[" + b",".join([body] * batch_size) + b"]"
    head = (
        f"POST {EVENTS_PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: {LOGIN}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


def message_bytes(received):
    """The length of the HTTP message that came; 0 while it is not all there."""
    head_end = received.find(b"\r\n\r\n") + 4
    if head_end < 4:
        return 0
    end = head_end + int(CONTENT_LENGTH.search(received, 0, head_end)[1])
    return end if len(received) >= end else 0


def percentiles_ms(latencies_ns):
    """p50 and p99 in milliseconds."""
    ordered = sorted(latencies_ns)
    return [ordered[int(share * (len(ordered) - 1))] / 1e6 for share in (0.5, 0.99)]


# ---- the receiver: a process of its own, it ends with its standard input ----


class CheapReceiver:
    """Answers every POST with 200, and knows how long each was under way."""

    ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok"
    SENT = re.compile(rb'"sent":"(\d{20})"')

    def __init__(self, expected, tls_folder=None):
        self._expected = expected
        self._tls = server_context(tls_folder) if tls_folder else None
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._poll = select.epoll()
        self._connections = {}  # file number -> [socket, what came of a request]
        self._connection_count = 0
        self._latencies_ns = []
        self._first_ns = 0

    def run(self):
        self._poll.register(self._listener, select.EPOLLIN)
        self._poll.register(0, select.EPOLLIN | select.EPOLLHUP)
        tell(port=self._listener.getsockname()[1])
        while True:
            for number, _ in self._poll.poll():
                if number == 0:  # the benchmark has closed it: that was all
                    return tell(requests=len(self._latencies_ns))
                self._accept_or_read(number)

    def _accept_or_read(self, number):
        if number == self._listener.fileno():
            connection, _ = self._listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls:
                connection = self._tls.wrap_socket(connection, server_side=True)
            self._connections[connection.fileno()] = [connection, b""]
            self._poll.register(connection, select.EPOLLIN)
            self._connection_count += 1
        else:
            self._read(number)

    def _read(self, number):
        entry = self._connections[number]
        with contextlib.suppress(ConnectionError):
            chunk = entry[0].recv(65536)
            if chunk:
                entry[1] += chunk
                return self._answer(entry)
        self._poll.unregister(number)
        self._connections.pop(number)[0].close()

    def _answer(self, entry):
        connection, received = entry
        if message_bytes(received):
            arrived_ns = time.monotonic_ns()
            connection.send(self.ANSWER)
            entry[1] = b""
            sent_ns = int(self.SENT.search(received)[1])
            self._first_ns = self._first_ns or arrived_ns
            self._latencies_ns.append(arrived_ns - sent_ns)
            if len(self._latencies_ns) == self._expected:
                self._report()

    def _report(self):
        tell(
            latency_ms=percentiles_ms(self._latencies_ns),
            connections=self._connection_count,
            first=self._first_ns / 1e9,
        )


# ---- the load: a process of its own ----


class Publisher:
    """Sends a request again and again, on several kept-alive connections in turn."""

    def __init__(self, port, request):
        address = "127.0.0.1", port
        connect = socket.create_connection
        self._idle = collections.deque(connect(address) for _ in range(PUBLISHING_CONNECTIONS))
        for connection in self._idle:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._request = request
        self._busy = {}  # connection -> [when it was sent, what came of the answer]
        self.latencies_ns = []

    def send(self, stamps_ns):
        """Send as many of the stamped requests as there are idle connections."""
        while stamps_ns and self._idle:
            connection, stamp_ns = self._idle.popleft(), stamps_ns.popleft()
            self._busy[connection] = [stamp_ns, b""]
            connection.sendall(self._request.replace(STAMP, b"%020d" % stamp_ns))

    def receive(self, seconds):
        """Take in the answers that come within some time."""
        readable, _, _ = select.select(self._busy, [], [], seconds)
        if not readable and seconds == STALL_SECONDS:
            raise BenchmarkError(f"no answer within {STALL_SECONDS} s")
        for connection in readable:
            self._read(connection)

    def _read(self, connection):
        entry = self._busy[connection]
        entry[1] += connection.recv(65536)
        if not entry[1].startswith(b"HTTP/1.1 202"):
            raise BenchmarkError(f"the answer is not 202: {entry[1][:500]}")
        if message_bytes(entry[1]):
            self.latencies_ns.append(time.monotonic_ns() - entry[0])
            self._idle.append(connection)
            del self._busy[connection]


def run_load(port, batch_size, count, rate):
    """Publish count requests, at a rate a second; rate 0: as fast as they are answered.

    A request counts as sent from when it is due, though no connection may be free."""
    publisher = Publisher(port, publish_request(batch_size))
    due, stamps_ns, begun = 0, collections.deque(), time.monotonic()
    while len(publisher.latencies_ns) < count:
        now = time.monotonic()
        answered, issued = len(publisher.latencies_ns), due
        due = int((now - begun) * rate) + 1 if rate else answered
        due = min(count, due if rate else due + PUBLISHING_CONNECTIONS)
        stamps_ns.extend([int(now * 1e9)] * (due - issued))
        publisher.send(stamps_ns)
        open_loop = rate and due < count
        publisher.receive(
            max(0, begun + due / rate - time.monotonic()) if open_loop else STALL_SECONDS
        )
    elapsed = time.monotonic() - begun
    latency_ms = percentiles_ms(publisher.latencies_ns)
    tell(begun=begun, rate=count * batch_size / elapsed, latency_ms=latency_ms)


# ---- the ceilings: each a part of webhookd alone, in a process of its own ----


def serve_without_store():
    """waitress as webhookd sets it up, and bottle with a login and JSON both ways."""
    app = bottle.Bottle()

    @app.post(EVENTS_PATH)
    def publish():
        given = bottle.request.get_header("Authorization", "")
        if not hmac.compare_digest(given, LOGIN):
            bottle.abort(401)
        event = json.loads(bottle.request.body.read())
        bottle.response.status = 202
        return {"id": 1, "event": event["event"], "timestamp": 1, "deliveries": 1}

    webhookd.start_logging()
    listener = socket.create_server(("127.0.0.1", 0))
    tell(port=listener.getsockname()[1])
    server = webhookd.make_server(app, listener, webhookd.Settings())
    webhookd.take_requests(server, threading.Event())


def stored_webhook(store, port, event=EVENT_NAME):
    """A signed webhook, stored without the API."""
    url = f"http://127.0.0.1:{port}/0"
    webhook = webhookd.Webhook(url=url, events=(event,), secret=WEBHOOK_SECRET)
    return store.write(webhookd.Batch.add_webhook, webhook)


def event_for_store():
    """An event as the API hands it to the store."""
    body = event_bytes().replace(STAMP, b"%020d" % time.monotonic_ns())
    now_ms = int(time.time() * 1000)
    return webhookd.read_events(body, False, now_ms, 1 << 20)


def commit_alone(database, count):
    """Publish from several threads, each its next event when the last is on disk."""
    event = event_for_store()

    def publish():
        for _ in range(count // PUBLISHING_THREADS):
            store.publish([event], event.timestamp).result()

    with open_store(database) as store:
        stored_webhook(store, 9)
        threads = [threading.Thread(target=publish) for _ in range(PUBLISHING_THREADS)]
        begun = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        tell(rate=count / (time.monotonic() - begun))


def prepare_finished(database, count):
    """A database with finished deliveries, all older than they are kept."""
    created = int((time.time() - 40 * 86400) * 1000)
    with open_store(database) as store:
        stored_webhook(store, 9, "page_removed")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        for table, values in (
            ("events", "n, 'page_removed', :created, :created, 1"),
            ("payloads", "n, CAST(:body AS BLOB)"),
            (
                "deliveries",
                "n, printf('%032x', n), 1, n, 'page_removed', :created, 'succeeded', 1,"
                " NULL, 0, 'SUCCESS', '200', 5",
            ),
            (
                "attempts",
                "n, n, :created, 5, 'http://127.0.0.1:9/0', :headers, 'SUCCESS', '200',"
                " 200, 'Content-Length: 2', 'ok', NULL",
            ),
        ):
            connection.execute(
                "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM"
                f" numbers WHERE n < :count) INSERT INTO {table} SELECT {values} FROM"
                " numbers",
                {"count": count, "created": created, "body": "x" * EVENT_BYTES}
                | {"headers": "X-Some-Header: some value\r\n" * 16},
            )
        connection.commit()
    with open_store(database) as store:  # else its clock would be in doubt at the start
        store.publish([event_for_store()], int(time.time() * 1000)).result()
    os.sync()  # not while it is measured
    tell(prepared=count)


def prepare_backlog(database, port, count):
    """Publish with nobody there to deliver."""
    with open_store(database) as store:
        stored_webhook(store, port)
        event = event_for_store()
        for _ in range(count // 1000):
            store.publish([event] * 1000, event.timestamp).result()
    tell(prepared=count)


# ---- processes ----

CHILDREN = {
    "--receive": lambda *arguments: CheapReceiver(*arguments).run(),
    "--load": run_load,
    "--serve-without-store": serve_without_store,
    "--commit-alone": commit_alone,
    "--prepare-backlog": prepare_backlog,
    "--prepare-finished": prepare_finished,
}


def tell(**values):
    """Called in a child: a line for the benchmark."""
    print(json.dumps(values), flush=True)


def start_child(name, *arguments):
    """Run this file as one of the CHILDREN."""
    command = [sys.executable, __file__, name, *map(json.dumps, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def told(child):
    """The next line of a child."""
    line = child.stdout.readline()
    if not line:
        raise BenchmarkError(f"{child.args[2]} ended unexpectedly")
    return json.loads(line)


def result_of(name, *arguments):
    """What a child tells that ends by itself."""
    with start_child(name, *arguments) as child:
        return told(child)


@contextlib.contextmanager
def receiver_process(expected, tls_folder=None):
    """A receiver that tells its port, and a report when all it expects has come."""
    with start_child("--receive", expected, tls_folder) as child:
        try:
            yield child, told(child)["port"]
        except BaseException:
            child.kill()
            raise
        child.stdin.close()
        requests = told(child)["requests"]
        if requests != expected:
            raise BenchmarkError(f"{requests} requests came, not {expected}")


class Service:
    """A fresh webhookd: `with` starts and stops it."""

    def __init__(self, folder):
        self._folder = folder

    def __enter__(self):
        begun = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, webhookd.__file__, "--listen", "127.0.0.1:0"]
            + ["--allow-networks", "127.0.0.0/8,::1/128", "--database", "webhookd.db"],
            env=os.environ | {"WEBHOOKD_ADMIN_PASSWORD": PASSWORD, "SSL_CERT_FILE": "cert.pem"},
            cwd=self._folder,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.port = self._read_port()
        self.start_seconds = time.monotonic() - begun
        self.idle_mb = self.memory_mb("VmRSS")
        return self

    def __exit__(self, *exc_info):
        self._process.terminate()
        self._process.wait(timeout=STALL_SECONDS)

    def _read_port(self):
        for line in self._process.stderr:
            ready = re.search(r"ready listen=127\.0\.0\.1:(\d+)", line)
            if ready:
                # what it logs from now on must not fill the pipe
                threading.Thread(target=self._process.stderr.read, daemon=True).start()
                return int(ready[1])
        raise BenchmarkError("webhookd did not start")

    def memory_mb(self, field):
        """VmRSS, or VmHWM, the highest it was."""
        status = pathlib.Path(f"/proc/{self._process.pid}/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024

    def cpu_seconds(self):
        """User and system time of the process so far."""
        stat = pathlib.Path(f"/proc/{self._process.pid}/stat").read_text()
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def call(self, method, path, document=None):
        """A request to the API; its answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, STALL_SECONDS)
        headers = {"Authorization": LOGIN, "Content-Type": "application/json"}
        with contextlib.closing(connection):
            connection.request(method, path, json.dumps(document), headers)
            response = connection.getresponse()
            if response.status not in (200, 201):
                raise BenchmarkError(f"{method} {path}: {response.status}")
            return json.load(response)

    def register(self, url, count, event=EVENT_NAME):
        """Register signed webhooks that lead to the receiver."""
        webhook = {"events": [event], "configuration": {"secret": WEBHOOK_SECRET}}
        for number in range(count):
            self.call("POST", WEBHOOKS_PATH, webhook | {"url": f"{url}/{number}"})

    def idle_figures(self, seconds):
        """Wake-ups a second of the thread that wakes most, and KB written, when idle."""
        before, written = self._wakeups(), self._written_bytes()
        time.sleep(seconds)
        after = self._wakeups()
        most = max(after[thread] - before[thread] for thread in before)
        return most / seconds, (self._written_bytes() - written) / 1024

    def _wakeups(self):
        """How often each thread has waited for something."""
        wait = re.compile(r"\nvoluntary_ctxt_switches:\s+(\d+)")
        tasks = pathlib.Path(f"/proc/{self._process.pid}/task").iterdir()
        return {task: int(wait.search((task / "status").read_text())[1]) for task in tasks}

    def _written_bytes(self):
        text = pathlib.Path(f"/proc/{self._process.pid}/io").read_text()
        return int(re.search(r"\nwrite_bytes: (\d+)", text)[1])

    def wait_until_recorded(self, expected):
        """When nothing was pending any more; every attempt must have succeeded."""
        while self._pending():
            time.sleep(POLL_SECONDS)
        recorded = time.monotonic()
        page = self.call("GET", WEBHOOKS_PATH + "?statistics=true&limit=1000")
        counts = [webhook["statistics"]["counts"] for webhook in page["results"]]
        kinds = "successes", "failures", "errors"
        sums = [sum(count[kind] for count in counts) for kind in kinds]
        if sums != [expected, 0, 0]:
            raise BenchmarkError(f"{kinds} are {sums}, not {[expected, 0, 0]}")
        return recorded

    def _pending(self):
        page = self.call("GET", WEBHOOKS_PATH + "?limit=1000")
        return sum(webhook["health"]["pending"] for webhook in page["results"])


# ---- measurements: each returns named figures ----


def measure_publishing(count, batch_size=1, webhooks=1, rate=0, others=0, finished=0, tls=False):
    """Publish so many events, and wait until all is delivered and recorded.

    others: webhooks that do not want them; finished: deliveries from long ago."""
    expected = count * webhooks
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if tls:
            make_certificate(folder)
        if finished:
            result_of("--prepare-finished", f"{folder}/webhookd.db", finished)
        receiver, port = stack.enter_context(receiver_process(expected, folder if tls else None))
        service = stack.enter_context(Service(folder))
        url = f"https://localhost:{port}" if tls else f"http://127.0.0.1:{port}"
        service.register(url, webhooks)
        service.register(url, others, "page_removed")
        cpu_before = service.cpu_seconds()
        load = result_of("--load", service.port, batch_size, count // batch_size, rate)
        report = told(receiver)
        seconds = service.wait_until_recorded(expected) - load["begun"]
        return {
            "cpu_us": (service.cpu_seconds() - cpu_before) * 1e6 / count,
            "accepted": load["rate"],
            "events": count / seconds,
            "deliveries": expected / seconds,
            "publish_p50_ms": load["latency_ms"][0],
            "publish_p99_ms": load["latency_ms"][1],
            "end_to_end_p50_ms": report["latency_ms"][0],
            "end_to_end_p99_ms": report["latency_ms"][1],
            "connections": report["connections"],
            "start_seconds": service.start_seconds,
            "idle_mb": service.idle_mb,
            "loaded_mb": service.memory_mb("VmRSS"),
            "highest_mb": service.memory_mb("VmHWM"),
        }


def measure_idling(seconds):
    """What a service does that has nothing to do."""
    with tempfile.TemporaryDirectory() as folder, Service(folder) as service:
        service.register("http://127.0.0.1:9", 1)
        time.sleep(2)
        wakeups, written_kb = service.idle_figures(seconds)
    return {"wakeups": wakeups, "written_kb": written_kb}


def measure_serving(count):
    """waitress and bottle alone."""
    with start_child("--serve-without-store") as server:
        try:
            return result_of("--load", told(server)["port"], 1, count, 0)
        finally:
            server.terminate()


def measure_commits(count):
    """Group commits alone."""
    with tempfile.TemporaryDirectory() as folder:
        return result_of("--commit-alone", f"{folder}/webhookd.db", count)


def measure_delivering(count):
    """The delivery loop alone: a service that finds a backlog when it starts."""
    with tempfile.TemporaryDirectory() as folder, receiver_process(count) as (receiver, port):
        result_of("--prepare-backlog", f"{folder}/webhookd.db", port, count)
        with Service(folder) as service:
            report = told(receiver)
            seconds = service.wait_until_recorded(count) - report["first"]
    return {"rate": count / seconds}


def medians(measure, rounds, *arguments, **named):
    """The median of each figure over some rounds."""
    results = [measure(*arguments, **named) for _ in range(rounds)]
    median = statistics.median
    return {key: median(one[key] for one in results) for key in keys_of_numbers(results)}


def keys_of_numbers(results):
    return [key for key, value in results[0].items() if isinstance(value, (int, float))]


def sync_ms():
    """The median time of a 4 KiB write with fdatasync, where the databases are."""
    with tempfile.NamedTemporaryFile() as file:
        times = [time.monotonic()]
        for _ in range(200):
            os.write(file.fileno(), bytes(4096))
            os.fdatasync(file.fileno())
            times.append(time.monotonic())
    return 1000 * statistics.median(b - a for a, b in itertools.pairwise(times))


# ---- tables ----

SUSTAINED = (  # what, events, how
    ("single events, 1 webhook", 8000, {}),
    ("single events, 10 webhooks", 2000, {"webhooks": 10}),
    ("batches of 100, 1 webhook", 20000, {"batch_size": 100}),
    ("batches of 100, 10 webhooks", 3000, {"batch_size": 100, "webhooks": 10}),
)
GROWTH = (  # what, how
    ("1,000 webhooks registered, one wants the event", {"others": 999}),
    ("a million finished deliveries, being pruned", {"finished": 1_000_000}),
    ("TLS receiver, kept alive", {"tls": True}),
)
CEILINGS = (
    ("waitress and bottle with login and JSON, no store", measure_serving, 10000),
    ("group commits alone", measure_commits, 16000),
    ("delivery loop alone, from a backlog", measure_delivering, 20000),
)
SHARES = (0.2, 0.5)  # of the sustained rate of single events
LATENCY_SECONDS = 10
IDLE_SECONDS = 10


def print_table(head, rows):
    """Rows of Markdown; the first column is text, the others are figures."""
    print(f"\n| {' | '.join(head)} |\n|---|{'---:|' * (len(head) - 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def print_machine():
    """What was measured where."""
    cpu = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    waitress_version = importlib.metadata.version("waitress")
    print(
        f"{cpu[1] if cpu else platform.machine()},"
        f" {len(os.sched_getaffinity(0))} cores, fdatasync {sync_ms():.2f} ms;"
        f" Python {platform.python_version()}, SQLite {sqlite3.sqlite_version},"
        f" bottle {bottle.__version__}, waitress {waitress_version};"
        f" {datetime.date.today()}"
    )


def sustained_rows(results):
    keys = "accepted", "events", "deliveries", "cpu_us"
    for (words, _, _), result in zip(SUSTAINED, results):
        yield words, *(f"{result[key]:,.0f}" for key in keys)


def latency_rows(share_results):
    keys = [f"{way}_p{p}_ms" for way in ("publish", "end_to_end") for p in (50, 99)]
    for share, result in share_results:
        yield (
            f"at {share:.0%} of the load, {result['accepted']:,.0f} events/s",
            *(f"{result[key]:.1f}" for key in keys),
        )


def ceiling_rows(rates, sustained):
    nearest = min(rates.values())
    for words, rate in rates.items():
        mark = ", the nearest" if rate == nearest else ""
        yield words + mark, f"{rate:,.0f}", f"{rate / sustained:.1f}"


def growth_rows(results, sustained):
    for (words, _), result in zip(GROWTH, results):
        yield words, f"{result['events']:,.0f}", f"{result['events'] / sustained:.0%}"


def footprint_rows(single, results, idle):
    highest = max(result["highest_mb"] for result in results)
    yield "memory when idle", f"{single['idle_mb']:.0f} MB"
    yield "memory after the single events", f"{single['loaded_mb']:.0f} MB"
    yield "memory after the batches", f"{results[2]['loaded_mb']:.0f} MB"
    yield "memory at its highest in all of the above", f"{highest:.0f} MB"
    yield "start to ready", f"{single['start_seconds']:.2f} s"
    yield "connections to the receiver of one webhook", f"{single['connections']:.0f}"
    yield "idle: wake-ups a second of any thread, at most", f"{idle['wakeups']:.1f}"
    yield "idle: written to the disk", f"{idle['written_kb']:.0f} KB"


def run_benchmark(rounds, scale):
    """Measure and print everything; scale: the share of the events to publish."""
    print_machine()
    results = [
        medians(measure_publishing, rounds, int(count * scale), **how)
        for _, count, how in SUSTAINED
    ]
    head = "sustained until delivered and recorded", "accepted events/s"
    head = *head, "events/s", "deliveries/s", "CPU µs an event"
    print_table(head, sustained_rows(results))
    single, latencies = results[0], []
    for share in SHARES:
        rate = share * single["events"]
        count = int(rate * LATENCY_SECONDS * scale)
        latencies.append(medians(measure_publishing, rounds, count, rate=rate))
    head = "latency in ms, single events, 1 webhook", "publish p50", "publish p99"
    rows = latency_rows(zip(SHARES, latencies))
    print_table((*head, "end to end p50", "end to end p99"), rows)
    count = int(SUSTAINED[0][1] * scale)
    grown = [medians(measure_publishing, rounds, count, **how) for _, how in GROWTH]
    head = "single events, 1 webhook, and", "events/s", "of the rate without"
    print_table(head, growth_rows(grown, single["events"]))
    rates = {
        words: medians(measure, rounds, int(count * scale))["rate"]
        for words, measure, count in CEILINGS
    }
    head = "ceilings of single events, 1 webhook", "a second"
    rows = ceiling_rows(rates, single["events"])
    print_table((*head, "times the sustained rate"), rows)
    idle = measure_idling(IDLE_SECONDS)
    print_table(("footprint", ""), footprint_rows(single, results + latencies, idle))


def out_of_time(number, frame):
    raise BenchmarkError(f"not done within {LIMIT_SECONDS} s")


def main(argv):
    """Run the benchmark, or one of its child processes."""
    if argv and argv[0] in CHILDREN:
        return CHILDREN[argv[0]](*map(json.loads, argv[1:]))
    parser = argparse.ArgumentParser(description="Measure webhookd.")
    parser.add_argument("--quick", action="store_true", help="in about a minute")
    quick = parser.parse_args(argv).quick
    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(LIMIT_SECONDS)
    try:
        return run_benchmark(1, 0.5) if quick else run_benchmark(3, 1)
    except BenchmarkError as error:
        return f"benchmark: {error}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
