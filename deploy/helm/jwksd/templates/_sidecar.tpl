{{/*
A signer beside an application. The application's chart has this one as a dependency, with `mode: sidecar`, and includes
these templates in its pod with the dependency's context:

    metadata:
      labels:
        {{- include "jwksd.sidecar.labels" .Subcharts.jwksd | nindent 8 }}
      annotations:
        {{- include "jwksd.sidecar.annotations" .Subcharts.jwksd | nindent 8 }}
    spec:
      securityContext:
        {{- include "jwksd.sidecar.podSecurityContext" (list .Subcharts.jwksd .Values.podSecurityContext) | nindent 8 }}
      initContainers:
        {{- include "jwksd.sidecar.container" .Subcharts.jwksd | nindent 8 }}
      containers:
        - name: app
          env:
            {{- include "jwksd.sidecar.env" .Subcharts.jwksd | nindent 12 }}
          volumeMounts:
            {{- include "jwksd.sidecar.volumeMount" .Subcharts.jwksd | nindent 12 }}
      volumes:
        {{- include "jwksd.sidecar.volumes" .Subcharts.jwksd | nindent 8 }}

The whole is in deploy/helm/examples/app. The order among init containers is the order of starts: after what the signer
needs (istio-proxy), before what asks it for tokens.
*/}}

{{- define "jwksd.sidecar.container" -}}
{{- $component := dict "root" . "name" "sidecar" "block" .Values.sidecar -}}
{{- include "jwksd.sidecar.refuse" . -}}
{{- $ops := include "jwksd.port" .Values.sidecar.config.ops.listen -}}
# Starts before the application and ends after it: restartPolicy: Always makes an init container a sidecar.
- name: jwksd
  image: {{ include "jwksd.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  restartPolicy: Always
  command: [/usr/local/bin/jwksd, serve, --config, /etc/jwksd/jwksd.json]
  env:
    {{- include "jwksd.environment" $component | nindent 4 }}
  {{- with include "jwksd.containerPorts" $component | trim }}
  ports:
    {{- . | nindent 4 }}
  {{- end }}
  # By exec, since a mesh does not come between. With --server, so that a configuration that is not valid, which a running
  # daemon does not take up, is no reason to restart it.
  startupProbe:
    exec:
      command: [/usr/local/bin/jwksd, healthcheck, {{ ternary "--sign" "--live" .Values.sidecar.startWhenReadyToSign }}, --server, "http://127.0.0.1:{{ $ops }}"]
    periodSeconds: 1
    timeoutSeconds: 5
    failureThreshold: 300
  livenessProbe:
    exec:
      command: [/usr/local/bin/jwksd, healthcheck, --live, --server, "http://127.0.0.1:{{ $ops }}"]
    periodSeconds: 20
    timeoutSeconds: 5
    failureThreshold: 3
  {{- if .Values.sidecar.readiness }}
  readinessProbe:
    exec:
      command: [/usr/local/bin/jwksd, healthcheck, --sign, --server, "http://127.0.0.1:{{ $ops }}"]
    periodSeconds: 5
    timeoutSeconds: 5
    failureThreshold: 2
  {{- end }}
  resources:
    {{- toYaml .Values.sidecar.resources | nindent 4 }}
  securityContext:
    {{- include "jwksd.containerSecurityContext" . | nindent 4 }}
  volumeMounts:
    {{- include "jwksd.volumeMounts" $component | nindent 4 }}
{{- end -}}

{{- define "jwksd.sidecar.volumes" -}}
{{- include "jwksd.volumes" (dict "root" . "name" "sidecar" "block" .Values.sidecar) -}}
{{- end -}}

{{/* For containers that ask for tokens: the folder of the socket. A mounted socket would be a dead one after a restart. */}}
{{- define "jwksd.sidecar.volumeMount" -}}
- name: jwksd-run
  mountPath: /run/jwksd
  readOnly: true
{{- end -}}

{{/* For the same: where the socket is. */}}
{{- define "jwksd.sidecar.env" -}}
- name: JWKSD_SIGNER_SOCKET
  value: {{ trimPrefix "unix:" .Values.sidecar.config.signer.listen }}
{{- end -}}

{{/* (list CONTEXT OWN): the application's own securityContext of the pod, with an fsGroup if it has none. */}}
{{- define "jwksd.sidecar.podSecurityContext" -}}
{{- $jwksd := index . 0 -}}
{{- $own := index . 1 | default dict -}}
{{- toYaml (merge (deepCopy $own) (dict "fsGroup" (int $jwksd.Values.sidecar.fsGroup) "fsGroupChangePolicy" "OnRootMismatch")) -}}
{{- end -}}

{{- define "jwksd.sidecar.labels" -}}
jwksd-sidecar: {{ include "jwksd.fullname" . }}
{{- if eq (.Values.sidecar.config.store.kind | default "file") "upstream" }}
{{ toYaml .Values.networkPolicy.replication.podLabels }}
{{- end }}
{{- end -}}

{{- define "jwksd.sidecar.annotations" -}}
jwksd/restart-checksum: {{ include "jwksd.restartChecksum" .Values.sidecar.config }}
{{- end -}}

{{- define "jwksd.sidecar.refuse" -}}
{{- if ne .Values.mode "sidecar" -}}
{{- fail "jwksd: an application's chart that includes jwksd.sidecar.container sets jwksd.mode: sidecar; without it this dependency would install managers of its own" -}}
{{- end -}}
{{- if (.Values.sidecar.config.ops | default dict).tls -}}
{{- fail "jwksd: sidecar.config.ops.tls: the probes ask without TLS; leave it out, and listen on 127.0.0.1 where others must not see metrics" -}}
{{- end -}}
{{- include "jwksd.checkSidecar" (dict "root" . "name" "sidecar" "block" .Values.sidecar) -}}
{{- end -}}
