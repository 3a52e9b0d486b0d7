{{/* What pods of managers, signers and sidecars have in common. */}}

{{- define "jwksd.containerSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* Folders, never single files (subPath): those would not follow when a Secret or the ConfigMap changes. */}}
{{- define "jwksd.volumeMounts" -}}
{{- $prefix := ternary "jwksd-" "" (eq .name "sidecar") -}}
- name: {{ $prefix }}config
  mountPath: /etc/jwksd
  readOnly: true
- name: {{ $prefix }}run
  mountPath: /run/jwksd
- name: {{ $prefix }}state
  mountPath: /var/lib/jwksd
{{- range $name, $secret := .block.secrets }}
{{- if $secret }}
- name: {{ $prefix }}secret-{{ $name }}
  mountPath: /run/secrets/jwksd/{{ $name }}
  readOnly: true
{{- end }}
{{- end }}
{{- with .block.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "jwksd.volumes" -}}
{{- $prefix := ternary "jwksd-" "" (eq .name "sidecar") -}}
- name: {{ $prefix }}config
  configMap:
    name: {{ include "jwksd.componentName" . }}
    defaultMode: 0444
- name: {{ $prefix }}run
  emptyDir:
    medium: Memory
    sizeLimit: 1Mi
- name: {{ $prefix }}state
{{- $volume := .block.persistence | default dict }}
{{- if or $volume.enabled $volume.existingClaim }}
  persistentVolumeClaim:
    claimName: {{ $volume.existingClaim | default (include "jwksd.componentName" .) }}
{{- else }}
  emptyDir:
    sizeLimit: 256Mi
{{- end }}
{{- if .block.secrets }}
# 0440: the group is the pod's fsGroup. The daemon refuses a seal key that others may read.
{{- end }}
{{- range $name, $secret := .block.secrets }}
{{- if $secret }}
- name: {{ $prefix }}secret-{{ $name }}
  secret:
    secretName: {{ $secret.existingSecret }}
    defaultMode: 0440
    {{- with $secret.items }}
    items:
      {{- toYaml . | nindent 6 }}
    {{- end }}
{{- end }}
{{- end }}
{{- with .block.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "jwksd.environment" -}}
# For commands in the pod: kubectl exec … -- /usr/local/bin/jwksd status
- name: JWKSD_CONFIG
  value: /etc/jwksd/jwksd.json
{{- with .block.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "jwksd.containerPorts" -}}
{{- $component := . -}}
{{- range $name := include "jwksd.reachable" . | fromJsonArray }}
- name: {{ ternary "jwksd-" "" (eq $component.name "sidecar") }}{{ $name }}
  containerPort: {{ include "jwksd.port" (get $component.block.config $name).listen }}
  protocol: TCP
{{- end }}
{{- end -}}

{{- define "jwksd.probe" -}}
httpGet:
  path: {{ .path }}
  port: ops
  scheme: {{ ternary "HTTPS" "HTTP" (not (empty .config.ops.tls)) }}
{{- end -}}

{{/* The Deployment of managers or of signers. */}}
{{- define "jwksd.deployment" -}}
{{- $component := . -}}
{{- $block := .block -}}
{{- $root := .root -}}
{{- $file := eq ($block.config.store.kind | default "file") "file" -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ include "jwksd.componentName" . }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- include "jwksd.labels" . | nindent 4 }}
spec:
  replicas: {{ $block.replicas }}
  revisionHistoryLimit: 5
  selector:
    matchLabels:
      {{- include "jwksd.selectorLabels" . | nindent 6 }}
  {{- if $file }}
  # A file store serves one process: the former pod ends before the next one starts.
  strategy:
    type: Recreate
  {{- else }}
  # One by one, each after the one before is ready: somebody always publishes.
  minReadySeconds: 5
  strategy:
    type: RollingUpdate
    rollingUpdate:
      maxUnavailable: 0
      maxSurge: 1
  {{- end }}
  template:
    metadata:
      labels:
        {{- include "jwksd.selectorLabels" . | nindent 8 }}
        {{- if eq ($block.config.store.kind | default "file") "upstream" }}
        {{- toYaml $root.Values.networkPolicy.replication.podLabels | nindent 8 }}
        {{- end }}
        {{- with $block.podLabels }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      annotations:
        # Of what only a start reads; the rest of the configuration is re-read without one.
        jwksd/restart-checksum: {{ include "jwksd.restartChecksum" $block.config }}
        {{- with $block.podAnnotations }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    spec:
      serviceAccountName: {{ include "jwksd.serviceAccountName" . }}
      automountServiceAccountToken: {{ $block.serviceAccount.automountToken }}
      enableServiceLinks: false
      # shutdown_delay, 5 s for requests under way, and a margin.
      terminationGracePeriodSeconds: {{ add (include "jwksd.seconds" ($block.config.shutdown_delay | default "0s") | int) 15 }}
      {{- with $root.Values.imagePullSecrets }}
      imagePullSecrets:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $block.priorityClassName }}
      priorityClassName: {{ . }}
      {{- end }}
      securityContext:
        runAsNonRoot: true
        fsGroup: 65532
        fsGroupChangePolicy: OnRootMismatch
        seccompProfile:
          type: RuntimeDefault
      {{- if and $file ($block.init | default dict).enabled }}
      # Makes the store. Only for the first installation: while this is here a volume that got lost would become a new issuer.
      initContainers:
        - name: init
          image: {{ include "jwksd.image" $root }}
          imagePullPolicy: {{ $root.Values.image.pullPolicy }}
          command: [/usr/local/bin/jwksd, --config, /etc/jwksd/jwksd.json, init, --existing-seal]
          env:
            {{- include "jwksd.environment" . | nindent 12 }}
          resources:
            {{- toYaml $block.resources | nindent 12 }}
          securityContext:
            {{- include "jwksd.containerSecurityContext" . | nindent 12 }}
          volumeMounts:
            {{- include "jwksd.volumeMounts" . | nindent 12 }}
      {{- end }}
      containers:
        - name: jwksd
          image: {{ include "jwksd.image" $root }}
          imagePullPolicy: {{ $root.Values.image.pullPolicy }}
          command: [/usr/local/bin/jwksd, serve, --config, /etc/jwksd/jwksd.json]
          env:
            {{- include "jwksd.environment" . | nindent 12 }}
          ports:
            {{- include "jwksd.containerPorts" . | trim | nindent 12 }}
          # As long as the store is waited for, nothing answers.
          startupProbe:
            {{- include "jwksd.probe" (dict "path" "/livez" "config" $block.config) | nindent 12 }}
            periodSeconds: 2
            timeoutSeconds: 2
            failureThreshold: 150
          livenessProbe:
            {{- include "jwksd.probe" (dict "path" "/livez" "config" $block.config) | nindent 12 }}
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 6
          readinessProbe:
            {{- $path := ternary "/readyz/sign" "/readyz" (and (eq .name "signer") (eq ($block.readiness | default "") "sign")) }}
            {{- include "jwksd.probe" (dict "path" $path "config" $block.config) | nindent 12 }}
            periodSeconds: 3
            timeoutSeconds: 2
            failureThreshold: 2
          resources:
            {{- toYaml $block.resources | nindent 12 }}
          securityContext:
            {{- include "jwksd.containerSecurityContext" . | nindent 12 }}
          volumeMounts:
            {{- include "jwksd.volumeMounts" . | nindent 12 }}
      volumes:
        {{- include "jwksd.volumes" . | nindent 8 }}
      {{- with $block.nodeSelector }}
      nodeSelector:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $block.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $block.affinity }}
      affinity:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      topologySpreadConstraints:
        {{- if $block.topologySpreadConstraints }}
        {{- toYaml $block.topologySpreadConstraints | nindent 8 }}
        {{- else }}
        {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
        - maxSkew: 1
          topologyKey: {{ . }}
          whenUnsatisfiable: ScheduleAnyway
          matchLabelKeys: [pod-template-hash]
          labelSelector:
            matchLabels:
              {{- include "jwksd.selectorLabels" $component | nindent 14 }}
        {{- end }}
        {{- end }}
{{- end -}}

{{/* The pod that runs `jwksd init` as the database's owner. */}}
{{- define "jwksd.initPod" -}}
metadata:
  labels:
    {{- include "jwksd.selectorLabels" (dict "root" .root "name" "init") | nindent 4 }}
spec:
  restartPolicy: OnFailure
  serviceAccountName: {{ include "jwksd.serviceAccountName" . }}
  automountServiceAccountToken: {{ .block.serviceAccount.automountToken }}
  enableServiceLinks: false
  {{- with .root.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    runAsNonRoot: true
    fsGroup: 65532
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile:
      type: RuntimeDefault
  containers:
    - name: init
      image: {{ include "jwksd.image" .root }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      command: [/usr/local/bin/jwksd, --config, /etc/jwksd/jwksd.json, init]
      env:
        {{- include "jwksd.environment" . | nindent 8 }}
        # The owner's instead of the manager's.
        - name: JWKSD__STORE__URL_FILE
          value: /run/secrets/jwksd-owner/url
      resources:
        {{- toYaml .block.resources | nindent 8 }}
      securityContext:
        {{- include "jwksd.containerSecurityContext" . | nindent 8 }}
      volumeMounts:
        {{- include "jwksd.volumeMounts" . | nindent 8 }}
        - name: owner
          mountPath: /run/secrets/jwksd-owner
          readOnly: true
  volumes:
    {{- include "jwksd.volumes" . | nindent 4 }}
    - name: owner
      secret:
        secretName: {{ .block.init.ownerSecret }}
        defaultMode: 0440
  {{- with .block.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .block.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
