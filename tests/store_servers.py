"""Servers on loopback that speak as S3, Google Cloud Storage and the Hugging Face Hub do, as far as their clients need it here.

Each serves a folder: as a bucket of any name, into which small files may be written, or as the main branch of any data set.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import object_store


class _Store(object_store.Handler):
    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.faults.writable:
            self.write(content)
        else:
            self.refuse(403)

    do_PUT = do_POST

    def write(self, content: bytes) -> None:
        self.refuse(403)

    def parts(self, before: str = "/") -> list[str]:
        """Of the path after `before`."""
        return [unquote(part) for part in urlsplit(self.path).path.removeprefix(before).split("/")]

    def query(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}

    def within(self, folder: str) -> tuple[list[Path], list[Path]]:
        """The files and the folders right in a folder, which need not be there."""
        folder = self.root / folder
        found = sorted(folder.iterdir()) if folder.is_dir() else []
        return [path for path in found if path.is_file()], [path for path in found if path.is_dir()]

    def key(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def _tag(path: Path) -> str:
    """Changes when the file does."""
    return hashlib.sha256(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}".encode()).hexdigest()[:40]


def _modified(path: Path) -> str:
    return datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class S3(_Store):
    """``ListObjectsV2`` with a delimiter, ``HeadObject`` and ``GetObject``, buckets in the path."""

    CODES = {403: "AccessDenied", 404: "NoSuchKey", 416: "InvalidRange", 503: "SlowDown"}

    def answer(self) -> None:
        (_, *key), query = self.parts(), self.query()
        path = self.root / "/".join(key)
        if "list-type" in query and not self.faults.unlisted:
            self.send(200, self._listing(query.get("prefix", "")).encode())
        elif path.is_file():
            self.send_file(path)
        else:
            self.refuse_missing()

    def write(self, content: bytes) -> None:
        path = self.root / "/".join(self.parts()[1:])
        path.write_bytes(content)
        self.send(200, headers={"ETag": f'"{_tag(path)}"'})

    def _listing(self, prefix: str) -> str:
        files, folders = self.within(prefix)
        contents = [
            f"<Contents><Key>{escape(self.key(path))}</Key><LastModified>{_modified(path)}</LastModified><ETag>&quot;{_tag(path)}&quot;</ETag>"
            f"<Size>{path.stat().st_size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for path in files
        ]
        prefixes = [f"<CommonPrefixes><Prefix>{escape(self.key(path))}/</Prefix></CommonPrefixes>" for path in folders]
        count = f"<KeyCount>{len(files) + len(folders)}</KeyCount><IsTruncated>false</IsTruncated>"
        return f"<ListBucketResult>{count}{''.join(contents + prefixes)}</ListBucketResult>"

    def refuse(self, status: int) -> None:
        self.send(status, f"<Error><Code>{self.CODES[status]}</Code><Message>{self.responses[status][0]}</Message></Error>".encode())


class Gcs(_Store):
    """The JSON API: ``objects.list`` with a delimiter, ``objects.get`` and downloads."""

    def answer(self) -> None:
        media = self.path.startswith("/download")
        _, _, *name = self.parts("/download/storage/v1/b/" if media else "/storage/v1/b/")
        path = self.root / "/".join(name)
        if not name and not self.faults.unlisted:
            files, folders = self.within(self.query().get("prefix", ""))
            items = [self._describe(path) for path in files]
            self._send_json({"kind": "storage#objects", "items": items, "prefixes": [f"{self.key(path)}/" for path in folders]})
        elif not path.is_file():
            self.refuse_missing()
        elif media:
            self.send_file(path)
        else:
            self._send_json(self._describe(path))

    def write(self, content: bytes) -> None:
        """An upload of two parts, the second of which is the file."""
        described, _, sent = content.partition(b"\n--==0==\n")
        path = self.root / json.loads(described.partition(b"\n\n")[2])["name"]
        path.write_bytes(sent.partition(b"\n\n")[2].removesuffix(b"\n--==0==--"))
        self._send_json(self._describe(path))

    def _describe(self, path: Path) -> dict[str, str]:
        status, modified = path.stat(), _modified(path)
        names = {"kind": "storage#object", "name": self.key(path), "bucket": "bucket", "generation": str(status.st_mtime_ns)}
        return names | {"size": str(status.st_size), "etag": _tag(path), "timeCreated": modified, "updated": modified}

    def _send_json(self, content: dict, status: int = 200) -> None:
        self.send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int) -> None:
        self._send_json({"error": {"code": status, "message": f"{self.responses[status][0]}."}}, status)


class Hub(_Store):
    """Of a data set what it is, the files of a folder, and downloads."""

    def answer(self) -> None:
        owner, name, *rest = self.parts("/api/datasets/" if self.path.startswith("/api") else "/datasets/")
        what, path = rest[0] if rest else "revision", self.root / "/".join(rest[2:])
        if what == "revision":
            self._send_json({"id": f"{owner}/{name}", "sha": "0" * 40, "siblings": [], "private": False, "tags": []})
        elif what == "tree" and path.is_dir():
            files, folders = self.within(self.key(path))
            self._send_json([self._describe(path) for path in (*files, *folders)])
        elif what == "resolve" and path.is_file():
            self.send_file(path)
        else:
            self.refuse_missing()

    def _describe(self, path: Path) -> dict:
        if path.is_dir():
            return {"type": "directory", "path": self.key(path), "oid": _tag(path), "size": 0}
        return {"type": "file", "path": self.key(path), "oid": _tag(path), "size": path.stat().st_size}

    def _send_json(self, content: dict | list) -> None:
        self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int) -> None:
        codes = {403: "GatedRepo", 404: "EntryNotFound"}
        self.send(status, headers={"X-Error-Code": codes[status]} if status in codes else {})
