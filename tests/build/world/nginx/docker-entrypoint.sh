#!/bin/sh
set -e
if [ "$1" = check ]; then
  nginx -g "daemon on; error_log stderr crit;"
  exec curl -s http://127.0.0.1:8080/
fi
exec "$@"
