{{/* The components that this release runs, as JSON: their names. Refuses what cannot work. */}}
{{- define "jwksd.components" -}}
{{- $names := list -}}
{{- if eq .Values.mode "standalone" -}}
{{- include "jwksd.checkManager" (dict "root" $ "name" "manager" "block" .Values.manager) -}}
{{- $names = append $names "manager" -}}
{{- if .Values.signer.enabled -}}
{{- include "jwksd.checkSigner" (dict "root" $ "name" "signer" "block" .Values.signer) -}}
{{- $names = append $names "signer" -}}
{{- end -}}
{{- end -}}
{{- toJson $names -}}
{{- end -}}
