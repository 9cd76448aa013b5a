#!/bin/sh
# run.sh: what 'make run' does. Everything it makes is kept in .run, which may be deleted to begin anew.
set -eu
cd "$(dirname "$0")/.."

say() { echo "run.sh: $*" >&2; }

# pass_on copies the server's log, and prints the client once requests are accepted. It outlives Ctrl-C to copy the
# last lines, and ends with the server. Where nobody can read them any more, the server ends too.
pass_on() {
	trap '' HUP INT TERM PIPE
	while IFS= read -r line; do
		printf '%s\n' "$line" >&2 || :
		case $line in
		*'"msg":"serving"'*)
			[ ! -s "$client" ] || show_client
			break
			;;
		esac
	done
	cat >&2 || {
		kill $$
		exec cat >/dev/null
	}
}

# hang_up ends the server with its terminal. By itself the server would take a signal for one to read its keys again, and
# where make leads the session it gets none.
hang_up() {
	trap '' HUP INT TERM
	until timeout 1 tail -s 0.2 --pid=$$ -f /dev/null; do
		[ -z "$terminal" ] || [ -t 2 ] || kill $$ || :
	done
}

show_client() {
	# Not its "url", which is what ISSUER says.
	address=$(printf '%s\n' "$line" | sed -n 's/.*"address":"\([^"]*\)".*/\1/p')
	case $address in
	127.0.0.1:* | 0.0.0.0:* | '[::]:'*) address=localhost:${address##*:} ;;
	esac
	user=$(sed -n 's/^client_id: //p' "$client"):$(sed -n 's/^client_secret: //p' "$client")
	cat "$client"
	echo "curl -s -u $user -d grant_type=client_credentials http://${address:-localhost:${PORT:-3000}}/api/v1/token"
}

# serve runs inside with-services.sh and becomes the server.
serve() {
	client=$1 terminal=$2
	if [ ! -s "$client" ]; then
		if .run/agentidp bootstrap first-agent@example.com >"$client.$$"; then
			mv "$client.$$" "$client"
		else
			rm -f "$client.$$"
			say "no client of this database is known here, so none is shown"
		fi
	fi
	for name in DATABASE_URL REDIS_URL JWT_PRIVATE_KEY JWT_PRIVATE_KEY_FILE JWT_PUBLIC_KEY JWT_PUBLIC_KEY_FILE ISSUER PORT HOST; do
		eval "value=\${$name-}"
		[ -z "$value" ] || printf "%s='%s'\n" "$name" "$(printf %s "$value" | sed "s/'/'\\\\''/g")"
	done >.run/env
	hang_up &
	mkfifo ".run/log.$$"
	pass_on <".run/log.$$" &
	exec 2>".run/log.$$"
	rm -f ".run/log.$$"
	exec .run/agentidp
}

if [ "${1-}" = serve ]; then
	serve "$2" "$3"
fi
[ -t 2 ] && terminal=y || terminal=

mkdir -p -m 700 .run
command -v go >/dev/null || {
	say "Go is needed (go.mod has the version), and 'go' is not on PATH"
	exit 69
}
say "building .run/agentidp, which takes a minute where nothing is compiled yet"
go build -o ".run/agentidp.$$" .
mv ".run/agentidp.$$" .run/agentidp # another copy may be running
umask 077

if [ -z "${DATABASE_URL-}" ] && [ -n "${DATABASE_URL_FILE-}" ]; then
	DATABASE_URL=$(cat "$DATABASE_URL_FILE")
	export DATABASE_URL
	unset DATABASE_URL_FILE
fi
if [ -z "${REDIS_URL-}" ] && [ -n "${REDIS_URL_FILE-}" ]; then
	REDIS_URL=$(cat "$REDIS_URL_FILE")
	export REDIS_URL
	unset REDIS_URL_FILE
fi
if [ -n "${DATABASE_URL-}" ]; then
	say "using the PostgreSQL of DATABASE_URL"
	client=.run/first-agent-$(printf %s "$DATABASE_URL" | cksum | cut -d' ' -f1)
else
	say "using a private PostgreSQL, kept in .run/data"
	client=.run/first-agent
	[ -e .run/data/services.lock ] || rm -f "$client" # its database was deleted
fi
if [ -n "${REDIS_URL-}" ]; then
	say "using the Redis of REDIS_URL"
else
	say "using a private Redis, kept in .run/data"
fi

if [ -z "${JWT_PRIVATE_KEY-}${JWT_PRIVATE_KEY_FILE-}" ]; then
	if [ ! -s .run/jwt.pem ]; then
		say "making a development key, kept in .run/jwt.pem"
		.run/agentidp keygen >".run/jwt.$$"
		mv ".run/jwt.$$" .run/jwt.pem
	fi
	export JWT_PRIVATE_KEY_FILE="$PWD/.run/jwt.pem"
fi

case ${LOG_LEVEL-} in
[Dd]*) ;;
*) export LOG_LEVEL=info ;; # higher ones leave out the line that this script waits for
esac
export HOST="${HOST-127.0.0.1}" DRAIN_TIME="${DRAIN_TIME-0}" # there is no balancer to wait for
say "will listen on ${HOST:-all addresses}, port ${PORT:-3000} (HOST and PORT change that). Ctrl-C stops everything."
exec ./dev/with-services.sh --keep .run/data ./dev/run.sh serve "$client" "$terminal"
