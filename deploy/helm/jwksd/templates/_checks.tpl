{{/* What cannot work is refused here in plain words, before anything reaches the cluster. */}}

{{/* Each path that a configuration names, as a line of its key and the path. at = where value stands. */}}
{{- define "jwksd.paths" -}}
{{- $at := .at -}}
{{- range $key, $value := .value -}}
{{- $here := printf "%s.%s" $at $key -}}
{{- if kindIs "map" $value -}}
{{- include "jwksd.paths" (dict "at" $here "value" $value) -}}
{{- else if kindIs "string" $value -}}
{{- if or (eq $key "file") (eq $key "path") (hasSuffix "_file" $key) (hasSuffix "_path" $key) -}}
{{- printf "%s %s\n" $here $value -}}
{{- else if and (eq $key "listen") (hasPrefix "unix:" $value) -}}
{{- printf "%s %s\n" $here (trimPrefix "unix:" $value) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Each environment variable that a configuration names, likewise. */}}
{{- define "jwksd.variables" -}}
{{- $at := .at -}}
{{- range $key, $value := .value -}}
{{- $here := printf "%s.%s" $at $key -}}
{{- if kindIs "map" $value -}}
{{- include "jwksd.variables" (dict "at" $here "value" $value) -}}
{{- else if and (kindIs "string" $value) (or (eq $key "env") (hasSuffix "_env" $key)) -}}
{{- printf "%s %s\n" $here $value -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What every component needs. */}}
{{- define "jwksd.checkComponent" -}}
{{- $at := printf "%s.config" .name -}}
{{- $config := .block.config -}}
{{- $store := $config.store | default dict -}}
{{- if not $store -}}
{{- $hint := ternary " (an application's chart that only wants the sidecar sets jwksd.mode: sidecar)" "" (eq .name "manager") -}}
{{- fail (printf "jwksd: %s.store is missing: say where keyrings live, with kind: postgres and url_file%s%s" $at (ternary ", or kind: upstream and urls" "" (ne .name "manager")) $hint) -}}
{{- end -}}
{{- $kind := $store.kind | default "file" -}}
{{- $seal := $config.seal | default dict -}}
{{- if not (or $seal.path $seal.key_id) -}}
{{- fail (printf "jwksd: %s.seal is missing: name the key that encrypts private keys at rest, with kind: aws-kms and key_id, or with path, a file of one of %s.secrets such as /run/secrets/jwksd/seal/seal.key" $at .name) -}}
{{- end -}}
{{- if not $config.ops -}}
{{- fail (printf "jwksd: %s.ops is missing: the probes ask there" $at) -}}
{{- end -}}
{{- if hasPrefix "unix:" $config.ops.listen -}}
{{- fail (printf "jwksd: %s.ops.listen is a Unix socket: the probes ask at a port, such as 0.0.0.0:8623" $at) -}}
{{- end -}}
{{- include "jwksd.checkListeners" . -}}
{{- include "jwksd.checkFiles" . -}}
{{- if and (ne $kind "file") $seal.path (hasPrefix "/var/lib/jwksd/" $seal.path) -}}
{{- fail (printf "jwksd: %s.seal.path %s is on the pod's own volume, but all replicas of a shared store need the same key: put it into a Secret (%s.secrets), or use kind: aws-kms" $at $seal.path .name) -}}
{{- end -}}
{{- end -}}

{{/* The daemon refuses the same at its start; here it is known which values are to be changed. */}}
{{- define "jwksd.checkListeners" -}}
{{- $component := . -}}
{{- $at := printf "%s.config" .name -}}
{{- range $name := include "jwksd.reachable" . | fromJsonArray -}}
{{- $listener := get $component.block.config $name -}}
{{- if has $name (list "signer" "admin" "replication") -}}
{{- $tls := $listener.tls | default dict -}}
{{- if not (and $tls.cert_file $tls.key_file) -}}
{{- fail (printf "jwksd: %s.%s listens on %s without TLS: set tls.cert_file and tls.key_file to files of a Secret that exists, of cert-manager for example (%s.secrets.tls.existingSecret; then /run/secrets/jwksd/tls/tls.crt and tls.key), for the name %s.%s.svc; or listen on unix:/run/jwksd/%s.sock" $at $name $listener.listen $component.name (include "jwksd.serviceName" (dict "of" $component "listener" $name)) $component.root.Release.Namespace $name) -}}
{{- end -}}
{{- $who := ternary "token" "client" (eq $name "admin") -}}
{{- if not (or $listener.token $listener.client) -}}
{{- fail (printf "jwksd: %s.%s listens on %s without %s: whoever reaches it could use it. Add %s.%s.NAME with %s, a file of a Secret that exists (%s.secrets)" $at $name $listener.listen (ternary "tokens" "clients" (eq $name "admin")) $name $who (ternary "role and file" "token_file" (eq $name "admin")) $component.name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Everything that the configuration names is mounted, and what is written can be. */}}
{{- define "jwksd.checkFiles" -}}
{{- $component := . -}}
{{- $block := .block -}}
{{- $readable := list -}}
{{- range $name, $secret := $block.secrets -}}
{{- if $secret -}}
{{- $readable = append $readable (printf "/run/secrets/jwksd/%s/" $name) -}}
{{- end -}}
{{- end -}}
{{- $writable := list "/run/jwksd/" "/var/lib/jwksd/" -}}
{{- range $block.extraVolumeMounts -}}
{{- $folder := printf "%s/" (trimSuffix "/" .mountPath) -}}
{{- $readable = append $readable $folder -}}
{{- if not .readOnly -}}
{{- $writable = append $writable $folder -}}
{{- end -}}
{{- end -}}
{{- range include "jwksd.paths" (dict "at" (printf "%s.config" .name) "value" $block.config) | trim | splitList "\n" -}}
{{- if . -}}
{{- $key := regexFind "^[^ ]+" . -}}
{{- $path := trimPrefix (printf "%s " $key) . -}}
{{- $written := regexMatch "\\.(listen|state_path|store\\.path|publish\\.[^.]+\\.path)$" $key -}}
{{- $mounts := ternary $writable (concat $readable $writable) $written -}}
{{- $found := false -}}
{{- range $mounts -}}
{{- if hasPrefix . (printf "%s/" $path) -}}
{{- $found = true -}}
{{- end -}}
{{- end -}}
{{- if not (hasPrefix "/" $path) -}}
{{- fail (printf "jwksd: %s is the relative path %s: write it from / on" $key $path) -}}
{{- end -}}
{{- if and (not $found) $written -}}
{{- fail (printf "jwksd: %s is %s, which the daemon cannot write: use a path below %s" $key $path (join " or " $writable)) -}}
{{- end -}}
{{- if not $found -}}
{{- fail (printf "jwksd: %s is %s, which nothing mounts: add %s.secrets.NAME.existingSecret, which is mounted as /run/secrets/jwksd/NAME (there are: %s)" $key $path $component.name (join ", " (concat $readable $writable))) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $given := list -}}
{{- range $block.env -}}
{{- if hasPrefix "JWKSD__" .name -}}
{{- fail (printf "jwksd: %s.env has %s: set it in %s.config, from which ports and mounts are made" $component.name .name $component.name) -}}
{{- end -}}
{{- $given = append $given .name -}}
{{- end -}}
{{- range include "jwksd.variables" (dict "at" (printf "%s.config" .name) "value" $block.config) | trim | splitList "\n" -}}
{{- if . -}}
{{- $words := splitList " " . -}}
{{- if not (has (last $words) $given) -}}
{{- fail (printf "jwksd: %s names the variable %s, which %s.env does not set: add it there with valueFrom.secretKeyRef" (first $words) (last $words) $component.name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "jwksd.checkManager" -}}
{{- $config := .block.config -}}
{{- if not (has $config.role (list "manager" "all")) -}}
{{- fail (printf "jwksd: manager.config.role is %q: managers have the role manager or all; signers stand under signer" $config.role) -}}
{{- end -}}
{{- include "jwksd.checkComponent" . -}}
{{- range list "issuer" "keyset" -}}
{{- if not (get $config .) -}}
{{- fail (printf "jwksd: manager.config.%s is missing: managers need at least one issuer and one keyset" .) -}}
{{- end -}}
{{- end -}}
{{- $kind := $config.store.kind | default "file" -}}
{{- if eq $kind "upstream" -}}
{{- fail "jwksd: manager.config.store.kind is upstream: managers need the store itself, kind: postgres or file" -}}
{{- end -}}
{{- if and (eq $kind "file") (ne (int .block.replicas) 1) -}}
{{- fail (printf "jwksd: manager.replicas is %d with a file store, which serves one process: set manager.replicas to 1, or use manager.config.store.kind: postgres" (int .block.replicas)) -}}
{{- end -}}
{{- if and (eq $kind "file") (ne $config.role "all") -}}
{{- fail "jwksd: manager.config.role is manager with a file store, which only one process can use: set manager.config.role to all" -}}
{{- end -}}
{{- $volume := .block.persistence -}}
{{- $own := or $volume.enabled $volume.existingClaim -}}
{{- range .block.extraVolumeMounts -}}
{{- if hasPrefix (printf "%s/" (trimSuffix "/" .mountPath)) (printf "%s/" $config.store.path) -}}
{{- $own = true -}}
{{- end -}}
{{- end -}}
{{- if and (eq $kind "file") (not $own) -}}
{{- fail "jwksd: manager.config.store is a file store without a volume: all keys would be gone with the pod. Set manager.persistence.enabled, or existingClaim" -}}
{{- end -}}
{{- if and (ne $kind "file") $own $volume.existingClaim (gt (int .block.replicas) 1) -}}
{{- fail "jwksd: manager.persistence.existingClaim with several replicas: each needs a state_path of its own; leave persistence off" -}}
{{- end -}}
{{- if and (ne $kind "file") $volume.enabled -}}
{{- fail "jwksd: manager.persistence is for a file store: replicas of a shared store each have a state_path of their own, in an emptyDir" -}}
{{- end -}}
{{- if not $config.public -}}
{{- fail "jwksd: manager.config.public is missing: managers publish the keys; leave it as it is in the chart's values" -}}
{{- end -}}
{{- if not (has "public" (include "jwksd.reachable" . | fromJsonArray)) -}}
{{- fail "jwksd: manager.config.public.listen can be reached from the pod only, so nobody could fetch the keys: use 0.0.0.0:8620" -}}
{{- end -}}
{{- if and .block.init.enabled (eq $kind "postgres") -}}
{{- if not $config.store.url_file -}}
{{- fail "jwksd: manager.init needs manager.config.store.url_file, in whose place it names the owner's: with url_env run jwksd init yourself" -}}
{{- end -}}
{{- if not .block.init.ownerSecret -}}
{{- fail "jwksd: manager.init.ownerSecret is missing: name a Secret with the database URL of jwksd_owner under the key url" -}}
{{- end -}}
{{- end -}}
{{- if and .root.Values.signer.enabled (get $config "signer") -}}
{{- fail "jwksd: signer.enabled beside manager.config.role: all with a signer listener: both would be the Service for applications. Use role: manager" -}}
{{- end -}}
{{- end -}}

{{- define "jwksd.checkSigner" -}}
{{- $config := .block.config -}}
{{- if ne $config.role "signer" -}}
{{- fail (printf "jwksd: %s.config.role is %q: it has to be signer, since it is the managers that make and rotate keys" .name $config.role) -}}
{{- end -}}
{{- if $config.store -}}
{{- if eq ($config.store.kind | default "file") "file" -}}
{{- $why := ternary "each pod would have keys of its own, which no JWKS shows" "it would have keys that the managers do not know" (eq .name "sidecar") -}}
{{- fail (printf "jwksd: %s.config.store is a file store: %s. Use kind: upstream with the URL of the managers' replication Service, or kind: postgres" .name $why) -}}
{{- end -}}
{{- end -}}
{{- include "jwksd.checkComponent" . -}}
{{- end -}}

{{- define "jwksd.checkSidecar" -}}
{{- include "jwksd.checkSigner" . -}}
{{- $signer := .block.config.signer | default dict -}}
{{- if not (hasPrefix "unix:/run/jwksd/" ($signer.listen | default "")) -}}
{{- fail "jwksd: sidecar.config.signer.listen has to be a socket in the folder that the application mounts, such as unix:/run/jwksd/signer.sock" -}}
{{- end -}}
{{- /* Connecting takes the right to write, of the group or of all others. */ -}}
{{- if not (regexMatch "([2367][0-7]|[0-7][2367])$" ($signer.socket_mode | default "0600")) -}}
{{- fail (printf "jwksd: sidecar.config.signer.socket_mode %q lets only the sidecar's own user in: use \"0660\", for the pod's fsGroup" ($signer.socket_mode | default "0600")) -}}
{{- end -}}
{{- end -}}
