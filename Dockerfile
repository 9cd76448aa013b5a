FROM golang:1.26-bookworm AS build
WORKDIR /src
ENV CGO_ENABLED=0
COPY go.mod go.sum ./
# Layers keep what seldom changes, so that any builder builds the rest in seconds.
RUN go mod download && go build -trimpath net/http \
	github.com/jackc/pgx/v5/pgxpool github.com/redis/go-redis/v9 golang.org/x/crypto/bcrypt
COPY . .
# The program has the commit in it. To git, what .dockerignore leaves out is no change of it.
RUN if [ -d .git ]; then git ls-files -dz | xargs -0r git update-index --skip-worktree; fi
RUN go build -trimpath -o /agentidp .

# A shell and psql beside the program, for the service "setup" of docker-compose.yml.
FROM postgres:17 AS setup
RUN install -d -o 65532 -g 65532 /secrets /redis
COPY --from=build /agentidp /usr/local/bin/
USER 65532:65532
WORKDIR /secrets
ENTRYPOINT ["sh", "-euc"]

# No shell and nothing else to run.
FROM scratch
LABEL org.opencontainers.image.title=AgentIdP
LABEL org.opencontainers.image.description="An identity provider for AI agents"
LABEL org.opencontainers.image.licenses=Apache-2.0
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /agentidp /agentidp
USER 65532:65532
EXPOSE 3000
HEALTHCHECK --interval=3s --timeout=5s --start-period=60s CMD ["/agentidp", "healthcheck"]
ENTRYPOINT ["/agentidp"]
