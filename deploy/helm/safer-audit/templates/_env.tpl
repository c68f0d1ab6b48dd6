{{/* A variable from a secret, or nothing where no secret is named. Takes (dict "name" NAME "from" {secretName, secretKey}). */}}
{{- define "safer.env.secret" -}}
{{- if .from.secretName -}}
- name: {{ .name }}
  valueFrom:
    secretKeyRef:
      name: {{ .from.secretName }}
      key: {{ .from.secretKey }}
{{- end -}}
{{- end -}}

{{- define "safer.env.database" -}}
- name: SAFER_HOME
  value: /var/lib/safer-audit
{{ include "safer.env.secret" (dict "name" "SAFER_DATABASE_URL" "from" .Values.database) }}
{{- end -}}

{{/* What API and workers share. */}}
{{- define "safer.env.shared" -}}
{{- $store := .Values.store -}}
{{ include "safer.env.database" . }}
{{ include "safer.env.secret" (dict "name" "SAFER_BROKER_URL" "from" .Values.broker) }}
- name: SAFER_STORE_URL
  value: {{ $store.url | quote }}
- name: SAFER_S3_REGION
  value: {{ $store.region | quote }}
{{- range $name, $value := dict "SAFER_S3_ENDPOINT" $store.endpoint "SAFER_S3_SSE" $store.sse "SAFER_S3_KMS_KEY" $store.kmsKey }}
{{- if $value }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}
{{- with $store.credentials }}
{{- if .secretName }}
{{ include "safer.env.secret" (dict "name" "SAFER_S3_ACCESS_KEY" "from" (dict "secretName" .secretName "secretKey" .accessKey)) }}
{{ include "safer.env.secret" (dict "name" "SAFER_S3_SECRET_KEY" "from" (dict "secretName" .secretName "secretKey" .secretKey)) }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "safer.env.settings" -}}
{{- range $name, $value := .Values.settings }}
- name: SAFER_{{ upper $name }}
  value: {{ include "safer.plain" $value | quote }}
{{- end }}
{{- end -}}

{{- define "safer.env.extra" -}}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "safer.env.api" -}}
{{- $home := int64 .Values.api.homeGi -}}
{{ include "safer.env.shared" . }}
{{ include "safer.env.secret" (dict "name" "SAFER_SECRET_PEPPER" "from" .Values.pepper) }}
{{- if .Values.callbackSecret.secretName }}
{{ include "safer.env.secret" (dict "name" "SAFER_CALLBACK_SECRET" "from" .Values.callbackSecret) }}
{{- end }}
- name: SAFER_HOST
  value: {{ .Values.api.host | quote }}
- name: SAFER_PORT
  value: {{ .Values.api.port | int | quote }}
- name: SAFER_ALLOWED_HOSTS
  value: {{ include "safer.hosts" . | quote }}
{{- with .Values.api.publicUrl | default (.Values.api.ingress.enabled | ternary (printf "https://%s" .Values.api.ingress.host) "") }}
- name: SAFER_PUBLIC_URL
  value: {{ . | quote }}
{{- end }}
- name: SAFER_METRICS_PUBLIC
  value: {{ .Values.api.metricsPublic | quote }}
- name: SAFER_PRESIGN
  value: {{ .Values.store.presign | quote }}
- name: SAFER_ARTIFACT_CACHE_BYTES
  value: {{ div (mul $home 1073741824) 2 | quote }}
{{- include "safer.env.settings" . }}
{{- include "safer.env.extra" . }}
{{- end -}}

{{/* Takes (dict "root" $ "spec" VALUES "device" DEVICE). */}}
{{- define "safer.env.worker" -}}
{{- $home := mul (int64 .spec.homeGi) 1073741824 -}}
{{ include "safer.env.shared" .root }}
{{- if .root.Values.hubToken.secretName }}
{{ include "safer.env.secret" (dict "name" "SAFER_HUB_TOKEN" "from" .root.Values.hubToken) }}
{{- end }}
{{- if .root.Values.labellerKey.secretName }}
{{ include "safer.env.secret" (dict "name" "SAFER_LABELLER_API_KEY" "from" .root.Values.labellerKey) }}
{{- end }}
- name: SAFER_DEVICE
  value: {{ .device | quote }}
{{- if .root.Values.worker.gpu.enabled }}
- name: SAFER_PRECISION_DEVICE
  value: cuda
{{- end }}
- name: SAFER_METRICS_PORT
  value: "9464"
- name: SAFER_TERMINATE_SECONDS
  value: {{ .root.Values.worker.terminateSeconds | int | quote }}
- name: SAFER_WORKER_MEMORY_BYTES
  value: {{ div (mul (include "safer.bytes" .spec.resources.limits.memory | int64) 9) 10 | quote }}
- name: SAFER_CACHE_BYTES
  value: {{ div (mul $home 4) 10 | quote }}
- name: SAFER_ARTIFACT_CACHE_BYTES
  value: {{ div (mul $home 3) 10 | quote }}
- name: HF_HOME
  value: /var/lib/safer-audit/cache/hub
# torch would otherwise start a thread for every core of the node.
- name: OMP_NUM_THREADS
  valueFrom:
    resourceFieldRef:
      resource: limits.cpu
{{- include "safer.env.settings" .root }}
{{- include "safer.env.extra" .root }}
{{- end -}}
