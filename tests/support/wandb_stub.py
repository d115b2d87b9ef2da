"""A stub of the W&B server on the loopback: it gives the client the answers it needs, and records what it is sent."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROJECT = {"id": "p", "internalId": "p", "name": "test", "entity": {"id": "e", "name": "someone"}}


class WandbStub:
    """A server that runs inside a ``with`` block.

    Args:
        failing: a GraphQL operation that always gets a server error.
        last: a GraphQL operation after which the server is gone and refuses connections.
    """

    def __init__(self, failing: str | None = None, last: str | None = None) -> None:
        self.failing, self.last = failing, last
        self.operations: list[tuple[str, dict[str, Any]]] = []  # the name and variables of each request
        self.uploads: dict[str, bytes] = {}  # by name; files of an artifact are below its type
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("_Bound", (_Handler,), {"stub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> WandbStub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Refuse connections from now on."""
        self._server.shutdown()
        self._server.server_close()

    def asked(self, operation: str) -> list[dict[str, Any]]:
        """Return the variables of every request for an operation."""
        return [variables for name, variables in self.operations if name == operation]

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Return the data of an operation, without the fields that the client can do without."""
        if operation == "Viewer":  # the owner of the API key
            return {"viewer": {"id": "u", "entity": "someone", "username": "someone", "flags": "{}"}}
        if operation == "UpsertBucket":
            bucket = {"id": "b", "name": variables["name"], "displayName": "run", "project": PROJECT}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if operation == "ArtifactType":  # is there an earlier version?
            return {"project": {"artifact": None}}
        if operation == "CreateArtifact":  # a run has at most one artifact of a type, so the type is its ID
            artifact = {"id": variables["input"]["artifactTypeName"], "state": "PENDING", "artifactSequence": {}}
            return {"createArtifact": {"artifact": artifact}}
        if operation == "CreateArtifactManifest":
            url = f"{self.url}/{variables['artifactID']}/manifest.json"
            file = {"id": "f", "uploadUrl": url, "uploadHeaders": []}
            return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}
        if operation == "CreateArtifactFiles":
            files = [(file["artifactID"], file["name"]) for file in variables["input"]["artifactFiles"]]
            nodes = [
                {"storagePath": name, "uploadUrl": f"{self.url}/{owner}/{name}", "artifact": {"id": owner}}
                for owner, name in files
            ]
            return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}
        if operation == "CommitArtifact":
            return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": "0"}}}
        if operation == "ArtifactByID":
            return {"artifact": self._committed(variables["id"])}
        return {}

    def _committed(self, identity: str) -> dict[str, Any]:
        [sent] = [v["input"] for v in self.asked("CreateArtifact") if v["input"]["artifactTypeName"] == identity]
        server_fields = {"id": identity, "versionIndex": 0, "state": "COMMITTED", "size": 0, "fileCount": 1, "tags": []}
        empty = dict.fromkeys(["description", "historyStep", "commitHash", "updatedAt"])
        return {
            **server_fields,
            **empty,
            "artifactSequence": {"name": sent["artifactCollectionName"], "project": PROJECT},
            "artifactType": {"name": sent["artifactTypeName"]},
            "metadata": sent["metadata"],
            "digest": sent["digest"],
            "ttlDurationSeconds": -1,
            "ttlIsInherited": False,
            "createdAt": "2026-01-01T00:00:00",
        }


class _Handler(BaseHTTPRequestHandler):  # speaks HTTP/1.0, so that no connection outlives the server
    stub: WandbStub

    def do_POST(self) -> None:
        body = self._body()
        if self.path != "/graphql":  # metrics of the run, and of the client
            self._reply(200, {})
            return
        request = json.loads(body)
        operation = re.search(r"(query|mutation)\s+(\w+)", request["query"])[2]
        variables = request.get("variables") or {}
        self.stub.operations.append((operation, variables))
        if operation == self.stub.failing:
            self._reply(500)
            return
        if operation == self.stub.last:
            self.stub.stop()
        self._reply(200, {"data": self.stub.answer(operation, variables)})

    def do_PUT(self) -> None:
        self.stub.uploads[self.path[1:]] = self._body()
        self._reply(200)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _reply(self, status: int, content: Any = None) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b"" if content is None else json.dumps(content).encode())

    def log_message(self, *_: object) -> None:
        """Print nothing."""
