"""
A server that speaks the Hub's protocol on loopback, for tests: repositories of models and data sets, commits, branches,
large files, access rights, validation of cards, and faults on demand. It keeps everything in memory.

    with HubServer() as hub:
        hub.fail("POST", "/commit/", status=503)   # the next such request
        hub.cut("PUT", "/lfs/", after=1000)        # the connection breaks when this much of the body has come
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

# What the Hub stores as large files: by extension, and everything above this size.
LARGE_FILES = (".safetensors", ".bin", ".arrow", ".parquet", ".png", ".pkl")
LARGE_SIZE = 10 * 2**20
# Of the Hub's lists, what is used here.
LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "other")
PIPELINE_TAGS = ("image-classification", "unconditional-image-generation", "other")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class User:
    name: str
    organizations: tuple[str, ...] = ()
    can_write: bool = True


@dataclass
class File:
    content: bytes
    large: bool = False

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid

    def entry(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        if self.large:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
        return entry


@dataclass
class Repo:
    id: str
    type: str
    private: bool
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit
    commits: dict[str, dict[str, File]] = field(default_factory=dict)  # commit -> files by path
    titles: list[str] = field(default_factory=list)  # of all commits, in order

    def commit(self, branch: str, files: dict[str, File], title: str) -> str:
        digest = hashlib.sha1(f"{self.type} {self.id} {branch} {len(self.titles)} {title}".encode()).hexdigest()
        self.commits[digest] = files
        self.branches[branch] = digest
        self.titles.append(title)
        return digest

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.commits[self.branches.get(revision, revision)].items()}


@dataclass
class Fault:
    method: str
    path: str
    times: int
    status: int | None = None
    cut_after: int | None = None


class Answer(Exception):
    """Ends a request."""

    def __init__(self, status: int, body: object = b"", headers: dict[str, str] | None = None):
        self.status, self.body, self.headers = status, body, headers or {}


def error(status: int, message: str, code: str | None = None) -> Answer:
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return Answer(status, {"error": message}, headers)


class HubServer(ThreadingHTTPServer):
    """
    Args:
        users (`dict[str, User]`): Who is who, by token.

    Attributes:
        repos (`dict[tuple[str, str], Repo]`): By type (`models`, `datasets` or `spaces`) and id.
        requests (`list[str]`): Method and path of all that came.
    """

    daemon_threads = True

    def __init__(self, users: dict[str, User] | None = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.users = users or {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}  # large files, by SHA-256
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *args) -> None:
        self.shutdown()
        self.server_close()

    def reset(self) -> None:
        for kept in (self.repos, self.objects, self.requests, self.faults):
            kept.clear()

    def fail(self, method: str, path: str, status: int, times: int = 1) -> None:
        """The next `times` requests with `path` (a regular expression) in their path get `status`."""
        self.faults.append(Fault(method, path, times, status=status))

    def cut(self, method: str, path: str, after: int = 0, times: int = 1) -> None:
        """The connection of the next `times` such requests is cut after so many bytes of the body."""
        self.faults.append(Fault(method, path, times, cut_after=after))

    def next_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args) -> None:
        pass

    # --------------------------------------------------------------------------------------------- requests and answers

    def handle_any(self) -> None:
        self.path_only = unquote(urlsplit(self.path).path)
        self.query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        self.server.requests.append(f"{self.command} {self.path_only}")
        fault = self.server.next_fault(self.command, self.path_only)
        if fault is not None and fault.cut_after is not None:
            if fault.cut_after:
                self.rfile.read1(fault.cut_after)
            self.close_connection = True
            return
        self.body = self.read_body()
        try:
            if fault is not None:
                raise error(fault.status, "a fault that the test asked for")
            self.user = self.authenticate()
            for method, pattern, function in ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, self.path_only)):
                    function(self, *match.groups())
                    raise AssertionError(f"{function.__name__} gave no answer")
            raise error(404, f"no such route: {self.command} {self.path_only}", "EntryNotFound")
        except Answer as answer:
            self.answer(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, answer: Answer) -> None:
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))} | answer.headers
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # ------------------------------------------------------------------------------------------------ users and access

    def authenticate(self) -> User | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.users:
            raise error(401, "Invalid credentials in Authorization header")
        return self.server.users.get(token)

    def owns(self, repo_id: str) -> bool:
        namespace = repo_id.partition("/")[0]
        return self.user is not None and namespace in (self.user.name, *self.user.organizations)

    def readable_repo(self, repo_type: str | None, repo_id: str) -> Repo:
        repo = self.server.repos.get((repo_type or "models", repo_id))
        if repo is None or (repo.private and not self.owns(repo_id)):
            # Whoever is not logged in is not told which repositories there are.
            raise error(404 if self.user else 401, "Repository not found", "RepoNotFound")
        return repo

    def writable_repo(self, repo_type: str | None, repo_id: str) -> Repo:
        if self.user is None:
            raise error(401, "Invalid username or password.")
        repo = self.readable_repo(repo_type, repo_id)
        if not (self.user.can_write and self.owns(repo_id)):
            raise error(403, f"You don't have the rights to write to {repo_id}")
        return repo

    def commit_of(self, repo: Repo, revision: str) -> str:
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            raise error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # ------------------------------------------------------------------------------------------------------- the routes

    def whoami(self):
        if self.user is None:
            raise error(401, "Invalid username or password.")
        organizations = [{"name": name, "type": "org"} for name in self.user.organizations]
        raise Answer(200, {"type": "user", "name": self.user.name, "orgs": organizations})

    def validate_yaml(self):
        request = json.loads(self.body)
        errors = check_card(request["content"]) if request["repoType"] == "model" else []
        if errors and self.headers.get("Accept") == "text/plain":
            raise Answer(400, "\n".join(errors).encode(), {"Content-Type": "text/plain"})
        messages = [{"message": message} for message in errors]
        raise Answer(400 if errors else 200, {"errors": messages, "warnings": []})

    def create_repo(self):
        request = json.loads(self.body)
        if self.user is None:
            raise error(401, "Invalid username or password.")
        repo_type = f"{request.get('type') or 'model'}s"
        repo_id = f"{request.get('organization') or self.user.name}/{request['name']}"
        if not (self.user.can_write and self.owns(repo_id)):
            raise error(403, f"You don't have the rights to create {repo_id}")
        url = f"{self.server.url}/{'' if repo_type == 'models' else f'{repo_type}/'}{repo_id}"
        with self.server.lock:
            if (repo_type, repo_id) in self.server.repos:
                raise Answer(409, {"error": "You already created this repo", "url": url})
            repo = Repo(repo_id, repo_type, private=request.get("visibility") == "private")
            repo.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n")}, "initial commit")
            self.server.repos[repo_type, repo_id] = repo
        raise Answer(200, {"url": url, "name": repo_id})

    def list_repos(self, repo_type: str):
        found = [
            {"id": repo.id, "modelId": repo.id, "private": repo.private, "tags": []}
            for (kind, _), repo in self.server.repos.items()
            if kind == repo_type
            and (not repo.private or self.owns(repo.id))
            and repo.id.partition("/")[0] == self.query.get("author", repo.id.partition("/")[0])
        ]
        raise Answer(200, found)

    def repo_info(self, repo_type: str, repo_id: str, revision: str | None):
        repo = self.readable_repo(repo_type, repo_id)
        commit = self.commit_of(repo, revision or "main")
        files = repo.commits[commit]
        card = read_card(files["README.md"].content.decode())[0] if "README.md" in files else {}
        raise Answer(
            200,
            {
                "id": repo.id,
                "modelId": repo.id,
                "sha": commit,
                "private": repo.private,
                "tags": card.get("tags", []),
                "siblings": [{"rfilename": path} for path in files],
                "cardData": card,
                "pipeline_tag": card.get("pipeline_tag"),
                "library_name": card.get("library_name"),
                "model-index": card.get("model-index"),
            },
        )

    def tree(self, repo_type: str, repo_id: str, revision: str, folder: str | None):
        repo = self.readable_repo(repo_type, repo_id)
        files = repo.commits[self.commit_of(repo, revision)]
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for path, file in files.items():
            if path.startswith(prefix):
                parts = path.removeprefix(prefix).split("/")
                for depth in range(1, len(parts)):
                    parent = prefix + "/".join(parts[:depth])
                    entries[parent] = {"type": "directory", "path": parent, "oid": "0" * 40, "size": 0}
                entries[path] = file.entry(path)
        if folder and not entries:
            raise error(404, f"{folder} does not exist", "EntryNotFound")
        if self.query.get("recursive", "false").lower() != "true":
            entries = {path: entry for path, entry in entries.items() if "/" not in path.removeprefix(prefix)}
        raise Answer(200, list(entries.values()))

    def paths_info(self, repo_type: str, repo_id: str, revision: str):
        repo = self.readable_repo(repo_type, repo_id)
        files = repo.commits[self.commit_of(repo, revision)]
        entries = []
        for path in parse_qs(self.body.decode())["paths"]:
            if path in files:
                entries.append(files[path].entry(path))
            elif any(name.startswith(f"{path}/") for name in files):
                entries.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        raise Answer(200, entries)

    def refs(self, repo_type: str, repo_id: str):
        repo = self.readable_repo(repo_type, repo_id)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
            for name, commit in repo.branches.items()
        ]
        raise Answer(200, {"branches": branches, "tags": [], "converts": []})

    def create_branch(self, repo_type: str, repo_id: str, branch: str):
        repo = self.writable_repo(repo_type, repo_id)
        if branch in repo.branches:
            raise error(409, f"Reference already exists: {branch}")
        repo.branches[branch] = self.commit_of(repo, json.loads(self.body or "{}").get("startingPoint", "main"))
        raise Answer(200, {})

    def preupload(self, repo_type: str, repo_id: str, revision: str):
        repo = self.writable_repo(repo_type, repo_id)
        files = repo.commits[self.commit_of(repo, revision)]
        answers = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            large = path.endswith(LARGE_FILES) or asked["size"] > LARGE_SIZE
            answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            answers.append(answer | ({"oid": files[path].etag} if path in files else {}))
        raise Answer(200, {"files": answers})

    def lfs_batch(self, repo_type: str | None, repo_id: str):
        self.writable_repo(repo_type, repo_id)
        answers = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.objects:
                answer["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}", "header": {}}}
            answers.append(answer)
        raise Answer(200, {"transfer": "basic", "objects": answers})

    def lfs_put(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise error(400, "the content is not what was announced")
        self.server.objects[oid] = self.body
        raise Answer(200)

    def commit(self, repo_type: str, repo_id: str, revision: str):
        repo = self.writable_repo(repo_type, repo_id)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        with self.server.lock:
            parent = self.commit_of(repo, revision)
            if header["value"].get("parentCommit", parent) != parent:
                raise error(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repo.commits[parent])
            for operation in operations:
                key, value = operation["key"], operation["value"]
                if key == "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]))
                elif key == "lfsFile":
                    if value["oid"] not in self.server.objects:
                        raise error(400, f"the content of {value['path']} was never uploaded")
                    files[value["path"]] = File(self.server.objects[value["oid"]], large=True)
                elif key == "deletedFile":
                    del files[value["path"]]
                else:
                    raise error(400, f"unknown operation {key}")
            branch, pull_request = revision, None
            if "create_pr" in self.query:
                branch = f"refs/pr/{sum(name.startswith('refs/pr/') for name in repo.branches) + 1}"
                pull_request = f"{self.server.url}/{repo_id}/discussions/{branch.rpartition('/')[2]}"
            commit = repo.commit(branch, files, header["value"]["summary"])
        url = f"{self.server.url}/{repo_id}/commit/{commit}"
        raise Answer(200, {"commitUrl": url, "commitOid": commit, "pullRequestUrl": pull_request})

    def resolve(self, repo_type: str | None, repo_id: str, revision: str, path: str):
        repo = self.readable_repo(repo_type, repo_id)
        commit = self.commit_of(repo, revision)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if path not in repo.commits[commit]:
            missing = error(404, f"{path} does not exist", "EntryNotFound")
            missing.headers |= headers
            raise missing
        file = repo.commits[commit][path]
        headers |= {"ETag": f'"{file.etag}"', "X-Linked-ETag": f'"{file.etag}"'}
        headers["X-Linked-Size"] = str(len(file.content))
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), min(int(wanted[2] or len(file.content)), len(file.content) - 1)
            if start >= len(file.content):
                raise Answer(416, headers=headers | {"Content-Range": f"bytes */{len(file.content)}"})
            headers["Content-Range"] = f"bytes {start}-{end}/{len(file.content)}"
            raise Answer(206, file.content[start : end + 1], headers)
        if self.command == "HEAD":
            headers["Content-Length"] = str(len(file.content))
        raise Answer(200, file.content, headers)


KIND, ID, REVISION = r"(models|datasets|spaces)", r"([\w.-]+/[\w.-]+)", r"(refs/pr/\d+|[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", "/api/repos/create", Handler.create_repo),
    ("GET", f"/api/{KIND}", Handler.list_repos),
    ("GET", f"/api/{KIND}/{ID}(?:/revision/{REVISION})?", Handler.repo_info),
    ("GET", f"/api/{KIND}/{ID}/tree/{REVISION}(?:/(.*))?", Handler.tree),
    ("POST", f"/api/{KIND}/{ID}/paths-info/{REVISION}", Handler.paths_info),
    ("GET", f"/api/{KIND}/{ID}/refs", Handler.refs),
    ("POST", f"/api/{KIND}/{ID}/branch/(.+)", Handler.create_branch),
    ("POST", f"/api/{KIND}/{ID}/preupload/{REVISION}", Handler.preupload),
    ("POST", f"/api/{KIND}/{ID}/commit/{REVISION}", Handler.commit),
    ("POST", rf"/(?:(datasets|spaces)/)?{ID}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(\w+)", Handler.lfs_put),
    ("GET", f"/(?:(datasets|spaces)/)?{ID}/resolve/{REVISION}/(.+)", Handler.resolve),
    ("HEAD", f"/(?:(datasets|spaces)/)?{ID}/resolve/{REVISION}/(.+)", Handler.resolve),
]


# ------------------------------------------------------------------------------------------------ validation of cards


def read_card(content: str) -> tuple[dict, list[str]]:
    """The metadata of a card, and what is wrong with their form."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if match is None:
        return {}, ["there is no metadata block"]
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError as problem:
        return {}, [f"the metadata are not YAML: {problem}"]
    return (metadata, []) if isinstance(metadata, dict) else ({}, ["the metadata are not a mapping"])


def check_card(content: str) -> list[str]:
    """What the Hub refuses in the card of a model."""
    metadata, errors = read_card(content)
    if metadata.get("license", "other") not in LICENSES:
        errors.append(f'"license" must be one of {LICENSES}')
    if metadata.get("pipeline_tag", "other") not in PIPELINE_TAGS:
        errors.append(f'"pipeline_tag" must be one of {PIPELINE_TAGS}')
    for key in ("base_model", "datasets"):
        values = metadata.get(key, [])
        for value in [values] if isinstance(values, str) else values:
            if not HUB_ID.fullmatch(value):
                errors.append(f'"{key}" with value "{value}" is not valid')
    for key in ("library_name", "license", "pipeline_tag"):
        if not isinstance(metadata.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    if not all(isinstance(tag, str) for tag in metadata.get("tags", [])):
        errors.append('"tags" must be an array of strings')
    for model in metadata.get("model-index", []):
        for result in model.get("results", []) or [{}]:
            if "type" not in result.get("task", {}):
                errors.append('"model-index[0].results[0].task.type" is required')
            if not {"type", "name"} <= result.get("dataset", {}).keys():
                errors.append('"model-index[0].results[0].dataset" needs a type and a name')
            if not all({"type", "value"} <= metric.keys() for metric in result.get("metrics", []) or [{}]):
                errors.append('"model-index[0].results[0].metrics" needs types and values')
        if not isinstance(model.get("name"), str):
            errors.append('"model-index[0].name" is required')
    return errors
