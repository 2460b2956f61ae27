{{/* The revision, and what it adds to names. */}}
{{- define "outrigger.revision" -}}
{{ default "default" (toString (default "" .Values.revision)) }}
{{- end }}
{{- define "outrigger.suffix" -}}
{{- $revision := include "outrigger.revision" . -}}
{{ if ne $revision "default" }}-{{ $revision }}{{ end }}
{{- end }}
{{/* Names that no two installs may share. */}}
{{- define "outrigger.injector" -}}
istio-sidecar-injector{{ include "outrigger.suffix" . }}{{ if ne .Release.Namespace "istio-system" }}-{{ .Release.Namespace }}{{ end }}
{{- end }}
{{- define "outrigger.proxyImage" -}}
{{- $image := .Values.global.proxy.image -}}
{{- if contains "/" $image }}{{ $image }}{{ else }}{{ .Values.global.hub }}/{{ $image }}:{{ .Values.global.tag }}{{ end }}
{{- end }}
{{/* What injection reads: all values but those of gateways, with the place of the control plane. */}}
{{- define "outrigger.values" -}}
{{- $values := omit (deepCopy .Values) "gateways" "cni" -}}
{{- if and .Values.cni.enabled (not (hasKey .Values.pilot "cni")) }}{{- $_ := set $values.pilot "cni" (dict "enabled" true) -}}{{ end -}}
{{- $_ := set $values.global "istioNamespace" .Release.Namespace -}}
{{- $_ := set $values "revision" (trimPrefix "-" (include "outrigger.suffix" .)) -}}
{{- if not $values.global.caAddress }}{{- $_ := set $values.global "caAddress" (printf "istiod%s.%s.svc:15012" (include "outrigger.suffix" .) .Release.Namespace) -}}{{ end -}}
{{ toPrettyJson $values }}
{{- end }}
{{- define "outrigger.mesh" -}}
{{- $mesh := dict "defaultConfig" (dict "discoveryAddress" (printf "istiod%s.%s.svc:15012" (include "outrigger.suffix" .) .Release.Namespace))
    "enablePrometheusMerge" true "rootNamespace" .Release.Namespace "trustDomain" "cluster.local" -}}
{{ toYaml (mergeOverwrite $mesh (deepCopy .Values.meshConfig)) }}
{{- end }}
