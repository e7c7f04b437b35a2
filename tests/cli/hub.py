"""A stand-in of the hub's API: repositories in memory, each revision a mapping from paths to bytes. Run as a program it does
what a user would by the command line, with `HF_ENDPOINT` set to it, and prints what came of it as JSON."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """The server; `repos` is name -> revision -> path -> content, `private` the names that were made so."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.token = "right"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @staticmethod
    def sha(files: dict[str, bytes]) -> str:
        return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str) -> None:
        self.answer({"error": code}, 404, X_Error_Code=code, X_Error_Message=code)

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """The files of a revision; None, and answered, where it is not there."""
        revisions = self.server.repos.get(repo)
        if revisions is None:
            return self.missing("RepoNotFound")
        for name, files in revisions.items():
            if revision in (name, self.server.sha(files)):
                return files
        return self.missing("RevisionNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "whoami-v2"]:
            right = self.headers.get("Authorization") == f"Bearer {self.server.token}"
            return self.answer({"name": "me", "type": "user"}) if right else self.answer({"error": "no"}, 401)
        if parts[:2] == ["api", "models"]:
            repo, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
            if (files := self.files(repo, revision)) is None:
                return None
            if parts[4:5] == ["tree"]:
                return self.answer(
                    [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()]
                )
            listed = [{"rfilename": name} for name in files]
            return self.answer(
                {"id": repo, "modelId": repo, "sha": self.server.sha(files), "siblings": listed, "private": False}
            )
        if len(parts) < 5:
            return self.missing("EntryNotFound")
        repo, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        if (files := self.files(repo, revision)) is None:
            return None
        if name not in files:
            return self.missing("EntryNotFound")
        etag = hashlib.sha1(files[name]).hexdigest()
        return self.answer(files[name], ETag=f'"{etag}"', X_Repo_Commit=self.server.sha(files))

    def do_POST(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        chunks = []
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        else:
            chunks.append(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        body = b"".join(chunks)
        repos = self.server.repos
        if parts[1] == "validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.answer({"error": "not allowed"}, 401)
        if parts[1:] == ["repos", "create"]:
            given = json.loads(body)
            name = f"{given.get('organization') or 'me'}/{given['name']}"
            if name in repos:
                return self.answer({"error": "exists", "url": f"{self.server.url}/{name}"}, 409)
            repos[name] = {"main": {}}
            if given.get("private") or given.get("visibility") == "private":
                self.server.private.add(name)
            return self.answer({"url": f"{self.server.url}/{name}", "id": name, "name": name})
        repo, what, revision = "/".join(parts[2:4]), parts[4], parts[5]
        if what == "branch":
            repos[repo].setdefault(revision, dict(repos[repo]["main"]))
            return self.answer({})
        if what == "preupload":
            asked = json.loads(body)["files"]
            modes = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]
            return self.answer({"files": modes})
        for line in map(json.loads, body.splitlines()):  # a commit
            if line["key"] == "file":
                repos[repo][revision][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        sha = self.server.sha(repos[repo][revision])
        return self.answer({"commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "commitOid": sha, "hookOutput": ""})


def main() -> None:
    """Command lines as JSON lists on stdin, one each; a list on stdout of (exit code, output)."""
    from typer.testing import CliRunner

    from lorakit.cli import app

    found = []
    for line in sys.stdin:
        result = CliRunner().invoke(app, json.loads(line))
        found.append([result.exit_code, " ".join(result.output.split()), repr(result.exception)])
    Path(os.environ["ANSWERS"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
