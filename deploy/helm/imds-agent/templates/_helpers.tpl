{{- define "imds-agent.chart" -}}
{{ .Values.nameOverride | default .Chart.Name }}
{{- end }}

{{- define "imds-agent.name" -}}
{{- $name := include "imds-agent.chart" . }}
{{- $whole := printf "%s-%s" .Release.Name $name }}
{{- .Values.fullnameOverride | default (ternary .Release.Name $whole (contains $name .Release.Name)) | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* Name of the Job that checks the configuration, whose pods have it in a label of at most 63 characters. */}}
{{- define "imds-agent.configCheck" -}}
{{ include "imds-agent.name" . | trunc 50 | trimSuffix "-" }}-config-check
{{- end }}

{{- define "imds-agent.selector" -}}
app.kubernetes.io/name: {{ include "imds-agent.chart" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "imds-agent.labels" -}}
{{ include "imds-agent.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "imds-agent.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (include "imds-agent.name" .) }}
{{- end }}

{{- define "imds-agent.listen" -}}
{{ if contains ":" .Values.metrics.address }}[{{ .Values.metrics.address }}]{{ else }}{{ .Values.metrics.address }}{{ end }}:{{ .Values.metrics.port }}
{{- end }}

{{/* Probe of the kubelet, which runs in the node's network namespace. Arguments: the root context, the path, the settings. */}}
{{- define "imds-agent.probe" -}}
{{- $metrics := (index . 0).Values.metrics }}
{{- $host := ternary "127.0.0.1" $metrics.address (has $metrics.address (list "0.0.0.0" "::")) }}
{{- $get := dict "httpGet" (dict "host" $host "port" $metrics.port "path" (index . 1)) }}
{{- toYaml (merge $get (index . 2)) }}
{{- end }}

{{- define "imds-agent.isLocal" -}}
{{- if has .Values.metrics.address (list "127.0.0.1" "::1" "localhost") }}true{{ end }}
{{- end }}

{{/* Endpoint of a PodMonitor or ServiceMonitor with these settings. */}}
{{- define "imds-agent.scrape" -}}
- port: metrics
  path: /metrics
  interval: {{ .interval }}
  relabelings:
    # Job name that the alerts and the dashboard expect.
    - targetLabel: job
      replacement: imds-agent
    - sourceLabels: [__meta_kubernetes_pod_node_name]
      targetLabel: node
{{- end }}

{{/* Image of the agent. */}}
{{- define "imds-agent.image" -}}
{{- with .Values.image }}
{{- with $.Values.global.imageRegistry | default .registry }}{{ . }}/{{ end }}
{{- if .digest }}{{ printf "%s@%s" .repository .digest }}{{ else }}{{ printf "%s:%s" .repository (.tag | default $.Chart.AppVersion) }}{{ end }}
{{- end }}
{{- end }}

{{/* Configuration file. Numbers of values are floats, also whole ones, which TOML tells apart. */}}
{{- define "imds-agent.config" -}}
{{- $metrics := dict "listen" (list (include "imds-agent.listen" .)) "program_run_time" .Values.metrics.programRunTime }}
{{- $kubernetes := dict "enabled" .Values.kubernetes.enabled "events" .Values.kubernetes.events "node_condition" .Values.kubernetes.nodeCondition }}
{{- $config := merge (dict "metrics" $metrics "kubernetes" $kubernetes) .Values.config }}
{{- /* An empty list would forbid rules in extraConfig. */}}
{{- $config = empty .Values.config.exempt | ternary (omit $config "exempt") $config }}
{{- regexReplaceAll "(?m)^(\\s*\\w+ = -?[0-9]+)\\.0$" (toToml $config) "${1}" | trim }}
{{- with .Values.extraConfig }}

{{ . | trim }}
{{- end }}
{{- end }}
