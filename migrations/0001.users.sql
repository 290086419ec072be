-- Test users, and the pools that they form.
-- A user's identity (who, where, labels, password) changes seldom and is indexed for look-ups; what
-- changes with every lock stands in a narrow row of its own (0002), so that taking a lock touches
-- none of these indexes.
create table pools (
    id integer generated always as identity primary key,
    project_id uuid not null,
    env text not null,
    domain text not null,
    constraint "a pool is one project, env and domain" unique (project_id, env, domain)
);

create table users (
    id uuid primary key,
    created_at timestamptz not null default clock_timestamp(),
    project_id uuid not null,
    env text not null,
    domain text not null,
    login text not null,
    labels jsonb not null default '{}',
    secret text not null,
    constraint "a login is unique within a project and env" unique (project_id, env, login),
    constraint "labels are an object" check (jsonb_typeof(labels) = 'object'),
    -- Prevents a clear password from ever being stored by mistake: see Passwords in botfarm.py.
    constraint "a secret is sealed or hashed" check (secret ~ '^\$(aes-256-gcm|argon2id)\$')
);

-- Lists read oldest first, of everything or of one project, and page by key.
create index users_by_age on users (created_at, id);

create index users_by_project_and_age on users (project_id, created_at, id);
