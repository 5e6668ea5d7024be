#!/usr/bin/env bash
# pydo 0.44.0, DigitalOcean's own client: a call that creates a droplet or a volume, and is answered with 500, 503 or
# 504, is sent once more, at once and without a word. All of these may come after the call took effect.
#
# One would expect an exception, as for 502 and for an answer that never comes: whoever creates a droplet while a
# gateway is slow has two, knows of the second, and pays for both. A 429 that tells by `ratelimit-reset` when to come
# again, as DigitalOcean's do, is what is not repeated, though nothing has happened then.
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
import time

import pydo
from azure.core.credentials import AzureKeyCredential
from azure.core.exceptions import AzureError
from azure.core.pipeline.policies import AzureKeyCredentialPolicy


class Slow(http.server.BaseHTTPRequestHandler):
    """Creates something at each call. The first one is answered with `status`, or not at all if that is 0."""

    status = 0
    created: list[str] = []

    def do_POST(self) -> None:
        self.created.append(json.loads(self.rfile.read(int(self.headers["content-length"])))["name"])
        kind = self.path.rpartition("/")[2][:-1]
        status = self.status if len(self.created) == 1 else {"droplet": 202, "volume": 201}[kind]
        if not status:
            self.close_connection = True
            return
        told = {"id": "refused", "message": "Something took too long.", "request_id": "1"}
        body = json.dumps(told if status >= 400 else {kind: {"id": len(self.created)}}).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.send_header("ratelimit-remaining", "0")
        self.send_header("ratelimit-reset", str(int(time.time()) + 1))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = pydo.Client(
    "unused",
    endpoint=f"http://127.0.0.1:{server.server_port}",
    # over plain HTTP it takes a token only so
    authentication_policy=AzureKeyCredentialPolicy(AzureKeyCredential("token"), "Authorization", prefix="Bearer"),
)
calls = {
    "droplets.create": lambda: client.droplets.create(
        {"name": "web", "region": "fra1", "size": "s-1vcpu-1gb", "image": "debian-13-x64"}
    ),
    "volumes.create": lambda: client.volumes.create({"name": "data", "size_gigabytes": 1, "region": "fra1"}),
}
twice: dict[str, list[int]] = {}
for name, call in calls.items():
    for Slow.status in (0, 429, 500, 502, 503, 504):
        Slow.created.clear()
        try:
            answer = call()
        except AzureError:
            assert len(Slow.created) == 1
            continue
        if len(Slow.created) == 2:
            assert next(iter(answer.values())) == {"id": 2}
            twice.setdefault(name, []).append(Slow.status)

print("pydo", importlib.metadata.version("pydo"))
for name, statuses in twice.items():
    print(f"{name}: two were created, and the second one returned, after {', '.join(map(str, statuses))}")
expected = {"droplets.create": [500, 503, 504], "volumes.create": [500, 503, 504]}
if twice != expected:
    sys.exit(f"that is different now: {twice}, and it was {expected}")
PROGRAM
