"""A Hub on the loopback interface, with the endpoints that huggingface_hub's clients use to push and to read."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

COMMIT = "0" * 39 + "1"


class LoopbackHub:
    """Holds files by repository; `failures` is the number of commits to refuse with status 503."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.failures = 0
        self.created: list[dict] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def _reply(self, status: int, content: bytes = b"", **headers: str) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT, **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def _json(self, value: object, status: int = 200) -> None:
                self._reply(status, json.dumps(value).encode(), Content_Type="application/json")

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def do_POST(self) -> None:
                path, body = unquote(urlparse(self.path).path), self._body()
                if path == "/api/repos/create":
                    asked = json.loads(body)
                    hub.created.append({**asked, "token": self.headers.get("Authorization", "")})
                    name = "/".join(filter(None, [asked.get("organization") or "tester", asked["name"]]))
                    hub.files.setdefault(name, {})
                    self._json({"url": f"http://{self.headers['Host']}/{name}", "name": name, "id": name})
                elif path == "/api/validate-yaml":
                    self._json({"errors": [], "warnings": []})
                elif "/preupload/" in path:
                    asked = json.loads(body)["files"]
                    lfs = (".safetensors", ".png")
                    modes = [
                        {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(lfs) else "regular"}
                        for f in asked
                    ]
                    self._json({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
                elif path.endswith("/info/lfs/objects/batch"):
                    objects = [
                        {
                            **{key: o[key] for key in ("oid", "size")},
                            "actions": {"upload": {"href": f"http://{self.headers['Host']}/lfs/{o['oid']}"}},
                        }
                        for o in json.loads(body)["objects"]
                    ]
                    self._json({"transfer": "basic", "objects": objects})
                elif "/commit/" in path:
                    if hub.failures:
                        hub.failures -= 1
                        self._reply(503)
                        return
                    name = path.removeprefix("/api/models/").split("/commit/")[0]
                    for line in map(json.loads, body.splitlines()):
                        value = line["value"]
                        if line["key"] == "file":
                            hub.files[name][value["path"]] = base64.b64decode(value["content"])
                        elif line["key"] == "lfsFile":
                            hub.files[name][value["path"]] = hub.objects[value["oid"]]
                    url = f"http://{self.headers['Host']}/{name}/commit/{COMMIT}"
                    self._json({"success": True, "commitOid": COMMIT, "commitUrl": url})
                else:
                    self._reply(404)

            def do_PUT(self) -> None:
                content = self._body()
                hub.objects[hashlib.sha256(content).hexdigest()] = content
                self._reply(200)

            def do_GET(self) -> None:
                path = unquote(urlparse(self.path).path)
                if path == "/api/whoami-v2":
                    self._json({"name": "tester", "type": "user", "orgs": [], "auth": {}})
                    return
                if path.startswith("/api/models/"):
                    name = "/".join(path.split("/")[3:5])
                    if name not in hub.files:
                        self._reply(404, X_Error_Code="RepoNotFound")
                    elif "/tree/" in path:
                        folder = "".join(path.split("/tree/")[1].partition("/")[2:])
                        tree = [
                            {"type": "file", "path": file, "size": len(content), "oid": ""}
                            for file, content in hub.files[name].items()
                            if file.startswith(folder)
                        ]
                        self._json(tree) if tree else self._reply(404, X_Error_Code="EntryNotFound")
                    else:
                        siblings = [{"rfilename": file} for file in hub.files[name]]
                        self._json({"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
                    return
                owner, repo, _, _, *rest = [*path.strip("/").split("/"), "", "", "", ""]
                name, file = f"{owner}/{repo}", "/".join(part for part in rest if part)
                if name not in hub.files:
                    self._reply(404, X_Error_Code="RepoNotFound")
                elif file not in hub.files[name]:
                    self._reply(404, X_Error_Code="EntryNotFound")
                else:
                    content = hub.files[name][file]
                    self._reply(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"')

            do_HEAD = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> LoopbackHub:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
