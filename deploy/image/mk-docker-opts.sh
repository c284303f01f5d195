#!/bin/sh
# flannel's script of this name: subnet.env as options for dockerd.
exec /opt/flannelpy/venv/bin/flannelpy docker-opts "$@"
