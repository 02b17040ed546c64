"""A small Hub for tests: what the real clients ask of the real one, from memory, on the standard library alone.

Users: the token "hf_" + name + zeros is that user's. Faults are set by tests, also from other processes through
POST /_test/fault, and the requests seen are told by GET /_test/log. Not here: Xet, multipart LFS, pull requests.
"""
# SPDX-License-Identifier: Apache-2.0

import base64
import hashlib
import itertools
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_NAMES = (".safetensors", ".bin", ".pt", ".png")
LFS_BYTES = 10 * 1024 * 1024
DATE = "2025-01-01T00:00:00.000Z"
_counter = itertools.count()


def token_of(user):
    return f"hf_{user}".ljust(40, "0")


def git_blob_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class RefusalError(Exception):
    """An answer that is an error: HTTP status, the Hub's error code, its message."""

    def __init__(self, status, code, message=""):
        self.status, self.code, self.message = status, code, message or code


@dataclass
class Repo:
    name: str
    private: bool
    commits: dict = field(default_factory=dict)  # id -> (parent, {path: (content, is_lfs)}, title)
    branches: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)

    def commit(self, branch, files, title):
        parent = self.branches.get(branch)
        oid = hashlib.sha1(f"{self.name} {parent} {title} {next(_counter)}".encode()).hexdigest()
        self.commits[oid] = (parent, files, title)
        self.branches[branch] = oid
        return oid

    def resolve(self, revision):
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise RefusalError(404, "RevisionNotFound")
        return oid

    def files(self, revision):
        return self.commits[self.resolve(revision)][1]


def entry(path, content, is_lfs):
    """One file as /tree and /paths-info tell it."""
    told = {"type": "file", "path": path, "size": len(content), "oid": git_blob_id(content)}
    if is_lfs:
        told["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return told


class LocalHub(ThreadingHTTPServer):
    """The server: its repositories, LFS blobs, faults to come and requests seen. Serves from a thread of its own."""

    daemon_threads = True

    def __init__(self, lfs=True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.blobs, self.faults, self.log = {}, {}, [], []
        self.lfs, self.lock = lfs, threading.RLock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that hangs up is none of the test's concern."""

    def fault(self, match, do, times=1, status=500, seconds=0.0):
        """The next `times` requests whose "METHOD path" has `match` go wrong.

        do: "error" answers `status`; "drop" hangs up before doing anything; "lost" does it and hangs up; "half" hangs
        up in the middle of the answer; "slow" waits `seconds` first.
        """
        self.faults.append({"match": match, "do": do, "times": times, "status": status, "seconds": seconds})

    def next_fault(self, request):
        with self.lock:
            for fault in self.faults:
                if fault["times"] > 0 and re.search(fault["match"], request):
                    fault["times"] -= 1
                    return fault
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise every answer waits 40 ms for the client's delayed acknowledgement
    server: LocalHub
    half = False

    def log_message(self, *arguments):
        pass

    def do_any(self):
        length = int(self.headers.get("Content-Length") or 0)
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        self.raw = self.chunks() if chunked else self.rfile.read(length)
        url = urlsplit(self.path)
        self.query, request = parse_qs(url.query), f"{self.command} {url.path}"
        if url.path.startswith("/_test/"):
            return self.control(url.path)
        self.server.log.append(request)
        fault = self.server.next_fault(request) or {"do": None}
        if fault["do"] == "slow":
            time.sleep(fault["seconds"])
        if fault["do"] == "drop":
            self.close_connection = True
            return None
        if fault["do"] == "error":
            return self.answer({"error": "injected"}, status=fault["status"])
        self.half, self.silent = fault["do"] == "half", fault["do"] == "lost"
        try:
            with self.server.lock:
                status, body, headers = self.route(url.path)
        except RefusalError as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            status, body = refusal.status, {"error": refusal.message}
        if self.silent:
            self.close_connection = True
            return None
        return self.answer(body, status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_any  # noqa: N815

    def chunks(self):
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, body, status=200, headers=None):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        sent = {"Content-Length": str(len(content)), "Content-Type": "application/json"} | (headers or {})
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        if self.half:
            content, self.close_connection = content[: len(content) // 2], True
        if self.command != "HEAD":
            self.wfile.write(content)

    def control(self, path):
        if path == "/_test/fault":
            self.server.fault(**json.loads(self.raw))
            return self.answer({})
        seen = list(self.server.log)
        self.server.log.clear()
        return self.answer(seen)

    # Who asks, and for what.

    def user(self):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return token[3:].rstrip("0") if token.startswith("hf_") else None

    def signed_in(self):
        if not self.user():
            raise RefusalError(401, "Unauthorized", "Invalid username or password.")
        return self.user()

    def repo(self, name, write=False):
        repo, owner = self.server.repos.get(name), name.split("/")[0]
        if repo is None or (repo.private and self.user() != owner):
            raise RefusalError(404 if self.user() else 401, "RepoNotFound", "Repository not found")
        if write and self.signed_in() != owner:
            raise RefusalError(403, "Forbidden", "You don't have the rights to write here")
        return repo

    def route(self, path):
        """(status, body, headers) of the first route that fits."""
        for pattern, name in ROUTES:
            if match := re.fullmatch(pattern, path):
                return getattr(self, name)(*(unquote(part or "") for part in match.groups()))
        raise RefusalError(404, "NotFound", f"no route {self.command} {path}")

    def json(self):
        return json.loads(self.raw or b"{}")

    def whoami(self):
        name = self.signed_in()
        token = {"type": "access_token", "accessToken": {"role": "write"}}
        return 200, {"type": "user", "name": name, "fullname": name, "orgs": [], "auth": token}, {}

    def validate_yaml(self):
        import yaml

        block = re.match(r"^---\n(.*?)\n---", self.json()["content"], re.S)
        try:
            told = yaml.safe_load(block[1]) if block else {}
        except yaml.YAMLError as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}, {}
        errors = [] if isinstance(told, dict) else [{"message": "metadata is no mapping"}]
        return (400 if errors else 200), {"errors": errors, "warnings": []}, {}

    def create(self):
        asked, user = self.json(), self.signed_in()
        name = f"{asked.get('organization') or user}/{asked['name']}"
        if name.split("/")[0] != user:
            raise RefusalError(403, "Forbidden", "You don't have the rights to create here")
        url = f"{self.server.url}/{name}"
        if name in self.server.repos:
            return 409, {"error": "You already created this model repo", "url": url}, {}
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.server.repos[name] = Repo(name, private)
        self.server.repos[name].commit("main", {".gitattributes": (b"", False)}, "initial commit")
        return 200, {"url": url, "name": name, "id": name}, {}

    def delete(self):
        name = f"{self.json().get('organization') or self.signed_in()}/{self.json()['name']}"
        self.repo(name, write=True)
        del self.server.repos[name]
        return 200, {}, {}

    # Large files.

    def lfs_batch(self, name):
        self.repo(name, write=True)
        told = []
        for item in self.json()["objects"]:
            href = f"{self.server.url}/_lfs/{item['oid']}"
            missing = {"actions": {"upload": {"href": href}, "verify": {"href": f"{self.server.url}/_lfs/verify"}}}
            told.append(item if item["oid"] in self.server.blobs else item | missing)
        return 200, {"transfer": "basic", "objects": told}, {}

    def lfs_verify(self):
        return (200 if self.json()["oid"] in self.server.blobs else 404), {}, {}

    def lfs_put(self, oid):
        if hashlib.sha256(self.raw).hexdigest() != oid:
            raise RefusalError(400, "BadDigest")
        self.server.blobs[oid] = self.raw
        return 200, b"", {}

    # Reading.

    def info(self, name, revision):
        repo = self.repo(name)
        oid = repo.resolve(revision or "main")
        paths = [{"rfilename": path} for path in sorted(repo.files(oid))]
        told = {"id": name, "modelId": name, "sha": oid, "private": repo.private, "gated": False, "disabled": False}
        return 200, told | {"lastModified": DATE, "createdAt": DATE, "tags": [], "siblings": paths}, {}

    def refs(self, name):
        repo = self.repo(name)

        def shown(refs, kind):
            return [{"name": key, "ref": f"refs/{kind}/{key}", "targetCommit": oid} for key, oid in refs.items()]

        return 200, {"branches": shown(repo.branches, "heads"), "tags": shown(repo.tags, "tags"), "converts": []}, {}

    def history(self, name, revision):
        repo, told = self.repo(name), []
        oid = repo.resolve(revision)
        while oid:
            parent, _, title = repo.commits[oid]
            told.append({"id": oid, "title": title, "message": "", "date": DATE, "authors": []})
            oid = parent
        return 200, told, {}

    def tree(self, name, revision, folder):
        prefix = f"{folder}/" if folder else ""
        files = {path: file for path, file in self.repo(name).files(revision).items() if path.startswith(prefix)}
        if folder and not files:
            raise RefusalError(404, "EntryNotFound")
        deep = self.query.get("recursive", ["false"])[0].lower() == "true"
        shown = [entry(path, *file) for path, file in sorted(files.items()) if deep or "/" not in path[len(prefix) :]]
        return 200, shown, {}

    def paths_info(self, name, revision):
        files = self.repo(name).files(revision)
        wanted = self.json()["paths"] if self.raw[:1] == b"{" else parse_qs(self.raw.decode()).get("paths", [])
        return 200, [entry(path, *files[path]) for path in wanted if path in files], {}

    def resolve(self, name, revision, path):
        repo = self.repo(name)
        oid = repo.resolve(revision)
        headers = {"X-Repo-Commit": oid}
        if path not in repo.files(oid):
            return 404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"}
        content, is_lfs = repo.files(oid)[path]
        told = entry(path, content, is_lfs)
        headers |= {"ETag": f'"{told["oid"]}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if is_lfs:
            headers |= {"X-Linked-Etag": f'"{told["lfs"]["oid"]}"', "X-Linked-Size": str(len(content))}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not span or self.command == "HEAD":
            return 200, content, headers
        start, end = int(span[1]), int(span[2] or len(content) - 1)
        return 206, content[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(content)}"}

    # Writing.

    def branch(self, name, branch):
        repo = self.repo(name, write=True)
        if self.command == "DELETE":
            repo.branches.pop(branch, None)
        elif branch in repo.branches:
            raise RefusalError(409, "Conflict", "Reference already exists")
        else:
            repo.branches[branch] = repo.resolve(self.json().get("startingPoint") or "main")
        return 200, {}, {}

    def tag(self, name, revision):
        repo = self.repo(name, write=True)
        if self.command == "DELETE":
            repo.tags.pop(revision, None)
        elif self.json()["tag"] in repo.tags:
            raise RefusalError(409, "Conflict", "Tag reference exists already")
        else:
            repo.tags[self.json()["tag"]] = repo.resolve(revision)
        return 200, {}, {}

    def preupload(self, name, revision):
        files, told = self.repo(name, write=True).files(revision), []
        for asked in self.json()["files"]:
            path = asked["path"]
            large = self.server.lfs and (path.endswith(LFS_NAMES) or asked["size"] >= LFS_BYTES)
            known = None
            if path in files:
                known = entry(path, *files[path])
                known = known["lfs"]["oid"] if files[path][1] else known["oid"]
            mode = "lfs" if large else "regular"
            told.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
        return 200, {"files": told}, {}

    def commit(self, name, revision):
        repo = self.repo(name, write=True)
        lines = [json.loads(line) for line in self.raw.splitlines() if line.strip()]
        head, files = lines[0]["value"], dict(repo.files(revision))
        if head.get("parentCommit") not in (None, repo.resolve(revision)):
            raise RefusalError(412, "Precondition", "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = (base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    raise RefusalError(400, "LfsMissing", "an LFS object was not uploaded")
                files[value["path"]] = (self.server.blobs[value["oid"]], True)
            elif line["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                raise RefusalError(400, "BadRequest", "A file with this name doesn't exist")
        oid = repo.commit(revision, files, head["summary"])
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"}, {}


_REPO = "/api/models/([^/]+/[^/]+)"
ROUTES = [
    ("/api/whoami-v2", "whoami"),
    ("/api/validate-yaml", "validate_yaml"),
    ("/api/repos/create", "create"),
    ("/api/repos/delete", "delete"),
    (r"/([^/]+/[^/]+?)\.git/info/lfs/objects/batch", "lfs_batch"),
    ("/_lfs/verify", "lfs_verify"),
    ("/_lfs/([0-9a-f]+)", "lfs_put"),
    (f"{_REPO}(?:/revision/([^/]+))?", "info"),
    (f"{_REPO}/refs", "refs"),
    (f"{_REPO}/commits/([^/]+)", "history"),
    (f"{_REPO}/tree/([^/]+)(?:/(.+))?", "tree"),
    (f"{_REPO}/paths-info/([^/]+)", "paths_info"),
    (f"{_REPO}/branch/([^/]+)", "branch"),
    (f"{_REPO}/tag/([^/]+)", "tag"),
    (f"{_REPO}/preupload/([^/]+)", "preupload"),
    (f"{_REPO}/commit/([^/]+)", "commit"),
    ("/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
]
