"""A Hub on 127.0.0.1 that speaks what huggingface_hub asks of the real one: create, preupload, LFS, commit, info, resolve.

What it holds is in `repos`; what was asked of it in `log`. `fail(path, …)` has the next requests to a path answered with a status, or
cut off in the middle.
"""

import base64
import hashlib
import json
import re
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "t" * 34
CUT = 0
LFS_SUFFIXES = (".safetensors", ".bin")


class Repo:
    """Its commits, newest last: {path: content}."""

    def __init__(self, private: bool):
        self.private, self.commits, self.stored = private, [{}], {}

    @property
    def sha(self) -> str:
        return f"{len(self.commits):040x}"

    def files(self, revision: str) -> dict[str, bytes] | None:
        if revision == "main":
            return self.commits[-1]
        number = int(revision, 16) if re.fullmatch(r"[0-9a-f]{40}", revision) else 0
        return self.commits[number - 1] if 1 <= number <= len(self.commits) else None


class LoopbackHub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.log: list[str] = []
        self.failures: dict[str, list[tuple[int, dict[str, str]]]] = defaultdict(list)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def fail(self, part: str, *statuses: int, **headers: str) -> None:
        """Answer the next requests whose path has `part` with these statuses; CUT closes the connection."""
        self.failures[part] += [(status, {name.replace("_", "-"): value for name, value in headers.items()}) for status in statuses]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are nothing to report."""


class Handler(BaseHTTPRequestHandler):
    server: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, content: Any = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, _ = self.path.partition("?")
        self.server.log.append(f"{self.command} {path}")
        for part, planned in self.server.failures.items():
            if part in path and planned:
                status, headers = planned.pop(0)
                if status == CUT:
                    self.close_connection = True
                    self.connection.close()
                else:
                    self.answer(status, {"error": f"planned {status}"}, **headers)
                return
        for pattern, handle in ROUTES.items():
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                handle(self, body, **found.groupdict())
                return
        self.answer(404, {"error": "no such endpoint"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def may(self, repo: Repo | None = None) -> bool:
        """Whether the request's token allows it; private repositories are not there for others."""
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.answer(401, {"error": "Invalid username or password."}, X_Error_Code="RepoNotFound" if repo else "")
        return False

    def repo(self, name: str, writes: bool = True) -> Repo | None:
        repo = self.server.repos.get(name)
        if repo is None:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return repo if (not writes and not repo.private) or self.may(repo) else None

    # --- endpoints ----------------------------------------------------------------------------------------------------

    def create(self, body: bytes) -> None:
        if not self.may():
            return
        asked = json.loads(body)
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        known = name in self.server.repos
        if not known:
            self.server.repos[name] = Repo(asked.get("visibility") == "private")
        self.answer(409 if known else 200, {"url": f"{self.server.url}/{name}", "error": "exists"})

    def info(self, body: bytes, name: str, revision: str = "main") -> None:
        if repo := self.repo(name, writes=False):
            siblings = [{"rfilename": path} for path in repo.files(revision) or {}]
            self.answer(200, {"id": name, "sha": repo.sha, "private": repo.private, "siblings": siblings, "tags": []})

    def tree(self, body: bytes, name: str, revision: str) -> None:
        if repo := self.repo(name, writes=False):
            files = (repo.files(revision) or {}).items()
            self.answer(200, [{"type": "file", "path": path, "size": len(data), "oid": sha1(data)} for path, data in files])

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        if repo := self.repo(name):
            files = []
            for file in json.loads(body)["files"]:
                lfs, there = file["path"].endswith(LFS_SUFFIXES), repo.commits[-1].get(file["path"])
                oid = None if there is None else (hashlib.sha256(there).hexdigest() if lfs else sha1(there))
                files.append({"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
            self.answer(200, {"files": files})

    def lfs(self, body: bytes, name: str) -> None:
        if repo := self.repo(name):
            objects = []
            for item in json.loads(body)["objects"]:
                upload = (
                    {} if item["oid"] in repo.stored else {"actions": {"upload": {"href": f"{self.server.url}/lfs/{name}/{item['oid']}"}}}
                )
                objects.append(item | upload)
            self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, name: str, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.repos[name].stored[oid] = body
        self.answer(200)

    def commit(self, body: bytes, name: str, revision: str) -> None:
        if repo := self.repo(name):
            files = dict(repo.commits[-1])
            for line in body.splitlines():
                item = json.loads(line)
                key, value = item["key"], item["value"]
                if key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    files[value["path"]] = repo.stored[value["oid"]]
                elif key == "deletedFile":
                    del files[value["path"]]
            repo.commits.append(files)
            url = f"{self.server.url}/{name}/commit/{repo.sha}"
            self.answer(200, {"commitUrl": url, "commitOid": repo.sha, "success": True})

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        if repo := self.repo(name, writes=False):
            files = repo.files(revision)
            commit = {"X_Repo_Commit": repo.sha if revision == "main" else revision}
            if files is None:
                self.answer(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
            elif path not in files:
                self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", **commit)
            else:
                self.answer(200, files[path], ETag=f'"{sha1(files[path])}"', **commit)

    def collect(self, body: bytes) -> None:
        if not self.may():
            return
        asked = json.loads(body)
        slug = f"{asked['namespace']}/{asked['title'].lower().replace(' ', '-')}-0123456789abcdef01234567"
        known = slug in self.server.collections
        new = {"slug": slug, "title": asked["title"], "owner": {"name": asked["namespace"]}, "private": asked["private"], "items": [],
               "position": 0, "theme": "green", "upvotes": 0, "lastUpdated": "2026-11-21T00:00:00.000Z"}  # fmt: skip
        self.server.collections.setdefault(slug, new)
        self.answer(409 if known else 200, self.server.collections[slug])

    def collection(self, body: bytes, slug: str) -> None:
        self.answer(200, self.server.collections[slug])

    def add_item(self, body: bytes, slug: str) -> None:
        asked, items = json.loads(body), self.server.collections[slug]["items"]
        known = any(item["id"] == asked["item"]["id"] for item in items)
        if not known:
            note = {"text": asked["note"], "html": ""}
            items.append({"_id": f"{len(items):024x}", "position": len(items), "note": note, **asked["item"]})
        self.answer(409 if known else 200, self.server.collections[slug])

    def validate(self, body: bytes) -> None:
        self.answer(200, {"errors": [], "warnings": []})


def sha1(data: bytes) -> str:
    """As git names a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


NAME, REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES = {
    r"POST /api/repos/create": Handler.create,
    r"POST /api/validate-yaml": Handler.validate,
    r"POST /api/collections": Handler.collect,
    r"GET /api/collections/(?P<slug>[^/]+/[^/]+)": Handler.collection,
    r"POST /api/collections/(?P<slug>[^/]+/[^/]+)/items": Handler.add_item,
    rf"GET /api/models/{NAME}": Handler.info,
    rf"GET /api/models/{NAME}/revision/{REVISION}": Handler.info,
    rf"GET /api/models/{NAME}/tree/{REVISION}": Handler.tree,
    rf"POST /api/models/{NAME}/preupload/{REVISION}": Handler.preupload,
    rf"POST /{NAME}\.git/info/lfs/objects/batch": Handler.lfs,
    rf"PUT /lfs/{NAME}/(?P<oid>[0-9a-f]+)": Handler.put,
    rf"POST /api/models/{NAME}/commit/{REVISION}": Handler.commit,
    rf"(GET|HEAD) /{NAME}/resolve/{REVISION}/(?P<path>.+)": Handler.resolve,
}


def serve() -> LoopbackHub:
    hub = LoopbackHub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    return hub
