-- The schema of AgentIdP: four tables. PostgreSQL 14 or later.
--
-- It is embedded in the program and applied at every start, under an advisory
-- lock. So everything here must be repeatable, and cheap when there is nothing to
-- do. A service whose role doesn't own the tables only checks that "migrate" has
-- applied this version or a later one; docs/devops has that role. From version 2 on
-- a change only adds, so that the program before does with it; and it raises
-- schemaVersion in store.go.
--
-- Requests go on meanwhile. So each part, up to a line of three dashes, is a
-- transaction of its own that locks one table, the strongest lock first: one that
-- held a table and wanted another would stand against requests that hold the other
-- and want the first. The log comes first, since whose it is says whose all are;
-- and its partitions last, which is all that a start does on this very version.
--
-- Times are UTC with milliseconds, as they are served: what is hashed into the
-- audit chain is what is stored and what is answered.

-- The audit log: one gapless chain of hashes over all partitions (chain.go
-- says how it is computed). A unique key of a partitioned table must hold the
-- partition key; that seq alone is unique, the chain proves.
create table if not exists audit_events (
    event_id    uuid not null, -- holds timestamp and seq, and so needs no index
    seq         bigint not null check (seq > 0),
    "timestamp" timestamptz not null,
    agent_id    uuid, -- whom it concerns
    actor_id    uuid, -- who did it; null for the operator and for who is not known
    action      text not null,
    outcome     text not null check (outcome in ('success', 'failure')),
    ip_address  text not null,
    user_agent  text not null,
    metadata    json not null, -- json, not jsonb: it keeps the bytes that were hashed
    prev_hash   bytea not null check (length(prev_hash) = 32),
    hash        bytea not null check (length(hash) = 32),
    primary key (seq, "timestamp")
) partition by range ("timestamp");
create index if not exists audit_events_timestamp on audit_events ("timestamp");
-- The second counts an agent's tokens of this month, where Redis has lost its quota.
create index if not exists audit_events_agent on audit_events (agent_id, seq);
create index if not exists audit_events_issued on audit_events (agent_id, seq)
    where action = 'token.issued' and outcome = 'success';
create index if not exists audit_events_actor_id on audit_events (actor_id, seq);
-- Any action may be rare. What is most of all is kept small.
create index if not exists audit_events_tokens on audit_events (seq) where action = 'token.issued';
create index if not exists audit_events_action on audit_events (action, seq) where action <> 'token.issued';
create index if not exists audit_events_failure on audit_events (seq) where outcome = 'failure';
-- Since version 6: what was got in somebody's name.
create index if not exists audit_events_subject on audit_events ((metadata ->> 'subject'), seq)
    where metadata ->> 'subject' is not null;
---
-- Until version 4 this was there, and had not all that a page of an agent takes.
drop index if exists audit_events_agent_id;
---
create table if not exists agents (
    agent_id       uuid primary key, -- version 7: sorts by time of registration
    email          text not null check (length(email) <= 255),
    agent_type     text not null check (agent_type in (
        'screener', 'classifier', 'orchestrator', 'extractor',
        'summarizer', 'router', 'monitor', 'custom')),
    version        text not null check (length(version) <= 64),
    capabilities   text[] not null check (cardinality(capabilities) between 1 and 64),
    owner          text not null check (length(owner) between 1 and 128),
    deployment_env text not null check (deployment_env in ('development', 'staging', 'production')),
    status         text not null default 'active' check (status in ('active', 'suspended', 'decommissioned')),
    created_at     timestamptz not null default date_trunc('milliseconds', clock_timestamp()),
    updated_at     timestamptz not null default date_trunc('milliseconds', clock_timestamp())
);
-- Since version 4: where an agent's tokens may go, empty is anywhere; and limits of
-- its own, null is the deployment's. Only where it is missing, since to alter a table
-- is to wait for all who read it.
do $$
begin
    if not exists (select from pg_attribute where attrelid = 'agents'::regclass and attname = 'resources') then
        alter table agents
            add column resources text[] not null default '{}',
            add column rate_limit int check (rate_limit >= 0), -- requests a minute
            add column monthly_token_limit int check (monthly_token_limit >= 0),
            add column token_ttl int check (token_ttl > 0); -- seconds
    end if;
    -- Since version 6: who may act for it by token exchange; and whether its tokens are
    -- bound to a key.
    if not exists (select from pg_attribute where attrelid = 'agents'::regclass and attname = 'proof_required') then
        alter table agents
            add column if not exists delegates text[] not null default '{}',
            add column proof_required boolean not null default false;
    end if;
end $$;
create unique index if not exists agents_email on agents (lower(email));
create index if not exists agents_owner on agents (owner, agent_id);
create index if not exists agents_type on agents (agent_type, agent_id);
create index if not exists agents_status on agents (status, agent_id);
create index if not exists agents_type_and_status on agents (agent_type, status, agent_id);
---
create table if not exists credentials (
    credential_id uuid primary key,
    client_id     uuid not null references agents,
    status        text not null default 'active' check (status in ('active', 'revoked')),
    created_at    timestamptz not null default date_trunc('milliseconds', clock_timestamp()),
    expires_at    timestamptz,
    revoked_at    timestamptz,
    -- The first 16 hex digits of the secret find the one row to compare with.
    secret_prefix text not null check (secret_prefix ~ '^[0-9a-f]{16}$'),
    secret_hash   text not null, -- bcrypt
    -- New with every rotation. Tokens carry it, and are dead where it is another.
    secret_id     uuid not null,
    check ((status = 'revoked') = (revoked_at is not null))
);
-- Since version 4 a credential may be a key or a workload, in place of a secret: its
-- prefix is then a random one, and its hash empty, so that the program before does
-- with it.
do $$
begin
    if not exists (select from pg_attribute where attrelid = 'credentials'::regclass and attname = 'kind') then
        alter table credentials
            add column kind text not null default 'secret' check (kind in ('secret', 'key', 'workload')),
            add column public_key json, -- as a JWK, with its alg
            add column key_thumbprint text, -- RFC 7638
            add column workload json, -- its issuer, subject, and claims if there are any
            add constraint credentials_secret_check check ((kind = 'secret') = (secret_hash <> '')), -- so that the program before rotates no other
            add constraint credentials_workload_check check ((kind = 'workload') = (workload is not null)),
            add constraint credentials_key_check check (num_nulls(public_key, key_thumbprint) = case kind when 'key' then 0 else 2 end);
    end if;
end $$;
create unique index if not exists credentials_key_thumbprint on credentials (key_thumbprint) where status = 'active';
create index if not exists credentials_workload on credentials ((workload ->> 'subject')) where status = 'active';
drop index if exists credentials_keys; -- of version 5
create index if not exists credentials_keys_by_end on credentials
    (client_id, status, coalesce(expires_at, 'infinity'), credential_id) where kind = 'key'; -- since version 7
create unique index if not exists credentials_secret_prefix on credentials (secret_prefix);
create index if not exists credentials_client_id on credentials (client_id, credential_id);
---
-- 0.1.0 kept here whatever was revoked. What it has beside tokens is in the
-- state of credentials and agents too.
do $$
begin
    if exists (select from pg_attribute
        where attrelid = to_regclass('token_revocations') and attname = 'lifted' and not attisdropped)
    then
        delete from token_revocations where kind <> 'token';
        alter table token_revocations rename column id to jti;
        alter table token_revocations
            drop column kind, drop column revision, drop column lifted, drop column in_redis, drop column revoked_at;
        drop sequence token_revocations_revision;
    end if;
end $$;

-- Tokens that were revoked one by one, and assertions that were used, by a digest of
-- their issuer and jti. What else ends a token is the state of its credential and
-- its agent. A row is of no use once what it is of has expired by any clock, and is
-- then deleted.
create table if not exists token_revocations (
    jti        uuid primary key,
    expires_at timestamptz not null
);
create index if not exists token_revocations_expires_at on token_revocations (expires_at);
---
create or replace function audit_events_refuse() returns trigger language plpgsql as $$
begin
    raise exception '% on audit_events is refused: the log is append-only', tg_op
        using errcode = 'insufficient_privilege';
end $$;

-- A partition for this month and each of the next twelve, so that retention is
-- a DROP; behind them a default one, so that no event is ever homeless. Each
-- refuses what the parent refuses, also when it is named directly.
do $$
declare
    first timestamptz := date_trunc('month', now(), 'UTC');
    part  text;
    month timestamptz;
begin
    if to_regclass('audit_events_default') is null then
        create table audit_events_default partition of audit_events default;
    end if;
    for i in 0..12 loop
        month := (first at time zone 'UTC' + make_interval(months => i)) at time zone 'UTC';
        part := 'audit_events_' || to_char(month at time zone 'UTC', 'YYYY_MM');
        if to_regclass(part) is null then
            begin
                execute format('create table %I partition of audit_events for values from (%L) to (%L)',
                    part, month, (month at time zone 'UTC' + interval '1 month') at time zone 'UTC');
            exception when check_violation then
                raise warning '% not made: audit_events_default has events of that month already', part;
            end;
        end if;
    end loop;
    for part in
        select c.relname from pg_class c
        where (c.oid = 'audit_events'::regclass
            or c.oid in (select inhrelid from pg_inherits where inhparent = 'audit_events'::regclass))
          and not exists (select from pg_trigger t
            where t.tgrelid = c.oid and t.tgname = 'append_only' and t.tgenabled = 'A')
    loop
        execute format('create or replace trigger append_only before update or delete or truncate on %I
            for each statement execute function audit_events_refuse()', part);
        -- "always": session_replication_role does not switch it off.
        execute format('alter table %I enable always trigger append_only', part);
    end loop;
end $$;
