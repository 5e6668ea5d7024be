"""A DigitalOcean account on this machine: the HTTP API, volumes as sparse files, droplets as real SSH servers.

Needs root, and sshd, iproute2 and util-linux. Start one with `with Simulator(directory) as simulator:`.
"""

from .behaviour import Behaviour
from .faults import FOREVER, Fault
from .resources import Droplet, Key, Resource, Snapshot, Tag, Volume
from .server import RequestRecord
from .simulator import Simulator

__all__ = [
    "FOREVER",
    "Behaviour",
    "Droplet",
    "Fault",
    "Key",
    "RequestRecord",
    "Resource",
    "Simulator",
    "Snapshot",
    "Tag",
    "Volume",
]
