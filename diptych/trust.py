"""Who may use internal routes: legs and what belongs to them, registry writes, drain.

With a cluster secret: who shows it. Without one: everybody for the legs, and who is on this machine for the rest.
"""

import hmac
import ipaddress
import os
from collections.abc import Mapping

from diptych.errors import Forbidden

HEADER = "X-Diptych-Cluster-Secret"
VARIABLE = "DIPTYCH_CLUSTER_SECRET"


class ClusterTrust:
    def __init__(self, secret: str | None) -> None:
        """`secret`: what the configuration says; else the environment's."""
        self._secret = secret or os.environ.get(VARIABLE) or None

    def __repr__(self) -> str:
        return f"ClusterTrust({'a secret' if self._secret else 'this machine only'})"

    def headers(self) -> dict[str, str]:
        """What our own requests to internal routes carry."""
        return {} if self._secret is None else {HEADER: self._secret}

    @property
    def secret(self) -> str | None:
        return self._secret

    def check_secret(self, headers: Mapping[str, str]) -> None:
        """Raises Forbidden when a secret is set and not shown. For what other machines use without one, too."""
        if self._secret is None:
            return
        shown = headers.get(HEADER, "")
        if not hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), self._secret.encode()):
            raise Forbidden(f"This needs the cluster's secret in the header {HEADER}.")

    def check(self, remote: str | None, headers: Mapping[str, str]) -> None:
        """Raises Forbidden. `remote`: the peer's address."""
        self.check_secret(headers)
        if self._secret is None and not _is_local(remote):
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
