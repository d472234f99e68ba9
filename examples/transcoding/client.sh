#!/bin/sh
# Transcodes a clip, and writes the result beside it.
#
#   client.sh http://HOST[:PORT] CLIP         waits for the answer
#   client.sh -a http://HOST[:PORT] CLIP      submits a task, asks about it, fetches the result
set -eu
asynchronous=
[ "$1" = -a ] && { asynchronous=yes; shift; }
url=$1 clip=$2 out=${2%.*}.small.mp4

if [ -z "$asynchronous" ]; then
  curl -fsS --data-binary "@$clip" -o "$out" "$url/transcode"
else
  id=$(curl -fsS --data-binary "@$clip" "$url/submit" | sed 's/.*"task_id": *"\([^"]*\)".*/\1/')
  while :; do
    state=$(curl -fsS "$url/status/$id")
    case $state in
      *finished*) break ;;
      *failed*) echo "this is no clip" >&2; exit 1 ;;
    esac
    sleep 0.5
  done
  curl -fsS -o "$out" "$url/result/$id"
fi
echo "$out"
