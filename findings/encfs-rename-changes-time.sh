#!/usr/bin/env bash
# encfs 1.9.5 (Debian 12's 1.9.5-2): a rename cuts a file's modification time to whole seconds.
#
# One would expect a rename to leave it alone, as POSIX and every other file system do. Whoever writes a file under a
# temporary name, notes its time and renames it, as tools do that look for what changed, finds it changed at the next
# look. A time that is set is cut to microseconds, as quietly.
#
# It needs Debian 12 with apt-get, python3, /dev/fuse, `fusermount` (of fuse or fuse3) and, for apt, the network. Exits
# with 1 if it is different now.

set -euo pipefail
place=$(mktemp -d)
cd "$place"
finish() {
    fusermount -u "$place/plain" 2>/dev/null || true
    rm -rf "$place"
}
trap finish EXIT

apt-get -qq download encfs=1.9.5-2 libfuse2=2.9.9-6+b1 libtinyxml2-9=9.0.0+dfsg-3.1 2>/dev/null
for package in *.deb; do dpkg-deb -x "$package" root; done
libraries=$(find "$place/root" -name '*.so.*' -printf '%h\n' | sort -u | paste -sd:)
mkdir cipher plain
echo password | LD_LIBRARY_PATH=$libraries root/usr/bin/encfs --standard --stdinpass "$place/cipher" "$place/plain" >log

python3 - <<'PROGRAM'
import os
import sys
from pathlib import Path

SET = 1_000_000_000_123_456_789


def kept() -> int:
    """The time that encfs has for its only file, below its mount: nothing is cached there."""
    return next(path for path in Path("cipher").iterdir() if path.name != ".encfs6.xml").stat().st_mtime_ns


path = Path("plain/before")
path.write_text("content\n")
os.utime(path, ns=(SET, SET))
before = kept()
path.rename("plain/after")
after = kept()
print(f"encfs 1.9.5: asked for {SET} ns, set {before}; after a rename {after}")
if (before, after) != (1_000_000_000_123_456_000, 1_000_000_000_000_000_000):
    sys.exit("encfs does this differently now")
PROGRAM
