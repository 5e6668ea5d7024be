"""What DigitalOcean has on offer: regions, sizes, images. A small choice with every peculiarity once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

_FEATURES = ("backups", "ipv6", "metadata", "install_agent", "storage", "image_transfer")
_EVERYWHERE = ("nyc1", "nyc3", "ams3", "fra1", "lon1", "sgp1", "tor1", "blr1", "sfo3", "syd1")


@dataclass(frozen=True)
class Region:
    """A region; droplets can be had only where it is `available`, volumes only where it has storage."""

    slug: str
    name: str
    available: bool = True
    storage: bool = True

    def as_json(self) -> Json:
        """As the API shows it."""
        sizes = (
            [size.slug for size in SIZES.values() if size.available and self.slug in size.regions]
            if self.available
            else []
        )
        features = [feature for feature in _FEATURES if self.storage or feature != "storage"]
        return {"name": self.name, "slug": self.slug, "features": features, "available": self.available, "sizes": sizes}


@dataclass(frozen=True)
class Size:
    """A size of droplets; memory in MiB, disk in GiB, price in dollars."""

    slug: str
    memory: int
    vcpus: int
    disk: int
    price_hourly: float
    regions: tuple[str, ...] = _EVERYWHERE
    available: bool = True
    description: str = "Basic"

    def as_json(self) -> Json:
        """As the API shows it."""
        return {
            "slug": self.slug,
            "memory": self.memory,
            "vcpus": self.vcpus,
            "disk": self.disk,
            "transfer": 1.0,
            "price_monthly": round(self.price_hourly * 672, 2),
            "price_hourly": self.price_hourly,
            "regions": list(self.regions) if self.available else [],
            "available": self.available,
            "description": self.description,
            "disk_info": [{"type": "local", "size": {"amount": self.disk, "unit": "gib"}}],
        }


@dataclass(frozen=True)
class Image:
    """A distribution image."""

    id: int
    slug: str
    distribution: str
    name: str
    regions: tuple[str, ...] = _EVERYWHERE
    status: str = "available"

    def as_json(self) -> Json:
        """As the API shows it."""
        return {
            "id": self.id,
            "name": self.name,
            "distribution": self.distribution,
            "slug": self.slug,
            "public": True,
            "regions": list(self.regions),
            "created_at": "2025-08-14T12:00:00Z",
            "min_disk_size": 10,
            "type": "base",
            "size_gigabytes": 0.65,
            "description": f"{self.distribution} {self.name}",
            "tags": [],
            "status": self.status,
        }


REGIONS = {
    region.slug: region
    for region in (
        Region("nyc1", "New York 1"),
        Region("nyc2", "New York 2", available=False),
        Region("nyc3", "New York 3"),
        Region("sfo1", "San Francisco 1", available=False, storage=False),
        Region("ams2", "Amsterdam 2", storage=False),
        Region("ams3", "Amsterdam 3"),
        Region("sgp1", "Singapore 1"),
        Region("lon1", "London 1"),
        Region("fra1", "Frankfurt 1"),
        Region("tor1", "Toronto 1"),
        Region("blr1", "Bangalore 1"),
        Region("sfo3", "San Francisco 3"),
        Region("syd1", "Sydney 1"),
    )
}

SIZES = {
    size.slug: size
    for size in (
        Size("s-1vcpu-512mb-10gb", 512, 1, 10, 0.00595, ("nyc1", "nyc3", "ams3", "fra1", "lon1", "sfo3")),
        Size("s-1vcpu-1gb", 1024, 1, 25, 0.00893, (*_EVERYWHERE, "ams2")),
        Size("s-1vcpu-1gb-amd", 1024, 1, 25, 0.01042, ("nyc3", "fra1", "syd1"), description="Basic AMD"),
        Size("512mb", 512, 1, 20, 0.00744, available=False, description="Legacy Basic"),
        Size("s-1vcpu-2gb", 2048, 1, 50, 0.01786),
        Size("s-2vcpu-2gb", 2048, 2, 60, 0.02679),
        Size("s-2vcpu-4gb", 4096, 2, 80, 0.03571),
        Size("s-4vcpu-8gb", 8192, 4, 160, 0.07143),
        Size("c-2", 4096, 2, 25, 0.0625, description="CPU-Optimized"),
    )
}

IMAGES = {
    image.slug: image
    for image in (
        Image(106427515, "debian-10-x64", "Debian", "10 x64", status="retired"),
        Image(112929408, "debian-11-x64", "Debian", "11 x64", ("nyc1", "nyc3", "ams3")),
        Image(136750817, "debian-12-x64", "Debian", "12 x64", (*_EVERYWHERE, "ams2")),
        Image(196870013, "debian-13-x64", "Debian", "13 x64", tuple(slug for slug in _EVERYWHERE if slug != "blr1")),
        Image(129211873, "ubuntu-22-04-x64", "Ubuntu", "22.04 (LTS) x64"),
        Image(155133621, "ubuntu-24-04-x64", "Ubuntu", "24.04 (LTS) x64"),
        Image(187000001, "fedora-42-x64", "Fedora", "42 x64"),
        Image(188000001, "rockylinux-9-x64", "Rocky Linux", "9 x64"),
    )
}


def find_image(identifier: object) -> Image | None:
    """An image by its slug or its id."""
    return next((image for image in IMAGES.values() if identifier in (image.slug, image.id, str(image.id))), None)
