#!/usr/bin/env bash
# Debian's Fashion-MNIST holds the official data in files that no checksum knows.
#
# dataset-fashion-mnist 0.0~git20200523.55506a9-1 and the checksums in
# tensorflow-datasets 4.9.10. The four .gz files have the official names and, unpacked,
# the official data, but other sizes and SHA-256: Debian's build took each file's own
# name and its time out of the gzip header. So what compares checksums, as
# tensorflow-datasets does, has to download again what is on the disk. With name and
# time put back the files are the official ones to the byte.
#
# Seen, for each of the four: as packaged False, with name and time put back True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps \
  tensorflow-datasets==4.9.10
cd "$folder"
apt-get download --quiet=2 -o APT::Sandbox::User=root \
  dataset-fashion-mnist=0.0~git20200523.55506a9-1
dpkg-deb --extract dataset-fashion-mnist_*.deb files
"$folder/venv/bin/python" - <<'PYTHON'
import hashlib
import pathlib
import struct
import sysconfig

package = pathlib.Path(sysconfig.get_path("purelib")) / "tensorflow_datasets"
known = {}
for line in (package / "url_checksums" / "fashion_mnist.txt").read_text().splitlines():
    _, size, digest, name = line.split("\t")
    known[name] = int(size), digest

# When the official files were packed (UTC, 31 August 2017).
TIMES = {"train": 1504176606, "t10k": 1504176627}
HAS_NAME = 8


def is_known(name, content):
    return known[name] == (len(content), hashlib.sha256(content).hexdigest())


assert len(known) == 4
for name in sorted(known):
    content = next(pathlib.Path("files").rglob(name)).read_bytes()
    assert content[:4] == b"\x1f\x8b\x08\x00", "the header has a name now"
    time = struct.pack("<I", TIMES[name.partition("-")[0]])
    own_name = name.removesuffix(".gz").encode() + b"\0"
    restored = content[:3] + bytes([HAS_NAME]) + time + content[8:10] + own_name
    restored += content[10:]
    print(
        f"{name}: as packaged {is_known(name, content)},",
        f"with name and time put back {is_known(name, restored)}",
    )
    assert not is_known(name, content)
    assert is_known(name, restored)
PYTHON
