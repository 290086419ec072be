-- What pages show at a glance. None of these indexes holds what a renewal changes, so renewals stay HOT updates.
-- The latest ends.
create index history_by_end on history (ended_at);

-- Users that are quarantined: few among many, counted once a second for pages that are open.
create index locks_quarantined on locks (pool_id) where quarantine is not null;

-- Logins by how they begin, whatever the database's collation is. The index that keeps logins unique does that, too,
-- with the login in front: one more index would make imports 8 % slower.
create unique index users_by_login on users (login text_pattern_ops, project_id, env);

alter table users drop constraint "a login is unique within a project and env";

alter index users_by_login rename to "a login is unique within a project and env";
