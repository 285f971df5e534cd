"""A Hub on the loopback interface: the endpoints with which the Hub's clients push, download and stream.

    with LoopbackHub() as hub:
        hub.data_sets["someone/pictures"].commit({"data/train-00000.parquet": content})
        subprocess.run(command, env={**os.environ, **hub.environment(home)})
        assert hub.models["tester/discs"].files()["README.md"]

`models` and `data_sets` hold a `Repository` by name, made at its first use; a push makes one too. A repository has
commits, and branches that name them.

Everything that was asked is in `hub.requests`, in order. To fail on schedule, set `hub.failures` (again at any time)
to a list or to a function:

    hub.failures = [None, Refuse(503), Cut(after=1000)]   # met by the next file GETs, one each; then all is well
    hub.failures = lambda request: Refuse(500) if request.path.startswith("/api/") else None   # asked about every one
    hub.failures = outage(503, seconds=2.0, after=3)      # three file GETs succeed, then nothing does for two seconds

A file GET asks for a file's content, whole or a range of it; a data set's README.md, which `datasets` reads first, is
a file too. Its `Request.file` is the path in the repository.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id


@dataclass(frozen=True)
class Refuse:
    """Answer with this status and an empty body."""

    status: int


@dataclass(frozen=True)
class Cut:
    """Promise the whole body, send `after` bytes of it, then reset the connection, or else close it in order."""

    after: int
    reset: bool = True


@dataclass
class Request:
    """One request and how it was answered."""

    method: str
    path: str  # without the query
    file: str | None = None  # path in the repository, of a request for a file's content
    revision: str | None = None  # as asked for, a branch or a commit
    range: str | None = None  # the Range header, such as "bytes=0-999"
    status: int | None = None
    sent: int = 0  # bytes of the body

    @property
    def is_file_get(self) -> bool:
        return self.method == "GET" and self.file is not None


Failure = Refuse | Cut


def outage(status: int, *, seconds: float, after: int = 0) -> Callable[[Request], Failure | None]:
    """For `hub.failures`: after `after` file GETs every request is refused with `status`, for `seconds`."""
    file_gets, ends = 0, None

    def failure(request: Request) -> Failure | None:
        nonlocal file_gets, ends
        file_gets += request.is_file_get
        if ends is None and file_gets <= after:
            return None
        ends = ends or time.monotonic() + seconds
        return Refuse(status) if time.monotonic() < ends else None

    return failure


@dataclass
class Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add or replace files on a branch, which starts from main if it is new: the commit's id."""
        files = self.files(branch if branch in self.branches else "main") | files
        described = "".join(f"{path} {hashlib.sha1(content).hexdigest()}\n" for path, content in sorted(files.items()))
        sha = hashlib.sha1(f"{branch}\n{described}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit's id of a branch or commit."""
        return self.branches.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Contents by path."""
        return self.commits[self.resolve(revision) or ""]


class LoopbackHub:
    """A server with its own thread, running within a `with` block; see the module's text."""

    def __init__(self) -> None:
        self.models: defaultdict[str, Repository] = defaultdict(Repository)
        self.data_sets: defaultdict[str, Repository] = defaultdict(Repository)
        self.objects: dict[str, bytes] = {}  # uploaded large files by SHA-256
        self.requests: list[Request] = []
        self.failures: list[Failure | None] | Callable[[Request], Failure | None] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.lock = threading.Lock()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables with which a new process takes this for the Hub, and keeps its downloads under `home`."""
        return {"HF_ENDPOINT": self.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}

    def record(self, request: Request) -> Failure | None:
        """Log the request; the failure that the schedule has for it."""
        with self.lock:
            self.requests.append(request)
            if callable(self.failures):
                return self.failures(request)
            return self.failures.pop(0) if request.is_file_get and self.failures else None

    def __enter__(self) -> LoopbackHub:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def card_errors(content: str) -> list[str]:
    """What the Hub would refuse in a model card's metadata (https://huggingface.co/docs/hub/model-cards)."""
    block = re.match(r"---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", content, flags=re.DOTALL)
    if block is None:
        return ["no YAML metadata between two lines of ---"]
    try:
        metadata = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"the metadata is not YAML: {error}"]
    if not isinstance(metadata, dict):
        return ["the metadata must be an object"]
    errors = []
    for key, kind in (("base_model", "model"), ("datasets", "dataset")):
        ids = metadata.get(key, [])
        for number, name in enumerate(ids if isinstance(ids, list) else [ids]):
            try:
                validate_repo_id(name)
            except HFValidationError:
                errors.append(f'"{key}[{number}]" with value "{name}" is not valid. Use a {kind} id from the Hub.')
    for key, example in (("library_name", "diffusers"), ("pipeline_tag", "text-to-image")):
        value = metadata.get(key, example)
        if not isinstance(value, str) or not re.fullmatch(r"[a-z0-9]+([-_.][a-z0-9]+)*", value):
            errors.append(f'"{key}" with value "{value}" is not valid. It must be a string such as {example}.')
    tags = metadata.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        errors.append('"tags" must be an array of strings')
    return errors


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(self._body())

    do_PUT = do_POST

    def _answer(self, body: bytes) -> None:
        url = urlsplit(self.path)
        # Split before unquoting: a revision such as refs%2Fpr%2F1 is one segment.
        segments = [unquote(segment) for segment in url.path.strip("/").split("/")]
        is_data_set = segments[0] == "datasets"
        repositories = self.hub.data_sets if is_data_set else self.hub.models
        self.asked = Request(self.command, unquote(url.path), range=self.headers.get("Range"))
        match segments[is_data_set:]:
            case [_, _, "resolve", revision, *path]:
                self.asked.file, self.asked.revision = "/".join(path), revision
        self.failure = self.hub.record(self.asked)
        if isinstance(self.failure, Refuse):
            return self._reply(self.failure.status)
        match segments[is_data_set:]:
            case [owner, name, "resolve", revision, *path]:
                self._send_file(f"{owner}/{name}", repositories, revision, "/".join(path))
            case ["api", "whoami-v2"]:
                self._json({"name": "tester", "type": "user", "orgs": [], "auth": {}})
            case ["api", "repos", "create"]:
                new = json.loads(body)
                name = f"{new.get('organization') or 'tester'}/{new['name']}"
                (self.hub.data_sets if new.get("type") == "dataset" else self.hub.models)[name]
                self._json({"url": f"{self.hub.address}/{name}", "name": name, "id": name})
            case ["api", "validate-yaml"]:
                self._check_card(json.loads(body)["content"])
            case ["api", "models" | "datasets" as kind, owner, name, *rest]:
                repositories = self.hub.models if kind == "models" else self.hub.data_sets
                self._send_api(f"{owner}/{name}", repositories, rest, parse_qs(url.query), body)
            case [*_, "info", "lfs", "objects", "batch"]:
                objects = [{key: one[key] for key in ("oid", "size")} for one in json.loads(body)["objects"]]
                for one in objects:
                    one["actions"] = {"upload": {"href": f"{self.hub.address}/lfs/{one['oid']}"}}
                self._json({"transfer": "basic", "objects": objects})
            case ["lfs", oid] if oid == hashlib.sha256(body).hexdigest():
                self.hub.objects[oid] = body
                self._reply(200)
            case _:
                self._reply(404)

    def _send_api(
        self, name: str, repositories: dict[str, Repository], rest: list[str], query: dict[str, list[str]], body: bytes
    ) -> None:
        if name not in repositories:
            return self._reply(404, X_Error_Code="RepoNotFound")
        repository = repositories[name]
        action, revision, *path = [*rest, "main"] if len(rest) == 1 else rest or ["revision", "main"]
        sha = repository.resolve(revision)
        if sha is None:
            return self._reply(404, X_Error_Code="RevisionNotFound")
        entries = {entry["path"]: entry for entry in _entries(repository.commits[sha])}
        match action:
            case "revision":
                siblings = [{"rfilename": file} for file in repository.commits[sha]]
                self._json({"id": name, "sha": sha, "siblings": siblings, "private": False, "tags": []})
            case "tree":
                folder = "/".join(path)
                inside = [entry for path, entry in entries.items() if path.startswith(f"{folder}/" if folder else "")]
                if query.get("recursive", ["false"])[0].lower() != "true":
                    depth = len(path)
                    inside = [entry for entry in inside if entry["path"].count("/") == depth]
                known = not folder or entries.get(folder, {}).get("type") == "directory"
                self._json(inside) if known else self._reply(404, X_Error_Code="EntryNotFound")
            case "paths-info":
                is_json = "json" in self.headers.get("Content-Type", "")
                paths = json.loads(body)["paths"] if is_json else parse_qs(body.decode())["paths"]
                self._json([entries[path] for path in paths if path in entries])
            case "preupload":
                paths = [file["path"] for file in json.loads(body)["files"]]
                modes = ["lfs" if path.endswith((".safetensors", ".png", ".parquet")) else "regular" for path in paths]
                described = zip(paths, modes, strict=True)
                self._json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in described]})
            case "commit":
                self._commit(name, repository, revision, [json.loads(line) for line in body.splitlines()])
            case _:
                self._reply(404)

    def _commit(self, name: str, repository: Repository, branch: str, lines: list[dict[str, Any]]) -> None:
        values = [(line["key"], line["value"]) for line in lines]
        files = {value["path"]: base64.b64decode(value["content"]) for key, value in values if key == "file"}
        files |= {value["path"]: self.hub.objects[value["oid"]] for key, value in values if key == "lfsFile"}
        if "README.md" in files and card_errors(files["README.md"].decode()):
            return self._check_card(files["README.md"].decode())
        sha = repository.commit(files, branch)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.address}/{name}/commit/{sha}"})

    def _check_card(self, content: str) -> None:
        errors = [{"message": message} for message in card_errors(content)]
        self._json({"errors": errors, "warnings": []}, status=400 if errors else 200)

    def _send_file(self, name: str, repositories: dict[str, Repository], revision: str, path: str) -> None:
        if name not in repositories:
            return self._reply(404, X_Error_Code="RepoNotFound")
        sha = repositories[name].resolve(revision)
        if sha is None:
            return self._reply(404, X_Error_Code="RevisionNotFound")
        content = repositories[name].commits[sha].get(path)
        if content is None:
            return self._reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.asked.range or "")
        if span is None:
            return self._reply(200, content, **headers)
        first, last = span.groups()
        start = int(first) if first else max(0, len(content) - int(last))
        end = min(len(content), int(last) + 1 if first and last else len(content))
        if start >= end:
            return self._reply(416, Content_Range=f"bytes */{len(content)}")
        self._reply(206, content[start:end], Content_Range=f"bytes {start}-{end - 1}/{len(content)}", **headers)

    def _json(self, value: object, status: int = 200) -> None:
        self._reply(status, json.dumps(value).encode(), Content_Type="application/json")

    def _reply(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.asked.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.failure if isinstance(self.failure, Cut) and self.failure.after < len(content) else None
        sent = content[: cut.after] if cut else content
        self.asked.sent = len(sent)  # before the client has it, who may look at once
        try:
            self.wfile.write(sent)
        except ConnectionError:  # a stream that was closed early
            self.close_connection = True
            return
        if cut:
            self.close_connection = True
            if cut.reset:
                # Closed with no time to linger, a socket sends a reset; both references to it must go.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.rfile.close()
                self.connection.close()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body


def _entries(files: dict[str, bytes]) -> list[dict[str, Any]]:
    """Files and their folders, as the Hub lists a tree."""
    folders = {str(folder) for path in files for folder in Path(path).parents if str(folder) != "."}
    listed = [{"type": "directory", "path": folder, "size": 0, "oid": "0" * 40} for folder in folders]
    for path, content in files.items():
        oid = hashlib.sha1(content).hexdigest()
        listed.append({"type": "file", "path": path, "size": len(content), "oid": oid})
    return sorted(listed, key=lambda entry: entry["path"])
