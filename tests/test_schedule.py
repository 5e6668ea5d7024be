"""A run of many volumes in which several things go wrong: they cost no volume, and nothing that is paid for twice."""

from __future__ import annotations

import pytest
from conftest import write_at
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulator import Fault
from trouble_support import account, assert_backed_up, assert_nothing_left, start, until

pytestmark = pytest.mark.small

VOLUMES = 40
LIMIT = 600  # seconds for so many, on a slow machine too
IMPATIENT = {"ACTION_LIMIT": 4, "STALL_LIMIT": 6, "RECONNECT_LIMIT": 12, "SSH_TIMEOUT": 6}


@settings(max_examples=2, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    hung=st.integers(1, VOLUMES),
    lost=st.integers(0, VOLUMES - 1),
    refused=st.integers(2, VOLUMES),
    limit=st.integers(1, 60),
)
def test_many_volumes_and_several_faults(
    tmp_path_factory: pytest.TempPathFactory, hung: int, lost: int, refused: int, limit: int
) -> None:
    """An attach hangs, the droplet is lost after some volumes, a clone is refused, the quota is scarce."""
    with account(tmp_path_factory.mktemp("many") / "account") as (sim, home):
        volumes = [sim.add_volume(f"volume-{number:02}") for number in range(VOLUMES)]
        for number, volume in enumerate(volumes):
            write_at(volume.path, number * 4096, bytes([number + 1]) * 4096)
        sim.limit_volumes(VOLUMES + limit)
        sim.faults.add(
            Fault("action-stuck", nth=hung),
            Fault("error", method="POST", path="^/v2/volumes$", nth=refused, status=403),
        )
        running = start(home, constants=IMPATIENT)
        until(lambda: running.output.count(": backed up") >= lost or running.process.poll() is not None, LIMIT)
        for droplet in sim.droplets:
            droplet.kill()
        assert running.process.wait(LIMIT) == 0, running.output
        running.end()
        assert_backed_up(home, *volumes)
        assert sum(item.kind == "snapshot" for item in sim.ever) == VOLUMES
        assert sum(item.kind == "droplet" for item in sim.ever) <= 3
        assert_nothing_left(sim)
