#!/bin/sh
# incident.sh: an agent does what it should not. Find out what it did, and cut it off. incident.md is about it.
#
#   sh incident.sh look    changes nothing; collects the evidence
#   sh incident.sh act     suspends the agent, revokes its credentials, proves it on every copy, and collects the evidence
#
# All else comes from the environment, so that no secret is on a command line, which everybody on the machine can read:
#
#   BASE                      the URL of the service, without a slash at the end
#   CLIENT_ID, CLIENT_SECRET  of an operator: an agent with agents:read, agents:write, tokens:read and audit:read, and with
#                             whatever else of the five scopes the agent has that is to be cut off
#   AGENT_ID                  the agent that is to be cut off
#   TOKEN, AGENT_SECRET       a token and a secret of that agent, which are to be dead then; both optional. A token that came
#                             of one of the agent's by exchange will do
#   BASES                     the URLs of all copies, separated by spaces, where each can be reached by itself; BASE if empty
#   SINCE                     a day or time like 2026-11-25T03:00:00Z to read the log from; if empty, all that is served
#   EVIDENCE                  the folder to make; evidence-MODE-TIME if empty
#   DATABASE_URL, ...         the variables of the service. Where DATABASE_URL or DATABASE_URL_FILE is set, the whole log is
#                             exported from the database
#   AGENTIDP                  the program, which exports the log and checks it; agentidp if empty
set -eu
umask 077
export LC_ALL=C
newline='
'

fail() {
	echo "incident.sh: $*" >&2
	exit 1
}

# checked NAME: a variable that goes into a configuration of curl or a URL may have nothing that means something there.
checked() {
	value=
	eval "value=\${$1-}"
	case $value in
	'') fail "$1 is missing" ;;
	*[!]A-Za-z0-9_.:/[-]*) fail "$1 has characters that it should not have" ;;
	esac
}

mode=${1-}
case "$mode $#" in
'look 1' | 'act 1') ;;
*)
	sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
	exit 64
	;;
esac
for name in BASE CLIENT_ID CLIENT_SECRET AGENT_ID; do checked $name; done
for name in TOKEN AGENT_SECRET SINCE; do
	eval "[ -z \"\${$name-}\" ] || checked $name"
done
[ "$AGENT_ID" != "$CLIENT_ID" ] || fail "AGENT_ID is CLIENT_ID: this would cut off yourself"
BASES=${BASES:-$BASE}
for copy in $BASES; do checked copy; done

began=$(date -u +%Y-%m-%dT%H:%M:%SZ)
dir=${EVIDENCE:-evidence-$mode-$(echo "$began" | tr -d :)}
mkdir "$dir"
current='it began'

finish() {
	code=$?
	[ $code = 0 ] || echo "incident.sh: STOPPED at: $current. What is before that in $dir/report.txt is done, nothing after it." >&2
	rm -f "$dir/page" "$dir/pages"
}
trap finish EXIT

# step says what comes next; note, what came of it. Both are the report.
step() {
	current=$1
	echo "$(date -u +%Y-%m-%dT%H:%M:%SZ) $1" | tee -a "$dir/report.txt"
}
note() { echo "    $1" | tee -a "$dir/report.txt"; }

# ask STATUSES [FILE]: sends the request that curl's configuration on standard input describes, and prints the body, or
# writes it to a file, as it must where it is long. It fails where the status is none of these. A 429 or 503 is tried again
# when the service says.
ask() {
	answer=$(curl -q -sS --retry 8 --max-time 60 -o "${2:--}" -w '\n%{http_code}' -K -) || fail "no answer"
	status=${answer##*"$newline"}
	answer=${answer%"$newline"*}
	answer=${answer%"$newline"}
	answer=${answer##*"$newline"} # what was tried again is before it, and ours is one line
	case " $1 " in
	*" $status "*) [ -n "${2-}" ] || printf '%s\n' "$answer" ;;
	*)
		[ -z "${2-}" ] || answer=$(head -c 1000 "$2")
		case $status in
		2*) answer= ;; # it may have a token
		esac
		fail "the answer is $status, and not $1. $answer"
		;;
	esac
}

as_client() { printf 'url = "%s/api/v1/token%s"\nuser = "%s:%s"\n' "$1" "$2" "$3" "$4"; }
as_operator() { printf 'url = "%s/api/v1%s"\nheader = "Authorization: Bearer %s"\n' "$1" "$2" "$operator"; }

sign_in() {
	answer=$({ as_client "$BASE" '' "$CLIENT_ID" "$CLIENT_SECRET" && echo 'data = "grant_type=client_credentials"'; } | ask 200)
	operator=$(printf '%s' "$answer" | sed -n 's/.*"access_token":"\([^"]*\)".*/\1/p')
	[ -n "$operator" ] || fail "there is no token in the answer"
}

# introspect COPY TOKEN
introspect() {
	{ as_client "$1" /introspect "$CLIENT_ID" "$CLIENT_SECRET" && printf 'data = "token=%s"\n' "$2"; } | ask 200
}

# events HEAD FILE: reads the log up to this seq into a file, one event a line; SINCE is found by halving.
events() {
	before=-1 next=${SINCE:+$1}
	next=${next:-0}
	while [ $((next - before)) -gt 1 ]; do
		middle=$(((before + next) / 2))
		as_operator "$BASE" "/audit?limit=1&after=$middle" | ask '200 400' "$dir/page" # 400 is of before what is served
		at=$(sed -n 's/.*"timestamp":"\([^"]*\)".*/\1/p' "$dir/page")
		if [ -n "$at" ] && expr "$at" '>=' "${SINCE%Z}" >/dev/null; then next=$middle; else before=$middle; fi
	done
	pages=0
	: >"$dir/pages"
	while [ "${next%-*}" -lt "$1" ]; do
		[ $((pages % 50)) != 0 ] || sign_in # a long reading may outlive a token
		as_operator "$BASE" "/audit?limit=1000&after=$next" | ask 200 "$dir/page"
		sed -e 's/^{"data":\[//' -e 's/\],"next":"[^"]*"}$//' -e 's/},{"eventId":/}\
{"eventId":/g' "$dir/page" >>"$dir/pages"
		next=$(sed -n 's/.*\],"next":"\([^"]*\)"}$/\1/p' "$dir/page")
		pages=$((pages + 1))
	done
	awk -F '[:,]' -v head="$1" '$4 <= head' "$dir/pages" >"$2"
}

# summary FILE: how many events of which kind, from where, and from when to when. Fields are what stands between quotes.
summary() {
	note "$(wc -l <"$1" | tr -d ' ') events in ${1##*/}"
	awk -F '"' '{
		for (i = 6; $i != "action" && i < NF; i++);
		count[$(i + 2) " " $(i + 6) " from " $(i + 10)]++
		at = $(NF - 9)
		if (NR == 1 || at < first) first = at
		if (at > last) last = at
	}
	END {
		for (what in count) print count[what], "of", what | "sort -k 3"
		close("sort -k 3")
		if (NR) print "the first at " first "\nthe last at " last
	}' "$1" | while read -r line; do note "$line"; done
}

step "$mode: agent $AGENT_ID at $BASE; by $CLIENT_ID"
sign_in
as_operator "$BASE" "/agents/$AGENT_ID" | ask 200 >"$dir/agent-before.json"
note "it is $(sed -n 's/.*"email":"\([^"]*\)".*"status":"\([^"]*\)".*/\1, \2/p' "$dir/agent-before.json")"
if [ -n "${TOKEN-}" ]; then
	was=$(introspect "$BASE" "$TOKEN")
	case $was in
	'{"active":true,'*"\"sub\":\"$AGENT_ID\""* | '{"active":true,'*"\"client_id\":\"$AGENT_ID\""*)
		note "TOKEN is a token of this agent, or came of one, and alive"
		;;
	'{"active":false}') note "TOKEN is dead already, or no token: that it is dead later proves nothing" ;;
	*) fail "TOKEN is another agent's" ;;
	esac
fi

if [ "$mode" = act ]; then
	step "suspends the agent: its tokens are dead with the answer, on every copy, and it gets no more"
	{
		as_operator "$BASE" "/agents/$AGENT_ID"
		printf 'request = "PATCH"\nheader = "Content-Type: application/json"\ndata = "{\\"status\\":\\"suspended\\"}"\n'
	} | ask '200 409' >"$dir/agent-after.json"
	grep -q -e '"status":"suspended"' -e AGENT_ALREADY_DECOMMISSIONED "$dir/agent-after.json" || fail "it is not suspended"
	note "done"
fi

step "lists its credentials$([ "$mode" = look ] || echo ', and revokes those that are active')"
page=1 total=1
while [ $(((page - 1) * 100)) -lt "$total" ]; do
	as_operator "$BASE" "/agents/$AGENT_ID/credentials?limit=100&page=$page" | ask 200 "$dir/credentials-$page.json"
	total=$(sed -n 's/.*"total":\([0-9]*\),.*/\1/p' "$dir/credentials-$page.json")
	active=$(tr '{' '\n' <"$dir/credentials-$page.json" | sed -n 's/^"credentialId":"\([^"]*\)".*"status":"active".*/\1/p')
	for id in $active; do
		if [ "$mode" = act ]; then
			{ as_operator "$BASE" "/agents/$AGENT_ID/credentials/$id" && echo 'request = "DELETE"'; } | ask '204 409' >/dev/null
			note "revoked $id"
		else
			note "active: $id"
		fi
	done
	page=$((page + 1))
done

for copy in $BASES; do
	step "asks the copy $copy"
	is=$(introspect "$copy" "$operator")
	case $is in
	'{"active":true,'*) ;;
	*) fail "$copy does not know the operator's token, so what it says of others proves nothing" ;;
	esac
	is=$(as_operator "$copy" "/agents/$AGENT_ID" | ask 200)
	is=$(printf '%s' "$is" | sed -n 's/.*"status":"\([^"]*\)".*/\1/p')
	note "the agent is $is"
	[ "$mode $is" != 'act active' ] || fail "$copy has the agent active"
	if [ -n "${TOKEN-}" ]; then
		is=$(introspect "$copy" "$TOKEN")
		case $mode$is in
		*'{"active":false}') note "TOKEN is dead" ;;
		look*) note "TOKEN is alive" ;;
		*) fail "TOKEN is ALIVE on $copy" ;;
		esac
	fi
	if [ "$mode" = act ] && [ -n "${AGENT_SECRET-}" ]; then # in look, a good one would get a token
		{ as_client "$copy" '' "$AGENT_ID" "$AGENT_SECRET" && echo 'data = "grant_type=client_credentials"'; } | ask '401 403' >/dev/null
		note "AGENT_SECRET gets no token"
	fi
done

printf 'url = "%s/.well-known/jwks.json"\n' "$BASE" | ask 200 "$dir/jwks.json"
if [ -n "${DATABASE_URL-}${DATABASE_URL_FILE-}" ]; then
	step "exports the log from the database, which checks all of it"
	"${AGENTIDP:-agentidp}" audit-export >"$dir/log.jsonl" || fail "the export failed: if it says that the log was altered, keep the database as it is"
	sed -n '$s/^{"checkpoint":"\([^"]*\)"}$/\1/p' "$dir/log.jsonl" >"$dir/checkpoint.txt"
else
	step "has the end of the log verified, and reads it up to there, as far as it is served${SINCE:+, from $SINCE on}"
	sign_in
	as_operator "$BASE" /audit/verify | ask 200 "$dir/verify.json"
	case $(head -c 17 "$dir/verify.json") in
	'{"verified":true,') note "verified: $(sed -n 's/.*"fromSeq":\([0-9]*\),"events":\([0-9]*\),.*"headSeq":\([0-9]*\).*/\2 events, from seq \1 to \3/p' "$dir/verify.json")" ;;
	*) fail "the log was ALTERED: $dir/verify.json has the first bad seq. Keep the database as it is" ;;
	esac
	sed -n 's/.*"checkpoint":"\([^"]*\)".*/\1/p' "$dir/verify.json" >"$dir/checkpoint.txt"
	events "$(sed -n 's/.*"headSeq":\([0-9]*\).*/\1/p' "$dir/verify.json")" "$dir/log.jsonl"
	[ ! -s "$dir/log.jsonl" ] || sed 's/.*/{"checkpoint":"&"}/' "$dir/checkpoint.txt" >>"$dir/log.jsonl"
fi
if [ ! -s "$dir/log.jsonl" ]; then
	note "there are no events of that time"
elif command -v "${AGENTIDP:-agentidp}" >/dev/null; then
	step "checks what it has of the log, as anybody can"
	"${AGENTIDP:-agentidp}" verify-audit --file "$dir/log.jsonl" --jwks "$dir/jwks.json" >"$dir/page" || fail "log.jsonl is not what the service signed"
	sed '/^checkpoint/d; s/^/    /' "$dir/page" | tee -a "$dir/report.txt"
else
	note "log.jsonl is NOT checked: there is no ${AGENTIDP:-agentidp} here; incident.md says how it is"
fi

step "lists what concerns the agent"
sed -n "/^{\"eventId\":\"[^\"]*\",\"seq\":[0-9]*,\"agentId\":\"$AGENT_ID\"/p" "$dir/log.jsonl" >"$dir/concerns.jsonl"
summary "$dir/concerns.jsonl"
sed -n "/\"actorId\":\"$AGENT_ID\"/p" "$dir/log.jsonl" >"$dir/did.jsonl"
note "what the agent itself did, also to others:"
summary "$dir/did.jsonl"
sed -n "/\"action\":\"token.issued\",\"outcome\":\"success\"/{
/\"subject\":\"$AGENT_ID\"/p
/\"act\":{\"sub\":\"[^\"]*\",\"act\":.*\"sub\":\"$AGENT_ID\"/p
}" "$dir/log.jsonl" >"$dir/handed.jsonl"
note "who got tokens by what it handed out:"
summary "$dir/handed.jsonl"
sed -n 's/.*"actorId":"\([^"]*\)".*"scope":"[^"]*","subject":"\([^"]*\)".*/\1 in the name of \2/p' "$dir/handed.jsonl" | sort | uniq -c |
	while read -r count who; do note "$count by $who"; done

step "ends$([ "$mode" = look ] || echo ': the agent is cut off')"
rm -f "$dir/page" "$dir/pages"
sum=$(command -v sha256sum || echo shasum -a 256)
# shellcheck disable=SC2086 # one word or three
(cd "$dir" && $sum -- *.json *.jsonl *.txt >SHA256SUMS && echo "The evidence is in $dir. Write this down elsewhere: $($sum SHA256SUMS)")
