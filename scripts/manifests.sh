#!/usr/bin/env bash
# Writes the manifests in deploy/kubernetes from the chart. Needs helm 3: HELM names it, if it is not in PATH.
#
#   scripts/manifests.sh [FOLDER]    where to (default deploy/kubernetes)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
helm=${HELM:-helm}
folder=${1:-deploy/kubernetes}
chart=deploy/kubernetes/chart/flannelpy

render() {
    "$helm" template flannelpy $chart --namespace kube-flannel "$@" | grep -v '^# Source: '
}

{
    cat <<'END'
# All that a cluster needs to run flannelpy. Written by scripts/manifests.sh from the chart beside it: change it there.
# Before you apply it: name your image (twice), and make "Network" the pod network of your cluster.
---
apiVersion: v1
kind: Namespace
metadata:
  name: kube-flannel
  labels:
    k8s-app: flannel
    pod-security.kubernetes.io/enforce: privileged
END
    render
} >"$folder/flannelpy.yml"

{
    cat <<'END'
# For a cluster that runs flannel: its DaemonSet becomes flannelpy's, and a node moves over when you delete its pod.
# Its network config stays. See docs/kubernetes-migration.md. Written by scripts/manifests.sh: change the chart.
END
    render --set migration=true --show-only templates/rbac.yaml --show-only templates/daemonset.yaml
} >"$folder/migration.yml"
