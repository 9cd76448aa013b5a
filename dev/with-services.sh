#!/bin/sh
# with-services.sh [--durable | --keep DIR] CMD...
#
# Runs CMD with DATABASE_URL and REDIS_URL set, and starts a PostgreSQL or a Redis where one of them is not set yet, on
# unix sockets in a private folder. TMPDIR is in there too. When CMD and all that it started have ended, however they
# did, the servers are stopped and the folder is removed.
#
#   (no option)  The database is removed too, and written without fsync: for tests.
#   --durable    It is removed too, but is in /var/tmp and written with fsync: for benchmarks.
#   --keep DIR   It is kept in DIR, for the next run. Redis has nothing that is worth keeping.
#
# with-services.sh --install PACKAGE... installs Debian packages if this user may. None of their services is started
# now; those of PostgreSQL, Redis and rsyslog start with the machine, as Debian has it.
#
# Without --keep, the programs of both are in PATH, installed if need be, also where both URLs are set: tests start
# further servers of their own.
#
# CMD takes the place of this script, so signals, standard input and the exit status are its own. A supervisor in a
# session of its own reads a FIFO whose writing end is held by CMD and by what CMD starts. End of file tells it that
# all of them are gone, also after kill -9. Should the supervisor be killed, the kernel ends the servers, and the next
# run removes the folder.
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
	policy=/usr/sbin/policy-rc.d # whatever asks it whether to start a service, 101 means no
	if [ ! -e $policy ] || grep -q with-services $policy; then
		trap 'rm -f $policy' EXIT
		trap 'exit 130' INT
		trap 'exit 143' HUP TERM
		printf '#!/bin/sh\n# with-services.sh is installing packages\nexit 101\n' >$policy
		chmod 755 $policy
	fi
	set -- env DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 apt-get install -q -y --no-install-recommends \
		-o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "$@"
	"$@" </dev/null >&2 || { # a fresh machine has no package lists
		apt-get update -q </dev/null >&2
		"$@" </dev/null >&2
	}
}

# find_postgres sets pgbin: the kept database's version, or the one in PATH, or the newest.
find_postgres() {
	for p in "/usr/lib/postgresql/$version/bin/initdb" "$(readlink -f "$(command -v postgres)")" \
		$(find /usr/lib/postgresql/*/bin -name initdb 2>/dev/null | sort -rV); do
		pgbin=${p%/*}
		[ ! -x "$pgbin/initdb" ] || return 0
	done
	return 1
}

find_redis() { redis=$(command -v redis-server || command -v valkey-server); }

# own gives a folder of root's away, since PostgreSQL refuses root.
own() {
	if [ "$(stat -c %u "$1")" = 0 ]; then
		chown "$(id -un postgres 2>/dev/null || echo nobody):" "$1"
	fi
}

# as_owner becomes CMD, run by the owner of $dir/run. CMD gets the signal when this shell's parent dies.
as_owner() {
	signal=$1
	shift
	if [ "$(id -u)" = 0 ]; then
		set -- --reuid="$(stat -c %u "$dir/run")" --regid="$(stat -c %g "$dir/run")" --clear-groups -- "$@"
	fi
	exec setpriv --pdeathsig="$signal" "$@"
}

# private_folder sets dir to a new folder in the first place that is usable for sockets, a URL and the servers' user. It
# is locked for as long as one of its processes lives. One that is not is removed: its supervisor was killed.
private_folder() {
	for place; do
		case $place in
		*[!A-Za-z0-9/._-]*) continue ;;
		esac
		[ "${#place}" -le 60 ] && [ -w "$place" ] || continue
		exec 7<"$place"
		flock -w 60 7 || say "another holds the lock of $place" # so that none is removed between being made and being locked
		for old in "$place"/agentidp-services.*; do
			if [ -d "$old" ] && [ ! -L "$old" ] && [ -r "$old" ] && (exec 6<"$old" && flock -n 6); then rm -rf "$old"; fi
		done
		dir=$(mktemp -d "$place/agentidp-services.XXXXXX")
		exec 6<"$dir" 7<&-
		flock 6
		chmod 711 "$dir" # what is in there is private by itself
		mkdir -m 700 "$dir/run"
		if [ -d "$data/postgres" ]; then chown --reference="$data/postgres" "$dir/run"; else own "$dir/run"; fi
		if (cd / && as_owner TERM test -w "$dir/run"); then
			return
		fi
		rm -r "$dir"
	done
	say "no private folder could be made in: $*"
	exit 1
}

# open_kept sets data to a folder whose lock is ours for as long as one of its servers lives.
open_kept() {
	if [ -e "$1" ] && { [ ! -w "$1" ] || [ ! -x "$1" ]; }; then
		say "$1 is not writable. Another user made it?"
		exit 1
	fi
	(umask 077 && mkdir -p "$1")
	data=$(cd "$1" && pwd -P)
	if [ ! -e "$data/services.lock" ] && [ -n "$(ls -A "$data")" ]; then
		say "$1 holds something else. Choose a new folder."
		exit 1
	fi
	chmod 700 "$data"
	exec 8>>"$data/services.lock"
	if ! flock -w 5 8; then # the last run may be stopping
		say "$1 is in use by another run, of pid $(cat "$data/services.lock"). Stop that one, or set DATABASE_URL and REDIS_URL to share its servers."
		exit 1
	fi
	echo $$ >"$data/services.lock"
	version=$(cat "$data/postgres/PG_VERSION" 2>/dev/null || :)
}

# A kept folder may lie in a home that is closed to the servers' user, so they get theirs as an open file.
run_initdb() {
	exec 5<"$data/initdb"
	set -- -D /proc/self/fd/5 -U agentidp -E UTF8 --locale=C -A trust
	[ "$mode" = keep ] || set -- "$@" --no-sync
	as_owner TERM "$pgbin/initdb" "$@"
}

run_postgres() {
	exec 5<"$data/postgres"
	set -- -D /proc/self/fd/5 -c max_connections=200 -c listen_addresses= -c port=5432 -c unix_socket_directories="$dir/run"
	[ "$mode" != fast ] || set -- "$@" -c fsync=off -c full_page_writes=off
	as_owner "$end" "$pgbin/postgres" "$@"
}

run_redis() {
	as_owner TERM "$redis" - <<-EOF
		port 0
		unixsocket $dir/run/redis.sock
		unixsocketperm 700
		save ""
		databases 64
		maxmemory-policy noeviction
	EOF
}

# start starts a server, sets pid, and returns when its log says that it is ready.
start() {
	: >"$dir/$1.log"
	"run_$1" </dev/null >>"$dir/$1.log" 2>&1 3<&- &
	pid=$!
	tries=3000 # a minute, should a crash have left much to recover
	until grep -q 'eady to accept connections' "$dir/$1.log"; do
		tries=$((tries - 1))
		if [ "$tries" = 0 ] || ! kill -0 "$pid" 2>/dev/null; then
			say "$1 did not start. Its log ends:"
			tail -n 20 "$dir/$1.log" >&2
			return 1
		fi
		sleep 0.02
	done
}

start_postgres() {
	if [ ! -e "$data/postgres" ]; then
		rm -rf "$data/initdb"
		mkdir "$data/initdb"
		chown --reference="$dir/run" "$data/initdb"
		if ! (run_initdb) >"$dir/initdb.log" 2>&1 3<&-; then
			say "initdb failed. Its log ends:"
			tail -n 20 "$dir/initdb.log" >&2
			return 1
		fi
		mv "$data/initdb" "$data/postgres"
	fi
	# We hold the lock, and so would a living server: what is left is from a crash.
	rm -f "$data/postgres/postmaster.pid"
	start postgres
}

supervise() {
	mode=$1 dir=$2 data=$3 pgbin=$4 redis=$5 postgres_pid='' redis_pid='' pid=''
	# The end of a kept database is a clean one. Another is quick, and leaves no shared memory.
	[ "$mode" = keep ] && end=INT || end=QUIT
	trap '' HUP INT QUIT TERM PIPE
	exec 3<"$dir/life" 9>&-
	rm -f "$dir/life"
	cd /
	umask 077
	export LC_ALL=C
	if { [ -z "$pgbin" ] || start_postgres && postgres_pid=$pid; } && { [ -z "$redis" ] || start redis && redis_pid=$pid; }; then
		echo ready || :      # nobody listens if CMD is gone already
		exec >/dev/null 2>&1 # or 'CMD | cat' would wait for us
		read -r _ <&3 || :
	fi
	[ -z "$redis_pid" ] || kill -s KILL "$redis_pid" || :
	if [ -n "$postgres_pid" ]; then
		kill -s "$end" "$postgres_pid" || :
		timeout 60 tail -s 0.05 --pid="$postgres_pid" -f /dev/null || kill -s KILL "$postgres_pid" || :
	fi
	[ -z "$pid" ] || kill -s KILL "$pid" 2>/dev/null || : # one that was never ready
	rm -rf "$dir"
}

self=$(readlink -f "$0")
mode=fast version='' data=''
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
	# shellcheck disable=SC2086 # one or two words
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

if [ $mode = durable ]; then
	private_folder /var/tmp
	say "servers on disk and with fsync, in $dir ($(stat -f -c %T "$dir"))"
else
	private_folder "${TMPDIR:-/tmp}" /tmp
fi
mkdir -m 755 "$dir/tmp"
mkfifo -m 600 "$dir/life"
exec 9<>"$dir/life" # for both ways, since that never waits
ready=$(setsid sh "$self" --supervise "$mode" "$dir" "${data:-$dir}" "$pgbin" "$redis" &)
[ -n "$ready" ] || exit 1
export TMPDIR="$dir/tmp"
[ -z "$need_postgres" ] || export DATABASE_URL="postgres:///postgres?host=$dir/run&port=5432&user=agentidp"
[ -z "$need_redis" ] || export REDIS_URL="unix://$dir/run/redis.sock?db=0"
exec "$@" 8>&-
