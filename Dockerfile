FROM golang:1.26-bookworm AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY *.go schema.sql openapi.yaml ./
RUN CGO_ENABLED=0 go build -trimpath -o /agentidp .

# No shell and nothing else to run.
FROM scratch
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /agentidp /agentidp
USER 65532:65532
EXPOSE 3000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --start-interval=1s CMD ["/agentidp", "healthcheck"]
ENTRYPOINT ["/agentidp"]
