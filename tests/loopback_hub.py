"""A Hub on loopback, of the standard library, for the real client: repositories, commits, LFS, branches, tags, faults.

Speaks as much of the Hub's protocol as `huggingface_hub` asks for when it pushes and pulls models and data sets.
`hub.faults` makes requests fail: see [`Fault`].
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN, READ_ONLY_TOKEN = "hf_loopback", "hf_reader"
LFS_SUFFIXES = (".safetensors", ".png", ".parquet", ".onnx")


@dataclass
class Fault:
    """What happens to the first `times` requests whose "METHOD path" matches `pattern`.

    `status`: answered with that status; `cut`: the connection breaks in the middle, of the request's body if it has
    one, else of the answer's.
    """

    pattern: str
    status: int = 0
    cut: bool = False
    times: int = 1


@dataclass
class Repository:
    """Files by path at each commit; branches and tags name commits."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # oid -> path -> content
    titles: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], title: str) -> str:
        oid = hashlib.sha1(f"{branch} {len(self.titles)} {title}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.titles.append(title)
        return oid

    def find(self, revision: str) -> str | None:
        names = {**{oid: oid for oid in self.commits}, **self.tags, **self.branches}
        return names.get(unquote(revision))

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """What a test looks at: path -> content."""
        return self.commits[self.find(revision)]


class Refusal(Exception):
    """An error answer: status, the Hub's error code, message."""


class LoopbackHub:
    """The server; `url` is what HF_ENDPOINT must be."""

    def __init__(self):
        self.reset()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def answer(self):
                hub.serve(self)

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reset(self):
        """Forget every repository, fault and request."""
        self.lock = threading.Lock()
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}  # sha256 -> content, of LFS
        self.faults: list[Fault] = []
        self.requests: list[str] = []  # "METHOD path", in order
        self.ranges: list[str] = []  # Range headers seen

    def __getitem__(self, name: str) -> Repository:
        return self.repositories["models", name]

    # ------------------------------------------------------------------------------------------------- one request

    def serve(self, request: BaseHTTPRequestHandler):
        label = f"{request.command} {request.path}"
        with self.lock:
            self.requests.append(label)
            fault = next((each for each in self.faults if each.times and re.search(each.pattern, label)), None)
            if fault is not None:
                fault.times -= 1
        length = int(request.headers.get("Content-Length") or 0)
        if fault is not None and fault.cut and length:
            request.rfile.read(length // 2)
            request.connection.close()
            request.close_connection = True
            return
        body = self._chunks(request) if request.headers.get("Transfer-Encoding") else request.rfile.read(length)
        try:
            if fault is not None and fault.status:
                raise Refusal(fault.status, "", f"injected {fault.status}")
            with self.lock:
                status, headers, content = self.route(request.command, request.path, request.headers, body)
        except Refusal as refusal:
            status, code, message = refusal.args
            headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
            content = json.dumps({"error": message}).encode()
        request.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        if fault is not None and fault.cut:
            request.wfile.write(content[: len(content) // 2])
            request.wfile.flush()
            request.connection.close()
            request.close_connection = True
            return
        request.wfile.write(content)

    @staticmethod
    def _chunks(request) -> bytes:
        body = b""
        while size := int(request.rfile.readline().split(b";")[0], 16):
            body += request.rfile.read(size)
            request.rfile.readline()
        request.rfile.readline()
        return body

    def route(self, method: str, target: str, headers, body: bytes):
        url = urlsplit(target)
        path, token = url.path, (headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", TOKEN, READ_ONLY_TOKEN):
            raise Refusal(401, "", "Invalid username or password.")
        if path == "/api/whoami-v2":
            if not token:
                raise Refusal(401, "", "Invalid username or password.")
            return _json({"type": "user", "name": "reader", "auth": {"accessToken": {"role": "write"}}, "orgs": []})
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if path.startswith("/lfs/"):
            return self.receive(path.removeprefix("/lfs/"), body)
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, name, revision, file = match.groups()
            return self.resolve(kind, name, revision, unquote(file), method, headers, token)
        if method in ("POST", "PUT", "DELETE") and not re.search("/paths-info/", path):
            if not token:
                raise Refusal(401, "", "Invalid username or password.")
            if token == READ_ONLY_TOKEN:
                raise Refusal(403, "", "You don't have the rights to write here.")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(body))
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([a-z-]+)(?:/([^/]+)(?:/(.*))?)?)?", path):
            kind, name, verb, revision, rest = match.groups()
            repository = self.repository(kind, name, token)
            asked = parse_qs(url.query)
            return self.api(repository, name, verb, revision, unquote(rest or ""), asked, headers, body)
        raise Refusal(404, "", f"the loopback Hub does not know {method} {path}")

    # ------------------------------------------------------------------------------------------------------ routes

    def repository(self, kind: str, name: str, token: str) -> Repository:
        repository = self.repositories.get((kind, name))
        if repository is None or (repository.private and not token):
            raise Refusal(404 if token else 401, "RepoNotFound", "Repository not found")
        return repository

    def create(self, wanted: dict):
        name, kind = f"{wanted.get('organization') or 'reader'}/{wanted['name']}", f"{wanted.get('type') or 'model'}s"
        place = {"url": f"{self.url}/{'' if kind == 'models' else kind + '/'}{name}"}
        if (kind, name) in self.repositories:
            return _json({"error": "You already created this repo", **place}, 409)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.repositories[kind, name] = repository = Repository(private)
        repository.commit("main", {}, "initial commit")
        return _json(place)

    def batch(self, wanted: dict):
        objects = []
        for each in wanted["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.url}/lfs/{each['oid']}"}}}
            objects.append({**each, "authenticated": True, **({} if each["oid"] in self.blobs else upload)})
        return _json({"transfer": "basic", "objects": objects})

    def receive(self, oid: str, body: bytes):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(422, "", "the content has another hash")
        self.blobs[oid] = body
        return 200, {}, b""

    def resolve(self, kind, name, revision, file, method, headers, token):
        repository = self.repository("datasets" if kind else "models", name, token)
        commit = repository.find(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if file not in repository.commits[commit]:
            missing = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": commit}
            return 404, missing, b""
        content = repository.commits[commit][file]
        entry = _entry(file, content)
        found = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes", "ETag": f'"{entry["oid"]}"'}
        if "lfs" in entry:
            found |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(len(content))}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range") or ""):
            self.ranges.append(wanted[0])
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            found["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return 206, found, content[first : last + 1]
        if method == "HEAD":
            return 200, {**found, "Content-Length": str(len(content))}, b""
        return 200, found, content

    def api(self, repository, name, verb, revision, rest, asked, headers, body):
        if verb == "refs":
            told = {"converts": []}
            for key, place in (("branches", "heads"), ("tags", "tags")):
                refs = getattr(repository, key).items()
                told[key] = [{"name": n, "ref": f"refs/{place}/{n}", "targetCommit": oid} for n, oid in refs]
            return _json(told)
        if verb == "branch":
            if unquote(revision) in repository.branches:
                raise Refusal(409, "", "Reference already exists")
            repository.branches[unquote(revision)] = repository.branches["main"]
            return _json({})
        commit = repository.find(revision or "main")
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repository.commits[commit]
        if verb == "tag":
            repository.tags[json.loads(body)["tag"]] = commit
            return _json({})
        if verb in (None, "revision"):
            siblings = [{"rfilename": path} for path in sorted(files)]
            about = {"id": name, "sha": commit, "private": repository.private, "tags": [], "siblings": siblings}
            return _json({**about, "_id": "0", "downloads": 0, "likes": 0, "gated": False, "disabled": False})
        if verb == "tree":
            prefix = f"{rest}/" if rest else ""
            inside = [path for path in sorted(files) if path.startswith(prefix)]
            if rest and not inside:
                raise Refusal(404, "EntryNotFound", f"{rest} does not exist")
            parents = {parent.as_posix() for path in inside for parent in PurePosixPath(path).parents}
            folders = [each for each in sorted(parents) if each.startswith(prefix) and each != "."]
            if asked.get("recursive", ["false"])[0].lower() not in ("true", "1"):
                inside, folders = ([p for p in paths if "/" not in p[len(prefix) :]] for paths in (inside, folders))
            entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]
            return _json(entries + [_entry(path, files[path]) for path in inside])
        if verb == "paths-info":
            is_json = (headers.get("Content-Type") or "").startswith("application/json")
            paths = json.loads(body)["paths"] if is_json else parse_qs(body.decode())["paths"]
            return _json([_entry(path, files[path]) for path in paths if path in files])
        if verb == "preupload":
            told = []
            for each in json.loads(body)["files"]:
                mode = "lfs" if each["path"].endswith(LFS_SUFFIXES) else "regular"
                there = _entry(each["path"], files[each["path"]])["oid"] if each["path"] in files else None
                told.append({"path": each["path"], "uploadMode": mode, "shouldIgnore": False, "oid": there})
            return _json({"files": told})
        if verb == "commit":
            return self.commit(repository, name, unquote(revision), dict(files), body)
        raise Refusal(404, "", f"the loopback Hub does not know {verb}")

    def commit(self, repository, name, branch, files, body):
        title = ""
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    title = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.blobs[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
                case "deletedFolder":
                    files = {path: content for path, content in files.items() if not path.startswith(value["path"])}
        oid = repository.commit(branch, files, title)
        return _json({"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"})


def _json(content, status: int = 200):
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry
