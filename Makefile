GO = go
BENCH =
CLIENTS =
FUZZTIME = 30s
TESTFLAGS =
ANSWERS = $(CURDIR)/answers.jsonl
METRICS = $(CURDIR)/metrics.prom

# Recipes end in exec, so that Ctrl-C, or a SIGTERM sent to make, reaches the program itself. Should make be killed, the kernel
# tells the program.
tied = $(if $(shell command -v setpriv),setpriv --pdeathsig $(1) --)

# The tests erase what they find, so they get no DATABASE_URL and REDIS_URL but those meant for tests.
services = DATABASE_URL="$$TEST_DATABASE_URL" REDIS_URL="$$TEST_REDIS_URL"; export DATABASE_URL REDIS_URL; \
	exec $(call tied,TERM) ./dev/with-services.sh
for_tests = sh -c 'export TEST_DATABASE_URL="$$DATABASE_URL" TEST_REDIS_URL="$$REDIS_URL"; \
	unset DATABASE_URL REDIS_URL; exec "$$@"' sh

# The go command doesn't pass a SIGTERM on to the test program, so that is tied to it.
go_test = $(GO) test $(if $(shell command -v setpriv),-exec "$(call tied,KILL)")

# The race detector, but for bcrypt, which computes with what is its own, and takes ten times as long with it.
race = -race -gcflags=golang.org/x/crypto/blowfish=-race=false

# Tests at once: two more than there are cores, since some only wait.
parallel = $(shell expr $$(nproc) + 2)

help: ## list these
	@sed -n 's/^\([a-z]*\):[^#]*## /make \1	/p' Makefile | expand -t 17

run: ## start everything on http://localhost:3000, and print a client and a curl line for a token
	@exec $(call tied,TERM) ./dev/run.sh

# RACE has the tests in test/ start the program built with the race detector, but for the most part not where they kill it. Their
# own part is clients, which would take more than twice as long with it. All tests, not some, leave a record of the answers for
# 'make openapi', and metrics of a busy copy for 'make promtool'.
test: gcc ## run all tests with the race detector (TESTFLAGS='-run Token -v' for some)
	@$(services) $(for_tests) $(go_test) $(race) -shuffle=on $(TESTFLAGS) .
	@$(services) $(for_tests) env RACE=1 ANSWERS="$(if $(TESTFLAGS),,$(ANSWERS))" METRICS="$(if $(TESTFLAGS),,$(METRICS))" \
		$(go_test) -shuffle=on -parallel $(parallel) -timeout 60m $(TESTFLAGS) ./test
	@cd verify && exec $(go_test) -race -shuffle=on $(TESTFLAGS) ./...

$(ANSWERS): $(wildcard *.go) schema.sql
	@$(MAKE) test TESTFLAGS=

openapi: $(ANSWERS) ## hold openapi.yaml, and every answer in the tests, to each other
	@$(GO) run -C acceptance/openapi . "$(CURDIR)/openapi.yaml" "$(ANSWERS)"

$(METRICS): $(ANSWERS)
	@test -e $@ || $(MAKE) test TESTFLAGS=

promtool: $(METRICS) ## hold the metrics of a copy in the tests, and the alert rules, to Prometheus's own checker
	@command -v promtool >/dev/null || ./dev/with-services.sh --install prometheus
	@promtool check rules docs/devops/alerts.yml
	@promtool test rules docs/devops/alerts_test.yml
	@promtool check metrics <"$(METRICS)"

soak: gcc ## run the tests of the program at their full length, then each fuzz target (FUZZTIME=30s)
	@$(services) $(for_tests) env SOAK=1 RACE=1 $(go_test) -shuffle=on -timeout 90m $(TESTFLAGS) ./test
	@$(MAKE) fuzz

acceptance: ## drive the program with clients that others wrote, by npm and apt too (CLIENTS='nginx jose' for some)
	@exec $(call tied,TERM) ./acceptance/run.sh $(CLIENTS)

bench: ## measure the service under load, on servers that write to disk (BENCH='-only Token -time 5'; -h lists these)
	@$(services) --durable $(for_tests) $(GO) run ./bench $(BENCH)

fuzz: ## run each fuzz target for FUZZTIME=30s
	@$(services) $(for_tests) sh -ec 'for f in $$($(GO) test -list ^Fuzz . | grep ^Fuzz); do \
		$(call tied,TERM) $(go_test) -run ^- -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) .; done'

lint: ## gofmt, go vet, staticcheck
	@files=$$(gofmt -l .) && test -z "$$files" || { echo "gofmt would change: $$files" >&2; exit 1; }
	@for module in . verify; do (cd $$module && $(GO) vet ./... && \
		$(GO) tool -modfile="$(CURDIR)/dev/tools/go.mod" staticcheck ./...) || exit 1; done

vuln: ## ask the Go vulnerability database about what is used here
	@$(GO) tool -modfile=dev/tools/go.mod govulncheck ./...

build: ## build ./agentidp: the same bytes wherever it is built, with this Go and of this commit
	@CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=$(if $(wildcard .git),true,false) -o agentidp .

# The second clone is built without what was built before.
deployment: ## build two clones, which must be the same bytes, and check the systemd unit and the script for incidents
	@set -e; dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; revision=$$(git rev-parse --short=12 HEAD); \
		for clone in one another/place; do git clone -q . "$$dir/$$clone"; done; \
		$(MAKE) -s -C "$$dir/one" build; GOCACHE="$$dir/cache" $(MAKE) -s -C "$$dir/another/place" build; \
		cmp "$$dir/one/agentidp" "$$dir/another/place/agentidp"; \
		"$$dir/one/agentidp" -version | grep -F "$$revision" || { echo "-version does not say $$revision" >&2; exit 1; }
	@if command -v systemd-analyze >/dev/null; then \
		out=$$(systemd-analyze security --no-pager --offline=true --threshold=25 docs/devops/agentidp.service) || { echo "$$out"; exit 1; }; \
		echo "$$out" | tail -n 1; else echo "no systemd-analyze here: the unit is not checked"; fi
	@if command -v shellcheck >/dev/null; then shellcheck docs/devops/incident.sh; else echo "no shellcheck here: incident.sh is not checked"; fi

# The race detector needs a C compiler, and the operator's pages curl.
gcc:
	@command -v $(GO) >/dev/null || { echo "Go is needed (go.mod has the version), and '$(GO)' is not on PATH" >&2; exit 69; }
	@set -- $$($(GO) env CC); command -v "$$1" >/dev/null || ./dev/with-services.sh --install gcc libc6-dev
	@command -v curl >/dev/null || ./dev/with-services.sh --install curl

.PHONY: help run test openapi promtool soak acceptance bench fuzz lint vuln build deployment gcc
