#!/bin/sh
# Transcodes a clip, and writes the result beside it.
#
#   client.sh http://HOST[:PORT] CLIP         waits for the answer
#   client.sh -a http://HOST[:PORT] CLIP      the service is asynchronous: submits a task, asks
#                                             about it, fetches the result
#   client.sh -d http://HOST[:PORT] CLIP      the service is not, but this client does not wait:
#                                             strictproxy keeps the request, and the result
set -eu
way=waits
case $1 in
  -a) way=asynchronous; shift ;;
  -d) way=detached; shift ;;
esac
url=$1 clip=$2 out=${2%.*}.small.mp4

case $way in
  waits)
    curl -fsS --data-binary "@$clip" -o "$out" "$url/transcode"
    ;;
  asynchronous)
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
    ;;
  detached)
    # With a key it can be sent again, if the connection breaks, and is one job all the same.
    location=$(curl -fsS --retry 5 --data-binary "@$clip" -H "Idempotency-Key: $(cksum "$clip" | tr ' ' -)" \
      -H "Prefer: respond-async" -o /dev/null -D - "$url/transcode" |
      sed -n 's/^[Ll]ocation: *\([^[:space:]]*\).*/\1/p')
    while :; do
      state=$(curl -fsS --retry 5 -H "Prefer: wait=60" "$url$location")
      case $state in
        *'"state": "queued"'* | *'"state": "running"'*) ;;
        *) break ;;
      esac
    done
    curl -fsS -o "$out" "$url$location/result"
    ;;
esac
echo "$out"
