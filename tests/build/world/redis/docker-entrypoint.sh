#!/bin/sh
set -e
if [ "$1" = 'redis-server' ] && [ "$(id -u)" = '0' ]; then
	find . \! -user redis -exec chown redis '{}' +
	exec setpriv --reuid redis --regid redis --clear-groups "$0" "$@"
fi
if [ "$1" = check ]; then
	redis-server --port 0 --unixsocket /tmp/r --daemonize yes > /dev/null
	until redis-cli -s /tmp/r ping > /dev/null 2>&1; do sleep 0.1; done
	redis-cli -s /tmp/r set a b
	exec redis-cli -s /tmp/r get a
fi
exec "$@"
