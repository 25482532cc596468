{{- define "imds-agent.chart" -}}
{{ .Values.nameOverride | default .Chart.Name }}
{{- end }}

{{- define "imds-agent.name" -}}
{{- $name := include "imds-agent.chart" . }}
{{- $whole := printf "%s-%s" .Release.Name $name }}
{{- .Values.fullnameOverride | default (ternary .Release.Name $whole (contains $name .Release.Name)) | trunc 63 | trimSuffix "-" }}
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

{{/* Probe of the kubelet, which runs in the node's network namespace. */}}
{{- define "imds-agent.probe" -}}
httpGet:
  host: {{ if has .Values.metrics.address (list "0.0.0.0" "::") }}127.0.0.1{{ else }}{{ .Values.metrics.address }}{{ end }}
  port: {{ .Values.metrics.port }}
{{- end }}

{{/* Image of the agent. */}}
{{- define "imds-agent.image" -}}
{{- with .Values.image }}
{{- with $.Values.global.imageRegistry | default .registry }}{{ . }}/{{ end }}
{{- if .digest }}{{ printf "%s@%s" .repository .digest }}{{ else }}{{ printf "%s:%s" .repository (.tag | default $.Chart.AppVersion) }}{{ end }}
{{- end }}
{{- end }}

{{/* Inline table of TOML with the members of a map, whose values are strings. */}}
{{- define "imds-agent.inlineTable" -}}
{{- $members := list }}
{{- range $key, $value := . }}
{{- $members = append $members (printf "%s = %s" (toJson $key) (toJson $value)) }}
{{- end -}}
{ {{ join ", " $members }} }
{{- end }}

{{/* Configuration file. */}}
{{- define "imds-agent.config" -}}
mode = {{ .Values.config.mode | quote }}
on_deny = {{ .Values.config.onDeny | quote }}
on_deny_errno = {{ .Values.config.onDenyErrno | quote }}
provider = {{ .Values.config.provider | quote }}

[hooks]
{{- range $hook, $on := .Values.config.hooks }}
{{ $hook }} = {{ toJson $on }}
{{- end }}

{{- if kindIs "slice" .Values.config.nodeAllow }}

[node]
allow = {{ toJson .Values.config.nodeAllow }}
{{- end }}

[metrics]
listen = [{{ include "imds-agent.listen" . | quote }}]
program_run_time = {{ .Values.metrics.programRunTime | default false }}
{{- with .Values.config.events }}
{{- if .sinks }}

[events]
verdicts = {{ toJson .verdicts }}
{{- range .sinks }}

[[events.sinks]]
{{- range $key, $value := . }}
{{ $key }} = {{ if kindIs "map" $value }}{{ include "imds-agent.inlineTable" $value }}{{ else }}{{ toJson $value }}{{ end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

[kubernetes]
enabled = {{ ternary "yes" "no" .Values.kubernetes.enabled | quote }}
{{- with .Values.config.rules }}

{{ . }}
{{- end }}
{{- end }}
