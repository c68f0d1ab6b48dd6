{{- define "safer.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "safer.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Labels of an object. Takes (dict "root" $ "component" NAME). */}}
{{- define "safer.labels" -}}
{{ include "safer.selector" .root }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
app.kubernetes.io/part-of: safer-audit
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "safer.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "safer.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* An image's reference. Takes (dict "root" $ "image" IMAGE). */}}
{{- define "safer.image" -}}
{{- if .image.digest -}}
{{- printf "%s@%s" .image.repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" .image.repository (default .root.Chart.AppVersion .image.tag) -}}
{{- end -}}
{{- end -}}

{{/* Names that the API's Host header may have, comma-separated. */}}
{{- define "safer.hosts" -}}
{{- $name := include "safer.fullname" . -}}
{{- $near := printf "%s.%s" $name .Release.Namespace -}}
{{- $hosts := list "127.0.0.1" "localhost" $name $near (printf "%s.svc" $near) (printf "%s.svc.cluster.local" $near) -}}
{{- if .Values.api.ingress.enabled -}}
{{- $hosts = append $hosts .Values.api.ingress.host -}}
{{- end -}}
{{- concat $hosts .Values.api.allowedHosts | uniq | join "," -}}
{{- end -}}

{{/* Bytes of a quantity in Gi or Mi. */}}
{{- define "safer.bytes" -}}
{{- if hasSuffix "Gi" . -}}
{{- mul (trimSuffix "Gi" . | int64) 1073741824 -}}
{{- else -}}
{{- mul (trimSuffix "Mi" . | int64) 1048576 -}}
{{- end -}}
{{- end -}}

{{/* A setting as an environment variable has it: whole numbers without an exponent, lists by commas. */}}
{{- define "safer.plain" -}}
{{- if kindIs "slice" . -}}
{{- join "," . -}}
{{- else if kindIs "float64" . -}}
{{- if eq (floor .) . -}}{{- printf "%.0f" . -}}{{- else -}}{{- toString . -}}{{- end -}}
{{- else -}}
{{- toString . -}}
{{- end -}}
{{- end -}}

{{/* What no schema can say. */}}
{{- define "safer.validate" -}}
{{- $open := or .Values.api.metricsPublic .Values.monitoring.key.secretName -}}
{{- $jobs := and .Values.worker.gpu.enabled (eq .Values.worker.mode "scaledjob") -}}
{{- if and .Values.monitoring.serviceMonitor.enabled (not $open) -}}
{{- fail "monitoring.serviceMonitor needs monitoring.key.secretName (an admin's key), or api.metricsPublic: true" -}}
{{- end -}}
{{- if and $jobs (eq .Values.worker.keda.trigger "metrics-api") (not $open) -}}
{{- fail "worker.keda.trigger metrics-api needs monitoring.key.secretName (an admin's key), or api.metricsPublic: true" -}}
{{- end -}}
{{- if and $jobs (eq .Values.worker.keda.trigger "prometheus") (not .Values.worker.keda.prometheusAddress) -}}
{{- fail "worker.keda.trigger prometheus needs worker.keda.prometheusAddress" -}}
{{- end -}}
{{- if gt (int .Values.api.autoscaling.minReplicas) (int .Values.api.autoscaling.maxReplicas) -}}
{{- fail "api.autoscaling.minReplicas is greater than api.autoscaling.maxReplicas" -}}
{{- end -}}
{{- if gt (int .Values.worker.gpu.minJobs) (int .Values.worker.gpu.maxJobs) -}}
{{- fail "worker.gpu.minJobs is greater than worker.gpu.maxJobs" -}}
{{- end -}}
{{- end -}}
