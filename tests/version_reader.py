"""An independent reader of dosvob's format: it shares no code with dosvob.py, and knows it from README alone.

It restores the image and every older version of a volume, in memory, and checks what there is to check:

    python version_reader.py BACKUPS NAME              the times of all, the newest first
    python version_reader.py BACKUPS NAME TIME FILE    write that one
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MIB, PAGE, BLOCK = 1 << 20, 4096, 4096
HEADER = struct.Struct(">4sI32s32s32s16s")
ROW = struct.Struct(">IQ32s32s32s")


class Wrong(Exception):
    """Something is not as the description says."""


def sealed(kind: str, block: bytes) -> dict[str, Any] | None:
    """What a sealed block says; None if it is none."""
    if len(block) != BLOCK or hashlib.sha256(block[:-32]).digest() != block[-32:]:
        return None
    first, second = block[:-32].split(b"\n")[:2]
    content: dict[str, Any] = json.loads(second)
    return content if first == f"dosvob {kind} 1".encode() else None


def digest_of(chunk: bytes | bytearray) -> bytes:
    """The digest of a chunk: that of the digests of its pages."""
    pages = (chunk[start : start + PAGE] for start in range(0, MIB, PAGE))
    return hashlib.sha256(b"".join(hashlib.sha256(page).digest() for page in pages)).digest()


class PatchFile:
    """A version's file, or an undo."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self._content = path.read_bytes()
        head, end = sealed(kind, self._content[:BLOCK]), sealed("end", self._content[-BLOCK:])
        self.head = head or {}
        self.end = end if head is not None and end is not None and end["id"] == head["id"] else None

    def patches(self) -> Iterator[tuple[int, dict[int, bytes], bytes]]:
        """Each patch: the chunk's index, its new pages by their numbers, its digest afterwards."""
        position, rows, limit = BLOCK, b"", len(self._content) - BLOCK
        if self.end is not None and "index" in self.end:
            limit = self.end["index"]
        while position < limit:
            header = self._content[position : position + HEADER.size]
            magic, index, pages, filled, digest, checksum = HEADER.unpack(header)
            rows += ROW.pack(index, position, pages, filled, digest)
            position += HEADER.size
            numbers = [page for page in range(256) if pages[page // 8] >> page % 8 & 1]
            with_data = [page for page in range(256) if filled[page // 8] >> page % 8 & 1]
            data = self._content[position : position + PAGE * len(with_data)]
            position += len(data)
            expected = hashlib.sha256(self.head["id"].encode() + header[:-16] + data).digest()[:16]
            if magic != b"ptch" or checksum != expected or not set(with_data) <= set(numbers):
                raise Wrong(f"{self.path}: the patch before byte {position} is damaged")
            contents = dict.fromkeys(numbers, bytes(PAGE))
            contents |= {page: data[at * PAGE : (at + 1) * PAGE] for at, page in enumerate(with_data)}
            yield index, contents, digest
        if self.end is not None and "index" in self.end:
            index_digest = hashlib.sha256(self._content[limit:-BLOCK]).hexdigest()
            if (
                self.head["version"] != 2
                or self._content[limit:-BLOCK] != rows
                or index_digest != self.end["index_digest"]
            ):
                raise Wrong(f"{self.path}: the index is not that of the patches")
        elif self.head["version"] != 1:
            raise Wrong(f"{self.path} has no index")


class Reader:
    """The image of a volume and its versions."""

    def __init__(self, backups: Path, name: str) -> None:
        self._image = backups / name
        metadata = backups / ".dosvob"
        self._state_path = metadata / f"{name}.state"
        self._undo: PatchFile | None = None
        files = [path for path in (metadata / f"{name}.versions").glob("*") if re.fullmatch(r"[0-9TZ]{16}", path.name)]
        self._versions = [PatchFile(path, "version") for path in sorted(files, reverse=True)]
        undo = metadata / f"{name}.undo"
        file = PatchFile(undo, "version") if undo.exists() else None
        if file is not None and file.end is not None:
            state = self._state()[0]
            if (state["snapshot"], state["digests"]) != (file.head["newer"], file.head["newer_digests"]):
                self._undo = file
            elif file.head["time"]:
                self._versions.insert(0, file)

    def times(self) -> list[str]:
        """The times of all that can be restored, as the versions' files are named; the first is the image's."""
        taken_at = self._state()[0]["snapshot"]["taken_at"]
        return [re.sub(r"[-:]|\.\d+", "", taken_at), *(file.head["time"] for file in self._versions)]

    def all(self) -> Iterator[tuple[str, bytes]]:
        """What the volume was at each time, from the newest on."""
        content, digests, size = self._newest()
        sound: set[int] = set()  # chunks that were compared with their digests, and are as they were then
        times = self.times()
        yield times[0], self._checked(content, digests, size, sound, times[0])
        for time, version in zip(times[1:], self._versions, strict=True):
            if version.end is None:
                raise Wrong(f"{version.path} has no end")
            last = -1
            for index, pages, digest in version.patches():
                if index <= last:
                    raise Wrong(f"{version.path}: not in order")
                last = index
                self._lay(content, index, pages)
                digests[index] = digest
                sound.discard(index)
            yield time, self._checked(content, digests, version.head["snapshot"]["size"], sound, time)

    def restore(self, time: str) -> bytes:
        """What the volume was at one of these times."""
        return next(content for moment, content in self.all() if moment == time)

    def _checked(self, content: bytearray, digests: list[bytes], size: int, sound: set[int], time: str) -> bytes:
        for index in set(range(size // MIB)) - sound:
            if digest_of(content[index * MIB : (index + 1) * MIB]) != digests[index]:
                raise Wrong(f"{self._image} of {time}: chunk {index} is not what it was")
            sound.add(index)
        return bytes(content[:size])

    def _newest(self) -> tuple[bytearray, list[bytes], int]:
        """The image as its undo makes it, the recorded digests of its chunks, and its size."""
        state, table = self._state()
        size = state["snapshot"]["size"]
        content = bytearray(self._image.read_bytes()[:size].ljust(size, b"\0"))
        for index, pages, _ in self._undo.patches() if self._undo else ():
            self._lay(content, index, pages)
        return content, [table[at : at + 32] for at in range(0, len(table), 32)], size

    def _state(self) -> tuple[dict[str, Any], bytes]:
        block = self._state_path.read_bytes()
        state = sealed("state", block[:BLOCK])
        if state is None or hashlib.sha256(block[BLOCK:]).hexdigest() != state["digests"]:
            raise Wrong(f"{self._state_path} is damaged")
        return state, block[BLOCK:]

    @staticmethod
    def _lay(content: bytearray, index: int, pages: dict[int, bytes]) -> None:
        for page, data in pages.items():
            start = index * MIB + page * PAGE
            content[start : start + PAGE] = data


def main(arguments: list[str]) -> None:
    """Run as a program."""
    backups, name, *wanted = arguments
    reader = Reader(Path(backups), name)
    if wanted:
        Path(wanted[1]).write_bytes(reader.restore(wanted[0]))
    else:
        print("\n".join(reader.times()))


if __name__ == "__main__":
    main(sys.argv[1:])
