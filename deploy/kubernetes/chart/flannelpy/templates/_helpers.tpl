{{/* The labels of everything here. They are flannel's: an upgrade from flannel's chart changes objects in place. */}}
{{- define "flannelpy.labels" -}}
tier: node
app: flannel
{{- end }}

{{- define "flannelpy.image" -}}
{{- with .Values.flannel.image }}
{{- if contains "flannel-io/" .repository }}
{{- fail (printf "flannel.image.repository %s is flannel's own image; name flannelpy's, or leave it out" .repository) }}
{{- end }}
{{- printf "%s:%s" .repository (toString .tag) }}
{{- end }}
{{- end }}

{{/* net-conf.json, made as a value and written as JSON, so no combination of values can make it something else. */}}
{{- define "flannelpy.netConf" -}}
{{- $given := .Values.flannel }}
{{- $keys := dict
  "vxlan" (dict "backendPort" "Port" "vni" "VNI" "mtu" "MTU" "GBP" "GBP" "learning" "Learning" "directRouting" "DirectRouting" "macPrefix" "MacPrefix")
  "udp" (dict "backendPort" "Port")
  "ipip" (dict "directRouting" "DirectRouting")
  "wireguard" (dict "backendPort" "ListenPort" "backendPortv6" "ListenPortV6" "psk" "PSK" "mtu" "MTU" "tunnelMode" "Mode" "keepaliveInterval" "PersistentKeepaliveInterval") }}
{{- $backend := dict "Type" $given.backend }}
{{- range $value, $key := get $keys $given.backend | default dict }}
{{- if get $given $value }}
{{- $_ := set $backend $key (get $given $value) }}
{{- end }}
{{- end }}
{{- range $key, $value := $given.backendOptions }}
{{- $_ := set $backend $key $value }}
{{- end }}
{{- $conf := dict "Backend" $backend "EnableNFTables" $given.enableNFTables }}
{{- if .Values.podCidr }}
{{- $_ := set $conf "Network" .Values.podCidr }}
{{- else }}
{{- $_ := set $conf "EnableIPv4" false }}
{{- end }}
{{- if .Values.podCidrv6 }}
{{- $_ := set $conf "IPv6Network" .Values.podCidrv6 }}
{{- $_ := set $conf "EnableIPv6" true }}
{{- end }}
{{- $conf | toPrettyJson }}
{{- end }}

{{- define "flannelpy.privileged" -}}
{{- if kindIs "bool" .Values.flannel.privileged }}{{ .Values.flannel.privileged }}{{ else }}{{ eq .Values.flannel.backend "udp" }}{{ end }}
{{- end }}
