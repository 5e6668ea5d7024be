#!/usr/bin/env bash
# pydo 0.44.0, DigitalOcean's own client: a call that is answered with 404 does not fail. It returns the body of the
# answer, as it returns what was asked for; some calls do so for 400 too.
#
# One would expect an exception, as for 401, 403, 409, 422, 429 and 500: whoever deletes a droplet by a wrong id, or
# creates a volume in a way that is refused, goes on as if that was done.
#
# Seen with Python 3.11. It needs python3 with venv, and the network for pip. Exits with 1 if it is different now.

set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet pydo==0.44.0 azure-core==1.41.0
"$place/venv/bin/python" - <<'PROGRAM'
import http.server
import importlib.metadata
import json
import sys
import threading

import pydo
from azure.core.credentials import AzureKeyCredential
from azure.core.exceptions import HttpResponseError
from azure.core.pipeline.policies import AzureKeyCredentialPolicy, RetryPolicy


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers every call with a refusal, in the form that the API's specification gives it."""

    status = 404

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        body = json.dumps({"id": "refused", "message": "This was refused.", "request_id": "1"}).encode()
        self.send_response(self.status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_DELETE = answer

    def log_message(self, *_: object) -> None:
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = pydo.Client(
    "unused",
    endpoint=f"http://127.0.0.1:{server.server_port}",
    # over plain HTTP it takes a token only so
    authentication_policy=AzureKeyCredentialPolicy(AzureKeyCredential("token"), "Authorization", prefix="Bearer"),
    retry_policy=RetryPolicy.no_retries(),
)
calls = {
    "droplets.destroy": lambda: client.droplets.destroy(1),
    "volumes.get": lambda: client.volumes.get("00000000-0000-0000-0000-000000000000"),
    "volumes.delete": lambda: client.volumes.delete("00000000-0000-0000-0000-000000000000"),
    "volumes.create": lambda: client.volumes.create({"name": "data", "size_gigabytes": 1, "region": "fra1"}),
    "snapshots.delete": lambda: client.snapshots.delete("1"),
}
returned: dict[int, list[str]] = {}
for Refusing.status in (400, 401, 403, 404, 409, 422, 429, 500):
    for name, call in calls.items():
        try:
            answer = call()
        except HttpResponseError:
            continue
        assert answer["message"] == "This was refused."
        returned.setdefault(Refusing.status, []).append(name)
print(f"pydo {importlib.metadata.version('pydo')}: refusals that are returned, by status: {returned}")
seen = {400: ["volumes.create", "snapshots.delete"], 404: list(calls)}
sys.exit(0 if returned == seen else "it is different now")
PROGRAM
