{{- define "safer.pod.security" -}}
automountServiceAccountToken: false
# A service named safer-… would otherwise put variables SAFER_…_PORT into every pod.
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "safer.container.security" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  capabilities:
    drop: [ALL]
  seccompProfile:
    type: RuntimeDefault
{{- end -}}

{{/* Where pods may run. Takes a component's values. */}}
{{- define "safer.pod.scheduling" -}}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Spread over zones and nodes. Takes (dict "root" $ "component" NAME). */}}
{{- define "safer.pod.spread" -}}
topologySpreadConstraints:
  {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "safer.selector" $.root | nindent 8 }}
        app.kubernetes.io/component: {{ $.component }}
  {{- end }}
{{- end -}}

{{/* Scratch disks. Takes (dict "root" $ "spec" VALUES). */}}
{{- define "safer.pod.volumes" -}}
volumes:
  - name: home
    {{- if .spec.homeStorageClass }}
    ephemeral:
      volumeClaimTemplate:
        spec:
          accessModes: [ReadWriteOnce]
          storageClassName: {{ .spec.homeStorageClass }}
          resources:
            requests:
              storage: {{ int .spec.homeGi }}Gi
    {{- else }}
    emptyDir:
      sizeLimit: {{ int .spec.homeGi }}Gi
    {{- end }}
  - name: tmp
    emptyDir:
      sizeLimit: 1Gi
  {{- with .root.Values.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "safer.container.mounts" -}}
volumeMounts:
  - name: home
    mountPath: /var/lib/safer-audit
  - name: tmp
    mountPath: /tmp
  {{- with .Values.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* Labels and annotations of a pod. Takes (dict "root" $ "component" NAME "spec" VALUES "queue" KUEUE-QUEUE). */}}
{{- define "safer.pod.metadata" -}}
labels:
  {{- include "safer.labels" . | nindent 2 }}
  {{- with .queue }}
  kueue.x-k8s.io/queue-name: {{ . }}
  {{- end }}
  {{- with .spec.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .spec.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* The pod of a worker. Takes (dict "root" $ "spec" VALUES "component" NAME "device" DEVICE "queues" QUEUES "once" BOOL). */}}
{{- define "safer.pod.worker" -}}
{{- $worker := .root.Values.worker -}}
{{ include "safer.pod.security" .root }}
serviceAccountName: {{ include "safer.serviceAccount" .root }}
# Time to leave, to write a checkpoint and to give the unit back.
terminationGracePeriodSeconds: {{ add (int $worker.drainSeconds) (int $worker.terminateSeconds) 30 }}
{{- if .once }}
restartPolicy: Never
{{- else }}
{{ include "safer.pod.spread" . }}
{{- end }}
{{- with include "safer.pod.scheduling" .spec | trim }}
{{ . }}
{{- end }}
{{ include "safer.pod.volumes" . }}
containers:
  - name: worker
    image: {{ include "safer.image" (dict "root" .root "image" .root.Values.images.worker) | quote }}
    imagePullPolicy: {{ .root.Values.images.pullPolicy }}
    command: [safer-audit]
    args: [worker, {{ if .once }}--once, {{ end }}--queues, {{ .queues | quote }}]
    env:
      {{- include "safer.env.worker" . | nindent 6 }}
    ports:
      - name: metrics
        containerPort: 9464
        protocol: TCP
    {{- if not .once }}
    startupProbe:
      httpGet: {path: /metrics, port: metrics}
      periodSeconds: 5
      failureThreshold: 60
    livenessProbe:
      httpGet: {path: /metrics, port: metrics}
      periodSeconds: 30
      timeoutSeconds: 10
      failureThreshold: 6
    readinessProbe:
      httpGet: {path: /metrics, port: metrics}
      periodSeconds: 15
      timeoutSeconds: 10
    {{- end }}
    {{- with int $worker.drainSeconds }}
    lifecycle:
      preStop:
        exec:
          command: [sleep, {{ . | quote }}]
    {{- end }}
    resources:
      {{- $extra := dict }}
      {{- if .gpus }}
      {{- $extra = dict .spec.resourceName (.gpus | int | toString) }}
      {{- end }}
      requests:
        {{- toYaml (merge (dict) .spec.resources.requests $extra) | nindent 8 }}
      limits:
        {{- toYaml (merge (dict) .spec.resources.limits $extra) | nindent 8 }}
    {{- include "safer.container.security" .root | nindent 4 }}
    {{- include "safer.container.mounts" .root | nindent 4 }}
{{- end -}}
