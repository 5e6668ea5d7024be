"""How the simulated cloud behaves when nothing goes wrong: its delays and its limits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Behaviour:
    """Delays in seconds, limits as counts. The defaults are fast; `realistic()` is as slow as DigitalOcean."""

    boot_seconds: float = 0.1
    """From the creation of a droplet to `active`. Its private address shows after half of it."""
    address_seconds: float = 0.03
    """From `active` to the public address."""
    ssh_seconds: float = 0.1
    """From `active` to a listening sshd; connections are refused until then."""
    action_seconds: float = 0.05
    """What an attach or detach takes to complete."""
    device_seconds: float = 0.05
    """From the completed attach to the device in the droplet."""
    release_seconds: float = 0.1
    """How long the volumes of a deleted droplet still count as attached."""
    fresh_seconds: float = 0.0
    """How long a fresh resource still answers 404 and is missing from lists."""
    list_lag_seconds: float = 0.0
    """How much longer than that a fresh resource is missing from lists."""

    clock_seconds: float = 0.0
    """How far the cloud's clock is ahead of this machine's; it is behind if this is negative."""

    idle_seconds: float = 0.0
    """After so long without a request a connection is forgotten on the way: what comes then is lost; 0 for never."""

    snapshot_interval: float = 0.0
    """One snapshot per volume in so many seconds; 0 for no limit (DigitalOcean: 600)."""
    snapshot_retry_after: bool = False
    """Whether the refusal of a snapshot carries `retry-after`."""
    requests_per_minute: int = 0
    """Burst limit per token; 0 for none (DigitalOcean: 250). The refusal carries `retry-after`."""
    requests_per_hour: int = 0
    """Hourly limit per token; 0 for none (DigitalOcean: 5000). The refusal carries `ratelimit-reset` alone."""
    key_lists_per_minute: int = 0
    """Limit of `GET /v2/account/keys`; 0 for none (DigitalOcean: 10)."""

    volumes_per_droplet: int = 7
    snapshots_per_volume: int = 25
    droplet_limit: int = 25
    volume_limit: int = 100
    capacity_gib: int = 16384
    """What all volumes of the account may hold together."""
    snapshot_limit: int = 250
    """Volume snapshots of the whole account."""

    sold_out: frozenset[str] = frozenset()
    """Sizes that the list offers and the creation of a droplet refuses."""
    null_lists: bool = True
    """Whether an empty `tags` or `droplet_ids` is `null` in every other answer."""

    @classmethod
    def realistic(cls) -> Behaviour:
        """The delays and limits of the real thing."""
        return cls(
            boot_seconds=20,
            address_seconds=3,
            ssh_seconds=15,
            action_seconds=5,
            device_seconds=2,
            release_seconds=8,
            fresh_seconds=0.5,
            list_lag_seconds=1,
            snapshot_interval=600,
            requests_per_minute=250,
            requests_per_hour=5000,
            key_lists_per_minute=10,
        )
