#!/usr/bin/env bash
# Builds the image, for this machine or for several kinds of machines.
#
#   deploy/image/build.sh registry.example/flannelpy:0.1.0
#   PLATFORMS=linux/amd64,linux/arm64 deploy/image/build.sh ...    a manifest list; needs qemu-user-static
#   BASE=localhost/debian deploy/image/build.sh ...                another Debian 12 to build upon
#   BUILDER=podman                                                 buildah (default), podman or docker
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
name=${1:?usage: deploy/image/build.sh NAME:TAG}
builder=${BUILDER:-buildah}
options=(--file deploy/image/Containerfile)
if [ -n "${BASE:-}" ]; then options+=(--build-arg "BASE=$BASE"); fi
if [ -n "${PLATFORMS:-}" ]; then
    options+=(--platform "$PLATFORMS")
    if [ "$builder" = docker ]; then options+=(--tag "$name"); else options+=(--manifest "$name"); fi
else
    options+=(--tag "$name")
fi
exec "$builder" build "${options[@]}" .
