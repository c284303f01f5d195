"""`flannelpy cleanup`: remove from this host what the daemon made. Needs no datastore."""

import argparse
import json
import sys

from flannelpy.daemon import clean_up
from flannelpy.flags import FLAGS


def main(argv: list[str]) -> int:
    """Show what would be removed, or remove it with --yes."""
    parser = argparse.ArgumentParser(
        prog="flannelpy cleanup",
        description="Remove from this host what flannelpy made: devices, routes, neighbours, FDB entries,"
        " masquerade and forward rules, and subnet.env. Only shows them, unless --yes is given."
        " The lease in etcd stays: it expires by itself, or delete its key.",
    )
    parser.add_argument("--yes", action="store_true", help="really remove it")
    parser.add_argument(
        "--subnet-file", default=FLAGS["subnet-file"].default, help="tells our subnet (default: %(default)s)"
    )
    parser.add_argument("--output", choices=("text", "json"), default="text")
    options = parser.parse_args(argv)
    found = clean_up(options.subnet_file, remove=options.yes)
    if options.output == "json":
        print(json.dumps({"removed": options.yes, "objects": found.objects, "failed": found.failed}))
    else:
        for line in found.objects:
            print(f"{'removed' if options.yes else 'would remove'}: {line}")
        for line in found.failed:
            print(f"not removed: {line}", file=sys.stderr)
        if not found.objects:
            print("nothing of flannelpy's is here")
        elif not options.yes:
            print(f"{len(found.objects)} objects; run `flannelpy cleanup --yes` to remove them")
    return 1 if found.failed else 0
