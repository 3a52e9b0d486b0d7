{{/* The components that this release runs, as JSON: their names. Refuses what cannot work. */}}
{{- define "jwksd.components" -}}
{{- /* From here on there are no nulls: `client: { orders: null }` is no client. */ -}}
{{- range $name := list "manager" "signer" "sidecar" -}}
{{- $block := get $.Values $name -}}
{{- $_ := set $block "config" (include "jwksd.config" $block.config | fromJson) -}}
{{- end -}}
{{- $names := list -}}
{{- if eq .Values.mode "standalone" -}}
{{- include "jwksd.checkManager" (dict "root" $ "name" "manager" "block" .Values.manager) -}}
{{- $names = append $names "manager" -}}
{{- if .Values.signer.enabled -}}
{{- include "jwksd.checkSigner" (dict "root" $ "name" "signer" "block" .Values.signer) -}}
{{- $names = append $names "signer" -}}
{{- if and .Values.serviceMonitor.enabled (ne (empty .Values.manager.config.ops.tls) (empty .Values.signer.config.ops.tls)) -}}
{{- fail "jwksd: serviceMonitor asks managers and signers alike: set ops.tls in manager.config and in signer.config, or in neither" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toJson $names -}}
{{- end -}}
