{{/* A component is a dict: root (the chart's context), name (manager, signer or sidecar), block (its values). */}}

{{- define "jwksd.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "jwksd.componentName" -}}
{{- $fullname := include "jwksd.fullname" .root -}}
{{- ternary $fullname (printf "%s-%s" $fullname .name) (eq .name "manager") -}}
{{- end -}}

{{/* The Service of a listener: of = component, listener = its name. */}}
{{- define "jwksd.serviceName" -}}
{{- $name := include "jwksd.componentName" .of -}}
{{- $own := ternary "public" "signer" (eq .of.name "manager") -}}
{{- ternary $name (printf "%s-%s" $name .listener) (eq .listener $own) -}}
{{- end -}}

{{- define "jwksd.selectorLabels" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .name }}
{{- end -}}

{{- define "jwksd.labels" -}}
{{ include "jwksd.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name (.root.Chart.Version | replace "+" "_") }}
{{- end -}}

{{- define "jwksd.serviceAccountName" -}}
{{- $account := .block.serviceAccount -}}
{{- if $account.name -}}
{{- $account.name -}}
{{- else -}}
{{- ternary (include "jwksd.componentName" .) "default" $account.create -}}
{{- end -}}
{{- end -}}

{{- define "jwksd.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* The port of an address such as 0.0.0.0:8620; nothing for a Unix socket. */}}
{{- define "jwksd.port" -}}
{{- if not (hasPrefix "unix:" .) -}}
{{- regexFind "[0-9]+$" . -}}
{{- end -}}
{{- end -}}

{{/* The names of the listeners that other pods can reach, as JSON. */}}
{{- define "jwksd.reachable" -}}
{{- $reachable := list -}}
{{- range $name := list "public" "signer" "admin" "ops" "replication" -}}
{{- $listener := get $.block.config $name -}}
{{- if $listener -}}
{{- if not (regexMatch "^(unix:|127\\.|\\[::1\\]|localhost)" $listener.listen) -}}
{{- $reachable = append $reachable $name -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toJson $reachable -}}
{{- end -}}

{{/* A duration such as 1h30m in whole seconds, rounded up. */}}
{{- define "jwksd.seconds" -}}
{{- $units := dict "ms" 0.001 "s" 1.0 "m" 60.0 "h" 3600.0 "d" 86400.0 -}}
{{- $total := 0.0 -}}
{{- range regexFindAll "[0-9]+(ms|s|m|h|d)" . -1 -}}
{{- $number := regexFind "^[0-9]+" . -}}
{{- $total = addf $total (mulf (float64 $number) (get $units (trimPrefix $number .))) -}}
{{- end -}}
{{- ceil $total | int -}}
{{- end -}}

{{/* A configuration as JSON, without what null removed: helm keeps a null where the chart's own values have no such key. */}}
{{- define "jwksd.config" -}}
{{- $kept := dict -}}
{{- range $key, $value := . -}}
{{- if kindIs "map" $value -}}
{{- $_ := set $kept $key (include "jwksd.config" $value | fromJson) -}}
{{- else if not (kindIs "invalid" $value) -}}
{{- $_ := set $kept $key $value -}}
{{- end -}}
{{- end -}}
{{- toPrettyJson $kept -}}
{{- end -}}

{{/*
What of a configuration only a start reads, as a checksum: the rest is re-read when the ConfigMap changes, so it must not
restart anything. New tables of later releases count as needing one.
*/}}
{{- define "jwksd.restartChecksum" -}}
{{- $config := include "jwksd.config" . | fromJson -}}
{{- range list "keyset" "defaults" "shutdown_delay" -}}
{{- $_ := unset $config . -}}
{{- end -}}
{{- range $name := list "public" "signer" "admin" "ops" "replication" -}}
{{- $listener := get $config $name -}}
{{- if $listener -}}
{{- $kept := pick $listener "listen" "socket_mode" -}}
{{- $_ := set $kept "tls" (hasKey $listener "tls") -}}
{{- $_ := set $config $name $kept -}}
{{- end -}}
{{- end -}}
{{- if $config.store -}}
{{- $_ := set $config "store" (omit $config.store "initialise" "staleness_limit" "publish_lag") -}}
{{- end -}}
{{- $published := dict -}}
{{- range $name, $issuer := $config.issuer -}}
{{- if $issuer.publish -}}
{{- $_ := set $published $name $issuer.publish -}}
{{- end -}}
{{- end -}}
{{- $_ := set $config "issuer" $published -}}
{{- if $config.log -}}
{{- $_ := set $config "log" (omit $config.log "signatures") -}}
{{- end -}}
{{- toJson $config | sha256sum -}}
{{- end -}}

{{/*
The public paths as JSON: a list of dicts with host and path, as the daemon serves them (README, HTTP API).
*/}}
{{- define "jwksd.publicPaths" -}}
{{- $routes := list -}}
{{- range $name, $issuer := . -}}
{{- $url := urlParse $issuer.url -}}
{{- $host := regexReplaceAll ":[0-9]+$" $url.host "" -}}
{{- $path := trimSuffix "/" $url.path -}}
{{- $paths := list (printf "%s/.well-known/jwks.json" $path) -}}
{{- $paths = concat $paths ($issuer.jwks_paths | default list) -}}
{{- if ne ($issuer.discovery | default "minimal") "off" -}}
{{- $paths = append $paths (printf "%s/.well-known/openid-configuration" $path) -}}
{{- $paths = append $paths (printf "/.well-known/oauth-authorization-server%s" $path) -}}
{{- end -}}
{{- range $paths -}}
{{- $routes = append $routes (dict "host" $host "path" .) -}}
{{- end -}}
{{- end -}}
{{- toJson $routes -}}
{{- end -}}
