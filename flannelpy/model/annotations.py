"""The prefix of flannel's node annotations: `flannel.alpha.coreos.com/`, or `example.com/net-`."""

import re

_PREFIX = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)+/(?:[a-z0-9_-]+-)?")
_LONGEST = 253


def key_prefix(text: str) -> str:
    """The flag's text -> what stands before `backend-type`; ValueError with the rule otherwise.

    flannel's rules: a missing `/` is added, and a `-` behind a name that stands after the `/`.
    """
    prefix = text if "/" in text else f"{text}/"
    if not prefix.endswith(("/", "-")):
        prefix += "-"
    if len(prefix) > _LONGEST or not _PREFIX.fullmatch(prefix):
        raise ValueError(
            "must be a lower-case domain name of two or more labels, and may have a name after a slash:"
            " flannel.alpha.coreos.com or example.com/net"
        )
    return prefix
