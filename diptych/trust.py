"""Who may use internal routes: registry writes and drain.

With a cluster secret: who shows it. Without one: who is on this machine.
"""

import hmac
import ipaddress
import os
from collections.abc import Mapping

from diptych.errors import DiptychError

HEADER = "X-Diptych-Cluster-Secret"
VARIABLE = "DIPTYCH_CLUSTER_SECRET"


class Forbidden(DiptychError):
    status = 403
    type = "permission_error"
    default_code = "forbidden"


class ClusterTrust:
    def __init__(self, secret: str | None) -> None:
        """`secret`: what the configuration says; else the environment's."""
        self._secret = secret or os.environ.get(VARIABLE) or None

    def __repr__(self) -> str:
        return f"ClusterTrust({'a secret' if self._secret else 'this machine only'})"

    def headers(self) -> dict[str, str]:
        """What our own requests to internal routes carry."""
        return {} if self._secret is None else {HEADER: self._secret}

    def check(self, remote: str | None, headers: Mapping[str, str]) -> None:
        """Raises Forbidden. `remote`: the peer's address."""
        if self._secret is not None:
            shown = headers.get(HEADER, "")
            if not hmac.compare_digest(shown.encode(), self._secret.encode()):
                raise Forbidden(f"This route needs the cluster's secret in the header {HEADER}.")
        elif not _is_local(remote):
            raise Forbidden(
                f"This route is for this machine only, not for {remote}, until a cluster secret is set "
                f"(cluster_secret in the YAML or the environment's {VARIABLE})."
            )


def _is_local(remote: str | None) -> bool:
    if remote is None:
        return False
    try:
        address = ipaddress.ip_address(remote.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
