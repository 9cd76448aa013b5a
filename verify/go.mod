module agentidp/verify

go 1.26.0
