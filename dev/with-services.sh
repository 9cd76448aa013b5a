#!/bin/sh
# with-services.sh [--durable | --keep DIR] CMD...
#
# Runs CMD with DATABASE_URL and REDIS_URL set, and starts a PostgreSQL or a Redis where one of them is not set yet.
#
#   (no option)  Thrown away afterwards: unix sockets in a private folder, in memory if there is room, no fsync.
#   --durable    Thrown away too, but on disk and with fsync, as a benchmark must have it.
#   --keep DIR   Kept in DIR, and found there by the next run: loopback, free ports, random passwords, fsync.
#
# with-services.sh --install PACKAGE... installs Debian packages if this user may, and starts none of their services.
#
# Without --keep, the programs of both are in PATH, installed if need be, also where both URLs are set: tests start
# further servers of their own.
#
# CMD takes the place of this script, so signals, standard input and the exit status are its own. A supervisor in a
# session of its own reads a FIFO whose writing end is held by CMD and by what CMD starts. End of file tells it that
# all of them are gone, also after kill -9. Then it stops the servers.
set -eu

say() { echo "with-services.sh: $*" >&2; }

# give_up REASON PACKAGE...
give_up() {
	reason=$1
	shift
	case " $*" in
	*' postgresql'* | *' redis-server'*) or=", or set DATABASE_URL and REDIS_URL, or use 'docker compose up'" ;;
	*) or= ;;
	esac
	say "$* needed, and $reason. Have them installed (apt-get install $*)$or."
	exit 69
}

install() {
	command -v apt-get >/dev/null || give_up "there is no apt-get here" "$@"
	if [ "$(id -u)" != 0 ]; then
		sudo -n true 2>/dev/null || give_up "this user may not install packages" "$@"
		exec sudo -n sh "$self" --install "$@"
	fi
	say "installing $* with apt-get"
	exec 7</etc/apt
	flock 7 # another copy may be installing
	trap restore EXIT
	trap 'exit 130' INT
	trap 'exit 143' HUP TERM

	# Whatever asks this file, 101 means that the service must not be started.
	if [ -e "$policy" ] && ! grep -q with-services "$policy"; then
		mv "$policy" "$policy.with-services"
	fi
	printf '#!/bin/sh\n# with-services.sh is installing packages\nexit 101\n' >"$policy"
	chmod 755 "$policy"

	case " $* " in
	*' postgresql '*)
		apt postgresql-common
		[ -e "$cluster.with-services" ] || cp -p "$cluster" "$cluster.with-services"
		echo 'create_main_cluster = false' >>"$cluster"
		;;
	esac
	new=
	for service in redis-server prometheus; do
		command -v $service >/dev/null || new="$new $service"
	done
	apt "$@"
	if command -v systemctl >/dev/null; then
		for service in $new; do
			systemctl --quiet disable "$service" 2>/dev/null || : # nor at the next start of the machine
		done
	fi
}

policy=/usr/sbin/policy-rc.d
cluster=/etc/postgresql-common/createcluster.conf

restore() {
	rm -f "$policy"
	for f in "$policy" "$cluster"; do
		[ ! -e "$f.with-services" ] || mv -f "$f.with-services" "$f"
	done
}

apt() {
	set -- env DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 apt-get install -q -y --no-install-recommends \
		-o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "$@"
	"$@" </dev/null >&2 || { # a fresh machine has no package lists
		apt-get update -q </dev/null >&2
		"$@" </dev/null >&2
	}
}

# find_postgres sets pgbin: the kept data's version, or the one in PATH, or the newest.
find_postgres() {
	pgbin=
	if [ -n "$version" ] && [ -x "/usr/lib/postgresql/$version/bin/initdb" ]; then
		pgbin=/usr/lib/postgresql/$version/bin
	elif p=$(command -v postgres) && p=$(readlink -f "$p") && [ -x "${p%/*}/initdb" ]; then
		pgbin=${p%/*}
	else
		newest=0
		for p in /usr/lib/postgresql/*/bin/initdb; do
			v=${p#/usr/lib/postgresql/}
			v=${v%%[!0-9]*}
			if [ -x "$p" ] && [ "$v" -gt "$newest" ]; then
				newest=$v
				pgbin=${p%/*}
			fi
		done
	fi
	[ -n "$pgbin" ]
}

find_redis() { redis=$(command -v redis-server || command -v valkey-server); }

# own gives a folder of root's away, since PostgreSQL refuses root.
own() {
	if [ "$(stat -c %u "$1")" = 0 ]; then
		chown "$(id -un postgres 2>/dev/null || echo nobody):" "$1"
	fi
}

# as_owner becomes CMD, run by the owner of $dir. CMD gets the signal when this shell's parent dies.
as_owner() {
	signal=$1
	shift
	if [ "$(id -u)" = 0 ]; then
		set -- --reuid="$(stat -c %u "$dir")" --regid="$(stat -c %g "$dir")" --clear-groups -- "$@"
	fi
	exec setpriv --pdeathsig="$signal" "$@"
}

# private_folder sets dir to a new folder in the first place that is usable for sockets, a URL and the servers' user.
private_folder() {
	for place; do
		case $place in
		*[!A-Za-z0-9/._-]*) continue ;;
		esac
		[ "${#place}" -le 60 ] || continue
		dir=$(mktemp -d "$place/agentidp.XXXXXX" 2>/dev/null) || continue
		own "$dir"
		if (cd / && as_owner TERM test -w "$dir"); then
			return
		fi
		rmdir "$dir"
	done
	say "no private folder could be made in: $*"
	exit 1
}

# open_kept sets dir to a folder whose lock is ours for as long as one of its servers lives.
open_kept() {
	if [ -e "$1" ] && { [ ! -w "$1" ] || [ ! -x "$1" ]; }; then
		say "$1 is not writable. Another user made it?"
		exit 1
	fi
	(umask 077 && mkdir -p "$1")
	dir=$(cd "$1" && pwd -P)
	if [ ! -e "$dir/services.lock" ] && [ -n "$(ls -A "$dir")" ]; then
		say "$1 holds something else. Choose a new folder."
		exit 1
	fi
	chmod 700 "$dir"
	own "$dir"
	exec 8>>"$dir/services.lock"
	if ! flock -w 5 8; then # the last run may be stopping
		say "$1 is in use by another run. Stop that one, or set DATABASE_URL and REDIS_URL to share its servers."
		exit 1
	fi
	version=$(cat "$dir/postgres/PG_VERSION" 2>/dev/null || :)
}

random_port() { echo $(($(od -An -N2 -tu2 /dev/urandom) % 12000 + 20000)); } # below the ports of outgoing connections

# A kept folder may lie in a home that is closed to the servers' user, so they get theirs as an open file.
run_initdb() {
	set -- -D /proc/self/fd/5 -U agentidp -E UTF8 --locale=C
	case $mode in
	keep) set -- "$@" -A scram-sha-256 --pwfile=/proc/self/fd/5/../password ;;
	*) set -- "$@" -A trust --no-sync ;;
	esac
	as_owner TERM "$pgbin/initdb" "$@"
}

run_postgres() {
	set -- -D /proc/self/fd/5 -c max_connections=200
	case $mode in
	keep) as_owner INT "$pgbin/postgres" "$@" -c listen_addresses=127.0.0.1 -c port="$port" \
		-c unix_socket_directories= ;;
	fast) set -- "$@" -c fsync=off -c full_page_writes=off ;;
	esac
	as_owner QUIT "$pgbin/postgres" "$@" -c listen_addresses= -c port=5432 -c unix_socket_directories="$dir"
}

run_redis() {
	case $mode in
	# The one moment to save is a clean end. An older dump would bring back what was deleted since.
	keep) set -- "bind 127.0.0.1" "port $port" "requirepass $password" "save 1000000000 1" ;;
	*) set -- "port 0" "unixsocket $dir/redis.sock" "unixsocketperm 700" 'save ""' ;;
	esac
	cd "$dir/redis"
	as_owner TERM "$redis" - <<-EOF
		$(printf '%s\n' "$@")
		databases 64
		appendonly no
		maxmemory-policy noeviction
	EOF
}

# launch starts a server and returns when its log says that it is ready. It sets pid, empty if there is none.
launch() {
	: >"$dir/$1.log"
	"run_$1" </dev/null >>"$dir/$1.log" 2>&1 3<&- 5<"$dir/$1" &
	pid=$!
	tries=3000 # a minute, should a crash have left much to recover
	until grep -q 'eady to accept connections' "$dir/$1.log"; do
		if ! kill -0 "$pid" 2>/dev/null; then
			pid=
			return 1
		fi
		tries=$((tries - 1))
		[ "$tries" -gt 0 ] || return 1
		sleep 0.02
	done
}

start() {
	for _ in 1 2 3 4 5; do
		port=$(random_port)
		launch "$1" && return
		grep -q 'Address already in use' "$dir/$1.log" || break
	done
	say "$1 did not start. Its log ends:"
	tail -n 20 "$dir/$1.log" >&2
	return 1
}

start_postgres() {
	if [ ! -e "$dir/postgres" ]; then
		rm -rf "$dir/initdb"
		mkdir "$dir/initdb"
		chown --reference="$dir" "$dir/initdb"
		if ! (run_initdb) >"$dir/initdb.log" 2>&1 3<&- 5<"$dir/initdb"; then
			say "initdb failed. Its log ends:"
			tail -n 20 "$dir/initdb.log" >&2
			return 1
		fi
		mv "$dir/initdb" "$dir/postgres"
	fi
	# We hold the lock, and so would a living server: what is left is from a crash.
	rm -f "$dir/postgres/postmaster.pid"
	start postgres || return
	case $mode in
	keep) database_url="postgres://agentidp:$password@127.0.0.1:$port/postgres?sslmode=disable" ;;
	*) database_url="postgres:///postgres?host=$dir&port=5432&user=agentidp" ;;
	esac
}

start_redis() {
	if [ ! -e "$dir/redis" ]; then
		mkdir "$dir/redis"
		chown --reference="$dir" "$dir/redis"
	fi
	start redis || return
	rm -f "$dir/redis/dump.rdb"
	case $mode in
	keep) redis_url="redis://default:$password@127.0.0.1:$port/0" ;;
	*) redis_url="unix://$dir/redis.sock?db=0" ;;
	esac
}

start_servers() {
	if [ "$mode" = keep ]; then
		if [ ! -s "$dir/password" ]; then
			od -An -N16 -tx1 /dev/urandom | tr -d ' \n' >"$dir/password"
		fi
		chown -h --reference="$dir" "$dir/password" "$dir/services.lock"
		rm -f "$dir"/*.log
		password=$(cat "$dir/password")
	fi
	if [ -n "$pgbin" ]; then
		start_postgres || return
		postgres_pid=$pid
	fi
	if [ -n "$redis" ]; then
		start_redis || return
		redis_pid=$pid
	fi
}

supervise() {
	mode=$1 dir=$2 pgbin=$3 redis=$4
	postgres_pid='' redis_pid='' pid='' database_url=- redis_url=-
	trap '' HUP INT QUIT TERM PIPE
	exec 3<"$dir/life" 9>&-
	rm -f "$dir/life"
	cd /
	umask 077
	export LC_ALL=C
	if start_servers; then
		echo "$database_url $redis_url" || : # nobody listens if CMD is gone already
		exec >/dev/null 2>&1              # or 'CMD | cat' would wait for us
		read -r _ <&3 || :
	fi
	case $mode in
	keep) signal=INT ;;  # a clean end
	*) signal=QUIT ;;    # a quick one, that leaves no shared memory
	esac
	[ -z "$postgres_pid" ] || kill -s "$signal" "$postgres_pid" || :
	[ -z "$redis_pid" ] || kill "$redis_pid" || :
	[ -z "$pid" ] || kill "$pid" 2>/dev/null || : # one that was never ready
	wait
	[ "$mode" = keep ] || rm -rf "$dir"
}

self=$(readlink -f "$0")
mode=fast version=
case ${1-} in
--supervise | --install)
	do=${1#--}
	shift
	"$do" "$@"
	exit
	;;
--durable)
	mode=durable
	shift
	;;
--keep)
	mode=keep keep=${2-}
	shift
	[ $# = 0 ] || shift
	;;
esac
case ${1--} in
-*)
	sed -n '2,/^[^#]/s/^#[ ]\{0,1\}//p' "$self" >&2
	exit 64
	;;
esac

need_postgres='' need_redis='' missing=''
[ -n "${DATABASE_URL-}" ] || need_postgres=y
[ -n "${REDIS_URL-}" ] || need_redis=y
if [ -n "$need_postgres$need_redis" ]; then
	for p in flock setpriv setsid; do
		command -v $p >/dev/null || give_up "$p is missing" util-linux postgresql redis-server
	done
	[ $mode != keep ] || open_kept "$keep"
fi
# wanted NEED: what is not to be kept is for tests, which start further servers of their own.
wanted() { [ $mode != keep ] || [ -n "$1" ]; }
find_postgres || ! wanted "$need_postgres" || missing=postgresql
find_redis || ! wanted "$need_redis" || missing="$missing redis-server"
if [ -n "$missing" ]; then
	# shellcheck disable=SC2086 # none, one or two words
	(install $missing)
	find_postgres || ! wanted "$need_postgres" || give_up "initdb is not found even now" postgresql
	find_redis || ! wanted "$need_redis" || give_up "it is not found even now" redis-server
fi
PATH=$PATH${pgbin:+:$pgbin} # for what starts servers of its own
export PATH
if [ -z "$need_postgres$need_redis" ]; then
	exec "$@"
fi

if [ -n "$need_postgres" ]; then
	here=$("$pgbin/postgres" -V | sed 's/[^0-9]*\([0-9]*\).*/\1/')
	if [ "${version:-$here}" != "$here" ]; then
		say "$keep holds data of PostgreSQL $version, but this is PostgreSQL $here." \
			"Install postgresql-$version, or move $keep away to begin anew."
		exit 1
	fi
	for v in $(env | sed -n 's/^\(PG[A-Z_]*\)=.*/\1/p'); do
		unset "$v" # they would redirect psql and pgx
	done
else
	pgbin=
fi
[ -n "$need_redis" ] || redis=

case $mode in
fast)
	free=$(df -k --output=avail /dev/shm 2>/dev/null | tail -n 1)
	[ "$((free + 0))" -gt 2000000 ] && memory=/dev/shm || memory= # Docker gives it 64 MB
	# shellcheck disable=SC2086
	private_folder $memory "${TMPDIR:-/tmp}" /tmp
	;;
durable)
	private_folder /var/tmp
	say "servers on disk and with fsync, in $dir ($(stat -f -c %T "$dir"))"
	;;
esac

rm -f "$dir/life"
mkfifo -m 600 "$dir/life"
exec 9<>"$dir/life" # for both ways, since that never waits
urls=$(setsid sh "$self" --supervise "$mode" "$dir" "$pgbin" "$redis" &)
[ -n "$urls" ] || exit 1
[ -z "$need_postgres" ] || export DATABASE_URL="${urls% *}"
[ -z "$need_redis" ] || export REDIS_URL="${urls#* }"
exec "$@" 8>&-
