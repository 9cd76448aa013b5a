#!/bin/sh
# run.sh [PART OF A NAME]...
#
# What 'make acceptance' does: drives the program with clients and resource servers that others wrote, all of them or
# those whose name has one of these parts. What is built is kept in acceptance/.build.
set -eu
cd "$(dirname "$0")/.."

say() { echo "acceptance: $*" >&2; }

for need in go node npm curl; do
	command -v $need >/dev/null || {
		say "$need is needed, and not on PATH"
		exit 69
	}
done

# Debian's packages, by a file of each.
missing=
while read -r package file; do
	[ -e "$file" ] || missing="$missing $package"
done <<-EOF
	nginx /usr/sbin/nginx
	libnginx-mod-http-js /usr/lib/nginx/modules/ngx_http_js_module.so
	haproxy /usr/sbin/haproxy
	apache2-bin /usr/sbin/apache2
	libapache2-mod-oauth2 /usr/lib/apache2/modules/mod_oauth2.so
	python3-requests /usr/lib/python3/dist-packages/requests/__init__.py
	python3-authlib /usr/lib/python3/dist-packages/authlib/__init__.py
EOF
# shellcheck disable=SC2086 # words
[ -z "$missing" ] || ./dev/with-services.sh --install $missing

build=acceptance/.build
mkdir -p $build
if ! cmp -s acceptance/node/package-lock.json acceptance/node/node_modules/.acceptance; then
	say "installing what acceptance/node/package-lock.json pins"
	npm ci --prefix acceptance/node --no-fund --no-audit >&2
	cp acceptance/node/package-lock.json acceptance/node/node_modules/.acceptance
fi
say "building"
go build -o "$build/agentidp.$$" .
mv "$build/agentidp.$$" $build/agentidp
go build -C acceptance/go -o "../../$build/acceptance.$$" .
mv "$build/acceptance.$$" $build/acceptance
go build -C acceptance/kubernetes -o "../../$build/kubernetes.$$" .
mv "$build/kubernetes.$$" $build/kubernetes

# The agents of each run are registered in a database of its own.
unset DATABASE_URL REDIS_URL
exec ./dev/with-services.sh $build/acceptance "$PWD/$build/agentidp" "$@"
