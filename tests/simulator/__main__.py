"""The simulator as a server of its own: `python -m simulator --directory D --port P --volume data:fra1:1`."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from pathlib import Path

from .behaviour import Behaviour
from .simulator import Simulator


def main() -> None:
    """Serve until interrupted."""
    options = _options()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    behaviour = Behaviour.realistic() if options.slow else Behaviour()
    openapi = os.environ.get("DIGITALOCEAN_OPENAPI") or None
    with Simulator(options.directory, behaviour, openapi, host=options.host, port=options.port) as simulator:
        for name, region, size_gib in options.volume:
            volume = simulator.add_volume(name, region, size_gib)
            print(f"volume {name}: {volume.path}", flush=True)
        print(f"url {simulator.url}\ntoken {simulator.token}", flush=True)
        stop.wait()
    for resource in simulator.alive():
        print(f"left behind: {resource}", flush=True)
    for violation in simulator.violations:
        print(f"violation: {violation}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="simulator", description="A DigitalOcean account on this machine.")
    parser.add_argument("--directory", type=Path, required=True, help="where the volumes lie")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on")
    parser.add_argument("--port", type=int, default=0, help="the port to listen on; by default a free one")
    parser.add_argument("--slow", action="store_true", help="be as slow as DigitalOcean")
    parser.add_argument(
        "--volume",
        action="append",
        default=[],
        type=_volume,
        metavar="NAME[:REGION[:GIB]]",
        help="a volume that exists",
    )
    return parser.parse_args()


def _volume(text: str) -> tuple[str, str, int]:
    name, region, size = (*text.split(":"), "", "")[:3]
    return name, region or "fra1", int(size or 1)


if __name__ == "__main__":
    main()
