"""A small Hub on the loopback address: the requests of huggingface_hub, and ways in which they
fail."""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


@dataclass
class Repository:
    """Files by commit, and branches.

    Its hashes are computed from its content and are not the Hub's.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def push(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit, move the branch to it, and return its hash."""
        seed = b"".join(name.encode() + content for name, content in files.items()) + str(len(self.commits)).encode()
        commit = hashlib.sha1(seed).hexdigest()
        self.commits[commit] = files
        self.refs[branch] = commit
        return commit


class Hub:
    """Start with `with Hub() as hub`, fill `hub.repositories`, look at `hub.requests`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        """By name; the name of a data set starts with datasets/."""
        self.stored: dict[str, bytes] = {}
        """Large files by checksum, as the Hub's storage has them."""
        self.requests: list[tuple[str, str, str | None]] = []
        """Method, file name and Range header of each request for a file."""
        self.cuts: list[int] = []
        """Per response: number of bytes that are sent before the connection breaks."""
        self.damage = False
        """Send other bytes than those with the announced checksum."""
        self.read_only = False
        """Refuse all uploads."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Refuse connections from now on."""
        self.server.shutdown()
        self.server.server_close()

    def push(self, repository: str, files: dict[str, bytes], branch: str = "main") -> str:
        return self.repositories.setdefault(repository, Repository()).push(files, branch)

    def bodies(self) -> list[str]:
        """The files whose content was requested."""
        return [name for method, name, _ in self.requests if method == "GET"]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            address, what, rest = unquote(self.path.split("?")[0]).strip("/").partition("/resolve/")
            if address.startswith("stored/"):
                return self.send_file(*address.split("/", 2)[1:], with_body)
            if address.startswith(("api/models/", "api/datasets/")) and "/tree/" in address:
                return self.list_files(*address.removeprefix("api/").removeprefix("models/").split("/tree/"))
            if not what:  # the client asks for a thing or two that are no files
                return self.refuse(404, "")
            revision, _, name = rest.partition("/")
            hub.requests.append((self.command, name, None))
            repository = hub.repositories.get(address)
            if repository is None:  # the real one says 401 to those it does not know
                return self.refuse(401, "RepoNotFound")
            commit = repository.refs.get(revision, revision)
            if commit not in repository.commits:
                return self.refuse(404, "RevisionNotFound")
            content = repository.commits[commit].get(name)
            if content is None:
                return self.refuse(404, "EntryNotFound", commit)
            checksum = hashlib.sha256(content).hexdigest()
            hub.stored[checksum] = content
            # Large files lie on another host, behind addresses that hold for minutes.
            where = f"{hub.url.replace('127.0.0.1', 'localhost')}/stored/{checksum}/{name}?signature=1"
            headers = {"ETag": f'"{commit}"', "X-Linked-ETag": f'"{checksum}"', "X-Linked-Size": str(len(content))}
            self.head(302, {**headers, "X-Repo-Commit": commit, "Location": where, "Content-Length": "0"})

        def list_files(self, name: str, revision: str) -> None:
            repository = hub.repositories.get(name)
            if repository is None:
                return self.refuse(401, "RepoNotFound")
            files = repository.commits[repository.refs.get(revision, revision)]
            self.send_json(
                [{"type": "file", "path": path, "size": len(content), "oid": "0"} for path, content in files.items()]
            )

        def do_POST(self) -> None:
            """Requests of an upload.

            Every file is part of the commit, like small files on the real Hub.
            """
            body = self.rfile.read(int(self.headers["Content-Length"]))
            address = unquote(self.path.split("?")[0]).strip("/").removeprefix("api/")
            if address == "validate-yaml":
                return self.send_json({"errors": [], "warnings": []})
            if hub.read_only:
                return self.refuse(403, "")
            if address == "repos/create":
                return self.send_json(
                    {"url": f"{hub.url}/{json.loads(body).get('organization')}/{json.loads(body)['name']}"}
                )
            repository, _, what = address.removeprefix("models/").rpartition("/main")[0].rpartition("/")
            if what == "preupload":
                names = [file["path"] for file in json.loads(body)["files"]]
                modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]
                return self.send_json({"files": modes})
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            commit = hub.push(repository, {file["path"]: base64.b64decode(file["content"]) for file in files})
            self.send_json({"commitUrl": f"{hub.url}/{repository}/commit/{commit}", "commitOid": commit})

        def send_json(self, value: object) -> None:
            content = json.dumps(value).encode()
            self.head(200, {"Content-Type": "application/json", "Content-Length": str(len(content))})
            self.wfile.write(content)

        def send_file(self, checksum: str, name: str, with_body: bool) -> None:
            byte_range = self.headers.get("Range")
            hub.requests.append((self.command, name, byte_range))
            content = hub.stored[checksum]
            size = len(content)
            start = int(byte_range.removeprefix("bytes=").split("-")[0]) if byte_range else 0
            headers = {"ETag": '"of the store"', "Accept-Ranges": "bytes", "Content-Length": str(size - start)}
            if start:
                headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
            self.head(206 if start else 200, headers)
            if not with_body:
                return
            if hub.damage:
                content = content[: size // 2] + bytes(size - size // 2)
            cut = hub.cuts.pop(0) if hub.cuts else size
            self.wfile.write(content[start : start + cut])
            self.close_connection = start + cut < size

        def refuse(self, status: int, code: str, commit: str = "") -> None:
            headers = {"X-Error-Code": code, "X-Repo-Commit": commit, "Content-Length": "0"}
            self.head(status, {header: value for header, value in headers.items() if value})

        def head(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for header, value in headers.items():
                self.send_header(header, value)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Print no log."""

    return Handler
