"""A hub on the loopback interface: the part of the Hugging Face hub's protocol that downloads and small uploads use."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "1234567890" * 4
LARGE = (".pth", ".pt", ".safetensors")  # kept like the hub's large files: behind a redirect, with a SHA-256


@dataclass
class FakeHub:
    """Repositories by their path in URLs (`user/model`, `datasets/user/orders`), and what has been asked for."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range
    cut: dict[str, list[int]] = field(default_factory=dict)  # file: bytes after which its next answers break off
    altered: set[str] = field(default_factory=set)  # files that arrive with a wrong byte
    stall: threading.Event | None = None  # an answer that would be cut waits for this instead
    url: str = ""
    cdn: str = ""  # the same server under another name, as large files are kept elsewhere
    leaked: bool = False  # the token was sent there

    def ranges(self, name: str) -> list[str]:
        """`Range` of the GET requests for the content of a file, in order."""
        return [span for method, path, span in self.requests if method == "GET" and path.endswith(f"/{name}")]

    def digest(self, name: str, content: bytes) -> str:
        if name.endswith(LARGE):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def describe(self, repo: str) -> dict:
        siblings = []
        for name, content in self.repos[repo].items():
            entry: dict = {"rfilename": name, "size": len(content), "blobId": "0" * 40}
            if name.endswith(LARGE):
                entry["lfs"] = {"size": len(content), "sha256": self.digest(name, content), "pointerSize": 130}
            else:
                entry["blobId"] = self.digest(name, content)
            siblings.append(entry)
        return {"id": repo, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}


def start(hub: FakeHub) -> ThreadingHTTPServer:
    """Serve ``hub`` until the server is shut down; ``hub.url`` says where."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers.get("Range", "")))
            if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
                repo = match[2] if match[1] == "models" else f"datasets/{match[2]}"
                if repo in hub.repos:
                    return self.answer_json(hub.describe(repo))
            elif match := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
                content = hub.repos.get(match[1], {}).get(match[2])
                if content is not None:
                    return self.answer_file(match[1], match[2], content)
            elif match := re.fullmatch(r"/cdn/((?:datasets/)?[^/]+/[^/]+)/(.+)", path):
                hub.leaked |= "Authorization" in self.headers
                return self.answer_content(match[2], hub.repos[match[1]][match[2]], {})
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(("POST", path, ""))
            if self.headers.get("Authorization") != "Bearer hf_test":
                return self.answer(401, b"", {})
            if path == "/api/repos/create":
                repo = "{organization}/{name}".format(**json.loads(body))
                hub.repos.setdefault(repo, {})
                return self.answer_json({"url": f"{hub.url}/{repo}"})
            if path == "/api/validate-yaml":
                return self.answer_json({"errors": [], "warnings": []})
            match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
            assert match is not None, path
            if match[2] == "preupload":
                names = [file["path"] for file in json.loads(body)["files"]]
                files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
                return self.answer_json({"files": files, "commitOid": COMMIT})
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.repos[match[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer_json({"commitOid": COMMIT, "commitUrl": f"{hub.url}/{match[1]}/commit/{COMMIT}"})

        def answer_file(self, repo: str, name: str, content: bytes) -> None:
            digest = hub.digest(name, content)
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"'}
            if not name.endswith(LARGE):
                return self.answer_content(name, content, headers)
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            self.answer(302, b"", headers | {"Location": f"{hub.cdn}/cdn/{repo}/{name}"})

        def answer_content(self, name: str, content: bytes, headers: dict[str, str]) -> None:
            if name in hub.altered:
                content = content[:-1] + bytes([content[-1] ^ 1])
            status, total = 200, len(content)
            if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
                status, start = 206, int(match[1])
                content = content[start:]
                headers = headers | {"Content-Range": f"bytes {start}-{total - 1}/{total}"}
            self.answer(status, content, headers, hub.cut.get(name))

        def answer_json(self, value: object) -> None:
            self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def answer(self, status: int, body: bytes, headers: dict[str, str], cut: list[int] | None = None) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if cut:
                self.wfile.write(body[: cut.pop(0)])
                self.wfile.flush()
                if hub.stall is not None:
                    hub.stall.wait(60)
                self.close_connection = True
            else:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url, hub.cdn = (f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost"))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server
