"""Where the server of a data folder listens, for the operator's commands on the same machine."""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass
from pathlib import Path

from split_model.files import write_durably
from split_server.settings import DEFAULT_PORT, ServerSettings

_FILE = "address.json"


@dataclass(frozen=True)
class Address:
    """A server's address, and the certificates to trust for it; None: those of the system."""

    url: str = f"http://127.0.0.1:{DEFAULT_PORT}"
    ca_file: Path | None = None


def write_address(settings: ServerSettings) -> None:
    """Write where this server listens into its data folder."""
    scheme = "http" if settings.tls_cert is None else "https"
    certificate = None if settings.tls_cert is None else str(settings.tls_cert.absolute())
    content = {"url": f"{scheme}://{_local_host(settings.host)}:{settings.port}"}
    if certificate is not None:
        content["ca_file"] = certificate
    write_durably(settings.data_dir / _FILE, json.dumps(content).encode(), mode=0o600)


def read_address(data_dir: Path) -> Address:
    """Return where the server of a data folder listened last; without such a file, the default."""
    try:
        content = json.loads((data_dir / _FILE).read_text(encoding="utf-8"))
        file = content.get("ca_file")
        return Address(str(content["url"]), None if file is None else Path(str(file)))
    except (OSError, ValueError, LookupError, AttributeError):
        return Address()


def _local_host(host: str) -> str:
    """Return an address at which this machine reaches a server that listens on ``host``."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return host if address.version == 4 else f"[{host}]"
