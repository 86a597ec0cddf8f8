"""A stand-in for the Hugging Face Hub, because no hub can be reached from the tests.

The real `huggingface_hub` client talks to it over HTTP on 127.0.0.1. It speaks: `whoami`, `create_repo`,
`upload_folder` / `create_commit` (card check, preupload, LFS batch + PUT + verify, commit of added files),
`model_info`, the (always recursive) file listing, and downloads (HEAD and GET of `resolve`). Public model repos with
the branch `main` and its newest commit, and to download from, what `repos` has as `tester/tiny@v1`. Anything else is
refused and changes nothing.

    with HubServer() as hub:
        subprocess.run([sys.executable, "-c", script], env=hub.env(tmp_path), check=True)
    assert "README.md" in hub.repos["tester/tiny"]

The client reads its environment when it is imported, hence the subprocess. This module does not import the client.
"""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import yaml


REPO = "([^/]+/[^/]+)"
ROUTES = [  # (method, path, HubServer method, open to requests without a token)
    ("GET", "/api/whoami-v2", "whoami", False),
    ("POST", "/api/repos/create", "create", False),
    ("POST", "/api/validate-yaml", "validate_yaml", True),
    ("GET", f"/api/models/{REPO}(?:/revision/([^/]+))?", "info", True),
    ("GET", f"/api/models/{REPO}/tree/([^/]+)(?:/(.+))?", "tree", True),
    ("POST", f"/api/models/{REPO}/preupload/(main)", "preupload", False),
    ("POST", f"/api/models/{REPO}/commit/(main)", "commit", False),
    ("POST", f"/{REPO}\\.git/info/lfs/objects/batch", "lfs_batch", False),
    ("PUT", "/lfs/(.+)", "lfs_put", True),  # the client sends no token here
    ("POST", "/lfs/verify", "lfs_verify", False),
    ("GET", f"/{REPO}/resolve/([^/]+)/(.+)", "resolve", True),
]


class Refusal(Exception):
    """An error answer; the client chooses its exception by the status and by `X-Error-Code`."""

    def __init__(self, status, message, code="", headers=None, **fields):
        self.status, self.body = status, {"error": message, **fields}
        self.headers = {"X-Error-Message": message, "X-Error-Code": code, **(headers or {})}


def is_lfs(start, size):
    return b"\0" in start[:512] or size > 10_000_000  # the client sends the first 512 bytes for this choice


def oid(content):
    """sha256 for an LFS file, else the git blob id: what the client compares, and the ETag of a download."""
    if is_lfs(content, len(content)):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


class HubServer:
    """`token` is the one valid token (assign another to revoke it); files put in `repos` are served."""

    def __init__(self, token="hf_good", user="tester"):
        self.token, self.user = token, user
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []
        self.requests: list[str] = []  # "METHOD /path", in the order of arrival
        self._lock, self._blobs = threading.Lock(), {}
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.hub = self
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self._http.shutdown()
        self._http.server_close()

    def env(self, home):
        """The environment for a subprocess: this server, HF_HOME in `home`, no token and no offline flag."""
        drop = ("HF_", "HUGGING", "TRANSFORMERS_")
        env = {key: value for key, value in os.environ.items() if not key.startswith(drop)}
        env |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        # With hf_xet installed the client uploads through Xet without asking the server: it must be told not to.
        return env | {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def answer(self, method, path, authorization, body):
        """Return (status, headers, content) for one request."""
        with self._lock:
            self.requests.append(f"{method} {path}")
            try:
                status, (headers, reply) = 200, self._dispatch(method, path, authorization, body)
            except Refusal as refusal:
                status, headers, reply = refusal.status, refusal.headers, refusal.body
        return status, headers, reply if isinstance(reply, bytes) else json.dumps(reply).encode()

    def _dispatch(self, method, path, authorization, body):
        for verb, pattern, name, is_open in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and verb == method.replace("HEAD", "GET"):
                self._authorize(name, authorization, is_open)
                reply = getattr(self, name)(body, *(part and unquote(part) for part in match.groups()))
                return reply if isinstance(reply, tuple) else ({}, reply)
        raise Refusal(404, f"tests/hub_server.py does not speak {method} {path}")

    def _authorize(self, name, authorization, is_open):
        if authorization == f"Bearer {self.token}" or (is_open and not authorization):
            return
        if is_open:
            raise Refusal(401, "Invalid credentials in Authorization header")
        # From an https Hub the client takes these two for a missing repo by their URL; over http it needs the code.
        raise Refusal(401, "Invalid username or password.", "RepoNotFound" if name in ("preupload", "commit") else "")

    def _files(self, repo, revision="main"):
        if repo not in self.repos:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        branches = {name.partition("@")[2]: files for name, files in self.repos.items() if name.startswith(f"{repo}@")}
        for branch, files in ({"main": self.repos[repo]} | branches).items():
            sha = hashlib.sha1(repr(sorted((path, oid(files[path])) for path in files)).encode()).hexdigest()
            if revision in (None, branch, sha):
                return sha, files
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def whoami(self, body):
        return {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}}

    def create(self, body):
        asked = json.loads(body)
        repo = f"{asked.get('organization') or self.user}/{asked['name']}"
        if asked.get("type", "model") != "model":
            raise Refusal(400, "tests/hub_server.py has model repos only")
        if repo in self.repos:
            raise Refusal(409, "You already created this model repo", url=f"{self.endpoint}/{repo}")
        self.repos[repo] = {}
        return {"url": f"{self.endpoint}/{repo}"}

    def validate_yaml(self, body):
        block = re.match(r"---\s*\n(.*?)^---\s*$", json.loads(body)["content"], re.DOTALL | re.MULTILINE)
        try:
            problem = block and not isinstance(yaml.safe_load(block[1]), dict) and "the metadata is not a mapping"
        except yaml.YAMLError as error:
            problem = str(error)
        if problem:
            raise Refusal(400, "Invalid metadata", errors=[{"message": problem}])
        return {"warnings": [] if block else [{"message": "empty or missing yaml metadata in repo card"}]}

    def info(self, body, repo, revision):
        sha, files = self._files(repo, revision)
        return {"id": repo, "sha": sha, "tags": [], "siblings": [{"rfilename": path} for path in sorted(files)]}

    def tree(self, body, repo, revision, folder):
        _, files = self._files(repo, revision)
        paths = sorted(path for path in files if path.startswith(f"{folder}/" if folder else ""))
        if folder and not paths:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return [{"type": "file", "path": path, "size": len(files[path]), "oid": oid(files[path])} for path in paths]

    def preupload(self, body, repo, revision):
        _, files = self._files(repo)
        asked = json.loads(body)["files"]
        for file in asked:
            lfs = is_lfs(base64.b64decode(file.pop("sample")), file["size"])
            known = oid(files[file["path"]]) if file["path"] in files else None
            file |= {"uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": known}
        return {"files": asked}

    def lfs_batch(self, body, repo):
        self._files(repo)
        objects = json.loads(body)["objects"]
        for wanted in objects:
            upload, verify = f"{self.endpoint}/lfs/{wanted['oid']}", f"{self.endpoint}/lfs/verify"
            wanted["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, body, sha256):
        if hashlib.sha256(body).hexdigest() != sha256:
            raise Refusal(400, f"the sha256 of the upload is not {sha256}")
        self._blobs[sha256] = body
        return {}

    def lfs_verify(self, body):
        asked = json.loads(body)
        if len(self._blobs.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, f"no upload of {asked['oid']} with {asked['size']} bytes")
        return {}

    def commit(self, body, repo, revision):
        header, *operations = (json.loads(line) for line in body.splitlines())
        files = dict(self._files(repo)[1])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile" and value["oid"] in self._blobs:
                files[value["path"]] = self._blobs[value["oid"]]
            else:
                raise Refusal(400, f"cannot commit {operation['key']} {value['path']}")
        self.repos[repo] = files
        self.commits.append(header["value"]["summary"])
        sha = self._files(repo)[0]
        return {"commitOid": sha, "commitUrl": f"{self.endpoint}/{repo}/commit/{sha}"}

    def resolve(self, body, repo, revision, path):
        sha, files = self._files(repo, revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": sha})
        content = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{oid(content)}"', "Content-Type": "application/octet-stream"}
        if is_lfs(content, len(content)):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": len(content)}
        return headers, content


class Handler(BaseHTTPRequestHandler):  # HTTP/1.0: no connection outlives its request, nor the server
    def reply(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        path, token = self.path.partition("?")[0], self.headers["Authorization"]
        status, headers, content = self.server.hub.answer(self.command, path, token, body)
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers, "Content-Length": len(content)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = reply

    def log_message(self, *args):
        pass
