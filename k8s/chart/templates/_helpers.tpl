{{- define "strictproxy.labels" -}}
app.kubernetes.io/name: strictproxy
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "strictproxy.selector" -}}
app.kubernetes.io/name: strictproxy
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "strictproxy.account" -}}
{{ .Values.serviceAccount.name | default .Release.Name }}
{{- end }}
